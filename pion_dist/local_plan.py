"""A rank's part of the plan: the weights it stores, its teams, the moments it holds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from . import dtensor, exchange, state, storage
from .checkpoint import Record
from .config import PionConfig
from .exchange import GroupPeers, ProcessGroup, in_a_node
from .matrices import as_rows
from .matrix_plan import MatrixPlan
from .route import Route
from .slots import Slot
from .storage import compute_dtype
from .teams import GroupSizes, build_plan


class LocalPlan:
    """The plan, and this rank's part of it.

    Attributes:
        plan: of all matrices that this rank stores or computes something of.
        slots: what this rank stores of each weight.
        params: the tensors that are stepped, in the order of the plan.
        places: tensor and part that each of the plan's matrices are of.
        groups: of ranks that together store weights; the plan has their numbers.
        in_place: numbers of matrices that are computed where they are stored, by batch.
        routes: of each group, what travels in each wave.
    """

    def __init__(
        self,
        params: Sequence[Sequence[Tensor]],
        slots: Mapping[Tensor, Slot],
        config: PionConfig,
        teams: Mapping[ProcessGroup, Sequence[ProcessGroup]],
    ) -> None:
        """Build the plan; no collective.

        Args:
            params: by parameter group.
            slots: of each parameter.
            config: the run's options.
            teams: see ``Pion``.
        """
        self.slots = slots
        self.params = [p for group in params for p in group]
        self.groups: list[ProcessGroup] = []
        self.places: list[tuple[Tensor, str]] = []
        self._teams = teams
        self._spreads: dict[Tensor, dict[str, dtensor.Spread]] = {}
        matrices = []
        for number, group in enumerate(params):
            for p in group:
                slot = slots[p]
                if slot.group is not None and slot.group not in self.groups:
                    self.groups.append(slot.group)
                for part in slot.view.shapes:
                    self.places.append((p, part))
                    matrices.append(
                        slot.plan(part, p, groups=self.groups, param_group=number, config=config)
                    )
        sizes = [
            GroupSizes(g.size(), tuple(sorted({1, *self._teams_in(g)})), in_a_node(g))
            for g in self.groups
        ]
        self.plan = build_plan(matrices, sizes, config)
        self._numbers = {place: i for i, place in enumerate(self.places)}
        on: dict[torch.device, list[int]] = {}
        for i in self.plan.computed(self.plan.in_place(), self.ranks):
            on.setdefault(self.places[i][0].device, []).append(i)
        self.in_place = [
            batch for device, mine in on.items() for batch in self.plan.batches(mine, device.type)
        ]
        every = range(len(self.plan.matrices))
        self.routes = [self._routes_of(index, every) for index in range(len(self.groups))]

    @property
    def ranks(self) -> tuple[int, ...]:
        """This rank's in each group."""
        return tuple(group.rank() for group in self.groups)

    def compare(self, steps: Sequence[str]) -> None:
        """Compare the plan with other ranks'; a collective of each group.

        Args:
            steps: lines that have to be the same too.

        Raises:
            RuntimeError: names what differs.
        """
        for index, group in enumerate(self.groups):
            digest = " ".join([self.plan.digest(index), *steps])
            lines = [*self.plan.lines(index), *steps]
            exchange.compare(digest, lines, group=group, what="Pion's plans")

    def team(self, i: int) -> GroupPeers | None:
        """The team of the plan's matrices ``i``; None where it is one rank."""
        x = self.plan.matrices[i]
        if len(x.team) == 1:
            return None
        assert x.group is not None, "a rank that stores all of a matrix computes it alone"
        return GroupPeers(self._teams_in(self.groups[x.group])[len(x.team)])

    def _teams_in(self, group: ProcessGroup) -> dict[int, ProcessGroup]:
        """The teams of a group, of more than one rank, that this rank can be in, by size."""
        return {each.size(): each for each in self._teams.get(group, (group,))}

    def whole(self, i: int, shares: Tensor) -> Tensor:
        """Whole matrices, of this rank's share of some of the plan's ``i``; a team's collective."""
        team = self.team(i)
        return shares if team is None else team.all_gather(shares, self.plan.matrices[i].share_dim)

    def _routes_of(self, index: int, wanted: Collection[int]) -> list[Route]:
        """What travels of some matrices in each wave of a group."""
        group, matrices = self.groups[index], self.plan.matrices
        waves = ([i for i in wave if i in wanted] for wave in self.plan.waves(index))
        return [
            Route(
                {i: matrices[i] for i in wave},
                {i: self.plan.flags(matrices[i]) for i in wave},
                rank=group.rank(),
                size=group.size(),
            )
            for wave in waves
            if wave
        ]

    def exchanged(self, index: int) -> Tensor:
        """An empty tensor of the dtype and on the device of what a group exchanges."""
        p = self.places[self.plan.of_group(index)[0]][0]
        return torch.empty(0, dtype=compute_dtype(p), device=p.device)

    def moments(self, p: Tensor) -> dict[str, tuple[state.Moment, int]]:
        """A parameter's moments that this rank holds, and the ranks that share them, by key."""
        return {
            state.key(name, part): (moment, len(x.team))
            for part, x in self._parts(p).items()
            if self.plan.computed([self._numbers[p, part]], self.ranks)
            for name, moment in self.moments_of(x).items()
        }

    def elsewhere(self, p: Tensor) -> dict[str, Tensor]:
        """An empty tensor for each moment of a DTensor, which this rank may have none of, by key.

        torch's flat state dicts ask each rank's ``optimizer.state`` for the keys.
        """
        if self.slots[p].group is None or not dtensor.is_dtensor(p):
            return {}
        named = ((part, name) for part, x in self._parts(p).items() for name in self.moments_of(x))
        return {state.key(name, part): torch.empty(0, device=p.device) for part, name in named}

    def zeros(self, moment: state.Moment, ranks: int, p: Tensor) -> Tensor:
        """Allocate a moment where the options say; see ``storage.zeros``."""
        return storage.zeros(moment, ranks, p, on_host=self.plan.config.offload_state)

    def moments_of(self, x: MatrixPlan) -> dict[str, state.Moment]:
        """The moments of matrices, by name."""
        return state.moments(x.batch, x.m, x.n, self.plan.config, x.along, len(x.team))

    def records(self) -> Iterator[tuple[int, str, Record]]:
        """Place of each moment of this rank among all ranks', by its parameter and key."""
        for index, p in enumerate(self.params):
            for key, (moment, ranks) in self.moments(p).items():
                x = self._parts(p)[state.part_of(key)]
                member = x.team.index(self.ranks[x.group]) if x.group is not None else 0
                yield index, key, self.slots[p].record(moment, member=member, ranks=ranks)

    def spreads(self, p: Tensor) -> Mapping[str, dtensor.Spread]:
        """How each moment of a DTensor that ranks divide travels to them, by key; planned once."""
        if p not in self._spreads:
            divided = self.slots[p].group is not None and dtensor.is_dtensor(p)
            self._spreads[p] = {
                state.key(name, part): dtensor.Spread(p, moment, x.team)
                for part, x in self._parts(p).items()
                for name, moment in self.moments_of(x).items()
                if divided
            }
        return self._spreads[p]

    def _parts(self, p: Tensor) -> dict[str, MatrixPlan]:
        """The plan of each part of a parameter."""
        return {
            part: self.plan.matrices[self._numbers[p, part]] for part in self.slots[p].view.shapes
        }

    def matrices(self) -> Iterator[tuple[str, Tensor]]:
        """Every matrix that this rank stores, or its shard, with its name in every layout."""
        for x, (p, part) in zip(self.plan.matrices, self.places, strict=True):
            slot = self.slots[p]
            if not slot.ranges:
                yield from zip(x.names(), slot.matrices(p.detach(), part), strict=True)

    def measured[T](
        self, wanted: Collection[int], measure: Callable[[int, Tensor], T]
    ) -> dict[int, T]:
        """Measure whole matrices, each batch on one of the ranks that store it; a collective.

        Args:
            wanted: numbers in the plan; the same on all ranks of a group.
            measure: takes a number and matrices [B, m, n].
        """
        results: dict[int, T] = {}

        def take(i: int, shares: Tensor) -> None:
            team, matrices = self.team(i), self.whole(i, shares)
            if team is None or team.rank == i % team.size:
                results[i] = measure(i, matrices)

        for i in sorted(set(wanted) & set(self.plan.in_place())):
            p, part = self.places[i]
            take(i, self.slots[p].matrices(p.detach(), part))

        def stored(i: int) -> list[Tensor]:
            p, part = self.places[i]
            return [self.slots[p].stored(p.detach(), part)]

        def compute(given: exchange.Given) -> exchange.Computed:
            for i, (weight,) in given.items():
                take(i, weight)
            return {}

        for index, group in enumerate(self.groups):
            if routes := self._routes_of(index, wanted):
                like = self.exchanged(index)
                exchange.run(routes, 1, stored, compute, None, like=like, group=group)
        return results

    def with_zeros(self, params: Iterable[Tensor]) -> list[str]:
        """Names of the weights with a matrix of zeros; a collective of the ranks that share them.

        Those that wrappers store are left out.
        """
        asked = set(params)
        nonzero = {
            i: self.slots[p].view.nonzero(as_rows(dtensor.local(p.detach())), part)
            for i, (p, part) in enumerate(self.places)
            if p in asked and not p.is_meta and self.slots[p].storage is None
        }
        for index, group in enumerate(self.groups):
            if cut := [i for i in nonzero if self.plan.matrices[i].group == index]:
                flags = torch.cat([nonzero[i] for i in cut]).int()
                flags = GroupPeers(group).all_reduce_max(flags).bool()
                sizes = [len(nonzero[i]) for i in cut]
                nonzero |= dict(zip(cut, torch.split(flags, sizes), strict=True))
        names = [self.plan.matrices[i].weight for i, flags in nonzero.items() if not flags.all()]
        return list(dict.fromkeys(names))
