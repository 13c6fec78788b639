"""State, communication and time of an optimizer's step on a described cluster."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from ..config import PionConfig
from ..plan import StepPlan
from .dealing import Dealing, Dealt, Weight, dealt, plan_of, weights
from .describe import Cluster, Layout, Model
from .trace import Kernel, kernels

Optimizer = Literal["pion", "muon", "adamw"]
MuonMode = Literal["blockwise", "duplicated"]

# Bytes of an element, with --bf16: gradients are reduced in float32.
GRAD, PARAM, MASTER = 4, 2, 4
# Read and written for an element. AdamW: the gradient 4, master and both moments 24, bf16 2.
ADAMW_TRAFFIC = 30
ADAMW_STATE = 8
# Around Pion's and Muon's step: a look for NaN in the gradient 4, master to bf16 6.
AROUND = 10
# Muon, elementwise: momentum and look-ahead 24, to bf16 6, norm and scaling 6, update 12.
MUON_TRAFFIC = 48
MUON_STATE = 4
MUON_STEPS = 5


@dataclass(frozen=True, kw_only=True)
class Method:
    """How matrices are stepped.

    Attributes:
        optimizer: of the matrices; the rest is AdamW's.
        config: Pion's options.
        dealing: how whole weights get to data-parallel ranks (Pion, Muon).
        muon: Megatron's ``--muon-tp-mode``.
    """

    optimizer: Optimizer = "pion"
    config: PionConfig = field(default_factory=PionConfig)
    dealing: Dealing = "layout"
    muon: MuonMode = "duplicated"


@dataclass(frozen=True)
class Seconds:
    """Time of a rank's step.

    Attributes:
        compute: its kernels.
        exchange: tensor-parallel collectives that no computation hides.
    """

    compute: float
    exchange: float = 0.0

    @property
    def total(self) -> float:
        """Both."""
        return self.compute + self.exchange


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What an optimizer costs in an iteration.

    Attributes:
        state_max: bytes of moments on the rank that has most.
        state_mean: on a rank, on average.
        masters_max: bytes of float32 masters on the rank that has most.
        moved: bytes that a rank hands to collectives in a step, the largest of any rank, by group
            and operation; on average over odd and even steps.
        step: seconds of the slowest ranks' step, exchange included: the critical path.
        exchange: seconds of it that are exposed exchange, on the slowest ranks.
        exposed: seconds of the data-parallel collectives that forward and backward do not hide.
        model: seconds of forward and backward.
        mean: seconds of a step's computation on a rank, on average.
        idle: share of the ranks that have no matrix to compute.
        padding: share of the data-parallel buffers that holds nothing.
        buffers: bytes of gradients and weights on every rank, padding included.
    """

    state_max: int
    state_mean: float
    masters_max: int
    moved: dict[str, float]
    step: float
    exchange: float
    exposed: float
    model: float
    mean: float
    idle: float
    padding: float
    buffers: int

    @property
    def memory(self) -> int:
        """Bytes that weights, gradients, masters and moments take, without activations."""
        return self.buffers + self.masters_max + self.state_max

    @property
    def share(self) -> float:
        """Of the iteration that is the optimizer's."""
        mine = self.step + self.exposed
        return mine / (self.model + mine)

    @property
    def balance(self) -> float:
        """Mean over slowest: 1 where no rank waits."""
        return self.mean / self.step if self.step else 1.0


