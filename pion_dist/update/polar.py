"""The polar step: Muon's step, kept on the matrices of one spectrum (docs/algorithm.md).

W = U Σ Vᵀ with U [m, r], V [n, r] and r = min(m, n). Σ never changes; U and V are state. Muon's
step D = η' M (MᵀM)^(−1/2) is expressed in the two singular frames. The diagonal of B = Uᵀ D V would
change singular values to first order, so it is dropped. The rest turns U and V:

    U ← E(A) U,  A U = U X − Z diag(c),  Z = D V − U B;   V ← V E(Y);   W ← U Σ Vᵀ

``kernels.angles`` computes the skew X and Y, and c. E(A) = I + A + A²/2 + A³/8 leaves
E(A)ᵀE(A) = I − A⁶/64; a product with I + (I − UᵀU)/2 removes that and the rounding.

A wide W is stepped as its transpose: L is the larger of m and n, and U has L rows. Where L is much
larger than r, D is not formed: D V = (M V) H, with a polynomial H of (M V)ᵀ M V that is close to
its inverse root. So only M V, U and V are multiplied with L rows. Ranks that divide the rows
exchange sums of r x r matrices, and where r is large divide the algebra of these (``squares``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import kernels
from ..config import PionConfig, Side
from ..cost import polishes_to_third_order, uses_gram
from ..state import LEFT, RIGHT, SIGMA
from .direction import inverse_root, polar
from .peers import Peers
from .precision import (
    DIRECTION_PRODUCTS,
    Products,
    choose_weight_products,
    exact,
    float32_precision,
)
from .readings import read_polar
from .squares import Squares, squares_of

# Muon's steps with this root mean square train at AdamW's learning rates (Moonlight, 2025,
# https://arxiv.org/abs/2502.16982, section 2.2).
RMS = 0.2

Sum = Callable[[Tensor], Tensor]
"""Sums a tensor over the ranks that divide the rows (in place)."""


def factorize(w_Bmn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute U [B, m, r], σ [B, r] in descending order and V [B, n, r] of W, in float64."""
    u, sigma, vt = torch.linalg.svd(w_Bmn.double(), full_matrices=False)
    # Collectives need contiguous tensors.
    u, v = (x.to(w_Bmn.dtype).contiguous() for x in (u, vt.mT))
    return u, sigma.to(w_Bmn.dtype), v


def mismatch(w_Bmn: Tensor, moments: Mapping[str, Tensor], *, all_reduce_sum: Sum) -> Tensor:
    """Compute ‖W − U Σ Vᵀ‖_F / ‖W‖_F of each matrix, [B]; NaN where something is not finite.

    Args:
        w_Bmn: weights, or this rank's rows or columns of them.
        moments: U, Σ and V.
        all_reduce_sum: sums over the ranks that divide W.
    """
    product = torch.bmm(moments[LEFT], (moments[RIGHT] * moments[SIGMA].unsqueeze(-2)).mT)
    norms = [all_reduce_sum(x.square().sum((-2, -1))) for x in (w_Bmn - product, w_Bmn)]
    return (norms[0] / norms[1].clamp_min(torch.finfo(w_Bmn.dtype).tiny)).sqrt()


