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

from .config import SIDE_OF, Axis, PionConfig, Side, StateDtype

_DIM: dict[Axis, int] = {"rows": 1, "cols": 2}
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

    def nbytes(self, itemsize: int) -> int:
        """On all ranks together; bytes of a computed element."""
        each = {"fp64": 8, "fp32": itemsize, "bf16": 2, "int8": 1}[self.held_in(itemsize)]
        return prod(self.held(1, itemsize)) * each


def large_side(m: int, n: int, axis: Axis | None) -> Side:
    """The side of the larger dimension; of equal ones that which ``axis`` cuts, or ``out``."""
    if m == n:
        return "in" if axis == "cols" else "out"
    return "out" if m > n else "in"


def moments(batch: int, m: int, n: int, config: PionConfig, axis: Axis | None) -> dict[str, Moment]:
    """Every moment of a batch of matrices [B, m, n] cut along ``axis``, by name."""
    if config.direction == "polar":
        return _factors(batch, m, n, config, axis)
    names = ("m", "v") if config.direction == "adaptive" else ("m",)
    divided = axis is not None and config.tp_mode in ("distributed", "blockwise")
    found: dict[str, Moment] = {}
    if config.momentum != "lie":
        dim = _DIM[axis] if axis is not None and divided else None
        found = {name: Moment((batch, m, n), dim, dtype=config.state_dtype) for name in names}
    blocks = config.blocks_of(axis)
    for side in config.sides:
        count = blocks.get(side, 1)
        d = (n if side == "in" else m) // count
        start, of_blocks = ((batch, count), 1) if side in blocks else ((batch,), None)
        if config.momentum == "lie":
            # Blockwise repeats what all blocks share, distributed divides its rows.
            dim = 1 if divided and not blocks else of_blocks
            packed = config.state_layout == "packed" and (not divided or bool(blocks))
            moment = Moment((*start, d, d), dim, packed, config.state_dtype)
            found |= {f"{name}_{side}": moment for name in names}
    if config.spectrum_reset_interval:
        found[START] = Moment((batch, min(m, n)), None, dtype="fp64")
    return found


def _factors(
    batch: int, m: int, n: int, config: PionConfig, axis: Axis | None
) -> dict[str, Moment]:
    """The average and the factors of W = U Σ Vᵀ, whose rows on the larger side ranks divide."""
    large, r = large_side(m, n, axis), min(m, n)
    divided = axis is not None and config.tp_mode == "distributed"
    out, of_in = (1 if divided and large == side else None for side in ("out", "in"))
    return {
        "m": Moment((batch, m, n), out or (2 if of_in else None), dtype=config.state_dtype),
        LEFT: Moment((batch, m, r), out),
        RIGHT: Moment((batch, n, r), of_in),
        SIGMA: Moment((batch, r), None),
    }


def unfit(m: int, n: int, config: PionConfig, axis: Axis | None, ranks: int) -> str:
    """Why matrices m x n cannot be computed by ``ranks`` ranks, or an empty string."""
    if axis is None:
        return ""
    cut, other = (m, n) if axis == "rows" else (n, m)
    if config.tp_mode == "blockwise":
        if config.blocks % ranks:
            return f"blocks={config.blocks} is not a multiple of the {ranks} ranks that share it"
        if cut % config.blocks:
            return f"its {cut} {axis} are not {config.blocks} equal blocks; change blocks"
    if config.tp_mode != "distributed" or ranks == 1:
        return ""
    if config.direction == "polar":
        if max(m, n) % ranks and large_side(m, n, axis) != SIDE_OF[axis]:
            return (
                f"tp_mode='distributed' divides the {max(m, n)} rows of its {m}x{n} matrices' "
                f"larger factor to {ranks} ranks; use tp_mode='owner'"
            )
    elif other % ranks:
        return (
            f"tp_mode='distributed' divides its {m}x{n} matrices' generators, of {other} rows, to "
            f"{ranks} ranks; use tp_mode='owner'"
        )
    return ""


def key(moment: str, part: str) -> str:
    """The key of a part's moment in a weight's state."""
    return f"{moment}.{part}"


def is_key(name: str) -> bool:
    """Whether a state key is of one of Pion's moments."""
    moment, dot, _ = name.partition(".")
    return bool(dot) and moment in _NAMES


def is_start(name: str) -> bool:
    """Whether a state key is of spectra at start."""
    return name.partition(".")[0] == START


def is_measured(name: str) -> bool:
    """Whether a state key is of what the first step takes from the weights."""
    return name.partition(".")[0] in (START, LEFT)


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
