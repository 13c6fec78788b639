"""The commands of README.md and CONTRIBUTING.md work as they are written."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def block(start: str, *, page: str = "README.md") -> str:
    blocks = re.findall(r"```\w*\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    (content,) = (text for text in blocks if text.startswith(start))
    return content


def run(command: list[str], folder: Path) -> str:
    # Also the torchrun and python of this environment.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_plain_pytorch() -> None:
    exec(compile(block("import torch"), "README.md", "exec"), {})


def test_the_example_of_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    """Ranks 0 and 2 have the rows of the team's first member, and 1 and 3 those of its second."""
    exec(compile(block("from pion_dist", page="CONTRIBUTING.md"), "CONTRIBUTING.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    sent = {line.partition(" [")[0] for line in lines if not line.endswith("[]")}
    assert len(lines) == 8 and sent == {"0 to 2", "1 to 3", "2 to 2", "3 to 3"}


@pytest.mark.slow
def test_megatron(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    output = run(["bash", "-e", "-c", block("python examples/")], tmp_path)
    assert "linear_qkv.weight" in output and "Pion: q 1 of 64x64" in output
    losses = [float(loss) for loss in re.findall(r"lm loss: (\S+)", output)]
    # From 256 equally likely bytes, log 256 = 5.5, to less than their frequencies say.
    assert len(losses) == 5 and losses[0] > 5.3 and losses[-1] < 3.5
