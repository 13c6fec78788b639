"""Pion's step of a pool: what each rank computes, what travels, and what hides what."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ..config import Axis, PionConfig
from ..plan import StepPlan
from ..traffic import traffic
from .dealing import Planned, Wave, apart, ranks_of
from .describe import Cluster
from .rates import AROUND, MASTER, Group, Stepped, priced, streamed
from .stage import Pool
from .trace import kernels

# Bytes read and written for one that travels. Two copies make what is sent, one the matrices of
# what is received. Where weights are stored, old values and flags are read besides.
PACKED, RECEIVED, UNPACKED = 4, 2, 8


@dataclass(frozen=True)
class Work:
    """What a rank does with some matrices.

    Attributes:
        compute: seconds of kernels.
        exchange: seconds of its team's collectives.
        waiting: seconds of waits for moments in host memory.
        moved: bytes that it hands to them, by operation.
    """

    compute: float = 0.0
    exchange: float = 0.0
    waiting: float = 0.0
    moved: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: Work) -> Work:
        """Both, one after the other."""
        return Work(
            self.compute + other.compute,
            self.exchange + other.exchange,
            self.waiting + other.waiting,
            self.moved + other.moved,
        )

    @property
    def total(self) -> float:
        """Seconds."""
        return self.compute + self.exchange + self.waiting


def stepped(pool: Pool, planned: Planned, cluster: Cluster) -> Stepped:
    """Step a pool; on average over odd and even steps."""
    around = [streamed(AROUND * numel, cluster) for numel in planned.stored]
    steps = [step_of(pool, planned, cluster, step) for step in (1, 2)]
    ranks = range(pool.ranks * pool.tp)
    places = [ranks_of(pool, planned.names, rank) for rank in ranks]
    states = _states(planned)
    held = [
        states[None][0] + sum(states[g][rank] for g, rank in enumerate(place)) for place in places
    ]
    offloads = planned.plan.config.offload_state
    moved: dict[str, float] = {}
    for works, _ in steps:
        each = [handed(planned, *both) for both in zip(places, works, strict=True)]
        for op in {op for sizes in each for op in sizes}:
            moved[op] = moved.get(op, 0.0) + max(sizes[op] for sizes in each) / len(steps)
    return Stepped(
        compute=[
            sum(works[rank].compute for works, _ in steps) / len(steps) + around[rank // pool.tp]
            for rank in ranks
        ],
        done=[sum(seconds for _, seconds in steps) / len(steps) + max(around)] * len(ranks),
        state=[planned.plan.state_bytes_on(place, "cuda") for place in places]
        if offloads
        else held,
        on_host=held if offloads else (),
        masters=[MASTER * planned.stored[rank // pool.tp] for rank in ranks],
        moved=dict(sorted(moved.items())),
    )


def handed(planned: Planned, place: Sequence[int], work: Work) -> Counter[str]:
    """Bytes that a rank hands to collectives, by group and operation.

    Args:
        planned: of its pool.
        place: its numbers in the plan's groups.
        work: its own.
    """
    sizes = Counter({f"team {op}": size for op, size in work.moved.items()})
    for name, waves, rank in zip(planned.names, planned.waves, place, strict=True):
        sizes[f"{name} all_reduce"] += 4  # whether all gradients are finite
        if waves:
            sizes[f"{name} all_to_all"] += sum(x.sent[rank] + x.returned[rank] for x in waves)
    return sizes


def step_of(pool: Pool, planned: Planned, cluster: Cluster, step: int) -> tuple[list[Work], float]:
    """The work of each rank of a pool, and seconds until all have stepped."""
    plan = planned.plan
    places = [ranks_of(pool, planned.names, rank) for rank in range(pool.ranks * pool.tp)]
    # Every rank that stores such matrices computes them, or its shards.
    in_place = _work(plan, plan.in_place(), cluster, step, 1)
    by_rank, seconds = [in_place] * len(places), in_place.total
    for group, (name, waves) in enumerate(zip(planned.names, planned.waves, strict=True)):
        size = plan.sizes[group]
        between = apart(pool, name)
        links = Group(size, cluster, between)
        works = [_of_wave(plan, wave, size, cluster, step, between) for wave in waves]
        seconds += links.seconds("all_reduce", 4, 1) + pipelined(waves, works, links)
        for work in works:
            by_rank = [x + work[place[group]] for x, place in zip(by_rank, places, strict=True)]
    return by_rank, seconds


def pipelined(waves: Sequence[Wave], works: Sequence[Sequence[Work]], links: Group) -> float:
    """Seconds until the last wave has travelled back.

    A wave travels to the teams while the one before is computed, and back behind those after it;
    no all-to-all ends before its last rank begins it.
    """
    arrived = 0.0
    arrivals: list[float] = []
    for wave in waves:
        arrived += links.seconds("all_to_all", max(*wave.sent, *wave.got), 1)
        arrivals.append(arrived)
    free = [0.0] * links.size
    back = arrived
    for wave, work, arrival in zip(waves, works, arrivals, strict=True):
        free = [max(t, arrival) + x.total for t, x in zip(free, work, strict=True)]
        back = max(back, *free)
        back += links.seconds("all_to_all", max(*wave.returned, *wave.taken), 1)
    return back


def _of_wave(
    plan: StepPlan, wave: Wave, size: int, cluster: Cluster, step: int, between: int
) -> list[Work]:
    """A wave's work by rank, copies of what travels included."""
    mine: dict[int, list[int]] = {}
    for i in wave.indices:
        for rank in plan.matrices[i].team:
            mine.setdefault(rank, []).append(i)
    by_rank = []
    for rank in range(size):
        packed = PACKED * (wave.sent[rank] + wave.returned[rank]) + RECEIVED * wave.got[rank]
        copies = Work(streamed(packed + UNPACKED * wave.taken[rank], cluster))
        work = _work(plan, mine[rank], cluster, step, between) if rank in mine else Work()
        by_rank.append(copies + work)
    return by_rank


