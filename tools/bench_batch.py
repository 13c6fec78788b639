"""Time Pion's step on many small matrices against the bytes that one batch may have.

    python tools/bench_batch.py [--heads 24 --rows 64 --cols 512]

Prints the median step for every budget: what pion_dist.plan.BATCH_BYTES is chosen by.
"""

import argparse
from dataclasses import replace

import torch
from torch.utils.benchmark import Timer

import pion_dist.plan
from pion_dist import RECIPES, Pion
from pion_dist.matrices import stacked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--cols", type=int, default=512)
    args = parser.parse_args()
    heads, rows, cols = args.heads, args.rows, args.cols
    print(f"{heads} matrices of {rows} x {cols}, torch {torch.__version__}, "
          f"{torch.get_num_threads()} threads; ms a step by MiB a batch")  # fmt: skip
    for momentum in ("lie", "transported"):
        weight = torch.nn.Parameter(torch.randn(heads * rows, cols) / cols**0.5)
        weight.grad = torch.randn_like(weight)
        view = stacked(heads * rows, cols, name="head", count=heads)
        config = replace(RECIPES["paper-1.3b"], momentum=momentum, direction="adaptive")
        optimizer = Pion([weight], config=config, views={weight: view})
        for budget in (1, 4, 8, 16, 64, 1024):
            pion_dist.plan.BATCH_BYTES["cpu"] = budget << 20
            timer = Timer("optimizer.step()", globals={"optimizer": optimizer})
            median = timer.blocked_autorange(min_run_time=1.0).median
            print(f"{momentum:12} {budget:5} MiB {median * 1e3:8.1f}", flush=True)


if __name__ == "__main__":
    main()
