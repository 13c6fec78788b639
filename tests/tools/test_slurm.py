"""Jobs of examples/slurm/ on two nodes train one node's run, requeue, and fail with a rank."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from megatron_runs import MODEL, NO_DROPOUT, PION, ROOT, environment, launch
from slurm_job import STEP, STEPS, WAITS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("TEST_SLURM" not in os.environ, reason="make test-slurm runs it"),
]

# TP within a node and DP between them: with 4 ranks both the same for both scripts.
LAYOUT = ["--tensor-model-parallel-size", "2", "--micro-batch-size", "4"]
ITERATIONS = 8
FLAGS = [*PION, *NO_DROPOUT, *LAYOUT, "--train-iters", str(ITERATIONS)]
JOB = ROOT / "tests" / "support" / "slurm_job.py"
# sbatch options that stand in the script's block, for the small nodes here.
ONE_NODE = ["--gpus-per-node=2", "--cpus-per-task=1"]
SCRIPTS = {
    "multi_node_srun": [*ONE_NODE, "--ntasks-per-node=2"],
    "multi_node_torchrun": ONE_NODE,
    "single_node": ONE_NODE,
}
MULTI_NODE = ["multi_node_srun", "multi_node_torchrun"]


def slurm(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def data_flags(corpus: Path) -> list[str]:
    return ["--data-path", str(corpus), "--data-cache-path", str(corpus.parent / "cache")]


def steps(log: str) -> list[Any]:
    """Iteration, loss and grad norm in full, of one launch after the other.

    Not those that Megatron prints: there the second loss of a launch is the mean of its first two.
    """
    return [step for line in re.findall(f"{STEPS}(.*)", log) for step in json.loads(line)]


@dataclass(frozen=True)
class Job:
    number: str
    folder: Path

    @property
    def log(self) -> str:
        file = self.folder / f"pion-{self.number}.log"
        return file.read_text(errors="replace") if file.exists() else ""

    def shown(self, field: str) -> str:
        text = slurm("scontrol", "show", "job", self.number)
        return re.search(rf"\b{field}=(\S*)", text)[1]

    def wait(self, *states: str, log: str = "", times: int = 1) -> str:
        """Wait for one of these states and so many lines in the log; return the state."""
        end = time.monotonic() + 400
        while time.monotonic() < end:
            state = self.shown("JobState")
            if state in states and self.log.count(log) >= times:
                return state
            assert state not in {"FAILED", "CANCELLED", "TIMEOUT"} - set(states), self.log[-8000:]
            time.sleep(0.2)
        raise AssertionError(f"job {self.number} is {state}: {self.log[-8000:]}")


class Cluster:
    def __init__(self, corpus: Path, folder: Path) -> None:
        self.corpus = corpus
        self.folder = folder

    def submit(self, name: str, *arguments: str) -> Job:
        script = ROOT / "examples" / "slurm" / f"{name}.sbatch"
        options = ["--parsable", f"--chdir={self.folder}", *SCRIPTS[name]]
        arguments = ("--cpu", str(JOB), *arguments, *MODEL, *data_flags(self.corpus), *FLAGS)
        # gloo asks for the host's address, which not every host's name has.
        env = {**environment(), "GLOO_SOCKET_IFNAME": "lo"}
        command = ["sbatch", *options, str(script), *arguments]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
        return Job(done.stdout.strip(), self.folder)


@pytest.fixture
def cluster(corpus: Path, tmp_path: Path) -> Cluster:
    return Cluster(corpus, tmp_path)


@pytest.fixture(scope="module")
def undisturbed(corpus: Path) -> list[Any]:
    """The same layout's run without SLURM."""
    trained = steps(launch(JOB, "nothing", *MODEL, *data_flags(corpus), *FLAGS, processes=4))
    assert [step[0] for step in trained] == list(range(1, ITERATIONS + 1))
    return trained


@pytest.mark.parametrize("name", MULTI_NODE)
def test_two_nodes_train_the_run_of_one(
    cluster: Cluster, undisturbed: list[Any], name: str
) -> None:
    job = cluster.submit(name, "nothing")
    job.wait("COMPLETED")
    assert job.shown("NumNodes") == "2"
    assert job.log.count("launch: 4 ranks by") == 1
    assert steps(job.log) == undisturbed


@pytest.mark.parametrize("name", MULTI_NODE)
def test_a_job_that_gets_usr1_goes_on_where_it_was(
    cluster: Cluster, undisturbed: list[Any], name: str
) -> None:
    folder = str(cluster.folder / "checkpoint")
    keep = ["--save", folder, "--load", folder, "--ckpt-format", "torch_dist"]
    keep += ["--save-interval", "1000"]  # which Megatron wants; never comes
    job = cluster.submit(name, "stop", *keep)
    job.wait("RUNNING", log=WAITS, times=4)
    slurm("scancel", "--batch", "--signal=USR1", job.number)
    job.wait("PENDING")
    # SLURM would have it wait for two minutes.
    slurm("scontrol", "update", f"JobId={job.number}", "StartTime=now")
    job.wait("COMPLETED")
    assert job.shown("Restarts") == "1"
    # STEP is the last before the checkpoint: no step is missing, and none was done twice.
    assert f"successfully saved checkpoint from iteration {STEP:7}" in job.log
    assert steps(job.log) == undisturbed


@pytest.mark.parametrize("name", ["multi_node_srun", "single_node"])
def test_a_failing_rank_fails_the_job_with_its_message(cluster: Cluster, name: str) -> None:
    job = cluster.submit(name, "raise")
    assert job.wait("COMPLETED", "FAILED") == "FAILED"
    assert job.shown("ExitCode") != "0:0"
    assert "[rank1]: ArithmeticError: rank 1 cannot go on" in job.log
    assert f"iteration {STEP - 1:8}/" in job.log and f"iteration {STEP:8}/" not in job.log
