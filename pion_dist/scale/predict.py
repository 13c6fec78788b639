"""State, communication and time of an optimizer's step on a described cluster."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from ..config import PionConfig
from ..state import divided_axis, divides
from . import muon, pion
from .dealing import buffer, planned
from .describe import Cluster, Layout, Model
from .rates import GRAD, MASTER, PARAM, Group, Stepped, streamed
from .stage import Pool, pools

Optimizer = Literal["pion", "muon", "adamw"]

# Read and written for an element. AdamW: the gradient 4, master and both moments 24, bf16 2.
ADAMW_TRAFFIC = 30
ADAMW_STATE = 8


@dataclass(frozen=True, kw_only=True)
class Method:
    """How matrices are stepped.

    Attributes:
        optimizer: of the matrices; the rest is AdamW's.
        config: Pion's options.
        path: how the layer-wise optimizer deals Muon's weights.
        muon: Megatron's ``--muon-tp-mode``.
    """

    optimizer: Optimizer = "pion"
    config: PionConfig = field(default_factory=PionConfig)
    path: muon.Path = "buffers"
    muon: muon.Mode = "duplicated"


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What an optimizer costs in an iteration.

    Attributes:
        state_max: bytes of moments on the device of the rank that has most.
        state_mean: on a rank, on average.
        host_max: bytes of offloaded moments on the rank that has most.
        held_max: bytes of float32 masters and moments on the rank that has most.
        moved: bytes that a rank hands to collectives in a step, the largest of any rank, by group
            and operation; on average over odd and even steps.
        step: seconds until the last rank has stepped, exchange included: the critical path.
        exposed: seconds of the data-parallel collectives that forward and backward do not hide.
        model: seconds of forward and backward.
        busiest: seconds of a step's kernels on the rank that has most.
        mean: on a rank, on average.
        idle: share of the ranks that compute no matrix.
        buffers: bytes of gradients and weights on every rank, padding included.
    """

    state_max: int
    state_mean: float
    host_max: int
    held_max: int
    moved: dict[str, float]
    step: float
    exposed: float
    model: float
    busiest: float
    mean: float
    idle: float
    buffers: int

    @property
    def exchange(self) -> float:
        """Seconds of the step in which the busiest rank computes nothing."""
        return self.step - self.busiest

    @property
    def memory(self) -> int:
        """Bytes that weights, gradients, masters and moments take, without activations."""
        return self.buffers + self.held_max

    @property
    def share(self) -> float:
        """Of the iteration that is the optimizer's."""
        mine = self.step + self.exposed
        return mine / (self.model + mine)

    @property
    def imbalance(self) -> float:
        """Busiest over mean: 1 where all ranks compute alike."""
        return self.busiest / self.mean


def predict(model: Model, layout: Layout, cluster: Cluster, method: Method) -> Prediction:
    """Predict a stage between the first and the last.

    Those two also have the embedding and the output layer, which AdamW steps and divides evenly:
    30 bytes of traffic an element, and left out here.

    Args:
        model: what is trained.
        layout: on which ranks.
        cluster: their rates.
        method: how matrices are stepped.

    Raises:
        ValueError: the layout does not divide; names the flag.
    """
    layout.check(model)
    _check_blocks(model, layout, method.config)
    shares = [_share(pool, cluster, method) for pool in pools(model, layout, method.config)]
    flop = model.train_flop(layout.tokens, layout.seq)
    seconds = flop / (cluster.mfu * cluster.bf16 * layout.gpus)
    micro = seconds / layout.micro_batches
    buckets = sum(x.buckets for x in shares)
    # Gradients travel in the last micro-batch's backward pass, weights in the first's forward; the
    # bucket that is filled last, or needed first, has nothing to hide behind.
    exposed = sum(
        max(travel / buckets, travel - window)
        for travel, window in (
            (sum(x.reduce for x in shares), micro * 2 / 3),
            (sum(x.gather for x in shares), micro / 3),
        )
    )
    return _combined(shares, layout, seconds, exposed)


def _check_blocks(model: Model, layout: Layout, config: PionConfig) -> None:
    if config.blocks == 1:
        return
    sizes = [model.hidden, model.heads * model.head_dim, model.groups * model.head_dim]
    sizes += [x for x in (model.ffn, model.expert_ffn, model.shared_ffn) if x]
    if config.blocks % layout.tp or any(size % config.blocks for size in sizes):
        raise ValueError(
            f"--blocks {config.blocks} must be a multiple of --tp {layout.tp} and divide "
            f"{', '.join(map(str, sorted(set(sizes))))}; change --blocks"
        )


