"""The layout changes the speed and not the run: losses, grad norms and weights equal one process's.

Context parallelism is not here: Megatron's own attention refuses it without Transformer Engine.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from layout_table import Difference, Run, Table

pytestmark = pytest.mark.slow


def tp(size: int, *more: str) -> tuple[str, ...]:
    # Half of the micro-batches, and so of the messages, whose number is what a run's time goes by.
    return ("--tensor-model-parallel-size", str(size), "--micro-batch-size", "4", *more)


SP = "--sequence-parallel"
DUPLICATED = ("--pion-tp-mode", "duplicated")
PP2 = ("--pipeline-model-parallel-size", "2")
VPP2 = ("--num-layers-per-virtual-pipeline-stage", "1")
EP2 = ("--expert-model-parallel-size", "2")
WHOLE_EXPERTS = ("--expert-tensor-parallel-size", "1")
RESHARDABLE = "--dist-ckpt-optim-fully-reshardable"
DIST_OPT = ("--use-distributed-optimizer", RESHARDABLE)
OVERLAP = ("--overlap-grad-reduce", "--overlap-param-gather")
LEGACY = "--no-use-layer-wise-param-layout"
# Momentum, matrices and sides that differ in what is exchanged and in what state there is.
MSIGN = (
    *("--pion-momentum", "transported", "--pion-direction", "msign", "--pion-nesterov"),
    *("--pion-side", "alternate", "--pion-qkv", "head"),
)
# A clip factor differs in its last bit from layout to layout, and bf16 weights then round
# differently here and there (AdamW's losses by 1e-4 too). Without clipping, data parallelism's
# sums are the same bits.
BF16 = ("--bf16", "--clip-grad", "0")

TP2 = Run("tp2 owner", 2, tp(2))
TP2_DUPLICATED = Run("tp2 duplicated", 2, tp(2, *DUPLICATED))
PP2_RUN = Run("pp2", 2, PP2)
MOE_EP2 = Run("moe ep2", 2, EP2, "moe")
BF16_TP2 = Run("bf16 tp2", 2, tp(2), options=BF16)
# Under TP, Megatron's MLA without Transformer Engine has another gradient than in one process (the
# first grad norm is 4.672 instead of 4.687, AdamW's too): it keeps only its own heads' part of the
# gradient of the positional key. So the modes are compared with each other there.
MLA_DUPLICATED = Run("mla tp2 duplicated", 2, tp(2, *DUPLICATED), "mla")

FLOAT32 = [
    TP2,
    TP2_DUPLICATED,
    Run("tp2 sp", 2, tp(2, SP)),
    Run("tp2 sp, msign, heads", 2, tp(2, SP), options=MSIGN),
    Run("tp4 owner", 4, tp(4)),
    Run("tp4 duplicated", 4, tp(4, *DUPLICATED)),
    PP2_RUN,
    Run("pp2 vpp2", 2, (*PP2, *VPP2)),
    Run("dp2", 2),
    Run("dp4", 4),
    Run("tp2 dp2", 4, tp(2)),
    Run("tp2 pp2", 4, tp(2, *PP2)),
    Run("tp2 pp2, msign, heads", 4, tp(2, *PP2), options=MSIGN),
    Run("tp2 pp2 dp2", 8, tp(2, *PP2, "--micro-batch-size", "2")),
    MOE_EP2,
    Run("moe ep2 tp2", 4, tp(2, SP, *EP2, *WHOLE_EXPERTS), "moe"),
    Run("moe tp2, cut experts", 2, tp(2, SP), "moe"),
    Run("mha, plain mlp, tp2 sp", 2, tp(2, SP), "plain"),
    Run("mha, plain mlp, pp2", 2, PP2, "plain"),
    Run("mla dp2", 2, (), "mla"),
    Run("mla pp2", 2, PP2, "mla"),
    Run("mtp tp2 sp", 2, tp(2, SP), "mtp"),
    Run("mtp pp2", 2, PP2, "mtp"),
    Run("mla tp2, owner to duplicated", 2, tp(2), "mla", against=MLA_DUPLICATED),
]
BFLOAT16 = [
    Run("bf16 dp2", 2, options=BF16),
    Run("bf16 pp2", 2, PP2, options=BF16),
    Run("bf16 dp2 dist-opt", 2, DIST_OPT, options=BF16),
    Run("bf16 dp2 dist-opt overlap", 2, (*DIST_OPT, *OVERLAP), options=BF16),
    Run("bf16 dp2 dist-opt legacy", 2, (*DIST_OPT, LEGACY), options=BF16),
    Run("bf16 dp2 dist-opt legacy overlap", 2, (*DIST_OPT, LEGACY, *OVERLAP), options=BF16),
    Run("bf16 tp2 dp2 dist-opt", 4, tp(2, *DIST_OPT), options=BF16, against=BF16_TP2),
    Run("bf16 tp2 dp2 dist-opt legacy", 4, tp(2, *DIST_OPT, LEGACY), options=BF16, against=BF16_TP2),
]
PLACES = [TP2.one_process, TP2, TP2_DUPLICATED, PP2_RUN]
MOE_PLACES = [MOE_EP2.one_process, MOE_EP2]
MOVES = [
    *(saved.moved_to(loaded) for saved in PLACES for loaded in PLACES),
    *(place.moved_to(place) for place in MOE_PLACES),
]


def named(runs: list[Run]) -> Callable[..., None]:
    return pytest.mark.parametrize("run", runs, ids=[r.name.replace(" ", "-") for r in runs])


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest, corpus, tmp_path_factory) -> Table:
    table = Table(corpus, tmp_path_factory.mktemp("runs"))
    items = (getattr(item, "callspec", None) for item in request.session.items)
    table.train([spec.params["run"] for spec in items if spec and "run" in spec.params])
    return table


def check(table, run, record_property, limits):
    found, expected = table[run], table[run.reference]
    difference = Difference.between(found, expected)
    start = table[run.start]
    alone = table[run.one_process].drift_since(start)
    drift = found.drift_since(start)
    record_property(
        "table",
        f"{run.name:36} {run.processes:2} {difference.loss:9.1e} {difference.grad_norm:9.1e} "
        f"{difference.weights:9.1e} {difference.others:9.1e} {drift:9.2e} {alone:9.2e}",
    )


@named(FLOAT32)
def test_float32(table: Table, run: Run, record_property) -> None:
    check(table, run, record_property, 0)


@named(BFLOAT16)
def test_bfloat16(table: Table, run: Run, record_property) -> None:
    check(table, run, record_property, 0)


def test_bfloat16_tensor_parallel(table: Table, record_property) -> None:
    check(table, BF16_TP2, record_property, 0)


@named(MOVES)
def test_checkpoints_move(table: Table, run: Run, record_property) -> None:
    check(table, run, record_property, 0)


def test_trainings_of_one_launch_do_not_change_each_other(table: Table) -> None:
    for first, again in table.repeated:
        assert first.steps == again.steps
