"""``python -m pion_dist.doctor``: what is installed here, whether it works, and what that means.

Every check is a program of its own, so that a package that crashes or hangs hides nothing else.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

# An import from a cold file system of a cluster takes minutes.
LIMIT_S = 300
ERROR_LINES = 6
AT_ONCE = 4  # programs that import torch, of half a GB each
ABSENT = 3  # exit status of a check whose package is not here
PYTHON = (3, 12)
WITHOUT_TRITON = "Pion works in torch operations; pip install triton for kernels on a GPU"
WITHOUT_EMERGING = "Megatron needs it for optimizers that are not Adam or SGD"
WITHOUT_TE = (
    "no FP8 and no context parallelism; Megatron needs --transformer-impl local and\n"
    "more: PLAIN_FLAGS in examples/megatron_job.py"
)
DRIFT = 1e-5  # in two steps: 3e-8 in float32 (measured); TF32 rounds by 2**-11


def need(module: str, meaning: str) -> None:
    """End the check of a package that is not here."""
    if find_spec(module) is None:
        print(meaning)
        sys.exit(ABSENT)


def check_python() -> None:
    """Python itself."""
    print(f"{platform.python_version()} at {sys.executable}, {platform.platform()}")
    if sys.version_info < PYTHON:
        raise RuntimeError(f"Megatron needs Python {PYTHON[0]}.{PYTHON[1]} or newer")


def check_torch() -> None:
    """Torch, CUDA, the GPUs and nccl."""
    need("torch", "all of this needs it")
    import torch

    from .update.precision import cpu_bf16_products

    print(f"{torch.__version__}, {built_for()}")
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        print(f"GPU {index}: {gpu.name}, compute capability {gpu.major}.{gpu.minor}, {memory}")
    if not torch.cuda.is_available():
        print("no GPU that torch can use: run with `python -m megatron_patches --cpu SCRIPT ...`")
        print(f"the CPU has {cpu_bf16_products()}")
    elif torch.cuda.get_device_capability() >= (8, 0):
        print("bf16 and TF32 products: --pion-matmul-precision bf16 (default with --bf16), high")


def built_for() -> str:
    """The CUDA and the nccl of this torch."""
    import torch

    if torch.version.cuda is None:
        return "built without CUDA: CPU only"
    nccl: Any = torch.cuda.nccl  # untyped
    return f"CUDA {torch.version.cuda}, nccl {'.'.join(map(str, nccl.version()))}"


def check_pion() -> None:
    """Two steps, one of each side, on the device that there is."""
    import torch

    from . import Pion
    from .kernels import backend
    from .spectrum import drift, singular_values

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    start, gradient = torch.randn(2, 96, 64, generator=generator).to(device)
    weight = torch.nn.Parameter(start.clone())
    weight.grad = gradient
    optimizer = Pion([weight], lr=1e-2)
    optimizer.step()
    optimizer.step()
    moved = drift(singular_values(start), singular_values(weight)).item()
    print(f"two steps on the {device.type} changed singular values by {moved:.0e} of their size")
    if not moved < DRIFT:
        raise RuntimeError(f"that is above {DRIFT:.0e}: products are not float32 here")
    if backend(device) == "triton":
        print("moments, skew parts and norms are computed in Triton")
    elif device.type == "cuda":
        print("moments, skew parts and norms are computed in torch: Triton is not installed")
    else:
        print("moments, skew parts and norms are computed in torch, as always without a GPU")


def check_import(module: str, meaning: str) -> None:
    """A package that only has to import."""
    need(module, meaning)
    importlib.import_module(module)
    print(version(module))


def check_megatron() -> None:
    """Megatron, seam by seam; by ``megatron_patches``, which knows them."""
    need("megatron", "Pion works in plain PyTorch; --optimizer pion is a flag of Megatron's")
    runpy.run_module("megatron_patches.check", run_name="__main__")


def check_transformer_engine() -> None:
    """Transformer Engine: a layer on a GPU; without one it imports and can do no more."""
    need("transformer_engine", WITHOUT_TE)
    import torch

    te = importlib.import_module("transformer_engine.pytorch")
    print(version("transformer-engine"))
    if not torch.cuda.is_available():
        print("imports, and cannot work without a GPU; --cpu hides it from Megatron, whose Adam")
        print("would else be Transformer Engine's and fail")
        return
    layer = te.Linear(64, 64, params_dtype=torch.bfloat16, device="cuda")
    layer(torch.ones(32, 64, dtype=torch.bfloat16, device="cuda")).sum().backward()
    print("a bf16 layer ran forward and backward")
    fp8, why = te.is_fp8_available(return_reason=True)
    print("FP8 is available" if fp8 else f"no FP8: {why}")


def check_apex() -> None:
    """Apex, told from the package of that name on the index, which is something else."""
    other = "; the installed `apex` is another package" if find_spec("apex") else ""
    need("amp_C", f"not needed: Megatron takes Adam from Transformer Engine, apex or torch{other}")
    for module in ("torch", "amp_C", "apex.multi_tensor_apply"):  # torch's libraries come first
        importlib.import_module(module)
    print("amp_C and apex.multi_tensor_apply import")


def check_mpi4py() -> None:
    """mpi4py with its library, not started: that can end a process which mpirun did not start."""
    need("mpi4py", "only to start ranks with mpirun: pip install -e '.[mpi]'")
    importlib.import_module("mpi4py").rc.initialize = False
    mpi = importlib.import_module("mpi4py.MPI")  # RuntimeError without libmpi
    print(f"{version('mpi4py')}, {mpi.Get_library_version().strip().splitlines()[0].strip()}")


def check_slurm() -> None:
    """SLURM's commands, and the job that this is in."""
    commands = [name for name in ("sbatch", "srun", "scontrol") if shutil.which(name)]
    job = os.environ.get("SLURM_JOB_ID")
    if not commands and job is None:
        print("only to start ranks with srun or sbatch")
        sys.exit(ABSENT)
    if commands:
        told = subprocess.run([commands[0], "--version"], capture_output=True, text=True)
        if told.returncode:  # without a slurm.conf
            raise RuntimeError(f"{commands[0]} --version: {told.stderr.strip()}")
        print(f"{told.stdout.strip()}: {', '.join(commands)}")
    if job is None:
        print("not in a job")
    else:
        step, tasks = os.environ.get("SLURM_STEP_ID"), os.environ.get("SLURM_NTASKS", "1")
        task = f"task {os.environ.get('SLURM_PROCID')} of {tasks}" if step else "no task of srun's"
        print(f"in job {job}, {task}")


