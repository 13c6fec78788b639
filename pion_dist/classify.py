"""The one rule that assigns each parameter to Pion, as matrices, or to another optimizer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .config import Axis, PionConfig
from .matrices import MatrixView, interleaved, stacked, whole


@dataclass(frozen=True, kw_only=True)
class ParamInfo:
    """The facts about a parameter that decide its class.

    Attributes:
        name: name in the whole model, with global layer and expert numbers.
        shape: shape of the parameter on this rank.
        embedding_or_output: whether it belongs to an embedding or the output layer.
        qkv: for a fused QKV weight, name and rows of each projection of a query group, in order.
        head_dim: rows of one head of a fused QKV weight.
        gated: whether it is the first linear layer of a gated MLP: gate over up.
        gate_interleave: rows of the blocks in which gate and up alternate; 0 where gate is above
            up.
        tp_axis: axis that tensor parallelism cuts, also where it has one rank; None where each
            rank has the whole weight.
        tp_size: number of ranks that share the weight; ``shape`` is that of one rank's shard.
        initialized: whether it has initial values; if not, zeros in its memory mean nothing.
        split_groups: whether tensor-parallel ranks have rows of a part of a query group.
        unsupported: why Pion cannot rotate it, and the fix; empty where it can.
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
    split_groups: bool = False
    unsupported: str = ""


def query_group(head_dim: int, *, heads: int, gated: bool) -> tuple[tuple[str, int], ...]:
    """List the projections of a query group in Megatron's fused QKV weight, for ``ParamInfo.qkv``.

    Args:
        head_dim: rows of a head.
        heads: query heads of a group.
        gated: whether the attention output's gate is stored too.
    """
    gate = (("gate", heads * head_dim),) if gated else ()
    return (("q", heads * head_dim), *gate, ("k", head_dim), ("v", head_dim))


@dataclass(frozen=True)
class Rotated:
    """The decision to let Pion update a weight, as the matrices of its view.

    Attributes:
        view: view of this rank's shard, or of the whole weight where the shards have no matrices.
        ranks: number of ranks that share the weight.
        of_whole: whether the view is of the whole weight.
    """

    view: MatrixView
    ranks: int = 1
    of_whole: bool = False


@dataclass(frozen=True)
class Scalar:
    """The decision to leave a parameter to an elementwise optimizer, with the reason to print."""

    reason: str


# Rotations keep zeros, so Pion would never train such a weight. ``classify`` sees no values.
ZEROS = Scalar("starts with a matrix of zeros, which rotations keep")
# Matches "bias" as a word in a parameter's own name: bias, down_proj_bias, bias0, pos_bias_u.
_BIAS = re.compile(r"(?<![a-z])bias(?![a-z])[^.]*$")


def classify(
    info: ParamInfo, config: PionConfig, *, exclude: Sequence[str] = ()
) -> Rotated | Scalar:
    """Assign a parameter to Pion or to an elementwise optimizer.

    2-D weights are Pion's, but for embeddings, the output layer, biases (fused experts store a row
    each) and names that ``exclude`` matches. The caller has to find weights that start with a
    matrix of zeros: see ``ZEROS``.

    Args:
        info: the parameter.
        config: the options that decide how fused weights are cut into matrices.
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
    if info.split_groups and info.tp_size > 1:
        shape = (info.shape[0] * info.tp_size, info.shape[1])
        alone = replace(info, shape=shape, tp_axis=None, tp_size=1)
        return Rotated(_view(alone, config), info.tp_size, of_whole=True)
    return Rotated(_view(info, config), info.tp_size)


def table(
    decisions: Sequence[tuple[str, tuple[int, ...], Rotated | Scalar]],
) -> list[str]:
    """Format a line for every parameter from its name, shape and decision."""
    width = max((len(name) for name, _, _ in decisions), default=0)
    lines = []
    for name, shape, decision in decisions:
        what = f"Adam: {decision.reason}" if isinstance(decision, Scalar) else _matrices(decision)
        lines.append(f"{name:<{width}}  {'x'.join(map(str, shape)):>12}  {what}")
    return lines


def _matrices(decision: Rotated) -> str:
    shapes = decision.view.whole_shapes(1 if decision.of_whole else decision.ranks).items()
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
    # A rank has whole query groups. So a cut of the rows leaves heads and a group's projections
    # whole, and the ranks divide their batch.
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
