"""Time one optimizer step: Pion, the published arithmetic, Megatron's Muon and AdamW, side by side.

    python tools/bench_step.py --out bench_out          # also: --model 8b, --scale 1, --device cuda

Every contender steps the same weights, by turns; times are medians over the rounds, and ratios are
of these medians. Writes tables, JSON and a plot.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from emerging_optimizers.orthogonalized_optimizers import Muon
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from released import ReleasedPion, released_flop
from study_report import COLORS, Table, panels, write
from torch import Tensor
from torch.autograd import DeviceType
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile

from megatron_patches import cpu_products
from pion_dist import RECIPES, Pion, PionConfig
from pion_dist.config import Axis
from pion_dist.cost import forms, step_flop
from pion_dist.matrices import stacked
from pion_dist.recipes import in_bf16
from pion_dist.state import moments, unfit
from pion_dist.update.precision import cpu_bf16_products

FLOAT = 4  # bytes
EXPERTS = 16  # of the 128: what one of 8 expert-parallel ranks has


@dataclass(frozen=True)
class Weight:
    """A stored weight: ``count`` matrices of [m, n], one below the other.

    Attributes:
        count: of matrices.
        m: rows of one.
        n: columns.
        projections: rows of each matrix that Muon has instead, where Pion's are heads.
    """

    count: int
    m: int
    n: int
    projections: tuple[int, ...] = ()

    @property
    def numel(self) -> int:
        return self.count * self.m * self.n


@dataclass(frozen=True)
class Group:
    """Weights of a layer that are timed together."""

    name: str
    weights: tuple[Weight, ...]

    @property
    def matrix(self) -> int:
        """Bytes of the largest matrix."""
        return FLOAT * max(w.m * w.n for w in self.weights)

    @property
    def square(self) -> int:
        """Bytes of the largest generator."""
        return FLOAT * max(max(w.m, w.n) ** 2 for w in self.weights)


@dataclass(frozen=True)
class Model:
    """Sizes of a layer.

    Attributes:
        title: in the plot.
        hidden: size.
        ffn: of the MLP or of one expert.
        heads: of queries.
        query_groups: of keys and values.
        head_dim: rows of a head.
        cpu: what all lengths are multiplied by on a CPU; numbers of matrices stay.
        moe: the MLP is of experts.
    """

    title: str
    hidden: int
    ffn: int
    heads: int
    query_groups: int
    head_dim: int
    cpu: float = 1.0
    moe: bool = False

    def groups(self, scale: float) -> tuple[Group, ...]:
        """Attention's projections, its QKV as heads, and the MLP; lengths are ``scale`` times."""
        h, f, d = (max(1, round(x * scale)) for x in (self.hidden, self.ffn, self.head_dim))
        q, kv = self.heads * d, self.query_groups * d
        heads = Weight(self.heads + 2 * self.query_groups, d, h, (q, kv, kv))
        projections = (Weight(1, q, h), Weight(1, kv, h), Weight(1, kv, h), Weight(1, h, q))
        mlp = (Weight(2, f, h), Weight(1, h, f))  # gate over up, down
        return (
            Group("attention", projections),
            Group("QKV by heads", (heads,)),
            Group("experts", mlp * EXPERTS) if self.moe else Group("MLP", mlp),
        )


MODELS = {
    "60m": Model("Llama 60M", 512, 1376, 8, 8, 64),
    "1.3b": Model("Llama 1.3B", 2048, 5460, 32, 32, 64, cpu=1 / 8),
    "8b": Model("Llama 8B", 4096, 14336, 32, 8, 128, cpu=1 / 8),
    "70b": Model("Llama 70B", 8192, 28672, 64, 8, 128, cpu=1 / 32),
    "moe": Model("Qwen3 30B-A3B", 2048, 768, 32, 4, 128, cpu=1 / 8, moe=True),
}


