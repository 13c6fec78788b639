"""The layouts of a step's matrices: whole, in blocks, or divided over ranks.

A layout makes a side's generator, in the layout of its moments; the rest of a step is the same for
all layouts. Let W be cut along its rows, W = [W_1; ...; W_N] (columns are the mirror image):

- Blocks: each block has an out generator, W_i S_iᵀ − S_i W_iᵀ, and all share one in generator,
  Σ S_iᵀ W_i − W_iᵀ S_i. The factors blkdiag(R_1, ..., R_N) and P keep W's spectrum.
- Divided: rank r has the rows W_r Sᵀ − S_r Wᵀ of a single out generator and, after a
  reduce-scatter, its rows of the in generator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .. import kernels
from ..config import Side
from ..iterations import NEWTON_SCHULZ
from .direction import LieMoments, msign, spectral_bound_scale
from .generators import (
    DIM,
    Blocked,
    Dense,
    Generator,
    Matmul,
    Shard,
    cut_blocks,
    factors,
    generator,
)
from .peers import Peers
from .precision import Products


class Layout(Protocol):
    """The operations of a step that depend on how its matrices lie over ranks."""

    @property
    def low_rank(self) -> bool:
        """Tell whether a generator may be stored as its factors U, V."""

    @property
    def shares(self) -> int:
        """Number of ranks that have a share of each matrix."""

    def cuts(self, side: Side) -> bool:
        """Tell whether ranks divide the dimension that a side's generator multiplies."""

    def share(self, x: Tensor, *, side: Side) -> Tensor:
        """Return this rank's share of a side's vectors, [B, 1, n] or [B, m, 1]."""

    def generator_matrix(
        self, w: Tensor, s: Tensor, *, side: Side, direction_products: Matmul
    ) -> Tensor:
        """Compute the skew generator of S at W, in this layout."""

    def averaged(
        self, w: Tensor, g: Tensor, lie: LieMoments, *, side: Side, direction_products: Matmul
    ) -> Tensor | None:
        """Average the generator of G, and its square; return the direction if wanted."""

    def sign(self, k: Tensor, *, side: Side, eps: float, direction_products: Products) -> Tensor:
        """Compute the matrix sign of a ``generator_matrix``."""

    def generator(self, k: Tensor, *, side: Side) -> Generator:
        """Wrap a ``generator_matrix``, or its ``sign``, as the generator that multiplies."""

    def norm(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Compute the Frobenius norm of each whole matrix X, or X + Y: [B, 1, 1]."""


class Whole:
    """Each matrix lies on one rank and has one factor a side."""

    low_rank = True
    shares = 1

    def cuts(self, side: Side) -> bool:
        """Tell that no side is divided."""
        return False

    def share(self, x: Tensor, *, side: Side) -> Tensor:
        """Return X."""
        return x

    def generator_matrix(
        self, w: Tensor, s: Tensor, *, side: Side, direction_products: Matmul
    ) -> Tensor:
        """Compute the generator, [B, d, d]."""
        return generator(w, s, side=side, matmul=direction_products)

    def averaged(
        self, w: Tensor, g: Tensor, lie: LieMoments, *, side: Side, direction_products: Matmul
    ) -> Tensor | None:
        """Average the generators; return the direction [B, d, d] if wanted."""
        return lie.averaged(kernels.outer(*factors(w, g, side=side), matmul=direction_products))

    def sign(self, k: Tensor, *, side: Side, eps: float, direction_products: Products) -> Tensor:
        """Compute the matrix sign, [B, d, d]."""
        return msign(k, eps=eps, direction_products=direction_products)

    def generator(self, k: Tensor, *, side: Side) -> Generator:
        """Wrap the matrix [B, d, d]."""
        return Dense(side, k)

    def norm(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Compute the norm of each matrix of X [B, m, n], or X + Y."""
        return kernels.frobenius(x, y)


@dataclass(frozen=True)
class Blocks:
    """A block-diagonal factor on one side, one factor for all blocks on the other.

    Attributes:
        side: the side with a factor for each block.
        count: blocks of each matrix on this rank.
        peers: the ranks that share each matrix's blocks; None where this rank has all.
    """

    side: Side
    count: int
    peers: Peers | None = None
    low_rank = False

    @property
    def shares(self) -> int:
        """Number of ranks that have blocks of each matrix."""
        return self.peers.size if self.peers is not None else 1

    def cuts(self, side: Side) -> bool:
        """Tell whether ranks divide this side's blocks."""
        return self.peers is not None and side == self.side

    def share(self, x: Tensor, *, side: Side) -> Tensor:
        """Return the part of X that belongs to this rank's blocks."""
        if self.peers is None or side != self.side:
            return x
        return _share(x, side, self.peers)

    def generator_matrix(
        self, w: Tensor, s: Tensor, *, side: Side, direction_products: Matmul
    ) -> Tensor:
        """Compute the generators of this rank's blocks, [B, count, d, d], or [B, d, d] for all."""
        if side != self.side:
            k = generator(w, s, side=side, matmul=direction_products)
            return self.peers.all_reduce_sum(k) if self.peers is not None else k
        blocks = [cut_blocks(x, side=side, count=self.count) for x in (w, s)]
        k = generator(blocks[0], blocks[1], side=side, matmul=direction_products)
        return torch.unflatten(k, 0, (-1, self.count))

    def averaged(
        self, w: Tensor, g: Tensor, lie: LieMoments, *, side: Side, direction_products: Matmul
    ) -> Tensor | None:
        """Average generators; return directions [B, count, d, d], or [B, d, d], if wanted."""
        if side == self.side:
            w, g = (cut_blocks(x, side=side, count=self.count) for x in (w, g))
            lie = lie.flat()
        a, b = factors(w, g, side=side)
        x = direction_products(a, b.mT)
        if side != self.side and self.peers is not None:
            x = self.peers.all_reduce_sum(x)
        direction = lie.averaged(x)
        if direction is None or side != self.side:
            return direction
        return torch.unflatten(direction, 0, (-1, self.count))

    def sign(self, k: Tensor, *, side: Side, eps: float, direction_products: Products) -> Tensor:
        """Compute the matrix sign of each block by itself."""
        if side != self.side:
            return msign(k, eps=eps, direction_products=direction_products)
        return msign(k.flatten(0, 1), eps=eps, direction_products=direction_products).view_as(k)

    def generator(self, k: Tensor, *, side: Side) -> Generator:
        """Wrap the blocks of a block-diagonal matrix, or the matrix [B, d, d]."""
        return Blocked(side, k) if side == self.side else Dense(side, k)

    def norm(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Compute the norm over all blocks, those of other ranks too."""
        return kernels.frobenius(x, y) if self.peers is None else _norm(x, y, self.peers)


class Divided:
    """Each matrix is cut over ranks, and so are the rows of its generators."""

    low_rank = False

    def __init__(self, side: Side, peers: Peers) -> None:
        """Take the side whose dimension of W the ranks divide, and those ranks."""
        self.side, self.peers = side, peers
        self._last: tuple[Tensor, Tensor] | None = None  # a shard, and the matrices it is of

    @property
    def shares(self) -> int:
        """Number of ranks that have a shard of each matrix."""
        return self.peers.size

    def cuts(self, side: Side) -> bool:
        """Tell whether this is the divided side."""
        return side == self.side

    def share(self, x: Tensor, *, side: Side) -> Tensor:
        """Return the part of X that belongs to this rank's shard."""
        return _share(x, side, self.peers) if self.cuts(side) else x

    def gather(self, x: Tensor) -> Tensor:
        """Join the shards of X; the result is kept until the next one, since W is needed twice."""
        if self._last is None or self._last[0] is not x:
            self._last = (x, self.peers.all_gather(x, DIM[self.side]))
        return self._last[1]

    def generator_matrix(
        self, w: Tensor, s: Tensor, *, side: Side, direction_products: Matmul
    ) -> Tensor:
        """Compute this rank's rows of the generator, [B, d / ranks, d]."""
        u, v = factors(w, s, side=side)
        if side != self.side:
            return self.peers.reduce_scatter(kernels.skew(direction_products(u, v.mT)), 1)
        whole_s, whole_w = self.gather(s), self.gather(w)
        whole_u, whole_v = factors(whole_w, whole_s, side=side)
        return direction_products(u, whole_v.mT).sub_(direction_products(v, whole_u.mT))

    def averaged(
        self, w: Tensor, g: Tensor, lie: LieMoments, *, side: Side, direction_products: Matmul
    ) -> Tensor | None:
        """Average this rank's rows, [B, d / ranks, d]; return the direction's if wanted."""
        return lie.averaged_rows(
            self.generator_matrix(w, g, side=side, direction_products=direction_products)
        )

    def sign(self, k: Tensor, *, side: Side, eps: float, direction_products: Products) -> Tensor:
        """Compute this rank's rows of ``direction.msign``.

        Polynomials in X commute: X poly = poly X.
        """
        x = direction_products.rounded(k / (_norm(k, None, self.peers) + eps))
        for step, (a, b, c) in enumerate(NEWTON_SCHULZ):
            whole_x = self.peers.all_gather(x, 1)
            p = direction_products(x, whole_x)
            q = direction_products(p, self.peers.all_gather(p, 1))
            r: Tensor | float = (
                spectral_bound_scale(_norm(q, None, self.peers)) if step == 0 else 1.0
            )
            poly = q.mul_(c * r**5).sub_(p.mul_(b * r**3))
            x = direction_products(poly, whole_x).add_(x.mul_(a * r))
        mirror = self.peers.all_gather(x, 1).chunk(self.shares, -1)[self.peers.rank].mT
        return (x - mirror).to(k.dtype).mul_(0.5)

    def generator(self, k: Tensor, *, side: Side) -> Generator:
        """Wrap this rank's share of the divided side's matrix, or the other side's matrix."""
        if side != self.side:
            return Dense(side, self.peers.all_gather(k, 1))
        # X A needs columns of A, which are its negated rows: A is skew.
        return Shard(side, k if side == "out" else -k.mT, self.peers, self.gather)

    def norm(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Compute the norm over all ranks' shards."""
        return _norm(x, y, self.peers)


def _share(x: Tensor, side: Side, peers: Peers) -> Tensor:
    return x.chunk(peers.size, DIM[side])[peers.rank]


def _norm(x: Tensor, y: Tensor | None, peers: Peers) -> Tensor:
    return peers.all_reduce_sum(kernels.frobenius(x, y).square_()).sqrt_()
