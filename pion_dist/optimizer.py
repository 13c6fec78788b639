"""Pion as a torch optimizer: the shell around ``pion_dist.update``."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from . import dtensor, exchange, moments, offload, state, storage
from .checkpoint import Record
from .config import PionConfig
from .exchange import ProcessGroup
from .execute import Readings, Step
from .factors import Factors
from .guard import Guard
from .local_plan import LocalPlan
from .matrices import MatrixView
from .param_groups import refuse_options
from .plan import StepPlan
from .slots import Slot, Storage, check_dtype, slot_of

logger = logging.getLogger("pion_dist")

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
        names: names of parameters, for messages; ``named_parameters()`` brings its own.
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
        self._local = LocalPlan((), {}, self.config, {})
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
        refuse_options(group, place)
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
        names = self._local.with_zeros(params)
        if names:
            logger.warning(
                "%s: a matrix of zeros, which Pion never moves. Unless weights are still to be "
                "loaded, give it to torch.optim.AdamW, as split_parameters does",
                ", ".join(names),
            )

    def _follow(self) -> None:
        """Take over parameters that were converted, as by ``model.cuda()``, with their moments."""
        now = self._params()
        if list(map(id, now)) != list(map(id, self._slots)):
            self._replace(now)
        if self.config.offload_state:
            for p in now:
                for key, x in self.state[p].items():
                    self.state[p][key] = offload.at_home(x, p.device)
        if self._kinds == self._kinds_now():
            return
        for p, slot in self._slots.items():
            check_dtype(p, slot.name)
        self._wait()
        self._guard = Guard()  # its counts lie where the gradients were
        self._factors.forget()  # weights may have been rounded
        for p in self._slots:
            for key, (moment, ranks) in self._local.moments(p).items():
                value = storage.matrices(self.state[p][key], moment, ranks, key)
                self.state[p][key] = self._local.zeros(moment, ranks, p)
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

    def _wait(self) -> None:
        """Wait for the devices, and report steps that were not taken."""
        self._guard.report()
        if self.config.offload_state:
            # Parameters may have been converted since the last step, whose copies are elsewhere.
            for device in {device for device, _ in (*self._kinds, *self._kinds_now())}:
                offload.wait(device)

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
        self._wait()
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
            held = {key: x for key, x in self.state[p].items() if x.numel()}
            self.state[p] = self._local.elsewhere(p) | {
                key: held[key] if key in held else self._local.zeros(moment, ranks, p)
                for key, (moment, ranks) in self._local.moments(p).items()
            }

    def _plan(self) -> None:
        """Make the plan, and this rank's part of it."""
        self._kinds = self._kinds_now()
        self._local = LocalPlan(self.members(), self._slots, self.config, self._teams)
        self._factors.matrices = sum(x.batch for x in self.plan.matrices)

    @property
    def plan(self) -> StepPlan:
        """What each step computes and exchanges, of all matrices, and on which ranks."""
        return self._local.plan

    @property
    def groups(self) -> list[ProcessGroup]:
        """Ranks that together store weights, by the plan's numbers."""
        return self._local.groups

    @property
    def ranks(self) -> tuple[int, ...]:
        """This rank's in each of ``groups``."""
        return self._local.ranks

    def totals(self) -> str:
        """What this rank has and does in a step, in a line: ``StepPlan.totals``."""
        device = next(iter(self._slots)).device.type if self._slots else "cpu"
        return self.plan.totals(self.ranks, device)

    def members(self) -> list[list[Tensor]]:
        """The tensors that are stepped of every group, of whose weights other ranks may store all.

        They have the places in ``state_dict``.
        """
        return [
            self._members.get(number, group["params"])
            for number, group in enumerate(self.param_groups)
        ]

    def _params(self) -> list[Tensor]:
        return [p for params in self.members() for p in params]

    def _compare(self) -> None:
        """Compare the plan and the steps taken with the other ranks'."""
        steps = [f"step {group['step']} in group {i}" for i, group in enumerate(self.param_groups)]
        self._local.compare(steps)

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

        Writes into ``p.data`` are such. Without this call the next polar step would undo them. All
        ranks that share weights make it.
        """
        self._factors.forget()

    def matrices(self) -> Iterator[tuple[str, Tensor]]:
        """Every matrix that this rank stores, or its shard, with a name that is the same in every
        layout: weight, part and place in its batch.
        """
        return self._local.matrices()

    def measured[T](
        self, wanted: Collection[int], measure: Callable[[int, Tensor], T]
    ) -> dict[int, T]:
        """Measure whole matrices: ``LocalPlan.measured``."""
        return self._local.measured(wanted, measure)

    def start(self, i: int) -> Tensor | None:
        """Singular values at start, [B, k], of the plan's matrices ``i``, if they are recorded."""
        p, part = self._local.places[i]
        if self.config.offload_state:
            self._wait()
        sigma = self.state[p].get(state.key(state.SIGMA, part))
        if sigma is not None:
            return sigma.to(p.device, torch.float64) if sigma.any() else None
        recorded = self.state[p].get(state.key(state.START, part))
        return recorded.to(p.device) if recorded is not None and p in self._started else None

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
        if not due and not any(self._local.routes):
            return loss
        self._step(due)
        return loss

    def _step(self, due: Sequence[Tensor]) -> None:
        """Step what has gradients, where it is stored and then where it travels to."""
        grads_finite = exchange.agree(self._grads_finite(due), self.groups)
        polar = self.config.direction == "polar"
        if polar:
            self._factors.begin(due)
        step = Step(
            local=self._local,
            groups=self.param_groups,
            state=self.state,
            factors=self._factors,
            started=self._started,
            grads_finite=grads_finite,
            readings=self.readings,
        )
        step.take()
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

    def _due(self) -> list[Tensor]:
        """The parameters that have a gradient."""
        due = [p for p in self._params() if p.grad is not None]
        for p in due:
            if p.grad is not None and p.grad.is_sparse:
                raise ValueError(f"{self._slots[p].name} has a sparse gradient")
        return due

    def records(self) -> Iterator[tuple[int, str, Record]]:
        """Place of each moment of ``state_dict`` among all ranks', by its parameter and key."""
        return self._local.records()

    def state_dict(self) -> dict[str, Any]:
        """Return the state in torch's form; waits for the device and reports steps not taken.

        Moments that are held packed or coded are in it as matrices, so that it is the same for each
        ``state_layout`` and ``int8`` can be loaded as ``fp32``; they are made on the CPU, since
        devices may not have room for all. Those of DTensors are on the device.
        """
        self._follow()
        self._wait()
        shown = self._state_dict() if self._members else super().state_dict()
        for index, p in enumerate(self._params()):
            shown["state"][index] = moments.show(self._local, p, self.state[p])
        return shown

    def _state_dict(self) -> dict[str, Any]:
        """As torch's, of all weights that this rank computes or stores something of."""
        numbers = itertools.count()
        groups = [
            {**group, "params": [next(numbers) for _ in params]}
            for group, params in zip(self.param_groups, self.members(), strict=True)
        ]
        return {"state": {}, "param_groups": groups}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned, or refuse all of it and name what does not fit.

        A state without the spectra at start, where they are reset, is taken: those of the weights
        at the next step stand for them, which the log says.

        Raises:
            ValueError: the state is of other options, parameters or shapes.
            RuntimeError: ranks that share weights have loaded different steps.
        """
        self._follow()
        self._refuse_other_state(state_dict)
        self._wait()
        self._started.clear()
        self._factors.forget()
        lacking = []
        # torch would cast moments to their parameter's dtype, and know nothing of packed ones.
        saved = state_dict["param_groups"]
        groups = [
            {**old, "params": old["params"][: len(group["params"])]}
            for old, group in zip(saved, self.param_groups, strict=True)
        ]
        super().load_state_dict({**state_dict, "state": {}, "param_groups": groups})
        for group in self.param_groups:
            group["pion"] = state.identity(self.config)
        for old, params in zip(saved, self.members(), strict=True):
            for p, index in zip(params, old["params"], strict=True):
                shown = state_dict["state"].get(index, {})
                self.state[p], missing = moments.take(self._local, p, shown)
                lacking += [self._slots[p].name] * len(missing)
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
        groups, mine = state_dict["param_groups"], self.members()
        moments.refuse_other_groups(self.param_groups, groups, list(map(len, mine)))
        for group, params in zip(groups, mine, strict=True):
            for p, index in zip(params, group["params"], strict=True):
                moments.refuse_others(self._local, p, state_dict["state"].get(index, {}))