def predict(model: Model, layout: Layout, cluster: Cluster, method: Method) -> Prediction:
    """Predict a stage between the first and the last.

    Those two also have the embedding and the output layer, which AdamW steps and shares out evenly:
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
    dense, expert = weights(model, layout, method.config)
    pools = [_pool("dp", dense, layout.sharing, layout.tp, layout.tp, cluster, method)]
    if expert:
        pools.append(_pool("edp", expert, layout.expert_dp, 1, layout.ep, cluster, method))
    flop = model.train_flop(layout.tokens, layout.seq)
    seconds = flop / (cluster.mfu * cluster.bf16 * layout.gpus)
    micro = seconds / layout.micro_batches
    buckets = sum(p.buckets for p in pools)
    # Gradients travel in the last micro-batch's backward pass, weights in the first's forward; the
    # bucket that is filled last, or needed first, has nothing to hide behind.
    exposed = sum(
        max(travel / buckets, travel - window)
        for travel, window in (
            (sum(p.reduce for p in pools), micro * 2 / 3),
            (sum(p.gather for p in pools), micro / 3),
        )
    )
    return _combined(pools, layout, seconds, exposed)


def _check_blocks(model: Model, layout: Layout, config: PionConfig) -> None:
    if config.tp_mode != "blockwise":
        return
    sizes = [model.hidden, model.heads * model.head_dim, model.groups * model.head_dim]
    sizes += [x for x in (model.ffn, model.expert_ffn, model.shared_ffn) if x]
    if config.blocks % layout.tp or any(size % config.blocks for size in sizes):
        raise ValueError(
            f"--blocks {config.blocks} must be a multiple of --tp {layout.tp} and divide "
            f"{', '.join(map(str, sorted(set(sizes))))}; change --blocks"
        )


@dataclass(frozen=True)
class _Rank:
    """What a rank of a stage has of a pool of weights, by parity of the step."""

    seconds: tuple[Seconds, ...]
    state: int
    masters: int
    moved: tuple[Counter[str], ...]
    works: bool


@dataclass(frozen=True)
class _Pool:
    """Weights that one data-parallel group shares out: a stage's dense ones, or its experts."""

    ranks: tuple[tuple[_Rank, ...], ...]  # [data-parallel][tensor-parallel]
    numel: int
    buffer: int
    buckets: int
    reduce: float
    gather: float
    moved: Counter[str]


