"""Time one optimizer step: Pion, the published arithmetic, Muon, fixed-norm Muon, ISO and AdamW.

    python tools/bench_step.py --out bench_out          # also: --model 8b, --scale 1, --device cuda

Every contender steps the same weights, by turns; times are medians over the rounds, and ratios are
of these medians. Writes tables, JSON and a plot.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Collection, Sequence
from importlib.metadata import version
from pathlib import Path

import psutil
import torch
from bench_step_contenders import BASE, FLOAT, MODELS, Contender, Group, Weight, contenders, stored
from bench_step_report import Cell, Results, draw, setting, tables
from study_report import write
from torch.autograd import DeviceType
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile

from megatron_patches import cpu_products
from pion_dist.cost import forms
from pion_dist.update.precision import cpu_bf16_products


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Time of a call by ``clock``."""
    if device.type != "cuda":
        now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        start = now()
        call()
        return now() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def clock(device: torch.device) -> str:
    """What ``seconds`` reads; other work on a machine does not count in CPU time."""
    if device.type == "cuda":
        return "events on the GPU, around all that a step launches"
    return "CPU time of one thread" if torch.get_num_threads() == 1 else "wall clock"


def peak_extra(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that torch's allocator holds at most during a call, beyond what it held before.

    On the CPU the sum over the profiler's records of every allocation and release; the workspaces
    that BLAS and LAPACK take for themselves are not among them.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    held = peak = 0
    assert profiled.profiler is not None and profiled.profiler.kineto_results is not None
    events = profiled.profiler.kineto_results.events()
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == "[memory]" and event.device_type() == DeviceType.CPU:
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def too_large(contender: Contender, weights: Sequence[Weight], device: torch.device) -> str:
    """Why a contender's state and temporaries would not fit, or an empty string."""
    need = contender.state(weights)
    # Temporaries: some of the largest of one matrix, or of a part, which is one batch on a GPU.
    batched = contender.batched or (device.type == "cuda" and contender.kind == "pion")
    need += (
        4
        * FLOAT
        * max(
            (w.count if batched else 1) * (largest_square(contender, w) + w.m * w.n)
            for w in weights
        )
    )
    return shortage(need, device)


def largest_square(contender: Contender, w: Weight) -> int:
    """Elements of the largest square matrix that a step makes."""
    if contender.kind == "peer":
        return min(w.m, w.n) ** 2
    if contender.kind == "loop":
        return max(w.m, w.n) ** 2
    if contender.config.direction == "polar":
        return min(w.m, w.n) ** 2
    held = forms(w.m, w.n, contender.config)
    return max((w.n if side == "in" else w.m) ** 2 for side in held if held[side] == "dense")


def shortage(need: int, device: torch.device) -> str:
    """That so many bytes are not free, or an empty string."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available
    return f"needs {need / 2**30:.1f} GiB, {free / 2**30:.1f} are free" if need > free else ""


def measure(
    model: str,
    group: Group,
    device: torch.device,
    rounds: int,
    names: Collection[str] | None = None,
) -> list[Cell]:
    """Every contender's cell of a group; those of ``names`` step by turns, two steps a turn."""
    rivals = contenders(device)
    cells = {
        contender.name: {
            "model": model,
            "shape": group.name,
            "contender": contender.name,
            "flop": sum(map(contender.flop, group.weights)),
            "state_bytes": contender.state(group.weights),
            "matrix_bytes": group.matrix,
            "square_bytes": group.square,
        }
        for contender in rivals
    }
    if why := shortage(2 * FLOAT * sum(w.numel for w in group.weights), device):
        return [cell | {"skipped": f"the weights: {why}"} for cell in cells.values()]
    weights = [stored(shape, device) for shape in group.weights]
    size = 8192 if device.type == "cuda" else 1024
    square = torch.randn(size, size, device=device)
    low = square.bfloat16()
    turns: dict[str, Callable[[], object]] = {
        "float32": lambda: square @ square,
        "bf16": lambda: low @ low,
    }
    for contender in rivals:
        cell = cells[contender.name]
        if names is not None and contender.name not in names:
            cell["skipped"] = "not among --contenders"
            continue
        print(f"  {contender.name}: memory", file=sys.stderr, flush=True)
        if why := too_large(contender, group.weights, device):
            cell["skipped"] = why
            continue
        try:
            turn = two_steps(contender.build(weights))
            cell["peak_bytes"] = peak_extra(turn, device)
        except torch.OutOfMemoryError as error:
            cell["skipped"] = str(error).partition(".")[0]
            continue
        turns[contender.name] = turn
    times: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(rounds):
        print(f"  round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        for name, turn in turns.items():
            times[name].append(seconds(turn, device))
    rates = {name: 2.0 * size**3 / statistics.median(times[name]) for name in ("float32", "bf16")}
    for contender in rivals:
        cell = cells[contender.name]
        if contender.name in times:
            cell["rounds"] = [t / 2 for t in times[contender.name]]
            cell["seconds"] = statistics.median(cell["rounds"])
            cell["rate"] = rates[contender.precision]
            cell["fraction"] = cell["flop"] / cell["seconds"] / cell["rate"]
    return list(cells.values())


def two_steps(optimizer: Optimizer) -> Callable[[], None]:
    """Both sides of what alternates. A step is taken now: some make their state then."""

    def turn() -> None:
        optimizer.step()
        optimizer.step()

    optimizer.step()
    return turn


def cpu_name() -> str:
    """The CPU's name as Linux says it, and how it computes bf16 products."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()} ({cpu_bf16_products()})"


def machine(device: torch.device) -> str:
    """Of the measurement, in words."""
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    else:
        where = f"{cpu_name()}, {torch.get_num_threads()} of {os.cpu_count()} cores"
    packages = ("torch", "emerging-optimizers")
    return ", ".join([where, *(f"{name} {version(name)}" for name in packages)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument(
        "--scale",
        type=float,
        help="of all lengths, 1 for the true ones (default: 1 on a GPU, each model's own on a CPU)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    names = [c.name for c in contenders(torch.device("cpu"))]
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=names,
        metavar="NAME",
        help=f"what is timed; {BASE} always is, since times are over its own; default: all of "
        + ", ".join(names),
    )
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("bench_out"), help="default: %(default)s")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: must be at least 1")
    if args.scale is not None and not 0.0 < args.scale <= 1.0:
        parser.error(f"--scale {args.scale:g}: must be above 0, and at most 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's lines between the progress
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    cpu_products.install()  # for the peers too: their bf16 products are as slow without
    torch.manual_seed(0)
    scales = {}
    for name in args.model:
        default = 1.0 if device.type == "cuda" else MODELS[name].cpu
        scales[name] = default if args.scale is None else args.scale
    chosen = None if args.contenders is None else {*args.contenders, BASE}
    todo = [(name, group) for name in args.model for group in MODELS[name].groups(scales[name])]
    cells: list[Cell] = []
    for number, (name, group) in enumerate(todo, 1):
        print(f"{number} of {len(todo)}: {name} {group.name}", file=sys.stderr, flush=True)
        cells += measure(name, group, device, args.rounds, chosen)
    shown = [c for c in contenders(device) if chosen is None or c.name in chosen]
    results = Results(cells, shown)
    setup = {
        "machine": machine(device),
        "device": args.device,
        "clock": clock(device),
        "rounds of two steps": args.rounds,
        "scales": scales,
    }
    write(
        "step",
        [setting(setup, results), *tables(results, scales, device)],
        draw(results),
        args.out,
        data={"setup": setup, "cells": cells},
    )


if __name__ == "__main__":
    main()