@dataclass(frozen=True)
class Stored:
    """A weight and its gradient; all contenders have the same."""

    shape: Weight
    weight: Tensor
    grad: Tensor

    def rows(self, heights: Sequence[int]) -> list[torch.nn.Parameter]:
        """Parameters of so many rows each."""
        found = []
        for w, g in zip(self.weight.split(heights), self.grad.split(heights), strict=True):
            found.append(torch.nn.Parameter(w))
            found[-1].grad = g
        return found

    def matrices(self) -> list[torch.nn.Parameter]:
        return self.rows([self.shape.m] * self.shape.count)


def stored(shape: Weight, device: torch.device) -> Stored:
    """Random weights whose first-order changes are of ordinary size, and random gradients."""
    size = (shape.count * shape.m, shape.n)
    weight = torch.randn(size, device=device) / shape.n**0.5
    return Stored(shape, weight, torch.randn(size, device=device))


@dataclass(frozen=True)
class Contender:
    """What is timed.

    Attributes:
        name: in the tables.
        options: what it is.
        kind: of whose code.
        precision: of most of its products.
        build: the optimizer of some weights.
        flop: of a step of a weight, counted.
        state: bytes of moments of some weights, counted.
        config: Pion's.
        loop: name of the published arithmetic to compare with.
    """

    name: str
    options: str
    kind: Literal["pion", "loop", "peer"]
    precision: str
    build: Callable[[Sequence[Stored]], Optimizer]
    flop: Callable[[Weight], float]
    state: Callable[[Sequence[Weight]], int]
    config: PionConfig = RECIPES["pretrain"]
    loop: str = ""


LR = 1e-4  # small: no contender moves the weights that all share by much

DEFAULT = RECIPES["pretrain"]
LIE = RECIPES["paper-1.3b"]
LIE_ALTERNATE = RECIPES["paper-rl"]
TRANSPORTED = RECIPES["paper-60m"]
MSIGN = replace(
    LIE, momentum="ambient", direction="msign", side="alternate", scaling="none"
)  # the published code's second update


def options(config: PionConfig) -> str:
    """Those that decide the cost."""
    nesterov = "Nesterov, " if config.nesterov else ""
    if config.direction == "polar":
        return f"{nesterov}polar"
    retraction = "Taylor 2" if config.retraction == "taylor" else config.retraction
    return (
        f"{config.momentum}, {config.direction}, {nesterov}{config.side}, "
        f"scaling {config.scaling}, {retraction}"
    )


def pion_state(config: PionConfig, weights: Sequence[Weight], axis: Axis | None = None) -> int:
    """Bytes of Pion's moments of weights that are cut along an axis."""
    found = (moments(w.count, w.m, w.n, config, axis).values() for w in weights)
    return sum(moment.nbytes(FLOAT) for each in found for moment in each)


def pion(
    name: str, config: PionConfig, *, device: str, recipe: str = "", loop: str = ""
) -> Contender:
    def build(weights: Sequence[Stored]) -> Pion:
        parameters, views = [], {}
        for each in weights:
            rows, cols = each.weight.shape
            if config.direction == "polar":
                # Others' steps would change the weights, whose factors would be taken anew.
                each = replace(each, weight=each.weight.clone())
            [p] = each.rows([rows])
            parameters.append(p)
            views[p] = stacked(rows, cols, name="matrix", count=each.shape.count)
        return Pion(parameters, LR, config=config, views=views)

    return Contender(
        name,
        "pion_dist: " + options(config) + recipe,
        "pion",
        "bf16" if config.matmul_precision == "bf16" else "float32",
        build,
        lambda w: w.count * step_flop(w.m, w.n, config, device=device),
        lambda weights: pion_state(config, weights),
        config,
        loop,
    )


def released(name: str, config: PionConfig) -> Contender:
    return Contender(
        name,
        "tools/released.py: " + options(config),
        "loop",
        "float32",
        lambda weights: ReleasedPion([p for w in weights for p in w.matrices()], LR, config=config),
        lambda w: w.count * released_flop(w.m, w.n, config),
        lambda weights: pion_state(replace(config, state_layout="dense"), weights),
        config,
    )