def _work(
    plan: StepPlan, indices: Sequence[int], cluster: Cluster, step: int, between: int
) -> Work:
    """What a rank of their team does with some matrices; ``between``: see ``dealing.apart``."""
    total = Work()
    seconds, copies = [0.0], []
    for batch in plan.batches(indices, "cuda"):
        x = plan.matrices[batch[0]]
        ranks, count = len(x.team), sum(plan.matrices[i].batch for i in batch)
        if len(batch) > 1:  # gradient and moments joined; weight and moments taken apart
            total += Work(streamed(2 * 5 * x.itemsize * count * x.m * x.n / ranks, cluster))
        for part in plan.parts(batch, "cuda"):
            some = sum(map(len, part.values()))
            turn = step if plan.config.side == "alternate" else 1  # other steps are alike
            work = matrices_work(
                some, x.m, x.n, plan.config, x.along, ranks, turn, cluster, between
            )
            total += work
            seconds.append(work.total)
            copies.append(plan.part_bytes(part) / (cluster.link * cluster.host))
    if not plan.config.offload_state:
        return total
    # The first moments come while nothing is computed. While others are, those of the batch before
    # go back and those of the next one come. Nothing waits for the last ones.
    hidden = zip(seconds, [0.0, 0.0, *copies], [*copies, 0.0], strict=False)
    return total + Work(waiting=sum(max(0.0, back + to - busy) for busy, back, to in hidden))


@functools.cache
def matrices_work(
    batch: int,
    m: int,
    n: int,
    config: PionConfig,
    axis: Axis | None,
    ranks: int,
    step: int,
    cluster: Cluster,
    between: int = 1,
) -> Work:
    """What one of ``ranks`` ranks does with a batch of matrices [B, m, n].

    Args:
        batch: B.
        m: rows of a whole matrix.
        n: columns of a whole matrix.
        config: the run's options.
        axis: along which ranks or blocks divide the matrices.
        ranks: of the team.
        step: number of the step, from 1.
        cluster: has the rates.
        between: distance of the team's members; see ``dealing.apart``.
    """
    cut = axis if ranks > 1 or config.blocks > 1 else None
    compute = priced(kernels(batch, m, n, config, cut, ranks=ranks, step=step), cluster)
    if ranks == 1:
        return Work(compute)
    assert axis is not None, "a divided matrix has an axis"
    moved = traffic(batch, m, n, config, axis, ranks=ranks, step=step)
    group = Group(ranks, cluster, between)
    seconds = sum(group.seconds(op, moved.bytes[op], calls) for op, calls in moved.calls.items())
    return Work(compute, seconds, moved=moved.bytes)


def _states(planned: Planned) -> dict[int | None, list[int]]:
    """Bytes of moments by group and rank; of None those of matrices that a rank has by itself."""
    plan = planned.plan
    held: dict[int | None, list[int]] = {g: [0] * size for g, size in enumerate(plan.sizes)}
    held[None] = [0]
    for x in plan.matrices:
        alone = replace(plan, matrices=(x,))
        size = alone.state_bytes([x.team[0]] * len(plan.sizes))
        for rank in x.team:
            held[x.group][rank] += size
    return held
