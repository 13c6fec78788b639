"""Unmodified Megatron trains with --optimizer pion, resumes exactly, and refuses bad flags."""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from megatron_runs import (
    LIMIT_S,
    MEGATRON_018,
    MODEL,
    NO_DROPOUT,
    PION,
    PUBLISHED_FLAGS,
    ROOT,
    SCRIPT,
    environment,
    launch,
    refused,
    steps,
    train,
)

from megatron_patches.arguments import FLAGS
from megatron_patches.checkpoint_checks import _reshardable
from megatron_patches.distributed_optimizer import PionAndAdam
from megatron_patches.megatron_optimizer import refuse_without_ranges
from pion_dist import PionConfig
from pion_dist.classify import ParamInfo, classify

TP2 = ["--tensor-model-parallel-size", "2"]
MOMENTUM = ["--pion-direction", "momentum"]

pytestmark = pytest.mark.slow


def checks(*arguments: str, before: tuple[Path, ...] = ()) -> str:
    """Run megatron_checks.py, whose checks share one launch: start-up takes longer than they do."""
    output = launch(
        ROOT / "tests" / "support" / "megatron_checks.py",
        *(*MODEL, *NO_DROPOUT, *PION, "--pion-init", "fan_in", *arguments),
        before=before,
    )
    assert "all checks passed" in output, output[-3000:]
    return output


@pytest.mark.parametrize("flags", [["--bf16"], PUBLISHED_FLAGS], ids=["bf16", "fp32-published"])
def test_checks_inside_one_process(flags: Sequence[str]) -> None:
    checks(*flags)


@pytest.mark.skipif(not MEGATRON_018.is_dir(), reason="no Megatron 0.18.2: `make test` brings it")
def test_checks_in_megatron_018() -> None:
    assert "in megatron-core 0.18.2" in checks("--bf16", before=(MEGATRON_018,))


@pytest.mark.parametrize(
    ("ckpt_format", "flags"),
    [
        ("torch_dist", ["--bf16", *PUBLISHED_FLAGS]),
        ("torch", ["--bf16", *PUBLISHED_FLAGS]),
        ("torch", ["--bf16"]),
        (
            "torch",
            [
                *("--pion-recipe", "paper-60m", "--pion-direction", "adaptive"),
                *("--pion-spectrum-reset-interval", "4"),
            ],
        ),
    ],
    ids=["torch_dist-bf16-lie", "torch-bf16-lie", "torch-bf16-default", "torch-fp32-recipe"],
)
def test_resume_prints_the_same_losses(
    corpus: Path, tmp_path: Path, ckpt_format: str, flags: list[str]
) -> None:
    # With Megatron's default dropout, so that the random state is in it too.
    common = [*PION, *flags, "--ckpt-format", ckpt_format, "--save-interval", "10"]
    save = tmp_path / "checkpoint"
    straight = train(corpus, *common, "--save", str(save))
    tracker = save / "latest_checkpointed_iteration.txt"
    assert tracker.read_text() == "20"
    shutil.rmtree(save / "iter_0000020")
    tracker.write_text("10")
    resumed = train(corpus, *common, "--load", str(save))
    assert [s.iteration for s in resumed] == list(range(11, 21))
    # Megatron does not reset its running loss after a process's first iteration, so the second
    # one it prints is the mean of two (training_log, should_reset).
    first, second, *rest = straight[10:]
    assert resumed[0] == first
    assert resumed[2:] == rest
    assert float(resumed[1].loss) == pytest.approx(
        (float(first.loss) + float(second.loss)) / 2, abs=1e-6
    )
    assert resumed[1].grad_norm == second.grad_norm


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--pion-momentum", "heavy"], ["--pion-momentum", "lie", "transported", "ambient"]),
        (["--pion-recipe", "paper"], ["--pion-recipe", "pretrain", "finetune", "paper-60m"]),
        (["--pion-degree", "1"], ["--pion-degree", "2 to 8"]),
        (["--pion-degree", "3"], ["--pion-degree=3", "direction='polar'", "leave it out"]),
        ([*MOMENTUM, "--pion-retraction", "cayley", "--pion-degree", "3"], ["--pion-degree=3"]),
        (["--pion-beta1", "1.5"], ["--pion-beta1"]),
        (["--pion-exclude", "("], ["--pion-exclude", "regular expression"]),
        (["--optimizer-cpu-offload"], ["--optimizer-cpu-offload", "--pion-offload-state"]),
        (["--async-save", "--pion-offload-state"], ["--async-save", "--pion-offload-state"]),
        (["--fp16"], ["--fp16", "use --bf16"]),
        (["--pion-blocks", "4"], ["--pion-blocks=4", "direction='polar'"]),
        (["--pion-team-size", "3"], ["--pion-team-size=3", "'auto' or a power of two"]),
        (["--pion-team-size", "all"], ["--pion-team-size='all'", "'auto' or a power of two"]),
        ([*MOMENTUM, "--pion-blocks", "4", "--pion-team-size", "2"], ["--pion-team-size=2"]),
        (["--pion-spectrum-exact"], ["--pion-spectrum-exact", "--pion-spectrum-interval"]),
        (["--pion-spectrum-interval", "-1"], ["--pion-spectrum-interval", "0"]),
        (
            [*MOMENTUM, "--pion-blocks", "3", *TP2],
            ["--pion-blocks 3", "--tensor-model-parallel-size 2"],
        ),
        (
            ["--use-distributed-optimizer", "--save", "nowhere", "--ckpt-format", "torch"],
            ["--ckpt-format torch_dist"],
        ),
    ],
    ids=lambda value: " ".join(value[:2]) if value[0].startswith("--") else "",
)
def test_bad_flags_are_refused_before_training(flags: list[str], says: list[str]) -> None:
    output = refused(SCRIPT, *MODEL, *PION, *flags)
    assert all(word in output.splitlines()[-1] for word in says), output[-1500:]


