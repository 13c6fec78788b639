"""The plan of a step: who stores and computes each matrix, what moves, and what it costs.

Integers and strings. The ranks that share weights build the same plan, each for itself, and compare
digests; what only one of them does is asked for by its rank.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
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

# Of `owner`: 2 hide half of what travels behind the other half's computation.
WAVES = 2


@dataclass(frozen=True, kw_only=True)
class MatrixPlan:
    """The matrices of one part of a weight.

    Attributes:
        weight: its name.
        part: of the weight's view.
        batch: number of matrices, B; this rank's where a group deals them.
        m: rows of a whole matrix.
        n: columns of a whole matrix.
        axis: along which tensor parallelism cuts each matrix, if it does.
        group: index of the process group that shares the weight; None where this rank has it all.
        owner: the rank of the group that computes them (``tp_mode="owner"``).
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
    owner: int | None = None
    param_group: int = 0
    itemsize: int = 4

    @property
    def shared(self) -> bool:
        """Whether every rank of the group has a shard of each matrix."""
        return self.group is not None and self.axis is not None

    @property
    def numel(self) -> int:
        """Elements of the whole matrices."""
        return self.batch * self.m * self.n

    def name(self, index: int) -> str:
        """Of one of the matrices: its number is ``index`` among all ranks'."""
        return matrix_name(self.weight, self.part, index)


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

    def ranks_of(self, matrix: MatrixPlan) -> int:
        """Ranks that have a shard of each of these matrices."""
        return self.sizes[matrix.group] if matrix.group is not None and matrix.shared else 1

    def of_group(self, group: int) -> list[int]:
        """Indices of the matrices that a group's ranks have shards of."""
        return [i for i, x in enumerate(self.matrices) if x.group == group and x.shared]

    def waves(self, group: int) -> list[list[int]]:
        """The group's matrices in the waves of ``owner``, of which one travels while another is
        computed; every owner has an even part in each.
        """
        found: list[list[int]] = [[] for _ in range(WAVES)]
        indices = self.of_group(group)
        for owner in sorted({self.matrices[i].owner or 0 for i in indices}):
            mine = [i for i in indices if (self.matrices[i].owner or 0) == owner]
            sizes = [float(self.matrices[i].numel) for i in mine]
            for i, wave in zip(mine, deal(sizes, WAVES), strict=True):
                found[wave].append(i)
        return [wave for wave in found if wave]

    def batches(self, group: int) -> list[list[int]]:
        """The group's matrices in batches of one shape, for ``distributed`` and ``blockwise``."""
        most = BATCH_ELEMENTS * self.sizes[group]
        return self._batched(self.of_group(group), lambda x: most // (x.m * x.n))

    def own(self) -> list[int]:
        """Indices of the matrices that this rank has whole, or alone."""
        return [i for i, x in enumerate(self.matrices) if not x.shared]

    def own_batches(self, indices: Sequence[int], device: str) -> list[list[int]]:
        """Some of ``own`` in batches of one shape; of one that is too large for a batch by itself
        ``batch_size`` tells the parts.
        """
        return self._batched(indices, lambda x: self.batch_size(x, device))

    def batch_size(self, x: MatrixPlan, device: str) -> int:
        """Matrices like these, whole, that are computed at once.

        Args:
            x: some matrices.
            device: type of the device that computes them.
        """
        most = BATCH_BYTES.get(device, BATCH_BYTES_OF_OTHERS)
        return max(1, most // (x.itemsize * cost.room(x.m, x.n, self.config)))

    def _batched(
        self, indices: Sequence[int], most: Callable[[MatrixPlan], int]
    ) -> list[list[int]]:
        alike: dict[tuple[object, ...], list[list[int]]] = {}
        for i in indices:
            x = self.matrices[i]
            found = alike.setdefault((x.m, x.n, x.axis, x.param_group, x.itemsize), [[]])
            if found[-1] and sum(self.matrices[j].batch for j in found[-1]) + x.batch > most(x):
                found.append([])
            found[-1].append(i)
        return [batch for batches in alike.values() for batch in batches]

    def flop(self, ranks: Sequence[int]) -> float:
        """FLOP of a step on average over steps, products only.

        Args:
            ranks: this rank's in each group.
        """
        total = 0.0
        for x in self.matrices:
            if not self._computes(x, ranks):
                continue
            split = self.ranks_of(x) if self.config.tp_mode in ("distributed", "blockwise") else 1
            total += x.batch * cost.step_flop(x.m, x.n, self.config, x.axis, ranks=split)
        return total

    def state_bytes(self, ranks: Sequence[int]) -> int:
        """Bytes of a rank's moments; see ``flop``."""
        total = 0
        for x in self.matrices:
            if self._computes(x, ranks):
                for moment in moments(x.batch, x.m, x.n, self.config, x.axis).values():
                    shares = self.ranks_of(x) if moment.dim is not None else 1
                    total += moment.nbytes(x.itemsize) // shares
        return total

    def adam_bytes(self) -> int:
        """Bytes that Adam's state of this rank's weights would take, in float32."""
        return sum(ADAM_STATE_BYTES * x.numel // self.ranks_of(x) for x in self.matrices)

    def collectives(self, ranks: Sequence[int], step: int) -> dict[str, Moved]:
        """What a rank hands to collectives in a step, by operation.

        Not counted: whole matrices that the first step after a start measures or decomposes, for a
        reset of spectra and for polar, in ``distributed`` and ``blockwise``.

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
            shared = [self.matrices[i] for i in self.of_group(group)]
            shards = sum(x.itemsize * x.numel // size for x in shared)
            owned = sum(x.itemsize * x.numel // size for x in shared if x.owner == rank)
            if shared and self.config.tp_mode == "owner":
                add("all_to_all", 2 * len(self.waves(group)), 2 * shards + size * owned)
            else:
                for batch in self.batches(group):
                    x = self.matrices[batch[0]]
                    assert x.axis is not None, "a shared matrix has an axis"
                    many = sum(self.matrices[i].batch for i in batch)
                    found = cost.traffic(
                        many,
                        x.m,
                        x.n,
                        self.config,
                        x.axis,
                        ranks=size,
                        step=step,
                        itemsize=x.itemsize,
                    )
                    for op, number in found.calls.items():
                        add(op, number, x.itemsize * found.elements[op])
                    if count := self._reset_in(batch, step):
                        add("all_gather", 1, x.itemsize * count * x.m * x.n // size)
        return {op: Moved(calls[op], sizes[op]) for op in calls}

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
        state, adam = self.state_bytes(ranks), self.adam_bytes()
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
        return x.owner is None or x.group is None or x.owner == ranks[x.group]


def due(name: str, step: int, interval: int) -> bool:
    """Whether the matrix of this name has its turn in this step, one of ``interval``.

    The name decides, so that it is the same step in every layout, and another for other matrices.
    """
    return step % interval == _turn(name, interval)


@functools.lru_cache(maxsize=1 << 16)
def _turn(name: str, interval: int) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) % interval


def deal(costs: Sequence[float], ranks: int) -> list[int]:
    """An owner for each cost, so that no rank has much more than the others: largest first.

    The same on every rank: ties go to the earlier item and the lower rank.
    """
    loads = [0.0] * ranks
    owners = [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owners[item] = min(range(ranks), key=lambda rank: (loads[rank], rank))
        loads[owners[item]] += costs[item]
    return owners


def deal_shards(buckets: Sequence[Sequence[float]]) -> list[list[int]]:
    """A rank for each shard of each bucket: a bucket's costliest to the ranks with least so far.

    The same on every rank: ties go to the earlier shard and the lower rank.

    Args:
        buckets: costs of their shards, as many as there are ranks.

    Returns:
        For every bucket the ranks of its shards.
    """
    found: list[list[int]] = []
    loads = [0.0] * max(map(len, buckets), default=0)
    for costs in buckets:
        ranks = [0] * len(costs)
        costliest = sorted(range(len(costs)), key=lambda shard: (-costs[shard], shard))
        least = sorted(range(len(costs)), key=loads.__getitem__)
        for shard, rank in zip(costliest, least, strict=True):
            ranks[shard] = rank
            loads[rank] += costs[shard]
        found.append(ranks)
    return found


def build_plan(
    matrices: Sequence[MatrixPlan], sizes: Sequence[int], config: PionConfig
) -> StepPlan:
    """The plan for matrices whose owners are to be chosen.

    Args:
        matrices: in the same order on every rank that shares them.
        sizes: ranks of each process group.
        config: the run's options.
    """
    plan = StepPlan(config, tuple(sizes), tuple(matrices))
    if config.tp_mode != "owner":
        return plan
    owned = list(matrices)
    for group, size in enumerate(sizes):
        indices = plan.of_group(group)
        found = [matrices[i] for i in indices]
        costs = [x.batch * cost.step_flop(x.m, x.n, config) for x in found]
        for i, owner in zip(indices, deal(costs, size), strict=True):
            owned[i] = dataclasses.replace(owned[i], owner=owner)
    return StepPlan(config, tuple(sizes), tuple(owned))


def differences(mine: Sequence[str], others: Sequence[Sequence[str]]) -> str:
    """The first line in which two ranks' plans differ, in words; empty where they are alike."""
    for rank, lines in enumerate(others):
        for place in range(max(len(mine), len(lines))):
            a, b = ((x[place] if place < len(x) else "nothing") for x in (mine, lines))
            if a != b:
                return f"this rank has {a}, rank {rank} of the group has {b}"
    return ""
