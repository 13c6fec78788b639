"""A step of the plan's matrices on the ranks that compute them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import cost, exchange, spectrum, state, storage
from .config import SIDE_OF
from .exchange import GroupPeers
from .factors import Factors, Rows
from .plan import MatrixPlan, StepPlan, due
from .update import polar
from .update.layout import Blocks, Divided, Layout
from .update.step import step as update

Readings = list[tuple[Sequence[tuple[int, int]], Tensor]]


@dataclass(frozen=True)
class Step:
    """One step, of whole matrices or of this rank's share of each.

    Attributes:
        plan: what there is to do; matrices have their numbers in it.
        groups: parameter groups, with ``lr`` and ``step``.
        params: the parameter that each number is of.
        moments: returns a number's moments by name, to be modified in place.
        peers: returns the team of a number; None where it is one rank.
        factors: polar's, or rather what is known of them.
        started: parameters whose spectra at start are measured.
        grads_finite: boolean scalar; where it is False nothing moves.
        readings: what the step does, by number and number in its batch, is put here, if wanted.
    """

    plan: StepPlan
    groups: Sequence[Mapping[str, Any]]
    params: Sequence[Tensor]
    moments: Callable[[int], Mapping[str, Tensor]]
    peers: Callable[[int], GroupPeers | None]
    factors: Factors
    started: AbstractSet[Tensor]
    grads_finite: Tensor
    readings: Readings | None

    def batch(self, given: exchange.Given) -> exchange.Computed:
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
        held = [self.moments(i) for i in given]
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
        """``batch`` of the plan's matrices ``i``, a batch after the other."""
        x, moments = self.plan.matrices[i], self.moments(i)
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
        if resets and not {self.params[i] for i, _ in members} <= self.started:
            assert w is not None, "polar has no resets"
            start = moments[state.START]
            values = spectrum.singular_values(complete(x, w, self.peers(members[0][0])))
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
        rows = Rows(self.peers(number), x.along)
        params = [self.params[i] for i, _ in members]
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
        peers = self.peers(members[0][0])
        restored = spectrum.restored(complete(x, mine, peers), start[turns])
        if peers is not None:
            restored = restored.chunk(peers.size, x.share_dim)[peers.rank]
        w[turns] = torch.where(grads_finite, restored, mine)

    def _name(self, i: int, index: int) -> str:
        """Name of a matrix: number ``index`` of the plan's matrices ``i``."""
        return self.plan.matrices[i].name(index)

    def _layout(self, i: int) -> Layout | None:
        """How ``_update``'s matrices lie; None for whole."""
        x = self.plan.matrices[i]
        if x.along is None:
            return None
        peers = self.peers(i)
        if self.plan.config.blocks > 1:
            return Blocks(SIDE_OF[x.along], self.plan.config.blocks // len(x.team), peers)
        return None if peers is None else Divided(SIDE_OF[x.along], peers)


def complete(x: MatrixPlan, shares: Tensor, peers: GroupPeers | None) -> Tensor:
    """Whole matrices of what a member of their team has of them; a collective of the team."""
    return shares if peers is None else peers.all_gather(shares, x.share_dim)
