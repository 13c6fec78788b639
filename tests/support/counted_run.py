"""Run through the launcher: a training that prints what each iteration hands to collectives.

    python -m megatron_patches --cpu tests/support/counted_run.py ...

It is what examples/pretrain_bytes.py does. Megatron is imported inside functions, as there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))


def main() -> None:
    """Train, and print a line ``collectives: {name: [bytes, ...]}`` an iteration on rank 0."""
    import torch
    from megatron.training import training
    from pretrain_bytes import main as pretrain_bytes
    from rank_checks import INPUTS
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    coalesced = {
        "c10d::reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
        "c10d::allgather_into_tensor_coalesced_": ("all_gather", 1),
    }
    inputs = INPUTS | coalesced

    class Sizes(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: dict[str, list[int]] = {}

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            operation = func._schema.name
            if operation.startswith("c10d::"):
                name, place = inputs.get(operation, (operation, 0))
                tensors = [x for x in tree_leaves(args[place]) if isinstance(x, torch.Tensor)]
                self.seen.setdefault(name, []).append(sum(x.nbytes for x in tensors))
            return func(*args, **(kwargs or {}))

    original = training.train_step

    def train_step(*args: Any, **kwargs: Any) -> Any:
        with Sizes() as sizes:
            result = original(*args, **kwargs)
        if torch.distributed.get_rank() == 0:
            print(f"collectives: {json.dumps(sizes.seen)}", flush=True)
        return result

    training.train_step = train_step
    pretrain_bytes()


if __name__ == "__main__":
    main()
