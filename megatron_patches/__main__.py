"""Run a Megatron training script, unedited, with ``--optimizer pion`` registered."""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path

from .launch import LaunchError, set_ranks
from .registration import apply
from .seams import SeamError


def main() -> None:
    """Parse the launcher's own arguments, patch Megatron, run the script as ``__main__``."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_patches",
        description="Run a Megatron training script, unedited, with --optimizer pion registered. "
        "Alone or started by srun, mpirun or torchrun, whose ranks it finds: "
        "torchrun --nproc-per-node 8 -m megatron_patches SCRIPT ...",
    )
    parser.add_argument(
        "--cpu", action="store_true", help="put Megatron on CPU and gloo instead of GPU and nccl"
    )
    parser.add_argument("script", type=Path, help="the training script, such as pretrain_gpt.py")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="the script's own arguments")
    options = parser.parse_args()
    if not options.script.is_file():
        parser.error(f"no such script: {options.script}")
    try:
        if options.cpu:
            from . import cpu_device

            cpu_device.install()
            cpu_device.patch_megatron()
        set_ranks()  # after --cpu has hidden the GPUs: it refuses a task that sees too few
        apply()
    except (LaunchError, SeamError) as error:
        sys.exit(f"python -m megatron_patches: {error}")
    sys.argv = [str(options.script), *options.args]
    sys.path.insert(0, str(options.script.resolve().parent))
    runpy.run_path(str(options.script), run_name="__main__")


if __name__ == "__main__":
    main()
