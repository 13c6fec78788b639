"""The polar step: Muon's step, kept on the matrices of one spectrum (docs/polar.md).

W = U Σ Vᵀ with U [m, r], V [n, r] and r = min(m, n). Σ never changes; U and V are state. Muon's
step D = η' M (MᵀM)^(−1/2) is taken apart in the two singular frames. What would change singular
values to first order, the diagonal of B = Uᵀ D V, is dropped. The rest turns U and V:

    U ← E(A) U,  A U = U X − Z diag(c),  Z = D V − U B;   V ← V E(Y);   W ← U Σ Vᵀ

``kernels.angles`` has the skew X and Y, and c. E(A) = I + A + A²/2 + A³/8 leaves
E(A)ᵀE(A) = I − A⁶/64, and I + (I − UᵀU)/2 takes away that and the rounding.

A wide W is stepped as its transpose: L is the larger of m and n, and U has L rows. D is not formed
where L is much larger than r: D V = (M V) H with the polynomial H of (M V)ᵀ M V that is close to
its inverse root, so that only products of L rows with M V, U and V are left. Rows divide over
ranks with sums of r x r matrices and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels
from ..config import PionConfig, Side
from ..cost import uses_gram
from ..state import LEFT, RIGHT, SIGMA
from .direction import inverse_root, polar
from .precision import PRODUCTS, Products, exact, float32_precision, moving
from .readings import read_polar

# Muon's steps of this root mean square train at AdamW's learning rates (Moonlight, 2025,
# https://arxiv.org/abs/2502.16982, section 2.2).
RMS = 0.2

Sum = Callable[[Tensor], Tensor]
"""Sums what ranks with other rows have (in place)."""


def factorize(w_Bmn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [B, m, r], σ [B, r] in descending order and V [B, n, r] of W, computed in float64."""
    u, sigma, vt = torch.linalg.svd(w_Bmn.double(), full_matrices=False)
    # Contiguous, as collectives need them.
    u, v = (x.to(w_Bmn.dtype).contiguous() for x in (u, vt.mT))
    return u, sigma.to(w_Bmn.dtype), v


def mismatch(w_Bmn: Tensor, moments: Mapping[str, Tensor], *, total: Sum) -> Tensor:
    """‖W − U Σ Vᵀ‖_F / ‖W‖_F of each matrix, [B]: NaN where something is not finite.

    Args:
        w_Bmn: weights, or the rows or columns of them that this rank has.
        moments: U, Σ and V.
        total: of the ranks that divide W.
    """
    product = torch.bmm(moments[LEFT], (moments[RIGHT] * moments[SIGMA].unsqueeze(-2)).mT)
    norms = [total(x.square().sum((-2, -1))) for x in (w_Bmn - product, w_Bmn)]
    return (norms[0] / norms[1].clamp_min(torch.finfo(w_Bmn.dtype).tiny)).sqrt()


@dataclass(frozen=True)
class _Frames:
    """Muon's step in the singular frames, as the step of U needs it.

    Attributes:
        b: B = Uᵀ D V, [B, r, r].
        y: [B, L, r], with D V = Y H.
        h: [B, r, r]; None for the identity.
        out: ZᵀZ = (D V)ᵀ D V − BᵀB, [B, r, r]; None for a square W, whose Z is zero.
    """

    b: Tensor
    y: Tensor
    h: Tensor | None
    out: Tensor | None


