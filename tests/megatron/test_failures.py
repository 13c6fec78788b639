"""A rank that fails ends the job, and the job goes on from its last complete checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from megatron_runs import MODEL, NO_DROPOUT, PION, PUBLISHED_FLAGS, ROOT, Launched, launch, run

pytestmark = pytest.mark.slow

TP2 = ["--tensor-model-parallel-size", "2", "--micro-batch-size", "4"]
DP2: list[str] = []
DIST_OPT = ["--use-distributed-optimizer"]


class Jobs:
    """Trainings of two ranks, with a file of jobs for each launch."""

    def __init__(self, corpus: Path, folder: Path) -> None:
        data = ["--data-path", str(corpus), "--data-cache-path", str(corpus.parent / "cache")]
        self.common = [*MODEL, *data, *PION, *NO_DROPOUT, "--ckpt-format", "torch_dist"]
        self.folder = folder

    def job(self, name: str, *flags: str) -> dict[str, Any]:
        steps = self.folder / f"{name}.json"
        return {"name": name, "flags": [*self.common, *flags], "steps": str(steps)}

    def checkpoint(self, name: str) -> Path:
        return self.folder / name

    def saving(self, name: str) -> list[str]:
        return ["--save", str(self.checkpoint(name)), "--save-interval", "5"]

    def write(self, *jobs: dict[str, Any]) -> str:
        file = self.folder / "jobs.json"
        file.write_text(json.dumps(jobs))
        return str(file)

    def steps(self, name: str) -> dict[int, Any]:
        steps = json.loads((self.folder / f"{name}.json").read_text())
        # A resumed run looks at its factors once more.
        kept = steps[0].keys() - {"mismatch", "factorize"}
        return {step["iteration"]: {key: step[key] for key in kept} for step in steps}

    def fail(self, job: dict[str, Any], *, rank: int, moment: str, count: int) -> Launched:
        # Without an end of its own, the other rank would wait for minutes: gloo's timeout is 10.
        script = ROOT / "tests" / "support" / "failing_run.py"
        options = [str(rank), moment, str(count)]
        return run(script, self.write(job), *options, processes=2, timeout=400)


@pytest.fixture
def jobs(corpus: Path, tmp_path: Path) -> Jobs:
    return Jobs(corpus, tmp_path)


@pytest.mark.parametrize("layout", [TP2, DP2], ids=["tp2", "dp2"])
def test_a_rank_that_raises_ends_the_job_with_its_message(jobs: Jobs, layout: list[str]) -> None:
    ended = jobs.fail(jobs.job("raising", *layout), rank=1, moment="raise-in-step", count=5)
    assert ended.code != 0
    assert "[rank1]: ArithmeticError: rank 1 cannot go on" in ended.why
    assert "iteration        4/" in ended.output and "iteration        5/" not in ended.output
    assert not ended.left


def test_killed_runs_go_on_from_the_last_complete_checkpoint(jobs: Jobs) -> None:
    cases = {
        "step": ([*TP2, *PUBLISHED_FLAGS], dict(rank=1, moment="kill-in-step", count=12), 10),
        "save": (DP2, dict(rank=0, moment="kill-in-save", count=2), 5),
        "reduction": (DIST_OPT, dict(rank=1, moment="kill-in-reduction", count=8), 5),
        "exchange": (DIST_OPT, dict(rank=0, moment="kill-in-exchange", count=12), 10),
        "gather": (DIST_OPT, dict(rank=1, moment="kill-in-gather", count=13), 10),
    }
    straight = {" ".join(layout): f"{name}-straight" for name, (layout, _, _) in cases.items()}
    again = [jobs.job(name, *layout.split()) for layout, name in straight.items()]
    for name, (layout, when, complete) in cases.items():
        ended = jobs.fail(jobs.job(name, *layout, *jobs.saving(name)), **when)
        assert ended.code != 0 and "SIGKILL" in ended.output
        # Megatron's writer of checkpoints has a process for its queue, which a killed rank orphans.
        assert all("multiprocessing" in process for process in ended.left), ended.left
        tracker = jobs.checkpoint(name) / "latest_checkpointed_iteration.txt"
        assert tracker.read_text() == str(complete)
        load = ["--load", str(jobs.checkpoint(name))]
        again += [jobs.job(f"{name}-resumed", *layout, *jobs.saving(name), *load)]
    # The save that was cut off left files that the resumed run has to replace.
    assert any((jobs.checkpoint("save") / "iter_0000010").iterdir())
    launch(ROOT / "tests" / "support" / "many_runs.py", jobs.write(*again), processes=2)
    for name, (layout, _, complete) in cases.items():
        whole, resumed = jobs.steps(straight[" ".join(layout)]), jobs.steps(f"{name}-resumed")
        assert resumed == {i: whole[i] for i in range(complete + 1, 21)}
