"""Pion's weights of a pipeline stage, in pools that a data-parallel group divides."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..classify import ParamInfo, Rotated, classify
from ..config import PionConfig
from .describe import Layout, Model


@dataclass(frozen=True)
class Weight:
    """A stored weight of Pion's.

    Attributes:
        name: in its stage.
        numel: elements on a tensor-parallel rank.
        rotated: its matrices.
    """

    name: str
    numel: int
    rotated: Rotated


@dataclass(frozen=True)
class Pool:
    """The weights that one data-parallel group divides: a stage's dense ones, or its experts.

    Attributes:
        name: of the data-parallel group.
        items: the weights of a rank, in the model's order.
        ranks: data-parallel ranks.
        tp: tensor-parallel ranks.
        apart: distance of neighbours in the data-parallel group, in the order of all ranks.
    """

    name: str
    items: tuple[Weight, ...]
    ranks: int
    tp: int
    apart: int

    @property
    def numel(self) -> int:
        """Elements of the weights."""
        return sum(w.numel for w in self.items)


def pools(model: Model, layout: Layout, config: PionConfig) -> list[Pool]:
    """The pools of a stage between the first and the last."""
    dense, expert = weights(model, layout, config)
    both = [Pool("dp", tuple(dense), layout.sharing, layout.tp, layout.tp)]
    if expert:
        both.append(Pool("edp", tuple(expert), layout.expert_dp, 1, layout.ep))
    return both


def weights(model: Model, layout: Layout, config: PionConfig) -> tuple[list[Weight], list[Weight]]:
    """Pion's weights of a stage between the first and the last: dense ones, and experts' of a rank.

    In Megatron's order, for each tensor-parallel rank alike.
    """
    dense: list[ParamInfo] = []
    expert: list[ParamInfo] = []
    tp, h = layout.tp, model.hidden
    heads = model.heads // model.groups * model.head_dim
    qkv = (("q", heads), ("k", model.head_dim), ("v", model.head_dim))
    for layer in range(layout.stage_layers(model)):
        start = f"layers.{layer}."
        rows = model.groups * (heads + 2 * model.head_dim) // tp
        dense += [
            ParamInfo(
                name=f"{start}linear_proj",
                shape=(h, model.heads * model.head_dim // tp),
                tp_axis="cols",
                tp_size=tp,
            ),
            ParamInfo(
                name=f"{start}linear_qkv",
                shape=(rows, h),
                qkv=qkv,
                head_dim=model.head_dim,
                tp_axis="rows",
                tp_size=tp,
            ),
        ]
        if model.ffn:
            dense += _mlp(start, model.ffn, h, tp)
        if model.experts:
            dense.append(ParamInfo(name=f"{start}router", shape=(model.experts, h)))
            local = range(model.experts // layout.ep)
            each = [_mlp(f"{start}experts.{i}.", model.expert_ffn, h, 1) for i in local]
            expert += [info for both in zip(*each, strict=True) for info in both]
        if model.shared_ffn:
            dense += _mlp(f"{start}shared_experts.", model.shared_ffn, h, tp)
    return _weights(dense, config), _weights(expert, config)


def _mlp(start: str, ffn: int, hidden: int, tp: int) -> list[ParamInfo]:
    return [
        ParamInfo(
            name=f"{start}linear_fc1",
            shape=(2 * ffn // tp, hidden),
            gated=True,
            tp_axis="rows",
            tp_size=tp,
        ),
        ParamInfo(name=f"{start}linear_fc2", shape=(hidden, ffn // tp), tp_axis="cols", tp_size=tp),
    ]


def _weights(infos: Iterable[ParamInfo], config: PionConfig) -> list[Weight]:
    listed = []
    for info in infos:
        decision = classify(info, config)
        assert isinstance(decision, Rotated), "norms, embedding and output layer are not listed"
        listed.append(Weight(info.name, info.shape[0] * info.shape[1], decision))
    return listed
