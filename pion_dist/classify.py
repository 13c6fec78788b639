"""The one rule that says what each parameter is: Pion's matrices, or another optimizer's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .config import PionConfig
from .matrices import MatrixView, interleaved, stacked, whole

Cut = Literal["batch", "rows", "cols"]


@dataclass(frozen=True, kw_only=True)
class ParamInfo:
    """What has to be known of a parameter to classify it.

    Attributes:
        name: its name in the whole model, with global layer and expert numbers.
        shape: of the parameter on this rank.
        embedding_or_output: it belongs to an embedding or the output layer.
        qkv: for a fused QKV weight, name and rows of what one query group stores, in order.
        head_dim: rows of one head of a fused QKV weight.
        gated: it is the first linear layer of a gated MLP: gate over up.
        gate_interleave: gate and up alternate in blocks of so many rows; 0 where gate is above up.
        tp_cut: ``shape`` is one rank's, of a weight whose rows or columns tensor parallelism cuts.
        tp_size: ranks that it is cut to.
        unsupported: why Pion cannot rotate it and what to do; empty where it can.
    """

    name: str
    shape: tuple[int, ...]
    embedding_or_output: bool = False
    qkv: tuple[tuple[str, int], ...] = ()
    head_dim: int = 0
    gated: bool = False
    gate_interleave: int = 0
    tp_cut: Literal["rows", "cols"] | None = None
    tp_size: int = 1
    unsupported: str = ""


@dataclass(frozen=True)
class Rotated:
    """Pion's: the weight is updated as the matrices of its view.

    Attributes:
        view: of this rank's shard.
        cuts: for each part, what tensor parallelism cuts: its ``batch`` of matrices, their ``rows``
            or their ``cols``; empty where it cuts nothing.
        ranks: that share the weight.
    """

    view: MatrixView
    cuts: tuple[tuple[str, Cut], ...] = ()
    ranks: int = 1


@dataclass(frozen=True)
class Scalar:
    """Not Pion's: left to an elementwise optimizer, for a reason that a plan can print."""

    reason: str


def classify(
    info: ParamInfo, config: PionConfig, *, exclude: Sequence[str] = ()
) -> Rotated | Scalar:
    """What a parameter is to Pion.

    2-D weights are Pion's, but for embeddings, the output layer and what ``exclude`` names: the
    rule by which Megatron routes parameters to the buffers of its layer-wise optimizer.

    Args:
        info: the parameter.
        config: decides how fused weights are cut into matrices.
        exclude: regular expressions, searched in the name.

    Raises:
        ValueError: the weight is Pion's and cannot be rotated, or its rows do not fit its geometry.
    """
    for pattern in exclude:
        if re.search(pattern, info.name):
            return Scalar(f"excluded by {pattern!r}")
    if info.embedding_or_output:
        return Scalar("embedding or output layer")
    if len(info.shape) != 2:
        return Scalar(f"{len(info.shape)}-D")
    if info.unsupported:
        raise ValueError(f"{info.name}: {info.unsupported}")
    view = _view(info, config)
    return Rotated(view, _cuts(info, view, config), info.tp_size)


def _view(info: ParamInfo, config: PionConfig) -> MatrixView:
    rows, cols = info.shape
    if info.qkv:
        return _qkv_view(info, config)
    if not info.gated:
        return whole(rows, cols)
    if not config.split_gate:
        if info.tp_cut == "rows":
            raise ValueError(
                f"{info.name}: split_gate=False (--pion-no-split-gate) needs "
                "--tensor-model-parallel-size 1, since each rank stores rows of gate and of up"
            )
        return whole(rows, cols)
    if info.gate_interleave:
        block = info.gate_interleave
        repeated = [("gate", block), ("up", block)]
        return interleaved(rows, cols, repeated=repeated, per_repetition=False)
    return stacked(rows, cols, name="gate_up", count=2)


def _cuts(info: ParamInfo, view: MatrixView, config: PionConfig) -> tuple[tuple[str, Cut], ...]:
    if info.tp_cut is None:
        return ()
    # A rank has whole query groups, so matrices that are heads or a group's projections are whole.
    dealt = info.qkv and info.tp_cut == "rows" and config.qkv in ("head", "group")
    return tuple((part.name, "batch" if dealt else info.tp_cut) for part in view.parts)


def _qkv_view(info: ParamInfo, config: PionConfig) -> MatrixView:
    rows, cols = info.shape
    match config.qkv:
        case "qkv":
            return interleaved(rows, cols, repeated=info.qkv, per_repetition=False)
        case "group":
            return interleaved(rows, cols, repeated=info.qkv, per_repetition=True)
        case "head":
            return stacked(rows, cols, name="head", count=rows // info.head_dim)
        case "whole":
            return whole(rows, cols)
        case _:
            raise ValueError(f"qkv={config.qkv!r}")