def muon(name: str, about: str, precision: str, **given: Any) -> Contender:
    def build(weights: Sequence[Stored]) -> Optimizer:
        found = [
            w.rows(w.shape.projections) if w.shape.projections else w.matrices() for w in weights
        ]
        return Muon([p for some in found for p in some], lr=LR, **given)

    def flop(w: Weight) -> float:
        total = 0.0
        for rows in w.projections or (w.m,) * w.count:
            short, long = sorted((rows, w.n))
            total += 5 * (4.0 * short * short * long + 2.0 * short**3)
        return total

    return Contender(
        name, about, "peer", precision, build, flop, lambda ws: FLOAT * sum(w.numel for w in ws)
    )


def adamw() -> Contender:
    def build(weights: Sequence[Stored]) -> Optimizer:
        parameters = [p for w in weights for p in w.rows([len(w.weight)])]
        return torch.optim.AdamW(parameters, lr=LR, fused=True)

    return Contender(
        "AdamW",
        "torch.optim.AdamW, fused",
        "peer",
        "float32",
        build,
        lambda w: 0.0,
        lambda ws: 2 * FLOAT * sum(w.numel for w in ws),
    )


BASE, OWN = "Muon float32", "Muon"


def contenders(device: torch.device) -> list[Contender]:
    """All that is timed, in the tables' order."""
    of = functools.partial(pion, device=device.type)
    found = [
        of("default float32", DEFAULT, recipe=" (pretrain)"),
        of("default bf16", in_bf16("pretrain"), recipe=", bf16 products"),
        of("msign", MSIGN, loop="loop: msign"),
        of("lie both", LIE, recipe=" (paper-1.3b)", loop="loop: lie both"),
        of("lie alternate", LIE_ALTERNATE, recipe=" (paper-rl)", loop="loop: lie alternate"),
        of("transported", TRANSPORTED, recipe=" (paper-60m)", loop="loop: transported"),
        released("loop: msign", MSIGN),
        released("loop: lie both", LIE),
        released("loop: lie alternate", LIE_ALTERNATE),
        released("loop: transported", TRANSPORTED),
        muon(OWN, "emerging_optimizers' own defaults: 5 quintic steps in bf16", "bf16"),
        muon(BASE, "the same, fp32_matmul_prec='highest'", "float32", fp32_matmul_prec="highest"),
        adamw(),
    ]
    return found


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
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    held = peak = 0
    assert found.profiler is not None and found.profiler.kineto_results is not None
    events = found.profiler.kineto_results.events()
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == "[memory]" and event.device_type() == DeviceType.CPU:
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def too_large(contender: Contender, weights: Sequence[Weight], device: torch.device) -> str:
    """Why a contender's state and temporaries would not fit, or an empty string."""
    need = contender.state(weights)
    # Temporaries: some of the largest of one matrix, or of a part, which is one batch on a GPU.
    batched = device.type == "cuda" and contender.kind == "pion"
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


Cell = dict[str, Any]
Shape = tuple[str, str]  # model and group


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


class Found:
    """All cells, and ratios between them."""

    def __init__(self, cells: Sequence[Cell], contenders: Sequence[Contender]) -> None:
        self.cells = cells
        self.contenders = contenders
        self.shapes = list(dict.fromkeys((c["model"], c["shape"]) for c in cells))
        self._at = {(c["model"], c["shape"], c["contender"]): c for c in cells}

    @property
    def names(self) -> list[str]:
        return [c.name for c in self.contenders]

    def at(self, shape: Shape, name: str) -> Cell:
        return self._at[*shape, name]

    def ratio(self, shape: Shape, name: str, to: str, what: str = "seconds") -> float:
        """NaN where one of them was skipped or has none."""
        over, under = self.at(shape, name).get(what), self.at(shape, to).get(what)
        return over / under if over is not None and under else math.nan

    def table(
        self,
        title: str,
        cell: Callable[[Shape, str], float],
        form: str = ".2f",
        *,
        names: Sequence[str] | None = None,
    ) -> Table:
        """A row for each shape, a column for each contender, or those named."""
        columns = self.names if names is None else names
        table = Table(title, ["", *columns])
        for shape in self.shapes:
            row = [" ".join(shape)]
            for name in columns:
                value = math.nan if "skipped" in self.at(shape, name) else cell(shape, name)
                row.append("-" if math.isnan(value) else f"{value:{form}}")
            table.rows.append(row)
        return table

    def skipped(self) -> list[Sequence[str]]:
        return [
            (f"{c['model']} {c['shape']}", c["contender"], c["skipped"])
            for c in self.cells
            if "skipped" in c and c["contender"] in self.names
        ]


