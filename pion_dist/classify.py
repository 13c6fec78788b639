"""The one rule that says what each parameter is: Pion's matrices, or another optimizer's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .config import Axis, PionConfig
from .matrices import MatrixView, interleaved, stacked, whole


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
        tp_axis: what tensor parallelism cuts, also where it has one rank; None where each rank has
            the whole weight.
        tp_size: ranks that it is cut to; ``shape`` is one's.
        initialized: it has initial values; else zeros in its memory mean nothing.
        unsupported: why Pion cannot rotate it and what to do; empty where it can.
    """

    name: str
    shape: tuple[int, ...]
    embedding_or_output: bool = False
    qkv: tuple[tuple[str, int], ...] = ()
    head_dim: int = 0
    gated: bool = False
    gate_interleave: int = 0
    tp_axis: Axis | None = None
    tp_size: int = 1
    initialized: bool = True
    unsupported: str = ""


def query_group(head_dim: int, *, heads: int, gated: bool) -> tuple[tuple[str, int], ...]:
    """What a query group of Megatron's fused QKV weight stores, as ``ParamInfo.qkv`` has it.

    Args:
        head_dim: rows of a head.
        heads: query heads of a group.
        gated: it has the attention output's gate too.
    """
    gate = (("gate", heads * head_dim),) if gated else ()
    return (("q", heads * head_dim), *gate, ("k", head_dim), ("v", head_dim))


@dataclass(frozen=True)
class Rotated:
    """Pion's: the weight is updated as the matrices of its view.

    Attributes:
        view: of this rank's shard.
        ranks: that share the weight.
    """

    view: MatrixView
    ranks: int = 1


@dataclass(frozen=True)
class Scalar:
    """Not Pion's: left to an elementwise optimizer, for a reason that a plan can print."""

    reason: str


# Rotations of zeros are zeros: Pion would never train such a weight. ``classify`` sees no values.
ZEROS = Scalar("starts with a matrix of zeros, which rotations keep")
# The word in a parameter's own name: bias, down_proj_bias, bias0, pos_bias_u.
_BIAS = re.compile(r"(?<![a-z])bias(?![a-z])[^.]*$")


def classify(
    info: ParamInfo, config: PionConfig, *, exclude: Sequence[str] = ()
) -> Rotated | Scalar:
    """What a parameter is to Pion.

    2-D weights are Pion's, but for embeddings, the output layer, biases (which fused experts have
    as a row each) and what ``exclude`` names. Weights that start with a matrix of zeros are to be
    found by the caller: see ``ZEROS``.

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
    if _BIAS.search(info.name):
        return Scalar("bias")
    if info.unsupported:
        raise ValueError(f"{info.name}: {info.unsupported}")
    return Rotated(_view(info, config), info.tp_size)


def table(
    decisions: Sequence[tuple[str, tuple[int, ...], Rotated | Scalar]],
) -> list[str]:
    """A line for every parameter, given its name, its shape and what it is."""
    width = max((len(name) for name, _, _ in decisions), default=0)
    lines = []
    for name, shape, decision in decisions:
        what = f"Adam: {decision.reason}" if isinstance(decision, Scalar) else _matrices(decision)
        lines.append(f"{name:<{width}}  {'x'.join(map(str, shape)):>12}  {what}")
    return lines


def _matrices(decision: Rotated) -> str:
    shapes = decision.view.joined(decision.ranks).items()
    return "Pion: " + ", ".join(f"{part} {b} of {m}x{n}" for part, (b, m, n) in shapes)


def _view(info: ParamInfo, config: PionConfig) -> MatrixView:
    rows, cols = info.shape
    if info.qkv:
        return _qkv_view(info, config)
    if not info.gated:
        return whole(rows, cols, axis=info.tp_axis)
    if not config.split_gate:
        if info.tp_axis == "rows" and info.tp_size > 1:
            raise ValueError(
                f"{info.name}: split_gate=False (--pion-no-split-gate) needs "
                "--tensor-model-parallel-size 1, since each rank stores rows of gate and of up"
            )
        return whole(rows, cols, axis=info.tp_axis)
    block = info.gate_interleave or rows // 2
    return interleaved(
        rows,
        cols,
        repeated=[("gate", block), ("up", block)],
        per_repetition=False,
        axis=info.tp_axis,
    )


def _qkv_view(info: ParamInfo, config: PionConfig) -> MatrixView:
    rows, cols = info.shape
    # A rank has whole query groups, so matrices that are heads or a group's projections are whole:
    # where the rows are cut, those are dealt.
    dealt = None if info.tp_axis == "rows" else info.tp_axis
    match config.qkv:
        case "qkv":
            return interleaved(
                rows, cols, repeated=info.qkv, per_repetition=False, axis=info.tp_axis
            )
        case "group":
            return interleaved(rows, cols, repeated=info.qkv, per_repetition=True, axis=dealt)
        case "head":
            return stacked(rows, cols, name="head", count=rows // info.head_dim, axis=dealt)
        case "whole":
            return whole(rows, cols, axis=info.tp_axis)
        case _:
            raise ValueError(f"qkv={config.qkv!r}")
