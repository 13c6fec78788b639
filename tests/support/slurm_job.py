"""Run through the launcher: examples/pretrain_bytes.py, in which something may happen.

    srun ... python -m megatron_patches --cpu tests/support/slurm_job.py nothing|stop|raise FLAGS...

Megatron is imported inside functions: a checkpoint's writer starts a process that imports this
file anew.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

STEP = 4
WAITS = "a rank waits for USR1"
STEPS = "steps: "


def wait_for_usr1() -> None:
    from megatron.training.global_vars import get_signal_handler

    print(WAITS, flush=True)
    end = time.monotonic() + 120
    while not get_signal_handler()._signal_received:
        if time.monotonic() > end:
            raise TimeoutError(f"no USR1 came to rank {os.environ['RANK']}")
        time.sleep(0.05)


def main(moment: str) -> None:
    from failing_run import before, complain
    from many_runs import watch_steps
    from pretrain_bytes import main as pretrain_bytes

    from pion_dist import Pion

    steps = watch_steps()
    if moment == "stop" and "SLURM_RESTART_COUNT" not in os.environ:
        before(Pion, "step", STEP, wait_for_usr1)
    elif moment == "raise" and os.environ["RANK"] == "1":
        before(Pion, "step", STEP, complain)
    try:
        pretrain_bytes()
    finally:  # Megatron ends with sys.exit where a signal came
        if os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
            printed = [(s["iteration"], s["losses"]["lm loss"], s["grad_norm"]) for s in steps]
            print(STEPS + json.dumps(printed), flush=True)


if __name__ == "__main__":
    main(sys.argv.pop(1))
