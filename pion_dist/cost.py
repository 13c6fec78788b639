"""What a step costs, counted: floating-point operations and state, and the form that is cheapest.

A product of [a, b] and [b, c] counts 2abc.
"""

from __future__ import annotations

from typing import Literal

from .config import PionConfig, Side
from .update.direction import NEWTON_SCHULZ

Form = Literal["dense", "factors"]


def forms(m: int, n: int, config: PionConfig) -> dict[Side, Form]:
    """For each side, how its generator is held: as its matrix, or in factors where that is cheaper.

    Lie moments are dense, and ``cayley`` and ``exp`` need the matrix; the averages of the gradient
    (``transported``, ``ambient``) allow either, and the smaller count of FLOP decides.

    Args:
        m: rows of the matrix.
        n: columns of the matrix.
        config: the run's options.

    Returns:
        ``dense`` or ``factors`` for each of ``config.sides``.
    """
    chosen: dict[Side, Form] = {}
    for side in config.sides:
        d, other = (n, m) if side == "in" else (m, n)
        in_factors = (
            config.momentum != "lie"
            and config.retraction in ("taylor", "cubic")
            # Q of the matrix sign has 2·other columns: it must be the narrower one.
            and (config.direction != "msign" or 2 * other < d)
            and _side_flop(
                d, other, config, form="factors", products=_products(config, first=False)
            )
            < _side_flop(d, other, config, form="dense", products=_products(config, first=False))
        )
        chosen[side] = "factors" if in_factors else "dense"
    return chosen


def order(m: int, n: int, active: tuple[Side, ...]) -> tuple[Side, ...]:
    """The active sides as they are applied: the larger first, which costs a product less."""
    return tuple(sorted(active, key=lambda side: -(n if side == "in" else m)))


def step_flop(m: int, n: int, config: PionConfig) -> float:
    """FLOP of a step of one m x n matrix, on average over steps (``alternate``: half each side).

    Elementwise work is not counted.
    """
    chosen = forms(m, n, config)
    total = 0.0
    sides = order(m, n, config.sides)
    for position, side in enumerate(sides):
        d, other = (n, m) if side == "in" else (m, n)
        alone = config.side == "alternate" or position == 0
        flop = _side_flop(
            d, other, config, form=chosen[side], products=_products(config, first=alone)
        )
        if config.side == "alternate":
            # Both sides' Lie moments are updated every step, so their generators are formed then.
            always = 2.0 * other * d * d if config.momentum == "lie" else 0.0
            flop = always + (flop - always) / 2
        total += flop
    return total


def state_elements(m: int, n: int, config: PionConfig) -> int:
    """Elements of Pion's state for one m x n matrix."""
    moments = 2 if config.direction == "adaptive" else 1
    if config.momentum != "lie":
        return moments * m * n
    return moments * sum((n if side == "in" else m) ** 2 for side in config.sides)


def _products(config: PionConfig, *, first: bool) -> int:
    """Products with a side's generator in a step: on W, and on a transported moment."""
    if config.retraction in ("cayley", "exp"):
        on_w, on_moment = 2, 1  # the first-order term for the norm, then the factor
    else:
        degree = 3 if config.retraction == "cubic" else config.degree
        on_w, on_moment = degree + (not first), degree
    return on_w + (on_moment if config.momentum == "transported" else 0)


def _side_flop(d: int, other: int, config: PionConfig, *, form: Form, products: int) -> float:
    """FLOP of one side's generator [d, d] and ``products`` products with it."""
    sign = config.direction == "msign"
    newton_schulz = 2.0 * 3 * len(NEWTON_SCHULZ)
    if form == "dense":
        flop = 2.0 * other * d * d + products * 2.0 * other * d * d
        if sign:
            flop += newton_schulz * d**3
        if config.retraction == "cayley":
            flop += (2.0 / 3.0 + 2.0) * d**3  # LU and d right-hand sides
        if config.retraction == "exp":
            flop += 2.0 * 6 * d**3  # degree 8 to 18 in 3 to 5 products, then squarings
        return flop
    if not sign:
        return products * 8.0 * other * other * d
    k = 2 * other
    qr = 4.0 * d * k * k - 4.0 / 3.0 * k**3
    core = 2.0 * k * k * other + newton_schulz * k**3
    return qr + core + products * (4.0 * other * d * k + 2.0 * other * k * k)
