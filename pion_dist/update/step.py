"""The step of all directions but polar, on a batch of matrices of one shape."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from torch import Tensor

from .. import kernels
from ..config import PionConfig, Side
from .direction import LieMoments, adapted
from .generators import Blocked, Dense, Generator, Outer, Shard, factors
from .layout import Layout, Whole
from .precision import DIRECTION_PRODUCTS, Products, choose_weight_products, float32_precision
from .readings import Turning, read
from .retraction import Known, Polynomial, coefficients, factor, rotate


@float32_precision("ieee")
def step(
    w_Bmn: Tensor,
    g_Bmn: Tensor,
    moments: Mapping[str, Tensor],
    *,
    config: PionConfig,
    lr: float | Tensor,
    active: Sequence[Side],
    forms: Mapping[Side, str],
    grads_finite: Tensor,
    layout: Layout | None = None,
    collect_metrics: bool = False,
) -> Tensor | None:
    """Move the moments and the weights by one step (modified in place).

    Args:
        w_Bmn: weights [B, m, n], float32 or float64; this rank's shards where ranks divide them.
        g_Bmn: gradients, of the weights' shape and dtype.
        moments: those of ``state.moments``. Lie momentum has ``m_in``, ``v_in`` [B, n, n] and
            ``m_out``, ``v_out`` [B, m, m], dense or folded; others have ``m``, ``v`` [B, m, n].
            Only the adaptive direction has a ``v``. (modified in place)
        config: the run's options.
        lr: η.
        active: the sides this step applies, in order of application.
        forms: ``dense`` or ``factors`` for each active side; ignored unless matrices are whole.
        grads_finite: boolean scalar on the weights' device; where it is False nothing moves.
        layout: how the matrices lie over ranks; whole by default.
        collect_metrics: whether to measure what the step does.

    Returns:
        The result of ``readings.read``, or None without ``collect_metrics``.
    """
    direction_products = DIRECTION_PRODUCTS[config.matmul_precision]
    weight_products = choose_weight_products(config.matmul_precision, w_Bmn.device)
    layout = Whole() if layout is None else layout
    by_average = functools.partial(_from_average, forms=forms)
    make: Callable[..., list[Generator]] = _from_lie if config.momentum == "lie" else by_average
    generators = make(
        w_Bmn,
        g_Bmn,
        moments,
        layout,
        config=config,
        active=active,
        grads_finite=grads_finite,
        direction_products=direction_products,
    )
    rms = config.scaling == "rms"
    known = [a.apply(w_Bmn, matmul=weight_products) if rms else None for a in generators]
    alphas = _alphas(w_Bmn, [term for term in known if term is not None], layout, config=config)
    alphas = alphas * len(generators)
    angles = [alpha * lr for alpha in alphas]
    retraction = _retraction(config)
    turn = _turning(generators, angles, retraction)
    change = turn(w_Bmn, known, matmul=weight_products)
    del known
    metrics = None
    if collect_metrics:
        each = zip(generators, angles, strict=True)
        turnings = [_turning([a], [angle], retraction) for a, angle in each]
        metrics = read(
            change, generators, alphas, turnings, layout, active=active, grads_finite=grads_finite
        )
    if config.momentum != "transported":
        kernels.moved(w_Bmn, change, grads_finite=grads_finite)
        return metrics
    m = moments["m"]
    if any(isinstance(a, Outer) for a in generators):
        # An Outer has views of W and m, so compute both changes before either is applied.
        m_change = turn(m.to(w_Bmn.dtype), None, matmul=direction_products)
        kernels.moved(w_Bmn, change, grads_finite=grads_finite)
    else:
        kernels.moved(w_Bmn, change, grads_finite=grads_finite)
        del change
        m_change = turn(m.to(w_Bmn.dtype), None, matmul=direction_products)
    kernels.moved(m, m_change, grads_finite=grads_finite)
    return metrics


def _from_lie(
    w: Tensor,
    g: Tensor,
    moments: Mapping[str, Tensor],
    layout: Layout,
    *,
    config: PionConfig,
    active: Sequence[Side],
    grads_finite: Tensor,
    direction_products: Products,
) -> list[Generator]:
    """Average each side's generators, and turn the active sides' averages into directions."""
    generators: dict[Side, Generator] = {}
    for side in config.sides:
        m, v = moments[f"m_{side}"], moments.get(f"v_{side}")
        lie = LieMoments(m, v, config, grads_finite, wanted=side in active)
        a = layout.averaged(w, g, lie, side=side, direction_products=direction_products)
        if a is None:
            continue
        if config.direction == "msign":
            a = a if config.nesterov else a.clone()  # it may be the moment itself
            a = layout.sign(a, side=side, eps=config.eps, direction_products=direction_products)
        generators[side] = layout.generator(a, side=side)
    return [generators[side] for side in active]


def _from_average(
    w: Tensor,
    g: Tensor,
    moments: Mapping[str, Tensor],
    layout: Layout,
    *,
    config: PionConfig,
    active: Sequence[Side],
    forms: Mapping[Side, str],
    grads_finite: Tensor,
    direction_products: Products,
) -> list[Generator]:
    """Average the gradient, and make the active sides' generators from the average."""
    beta1, beta2 = config.betas
    m = moments["m"]
    s = kernels.average(m, g, beta=beta1, nesterov=config.nesterov, grads_finite=grads_finite)
    if config.direction == "adaptive":
        square = m.to(g.dtype).square()
        v = kernels.average(
            moments["v"], square, beta=beta2, nesterov=False, grads_finite=grads_finite
        )
        s = adapted(s, v, eps=config.eps)
    sign = config.direction == "msign"
    matrices: dict[Side, Tensor] = {}
    generators: dict[Side, Generator] = {}
    for side in active:
        if layout.low_rank and forms[side] == "factors":
            generators[side] = Outer(side, *factors(w, s, side=side))
        else:
            matrices[side] = layout.generator_matrix(
                w, s, side=side, direction_products=direction_products
            )
    del s  # the sign needs the memory of S, and of each matrix that it replaces
    for side in list(matrices):
        k = matrices.pop(side)
        if sign:
            k = layout.sign(k, side=side, eps=config.eps, direction_products=direction_products)
        generators[side] = layout.generator(k, side=side)
    return [generators[side] for side in active]