@float32_precision("ieee")
def step(
    g_Bmn: Tensor,
    moments: Mapping[str, Tensor],
    *,
    config: PionConfig,
    lr: float | Tensor,
    large: Side,
    rows: int,
    ok: Tensor,
    total: Sum = lambda x: x,
    watched: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Move the average and the factors by one step.

    Args:
        g_Bmn: gradients [B, m, n], float32 or float64; the rows (of the large side) that this rank
            has, where ranks divide them.
        moments: ``m`` as the gradients, ``left`` U [B, m, r], ``right`` V [B, n, r], of which one
            is divided likewise, and ``sigma`` [B, r]. (modified in place)
        config: the run's options.
        lr: η.
        large: the side of the larger dimension.
        rows: of that side, on all ranks: L.
        ok: boolean scalar on the gradients' device; where it is False nothing moves.
        total: sums over the ranks that divide the rows.
        watched: whether to measure what the step does.

    Returns:
        The weights U Σ Vᵀ, as the gradients; whether each matrix has moved, [B, 1, 1], which none
        does whose average is zero; and ``readings.read_polar``'s, if it is watched.
    """
    fast = PRODUCTS[config.matmul_precision]
    moves = moving(config.matmul_precision, g_Bmn.device)
    left, right, sigma = moments[LEFT], moments[RIGHT], moments[SIGMA]
    u, v = (left, right) if large == "out" else (right, left)
    r = v.shape[-1]
    s = kernels.average(moments["m"], g_Bmn, beta=config.betas[0], nesterov=config.nesterov, ok=ok)
    s = s if large == "out" else s.mT
    norm = total(kernels.frobenius(s).square_()).sqrt_()
    s = fast.rounded(s / norm.clamp_min(torch.finfo(norm.dtype).tiny))
    scale = lr * (RMS * math.sqrt(rows))
    frames = _frames(s, u, v, scale, rows=rows, fast=fast, total=total)
    del s
    x, y, c = kernels.angles(frames.b, sigma, scale=scale)
    before = None
    if watched:
        d = frames.y if frames.h is None else fast(frames.y, frames.h)
        squares = [_outward(x, c, frames), exact.symmetric(y, -y)]
        before = d, squares, v.clone(), u * sigma.unsqueeze(-2)
    new_u = _turned_out(u, x, c, frames, fast=fast)
    del frames, x
    new_u = _polished(new_u, fast=fast, moves=moves, total=total)
    new_v = torch.add(v, fast(v, _cubic(y, fast=fast)))
    new_v = _polished(new_v, fast=fast, moves=moves, total=lambda x: x)
    go = ok & (norm > 0)
    torch.where(go, new_u, u, out=u)
    torch.where(go, new_v, v, out=v)
    del new_u, new_v
    w = moves(left, (right * sigma.unsqueeze(-2)).mT)
    if before is None:
        return w, go, None
    d, squares, old_v, old_us = before
    change = exact(w if large == "out" else w.mT, old_v).sub_(old_us)  # ΔW V, of the old V
    found = read_polar(change, d, (u, v), squares, numel=rows * r, total=total)
    return w, go, torch.where(ok, found, torch.zeros_like(found))


def _frames(
    s: Tensor,
    u: Tensor,
    v: Tensor,
    scale: float | Tensor,
    *,
    rows: int,
    fast: Products,
    total: Sum,
) -> _Frames:
    """Muon's step of the average S, which has norm 1, in the frames; the cheaper way."""
    r = v.shape[-1]
    if uses_gram(rows, r):
        return _through_gram(s, u, v, scale, fast=fast, total=total)
    return _directly(s, u, v, scale, square=rows == r, fast=fast, total=total)


def _through_gram(
    s: Tensor,
    u: Tensor,
    v: Tensor,
    scale: float | Tensor,
    *,
    fast: Products,
    total: Sum,
) -> _Frames:
    """From Y = M V and the inverse root of YᵀY."""
    y = fast(s, fast.rounded(v))
    gram, inner = _sums([fast.symmetric(y.mT, y), fast(fast.rounded(u).mT, y)], v.dtype, total)
    h, root = inverse_root(gram, matmul=fast)
    b = fast(inner, h).mul_(scale)
    out = root.mul_(scale**2).sub_(fast.symmetric(b.mT, b))
    return _Frames(b, y, h.mul_(scale), out)


def _directly(
    s: Tensor,
    u: Tensor,
    v: Tensor,
    scale: float | Tensor,
    *,
    square: bool,
    fast: Products,
    total: Sum,
) -> _Frames:
    """From D = η' polar(M) itself."""
    y = fast(polar(s, matmul=fast, total=total), fast.rounded(v)).mul_(scale)
    inner = fast(fast.rounded(u).mT, y)
    if square:
        (b,) = _sums([inner], v.dtype, total)
        return _Frames(b, y, None, None)
    b, gram = _sums([inner, fast.symmetric(y.mT, y)], v.dtype, total)
    return _Frames(b, y, None, gram.sub_(fast.symmetric(b.mT, b)))


def _sums(parts: list[Tensor], dtype: torch.dtype, total: Sum) -> list[Tensor]:
    """The ranks' sums of r x r matrices, in one collective."""
    return list(total(torch.stack([x.to(dtype) for x in parts])).unbind())


def _turned_out(u: Tensor, x: Tensor, c: Tensor, frames: _Frames, *, fast: Products) -> Tensor:
    """E(A) U, whose powers of A leave r x r matrices beside U and Z: U S − Z T.

    A² U = U (X² − N) − Z C X and A³ U = U (X³ − X N − N X) − Z C (X² − N), where C = diag(c) and
    N = C ZᵀZ C. With Z = Y H − U B, S and T give U (S + B T) − Y (H T).
    """
    if frames.out is None:
        return torch.add(u, fast(u, _cubic(x, fast=fast)))
    n = frames.out * (c.unsqueeze(-1) * c.unsqueeze(-2))
    square = fast.symmetric(x, x)
    third = kernels.skew(fast(x, square.mul(0.5).sub_(n)), scale=0.125)
    square.sub_(n)
    del n
    t = torch.add(x.mul(0.5), square, alpha=0.125)
    t.diagonal(dim1=-2, dim2=-1).add_(1.0)
    t.mul_(c.unsqueeze(-1))
    s = square.mul_(0.5).add_(third).add_(x)
    del third
    s.add_(fast(frames.b, t))
    change = fast(u, s)
    t = t if frames.h is None else fast(frames.h, t)
    change.sub_(fast(frames.y, t.to(frames.y.dtype)))
    return change.add_(u)


def _outward(x: Tensor, c: Tensor, frames: _Frames) -> Tensor:
    """−A² restricted to U: N − X²."""
    square = exact.symmetric(x, -x)
    if frames.out is None:
        return square
    return square + frames.out * (c.unsqueeze(-1) * c.unsqueeze(-2))


def _cubic(a: Tensor, *, fast: Products) -> Tensor:
    """E(A) − I of skew matrices [B, r, r]."""
    square = fast.symmetric(a, a)
    third = fast.symmetric(square, a, sign=-1)
    return square.mul_(0.5).add_(third, alpha=0.125).add_(a)


def _polished(u: Tensor, *, fast: Products, moves: Products, total: Sum) -> Tensor:
    """U (I + (I − UᵀU)/2): U's distance from orthonormal columns, squared. (modified in place)

    The Gram matrix decides how far W's spectrum is from Σ; the product with it is a correction of
    1e-3 at most, which bf16 rounds to 4e-6.
    """
    gram = total(moves.symmetric(u.mT, u)).mul_(-0.5)
    gram.diagonal(dim1=-2, dim2=-1).add_(0.5)
    return u.add_(fast(u, gram))
