"""Learning rates of Pion's groups and Adam's in real Megatron: --pion-lr-mult."""

from __future__ import annotations

import json
import math
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from megatron_runs import MODEL, NO_DROPOUT, PION, ROOT, SCRIPT, launch, refused

pytestmark = pytest.mark.slow

LR, MIN_LR, DECOUPLED, TIMES = 1e-3, 1e-4, 5e-3, 8.0
ITERATIONS, WARMUP, SAVED = 6, 2, 3
FLAGS = [
    *(*PION, *NO_DROPOUT, "--lr", str(LR), "--min-lr", str(MIN_LR)),
    *("--decoupled-lr", str(DECOUPLED), "--pion-lr-mult", str(TIMES)),
    *("--train-iters", str(ITERATIONS), "--lr-warmup-iters", str(WARMUP)),
]
DIST_OPT = ["--use-distributed-optimizer"]
WAYS = {
    "torch_dist": [],
    "torch": ["--ckpt-format", "torch"],
    "layout": DIST_OPT,
    "legacy": [*DIST_OPT, "--no-use-layer-wise-param-layout"],
}


class Runs:
    """Every way trained on two data-parallel ranks, straight and resumed, in one launch."""

    def __init__(self, corpus: Path, folder: Path) -> None:
        self.folder = folder
        self.data = ["--data-path", str(corpus), "--data-cache-path", str(corpus.parent / "cache")]
        jobs = chain(*((self.job(way), self.job(way, resumed=True)) for way in WAYS))
        file = folder / "jobs.json"
        file.write_text(json.dumps(list(jobs)))
        launch(ROOT / "tests" / "many_runs.py", str(file), processes=2)

    def flags(self, way: str, *, resumed: bool) -> list[str]:
        checkpoint = str(self.folder / way)
        save = ["--save", checkpoint, "--save-interval", str(SAVED)]
        load = ["--load", checkpoint, "--ckpt-step", str(SAVED)]
        where = load if resumed else save
        return [*MODEL, *FLAGS, "--ckpt-format", "torch_dist", *WAYS[way], *self.data, *where]

    def job(self, way: str, *, resumed: bool = False) -> dict[str, Any]:
        name = f"{way}{'-resumed' if resumed else ''}"
        file = str(self.folder / f"{name}.json")
        return {"name": name, "flags": self.flags(way, resumed=resumed), "steps": file}

    def steps(self, name: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads((self.folder / f"{name}.json").read_text())
        return found


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(corpus, tmp_path_factory.mktemp("rates"))


def schedule(iteration: int, largest: float, smallest: float) -> float:
    if iteration <= WARMUP:
        return largest * iteration / WARMUP
    part = (iteration - WARMUP) / (ITERATIONS - WARMUP)
    return smallest + (largest - smallest) * (1 + math.cos(math.pi * part)) / 2


@pytest.mark.parametrize("way", WAYS)
def test_every_group_follows_its_schedule(runs: Runs, way: str) -> None:
    straight, resumed = runs.steps(way), runs.steps(f"{way}-resumed")
    assert [step["iteration"] for step in straight] == list(range(1, ITERATIONS + 1))
    assert [step["lrs"] for step in resumed] == [step["lrs"] for step in straight[SAVED:]]
    for step in (*straight, *resumed):
        rates = {
            (True, LR * TIMES): schedule(step["iteration"], LR * TIMES, MIN_LR * TIMES),
            (False, LR): schedule(step["iteration"], LR, MIN_LR),
            (False, DECOUPLED): schedule(step["iteration"], DECOUPLED, MIN_LR),
        }
        found = {(pion, largest): lr for pion, largest, lr in step["lrs"]}
        # The same few operations in another order: some units in the last place of a double.
        assert found == pytest.approx(rates, rel=1e-14)
        assert step["lr"] == pytest.approx(rates[False, LR], rel=1e-14)  # Megatron's log


@pytest.mark.parametrize("way", ["torch_dist", "torch"])
def test_another_factor_is_refused_at_resume_as_another_lr_is(runs: Runs, way: str) -> None:
    for changed in (["--pion-lr-mult", "2"], ["--lr", "2e-3"]):
        output = refused(SCRIPT, *runs.flags(way, resumed=True), *changed)
        error = next(line for line in output.splitlines() if "ValueError: " in line)
        assert "parameter group" in error and "max_lr" in output, error


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--pion-lr-mult", "0"], "--pion-lr-mult 0.0: must be a positive number"),
        (["--pion-lr-mult", "nan"], "--pion-lr-mult nan: must be a positive number"),
        (["--pion-lr-mult", "0.1", "--lr-warmup-init", "2e-3"], "below --lr-warmup-init 0.002"),
    ],
)
def test_bad_factors_are_refused(flags: list[str], says: str) -> None:
    assert says in refused(SCRIPT, *MODEL, *PION, *flags).splitlines()[-1]
