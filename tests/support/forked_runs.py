"""Runs of one process, each a fork that finds Megatron imported: that takes longer than most do.

    python tests/support/forked_runs.py

reads a line of JSON for each run from its input, ``{"argv": [...], "streams": [out, err]}``: the
arguments of ``python -m megatron_patches``, and the files for what it prints. For each it prints
the fork's process, and its exit status once it has ended.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from megatron_patches import __main__ as launcher


def start_up() -> None:
    """What the launcher does before it runs a script; it does nothing of that twice."""
    from megatron_patches import cpu_device, registration

    cpu_device.install()
    cpu_device.patch_megatron()
    registration.apply()
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    import pretrain_bytes  # noqa: F401


def is_a_run() -> bool:
    """Fork for every line; True in a fork, with its arguments and streams, False at the end."""
    for line in sys.stdin:
        job = json.loads(line)
        process = os.fork()
        if not process:
            os.setsid()
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for number, file in enumerate(job["streams"], start=1):
                os.dup2(os.open(file, os.O_WRONLY), number)
            sys.argv = ["megatron_patches", *job["argv"]]
            return True
        print(process, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
    return False


if __name__ == "__main__":
    start_up()
    if is_a_run():  # which ends as the launcher does, by whatever it raises
        launcher.main()
