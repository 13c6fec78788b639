"""The algebra of r x r matrices in a polar step: on every rank of a team, or divided over them.

A team divides the rows of the longer dimension, L. What follows from sums over these are r x r
matrices, the same on all members: of a 28,672 x 8,192 matrix on eight they would be most of the
step. So where r is large a member has only some rows of each, and gathers all of a matrix only to
multiply by it, rounded as products round it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal, Unpack

import torch
from torch import Tensor

from .. import kernels
from ..iterations import divides_squares
from .peers import Peers
from .precision import Products, Terms


@dataclass(frozen=True)
class Squares:
    """Square matrices that each rank has all rows of.

    Methods speak of two forms of a matrix, both [B, ., r]. "Rows" are those that this rank has.
    A "whole" matrix has all rows and is rounded for products.

    Attributes:
        products: those of the direction, of square matrices and others.
        peers: the ranks that divide U's rows, whose matrices are summed; None for one rank.
    """

    products: Products
    peers: Peers | None = None
    divided = False
    """Whether ranks divide the rows of square matrices, and of V."""

    def rows(self, x: Tensor) -> Tensor:
        """Return this rank's rows of a matrix that all ranks have."""
        return x

    def complete(self, rows: Tensor) -> Tensor:
        """Join the ranks' rows, not rounded."""
        return rows

    def whole(self, rows: Tensor) -> Tensor:
        """Join the ranks' rows, rounded."""
        return self.products.rounded(rows)

    def summed(self, part: Tensor) -> Tensor:
        """Sum the ranks' matrices [B, r, r], at least in float32; return rows."""
        return part if self.peers is None else self.peers.all_reduce_sum(part.to(wide(part.dtype)))

    def gram(self, x: Tensor, products: Products, *, less: float = 0.0, cut: bool = True) -> Tensor:
        """Compute XᵀX − ``less`` I, whole.

        Args:
            x: X [B, ., r].
            products: compute XᵀX.
            less: is subtracted before the result is rounded.
            cut: whether X has rows of a matrix that the ranks divide, rather than all of it.
        """
        gram = products.symmetric(x.mT, x)
        gram = self.summed(gram) if cut else gram
        if less:
            gram.diagonal(dim1=-2, dim2=-1).sub_(less)
        return self.products.rounded(gram)

    def symmetric(self, left: Tensor, right: Tensor, *, sign: Literal[1, -1] = 1) -> Tensor:
        """Compute rows of a symmetric (``sign`` 1) or skew product of rows and a whole matrix."""
        return self.products.symmetric(left, right, sign=sign)

    def mirrored(
        self, out: Tensor, a: Tensor, b: Tensor, *, sign: Literal[1, -1], **terms: Unpack[Terms]
    ) -> Tensor:
        """Do as ``Products.mirrored``, with whole matrices."""
        return self.products.mirrored(out, a, b, sign=sign, **terms)

    def transposed(self, rows: Tensor) -> Tensor:
        """Return rows of the transpose."""
        return rows.mT

    def skew(self, rows: Tensor, *, scale: float) -> Tensor:
        """Compute rows of scale (A − Aᵀ). (A's values may be lost)"""
        return kernels.skew(rows, scale=scale)

    def angles(
        self, b: Tensor, b_transposed: Tensor, sigma: Tensor, *, scale: float | Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute X's and Y's rows and all of c (``kernels.angles``)."""
        return kernels.angles(b, None, sigma, scale=scale)

    def diagonal(self, rows: Tensor) -> Tensor:
        """View the elements of the diagonal that are in this rank's rows."""
        return rows.diagonal(0, -2, -1)


@dataclass(frozen=True)
class DividedSquares(Squares):
    """Square matrices whose rows a team's ranks divide.

    Symmetric and skew matrices travel as one half: blocks [r / 2k, r / 2k] on and below the
    diagonal, for k ranks. Rank j has the blocks of block row j and of row j from below, so that
    each has 2k + 1.
    """

    divided = True

    def rows(self, x: Tensor) -> Tensor:
        """Return this rank's rows of a matrix that all ranks have."""
        peers = self._others()
        return x.chunk(peers.size, 1)[peers.rank]

    def complete(self, rows: Tensor) -> Tensor:
        """Join the ranks' rows, not rounded."""
        return self._others().all_gather(rows, 1)

    def whole(self, rows: Tensor) -> Tensor:
        """Join the ranks' rows, rounded."""
        return self._others().all_gather(self.products.rounded(rows), 1)

    def summed(self, part: Tensor) -> Tensor:
        """Sum the ranks' matrices [B, r, r], at least in float32; return rows."""
        return self._others().reduce_scatter(part.to(wide(part.dtype)), 1)

    def gram(self, x: Tensor, products: Products, *, less: float = 0.0, cut: bool = True) -> Tensor:
        """Compute XᵀX − ``less`` I, whole, of rows that the ranks divide."""
        peers = self._others()
        part = products.symmetric(x.mT, x)
        i, j = _lower(peers.size, part.device)
        blocks = _blocked(part, 2 * peers.size)[:, i, :, j]
        mine = peers.reduce_scatter(blocks.to(wide(blocks.dtype)), 0)
        for on_diagonal in (peers.rank, -1) if less else ():
            mine[0, on_diagonal].diagonal(dim1=-2, dim2=-1).sub_(less)
        whole = peers.all_gather(self.products.rounded(mine), 0)
        return _unpack(whole, whole.new_empty(part.shape), sign=1)

    def symmetric(self, left: Tensor, right: Tensor, *, sign: Literal[1, -1] = 1) -> Tensor:
        """Compute rows of a product of rows and a whole matrix."""
        return self.products(left, right)

    def mirrored(
        self, out: Tensor, a: Tensor, b: Tensor, *, sign: Literal[1, -1], **terms: Unpack[Terms]
    ) -> Tensor:
        """Do as ``Products.mirrored``, with whole matrices; a rank computes its two block rows."""
        peers = self._others()
        count = 2 * peers.size
        size = out.shape[-1] // count
        mine = out.new_empty(out.shape[0], size, (count + 1) * size)
        end = (peers.rank + 1) * size
        for row, packed in (
            (peers.rank, mine[..., :end]),
            (count - 1 - peers.rank, mine[..., end:]),
        ):
            self.products.panel(packed, a, b, row * size, (row + 1) * size, **terms)
        blocks = torch.unflatten(peers.all_gather(mine.unsqueeze(0), 0), -1, (count + 1, size))
        return _unpack(blocks.permute(0, 3, 1, 2, 4), out, sign=sign)

    def transposed(self, rows: Tensor) -> Tensor:
        """Return rows of the transpose."""
        return self._others().transposed(rows)

    def skew(self, rows: Tensor, *, scale: float) -> Tensor:
        """Compute rows of scale (A − Aᵀ). (A's values may be lost)"""
        return rows.sub_(self.transposed(rows)).mul_(scale)

    def angles(
        self, b: Tensor, b_transposed: Tensor, sigma: Tensor, *, scale: float | Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute X's and Y's rows and all of c (``kernels.angles``)."""
        x, y, c = kernels.angles(b, b_transposed, sigma, scale=scale, first=self._first(b))
        return x, y, self.complete(c)

    def diagonal(self, rows: Tensor) -> Tensor:
        """View the elements of the diagonal that are in this rank's rows."""
        return rows.diagonal(self._first(rows), -2, -1)

    def _first(self, rows: Tensor) -> int:
        """Number of the first of this rank's rows."""
        return self._others().rank * rows.shape[1]

    def _others(self) -> Peers:
        assert self.peers is not None, "only ranks divide"
        return self.peers


def squares_of(products: Products, peers: Peers | None, r: int) -> Squares:
    """Choose how ``peers`` hold r x r matrices."""
    if peers is not None and divides_squares(r, peers.size):
        return DividedSquares(products, peers)
    return Squares(products, peers)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which ranks add up products of ``dtype``."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


@functools.cache
def _lower(ranks: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Block row and block column of each rank's blocks, [ranks, 2 ranks + 1]."""
    count = 2 * ranks
    of_ranks = [
        [(row, column) for row in (rank, count - 1 - rank) for column in range(row + 1)]
        for rank in range(ranks)
    ]
    i, j = torch.tensor(of_ranks, device=device).unbind(-1)
    return i, j


def _blocked(x: Tensor, count: int) -> Tensor:
    """View X [B, r, r] as count x count blocks, [B, count, ., count, .]."""
    return torch.unflatten(torch.unflatten(x, -1, (count, -1)), 1, (count, -1))


def _unpack(blocks: Tensor, out: Tensor, *, sign: Literal[1, -1]) -> Tensor:
    """Write the blocks [ranks, 2 ranks + 1, B, ., .] and their mirror images into ``out``."""
    i, j = _lower(len(blocks), blocks.device)
    at = _blocked(out, 2 * len(blocks))
    at[:, j, :, i] = blocks.mT if sign == 1 else -blocks.mT
    at[:, i, :, j] = blocks
    return out
