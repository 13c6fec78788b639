"""A study trains in real Megatron, is found again where it was stopped, and says the same twice."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from megatron_runs import LIMIT_S, ROOT, environment, tool

TOOLS = ROOT / "tools"
SMALL = ["--widths", "32", "--iterations", "2", "--seq", "32", "--batch", "2", "--seeds", "2"]


def study(*arguments: str) -> subprocess.CompletedProcess[str]:
    return tool("study.py", *arguments)


@pytest.mark.slow
def test_a_study_resumes_and_repeats_its_table(tmp_path: Path) -> None:
    first = study("transfer", *SMALL, "--out", str(tmp_path))
    assert first.returncode == 0, first.stdout + first.stderr
    table = (tmp_path / "transfer.md").read_text()
    assert re.search(r"\| rms +\| [\d.e-]+", table) and (tmp_path / "transfer.png").stat().st_size
    records = sorted((tmp_path / "runs").glob("*.json"), key=os.path.getmtime)
    assert len(records) >= 6  # three learning rates of each scaling
    kept = {record: record.stat().st_mtime_ns for record in records[1:]}
    lost = records[0]
    before = lost.read_text()
    lost.unlink()
    again = study("transfer", *SMALL, "--out", str(tmp_path))
    assert again.returncode == 0, again.stdout + again.stderr
    assert (tmp_path / "transfer.md").read_text() == table
    # Only what was lost was trained, to the same digits.
    assert {record: record.stat().st_mtime_ns for record in kept} == kept
    for name in ("loss", "validation"):
        pattern = rf'"{name}": \[[^]]*\]'
        assert re.search(pattern, before)[0] == re.search(pattern, lost.read_text())[0]  # type: ignore[index]


@pytest.mark.slow
def test_a_training_goes_on_from_a_kept_one_and_leaves_no_process(tmp_path: Path) -> None:
    work = """
import math
import sys
from pathlib import Path
from study import ADAMW, MAX_BYTES, PION
from study_runner import Model, Run, Runner, prepare_corpus

if __name__ == "__main__":
    runner = Runner(Path(sys.argv[1]), 1)
    runner.add_corpus("code", lambda prefix: prepare_corpus.prepare(prefix, [], MAX_BYTES))
    model = Model(32, seq=32, batch=2)
    base = Run(ADAMW, model, 3, keep=True)
    ended, evaluated, tuned = runner.all(
        [base, Run(ADAMW, model, 0, start=base), Run(PION, model, 2, start=base)]
    )
    assert evaluated.loss == ended.loss, (evaluated.loss, ended.loss)
    # Nearer to the trained model than to an untrained one, which guesses among 256 bytes.
    assert tuned.loss < (ended.loss + math.log(256)) / 2 and tuned.drift < 1e-5
"""
    script = tmp_path / "work.py"
    script.write_text(work)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "out")],
        env=environment()
        | {"PYTHONPATH": os.pathsep.join((str(TOOLS), str(ROOT))), "MARK": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # Orphans have the environment of this launch.
    left = [p.pid for p in psutil.process_iter() if _of(p, str(tmp_path))]
    assert not left


def _of(process: psutil.Process, folder: str) -> bool:
    try:
        return any(folder in value for value in process.environ().values())
    except psutil.Error:
        return False


@pytest.mark.slow
def test_a_training_that_fails_says_so_with_the_end_of_its_log(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "corpora").mkdir(parents=True)
    (out / "corpora" / "code.bin").write_bytes(b"")
    (out / "corpora" / "code.idx").write_bytes(b"not an index")
    done = study("transfer", *SMALL, "--out", str(out))
    assert done.returncode == 1
    assert "a training failed. The end of its log" in done.stderr
    assert not list((out / "runs").glob("*.json"))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--widths", "100"], "must be multiples of 32"),
        (["--iterations", "0"], "--iterations 0: must be at least 1"),
    ],
)
def test_sizes_that_make_no_study_are_refused(flags: list[str], said: str) -> None:
    done = study("compare", *flags)
    assert done.returncode == 2 and said in done.stderr
