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

from . import cost, exchange, spectrum, state, storage
from .checkpoint import Record
from .config import SIDE_OF, Axis, PionConfig
from .exchange import GroupPeers, ProcessGroup, Route
from .factors import Factors, Rows
from .guard import Guard
from .matrices import MatrixView, as_rows, stacked, whole
from .plan import StepPlan, build_plan, due
from .slots import Slot, Storage
from .storage import compute_dtype
from .update import polar
from .update.layout import Blocks, Divided, Layout
from .update.step import step as update

logger = logging.getLogger("pion_dist")

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
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
    moments follow at the next step. ``torch.compile`` leaves ``step`` out of its graph and compiles
    a training step around it.

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

    Raises:
        ValueError: a parameter is neither 2-D nor contiguous and 3-D, is not real floating point,
            or is a DTensor; a view does not fit it; it cannot be cut as the options say; lr is
            negative; or a group has options.
        RuntimeError: the ranks of a group have other parameters or options.

    A matrix of zeros stays zero under any factors: the log warns of weights that have one when the
    optimizer is made. It is no error, since weights may still be loaded; ``split_parameters`` gives
    such weights to AdamW.

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
    ) -> None:
        """See the class."""
        self._names = dict(names or {})
        self._shards = dict(shards or {})
        self.config = config if config is not None else PionConfig()
        self._views = dict(views or {})
        self._slots: dict[Tensor, Slot] = {}
        self._stored = dict(stored or {})
        # The data of a group's weights, where wrappers show some of it in param_groups.
        self._members: dict[int, list[Tensor]] = {}
        self._guard = Guard()
        self._factors = Factors()
        self.plan = StepPlan(self.config, (), ())
        self._started: set[Tensor] = set()  # parameters whose spectra at start are measured
        # What the next step's factors do, by (number in the plan, number in its batch), is put
        # here; for ``diagnostics``.
        self.readings: list[tuple[Sequence[tuple[int, int]], Tensor]] | None = None
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
            p: self._slot(p, name or self._names.get(p, f"parameter {index} {place}"))
            for index, (name, p) in enumerate(named)
        }
        lr = group.get("lr", self.defaults["lr"])
        if not isinstance(lr, Tensor) and lr < 0.0:
            raise ValueError(f"lr={lr}: must not be negative")
        group["step"] = 0
        group["pion"] = state.identity(self.config)
        super().add_param_group(group)
        if some := {p: each for p, slot in slots.items() if (each := slot.storage) is not None}:
            self._members[len(self.param_groups) - 1] = [each.data for each in some.values()]
            group["params"] = [each.data for each in some.values() if each.data.numel()]
            slots = {each.data: slots[p] for p, each in some.items()}
        self._slots.update(slots)
        if self._constructed:
            self.settle()
            self._warn_of_zeros(slots)

    def _slot(self, p: Any, name: str) -> Slot:
        if not isinstance(p, Tensor):
            raise TypeError(f"{name}: a parameter must be a tensor, not {type(p).__name__}")
        view = self._views.get(p)
        if p.dim() not in (2, 3) or p.numel() == 0:
            raise ValueError(
                f"{name} has shape {tuple(p.shape)}: Pion rotates 2-D weights and fused experts "
                "[E, m, n]; give this parameter to torch.optim.AdamW"
            )
        if p.dim() == 3 and not p.is_contiguous():
            raise ValueError(
                f"{name} is 3-D and not contiguous: make it so, or give it to torch.optim.AdamW"
            )
        if why := exchange.cut_elsewhere(p):
            raise ValueError(f"{name} {why}")
        _check_dtype(p, name)
        rows, cols = as_rows(p).shape
        if view is not None and (view.rows, view.cols) != (rows, cols):
            raise ValueError(f"{name} has shape {tuple(p.shape)}, its view is of {view}")
        if view is None:
            axis: Axis = "rows" if p.shape[-2] >= cols else "cols"
            if p.dim() == 3:
                view = stacked(rows, cols, name="expert", count=len(p), axis=axis)
            else:
                view = whole(rows, cols, axis=axis)
        slot = Slot(name, view, self._shards.get(p), self._stored.get(p))
        for _, m, n in slot.shapes.values():
            if why := state.unfit(m, n, self.config, view.axis, slot.cut):
                raise ValueError(f"{name}: {why}")
        return slot

    def _warn_of_zeros(self, params: Iterable[Tensor]) -> None:
        """Name the weights with a matrix of zeros; a collective of the ranks that share them."""
        asked = set(params)
        nonzero = {
            i: self._slots[p].view.nonzero(as_rows(p.detach()), part)
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
        if self._kinds == self._kinds_now():
            return
        for p, slot in self._slots.items():
            _check_dtype(p, slot.name)
        self._guard.report()
        self._guard = Guard()  # its counts lie where the gradients were
        self._factors.forget()  # weights may have been rounded
        for p in self._slots:
            for key, (moment, ranks) in self._held_moments(p).items():
                value = storage.matrices(self.state[p][key], moment, ranks, key)
                self.state[p][key] = storage.zeros(moment, ranks, p)
                storage.store(value, self.state[p][key], moment, ranks, key)
        self.settle()

    def _kinds_now(self) -> list[tuple[torch.device, torch.dtype]]:
        return [(p.device, p.dtype) for p in self._slots]

    def __getstate__(self) -> dict[str, Any]:
        """Everything that a copy needs, for ``copy.deepcopy``, ``pickle`` and ``torch.save``.

        Raises:
            TypeError: there are shards, whose process groups are of this process alone.
        """
        if self._shards or self._stored:
            raise TypeError(
                "Pion with shards= cannot be copied or pickled, since their process groups cannot: "
                "take state_dict(), and load it into a Pion that is made on all ranks"
            )
        self._guard.report()
        return {**super().__getstate__(), **{name: getattr(self, name) for name in _COPIED}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a copy; also torch's way to load groups and moments, which are all it gives."""
        super().__setstate__(state)
        if state.keys() >= set(_COPIED):
            self._shards, self._guard, self.readings = {}, Guard(), None
            self._stored, self._members = {}, {}
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
                    matrices.append(slot.plan(part, p, groups=self.groups, param_group=number))
        self.plan = build_plan(matrices, [g.size() for g in self.groups], self.config)
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
            state.key(name, part): (moment, slot.cut)
            for part in slot.view.shapes
            if self.plan.computed([self._numbers[p, part]], self.ranks)
            for name, moment in self._moments(p, part).items()
        }

    def _moments(self, p: Tensor, part: str) -> dict[str, state.Moment]:
        slot = self._slots[p]
        return state.moments(*slot.shapes[part], self.config, slot.view.axis)

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
        x = self.plan.matrices[i]
        return [x.name(index) for index in range(x.batch)]

    def measured[T](
        self, wanted: Collection[int], measure: Callable[[int, Tensor], T]
    ) -> dict[int, T]:
        """Measure whole matrices, each batch on one of the ranks that store it; a collective.

        Args:
            wanted: numbers in the plan; the same on all ranks of a group.
            measure: takes a number and matrices [B, m, n].
        """
        results: dict[int, T] = {}

        def take(i: int, shards: Tensor) -> None:
            team = self.plan.matrices[i].team
            matrices = self._complete(i, shards)
            if len(team) == 1 or GroupPeers(self._tp(i)).rank == i % len(team):
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

    def _tp(self, i: int) -> ProcessGroup:
        """The team's process group of matrices that ranks divide."""
        group = self._slots[self._places[i][0]].tp
        assert group is not None, "teams of several ranks are tensor parallelism's"
        return group

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
        for batch in self._in_place:
            if some := self._with_gradients(batch):
                self._step_in_place(some, grads_finite)
        for index, routes in enumerate(self._routes):
            if routes:
                self._step_exchanged(index, grads_finite)
        if self.config.spectrum_reset_interval:
            self._started.update(due)
        if polar:
            self._factors.end(due)

    def _grads_finite(self, due: Sequence[Tensor]) -> Tensor:
        if not due:  # other ranks store all of the weights that this one computes
            return torch.ones((), dtype=torch.bool, device=self._params()[0].device)
        names = [self._slots[p].name for p in due]
        return self._guard.check(names, [p.grad for p in due if p.grad is not None])

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
                if slot.storage is None and self._factors.unsure(p):
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

    def _step_in_place(self, batch: Sequence[int], grads_finite: Tensor) -> None:
        """Step matrices of one shape that this rank has, or a shard of each."""
        given: exchange.Given = {}
        for i in batch:
            p, part = self._places[i]
            assert p.grad is not None
            given[i] = [self._slots[p].shard(x, part) for x in (p, p.grad)]
        for i, (weight, _) in self._step_batch(given, grads_finite).items():
            p, part = self._places[i]
            self._slots[p].put(weight, p, part)

    def _step_exchanged(self, index: int, grads_finite: Tensor) -> None:
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
                stepped |= self._step_batch({i: given[i] for i in batch}, grads_finite)
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

    def _step_batch(self, given: exchange.Given, grads_finite: Tensor) -> exchange.Computed:
        """Step matrices of one shape, or this rank's shards of them.

        Args:
            given: by number in the plan, their weights (modified in place) and gradients; polar's
                gradients alone where its factors tell the weights.
            grads_finite: boolean scalar; where it is False nothing moves.

        Returns:
            By number, weights and, of polar's, which matrices have moved.
        """
        if len(given) == 1:
            ((i, tensors),) = given.items()
            return {i: self._step_parts(i, tensors, grads_finite)}
        held = [self._held(*self._places[i]) for i in given]
        counts = [self.plan.matrices[i].batch for i in given]
        *weights, grad = (torch.cat(x) for x in zip(*given.values(), strict=True))
        joined = {name: torch.cat([moments[name] for moments in held]) for name in held[0]}
        numbered = zip(given, counts, strict=True)
        members = [(i, index) for i, count in numbered for index in range(count)]
        weight = weights[0] if weights else None
        stepped, moved = self._update(members, weight, grad, joined, grads_finite)
        for name, moment in joined.items():
            for moments, each in zip(held, torch.split(moment, counts), strict=True):
                moments[name].copy_(each)
        flags = [None] * len(counts) if moved is None else torch.split(moved, counts)
        return dict(zip(given, zip(torch.split(stepped, counts), flags, strict=True), strict=True))

    def _step_parts(
        self, i: int, tensors: Sequence[Tensor], grads_finite: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """``_step_batch`` of the plan's matrices ``i``, a batch after the other."""
        x, moments = self.plan.matrices[i], self._held(*self._places[i])
        *weights, grad = tensors
        stride = x.batch if len(x.team) > 1 else self.plan.batch_size(x, grad.device.type)
        found = []
        for first in range(0, x.batch, stride):
            some = slice(first, first + stride)
            found.append(
                self._update(
                    [(i, index) for index in range(x.batch)[some]],
                    weights[0][some] if weights else None,
                    grad[some],
                    {name: moment[some] for name, moment in moments.items()},
                    grads_finite,
                )
            )
        if weights:  # modified in place
            moved = [each for _, each in found if each is not None]
            return weights[0], torch.cat(moved) if moved else None
        return torch.cat([w for w, _ in found]), torch.cat([m for _, m in found if m is not None])

    def _held(self, p: Tensor, part: str) -> dict[str, Tensor]:
        """A part's moments on this rank, by name."""
        return {name: self.state[p][state.key(name, part)] for name in self._moments(p, part)}

    def _update(
        self,
        members: Sequence[tuple[int, int]],
        w: Tensor | None,
        g: Tensor,
        moments: Mapping[str, Tensor],
        grads_finite: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """Step a batch of matrices, or of their shards.

        Args:
            members: of each its number in the plan, and in the batch there.
            w: weights. (modified in place)
            g: gradients.
            moments: by name. (modified in place)
            grads_finite: boolean scalar; where it is False nothing moves.

        Returns:
            The weights and, of polar's, which matrices have moved, [B].
        """
        x = self.plan.matrices[members[0][0]]
        group = self.param_groups[x.param_group]
        grads_finite = grads_finite.to(g.device, non_blocking=True)
        resets = self.config.spectrum_reset_interval > 0
        if resets and not self._started.issuperset(self._places[i][0] for i, _ in members):
            assert w is not None, "polar has no resets"
            start = moments[state.START]
            values = spectrum.singular_values(self._complete(members[0][0], w))
            start.copy_(torch.where(start.any(-1, keepdim=True), start, values))
        used, coded = moments, self.config.state_dtype == "int8"
        if coded:
            described = state.moments(len(g), x.m, x.n, self.config, x.axis)
            used = storage.decode(moments, described)
        lr, collect_metrics = group["lr"], self.readings is not None
        moved = None
        if self.config.direction == "polar":
            w, moved, found = self._step_polar(
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
            found = update(
                w,
                g,
                used,
                config=self.config,
                lr=lr,
                active=cost.order(x.m, x.n, self.config.active_sides(group["step"])),
                forms=cost.forms(x.m, x.n, self.config),
                grads_finite=grads_finite,
                layout=self._layout(members[0][0]),
                collect_metrics=collect_metrics,
            )
        if coded:
            storage.encode(used, moments, grads_finite=grads_finite)
        if self.readings is not None and found is not None:
            self.readings.append((members, found))
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
        large = state.large_side(x.m, x.n, x.axis)
        divided = len(x.team) > 1
        rows = Rows(GroupPeers(self._tp(number)) if divided else None, x.axis, large)
        params = [self._places[i][0] for i, _ in members]
        if w is not None and (self._factors.doubt or any(map(self._factors.unsure, params))):
            names = {i: self.names(i) for i, _ in members}
            self._factors.match(
                [names[i][index] for i, index in members],
                params,
                rows.from_shard(w),
                moments,
                rows,
                computed_by=number % len(x.team),
            )
        stepped, go, found = polar.step(
            rows.from_shard(g),
            moments,
            config=self.config,
            lr=lr,
            large=large,
            rows=max(x.m, x.n),
            grads_finite=grads_finite,
            all_reduce_sum=rows.all_reduce_sum,
            collect_metrics=collect_metrics,
        )
        stepped = rows.to_shard(stepped)
        if w is not None:
            torch.where(go, stepped, w, out=w)
            stepped = w
        return stepped, go.view(-1).to(stepped.dtype), found

    def _complete(self, i: int, shards: Tensor) -> Tensor:
        """Whole matrices of what a team's rank has of them; a collective of the team."""
        x = self.plan.matrices[i]
        if len(x.team) == 1:
            return shards
        return GroupPeers(self._tp(i)).all_gather(shards, x.cut_dim)

    def _reset(
        self, members: Sequence[tuple[int, int]], w: Tensor, start: Tensor, grads_finite: Tensor
    ) -> None:
        """Put back the singular values of the matrices whose turn it is (modified in place)."""
        x = self.plan.matrices[members[0][0]]
        step = self.param_groups[x.param_group]["step"]
        names = {i: self.names(i) for i, _ in members}
        interval = self.config.spectrum_reset_interval
        turns = [b for b, (i, j) in enumerate(members) if due(names[i][j], step, interval)]
        if not turns:
            return
        mine = w[turns]
        number = members[0][0]
        found = spectrum.restored(self._complete(number, mine), start[turns])
        if len(x.team) > 1:
            peers = GroupPeers(self._tp(number))
            found = found.chunk(peers.size, x.cut_dim)[peers.rank]
        w[turns] = torch.where(grads_finite, found, mine)

    def _layout(self, i: int) -> Layout | None:
        """How ``_update``'s matrices lie; None for whole."""
        x = self.plan.matrices[i]
        if x.axis is None:
            return None
        peers = GroupPeers(self._tp(i)) if len(x.team) > 1 else None
        if self.config.tp_mode == "blockwise":
            return Blocks(SIDE_OF[x.axis], self.config.blocks // len(x.team), peers)
        return None if peers is None else Divided(SIDE_OF[x.axis], peers)

    def records(self) -> Iterator[tuple[int, str, Record]]:
        """Place of each moment of ``state_dict`` among all ranks', by its parameter and key."""
        for index, p in enumerate(self._params()):
            slot = self._slots[p]
            for key, (moment, _) in self._held_moments(p).items():
                yield index, key, slot.record(moment, divided=self.config.tp_mode != "owner")

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
            for key, (moment, ranks) in self._held_moments(p).items():
                if moment.held(ranks, compute_dtype(p).itemsize) != moment.local(ranks):
                    own = found["state"][index] = dict(found["state"][index])
                    own[key] = storage.matrices(own[key].cpu(), moment, ranks, key)
        return found

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
        for number, old in enumerate(saved):
            for p, index in zip(self._params_of(number), old["params"], strict=True):
                self.state[p] = {}  # also where this rank holds no moment of it
                for key, (moment, ranks) in self._held_moments(p).items():
                    self.state[p][key] = held = storage.zeros(moment, ranks, p)
                    value = state_dict["state"].get(index, {}).get(key)
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
                if old["pion"].get(option) != value:
                    raise ValueError(
                        f"the state was made with {option}={old['pion'].get(option)!r}, this run "
                        f"has {option}={value!r}"
                    )
            for p, index in zip(self._params_of(number), old["params"], strict=True):
                slot, found = self._slots[p], state_dict["state"].get(index, {})
                for key, (moment, ranks) in self._held_moments(p).items():
                    shape = moment.local(ranks)
                    if key not in found and state.is_start(key):
                        continue
                    if key not in found or tuple(found[key].shape) != shape:
                        has = tuple(found[key].shape) if key in found else "nothing"
                        raise ValueError(f"{slot.name}: {key} must be {shape}, the state has {has}")


def _check_dtype(p: Tensor, name: str) -> None:
    if p.dtype not in _FLOATS:
        raise ValueError(f"{name} is {p.dtype}: Pion takes {', '.join(map(str, _FLOATS))}")


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
