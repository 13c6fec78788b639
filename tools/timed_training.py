"""One training of `bench_train.py`: `examples/pretrain_bytes.py`, and what it cost as JSON.

    python -m megatron_patches tools/timed_training.py FOLDER ...   # Megatron's flags

Every rank writes FOLDER/RANK.json. Times are those of Megatron's own timers.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.training import get_args, get_timers, training

from megatron_patches.distributed_optimizer import PionAndAdam

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
from pretrain_bytes import main as pretrain_bytes  # noqa: E402

# An iteration; forward and backward; all of MegatronOptimizer.step; the optimizer's own step in it.
TIMERS = ("interval-time", "forward-backward", "optimizer", "optimizer-inner-step")


def listen(folder: Path) -> None:
    """Have Megatron's training leave its times and sizes in a folder."""
    train, log = training.train, training.training_log
    totals: dict[str, list[float]] = {name: [] for name in TIMERS}

    def listened_log(*args: Any, **kwargs: Any) -> Any:
        result = log(*args, **kwargs)  # reads interval-time, which ends the iteration
        for name, total in totals.items():
            total.append(get_timers()(name).active_time())
        return result

    def listened_train(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(train).bind(*args, **kwargs).arguments
        result = train(*args, **kwargs)
        options = get_args()
        measured = {
            "totals": totals,
            "tokens": options.global_batch_size * options.seq_length,
            "micro_batch": options.micro_batch_size,
            "seq_length": options.seq_length,
            "data_parallel": options.data_parallel_size,
            "parameters": sum(p.numel() for chunk in given["model"] for p in chunk.parameters()),
            "state_bytes": sum(t.nbytes for t in state(given["optimizer"])),
            # 0 without a GPU.
            "peak_bytes": torch.cuda.max_memory_allocated(),
        }
        (folder / f"{options.rank}.json").write_text(json.dumps(measured))
        return result

    training.train, training.training_log = listened_train, listened_log


def state(optimizer: Any) -> Iterator[torch.Tensor]:
    """Moments of every torch optimizer inside Megatron's; no step counts, no float32 masters."""
    chained = getattr(optimizer, "chained_optimizers", None)
    for each in chained or []:
        yield from state(each)
    inner = None if chained is not None else optimizer.optimizer
    both = (inner.pion, inner.adam) if isinstance(inner, PionAndAdam) else (inner,)
    for moments in (
        moments for each in both if each is not None for moments in each.state.values()
    ):
        yield from (t for t in moments.values() if isinstance(t, torch.Tensor) and t.dim())


def main() -> None:
    listen(Path(sys.argv.pop(1)))
    pretrain_bytes()


if __name__ == "__main__":
    main()
