"""Which weights of a pipeline stage each rank has, as the layer-wise optimizer deals them."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from .. import cost
from ..classify import ParamInfo, Rotated, classify
from ..config import PionConfig
from ..plan import MatrixPlan, StepPlan, build_plan, deal, deal_shards
from .describe import Layout, Model

Dealing = Literal["layout", "whole"]
"""Megatron's buffers of whole weights in shards, or (--no-use-layer-wise-param-layout) lists."""

ALIGNMENT = 64  # elements, of a weight's start in its shard
FULL = 0.9  # a bucket grows until its weights are so much of what its largest would pad it to


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

    def flop(self, config: PionConfig) -> float:
        """What it is dealt by: see ``cost.weight_flop``."""
        view, ranks = self.rotated.view, self.rotated.ranks
        return cost.weight_flop(view.whole_shapes(ranks).values(), config, view.axis, ranks=ranks)


@dataclass(frozen=True)
class Dealt:
    """A stage's weights, dealt.

    Attributes:
        owned: of each rank, indices of weights.
        numel: elements of the weights.
        buffer: elements of the buffer that holds them, padded.
        buckets: of the buffer.
    """

    owned: tuple[tuple[int, ...], ...]
    numel: int
    buffer: int
    buckets: int


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
    found = []
    for info in infos:
        decision = classify(info, config)
        assert isinstance(decision, Rotated), "norms, embedding and output layer are not listed"
        found.append(Weight(info.name, info.shape[0] * info.shape[1], decision))
    return found


def dealt(items: Sequence[Weight], ranks: int, costs: Sequence[float], dealing: Dealing) -> Dealt:
    """Deal weights to ranks.

    Args:
        items: in the model's order.
        ranks: that share them out.
        costs: of the weights.
        dealing: ``layout`` pads, ``whole`` does not.
    """
    numel = sum(w.numel for w in items)
    owned: list[list[int]] = [[] for _ in range(ranks)]
    if dealing == "whole":
        for item, rank in enumerate(deal(costs, ranks)):
            owned[rank].append(item)
        return Dealt(tuple(map(tuple, owned)), numel, numel, min(1, len(items)))
    buckets, buffer = packed([w.numel for w in items], ranks)
    each = [[sum(costs[i] for i in shard) for shard in bucket] for bucket in buckets]
    for bucket, to in zip(buckets, deal_shards(each), strict=True):
        for shard, rank in zip(bucket, to, strict=True):
            owned[rank] += shard
    return Dealt(tuple(map(tuple, owned)), numel, buffer, len(buckets))


def packed(
    numels: Sequence[int], ranks: int, bucket_size: int | None = None
) -> tuple[list[list[list[int]]], int]:
    """Buckets of shards of whole weights, and elements of the buffer, as Megatron 0.19 packs them.

    (LayerWiseDistributedOptimizer._compute_per_buffer_param_layout: in the order of backward,
    largest first to the emptiest shard, every shard padded to the fullest.)

    Args:
        numels: of the weights, in the model's order.
        ranks: shards of a bucket.
        bucket_size: elements; by default DDP's, max(40M, 1M x ranks).

    Returns:
        For every bucket and shard the indices of its weights; and the buffer's elements.
    """
    if bucket_size is None:
        bucket_size = max(40_000_000, 1_000_000 * ranks)
    divisor = math.lcm(ALIGNMENT, math.lcm(ranks, 128) // ranks)
    buckets: list[list[list[int]]] = []
    buffer = 0
    chunk: list[int] = []
    total = largest = 0
    for i in reversed(range(len(numels))):
        chunk.append(i)
        total, largest = total + numels[i], max(largest, numels[i])
        if i and total < max(bucket_size, int(ranks * largest * FULL)):
            continue
        shards: list[list[int]] = [[] for _ in range(ranks)]
        ends = [(0, shard) for shard in range(ranks)]
        for j in sorted(chunk, key=lambda j: -numels[j]):
            end, shard = heapq.heappop(ends)
            shards[shard].append(j)
            heapq.heappush(ends, (_up(end, ALIGNMENT) + numels[j], shard))
        buckets.append(shards)
        buffer += ranks * _up(max(ends)[0], divisor)
        chunk, total, largest = [], 0, 0
    return buckets, buffer


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def plan_of(items: Sequence[Weight], config: PionConfig, tp: int) -> StepPlan:
    """What ``Pion`` plans for weights that a tensor-parallel group has shards of.

    Args:
        items: of one data-parallel rank.
        config: the run's options.
        tp: ranks of the group.
    """
    matrices = []
    for w in items:
        axis, ranks = w.rotated.view.axis, w.rotated.ranks
        cut = ranks > 1 and axis is not None  # others are a rank's own: whole, or dealt
        matrices += [
            MatrixPlan(
                weight=w.name,
                part=part,
                batch=batch,
                m=m,
                n=n,
                axis=axis,
                group=0 if cut else None,
                cut=tp if cut else 1,
            )
            for part, (batch, m, n) in w.rotated.view.whole_shapes(ranks).items()
        ]
    return build_plan(matrices, [tp] if tp > 1 else [], config)
