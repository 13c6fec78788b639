"""Pion as a torch optimizer: the shell around ``pion_dist.update``."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from . import dtensor, exchange, state, storage
from .checkpoint import Record
from .config import PionConfig
from .exchange import GroupPeers, ProcessGroup, Route, in_a_node
from .execute import Readings, Step, complete
from .factors import Factors
from .guard import Guard
from .matrices import MatrixView, as_rows
from .plan import MatrixPlan, StepPlan
from .slots import Slot, Storage, check_dtype, slot_of
from .storage import compute_dtype
from .teams import GroupSizes, build_plan

logger = logging.getLogger("pion_dist")

_OPTIONS = {field.name for field in dataclasses.fields(PionConfig)}
_OPTIONS_OF_OTHERS = {
    name
    for each in vars(torch.optim).values()
    if inspect.isclass(each) and issubclass(each, torch.optim.Optimizer)
    for name in inspect.signature(each).parameters
} - {"params", "lr", "defaults"}
# What a copy takes over. It makes its plan, its guard and its readings anew.
_COPIED = ("config", "_names", "_views", "_slots", "_started")


class Pion(torch.optim.Optimizer):
    """Updates weight matrices by orthogonal factors, W <- R W P: their singular values stay.

    R = E(lr α A_out) and P = E(lr α A_in) for skew generators that descend; see PionConfig and
    arXiv 2605.12492. Weight decay would change the spectrum and does not exist here.

    Parameters may be converted at any time, as by ``model.cuda()`` or ``model.double()``: the
    moments follow at the next step. Before the first step a sharded model's may stand in the places
    of those that Pion was made with, as Accelerate puts them. ``torch.compile`` leaves ``step`` out
    of its graph and compiles a training step around it.

    Args:
        params: 2-D parameters, or groups of them; as for any torch optimizer, also
            ``model.named_parameters()``. Give embeddings, output layers, norms and biases to AdamW.
            Fused experts [E, m, n] are E matrices, below each other for their view.
        lr: η, per group; schedulers set ``group["lr"]``.
        config: the options that all groups share. A group has none but ``lr``: those of
            PionConfig are refused there, and those of torch's optimizers unless they are off, as
            ``weight_decay=0``. Other keys of a group are the caller's, and stay.
        views: how a parameter is seen as matrices; one that has none is one matrix, cut (where the
            options cut) along its longer dimension, rows if both are equal.
        names: of parameters, for messages; ``named_parameters()`` brings its own.
        shards: parameters that are a rank's shard of a weight, with the ranks that share it: each
            matrix is cut evenly along its view's axis, or, where that is None, the ranks have
            matrices of their own. The same ones, in the same order, on every rank of the group,
            and to be made on all of them at a time.
        stored: parameters of which this rank stores a part alone, which is stepped in their place:
            for wrappers that divide weights over data-parallel ranks. All of a group, or none.
        teams: for a process group that together stores weights, this rank's groups of neighbours
            in it, which may compute a matrix together. Each begins at a multiple of its size, which
            divides the group's. By default one rank of the group or all compute a matrix.

    Raises:
        ValueError: a parameter is neither 2-D nor contiguous and 3-D, is not real floating point,
            or is a DTensor that is divided otherwise than below; a view does not fit it; it cannot
            be cut as the options say; lr is negative; or a group has options.
        RuntimeError: the ranks of a group have other parameters or options.

    A matrix of zeros stays zero under any factors: the log warns of weights that have one when the
    optimizer is made. It is no error, since weights may still be loaded; ``split_parameters`` gives
    such weights to AdamW.

    A DTensor, as ``fully_shard`` makes (FSDP2, with or without replicas and tensor parallelism), is
    stepped as the whole weight would be. Ranks may divide its rows or experts, and its columns in
    the mesh's last dimension. The optimizer is made, stepped, saved and loaded on all of them at a
    time, and every one needs the gradient. Its view is that of the whole weight. In ``state_dict``
    moments are DTensors too, for ``torch.distributed.checkpoint``.

    Low-precision parameters (bf16, fp16) are computed in float32 and rounded when stored, which
    moves singular values by the rounding; keep float32 masters where that matters.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        *,
        config: PionConfig | None = None,
        views: Mapping[Tensor, MatrixView] | None = None,
        names: Mapping[Tensor, str] | None = None,
        shards: Mapping[Tensor, ProcessGroup] | None = None,
        stored: Mapping[Tensor, Storage] | None = None,
        teams: Mapping[ProcessGroup, Sequence[ProcessGroup]] | None = None,
    ) -> None:
        """See the class."""
        self._names = dict(names or {})
        self._shards = dict(shards or {})
        self.config = config if config is not None else PionConfig()
        self._views = dict(views or {})
        self._slots: dict[Tensor, Slot] = {}
        self._stored = dict(stored or {})
        self._teams = dict(teams or {})
        # The data of a group's weights, where wrappers show some of it in param_groups.
        self._members: dict[int, list[Tensor]] = {}
        self._guard = Guard()
        self._factors = Factors()
        self.plan = StepPlan(self.config, (), (), ())
        self._started: set[Tensor] = set()  # parameters whose spectra at start are measured
        # What the next step's factors do, by (number in the plan, number in its batch), is put
        # here; for ``diagnostics``.
        self.readings: Readings | None = None
        self._constructed = False
        super().__init__(params, {"lr": lr})
        self._constructed = True
        self.settle()
        self._warn_of_zeros(self._slots)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, checked as a whole before anything changes; see torch's."""
        group = dict(param_group)
        params = group["params"]
        group["params"] = params = [params] if isinstance(params, Tensor) else list(params)
        named = [p if isinstance(p, tuple) else (None, p) for p in params]
        place = f"of group {len(self.param_groups)}"
        _refuse_options(group, place)
        slots = {
            p: slot_of(
                p,
                name or self._names.get(p, f"parameter {index} {place}"),
                self.config,
                view=self._views.get(p),
                tp=self._shards.get(p),
                stored=self._stored.get(p),
            )
            for index, (name, p) in enumerate(named)
        }
        lr = group.get("lr", self.defaults["lr"])
        if not isinstance(lr, Tensor) and lr < 0.0:
            raise ValueError(f"lr={lr}: must not be negative")
        group["step"] = 0
        group["pion"] = state.identity(self.config)
        super().add_param_group(group)
        if some := {p: self._stored[p] for p in slots if p in self._stored}:
            self._members[len(self.param_groups) - 1] = [each.data for each in some.values()]
            group["params"] = [each.data for each in some.values() if each.data.numel()]
            slots = {each.data: slots[p] for p, each in some.items()}
        self._slots.update(slots)
        if self._constructed:
            self.settle()
            self._warn_of_zeros(slots)

    def _warn_of_zeros(self, params: Iterable[Tensor]) -> None:
        """Name the weights with a matrix of zeros; a collective of the ranks that share them."""
        asked = set(params)
        nonzero = {
            i: self._slots[p].view.nonzero(as_rows(dtensor.local(p.detach())), part)
            for i, (p, part) in enumerate(self._places)
            if p in asked and not p.is_meta and self._slots[p].storage is None
        }
        for index, group in enumerate(self.groups):
            if cut := [i for i in nonzero if self.plan.matrices[i].group == index]:
                flags = torch.cat([nonzero[i] for i in cut]).int()
                flags = GroupPeers(group).all_reduce_max(flags).bool()
                sizes = [len(nonzero[i]) for i in cut]
                nonzero |= dict(zip(cut, torch.split(flags, sizes), strict=True))
        names = [self.plan.matrices[i].weight for i, flags in nonzero.items() if not flags.all()]
        if names:
            logger.warning(
                "%s: a matrix of zeros, which Pion never moves. Unless weights are still to be "
                "loaded, give it to torch.optim.AdamW, as split_parameters does",
                ", ".join(dict.fromkeys(names)),
            )

    def _follow(self) -> None:
        """Take over parameters that were converted, as by ``model.cuda()``, with their moments."""
        now = self._params()
        if list(map(id, now)) != list(map(id, self._slots)):
            self._replace(now)
        if self._kinds == self._kinds_now():
            return
        for p, slot in self._slots.items():
            check_dtype(p, slot.name)
        self._guard.report()
        self._guard = Guard()  # its counts lie where the gradients were
        self._factors.forget()  # weights may have been rounded
        for p in self._slots:
            for key, (moment, ranks) in self._held_moments(p).items():
                value = storage.matrices(self.state[p][key], moment, ranks, key)
                self.state[p][key] = storage.zeros(moment, ranks, p)
                storage.store(value, self.state[p][key], moment, ranks, key)
        self.settle()

    def _replace(self, params: Sequence[Tensor]) -> None:
        """Take over parameters that stand in others' places in the groups; a collective.

        Accelerate puts those of a sharded model there, of an optimizer that was made before.

        Raises:
            RuntimeError: a step was taken, or they are not the same weights; and what to do.
        """
        old = list(self._slots.items())
        shapes = [p.shape for p, _ in old]
        if any(group["step"] for group in self.param_groups) or shapes != [p.shape for p in params]:
            raise RuntimeError(
                "param_groups have other parameters than Pion was made with: add some with "
                "add_param_group, and put a sharded model's there before the first step"
            )
        places = {p: new for (p, _), new in zip(old, params, strict=True)}
        self._views = {places[p]: view for p, view in self._views.items() if p in places}
        self._shards = {places[p]: group for p, group in self._shards.items() if p in places}
        self._slots = {
            p: slot_of(p, slot.name, self.config, view=self._views.get(p), tp=self._shards.get(p))
            for p, (_, slot) in zip(params, old, strict=True)
        }
        self.settle()

    def _kinds_now(self) -> list[tuple[torch.device, torch.dtype]]:
        return [(p.device, p.dtype) for p in self._slots]

    def __getstate__(self) -> dict[str, Any]:
        """Everything that a copy needs, for ``copy.deepcopy``, ``pickle`` and ``torch.save``.

        Raises:
            TypeError: there are shards, whose process groups are of this process alone.
        """
        if self._shards or self._stored or self.groups:
            raise TypeError(
                "Pion with shards= or DTensors cannot be copied or pickled, since process groups "
                "cannot: take state_dict(), and load it into a Pion that is made on all ranks"
            )
        self._guard.report()
        return {**super().__getstate__(), **{name: getattr(self, name) for name in _COPIED}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a copy; also torch's way to load groups and moments, which are all it gives."""
        super().__setstate__(state)
        if state.keys() >= set(_COPIED):
            self._shards, self._guard, self.readings = {}, Guard(), None
            self._stored, self._teams, self._members = {}, {}, {}
            self._factors = Factors()
            self._constructed = True
            self._plan()

    def settle(self) -> None:
        """Make the plan, compare it with other ranks', and make the state this rank holds.

        Done at construction, and to be done again by a wrapper that has taken parameters out of the
        groups: their state is freed. A collective of each group that stores weights together.

        Raises:
            RuntimeError: ranks have other plans, or matrices that ranks share would be dealt anew
                after the first step.
        """
        params = self._params()
        self._slots = {p: self._slots[p] for p in params}
        for p in set(self.state) - set(params):
            del self.state[p]
        self._started &= set(params)
        self._factors.forget()  # it would hold parameters that have left
        old = {(x.weight, x.part): x.team for x in self.plan.matrices}
        self._plan()
        stepped = any(group["step"] for group in self.param_groups)
        if stepped and any(
            old.get((x.weight, x.part), x.team) != x.team for x in self.plan.matrices
        ):
            raise RuntimeError("add or convert sharded parameters before the first step")
        self._compare()
        for p in params:
            self.state[p] = {
                key: self.state[p][key] if key in self.state[p] else storage.zeros(moment, ranks, p)
                for key, (moment, ranks) in self._held_moments(p).items()
            }

    def _plan(self) -> None:
        """Build ``plan``, and where each of its matrices is."""
        self._kinds = self._kinds_now()
        self.groups: list[ProcessGroup] = []
        self._places: list[tuple[Tensor, str]] = []
        matrices = []
        for number in range(len(self.param_groups)):
            for p in self._params_of(number):
                slot = self._slots[p]
                if slot.group is not None and slot.group not in self.groups:
                    self.groups.append(slot.group)
                for part in slot.view.shapes:
                    self._places.append((p, part))
                    matrices.append(
                        slot.plan(
                            part,
                            p,
                            groups=self.groups,
                            param_group=number,
                            config=self.config,
                        )
                    )
        sizes = [
            GroupSizes(g.size(), tuple(sorted({1, *self._teams_in(g)})), in_a_node(g))
            for g in self.groups
        ]
        self.plan = build_plan(matrices, sizes, self.config)
        self._factors.matrices = sum(x.batch for x in self.plan.matrices)
        self._numbers = {place: i for i, place in enumerate(self._places)}
        on: dict[torch.device, list[int]] = {}
        for i in self.plan.computed(self.plan.in_place(), self.ranks):
            on.setdefault(self._places[i][0].device, []).append(i)
        self._in_place = [
            batch for device, mine in on.items() for batch in self.plan.batches(mine, device.type)
        ]
        every = range(len(self.plan.matrices))
        self._routes = [self._routes_of(index, every) for index in range(len(self.groups))]

    def _teams_in(self, group: ProcessGroup) -> dict[int, ProcessGroup]:
        """The teams of a group, of more than one rank, that this rank can be in, by size."""
        return {each.size(): each for each in self._teams.get(group, (group,))}

    def _peers(self, i: int) -> GroupPeers | None:
        """The team of the plan's matrices ``i``; None where it is one rank."""
        x = self.plan.matrices[i]
        if len(x.team) == 1:
            return None
        assert x.group is not None, "a rank that stores all of a matrix computes it alone"
        return GroupPeers(self._teams_in(self.groups[x.group])[len(x.team)])

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

    def _params_of(self, number: int) -> list[Tensor]:
        """The tensors that are stepped of a group, of whose weights other ranks may store all."""
        params: list[Tensor] = self.param_groups[number]["params"]
        return self._members.get(number, params)

    def members(self) -> list[list[Tensor]]:
        """The tensors that are stepped of every group, of whose weights other ranks may store all.

        They have the places in ``state_dict``.
        """
        return [self._params_of(number) for number in range(len(self.param_groups))]

    def _params(self) -> list[Tensor]:
        return [p for number in range(len(self.param_groups)) for p in self._params_of(number)]

    @property
    def ranks(self) -> tuple[int, ...]:
        """This rank's in each group of the plan."""
        return tuple(group.rank() for group in self.groups)

    def _compare(self) -> None:
        """Compare the plan and the steps taken with the other ranks'."""
        steps = [f"step {group['step']} in group {i}" for i, group in enumerate(self.param_groups)]
        for index, group in enumerate(self.groups):
            digest = " ".join([self.plan.digest(index), *steps])
            lines = [*self.plan.lines(index), *steps]
            exchange.compare(digest, lines, group=group, what="Pion's plans")

    def _held_moments(self, p: Tensor) -> dict[str, tuple[state.Moment, int]]:
        """A parameter's moments that this rank holds, and the ranks that share them, by key."""
        slot = self._slots[p]
        return {
            state.key(name, part): (moment, len(x.team))
            for part in slot.view.shapes
            if self.plan.computed([i := self._numbers[p, part]], self.ranks)
            for x in (self.plan.matrices[i],)
            for name, moment in self._moments(x).items()
        }

    def _moments(self, x: MatrixPlan) -> dict[str, state.Moment]:
        return state.moments(x.batch, x.m, x.n, self.config, x.along, len(x.team))

    def adopt(self, masters: Mapping[Tensor, Tensor]) -> None:
        """Step masters in place of parameters, and ``settle``: for wrappers that keep them.

        Args:
            masters: a tensor for each parameter that has left the groups for it, of its shape.

        Raises:
            ValueError: the shapes differ.
        """
        for old, new in masters.items():
            if old.shape != new.shape:
                raise ValueError(
                    f"a master of shape {tuple(new.shape)} for one of {tuple(old.shape)}"
                )
        for old, new in masters.items():
            self._slots[new] = self._slots.pop(old)
            if old in self.state:
                self.state[new] = self.state.pop(old)
        self.settle()

    def forget_factors(self) -> None:
        """Look at every weight in the next step, as after a write that torch does not count.

        Writes into ``p.data`` are such. Without it the next polar step would undo them. To be
        called on all ranks that share weights.
        """
        self._factors.forget()

    def matrices(self) -> Iterator[tuple[str, Tensor]]:
        """Every matrix that this rank stores, or its shard, with a name that is the same in every
        layout: weight, part and place in its batch.
        """
        for i, (p, part) in enumerate(self._places):
            slot = self._slots[p]
            if not slot.ranges:
                yield from zip(self.names(i), slot.matrices(p.detach(), part), strict=True)

    def names(self, i: int) -> list[str]:
        """Of the plan's matrices ``i`` on this rank, each the same in every layout."""
        return self.plan.matrices[i].names()

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
            peers = self._peers(i)
            matrices = complete(self.plan.matrices[i], shares, peers)
            if peers is None or peers.rank == i % peers.size:
                results[i] = measure(i, matrices)

        for i in sorted(set(wanted) & set(self.plan.in_place())):
            p, part = self._places[i]
            take(i, self._slots[p].matrices(p.detach(), part))

        def stored(i: int) -> list[Tensor]:
            p, part = self._places[i]
            return [self._slots[p].stored(p.detach(), part)]

        def compute(given: exchange.Given) -> exchange.Computed:
            for i, (weight,) in given.items():
                take(i, weight)
            return {}

        for index, group in enumerate(self.groups):
            if routes := self._routes_of(index, wanted):
                exchange.run(routes, 1, stored, compute, None, like=self._like(index), group=group)
        return results

    def _like(self, index: int) -> Tensor:
        """An empty tensor of the dtype and on the device of what a group exchanges."""
        p = self._places[self.plan.of_group(index)[0]][0]
        return torch.empty(0, dtype=compute_dtype(p), device=p.device)

    def start(self, i: int) -> Tensor | None:
        """Singular values at start, [B, k], of the plan's matrices ``i``, if they are recorded."""
        p, part = self._places[i]
        sigma = self.state[p].get(state.key(state.SIGMA, part))
        if sigma is not None:
            return sigma.double() if sigma.any() else None
        recorded = self.state[p].get(state.key(state.START, part))
        return recorded if p in self._started else None

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    # As torch's own optimizers; torch.compiler.disable would import dynamo, 2 s, with this module.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step.

        If any gradient is not finite, no weight and no moment moves (decided on the device,
        without waiting for it), and the parameter is named in the log when the host next looks:
        at the next step or ``state_dict``. The step count advances all the same.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            ValueError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._follow()
        self._guard.look()
        due = self._due()
        for group in self.param_groups:
            group["step"] += 1
        if not due and not any(self._routes):
            return loss
        self._step(due)
        return loss

    def _step(self, due: Sequence[Tensor]) -> None:
        """Step what has gradients, where it is stored and then where it travels to."""
        grads_finite = exchange.agree(self._grads_finite(due), self.groups)
        polar = self.config.direction == "polar"
        if polar:
            self._factors.begin(due)
            self._refuse_changes()
        step = Step(
            plan=self.plan,
            groups=self.param_groups,
            params=[p for p, _ in self._places],
            moments=self._held,
            peers=self._peers,
            factors=self._factors,
            started=self._started,
            grads_finite=grads_finite,
            readings=self.readings,
        )
        for batch in self._in_place:
            if some := self._with_gradients(batch):
                self._step_in_place(some, step)
        for index, routes in enumerate(self._routes):
            if routes:
                self._step_exchanged(index, step)
        if self.config.spectrum_reset_interval:
            self._started.update(due)
        if polar:
            self._factors.end(due)

    def _grads_finite(self, due: Sequence[Tensor]) -> Tensor:
        if not due:  # other ranks store all of the weights that this one computes
            return torch.ones((), dtype=torch.bool, device=self._params()[0].device)
        names = [self._slots[p].name for p in due]
        grads = [dtensor.local(p.grad) for p in due if p.grad is not None]
        return self._guard.check(names, grads)

    def _refuse_changes(self) -> None:
        """Refuse weights that travel to their factors only where all ranks know of a change.

        Raises:
            RuntimeError: names the weight.
        """
        if self._factors.doubt:
            return
        for routes in self._routes:
            for i in (i for route in routes for i in route.pieces):
                slot = self._slots[p := self._places[i][0]]
                kept_by_others = slot.storage is not None and not dtensor.is_dtensor(p)
                if not kept_by_others and self._factors.unsure(p):
                    raise RuntimeError(
                        f"{slot.name} was changed since Pion's last step: call forget_factors() "
                        "after it, on all ranks that share the weight"
                    )

    def _due(self) -> list[Tensor]:
        """The parameters that have a gradient."""
        due = [p for p in self._params() if p.grad is not None]
        for p in due:
            if p.grad is not None and p.grad.is_sparse:
                raise ValueError(f"{self._slots[p].name} has a sparse gradient")
        return due

    def _with_gradients(self, batch: Sequence[int]) -> list[int]:
        """Those of some matrices that have gradients; of those that ranks share it is all."""
        for i in batch:
            p = self._places[i][0]
            if p.grad is None and self.plan.matrices[i].group is not None:
                self._refuse_lack(p)
        return [i for i in batch if self._places[i][0].grad is not None]

    def _refuse_lack(self, p: Tensor) -> None:
        raise RuntimeError(f"{self._slots[p].name} is sharded and has no gradient on this rank")

    def _step_in_place(self, batch: Sequence[int], step: Step) -> None:
        """Step matrices of one shape that this rank has, or a shard of each."""
        given: exchange.Given = {}
        for i in batch:
            p, part = self._places[i]
            assert p.grad is not None
            given[i] = [self._slots[p].shard(x, part) for x in (p, p.grad)]
        for i, (weight, _) in step.batch(given).items():
            p, part = self._places[i]
            self._slots[p].put(weight, p, part)

    def _held(self, i: int) -> dict[str, Tensor]:
        """The moments of the plan's matrices ``i`` on this rank, by name."""
        (p, part), names = self._places[i], self._moments(self.plan.matrices[i])
        return {name: self.state[p][state.key(name, part)] for name in names}

    def _step_exchanged(self, index: int, step: Step) -> None:
        """Step the matrices of which every rank of a group stores a part."""
        weights = self.plan.sends_weights or self._factors.doubt
        like = self._like(index)

        def stored(i: int) -> list[Tensor]:
            p, part = self._places[i]
            if p.grad is None:
                self._refuse_lack(p)
            slot = self._slots[p]
            some = (p, p.grad) if weights else (p.grad,)
            return [slot.stored(x, part).to(like.dtype) for x in some if x is not None]

        def compute(given: exchange.Given) -> exchange.Computed:
            stepped: exchange.Computed = {}
            for batch in self.plan.batches(list(given), like.device.type):
                stepped |= step.batch({i: given[i] for i in batch})
            return stepped

        def finalize(i: int, weight: Tensor, moved: Tensor | None) -> None:
            p, part = self._places[i]
            self._slots[p].write(weight, p, part, moved)

        exchange.run(
            self._routes[index],
            2 if weights else 1,
            stored,
            compute,
            finalize,
            like=like,
            group=self.groups[index],
        )

    def records(self) -> Iterator[tuple[int, str, Record]]:
        """Place of each moment of ``state_dict`` among all ranks', by its parameter and key."""
        for index, p in enumerate(self._params()):
            for key, (moment, ranks) in self._held_moments(p).items():
                x = self.plan.matrices[self._numbers[p, state.part_of(key)]]
                member = x.team.index(self.ranks[x.group]) if x.group is not None else 0
                yield index, key, self._slots[p].record(moment, member=member, ranks=ranks)

    def state_dict(self) -> dict[str, Any]:
        """As torch's; also waits for the device and reports steps that were not taken.

        Moments that are held packed or coded are in it as matrices, so that it is the same for each
        ``state_layout`` and ``int8`` can be loaded as ``fp32``; they are made on the CPU, since
        devices may not have room for all.
        """
        self._follow()
        self._guard.report()
        found = self._state_dict() if self._members else super().state_dict()
        for index, p in enumerate(self._params()):
            own = found["state"][index] = dict(found["state"].get(index, {}))
            spreads = self._spreads(p)
            for key, (moment, ranks) in self._held_moments(p).items():
                if moment.held(ranks, compute_dtype(p).itemsize) != moment.local(ranks):
                    held = own[key] if spreads else own[key].cpu()
                    own[key] = storage.matrices(held, moment, ranks, key)
            for key, spread in spreads.items():
                dtype = storage.dtype_of(spread.moment, p)
                dtype = torch.float32 if dtype == torch.int8 else dtype
                own[key] = spread.scatter(
                    own.get(key), torch.empty(0, dtype=dtype, device=p.device)
                )
        return found

    def _spreads(self, p: Tensor) -> dict[str, dtensor.Spread]:
        """How each moment of a DTensor that ranks divide travels to them, by key."""
        slot = self._slots[p]
        if slot.group is None or not dtensor.is_dtensor(p):
            return {}
        return {
            state.key(name, part): dtensor.Spread(p, moment, x.team)
            for part in slot.view.shapes
            for x in (self.plan.matrices[self._numbers[p, part]],)
            for name, moment in self._moments(x).items()
        }

    def _state_dict(self) -> dict[str, Any]:
        """As torch's, of all weights that this rank computes or stores something of."""
        numbers = itertools.count()
        groups = [
            {**group, "params": [next(numbers) for _ in self._params_of(number)]}
            for number, group in enumerate(self.param_groups)
        ]
        own = {index: dict(self.state[p]) for index, p in enumerate(self._params())}
        return {"state": own, "param_groups": groups}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned; refused as a whole, naming what does not fit.

        A state without the spectra at start, where they are reset, is taken: those of the weights
        at the next step stand for them, which the log says.

        Raises:
            ValueError: the state is of other options, parameters or shapes.
            RuntimeError: ranks that share weights have loaded different steps.
        """
        self._refuse_other_state(state_dict)
        self._follow()
        self._started.clear()
        self._factors.forget()
        lacking = []
        # torch would cast moments to their parameter's dtype, and know nothing of packed ones.
        shown = [len(group["params"]) for group in self.param_groups]
        saved = state_dict["param_groups"]
        groups = [
            {**group, "params": group["params"][:count]}
            for group, count in zip(saved, shown, strict=True)
        ]
        super().load_state_dict({**state_dict, "state": {}, "param_groups": groups})
        for group in self.param_groups:
            group["pion"] = state.identity(self.config)
        for number, old in enumerate(saved):
            for p, index in zip(self._params_of(number), old["params"], strict=True):
                self.state[p] = {}  # also where this rank holds no moment of it
                values: Mapping[str, Any] = state_dict["state"].get(index, {})
                if spreads := self._spreads(p):
                    some = {key: each for key, each in spreads.items() if key in values}
                    values = {key: each.gather(values[key]) for key, each in some.items()}
                for key, (moment, ranks) in self._held_moments(p).items():
                    self.state[p][key] = held = storage.zeros(moment, ranks, p)
                    value = values.get(key)
                    if value is None:
                        lacking.append(self._slots[p].name)
                    else:
                        storage.store(value, held, moment, ranks, key)
                starts = [x for key, x in self.state[p].items() if state.is_start(key)]
                if all(x.any(-1).all() for x in starts):
                    self._started.add(p)
        if lacking:
            logger.warning(
                "the state has no spectra at start (of %s, and %d more): spectra will be reset to "
                "those of the weights at the next step",
                lacking[0],
                len(set(lacking)) - 1,
            )
        self._compare()

    def _refuse_other_state(self, state_dict: dict[str, Any]) -> None:
        groups = state_dict["param_groups"]
        sizes = [len(g["params"]) for g in groups]
        numbers = range(len(self.param_groups))
        if sizes != (mine := [len(self._params_of(number)) for number in numbers]):
            raise ValueError(f"the state has groups of {sizes} parameters, this optimizer {mine}")
        for number, (group, old) in enumerate(zip(self.param_groups, groups, strict=True)):
            if "pion" not in old:
                raise ValueError("the state is not Pion's: it is of another optimizer")
            for option, value in group["pion"].items():
                # An empty list is left out by torch.distributed.checkpoint.
                theirs = old["pion"].get(option, [])
                if theirs != value:
                    raise ValueError(
                        f"the state was made with {option}={theirs!r}, this run has "
                        f"{option}={value!r}"
                    )
            for p, index in zip(self._params_of(number), old["params"], strict=True):
                self._refuse_other_moments(p, state_dict["state"].get(index, {}))

    def _refuse_other_moments(self, p: Tensor, found: Mapping[str, Any]) -> None:
        name, spreads = self._slots[p].name, self._spreads(p)
        shapes = {key: each.shape for key, each in spreads.items()} or {
            key: moment.local(ranks) for key, (moment, ranks) in self._held_moments(p).items()
        }
        for key, shape in shapes.items():
            if key not in found and state.is_start(key):
                continue
            if key not in found or tuple(found[key].shape) != shape:
                has = tuple(found[key].shape) if key in found else "nothing"
                raise ValueError(f"{name}: {key} must be {shape}, the state has {has}")
            if spreads and (why := spreads[key].unfit(found[key])):
                raise ValueError(f"{name}: {key} {why}")


def _refuse_options(group: Mapping[str, Any], place: str) -> None:
    for name, value in group.items():
        if name in _OPTIONS:
            raise ValueError(
                f"{name}={value!r} {place}: Pion's options are the same in all groups; give "
                f"config=PionConfig({name}=...)"
            )
        if name == "weight_decay" and value:
            raise ValueError(
                f"weight_decay={value!r} {place}: decay would change the spectrum, so that Pion "
                "has none; set it to 0, or give the parameters to torch.optim.AdamW"
            )
        if name in _OPTIONS_OF_OTHERS and value:
            raise ValueError(f"{name}={value!r} {place}: Pion has no such option; leave it out")
