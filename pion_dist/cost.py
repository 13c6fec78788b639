"""What a step costs, counted: floating-point operations and state, and the form that is cheapest.

A product of [a, b] and [b, c] counts 2abc.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .config import SIDE_OF, Axis, PionConfig, Side
from .iterations import NEWTON_SCHULZ, divides_squares, panels

Form = Literal["dense", "factors"]


def forms(m: int, n: int, config: PionConfig) -> dict[Side, Form]:
    """For each side, how its generator is held: as its matrix, or in factors where that is cheaper.

    Lie moments are dense, and ``cayley`` and ``exp`` need the matrix; the averages of the gradient
    (``transported``, ``ambient``) allow either, but for a matrix sign, and FLOP over their rates
    decide.

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
            and config.retraction == "taylor"
            and config.direction != "msign"
            and _work(d, other, config, form="factors", first=False).weighed(config)
            < _work(d, other, config, form="dense", first=False).weighed(config)
        )
        chosen[side] = "factors" if in_factors else "dense"
    return chosen


def room(m: int, n: int, config: PionConfig) -> int:
    """Elements that a step of one m x n matrix works in, about: generators, iterates, copies.

    Args:
        m: rows of the matrix.
        n: columns of the matrix.
        config: the run's options.
    """
    elements = 4 * m * n
    if config.direction == "polar":
        return elements + 4 * min(m, n) ** 2
    for side, form in forms(m, n, config).items():
        if form == "dense":
            elements += (n if side == "in" else m) ** 2
    return elements


def order(m: int, n: int, active: tuple[Side, ...]) -> tuple[Side, ...]:
    """The active sides as they are applied: the larger first, which costs a product less."""
    return tuple(sorted(active, key=lambda side: -(n if side == "in" else m)))


