"""A step: the matrices that this rank computes, in place or brought by the exchange."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import cost, exchange, spectrum, state, storage
from .config import SIDE_OF
from .dtensor import is_dtensor
from .factors import Factors, Rows
from .local_plan import LocalPlan
from .offload import Batch, Offloaded, joined
from .plan import Part, StepPlan, due
from .update import polar
from .update.layout import Blocks, Divided, Layout
from .update.step import step as update

Readings = list[tuple[Sequence[tuple[int, int]], Tensor]]
OnDevices = Mapping[torch.device, Offloaded]


@dataclass(frozen=True)
class Step:
    """One step, of whole matrices or of this rank's share of each.

    Attributes:
        local: what there is to do, and where; matrices have their numbers in its plan.
        groups: parameter groups, with ``lr`` and ``step``.
        state: moments by parameter and key. (modified in place)
        factors: polar's, or rather what is known of them.
        started: parameters whose spectra at start are measured.
        grads_finite: boolean scalar; where it is False nothing moves.
        readings: what the step does, by number and number in its batch, is put here, if wanted.
    """

    local: LocalPlan
    groups: Sequence[Mapping[str, Any]]
    state: Mapping[Tensor, Mapping[str, Tensor]]
    factors: Factors
    started: AbstractSet[Tensor]
    grads_finite: Tensor
    readings: Readings | None

    @property
    def plan(self) -> StepPlan:
        """The plan of ``local``."""
        return self.local.plan

    def take(self) -> None:
        """Step what has gradients, where it is stored and then where it travels to.

        Raises:
            RuntimeError: a weight that ranks store together has no gradient on this one, or was
                changed without their knowing.
        """
        if self.plan.config.direction == "polar":
            self._refuse_changes()
        in_place = [some for x in self.local.in_place if (some := self._with_gradients(x))]
        offloaded = self._offloaded(in_place)
        for batch in in_place:
            self._step_in_place(batch, offloaded)
        for index, routes in enumerate(self.local.routes):
            if routes:
                self._step_exchanged(index, offloaded)

    def _offloaded(self, in_place: Sequence[Sequence[int]]) -> OnDevices:
        """What has to come from host memory, by device, in the order of ``take``."""
        if not self.plan.config.offload_state:
            return {}
        held: dict[torch.device, list[Batch]] = {}
        exchanged = [
            batch
            for index, routes in enumerate(self.local.routes)
            for route in routes
            for batch in self.plan.batches(route.mine, self.local.exchanged(index).device.type)
        ]
        for batch in (*in_place, *exchanged):
            device = self.local.places[batch[0]][0].device
            for part in self.plan.parts(batch, device.type):
                held.setdefault(device, []).append(self._moments(part))
        return {device: Offloaded(batches, device) for device, batches in held.items()}

    def _refuse_changes(self) -> None:
        """Refuse weights that travel to their factors only where all ranks know of a change."""
        if self.factors.doubt:
            return
        for routes in self.local.routes:
            for i in (i for route in routes for i in route.pieces):
                slot = self.local.slots[p := self.local.places[i][0]]
                kept_by_others = slot.storage is not None and not is_dtensor(p)
                if not kept_by_others and self.factors.unsure(p):
                    raise RuntimeError(
                        f"{slot.name} was changed since Pion's last step: call forget_factors() "
                        "after it, on all ranks that share the weight"
                    )

    def _with_gradients(self, batch: Sequence[int]) -> list[int]:
        """Those of some matrices that have gradients; of those that ranks share it is all."""
        for i in batch:
            if self.plan.matrices[i].group is not None:
                self._grad(i)
        return [i for i in batch if self.local.places[i][0].grad is not None]

    def _grad(self, i: int) -> Tensor:
        """The gradient of a weight that needs one on every rank."""
        p, _ = self.local.places[i]
        if p.grad is None:
            name = self.local.slots[p].name
            raise RuntimeError(f"{name} is sharded and has no gradient on this rank")
        return p.grad

    def _step_in_place(self, batch: Sequence[int], offloaded: OnDevices) -> None:
        """Step matrices of one shape that this rank has, or a shard of each."""
        given: exchange.Given = {}
        for i in batch:
            p, part = self.local.places[i]
            given[i] = [self.local.slots[p].shard(x, part) for x in (p, self._grad(i))]
        for i, (weight, _) in self._batch(given, offloaded).items():
            p, part = self.local.places[i]
            self.local.slots[p].put(weight, p, part)

    def _step_exchanged(self, index: int, offloaded: OnDevices) -> None:
        """Step the matrices of which every rank of a group stores a part."""
        weights = self.plan.sends_weights or self.factors.doubt
        like = self.local.exchanged(index)

        def stored(i: int) -> list[Tensor]:
            (p, part), grad = self.local.places[i], self._grad(i)
            slot = self.local.slots[p]
            some = (p, grad) if weights else (grad,)
            return [slot.stored(x, part).to(like.dtype) for x in some]

        def compute(given: exchange.Given) -> exchange.Computed:
            stepped: exchange.Computed = {}
            for batch in self.plan.batches(list(given), like.device.type):
                stepped |= self._batch({i: given[i] for i in batch}, offloaded)
            return stepped

        def finalize(i: int, weight: Tensor, moved: Tensor | None) -> None:
            p, part = self.local.places[i]
            self.local.slots[p].write(weight, p, part, moved)

        exchange.run(
            self.local.routes[index],
            2 if weights else 1,
            stored,
            compute,
            finalize,
            like=like,
            group=self.local.groups[index],
        )

    def _moments(self, part: Part) -> Batch:
        """The moments of what is computed at once, of each weight, by name; views."""
        batch = []
        for i, some in part.items():
            p, name_of_part = self.local.places[i]
            held, rows = self.state[p], slice(some.start, some.stop)
            names = self.local.moments_of(self.plan.matrices[i])
            batch.append({name: held[state.key(name, name_of_part)][rows] for name in names})
        return batch

    def _batch(self, given: exchange.Given, offloaded: OnDevices) -> exchange.Computed:
        """Step matrices of one shape, or this rank's shares of them.

        Args:
            given: by number in the plan, their weights (modified in place) and gradients; polar's
                gradients alone where its factors tell the weights.
            offloaded: moments that come from host memory.

        Returns:
            By number, weights and, of polar's, which matrices have moved.
        """
        device = next(iter(given.values()))[-1].device
        stepped: dict[int, list[tuple[Tensor, Tensor | None]]] = {i: [] for i in given}
        for part in self.plan.parts(list(given), device.type):
            tensors = [[x[some.start : some.stop] for x in given[i]] for i, some in part.items()]
            *weights, grad = (_joined(x) for x in zip(*tensors, strict=True))
            members = [(i, index) for i, some in part.items() for index in some]
            brought = offloaded[device].next() if offloaded else joined(self._moments(part))
            with brought as moments:
                weight, moved = self._update(
                    members, weights[0] if weights else None, grad, moments
                )
            counts = [len(some) for some in part.values()]
            flags: Sequence[Tensor | None] = [None] * len(counts)
            if moved is not None:
                flags = torch.split(moved, counts)
            for i, each, flag in zip(part, torch.split(weight, counts), flags, strict=True):
                stepped[i].append((each, flag))
        return {i: _whole(parts, given[i]) for i, parts in stepped.items()}

    def _update(
        self,
        members: Sequence[tuple[int, int]],
        w: Tensor | None,
        g: Tensor,
        moments: Mapping[str, Tensor],
    ) -> tuple[Tensor, Tensor | None]:
        """Step a batch of matrices, or of this rank's shares of them.

        Args:
            members: of each its number in the plan, and in the batch there.
            w: weights. (modified in place)
            g: gradients.
            moments: by name. (modified in place)

        Returns:
            The weights and, of polar's, which matrices have moved, [B].
        """
        x = self.plan.matrices[members[0][0]]
        group = self.groups[x.param_group]
        grads_finite = self.grads_finite.to(g.device, non_blocking=True)
        resets = self.plan.config.spectrum_reset_interval > 0
        if resets and not {self.local.places[i][0] for i, _ in members} <= self.started:
            assert w is not None, "polar has no resets"
            start = moments[state.START]
            values = spectrum.singular_values(self.local.whole(members[0][0], w))
            start.copy_(torch.where(start.any(-1, keepdim=True), start, values))
        used, coded = moments, self.plan.config.state_dtype == "int8"
        if coded:
            described = state.moments(len(g), x.m, x.n, self.plan.config, x.along)
            used = storage.decode(moments, described)
        lr, collect_metrics = group["lr"], self.readings is not None
        moved = None
        if self.plan.config.direction == "polar":
            w, moved, metrics = self._step_polar(
                members,
                w,
                g,
                used,
                lr=lr,
                grads_finite=grads_finite,
                collect_metrics=collect_metrics,
            )
        else:
            assert w is not None, "generators need the weights"
            metrics = update(
                w,
                g,
                used,
                config=self.plan.config,
                lr=lr,
                active=cost.order(x.m, x.n, self.plan.config.active_sides(group["step"])),
                forms=cost.forms(x.m, x.n, self.plan.config),
                grads_finite=grads_finite,
                layout=self._layout(members[0][0]),
                collect_metrics=collect_metrics,
            )
        if coded:
            storage.encode(used, moments, grads_finite=grads_finite)
        if self.readings is not None and metrics is not None:
            self.readings.append((members, metrics))
        if resets:
            self._reset(members, w, moments[state.START], grads_finite)
        return w, moved

    def _step_polar(
        self,
        members: Sequence[tuple[int, int]],
        w: Tensor | None,
        g: Tensor,
        moments: Mapping[str, Tensor],
        *,
        lr: float | Tensor,
        grads_finite: Tensor,
        collect_metrics: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """``_update`` of the polar direction; also returns its readings."""
        number = members[0][0]
        x = self.plan.matrices[number]
        assert x.along is not None, "polar divides the longer dimension"
        rows = Rows(self.local.team(number), x.along)
        params = [self.local.places[i][0] for i, _ in members]
        if w is not None and (self.factors.doubt or any(map(self.factors.unsure, params))):
            self.factors.match(
                [self._name(*member) for member in members],
                params,
                w,
                moments,
                rows,
                computed_by=number % len(x.team),
            )
        stepped, go, metrics = polar.step(
            g,
            moments,
            config=self.plan.config,
            lr=lr,
            large=SIDE_OF[x.along],
            rows=max(x.m, x.n),
            grads_finite=grads_finite,
            peers=rows.peers,
            collect_metrics=collect_metrics,
        )
        if w is not None:
            torch.where(go, stepped, w, out=w)
            stepped = w
        return stepped, go.view(-1).to(stepped.dtype), metrics

    def _reset(
        self, members: Sequence[tuple[int, int]], w: Tensor, start: Tensor, grads_finite: Tensor
    ) -> None:
        """Put back the singular values of the matrices whose turn it is (modified in place)."""
        x = self.plan.matrices[members[0][0]]
        step = self.groups[x.param_group]["step"]
        interval = self.plan.config.spectrum_reset_interval
        turns = [b for b, each in enumerate(members) if due(self._name(*each), step, interval)]
        if not turns:
            return
        mine = w[turns]
        restored = spectrum.restored(self.local.whole(members[0][0], mine), start[turns])
        if (team := self.local.team(members[0][0])) is not None:
            restored = restored.chunk(team.size, x.share_dim)[team.rank]
        w[turns] = torch.where(grads_finite, restored, mine)

    def _name(self, i: int, index: int) -> str:
        """Name of a matrix: number ``index`` of the plan's matrices ``i``."""
        return self.plan.matrices[i].name(index)

    def _layout(self, i: int) -> Layout | None:
        """How ``_update``'s matrices lie; None for whole."""
        x = self.plan.matrices[i]
        if x.along is None:
            return None
        team = self.local.team(i)
        if self.plan.config.blocks > 1:
            return Blocks(SIDE_OF[x.along], self.plan.config.blocks // len(x.team), team)
        return None if team is None else Divided(SIDE_OF[x.along], team)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _whole(
    parts: Sequence[tuple[Tensor, Tensor | None]], given: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None]:
    """A weight's matrices and flags, of parts that were computed one after the other."""
    if len(parts) == 1:
        return parts[0]
    moved = [flags for _, flags in parts if flags is not None]
    # Weights that were given were modified in place.
    weight = given[0] if len(given) > 1 else torch.cat([each for each, _ in parts])
    return weight, torch.cat(moved) if moved else None
