"""Skew generators, dense or in factors, and their action on a batch of matrices.

A generator made from a gradient-like S is A_in = SᵀW − WᵀS and A_out = WSᵀ − SWᵀ (the descent
direction: minus the published G_in, G_out). Both have the form U Vᵀ − V Uᵀ, so where W is wide the
right one need never be formed: X A_in = (X Sᵀ) W − (X Wᵀ) S, and likewise where it is tall.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .. import kernels
from ..config import Side
from .precision import exact

Matmul = Callable[[Tensor, Tensor], Tensor]


class Generator(Protocol):
    """A skew generator that multiplies a batch [B, m, n] from its own side."""

    def apply(self, x_Bmn: Tensor, *, matmul: Matmul) -> Tensor:
        """X A for the in side, A X for the out side."""


@dataclass(frozen=True)
class Dense:
    """A generator as its matrix: [B, n, n] for the in side, [B, m, m] for the out side."""

    side: Side
    matrix: Tensor

    def apply(self, x_Bmn: Tensor, *, matmul: Matmul) -> Tensor:
        """X A for the in side, A X for the out side."""
        return matmul(x_Bmn, self.matrix) if self.side == "in" else matmul(self.matrix, x_Bmn)

    def mapped(self, function: Callable[[Tensor, Tensor], Tensor], angle: Tensor) -> Dense:
        """``function(A, a)`` in A's place, a [B, 1, 1]: for the orthogonal factor."""
        return Dense(self.side, function(self.matrix, angle))


@dataclass(frozen=True)
class Outer:
    """A generator as U Vᵀ − V Uᵀ: U, V are [B, n, r] for the in side, [B, m, r] for the out."""

    side: Side
    u: Tensor
    v: Tensor

    def apply(self, x_Bmn: Tensor, *, matmul: Matmul) -> Tensor:
        """X A for the in side, A X for the out side."""
        u, v = self.u, self.v
        if self.side == "in":
            return matmul(matmul(x_Bmn, u), v.mT) - matmul(matmul(x_Bmn, v), u.mT)
        return matmul(u, matmul(v.mT, x_Bmn)) - matmul(v, matmul(u.mT, x_Bmn))


def factors(w_Bmn: Tensor, s_Bmn: Tensor, *, side: Side) -> tuple[Tensor, Tensor]:
    """U, V of the generator U Vᵀ − V Uᵀ that S gives at W: views, nothing is computed."""
    return (s_Bmn.mT, w_Bmn.mT) if side == "in" else (w_Bmn, s_Bmn)


def generator(w_Bmn: Tensor, s_Bmn: Tensor, *, side: Side, matmul: Matmul = exact) -> Tensor:
    """The skew generator of S at W.

    Args:
        w_Bmn: weights [B, m, n].
        s_Bmn: gradients, or an average of them, [B, m, n].
        side: ``in`` for SᵀW − WᵀS [B, n, n]; ``out`` for WSᵀ − SWᵀ [B, m, m].
        matmul: the product to use.

    Returns:
        The generator, exactly skew: one product and a transpose-subtract.
    """
    u, v = factors(w_Bmn, s_Bmn, side=side)
    return kernels.skew(matmul(u, v.mT))