def test_a_script_without_megatrons_arguments_reads_metadata() -> None:
    """megatron.core alone, as other libraries use it."""
    assert _reshardable(lambda: {"kind": 1})() == {"kind": 1}


def test_a_rank_s_ranges_are_no_state_dict() -> None:
    with pytest.raises(ValueError, match="sharded_state_dict"):
        PionAndAdam.__new__(PionAndAdam).state_dict()


def test_a_part_of_a_query_group_needs_the_distributed_optimizer() -> None:
    qkv = (("q", 4), ("k", 2), ("v", 2))
    shape = {"name": "linear_qkv.weight", "shape": (4, 5), "qkv": qkv, "head_dim": 2}
    for split, says in ((True, "--use-distributed-optimizer"), (False, "")):
        info = ParamInfo(**shape, tp_axis="rows", tp_size=2 if split else 1, split_groups=split)
        decisions = [(info, None, classify(replace(info, shape=(8, 5)), PionConfig()))]
        with pytest.raises(ValueError, match=says) if says else nullcontext():
            refuse_without_ranges(decisions)


def test_a_missing_script_and_a_moved_seam_are_refused(tmp_path: Path) -> None:
    assert "no such script: nowhere.py" in refused(Path("nowhere.py"))
    script = tmp_path / "moved.py"
    script.write_text(
        "import megatron.core.optimizer as o\n"
        "import megatron_patches, megatron_patches.registration as r\n"
        "r._applied = False\n"
        "del o.get_megatron_optimizer\n"
        "megatron_patches.apply()\n"
    )
    output = refused(script)
    assert "megatron-core 0.1" in output and "no get_megatron_optimizer" in output


def test_apply_in_a_script_of_ones_own(corpus: Path, tmp_path: Path) -> None:
    script = tmp_path / "own.py"
    script.write_text(
        "import runpy, sys\n"
        "from megatron_patches import apply, cpu_device\n"
        "cpu_device.install()\n"
        "apply()\n"
        f"sys.argv[0] = {str(SCRIPT)!r}\n"
        "if __name__ == '__main__':\n"
        "    runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    data = ["--data-path", str(corpus), "--data-cache-path", str(corpus.parent / "cache")]
    command = [sys.executable, str(script), *MODEL, *PION, *data, "--exit-interval", "2"]
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=LIMIT_S
    )
    assert [s.iteration for s in steps(done.stdout)] == [1, 2], done.stderr[-3000:]


def test_help_has_every_flag() -> None:
    output = launch(SCRIPT, "--help")
    for flag in FLAGS:
        assert f"--pion-{flag.name}" in output
    assert "singular values stay" in " ".join(output.split())
