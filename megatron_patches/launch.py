"""Which rank this process is, as torchrun, srun or mpirun says; set for Megatron.

``set_ranks`` is for any script. ``source``, ``of_environment`` and ``of_slurm`` are functions of an
environment alone; a variable that is empty counts as not set.
"""

from __future__ import annotations

import atexit
import functools
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

Environment = Mapping[str, str]
Source = Literal["environment", "SLURM", "MPI"]

RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
LOCAL_SIZE = "LOCAL_WORLD_SIZE"
# A process's number and how many there are: of Open MPI's mpirun, and of MPICH's and srun's PMI.
MPI_RANKS = (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE"))
SLURM_RANKS = ("SLURM_PROCID", "SLURM_NTASKS")
# From here on SLURM's numbers stand for what is no task: the shell of salloc, a batch script.
NO_STEP = 0xFFFFFFFA

INSTALL_MPI = "in pion_dist's folder, pip install -e '.[mpi]'"
AS_TORCHRUN = f"unset {', '.join(RANKS)} to have them found, or set all that torchrun sets"


class LaunchError(RuntimeError):
    """The environment does not say which rank this process is.

    The message names the variable and the fix.
    """


@dataclass(frozen=True)
class Launch:
    """The rank of this process, and where the ranks meet.

    Attributes:
        source: whose variables said so, for the log.
        rank, size: this process and the number of all.
        local_rank, local_size: likewise on this node; the size is None where nobody has said it.
        address, port: where rank 0 waits for the others.
    """

    source: str
    rank: int
    size: int
    local_rank: int
    local_size: int | None
    address: str
    port: int

    def __post_init__(self) -> None:
        local_size = self.size if self.local_size is None else self.local_size
        if not (self.rank < self.size and self.local_rank < local_size <= self.size):
            said = ", ".join(f"{name}={value}" for name, value in self.variables.items())
            raise LaunchError(
                f"{self.source}'s variables say {said}: ranks count from 0 and are below their "
                "number, on a node and in all"
            )

    @property
    def variables(self) -> dict[str, str]:
        """As torchrun sets them."""
        values = {
            "RANK": self.rank,
            "WORLD_SIZE": self.size,
            "LOCAL_RANK": self.local_rank,
            LOCAL_SIZE: self.local_size,
            "MASTER_ADDR": self.address,
            "MASTER_PORT": self.port,
        }
        return {name: str(value) for name, value in values.items() if value is not None}


@functools.cache  # what it sets is itself an environment
def set_ranks() -> Launch:
    """Find this process's rank and set what Megatron reads of it in ``os.environ``.

    torchrun's variables win, then srun's, then mpirun's, whose processes must all call this; else
    this process is the only rank. Rank 0 prints one line. Call this before anything initialises
    torch.distributed; twice does no harm.

    Raises:
        LaunchError: the environment is half set, contradicts itself, or MPI cannot be used.
    """
    match source(os.environ):
        case None:
            launch = Launch("nobody", 0, 1, 0, 1, "127.0.0.1", 0)
        case "environment":
            launch = of_environment(os.environ)
        case "SLURM":
            launch = of_slurm(os.environ)
            launch = replace(launch, address=resolved(launch.address))
        case "MPI":
            launch = of_mpi(os.environ)
    os.environ.update(launch.variables)
    if launch.rank == 0:
        ranks, where = "1 rank", ""
        if launch.size > 1:
            ranks = f"{launch.size} ranks"
            where = f", meeting at {launch.address}, port {launch.port}"
        print(f"launch: {ranks} by {launch.source}'s variables{where}", flush=True)
    return launch


def source(env: Environment) -> Source | None:
    """Whose variables say which rank this process is; None if it was started by itself.

    Raises:
        LaunchError: torchrun's are half set, or this is one process where SLURM gave room for more.
    """
    if given := [name for name in RANKS if env.get(name)]:
        _need(env, RANKS, f"{' and '.join(given)} is set", AS_TORCHRUN)
        return "environment"
    if _is_task(env) and not _started_by_mpirun(env):
        return "SLURM"
    if "PMIX_RANK" in env or any(rank in env for rank, _ in MPI_RANKS):
        return "MPI"
    for name in ("SLURM_NTASKS", "SLURM_NNODES"):
        if "SLURM_JOB_ID" in env and _number(env, name, "1") > 1:
            raise LaunchError(
                f"{name}={env[name]}, but srun did not start this process: it would be one rank "
                "alone. Put srun before the command, or 'srun -N 1 -n 1' if one is meant"
            )
    return None


def of_environment(env: Environment) -> Launch:
    """What torchrun, or whoever sets the same variables, says.

    Raises:
        LaunchError: they contradict each other, or what srun or mpirun says.
    """
    rank, size, local = (_number(env, name) for name in RANKS)
    local_size = _number(env, LOCAL_SIZE) if env.get(LOCAL_SIZE) else None
    if size > 1:
        _need(env, ("MASTER_ADDR", "MASTER_PORT"), f"WORLD_SIZE={size}", AS_TORCHRUN)
    by_torchrun = "TORCHELASTIC_RUN_ID" in env
    if not by_torchrun:  # which may well be one task of srun's, and has ranks of its own
        _compare(env, rank, size)
    return Launch(
        "torchrun" if by_torchrun else "the environment",
        rank,
        size,
        local,
        local_size,
        env.get("MASTER_ADDR") or "127.0.0.1",
        _port(env, "0", at_least=int(size > 1)),
    )


def of_slurm(env: Environment) -> Launch:
    """What srun says to one of its tasks. The address may be a node's name that only SLURM knows.

    Raises:
        LaunchError: a variable is missing, they contradict each other, or the task does not see a
            GPU for each of its node's.
    """
    names = (*SLURM_RANKS, "SLURM_LOCALID", "SLURM_NODEID")
    lists = ("SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE")
    fix = "pass on all that srun sets"
    _need(env, (*names, "SLURM_JOB_ID", *lists), "SLURM_STEP_ID is set", fix)
    rank, size, local, node = (_number(env, name) for name in names)
    tasks = tasks_per_node(env["SLURM_STEP_TASKS_PER_NODE"])
    if node >= len(tasks) or sum(tasks) != size:
        given = ", ".join(f"{name}={env[name]}" for name in ("SLURM_NODEID", "SLURM_NTASKS"))
        raise LaunchError(f"{given}, but SLURM_STEP_TASKS_PER_NODE={env[lists[1]]}: {fix}")
    # Megatron takes the GPU number LOCAL_RANK.
    devices = list(filter(None, env.get("CUDA_VISIBLE_DEVICES", "").split(",")))
    if 0 < len(devices) < tasks[node]:
        raise LaunchError(
            f"CUDA_VISIBLE_DEVICES={','.join(devices)} in one of {tasks[node]} tasks on a node, "
            "each of which takes the GPU of its number: ask for --gpus-per-node instead of "
            "--gpus-per-task, and --gpu-bind none"
        )
    address = first_node(env["SLURM_STEP_NODELIST"]) if len(tasks) > 1 else "127.0.0.1"
    # The same in every task, another for the next step and job, below what systems hand out.
    port = 20000 + (_number(env, "SLURM_JOB_ID") + 1000 * _number(env, "SLURM_STEP_ID")) % 10000
    return Launch(
        "SLURM",
        rank,
        size,
        local,
        tasks[node],
        env.get("MASTER_ADDR") or address,
        _port(env, str(port), at_least=1),
    )


def first_node(nodes: str) -> str:
    """The first of SLURM's list of nodes: gpu07 of gpu[07-09,12],login1."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]  # at a comma that is outside brackets
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def tasks_per_node(text: str) -> list[int]:
    """SLURM's short form, 4(x2),1, as a number for each node."""
    runs = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, nodes in runs for _ in range(int(nodes or 1))]


