"""Skew generators, dense or in factors, and their action on a batch of matrices.

A gradient-like S gives the generators A_in = SᵀW − WᵀS and A_out = WSᵀ − SWᵀ (the descent
direction: minus the published G_in, G_out). Both have the form U Vᵀ − V Uᵀ. So A_in of a wide W
need not be formed: X A_in = (X Sᵀ) W − (X Wᵀ) S. The same holds for A_out of a tall W.
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
"""A product of two batches, at either of a step's precisions."""


class Generator(Protocol):
    """A skew generator that multiplies a batch [B, m, n] from its own side."""

    def apply(self, x_Bmn: Tensor, *, matmul: Matmul) -> Tensor:
        """Multiply: X A for the in side, A X for the out side."""


@dataclass(frozen=True)
class Dense:
    """A generator stored as a matrix, [B, n, n] (in side) or [B, m, m] (out side)."""

    side: Side
    matrix: Tensor

    def apply(self, x_Bmn: Tensor, *, matmul: Matmul) -> Tensor:
        """Multiply: X A for the in side, A X for the out side."""
        return matmul(x_Bmn, self.matrix) if self.side == "in" else matmul(self.matrix, x_Bmn)

    def mapped(self, function: Callable[[Tensor, Tensor], Tensor], angle: Tensor) -> Dense:
        """Replace A by ``function(A, a)``, such as its orthogonal factor, with a [B, 1, 1]."""
        return Dense(self.side, function(self.matrix, angle))


@dataclass(frozen=True)
class Outer:
    """A generator U Vᵀ − V Uᵀ stored as U, V: [B, n, r] (in side) or [B, m, r] (out side)."""

    side: Side
    u: Tensor
    v: Tensor

    def apply(self, x_Bmn: Tensor, *, matmul: Matmul) -> Tensor:
        """Multiply: X A for the in side, A X for the out side."""
        u, v = self.u, self.v
        if self.side == "in":
            return matmul(matmul(x_Bmn, u), v.mT) - matmul(matmul(x_Bmn, v), u.mT)
        return matmul(u, matmul(v.mT, x_Bmn)) - matmul(v, matmul(u.mT, x_Bmn))


def factors(w_Bmn: Tensor, s_Bmn: Tensor, *, side: Side) -> tuple[Tensor, Tensor]:
    """Return U, V of S's generator U Vᵀ − V Uᵀ at W, as views: nothing is computed."""
    return (s_Bmn.mT, w_Bmn.mT) if side == "in" else (w_Bmn, s_Bmn)


def generator(w_Bmn: Tensor, s_Bmn: Tensor, *, side: Side, matmul: Matmul = exact) -> Tensor:
    """Compute the skew generator of S at W.

    Args:
        w_Bmn: weights [B, m, n].
        s_Bmn: gradients, or their average, [B, m, n].
        side: ``in`` for SᵀW − WᵀS [B, n, n]; ``out`` for WSᵀ − SWᵀ [B, m, m].
        matmul: the product to use.

    Returns:
        The generator, exactly skew, by one product and a transpose-subtract.
    """
    u, v = factors(w_Bmn, s_Bmn, side=side)
    return kernels.skew(matmul(u, v.mT))
