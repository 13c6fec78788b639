"""Every group of Pion's and Adam's follows its own schedule, with --pion-lr-mult and --use-mup."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from megatron_runs import MODEL, NO_DROPOUT, PION, ROOT, SCRIPT, launch, refused, run

pytestmark = pytest.mark.slow

LR, MIN_LR, DECOUPLED, TIMES = 1e-3, 1e-4, 5e-3, 8.0
ITERATIONS, WARMUP, SAVED = 6, 2, 3
FLAGS = [
    *(*PION, *NO_DROPOUT, "--lr", str(LR), "--min-lr", str(MIN_LR)),
    *("--pion-lr-mult", str(TIMES)),
    *("--train-iters", str(ITERATIONS), "--lr-warmup-iters", str(WARMUP)),
]
APART = ["--decoupled-lr", str(DECOUPLED)]
DIST_OPT = ["--use-distributed-optimizer"]
WAYS = {
    "torch_dist": [],
    "torch": ["--ckpt-format", "torch"],
    "distributed": DIST_OPT,
}
RUNS = [(way, name) for way in WAYS for name in (way, f"{way}-resumed")]
# At a resume, with Megatron's flag that lets them change.
NEW_LR, NEW_MIN_LR, NEW_DECOUPLED, NEW_TIMES = 2e-3, 3e-4, 7e-3, 3.0
NEW_RATES = [
    *("--lr", str(NEW_LR), "--min-lr", str(NEW_MIN_LR), "--decoupled-lr", str(NEW_DECOUPLED)),
    *("--pion-lr-mult", str(NEW_TIMES)),
]
OVERRIDE = "--override-opt-param-scheduler"
# Four times the base's width, and 2-D weights that are Adam's.
WIDTH = 4
MUP = [
    *("--use-mup", "--mup-base-hidden-size", str(64 // WIDTH)),
    *("--pion-exclude", "linear_fc2"),
]
MUPS = {"mup": MUP, "mup-decoupled": [*MUP, *APART]}
ADAM = ["--optimizer", "adam"]


class Runs:
    """Every way trained on two data-parallel ranks, straight and resumed, in one launch.

    And with muP, Pion beside Adam.
    """

    def __init__(self, corpus: Path, folder: Path) -> None:
        self.folder = folder
        data = ["--data-path", str(corpus), "--data-cache-path", str(corpus.parent / "cache")]
        self.common = [*MODEL, *FLAGS, *data]
        jobs = [
            *(self.job(name, self.flags(way, resumed=name != way)) for way, name in RUNS),
            *(self.job(f"{way}-changed", self.changed(way)) for way in WAYS),
            *(self.job(name, [*self.common, *flags]) for name, flags in MUPS.items()),
            *(self.job(f"{name}-adam", [*self.common, *f, *ADAM]) for name, f in MUPS.items()),
        ]
        file = folder / "jobs.json"
        file.write_text(json.dumps(jobs))
        launch(ROOT / "tests" / "support" / "many_runs.py", str(file), processes=2)

    def flags(self, way: str, *, resumed: bool) -> list[str]:
        checkpoint = str(self.folder / way)
        save = ["--save", checkpoint, "--save-interval", str(SAVED)]
        load = ["--load", checkpoint, "--ckpt-step", str(SAVED)]
        where = load if resumed else save
        return [*self.common, *APART, "--ckpt-format", "torch_dist", *WAYS[way], *where]

    def changed(self, way: str) -> list[str]:
        return [*self.flags(way, resumed=True), *NEW_RATES, OVERRIDE]

    def job(self, name: str, flags: list[str]) -> dict[str, Any]:
        return {"name": name, "flags": flags, "steps": str(self.folder / f"{name}.json")}

    def steps(self, name: str) -> list[dict[str, Any]]:
        recorded: list[dict[str, Any]] = json.loads((self.folder / f"{name}.json").read_text())
        return recorded


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
    assert [step["groups"] for step in resumed] == [step["groups"] for step in straight[SAVED:]]
    for step in (*straight, *resumed):
        rates = {
            (True, LR * TIMES): schedule(step["iteration"], LR * TIMES, MIN_LR * TIMES),
            (False, LR): schedule(step["iteration"], LR, MIN_LR),
            (False, DECOUPLED): schedule(step["iteration"], DECOUPLED, MIN_LR),
        }
        used = {(group["pion"], group["max_lr"]): group["lr"] for group in step["groups"]}
        # The same few operations in another order: some units in the last place of a double.
        assert used == pytest.approx(rates, rel=1e-14)
        assert step["lr"] == pytest.approx(rates[False, LR], rel=1e-14)  # Megatron's log


@pytest.mark.parametrize("way", WAYS)
def test_rates_change_at_a_resume_with_megatron_s_flag(runs: Runs, way: str) -> None:
    straight, changed = runs.steps(way)[SAVED:], runs.steps(f"{way}-changed")
    assert [step["iteration"] for step in changed] == [step["iteration"] for step in straight]
    assert [changed[0][key] for key in ("losses", "grad_norm")] == [
        straight[0][key] for key in ("losses", "grad_norm")
    ]
    for step in changed:
        i = step["iteration"]
        rates = {
            (True, NEW_LR * NEW_TIMES): schedule(i, NEW_LR * NEW_TIMES, NEW_MIN_LR * NEW_TIMES),
            (False, NEW_LR): schedule(i, NEW_LR, NEW_MIN_LR),
            (False, NEW_DECOUPLED): schedule(i, NEW_DECOUPLED, NEW_MIN_LR),
        }
        used = {(group["pion"], group["max_lr"]): group["lr"] for group in step["groups"]}
        assert used == pytest.approx(rates, rel=1e-14)
        assert step["lr"] == pytest.approx(rates[False, NEW_LR], rel=1e-14)
    # With the moments, too: all ways train the same run. Sums in another order differ by 2**-24 a
    # sum, some hundred in a row, which a run of this length passes on hardly enlarged.
    for step, other in zip(changed, runs.steps("torch_dist-changed"), strict=True):
        assert step["losses"] == pytest.approx(other["losses"], rel=2e-6)


def by_rates(step: dict[str, Any], *, pion: bool) -> dict[tuple[float, ...], int]:
    """Elements of Pion's groups or Adam's by their rates and eps."""
    elements: dict[tuple[float, ...], int] = {}
    for group in (group for group in step["groups"] if group["pion"] == pion):
        rates = tuple(group[key] for key in ("max_lr", "min_lr", "lr", "eps"))
        elements[rates] = elements.get(rates, 0) + group["elements"]
    return elements


@pytest.mark.parametrize("name", MUPS)
def test_mup_divides_pion_s_rates_by_the_root_of_the_width_and_adam_s_as_adam_s(
    runs: Runs, name: str
) -> None:
    for step, of_adam in zip(runs.steps(name), runs.steps(f"{name}-adam"), strict=True):
        ((largest, smallest, lr, _), rotated), *others = by_rates(step, pion=True).items()
        assert not others and rotated == 4 * 64 * (128 + 64 + 192)
        of_pion = TIMES / math.sqrt(WIDTH)
        expected = schedule(step["iteration"], LR * of_pion, MIN_LR * of_pion)
        assert (largest, smallest) == (LR * of_pion, MIN_LR * of_pion)
        assert lr == pytest.approx(expected, rel=1e-14)
        # Of --optimizer adam's groups, that of hidden matrices has lost Pion's.
        groups = by_rates(of_adam, pion=False)
        (hidden,) = (rates for rates in groups if rates[0] == LR / WIDTH)
        assert hidden[-1] == 1e-8 / WIDTH and len(groups) == 2 + ("decoupled" in name)
        groups[hidden] -= rotated
        assert groups[hidden] == 4 * 64 * 96
        assert by_rates(step, pion=False) == groups


@pytest.mark.parametrize("way", ["torch_dist", "torch"])
def test_another_factor_is_refused_at_resume_as_another_lr_is(runs: Runs, way: str) -> None:
    for changed in (["--pion-lr-mult", "2"], ["--lr", "2e-3"]):
        output = refused(SCRIPT, *runs.flags(way, resumed=True), *changed)
        error = next(line for line in output.splitlines() if "ValueError: " in line)
        assert all(word in error for word in ("parameter group", "max_lr", OVERRIDE)), error


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--pion-lr-mult", "0"], "--pion-lr-mult 0.0: must be a positive number"),
        (["--pion-lr-mult", "nan"], "--pion-lr-mult nan: must be a positive number"),
        (["--pion-lr-mult", "0.1", "--lr-warmup-init", "2e-3"], "below --lr-warmup-init 0.002"),
    ],
)
def test_bad_flags_are_refused(flags: list[str], says: str) -> None:
    assert says in refused(SCRIPT, *MODEL, *PION, *flags).splitlines()[-1]


def test_ranks_with_another_factor_are_stopped_at_the_start(tmp_path: Path) -> None:
    script = tmp_path / "another.py"
    script.write_text(
        "import os, runpy, sys\n"
        "if __name__ == '__main__':\n"
        "    sys.argv += ['--pion-lr-mult', os.environ['RANK'] + '.5']\n"
        f"    runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    ended = run(script, *MODEL, *PION, "--mock-data", processes=2)
    assert ended.code != 0
    assert "Pion's options differ" in ended.why and "lr_mult=1.5" in ended.why, ended.why
