"""Skew generators and their action on matrices: dense, in factors, in blocks, divided over ranks.

A gradient-like S gives the generators A_in = SᵀW − WᵀS and A_out = WSᵀ − SWᵀ (the descent
direction: minus the published G_in, G_out). Both have the form U Vᵀ − V Uᵀ. So A_in of a wide W
need not be formed: X A_in = (X Sᵀ) W − (X Wᵀ) S. The same holds for A_out of a tall W.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .. import kernels
from ..config import Side
from .peers import Peers
from .precision import exact

Matmul = Callable[[Tensor, Tensor], Tensor]
"""A product of two batches, at either of a step's precisions."""

DIM: dict[Side, int] = {"out": 1, "in": 2}
"""The dimension of X [B, m, n] that a side multiplies."""


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


@dataclass(frozen=True)
class Blocked:
    """A generator stored as the blocks [B, N, d, d] of a block-diagonal matrix."""

    side: Side
    matrix: Tensor

    def apply(self, x_Bmn: Tensor, *, matmul: Matmul) -> Tensor:
        """Multiply: X A for the in side, A X for the out side."""
        count, blocks = self.matrix.shape[1], self.matrix.flatten(0, 1)
        x = cut_blocks(x_Bmn, side=self.side, count=count)
        y = matmul(x, blocks) if self.side == "in" else matmul(blocks, x)
        y = torch.unflatten(y, 0, (-1, count))
        return y.flatten(1, 2) if self.side == "out" else y.transpose(1, 2).flatten(2, 3)

    def mapped(self, function: Callable[[Tensor, Tensor], Tensor], angle: Tensor) -> Blocked:
        """Replace each block A by ``function(A, a)``, with a [B, 1, 1]."""
        count = self.matrix.shape[1]
        each = function(self.matrix.flatten(0, 1), angle.repeat_interleave(count, 0))
        return Blocked(self.side, each.view_as(self.matrix))


@dataclass(frozen=True)
class Shard:
    """A generator stored as the rows (out) or columns (in) that give this rank's shard.

    Attributes:
        side: the side that the ranks divide.
        matrix: the rows or columns.
        peers: the ranks.
        gather: joins the shards of X.
    """

    side: Side
    matrix: Tensor
    peers: Peers
    gather: Callable[[Tensor], Tensor]

    def apply(self, x_Bmn: Tensor, *, matmul: Matmul) -> Tensor:
        """Compute this rank's shard of X A for the in side, of A X for the out side."""
        x = self.gather(x_Bmn)
        return matmul(x, self.matrix) if self.side == "in" else matmul(self.matrix, x)

    def mapped(self, function: Callable[[Tensor, Tensor], Tensor], angle: Tensor) -> Shard:
        """Replace A by ``function(A, a)``, computed from all rows of A, with a [B, 1, 1]."""
        peers, dim = self.peers, DIM[self.side]
        each = function(peers.all_gather(self.matrix, dim), angle)
        return Shard(self.side, each.chunk(peers.size, dim)[peers.rank], peers, self.gather)


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


def cut_blocks(x_Bmn: Tensor, *, side: Side, count: int) -> Tensor:
    """Cut X into blocks along the dimension of a side: [B count, m/count, n] for out."""
    if side == "out":
        return x_Bmn.reshape(-1, x_Bmn.shape[1] // count, x_Bmn.shape[2])
    return torch.unflatten(x_Bmn, 2, (count, -1)).transpose(1, 2).flatten(0, 1)
