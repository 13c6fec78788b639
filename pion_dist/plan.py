"""The plan of a step: who stores and computes each matrix, what moves, and what it costs.

Integers and strings. The ranks that store a weight together build the same plan, each for itself,
and compare digests; what only one of them does is asked for by its rank.

The ranks of a group are a grid: rank r has the tensor-parallel shard r % cut of each matrix and, of
that shard, what the data-parallel rank r // cut stores. A team of them computes a matrix: one rank,
or the tensor-parallel ranks of one data-parallel rank.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from . import cost
from .config import Axis, PionConfig
from .state import moments

ADAM_STATE_BYTES = 8  # exp_avg and exp_avg_sq in float32

# Weight elements that a rank's batch of matrices may have in `distributed` and `blockwise`: their
# collectives are few, and their copies small beside the weights. 64 Mi elements are 256 MiB.
BATCH_ELEMENTS = 1 << 26


# Bytes that a batch of whole matrices may work in. A CPU's caches larger ones fall out of, smaller
# ones are many calls. At 1, 4, 8, 64 MiB a step with adaptive Lie moments of 24 heads of 64 x 512
# takes 86, 76, 79 and 90 ms, of 96 of 8 x 256 49, 37, 39 and 75 (tools/bench_batch.py's cases, CPU
# time of one thread, torch 2.13). On other devices (not measured) a kernel's launch of 5 us should
# be short beside what it does: at 3 TB/s it moves 15 MB in that time.
BATCH_BYTES = {"cpu": 4 << 20}
BATCH_BYTES_OF_OTHERS = 256 << 20

# Of an exchange: 2 hide half of what travels behind the other half's computation.
WAVES = 2


@dataclass(frozen=True, kw_only=True)
class MatrixPlan:
    """The matrices of one part of a weight.

    Attributes:
        weight: its name.
        part: of the weight's view.
        batch: number of matrices, B; this rank's where tensor parallelism deals them.
        m: rows of a whole matrix.
        n: columns of a whole matrix.
        axis: along which tensor parallelism cuts each matrix, if it does.
        group: index of the process group that stores the weight; None where this rank has it all.
        cut: ranks that have a shard of each matrix.
        stored: elements [start, stop) of a shard that each data-parallel rank stores, counted in
            the order of the part's matrices; empty where each has all of its shard.
        team: ranks of the group that compute the matrices.
        first: number of the first matrix among all ranks'.
        param_group: of the optimizer.
        itemsize: bytes of an element, as computed.
    """

    weight: str
    part: str
    batch: int
    m: int
    n: int
    axis: Axis | None = None
    group: int | None = None
    cut: int = 1
    stored: tuple[tuple[int, int], ...] = ()
    team: tuple[int, ...] = (0,)
    first: int = 0
    param_group: int = 0
    itemsize: int = 4

    @property
    def numel(self) -> int:
        """Elements of the whole matrices."""
        return self.batch * self.m * self.n

    @property
    def shard_numel(self) -> int:
        """Elements of a shard of the matrices."""
        return self.numel // self.cut

    @property
    def shard_shape(self) -> tuple[int, int, int]:
        """[B, m, n] of a shard of the matrices."""
        rows = self.cut if self.axis == "rows" else 1
        return self.batch, self.m // rows, self.n * rows // self.cut

    @property
    def cut_dim(self) -> int:
        """Dimension of [B, m, n] along which shards join."""
        return 1 if self.axis == "rows" else 2

    @property
    def in_place(self) -> bool:
        """Whether the ranks that store the matrices compute them, each its shard."""
        return self.group is None or (not self.stored and len(self.team) == self.cut)

    def interval(self, rank: int) -> tuple[int, int]:
        """Elements [start, stop) of its shard that a rank of the group stores."""
        return self.stored[rank // self.cut] if self.stored else (0, self.shard_numel)

    def member(self, rank: int) -> int:
        """The rank of the team that computes what a rank of the group stores."""
        return self.team[rank % self.cut if len(self.team) > 1 else 0]

    def flow(self, rank: int, member: int) -> int:
        """Elements that a rank of the group stores and a rank of the team computes."""
        start, stop = self.interval(rank)
        return stop - start if self.member(rank) == member else 0

    def name(self, index: int) -> str:
        """Name of the matrix ``index`` of this rank's, the same in every layout."""
        return matrix_name(self.weight, self.part, self.first + index)


