"""The layout changes the speed and not the run: losses and grad norms equal one process's."""

from __future__ import annotations

from pathlib import Path

import pytest
from megatron_runs import NO_DROPOUT, PION, Step, train

pytestmark = pytest.mark.slow

# Momentum, matrices and sides that differ in what is exchanged and in what state there is.
MSIGN = [
    *("--pion-momentum", "transported", "--pion-direction", "msign", "--pion-nesterov"),
    *("--pion-side", "alternate", "--pion-qkv", "head"),
]
TP2 = ["--tensor-model-parallel-size", "2"]
PP2 = ["--pipeline-model-parallel-size", "2"]
DUPLICATED = ["--pion-tp-mode", "duplicated"]
DIST_OPT = ["--use-distributed-optimizer"]
OVERLAP = ["--overlap-grad-reduce", "--overlap-param-gather"]
LEGACY = ["--no-use-layer-wise-param-layout"]
RESHARDABLE = ["--dist-ckpt-optim-fully-reshardable"]
# A clip factor differs in its last bit from layout to layout, and bf16 weights then round
# differently here and there (AdamW's losses by 1e-4 too). Without clipping, data parallelism's
# sums are the same bits.
BF16 = ["--bf16", "--clip-grad", "0"]
MOE = [
    *("--num-experts", "4", "--moe-router-topk", "2", "--moe-ffn-hidden-size", "48"),
    *("--moe-shared-expert-intermediate-size", "96", "--moe-router-load-balancing-type", "none"),
    *("--moe-token-dispatcher-type", "alltoall"),
]
EP2 = ["--expert-model-parallel-size", "2"]


class Runs:
    """Runs from one checkpoint, since embeddings' initial weights depend on the layout."""

    def __init__(self, corpus: Path) -> None:
        self.corpus = corpus
        self.cache: dict[tuple[str, ...], list[Step]] = {}

    def start(self, flags: list[str]) -> list[str]:
        folder = self.corpus.parent / ("start" + "".join(flags).replace("-", ""))
        if not folder.exists():
            once = ["--save", str(folder), "--save-interval", "1", "--exit-interval", "1"]
            self.train(*flags, *once)
        return ["--load", str(folder), "--finetune"]

    def train(self, *flags: str, processes: int = 1) -> list[Step]:
        common = [*PION, *NO_DROPOUT, "--ckpt-format", "torch_dist"]
        return train(self.corpus, *common, *flags, processes=processes)

    def reference(self, model: list[str], *flags: str, processes: int = 1) -> list[Step]:
        """The 20 iterations that others have to equal."""
        key = (*model, *flags)
        if key not in self.cache:
            start = self.start(model)
            self.cache[key] = self.train(*model, *flags, *start, processes=processes)
        return self.cache[key]


@pytest.fixture(scope="module")
def runs(corpus: Path) -> Runs:
    return Runs(corpus)


def assert_equal(found: list[Step], expected: list[Step]) -> None:
    """Equal to float32 rounding.

    20 steps on, sums in another order differ by 2e-6 relative at most: 2**-24 a sum, some hundred
    in a row, a factor of ten or less for the run's sensitivity (measured: 3e-7, the last printed
    digit). A grad norm is printed to 3 decimals.
    """
    assert [s.iteration for s in found] == [s.iteration for s in expected]
    for a, b in zip(found, expected, strict=True):
        assert float(a.loss) == pytest.approx(float(b.loss), rel=2e-6)
        assert float(a.grad_norm) == pytest.approx(float(b.grad_norm), abs=2e-3)


@pytest.mark.parametrize(
    ("processes", "layout", "options"),
    [
        pytest.param(2, [], [], id="dp2"),
        pytest.param(2, PP2, [], id="pp2"),
        pytest.param(2, [*PP2, "--num-layers-per-virtual-pipeline-stage", "1"], [], id="pp2-vpp2"),
        pytest.param(2, TP2, [], id="tp2-owner"),
        pytest.param(2, [*TP2, *DUPLICATED], [], id="tp2-duplicated"),
        pytest.param(2, [*TP2, "--sequence-parallel"], MSIGN, id="tp2-sp-msign-heads"),
        pytest.param(4, [*TP2, *PP2], MSIGN, id="tp2-pp2-msign-heads"),
        pytest.param(4, TP2, [], id="tp2-dp2"),
    ],
)
def test_float32(runs: Runs, processes: int, layout: list[str], options: list[str]) -> None:
    start = runs.start([])
    found = runs.train(*options, *layout, *start, processes=processes)
    assert_equal(found, runs.reference([], *options))


