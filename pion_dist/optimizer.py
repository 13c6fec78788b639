"""Pion as a torch optimizer: the shell around ``pion_dist.update``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from . import cost, state
from .config import PionConfig
from .guard import Guard
from .matrices import MatrixView, compute_dtype, whole
from .update.step import step as update

# Bytes of generators and temporaries that one batch may have on the CPU: measured with
# tools/bench_batch.py, larger batches fall out of its caches. On other devices a part is one batch.
CPU_BATCH_BYTES = 8 << 20

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _Slot:
    """What the optimizer knows of a parameter."""

    name: str
    view: MatrixView


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
    ) -> None:
        """See the class."""
        self._names = dict(names or {})
        self.config = config if config is not None else PionConfig()
        self._views = dict(views or {})
        self._slots: dict[Tensor, _Slot] = {}
        self._guard = Guard()
        super().__init__(params, {"lr": lr})

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
        for p, slot in slots.items():
            self.state[p] = {
                key: torch.zeros(shape, dtype=compute_dtype(p), device=p.device)
                for key, shape in self._shapes(slot).items()
            }

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
        return _Slot(name, view if view is not None else whole(*p.shape))

    def _shapes(self, slot: _Slot) -> dict[str, tuple[int, int, int]]:
        """Shape of every moment of a parameter, by state key."""
        return {
            state.key(moment, part): shape
            for part, sizes in slot.view.shapes.items()
            for moment, shape in state.shapes(*sizes, self.config).items()
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
        for group in self.param_groups:
            group["step"] += 1
        for group, p in due:
            assert ok is not None
            self._update(p, lr=group["lr"], step=group["step"], ok=ok)
        return loss

    def _update(self, p: Tensor, *, lr: float | Tensor, step: int, ok: Tensor) -> None:
        assert p.grad is not None
        config, view, dtype = self.config, self._slots[p].view, compute_dtype(p)
        weights = view.split(p.to(dtype))
        grads = view.split(p.grad.to(dtype))
        ok = ok.to(p.device, non_blocking=True)
        for part in view.parts:
            batch, m, n = view.shape_of(part)
            moments = {
                moment: self.state[p][state.key(moment, part.name)]
                for moment in state.shapes(batch, m, n, config)
            }
            stride = _batch_size(m, n, p)
            for first in range(0, batch, stride):
                some = slice(first, first + stride)
                update(
                    weights[part.name][some],
                    grads[part.name][some],
                    {name: moment[some] for name, moment in moments.items()},
                    config=config,
                    lr=lr,
                    active=cost.order(m, n, config.active_sides(step)),
                    forms=cost.forms(m, n, config),
                    ok=ok,
                )
        view.merge(weights, p)

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
