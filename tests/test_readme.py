"""The README's commands work as they are written."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def block(start: str) -> str:
    (found,) = (text for _, text in BLOCKS if text.startswith(start))
    return found


def run(command: list[str], folder: Path) -> str:
    # Also the torchrun and python of this environment.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_plain_pytorch() -> None:
    exec(compile(block("import torch"), "README.md", "exec"), {})


@pytest.mark.slow
def test_megatron(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    output = run(["bash", "-e", "-c", block("python examples/")], tmp_path)
    assert "linear_qkv.weight" in output and "Pion: q 1 of 64x64" in output
    losses = [float(loss) for loss in re.findall(r"lm loss: (\S+)", output)]
    # From 256 equally likely bytes, log 256 = 5.5, to less than their frequencies say.
    assert len(losses) == 5 and losses[0] > 5.3 and losses[-1] < 3.5
