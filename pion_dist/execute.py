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
from .plan import StepPlan, due
from .update import polar
from .update.layout import Blocks, Divided, Layout
from .update.step import step as update

Readings = list[tuple[Sequence[tuple[int, int]], Tensor]]


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
        """Of ``local``."""
        return self.local.plan

    def take(self) -> None:
        """Step what has gradients, where it is stored and then where it travels to.

        Raises:
            RuntimeError: a weight that ranks store together has no gradient on this one, or was
                changed without their knowing.
        """
        if self.plan.config.direction == "polar":
            self._refuse_changes()
        for batch in self.local.in_place:
            if some := self._with_gradients(batch):
                self._step_in_place(some)
        for index, routes in enumerate(self.local.routes):
            if routes:
                self._step_exchanged(index)

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

    def _step_in_place(self, batch: Sequence[int]) -> None:
        """Step matrices of one shape that this rank has, or a shard of each."""
        given: exchange.Given = {}
        for i in batch:
            p, part = self.local.places[i]
            given[i] = [self.local.slots[p].shard(x, part) for x in (p, self._grad(i))]
        for i, (weight, _) in self._batch(given).items():
            p, part = self.local.places[i]
            self.local.slots[p].put(weight, p, part)

    def _step_exchanged(self, index: int) -> None:
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
                stepped |= self._batch({i: given[i] for i in batch})
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

    def _moments(self, i: int) -> dict[str, Tensor]:
        """The moments of the plan's matrices ``i`` on this rank, by name."""
        p, part = self.local.places[i]
        names = self.local.moments_of(self.plan.matrices[i])
        return {name: self.state[p][state.key(name, part)] for name in names}

    def _batch(self, given: exchange.Given) -> exchange.Computed:
        """Step matrices of one shape, or this rank's shares of them.

        Args:
            given: by number in the plan, their weights (modified in place) and gradients; polar's
                gradients alone where its factors tell the weights.

        Returns:
            By number, weights and, of polar's, which matrices have moved.
        """
        if len(given) == 1:
            ((i, tensors),) = given.items()
            return {i: self._parts(i, tensors)}
        held = [self._moments(i) for i in given]
        counts = [self.plan.matrices[i].batch for i in given]
        *weights, grad = (torch.cat(x) for x in zip(*given.values(), strict=True))
        joined = {name: torch.cat([moments[name] for moments in held]) for name in held[0]}
        numbered = zip(given, counts, strict=True)
        members = [(i, index) for i, count in numbered for index in range(count)]
        weight = weights[0] if weights else None
        stepped, moved = self._update(members, weight, grad, joined)
        for name, moment in joined.items():
            for moments, each in zip(held, torch.split(moment, counts), strict=True):
                moments[name].copy_(each)
        flags = [None] * len(counts) if moved is None else torch.split(moved, counts)
        return dict(zip(given, zip(torch.split(stepped, counts), flags, strict=True), strict=True))

    def _parts(self, i: int, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """``_batch`` of the plan's matrices ``i``, some after the other."""
        x, moments = self.plan.matrices[i], self._moments(i)
        *weights, grad = tensors
        stride = x.batch if len(x.team) > 1 else self.plan.batch_size(x, grad.device.type)
        stepped = []
        for first in range(0, x.batch, stride):
            some = slice(first, first + stride)
            stepped.append(
                self._update(
                    [(i, index) for index in range(x.batch)[some]],
                    weights[0][some] if weights else None,
                    grad[some],
                    {name: moment[some] for name, moment in moments.items()},
                )
            )
        if weights:  # modified in place
            moved = [each for _, each in stepped if each is not None]
            return weights[0], torch.cat(moved) if moved else None
        return torch.cat([w for w, _ in stepped]), torch.cat(
            [m for _, m in stepped if m is not None]
        )

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