def resolved(node: str) -> str:
    """A node's name, or its address from SLURM where the name does not resolve.

    Raises:
        LaunchError: neither is to be had.
    """
    try:
        socket.getaddrinfo(node, None)
        return node
    except OSError:
        command = ["scontrol", "show", "node", node]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        shown = str(error)
    if (match := re.search(r"\bNodeAddr=(\S+)", shown)) is None:
        raise LaunchError(f"the first node, {node}, does not resolve: set MASTER_ADDR to it")
    return match[1]


_store: Any = None  # rank 0's under MPI, which has to stay for as long as the process does


def of_mpi(env: Environment) -> Launch:
    """What mpirun's MPI says. Every process has to call it. MPI has ended when it returns.

    Rank 0 opens a port that nobody else has and keeps it: torch.distributed's own store joins the
    one that has the port already, where both are of the same process.

    Raises:
        LaunchError: mpi4py or its library is missing, or is not that of mpirun.
    """
    global _store
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise LaunchError(
            f"mpirun started this process, but mpi4py is missing ({error}): {INSTALL_MPI}"
        ) from error
    except RuntimeError as error:  # which mpi4py raises where it finds no library
        raise LaunchError(
            f"mpi4py found no MPI library ({error}): {INSTALL_MPI}, or load the module of the MPI "
            "whose mpirun this is"
        ) from error
    world = MPI.COMM_WORLD
    rank, size = world.Get_rank(), world.Get_size()
    for _, name in MPI_RANKS:
        if env.get(name, str(size)) != str(size):
            raise LaunchError(
                f"{name}={env[name]}, but mpi4py sees {size}: its MPI library is not that of this "
                "mpirun. Use the mpirun of the same MPI, or build mpi4py with this one"
            )
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    local, local_size = node.Get_rank(), node.Get_size()
    where: Any = None
    if rank == 0:
        address = "127.0.0.1" if local_size == size else socket.gethostname()
        address, port = env.get("MASTER_ADDR") or address, 0
        try:
            port = _port(env, "0", at_least=0)
            _store = _open_store(address, port)
            where = (address, _store.port)
        except (OSError, RuntimeError) as error:  # the others wait for what is said below
            where = LaunchError(f"rank 0 cannot open {address}, port {port}: {error}")
    where = world.bcast(where)
    # Not at exit, where a rank that has raised would wait for the others.
    MPI.Finalize()
    atexit.register(_end_all_if_raised)
    if isinstance(where, LaunchError):
        raise where
    return Launch("MPI", rank, size, local, local_size, *where)