def step_flop(
    m: int,
    n: int,
    config: PionConfig,
    axis: Axis | None = None,
    *,
    ranks: int = 1,
    device: str = "cuda",
) -> float:
    """FLOP of a step of one m x n matrix, on average over steps (``alternate``: half each side).

    Elementwise work is not counted, nor are the products that replace some of it on a CPU
    (``kernels.THIN``).

    Args:
        m: rows of the whole matrix.
        n: columns of the whole matrix.
        config: the run's options.
        axis: along which ranks or blocks divide it.
        ranks: that compute it together; the count is one's.
        device: type of the device, whose panels the matrix sign has.
    """
    if config.direction == "polar":
        return polar_flop(m, n, config, ranks=ranks, device=device)
    blocks = config.blocks_of(axis)
    divided = ranks > 1 and not blocks
    chosen = forms(m, n, config)
    total = 0.0
    sides = order(m, n, config.sides)
    for position, side in enumerate(sides):
        d, other = (n, m) if side == "in" else (m, n)
        alone = config.side == "alternate" or position == 0
        cut = axis is not None and side == SIDE_OF[axis]
        # Of Divided's rows both products are formed where no transpose is at hand.
        made = 2.0 if divided and cut else 1.0
        size, count = (d // blocks[side], blocks[side]) if side in blocks else (d, 1)
        dense = bool(blocks) or divided
        form: Form = "dense" if dense else chosen[side]
        # Rows of a divided product have no mirror image on their rank.
        on = None if divided else device
        work = _work(size, other, config, form=form, first=alone, device=on)
        always, once = made * count / ranks * work.generator, work.flop - work.generator
        # What every rank does alike: all of a shared side's own algebra, and a whole factor.
        alike = _factor_flop(size, config) if divided or (blocks and not cut) else 0.0
        alike += _sign_flop(size, config, device) if blocks and not cut else 0.0
        once = (once * count - alike) / ranks + alike
        if config.side == "alternate":
            # Both sides' Lie moments are updated every step, so their generators are formed then.
            total += always if config.momentum == "lie" else always / 2
            total += once / 2
        else:
            total += always + once
    return total


def uses_gram(m: int, n: int) -> bool:
    """Whether a polar step takes D V from the Gram matrix of M V, and not from D itself.

    With three quarters of symmetric products computed D takes 10.5 L r² FLOP that the Gram matrix
    does not, and saves 16 r³, L and r the larger and the smaller dimension.
    """
    return 2 * max(m, n) > 3 * min(m, n)


def polishes_to_third_order(m: int, n: int, config: PionConfig) -> bool:
    """Whether a polar step polishes the larger frame further; see ``update.polar``."""
    return uses_gram(m, n) and config.matmul_precision != "highest"


def polar_flop(
    m: int, n: int, config: PionConfig, *, ranks: int = 1, device: str = "cuda"
) -> float:
    """FLOP of a polar step of one m x n matrix; see ``update.polar``.

    Args:
        m: rows.
        n: columns.
        config: the run's options.
        ranks: that divide the rows of the larger dimension; the count is one's.
        device: type of the device, whose panels symmetric products have.
    """
    rows, r = max(m, n) / ranks, min(m, n)
    mirrored = sum(2.0 * (high - low) * high for low, high in panels(r, device))
    full = 2.0 * r * r
    iterated, symmetric, other = square_products(m, n, config)
    alike, half, whole, own = mirrored, mirrored, full, float(r)
    if divides_squares(r, ranks):  # of what is symmetric, all of its rows but in iterations
        alike, half, whole, own = full * _share(ranks), full / ranks, full / ranks, r / ranks
    # M V, Uᵀ D V, U S, the polish of U, and W; UᵀU. V E(Y) and the polish of V; VᵀV.
    tall, of_v = 5 * full + mirrored, 2 * full + mirrored
    if m != n:
        tall += mirrored  # (D V)ᵀ D V
    if uses_gram(m, n):
        tall += full  # Y (H T)
    else:  # D; Y T
        tall += len(NEWTON_SCHULZ) * (mirrored + full) + (full if m != n else 0.0)
    return tall * rows + of_v * own + (iterated * alike + symmetric * half + other * whole) * r


def _share(ranks: int) -> float:
    """A rank's part of a symmetric r x r matrix, of r²: ``update.squares``."""
    return (2 * ranks + 1) / (4 * ranks**2)


def square_products(m: int, n: int, config: PionConfig) -> tuple[int, int, int]:
    """Products of r x r matrices in a polar step: iterated ones, other symmetric ones, the rest."""
    steps = len(NEWTON_SCHULZ)
    # X², Y² and Y³; of a square also X³, of others BᵀB, and the third power of X and Z, B T.
    symmetric, other = 4, 2 * (m != n)
    if uses_gram(m, n):
        # (M V)ᵀ M V to H: all but the first step have four products. N² of the polish. B and H T.
        iterated = 4 * steps - 1 + polishes_to_third_order(m, n, config)
        return iterated, symmetric, other + 2
    return steps, symmetric, other  # the polynomials of D


def generator_products(config: PionConfig, *, first: bool) -> tuple[int, int]:
    """Products with a side's generator in a step: on W, and on a transported moment."""
    if config.retraction in ("cayley", "exp"):
        # The first-order term for the norm, then the factor.
        on_w, on_moment = 1 + (config.scaling == "rms"), 1
    else:
        # The second side multiplies what the first has changed, for a known first-order term too.
        on_w = config.degree + (config.scaling == "rms" and not first)
        on_moment = config.degree
    return on_w, on_moment if config.momentum == "transported" else 0


# Of a GPU's rate of large IEEE float32 products, by matmul_precision: that of its products, and of
# what moves W (three bf16 products for one); and of solvers. From H100's data sheet, but for
# solvers what ``scale.describe`` assumes; one core had 0.45 (tools/fit_scale.py).
_RATES = {"highest": (1.0, 1.0), "high": (7.4, 5.0), "bf16": (15.0, 5.0)}
_SOLVER_RATE = 0.4


@dataclass(frozen=True)
class _Work:
    """FLOP of one side of a step, by what decides their rate.

    Attributes:
        generator: products that make it, at matmul_precision.
        other: further ones at matmul_precision: the matrix sign, the turning of a moment.
        moving: products that move W.
        solvers: LU and exponentials.
    """

    generator: float = 0.0
    other: float = 0.0
    moving: float = 0.0
    solvers: float = 0.0

    @property
    def flop(self) -> float:
        """All."""
        return self.generator + self.other + self.moving + self.solvers

    def weighed(self, config: PionConfig) -> float:
        """All, each over its rate."""
        follows, moves = _RATES[config.matmul_precision]
        products = (self.generator + self.other) / follows + self.moving / moves
        return products + self.solvers / _SOLVER_RATE


def _work(
    d: int,
    other: int,
    config: PionConfig,
    *,
    form: Form,
    first: bool,
    device: str | None = "cuda",
) -> _Work:
    """The work of the side whose generator is [d, d]; None for whole products in its sign."""
    on_w, on_moment = (other * x for x in generator_products(config, first=first))
    row = 2.0 * d * d if form == "dense" else 8.0 * other * d
    # Factors of the gradient's average are there: nothing is computed to have them.
    return _Work(
        generator=other * row if form == "dense" else 0.0,
        other=on_moment * row + _sign_flop(d, config, device),
        moving=on_w * row,
        solvers=_factor_flop(d, config),
    )


def _sign_flop(d: int, config: PionConfig, device: str | None) -> float:
    if config.direction != "msign":
        return 0.0
    whole = [(0, d)] if device is None else panels(d, device)
    computed = sum((high - low) * high for low, high in whole)
    return 2.0 * 3 * len(NEWTON_SCHULZ) * d * computed


def _factor_flop(d: int, config: PionConfig) -> float:
    if config.retraction == "cayley":
        return (2.0 / 3.0 + 2.0) * d**3  # LU and d right-hand sides
    if config.retraction == "exp":
        return 2.0 * 6 * d**3  # degree 8 to 18 in 3 to 5 products, then squarings
    return 0.0
