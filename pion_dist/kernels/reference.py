"""The kernels' functions in plain torch operations, for every device and dtype.

The moments of generators are dense [B, d, d] or folded [B, 2, h, h] (see ``fold``). Each is stored
in its own dtype and computed in that of the product. A step uses the moments as rounded for
storage, so that a resumed run goes on from the same numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import fold


def skew(x_Bdd: Tensor, *, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
    """Compute scale (X − Xᵀ), exactly skew.

    Args:
        x_Bdd: [B, d, d]. (its values may be lost)
        scale: a factor.
        dtype: dtype of the result, which is rounded to it once; x's by default.

    Returns:
        [B, d, d].
    """
    mirrored = fold.transposed(x_Bdd)
    copied = mirrored.data_ptr() != x_Bdd.data_ptr()  # then X can be overwritten
    k = torch.sub(x_Bdd, mirrored, out=x_Bdd if copied else None)
    if scale != 1.0:
        k.mul_(scale)
    return k if dtype is None else k.to(dtype)


def lie_moments(
    x_Bdd: Tensor,
    m: Tensor,
    v: Tensor | None,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    nesterov: bool,
    grads_finite: Tensor,
    wanted: bool,
) -> Tensor | None:
    """Average the generators K = X − Xᵀ, and K∘K, and make the direction.

    Args:
        x_Bdd: the result of ``outer``: X = U Vᵀ [B, d, d], or K folded [B, 2, h, h], for even d.
            (its values may be lost)
        m: average of K, [B, d, d] or folded, float32, float64 or bfloat16; skew.
            (modified in place)
        v: average of K∘K, like m; symmetric with zero diagonal. (modified in place)
        beta1: decay of m <- beta1 m + (1 − beta1) K.
        beta2: decay of v.
        eps: added to the direction's denominator, > 0.
        nesterov: use beta1 m + (1 − beta1) K, with the new m, in place of m.
        grads_finite: boolean scalar; where it is False the moments stay bit for bit and K may be
            anything.
        wanted: whether to return the direction.

    Returns:
        None unless wanted. Else m, or m / (sqrt(v) + eps) if v is given, [B, d, d] of x's dtype,
        exactly skew with zero diagonal; the tensor m itself if it is that already.

    Raises:
        ValueError: m is neither dense nor folded.
    """
    k_folded = x_Bdd.dim() == 4
    d = x_Bdd.shape[-1] * (2 if k_folded else 1)
    m_folded = fold.is_folded(m, d)
    if k_folded:
        k = x_Bdd if m_folded else fold.unfold(x_Bdd, d, skew=True)
    else:
        k = fold.fold_skew(x_Bdd) if m_folded else skew(x_Bdd)
    second = None if v is None else _averaged(v, k.square(), beta=beta2, grads_finite=grads_finite)
    first = _averaged(m, k, beta=beta1, grads_finite=grads_finite)
    if not wanted:
        return None
    a = _look_ahead(first, k, beta=beta1, grads_finite=grads_finite) if nesterov else first
    if second is not None:
        a = a / second.sqrt().add_(eps)
    return fold.unfold(a, d, skew=True) if m_folded else a


def average(
    m_Bmn: Tensor, g_Bmn: Tensor, *, beta: float, nesterov: bool, grads_finite: Tensor
) -> Tensor:
    """Average: m <- beta m + (1 − beta) g.

    Args:
        m_Bmn: [B, m, n], float32, float64 or bfloat16. (modified in place)
        g_Bmn: [B, m, n].
        beta: decay.
        nesterov: return beta m + (1 − beta) g, with the new m, in place of m.
        grads_finite: boolean scalar; where it is False m stays bit for bit and g may be anything.

    Returns:
        m in g's dtype (the tensor m itself if it has that dtype), or the look-ahead, [B, m, n].
    """
    m = _averaged(m_Bmn, g_Bmn, beta=beta, grads_finite=grads_finite)
    return _look_ahead(m, g_Bmn, beta=beta, grads_finite=grads_finite) if nesterov else m


def angles(
    b_Bpr: Tensor,
    transposed_Bpr: Tensor | None,
    sigma_Br: Tensor,
    *,
    scale: float | Tensor,
    first: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute how far a step B turns the singular frames of W = U Σ Vᵀ (docs/algorithm.md).

    With δ = σ_j − σ_i, τ = σ_i + σ_j and the step's length d in each direction, X = (P + Q) / 2
    and Y = (P − Q) / 2 of

        P_ij = −(B + Bᵀ)_ij δ / (δ² + (B + Bᵀ)_ij² + d²)
        Q_ij = −(B − Bᵀ)_ij τ / (τ² + (B − Bᵀ)_ij² + d²)

    and c_j = σ_j / (σ_j² + max(d² − ‖b_j‖², 0) + d²), where b_j is a column of B.

    Args:
        b_Bpr: B [B, r, r], or some of its rows [B, p, r].
        transposed_Bpr: the same rows of Bᵀ; None where B has all.
        sigma_Br: σ [B, r].
        scale: d, a number or a scalar.
        first: number of the first row.

    Returns:
        The same rows of X and Y [B, p, r], which are skew, and elements of c [B, p].
    """
    least = scale * scale + torch.finfo(b_Bpr.dtype).tiny  # B is 0 where d and δ are 0
    x, y = torch.empty_like(b_Bpr), torch.empty_like(b_Bpr)
    other = b_Bpr.mT if transposed_Bpr is None else transposed_Bpr
    own = sigma_Br[:, first : first + b_Bpr.shape[1]]
    for rows in _panels(b_Bpr.shape[1]):
        row, column = own[:, rows].unsqueeze(-1), sigma_Br.unsqueeze(-2)
        b, mirrored = b_Bpr[:, rows], other[:, rows]
        p, q = b + mirrored, b - mirrored
        for entries, distance in ((p, column - row), (q, column + row)):
            below = entries.square().addcmul_(distance, distance).add_(least)
            entries.mul_(distance).div_(below).mul_(-0.5)
        torch.add(p, q, out=x[:, rows])
        torch.sub(p, q, out=y[:, rows])
    beside = (scale * scale - torch.linalg.vector_norm(other, dim=-1).square_()).clamp_min_(0.0)
    c = own / (beside.add_(own.square()).add_(least))
    return x, y, c


