"""The turn of the singular frames by a polar step: E(A), and the polish (``polar``).

E(A) = I + A + A²/2 + A³/8 leaves E(A)ᵀE(A) = I − A⁶/64. The polish removes that and the rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .muon import MuonStep
from .precision import Products, exact
from .squares import Squares


def coefficients(
    x: Tensor, c: Tensor, muon: MuonStep, scale: float | Tensor, squares: Squares
) -> tuple[Tensor, Tensor]:
    """Compute K and L of E(A) U = U (I + K) − Y L, for a W that is not square.

    A² U = U (X² − N) − Z C X and A³ U = U (X³ − X N − N X) − Z C (X² − N), where C = diag(c) and
    N = C ZᵀZ C. So E(A) U = U S − Z T, which with Z = Y H − U B is U (S + B T) − Y (H T).

    Args:
        x: rows of X. (its values are lost)
        c: all of c.
        muon: the step; its ZᵀZ is lost.
        scale: η'.
        squares: the algebra of these matrices.

    Returns:
        K and L, whole.
    """
    assert muon.out is not None, "a square's Z is zero"
    n = muon.out.mul_(squares.rows(c).unsqueeze(-1)).mul_(c.unsqueeze(-2))
    whole_x = squares.whole(x)
    square = squares.symmetric(squares.rows(whole_x), whole_x).to(x.dtype)
    of_third = squares.whole(torch.sub(square, n, alpha=2.0))  # 2 (X²/2 − N)
    third = squares.products(squares.rows(whole_x), of_third).to(x.dtype)
    del whole_x, of_third
    third = squares.skew(third, scale=1.0 / 16.0)
    square.sub_(n)
    t = torch.add(square, x, alpha=4.0)
    squares.diagonal(t).add_(8.0)
    t = squares.whole(t.mul_(0.125 * squares.rows(c).unsqueeze(-1)))
    s = x.add_(square, alpha=0.5).add_(third)
    del square, third
    s.add_(squares.products(squares.products.rounded(muon.b), t))
    if muon.h is not None:
        t = squares.whole(squares.products(squares.rows(muon.h), t).mul_(scale))
    return squares.whole(s), t


def outward(x: Tensor, c: Tensor, muon: MuonStep, squares: Squares) -> Tensor:
    """Compute −A² restricted to U: N − X²; all rows."""
    square = negated_square(x, squares)
    if muon.out is None:
        return square
    return square + squares.complete(muon.out) * (c.unsqueeze(-1) * c.unsqueeze(-2))


def negated_square(a: Tensor, squares: Squares) -> Tensor:
    """Compute −A² of the rows of skew matrices [B, r, r]; all rows."""
    a = squares.complete(a)
    return exact.symmetric(a, -a)


def cubic(a: Tensor, squares: Squares) -> Tensor:
    """Compute E(A) − I of the rows of skew matrices [B, r, r], whole."""
    whole = squares.whole(a)
    square = squares.symmetric(squares.rows(whole), whole)
    third = squares.symmetric(square, whole, sign=-1)
    return squares.whole(a.add(square, alpha=0.5).add_(third, alpha=0.125))


def polish(
    u: Tensor,
    squares: Squares,
    *,
    weight_products: Products,
    cut: bool = True,
    third_order: bool = False,
) -> None:
    """Multiply U by I − N/2, N = UᵀU − I, which squares its orthogonality error. (in place)

    UᵀU decides how far W's spectrum is from Σ. The product with N may be bf16: it is a correction.

    Args:
        u: U, or this rank's rows. (modified in place)
        squares: the algebra of r x r matrices.
        weight_products: for UᵀU.
        cut: whether ranks divide the rows of U.
        third_order: multiply by I − N/2 + 3/8 N² instead. Where the average is nearly of low rank,
            the way through the Gram matrix leaves N = 3e-2 in bf16, at angles of 0.15. The square
            of that would leave 6e-4, the third power leaves 3e-5 (1408 x 512, measured).
    """
    error = squares.gram(u, weight_products, less=1.0, cut=cut)
    if third_order:
        out = torch.empty_like(error)
        error = squares.mirrored(out, error, error, sign=1, add=error, beta=1.0, alpha=-0.75)
    u.sub_(squares.products(squares.products.rounded(u), error), alpha=0.5)