@dataclass(frozen=True)
class _Share:
    """A pool's part of an iteration.

    Attributes:
        pool: the weights.
        stepped: by rank.
        buffer: elements of the buffer that holds the weights.
        buckets: of the buffer.
        reduce: seconds of gradients' collectives.
        gather: seconds of parameters' collectives.
        moved: bytes that a rank hands to both.
    """

    pool: Pool
    stepped: Stepped
    buffer: int
    buckets: int
    reduce: float
    gather: float
    moved: dict[str, float]

    def place(self, rank: int) -> int:
        """The place of a stage's rank in what is listed by rank."""
        return rank * self.pool.tp // self.pool.apart


def _share(pool: Pool, cluster: Cluster, method: Method) -> _Share:
    numels = [w.numel for w in pool.items]
    flat = buffer(numels, pool.ranks)
    size, buckets, gathered, op = flat.numel, len(flat.buckets), 0, "reduce_scatter"
    if method.optimizer == "muon":
        if method.path == "buffers":
            packed, size = muon.packed(numels, pool.ranks)
            buckets = len(packed)
            owned = [[i for bucket in packed for i in bucket[r]] for r in range(pool.ranks)]
        else:
            owned, op, size = muon.listed(numels, pool.ranks), "all_reduce", pool.numel
            gathered = max(sum(numels[i] for i in own) for own in owned)
        stepped = muon.stepped(pool, owned, cluster, method.muon)
    elif method.optimizer == "adamw":
        stepped = _adamw(pool, cluster)
    else:
        stepped = pion.stepped(pool, planned(pool, method.config, cluster.node), cluster)
    group = Group(pool.ranks, cluster, pool.apart)
    return _Share(
        pool=pool,
        stepped=stepped,
        buffer=size,
        buckets=buckets,
        reduce=group.seconds(op, GRAD * size, buckets),
        gather=group.seconds("all_gather", PARAM * size / pool.ranks, buckets),
        moved={
            f"{pool.name} {op}": GRAD * size,
            f"{pool.name} all_gather": PARAM * (gathered or size // pool.ranks),
        },
    )


def _adamw(pool: Pool, cluster: Cluster) -> Stepped:
    numel, ranks = math.ceil(pool.numel / pool.ranks), pool.ranks * pool.tp
    seconds = [streamed(ADAMW_TRAFFIC * numel, cluster)] * ranks
    return Stepped(
        compute=seconds,
        done=seconds,
        state=[ADAMW_STATE * numel] * ranks,
        masters=[MASTER * numel] * ranks,
    )


def _combined(
    shares: Sequence[_Share], layout: Layout, seconds: float, exposed: float
) -> Prediction:
    """Every rank of a stage has a place in each pool."""
    ranks = range(layout.gpus // layout.pp)

    def total(name: str) -> list[float]:
        values = [0.0] * len(ranks)
        for share in shares:
            if each := getattr(share.stepped, name):
                values = [
                    x + each[share.place(rank)] for rank, x in zip(ranks, values, strict=True)
                ]
        return values

    compute, states, masters = total("compute"), total("state"), total("masters")
    moved: dict[str, float] = {}
    for share in shares:
        for op, size in (share.stepped.moved | share.moved).items():
            moved[op] = moved.get(op, 0.0) + size
    return Prediction(
        state_max=int(max(states)),
        state_mean=sum(states) / len(states),
        host_max=int(max(total("on_host"))),
        held_max=int(max(map(sum, zip(states, masters, strict=True)))),
        moved=moved,
        step=max(total("done")),
        exposed=exposed,
        model=seconds,
        busiest=max(compute),
        mean=sum(compute) / len(compute),
        idle=states.count(0.0) / len(states),
        buffers=(GRAD + PARAM) * sum(share.buffer for share in shares),
    )


def largest_matrix(
    model: Model, layout: Layout, cluster: Cluster, config: PionConfig, *, ranks: int
) -> float:
    """Seconds of the costliest matrix: no dealing of matrices to such teams is below it.

    Args:
        model: what is trained.
        layout: on which ranks.
        cluster: their rates.
        config: Pion's options.
        ranks: of its team.
    """
    here = replace(config, blocks=1)
    shapes = {
        (m, n, divided_axis(m, n, here, view.axis))
        for pool in pools(model, layout, here)
        for w in pool.items
        for view in (w.rotated.view,)
        for _, m, n in view.whole_shapes(w.rotated.ranks).values()
        if divides(m, n, here, ranks)
    }
    return max(
        sum(pion.matrices_work(1, m, n, here, along, ranks, s, cluster).total for s in (1, 2)) / 2
        for m, n, along in shapes
    )
