"""What a step costs, counted: floating-point operations and state, and the form that is cheapest.

A product of [a, b] and [b, c] counts 2abc.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from .config import SIDE_OF, Axis, PionConfig, Side
from .update.direction import NEWTON_SCHULZ
from .update.precision import panels
from .update.scaling import PRODUCTS

Form = Literal["dense", "factors"]


def forms(m: int, n: int, config: PionConfig) -> dict[Side, Form]:
    """For each side, how its generator is held: as its matrix, or in factors where that is cheaper.

    Lie moments are dense, and ``cayley`` and ``exp`` need the matrix; the averages of the gradient
    (``transported``, ``ambient``) allow either, and FLOP over their rates decide: with bf16
    products a QR decomposition costs more than the large matrix.

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
    found = 4 * m * n
    for side, form in forms(m, n, config).items():
        d, other = (n, m) if side == "in" else (m, n)
        if form == "dense":
            found += d * d
        elif config.direction == "msign":  # [U V] and Q, three iterates
            found += 4 * d * other + 12 * other * other
    return found


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
        axis: along which tensor parallelism cuts it.
        ranks: that share its computation (``distributed``, ``blockwise``); the count is one's.
        device: type of the device, whose panels the matrix sign has.
    """
    blocks = config.blocks_of(axis)
    divided = ranks > 1 and not blocks
    chosen = forms(m, n, config)
    total = 0.0
    sides = order(m, n, config.sides)
    for position, side in enumerate(sides):
        d, other = (n, m) if side == "in" else (m, n)
        alone = config.side == "alternate" or position == 0
        cut = axis is not None and side == SIDE_OF[axis]
        # Of Divided's cut side both products of the generator are formed: no transpose is at hand.
        made = 2.0 if divided and cut else 1.0
        size, count = (d // blocks[side], blocks[side]) if side in blocks else (d, 1)
        dense = bool(blocks) or divided
        form: Form = "dense" if dense else chosen[side]
        # Rows of a divided product have no mirror image on their rank.
        work = _work(
            size, other, config, form=form, first=alone, device=None if divided else device
        )
        always, once = made * count / ranks * work.generator, work.flop - work.generator
        # What every rank does alike: all of a shared side's own algebra, and a whole factor.
        alike = _factor_flop(size, config) if divided or (blocks and not cut) else 0.0
        alike += _sign_flop(size, config, device) if blocks and not cut else 0.0
        if config.scaling == "spectral" and (blocks or divided) and not cut:
            alike += PRODUCTS * 2.0 * size * size
        once = (once * count - alike) / ranks + alike
        if config.side == "alternate":
            # Both sides' Lie moments are updated every step, so their generators are formed then.
            total += always if config.momentum == "lie" else always / 2
            total += once / 2
        else:
            total += always + once
    return total


def weight_flop(
    shapes: Iterable[tuple[int, int, int]], config: PionConfig, axis: Axis | None, *, ranks: int
) -> float:
    """FLOP of a step of a weight, on average over the ranks that share its matrices.

    Args:
        shapes: [B, m, n] of its parts' matrices, whole.
        config: the run's options.
        axis: along which tensor parallelism cuts each matrix, if it does.
        ranks: that it cuts the weight to.
    """
    cut = ranks > 1 and axis is not None
    split = ranks if cut and config.tp_mode in ("distributed", "blockwise") else 1
    flop = sum(batch * step_flop(m, n, config, axis, ranks=split) for batch, m, n in shapes)
    return flop / ranks if cut and config.tp_mode == "owner" else flop


@dataclass
class Traffic:
    """What one rank hands to collectives: calls and input elements by operation."""

    calls: Counter[str] = field(default_factory=Counter)
    elements: Counter[str] = field(default_factory=Counter)

    def add(self, op: str, elements: int, calls: int = 1) -> None:
        """Count ``calls`` collectives of ``elements`` each."""
        if calls:
            self.calls[op] += calls
            self.elements[op] += calls * elements


def traffic(
    batch: int,
    m: int,
    n: int,
    config: PionConfig,
    axis: Axis,
    *,
    ranks: int,
    step: int,
    itemsize: int = 4,
) -> Traffic:
    """The collectives of a step of matrices [B, m, n] that ``ranks`` ranks share.

    Args:
        batch: B.
        m: rows of a whole matrix.
        n: columns of a whole matrix.
        config: with ``tp_mode`` ``distributed`` or ``blockwise``.
        axis: along which they are cut.
        ranks: that share them.
        step: number of the step, from 1.
        itemsize: bytes of an element; where one of float32 travels in bf16, two count as one.
    """
    low = config.matmul_precision == "bf16" and itemsize == 4
    found = Traffic()
    active = order(m, n, config.active_sides(step))
    for side in config.sides if config.momentum == "lie" else active:
        d = n if side == "in" else m
        cut = side == SIDE_OF[axis]
        if config.tp_mode == "blockwise":
            if not cut:
                found.add("all_reduce", batch * d * d)
            elif config.scaling == "spectral" and side in active:
                found.add("all_reduce", batch)
            continue
        if cut:
            found.add("all_gather", batch * m * n // ranks, 2)  # of W, and G or its average
        else:
            found.add("reduce_scatter", batch * d * d)
        if side in active:
            first = active[0] == side
            shard = m * n // ranks
            _divided(found, config, batch, d, shard, cut=cut, ranks=ranks, first=first, low=low)
    if config.scaling == "rms":
        found.add("all_reduce", batch)
    return found


def _divided(
    found: Traffic,
    config: PionConfig,
    batch: int,
    d: int,
    shard: int,
    *,
    cut: bool,
    ranks: int,
    first: bool,
    low: bool,
) -> None:
    """Count what an active side of ``distributed`` moves after its generator's rows are there."""
    rows = batch * d * d // ranks
    if config.direction == "msign":
        found.add("all_reduce", batch, 2)  # its norm, and its fourth power's
        found.add("all_gather", rows // 2 if low else rows, 2 * len(NEWTON_SCHULZ) + 1)
    if not cut:
        found.add("all_gather", rows)
        return
    if config.scaling == "spectral":
        found.add("all_gather", batch * d // ranks, PRODUCTS)
    # W is at hand: for the first-order term, and for the first side's first product.
    products = sum(_products(config, first=first))
    if config.retraction in ("cayley", "exp"):
        found.add("all_gather", rows)
        products -= (config.scaling == "rms") + first
    else:
        products -= config.scaling == "rms" or first
    found.add("all_gather", batch * shard, products)


def _products(config: PionConfig, *, first: bool) -> tuple[int, int]:
    """Products with a side's generator in a step: on W, and on a transported moment."""
    if config.retraction in ("cayley", "exp"):
        # The first-order term for the norm, then the factor.
        on_w, on_moment = 1 + (config.scaling == "rms"), 1
    else:
        degree = 3 if config.retraction == "cubic" else config.degree
        # The second side multiplies what the first has changed, for a known first-order term too.
        on_w, on_moment = degree + (config.scaling == "rms" and not first), min(degree, 2)
    return on_w, on_moment if config.momentum == "transported" else 0


def _outer(config: PionConfig, *, first: bool) -> tuple[int, int]:
    """``_products`` with a side's Q or Qᵀ, where its generator is Q C Qᵀ."""
    on_w = 1 + (not first)  # Qᵀ W is of the QR decomposition
    if config.side == "both" and config.scaling == "rms":
        on_w += 1  # both first-order terms are summed for their norm
    return on_w, 2 if config.momentum == "transported" else 0


# Of a GPU's rate of large IEEE float32 products, by matmul_precision: that of its products, and of
# what moves W (three bf16 products for one); and of QR. From H100's data sheet, and for QR what
# ``scale.describe`` assumes; one core had 0.45 (tools/fit_scale.py).
_RATES = {"highest": (1.0, 1.0), "high": (7.4, 5.0), "bf16": (15.0, 5.0)}
_SOLVER_RATE = 0.4


@dataclass(frozen=True)
class _Work:
    """FLOP of one side of a step, by what decides their rate.

    Attributes:
        generator: products that make it, at matmul_precision.
        other: further ones at matmul_precision: the matrix sign, the turning of a moment.
        moving: products that move W.
        vectors: float32 products with vectors.
        solvers: QR, LU and exponentials.
    """

    generator: float = 0.0
    other: float = 0.0
    moving: float = 0.0
    vectors: float = 0.0
    solvers: float = 0.0

    @property
    def flop(self) -> float:
        """All."""
        return self.generator + self.other + self.moving + self.vectors + self.solvers

    def weighed(self, config: PionConfig) -> float:
        """All, each over its rate."""
        follows, moves = _RATES[config.matmul_precision]
        products = (self.generator + self.other) / follows + self.moving / moves
        return products + self.vectors + self.solvers / _SOLVER_RATE


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
    vectors = PRODUCTS if config.scaling == "spectral" else 0
    on_w, on_moment = (other * x for x in _products(config, first=first))
    if form == "dense":
        row = 2.0 * d * d
        return _Work(
            generator=other * row,
            other=on_moment * row + _sign_flop(d, config, device),
            moving=on_w * row,
            vectors=vectors * row,
            solvers=_factor_flop(d, config),
        )
    if config.direction != "msign":
        row = 8.0 * other * d
        return _Work(other=on_moment * row, moving=on_w * row, vectors=vectors * row)
    k = 2 * other
    row, outer = 2.0 * k * k, 2.0 * d * k
    outer_w, outer_moment = (other * x for x in _outer(config, first=first))
    return _Work(
        generator=other * row,
        other=on_moment * row + outer_moment * outer + _sign_flop(k, config, device),
        moving=on_w * row + outer_w * outer,
        vectors=vectors * (row + 2 * outer),
        solvers=4.0 * d * k * k - 4.0 / 3.0 * k**3,
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
