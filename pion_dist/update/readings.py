"""What a step's factors did, measured on the step that is asked for.

A factor E(aA) is not formed. It is applied to vectors: one in the plane that it turns by the
largest angle, which power iteration with A finds, and a fixed one, spread over all planes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..config import Side
from .arrangement import Arrangement
from .generators import Generator
from .precision import Products, exact
from .retraction import Known

COLUMNS = ("orthogonality", "angle", "alpha", "kept", "update_rms")
"""Of the result of ``read``, which has no ``kept``, and of ``read_polar``, which has no ``alpha``.
"""

# With A, to its largest plane. ‖A x‖ of the last one is below ‖A‖₂ by 0.04 and 0.8% for generators
# of random W and G of 256 and 1024 rows, by 1.2 and 0.8% for their matrix signs (measured).
PLANE_PRODUCTS = 32


class Turning(Protocol):
    """Applies a step's orthogonal factors."""

    def __call__(self, x: Tensor, known: Known | None, *, matmul: Products) -> Tensor:
        """The change of X [B, m, n]; ``known`` as for ``rotate``."""


def read(
    change_Bmn: Tensor,
    generators: Sequence[Generator],
    alphas: Sequence[Tensor],
    turnings: Sequence[Turning],
    lies: Arrangement,
    *,
    active: Sequence[Side],
    grads_finite: Tensor,
) -> Tensor:
    """What a step does to each matrix.

    Args:
        change_Bmn: of the weights, or of their shards.
        generators: of the active sides.
        alphas: α [B, 1, 1] of each.
        turnings: each side's factor alone.
        lies: how the matrices lie.
        active: the sides.
        grads_finite: boolean scalar; where it is False nothing moved, and all is 0.

    Returns:
        [B, 5] in float64, the larger of two sides: |‖E x‖² − 1|, largest of the two vectors;
        the angle by which E turns x, radians; α; NaN; root mean square of the change.
    """
    batch, m, n = change_Bmn.shape
    errors, angles = [], []
    for side, a, turned in zip(active, generators, turnings, strict=True):
        length = (n if side == "in" else m) * (lies.shares if lies.cuts(side) else 1)
        start = change_Bmn.new_empty((1, 1, length) if side == "in" else (1, length, 1))
        x = _fixed(start).expand(batch, *start.shape[1:])
        x = lies.share(x, side=side)
        for vector in (x, _in_largest_plane(a, x, lies)):
            moved = turned(vector, None, matmul=exact).double()
            error, angle = _turn(vector.double(), moved, lies)
            errors.append(error)
            angles.append(angle)
    rms = lies.norm(change_Bmn).double() / (lies.shares * m * n) ** 0.5
    nothing = torch.full_like(rms, torch.nan).flatten()
    columns = [_largest(errors), _largest(angles), _largest(alphas), nothing, rms.flatten()]
    found = torch.stack([column.double() for column in columns], -1)
    return torch.where(grads_finite, found, torch.zeros_like(found))


def read_polar(
    change_BLr: Tensor,
    step_BLr: Tensor,
    factors: Sequence[Tensor],
    squares: Sequence[Tensor],
    *,
    numel: int,
    all_reduce_sum: Callable[[Tensor], Tensor],
) -> Tensor:
    """What a polar step does to each matrix.

    Args:
        change_BLr: of the weights times V, or of their rows that this rank has.
        step_BLr: Muon's step D times V, likewise.
        factors: U, or this rank's rows of it, and V, after the step.
        squares: −A², A restricted to U, and −Y², [B, r, r]: the squares of the angles.
        numel: elements of a whole matrix.
        all_reduce_sum: sums over the ranks that divide the rows.

    Returns:
        [B, 5] in float64: the larger of ‖UᵀU − I‖₂ and ‖VᵀV − I‖₂; the largest angle by which U
        and V turn, radians; NaN; the share of Muon's step that is kept, −⟨ΔW, D⟩ / ‖D‖²; root mean
        square of the change.
    """
    grams = [x.double().mT @ x.double() for x in factors]
    grams[0] = all_reduce_sum(grams[0])
    for gram in grams:
        gram.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    errors = torch.stack([_symmetric_norm(gram) for gram in grams]).amax(0)
    angles = torch.stack([_symmetric_norm(x.double()) for x in squares]).amax(0).sqrt()
    change, step = change_BLr.double(), step_BLr.double()
    products = ((change, step), (step, step), (change, change))
    inner, length, moved = all_reduce_sum(torch.stack([(a * b).sum((-2, -1)) for a, b in products]))
    nothing = torch.full_like(inner, torch.nan)
    tiny = torch.finfo(length.dtype).tiny
    kept = -inner / length.clamp_min(tiny)
    return torch.stack([errors, angles, nothing, kept, (moved / numel).sqrt()], -1)


def _symmetric_norm(a: Tensor) -> Tensor:
    """The spectral norm of symmetric matrices [B, r, r], from below, by power iteration: [B]."""
    x = _fixed(a[:1, :, :1]).expand(a.shape[0], -1, 1)
    norm = x.new_zeros(a.shape[0], 1, 1)
    for _ in range(PLANE_PRODUCTS):
        x = a @ x
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        x = x / norm.clamp_min(torch.finfo(norm.dtype).tiny)
    return norm.flatten()


def _turn(x: Tensor, moved: Tensor, lies: Arrangement) -> tuple[Tensor, Tensor]:
    """|‖E x‖² / ‖x‖² − 1| and the angle between x and E x, of x's change: zeros for x = 0.

    Of a triangle of sides 1, r and c the angle φ between the first two has c² = (r − 1)² +
    4 r sin²(φ/2), which is exact to rounding where φ is small too.
    """
    length, tiny = lies.norm(x), torch.finfo(x.dtype).tiny
    ratio = torch.where(length > 0, lies.norm(x + moved) / length.clamp_min(tiny), 1.0)
    chord = lies.norm(moved) / length.clamp_min(tiny)
    sine = (chord.square() - (ratio - 1.0).square()) / (4.0 * ratio.clamp_min(tiny))
    return (ratio.square() - 1.0).abs(), 2.0 * torch.asin(sine.clamp(0.0, 1.0).sqrt())


def _in_largest_plane(a: Generator, x: Tensor, lies: Arrangement) -> Tensor:
    for _ in range(PLANE_PRODUCTS):
        x = a.apply(x, matmul=exact)
        norm = lies.norm(x)
        x = x / norm.clamp_min(torch.finfo(norm.dtype).tiny)
    return x


def _largest(each: Sequence[Tensor]) -> Tensor:
    """Of tensors [B, 1, 1]: [B]."""
    return torch.stack([x.flatten() for x in each]).amax(0)


def _fixed(x: Tensor) -> Tensor:
    """A vector of length 1 in x's shape that depends on its length alone: a chirp, cos(√2 i²).

    Its values are spread as a random vector's are; no weight or gradient has its structure.
    """
    i = torch.arange(max(x.shape[1:]), dtype=torch.float64, device=x.device)
    chirp = torch.cos(math.sqrt(2.0) * i.square())
    unit: Tensor = chirp / torch.linalg.vector_norm(chirp)
    return unit.to(x.dtype).view(x.shape[1:])
