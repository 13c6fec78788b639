"""Megatron's flags for a small machine, and how a training is launched and its log is read."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# What all Llamas have in common.
LLAMA_FLAGS = [
    *("--position-embedding-type", "rope", "--swiglu", "--normalization", "RMSNorm"),
    *("--disable-bias-linear", "--untie-embeddings-and-output-weights"),
    *("--attention-dropout", "0", "--hidden-dropout", "0"),
]
# Megatron alone, without Transformer Engine and apex: none of their fused kernels.
PLAIN_FLAGS = [
    *("--transformer-impl", "local", "--no-gradient-accumulation-fusion"),
    *("--no-masked-softmax-fusion", "--no-persist-layer-norm", "--no-rope-fusion"),
    *("--no-bias-swiglu-fusion", "--no-bias-gelu-fusion", "--no-bias-dropout-fusion"),
]
# torchrun's report of a failure: long, and not what failed.
AGENT = re.compile(r"[EW]\d{4} .*torch/distributed/elastic")
TAIL = 25  # lines of a log in an error


class JobError(Exception):
    """What went wrong and where to look, for the user."""


def threads(processes: int = 1) -> int:
    """For each of so many processes side by side."""
    # Many small matmuls: more than eight threads only wait for each other.
    return max(1, min(8, len(os.sched_getaffinity(0)) // processes))


def environment(processes: int = 1) -> dict[str, str]:
    """This process's, with what Megatron needs; torchrun tells more than one their ranks."""
    own = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    defaults = {
        "OMP_NUM_THREADS": str(threads(processes)),
        "OMP_WAIT_POLICY": "PASSIVE",  # spinning makes it 10 times slower when cores are shared
        "PYTHONWARNINGS": "ignore",
        "PYTHONUNBUFFERED": "1",
    }
    launch = defaults | {name: value for name, value in os.environ.items() if name not in own}
    if processes > 1:
        return launch
    one_process = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    # Port 0 is any free one: one that is chosen here may be taken before Megatron is there.
    return launch | one_process | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def launcher(processes: int = 1, *, cpu: bool) -> list[str]:
    """The command before the script."""
    python = [sys.executable]
    if processes > 1:  # --standalone takes a free port
        python += ["-m", "torch.distributed.run", "--standalone"]
        python += ["--nproc-per-node", str(processes)]
    return [*python, "-m", "megatron_patches", *(["--cpu"] if cpu else [])]


def lines_of(command: list[str], log: Path, *, processes: int = 1) -> Iterator[str]:
    """Run a command, yield its output line by line and keep it in the log.

    Raises:
        JobError: it failed; with what the ranks raised, or else the end of its log.
    """
    tail: deque[str] = deque(maxlen=TAIL)
    raised: deque[str] = deque(maxlen=TAIL)
    agent = False
    with (
        log.open("w") as file,
        subprocess.Popen(
            command,
            env=environment(processes),
            cwd=ROOT,
            text=True,
            errors="replace",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        ) as child,
    ):
        try:
            assert child.stdout is not None
            for line in child.stdout:
                file.write(line)
                agent = agent or AGENT.match(line) is not None
                if not agent:
                    tail.append(line)
                if line.startswith("[rank"):
                    raised.append(line)
                yield line
        except BaseException:
            child.terminate()  # not kill: torchrun ends its workers first
            raise
    if child.returncode:
        what = Path(command[1]).name if command[1] != "-m" else command[2]
        raise JobError(
            f"{what} ended with status {child.returncode}. The end of its log, {log}:\n\n"
            + "".join(raised or tail)
        )
