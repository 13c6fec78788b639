"""The layout changes the speed and not the run: losses, grad norms and weights equal one process's.

Context parallelism is not here: Megatron's own attention refuses it without Transformer Engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from itertools import pairwise
from math import inf
from pathlib import Path

import pytest
import torch
from layout_table import FLAT, SHALLOW, Difference, Result, Run, Table
from megatron_runs import PUBLISHED_FLAGS

from pion_dist.spectrum import drift, shift, singular_values

pytestmark = pytest.mark.slow


def tp(size: int, *more: str) -> tuple[str, ...]:
    # Half of the micro-batches, and so of the messages, whose number is what a run's time goes by.
    return ("--tensor-model-parallel-size", str(size), "--micro-batch-size", "4", *more)


SP = "--sequence-parallel"
TEAMS2 = ("--pion-team-size", "2")
TEAMS4 = ("--pion-team-size", "4")
BLOCKS = ("--pion-blocks", "4")
PP2 = ("--pipeline-model-parallel-size", "2")
VPP2 = ("--num-layers-per-virtual-pipeline-stage", "1")
EP2 = ("--expert-model-parallel-size", "2")
WHOLE_EXPERTS = ("--expert-tensor-parallel-size", "1")
CUT_EXPERTS = ("--expert-tensor-parallel-size", "2")
DIST_OPT = ("--use-distributed-optimizer",)
OVERLAP = ("--overlap-grad-reduce", "--overlap-param-gather")
INSTANCES = ("--num-distributed-optimizer-instances", "2")
HEADS = ("--pion-qkv", "head")
# The other directions. The published algorithm's moments have other shapes and names, and more of
# them are exchanged.
PUBLISHED = (*PUBLISHED_FLAGS, "--pion-beta1=0.9", FLAT)
MSIGN = ("--pion-direction=msign", "--pion-momentum=transported", FLAT)
# A clip factor differs in its last bit from layout to layout, and bf16 weights then round
# differently here and there (AdamW's losses by 1e-4 too). Without clipping, data parallelism's
# sums are the same bits.
BF16 = ("--bf16", "--clip-grad", "0")

TP2 = Run("tp2", 2, tp(2))
TP2_TEAMS2 = Run("tp2 teams of 2", 2, tp(2, *TEAMS2))
PP2_RUN = Run("pp2", 2, PP2)
DIST_OPT_RUN = Run("dp2 dist-opt", 2, DIST_OPT)
TP2_DIST_OPT = Run("tp2 dp2 dist-opt", 4, tp(2, *DIST_OPT))
OFFLOADED = Run("dp2 dist-opt, state in host memory", 2, (*DIST_OPT, "--pion-offload-state"))
# A data-parallel rank's tensor-parallel ranks, both, and ranks of data parallelism alone.
DIST_OPT_TEAMS = [
    Run("tp2 dp2 dist-opt teams of 2", 4, tp(2, *DIST_OPT, *TEAMS2)),
    Run("tp2 dp2 dist-opt teams of 4", 4, tp(2, *DIST_OPT, *TEAMS4)),
    Run("dp2 dist-opt teams of 2", 2, (*DIST_OPT, *TEAMS2)),
]
TP2_FLAT = Run("tp2, equal values", 2, tp(2), options=(FLAT,))
MOE_EP2 = Run("moe ep2", 2, EP2, "moe")
MOE_TP2 = Run("moe tp2, cut experts", 2, tp(2, SP), "moe")
MOE_PP2 = Run("moe pp2", 2, PP2, "moe")
MOE_EP2_DIST_OPT = Run("moe ep2 dist-opt", 2, (*EP2, *DIST_OPT), "moe")
# Experts' data-parallel groups are larger than the other weights', smaller, or other ranks.
MOE_DIST_OPT = [
    Run(f"moe {name} dist-opt", processes, (*layout, *DIST_OPT), "moe")
    for name, processes, layout in (
        ("dp2", 2, ()),
        ("etp2", 2, CUT_EXPERTS),
        ("tp2", 2, tp(2, SP)),
        ("tp2 etp1", 2, tp(2, SP, *WHOLE_EXPERTS)),
        ("tp2 etp1 ep2", 2, tp(2, SP, *WHOLE_EXPERTS, *EP2)),
        ("etp2 ep2", 4, (*CUT_EXPERTS, *EP2)),
        ("tp2 dp2", 4, tp(2, SP)),
        ("tp2 etp1 dp2", 4, tp(2, SP, *WHOLE_EXPERTS)),
        ("tp2 etp1 ep2 dp2", 4, tp(2, SP, *WHOLE_EXPERTS, *EP2)),
        ("tp2 ep2 dp2", 4, tp(2, SP, *EP2)),
        ("ep2 dp2", 4, EP2),
    )
]
MOE_SIGMOID = [
    Run("moe sigmoid ep2 dist-opt", 2, (*EP2, *DIST_OPT), "moe sigmoid"),
    Run("moe sigmoid ep2 tp2", 4, tp(2, SP, *EP2, *WHOLE_EXPERTS), "moe sigmoid"),
    Run(
        "moe sigmoid tp2 etp1 dp2 dist-opt",
        4,
        tp(2, SP, *WHOLE_EXPERTS, *DIST_OPT),
        "moe sigmoid",
    ),
]
MOE_TEAMS2 = Run("moe ep2 dp2 dist-opt teams of 2", 4, (*EP2, *DIST_OPT, *TEAMS2), "moe")
SPLIT_GROUP = Run("one query group, tp2 dp2 dist-opt", 4, tp(2, *DIST_OPT), "one group")
M_TP2 = Run("tp2, msign", 2, tp(2), options=MSIGN)
M_BLOCKS = Run("tp2 blocks, msign", 2, tp(2), options=(*MSIGN, *BLOCKS))
M_RESET = Run("tp2, reset", 2, tp(2), options=(*MSIGN, "--pion-spectrum-reset-interval", "4"))
P_TP2 = Run("tp2, published", 2, tp(2), options=PUBLISHED)
P_TEAMS2 = Run("tp2 sp teams of 2, published", 2, tp(2, SP, *TEAMS2), options=PUBLISHED)
P_BLOCKS = Run("tp2 blocks, published", 2, tp(2), options=(*PUBLISHED, *BLOCKS))
P_PP2 = Run("pp2, published", 2, PP2, options=PUBLISHED)
P_DIST_OPT = Run("dp2 dist-opt overlap, published", 2, (*DIST_OPT, *OVERLAP), options=PUBLISHED)
P_BLOCKS_DIST_OPT = Run(
    "tp2 dp2 dist-opt blocks, published", 4, tp(2, *DIST_OPT), options=(*PUBLISHED, *BLOCKS)
)
P_TP2_DIST_OPT = Run("tp2 dp2 dist-opt, published", 4, tp(2, *DIST_OPT), options=PUBLISHED)
MOE_EP2_TP2 = Run("moe ep2 tp2", 4, tp(2, SP, *EP2, *WHOLE_EXPERTS), "moe")
P_MOE_EP2 = Run("moe ep2, published", 2, EP2, "moe", options=PUBLISHED)
# Fewer of Pion's weights than ranks.
P_FEW = Run("few dp4 dist-opt, published", 4, DIST_OPT, "few", options=PUBLISHED)
BF16_TP2 = Run("bf16 tp2", 2, tp(2), options=BF16)
BF16_DP2 = [
    Run("bf16 dp2", 2, options=BF16),
    Run("bf16 dp2 dist-opt overlap", 2, (*DIST_OPT, *OVERLAP), options=BF16),
]
# From equal singular values: drift is relative to each, and rounding to the largest.
WATCHED = ("--pion-spectrum-interval", "5", FLAT)
# Factors that stretch by the fourth power of the angle, so that spectra drift until they are put
# back.
RESET = (*MSIGN, "--lr", "0.02", "--min-lr", "0.02", *WATCHED, "--pion-spectrum-reset-interval=7")
W_TP2 = Run("tp2, watched", 2, tp(2), options=WATCHED)
W_DIST_OPT = Run("dp2 dist-opt, watched", 2, DIST_OPT, options=WATCHED)
W_RESET = Run("tp2, watched resets", 2, tp(2), options=RESET)
W_RESET_DIST_OPT = Run("dp2 dist-opt, watched resets", 2, DIST_OPT, options=RESET)
WATCHED_RUNS = [
    W_TP2.one_process,
    W_TP2,
    Run("tp2 teams of 2, watched", 2, tp(2, *TEAMS2), options=WATCHED),
    Run("pp2, watched", 2, PP2, options=WATCHED),
    W_DIST_OPT,
    W_TP2.moved_to(W_DIST_OPT),
    # From equal values an expert is chosen by rounding.
    Run("moe ep2, watched", 2, EP2, "moe", options=WATCHED[:2]),
    W_RESET.one_process,
    W_RESET,
    Run("pp2, watched resets", 2, PP2, options=RESET),
    W_RESET.moved_to(W_RESET_DIST_OPT),
]
# Weights alone, of which the first step takes the factors.
ALONE = ("--no-load-optim",)
W_ALONE = Run("one process, weights alone", options=ALONE)
FRESH = [
    TP2.moved_to(
        replace(run, name=f"{run.name}, alone", options=ALONE, against=TP2.moved_to(W_ALONE))
    )
    for run in (TP2_TEAMS2, PP2_RUN, DIST_OPT_RUN)
]
# Under TP, Megatron's MLA without Transformer Engine has another gradient than in one process (the
# first grad norm is 4.672 instead of 4.687, AdamW's too): it keeps only its own heads' part of the
# gradient of the positional key. So the modes are compared with each other there.
MLA_TEAMS2 = Run("mla tp2 teams of 2", 2, tp(2, *TEAMS2), "mla")

ZEROS = [
    Run("zeros tp2", 2, tp(2), "zeros", options=(FLAT,)),
    Run("zeros dp2 dist-opt", 2, DIST_OPT, "zeros", options=(FLAT,)),
    Run("zeros pp2", 2, PP2, "zeros", options=(FLAT,)),
]

FLOAT32 = [
    TP2,
    TP2_TEAMS2,
    Run("tp2 sp", 2, tp(2, SP)),
    Run("tp2 sp, heads", 2, tp(2, SP), options=HEADS),
    Run("tp4", 4, tp(4)),
    Run("tp4 teams of 4", 4, tp(4, *TEAMS4)),
    TP2_FLAT,
    M_TP2,
    M_BLOCKS,
    Run("dp2 dist-opt overlap, msign", 2, (*DIST_OPT, *OVERLAP), options=MSIGN),
    PP2_RUN,
    Run("pp2 vpp2", 2, (*PP2, *VPP2), "deep"),
    Run("dp2", 2),
    Run("dp4", 4),
    DIST_OPT_RUN,
    Run("dp2 dist-opt overlap", 2, (*DIST_OPT, *OVERLAP, "--micro-batch-size", "2")),
    TP2_DIST_OPT,
    OFFLOADED,
    Run("dp4 dist-opt", 4, DIST_OPT),
    Run("tp2 dist-opt teams of 2", 2, tp(2, *DIST_OPT, *TEAMS2)),
    *DIST_OPT_TEAMS,
    MOE_TEAMS2,
    SPLIT_GROUP,
    Run("one query group, tp2 sp heads", 2, tp(2, SP, *DIST_OPT), "one group", options=HEADS),
    Run("pp2 vpp2 dist-opt", 2, (*PP2, *VPP2, *DIST_OPT), "deep"),
    Run("dp4 dist-opt, 2 instances", 4, (*DIST_OPT, *INSTANCES)),
    Run("tp2 dp2", 4, tp(2)),
    Run("tp2 pp2", 4, tp(2, *PP2)),
    Run("tp2 pp2 dp2 dist-opt", 8, tp(2, *PP2, *DIST_OPT, "--micro-batch-size", "2")),
    MOE_EP2,
    MOE_EP2_DIST_OPT,
    MOE_EP2_TP2,
    MOE_TP2,
    MOE_PP2,
    *MOE_DIST_OPT,
    *MOE_SIGMOID,
    Run("mha, plain mlp, tp2 sp", 2, tp(2, SP), "plain"),
    Run("mha, plain mlp, pp2", 2, PP2, "plain"),
    Run("mla dp2", 2, (), "mla", options=(FLAT,)),
    Run("mla pp2", 2, PP2, "mla", options=(FLAT,)),
    Run("mtp tp2 sp", 2, tp(2, SP), "mtp"),
    Run("mtp pp2", 2, PP2, "mtp"),
    *ZEROS,
    Run("mla tp2, to teams of 2", 2, tp(2), "mla", against=MLA_TEAMS2),
    *(P_TP2, P_TEAMS2, P_BLOCKS, P_PP2),
    *(P_DIST_OPT, P_BLOCKS_DIST_OPT, P_TP2_DIST_OPT, P_MOE_EP2, P_FEW),
]
BFLOAT16 = [  # against one process, or TP's ranks alone
    *BF16_DP2,
    BF16_TP2,
    Run("bf16 pp2", 2, PP2, options=BF16),
    Run("bf16 dp2 dist-opt, published", 2, DIST_OPT, options=(*BF16, *PUBLISHED)),
    Run("bf16 tp2 dp2 dist-opt", 4, tp(2, *DIST_OPT), options=BF16, against=BF16_TP2),
]
# Without clipping, whose factor is a sum over all ranks, each element has the same history at DP 2
# with and without the distributed optimizer: sums of two are the same in either order.
NO_CLIP = ("--clip-grad", "0")
SAME_BITS = [
    Run(
        f"{name}dp2 dist-opt overlap, no clipping",
        2,
        (*DIST_OPT, *OVERLAP),
        options=(*NO_CLIP, *optimizer),
        against=Run(f"{name}dp2, no clipping", 2, options=(*NO_CLIP, *optimizer)),
    )
    for name, optimizer in (
        ("", ()),
        ("adam ", ("--optimizer", "adam")),
        ("bf16 gradients, ", ("--bf16", "--grad-reduce-in-bf16")),
    )
]
OF_POLAR = [TP2, TP2_TEAMS2, PP2_RUN, DIST_OPT_RUN, TP2_DIST_OPT]
PLACES = [TP2.one_process, TP2, PP2_RUN, DIST_OPT_RUN, TP2_DIST_OPT]
# The same of a MoE, and of the last ones those with the distributed optimizer.
MOE_PLACES = [MOE_EP2.one_process, MOE_TP2, MOE_PP2, MOE_DIST_OPT[0], MOE_DIST_OPT[6]]
P_PLACES = [P_TP2.one_process, P_TP2, P_TP2_DIST_OPT, P_DIST_OPT, P_PP2]
MOVES = [
    *(saved.moved_to(loaded) for saved in PLACES for loaded in PLACES),
    *(run.moved_to(MOE_EP2) for run in (*MOE_PLACES, MOE_EP2, MOE_EP2_DIST_OPT)),
    *(MOE_EP2.moved_to(run) for run in (*MOE_PLACES, MOE_EP2_DIST_OPT)),
    *(run.moved_to(run) for run in (MOE_EP2_DIST_OPT, *MOE_DIST_OPT)),
    MOE_TEAMS2.moved_to(MOE_TEAMS2),
    *(SPLIT_GROUP.one_process.moved_to(SPLIT_GROUP), SPLIT_GROUP.moved_to(SPLIT_GROUP.one_process)),
    *(
        saved.moved_to(loaded)
        for saved, loaded in pairwise([TP2.one_process, *DIST_OPT_TEAMS, TP2.one_process])
    ),
    TP2_FLAT.moved_to(TP2_FLAT.one_process),
    *FRESH,
    *(M_BLOCKS.one_process.moved_to(M_BLOCKS), M_BLOCKS.moved_to(M_BLOCKS.one_process)),
    M_TP2.moved_to(M_RESET),  # without spectra at start
    # Every place of Lie moments saves once and loads once.
    *(saved.moved_to(loaded) for saved, loaded in pairwise([*P_PLACES, P_PLACES[0]])),
    *(P_TP2.moved_to(P_TEAMS2), P_TEAMS2.moved_to(P_TP2)),
    *(P_MOE_EP2.one_process.moved_to(P_MOE_EP2), P_MOE_EP2.moved_to(P_MOE_EP2.one_process)),
    *(P_BLOCKS.one_process.moved_to(P_BLOCKS), P_BLOCKS.moved_to(P_BLOCKS.one_process)),
    P_FEW.moved_to(P_FEW),
    MOE_DIST_OPT[-1].moved_to(MOE_EP2_DIST_OPT),
    BF16_DP2[1].moved_to(BF16_DP2[1].one_process),
]


@dataclass(frozen=True)
class Limits:
    """What a row may differ by; see Difference.

    Gradients are smooth in the embedding, so that all but losses may differ by as much more as the
    embedding does. ``drift``: beyond one process's.
    """

    loss: float
    grad_norm: float
    weights: float
    others: float
    drift: float
    # A step moves an element of the embedding by up to the learning rate of 0.01, also where its
    # gradient is rounding alone: 4e-3 of the embedding, whose norm is 2.6. A quarter of one such
    # step is allowed (measured: 2.3e-4, where the grad norm then differs by 2.7e-5).
    embedding: float = 1e-3


# Float32 sums in another order differ by 2**-24 a sum, some hundred in a row, and the run passes
# that on with a factor of ten or less: 2e-6, and as much more as the embedding differs (measured:
# losses 2e-7, norms 2.0e-6 where the embedding differs by 5e-6). A weight is a sum of 20 steps that
# Pion and Adam divide by their own size, so that small elements keep a larger relative difference:
# 2e-5, and Adam's, which Pion's differences reach as gradients, twice that (measured: MLA at PP 2,
# where other matrices are of one batch, 2.0e-5).
# The rounding of a step moves singular values by some 2**-23 of the largest. Of generators' steps
# it adds up at random, of polar's only the last one's shows: two layouts' differ by as much
# (measured: 2**-23), and may by twice that.
EXACT = Limits(loss=2e-6, grad_norm=2e-6, weights=2e-5, others=4e-5, drift=2**-22)
# A router's gradient has one rank less than rows, since a softmax does not see what all experts'
# logits have in common. There the polar factor is rounding, made as large as Newton-Schulz makes
# it: four times EXACT's (measured: norms 4.0e-6; 1.1e-6 with --pion-exclude router).
ROUTER = replace(EXACT, grad_norm=8e-6)
# An adaptive direction divides by the root of a second moment, entry by entry, so that rounding
# counts for more where that is small (measured: norms 1.0e-5 where the embedding differs by
# 8e-5, weights 2.6e-6; with four layers weights 3.3e-5; from run to run they differ by half).
ADAPTIVE = replace(EXACT, grad_norm=1e-5, weights=5e-5, others=1e-4)
# Steps of RESET are nine times as long as EXACT's, on average (measured: norms 1.3e-5, weights
# 6e-5, Adam's 1.1e-4).
FAR = replace(EXACT, grad_norm=4e-5, weights=2e-4, others=4e-4)
# Gradients of Q, K and V pass through a weight that was zeros and is all of Adam's making, so that
# the norm differs by as much as this weight does, others' 4e-5 at most (measured: 1.5e-5).
FROM_ZEROS = replace(EXACT, grad_norm=4e-5)
# The same bits are summed by all ranks. A run's drift is its last rounding's: 2**-9 of an element,
# 4e-4 of the singular values.
BF16_EXACT = replace(EXACT, drift=2**-12)
# Under TP, partial sums round to bf16 before they are added: activations and gradients differ by
# 2**-9, and elements whose gradient is smaller than that go elsewhere, so that weights can differ
# by as much as they move. Under DP, the matrix sign brings what the order of a sum leaves, 2**-24
# times up to 300, into the masters, and their copies round elsewhere by 2**-9 in some elements. The
# loss is a mean over 512 tokens and differs by less than 2**-8 (measured: TP 1.5e-3, DP 6e-5).
BF16_ROUNDED = Limits(
    loss=2**-8, grad_norm=inf, weights=inf, others=inf, drift=2**-12, embedding=inf
)


def named(runs: list[Run]) -> pytest.MarkDecorator:
    ids = [run.name.replace(",", "").replace(" ", "-") for run in runs]
    return pytest.mark.parametrize("run", runs, ids=ids)


@pytest.fixture(scope="module")
def table(
    request: pytest.FixtureRequest, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Table:
    """The results of all runs that the chosen tests need."""
    table = Table(corpus, tmp_path_factory.mktemp("runs"))
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    chosen = [item.callspec.params for item in items if hasattr(item, "callspec")]
    table.train(params["run"] for params in chosen if isinstance(params.get("run"), Run))
    return table


@pytest.fixture
def check(table: Table, record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Compare a run with what it has to equal, and put it into the printed table."""

    def compare(title: str, run: Run, limits: Limits) -> None:
        result, start = table[run], table[run.start]
        difference = Difference.between(result, table[run.reference])
        drift, alone = result.drift_since(start), table[run.one_process].drift_since(start)
        values = (*astuple(difference), drift, alone)
        record_property(
            f"{title:36} ranks     loss grad norm  weights   Adam's    embed    drift of one",
            f"{run.name:36} {run.processes:5}" + "".join(f" {value:8.1e}" for value in values),
        )
        more = difference.embedding
        assert more <= limits.embedding
        assert difference.loss <= limits.loss
        assert difference.grad_norm <= limits.grad_norm + more
        assert difference.weights <= limits.weights + more
        assert difference.others <= limits.others + more
        assert drift <= alone + limits.drift

    return compare


