"""Directions from moments: adaptive ones, the matrix sign of skew matrices, polar factors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import kernels
from ..iterations import NEWTON_SCHULZ
from .precision import Products


def adapted(first: Tensor, second: Tensor, *, eps: float) -> Tensor:
    """first / (sqrt(second) + eps), elementwise; skew where first is skew and second symmetric."""
    return first / second.sqrt().add_(eps)


def msign(k: Tensor, *, eps: float, direction_products: Products) -> Tensor:
    """The matrix sign K (KᵀK)^(−1/2) of skew matrices by Newton–Schulz, with two more in memory.

    For a skew X the iteration X <- aX + b(XXᵀ)X + c(XXᵀ)²X is X(aI − bP + cP²) with P = X²: three
    products, each symmetric or skew. K is first divided by a bound of its largest singular value
    that the first step's products give: see ``spectral_bound_scale``.
    The result is made exactly skew again, since the spectrum depends on it.

    Args:
        k: skew [B, d, d]. (its values are lost)
        eps: added to the Frobenius norm that K is divided by before all else.
        direction_products: the products to use.

    Returns:
        Skew [B, d, d], singular values in [0.68, 1.21] where K's are above 0.02 of that bound;
        zero where they are zero.
    """
    x = direction_products.rounded(k.div_(kernels.frobenius(k) + eps))
    p, q = torch.empty_like(x), torch.empty_like(x)
    for step, (a, b, c) in enumerate(NEWTON_SCHULZ):
        direction_products.mirrored(p, x, x, sign=1)
        if step == 0:
            direction_products.mirrored(q, p, p, sign=1)
            r = spectral_bound_scale(kernels.frobenius(q))
            # As x is: the CPU makes float32 copies of bf16 matrices that meet a float32 tensor.
            x.mul_(r.to(x.dtype))
            q.mul_((c * r**4).to(x.dtype)).add_(p.mul_((-b * r**2).to(x.dtype)))
        else:
            direction_products.mirrored(q, p, p, sign=1, add=p, beta=-b, alpha=c)
        x, p = direction_products.mirrored(p, x, q, sign=-1, add=x, beta=a), x
    del p, q
    return kernels.skew(x, scale=0.5, dtype=k.dtype)


def polar(
    unit: list[Tensor], *, direction_products: Products, all_reduce_sum: Callable[[Tensor], Tensor]
) -> Tensor:
    """The polar factor X (XᵀX)^(−1/2) of tall matrices, as ``msign`` is of skew ones.

    Args:
        unit: of one X [B, m, n] with n columns, or the rows of it that this rank has; of Frobenius
            norm 1, or zero. It is taken out of the list, and its values are lost: nobody holds it
            while there is another iterate.
        direction_products: the products to use.
        all_reduce_sum: sums what ranks with other rows have (in place).

    Returns:
        [B, m, n], singular values in [0.68, 1.21] where X's are above 0.02 of the largest.
    """
    x = unit.pop()
    batch, _, n = x.shape
    dtype = x.dtype
    x = direction_products.rounded(x)
    gram, poly = x.new_empty(batch, n, n), x.new_empty(batch, n, n)
    for step, (a, b, c) in enumerate(NEWTON_SCHULZ):
        direction_products.mirrored(gram, x.mT, x, sign=1)
        gram = direction_products.rounded(all_reduce_sum(gram.to(wide(dtype))))
        if step == 0:
            direction_products.mirrored(poly, gram, gram, sign=1)
            r = spectral_bound_scale(kernels.frobenius(poly), pairs=False)
            x.mul_(r.to(x.dtype))
            poly.mul_((c * r**4).to(x.dtype)).add_(gram.mul_((b * r**2).to(x.dtype)))
        else:
            direction_products.mirrored(poly, gram, gram, sign=1, add=gram, beta=b, alpha=c)
        x = direction_products.into(torch.empty_like(x), x, poly, add=x, beta=a)
    return x.to(dtype)


def inverse_root(gram: Tensor, *, direction_products: Products) -> tuple[Tensor, Tensor]:
    """The polynomial H of G = XᵀX for which X H is ``polar(X)``, without X.

    Args:
        gram: G [B, n, n], float32 or float64; of trace 1, or zero.
        direction_products: the products to use.

    Returns:
        H and H G H, [B, n, n] in G's dtype. Directions in which G is below its rounding have
        another H than ``polar`` gives them, of the same bound.
    """
    dtype = gram.dtype
    gram = direction_products.rounded(gram)
    h: Tensor | None = None
    for a, b, c in NEWTON_SCHULZ:
        poly, square = torch.empty_like(gram), torch.empty_like(gram)
        direction_products.mirrored(square, gram, gram, sign=1)
        if h is None:
            r = spectral_bound_scale(kernels.frobenius(square), pairs=False)
            gram = gram * (r**2).to(gram.dtype)
            poly = square.mul_((c * r**4).to(gram.dtype)).add_(gram, alpha=b)
        else:
            poly = square.mul_(c).add_(gram, alpha=b)
        poly.diagonal(dim1=-2, dim2=-1).add_(a)
        if h is None:
            h = poly * r.to(poly.dtype)
        else:
            h = direction_products.mirrored(torch.empty_like(h), h, poly, sign=1)
        square = direction_products.mirrored(torch.empty_like(gram), poly, poly, sign=1)
        gram = direction_products.mirrored(torch.empty_like(gram), gram, square, sign=1)
    assert h is not None, "there is a step"
    return h.to(dtype), gram.to(dtype)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which ranks' sums of a dtype's products are added."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


def spectral_bound_scale(norm: Tensor, *, pairs: bool = True) -> Tensor:
    """What X is multiplied by, so that its largest singular value is at most 1, just below it.

    A skew X has its singular values in equal pairs, so that ‖X⁴‖_F² = Σ σ⁸ is at least 2 σ₁⁸; it is
    at most d σ₁⁸, so that σ₁ ends in [(2/d)^(1/8), 1]: above 0.38 for d = 4096, where ‖X‖_F of
    equal values is 64 σ₁.

    Args:
        norm: ‖X⁴‖_F, or ‖(XᵀX)²‖_F, where ‖X‖_F is 1 or 0.
        pairs: whether X is skew.
    """
    # ‖X⁴‖_F^(1/4) is d^(−3/8) at least.
    return norm.sqrt().sqrt_().clamp_min_(1e-3).reciprocal_().mul_(2.0**0.125 if pairs else 1.0)