def _pool(
    name: str,
    items: Sequence[Weight],
    ranks: int,
    tp: int,
    apart: int,
    cluster: Cluster,
    method: Method,
) -> _Pool:
    """Deal weights to ``ranks`` ranks that are so far ``apart`` in the order of all."""
    numel = sum(w.numel for w in items)
    ddp_buckets = max(1, numel // max(40_000_000, 1_000_000 * ranks))
    if method.optimizer == "adamw":
        found = Dealt((), numel, numel, ddp_buckets)
        held: tuple[tuple[_Rank, ...], ...] = ((_adamw(numel, ranks, cluster),) * tp,) * ranks
        largest = math.ceil(numel / ranks)
    else:
        # Megatron deals Muon's weights by size.
        pion = method.optimizer == "pion"
        costs = [w.flop(method.config) if pion else float(w.numel) for w in items]
        found = dealt(items, ranks, costs, method.dealing)
        ranks_of = functools.cache(functools.partial(_ranks, tp=tp, cluster=cluster, method=method))
        # Ranks whose weights have the same matrices are alike.
        alike = [replace(w, name="") for w in items]
        held = tuple(ranks_of(tuple(alike[i] for i in own)) for own in found.owned)
        largest = found.buffer // ranks
        if method.dealing == "whole":
            found = replace(found, buckets=ddp_buckets)
            largest = max(sum(items[i].numel for i in own) for own in found.owned)
    scattered = method.optimizer == "adamw" or method.dealing == "layout"
    op = "reduce_scatter" if scattered else "all_reduce"
    group = _Group(ranks, cluster, within=ranks * apart <= cluster.node)
    return _Pool(
        ranks=held,
        numel=numel,
        buffer=found.buffer,
        buckets=found.buckets,
        reduce=group.seconds(op, GRAD * found.buffer, found.buckets),
        gather=group.seconds("all_gather", PARAM * found.buffer / ranks, found.buckets),
        moved=Counter({f"{name} {op}": GRAD * found.buffer, f"{name} all_gather": PARAM * largest}),
    )


def _adamw(numel: int, ranks: int, cluster: Cluster) -> _Rank:
    share = math.ceil(numel / ranks)
    seconds = Seconds(ADAMW_TRAFFIC * share / (cluster.memory * cluster.stream))
    return _Rank(
        (seconds, seconds), ADAMW_STATE * share, MASTER * share, (Counter(), Counter()), True
    )


def _combined(pools: Sequence[_Pool], layout: Layout, seconds: float, exposed: float) -> Prediction:
    """Every rank of a stage has a place in each pool."""
    dense, *expert = pools
    together: list[list[_Rank]] = []
    for rank in range(layout.gpus // layout.pp):
        mine = [dense.ranks[rank // layout.tp][rank % layout.tp]]
        mine += [pool.ranks[rank // layout.ep][0] for pool in expert]
        together.append(mine)
    slowest: list[float] = []
    exchange: list[float] = []
    means: list[float] = []
    for parity in (0, 1):
        times = [[r.seconds[parity] for r in mine] for mine in together]
        worst = max(times, key=lambda each: sum(t.total for t in each))
        slowest.append(sum(t.total for t in worst))
        exchange.append(sum(t.exchange for t in worst))
        means.append(sum(t.compute for each in times for t in each) / len(times))
    moved: dict[str, float] = {}
    for pool in pools:
        ranks = [rank for row in pool.ranks for rank in row]
        for op in sorted({op for r in ranks for counts in r.moved for op in counts}):
            most = sum(max(r.moved[parity][op] for r in ranks) for parity in (0, 1)) / 2
            moved[op] = moved.get(op, 0.0) + most
        moved |= pool.moved
    states = [sum(r.state for r in mine) for mine in together]
    return Prediction(
        state_max=max(states),
        state_mean=sum(states) / len(states),
        masters_max=max(sum(r.masters for r in mine) for mine in together),
        moved=moved,
        step=sum(slowest) / 2,
        exchange=sum(exchange) / 2,
        exposed=exposed,
        model=seconds,
        mean=sum(means) / 2,
        idle=sum(not any(r.works for r in mine) for mine in together) / len(together),
        padding=1.0 - sum(p.numel for p in pools) / sum(p.buffer for p in pools),
        buffers=(GRAD + PARAM) * sum(p.buffer for p in pools),
    )


def _ranks(
    items: tuple[Weight, ...], tp: int, cluster: Cluster, method: Method
) -> tuple[_Rank, ...]:
    """The tensor-parallel ranks of one data-parallel rank."""
    if method.optimizer == "muon":
        return (_muon(items, tp, cluster, method.muon),) * tp
    plan = plan_of(items, method.config, tp)
    local = sum(w.numel for w in items)
    return tuple(_pion(plan, rank, local, cluster) for rank in range(tp))


def _pion(plan: StepPlan, rank: int, local: int, cluster: Cluster) -> _Rank:
    config, place = plan.config, [rank] * len(plan.sizes)
    around = AROUND * local / (cluster.memory * cluster.stream)
    found, moved = [], []
    for step in (1, 2):
        compute = around + sum(
            priced(kernels(batch, m, n, config, axis, ranks=ranks, step=step), cluster)
            for batch, m, n, axis, ranks in _work(plan, rank)
        )
        collectives = plan.collectives(place, step)
        copies = _copied(plan, rank) / (cluster.memory * cluster.stream)
        exchange = _exchange(plan, step, cluster, compute) if plan.sizes else 0.0
        found.append(Seconds(compute + copies, exchange))
        moved.append(Counter({f"tp {op}": each.bytes for op, each in collectives.items()}))
    state = plan.state_bytes(place)
    works = any(True for _ in _work(plan, rank))
    return _Rank(tuple(found), state, MASTER * local, tuple(moved), works)


Work = tuple[int, int, int, Literal["rows", "cols"] | None, int]


def _work(plan: StepPlan, rank: int) -> Iterable[Work]:
    """Batches that a rank computes: B, m, n, axis of a cut, ranks that share the computation."""
    for batch in _batches(plan, rank):
        x = plan.matrices[batch[0]]
        left = _count(plan, batch)
        if len(x.team) > 1:
            yield left, x.m, x.n, x.axis, len(x.team)
            continue
        axis = x.axis if plan.config.tp_mode == "blockwise" else None
        most = plan.batch_size(x, "cuda")
        while left > 0:
            yield min(left, most), x.m, x.n, axis, 1
            left -= most


def _batches(plan: StepPlan, rank: int) -> Iterable[list[int]]:
    """Batches of matrices that a rank computes: where they are stored, then wave by wave."""
    waves = [wave for group in range(len(plan.sizes)) for wave in plan.waves(group)]
    for some in (plan.in_place(), *waves):
        yield from plan.batches(plan.computed(some, [rank] * len(plan.sizes)), "cuda")


def _count(plan: StepPlan, batch: Sequence[int]) -> int:
    return sum(plan.matrices[i].batch for i in batch)


def _copied(plan: StepPlan, rank: int) -> float:
    """Bytes read and written to join batches and to pack what travels, and to take both apart."""
    found = 0.0
    for batch in _batches(plan, rank):
        divided = len(plan.matrices[batch[0]].team) > 1
        if divided or len(batch) > 1:  # weight, gradient and moment joined; two taken apart
            for x in (plan.matrices[i] for i in batch):
                found += 2 * 5 * x.itemsize * (x.shard_numel if divided else x.numel)
    for group in range(len(plan.sizes)):
        for x in (plan.matrices[i] for wave in plan.waves(group) for i in wave):
            # What travels packed; W taken back. Where it is computed that joined and W packed.
            whole = x.numel if rank in x.team else 0
            found += 2 * _travelling(plan) * x.itemsize * (x.shard_numel + whole)
    return found


def _travelling(plan: StepPlan) -> int:
    """Times that an exchanged matrix travels: W, where its team needs it, and G there, W back."""
    return 3 if plan.sends_weights else 2


def _exchange(plan: StepPlan, step: int, cluster: Cluster, compute: float) -> float:
    """Seconds of a plan's collectives that its computation does not hide."""
    total = 0.0
    for number, size in enumerate(plan.sizes):
        group = _Group(size, cluster, within=size <= cluster.node)
        if not plan.of_group(number):
            continue
        if waves := plan.waves(number):
            # The busiest owner takes in what travels of its matrices and sends W.
            owned: Counter[tuple[int, ...]] = Counter()
            for x in (plan.matrices[i] for wave in waves for i in wave):
                owned[x.team] += x.itemsize * x.numel
            busiest = _travelling(plan) * max(owned.values())
            moving = group.seconds("all_to_all", busiest, 2 * len(waves))
            hidden = min(moving, compute) * (len(waves) - 1) / len(waves)
            total += moving - hidden
            continue
        for op, moved in plan.collectives([0] * len(plan.sizes), step).items():
            total += group.seconds(op, moved.bytes, moved.calls)
    return total


def _muon(items: Sequence[Weight], tp: int, cluster: Cluster, mode: MuonMode) -> _Rank:
    """Newton-Schulz of the same matrices: of each rank's shards, or of the gathered matrices."""
    group = _Group(tp, cluster, within=tp <= cluster.node)
    compute = gathered = 0.0
    local = sum(w.numel for w in items)
    for w in items:
        view = w.rotated.view
        shapes = view.shapes if mode == "blockwise" else view.whole_shapes(w.rotated.ranks)
        for batch, m, n in shapes.values():
            short, long = min(m, n), max(m, n)
            flop = batch * MUON_STEPS * (4.0 * short**2 * long + 2.0 * short**3)
            compute += flop / (cluster.bf16 * cluster.matmul) + MUON_STEPS * 3 * cluster.launch
        if mode == "duplicated" and w.rotated.ranks > 1:
            gathered += MUON_STATE * w.numel
    compute += (MUON_TRAFFIC + AROUND) * local / (cluster.memory * cluster.stream)
    exchange = group.seconds("all_gather", gathered, len(items)) if gathered else 0.0
    moved = Counter({"tp all_gather": int(gathered)} if gathered else {})
    return _Rank(
        (Seconds(compute, exchange),) * 2,
        MUON_STATE * local,
        MASTER * local,
        (moved, moved),
        bool(items),
    )


@dataclass(frozen=True)
class _Group:
    """Ranks of a collective, and the links between them."""

    size: int
    cluster: Cluster
    within: bool

    def seconds(self, op: str, sent: float, calls: int) -> float:
        """Time of ``calls`` collectives of ``sent`` input bytes together, in ring algorithms."""
        if self.size == 1 or not calls:
            return 0.0
        c = self.cluster
        rate = c.link * (c.nvlink if self.within else c.network)
        latency = c.latency if self.within else c.network_latency
        others = self.size - 1
        passes = {
            "all_gather": others,
            "reduce_scatter": others / self.size,
            "all_to_all": others / self.size,
            "all_reduce": 2 * others / self.size,
        }[op]
        return passes * sent / rate + calls * latency * math.ceil(math.log2(self.size))


def priced(launched: Sequence[Kernel], cluster: Cluster) -> float:
    """Seconds of kernels one after another, each the longest of its arithmetic, memory, launch."""
    rates = {
        "float32": cluster.fp32 * cluster.matmul,
        "tf32": cluster.tf32 * cluster.matmul,
        "bf16": cluster.bf16 * cluster.matmul,
        "solver": cluster.fp32 * cluster.solver,
    }
    stream = cluster.memory * cluster.stream
    total = 0.0
    for k in launched:
        arithmetic = k.flop / rates[k.kind] if k.kind in rates else 0.0
        total += max(arithmetic, (k.read + k.written) / stream, cluster.launch)
    return total


def largest_matrix(model: Model, layout: Layout, cluster: Cluster, config: PionConfig) -> float:
    """Seconds of the costliest matrix on one rank: no dealing of whole matrices is below it."""
    alone = replace(config, tp_mode="owner", blocks=1)
    shapes = {
        (m, n)
        for items in weights(model, layout, alone)
        for w in items
        for _, m, n in w.rotated.view.whole_shapes(w.rotated.ranks).values()
    }
    return max(
        sum(priced(kernels(1, m, n, alone, None, step=s), cluster) for s in (1, 2)) / 2
        for m, n in shapes
    )