def _panels(r: int) -> list[slice]:
    """Choose rows to compute at once: eight copies of them add nothing to a step's peak memory."""
    height = max(64, -(-r // 8))
    return [slice(first, first + height) for first in range(0, r, height)]


def moved(w_Bmn: Tensor, change_Bmn: Tensor, *, grads_finite: Tensor) -> None:
    """Apply a change: w <- w + change.

    Args:
        w_Bmn: [B, m, n]. (modified in place)
        change_Bmn: [B, m, n]. (its values are lost)
        grads_finite: boolean scalar; where it is False w stays bit for bit and the change may be
            anything.
    """
    if grads_finite.device.type == "cpu":
        if grads_finite:
            w_Bmn.add_(change_Bmn)
        return
    new = change_Bmn.add_(w_Bmn)
    if new.dtype == w_Bmn.dtype:
        torch.where(grads_finite, new, w_Bmn, out=w_Bmn)
    else:
        w_Bmn.copy_(torch.where(grads_finite, new, w_Bmn))


def frobenius(x_Bmn: Tensor, y_Bmn: Tensor | None = None) -> Tensor:
    """Compute ‖X + Y‖_F of each matrix (‖X‖_F without Y), at least in float32: [B, 1, 1]."""
    total = x_Bmn if y_Bmn is None else x_Bmn + y_Bmn
    wide = torch.float32 if total.dtype == torch.bfloat16 else None
    norm: Tensor = torch.linalg.vector_norm(total, dim=(-2, -1), keepdim=True, dtype=wide)
    return norm


def _averaged(moment: Tensor, new: Tensor, *, beta: float, grads_finite: Tensor) -> Tensor:
    """Average into ``moment`` (modified in place); return it as stored, in new's dtype."""
    if moment.dtype == new.dtype:
        return moment.lerp_(_where(grads_finite, new, moment), 1.0 - beta)
    old = moment.to(new.dtype)
    moment.copy_(old.lerp_(_where(grads_finite, new, old), 1.0 - beta))
    return moment.to(new.dtype)


def _look_ahead(moment: Tensor, new: Tensor, *, beta: float, grads_finite: Tensor) -> Tensor:
    return moment.lerp(_where(grads_finite, new, moment), 1.0 - beta)


def _where(grads_finite: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Select as torch.where; on the CPU, which can read the flag, without a pass over elements."""
    if grads_finite.device.type == "cpu":
        return new if grads_finite else old
    return torch.where(grads_finite, new, old)
