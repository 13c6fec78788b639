"""Orthogonal factors from skew generators, applied without forming them where that is cheaper.

A polynomial retraction E(A) = sum c_k A^k of degree d needs d products with A, and the weights, the
generator and two products at a time in memory:
E(aA)W − W = aA (c_1 W + aA (c_2 W + ... aA c_d W)).
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
    """c_0 .. c_d of exp cut at ``degree``; E₂ᵀE₂ = I + A⁴/4 exactly, A skew."""
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
    """E(aA)X − X (or X E(aA) − X).

    Args:
        x: X, [B, m, n].
        generator: A.
        angle: a, [B, 1, 1].
        first_order: A X (or X A), where it is known. (its values are lost)
        poly: coefficients of E.
        matmul: the product to use.

    Returns:
        [B, m, n].
    """
    _, *inner, last = poly
    total = first_order if first_order is not None else generator.apply(x, matmul=matmul)
    total.mul_(angle * last)
    for coefficient in reversed(inner):
        total.add_(x, alpha=coefficient)
        total = generator.apply(total, matmul=matmul).mul_(angle)
    return total


Known = Sequence[Tensor | None]
"""Each generator's product with the weights that it was made at, or None. (Its values are lost.)"""


def rotate(
    x: Tensor,
    generators: Sequence[Generator],
    angles: Sequence[Tensor],
    known: Known | None,
    *,
    poly: Polynomial,
    matmul: Matmul,
) -> Tensor:
    """The product of the factors E(aA) of up to two sides with X, minus X.

    Args:
        x: [B, m, n].
        generators: of different sides, in the order in which they are applied.
        angles: a for each generator, [B, 1, 1].
        known: where X is the weights.
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
    """E(aA) − I of a generator's matrix A, for the factor E that is orthogonal to rounding.

    A product with E itself would round what stays in place too. ``cayley``'s E is
    (I − aA/2)⁻¹(I + aA/2) = I + (I − aA/2)⁻¹aA; I − aA/2 is never singular for a skew A, so the
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
    """The exponential of each matrix of a batch [B, d, d].

    For a batch of one torch's degree-8 branch has a wrong coefficient (torch 2.13 and before,
    https://github.com/pytorch/pytorch/issues/196592: orthogonality lost by 1.5e-5 at an angle of
    0.5 in float32); a zero matrix beside it takes the branch of larger batches, at no cost.
    """
    e: Tensor = torch.linalg.matrix_exp(torch.cat((a, torch.zeros_like(a[:1]))))
    return e[:-1]
