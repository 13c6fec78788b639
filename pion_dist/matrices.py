"""Views of a stored weight as the matrices Pion rotates; ``split`` and ``merge`` are inverses.

Shape suffixes: R, C are rows and columns of the stored weight; B is the number of m x n matrices of
a part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from .config import Axis

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Part:
    """Matrices of one shape that lie in a regular pattern of a weight's rows.

    The part takes ``length`` rows, from ``offset`` on, of every ``period`` rows. These rows, in
    order, are cut into ``batch`` matrices of equal height.

    Attributes:
        name: identifies the part within a view and in the state's keys.
        period: rows of one repetition; divides R.
        offset: first row of the part within a repetition.
        length: rows of the part within a repetition.
        batch: number of matrices, B.
    """

    name: str
    period: int
    offset: int
    length: int
    batch: int


@dataclass(frozen=True)
class MatrixView:
    """A view of a stored weight [R, C] as batches of matrices [B, m, n] with n = C.

    Attributes:
        rows: the weight's rows, R.
        cols: the weight's columns, C.
        parts: the parts, which cover every row exactly once.
        axis: the axis of the matrices along which tensor parallelism would cut each. None where it
            cuts none: it deals out their batch, or repeats the weight.

    Raises:
        ValueError: the parts do not tile the rows, or a part's rows do not divide into its batch.
    """

    rows: int
    cols: int
    parts: tuple[Part, ...]
    axis: Axis | None = None

    def __post_init__(self) -> None:
        covered: list[int] = []
        for part in self.parts:
            if part.period < 1 or self.rows % part.period or part.batch < 1:
                raise ValueError(f"{part} does not divide the {self.rows} rows of {self}")
            if self._rows_of(part) % part.batch:
                raise ValueError(
                    f"{part}: {self._rows_of(part)} rows are not {part.batch} matrices"
                )
            covered += [
                start + row
                for start in range(0, self.rows, part.period)
                for row in range(part.offset, part.offset + part.length)
            ]
        if sorted(covered) != list(range(self.rows)):
            raise ValueError(f"the parts of {self} do not cover each of its rows once")
        if len({part.name for part in self.parts}) != len(self.parts):
            raise ValueError(f"two parts of {self} have the same name")

    def _rows_of(self, part: Part) -> int:
        return self.rows // part.period * part.length

    def shape_of(self, part: Part) -> tuple[int, int, int]:
        """Return the part's batch shape (B, m, n)."""
        return part.batch, self._rows_of(part) // part.batch, self.cols

    @property
    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """Batch shape (B, m, n) of every part, by name."""
        return {part.name: self.shape_of(part) for part in self.parts}

    def whole_shapes(self, ranks: int) -> dict[str, tuple[int, int, int]]:
        """Return ``shapes`` of the matrices of which each of ``ranks`` ranks has such a shard."""
        rows = ranks if self.axis == "rows" else 1
        cols = ranks if self.axis == "cols" else 1
        return {part: (b, m * rows, n * cols) for part, (b, m, n) in self.shapes.items()}

    def split(self, weight_RC: Tensor) -> dict[str, Tensor]:
        """Return the weight's matrices, by part.

        Args:
            weight_RC: [R, C], any strides and dtype.

        Returns:
            A tensor [B, m, n] for each part, a view where the strides allow and else a copy.

        Raises:
            ValueError: the shape is not this view's.
        """
        return {part.name: self.matrices(weight_RC, part.name) for part in self.parts}

    def matrices(self, weight_RC: Tensor, name: str) -> Tensor:
        """Return the tensor of one part that ``split`` would return."""
        self._check(weight_RC)
        part = next(part for part in self.parts if part.name == name)
        return self._rows(weight_RC, part).reshape(self.shape_of(part))

    def position(self, name: str, element: int) -> int:
        """Count the elements of one part among the weight's first ``element``, flat.

        A part's matrices have its elements in the weight's order.
        """
        part = next(part for part in self.parts if part.name == name)
        turns, rest = divmod(element, part.period * self.cols)
        inside = min(max(rest - part.offset * self.cols, 0), part.length * self.cols)
        return turns * part.length * self.cols + inside

    def spans(self, name: str, start: int, stop: int) -> list[tuple[int, int]]:
        """Return where one part's elements lie among the weight's [start, stop), flat.

        Returns:
            Intervals [start, stop) of the weight's elements, in order.
        """
        part = next(part for part in self.parts if part.name == name)
        first, last = (row // self.cols // part.period for row in (start, max(start, stop - 1)))
        rows = (turn * part.period + part.offset for turn in range(first, last + 1))
        clipped = (
            (max(start, row * self.cols), min(stop, (row + part.length) * self.cols))
            for row in rows
        )
        return [(a, b) for a, b in clipped if a < b]

    def nonzero(self, weight_RC: Tensor, name: str) -> Tensor:
        """Tell whether each matrix of one part has an element other than zero, [B]."""
        return self.matrices(weight_RC, name).any(-1).any(-1)

    def merge(self, matrices: dict[str, Tensor], weight_RC: Tensor) -> None:
        """Write matrices into the weight: the inverse of ``split``.

        Args:
            matrices: a tensor [B, m, n] for every part to write, by name; may be views of
                ``weight_RC``. Other dtypes are rounded to the weight's.
            weight_RC: [R, C]. (modified in place)

        Raises:
            ValueError: the shape is not this view's.
        """
        self._check(weight_RC)
        for part in self.parts:
            if part.name not in matrices:
                continue
            rows = self._rows(weight_RC, part)
            if matrices[part.name].data_ptr() != rows.data_ptr():  # else it is the weight itself
                rows.copy_(matrices[part.name].reshape(rows.shape))

    def _rows(self, weight_RC: Tensor, part: Part) -> Tensor:
        repeated = weight_RC.view(self.rows // part.period, part.period, self.cols)
        return repeated[:, part.offset : part.offset + part.length]

    def _check(self, weight_RC: Tensor) -> None:
        if tuple(weight_RC.shape) != (self.rows, self.cols):
            raise ValueError(
                f"a weight of shape {tuple(weight_RC.shape)} is not [{self.rows}, {self.cols}]"
            )


def whole(rows: int, cols: int, *, axis: Axis | None = None) -> MatrixView:
    """View the weight as one matrix."""
    return MatrixView(rows, cols, (Part("whole", rows, 0, rows, 1),), axis)


def shape_of_rows(weight: Tensor) -> tuple[int, int]:
    """Return the shape of ``as_rows``."""
    return prod(weight.shape[:-1]), weight.shape[-1]


def as_rows(weight: Tensor) -> Tensor:
    """Return a weight as views see it, [R, C]: fused experts [E, m, C] lie below each other.

    It shares its memory where the weight is contiguous, and is a copy elsewhere.
    """
    return weight.reshape(-1, weight.shape[-1]) if weight.dim() == 3 else weight


def stacked(rows: int, cols: int, *, name: str, count: int, axis: Axis | None = None) -> MatrixView:
    """View the weight as ``count`` matrices of equal height, stacked (gate over up; heads)."""
    return MatrixView(rows, cols, (Part(name, rows, 0, rows, count),), axis)


def interleaved(
    rows: int,
    cols: int,
    *,
    repeated: Sequence[tuple[str, int]],
    per_repetition: bool,
    axis: Axis | None = None,
) -> MatrixView:
    """View a weight that stores projections in turns, such as QKV fused by query groups.

    Args:
        rows: R, a multiple of the rows of one repetition.
        cols: the weight's columns, C.
        repeated: name and height of each projection in a repetition, in order, such as
            ``[("q", 128), ("k", 64), ("v", 64)]``.
        per_repetition: whether to make one matrix per repetition and projection, and not one per
            projection from the rows of all repetitions.
        axis: the axis along which tensor parallelism would cut every matrix.

    Raises:
        ValueError: R is not a multiple of a repetition's rows.
    """
    period = sum(length for _, length in repeated)
    if rows % period:
        raise ValueError(f"{rows} rows are not repetitions of {period} rows {list(repeated)}")
    batch = rows // period if per_repetition else 1
    parts, offset = [], 0
    for name, length in repeated:
        parts.append(Part(name, period, offset, length, batch))
        offset += length
    return MatrixView(rows, cols, tuple(parts), axis)
