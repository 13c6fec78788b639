"""Pion as a torch optimizer: the shell around ``pion_dist.update``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from torch import Tensor

from . import cost, exchange, state
from .checkpoint import Record
from .config import PionConfig
from .exchange import Piece, Shard
from .guard import Guard
from .matrices import MatrixView, compute_dtype, whole
from .plan import deal
from .update.step import step as update

# Bytes of generators and temporaries that one batch may have on the CPU, whose caches larger ones
# fall out of. 24 heads of 64 x 512 take 57 ms a step at 1 MiB and 90 to 100 at 4 to 64 MiB with Lie
# momentum, 32 to 36 at any with transported (tools/bench_batch.py, 2 cores, torch 2.13). On other
# devices a part is one batch.
CPU_BATCH_BYTES = 1 << 20

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class _Slot:
    """What the optimizer knows of a parameter."""

    name: str
    view: MatrixView
    shard: Shard | None = None
    owners: dict[str, int] = field(default_factory=dict)  # of the parts that are cut

    def sizes(self, part: str) -> tuple[int, int, int]:
        """[B, m, n] of a part's matrices, whole."""
        sizes = list(self.view.shapes[part])
        if self.shard is not None and part in self.shard.dims:
            sizes[self.shard.dims[part]] *= self.shard.ranks
        return sizes[0], sizes[1], sizes[2]