@dataclass(frozen=True)
class _Frames:
    """Muon's step in the singular frames, in the form that U's step needs.

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


@float32_precision("ieee")
def step(
    g_Bmn: Tensor,
    moments: Mapping[str, Tensor],
    *,
    config: PionConfig,
    lr: float | Tensor,
    large: Side,
    rows: int,
    grads_finite: Tensor,
    peers: Peers | None = None,
    collect_metrics: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Move the average and the factors by one step.

    Args:
        g_Bmn: gradients [B, m, n], float32 or float64, or this rank's rows of them (of the large
            side).
        moments: ``m`` of the gradients' shape, ``left`` U [B, m, r], ``right`` V [B, n, r] and
            ``sigma`` [B, r]. Ranks that divide the rows also divide those of the large side's
            factor. (modified in place)
        config: the run's options.
        lr: η.
        large: the side of the larger dimension.
        rows: L, the number of rows on all ranks.
        grads_finite: boolean scalar on the gradients' device; where it is False nothing moves.
        peers: the ranks that divide the rows, if any do.
        collect_metrics: whether to measure what the step does.

    Returns:
        The weights U Σ Vᵀ, of the gradients' shape; whether each matrix has moved, [B, 1, 1]; and
        the result of ``readings.read_polar``, or None without ``collect_metrics``. A matrix whose
        average is zero does not move, nor does any at a rate of zero.
    """
    direction_products = DIRECTION_PRODUCTS[config.matmul_precision]
    weight_products = choose_weight_products(config.matmul_precision, g_Bmn.device)
    left, right, sigma = moments[LEFT], moments[RIGHT], moments[SIGMA]
    u, v = (left, right) if large == "out" else (right, left)
    r = v.shape[-1]
    squares = squares_of(direction_products, peers, r)
    all_reduce_sum: Sum = _itself if peers is None else peers.all_reduce_sum
    scale = lr * (RMS * math.sqrt(rows))
    beta, nesterov = config.betas[0], config.nesterov
    s = kernels.average(
        moments["m"], g_Bmn, beta=beta, nesterov=nesterov, grads_finite=grads_finite
    )
    norm = all_reduce_sum(kernels.frobenius(s).square_()).sqrt_()
    go = grads_finite & (norm > 0) & (scale > 0)
    unit = [
        _normalized(
            s if large == "out" else s.mT,
            norm,
            own=s is not moments["m"],
            direction_products=direction_products,
        )
    ]
    del s
    frames = _frames(
        unit,
        u,
        v,
        scale,
        rows=rows,
        direction_products=direction_products,
        squares=squares,
        collect_metrics=collect_metrics,
    )
    x, y, c = squares.angles(frames.b, frames.b_transposed, sigma, scale=scale)
    before = None
    if collect_metrics and frames.y is not None:
        d = frames.y
        if frames.h is not None:
            d = direction_products(d, frames.h).mul_(scale)
        of_v = squares.complete(y)
        turns = [_outward(x, c, frames, squares), exact.symmetric(of_v, -of_v)]
        before = d, turns, v.clone(), u * sigma.unsqueeze(-2)
    beside, inner = frames.y, None
    if frames.out is None:
        del frames  # those of a square W are as large as its factors
        coefficients = _cubic(x, squares)
    else:
        coefficients, inner = _coefficients(x, c, frames, scale, squares)
        del frames
    del x
    new_u = direction_products(u, coefficients)
    if beside is not None and inner is not None:
        direction_products.added(new_u, beside, inner, alpha=-1.0)
    new_u.add_(u)
    del coefficients, beside, inner
    _polish(
        new_u,
        squares,
        direction_products=direction_products,
        weight_products=weight_products,
        third_order=polishes_to_third_order(rows, r, config),
    )
    torch.where(go, new_u, u, out=u)
    del new_u
    mine = squares.rows(v)
    new_v = direction_products(mine, _cubic(y, squares)).add_(mine)
    del y
    _polish(
        new_v,
        squares,
        direction_products=direction_products,
        weight_products=weight_products,
        cut=squares.divided,
    )
    torch.where(go, squares.complete(new_v), v, out=v)
    del new_v, mine
    w = weight_products(left, (right * sigma.unsqueeze(-2)).mT)
    if before is None:
        return w, go, None
    d, turns, old_v, old_us = before
    change = exact(w if large == "out" else w.mT, old_v).sub_(old_us)  # ΔW V, of the old V
    metrics = read_polar(change, d, (u, v), turns, numel=rows * r, all_reduce_sum=all_reduce_sum)
    return w, go, torch.where(grads_finite, metrics, torch.zeros_like(metrics))


def _itself(x: Tensor) -> Tensor:
    """Return X: the sum over one rank."""
    return x


def _normalized(s: Tensor, norm: Tensor, *, own: bool, direction_products: Products) -> Tensor:
    """Divide S by its norm and round it for products; in place if the step owns S (``own``)."""
    norm = norm.clamp_min(torch.finfo(norm.dtype).tiny)
    return direction_products.rounded(s.div_(norm) if own else s / norm)


def _frames(
    unit: list[Tensor],
    u: Tensor,
    v: Tensor,
    scale: float | Tensor,
    *,
    rows: int,
    direction_products: Products,
    squares: Squares,
    collect_metrics: bool,
) -> _Frames:
    """Compute Muon's step in the frames by the cheaper of two ways.

    Args:
        unit: a list of the average S, of norm 1, which is taken out of it after its last use.
        u: U.
        v: V.
        scale: η'.
        rows: L.
        direction_products: the products to use.
        squares: the algebra of r x r matrices.
        collect_metrics: whether the metrics need Y.
    """
    r = v.shape[-1]
    if uses_gram(rows, r):
        return _through_gram(unit, u, v, scale, squares, direction_products=direction_products)
    frames = _directly(
        unit, u, v, scale, squares, square=rows == r, direction_products=direction_products
    )
    return frames if frames.out is not None or collect_metrics else replace(frames, y=None)