def exact(run: Run) -> Limits:
    if set(BF16) <= set(run.options):
        return BF16_ROUNDED
    if run.model == "zeros":
        return FROM_ZEROS
    if set(PUBLISHED) <= set(run.options):
        return ADAPTIVE
    return ROUTER if run.model == "moe" else EXACT


def far(run: Run) -> Limits:
    return FAR if set(RESET) <= set(run.options) else exact(run)


@named(FLOAT32)
def test_float32(check: Callable[..., None], run: Run) -> None:
    check("float32, to one process", run, exact(run))


@named(SAME_BITS)
def test_the_distributed_optimizer_changes_no_bit(table: Table, run: Run) -> None:
    """Adam's parameters beside Pion's too, as of Adam's own run."""
    expected = table[run.reference]
    assert all(table[run].steps[i][0] == loss for i, (loss, _) in expected.steps.items())
    assert expected.weights.keys() == table[run].weights.keys()
    for name, weight in expected.weights.items():
        assert torch.equal(table[run].weights[name], weight), name


@named([run.start for run in ZEROS[:1]])
def test_weights_of_zeros_train(table: Table, run: Run) -> None:
    """Under Pion they would be zeros still."""
    (name,) = (name for name in table[run].weights if "linear_proj" in name)
    assert table[run].weights[name].any(-1).all()


