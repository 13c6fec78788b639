"""Muon's step in the singular frames of the weights (``polar``), by the cheaper of two ways.

The direct way forms D = η' polar(M). Where L is much larger than r, D is not formed: D V = η' Y H
with Y = M V and a polynomial H of YᵀY that is close to its inverse root. So M, U and Y alone are
multiplied with L rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ..cost import uses_gram
from .direction import inverse_root, polar
from .squares import Squares


@dataclass(frozen=True)
class MuonStep:
    """Muon's step in the singular frames, in the form that U's turn needs.

    B and ZᵀZ are rows, H is whole, as ``Squares`` has them.

    Attributes:
        b: B = Uᵀ D V, [B, r, r].
        b_transposed: Bᵀ.
        y: Y [B, L, r]: D V = η' Y H, or Y if there is no H; None for a square W, unless metrics are
            collected.
        h: H [B, r, r]; None where Y is D V.
        out: ZᵀZ = (D V)ᵀ D V − BᵀB, [B, r, r]; None for a square W, whose Z is zero.
    """

    b: Tensor
    b_transposed: Tensor
    y: Tensor | None
    h: Tensor | None
    out: Tensor | None

    def in_v(self, scale: float | Tensor, squares: Squares) -> Tensor:
        """Compute D V [B, L, r]."""
        assert self.y is not None, "metrics need Y"
        return self.y if self.h is None else squares.products(self.y, self.h).mul_(scale)


def muon_step(
    unit: list[Tensor],
    u: Tensor,
    v: Tensor,
    scale: float | Tensor,
    squares: Squares,
    *,
    rows: int,
    collect_metrics: bool,
) -> MuonStep:
    """Compute Muon's step in the frames.

    Args:
        unit: a list of the average S [B, L, r], of norm 1 and rounded for products. S is taken out
            of it after its last use.
        u: U [B, L, r].
        v: V [B, r, r] of a W that is stepped as L x r.
        scale: η'.
        squares: the algebra of r x r matrices.
        rows: L, on all ranks.
        collect_metrics: whether the metrics need Y.
    """
    r = v.shape[-1]
    if uses_gram(rows, r):
        return _through_gram(unit, u, v, scale, squares)
    muon = _directly(unit, u, v, scale, squares, square=rows == r)
    return muon if muon.out is not None or collect_metrics else replace(muon, y=None)


def _through_gram(
    unit: list[Tensor], u: Tensor, v: Tensor, scale: float | Tensor, squares: Squares
) -> MuonStep:
    """Compute the step from Y = M V and the inverse root of YᵀY."""
    products = squares.products
    y = products(unit.pop(), products.rounded(v))
    inner = squares.summed(products(products.rounded(u).mT, y))
    h, root = inverse_root(squares.gram(y, products), squares=squares)
    b = products(inner, h).to(v.dtype).mul_(scale)
    del inner
    out = squares.rows(root).to(b.dtype).mul_(scale**2)
    del root
    b_transposed = squares.transposed(b)
    return MuonStep(b, b_transposed, y, h, _without_inner(out, b, b_transposed, squares))


def _directly(
    unit: list[Tensor],
    u: Tensor,
    v: Tensor,
    scale: float | Tensor,
    squares: Squares,
    *,
    square: bool,
) -> MuonStep:
    """Compute the step from D = η' polar(M) itself."""
    products = squares.products
    d = polar(unit, squares=squares)
    y = products(d, products.rounded(v)).mul_(scale)
    del d
    b = squares.summed(products(products.rounded(u).mT, y)).to(v.dtype)
    b_transposed = squares.transposed(b)
    if square:
        return MuonStep(b, b_transposed, y, None, None)
    out = squares.summed(products.symmetric(y.mT, y)).to(v.dtype)
    return MuonStep(b, b_transposed, y, None, _without_inner(out, b, b_transposed, squares))


def _without_inner(out: Tensor, b: Tensor, b_transposed: Tensor, squares: Squares) -> Tensor:
    """Subtract BᵀB from rows of (D V)ᵀ D V. (modified in place)"""
    return out.sub_(squares.symmetric(b_transposed, squares.whole(b)))