@dataclass(frozen=True)
class Check:
    """A thing to look at.

    Attributes:
        what: its name in the report.
        run: prints what there is to say, and raises where it does not work.
        fix: what to do where it does not; of what ``--optimizer pion`` cannot run without.
    """

    what: str
    run: Callable[[], None]
    fix: str = ""

    @property
    def key(self) -> str:
        """Its name on the command line."""
        return self.what.lower().replace(" ", "-")


INSTALL = "pip install -e . -c constraints.txt in pion_dist's folder brings the tested one"
TRITON = partial(check_import, "triton", WITHOUT_TRITON)
EMERGING = partial(check_import, "emerging_optimizers", WITHOUT_EMERGING)
CHECKS = (
    Check("Python", check_python, "another Python, in a new environment"),
    Check("torch", check_torch, INSTALL),
    Check("Pion", check_pion, "it says why above"),
    Check("Triton", TRITON),
    Check("Megatron", check_megatron, INSTALL),
    Check("emerging-optimizers", EMERGING, INSTALL),
    Check("Transformer Engine", check_transformer_engine),
    Check("apex", check_apex),
    Check("mpi4py", check_mpi4py),
    Check("SLURM", check_slurm),
)


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        check: that found it.
        state: ok, absent or broken.
        lines: what there is to say.
    """

    check: Check
    state: str
    lines: list[str]

    @property
    def prevents(self) -> bool:
        """Whether ``--optimizer pion`` cannot run for it."""
        return bool(self.check.fix) and self.state != "ok"


def examine(check: Check) -> Finding:
    """Run a check and judge it by its exit status."""
    command = ["-m", "pion_dist.doctor", "--check", check.key]
    try:
        done = subprocess.run(
            [sys.executable, *command],
            env=os.environ | {"PYTHONWARNINGS": "ignore"},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        return Finding(check, "broken", [f"no answer within {LIMIT_S} s"])
    lines = done.stdout.splitlines()
    if done.returncode in (0, ABSENT):
        return Finding(check, "ok" if done.returncode == 0 else "absent", lines)
    lines += error_of(done.stderr)
    if done.returncode < 0:
        lines.append(f"crashed: signal {-done.returncode}")
    lines.append(f"all of it: python {' '.join(command)}")
    return Finding(check, "broken", lines)


def error_of(stderr: str) -> list[str]:
    """What was raised, without the traceback; else the last line."""
    lines = stderr.splitlines()
    frames = [number for number, line in enumerate(lines) if line.startswith('  File "')]
    after = range(frames[-1], len(lines)) if frames else ()
    raised = next((number for number in after if not lines[number].startswith(" ")), None)
    return lines[-1:] if raised is None else lines[raised : raised + ERROR_LINES]


def report(findings: list[Finding]) -> list[str]:
    """The findings as a text, and what follows from them."""
    text = []
    for each in findings:
        first, *more = each.lines or [""]
        text.append(f"{each.state:7} {each.check.what:20} {first}")
        text += [" " * 29 + line for line in more]
    lacks = [each for each in findings if each.prevents]
    text += ["", "`--optimizer pion` cannot run here:" if lacks else "`--optimizer pion` can run."]
    return text + [f"  {each.check.what} is {each.state}: {each.check.fix}" for each in lacks]


def main() -> None:
    """Print the report; exit status 1 if ``--optimizer pion`` could not run."""
    parser = argparse.ArgumentParser(
        prog="python -m pion_dist.doctor",
        description="Say what is installed here, whether it works, and what that means.",
    )
    checks = {check.key: check for check in CHECKS}
    parser.add_argument("--check", choices=checks, help="one check alone, in this process")
    options = parser.parse_args()
    if options.check:
        checks[options.check].run()
        return
    with ThreadPoolExecutor(AT_ONCE) as pool:
        findings = list(pool.map(examine, CHECKS))
    print("\n".join(report(findings)))
    sys.exit(any(each.prevents for each in findings))


if __name__ == "__main__":
    main()