class Pion(torch.optim.Optimizer):
    """Updates weight matrices by orthogonal factors, W <- R W P: their singular values stay.

    R = E(lr α A_out) and P = E(lr α A_in) for skew generators that descend; see PionConfig and
    arXiv 2605.12492. Weight decay would change the spectrum and does not exist here.

    Args:
        params: 2-D parameters, or groups of them; as for any torch optimizer, also
            ``model.named_parameters()``. Give embeddings, output layers, norms and biases to AdamW.
        lr: η, per group; schedulers set ``group["lr"]``.
        config: the options that all groups share.
        views: how a parameter is seen as matrices; one that has none is one whole matrix.
        names: of parameters, for messages; ``named_parameters()`` brings its own.
        shards: parameters that are a rank's shard of a weight; the same ones, in the same order, on
            every rank of their groups.

    Raises:
        ValueError: a parameter is not 2-D or not real floating point, a view does not fit it, or
            lr is negative.

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
        shards: Mapping[Tensor, Shard] | None = None,
    ) -> None:
        """See the class."""
        self._names = dict(names or {})
        self._shards = dict(shards or {})
        self.config = config if config is not None else PionConfig()
        self._views = dict(views or {})
        self._slots: dict[Tensor, _Slot] = {}
        self._guard = Guard()
        self._constructed = False
        super().__init__(params, {"lr": lr})
        self._constructed = True
        self.settle()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, checked as a whole before anything changes; see torch's."""
        group = dict(param_group)
        params = group["params"]
        group["params"] = params = [params] if isinstance(params, Tensor) else list(params)
        named = [p if isinstance(p, tuple) else (None, p) for p in params]
        place = f"of group {len(self.param_groups)}"
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

    def _slot(self, p: Any, name: str) -> _Slot:
        if not isinstance(p, Tensor):
            raise TypeError(f"{name}: a parameter must be a tensor, not {type(p).__name__}")
        view = self._views.get(p)
        if p.dim() != 2 or p.numel() == 0:
            raise ValueError(
                f"{name} has shape {tuple(p.shape)}: Pion rotates 2-D weights only; give this "
                "parameter to torch.optim.AdamW"
            )
        if p.dtype not in _FLOATS:
            raise ValueError(f"{name} is {p.dtype}: Pion takes {', '.join(map(str, _FLOATS))}")
        if view is not None and (view.rows, view.cols) != tuple(p.shape):
            raise ValueError(f"{name} has shape {tuple(p.shape)}, its view is of {view}")
        return _Slot(name, view if view is not None else whole(*p.shape), self._shards.get(p))

    def settle(self) -> None:
        """Deal cut matrices to owners and make the state of what this rank computes.

        Done at construction, and to be done again by a wrapper that has taken parameters out of the
        groups: their state is freed.

        Raises:
            RuntimeError: matrices that are cut would be dealt anew after the first step.
        """
        params = [p for group in self.param_groups for p in group["params"]]
        self._slots = {p: self._slots[p] for p in params}
        for p in set(self.state) - set(params):
            del self.state[p]
        for group, cut in self._cut().items():
            costs = []
            for p, part in cut:
                batch, m, n = self._slots[p].sizes(part)
                costs.append(batch * cost.step_flop(m, n, self.config))
            for (p, part), owner in zip(cut, deal(costs, group.size()), strict=True):
                if self._slots[p].owners.setdefault(part, owner) != owner:
                    if any(g["step"] for g in self.param_groups):
                        raise RuntimeError("add sharded parameters before the first step")
                    self._slots[p].owners[part] = owner
        for p, slot in self._slots.items():
            shapes = self._shapes(slot)
            kept = {key: value for key, value in self.state[p].items() if key in shapes}
            self.state[p] = {
                key: kept[key]
                if key in kept
                else torch.zeros(shape, dtype=compute_dtype(p), device=p.device)
                for key, shape in shapes.items()
            }

    def _cut(self) -> dict[Any, list[tuple[Tensor, str]]]:
        """Parameter and part of all that is cut, in order, by the group that shares it."""
        found: dict[Any, list[tuple[Tensor, str]]] = {}
        for p, slot in self._slots.items():
            if slot.shard is not None:
                for part in slot.shard.dims:
                    found.setdefault(slot.shard.group, []).append((p, part))
        return found

    def _computes(self, slot: _Slot, part: str) -> bool:
        """Whether this rank computes a part's matrices, and so holds their state."""
        if slot.shard is None or part not in slot.shard.dims or self.config.tp_mode != "owner":
            return True
        return slot.owners[part] == slot.shard.rank

    def _shapes(self, slot: _Slot) -> dict[str, tuple[int, int, int]]:
        """Shape of every moment of a parameter that this rank holds, by state key."""
        return {
            state.key(moment, part): shape
            for part in slot.view.shapes
            if self._computes(slot, part)
            for moment, shape in state.shapes(*slot.sizes(part), self.config).items()
        }

    def replace_parameter(self, old: Tensor, new: Tensor) -> None:
        """Step ``new`` in place of ``old``: for wrappers that put a float32 master in a group.

        Args:
            old: a parameter of this optimizer.
            new: of the same shape; already in the group, or put there by the caller.

        Raises:
            ValueError: the shapes differ.
        """
        if old.shape != new.shape:
            raise ValueError(f"a master of shape {tuple(new.shape)} for one of {tuple(old.shape)}")
        self._slots[new] = self._slots.pop(old)
        if old in self.state:
            self.state[new] = self.state.pop(old)

    def matrices(self) -> Iterator[tuple[str, Tensor]]:
        """Every matrix that Pion rotates, with a name: weight, part and place in its batch."""
        for group in self.param_groups:
            for p in group["params"]:
                slot = self._slots[p]
                for part, batch in slot.view.split(p.detach()).items():
                    for index, matrix in enumerate(batch):
                        yield f"{slot.name}:{part}[{index}]", matrix

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

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
        self._guard.look()
        due: list[tuple[dict[str, Any], Tensor]] = []
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise ValueError(f"{self._slots[p].name} has a sparse gradient")
                due.append((group, p))
        ok = None
        if due:
            names = [self._slots[p].name for _, p in due]
            ok = self._guard.check(names, [p.grad for _, p in due if p.grad is not None])
            ok = exchange.agree(ok, list(self._cut()))
        for group in self.param_groups:
            group["step"] += 1
        for group, p in due:
            assert ok is not None
            self._step_local(p, group, ok)
        if due:
            assert ok is not None
            self._step_cut({p: group for group, p in due}, ok)
        return loss

    def _step_local(self, p: Tensor, group: dict[str, Any], ok: Tensor) -> None:
        """Step the parts of a parameter that this rank has whole."""
        assert p.grad is not None
        slot, dtype = self._slots[p], compute_dtype(p)
        cut = slot.shard.dims if slot.shard is not None else {}
        weights = slot.view.split(p.to(dtype))
        grads = slot.view.split(p.grad.to(dtype))
        for part in slot.view.shapes:
            if part not in cut:
                self._update(p, part, weights[part], grads[part], group, ok)
        slot.view.merge({part: w for part, w in weights.items() if part not in cut}, p)

    def _step_cut(self, groups: Mapping[Tensor, dict[str, Any]], ok: Tensor) -> None:
        """Step the parts whose matrices several ranks share."""
        for process_group, cut in self._cut().items():
            if missing := [self._slots[p].name for p, _ in cut if p not in groups]:
                raise RuntimeError(f"{missing[0]} is sharded and has no gradient on this rank")
            shapes = [self._slots[p].view.shapes[part] for p, part in cut]
            pieces = [
                Piece(shape, self._slots[p].shard.dims[part], self._slots[p].owners[part])  # type: ignore[union-attr]
                for (p, part), shape in zip(cut, shapes, strict=True)
            ]

            def prepare(i: int, cut: Any = cut) -> tuple[Tensor, Tensor]:
                p, part = cut[i]
                view, dtype = self._slots[p].view, compute_dtype(p)
                return view.split(p.to(dtype))[part], view.split(p.grad.to(dtype))[part]

            def compute(i: int, weight: Tensor, grad: Tensor, cut: Any = cut) -> None:
                p, part = cut[i]
                self._update(p, part, weight, grad, groups[p], ok)

            def finalize(i: int, weight: Tensor, cut: Any = cut) -> None:
                p, part = cut[i]
                self._slots[p].view.merge({part: weight}, p)

            exchange.run(
                pieces, prepare, compute, finalize, mode=self.config.tp_mode, group=process_group
            )

    def _update(
        self, p: Tensor, part: str, w: Tensor, g: Tensor, group: dict[str, Any], ok: Tensor
    ) -> None:
        """Step whole matrices [B, m, n] of a parameter's part (modified in place)."""
        batch, m, n = w.shape
        moments = {
            moment: self.state[p][state.key(moment, part)]
            for moment in state.shapes(batch, m, n, self.config)
        }
        stride = _batch_size(m, n, p)
        for first in range(0, batch, stride):
            some = slice(first, first + stride)
            update(
                w[some],
                g[some],
                {name: moment[some] for name, moment in moments.items()},
                config=self.config,
                lr=group["lr"],
                active=cost.order(m, n, self.config.active_sides(group["step"])),
                forms=cost.forms(m, n, self.config),
                ok=ok.to(p.device, non_blocking=True),
            )

    def records(self) -> Iterator[tuple[Tensor, str, Tensor, Record]]:
        """Parameter, state key, moment and its place among all ranks', for checkpoints."""
        for p, slot in self._slots.items():
            for key, moment in self.state[p].items():
                part, shard = key.partition(".")[2], slot.shard
                record = Record()
                if shard is not None and part in shard.dealt:
                    record = Record(index=shard.rank, count=shard.ranks)
                elif shard is not None and self.config.tp_mode == "duplicated":
                    record = Record(replica=shard.rank)
                yield p, key, moment, record

    def state_dict(self) -> dict[str, Any]:
        """As torch's; also waits for the device and reports steps that were not taken."""
        self._guard.report()
        return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned; refused as a whole, naming what does not fit.

        Raises:
            ValueError: the state is of other options, parameters or shapes.
        """
        self._refuse_other_state(state_dict)
        super().load_state_dict(state_dict)
        # torch casts state to its parameter's dtype; moments are kept in the compute dtype.
        saved = state_dict["state"]
        for group, old in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for p, index in zip(group["params"], old["params"], strict=True):
                for key, value in self.state[p].items():
                    if value.dtype != compute_dtype(p):
                        self.state[p][key] = saved[index][key].to(
                            device=p.device, dtype=compute_dtype(p), copy=True
                        )

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
                for key, shape in self._shapes(slot).items():
                    if key not in found or tuple(found[key].shape) != shape:
                        has = tuple(found[key].shape) if key in found else "nothing"
                        raise ValueError(f"{slot.name}: {key} must be {shape}, the state has {has}")


def _batch_size(m: int, n: int, p: Tensor) -> int:
    """How many matrices a batch has."""
    if p.device.type != "cpu":
        return p.numel()
    return max(1, CPU_BATCH_BYTES // (compute_dtype(p).itemsize * (m * m + n * n + 4 * m * n)))