def setting(setup: dict[str, Any], found: Found) -> Table:
    """What was measured on."""
    table = Table("The run", ("", ""))
    table.rows += [(name, str(setup[name])) for name in ("machine", "clock", "rounds of two steps")]
    for precision in ("float32", "bf16"):
        names = {c.name for c in found.contenders if c.precision == precision}
        measured = [c for c in found.cells if c["contender"] in names and "rate" in c]
        if measured:
            low, high = (f(c["rate"] for c in measured) / 1e9 for f in (min, max))
            span = f"{low:.0f} to {high:.0f} GFLOP a second"
            table.rows.append((f"a {precision} product, in medians", span))
    return table


def tables(found: Found, scales: dict[str, float], device: torch.device) -> list[Table]:
    """All that is said about what was measured."""
    at, ratio = found.at, found.ratio
    legend = Table("What is timed", ("name", "what it is"))
    legend.rows += [(c.name, c.options) for c in found.contenders]
    sizes = Table("Weights, as Pion's matrices", ("", "lengths", "matrices"))
    for model, name in found.shapes:
        group = next(g for g in MODELS[model].groups(scales[model]) if g.name == name)
        each = {w: group.weights.count(w) for w in group.weights}
        what = ", ".join(f"{n * w.count} of {w.m} x {w.n}" for w, n in each.items())
        sizes.rows.append((f"{model} {name}", f"times {scales[model]:g}", what))
    loops = {c.name: c.loop for c in found.contenders if c.loop in found.names}
    products = [c.name for c in found.contenders if c.name != "AdamW"]
    beside_loops = found.table(
        "Time, over that of the published loop",
        lambda s, c: ratio(s, c, loops[c]),
        names=list(loops),
    )
    made = [
        legend,
        sizes,
        found.table("ms a step", lambda s, c: at(s, c)["seconds"] * 1e3, ".1f"),
        found.table(f"Time, over that of {BASE}", lambda s, c: ratio(s, c, BASE), ".3g"),
        *([beside_loops] if loops else []),
        found.table(
            "Counted FLOP, over Muon's", lambda s, c: ratio(s, c, BASE, "flop"), names=products
        ),
        found.table(
            "Counted FLOP a second, over the rate of a square product in the same precision",
            lambda s, c: at(s, c)["fraction"],
            names=products,
        ),
        found.table(
            "Bytes of state, over AdamW's", lambda s, c: ratio(s, c, "AdamW", "state_bytes")
        ),
        layers(found),
        found.table(
            "Peak memory of a step beyond weights, gradients and state, in largest matrices",
            lambda s, c: at(s, c)["peak_bytes"] / at(s, c)["matrix_bytes"],
            ".1f",
        ),
        state_table(),
        targets(found, device),
    ]
    if rows := found.skipped():
        made.append(Table("Not measured", ("shape", "what", "why"), rows))
    return made


