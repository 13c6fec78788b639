"""One Pion step of a batch of matrices of one shape."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor

from .. import kernels
from ..config import PionConfig, Side
from .arrangement import Arrangement, Blocked, Lie, Shard, Whole
from .direction import adapted
from .generators import Dense, Generator, Outer, factors
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
    arrangement: Arrangement | None = None,
    collect_metrics: bool = False,
) -> Tensor | None:
    """Move the moments and the weights by one step (modified in place).

    Args:
        w_Bmn: weights [B, m, n], float32 or float64; shards of them where they are divided.
        g_Bmn: gradients, as the weights.
        moments: as ``state.moments`` says: Lie: ``m_in``, ``v_in`` [B, n, n] and ``m_out``,
            ``v_out`` [B, m, m], or folded; else ``m``, ``v`` [B, m, n]; the ``v`` for the
            adaptive direction only. (modified in place)
        config: the run's options.
        lr: η.
        active: the sides this step applies, in order of application.
        forms: ``dense`` or ``factors`` for each active side; heeded where the matrices are whole.
        grads_finite: boolean scalar on the weights' device; where it is False nothing moves.
        arrangement: how the matrices lie; whole by default.
        collect_metrics: whether to measure what the step does.

    Returns:
        The result of ``readings.read``, or None without ``collect_metrics``.
    """
    direction_products = DIRECTION_PRODUCTS[config.matmul_precision]
    weight_products = choose_weight_products(config.matmul_precision, w_Bmn.device)
    lies = arrangement if arrangement is not None else Whole()
    if config.momentum == "lie":
        generators = _from_lie(
            w_Bmn,
            g_Bmn,
            moments,
            lies,
            config=config,
            active=active,
            grads_finite=grads_finite,
            direction_products=direction_products,
        )
    else:
        generators = _from_average(
            w_Bmn,
            g_Bmn,
            moments,
            lies,
            config=config,
            active=active,
            forms=forms,
            grads_finite=grads_finite,
            direction_products=direction_products,
        )
    rms = config.scaling == "rms"
    known = [a.apply(w_Bmn, matmul=weight_products) if rms else None for a in generators]
    alphas = _alphas(w_Bmn, [term for term in known if term is not None], lies, config=config)
    alphas = alphas * len(generators)
    angles = [alpha * lr for alpha in alphas]
    how = _retraction(config)
    turned = _turning(generators, angles, how)
    change = turned(w_Bmn, known, matmul=weight_products)
    del known
    found = None
    if collect_metrics:
        each = zip(generators, angles, strict=True)
        turnings = [_turning([a], [angle], how) for a, angle in each]
        found = read(
            change, generators, alphas, turnings, lies, active=active, grads_finite=grads_finite
        )
    if config.momentum != "transported":
        kernels.moved(w_Bmn, change, grads_finite=grads_finite)
        return found
    m = moments["m"]
    if any(isinstance(a, Outer) for a in generators):
        # They have views of W and m: both changes before either is made.
        turn = turned(m.to(w_Bmn.dtype), None, matmul=direction_products)
        kernels.moved(w_Bmn, change, grads_finite=grads_finite)
    else:
        kernels.moved(w_Bmn, change, grads_finite=grads_finite)
        del change
        turn = turned(m.to(w_Bmn.dtype), None, matmul=direction_products)
    kernels.moved(m, turn, grads_finite=grads_finite)
    return found


def _from_lie(
    w: Tensor,
    g: Tensor,
    moments: Mapping[str, Tensor],
    lies: Arrangement,
    *,
    config: PionConfig,
    active: Sequence[Side],
    grads_finite: Tensor,
    direction_products: Products,
) -> list[Generator]:
    """Average each side's generators, and turn the active sides' averages into directions."""
    found: dict[Side, Generator] = {}
    for side in config.sides:
        m, v = moments[f"m_{side}"], moments.get(f"v_{side}")
        lie = Lie(m, v, config, grads_finite, wanted=side in active)
        a = lies.averaged(w, g, lie, side=side, direction_products=direction_products)
        if a is None:
            continue
        if config.direction == "msign":
            a = a if config.nesterov else a.clone()  # it may be the moment
            a = lies.sign(a, side=side, eps=config.eps, direction_products=direction_products)
        found[side] = lies.generator(a, side=side)
    return [found[side] for side in active]


def _from_average(
    w: Tensor,
    g: Tensor,
    moments: Mapping[str, Tensor],
    lies: Arrangement,
    *,
    config: PionConfig,
    active: Sequence[Side],
    forms: Mapping[Side, str],
    grads_finite: Tensor,
    direction_products: Products,
) -> list[Generator]:
    """Average the gradient, and project the average to the active sides' generators."""
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
    made: dict[Side, Tensor] = {}
    found: dict[Side, Generator] = {}
    for side in active:
        if lies.low_rank and forms[side] == "factors":
            found[side] = Outer(side, *factors(w, s, side=side))
        else:
            made[side] = lies.product(w, s, side=side, direction_products=direction_products)
    del s  # the sign needs its room, and below that of what it is made from
    for side in list(made):
        k = made.pop(side)
        if sign:
            k = lies.sign(k, side=side, eps=config.eps, direction_products=direction_products)
        found[side] = lies.generator(k, side=side)
    return [found[side] for side in active]


def _alphas(
    w: Tensor, first_order: Sequence[Tensor], lies: Arrangement, *, config: PionConfig
) -> list[Tensor]:
    """α [B, 1, 1], one for all active sides: c √(mn) / (‖A_out W + W A_in‖_F + ε), or 1."""
    batch, m, n = w.shape
    if config.scaling == "none":
        return [w.new_ones(batch, 1, 1)]
    scale: float = config.rms * math.sqrt(lies.shares * m * n)
    return [scale / (lies.norm(*first_order) + config.eps)]


Retraction = Polynomial | Literal["cayley", "exp"]


def _retraction(config: PionConfig) -> Retraction:
    if config.retraction == "taylor":
        return coefficients(config.degree)
    return config.retraction


def _turning(generators: Sequence[Generator], angles: Sequence[Tensor], how: Retraction) -> Turning:
    """What applies every active side's factor."""
    if isinstance(how, tuple):

        def by_polynomial(x: Tensor, known: Known | None, *, matmul: Products) -> Tensor:
            return rotate(x, generators, angles, known, poly=how, matmul=matmul)

        return by_polynomial

    made: list[Generator] = []
    for a, angle in zip(generators, angles, strict=True):
        assert isinstance(a, Dense | Blocked | Shard), "cost.forms keeps cayley and exp dense"
        made.append(a.mapped(functools.partial(factor, retraction=how), angle))

    def by_factors(x: Tensor, known: Known | None, *, matmul: Products) -> Tensor:
        total: Tensor | None = None
        for e in made:
            change = e.apply(x if total is None else x + total, matmul=matmul)
            total = change if total is None else total.add_(change)
        assert total is not None, "a step has an active side"
        return total

    return by_factors