def _through_gram(
    unit: list[Tensor],
    u: Tensor,
    v: Tensor,
    scale: float | Tensor,
    squares: Squares,
    *,
    direction_products: Products,
) -> _Frames:
    """Compute the frames from Y = M V and the inverse root of YᵀY."""
    y = direction_products(unit.pop(), direction_products.rounded(v))
    inner = squares.summed(direction_products(direction_products.rounded(u).mT, y))
    h, root = inverse_root(squares.gram(y, direction_products), squares=squares)
    b = direction_products(inner, h).to(v.dtype).mul_(scale)
    del inner
    out = squares.rows(root).to(b.dtype).mul_(scale**2)
    del root
    b_transposed = squares.transposed(b)
    return _Frames(b, b_transposed, y, h, _without_inner(out, b, b_transposed, squares))


def _directly(
    unit: list[Tensor],
    u: Tensor,
    v: Tensor,
    scale: float | Tensor,
    squares: Squares,
    *,
    square: bool,
    direction_products: Products,
) -> _Frames:
    """Compute the frames from D = η' polar(M) itself."""
    d = polar(unit, direction_products=direction_products, squares=squares)
    y = direction_products(d, direction_products.rounded(v)).mul_(scale)
    del d
    b = squares.summed(direction_products(direction_products.rounded(u).mT, y)).to(v.dtype)
    b_transposed = squares.transposed(b)
    if square:
        return _Frames(b, b_transposed, y, None, None)
    out = squares.summed(direction_products.symmetric(y.mT, y)).to(v.dtype)
    return _Frames(b, b_transposed, y, None, _without_inner(out, b, b_transposed, squares))


def _without_inner(out: Tensor, b: Tensor, b_transposed: Tensor, squares: Squares) -> Tensor:
    """Subtract BᵀB from rows of (D V)ᵀ D V. (modified in place)"""
    return out.sub_(squares.symmetric(b_transposed, squares.whole(b)))


def _coefficients(
    x: Tensor, c: Tensor, frames: _Frames, scale: float | Tensor, squares: Squares
) -> tuple[Tensor, Tensor]:
    """Compute K and L of E(A) U = U (I + K) − Y L, for a W that is not square. (X, ZᵀZ are lost)

    A² U = U (X² − N) − Z C X and A³ U = U (X³ − X N − N X) − Z C (X² − N), where C = diag(c) and
    N = C ZᵀZ C. So E(A) U = U S − Z T, which with Z = Y H − U B is U (S + B T) − Y (H T).

    Args:
        x: rows of X.
        c: all of c.
        frames: of the step.
        scale: η'.
        squares: the algebra of these matrices.

    Returns:
        K and L, whole.
    """
    assert frames.out is not None, "a square's Z is zero"
    n = frames.out.mul_(squares.rows(c).unsqueeze(-1)).mul_(c.unsqueeze(-2))
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
    s.add_(squares.products(squares.products.rounded(frames.b), t))
    if frames.h is not None:
        t = squares.whole(squares.products(squares.rows(frames.h), t).mul_(scale))
    return squares.whole(s), t


def _outward(x: Tensor, c: Tensor, frames: _Frames, squares: Squares) -> Tensor:
    """Compute −A² restricted to U: N − X²; all rows."""
    x = squares.complete(x)
    square = exact.symmetric(x, -x)
    if frames.out is None:
        return square
    return square + squares.complete(frames.out) * (c.unsqueeze(-1) * c.unsqueeze(-2))


def _cubic(a: Tensor, squares: Squares) -> Tensor:
    """Compute E(A) − I of the rows of skew matrices [B, r, r], whole."""
    whole = squares.whole(a)
    square = squares.symmetric(squares.rows(whole), whole)
    third = squares.symmetric(square, whole, sign=-1)
    return squares.whole(a.add(square, alpha=0.5).add_(third, alpha=0.125))


def _polish(
    u: Tensor,
    squares: Squares,
    *,
    direction_products: Products,
    weight_products: Products,
    cut: bool = True,
    third_order: bool = False,
) -> None:
    """Multiply U by I − N/2, N = UᵀU − I, which squares its orthogonality error. (in place)

    UᵀU decides how far W's spectrum is from Σ. The product with N may be bf16: it is a correction.

    Args:
        u: U, or this rank's rows. (modified in place)
        squares: the algebra of r x r matrices.
        direction_products: for the correction.
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
    u.sub_(direction_products(direction_products.rounded(u), error), alpha=0.5)
