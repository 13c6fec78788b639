"""Orthogonal factors from skew generators, applied without forming them where that is cheaper.

A polynomial retraction E(A) = sum c_k A^k of degree d takes d products with A:
E(aA)W − W = aA (c_1 W + aA (c_2 W + ... aA c_d W)). It keeps the weights, the generator and two
products in memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .generators import Generator, Matmul

Polynomial = tuple[float, ...]


def coefficients(degree: int) -> Polynomial:
    """Return c_0 .. c_d of exp's Taylor series; for a skew A, E₂ᵀE₂ = I + A⁴/4 exactly."""
    return tuple(1.0 / math.factorial(k) for k in range(degree + 1))


def change(
    x: Tensor,
    generator: Generator,
    angle: Tensor,
    *,
    first_order: Tensor | None,
    poly: Polynomial,
    matmul: Matmul,
) -> Tensor:
    """Compute E(aA)X − X, or X E(aA) − X for the in side.

    Args:
        x: X, [B, m, n].
        generator: A.
        angle: a, [B, 1, 1].
        first_order: A X (or X A) if it is known, else None. (its values are lost)
        poly: coefficients of E.
        matmul: the product to use.

    Returns:
        The change of X, [B, m, n].
    """
    _, *inner, last = poly
    total = first_order if first_order is not None else generator.apply(x, matmul=matmul)
    total.mul_(angle * last)
    for coefficient in reversed(inner):
        total.add_(x, alpha=coefficient)
        total = generator.apply(total, matmul=matmul).mul_(angle)
    return total


Known = Sequence[Tensor | None]
"""Each generator's product with the weights it was made from, or None. (Its values are lost.)"""


def rotate(
    x: Tensor,
    generators: Sequence[Generator],
    angles: Sequence[Tensor],
    known: Known | None,
    *,
    poly: Polynomial,
    matmul: Matmul,
) -> Tensor:
    """Compute the change of X under the factors E(aA) of one or two sides.

    Args:
        x: [B, m, n].
        generators: of different sides, in the order in which they are applied.
        angles: a for each generator, [B, 1, 1].
        known: the generators' products with X, which are known only where X is the weights.
        poly: coefficients of E.
        matmul: the product to use.

    Returns:
        The change of X, [B, m, n].
    """
    total: Tensor | None = None
    for index, (generator, angle) in enumerate(zip(generators, angles, strict=True)):
        term = known[index] if known is not None else None
        now = x
        if total is not None:
            now = x + total
            if term is not None:
                term = term.add_(generator.apply(total, matmul=matmul))
        step = change(now, generator, angle, first_order=term, poly=poly, matmul=matmul)
        total = step if total is None else total.add_(step)
    assert total is not None, "a step has an active side"
    return total


def factor(matrix: Tensor, angle: Tensor, *, retraction: Literal["cayley", "exp"]) -> Tensor:
    """Compute E(aA) − I of a generator's matrix A, for an E that is orthogonal to rounding.

    A product with E itself would also round the part that stays in place. ``cayley`` has
    E = (I − aA/2)⁻¹(I + aA/2) = I + (I − aA/2)⁻¹aA. I − aA/2 is never singular for a skew A, so the
    solver's check, which would wait for the device, is left out.

    Returns:
        [B, d, d].
    """
    a = matrix * angle
    if retraction == "exp":
        e = _exponential(a)
        e.diagonal(dim1=-2, dim2=-1).sub_(1.0)
        return e
    left = (a * -0.5).diagonal_scatter(a.new_ones(a.shape[:-1]), dim1=-2, dim2=-1)
    solved: Tensor
    solved, _ = torch.linalg.solve_ex(left, a, check_errors=False)
    return solved


def _exponential(a: Tensor) -> Tensor:
    """Compute the exponential of each matrix of a batch [B, d, d].

    torch's degree-8 branch for a batch of one has a wrong coefficient (torch 2.13 and before,
    https://github.com/pytorch/pytorch/issues/196592: orthogonality lost by 1.5e-5 at an angle of
    0.5 in float32). An added zero matrix selects the branch for larger batches, at no cost.
    """
    e: Tensor = torch.linalg.matrix_exp(torch.cat((a, torch.zeros_like(a[:1]))))
    return e[:-1]