@pytest.mark.parametrize(
    ("processes", "layout"),
    [
        pytest.param(2, [*EP2], id="ep2"),
        pytest.param(
            4,
            [*EP2, *TP2, "--sequence-parallel", "--expert-tensor-parallel-size", "1"],
            id="ep2-tp2",
        ),
        pytest.param(2, [*TP2, "--sequence-parallel"], id="tp2-experts-cut"),
    ],
)
def test_mixture_of_experts(runs: Runs, processes: int, layout: list[str]) -> None:
    found = runs.train(*MOE, *layout, *runs.start(MOE), processes=processes)
    assert_equal(found, runs.reference(MOE))


@pytest.mark.parametrize(
    ("processes", "layout"),
    [
        pytest.param(2, [], id="dp2"),
        pytest.param(2, [*OVERLAP], id="dp2-overlap"),
        pytest.param(2, [*LEGACY], id="dp2-legacy"),
        pytest.param(4, [*TP2], id="tp2-dp2"),
        pytest.param(4, [*TP2, *LEGACY], id="tp2-dp2-legacy"),
    ],
)
def test_distributed_optimizer(runs: Runs, processes: int, layout: list[str]) -> None:
    flags = [*BF16, *DIST_OPT, *RESHARDABLE, *layout]
    found = runs.train(*flags, *runs.start(BF16), processes=processes)
    alone = runs.reference(BF16, *(TP2 if TP2[0] in layout else []), processes=processes // 2)
    assert_equal(found, alone)


@pytest.mark.parametrize(
    ("saved", "loaded", "options"),
    [
        pytest.param((1, []), (2, TP2), [], id="1-to-tp2"),
        pytest.param((2, TP2), (1, []), [], id="tp2-to-1"),
        pytest.param((2, TP2), (2, [*TP2, *DUPLICATED]), [], id="tp2-to-duplicated"),
        pytest.param((2, [*TP2, *DUPLICATED]), (2, PP2), [], id="duplicated-to-pp2"),
        pytest.param((2, TP2), (1, []), MSIGN, id="tp2-to-1-msign-heads"),
    ],
)
def test_checkpoints_move(
    runs: Runs,
    tmp_path: Path,
    saved: tuple[int, list[str]],
    loaded: tuple[int, list[str]],
    options: list[str],
) -> None:
    folder = str(tmp_path / "checkpoint")
    half = ["--save", folder, "--save-interval", "10", "--exit-interval", "10"]
    runs.train(*options, *saved[1], *runs.start([]), *half, processes=saved[0])
    found = runs.train(*options, *loaded[1], "--load", folder, processes=loaded[0])
    assert_continued(found, runs.reference([], *options))


@pytest.mark.parametrize("path", [[], LEGACY], ids=["layout", "legacy"])
def test_distributed_optimizer_resumes(runs: Runs, tmp_path: Path, path: list[str]) -> None:
    folder = str(tmp_path / "checkpoint")
    flags = [*BF16, *DIST_OPT, *RESHARDABLE, *path]
    half = ["--save", folder, "--save-interval", "10", "--exit-interval", "10"]
    runs.train(*flags, *runs.start(BF16), *half, processes=2)
    found = runs.train(*flags, "--load", folder, processes=2)
    assert_continued(found, runs.reference(BF16))


def assert_continued(found: list[Step], straight: list[Step]) -> None:
    """Iterations 11 to 20 equal the straight run's, but for what Megatron prints at 12.

    It does not reset its running loss after a process's first iteration: the second is a mean.
    """
    assert found[0].iteration == 11
    assert_equal([found[0], *found[2:]], [straight[10], *straight[12:]])