def _alphas(
    w: Tensor, first_order: Sequence[Tensor], layout: Layout, *, config: PionConfig
) -> list[Tensor]:
    """Compute α [B, 1, 1] of all active sides: c √(mn) / (‖A_out W + W A_in‖_F + ε), or 1."""
    batch, m, n = w.shape
    if config.scaling == "none":
        return [w.new_ones(batch, 1, 1)]
    scale: float = config.rms * math.sqrt(layout.shares * m * n)
    return [scale / (layout.norm(*first_order) + config.eps)]


Retraction = Polynomial | Literal["cayley", "exp"]


def _retraction(config: PionConfig) -> Retraction:
    if config.retraction == "taylor":
        return coefficients(config.degree)
    return config.retraction


def _turning(
    generators: Sequence[Generator], angles: Sequence[Tensor], retraction: Retraction
) -> Turning:
    """Return the function that applies every active side's orthogonal factor."""
    if isinstance(retraction, tuple):

        def by_polynomial(x: Tensor, known: Known | None, *, matmul: Products) -> Tensor:
            return rotate(x, generators, angles, known, poly=retraction, matmul=matmul)

        return by_polynomial

    orthogonal: list[Generator] = []  # E − I of each side
    for a, angle in zip(generators, angles, strict=True):
        assert isinstance(a, Dense | Blocked | Shard), "cost.forms keeps cayley and exp dense"
        orthogonal.append(a.mapped(functools.partial(factor, retraction=retraction), angle))

    def by_factors(x: Tensor, known: Known | None, *, matmul: Products) -> Tensor:
        total: Tensor | None = None
        for e in orthogonal:
            change = e.apply(x if total is None else x + total, matmul=matmul)
            total = change if total is None else total.add_(change)
        assert total is not None, "a step has an active side"
        return total

    return by_factors