@named(BFLOAT16)
def test_bfloat16(check: Callable[..., None], run: Run) -> None:
    check("bf16", run, BF16_ROUNDED if run is BF16_TP2 or run in BF16_DP2 else BF16_EXACT)


@named(MOVES)
def test_checkpoints_move(check: Callable[..., None], run: Run) -> None:
    check("iterations 11 to 20, moved", run, exact(run))


@named(WATCHED_RUNS)
def test_reports(check: Callable[..., None], table: Table, run: Run) -> None:
    """Reports are one process's, and the last one is of the weights that were saved."""
    check("with reports", run, far(run))
    result, start, alone = table[run], table[run.start], table[run.one_process]
    mine = compare_reports(result, alone)
    if run.model == "moe":
        return  # experts' names in checkpoints are others
    resets = far(run) is FAR
    before, after = start.matrices(run), result.matrices(run)
    for name, weights in after.items():
        old, new = singular_values(before[name]), singular_values(weights)
        for kind, change in (("drift", drift(old, new)), ("shift", shift(old, new))):
            for layer, value in enumerate(change.flatten(1).amax(1).tolist()):
                tag = f"pion-{kind}/{name.replace('.layers.', f'.layers.{layer}.')}"
                # Event files have float32 numbers; squares of singular values are exact to 1e-15.
                # Polar's drift is since the singular values that it keeps, in float32.
                exact = 1e-12 if resets else 2**-24 * (1 + 1e-6)
                assert mine[tag][20] == pytest.approx(value, rel=1e-6, abs=exact), tag
    # Polar has no alpha, generators no share that is kept.
    matrices = int(SHALLOW[1]) * 7
    assert len(mine) == (7 + 4 * matrices if resets else 6 + 5 * matrices)
    assert mine["pion/drift"][20] == max(mine[tag][20] for tag in mine if "drift/" in tag) > 0
    if resets:
        assert mine["pion/drift"][20] > 1e-7
    else:
        # Where all singular values are equal, a square loses the symmetric part of its B, about
        # half of it.
        assert all(0.2 < share < 1.0 for share in mine["pion/kept"].values())