def state_table() -> Table:
    """Counted at the models' true sizes."""
    low: dict[str, Any] = {"state_dtype": "bf16"}
    adaptive = replace(LIE, direction="adaptive", betas=(0.9, 0.95))
    columns = {
        "default, M in float32": replace(DEFAULT, state_dtype="fp32"),
        "M in bf16": replace(DEFAULT, **low),
        "M in int8": replace(DEFAULT, state_dtype="int8"),
        "lie": LIE,
        "lie adaptive": adaptive,
        "dense": replace(adaptive, state_layout="dense"),
        "in bf16": replace(adaptive, **low),
        "in 8 blocks": replace(adaptive, blocks=8),
    }
    table = Table(
        "State and float32 masters of a layer's matrices at the true sizes, counted, bytes a "
        "parameter; dense and what is right of it are of lie adaptive",
        ["", "AdamW", *columns, "lie, QKV by heads"],
    )
    for key, model in MODELS.items():
        attention, heads, mlp = model.groups(1.0)
        # Megatron cuts the output projection and the second weight of an MLP along their columns.
        rows = [*attention.weights[:-1], *mlp.weights[::2]]
        cols = [attention.weights[-1], *mlp.weights[1::2]]
        split = [*heads.weights, attention.weights[-1], *mlp.weights]
        numel = sum(w.numel for w in (*rows, *cols))
        line = [key, f"{3 * FLOAT}"]
        for config in columns.values():
            fits = not any(unfit(w.m, w.n, config, "rows", 1) for w in rows)
            state = pion_state(config, rows, "rows") + pion_state(config, cols, "cols")
            line.append(f"{FLOAT + state / numel:.1f}" if fits else "no equal blocks")
        table.rows.append([*line, f"{FLOAT + pion_state(LIE, split) / numel:.1f}"])
    return table


# Of the default's time over Muon's in the same precision, for all matrices of a layer.
LAYER_TARGETS = {("default float32", BASE): 1.3, ("default bf16", OWN): 1.3}
# Of a mode's time over Muon's: on square matrices, and where one side is 2.7 times the other.
MUON_TARGETS = {
    "msign": (1.2, 2.5),
    "lie both": (0.6, 1.1),
    "lie alternate": (0.6, 0.6),
    "transported": (0.8, 0.8),
}
KINDS = {
    "square": (("60m", "attention"), ("1.3b", "attention")),
    "2.7:1": (("60m", "MLP"), ("1.3b", "MLP")),
}
PEAKS = {"default float32": 4.0, "default bf16": 4.0}  # largest matrices
PEAK = 3.0  # of the others


def targets(found: Found, device: torch.device) -> Table:
    """What was aimed at, and where it was missed by most."""
    table = Table(
        "Targets", ("at most", "of", "over", "hit at", "worst", "where", "counted FLOP there")
    )
    modes = [c for c in found.contenders if c.kind == "pion"]
    heads = [shape for shape in found.shapes if "heads" in shape[1]]
    wholes = [shape for shape in found.shapes if shape not in heads]
    limits = ((0.2, heads), (0.7, wholes)) if device.type == "cuda" else ((1.0, found.shapes),)
    for limit, shapes in limits:
        for c in (c for c in modes if c.loop in found.names):
            _judge(table, found, limit, c.name, c.loop, shapes)
    for (name, peer), limit in LAYER_TARGETS.items():
        if not {name, peer} <= {*found.names}:
            continue
        ratios = {(model, "layer"): _layer(found, model, name, peer) for model in _models(found)}
        _summarize(table, limit, f"{name}, layer", peer, ratios, None)
    for (kind, shapes), column in zip(KINDS.items(), (0, 1), strict=True):
        there = [shape for shape in shapes if shape in found.shapes]
        for name, peer in itertools.product(MUON_TARGETS, (BASE, OWN)):
            if {name, peer} <= {*found.names}:
                _judge(table, found, MUON_TARGETS[name][column], name, peer, there, kind)
    for c in modes:
        for unit, what in (("matrix_bytes", "matrix"), ("square_bytes", "generator")):
            peaks = {
                shape: cell["peak_bytes"] / cell[unit]
                for shape in found.shapes
                if "peak_bytes" in (cell := found.at(shape, c.name))
            }
            limit = PEAKS.get(c.name, PEAK)
            _summarize(table, limit, f"{c.name}, peak memory", f"largest {what}", peaks, None)
    return table


def layers(found: Found) -> Table:
    """Time and counted FLOP of a whole layer: attention's projections and the MLP or experts."""
    names = found.names
    table = Table(f"A layer, over {BASE}: time, and counted FLOP", ["", *names])
    for model in _models(found):
        for what, title in (("seconds", "time"), ("flop", "FLOP")):
            ratios = (_layer(found, model, name, BASE, what) for name in names)
            cells = ("-" if math.isnan(ratio) else f"{ratio:.2f}" for ratio in ratios)
            table.rows.append([f"{model} {title}", *cells])
    return table


