"""The polar step: Muon's step, kept on the matrices of one spectrum (docs/algorithm.md).

W = U Σ Vᵀ with U [m, r], V [n, r] and r = min(m, n). Σ never changes; U and V are state. Muon's
step D = η' M (MᵀM)^(−1/2) is expressed in the two singular frames. The diagonal of B = Uᵀ D V would
change singular values to first order, so it is dropped. The rest turns U and V:

    U ← E(A) U,  A U = U X − Z diag(c),  Z = D V − U B;   V ← V E(Y);   W ← U Σ Vᵀ

``kernels.angles`` computes the skew X and Y, and c. E(A) = I + A + A²/2 + A³/8 leaves
E(A)ᵀE(A) = I − A⁶/64; a product with I + (I − UᵀU)/2 removes that and the rounding.

A wide W is stepped as its transpose: L is the larger of m and n, and U has L rows. ``muon`` has D
in the frames, and ``frames`` their turns. Ranks that divide the rows exchange sums of r x r
matrices, and where r is large divide the algebra of these (``squares``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .. import kernels
from ..config import PionConfig, Side
from ..cost import polishes_to_third_order
from ..state import LEFT, RIGHT, SIGMA
from .frames import coefficients, cubic, negated_square, outward, polish
from .muon import muon_step
from .peers import Peers
from .precision import DIRECTION_PRODUCTS, choose_weight_products, exact, float32_precision
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
    weight_products = choose_weight_products(config.matmul_precision, g_Bmn.device)
    left, right, sigma = moments[LEFT], moments[RIGHT], moments[SIGMA]
    u, v = (left, right) if large == "out" else (right, left)
    r = v.shape[-1]
    squares = squares_of(DIRECTION_PRODUCTS[config.matmul_precision], peers, r)
    all_reduce_sum: Sum = _itself if peers is None else peers.all_reduce_sum
    scale = lr * (RMS * math.sqrt(rows))
    s = _averaged(moments["m"], g_Bmn, config, grads_finite=grads_finite)
    norm = all_reduce_sum(kernels.frobenius(s).square_()).sqrt_()
    go = grads_finite & (norm > 0) & (scale > 0)
    unit = [_normalized(s if large == "out" else s.mT, norm, squares, own=s is not moments["m"])]
    del s
    muon = muon_step(unit, u, v, scale, squares, rows=rows, collect_metrics=collect_metrics)
    x, y, c = squares.angles(muon.b, muon.b_transposed, sigma, scale=scale)
    before = None
    if collect_metrics:
        turns = [outward(x, c, muon, squares), negated_square(y, squares)]
        before = muon.in_v(scale, squares), turns, v.clone(), u * sigma.unsqueeze(-2)
    beside, inner = muon.y, None
    if muon.out is None:
        del muon  # the matrices of a square W are as large as its factors
        outer = cubic(x, squares)
    else:
        outer, inner = coefficients(x, c, muon, scale, squares)
        del muon
    del x
    new_u = squares.products(u, outer)
    if beside is not None and inner is not None:
        squares.products.added(new_u, beside, inner, alpha=-1.0)
    new_u.add_(u)
    del outer, beside, inner
    third_order = polishes_to_third_order(rows, r, config)
    polish(new_u, squares, weight_products=weight_products, third_order=third_order)
    torch.where(go, new_u, u, out=u)
    del new_u
    mine = squares.rows(v)
    new_v = squares.products(mine, cubic(y, squares)).add_(mine)
    del y
    polish(new_v, squares, weight_products=weight_products, cut=squares.divided)
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


def _averaged(m: Tensor, g: Tensor, config: PionConfig, *, grads_finite: Tensor) -> Tensor:
    """Average the gradients; return M, or the look-ahead."""
    beta, nesterov = config.betas[0], config.nesterov
    return kernels.average(m, g, beta=beta, nesterov=nesterov, grads_finite=grads_finite)


def _normalized(s: Tensor, norm: Tensor, squares: Squares, *, own: bool) -> Tensor:
    """Divide S by its norm and round it for products; in place if the step owns S (``own``)."""
    norm = norm.clamp_min(torch.finfo(norm.dtype).tiny)
    return squares.products.rounded(s.div_(norm) if own else s / norm)
