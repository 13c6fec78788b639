"""Megatron's Muon: whole weights dealt by its layer-wise distributed optimizer."""

from __future__ import annotations

import functools
import heapq
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from .dealing import ALIGNMENT, BUCKET_ALIGNMENT, bucket_numel, up
from .describe import Cluster
from .rates import AROUND, MASTER, Group, Stepped, streamed
from .stage import Pool, Weight

Path = Literal["buffers", "lists"]
"""Buffers of whole weights in shards, or (--no-use-layer-wise-param-layout) lists of weights."""
Mode = Literal["blockwise", "duplicated"]

FULL = 0.9  # a bucket grows until its weights are so much of what its largest would pad it to
# Bytes read and written for an element, elementwise: momentum and look-ahead 24, to bf16 6, norm
# and scaling 6, update 12.
TRAFFIC = 48
STATE = 4
STEPS = 5


def packed(
    numels: Sequence[int], ranks: int, bucket_size: int | None = None
) -> tuple[list[list[list[int]]], int]:
    """Buckets of shards of whole weights, and elements of the buffer, as Megatron 0.19 packs them.

    (LayerWiseDistributedOptimizer._compute_per_buffer_param_layout: in the order of backward,
    largest first to the emptiest shard, every shard padded to the fullest.)

    Args:
        numels: of the weights, in the model's order.
        ranks: shards of a bucket.
        bucket_size: elements; by default DDP's.

    Returns:
        For every bucket and shard, which is a rank's, the indices of its weights; and the buffer's
        elements.
    """
    if bucket_size is None:
        bucket_size = bucket_numel(ranks)
    divisor = math.lcm(ALIGNMENT, math.lcm(ranks, BUCKET_ALIGNMENT) // ranks)
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
            heapq.heappush(ends, (up(end, ALIGNMENT) + numels[j], shard))
        buckets.append(shards)
        buffer += ranks * up(max(ends)[0], divisor)
        chunk, total, largest = [], 0, 0
    return buckets, buffer


def listed(numels: Sequence[int], ranks: int) -> list[list[int]]:
    """Each rank's weights without buffers: by size, to all ranks up and down in turns."""
    owned: list[list[int]] = [[] for _ in range(ranks)]
    turns = [*range(ranks), *reversed(range(ranks))]
    for place, i in enumerate(sorted(range(len(numels)), key=numels.__getitem__)):
        owned[turns[place % len(turns)]].append(i)
    return owned


def stepped(pool: Pool, owned: Sequence[Sequence[int]], cluster: Cluster, mode: Mode) -> Stepped:
    """Step what each data-parallel rank owns.

    Args:
        pool: the weights.
        owned: indices of each data-parallel rank's.
        cluster: its rates.
        mode: Megatron's ``--muon-tp-mode``.
    """
    # Ranks whose weights have the same matrices are alike.
    alike = [replace(w, name="") for w in pool.items]
    each = [_rank(tuple(alike[i] for i in own), pool.tp, cluster, mode) for own in owned]
    ranks = [work for work in each for _ in range(pool.tp)]
    numels = [numel for _, _, numel, _ in ranks]
    gathered = max(size for *_, size in ranks)
    return Stepped(
        compute=[compute for compute, *_ in ranks],
        done=[compute + exchange for compute, exchange, *_ in ranks],
        state=[STATE * numel for numel in numels],
        masters=[MASTER * numel for numel in numels],
        moved={"tp all_gather": gathered} if gathered else {},
    )


@functools.cache
def _rank(
    items: tuple[Weight, ...], tp: int, cluster: Cluster, mode: Mode
) -> tuple[float, float, int, int]:
    """Seconds of compute and exchange, elements, and bytes that are gathered.

    Newton-Schulz of the same matrices as Pion's: of each rank's shards, or of gathered matrices.
    """
    compute, gathered = 0.0, 0
    local = sum(w.numel for w in items)
    for w in items:
        view = w.rotated.view
        shapes = view.shapes if mode == "blockwise" else view.whole_shapes(w.rotated.ranks)
        for batch, m, n in shapes.values():
            short, long = min(m, n), max(m, n)
            flop = batch * STEPS * (4.0 * short**2 * long + 2.0 * short**3)
            compute += flop / (cluster.bf16 * cluster.matmul) + STEPS * 3 * cluster.launch
        if mode == "duplicated" and w.rotated.ranks > 1:
            gathered += STATE * w.numel
    compute += streamed((TRAFFIC + AROUND) * local, cluster)
    group = Group(tp, cluster)
    exchange = group.seconds("all_gather", gathered, len(items)) if gathered else 0.0
    return compute, exchange, local, gathered
