"""The matrices of one part of a weight: who stores and who computes them.

The ranks of a group are a grid: rank r has the tensor-parallel shard r % cut of each matrix and, of
that shard, what the data-parallel rank r // cut stores. A team of neighbours among them computes a
matrix, each member an equal share along one axis. What a rank stores and a member computes is a
list of boxes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from . import traffic
from .config import Axis, PionConfig
from .state import DIM

Dims = tuple[int, int, int]


@dataclass(frozen=True)
class Box:
    """Elements of some matrices that a rank stores and a member of their team computes.

    They are part of a run: neighbours in the rank's storage that are a box of the matrices too.

    Attributes:
        start: of the run, among the elements that the rank stores.
        run: its shape, [b, r, c].
        dim: along which the box is cut from the run.
        first: place in the run where it starts along ``dim``.
        at: place in the member's matrices, [b, r, c], where it starts.
        shape: its own, [b, r, c].
    """

    start: int
    run: Dims
    dim: int
    first: int
    at: Dims
    shape: Dims

    @property
    def numel(self) -> int:
        """Its elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class MatrixPlan:
    """The matrices of one part of a weight.

    Attributes:
        weight: its name.
        part: of the weight's view.
        batch: number of matrices, B; this rank's where tensor parallelism deals them.
        m: rows of a whole matrix.
        n: columns of a whole matrix.
        axis: along which tensor parallelism cuts each matrix, if it does.
        group: index of the process group that stores the weight; None where this rank has it all.
        cut: ranks that have a shard of each matrix.
        stored: elements [start, stop) of a shard that rank r stores, at r // cut, counted in the
            order of the part's matrices; empty where each has all of its shard.
        along: the axis along which a team divides each matrix.
        team: ranks of the group that compute the matrices, in the order of their shares.
        first: number of the first matrix among all ranks'.
        param_group: of the optimizer.
        itemsize: bytes of an element, as computed.
    """

    weight: str
    part: str
    batch: int
    m: int
    n: int
    axis: Axis | None = None
    group: int | None = None
    cut: int = 1
    stored: tuple[tuple[int, int], ...] = ()
    along: Axis | None = None
    team: tuple[int, ...] = (0,)
    first: int = 0
    param_group: int = 0
    itemsize: int = 4

    @property
    def numel(self) -> int:
        """Elements of the whole matrices."""
        return self.batch * self.m * self.n

    @property
    def shard_numel(self) -> int:
        """Elements of a shard of the matrices."""
        return self.numel // self.cut

    @property
    def shard_shape(self) -> tuple[int, int, int]:
        """[B, m, n] of a shard of the matrices."""
        rows = self.cut if self.axis == "rows" else 1
        return self.batch, self.m // rows, self.n * rows // self.cut

    @property
    def share_dim(self) -> int:
        """Dimension of [B, m, n] along which the team's shares join."""
        return 0 if self.along is None else DIM[self.along]

    @property
    def share_shape(self) -> Dims:
        """[B, m, n] of what a member of the team computes."""
        shape = [self.batch, self.m, self.n]
        shape[self.share_dim] //= len(self.team)
        return shape[0], shape[1], shape[2]

    @property
    def in_place(self) -> bool:
        """Whether the ranks that store the matrices compute them, each its shard."""
        if self.group is None:
            return True
        return not self.stored and len(self.team) == self.cut and self.along == self.axis

    def seconds(self, config: PionConfig, near: int) -> float:
        """Seconds for which a member of the team is busy with the matrices, by ``traffic.seconds``.

        Args:
            config: the run's options.
            near: neighbours of the group that are in one node.
        """
        travels = 2 if config.direction == "polar" else 3  # G, W where it is needed, and W back
        return traffic.seconds(
            self.batch,
            self.m,
            self.n,
            config,
            self.along,
            ranks=len(self.team),
            near=near,
            travels=0 if self.in_place else travels,
        )

    def interval(self, rank: int) -> tuple[int, int]:
        """Elements [start, stop) of its shard that a rank of the group stores."""
        return self.stored[rank // self.cut] if self.stored else (0, self.shard_numel)

    def boxes(self, rank: int, member: int) -> list[Box]:
        """What a rank of the group stores and a member of the team computes, in storage's order.

        Args:
            rank: of the group.
            member: its place in the team.
        """
        start, stop = self.interval(rank)
        if start == stop:
            return []
        _, rows, cols = self.shard_shape
        shift = [0, 0, 0]
        if self.axis is not None:
            shift[DIM[self.axis]] = rank % self.cut * (rows if self.axis == "rows" else cols)
        dim = self.share_dim
        share = self.share_shape[dim]
        boxes = []
        for position, origin, shape in _runs(start, stop, rows, cols):
            at = [place + by for place, by in zip(origin, shift, strict=True)]
            own = [0, share] if len(self.team) == 1 else [member * share, (member + 1) * share]
            low, high = max(at[dim], own[0]), min(at[dim] + shape[dim], own[1])
            if low < high:
                first, part = low - at[dim], list(shape)
                at[dim], part[dim] = low - own[0], high - low
                boxes.append(Box(position - start, shape, dim, first, _dims(at), _dims(part)))
        return boxes

    def flow(self, rank: int, member: int) -> int:
        """Elements of ``boxes``."""
        if len(self.team) == 1:
            start, stop = self.interval(rank)
            return stop - start
        return sum(box.numel for box in self.boxes(rank, member))

    def name(self, index: int) -> str:
        """Name of the matrix ``index`` of this rank's, the same in every layout."""
        return matrix_name(self.weight, self.part, self.first + index)

    def names(self) -> list[str]:
        """``name`` of each of this rank's matrices."""
        return [self.name(index) for index in range(self.batch)]


def _dims(values: Sequence[int]) -> Dims:
    b, r, c = values
    return b, r, c


def _runs(start: int, stop: int, rows: int, cols: int) -> Iterator[tuple[int, Dims, Dims]]:
    """Cut elements [start, stop) of matrices [B, rows, cols] into boxes, five at most.

    Yields:
        The first element of each box, and its place and shape, [b, r, c].
    """
    while start < stop:
        row, col = divmod(start, cols)
        matrix, row = divmod(row, rows)
        if row == col == 0 and stop - start >= rows * cols:
            shape = ((stop - start) // (rows * cols), rows, cols)
        elif col == 0 and stop - start >= cols:
            shape = (1, min((stop - start) // cols, rows - row), cols)
        else:
            shape = (1, 1, min(stop - start, cols - col))
        yield start, (matrix, row, col), shape
        start += math.prod(shape)


def matrix_name(weight: str, part: str, index: int) -> str:
    """What the matrix ``index`` of a part is called, in every layout."""
    return f"{weight}:{part}[{index}]"