def _end_all_if_raised() -> None:
    """Let mpirun end the others: MPICH's sees to that for a signal, but not for an exit status."""
    if hasattr(sys, "last_exc"):
        sys.stdout.flush()
        sys.stderr.flush()
        os.kill(os.getpid(), signal.SIGKILL)


def _open_store(address: str, port: int) -> Any:
    from torch import distributed

    return distributed.TCPStore(  # type: ignore[attr-defined]
        address, port, is_master=True, wait_for_workers=False, multi_tenant=True
    )


def _is_task(env: Environment) -> bool:
    step = env.get("SLURM_STEP_ID", "")
    return step.isdecimal() and int(step) < NO_STEP


def _started_by_mpirun(env: Environment) -> bool:
    """In a step: srun starts mpirun's helpers, one a node, and they the processes."""
    if MPI_RANKS[0][0] in env:
        return True
    # srun itself sets PMI's with --mpi=pmi2: the same numbers as its own.
    pmi = [env.get(name) for name in MPI_RANKS[1]]
    return None not in pmi and pmi != [env.get(name) for name in SLURM_RANKS]


def _compare(env: Environment, rank: int, size: int) -> None:
    """Refuse ranks that cannot be those of the processes which srun or mpirun started."""
    pairs = [*MPI_RANKS, *([SLURM_RANKS] if _is_task(env) else [])]
    for theirs in pairs:  # the innermost
        if all(name in env for name in theirs):
            number, count = (_number(env, name) for name in theirs)
            # More ranks than tasks is a launcher of its own on every node.
            if size < count or (size == count and rank != number):
                raise LaunchError(
                    f"RANK={rank} and WORLD_SIZE={size}, but {theirs[0]}={number} and "
                    f"{theirs[1]}={count}: {AS_TORCHRUN}"
                )
            return


def _need(env: Environment, names: tuple[str, ...], because: str, fix: str) -> None:
    if missing := [name for name in names if not env.get(name)]:
        raise LaunchError(f"{because}, but not {' and '.join(missing)}: {fix}")


def _port(env: Environment, default: str, *, at_least: int) -> int:
    port = _number(env, "MASTER_PORT", default)
    if not at_least <= port < 2**16:
        raise LaunchError(f"MASTER_PORT={port}: set one from {at_least} to 65535")
    return port


def _number(env: Environment, name: str, default: str | None = None) -> int:
    text = env[name] if default is None else env.get(name) or default
    if not text.isdecimal():
        raise LaunchError(f"{name}={text!r} is not a number: unset it or set it right")
    return int(text)
