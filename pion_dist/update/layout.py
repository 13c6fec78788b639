"""The layouts of a step's matrices: whole, in blocks, or divided over ranks.

A layout makes a side's generator, in the layout of its moments; the rest of a step is the same for
all layouts. Let W be cut along its rows, W = [W_1; ...; W_N] (columns are the mirror image):

- Blocks: each block has an out generator, W_i S_iᵀ − S_i W_iᵀ, and all share one in generator,
  Σ S_iᵀ W_i − W_iᵀ S_i. The factors blkdiag(R_1, ..., R_N) and P keep W's spectrum.
- Divided: rank r has the rows W_r Sᵀ − S_r Wᵀ of a single out generator and, after a
  reduce-scatter, its rows of the in generator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from .. import kernels
from ..config import PionConfig, Side
from ..iterations import NEWTON_SCHULZ
from .direction import adapted, msign, spectral_bound_scale
from .generators import Dense, Generator, Matmul, factors, generator
from .peers import Peers
from .precision import Products

_DIM: dict[Side, int] = {"out": 1, "in": 2}  # the dimension of X [B, m, n] that a side multiplies


@dataclass(frozen=True)
class LieMoments:
    """A side's Lie moments, with the arguments that average them.

    Attributes:
        m: average of the generators. (modified in place)
        v: average of their squares; None unless the direction is adaptive. (modified in place)
        config: the run's options.
        grads_finite: boolean scalar; where it is False the moments stay.
        wanted: whether to return the direction.
    """

    m: Tensor
    v: Tensor | None
    config: PionConfig
    grads_finite: Tensor
    wanted: bool

    def flat(self) -> LieMoments:
        """Merge matrices and blocks, [B, N, ...], into one batch, [B N, ...]."""
        v = self.v.flatten(0, 1) if self.v is not None else None
        return replace(self, m=self.m.flatten(0, 1), v=v)

    def averaged(self, x: Tensor) -> Tensor | None:
        """Average the generators of ``kernels.outer``'s result; return the direction if wanted."""
        config = self.config
        return kernels.lie_moments(
            x,
            self.m,
            self.v,
            beta1=config.betas[0],
            beta2=config.betas[1],
            eps=config.eps,
            nesterov=config.nesterov,
            grads_finite=self.grads_finite,
            wanted=self.wanted,
        )

    def averaged_rows(self, k: Tensor) -> Tensor | None:
        """Average rows [B, ., d] of generators; rows have no triangle, so moments are dense."""
        (beta1, beta2), nesterov = self.config.betas, self.config.nesterov and self.wanted
        a = kernels.average(
            self.m, k, beta=beta1, nesterov=nesterov, grads_finite=self.grads_finite
        )
        if self.v is not None:
            v = kernels.average(
                self.v, k.square(), beta=beta2, nesterov=False, grads_finite=self.grads_finite
            )
            a = adapted(a, v, eps=self.config.eps) if self.wanted else a
        return a if self.wanted else None


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
        blocks = [_blocks(x, side=side, count=self.count) for x in (w, s)]
        k = generator(blocks[0], blocks[1], side=side, matmul=direction_products)
        return torch.unflatten(k, 0, (-1, self.count))

    def averaged(
        self, w: Tensor, g: Tensor, lie: LieMoments, *, side: Side, direction_products: Matmul
    ) -> Tensor | None:
        """Average generators; return directions [B, count, d, d], or [B, d, d], if wanted."""
        if side == self.side:
            w, g = (_blocks(x, side=side, count=self.count) for x in (w, g))
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
            self._last = (x, self.peers.all_gather(x, _DIM[self.side]))
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
        return Shard(side, k if side == "out" else -k.mT, self)

    def norm(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Compute the norm over all ranks' shards."""
        return _norm(x, y, self.peers)


@dataclass(frozen=True)
class Blocked:
    """A generator stored as the blocks [B, N, d, d] of a block-diagonal matrix."""

    side: Side
    matrix: Tensor

    def apply(self, x_Bmn: Tensor, *, matmul: Matmul) -> Tensor:
        """Multiply: X A for the in side, A X for the out side."""
        count, blocks = self.matrix.shape[1], self.matrix.flatten(0, 1)
        x = _blocks(x_Bmn, side=self.side, count=count)
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
    """A generator stored as the rows (out) or columns (in) that give this rank's shard."""

    side: Side
    matrix: Tensor
    layout: Divided

    def apply(self, x_Bmn: Tensor, *, matmul: Matmul) -> Tensor:
        """Compute this rank's shard of X A for the in side, of A X for the out side."""
        x = self.layout.gather(x_Bmn)
        return matmul(x, self.matrix) if self.side == "in" else matmul(self.matrix, x)

    def mapped(self, function: Callable[[Tensor, Tensor], Tensor], angle: Tensor) -> Shard:
        """Replace A by ``function(A, a)``, computed from all rows of A, with a [B, 1, 1]."""
        peers, dim = self.layout.peers, _DIM[self.side]
        each = function(peers.all_gather(self.matrix, dim), angle)
        return Shard(self.side, each.chunk(peers.size, dim)[peers.rank], self.layout)


def _blocks(x_Bmn: Tensor, *, side: Side, count: int) -> Tensor:
    """Cut X into blocks along the dimension of a side: [B count, m/count, n] for out."""
    if side == "out":
        return x_Bmn.reshape(-1, x_Bmn.shape[1] // count, x_Bmn.shape[2])
    return torch.unflatten(x_Bmn, 2, (count, -1)).transpose(1, 2).flatten(0, 1)


def _share(x: Tensor, side: Side, peers: Peers) -> Tensor:
    return x.chunk(peers.size, _DIM[side])[peers.rank]


def _norm(x: Tensor, y: Tensor | None, peers: Peers) -> Tensor:
    return peers.all_reduce_sum(kernels.frobenius(x, y).square_()).sqrt_()
