"""The benchmark of an iteration trains in real Megatron, and says what its timers say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from megatron_runs import ROOT, tool

TOOLS = ROOT / "tools"
sys.path[:0] = [str(TOOLS), str(ROOT / "examples")]
from bench_train import CONTENDERS, WARM, Training, Trainings, parsed  # noqa: E402
from megatron_job import JobError, lines_of  # noqa: E402

SMALL = ["--seq-length", "32", "--batch-tokens", "128", "--rounds", "1"]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return tool("bench_train.py", *arguments)


@pytest.mark.slow
def test_one_command_trains_and_writes_tables_json_and_plot(tmp_path: Path) -> None:
    names = ["adamw", "pion"]
    shape = [*SMALL, "--iterations", str(WARM + 4), "--contenders", *names]
    done = bench("--out", str(tmp_path), *shape, "--", "--num-layers", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "train.md").read_text() in done.stdout
    assert (tmp_path / "train.png").stat().st_size > 10_000
    written = json.loads((tmp_path / "train.json").read_text())
    adamw, pion = written["trainings"]
    assert [adamw["contender"], pion["contender"]] == names
    for training in (adamw, pion):
        seconds = training["seconds"]
        whole, step, own, passes = (
            seconds[name]
            for name in ("interval-time", "optimizer", "optimizer-inner-step", "forward-backward")
        )
        assert len(whole) == 2 and training["tokens"] == 128
        # Each is within the former; 10 us for what a clock reads between two stops.
        assert all(a > b + c - 1e-5 for a, b, c in zip(whole, step, passes, strict=True))
        assert all(a > b > 0.0 for a, b in zip(step, own, strict=True))
        # One layer of 128 wide with 4 of 8 heads of 24 for keys and values; 2 x 256 tokens.
        q, kv, proj, mlp = (192, 128), (96, 128), (128, 192), (352, 128)
        shapes = [q, kv, kv, proj, mlp, mlp, mlp]
        matrices = sum(m * n for m, n in shapes)
        assert training["parameters"] == matrices + 2 * 256 * 128 + 3 * 128
    # Adam has two float32 moments; polar an average in bf16, and float32 factors U, V and sigma.
    assert adamw["state"] == [8 * adamw["parameters"]]
    polar = sum(2 * m * n + 4 * min(m, n) * (m + n + 1) for m, n in shapes)
    assert pion["state"] == [adamw["state"][0] - 8 * matrices + polar]


@pytest.mark.slow
def test_a_training_that_fails_says_so_with_the_end_of_its_log(tmp_path: Path) -> None:
    flags = [*SMALL, "--contenders", "adamw", "--", "--no-such-flag"]
    done = bench("--out", str(tmp_path), *flags)
    assert done.returncode == 1 and not (tmp_path / "train.json").exists()
    assert "megatron_patches ended with status" in done.stderr
    assert "unrecognized arguments: --no-such-flag" in done.stderr


def test_what_failed_is_shown_and_not_what_torchrun_says_of_it(tmp_path: Path) -> None:
    code = """
print("error: no such flag")
for _ in range(100):
    print("E1121 14:37:26.758000 21688 torch/distributed/elastic/multiprocessing/api.py:1] failed")
    print("  a line of the report")
raise SystemExit(3)
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    with pytest.raises(JobError, match="ended with status 3") as caught:
        list(lines_of([sys.executable, str(script)], tmp_path / "log"))
    assert str(caught.value).endswith("error: no such flag\n")


def record(odd: float, even: float, optimizer: float) -> dict[str, object]:
    """A rank's, of iterations that take one time and the other by turns."""
    first = 100.0  # makes the state
    sums = [first + i // 2 * (odd + even) + (i % 2) * odd for i in range(WARM + 4)]
    parts = [optimizer * (i + 1) for i in range(WARM + 4)]
    sizes = {"tokens": 600, "parameters": 7, "state_bytes": 56, "peak_bytes": 0}
    layout = {"seq_length": 30, "micro_batch": 5, "data_parallel": 2}
    timers = {"interval-time": sums, "optimizer": parts}
    return {"totals": timers, **sizes, **layout}


def test_times_are_of_pairs_after_the_first_and_of_the_slowest_rank() -> None:
    slow = Training("a", 0, [record(1.0, 3.0, 0.25), record(1.0, 3.0, 0.5)])
    assert slow.seconds == {"interval-time": [2.0, 2.0], "optimizer": [0.5, 0.5]}
    assert slow.parameters == 7  # both data-parallel ranks have the same
    fast = Training("b", 0, [record(0.5, 1.5, 0.25)] * 2)
    trainings = Trainings([slow, fast, slow, fast])
    assert trainings.speeds("b") == [2.0, 2.0]
    assert trainings.share("a") == 0.25 and trainings.share("b") == 0.25


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--model 7b", "invalid choice: '7b' (choose from 'tiny', '60m', '1.3b', '8b')"),
        ("--contenders sgd", "invalid choice: 'sgd' (choose from 'adamw', 'muon', 'pion'"),
        ("--nproc 0", "--nproc 0: must be at least 1"),
        ("--rounds 0", "--rounds 0: must be at least 1"),
        ("--seq-length 0", "--seq-length 0: must be at least 1"),
        ("--iterations 5", "--iterations 5: must be at least 6, of which the first 4"),
        (
            "--batch-tokens 100",
            "--batch-tokens 100: must be a multiple of the samples' length, 128",
        ),
        ("--device cuda --nproc 4096", "--device cuda --nproc 4096: torch sees"),
        ("-- --optimizer=sgd", "--optimizer after --: use --contenders"),
        ("-- --train-iters 5", "--train-iters after --: use --iterations"),
        ("--tensor-model-parallel-size 2", "unrecognized arguments: --tensor-model-parallel-size"),
    ],
)
def test_what_cannot_be_measured_is_refused_first(
    flags: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parsed(flags.split())
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("contender", CONTENDERS)
def test_further_flags_go_to_all_and_change_no_contender(contender: str, tmp_path: Path) -> None:
    extra = ["--tensor-model-parallel-size", "2", "--optimizer-cpu-offload"]
    plan, _ = parsed(["--nproc", "2", "--batch-tokens", str(128 * 12), "--", *extra])
    command = plan.command(tmp_path, contender, tmp_path)
    last = len(CONTENDERS[contender])
    assert command[-last - len(extra) : -last] == extra
    assert tuple(command[-last:]) == CONTENDERS[contender]
    # 12 samples on 2 ranks: 2 divides each rank's 6 and the model's 16.
    assert command[command.index("--micro-batch-size") + 1] == "2"
