"""Pion's moments: which there are, their names, their shapes, and how ranks share them.

A moment belongs to a part's matrices, not to the rank or the weight: ``m_in.<part>`` [B, n, n] and
``m_out.<part>`` [B, m, m] for Lie momentum, with the sign of descent, or [B, N, d/N, d/N] on a side
of N blocks; ``m.<part>`` [B, m, n] for averages of the gradient; ``v`` likewise, where the
direction is adaptive.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from .config import Axis, PionConfig

_DIM: dict[Axis, int] = {"rows": 1, "cols": 2}


@dataclass(frozen=True)
class Moment:
    """A moment of a part's matrices.

    Attributes:
        shape: on all ranks together.
        dim: that the ranks which share the matrices divide; None where one rank, or each, has all.
    """

    shape: tuple[int, ...]
    dim: int | None

    @property
    def numel(self) -> int:
        """Elements on all ranks together."""
        return prod(self.shape)

    def local(self, ranks: int) -> tuple[int, ...]:
        """The shape on one of ``ranks`` ranks."""
        shape = list(self.shape)
        if self.dim is not None:
            shape[self.dim] //= ranks
        return tuple(shape)


def moments(batch: int, m: int, n: int, config: PionConfig, axis: Axis | None) -> dict[str, Moment]:
    """Every moment of a batch of matrices [B, m, n] cut along ``axis``, by name."""
    names = ("m", "v") if config.direction == "adaptive" else ("m",)
    divided = axis is not None and config.tp_mode in ("distributed", "blockwise")
    if config.momentum != "lie":
        dim = _DIM[axis] if axis is not None and divided else None
        return {name: Moment((batch, m, n), dim) for name in names}
    found: dict[str, Moment] = {}
    blocks = config.blocks_of(axis)
    for side in config.sides:
        d = n if side == "in" else m
        if side in blocks:
            count = blocks[side]
            moment = Moment((batch, count, d // count, d // count), 1)
        else:  # blockwise repeats what all blocks share, distributed divides its rows
            moment = Moment((batch, d, d), 1 if divided and not blocks else None)
        found |= {f"{name}_{side}": moment for name in names}
    return found


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
    if config.tp_mode == "distributed" and ranks > 1 and other % ranks:
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
    return bool(dot) and moment in ("m", "v", "m_in", "m_out", "v_in", "v_out")


def identity(config: PionConfig) -> dict[str, Any]:
    """The options that decide what the state is: a checkpoint with others is another state."""
    return {
        "momentum": config.momentum,
        "second_moment": config.direction == "adaptive",
        "sides": list(config.sides) if config.momentum == "lie" else [],
        "qkv": config.qkv,
        "split_gate": config.split_gate,
        "blocks": config.blocks,
    }
