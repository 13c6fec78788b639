"""Pion's moments: which there are, their names and their shapes.

A moment belongs to a part's matrices, not to the rank or the weight: ``m_in.<part>`` [B, n, n] and
``m_out.<part>`` [B, m, m] for Lie momentum, with the sign of descent; ``m.<part>`` [B, m, n] for
averages of the gradient; ``v`` likewise, where the direction is adaptive.
"""

from __future__ import annotations

from typing import Any

from .config import PionConfig


def shapes(batch: int, m: int, n: int, config: PionConfig) -> dict[str, tuple[int, int, int]]:
    """Shape of every moment of a batch of matrices [B, m, n], by name."""
    moments = ("m", "v") if config.direction == "adaptive" else ("m",)
    if config.momentum != "lie":
        return {moment: (batch, m, n) for moment in moments}
    sizes = {"in": n, "out": m}
    return {
        f"{moment}_{side}": (batch, sizes[side], sizes[side])
        for moment in moments
        for side in config.sides
    }


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
    }