def matrix_name(weight: str, part: str, index: int) -> str:
    """What the matrix ``index`` of a part is called, in every layout."""
    return f"{weight}:{part}[{index}]"


@dataclass(frozen=True)
class Moved:
    """What a rank hands to one kind of collective in a step.

    Attributes:
        calls: collectives.
        bytes: of their inputs.
    """

    calls: int
    bytes: int


@dataclass(frozen=True)
class StepPlan:
    """What a rank does in a step.

    Attributes:
        config: the run's options.
        sizes: ranks of each process group.
        matrices: all that the rank has or shares, in order.
    """

    config: PionConfig
    sizes: tuple[int, ...]
    matrices: tuple[MatrixPlan, ...] = field(repr=False)

    def of_group(self, group: int) -> list[int]:
        """Indices of the matrices that a group's ranks store."""
        return [i for i, x in enumerate(self.matrices) if x.group == group]

    def waves(self, group: int) -> list[list[int]]:
        """The group's matrices that are exchanged, in waves; every team has an even part in each.

        One wave travels while another is computed.
        """
        found: list[list[int]] = [[] for _ in range(WAVES)]
        teams: dict[tuple[int, ...], list[int]] = {}
        waves = [(place,) for place in range(WAVES)]
        for i in self.of_group(group):
            if not self.matrices[i].in_place:
                teams.setdefault(self.matrices[i].team, []).append(i)
        for team in sorted(teams):
            sizes = [float(self.matrices[i].numel) for i in teams[team]]
            places = deal(sizes, [waves] * len(sizes), WAVES)
            for i, place in zip(teams[team], places, strict=True):
                found[place].append(i)
        return [sorted(wave) for wave in found if wave]

    def in_place(self) -> list[int]:
        """Indices of the matrices that are computed where they are stored."""
        return [i for i, x in enumerate(self.matrices) if x.in_place]

    def computed(self, indices: Sequence[int], ranks: Sequence[int]) -> list[int]:
        """Those of some matrices that a rank computes; ``ranks`` are its own in each group."""
        return [i for i in indices if self._computes(self.matrices[i], ranks)]

    def batches(self, indices: Sequence[int], device: str) -> list[list[int]]:
        """Some matrices in batches of one shape and team; of one that is too large for a batch by
        itself ``batch_size`` tells the parts.
        """
        return self._batched(indices, lambda x: self.batch_size(x, device))

    def batch_size(self, x: MatrixPlan, device: str) -> int:
        """Matrices like these that are computed at once.

        Args:
            x: some matrices.
            device: type of the device that computes them.
        """
        if len(x.team) > 1:
            return max(1, BATCH_ELEMENTS * len(x.team) // (x.m * x.n))
        most = BATCH_BYTES.get(device, BATCH_BYTES_OF_OTHERS)
        return max(1, most // (x.itemsize * cost.room(x.m, x.n, self.config)))

    def _batched(
        self, indices: Sequence[int], most: Callable[[MatrixPlan], int]
    ) -> list[list[int]]:
        alike: dict[tuple[object, ...], list[list[int]]] = {}
        for i in indices:
            x = self.matrices[i]
            found = alike.setdefault(
                (x.m, x.n, x.axis, x.group, x.team, x.param_group, x.itemsize), [[]]
            )
            if found[-1] and sum(self.matrices[j].batch for j in found[-1]) + x.batch > most(x):
                found.append([])
            found[-1].append(i)
        return [batch for batches in alike.values() for batch in batches]

    def flop(self, ranks: Sequence[int]) -> float:
        """FLOP of a step on average over steps, products only.

        Args:
            ranks: this rank's in each group.
        """
        return sum(
            x.batch * cost.step_flop(x.m, x.n, self.config, x.axis, ranks=len(x.team))
            for x in self.matrices
            if self._computes(x, ranks)
        )

    def state_bytes(self, ranks: Sequence[int]) -> int:
        """Bytes of a rank's moments; see ``flop``."""
        total = 0
        for x in self.matrices:
            if self._computes(x, ranks):
                for moment in moments(x.batch, x.m, x.n, self.config, x.axis).values():
                    shares = len(x.team) if moment.dim is not None else 1
                    total += moment.nbytes(x.itemsize) // shares
        return total

    def stored_numel(self, ranks: Sequence[int]) -> int:
        """Elements of the weights that a rank stores; see ``flop``."""
        total = 0
        for x in self.matrices:
            start, stop = x.interval(0 if x.group is None else ranks[x.group])
            total += stop - start
        return total

    @property
    def sends_weights(self) -> bool:
        """Whether weights travel to their teams: polar's factors tell what they are."""
        return self.config.direction != "polar"

    def flags(self, x: MatrixPlan) -> int:
        """Elements that say which matrices have moved, beside the weights that travel back."""
        return 0 if self.sends_weights else x.batch

    def collectives(self, ranks: Sequence[int], step: int) -> dict[str, Moved]:
        """What a rank hands to collectives in a step, by operation.

        Not counted is what the first step after a start moves besides: weights that it measures for
        a reset of spectra, or decomposes for polar.

        Args:
            ranks: this rank's in each group.
            step: number of the step, from 1 (``alternate`` moves other sides in odd and even ones).
        """
        calls: dict[str, int] = {}
        sizes: dict[str, int] = {}

        def add(op: str, number: int, bytes_: int) -> None:
            calls[op] = calls.get(op, 0) + number
            sizes[op] = sizes.get(op, 0) + bytes_

        for group, (size, rank) in enumerate(zip(self.sizes, ranks, strict=True)):
            add("all_reduce", 1, 4)  # whether all gradients are finite, an int32
            for wave in self.waves(group):
                found = [self.matrices[i] for i in wave]
                add("all_to_all", 2, sum(self._sent(x, rank, size) for x in found))
        together = [i for i, x in enumerate(self.matrices) if len(x.team) > 1]
        # Waves are computed one after the other.
        waves = [wave for group in range(len(self.sizes)) for wave in self.waves(group)]
        for some in (self.in_place(), *waves):
            mine = self.computed([i for i in some if i in set(together)], ranks)
            for batch in self.batches(mine, ""):
                self._add_traffic(add, batch, step)
        return {op: Moved(calls[op], sizes[op]) for op in calls}

    def _sent(self, x: MatrixPlan, rank: int, size: int) -> int:
        """Bytes that a rank sends of exchanged matrices: to their team and back."""
        start, stop = x.interval(rank)
        sent = (2 if self.sends_weights else 1) * (stop - start)
        if rank in x.team:
            back = [x.flow(other, rank) for other in range(size)]
            sent += sum(count + self.flags(x) for count in back if count)
        return x.itemsize * sent

    def _add_traffic(
        self, add: Callable[[str, int, int], None], batch: Sequence[int], step: int
    ) -> None:
        """Add the collectives of a team that divides matrices."""
        x = self.matrices[batch[0]]
        assert x.axis is not None, "a divided matrix has an axis"
        found = cost.traffic(
            sum(self.matrices[i].batch for i in batch),
            x.m,
            x.n,
            self.config,
            x.axis,
            ranks=len(x.team),
            step=step,
            itemsize=x.itemsize,
        )
        for op, number in found.calls.items():
            add(op, number, x.itemsize * found.elements[op])
        if count := self._reset_in(batch, step):
            add("all_gather", 1, x.itemsize * count * x.m * x.n // len(x.team))

    def _reset_in(self, batch: Sequence[int], step: int) -> int:
        """Matrices of a batch whose spectrum is reset in a step."""
        interval, found = self.config.spectrum_reset_interval, [self.matrices[i] for i in batch]
        names = [x.name(index) for x in found for index in range(x.batch)]
        return sum(due(name, step, interval) for name in names) if interval else 0

    def lines(self, group: int) -> list[str]:
        """What the ranks of a group have to have alike, a line for each matrix."""
        return [*self.config.lines(), *(repr(x) for x in self.matrices if x.group == group)]

    def digest(self, group: int) -> str:
        """SHA-256 of ``lines``."""
        return hashlib.sha256("\n".join(self.lines(group)).encode()).hexdigest()

    def totals(self, ranks: Sequence[int]) -> str:
        """One line of what a rank has and does; see ``collectives``."""
        state, adam = self.state_bytes(ranks), ADAM_STATE_BYTES * self.stored_numel(ranks)
        return (
            f"{sum(x.batch for x in self.matrices)} matrices in "
            f"{len({x.weight for x in self.matrices})} weights, {self.flop(ranks):.3e} FLOP a "
            f"step, {state:,} bytes of state on this rank, {state / adam if adam else 0.0:.2f} of "
            f"Adam's for the same weights; moves {self._moves(ranks)}"
        )

    def _moves(self, ranks: Sequence[int]) -> str:
        odd, even = (
            ", ".join(
                f"{moved.calls} {op.replace('_', '-')} of {moved.bytes:,} bytes"
                for op, moved in self.collectives(ranks, step).items()
            )
            for step in (1, 2)
        )
        return (odd if odd == even else f"{odd} in odd steps, {even} in even ones") or "nothing"

    def _computes(self, x: MatrixPlan, ranks: Sequence[int]) -> bool:
        return x.group is None or ranks[x.group] in x.team


def due(name: str, step: int, interval: int) -> bool:
    """Whether the matrix of this name has its turn in this step, one of ``interval``.

    The name decides, so that it is the same step in every layout, and another for other matrices.
    """
    return step % interval == _turn(name, interval)


@functools.lru_cache(maxsize=1 << 16)
def _turn(name: str, interval: int) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) % interval


def build_plan(
    matrices: Sequence[MatrixPlan], sizes: Sequence[int], config: PionConfig
) -> StepPlan:
    """The plan for matrices whose teams are to be chosen: evenly by cost, the costliest first.

    Args:
        matrices: in the same order on every rank that stores them.
        sizes: ranks of each process group.
        config: the run's options.
    """
    found = list(matrices)
    for group, size in enumerate(sizes):
        indices = [i for i, x in enumerate(matrices) if x.group == group]
        teams = [_teams(matrices[i], size, config) for i in indices]
        costs = [
            x.batch * cost.step_flop(x.m, x.n, config, x.axis, ranks=len(each[0]))
            for x, each in zip((matrices[i] for i in indices), teams, strict=True)
        ]
        for i, each, place in zip(indices, teams, deal(costs, teams, size), strict=True):
            found[i] = dataclasses.replace(found[i], team=each[place])
    return StepPlan(config, tuple(sizes), tuple(found))


def _teams(x: MatrixPlan, size: int, config: PionConfig) -> list[tuple[int, ...]]:
    """The teams that can compute matrices of a group of ``size`` ranks."""
    if config.tp_mode == "owner" or x.cut == 1:
        return [(rank,) for rank in range(size)]
    return [tuple(range(first, first + x.cut)) for first in range(0, size, x.cut)]


def ranges(
    start: int, stop: int, bucket: tuple[int, int], ranks: int
) -> tuple[tuple[int, int], ...]:
    """The elements [a, b) of a weight that each of ``ranks`` ranks stores, counted from its start.

    Args:
        start: of the weight, in its buffer.
        stop: of the weight.
        bucket: start and stop of the bucket that has it, which is divided evenly.
        ranks: that divide the bucket.
    """
    share = (bucket[1] - bucket[0]) // ranks
    ends = [min(max(bucket[0] + rank * share, start), stop) - start for rank in range(ranks + 1)]
    return tuple(itertools.pairwise(ends))


def deal(
    costs: Sequence[float], teams: Sequence[Sequence[tuple[int, ...]]], ranks: int
) -> list[int]:
    """A team for each cost, so that no rank has much more than the others: costliest first.

    The same on every rank: ties go to the earlier item and the earlier team.

    Args:
        costs: of each item, for each rank of its team.
        teams: of each item, those that can have it.
        ranks: that are in teams.

    Returns:
        The place of each item's team among its ``teams``.
    """
    loads = [0.0] * ranks
    places = [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        each = teams[item]
        place = min(range(len(each)), key=lambda i: (max(loads[r] for r in each[i]), i))
        places[item] = place
        for rank in each[place]:
            loads[rank] += costs[item]
    return places


def differences(mine: Sequence[str], others: Sequence[Sequence[str]]) -> str:
    """The first line in which two ranks' plans differ, in words; empty where they are alike."""
    for rank, lines in enumerate(others):
        for place in range(max(len(mine), len(lines))):
            a, b = ((x[place] if place < len(x) else "nothing") for x in (mine, lines))
            if a != b:
                return f"this rank has {a}, rank {rank} of the group has {b}"
    return ""
