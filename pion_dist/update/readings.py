"""Metrics of a step's orthogonal factors, measured only on the steps that ask for them.

A factor E(aA) is not formed. It is applied to two vectors: one in the plane that it turns by the
largest angle, which power iteration with A finds, and a fixed one that is spread over all planes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..config import Side
from .generators import Generator
from .layout import Layout
from .precision import Products, exact
from .retraction import Known

COLUMNS = ("orthogonality", "angle", "alpha", "kept", "update_rms")
"""Columns of the metrics; ``read`` has no ``kept``, ``read_polar`` no ``alpha`` (NaN)."""

# Products with A that lead to its largest plane. After the last one ‖A x‖ is below ‖A‖₂ by 0.04 and
# 0.8% for generators of random W and G of 256 and 1024 rows, and by 1.2 and 0.8% for their matrix
# signs (measured).
PLANE_PRODUCTS = 32


class Turning(Protocol):
    """Applies a step's orthogonal factors."""

    def __call__(self, x: Tensor, known: Known | None, *, matmul: Products) -> Tensor:
        """Compute the change of X [B, m, n]; ``known`` as for ``rotate``."""


def read(
    change_Bmn: Tensor,
    generators: Sequence[Generator],
    alphas: Sequence[Tensor],
    turnings: Sequence[Turning],
    layout: Layout,
    *,
    active: Sequence[Side],
    grads_finite: Tensor,
) -> Tensor:
    """Measure what a step does to each matrix.

    Args:
        change_Bmn: change of the weights, or of this rank's shards.
        generators: one for each active side.
        alphas: α [B, 1, 1] of each generator.
        turnings: one for each generator, applying its factor alone.
        layout: how the matrices lie over ranks.
        active: the active sides.
        grads_finite: boolean scalar; where it is False nothing moved, and all metrics are 0.

    Returns:
        [B, 5] in float64, with COLUMNS: the largest |‖E x‖² − 1| and the largest angle by which an
        E turns an x, radians, over vectors and sides; the largest α; NaN; root mean square of the
        change.
    """
    batch, m, n = change_Bmn.shape
    errors, angles = [], []
    for side, a, turned in zip(active, generators, turnings, strict=True):
        length = (n if side == "in" else m) * (layout.shares if layout.cuts(side) else 1)
        start = change_Bmn.new_empty((1, 1, length) if side == "in" else (1, length, 1))
        x = _fixed(start).expand(batch, *start.shape[1:])
        x = layout.share(x, side=side)
        for vector in (x, _in_largest_plane(a, x, layout)):
            moved = turned(vector, None, matmul=exact).double()
            error, angle = _turn(vector.double(), moved, layout)
            errors.append(error)
            angles.append(angle)
    rms = layout.norm(change_Bmn).double() / (layout.shares * m * n) ** 0.5
    nothing = torch.full_like(rms, torch.nan).flatten()
    columns = [_largest(errors), _largest(angles), _largest(alphas), nothing, rms.flatten()]
    metrics = torch.stack([column.double() for column in columns], -1)
    return torch.where(grads_finite, metrics, torch.zeros_like(metrics))


def read_polar(
    change_BLr: Tensor,
    step_BLr: Tensor,
    factors: Sequence[Tensor],
    squares: Sequence[Tensor],
    *,
    numel: int,
    all_reduce_sum: Callable[[Tensor], Tensor],
) -> Tensor:
    """Measure what a polar step does to each matrix.

    Args:
        change_BLr: change of the weights times V, or this rank's rows of it.
        step_BLr: Muon's step D times V, or this rank's rows of it.
        factors: U, or this rank's rows of it, and V, after the step.
        squares: −A² restricted to U, and −Y², [B, r, r], whose norms are the angles' squares.
        numel: elements of a whole matrix.
        all_reduce_sum: sums over the ranks that divide the rows.

    Returns:
        [B, 5] in float64, with COLUMNS: the larger of ‖UᵀU − I‖₂ and ‖VᵀV − I‖₂; the largest angle
        by which U and V turn, radians; NaN; the share of Muon's step that is kept,
        −⟨ΔW, D⟩ / ‖D‖²; root mean square of the change.
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
    """Bound the spectral norm of symmetric matrices [B, r, r] from below, by power iteration."""
    x = _fixed(a[:1, :, :1]).expand(a.shape[0], -1, 1)
    norm = x.new_zeros(a.shape[0], 1, 1)
    for _ in range(PLANE_PRODUCTS):
        x = a @ x
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        x = x / norm.clamp_min(torch.finfo(norm.dtype).tiny)
    return norm.flatten()


def _turn(x: Tensor, moved: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Compute |‖E x‖² / ‖x‖² − 1|, and the angle between x and E x, from x's change.

    Both are zero for x = 0. The angle φ between sides 1 and r of a triangle whose third side is c
    follows from c² = (r − 1)² + 4 r sin²(φ/2), which is exact to rounding for a small φ too.
    """
    length, tiny = layout.norm(x), torch.finfo(x.dtype).tiny
    ratio = torch.where(length > 0, layout.norm(x + moved) / length.clamp_min(tiny), 1.0)
    chord = layout.norm(moved) / length.clamp_min(tiny)
    sine = (chord.square() - (ratio - 1.0).square()) / (4.0 * ratio.clamp_min(tiny))
    return (ratio.square() - 1.0).abs(), 2.0 * torch.asin(sine.clamp(0.0, 1.0).sqrt())


def _in_largest_plane(a: Generator, x: Tensor, layout: Layout) -> Tensor:
    for _ in range(PLANE_PRODUCTS):
        x = a.apply(x, matmul=exact)
        norm = layout.norm(x)
        x = x / norm.clamp_min(torch.finfo(norm.dtype).tiny)
    return x


def _largest(each: Sequence[Tensor]) -> Tensor:
    """Take the maximum over tensors [B, 1, 1], for each matrix: [B]."""
    return torch.stack([x.flatten() for x in each]).amax(0)


def _fixed(x: Tensor) -> Tensor:
    """Make a unit vector in x's shape that depends on its length alone: a chirp, cos(√2 i²).

    Its values spread like those of a random vector; no weight or gradient has its structure.
    """
    i = torch.arange(max(x.shape[1:]), dtype=torch.float64, device=x.device)
    chirp = torch.cos(math.sqrt(2.0) * i.square())
    unit: Tensor = chirp / torch.linalg.vector_norm(chirp)
    return unit.to(x.dtype).view(x.shape[1:])
