"""From moments to the generators a step uses, and the matrix sign of a skew matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import Side
from .generators import Framed, Matmul, factors, skew

# Muon's quintic (K. Jordan, 2024, https://kellerjordan.github.io/posts/muon/), as Megatron's
# --muon-coefficient-type quintic --muon-num-ns-steps 5: singular values end in [0.7, 1.2].
NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5


def averaged(moment: Tensor, new: Tensor, *, beta: float, ok: Tensor) -> None:
    """moment <- beta moment + (1 - beta) new (modified in place), left bit for bit where not ok."""
    moment.lerp_(torch.where(ok, new, moment), 1.0 - beta)


def look_ahead(moment: Tensor, new: Tensor, *, beta: float, ok: Tensor) -> Tensor:
    """beta moment + (1 - beta) new: what Nesterov's momentum uses in place of the moment."""
    return moment.lerp(torch.where(ok, new, moment), 1.0 - beta)


def adapted(first: Tensor, second: Tensor, *, eps: float) -> Tensor:
    """first / (sqrt(second) + eps), elementwise; skew where first is skew and second symmetric."""
    return first / second.sqrt().add_(eps)


def msign(k: Tensor, *, eps: float, matmul: Matmul) -> Tensor:
    """The matrix sign K (KᵀK)^(−1/2) of skew matrices by Newton–Schulz.

    For a skew X the iteration X <- aX + b(XXᵀ)X + c(XXᵀ)²X is X(aI − bP + cP²) with P = X²: three
    products. The result is made exactly skew again, since the spectrum depends on it.

    Args:
        k: skew [B, d, d].
        eps: added to the Frobenius norm that K is divided by first.
        matmul: the product to use.

    Returns:
        Skew [B, d, d], singular values in [0.7, 1.2] where K's are above 1e-3 of its norm; zero
        where they are zero.
    """
    x = k / (frobenius(k) + eps)
    for a, b, c in NEWTON_SCHULZ:
        p = matmul(x, x)
        poly = matmul(p, p).mul_(c).sub_(p, alpha=b)
        x = matmul(x, poly).add_(x, alpha=a)
    return skew(x).mul_(0.5)


def msign_outer(w_Bmn: Tensor, s_Bmn: Tensor, *, side: Side, eps: float, matmul: Matmul) -> Framed:
    """The matrix sign of S's generator at W, without the large matrix.

    The generator is U Vᵀ − V Uᵀ = [U V] J [U V]ᵀ with J = [[0, I], [−I, 0]]; with [U V] = Q R it is
    Q (R J Rᵀ) Qᵀ and its sign Q msign(R J Rᵀ) Qᵀ, well conditioned and exact.
    """
    u, v = factors(w_Bmn, s_Bmn, side=side)
    q, r = torch.linalg.qr(torch.cat((u, v), dim=-1))
    r_u, r_v = r.split(u.shape[-1], dim=-1)
    core = skew(matmul(r_u, r_v.mT))
    return Framed(side, q, msign(core, eps=eps, matmul=matmul))


def frobenius(x: Tensor) -> Tensor:
    """Frobenius norm of each matrix, [B, 1, 1]."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    return norm
