"""Predictions at scale count what the plan, the step and Megatron do."""

import json
import random
import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megatron_runs import MODEL, NO_DROPOUT, PION, ROOT, launch
from reference import PUBLISHED

from pion_dist import Pion, PionConfig, cost, iterations, traffic
from pion_dist.config import Axis, TeamSize
from pion_dist.cost import step_flop
from pion_dist.iterations import NEWTON_SCHULZ
from pion_dist.recipes import in_bf16
from pion_dist.scale.__main__ import main
from pion_dist.scale.dealing import buffer, planned, ranks_of
from pion_dist.scale.describe import Layout, Model
from pion_dist.scale.muon import listed, packed
from pion_dist.scale.pion import Work, handed, matrices_work, pipelined, step_of
from pion_dist.scale.predict import Method, Prediction, predict
from pion_dist.scale.presets import CLUSTERS, MODELS
from pion_dist.scale.rates import Group, priced
from pion_dist.scale.report import best, exact, limits, methods
from pion_dist.scale.stage import pools, weights
from pion_dist.scale.trace import kernels
from pion_dist.state import divided_axis

SMALL = Model(name="small", layers=4, hidden=32, ffn=48, heads=4, groups=2, head_dim=8, vocab=64)
MIXED = Model(
    name="mixed",
    layers=2,
    hidden=32,
    heads=4,
    groups=2,
    head_dim=8,
    vocab=64,
    experts=8,
    top_k=2,
    expert_ffn=24,
    shared_ffn=16,
)
H100 = CLUSTERS["h100"]
MSIGN = {"direction": "msign", "momentum": "transported", "side": "alternate"}


def predicted(model: Model, layout: Layout, **options: object) -> Prediction:
    return predict(model, layout, H100, Method(config=PionConfig(**options)))


