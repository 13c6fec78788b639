"""Real Megatron runs for the tests: a tiny byte-level GPT on real text, on CPU and gloo."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from reference import PUBLISHED

ROOT = Path(__file__).parents[2]
MEGATRON_018 = ROOT / ".venv" / "megatron-0.18.2"  # `make test` puts it there
SCRIPT = ROOT / "examples" / "pretrain_bytes.py"

# Seconds of a launch. It takes 10 to 60 alone; beside another on slow cores, several times as many.
LIMIT_S = 600

# 4 layers fill 2 pipeline stages of 2 chunks; of 8 heads TP 4 has whole query groups.
COMMON = [
    *("--num-layers", "4", "--hidden-size", "64", "--ffn-hidden-size", "96"),
    *("--num-attention-heads", "8", "--position-embedding-type", "rope"),
    *("--seq-length", "64", "--max-position-embeddings", "64"),
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
# Grouped queries and a gated MLP, no biases.
LLAMA = [
    *("--group-query-attention", "--num-query-groups", "4", "--swiglu"),
    *("--normalization", "RMSNorm", "--disable-bias-linear"),
]
MODEL = [*COMMON, *LLAMA]
NO_DROPOUT = ["--attention-dropout", "0", "--hidden-dropout", "0"]
PION = ["--optimizer", "pion"]
LAUNCHER = ("-m", "megatron_patches")
PUBLISHED_FLAGS = (
    *(f"--pion-{name}={value}" for name, value in PUBLISHED.items() if isinstance(value, str)),
    "--no-pion-nesterov",
)

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


def tool(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command of tools/, to its end."""
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / name), *arguments],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )


@dataclass(frozen=True)
class Launched:
    """A job that has ended.

    Attributes:
        code: its exit status.
        output: what it printed.
        left: names of processes that it left behind (killed since).
    """

    code: int
    output: str
    left: list[str]

    @property
    def why(self) -> str:
        """What the ranks raised, or else the end of what was printed."""
        ranks: dict[str, list[str]] = {}
        for line in self.output.splitlines():
            if match := re.match(r"\[rank(\d+)\]: ", line):
                ranks.setdefault(match[1], []).append(line)
        return "\n".join("\n".join(lines[-40:]) for lines in ranks.values()) or self.output[-8000:]


def run(
    script: Path,
    *arguments: str,
    processes: int = 1,
    before: tuple[Path, ...] = (),
    launcher: Sequence[str] = (*LAUNCHER, "--cpu"),
    timeout: float = LIMIT_S,
) -> Launched:
    """Run a script, through the launcher on the CPU, with folders before the installed packages.

    Raises:
        AssertionError: it does not end in time; with what it printed.
    """
    python = [sys.executable]
    if processes > 1:  # --standalone takes a free port
        python += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        python += [str(processes)]
    command = [*python, *launcher, str(script), *arguments]
    mark = uuid.uuid4().hex
    env = {**environment(*before), "PION_TEST_LAUNCH": mark}
    # Files, because a pipe stays open as long as an orphan has it.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        job = subprocess.Popen(command, env=env, cwd=ROOT, stdout=out, stderr=err)
        try:
            code: int | None = job.wait(timeout)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            left = end_marked(mark)
            job.wait()
        output = "".join(file.seek(0) or file.read() for file in (out, err))
    if code is None:
        raise AssertionError(f"not done in {timeout} s: {output[-8000:]}")
    return Launched(code, output, left)


def end_marked(mark: str) -> list[str]:
    """Kill a launch's processes that do not end by themselves; return what they were."""
    marked = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("PION_TEST_LAUNCH") == mark:
                marked.append(process)
    left = []
    for process in psutil.wait_procs(marked, timeout=3)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            left.append(" ".join(process.cmdline()))
            process.kill()
    return left


def launch(script: Path, *arguments: str, **options: Any) -> str:
    """As ``run``; what a job that succeeds prints.

    Raises:
        AssertionError: it failed, with the ranks' own tracebacks; or it left processes behind.
    """
    job = run(script, *arguments, **options)
    assert job.code == 0, f"{script.name} {' '.join(arguments)}\n{job.why}"
    assert not job.left, job.left
    return job.output


class Forks:
    """Runs of one process; see forked_runs.py, which is started with the first."""

    def __init__(self) -> None:
        self.server: subprocess.Popen[str] | None = None

    def run(self, *arguments: str) -> tuple[int, str]:
        """The exit status of ``python -m megatron_patches``, and what it printed.

        Raises:
            AssertionError: it does not end in time; with what it printed.
        """
        if self.server is None:
            self.server = self._start()
        assert self.server.stdin and self.server.stdout
        with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
            job = {"argv": arguments, "streams": [out.name, err.name]}
            print(json.dumps(job), file=self.server.stdin, flush=True)
            process = int(self.server.stdout.readline())
            late = threading.Timer(LIMIT_S, os.killpg, (process, signal.SIGKILL))
            late.start()
            code = int(self.server.stdout.readline())
            late.cancel()
            printed = out.read() + err.read()
        assert code != -signal.SIGKILL, f"not done in {LIMIT_S} s: {printed[-8000:]}"
        return code, printed

    def _start(self) -> subprocess.Popen[str]:
        server = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "support" / "forked_runs.py")],
            env=environment(),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(server.communicate)  # the end of its input is its own
        return server


FORKS = Forks()


def refused(script: Path, *arguments: str) -> str:
    """What a run that must be refused prints, before any training."""
    code, printed = FORKS.run("--cpu", str(script), *arguments)
    assert code != 0 and not steps(printed), printed[-2000:]
    return printed


def train(corpus: Path, *flags: str) -> list[Step]:
    """Train the tiny GPT in one process and return what Megatron printed."""
    data = ["--data-path", str(corpus), "--data-cache-path", str(corpus.parent / "cache")]
    code, printed = FORKS.run("--cpu", str(SCRIPT), *MODEL, *data, *flags)
    assert code == 0, printed[-8000:]
    trained = steps(printed)
    assert trained, "no iteration was printed"
    return trained


def steps(output: str) -> list[Step]:
    return [Step(int(i), loss, norm) for i, loss, norm in _STEP.findall(output)]
