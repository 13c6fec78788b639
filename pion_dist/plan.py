"""The plan of a step: who stores and computes each matrix, what moves, and what it costs.

Integers and strings. The ranks that store a weight together build the same plan, each for itself,
and compare digests; what only one of them does is asked for by its rank.
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from . import cost
from .config import PionConfig
from .dealing import deal
from .matrix_plan import MatrixPlan
from .state import moments
from .traffic import traffic

ADAM_STATE_BYTES = 8  # exp_avg and exp_avg_sq in float32

# Weight elements that a rank's batch of divided matrices may have: their collectives are few, and
# their copies small beside the weights. 64 Mi elements are 256 MiB.
BATCH_ELEMENTS = 1 << 26


# Bytes that a batch of whole matrices may work in. Larger batches do not fit a CPU's caches, and
# smaller ones need more calls. At 1, 4, 8, 64 MiB a step with adaptive Lie moments of 24 heads of
# 64 x 512 takes 86, 76, 79 and 90 ms, of 96 of 8 x 256 49, 37, 39 and 75 (tools/bench_batch.py's
# cases, CPU time of one thread, torch 2.13). On other devices (not measured) a kernel's launch of
# 5 us should be short beside what it does: at 3 TB/s it moves 15 MB in that time.
BATCH_BYTES = {"cpu": 4 << 20}
BATCH_BYTES_OF_OTHERS = 256 << 20

# Waves of an exchange: 2 hide half of what travels behind the other half's computation.
WAVES = 2

Part = dict[int, range]
"""Matrices that are computed at once: numbers in the plan, and which of each one's batch."""


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
        near: of each, neighbours that are in one node.
        matrices: all that the rank has or shares, in order.
    """

    config: PionConfig
    sizes: tuple[int, ...]
    near: tuple[int, ...]
    matrices: tuple[MatrixPlan, ...] = field(repr=False)

    def of_group(self, group: int) -> list[int]:
        """Indices of the matrices that a group's ranks store."""
        return [i for i, x in enumerate(self.matrices) if x.group == group]

    def waves(self, group: int) -> list[list[int]]:
        """The group's matrices that are exchanged, in waves; every team has an even part in each.

        One wave travels while another is computed.
        """
        dealt: list[list[int]] = [[] for _ in range(WAVES)]
        teams: dict[tuple[int, ...], list[int]] = {}
        for i in self.of_group(group):
            if not self.matrices[i].in_place:
                teams.setdefault(self.matrices[i].team, []).append(i)
        for team in sorted(teams):
            sizes = [float(self.matrices[i].numel) for i in teams[team]]
            for i, (wave,) in zip(teams[team], deal(sizes, [1] * len(sizes), WAVES), strict=True):
                dealt[wave].append(i)
        return [sorted(wave) for wave in dealt if wave]

    def in_place(self) -> list[int]:
        """Indices of the matrices that are computed where they are stored."""
        return [i for i, x in enumerate(self.matrices) if x.in_place]

    def computed(self, indices: Sequence[int], ranks: Sequence[int]) -> list[int]:
        """Those of some matrices that a rank computes; ``ranks`` are its own in each group."""
        return [i for i in indices if self._computes(self.matrices[i], ranks)]

    def batches(self, indices: Sequence[int], device: str) -> list[list[int]]:
        """Some matrices in batches of one shape and team; ``parts`` divides one that is too large.

        Args:
            indices: of the matrices.
            device: type of the device that computes them.
        """
        alike: dict[tuple[object, ...], list[list[int]]] = {}
        for i in indices:
            x = self.matrices[i]
            kind = alike.setdefault(
                (x.m, x.n, x.along, x.group, x.team, x.param_group, x.itemsize), [[]]
            )
            count = sum(self.matrices[j].batch for j in kind[-1]) + x.batch
            if kind[-1] and count > self._batch_size(x, device):
                kind.append([])
            kind[-1].append(i)
        return [batch for batches in alike.values() for batch in batches]

    def parts(self, batch: Sequence[int], device: str) -> list[Part]:
        """What is computed at once of a batch: all, or so many of one weight's matrices."""
        x = self.matrices[batch[0]]
        if len(batch) > 1 or len(x.team) > 1:
            return [{i: range(self.matrices[i].batch) for i in batch}]
        size = self._batch_size(x, device)
        every = range(x.batch)
        return [{batch[0]: every[first : first + size]} for first in range(0, x.batch, size)]

    def _batch_size(self, x: MatrixPlan, device: str) -> int:
        """Matrices like these that are computed at once."""
        if len(x.team) > 1:
            return max(1, BATCH_ELEMENTS * len(x.team) // (x.m * x.n))
        most = BATCH_BYTES.get(device, BATCH_BYTES_OF_OTHERS)
        return max(1, most // (x.itemsize * cost.room(x.m, x.n, self.config)))

    def in_order(self, ranks: Sequence[int], device: str) -> Iterator[Part]:
        """The parts that a rank computes in a step, one after the other.

        Args:
            ranks: this rank's in each group.
            device: type of the device that computes them.
        """
        for some in self._sequence():
            for batch in self.batches(self.computed(some, ranks), device):
                yield from self.parts(batch, device)

    def _sequence(self) -> Iterator[list[int]]:
        """What a step computes, in turns: matrices in place, then each wave of each group."""
        yield self.in_place()
        for group in range(len(self.sizes)):
            yield from self.waves(group)

    def flop(self, ranks: Sequence[int]) -> float:
        """FLOP of a step on average over steps, products only.

        Args:
            ranks: this rank's in each group.
        """
        return sum(
            x.batch * cost.step_flop(x.m, x.n, self.config, x.along, ranks=len(x.team))
            for x in self.matrices
            if self._computes(x, ranks)
        )

    def seconds(self, ranks: Sequence[int]) -> float:
        """Seconds of a rank's matrices by ``traffic.seconds``, which chooses teams; see ``flop``.

        Waits for other ranks are not among them.
        """
        return sum(
            x.seconds(self.config, 1 if x.group is None else self.near[x.group])
            for x in self.matrices
            if self._computes(x, ranks)
        )

    def state_bytes(self, ranks: Sequence[int]) -> int:
        """Bytes of a rank's moments, wherever they are; see ``flop``."""
        computed = self.computed(range(len(self.matrices)), ranks)
        return sum(self._state_bytes(self.matrices[i], self.matrices[i].batch) for i in computed)

    def state_bytes_on(self, ranks: Sequence[int], device: str) -> int:
        """Bytes of moments on the device at a time: all, or of offloaded ones two buffers.

        Args:
            ranks: this rank's in each group.
            device: its type.
        """
        if not self.config.offload_state:
            return self.state_bytes(ranks)
        sizes = list(map(self.part_bytes, self.in_order(ranks, device)))
        return sum(max(own) for own in (sizes[::2], sizes[1::2]) if own)

    def part_bytes(self, part: Part) -> int:
        """Bytes of the moments of what is computed at once."""
        return sum(self._state_bytes(self.matrices[i], len(some)) for i, some in part.items())

    def _state_bytes(self, x: MatrixPlan, count: int) -> int:
        """Bytes of the moments of so many matrices, on a member of their team."""
        team = len(x.team)
        held = moments(count, x.m, x.n, self.config, x.along, team)
        return sum(moment.nbytes(x.itemsize, team) for moment in held.values())

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
                travel = [self.matrices[i] for i in wave]
                add("all_to_all", 2, sum(self._sent(x, rank, size) for x in travel))
        for some in self._sequence():
            together = [i for i in some if len(self.matrices[i].team) > 1]
            mine = self.computed(together, ranks)
            for batch in self.batches(mine, ""):
                self._add_traffic(add, batch, step)
        return {op: Moved(calls[op], sizes[op]) for op in calls}

    def _sent(self, x: MatrixPlan, rank: int, size: int) -> int:
        """Bytes that a rank sends of exchanged matrices: to their team and back."""
        start, stop = x.interval(rank)
        sent = (2 if self.sends_weights else 1) * (stop - start)
        if rank in x.team:
            back = [x.flow(other, x.team.index(rank)) for other in range(size)]
            sent += sum(count + self.flags(x) for count in back if count)
        return x.itemsize * sent

    def _add_traffic(
        self, add: Callable[[str, int, int], None], batch: Sequence[int], step: int
    ) -> None:
        """Add the collectives of a team that divides matrices."""
        x = self.matrices[batch[0]]
        assert x.along is not None, "a divided matrix has an axis"
        moved = traffic(
            sum(self.matrices[i].batch for i in batch),
            x.m,
            x.n,
            self.config,
            x.along,
            ranks=len(x.team),
            step=step,
            itemsize=x.itemsize,
        )
        for op, number in moved.calls.items():
            add(op, number, moved.bytes[op])
        if count := self._reset_in(batch, step):
            add("all_gather", 1, x.itemsize * count * x.m * x.n // len(x.team))

    def _reset_in(self, batch: Sequence[int], step: int) -> int:
        """Matrices of a batch whose spectrum is reset in a step."""
        interval, members = self.config.spectrum_reset_interval, [self.matrices[i] for i in batch]
        names = [name for x in members for name in x.names()]
        return sum(due(name, step, interval) for name in names) if interval else 0

    def lines(self, group: int) -> list[str]:
        """What the ranks of a group have to have alike, a line for each matrix."""
        return [*self.config.lines(), *(repr(x) for x in self.matrices if x.group == group)]

    def digest(self, group: int) -> str:
        """SHA-256 of ``lines``."""
        return hashlib.sha256("\n".join(self.lines(group)).encode()).hexdigest()

    def totals(self, ranks: Sequence[int], device: str) -> str:
        """One line of what a rank has and does.

        Args:
            ranks: this rank's in each group.
            device: type of the device that computes.
        """
        state, adam = self.state_bytes(ranks), ADAM_STATE_BYTES * self.stored_numel(ranks)
        host = (
            f" in host memory, {self.state_bytes_on(ranks, device):,} at a time on the device, all "
            "to it and back in a step"
            if self.config.offload_state
            else ""
        )
        return (
            f"{sum(x.batch for x in self.matrices)} matrices in "
            f"{len({x.weight for x in self.matrices})} weights; {self._here(ranks)}, "
            f"{self.flop(ranks):.3e} FLOP a step, predicted {1e3 * self.seconds(ranks):.3g} ms of "
            f"an H100; {state:,} bytes of state, {state / adam if adam else 0.0:.2f} of "
            f"Adam's for the same weights{host}; moves {self._moves(ranks)}"
        )

    def _here(self, ranks: Sequence[int]) -> str:
        """How many matrices a rank computes, by the sizes of their teams."""
        sizes: Counter[int] = Counter()
        for x in self.matrices:
            sizes[len(x.team)] += x.batch * self._computes(x, ranks)
        counts = [
            f"{count} in teams of {size}" if size > 1 else f"{count} alone"
            for size, count in sorted(sizes.items())
            if count
        ]
        return f"{' and '.join(counts) or 'none'} on this rank"

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


def differences(mine: Sequence[str], others: Sequence[Sequence[str]]) -> str:
    """The first line in which two ranks' plans differ, in words; empty where they are alike."""
    for rank, lines in enumerate(others):
        for place in range(max(len(mine), len(lines))):
            a, b = ((x[place] if place < len(x) else "nothing") for x in (mine, lines))
            if a != b:
                return f"this rank has {a}, rank {rank} of the group has {b}"
    return ""
