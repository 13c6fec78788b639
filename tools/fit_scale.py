"""Fit pion_dist.scale's rates to this machine, and compare its predictions with measured steps.

    python tools/fit_scale.py

The rates are of four measurements that have nothing of Pion's: a product of 768 x 768 matrices, a
copy, a Cholesky decomposition with its inverse, and the smallest product. The predictions are of
the same function that docs/SCALE.md's are of. One thread; times are of the processor, which other
work on the machine does not lengthen but through caches and memory.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch.utils.benchmark import Timer

from pion_dist import RECIPES, Pion, PionConfig
from pion_dist.matrices import whole
from pion_dist.scale.describe import Cluster
from pion_dist.scale.rates import AROUND, priced
from pion_dist.scale.report import table
from pion_dist.scale.trace import kernels
from pion_dist.update.precision import exact

# Square and oblong both ways; at 256 x 1024 the default takes Muon's step from a Gram matrix.
SHAPES = ((256, 256), (512, 512), (768, 768), (256, 1024), (1024, 256))
CONFIGS = {
    "pretrain": PionConfig(),
    "pretrain, bf16 average": PionConfig(state_dtype="bf16"),
    "msign": PionConfig(direction="msign", momentum="ambient", side="alternate"),
    "paper-1.3b": RECIPES["paper-1.3b"],
    "paper-60m, adaptive": replace(RECIPES["paper-60m"], direction="adaptive"),
}


def seconds(run: Callable[[], object]) -> float:
    """Median."""
    timer = Timer("run()", globals={"run": run}, timer=time.process_time)
    return timer.blocked_autorange(min_run_time=0.5).median


def this_machine() -> Cluster:
    """Its rates as measured; the shares that are reached are then 1."""
    a, eye = torch.randn(768, 768), torch.eye(768)
    fp32 = 2.0 * 768**3 / seconds(lambda: a @ a)
    square = a @ a.mT + eye

    def solve() -> None:
        upper, _ = torch.linalg.cholesky_ex(square, upper=True)
        torch.linalg.solve_triangular(upper, eye, upper=True)

    solver = (1.0 + 1.0 / 3.0) * 768**3 / seconds(solve)
    # As large as a weight of the measured steps, and as far from the caches.
    x, y = torch.randn(1 << 20), torch.empty(1 << 20)
    memory = 2 * x.nbytes / seconds(lambda: y.copy_(x))
    return Cluster(
        name="this machine",
        bf16=fp32,
        tf32=fp32,
        fp32=fp32,
        memory=memory,
        capacity=float("inf"),
        nvlink=float("inf"),
        network=float("inf"),
        launch=0.0,
        matmul=1.0,
        solver=solver / fp32,
        stream=1.0,
        link=1.0,
        mfu=1.0,
    )


def measured(m: int, n: int, config: PionConfig) -> float:
    """Seconds of a step, the mean of medians of odd and of even ones."""
    p = torch.nn.Parameter(torch.randn(m, n) / n**0.5)
    p.grad = torch.randn_like(p)
    optimizer = Pion([p], lr=1e-4, config=config, views={p: whole(m, n)})
    optimizer.step()
    optimizer.step()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(3):
        for parity in times:
            start = time.process_time()
            optimizer.step()
            parity.append(time.process_time() - start)
    return statistics.fmean(map(statistics.median, times))


def predicted(m: int, n: int, config: PionConfig, cluster: Cluster, overhead: float) -> float:
    """Seconds of a step, the mean of an odd and an even one."""
    steps = [kernels(1, m, n, config, None, step=step) for step in (1, 2)]
    work = statistics.fmean(priced(each, cluster) for each in steps)
    # The processor that launches is the one that computes: both take their time.
    return work + overhead * statistics.fmean(map(len, steps)) + AROUND * m * n / cluster.memory


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    cluster, one = this_machine(), torch.ones(1, 1, 1)
    overhead = seconds(lambda: exact(one, one))
    print(
        f"torch {torch.__version__}, one thread; products {cluster.fp32 / 1e9:.0f} "
        f"GFLOP/s, solvers {cluster.solver * cluster.fp32 / 1e9:.0f}, memory "
        f"{cluster.memory / 1e9:.1f} GB/s, smallest product {overhead * 1e6:.1f} us\n",
        flush=True,
    )
    rows, ratios = [], []
    for name, config in CONFIGS.items():
        for m, n in SHAPES:
            told, took = predicted(m, n, config, cluster, overhead), measured(m, n, config)
            ratios.append(told / took)
            rows.append(
                (name, f"{m} x {n}", f"{1e3 * told:.1f}", f"{1e3 * took:.1f}", f"{told / took:.2f}")
            )
    print(table(("options", "matrix", "predicted, ms", "measured, ms", "ratio"), rows))
    print(
        f"\npredicted / measured: median {statistics.median(ratios):.2f}, "
        f"{min(ratios):.2f} to {max(ratios):.2f}"
    )


if __name__ == "__main__":
    main()
