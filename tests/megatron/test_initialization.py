"""--pion-init draws the singular values that each kind promises, the same in every layout."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from layout_table import MODELS, Result, Run
from megatron_runs import COMMON, MODEL, NO_DROPOUT, PION, ROOT, SCRIPT, launch, refused, run

from pion_dist.initialization import KINDS, orthogonal, spectral

SCALE = 0.5
SHAPES = [(1, 1), (1, 9), (9, 1), (64, 64), (48, 200), (200, 48), (300, 310)]

slow = pytest.mark.slow


def gaussian(m: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def check_orthogonal(matrix: torch.Tensor, scale: float) -> None:
    m, n = matrix.shape[-2:]
    expected = scale * max(1.0, math.sqrt(m / n))
    sigma = torch.linalg.svdvals(matrix.double())
    # Elements are rounded to float32: 2**-24 of the largest for each singular value, and some.
    assert (sigma / expected - 1).abs().max() < 2**-20
    # fan_in's norm: that of m * n elements with a root mean square of scale / sqrt(n).
    assert sigma.square().sum(-1).sqrt().numpy() == pytest.approx(scale * math.sqrt(m), rel=1e-6)


def check_spectral(matrix: torch.Tensor, scale: float) -> None:
    m, n = matrix.shape[-2:]
    sigma = torch.linalg.svdvals(matrix.double())
    assert sigma[..., 0].numpy() == pytest.approx(scale * math.sqrt(m / n), rel=1e-6)
    # A Gaussian's others are spread.
    assert min(m, n) == 1 or (sigma[..., -1] < 0.9 * sigma[..., 0]).all()


def check_fan_in(matrix: torch.Tensor, scale: float) -> None:
    # Standard deviation of so many normal numbers: relative error 1 / sqrt(2 * numel), 5 of them.
    ratio = matrix.double().square().mean((-2, -1)).sqrt() * math.sqrt(matrix.shape[-1]) / scale
    assert (ratio - 1).abs().max() < 5 / math.sqrt(2 * matrix[0].numel())


CHECKS: dict[str, Callable[[torch.Tensor, float], None]] = {
    "fan_in": check_fan_in,
    "orthogonal": check_orthogonal,
    "spectral": check_spectral,
}


def test_every_kind_is_checked() -> None:
    assert KINDS.keys() == CHECKS.keys()


@pytest.mark.parametrize("kind", CHECKS)
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_singular_values_are_what_the_kind_says(kind: str, m: int, n: int) -> None:
    CHECKS[kind](KINDS[kind](gaussian(m, n), SCALE)[None], SCALE)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_spectral_scales_the_gaussian(m: int, n: int) -> None:
    drawn = gaussian(m, n)
    ratio = spectral(drawn, SCALE).double() / drawn.double()
    assert ratio.max() / ratio.min() - 1 < 2**-22  # one rounding of each


def test_orthogonal_is_haar_distributed() -> None:
    corners = torch.stack([orthogonal(gaussian(4, 4, seed), 1.0)[0, 0] for seed in range(400)])
    # An element's mean square is 1/4: the mean of 400 is 0.025 off, 5 of them. (Householder's Q
    # has this element negative always: -0.4.)
    assert abs(corners.mean()) < 0.125


@dataclass(frozen=True)
class Case:
    """A model whose initial weights must be the same in every layout.

    Attributes:
        model: one of layout_table.MODELS.
        kind: of --pion-init, which "default" does not give.
        options: further flags, which decide the matrices.
        layouts: of two processes.
    """

    model: str
    kind: str
    options: tuple[str, ...]
    layouts: tuple[tuple[str, ...], ...]


TP2 = ("--tensor-model-parallel-size", "2")
PP2 = ("--pipeline-model-parallel-size", "2")
EP2 = ("--expert-model-parallel-size", "2")
SP = "--sequence-parallel"
CASES = {
    "orthogonal": Case("llama", "orthogonal", (), (TP2, PP2)),
    "default": Case("llama", "fan_in", (), (TP2, PP2, ("--use-distributed-optimizer",))),
    "spectral": Case("llama", "spectral", (), (TP2, PP2)),
    "heads": Case("llama", "orthogonal", ("--pion-qkv", "head"), (TP2,)),
    "gate and up as one": Case("llama", "orthogonal", ("--pion-no-split-gate",), (PP2,)),
    "adam": Case("llama", "orthogonal", ("--optimizer", "adam"), (TP2,)),
    "bf16": Case("llama", "spectral", ("--bf16",), (TP2,)),
    "experts": Case("moe", "orthogonal", (), (EP2, (*TP2, SP))),
    "plain": Case("plain", "spectral", (), (TP2,)),
}


class Runs:
    """Every case after a first step of no length, in one process and in its layouts."""

    def __init__(self, corpus: Path, folder: Path) -> None:
        self.folder = folder
        self.data = ["--data-path", str(corpus), "--data-cache-path", str(corpus.parent / "cache")]
        one = [self.job(name, case, 0) for name, case in CASES.items()]
        two = [
            self.job(name, case, number)
            for name, case in CASES.items()
            for number in range(1, len(case.layouts) + 1)
        ]
        for processes, jobs in ((1, one), (2, two)):
            file = folder / "jobs.json"
            file.write_text(json.dumps(jobs))
            launch(ROOT / "tests" / "support" / "many_runs.py", str(file), processes=processes)

    def job(self, name: str, case: Case, number: int) -> dict[str, Any]:
        folder = self.folder / f"{name}-{number}"
        folder.mkdir()
        flags = [*COMMON, *MODELS[case.model], *NO_DROPOUT, *self.data, "--optimizer", "pion"]
        init = [] if name == "default" else ["--pion-init", case.kind]
        flags += [*init, "--pion-init-scale", str(SCALE), *case.options]
        flags += case.layouts[number - 1] if number else ()
        # Warm-up's first learning rate is 0.
        flags += ["--lr-warmup-iters", "5", "--lr-warmup-init", "0", "--exit-interval", "1"]
        flags += ["--save", str(folder / "checkpoint"), "--save-interval", "1"]
        flags += ["--ckpt-format", "torch_dist"]
        return {"name": name, "flags": flags, "steps": str(folder / "steps.json")}

    def matrices(self, name: str, number: int) -> dict[str, torch.Tensor]:
        of = Run(name, model=CASES[name].model, options=CASES[name].options)
        return Result(of, self.folder / f"{name}-{number}").matrices(of)


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(corpus, tmp_path_factory.mktemp("initial"))


@slow
@pytest.mark.parametrize("name", CASES)
def test_every_layout_draws_the_same_weights(runs: Runs, name: str) -> None:
    alone = runs.matrices(name, 0)
    assert len(alone) >= 4
    for number in range(1, len(CASES[name].layouts) + 1):
        drawn = runs.matrices(name, number)
        assert drawn.keys() == alone.keys()
        for matrix, expected in alone.items():
            assert torch.equal(drawn[matrix], expected), (CASES[name].layouts[number - 1], matrix)


@slow
@pytest.mark.parametrize("name", [name for name in CASES if name != "bf16"])
def test_matrices_of_a_model_are_what_the_kind_says(runs: Runs, name: str) -> None:
    for matrices in runs.matrices(name, 0).values():
        CHECKS[CASES[name].kind](matrices.flatten(0, -3), SCALE)


@slow
def test_the_drawing_is_of_the_seed_and_the_place(runs: Runs) -> None:
    name = "decoder.layers.self_attention.linear_proj.weight"
    for layer, drawn in enumerate(runs.matrices("default", 0)[f"{name}:whole"]):
        digest = hashlib.sha256(f"1234 module.{name} ({layer},)".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
        expected = torch.randn(64, 64, generator=generator) * (SCALE / 8)
        assert torch.equal(drawn[0], expected)


@slow
def test_interleaved_gates_that_are_cut_are_refused() -> None:
    interleaved = ["--moe-mlp-glu-interleave-size", "8", "--pion-init", "orthogonal"]
    flags = [*COMMON, *MODELS["moe"], *TP2, SP, "--mock-data", "--optimizer", "pion", *interleaved]
    ended = run(SCRIPT, *flags, processes=2)
    assert ended.code != 0
    assert "--expert-tensor-parallel-size 1" in ended.why, ended.why


@slow
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--optimizer", "adam", "--pion-init-scale", "2"], "--pion-init keep"),
        ([*PION, "--pion-init-scale", "-1"], "must be a positive number"),
    ],
)
def test_bad_scales_are_refused(flags: list[str], says: str) -> None:
    error = refused(SCRIPT, *MODEL, *flags).splitlines()[-1]
    assert "--pion-init-scale" in error and says in error
