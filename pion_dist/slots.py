"""What the optimizer knows of a weight: how it is seen, and what of it this rank stores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .checkpoint import Record
from .config import Axis, PionConfig
from .dtensor import division, is_dtensor, local
from .exchange import ProcessGroup
from .matrices import MatrixView, as_rows, shape_of_rows, stacked, whole
from .matrix_plan import MatrixPlan
from .state import Moment, divided_axis, unfit
from .storage import compute_dtype

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Storage:
    """What this rank stores of a weight that data-parallel ranks divide, or of a DTensor.

    The ranks of a group are a grid: rank r stores range r // cut of the tensor-parallel shard r %
    cut, where ``cut`` is the number of shards that have a part of each matrix. A weight that is cut
    otherwise has ranges of the whole, and no shards.

    Attributes:
        data: 1-D tensor, which is stepped in the parameter's place; it may be empty. A DTensor is
            its own.
        group: the ranks that together store the weight; None where this rank has it all.
        ranges: elements [start, stop) of a shard, flat, by rank of the grid's other dimension;
            together they are all of it. Empty where there is one.
    """

    data: Tensor
    group: ProcessGroup | None
    ranges: tuple[tuple[int, int], ...] = ()


def slot_of(
    p: Any,
    name: str,
    config: PionConfig,
    *,
    view: MatrixView | None = None,
    tp: ProcessGroup | None = None,
    stored: Storage | None = None,
) -> Slot:
    """Describe a parameter, checked.

    Args:
        p: the parameter.
        name: for messages.
        config: the run's options.
        view: how it is seen as matrices; by default it is one, or one for each expert.
        tp: the ranks that have the other shards.
        stored: what this rank stores of a shard, if not all.

    Raises:
        TypeError: it is no tensor.
        ValueError: Pion does not take it, or the view does not fit it.
    """
    if not isinstance(p, Tensor):
        raise TypeError(f"{name}: a parameter must be a tensor, not {type(p).__name__}")
    if p.dim() not in (2, 3) or p.numel() == 0:
        raise ValueError(
            f"{name} has shape {tuple(p.shape)}: Pion rotates 2-D weights and fused experts "
            "[E, m, n]; give this parameter to torch.optim.AdamW"
        )
    if p.dim() == 3 and not p.is_contiguous():
        raise ValueError(
            f"{name} is 3-D and not contiguous: make it so, or give it to torch.optim.AdamW"
        )
    check_dtype(p, name)
    shape = shape_of_rows(p)
    whole_shards = stored is None or not stored.ranges
    if view is not None and whole_shards and (view.rows, view.cols) != shape:
        raise ValueError(f"{name} has shape {tuple(p.shape)}, its view is of {view}")
    view = _view_of(p) if view is None else view
    if is_dtensor(p):
        if tp is not None or stored is not None:
            raise ValueError(
                f"{name} is a DTensor, which says where it is stored: leave it out of shards and "
                "stored"
            )
        view, tp, stored = _of_dtensor(p, name, view)
    slot = Slot(name, view, tp, stored)
    for _, m, n in slot.shapes.values():
        if why := unfit(m, n, config, view.axis, slot.cut):
            raise ValueError(f"{name}: {why}")
    return slot


def _of_dtensor(
    p: Tensor, name: str, view: MatrixView
) -> tuple[MatrixView, ProcessGroup | None, Storage | None]:
    """The view of a rank's columns, the ranks that have the others, and what this one stores."""
    divided, storage = division(p, name), None
    if (tp := divided.columns) is not None:
        view = replace(view, cols=view.cols // tp.size(), axis="cols")
    if divided.ranges:
        storage = Storage(p, divided.group, divided.ranges)
    return view, tp, storage


def check_dtype(p: Tensor, name: str) -> None:
    """Refuse a parameter that is not real floating point.

    Raises:
        ValueError: names what Pion takes.
    """
    if p.dtype not in _FLOATS:
        raise ValueError(f"{name} is {p.dtype}: Pion takes {', '.join(map(str, _FLOATS))}")


def _view_of(p: Tensor) -> MatrixView:
    rows, cols = shape_of_rows(p)
    axis: Axis = "rows" if p.shape[-2] >= cols else "cols"
    if p.dim() == 3:
        return stacked(rows, cols, name="expert", count=len(p), axis=axis)
    return whole(rows, cols, axis=axis)


@dataclass(frozen=True)
class Slot:
    """A weight of the optimizer's.

    Attributes:
        name: for messages and plans.
        view: how a shard is seen as matrices.
        tp: the tensor-parallel ranks that have the other shards, or other matrices.
        storage: what of the shard this rank stores; None for all, in the parameter's shape.
    """

    name: str
    view: MatrixView
    tp: ProcessGroup | None = None
    storage: Storage | None = field(default=None, repr=False)

    @property
    def cut(self) -> int:
        """Ranks that have a shard of each matrix."""
        return self.tp.size() if self.tp is not None and self.view.axis is not None else 1

    @property
    def deal(self) -> tuple[int, int]:
        """This rank and the number of ranks, where each has matrices of its own."""
        if self.tp is None or self.view.axis is not None:
            return 0, 1
        return self.tp.rank(), self.tp.size()

    @property
    def group(self) -> ProcessGroup | None:
        """The ranks that together store each matrix; None for this one alone."""
        if self.storage is not None:
            return self.storage.group
        return self.tp if self.view.axis is not None else None

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """See ``Storage``."""
        return self.storage.ranges if self.storage is not None else ()

    @property
    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """[B, m, n] of every part's matrices, whole."""
        return self.view.whole_shapes(self.cut)

    def plan(
        self,
        part: str,
        p: Tensor,
        *,
        groups: Sequence[ProcessGroup],
        param_group: int,
        config: PionConfig,
    ) -> MatrixPlan:
        """Describe a part's matrices for the plan; its team is still to be chosen."""
        batch, m, n = self.shapes[part]
        return MatrixPlan(
            weight=self.name,
            part=part,
            batch=batch,
            m=m,
            n=n,
            axis=self.view.axis,
            group=None if self.group is None else groups.index(self.group),
            cut=self.cut,
            stored=tuple(
                (self.view.position(part, start), self.view.position(part, stop))
                for start, stop in self.ranges
            ),
            along=divided_axis(m, n, config, self.view.axis),
            first=self.deal[0] * batch,
            param_group=param_group,
            itemsize=compute_dtype(p).itemsize,
        )

    def record(self, moment: Moment, *, member: int, ranks: int) -> Record:
        """Tell where a moment of this rank's lies among all ranks'.

        Args:
            moment: its description.
            member: this rank's place in the team that computes the matrices.
            ranks: of the team.
        """
        rank, count = self.deal
        cuts = ((0, count, rank),) if count > 1 else ()
        if ranks == 1:
            return Record(cuts)
        if moment.dim is None:
            return Record(cuts, replica=member)
        return Record((*cuts, (moment.dim, ranks, member)))

    def matrices(self, x: Tensor, part: str) -> Tensor:
        """Read a part's matrices [B, m, n] from a whole shard of a weight, in its dtype."""
        return self.view.matrices(self._rows(x), part)

    def shard(self, x: Tensor, part: str) -> Tensor:
        """Read a part's matrices [B, m, n], as computed, from a whole shard."""
        return self.matrices(x, part).to(compute_dtype(x))

    def put(self, value: Tensor, x: Tensor, part: str) -> None:
        """Write a part's matrices into a whole shard. (modified in place)"""
        self.view.merge({part: value}, self._rows(x, strict=True))

    def stored(self, x: Tensor, part: str) -> Tensor:
        """Read what this rank stores of a part, flat, from a tensor like the parameter."""
        if not self.ranges:
            return self.shard(x, part).reshape(-1)
        flat = local(x).reshape(-1)
        spans = [flat[span] for span in self._spans(part)]
        return (torch.cat(spans) if spans else flat[:0]).to(compute_dtype(x))

    def write(self, value: Tensor, x: Tensor, part: str, moved: Tensor | None = None) -> None:
        """Write what this rank stores of a part, flat; the inverse of ``stored``.

        Args:
            value: the elements.
            x: a tensor like the parameter. (modified in place)
            part: of the view.
            moved: [B] by matrix, zero where nothing is to be written.
        """
        if moved is not None:
            old = self.stored(x, part)
            start, stop = self._interval(part)
            each = moved.bool().repeat_interleave(self._numel(part))[start:stop]
            value = torch.where(each, value, old)
        if not self.ranges:
            self.put(value.view(self.view.shapes[part]), x, part)
            return
        flat, done = local(x).view(-1), 0
        for span in self._spans(part):
            count = span.stop - span.start
            flat[span] = value[done : done + count]
            done += count

    def _numel(self, part: str) -> int:
        """Elements of one matrix's shard."""
        _, m, n = self.view.shapes[part]
        return m * n

    def _range(self) -> tuple[int, int]:
        assert self.storage is not None and self.storage.group is not None
        return self.ranges[self.storage.group.rank() // self.cut]

    def _interval(self, part: str) -> tuple[int, int]:
        if not self.ranges:
            batch, m, n = self.view.shapes[part]
            return 0, batch * m * n
        start, stop = self._range()
        return self.view.position(part, start), self.view.position(part, stop)

    def _spans(self, part: str) -> list[slice]:
        """Where a part's elements lie in the data."""
        start, stop = self._range()
        return [slice(a - start, b - start) for a, b in self.view.spans(part, start, stop)]

    def _rows(self, x: Tensor, *, strict: bool = False) -> Tensor:
        """[R, C] of a whole shard; with ``strict`` an error where it would be a copy."""
        x = local(x)
        if x.dim() == 1:
            return x.view(self.view.rows, self.view.cols)
        return x.view(-1, x.shape[-1]) if strict and x.dim() == 3 else as_rows(x)
