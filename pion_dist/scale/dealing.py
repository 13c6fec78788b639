"""Where Megatron stores the weights of a pool, and what Pion plans for them."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..config import PionConfig
from ..dealing import ranges
from ..matrix_plan import MatrixPlan
from ..plan import StepPlan
from ..state import divided_axis
from ..teams import GroupSizes, build_plan, team_sizes
from .stage import Pool

ALIGNMENT = 64  # elements, of a weight's start in its buffer
BUCKET_ALIGNMENT = 128  # elements, of a bucket's end


@dataclass(frozen=True)
class Buffer:
    """Weights in a flat buffer, which is cut into buckets, each divided over ranks.

    Attributes:
        weights: of each its start and stop, and the number of its bucket.
        buckets: elements [start, stop).
        ranks: that divide a bucket.
    """

    weights: tuple[tuple[int, int, int], ...]
    buckets: tuple[tuple[int, int], ...]
    ranks: int

    @property
    def numel(self) -> int:
        """Elements, the few that align weights included."""
        return self.buckets[-1][1]

    def ranges(self, weight: int) -> tuple[tuple[int, int], ...]:
        """Elements [start, stop) of a weight that each rank stores."""
        start, stop, bucket = self.weights[weight]
        return ranges(start, stop, self.buckets[bucket], self.ranks)


def bucket_numel(ranks: int) -> int:
    """Elements from which on Megatron's DDP ends a bucket."""
    return max(40_000_000, 1_000_000 * ranks)


def buffer(numels: Sequence[int], ranks: int, bucket_size: int | None = None) -> Buffer:
    """The buffer of weights as Megatron's distributed optimizer fills it, last weight first.

    (DistributedOptimizer._compute_per_buffer_param_layout of 0.19.)

    Args:
        numels: of the weights, in the model's order.
        ranks: that divide a bucket.
        bucket_size: elements; by default DDP's.
    """
    size = bucket_numel(ranks) if bucket_size is None else bucket_size
    places = [(0, 0, 0)] * len(numels)
    buckets: list[tuple[int, int]] = []
    first = end = 0
    for i in reversed(range(len(numels))):
        start = up(end, ALIGNMENT)
        end = start + numels[i]
        places[i] = start, end, len(buckets)
        if i == 0 or end - first >= size:
            end = up(end, math.lcm(ranks, BUCKET_ALIGNMENT))
            buckets.append((first, end))
            first = end
    return Buffer(tuple(places), tuple(buckets), ranks)


def up(value: int, multiple: int) -> int:
    """The smallest multiple that is not below a value."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class Wave:
    """A wave of a group's exchange: bytes by rank.

    Attributes:
        indices: of the matrices, in the plan.
        sent: to the teams.
        got: by the teams.
        returned: by the teams.
        taken: back where weights are stored.
    """

    indices: tuple[int, ...]
    sent: tuple[int, ...]
    got: tuple[int, ...]
    returned: tuple[int, ...]
    taken: tuple[int, ...]


@dataclass(frozen=True)
class Planned:
    """What ``Pion`` plans for a pool.

    Attributes:
        plan: the same on all ranks of the pool.
        names: of the plan's groups.
        waves: of each group's exchange.
        stored: elements of the weights by data-parallel rank.
    """

    plan: StepPlan
    names: tuple[str, ...]
    waves: tuple[tuple[Wave, ...], ...]
    stored: tuple[int, ...]


@functools.lru_cache(maxsize=32)
def planned(pool: Pool, config: PionConfig, node: int) -> Planned:
    """Plan a pool as a run does: ranges of a buffer, and teams that ``teams.build_plan`` chooses.

    Args:
        pool: the weights.
        config: the run's options.
        node: ranks of a node.
    """
    matrices, sizes = matrices_of(pool, config)
    groups = []
    for name, ranks in sizes.items():
        near = max(1, node // apart(pool, name))
        groups.append(GroupSizes(ranks, team_sizes(ranks, config, cut=pool.tp), near))
    return with_waves(pool, build_plan(matrices, groups, config), tuple(sizes))


def apart(pool: Pool, name: str) -> int:
    """Distance of neighbours in a group of a pool, in the order of all ranks."""
    return 1 if name == "grid" else pool.apart


def matrices_of(pool: Pool, config: PionConfig) -> tuple[list[MatrixPlan], dict[str, int]]:
    """A pool's matrices, whose teams are to be chosen, and the sizes of groups by name."""
    stored = buffer([w.numel for w in pool.items], pool.ranks)
    sizes: dict[str, int] = {}
    matrices = []
    for number, w in enumerate(pool.items):
        view = w.rotated.view
        cut = w.rotated.ranks if view.axis is not None else 1
        name, size = ("grid" if cut > 1 else pool.name), cut * pool.ranks
        if size > 1:
            sizes[name] = size
        parts = stored.ranges(number) if pool.ranks > 1 else ()
        matrices += [
            MatrixPlan(
                weight=w.name,
                part=part,
                batch=batch,
                m=m,
                n=n,
                axis=view.axis,
                group=list(sizes).index(name) if size > 1 else None,
                cut=cut,
                stored=tuple((view.position(part, a), view.position(part, b)) for a, b in parts),
                along=divided_axis(m, n, config, view.axis),
            )
            for part, (batch, m, n) in view.whole_shapes(cut).items()
        ]
    return matrices, sizes


def with_waves(pool: Pool, plan: StepPlan, names: tuple[str, ...]) -> Planned:
    """Count the bytes of a plan's waves."""
    groups = range(len(names))
    return Planned(
        plan,
        names,
        tuple(tuple(_wave(plan, each, plan.sizes[g]) for each in plan.waves(g)) for g in groups),
        tuple(
            plan.stored_numel(ranks_of(pool, names, rank * pool.tp)) for rank in range(pool.ranks)
        ),
    )


def ranks_of(pool: Pool, names: Sequence[str], rank: int) -> list[int]:
    """A rank's numbers in the groups: of all ranks of a pool those of the data-parallel group."""
    return [rank if name == "grid" else rank // pool.tp for name in names]


def _wave(plan: StepPlan, indices: Sequence[int], size: int) -> Wave:
    sent, got, returned, taken = ([0] * size for _ in range(4))
    for i in indices:
        x = plan.matrices[i]
        tensors = 2 if plan.sends_weights else 1
        parts = x.stored or ((0, x.shard_numel),)
        for place, (start, stop) in enumerate(parts):
            if start == stop:
                continue
            for rank in range(place * x.cut, (place + 1) * x.cut):
                for share, member in enumerate(x.team):
                    if count := x.flow(rank, share):
                        there = x.itemsize * tensors * count
                        back = x.itemsize * (count + plan.flags(x))
                        sent[rank] += there
                        got[member] += there
                        returned[member] += back
                        taken[rank] += back
    return Wave(tuple(indices), *map(tuple, (sent, got, returned, taken)))
