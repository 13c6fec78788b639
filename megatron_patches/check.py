"""``python -m megatron_patches.check``: whether the installed Megatron fits, seam by seam."""

from __future__ import annotations

import importlib
import sys

import torch

from . import cpu_device, seams
from .registration import apply


def main() -> None:
    """Print what fits; end with status 1 and the reason if ``--optimizer pion`` cannot be had."""
    cpu = not torch.cuda.is_available()
    if cpu:  # which hides Transformer Engine
        cpu_device.install()
    try:
        print(f"megatron-core {seams.megatron_version()}")
        if not seams.has_training():
            print("no megatron.training: megatron-core alone, for scripts with their own arguments")
        checks = [(seam, seam.check()) for seam in seams.needed()]
        for seam, what in checks:
            fits = f"fits: {seam.module}.{seam.name}"
            print(fits if what is None else f"MISSING: {what} ({seam.why})")
        if any(what is not None for _, what in checks):
            sys.exit("this Megatron lacks what is MISSING above; megatron-core 0.19.2 has it")
        if cpu:
            cpu_device.patch_megatron()
        apply()
    except seams.SeamError as error:
        sys.exit(f"{error}")
    adam = importlib.import_module("megatron.core.optimizer").Adam
    how = ", with --cpu" if cpu else ""
    print(f"Adam, for what is not Pion's: {adam.__module__}.{adam.__qualname__}{how}")


if __name__ == "__main__":
    main()
