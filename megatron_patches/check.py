"""``python -m megatron_patches.check``: whether the installed Megatron fits, seam by seam."""

from __future__ import annotations

import importlib
import sys

from . import seams
from .registration import apply


def main() -> None:
    """Print what fits; end with status 1 and the reason if ``--optimizer pion`` cannot be had."""
    try:
        print(f"megatron-core {seams.megatron_version()}")
        if not seams.has_training():
            print("no megatron.training: megatron-core alone, for scripts with their own arguments")
        found = seams.checked()
        for seam, what in found:
            fits = f"fits: {seam.module}.{seam.name}"
            print(fits if what is None else f"MISSING: {what} ({seam.why})")
        if any(what is not None for _, what in found):
            sys.exit("this Megatron lacks what is MISSING above; megatron-core 0.19.2 has it")
        apply()
    except seams.SeamError as error:
        sys.exit(f"{error}")
    adam = importlib.import_module("megatron.core.optimizer").Adam
    print(f"Adam, for what is not Pion's: {adam.__module__}.{adam.__qualname__}")


if __name__ == "__main__":
    main()
