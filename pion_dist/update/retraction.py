"""Orthogonal factors from skew generators, applied without forming them where that is cheaper.

A polynomial retraction E(A) = sum c_k A^k needs only products with A. With the first-order term
D = A·W at hand, E(aA)W − W = a (c_1 D + a A (c_2 D + a A (c_3 D + ...))): degree − 1 products.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .generators import Generator, Matmul
from .precision import float32_precision

Polynomial = tuple[float, ...]


def coefficients(retraction: Literal["taylor", "cubic"], *, degree: int) -> Polynomial:
    """c_0 .. c_d of the polynomial: exp cut at ``degree``, or the orthogonality-matched cubic.

    E₂ᵀE₂ = I + A⁴/4 for Taylor 2; EᵀE = I − A⁶/64 for the cubic (both exact, A skew).
    """
    if retraction == "cubic":
        return (1.0, 1.0, 0.5, 0.125)
    return tuple(1.0 / math.factorial(k) for k in range(degree + 1))


def change(
    first_order: Tensor, generator: Generator, angle: Tensor, *, poly: Polynomial, matmul: Matmul
) -> Tensor:
    """E(aA)X − X (or X E(aA) − X), given the first-order term.

    Args:
        first_order: A X (or X A), narrow.
        generator: A.
        angle: a, [B, 1, 1].
        poly: coefficients of E.
        matmul: the product to use.

    Returns:
        [B, m, n].
    """
    *inner, last = poly[1:]
    total = first_order * last
    for coefficient in reversed(inner):
        total = generator.inner(total, matmul=matmul).mul_(angle)
        total.add_(first_order, alpha=coefficient)
    return generator.widen(total.mul_(angle), matmul=matmul)


def rotate(
    x: Tensor,
    generators: Sequence[Generator],
    angles: Sequence[Tensor],
    first_order: Sequence[Tensor | None],
    *,
    poly: Polynomial,
    matmul: Matmul,
) -> Tensor:
    """The product of the factors E(aA) of up to two sides with X, minus X.

    With Y the first side's change and T = A₂X + A₂Y the second's first-order term, the change is
    Y + (E(a₂A₂) − 1)(X + Y): a side whose first-order term on X is known costs one product less.

    Args:
        x: [B, m, n].
        generators: of different sides, in the order in which they are applied.
        angles: a for each generator, [B, 1, 1].
        first_order: A X for each generator, narrow, or None where it is not known.
        poly: coefficients of E.
        matmul: the product to use.

    Returns:
        The change of X, [B, m, n].
    """
    total: Tensor | None = None
    for generator, angle, known in zip(generators, angles, first_order, strict=True):
        if known is None:
            seen = generator.narrow(x if total is None else x + total, matmul=matmul)
            term = generator.inner(seen, matmul=matmul)
        elif total is None:
            term = known
        else:
            seen = generator.narrow(total, matmul=matmul)
            term = generator.inner(seen, matmul=matmul).add_(known)
        step = change(term, generator, angle, poly=poly, matmul=matmul)
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
    with float32_precision("ieee"):
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
