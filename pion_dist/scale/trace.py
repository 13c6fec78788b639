"""What a Pion step executes, read from the step itself: it runs on tensors without data.

Moments and skew parts are read as torch operations (``kernels.reference``), of which Triton's
kernels need fewer passes; but polar's angles, which would be most of them, as Triton's one kernel.
What makes moments of 8 bits float32 ones, and back, is left out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from .. import cost, state
from .. import kernels as gpu
from ..config import SIDE_OF, Axis, PionConfig
from ..update import polar
from ..update.layout import Blocks, Divided
from ..update.step import step as update

Kind = Literal["float32", "tf32", "bf16", "solver", "other"]
"""Products by their precision; solvers; the rest."""


@dataclass(frozen=True)
class Kernel:
    """One operation.

    Attributes:
        kind: decides the rate.
        flop: of products and decompositions.
        read: bytes.
        written: bytes.
    """

    kind: Kind
    flop: float
    read: int
    written: int


@functools.cache
def kernels(
    batch: int,
    m: int,
    n: int,
    config: PionConfig,
    axis: Axis | None,
    *,
    ranks: int = 1,
    step: int = 1,
) -> tuple[Kernel, ...]:
    """What one rank's step of matrices [B, m, n] launches.

    Args:
        batch: B.
        m: rows of a whole matrix.
        n: columns of a whole matrix.
        config: the run's options.
        axis: along which ranks or blocks divide the matrices.
        ranks: of the team.
        step: number of the step, from 1.
    """
    shape = [batch, m, n]
    if axis is not None:
        shape[1 if axis == "rows" else 2] //= ranks
    w, g = torch.empty(shape, device="meta"), torch.empty(shape, device="meta")
    layout: Blocks | Divided | None = None
    if axis is not None and config.blocks > 1:
        peers = Peers(ranks) if ranks > 1 else None
        layout = Blocks(SIDE_OF[axis], config.blocks // ranks, peers)
    elif axis is not None and ranks > 1:
        layout = Divided(SIDE_OF[axis], Peers(ranks))
    grads_finite = torch.empty((), dtype=torch.bool, device="meta")
    held = {
        name: torch.empty(
            moment.used(ranks),
            dtype=torch.bfloat16 if moment.dtype == "bf16" else w.dtype,
            device="meta",
        )
        for name, moment in state.moments(batch, m, n, config, axis, ranks).items()
    }
    with _Recorder() as recorder, patch.object(gpu, "angles", functools.partial(_angles, recorder)):
        if config.direction == "polar":
            _polar(w, g, held, m, n, config, axis, ranks=ranks, grads_finite=grads_finite)
            return tuple(recorder.kernels)
        update(
            w,
            g,
            held,
            config=config,
            lr=0.1,
            active=cost.order(m, n, config.active_sides(step)),
            forms=cost.forms(m, n, config),
            grads_finite=grads_finite,
            layout=layout,
        )
    return tuple(recorder.kernels)


def _polar(
    w: Tensor,
    g: Tensor,
    held: Mapping[str, Tensor],
    m: int,
    n: int,
    config: PionConfig,
    axis: Axis | None,
    *,
    ranks: int,
    grads_finite: Tensor,
) -> None:
    """A polar step, as ``execute`` takes it."""
    large = state.large_side(m, n, axis)
    stepped, go, _ = polar.step(
        g,
        held,
        config=config,
        lr=0.1,
        large=large,
        rows=max(m, n),
        grads_finite=grads_finite,
        peers=Peers(ranks) if ranks > 1 else None,
    )
    torch.where(go, stepped, w, out=w)


def _angles(
    recorder: _Recorder,
    b_Bpr: Tensor,
    transposed_Bpr: Tensor | None,
    sigma_Br: Tensor,
    *,
    scale: float | Tensor,
    first: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """``kernels.angles`` as Triton has it: one kernel, which reads B and its transpose."""
    x, y = torch.empty_like(b_Bpr), torch.empty_like(b_Bpr)
    c = sigma_Br.new_empty(b_Bpr.shape[:2])
    recorder.kernels.append(Kernel("other", 0.0, 2 * _bytes([b_Bpr]), _bytes([x, y, c])))
    return x, y, c


@dataclass(frozen=True)
class Peers:
    """Stand in for ``size`` ranks, as ``update.peers.Peers``: shapes, no communication."""

    size: int
    rank: int = 0

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """Return X: no rank adds anything."""
        return x

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """Join ``size`` times X: the copy that ``exchange.GroupPeers`` makes, if it does."""
        return x.new_empty(self.size, *x.shape).movedim(0, dim).flatten(dim, dim + 1)

    def reduce_scatter(self, x: Tensor, dim: int) -> Tensor:
        """Return a share of X."""
        return torch.unflatten(x, dim, (self.size, -1)).movedim(dim, 0).contiguous()[0]

    def transposed(self, x: Tensor) -> Tensor:
        """Return X: its blocks transposed and copied twice, as they travel."""
        parts = torch.unflatten(x, -1, (self.size, -1)).permute(2, 0, 3, 1).contiguous()
        return parts.movedim(0, 2).flatten(2)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Every operation that is more than a view."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels: list[Kernel] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = _tensors([*args, *(x for key, x in (kwargs or {}).items() if key != "out")])
        outputs = _tensors(out if isinstance(out, (tuple, list)) else [out])
        name = func._schema.name
        if not outputs or func.is_view or name in _NOTHING:
            return out
        flop = 0.0
        kind: Kind = "other"
        if func._overloadpacket in flop_registry:
            formula = flop_registry[func._overloadpacket]  # knows no dtype of results
            given = [x for x in args if isinstance(x, Tensor)]
            flop = float(formula(*given, out_val=out, **(kwargs or {})))
            low = torch.backends.cuda.matmul.fp32_precision == "tf32"
            kind = "tf32" if low else "float32"
            if inputs[-1].dtype == torch.bfloat16:
                kind = "bf16"
            if (kwargs or {}).get("beta", 1.0) == 0.0:
                inputs = inputs[1:]  # what would be added is not read
        elif name in _SOLVERS:
            flop, kind = _SOLVERS[name](inputs[0].shape), "solver"
        read, written = _bytes(inputs), _bytes(outputs)
        if name.startswith("aten::new_"):
            read = 0  # reads a shape alone
        elif name == "aten::copy_":
            read = _bytes(inputs[1:])
        elif name == "aten::index":
            read = written
        elif name == "aten::index_put_":
            read = written = _bytes(_tensors(args[2:]))
        self.kernels.append(Kernel(kind, flop, read, written))
        return out


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(x.numel() * x.itemsize for x in tensors)


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    tensors: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, (tuple, list)):
            tensors += _tensors(value)
    return tensors


def _solve(shape: Sequence[int]) -> float:
    return shape[0] * (2.0 / 3.0 + 2.0) * shape[-1] ** 3


def _exp(shape: Sequence[int]) -> float:
    return 12.0 * shape[-1] ** 3 * (shape[0] - 1)  # retraction.py adds a zero matrix


# Launch nothing.
_NOTHING = ("aten::empty", "aten::empty_like", "aten::new_empty", "aten::_unsafe_view")
_SOLVERS: dict[str, Callable[[Sequence[int]], float]] = {
    "aten::_linalg_solve_ex": _solve,
    "aten::linalg_matrix_exp": _exp,
}
