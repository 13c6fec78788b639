"""Pion's moments: which there are, their names, their shapes, and how ranks share them.

A moment belongs to a part's matrices, not to the rank or the weight: ``m_in.<part>`` [B, n, n] and
``m_out.<part>`` [B, m, m] for Lie momentum, with the sign of descent, or [B, N, d/N, d/N] on a side
of N blocks; ``m.<part>`` [B, m, n] for averages of the gradient; ``v`` likewise, where the
direction is adaptive. Polar also has the factors of W = U Σ Vᵀ, r = min(m, n): ``left.<part>``
[B, m, r], ``sigma.<part>`` [B, r] and ``right.<part>`` [B, n, r]. And where spectra are reset,
``s.<part>`` [B, k], the singular values to put back, k = min(m, n).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Any, Literal

from .config import Axis, PionConfig, Side, StateDtype

DIM: dict[Axis, int] = {"rows": 1, "cols": 2}
"""Of matrices [B, m, n]."""
START = "s"  # zeros until it is measured, at the first step
LEFT, RIGHT, SIGMA = "left", "right", "sigma"  # likewise
_NAMES = (
    *("m", "v", "m_in", "m_out", "v_in", "v_out"),
    *(START, LEFT, RIGHT, SIGMA),
)


BLOCK = 128
"""Elements that share a scale in 8 bits, see ``kernels.eight_bit``."""

_BLOCK_BYTES = BLOCK + 2  # codes, and a bf16 scale


def eight_bit_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """The shape in which matrices of ``shape`` [B, ...] are held: [B, blocks, 130]."""
    return shape[0], ceil(prod(shape[1:]) / BLOCK), _BLOCK_BYTES


def folded_shape(d: int) -> tuple[int, int, int]:
    """The shape [2, h, h] of a folded d x d matrix, see ``kernels.fold``."""
    h = (d + 1) // 2
    return 2, h, h


@dataclass(frozen=True)
class Moment:
    """A moment of a part's matrices.

    Attributes:
        shape: on all ranks together.
        dim: that the ranks which share the matrices divide; None where one rank, or each, has all.
        packed: whether it is held folded, see ``kernels.fold``; not in checkpoints.
        dtype: it is held in where it is computed in float32, ``fp32``; ``fp64`` always.
    """

    shape: tuple[int, ...]
    dim: int | None
    packed: bool = False
    dtype: StateDtype | Literal["fp64"] = "fp32"

    def local(self, ranks: int) -> tuple[int, ...]:
        """The shape on one of ``ranks`` ranks."""
        shape = list(self.shape)
        if self.dim is not None:
            shape[self.dim] //= ranks
        return tuple(shape)

    def used(self, ranks: int) -> tuple[int, ...]:
        """The shape in which one of ``ranks`` ranks computes with it: packed or not."""
        shape = self.local(ranks)
        return (*shape[:-2], *folded_shape(shape[-1])) if self.packed else shape

    def held(self, ranks: int, itemsize: int) -> tuple[int, ...]:
        """The shape in which one of ``ranks`` ranks holds it; bytes of a computed element."""
        shape = self.used(ranks)
        return eight_bit_shape(shape) if self.held_in(itemsize) == "int8" else shape

    def held_in(self, itemsize: int) -> StateDtype | Literal["fp64"]:
        """The dtype it is held in (``fp32``: as computed); bytes of a computed element."""
        return self.dtype if itemsize == 4 or self.dtype == "fp64" else "fp32"

    def nbytes(self, itemsize: int, ranks: int = 1) -> int:
        """On one of ``ranks`` ranks; bytes of a computed element."""
        each = {"fp64": 8, "fp32": itemsize, "bf16": 2, "int8": 1}[self.held_in(itemsize)]
        return prod(self.held(ranks, itemsize)) * each


def large_side(m: int, n: int, axis: Axis | None) -> Side:
    """The side of the larger dimension; of equal ones that which ``axis`` cuts, or ``out``."""
    if m == n:
        return "in" if axis == "cols" else "out"
    return "out" if m > n else "in"


def divided_axis(m: int, n: int, config: PionConfig, axis: Axis | None) -> Axis | None:
    """The axis along which a team divides matrices m x n: of blocks theirs, else the longer one.

    Args:
        m: rows.
        n: columns.
        config: the run's options.
        axis: along which tensor parallelism cuts them, if it does.
    """
    if config.blocks > 1:
        return axis
    return "rows" if large_side(m, n, axis) == "out" else "cols"


def divides(m: int, n: int, config: PionConfig, ranks: int) -> bool:
    """Whether so many ranks can compute matrices m x n together, each its equal share.

    Polar's ranks have rows of the larger dimension; those of generators rows of either. 8 bits have
    scales for parts of whole matrices.
    """
    if config.state_dtype == "int8":
        return ranks == 1
    dims = (max(m, n),) if config.direction == "polar" else (m, n)
    return all(d % ranks == 0 for d in dims)


def moments(
    batch: int, m: int, n: int, config: PionConfig, along: Axis | None, ranks: int = 1
) -> dict[str, Moment]:
    """Every moment of a batch of matrices [B, m, n], by name.

    Args:
        batch: B.
        m: rows.
        n: columns.
        config: the run's options.
        along: ``divided_axis``.
        ranks: that divide each matrix.
    """
    if config.direction == "polar":
        return _factors(batch, m, n, config, along)
    names = ("m", "v") if config.direction == "adaptive" else ("m",)
    described: dict[str, Moment] = {}
    if config.momentum != "lie":
        dim = DIM[along] if along is not None else None
        described = {name: Moment((batch, m, n), dim, dtype=config.state_dtype) for name in names}
    blocks = config.blocks_of(along)
    for side in config.sides:
        count = blocks.get(side, 1)
        d = (n if side == "in" else m) // count
        start, of_blocks = ((batch, count), 1) if side in blocks else ((batch,), None)
        if config.momentum == "lie":
            # Ranks with blocks repeat what all blocks share; others divide its rows.
            dim = of_blocks if blocks else 1
            packed = config.state_layout == "packed" and (ranks == 1 or bool(blocks))
            moment = Moment((*start, d, d), dim, packed, config.state_dtype)
            described |= {f"{name}_{side}": moment for name in names}
    if config.spectrum_reset_interval:
        described[START] = Moment((batch, min(m, n)), None, dtype="fp64")
    return described


def _factors(
    batch: int, m: int, n: int, config: PionConfig, along: Axis | None
) -> dict[str, Moment]:
    """The average and the factors of W = U Σ Vᵀ, whose rows on the larger side ranks divide."""
    large, r = large_side(m, n, along), min(m, n)
    out, of_in = (1 if large == side else None for side in ("out", "in"))
    return {
        "m": Moment((batch, m, n), out or (2 if of_in else None), dtype=config.state_dtype),
        LEFT: Moment((batch, m, r), out),
        RIGHT: Moment((batch, n, r), of_in),
        SIGMA: Moment((batch, r), None),
    }


def unfit(m: int, n: int, config: PionConfig, axis: Axis | None, ranks: int) -> str:
    """Why matrices m x n cut along ``axis`` over ``ranks`` have no blocks, or an empty string."""
    if axis is None or config.blocks == 1:
        return ""
    if config.blocks % ranks:
        return f"blocks={config.blocks} is not a multiple of the {ranks} ranks that share it"
    if (cut := m if axis == "rows" else n) % config.blocks:
        return f"its {cut} {axis} are not {config.blocks} equal blocks; change blocks"
    return ""


def key(moment: str, part: str) -> str:
    """The key of a part's moment in a weight's state."""
    return f"{moment}.{part}"


def part_of(name: str) -> str:
    """The part of a weight whose moment a state key is of."""
    return name.partition(".")[2]


def is_key(name: str) -> bool:
    """Whether a state key is of one of Pion's moments."""
    moment, dot, _ = name.partition(".")
    return bool(dot) and moment in _NAMES


def is_start(name: str) -> bool:
    """Whether a state key is of spectra at start."""
    return name.partition(".")[0] == START


def identity(config: PionConfig) -> dict[str, Any]:
    """The options that decide what the state is: a checkpoint with others is another state."""
    polar = config.direction == "polar"
    return {
        "momentum": "polar" if polar else config.momentum,
        "second_moment": config.direction == "adaptive",
        "scaling": "rms or none",  # of what had others before polar: it is refused by name
        "sides": list(config.sides) if config.momentum == "lie" and not polar else [],
        "qkv": config.qkv,
        "split_gate": config.split_gate,
        "blocks": config.blocks,
    }