def compare_reports(result: Result, alone: Result) -> dict[str, dict[int, float]]:
    """What a run wrote to TensorBoard, after it has been found to be one process's."""
    mine, theirs = (
        {tag: values for tag, values in each.scalars.items() if tag.startswith("pion")}
        for each in (result, alone)
    )
    assert mine.keys() == theirs.keys()
    for tag, values in mine.items():
        assert list(values) == ([15, 20] if result.run.source else [5, 10, 15, 20])
        # Drift is a sum of roundings as well, of 2**-23 in the largest value (see EXACT); relative
        # to the least of values that are apart it can be any number.
        if "drift" in tag and FLAT not in result.run.options:
            continue
        for iteration, value in values.items():
            assert value == pytest.approx(theirs[tag][iteration], rel=1e-3, abs=2**-22), tag
    return mine


@named([*OF_POLAR, *BF16_DP2, *FRESH, *(TP2.moved_to(run) for run in PLACES)])
def test_factors_are_taken_once(table: Table, run: Run) -> None:
    """Before a process's first step: from the weights alone, or none where state was loaded."""
    (looked, taken), *others = table[run].factorizations
    assert looked > 0 and (taken > 0) == (run.source is None or set(ALONE) <= set(run.options))
    assert len(others) == (9 if run.source else 19) and set(others) == {(0, 0)}


@named([TP2, TP2.one_process])
def test_trainings_of_one_launch_do_not_change_each_other(table: Table, run: Run) -> None:
    ((first, last),) = (pair for pair in table.repeated if pair[0].run == run)
    assert first.folder != last.folder
    assert first.steps == last.steps and len(first.steps) == 20
    assert first.weights.keys() == last.weights.keys()
    for name, weight in first.weights.items():
        assert weight.equal(last.weights[name]), name