def _models(found: Found) -> list[str]:
    return list(dict.fromkeys(model for model, _ in found.shapes))


def _layer(found: Found, model: str, name: str, to: str, what: str = "seconds") -> float:
    """A layer's sum over another contender's; NaN where a part of it was skipped."""
    parts = [shape for shape in found.shapes if shape[0] == model and "heads" not in shape[1]]
    over, under = (sum(found.at(s, each).get(what, math.nan) for s in parts) for each in (name, to))
    return over / under if under else math.nan


def _judge(
    table: Table,
    found: Found,
    limit: float,
    name: str,
    to: str,
    shapes: Sequence[Shape],
    kind: str = "",
) -> None:
    """A row of ratios of times, and of counted FLOP."""
    ratios = {shape: found.ratio(shape, name, to) for shape in shapes}
    what = f"{name}, {kind}" if kind else name
    measured = {shape: ratio for shape, ratio in ratios.items() if not math.isnan(ratio)}
    _summarize(table, limit, what, to, measured, lambda shape: found.ratio(shape, name, to, "flop"))


def _summarize(
    table: Table,
    limit: float,
    what: str,
    over: str,
    ratios: dict[Shape, float],
    flop: Callable[[Shape], float] | None,
) -> None:
    if not ratios:
        return
    worst = max(ratios, key=lambda shape: ratios[shape])
    hit = sum(ratio <= limit for ratio in ratios.values())
    table.rows.append(
        (
            f"{limit:g}",
            what,
            over,
            f"{hit} of {len(ratios)}" + ("" if hit == len(ratios) else ": missed"),
            f"{ratios[worst]:.2f}",
            " ".join(worst),
            "" if flop is None else f"{flop(worst):.2f}",
        )
    )


def draw(found: Found) -> Figure:
    """Times over Muon's, a panel for each kind of weights; the published loops as marks.

    Without AdamW, whose hundredths would leave the others no room.
    """
    kinds = [("attention",), ("QKV by heads",), ("MLP", "experts")]
    names = [c.name for c in found.contenders if c.kind == "pion" or c.name == OWN]
    loops = {c.name: c.loop for c in found.contenders if c.loop in found.names}
    figure, axes = panels(len(kinds), columns=1)
    figure.set_size_inches(11, 10)
    width = 0.8 / len(names)
    for ax, kind in zip(axes, kinds, strict=True):
        shapes = [shape for shape in found.shapes if shape[1] in kind]
        for i, name in enumerate(names):
            at = [j + (i - (len(names) - 1) / 2) * width for j in range(len(shapes))]
            heights = [found.ratio(shape, name, BASE) for shape in shapes]
            up = [height - 1.0 for height in heights]
            ax.bar(at, up, width * 0.9, bottom=1.0, color=COLORS[i % len(COLORS)], label=name)
            if loop := loops.get(name):
                marks = [found.ratio(shape, loop, BASE) for shape in shapes]
                label = "the published loop of the same kind" if i == 0 else None
                ax.plot(at, marks, "k_", ms=11, mew=1.8, label=label)
        ax.axhline(1.0, color="black", lw=1)
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_locator(NullLocator())
        ax.grid(axis="y", color="0.9")
        ax.set_axisbelow(True)
        ax.set_xticks(range(len(shapes)), [f"{MODELS[m].title}\n{name}" for m, name in shapes])
        ax.set_ylabel(f"time over\n{BASE}'s")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


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
    found = Found(cells, shown)
    setup = {
        "machine": machine(device),
        "device": args.device,
        "clock": clock(device),
        "rounds of two steps": args.rounds,
        "scales": scales,
    }
    write(
        "step",
        [setting(setup, found), *tables(found, scales, device)],
        draw(found),
        args.out,
        found={"setup": setup, "cells": cells},
    )


if __name__ == "__main__":
    main()
