"""Run through the launcher: as many_runs.py, but one rank fails.

torchrun ... -m megatron_patches --cpu tests/support/failing_run.py jobs.json RANK MOMENT COUNT
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from many_runs import main


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def complain() -> None:
    raise ArithmeticError(f"rank {os.environ['RANK']} cannot go on")


def fail(moment: str, count: int) -> None:
    """Let this rank fail in its ``count``-th step or save."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
    from megatron.training import training

    import pion_dist.execute
    from pion_dist import Pion, exchange

    def die_between_matrices() -> None:
        before(pion_dist.execute, "update", 2, die)

    def die_between_waves() -> None:
        before(exchange._Wave, "compute", 2, die)

    def die_before_gather() -> None:
        before(_ParamAndGradBucketGroup, "start_param_sync", 1, die)

    def die_between_tensors() -> None:
        before(filesystem_async, "_write_item", 3, die)

    moments: dict[str, tuple[Any, str, Callable[[], None]]] = {
        "raise-in-step": (Pion, "step", complain),
        "kill-in-step": (Pion, "step", die_between_matrices),
        "kill-in-reduction": (DistributedDataParallel, "finish_grad_sync", die),
        "kill-in-exchange": (Pion, "step", die_between_waves),
        "kill-in-gather": (Pion, "step", die_before_gather),
        "kill-in-save": (training, "save_checkpoint", die_between_tensors),
    }
    owner, name, act = moments[moment]
    before(owner, name, count, act)


def before(owner: Any, name: str, count: int, act: Callable[[], None]) -> None:
    """Do something before the ``count``-th call of a function from now."""
    original, calls = getattr(owner, name), 0

    @functools.wraps(original)
    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            act()
        return original(*args, **kwargs)

    setattr(owner, name, counted)


if __name__ == "__main__":
    file, rank, moment, count = sys.argv[1:]
    if os.environ["RANK"] == rank:
        fail(moment, int(count))
    main(json.loads(Path(file).read_text()))
