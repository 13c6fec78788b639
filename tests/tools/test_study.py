"""A study trains in real Megatron, is found again where it was stopped, and says the same twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from megatron_runs import LIMIT_S, ROOT, environment, tool

from pion_dist import RECIPES, PionConfig

TOOLS = ROOT / "tools"
sys.path.insert(0, str(TOOLS))
from study_records import Records, curve, key_of, reached, resolved  # noqa: E402

SMALL = ["--widths", "32", "--iterations", "2", "--seq", "32", "--batch", "2", "--seeds", "2"]


def study(*arguments: str) -> subprocess.CompletedProcess[str]:
    return tool("study.py", *arguments)


PION = ("--optimizer", "pion", "--seed", "1")
GIVEN = (
    *("--pion-momentum", "transported", "--pion-direction", "msign", "--pion-nesterov"),
    *("--pion-beta1", "0.9", "--pion-side", "alternate", "--pion-scaling", "none"),
    *("--pion-retraction", "exp", "--pion-init", "fan_in"),
)
OTHER = PionConfig(
    momentum="transported",
    direction="msign",
    betas=(0.9, 0.95),
    side="alternate",
    scaling="none",
    retraction="exp",
)
POLAR = ("--pion-direction", "polar", "--pion-beta1", "0.95", "--pion-init", "fan_in")


def test_a_key_is_of_what_options_come_to(monkeypatch: pytest.MonkeyPatch) -> None:
    given, polar = (key_of(resolved([*PION, *flags])) for flags in (GIVEN, POLAR))
    for default, key in (
        (OTHER, given),
        (PionConfig(direction="polar", betas=(0.95, 0.95)), polar),
    ):
        monkeypatch.setitem(RECIPES, "pretrain", default)
        assert key_of(resolved(PION)) == key
        assert key_of(resolved([*PION, *GIVEN])) == given
    assert key_of(resolved([*PION, *POLAR])) == polar
    assert key_of(resolved([*PION, *POLAR, "--pion-beta2", "0.9"])) == polar  # does not apply
    assert key_of(resolved([*PION, *POLAR, "--log-interval", "7"])) == polar
    for other in (["--seed", "2"], ["--bf16"], ["--pion-init-scale", "2"], ["--pion-qkv", "head"]):
        assert key_of(resolved([*PION, *POLAR, *other])) != polar
    # Options of the step are nothing to another optimizer's runs; the start is.
    muon = ["--optimizer", "muon", "--pion-init", "fan_in"]
    assert resolved([*muon, "--pion-beta1", "0.5"]) == resolved(muon)
    assert resolved([*muon, "--pion-init-scale", "2"]) != resolved(muon)


def test_the_page_has_the_kept_trainings() -> None:
    from study import DATA, TRAINING
    from study_kept import kept_table

    assert kept_table(Records(DATA)).markdown() in TRAINING.read_text()


def test_records_are_sorted_and_shared(tmp_path: Path) -> None:
    names = ("corpus", "width", "layers", "iterations", "method", "lr", "rest", "seed")
    records = [dict.fromkeys(names, i) | {"key": f"{9 - i}"} for i in range(3)]
    one, other = (Records(tmp_path / "data" / "trainings.jsonl") for _ in range(2))
    for store, record in zip((one, other, one), reversed(records), strict=True):
        store.add(record)
    assert [json.loads(line) for line in one.path.read_text().splitlines()] == records
    assert Records(one.path).get("9") == records[0] and other.get("0") is None


def test_curves_end_at_the_last_iterations() -> None:
    assert curve([4.0, 3.0]) == [4.0, 3.0]
    falling = [10.0 - i / 100 for i in range(1000)]
    kept = curve(falling)
    assert len(kept) == 80 and kept[-1] == round(sum(falling[-50:]) / 50, 4)
    assert reached(kept, kept[39]) == 0.5 and reached(kept, 0.0) is None


def work(folder: Path, text: str) -> None:
    """Run a script of a study's parts in a process of its own, and leave none behind."""
    script = folder / "work.py"
    script.write_text(text)
    paths = os.pathsep.join((str(TOOLS), str(ROOT)))
    done = subprocess.run(
        [sys.executable, str(script), str(folder / "out")],
        env=environment() | {"PYTHONPATH": paths, "MARK": str(folder)},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # Orphans have the environment of this launch.
    assert not [p.pid for p in psutil.process_iter() if _of(p, str(folder))]


PREAMBLE = """
import json
import math
import sys
from pathlib import Path
from study import ADAMW, MAX_BYTES, POLAR
from study_runner import Model, OutOfTime, Run, Runner, prepare_corpus

out = Path(sys.argv[1])
data = out / "trainings.jsonl"
model = Model(32, seq=32, batch=2)

def runner(**options):
    made = Runner(out, 1, data=data, **options)
    made.add_corpus("code", lambda prefix: prepare_corpus.prepare(prefix, [], MAX_BYTES))
    return made
"""


@pytest.mark.slow
def test_a_kept_training_is_not_run_again_and_a_lost_one_has_the_same_digits(
    tmp_path: Path,
) -> None:
    work(
        tmp_path,
        PREAMBLE
        + """
if __name__ == "__main__":
    runs = [Run(POLAR, model, 2), Run(ADAMW, model, 2)]
    first = runner()
    results = first.all(runs)
    assert first.trained == 2
    lines = data.read_text().splitlines(keepends=True)
    assert len(lines) == 2 and max(map(len, lines)) < 1500
    lost = next(line for line in lines if json.loads(line)["method"] == "polar")
    data.write_text("".join(line for line in lines if line != lost))
    for path in (out / "runs").glob("*.json"):
        path.unlink()
    again = runner()
    assert again.all(runs)[1].record == results[1].record and again.trained == 1
    timed = {"seconds": 0}
    assert json.loads(lost) | timed == again.train(runs[0]).record | timed
    late = runner(minutes=0)
    assert [late.train(run).loss for run in runs] == [result.loss for result in results]
    assert late.attempt([lambda: late.train(Run(POLAR, model, 3))]) == [None]
    assert late.trained == late.asked == 0
""",
    )


@pytest.mark.slow
def test_a_training_goes_on_from_a_kept_one_and_leaves_no_process(tmp_path: Path) -> None:
    work(
        tmp_path,
        PREAMBLE
        + """
if __name__ == "__main__":
    base = Run(ADAMW, model, 3, keep=True)
    ended, evaluated, tuned = runner().all(
        [base, Run(ADAMW, model, 0, start=base), Run(POLAR, model, 2, start=base)]
    )
    assert evaluated.loss == ended.loss, (evaluated.loss, ended.loss)
    # Nearer to the trained model than to an untrained one, which guesses among 256 bytes.
    assert tuned.loss < (ended.loss + math.log(256)) / 2 and tuned.drift < 1e-5
""",
    )


@pytest.mark.slow
def test_peers_keep_what_they_are_named_after(tmp_path: Path) -> None:
    """ISO the singular values, Muon with fixed norms the norms alone."""
    work(
        tmp_path,
        PREAMBLE
        + """
import torch
import torch.distributed.checkpoint as dcp
from study import FIXED_NORM, ISO

def projections(run):
    reader = dcp.FileSystemReader(made.results / made._name(run) / f"iter_{run.iterations:07d}")
    name = "decoder.layers.self_attention.linear_proj.weight"
    stored = reader.read_metadata().state_dict_metadata[name]
    weights = {name: torch.empty(stored.size)}
    dcp.load(weights, storage_reader=reader, no_dist=True)
    return weights[name].double()

if __name__ == "__main__":
    made = runner()
    runs = [Run(FIXED_NORM, model, steps, keep=True) for steps in (1, 4)]
    iso, *fixed = made.all([Run(ISO, model, 4), *runs])
    # Rounding of U, V and W, each some 2**-23 a step.
    assert iso.drift < 4 * 3 * 2**-23, iso.drift
    assert fixed[1].drift > 1e-3, fixed[1].drift
    first, last = map(projections, runs)
    assert (last - first).norm() > 0.01 * first.norm()
    # Norms of float32 weights, rounded by 2**-24 of each element.
    assert torch.allclose(first.norm(dim=(1, 2)), last.norm(dim=(1, 2)), rtol=2**-22, atol=0.0)
""",
    )


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
    done = study("transfer", *SMALL, "--out", str(out), "--data", str(out / "trainings.jsonl"))
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
