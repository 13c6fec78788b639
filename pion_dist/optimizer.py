"""Pion as a torch optimizer: the shell around ``pion_dist.update``."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from . import cost, exchange, spectrum, state, storage
from .checkpoint import Record
from .config import SIDE_OF, Axis, PionConfig
from .exchange import GroupPeers, Piece, ProcessGroup
from .factors import Factors, Rows
from .guard import Guard
from .matrices import MatrixView, as_rows, stacked, whole
from .plan import MatrixPlan, StepPlan, build_plan, due
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


@dataclass(frozen=True)
class _Slot:
    """What the optimizer knows of a parameter."""

    name: str
    view: MatrixView
    group: ProcessGroup | None = None

    @property
    def ranks(self) -> int:
        """That share the weight."""
        return self.group.size() if self.group is not None else 1

    @property
    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """[B, m, n] of every part's matrices, whole."""
        return self.view.whole_shapes(self.ranks)


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
    ) -> None:
        """See the class."""
        self._names = dict(names or {})
        self._shards = dict(shards or {})
        self.config = config if config is not None else PionConfig()
        self._views = dict(views or {})
        self._slots: dict[Tensor, _Slot] = {}
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
        self._slots.update(slots)
        if self._constructed:
            self.settle()
            self._warn_of_zeros(slots)

    def _slot(self, p: Any, name: str) -> _Slot:
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
        slot = _Slot(name, view, self._shards.get(p))
        for _, m, n in slot.shapes.values():
            if why := state.unfit(m, n, self.config, view.axis, slot.ranks):
                raise ValueError(f"{name}: {why}")
        return slot

    def _warn_of_zeros(self, params: Iterable[Tensor]) -> None:
        """Name the weights with a matrix of zeros; a collective of the ranks that share them."""
        asked = set(params)
        nonzero = {
            i: self._slots[p].view.nonzero(as_rows(p.detach()), part)
            for i, (p, part) in enumerate(self._places)
            if p in asked and not p.is_meta
        }
        for index, group in enumerate(self.groups):
            cut = [i for i in nonzero if self.plan.matrices[i].group == index]
            cut = [i for i in cut if self.plan.matrices[i].shared]
            if cut:
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
        if self._shards:
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
            self._factors = Factors()
            self._constructed = True
            self._plan()

    def settle(self) -> None:
        """Make the plan, compare it with other ranks', and make the state this rank holds.

        Done at construction, and to be done again by a wrapper that has taken parameters out of the
        groups: their state is freed. A collective of each group that shares parameters.

        Raises:
            RuntimeError: ranks have other plans, or matrices that ranks share would be dealt anew
                after the first step.
        """
        params = [p for group in self.param_groups for p in group["params"]]
        self._slots = {p: self._slots[p] for p in params}
        for p in set(self.state) - set(params):
            del self.state[p]
        self._started &= set(params)
        self._factors.forget()  # it would hold parameters that have left
        old = {(x.weight, x.part): x.owner for x in self.plan.matrices}
        self._plan()
        stepped = any(group["step"] for group in self.param_groups)
        if stepped and any(
            old.get((x.weight, x.part), x.owner) != x.owner for x in self.plan.matrices
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
        found = []
        for number, group in enumerate(self.param_groups):
            for p in group["params"]:
                slot = self._slots[p]
                if slot.group is not None and slot.group not in self.groups:
                    self.groups.append(slot.group)
                for part, (batch, m, n) in slot.shapes.items():
                    self._places.append((p, part))
                    found.append(
                        MatrixPlan(
                            weight=slot.name,
                            part=part,
                            batch=batch,
                            m=m,
                            n=n,
                            axis=slot.view.axis,
                            group=None if slot.group is None else self.groups.index(slot.group),
                            param_group=number,
                            itemsize=compute_dtype(p).itemsize,
                        )
                    )
        self.plan = build_plan(found, [g.size() for g in self.groups], self.config)
        self._factors.matrices = sum(x.batch for x in self.plan.matrices)
        self._numbers = {place: i for i, place in enumerate(self._places)}
        joins = self.config.tp_mode == "owner"
        together = self.plan.waves if joins else self.plan.batches
        self._together = [together(index) for index in range(len(self.groups))]
        on: dict[torch.device, list[int]] = {}
        for i in self.plan.own():
            on.setdefault(self._places[i][0].device, []).append(i)
        self._own = [
            batch
            for device, mine in on.items()
            for batch in self.plan.own_batches(mine, device.type)
        ]

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
            state.key(name, part): (moment, slot.ranks)
            for part in slot.view.shapes
            if self.plan.matrices[self._numbers[p, part]].owner
            in (None, slot.group.rank() if slot.group else None)
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

        Writes into ``p.data`` are such. Without it the next polar step would undo them.
        """
        self._factors.forget()

    def matrices(self) -> Iterator[tuple[str, Tensor]]:
        """Every matrix that Pion rotates, with a name: weight, part and place in its batch."""
        for i, (p, part) in enumerate(self._places):
            each = self._slots[p].view.matrices(as_rows(p.detach()), part)
            yield from zip(self.names(i), each, strict=True)

    def names(self, i: int) -> list[str]:
        """Of the plan's matrices ``i`` on this rank, each the same in every layout."""
        x = self.plan.matrices[i]
        dealt = self.groups[x.group].rank() if x.group is not None and x.axis is None else 0
        return [x.name(dealt * x.batch + index) for index in range(x.batch)]

    def whole(self, i: int) -> Tensor:
        """The plan's matrices ``i``, [B, m, n]: a collective of the ranks that share them."""
        p, part = self._places[i]
        mine = self._slots[p].view.matrices(as_rows(p.detach()), part)
        return self._joined(self.plan.matrices[i], mine)

    def start(self, i: int) -> Tensor | None:
        """Singular values at start, [B, k], of the plan's matrices ``i``, if they are recorded."""
        p, part = self._places[i]
        sigma = self.state[p].get(state.key(state.SIGMA, part))
        if sigma is not None:
            return sigma.double() if sigma.any() else None
        recorded = self.state[p].get(state.key(state.START, part))
        return recorded if p in self._started else None

    def _joined(self, x: MatrixPlan, shards: Tensor) -> Tensor:
        """Whole matrices of this rank's shards of them."""
        if not x.shared or x.group is None:
            return shards
        return GroupPeers(self.groups[x.group]).all_gather(shards, 1 if x.axis == "rows" else 2)

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
        if not due:
            return loss
        names = [self._slots[p].name for p in due]
        grads_finite = self._guard.check(names, [p.grad for p in due if p.grad is not None])
        grads_finite = exchange.agree(grads_finite, self.groups)
        if self.config.direction == "polar":
            self._factors.begin(due)
        for batch in self._own:
            self._step_own([i for i in batch if self._places[i][0].grad is not None], grads_finite)
        for index in range(len(self.groups)):
            if self._together[index]:
                self._step_shared(index, grads_finite)
        if self.config.spectrum_reset_interval:
            self._started.update(due)
        if self.config.direction == "polar":
            self._factors.end(due)
        return loss

    def _due(self) -> list[Tensor]:
        """The parameters that have a gradient."""
        due = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for p in due:
            if p.grad is not None and p.grad.is_sparse:
                raise ValueError(f"{self._slots[p].name} has a sparse gradient")
        return due

    def _step_own(self, batch: Sequence[int], grads_finite: Tensor) -> None:
        """Step matrices of one shape that this rank has whole."""
        if len(batch) > 1:
            self._step_together(batch, grads_finite)
            return
        for i in batch:
            weight, grad = self._shard(i)
            self._step_whole(i, weight, grad, grads_finite)
            self._store(i, weight)

    def _step_whole(self, i: int, weight: Tensor, grad: Tensor, grads_finite: Tensor) -> None:
        """Step the plan's matrices ``i``, whole (modified in place), a batch after the other."""
        moments = self._held(*self._places[i])
        stride = self.plan.batch_size(self.plan.matrices[i], weight.device.type)
        for first in range(0, len(weight), stride):
            some = slice(first, first + stride)
            self._update(
                [(i, index) for index in range(len(weight))[some]],
                weight[some],
                grad[some],
                {name: moment[some] for name, moment in moments.items()},
                grads_finite,
            )

    def _step_shared(self, index: int, grads_finite: Tensor) -> None:
        """Step the matrices of which every rank of a group has a shard."""
        places = self._places
        for i in self.plan.of_group(index):
            if places[i][0].grad is None:
                name = self._slots[places[i][0]].name
                raise RuntimeError(f"{name} is sharded and has no gradient on this rank")
        if self.config.tp_mode in ("distributed", "blockwise"):
            for batch in self._together[index]:
                self._step_together(batch, grads_finite)
            return
        pieces = {}
        for i in self.plan.of_group(index):
            (p, part), owner = places[i], self.plan.matrices[i].owner
            view = self._slots[p].view
            pieces[i] = Piece(view.shapes[part], 1 if view.axis == "rows" else 2, owner or 0)

        def compute(i: int, weight: Tensor, grad: Tensor) -> None:
            self._step_whole(i, weight, grad, grads_finite)

        exchange.run(
            [{i: pieces[i] for i in wave} for wave in self._together[index]],
            self._shard,
            compute,
            self._store,
            group=self.groups[index],
        )

    def _step_together(self, batch: Sequence[int], grads_finite: Tensor) -> None:
        """Step matrices of one shape, or this rank's shards of them, as one batch."""
        shards = [self._shard(i) for i in batch]
        held = [self._held(*self._places[i]) for i in batch]
        counts = [weight.shape[0] for weight, _ in shards]
        weight, grad = (torch.cat(x) for x in zip(*shards, strict=True))
        joined = {name: torch.cat([moments[name] for moments in held]) for name in held[0]}
        numbered = zip(batch, counts, strict=True)
        members = [(i, index) for i, count in numbered for index in range(count)]
        self._update(members, weight, grad, joined, grads_finite)
        for i, stepped in zip(batch, torch.split(weight, counts), strict=True):
            self._store(i, stepped)
        for name, moment in joined.items():
            for moments, stepped in zip(held, torch.split(moment, counts), strict=True):
                moments[name].copy_(stepped)

    def _shard(self, i: int) -> tuple[Tensor, Tensor]:
        """What this rank has of the weight and the gradient of the plan's matrices ``i``."""
        p, part = self._places[i]
        view, dtype = self._slots[p].view, compute_dtype(p)
        assert p.grad is not None
        weight, grad = (view.matrices(as_rows(x), part).to(dtype) for x in (p, p.grad))
        return weight, grad

    def _store(self, i: int, shard: Tensor) -> None:
        p, part = self._places[i]
        rows = p if p.dim() == 2 else p.view(-1, p.shape[-1])  # raises where it would be a copy
        self._slots[p].view.merge({part: shard}, rows)

    def _held(self, p: Tensor, part: str) -> dict[str, Tensor]:
        """A part's moments on this rank, by name."""
        return {name: self.state[p][state.key(name, part)] for name in self._moments(p, part)}

    def _update(
        self,
        members: Sequence[tuple[int, int]],
        w: Tensor,
        g: Tensor,
        moments: Mapping[str, Tensor],
        grads_finite: Tensor,
    ) -> None:
        """Step a batch of matrices, or of their shards (modified in place).

        Args:
            members: of each its number in the plan, and in the batch there.
            w: weights.
            g: gradients.
            moments: by name.
            grads_finite: boolean scalar; where it is False nothing moves.
        """
        x = self.plan.matrices[members[0][0]]
        group = self.param_groups[x.param_group]
        grads_finite = grads_finite.to(w.device, non_blocking=True)
        resets = self.config.spectrum_reset_interval > 0
        if resets and not self._started.issuperset(self._places[i][0] for i, _ in members):
            start = moments[state.START]
            values = spectrum.singular_values(self._complete(x, w))
            start.copy_(torch.where(start.any(-1, keepdim=True), start, values))
        used, coded = moments, self.config.state_dtype == "int8"
        if coded:
            described = state.moments(len(w), x.m, x.n, self.config, x.axis)
            used = storage.decode(moments, described)
        lr, collect_metrics = group["lr"], self.readings is not None
        if self.config.direction == "polar":
            found = self._step_polar(
                members,
                w,
                g,
                used,
                lr=lr,
                grads_finite=grads_finite,
                collect_metrics=collect_metrics,
            )
        else:
            found = update(
                w,
                g,
                used,
                config=self.config,
                lr=lr,
                active=cost.order(x.m, x.n, self.config.active_sides(group["step"])),
                forms=cost.forms(x.m, x.n, self.config),
                grads_finite=grads_finite,
                layout=self._layout(x),
                collect_metrics=collect_metrics,
            )
        if coded:
            storage.encode(used, moments, grads_finite=grads_finite)
        if self.readings is not None and found is not None:
            self.readings.append((members, found))
        if resets:
            self._reset(members, w, moments[state.START], grads_finite)

    def _step_polar(
        self,
        members: Sequence[tuple[int, int]],
        w: Tensor,
        g: Tensor,
        moments: Mapping[str, Tensor],
        *,
        lr: float | Tensor,
        grads_finite: Tensor,
        collect_metrics: bool,
    ) -> Tensor | None:
        """``_update`` of the polar direction."""
        x = self.plan.matrices[members[0][0]]
        large = state.large_side(x.m, x.n, x.axis)
        divided = self.config.tp_mode == "distributed" and x.shared
        rows = Rows(GroupPeers(self.groups[x.group or 0]) if divided else None, x.axis, large)
        params = [self._places[i][0] for i, _ in members]
        if any(self._factors.unsure(p) for p in params):
            names = {i: self.names(i) for i, _ in members}
            self._factors.match(
                [names[i][index] for i, index in members],
                params,
                rows.from_shard(w),
                moments,
                rows,
                computed_by=members[0][0] % self.plan.ranks_of(x),
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
        torch.where(go, rows.to_shard(stepped), w, out=w)
        return found

    def _complete(self, x: MatrixPlan, w: Tensor) -> Tensor:
        """Whole matrices of what ``_update`` has of them."""
        return w if self.config.tp_mode == "owner" else self._joined(x, w)

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
        found = spectrum.restored(self._complete(x, mine), start[turns])
        if found.shape != mine.shape and x.group is not None:
            peers = GroupPeers(self.groups[x.group])
            found = found.chunk(peers.size, 1 if x.axis == "rows" else 2)[peers.rank]
        w[turns] = torch.where(grads_finite, found, mine)

    def _layout(self, x: MatrixPlan) -> Layout | None:
        """How ``_update``'s matrices lie; None for whole."""
        peers = GroupPeers(self.groups[x.group]) if x.shared and x.group is not None else None
        if x.axis is None:
            return None
        if self.config.tp_mode == "blockwise":
            count = self.config.blocks // (peers.size if peers is not None else 1)
            return Blocks(SIDE_OF[x.axis], count, peers)
        if self.config.tp_mode == "distributed" and peers is not None:
            return Divided(SIDE_OF[x.axis], peers)
        return None

    def records(self) -> Iterator[tuple[int, str, Record]]:
        """Place of each moment of ``state_dict`` among all ranks', by its parameter and key."""
        params = (p for group in self.param_groups for p in group["params"])
        for index, p in enumerate(params):
            for key, (moment, _) in self._held_moments(p).items():
                yield index, key, self._record(self._slots[p], moment)

    def _record(self, slot: _Slot, moment: state.Moment) -> Record:
        if slot.group is None:
            return Record()
        rank, ranks = slot.group.rank(), slot.ranks
        if slot.view.axis is None:  # the ranks have matrices of their own
            return Record(dim=0, index=rank, count=ranks)
        if moment.dim is not None:
            return Record(dim=moment.dim, index=rank, count=ranks)
        return Record() if self.config.tp_mode == "owner" else Record(replica=rank)

    def state_dict(self) -> dict[str, Any]:
        """As torch's; also waits for the device and reports steps that were not taken.

        Moments that are held packed or coded are in it as matrices, so that it is the same for each
        ``state_layout`` and ``int8`` can be loaded as ``fp32``; they are made on the CPU, since
        devices may not have room for all.
        """
        self._follow()
        self._guard.report()
        found = super().state_dict()
        params = (p for group in self.param_groups for p in group["params"])
        for index, p in enumerate(params):
            for key, (moment, ranks) in self._held_moments(p).items():
                if moment.held(ranks, compute_dtype(p).itemsize) != moment.local(ranks):
                    own = found["state"][index] = dict(found["state"][index])
                    own[key] = storage.matrices(own[key].cpu(), moment, ranks, key)
        return found

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
        super().load_state_dict({**state_dict, "state": {}})
        for group, old in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for p, index in zip(group["params"], old["params"], strict=True):
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
        if sizes != (mine := [len(g["params"]) for g in self.param_groups]):
            raise ValueError(f"the state has groups of {sizes} parameters, this optimizer {mine}")
        for group, old in zip(self.param_groups, groups, strict=True):
            if "pion" not in old:
                raise ValueError("the state is not Pion's: it is of another optimizer")
            for option, value in group["pion"].items():
                if old["pion"].get(option) != value:
                    raise ValueError(
                        f"the state was made with {option}={old['pion'].get(option)!r}, this run "
                        f"has {option}={value!r}"
                    )
            for p, index in zip(group["params"], old["params"], strict=True):
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
