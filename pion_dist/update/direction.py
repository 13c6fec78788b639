"""From moments to the generators a step uses, and the matrix sign of a skew matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import kernels
from ..config import Side
from .generators import Framed
from .precision import Products

# Muon's quintic (K. Jordan, 2024, https://kellerjordan.github.io/posts/muon/). From a tight bound
# of the largest singular value, 3 steps do what 5 do from the Frobenius norm: values above 0.02
# of it end in [0.68, 1.21].
NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 3


def adapted(first: Tensor, second: Tensor, *, eps: float) -> Tensor:
    """first / (sqrt(second) + eps), elementwise; skew where first is skew and second symmetric."""
    return first / second.sqrt().add_(eps)


def msign(k: Tensor, *, eps: float, matmul: Products) -> Tensor:
    """The matrix sign K (KᵀK)^(−1/2) of skew matrices by Newton–Schulz, with two more in memory.

    For a skew X the iteration X <- aX + b(XXᵀ)X + c(XXᵀ)²X is X(aI − bP + cP²) with P = X²: three
    products, each symmetric or skew. K is first divided by a bound of its largest singular value
    that the first step's products give: see ``tight``. The result is made exactly skew again, since
    the spectrum depends on it.

    Args:
        k: skew [B, d, d]. (its values are lost)
        eps: added to the Frobenius norm that K is divided by before all else.
        matmul: the products to use.

    Returns:
        Skew [B, d, d], singular values in [0.68, 1.21] where K's are above 0.02 of that bound;
        zero where they are zero.
    """
    x = matmul.rounded(k.div_(kernels.frobenius(k) + eps))
    p, q = torch.empty_like(x), torch.empty_like(x)
    for step, (a, b, c) in enumerate(NEWTON_SCHULZ):
        matmul.mirrored(p, x, x, sign=1)
        if step == 0:
            matmul.mirrored(q, p, p, sign=1)
            r = tight(kernels.frobenius(q))
            # As x is: the CPU makes float32 copies of bf16 matrices that meet a float32 tensor.
            x.mul_(r.to(x.dtype))
            q.mul_((c * r**4).to(x.dtype)).add_(p.mul_((-b * r**2).to(x.dtype)))
        else:
            matmul.mirrored(q, p, p, sign=1, add=p, beta=-b, alpha=c)
        x, p = matmul.mirrored(p, x, q, sign=-1, add=x, beta=a), x
    del p, q
    return kernels.skew(x, scale=0.5, dtype=k.dtype)


def tight(norm: Tensor) -> Tensor:
    """What X is multiplied by, so that its largest singular value is at most 1, just below it.

    A skew X has its singular values in equal pairs, so that ‖X⁴‖_F² = Σ σ⁸ is at least 2 σ₁⁸; it is
    at most d σ₁⁸, so that σ₁ ends in [(2/d)^(1/8), 1]: above 0.38 for d = 4096, where ‖X‖_F of
    equal values is 64 σ₁.

    Args:
        norm: ‖X⁴‖_F where ‖X‖_F is 1 or 0.
    """
    # ‖X⁴‖_F^(1/4) is d^(−3/8) at least.
    return norm.sqrt().sqrt_().clamp_min_(1e-3).reciprocal_().mul_(2.0**0.125)


def msign_outer(uv: Tensor, *, side: Side, eps: float, matmul: Products) -> Framed:
    """The matrix sign of a generator in factors, without the large matrix.

    The generator is U Vᵀ − V Uᵀ = [U V] J [U V]ᵀ with J = [[0, I], [−I, 0]]; with [U V] = Q R it is
    Q (R J Rᵀ) Qᵀ and its sign Q msign(R J Rᵀ) Qᵀ, well conditioned and exact.

    Args:
        uv: [U V], [B, n, 2r] for the in side, where V is Wᵀ; [B, m, 2r] for the out side, where U
            is W.
        side: of the generator.
        eps: as for ``msign``.
        matmul: as for ``msign``.
    """
    q, r = torch.linalg.qr(uv)
    del uv  # the sign needs its room, and R's
    r_u, r_v = r.chunk(2, dim=-1)
    core = kernels.skew(matmul(r_u, r_v.mT))
    weights = (r_v.mT if side == "in" else r_u).clone()
    del r, r_u, r_v
    return Framed(side, q, msign(core, eps=eps, matmul=matmul), weights)
