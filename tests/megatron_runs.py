"""Real Megatron runs for the tests: a tiny byte-level GPT on real text, on CPU and gloo."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
MEGATRON_018 = ROOT / ".venv" / "megatron-0.18.2"  # `make test` puts it there
SCRIPT = ROOT / "examples" / "pretrain_bytes.py"

MODEL = [
    *("--num-layers", "4", "--hidden-size", "64", "--ffn-hidden-size", "96", "--swiglu"),
    *("--num-attention-heads", "4", "--group-query-attention", "--num-query-groups", "2"),
    *("--seq-length", "64", "--max-position-embeddings", "64", "--position-embedding-type", "rope"),
    *("--normalization", "RMSNorm", "--disable-bias-linear"),
    *("--untie-embeddings-and-output-weights",),
    *("--micro-batch-size", "2", "--global-batch-size", "8", "--clip-grad", "1.0"),
    *("--lr", "1e-2", "--min-lr", "1e-3", "--lr-decay-style", "cosine", "--train-iters", "20"),
    *("--eval-iters", "0", "--eval-interval", "1000", "--log-interval", "1", "--num-workers", "0"),
    *("--tokenizer-type", "NullTokenizer", "--vocab-size", "256", "--null-tokenizer-eod-id", "0"),
    *("--make-vocab-size-divisible-by", "64", "--split", "9,1,0"),
    *("--transformer-impl", "local", "--distributed-backend", "gloo"),
    *("--no-gradient-accumulation-fusion", "--no-masked-softmax-fusion", "--no-rope-fusion"),
    *("--no-persist-layer-norm", "--no-bias-swiglu-fusion", "--no-bias-gelu-fusion"),
    *("--no-bias-dropout-fusion", "--no-create-attention-mask-in-dataloader"),
]
NO_DROPOUT = ["--attention-dropout", "0", "--hidden-dropout", "0"]
PION = ["--optimizer", "pion", "--pion-init", "fan_in"]

_STEP = re.compile(r"iteration +(\d+)/.*lm loss: (\S+) .*grad norm: (\S+) ")


@dataclass(frozen=True)
class Step:
    """An iteration as Megatron prints it."""

    iteration: int
    loss: str
    grad_norm: str


def environment(*first: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    paths = [*map(str, first), str(ROOT), os.environ.get("PYTHONPATH")]
    path = os.pathsep.join(filter(None, paths))
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": path}


def launch(script: Path, *arguments: str, processes: int = 1, before: tuple[Path, ...] = ()) -> str:
    """Run a script through the launcher on the CPU, with folders before the installed packages.

    Raises:
        AssertionError: it failed; with the end of what it printed.
    """
    python = [sys.executable]
    if processes > 1:
        python += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        python += [str(processes)]
    command = [*python, "-m", "megatron_patches", "--cpu", str(script), *arguments]
    done = subprocess.run(
        command, env=environment(*before), cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    output = done.stdout + done.stderr
    errors = "\n".join(line for line in output.splitlines() if "rror" in line)
    assert done.returncode == 0, f"{' '.join(command)}\n{errors[:3000]}\n...{output[-4000:]}"
    return output


def refused(script: Path, *arguments: str) -> str:
    """What a run that must be refused prints, before any training."""
    command = [sys.executable, "-m", "megatron_patches", "--cpu", str(script), *arguments]
    done = subprocess.run(
        command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0 and not steps(done.stdout), done.stdout[-2000:]
    return done.stdout + done.stderr


def train(corpus: Path, *flags: str, processes: int = 1) -> list[Step]:
    """Train the tiny GPT and return what Megatron printed."""
    data = ["--data-path", str(corpus), "--data-cache-path", str(corpus.parent / "cache")]
    found = steps(launch(SCRIPT, *MODEL, *data, *flags, processes=processes))
    assert found, "no iteration was printed"
    return found


def steps(output: str) -> list[Step]:
    return [Step(int(i), loss, norm) for i, loss, norm in _STEP.findall(output)]
