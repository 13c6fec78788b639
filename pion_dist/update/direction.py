"""Directions from moments: adaptive ones, the matrix sign of skew matrices, polar factors."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import kernels
from ..config import PionConfig
from ..iterations import NEWTON_SCHULZ
from .precision import Products
from .squares import Squares


def adapted(first: Tensor, second: Tensor, *, eps: float) -> Tensor:
    """Divide elementwise: first / (sqrt(second) + eps).

    The result is skew where ``first`` is skew and ``second`` symmetric.
    """
    return first / second.sqrt().add_(eps)


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


def msign(k: Tensor, *, eps: float, direction_products: Products) -> Tensor:
    """Compute the matrix sign K (KᵀK)^(−1/2) of skew matrices by Newton–Schulz.

    For a skew X the iteration X <- aX + b(XXᵀ)X + c(XXᵀ)²X is X(aI − bP + cP²) with P = X²: three
    products, each symmetric or skew, and two more matrices in memory. K is first divided by a bound
    of its largest singular value, which the first step's products give: ``spectral_bound_scale``.
    The result is made exactly skew again, since the spectrum depends on it.

    Args:
        k: skew [B, d, d]. (its values are lost)
        eps: added to the Frobenius norm, by which K is divided first.
        direction_products: the products to use.

    Returns:
        Skew [B, d, d]. Its singular values are in [0.68, 1.21] where K's are above 0.02 of that
        bound, and zero where K's are zero.
    """
    x = direction_products.rounded(k.div_(kernels.frobenius(k) + eps))
    p, q = torch.empty_like(x), torch.empty_like(x)
    for step, (a, b, c) in enumerate(NEWTON_SCHULZ):
        direction_products.mirrored(p, x, x, sign=1)
        if step == 0:
            direction_products.mirrored(q, p, p, sign=1)
            r = spectral_bound_scale(kernels.frobenius(q))
            # In x's dtype: the CPU would copy a bf16 matrix to float32 to multiply it by a float32.
            x.mul_(r.to(x.dtype))
            q.mul_((c * r**4).to(x.dtype)).add_(p.mul_((-b * r**2).to(x.dtype)))
        else:
            direction_products.mirrored(q, p, p, sign=1, add=p, beta=-b, alpha=c)
        x, p = direction_products.mirrored(p, x, q, sign=-1, add=x, beta=a), x
    del p, q
    return kernels.skew(x, scale=0.5, dtype=k.dtype)


def polar(unit: list[Tensor], *, squares: Squares) -> Tensor:
    """Compute the polar factor X (XᵀX)^(−1/2) of tall matrices by the iteration of ``msign``.

    Args:
        unit: a list of one tensor: X [B, m, n], or this rank's rows of it, of Frobenius norm 1 or
            zero. X is taken out of the list, so that its memory is free while the next iterate is
            made. (its values are lost)
        squares: the algebra of n x n matrices, over the ranks that divide the rows.

    Returns:
        [B, m, n], singular values in [0.68, 1.21] where X's are above 0.02 of the largest.
    """
    x = unit.pop()
    batch, _, n = x.shape
    dtype = x.dtype
    x = squares.products.rounded(x)
    poly = x.new_empty(batch, n, n)
    for step, (a, b, c) in enumerate(NEWTON_SCHULZ):
        gram = squares.gram(x, squares.products)
        if step == 0:
            squares.mirrored(poly, gram, gram, sign=1)
            r = spectral_bound_scale(kernels.frobenius(poly), pairs=False)
            x.mul_(r.to(x.dtype))
            poly.mul_((c * r**4).to(x.dtype)).add_(gram.mul_((b * r**2).to(x.dtype)))
        else:
            squares.mirrored(poly, gram, gram, sign=1, add=gram, beta=b, alpha=c)
        x = squares.products.into(torch.empty_like(x), x, poly, add=x, beta=a)
    return x.to(dtype)


def inverse_root(gram: Tensor, *, squares: Squares) -> tuple[Tensor, Tensor]:
    """Compute the polynomial H of G = XᵀX for which X H is ``polar(X)``, without X.

    Args:
        gram: G [B, n, n], whole as ``squares`` has it; of trace 1, or zero.
        squares: the algebra of n x n matrices.

    Returns:
        H and H G H, whole [B, n, n]. H differs from ``polar``'s in directions in which G is below
        its rounding; the bound of H is the same there.
    """
    h: Tensor | None = None
    for a, b, c in NEWTON_SCHULZ:
        square = torch.empty_like(gram)
        if h is None:
            squares.mirrored(square, gram, gram, sign=1)
            r = spectral_bound_scale(kernels.frobenius(square), pairs=False)
            gram = gram * (r**2).to(gram.dtype)
            poly = square.mul_((c * r**4).to(gram.dtype)).add_(gram, alpha=b)
        else:
            poly = squares.mirrored(square, gram, gram, sign=1, add=gram, beta=b, alpha=c)
        poly.diagonal(dim1=-2, dim2=-1).add_(a)
        if h is None:
            h = poly * r.to(poly.dtype)
        else:
            h = squares.mirrored(torch.empty_like(h), h, poly, sign=1)
        square = squares.mirrored(torch.empty_like(gram), poly, poly, sign=1)
        gram = squares.mirrored(torch.empty_like(gram), gram, square, sign=1)
    assert h is not None, "there is a step"
    return h, gram


def spectral_bound_scale(norm: Tensor, *, pairs: bool = True) -> Tensor:
    """Compute the scale that brings X's largest singular value to just below 1, never above.

    The singular values of a skew X come in equal pairs, so ‖X⁴‖_F² = Σ σ⁸ is at least 2 σ₁⁸. It is
    at most d σ₁⁸, so σ₁ ends in [(2/d)^(1/8), 1]: above 0.38 for d = 4096, where ‖X‖_F of equal
    values is 64 σ₁.

    Args:
        norm: ‖X⁴‖_F, or ‖(XᵀX)²‖_F, of an X with ‖X‖_F = 1 or 0.
        pairs: whether X is skew.
    """
    # ‖X⁴‖_F^(1/4) is at least d^(−3/8), so the floor changes only a zero X.
    return norm.sqrt().sqrt_().clamp_min_(1e-3).reciprocal_().mul_(2.0**0.125 if pairs else 1.0)
