"""Pion's moments: which there are, their names and shapes, and their matrices by part.

Lie moments belong to a part's matrices and are stored as ``m_in.<part>`` [B, n, n] and so on, with
the sign of descent. Averages of the gradient have the weight's own shape [R, C] and are stored as
``m`` and ``v``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .config import PionConfig
from .matrices import MatrixView


def shapes(view: MatrixView, config: PionConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every moment of a weight, by state key; the same on every rank."""
    moments = ("m", "v") if config.direction == "adaptive" else ("m",)
    if config.momentum != "lie":
        return {moment: (view.rows, view.cols) for moment in moments}
    found: dict[str, tuple[int, ...]] = {}
    for part, (batch, m, n) in view.shapes.items():
        for moment in moments:
            for side in config.sides:
                d = n if side == "in" else m
                found[f"{moment}_{side}.{part}"] = (batch, d, d)
    return found


def create(
    view: MatrixView, config: PionConfig, *, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """All moments of a weight, zero."""
    return {
        key: torch.zeros(shape, dtype=dtype, device=device)
        for key, shape in shapes(view, config).items()
    }


def by_part(
    state: Mapping[str, Tensor], view: MatrixView, config: PionConfig
) -> dict[str, dict[str, Tensor]]:
    """The moments of each part, batched as its matrices: views of the state where strides allow."""
    if config.momentum != "lie":
        split = {moment: view.split(state[moment]) for moment in shapes(view, config)}
        return {
            part.name: {moment: matrices[part.name] for moment, matrices in split.items()}
            for part in view.parts
        }
    found: dict[str, dict[str, Tensor]] = {part.name: {} for part in view.parts}
    for key in shapes(view, config):
        moment, part_name = key.split(".")
        found[part_name][moment] = state[key]
    return found


def store(
    parts: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Tensor],
    view: MatrixView,
    config: PionConfig,
) -> None:
    """The inverse of ``by_part``: write what was a copy back into the state (modified in place)."""
    if config.momentum == "lie":
        return
    for moment in shapes(view, config):
        view.merge({name: moments[moment] for name, moments in parts.items()}, state[moment])


def identity(config: PionConfig) -> dict[str, Any]:
    """The options that decide what the state is: a checkpoint with others is another state."""
    return {
        "momentum": config.momentum,
        "second_moment": config.direction == "adaptive",
        "sides": list(config.sides) if config.momentum == "lie" else [],
        "qkv": config.qkv,
        "split_gate": config.split_gate,
    }


def is_lie_key(key: str) -> bool:
    """Whether a state key is of a Lie moment."""
    return key.split(".")[0] in ("m_in", "m_out", "v_in", "v_out")
