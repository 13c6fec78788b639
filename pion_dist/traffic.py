"""What a step's teams exchange, counted, and the seconds that tell which team is best."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from math import log2

from . import cost
from .config import SIDE_OF, Axis, PionConfig
from .iterations import NEWTON_SCHULZ, divides_squares


@dataclass
class Traffic:
    """What one rank hands to collectives: calls and bytes of their inputs by operation."""

    itemsize: int
    calls: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)

    def add(self, op: str, elements: int, calls: int = 1, *, low: bool = False) -> None:
        """Count ``calls`` collectives of ``elements`` each, ``low`` ones in bf16."""
        if calls:
            self.calls[op] += calls
            self.bytes[op] += calls * elements * (2 if low else self.itemsize)


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
        config: the run's options.
        axis: along which ranks divide them.
        ranks: of the team.
        step: number of the step, from 1.
        itemsize: bytes of an element, as computed.
    """
    low = config.matmul_precision == "bf16" and itemsize == 4
    if config.direction == "polar":
        return _polar_traffic(batch, m, n, config, low=low, ranks=ranks, itemsize=itemsize)
    moved = Traffic(itemsize)
    active = cost.order(m, n, config.active_sides(step))
    for side in config.sides if config.momentum == "lie" else active:
        d, other = (n, m) if side == "in" else (m, n)
        cut = side == SIDE_OF[axis]
        if config.blocks > 1:
            if not cut:
                moved.add("all_reduce", batch * d * d)
            continue
        shards = ("all_gather", batch * m * n // ranks, 2)  # of W, and G or its average
        generator = ("reduce_scatter", batch * d * d, 1)
        moved.add(*(shards if cut else generator))
        if side in active:
            first = active[0] == side
            _divided(moved, config, batch, d, other, cut=cut, ranks=ranks, first=first, low=low)
    if config.scaling == "rms":
        moved.add("all_reduce", batch)
    return moved


# What decides between teams, of an H100 as pion_dist.scale describes it (not measured): FLOP a
# second of a step's products, those in three pieces among them; bytes a second of memory, between
# GPUs of a node and through a network adapter, of which every GPU has one; seconds of each doubling
# of a small collective's ranks, in a node and beyond it. And bytes that a
# polar step moves in memory for each element of W and of its r x r matrices; of these, where ranks
# divide them, for each of a rank's own and of all. Fitted to what pion_dist.scale takes from a
# trace: tests/unit/test_scale.py compares the seconds.
_PRODUCTS = {"highest": 40e12, "high": 250e12, "bf16": 450e12}
_MEMORY, _NODE, _NETWORK, _NODE_LATENCY, _NETWORK_LATENCY = 2.7e12, 340e9, 37e9, 7e-6, 15e-6
_BYTES_OF_W, _BYTES_OF_SQUARE, _BYTES_OF_OWN, _BYTES_OF_ALL = 340, 200, 130, 150


def seconds(
    batch: int,
    m: int,
    n: int,
    config: PionConfig,
    axis: Axis | None,
    *,
    ranks: int,
    near: int,
    travels: int,
) -> float:
    """Seconds for which a team is busy with a step of matrices [B, m, n], roughly.

    They tell which team is best, and not how long a step takes: ``pion_dist.scale`` does.

    Args:
        batch: B.
        m: rows of a whole matrix.
        n: columns of a whole matrix.
        config: the run's options.
        axis: along which ranks divide them.
        ranks: of the team.
        near: of them, that are in one node, at most.
        travels: how often the matrices travel to the team or back.
    """
    numel, square = batch * m * n / ranks, batch * min(m, n) ** 2
    flop = batch * cost.step_flop(m, n, config, axis, ranks=ranks)
    total = flop / _PRODUCTS[config.matmul_precision] + 4 * travels * numel / _NETWORK
    of_square: float = _BYTES_OF_SQUARE
    if divides_squares(min(m, n), ranks):
        of_square = _BYTES_OF_OWN / ranks + _BYTES_OF_ALL
    total += (_BYTES_OF_W * numel + of_square * square) / _MEMORY
    if ranks > 1 and axis is not None:
        moved = traffic(batch, m, n, config, axis, ranks=ranks, step=1)
        latency = _NODE_LATENCY if ranks <= near else _NETWORK_LATENCY
        for op, calls in moved.calls.items():
            rate = _NODE
            if ranks > near:  # a ring passes a node's adapters by turns
                rate = min(_NODE, _NETWORK * (1 if op == "all_to_all" else near))
            passes = {"all_gather": ranks - 1.0, "all_reduce": 2.0}.get(op, 1.0)
            total += calls * latency * log2(ranks) + passes * moved.bytes[op] / rate
    return total


def _polar_traffic(
    batch: int, m: int, n: int, config: PionConfig, *, low: bool, ranks: int, itemsize: int
) -> Traffic:
    """The collectives of a polar step whose rows ranks divide."""
    moved = Traffic(itemsize)
    square = batch * min(m, n) ** 2
    gram, steps = cost.uses_gram(m, n), len(NEWTON_SCHULZ)
    moved.add("all_reduce", batch)  # its norm
    if not divides_squares(r := min(m, n), ranks):
        moved.add("all_reduce", square, 0 if gram else steps)  # XᵀX of its polar factor
        moved.add("all_reduce", square, 2 if m == n else 3)  # B, UᵀU; (D V)ᵀ D V or that of M V
        return moved
    rows, half = square // ranks, batch * (2 * ranks + 1) * (r // (2 * ranks)) ** 2
    halves = 2 + (1 if gram else steps)  # UᵀU, VᵀV, (M V)ᵀ M V or XᵀX
    moved.add("reduce_scatter", ranks * half, halves)
    moved.add("reduce_scatter", square, 1 if gram or m == n else 2)  # Uᵀ D V; (D V)ᵀ D V
    moved.add("all_gather", half, halves + cost.square_products(m, n, config)[0], low=low)
    moved.add("all_to_all", rows, 1 if m == n else 2)  # Bᵀ, and that of the third power
    # X, Y and their functions; of U's rows off U also B, X² − 2 N and T; H T.
    moved.add("all_gather", rows, 4 + 3 * (m != n) + gram, low=low)
    moved.add("all_gather", rows)  # V
    moved.add("all_gather", batch * r // ranks)  # c
    return moved


def _divided(
    moved: Traffic,
    config: PionConfig,
    batch: int,
    d: int,
    other: int,
    *,
    cut: bool,
    ranks: int,
    first: bool,
    low: bool,
) -> None:
    """Count what an active side moves after its generator's rows are on a team's ranks."""
    rows = batch * d * d // ranks
    if config.direction == "msign":
        moved.add("all_reduce", batch, 2)  # its norm, and its fourth power's
        moved.add("all_gather", rows, 2 * len(NEWTON_SCHULZ) + 1, low=low)
    if not cut:
        moved.add("all_gather", rows)
        return
    # W is at hand: for the first-order term, and the first side's product.
    products = sum(cost.generator_products(config, first=first))
    with_w = [config.scaling == "rms", first]
    if config.retraction in ("cayley", "exp"):
        moved.add("all_gather", rows)
        products -= sum(with_w)
    else:
        products -= any(with_w)
    moved.add("all_gather", batch * d * other // ranks, products)
