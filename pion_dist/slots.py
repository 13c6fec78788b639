"""What the optimizer knows of a weight: how it is seen, and what of it this rank stores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .checkpoint import Record
from .exchange import ProcessGroup
from .matrices import MatrixView, as_rows
from .plan import MatrixPlan
from .state import Moment
from .storage import compute_dtype


@dataclass(frozen=True)
class Storage:
    """What this rank stores of a weight that data-parallel ranks divide.

    The ranks of a group are a grid: rank r stores a range of the tensor-parallel shard r % cut,
    where ``cut`` is the number of these shards.

    Attributes:
        data: 1-D tensor, which is stepped in the parameter's place; it may be empty.
        group: the ranks that together store the weight; None where this rank has it all.
        ranges: elements [start, stop) of a shard, flat, that each data-parallel rank stores, in
            order; empty where there is one.
    """

    data: Tensor
    group: ProcessGroup | None
    ranges: tuple[tuple[int, int], ...] = ()


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
        self, part: str, p: Tensor, *, groups: Sequence[ProcessGroup], param_group: int
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
            first=self.deal[0] * batch,
            param_group=param_group,
            itemsize=compute_dtype(p).itemsize,
        )

    def record(self, moment: Moment, *, divided: bool) -> Record:
        """Tell where a moment of this rank's lies among all ranks'.

        Args:
            moment: its description.
            divided: whether ranks of a team divide the matrices.
        """
        rank, count = self.deal
        if count > 1:
            return Record(dim=0, index=rank, count=count)
        if self.tp is None or not divided:
            return Record()
        if moment.dim is not None:
            return Record(dim=moment.dim, index=self.tp.rank(), count=self.cut)
        return Record(replica=self.tp.rank())

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
        spans = [x[span] for span in self._spans(part)]
        return (torch.cat(spans) if spans else x[:0]).to(compute_dtype(x))

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
        done = 0
        for span in self._spans(part):
            count = span.stop - span.start
            x[span] = value[done : done + count]
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
        if x.dim() == 1:
            return x.view(self.view.rows, self.view.cols)
        return x.view(-1, x.shape[-1]) if strict and x.dim() == 3 else as_rows(x)