@pytest.mark.parametrize("shape", [(16, 16), (8, 64), (64, 8)], ids=str)
@pytest.mark.parametrize(
    ("options", "axis", "ranks"),
    [
        ({}, None, 1),
        (PUBLISHED, None, 1),
        (MSIGN | {"retraction": "cayley", "side": "both"}, None, 1),
        (PUBLISHED | {"direction": "msign", "retraction": "exp"}, None, 1),
        ({}, "rows", 4),
        ({}, "cols", 2),
        (MSIGN, "rows", 4),
        (PUBLISHED, "cols", 2),
        ({"blocks": 4, **MSIGN}, "cols", 2),
        ({"blocks": 4, **PUBLISHED}, "rows", 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("least", [iterations.DIVIDED_ROWS, 8], ids=["alike", "divided"])
def test_flop_read_from_the_step_are_those_that_cost_counts(
    shape: tuple[int, int],
    options: dict[str, object],
    axis: Axis | None,
    ranks: int,
    least: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Square matrices are each rank's, or divided from so many rows on."""
    monkeypatch.setattr(iterations, "DIVIDED_ROWS", least)
    kernels.cache_clear()
    config = PionConfig(**options)
    axis = None if axis is None else divided_axis(*shape, config, axis)
    launched = [kernels(3, *shape, config, axis, ranks=ranks, step=step) for step in (1, 2)]
    flop = sum(k.flop for each in launched for k in each) / 2
    assert flop == pytest.approx(3 * step_flop(*shape, config, axis, ranks=ranks), rel=1e-12)


def test_products_at_full_precision_are_told_from_the_others() -> None:
    """U of a tall W and V: UᵀU, VᵀV and U Σ Vᵀ are each three bf16 products of pieces; the rest
    follows the precision, and below the highest U's polish has a product more. With transported
    msign W A and A², the norm among them, move W.
    """
    d, other = 16, 48
    moving = 2 * other * d * d + 2 * d**3 + 2 * other * d * d
    total = int(step_flop(other, d, PionConfig()))
    product, sign = 2 * other * d * d, 3 * len(NEWTON_SCHULZ) * 2 * d**3
    low = product + sign + 2 * product
    for options, most, more, moves in (
        ({}, total - moving, 2 * d**3, moving),
        (MSIGN | {"side": "in"}, low, 0, 2 * product),
    ):
        follows = most + more
        for precision, expected in (
            ("highest", {"float32": most + moves}),
            ("high", {"tf32": follows, "bf16": 3 * moves}),
            ("bf16", {"bf16": follows + 3 * moves}),
        ):
            config = PionConfig(**options, matmul_precision=precision)
            flop: Counter[str] = Counter()
            for k in kernels(1, other, d, config, None):
                flop[k.kind] += k.flop
            assert {kind: x for kind, x in flop.items() if x} == expected


@pytest.mark.parametrize("precision", ["highest", "high", "bf16"])
@pytest.mark.parametrize(
    "shape", [(28672, 8192), (11008, 4096), (4096, 1024), (16384, 2048), (2048, 16384)], ids=str
)
def test_generators_are_held_in_the_form_that_is_predicted_faster(
    shape: tuple[int, int], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To 25%: forms weigh FLOP by H100's rates, and not the bytes of elementwise work."""
    config = PionConfig(
        direction="momentum", momentum="ambient", side="alternate", matmul_precision=precision
    )
    larger = "out" if shape[0] > shape[1] else "in"
    chosen, seconds = cost.forms(*shape, config), {}
    for form in ("dense", "factors"):
        kernels.cache_clear()
        monkeypatch.setattr(cost, "forms", lambda *_, it=form: {**chosen, larger: it})
        launched = kernels(1, *shape, config, None, step=2 if larger == "out" else 1)
        seconds[form] = priced(launched, H100)
    kernels.cache_clear()
    assert seconds[chosen[larger]] <= 1.25 * min(seconds.values())


def test_elementwise_bytes_are_read_and_written() -> None:
    """Momentum without a matrix sign: what each operation of a step touches, counted by hand."""
    config = PionConfig(
        momentum="ambient", direction="momentum", nesterov=False, side="in", scaling="none",
        retraction="taylor", degree=2,
    )  # fmt: skip
    m, n = 24, 16
    operations = kernels(1, m, n, config, None)
    # where(grads_finite, g, m) and lerp(m, it); D times half the angle, plus W, and A's product
    # with it times the angle; plus W; where into W.
    of_weights = (3 + 3) + (2 + 3 + 2) + 3 + 3
    of_generators = 3  # X - X^T
    moved = sum(k.read + k.written for k in operations if k.kind == "other")
    # Scalars, of a few bytes each, are not in this count.
    assert 0 <= moved - 4 * (of_weights * m * n + of_generators * n * n) < 64


def test_products_read_what_they_multiply_and_add() -> None:
    """The generator; X², X⁴ or with it, and X added, three times; two with the sign."""
    config = PionConfig(
        direction="msign", momentum="ambient", nesterov=False, side="in", scaling="none"
    )
    d = 16
    operations = kernels(1, d, d, config, None)
    read = [k.read / (4 * d * d) for k in operations if k.kind == "float32"]
    assert read == [2, *(2, 2, 3), *(2, 3, 3), *(2, 3, 3), 2, 2]


@pytest.mark.parametrize("options", [{}, PUBLISHED], ids=["default", "published"])
@pytest.mark.parametrize("model", [SMALL, MIXED], ids=lambda m: m.name)
def test_state_is_what_the_optimizer_holds(model: Model, options: dict[str, object]) -> None:
    config = PionConfig(**options)
    items = [w for pool in weights(model, Layout(gpus=1), config) for w in pool]
    views = {
        torch.nn.Parameter(torch.zeros(w.rotated.view.rows, w.rotated.view.cols)): w.rotated.view
        for w in items
    }
    optimizer = Pion(list(views), config=config, views=views)
    held = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    p = predicted(model, Layout(gpus=1, batch=1), **options)
    assert p.state_max == p.state_mean == held == optimizer.plan.state_bytes([])
    assert p.held_max - held == sum(x.nbytes for x in views)
    # Weights are multiples of 64 elements here, and end in one or two buckets of a multiple of 128.
    assert 0 <= p.buffers - 6 * sum(x.numel() for x in views) < 2 * 6 * 128


@pytest.mark.parametrize("options", [{"team_size": 2}, {"blocks": 4, **PUBLISHED}], ids=str)
def test_traffic_within_teams_is_what_cost_counts(options: dict[str, object]) -> None:
    """rank_checks.py compares the same counts with what ranks on gloo hand over."""
    config = PionConfig(**options)
    p = predicted(SMALL, Layout(gpus=2, tp=2, batch=1), **options)
    expected: dict[str, float] = {}
    for w in weights(SMALL, Layout(gpus=2, tp=2), config)[0]:
        for batch, m, n in w.rotated.view.whole_shapes(2).values():
            for step in (1, 2):
                along = divided_axis(m, n, config, w.rotated.view.axis)
                assert along is not None
                moved = traffic.traffic(batch, m, n, config, along, ranks=2, step=step)
                for op, size in moved.bytes.items():
                    expected[f"team {op}"] = expected.get(f"team {op}", 0.0) + size / 2
    assert {op: size for op, size in p.moved.items() if op.startswith("team ")} == expected
    # Every rank has its blocks; polar divides the longer dimension, whichever is cut.
    assert ("grid all_to_all" in p.moved) == ("blocks" not in options)


LAYOUTS = {
    "TP 2 x DP 2": (SMALL, Layout(gpus=4, tp=2, batch=2)),
    "DP 3": (SMALL, Layout(gpus=3, batch=3)),
    "TP 2": (SMALL, Layout(gpus=2, tp=2, batch=1)),
    "experts": (MIXED, Layout(gpus=8, tp=2, ep=2, batch=4)),
    "experts in one place": (MIXED, Layout(gpus=4, tp=2, ep=4, batch=2)),
}


@pytest.mark.parametrize("size", ["auto", 1, 2])
@pytest.mark.parametrize("options", [{}, PUBLISHED, MSIGN], ids=["default", "published", "msign"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_bytes_and_state_are_the_plans_on_every_rank(
    name: str, options: dict[str, object], size: TeamSize
) -> None:
    """rank_checks.py compares the same plans with what ranks on gloo exchange and hold."""
    model, layout = LAYOUTS[name]
    config = PionConfig(**options, team_size=size)
    p = predict(model, layout, H100, Method(config=config))
    busiest: Counter[str] = Counter()
    states = [0] * layout.gpus
    for pool in pools(model, layout, config):
        pool_plan, most = planned(pool, config, H100.node), Counter()
        ranks = range(pool.tp * pool.ranks)
        for step in (1, 2):
            works, _ = step_of(pool, pool_plan, H100, step)
            each = []
            for rank in ranks:
                place = ranks_of(pool, pool_plan.names, rank)
                each.append(handed(pool_plan, place, works[rank]))
                by_op: Counter[str] = Counter()
                for op, size in each[-1].items():
                    by_op[op.split()[1]] += size
                counted = pool_plan.plan.collectives(place, step)
                assert {op: size for op, size in by_op.items() if size} == {
                    op: moved.bytes for op, moved in counted.items() if moved.bytes
                }
            most += {op: max(x[op] for x in each) / 2 for x in each for op in x}
        busiest += most
        for rank in range(layout.gpus):
            place = ranks_of(pool, pool_plan.names, rank * pool.tp // pool.apart)
            states[rank] += pool_plan.plan.state_bytes(place)
    assert p.state_max == max(states) and p.state_mean == sum(states) / len(states)
    adamw = predict(model, layout, H100, Method(optimizer="adamw")).moved
    assert p.moved == adamw | dict(busiest)


def test_a_step_exchanges_gradients_once_and_weights_once() -> None:
    """Polar's: 4 bytes an element there and 4 back, and a flag for each piece of a matrix."""
    model, layout = LAYOUTS["TP 2 x DP 2"]
    config = PionConfig(team_size=1)
    (pool,) = pools(model, layout, config)
    (waves,) = planned(pool, config, H100.node).waves
    sent, returned = sum(sum(w.sent) for w in waves), sum(sum(w.returned) for w in waves)
    assert sent == 4 * pool.numel * pool.tp
    # A matrix of 2 shards has a piece on each rank that stores some of it, at least 2, at most 4.
    matrices = 7 * model.layers
    assert sent + 4 * 2 * matrices <= returned <= sent + 4 * 4 * matrices


def test_waves_hide_what_travels_behind_what_is_computed() -> None:
    """Two waves of 1 s each way, computed in c seconds on one rank.

    There 1, then the first is computed while the second travels; back likewise. Long computations
    hide all but the first second and the last; short ones hide nothing.
    """
    links = Group(2, replace(H100, latency=0.0, link=1.0, nvlink=0.5))
    assert links.seconds("all_to_all", 1.0, 1) == 1.0
    (pool,) = pools(SMALL, Layout(gpus=2, tp=2), PionConfig())
    wave = planned(pool, PionConfig(), H100.node).waves[0][0]
    one = replace(wave, sent=(1, 0), got=(0, 1), returned=(1, 1), taken=(0, 1))
    for seconds, expected in ((0.0, 4.0), (0.5, 4.0), (1.0, 4.0), (10.0, 22.0)):
        works = [[Work(seconds), Work()]] * 2
        assert pipelined([one, one], works, links) == pytest.approx(expected)
    assert pipelined([], [], links) == 0.0


@pytest.mark.parametrize(("gpus", "ep", "leaves"), [(8, 2, False), (16, 2, True), (16, 4, True)])
def test_an_exchange_leaves_the_node_where_its_ranks_do(gpus: int, ep: int, leaves: bool) -> None:
    """Experts' data-parallel ranks are ep apart: 4 or 8 of them within 8 GPUs or beyond."""
    config, layout = PionConfig(), Layout(gpus=gpus, ep=ep, batch=gpus)
    _, experts = pools(MIXED, layout, config)
    slow = replace(H100, network=H100.network / 2)
    seconds = [step_of(experts, planned(experts, config, c.node), c, 1)[1] for c in (H100, slow)]
    assert (seconds[0] < seconds[1]) == leaves


def test_the_real_70b_is_dealt_and_works_as_one_process_does() -> None:
    """Over the 256 ranks of a stage on 1,024 GPUs; sums of 140 float64 to a rounding each."""
    model, config = MODELS["llama-70b"], PionConfig(team_size=1)
    (pool,) = pools(model, Layout(gpus=1024, tp=8, pp=4), config)
    (alone,) = pools(model, Layout(gpus=4, pp=4), config)
    plan, one = (planned(each, config, H100.node).plan for each in (pool, alone))
    names = [x.name(0) for x in plan.matrices]
    assert len(set(names)) == len(names) == 140 == len(one.matrices)
    assert plan.sizes == (256,) and one.sizes == ()
    assert all(len(x.team) == 1 and 0 <= x.team[0] < 256 for x in plan.matrices)
    flop = [plan.flop([rank]) for rank in range(256)]
    assert sum(flop) == pytest.approx(one.flop([]), rel=140 * 2**-53)
    # Every element is stored once.
    stored = sum(plan.stored_numel([rank]) for rank in range(256))
    assert stored == one.stored_numel([]) == 8 * pool.numel
    # Costliest first: no rank has a second matrix of the largest while another has none.
    largest = max(cost.polar_flop(x.m, x.n, plan.config) for x in plan.matrices)
    assert max(flop) == largest


def test_teams_of_the_real_70b_have_less_to_wait_for() -> None:
    """By default, on 1,024 GPUs: no rank has much more than the mean, in seconds and in memory."""
    model, layout = MODELS["llama-70b"], Layout(gpus=1024, tp=8, pp=4, batch=512)
    config = in_bf16("pretrain")
    auto, one = (
        predict(model, layout, H100, Method(config=replace(config, team_size=size)))
        for size in ("auto", 1)
    )
    adamw = predict(model, layout, H100, Method(optimizer="adamw"))
    assert auto.step < 0.6 * one.step and auto.imbalance < 1.3 < one.imbalance
    assert auto.memory < 1.05 * adamw.memory < one.memory
    # Every team is within a node: 8 tensor-parallel ranks, as its members are neighbours.
    assert max(len(team) for team in teams_of(model, layout, config)) <= H100.node


def test_teams_go_beyond_a_node_where_that_is_faster() -> None:
    """By default, of 70B on 16,384 GPUs: at most AdamW's share of an iteration plus two points."""
    model, config = MODELS["llama-70b"], in_bf16("pretrain")
    layout = Layout(gpus=16384, tp=8, pp=4, batch=2048)
    assert H100.node < max(len(team) for team in teams_of(model, layout, config))
    pion, adamw = (
        predict(model, layout, H100, method)
        for method in (Method(config=config), Method(optimizer="adamw"))
    )
    assert pion.share < adamw.share + 0.02 and pion.memory < 1.05 * adamw.memory


def teams_of(model: Model, layout: Layout, config: PionConfig) -> list[tuple[int, ...]]:
    """The teams of a stage's dense matrices."""
    (pool,) = pools(model, layout, config)
    return [x.team for x in planned(pool, config, H100.node).plan.matrices]


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("shape", [(28672, 8192), (8192, 8192), (14336, 4096)], ids=str)
def test_teams_are_chosen_by_about_the_predicted_seconds(
    shape: tuple[int, int], ranks: int
) -> None:
    """The counts behind ``auto`` are coarse, but a size of team changes more than a tenth."""
    config = in_bf16("pretrain")
    along = divided_axis(*shape, config, None)
    counted = traffic.seconds(1, *shape, config, along, ranks=ranks, near=8, travels=0)
    predicted = matrices_work(1, *shape, config, along, ranks, 1, H100).total
    assert counted == pytest.approx(predicted, rel=0.1)


@pytest.mark.parametrize("ranks", [1, 2, 3, 16, 64, 100])
@pytest.mark.parametrize("bucket_size", [None, 5_000_000])
def test_weights_lie_in_buffers_as_megatron_lays_them(
    ranks: int, bucket_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The byte-level distributed optimizer's for Pion, the layer-wise one's for Muon."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import layer_wise_optimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer, Range

    layer_wise = layer_wise_optimizer.LayerWiseDistributedOptimizer
    model = replace(SMALL, hidden=1001, ffn=2600, heads=10, head_dim=100)  # sizes to align
    items, _ = weights(model, Layout(gpus=1), PionConfig())
    items = random.Random(ranks).sample(items * 3, 40)
    params = [torch.nn.Parameter(torch.empty(w.numel, device="meta")) for w in items]
    numels = [w.numel for w in items]
    given = bucket_size or max(40_000_000, 1_000_000 * ranks), ranks

    theirs = DistributedOptimizer._compute_per_buffer_param_layout(
        params, *given, DistributedDataParallelConfig()
    )
    ours = buffer(numels, ranks, bucket_size)
    assert list(ours.buckets) == theirs.bucket_indices and ours.numel == ours.buckets[-1][1]
    assert [theirs.param_index_map[p] for p in params] == list(ours.weights)
    ranges = [ours.ranges(i) for i in range(len(items))]
    for number, (first, last) in enumerate(ours.buckets):
        share = (last - first) // ranks
        for rank in range(ranks):
            place = Range(first + rank * share, first + (rank + 1) * share)
            stored = DistributedOptimizer._build_model_gbuf_param_range_map(
                theirs.param_index_map, place, first
            )
            own = {
                i: (param_range["param"].start, param_range["param"].end)
                for i, p in enumerate(params)
                if (param_range := stored.get(p))
            }
            assert own == {
                i: each[rank]
                for i, each in enumerate(ranges)
                if ours.weights[i][2] == number and each[rank][0] < each[rank][1]
            }

    muons = layer_wise._compute_per_buffer_param_layout(
        params, *given, DistributedDataParallelConfig()
    )
    buckets, size = packed(numels, ranks, bucket_size)
    assert size == muons.bucket_indices[-1][1] and len(buckets) == len(muons.bucket_indices)
    for number, ((first, last), bucket) in enumerate(
        zip(muons.bucket_indices, buckets, strict=True)
    ):
        for rank, shard in enumerate(bucket):
            for i in shard:
                start, _, where = muons.param_index_map[params[i]]
                assert (where, (start - first) // ((last - first) // ranks)) == (number, rank)

    monkeypatch.setattr(layer_wise_optimizer, "get_pg_rank", lambda group: 0)
    own = SimpleNamespace(dp_cp=None, expt_dp=None)
    groups = [{"params": list(params)}]
    layer_wise._shard_params_ping_pong(own, [SimpleNamespace(param_groups=groups)], ranks, 1)
    at = {p: i for i, p in enumerate(params)}
    assert [[at[p] for p in each] for each in own.dp_cp_params_list] == listed(numels, ranks)


def test_where_there_are_more_ranks_than_matrices_ranks_idle_and_it_is_said() -> None:
    layouts = [Layout(gpus=gpus, batch=256) for gpus in (2, 8, 32, 64, 256)]
    pion = [predicted(SMALL, layout, team_size=1) for layout in layouts]
    adamw = [predict(SMALL, layout, H100, Method(optimizer="adamw")) for layout in layouts]
    # Of each of 4 layers Q, K, V, the projection, gate, up and fc2.
    assert [p.idle for p in pion] == [0.0, 0.0, 1 - 28 / 32, 1 - 28 / 64, 1 - 28 / 256]
    for fewer, more in pairwise(pion):
        assert more.state_max <= fewer.state_max and more.state_mean < fewer.state_mean
        assert more.mean < fewer.mean and more.busiest <= fewer.busiest * (1 + 1e-9)
    for p, other in zip(pion, adamw, strict=True):
        # Gradients and parameters travel and lie as AdamW's do.
        assert (p.buffers, p.exposed, p.model) == (other.buffers, other.exposed, other.model)
        assert all(p.moved[op] == size for op, size in other.moved.items())
        assert other.idle == other.exchange == 0.0 and other.imbalance == 1.0
    said = limits(pion[-1], adamw[-1])
    assert any("89% of the ranks compute no matrix" in line for line in said), said
    assert any("more memory than AdamW's" in line for line in said), said
    assert limits(adamw[0], adamw[0]) == []


def test_the_best_flags_are_exact_and_fit() -> None:
    model, layout = MODELS["llama-70b"], Layout(gpus=512, tp=8, pp=4)
    predictions = {
        name: (method, predict(model, layout, H100, method))
        for name, method in methods(layout, PionConfig(matmul_precision="bf16"), 8).items()
    }
    chosen = best(predictions, H100, among="exact")
    assert chosen is not None and exact(chosen[1])
    assert chosen[2].share == min(p.share for method, p in predictions.values() if exact(method))
    full = replace(H100, capacity=chosen[2].memory - 1)
    other = best(predictions, full, among="exact")
    assert other is None or other[0] != chosen[0]


def test_every_rate_matters_and_none_helps_when_it_is_halved() -> None:
    model, layout = MODELS["llama-8b"], Layout(gpus=64, tp=2)
    for precision, rates in (
        ("high", ("tf32", "bf16", "memory", "nvlink", "network")),
        ("highest", ("fp32",)),
    ):
        method = Method(config=PionConfig(team_size=8, matmul_precision=precision))
        base = predict(model, layout, H100, method)
        for rate in rates:
            halved = replace(H100, **{rate: getattr(H100, rate) / 2})
            slower = predict(model, layout, halved, method)
            assert slower.step + slower.exposed > base.step + base.exposed, rate


def test_collectives_of_rings_compose() -> None:
    group = Group(8, replace(H100, latency=0.0))
    apart = group.seconds("reduce_scatter", 1e9, 1) + group.seconds("all_gather", 1e9 / 8, 1)
    assert group.seconds("all_reduce", 1e9, 1) == pytest.approx(apart)
    assert Group(1, H100).seconds("all_reduce", 1e9, 1) == 0.0


def test_rings_of_whole_nodes_use_all_of_their_adapters() -> None:
    """Of 16 neighbours on two nodes, up to NVLink's rate; not of ranks that are 8 apart.

    An all-to-all sends half of what a rank has to the other node, through its own adapter.
    """
    slow = replace(H100, latency=0.0, network_latency=0.0, nvlink=8.0, network=1.0, link=1.0)
    near, far, both = Group(8, slow), Group(16, slow, apart=8), Group(16, slow)
    assert near.seconds("all_gather", 8.0, 1) == 7.0
    assert both.seconds("all_gather", 8.0, 1) == 15.0
    assert far.seconds("all_gather", 8.0, 1) == 120.0
    assert both.seconds("all_to_all", 16.0, 1) == 15.0


def test_large_products_take_their_arithmetic() -> None:
    """A matrix's time is its FLOP over their rates, where bytes and launches are few beside them.

    A quarter more, most of it the angles' in torch operations, of which Triton makes one pass.
    """
    config = PionConfig(matmul_precision="high")
    operations = kernels(1, 8192, 8192, config, None)
    rates = {"float32": H100.fp32, "tf32": H100.tf32, "bf16": H100.bf16}
    least = sum(k.flop / (rates[k.kind] * H100.matmul) for k in operations if k.flop)
    assert least < priced(operations, H100) < 1.3 * least


@pytest.mark.parametrize(
    ("name", "billions"),
    [("llama-8b", 8.03), ("llama-70b", 70.6), ("llama-405b", 405.9), ("qwen3-235b", 235.1)],
)
def test_models_have_their_published_sizes(name: str, billions: float) -> None:
    assert MODELS[name].params == pytest.approx(billions * 1e9, rel=1e-3)  # norms are not counted


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--model", "llama-7b"], ["--model llama-7b", "llama-8b, llama-70b"]),
        (["--cluster", "a100"], ["--cluster a100", "h100, h200, b200"]),
        (["--gpus", "1000"], ["--gpus 1000", "--tp 8 x --pp 4"]),
        (["--pp", "3", "--gpus", "768"], ["--pp 3", "80 layers", "change --pp"]),
        (["--tp", "16"], ["--tp 16", "8 query groups"]),
        (["--ep", "2"], ["--ep 2", "no experts"]),
        (["--model", "qwen3-235b", "--ep", "3"], ["--ep 3", "change --ep"]),
        (["--batch", "33"], ["--batch 33", "32 data-parallel", "change --batch"]),
        (["--blocks", "12", "--recipe", "paper-60m"], ["--blocks 12", "--tp 8"]),
        (["--blocks", "8"], ["--blocks 8", "than polar", "leave it out"]),
        (["--micro-batch", "0"], ["--micro-batch 0", "1 or more"]),
    ],
    ids=" ".join,
)
def test_what_does_not_fit_is_named(
    flags: list[str], says: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(flags)
    error = capsys.readouterr().err
    assert all(word in error for word in says), error


def test_the_command_prints_everything(capsys: pytest.CaptureFixture[str]) -> None:
    small = "--layers 4 --hidden 512 --ffn 1536 --heads 8 --groups 4 --head-dim 64 --vocab 1024"
    main([*small.split(), "--gpus", "16", "--tp", "2", "--pp", "2", "--matmul", "0.5"])
    text = capsys.readouterr().out
    assert "16 GPUs as TP 2, PP 2" in text and "--pion-team-size" in text
    for mode in ("Pion, auto", "Pion, teams of 8", "AdamW", "Muon"):
        assert mode in text
    assert "0.5 to 0.25" in text and "in 2 blocks" not in text
    main([*small.split(), "--gpus", "16", "--tp", "2", "--recipe", "paper-60m"])
    assert "in 2 blocks" in capsys.readouterr().out
    for recipe, blocks in (("pretrain", False), ("paper-60m", True)):
        main([*small.split(), "--gpus", "16", "32", "--tp", "2", "--recipe", recipe])
        text = capsys.readouterr().out
        assert "Muon (blockwise)" in text and ("Pion, in blocks" in text) == blocks


@pytest.mark.slow
def test_data_parallel_bytes_are_those_that_megatron_moves(corpus: Path) -> None:
    """Three ranks on gloo: gradients reduced in float32, weights gathered in bf16, as for AdamW."""
    data = ["--data-path", str(corpus), "--data-cache-path", str(corpus.parent / "cache")]
    flags = ["--bf16", "--use-distributed-optimizer", "--global-batch-size", "12"]
    seen = {}
    for name, optimizer in (
        ("adam", ["--optimizer", "adam"]),
        ("pion", [*PION, "--pion-print-plan"]),
    ):
        output = launch(
            ROOT / "tests" / "support" / "counted_run.py",
            *(*MODEL, *optimizer, *NO_DROPOUT, *data, *flags, "--train-iters", "2"),
            processes=3,
        )
        lines = re.findall(r"collectives: (\{.*\})", output)
        assert len(lines) == 2
        seen[name] = [json.loads(line) for line in lines]
    tiny = Model(name="tiny", layers=4, hidden=64, ffn=96, heads=8, groups=4, head_dim=8, vocab=256)
    moved = predicted(tiny, Layout(gpus=3, batch=6)).moved
    # In the same buffer are the embedding, the output layer, and 9 norms of 64 elements.
    others = 2 * 256 * 64 + 9 * 64
    for mine, adams in zip(seen["pion"], seen["adam"], strict=True):
        for op, size, ranks in (("reduce_scatter", 4, 1), ("all_gather", 2, 3)):
            assert mine[op] == adams[op], (op, mine, adams)
            more = sum(mine[op]) - moved[f"dp {op}"]
            # Either buffer ends at a multiple of 384 elements.
            assert abs(more - size * others / ranks) < size * 384 / ranks, (op, more)
    # What Pion adds is what its plan says, but that the first step also decomposes the weights.
    (plan,) = re.findall(r"rank 0[,:].* of Adam's .*; moves (.*)", output)
    moves = re.findall(r"(\d+) ([a-z-]+) of ([\d,]+) bytes", plan)
    printed = {op: (int(calls), int(size.replace(",", ""))) for calls, op, size in moves}
    pions, adams = seen["pion"][1], seen["adam"][1]
    added = Counter(pions["all_reduce"]) - Counter(adams["all_reduce"])
    assert printed.pop("all-reduce") == (added.total(), sum(added.elements()))
    assert printed.pop("all-to-all") == (len(pions["all_to_all"]), sum(pions["all_to_all"]))
    assert not printed and pions.keys() - adams.keys() == {"all_to_all"}
