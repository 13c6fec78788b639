"""The launcher finds the rank that torchrun, SLURM or MPI gave, and refuses contradictions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from megatron_runs import LIMIT_S, MODEL, NO_DROPOUT, PION, ROOT, SCRIPT, environment, launch, steps

from megatron_patches import LaunchError
from megatron_patches.launch import (
    Launch,
    first_node,
    of_environment,
    of_slurm,
    source,
    tasks_per_node,
)

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "gpu07",
    "MASTER_PORT": "29400",
    "TORCHELASTIC_RUN_ID": "none",
}
# The same set by somebody else.
BY_HAND = {name: value for name, value in TORCHRUN.items() if name != "TORCHELASTIC_RUN_ID"}
# What SLURM 22.05 sets in a batch script, and what else in a task of srun's (measured).
BATCH = {
    "SLURM_JOB_ID": "4711",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
TASK = {
    **BATCH,
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}
PMI2 = {"PMI_RANK": "5", "PMI_SIZE": "8"}  # srun --mpi=pmi2 sets its own numbers
MPICH = {"PMI_RANK": "2", "PMI_SIZE": "16"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "16", "PMIX_RANK": "2"}


def changed(env: dict[str, str], *without: str, **values: str) -> dict[str, str]:
    return {name: value for name, value in env.items() if name not in without} | values


@pytest.mark.parametrize(
    ("expected", "env"),
    [
        (None, {}),
        (None, {"MASTER_ADDR": "a", "MASTER_PORT": "1"}),
        (None, changed(BATCH, SLURM_NTASKS="1")),
        (None, changed(BATCH, "SLURM_NTASKS")),
        ("SLURM", TASK | {"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": ""}),
        ("environment", TORCHRUN),
        ("environment", BATCH | TORCHRUN),  # torchrun in a batch script
        ("environment", TASK | TORCHRUN),  # and in a task
        ("environment", MPICH | TORCHRUN),
        ("SLURM", TASK),
        ("SLURM", TASK | PMI2),
        ("SLURM", TASK | {"PMIX_RANK": "5"}),  # srun --mpi=pmix
        ("MPI", MPICH),
        ("MPI", OPEN_MPI),
        ("MPI", BATCH | MPICH),  # mpirun in a batch script
        ("MPI", TASK | MPICH),  # and of a helper that srun started
        ("MPI", TASK | OPEN_MPI),
    ],
)
def test_whose_variables_count(expected: str | None, env: dict[str, str]) -> None:
    assert source(env) == expected


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "0"}, "RANK is set, but not WORLD_SIZE and LOCAL_RANK: unset RANK, WORLD_SIZE"),
        (TASK | {"WORLD_SIZE": "8"}, "WORLD_SIZE is set, but not RANK and LOCAL_RANK: unset"),
        (TORCHRUN | {"RANK": ""}, "WORLD_SIZE and LOCAL_RANK is set, but not RANK: unset RANK"),
        (BATCH, "SLURM_NTASKS=8, but srun did not start this process"),
        # --nodes=2 alone
        ({"SLURM_JOB_ID": "4711", "SLURM_NNODES": "2"}, "SLURM_NNODES=2, but srun did not start"),
        # salloc's shell, a step itself
        (changed(BATCH, SLURM_STEP_ID="4294967290"), "but srun did not start this process"),
        (changed(BATCH, SLURM_NTASKS="many"), "SLURM_NTASKS='many' is not a number"),
    ],
)
def test_half_an_environment_is_refused(env: dict[str, str], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        source(env)


def test_torchruns_variables_stay() -> None:
    discovered = of_environment(BATCH | TORCHRUN)
    assert discovered == Launch("torchrun", 5, 8, 1, 4, "gpu07", 29400)
    assert discovered.variables.items() <= TORCHRUN.items()


def test_one_process_by_hand_needs_no_address() -> None:
    discovered = of_environment({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})
    assert discovered == Launch("the environment", 0, 1, 0, None, "127.0.0.1", 0)
    assert "LOCAL_WORLD_SIZE" not in discovered.variables


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (changed(TORCHRUN, RANK="8"), "torchrun's variables say RANK=8, WORLD_SIZE=8, .* below"),
        (changed(TORCHRUN, LOCAL_RANK="4"), "LOCAL_RANK=4, LOCAL_WORLD_SIZE=4"),
        (changed(TORCHRUN, "LOCAL_WORLD_SIZE", LOCAL_RANK="8"), "WORLD_SIZE=8, LOCAL_RANK=8"),
        (changed(TORCHRUN, LOCAL_WORLD_SIZE="16"), "WORLD_SIZE=8, .* LOCAL_WORLD_SIZE=16"),
        (changed(BY_HAND, RANK="-1"), "RANK='-1' is not a number"),
        (changed(TORCHRUN, "MASTER_ADDR"), "WORLD_SIZE=8, but not MASTER_ADDR"),
        (changed(TORCHRUN, MASTER_ADDR=""), "WORLD_SIZE=8, but not MASTER_ADDR"),
        (changed(TORCHRUN, MASTER_PORT="0"), "MASTER_PORT=0: set one from 1 to 65535"),
        # One exported rank for all tasks of srun's or mpirun's.
        (TASK | changed(BY_HAND, RANK="0"), "RANK=0 and .* but SLURM_PROCID=5 and SLURM_NTASKS=8"),
        (TASK | changed(BY_HAND, RANK="0", WORLD_SIZE="4"), "WORLD_SIZE=4, but SLURM_PROCID=5"),
        (BY_HAND | MPICH, "WORLD_SIZE=8, but PMI_RANK=2 and PMI_SIZE=16: unset RANK"),
        (BY_HAND | OPEN_MPI, "WORLD_SIZE=8, but OMPI_COMM_WORLD_RANK=2"),
    ],
)
def test_a_contradiction_is_refused(env: dict[str, str], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        of_environment(env)


@pytest.mark.parametrize(
    "env",
    [
        TASK | BY_HAND,  # somebody has set what srun says too
        changed(TASK, SLURM_NTASKS="2", SLURM_PROCID="1") | BY_HAND,  # a launcher in each
        BATCH | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
        changed(TASK, SLURM_NTASKS="2", SLURM_PROCID="0") | BY_HAND | changed(PMI2, PMI_SIZE="8"),
    ],
)
def test_what_only_looks_like_a_contradiction_is_not_refused(env: dict[str, str]) -> None:
    assert of_environment(env).source == "the environment"


def test_a_task_of_sruns() -> None:
    assert of_slurm(TASK) == Launch("SLURM", 5, 8, 1, 4, "gpu07", 24711)
    assert of_slurm(changed(TASK, SLURM_STEP_ID="2", SLURM_JOB_ID="14711")).port == 26711
    given = of_slurm(TASK | {"MASTER_ADDR": "login1", "MASTER_PORT": "29400"})
    assert (given.address, given.port) == ("login1", 29400)
    one_node = changed(TASK, SLURM_NODEID="0", SLURM_STEP_TASKS_PER_NODE="8")
    assert of_slurm(one_node) == Launch("SLURM", 5, 8, 1, 8, "127.0.0.1", 24711)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (changed(TASK, "SLURM_LOCALID"), "SLURM_STEP_ID is set, but not SLURM_LOCALID: pass on"),
        (changed(TASK, MASTER_PORT="0"), "MASTER_PORT=0"),
        (changed(TASK, SLURM_NODEID="2"), "SLURM_NODEID=2, .*TASKS_PER_NODE=4.x2.: pass on"),
        (changed(TASK, SLURM_NTASKS="6"), "SLURM_NTASKS=6, but SLURM_STEP_TASKS_PER_NODE=4"),
        (changed(TASK, SLURM_PROCID="8"), "SLURM's variables say RANK=8, WORLD_SIZE=8"),
        (changed(TASK, CUDA_VISIBLE_DEVICES="3"), "CUDA_VISIBLE_DEVICES=3 in one of 4 tasks"),
    ],
)
def test_a_task_that_cannot_start_is_refused(env: dict[str, str], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        of_slurm(env)


def test_slurms_short_forms() -> None:
    lists = ["n1", "n1,n2", "gpu[07-09,12],login1", "a,b[1-2]", "rack[1-2]n[03,05],x"]
    assert [*map(first_node, lists)] == ["n1", "n1", "gpu07", "a", "rack1n03"]
    assert tasks_per_node("4(x2),1") == [4, 4, 1]
    assert tasks_per_node("2,3(x3)") == [2, 3, 3, 3]


def mpirun(*command: str) -> subprocess.CompletedProcess[str]:
    """Python on 4 ranks."""
    # The one that the wheel brings, of the same MPI that mpi4py takes from there.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        ["mpirun", "-n", "4", sys.executable, *command],
        env={**environment(), "PATH": path},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )


@pytest.mark.slow
def test_ranks_of_mpirun_train_the_run_of_torchruns(corpus: Path) -> None:
    flags = [*PION, *NO_DROPOUT, "--tensor-model-parallel-size", "2", "--train-iters", "10"]
    data = ["--data-path", str(corpus), "--data-cache-path", str(corpus.parent / "cache")]
    launched = ("-m", "megatron_patches", "--cpu", str(SCRIPT))
    done = mpirun(*launched, *MODEL, *data, *flags)
    assert done.returncode == 0, done.stderr[-8000:]
    assert done.stdout.count("launch: 4 ranks by MPI's variables") == 1
    assert steps(done.stdout) == steps(launch(SCRIPT, *MODEL, *data, *flags, processes=4))


@pytest.mark.slow
def test_a_rank_of_mpiruns_that_raises_ends_the_others(tmp_path: Path) -> None:
    script = tmp_path / "raises.py"
    script.write_text(
        "import time\n"
        "from megatron_patches import set_ranks\n"
        "if set_ranks().rank == 2:\n"
        "    raise ArithmeticError('rank 2 cannot go on')\n"
        "time.sleep(600)\n"  # longer than mpirun is given
    )
    done = mpirun(str(script))
    assert done.returncode != 0 and "ArithmeticError: rank 2 cannot go on" in done.stderr


@pytest.mark.parametrize(
    ("env", "said", "raised"),
    [
        ({}, "launch: 1 rank by nobody's variables\n", ""),
        (MPICH, "", "LaunchError: mpirun started this process, but mpi4py is missing"),
    ],
)
def test_mpi4py_is_imported_only_under_mpirun(env: dict[str, str], said: str, raised: str) -> None:
    program = (
        "import sys\n"
        "sys.modules['mpi4py'] = None\n"  # an import raises
        "from megatron_patches import set_ranks\n"
        "assert set_ranks() is set_ranks()\n"
        "from torch import distributed\n"
        "distributed.init_process_group('gloo')\n"
        "assert distributed.get_world_size() == 1\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment() | env, capture_output=True, text=True)
    assert done.stdout == said and raised in done.stderr
    assert (done.returncode == 0) is (raised == "")
