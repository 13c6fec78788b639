"""Each kernel's bytes a second, next to those of a copy of the same device, in one run.

    python tools/bench_kernels.py

On a GPU Triton's kernels and torch's operations are timed side by side. On the CPU only torch's
are, since Triton needs a GPU. Bytes are counted once for every tensor that has to be read or
written; more than the caches hold lies between two runs on the same ones.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from pion_dist import kernels
from pion_dist.kernels import fold, reference


def seconds(run: Callable[[], object], device: str, repeats: int) -> float:
    """Median time of a run, after one that is not counted."""
    run()
    times = []
    flush = torch.empty(2**26 if device == "cuda" else 2**23, device=device)
    for _ in range(repeats):
        flush.zero_()
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


def cases(batch: int, d: int, device: str) -> dict[str, tuple[int, Callable[[object], object]]]:
    """Bytes and call of each kernel, given the module that has it."""
    x, y = (torch.randn(batch, d, d, device=device) for _ in range(2))
    k = x - x.mT
    grads_finite, size = torch.tensor(True, device=device), x.nbytes
    calls: dict[str, tuple[int, Callable[[object], object]]] = {
        "copy": (2 * size, lambda _: y.copy_(x)),
        "skew": (2 * size, lambda run: run.skew(x)),
        "skew to bf16": (size + size // 2, lambda run: run.skew(x, dtype=torch.bfloat16)),
        "average, Nesterov": (
            4 * size,
            lambda run: run.average(k, x, beta=0.9, nesterov=True, grads_finite=grads_finite),
        ),
        "moved": (3 * size, lambda run: run.moved(k, y, grads_finite=grads_finite)),
        "norm": (size, lambda run: run.frobenius(x)),
        "norm of a sum": (2 * size, lambda run: run.frobenius(x, y)),
    }

    def moments(m: Tensor, v: Tensor, wanted: bool) -> Callable[[object], object]:
        options = dict(
            beta1=0.9,
            beta2=0.99,
            eps=1e-8,
            nesterov=False,
            grads_finite=grads_finite,
            wanted=wanted,
        )
        return lambda run: run.lie_moments(x, m, v, **options)

    for layout, dtype in (("dense", "float32"), ("folded", "float32"), ("folded", "bfloat16")):
        m, v = ((fold(z) if layout == "folded" else z.clone()) for z in (k, k.square()))
        m, v = m.to(getattr(torch, dtype)), v.to(getattr(torch, dtype))
        for wanted in (True, False):
            name = f"moments, {layout} {dtype}" + (", direction" if wanted else "")
            moved = (2 if wanted else 1) * size + 2 * (m.nbytes + v.nbytes)
            calls[name] = moved, moments(m, v, wanted)
    return calls


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["96x64", "24x512", "1x2048"])
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    modules = {"torch": reference}
    if kernels.backend(torch.device(device)) == "triton":
        modules = {"triton": kernels, **modules}
    print(
        f"{device}, torch {torch.__version__}, median of {args.repeats}; GB/s, share of the copy's"
    )
    if "triton" not in modules:
        print("Triton's kernels need a GPU: only torch's operations are timed.")
    for shape in args.shapes:
        batch, d = map(int, shape.split("x"))
        print(f"\n{batch} matrices {d} x {d}".ljust(42) + "".join(n.rjust(18) for n in modules))
        copied = 0.0
        for name, (size, call) in cases(batch, d, device).items():
            line = name.ljust(41)
            for run in modules.values():
                rate = size / seconds(lambda run=run, call=call: call(run), device, args.repeats)
                copied = copied or rate
                line += f"{rate / 1e9:11.1f} {rate / copied:5.0%} "
            print(line)


if __name__ == "__main__":
    main()
