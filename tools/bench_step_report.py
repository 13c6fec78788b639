"""Tables and the plot of `bench_step`'s measurements."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from bench_step_contenders import BASE, DEFAULT, FLOAT, LIE, MODELS, OWN, Contender, pion_state
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from study_report import COLORS, Table, panels

from pion_dist.state import unfit

Cell = dict[str, Any]
Shape = tuple[str, str]  # model and group


class Results:
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


def setting(setup: dict[str, Any], results: Results) -> Table:
    """What was measured on."""
    table = Table("The run", ("", ""))
    table.rows += [(name, str(setup[name])) for name in ("machine", "clock", "rounds of two steps")]
    for precision in ("float32", "bf16"):
        names = {c.name for c in results.contenders if c.precision == precision}
        measured = [c for c in results.cells if c["contender"] in names and "rate" in c]
        if measured:
            low, high = (f(c["rate"] for c in measured) / 1e9 for f in (min, max))
            span = f"{low:.0f} to {high:.0f} GFLOP a second"
            table.rows.append((f"a {precision} product, in medians", span))
    return table


def tables(results: Results, scales: dict[str, float], device: torch.device) -> list[Table]:
    """All that is said about what was measured."""
    at, ratio = results.at, results.ratio
    legend = Table("What is timed", ("name", "what it is"))
    legend.rows += [(c.name, c.options) for c in results.contenders]
    sizes = Table("Weights, as Pion's matrices", ("", "lengths", "matrices"))
    for model, name in results.shapes:
        group = next(g for g in MODELS[model].groups(scales[model]) if g.name == name)
        each = {w: group.weights.count(w) for w in group.weights}
        what = ", ".join(f"{n * w.count} of {w.m} x {w.n}" for w, n in each.items())
        sizes.rows.append((f"{model} {name}", f"times {scales[model]:g}", what))
    loops = {c.name: c.loop for c in results.contenders if c.loop in results.names}
    products = [c.name for c in results.contenders if c.name != "AdamW"]
    beside_loops = results.table(
        "Time, over that of the published loop",
        lambda s, c: ratio(s, c, loops[c]),
        names=list(loops),
    )
    made = [
        legend,
        sizes,
        results.table("ms a step", lambda s, c: at(s, c)["seconds"] * 1e3, ".1f"),
        results.table(f"Time, over that of {BASE}", lambda s, c: ratio(s, c, BASE), ".3g"),
        *([beside_loops] if loops else []),
        results.table(
            "Counted FLOP, over Muon's", lambda s, c: ratio(s, c, BASE, "flop"), names=products
        ),
        results.table(
            "Counted FLOP a second, over the rate of a square product in the same precision",
            lambda s, c: at(s, c)["fraction"],
            names=products,
        ),
        results.table(
            "Bytes of state, over AdamW's", lambda s, c: ratio(s, c, "AdamW", "state_bytes")
        ),
        layers(results),
        results.table(
            "Peak memory of a step beyond weights, gradients and state, in largest matrices",
            lambda s, c: at(s, c)["peak_bytes"] / at(s, c)["matrix_bytes"],
            ".1f",
        ),
        state_table(),
        targets(results, device),
    ]
    if rows := results.skipped():
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


def targets(results: Results, device: torch.device) -> Table:
    """What was aimed at, and where it was missed by most."""
    table = Table(
        "Targets", ("at most", "of", "over", "hit at", "worst", "where", "counted FLOP there")
    )
    modes = [c for c in results.contenders if c.kind == "pion"]
    heads = [shape for shape in results.shapes if "heads" in shape[1]]
    wholes = [shape for shape in results.shapes if shape not in heads]
    limits = ((0.2, heads), (0.7, wholes)) if device.type == "cuda" else ((1.0, results.shapes),)
    for limit, shapes in limits:
        for c in (c for c in modes if c.loop in results.names):
            _judge(table, results, limit, c.name, c.loop, shapes)
    for (name, peer), limit in LAYER_TARGETS.items():
        if not {name, peer} <= {*results.names}:
            continue
        ratios = {
            (model, "layer"): _layer(results, model, name, peer) for model in _models(results)
        }
        _summarize(table, limit, f"{name}, layer", peer, ratios, None)
    for (kind, shapes), column in zip(KINDS.items(), (0, 1), strict=True):
        there = [shape for shape in shapes if shape in results.shapes]
        for name, peer in itertools.product(MUON_TARGETS, (BASE, OWN)):
            if {name, peer} <= {*results.names}:
                _judge(table, results, MUON_TARGETS[name][column], name, peer, there, kind)
    for c in modes:
        for unit, what in (("matrix_bytes", "matrix"), ("square_bytes", "generator")):
            peaks = {
                shape: cell["peak_bytes"] / cell[unit]
                for shape in results.shapes
                if "peak_bytes" in (cell := results.at(shape, c.name))
            }
            limit = PEAKS.get(c.name, PEAK)
            _summarize(table, limit, f"{c.name}, peak memory", f"largest {what}", peaks, None)
    return table


def layers(results: Results) -> Table:
    """Time and counted FLOP of a whole layer: attention's projections and the MLP or experts."""
    names = results.names
    table = Table(f"A layer, over {BASE}: time, and counted FLOP", ["", *names])
    for model in _models(results):
        for what, title in (("seconds", "time"), ("flop", "FLOP")):
            ratios = (_layer(results, model, name, BASE, what) for name in names)
            cells = ("-" if math.isnan(ratio) else f"{ratio:.2f}" for ratio in ratios)
            table.rows.append([f"{model} {title}", *cells])
    return table


def _models(results: Results) -> list[str]:
    return list(dict.fromkeys(model for model, _ in results.shapes))


def _layer(results: Results, model: str, name: str, to: str, what: str = "seconds") -> float:
    """A layer's sum over another contender's; NaN where a part of it was skipped."""
    parts = [shape for shape in results.shapes if shape[0] == model and "heads" not in shape[1]]
    over, under = (
        sum(results.at(s, each).get(what, math.nan) for s in parts) for each in (name, to)
    )
    return over / under if under else math.nan


def _judge(
    table: Table,
    results: Results,
    limit: float,
    name: str,
    to: str,
    shapes: Sequence[Shape],
    kind: str = "",
) -> None:
    """A row of ratios of times, and of counted FLOP."""
    ratios = {shape: results.ratio(shape, name, to) for shape in shapes}
    what = f"{name}, {kind}" if kind else name
    measured = {shape: ratio for shape, ratio in ratios.items() if not math.isnan(ratio)}
    _summarize(
        table, limit, what, to, measured, lambda shape: results.ratio(shape, name, to, "flop")
    )


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


def draw(results: Results) -> Figure:
    """Times over Muon's, a panel for each kind of weights; the published loops as marks.

    Without AdamW, whose hundredths would leave the others no room.
    """
    kinds = [("attention",), ("QKV by heads",), ("MLP", "experts")]
    names = [c.name for c in results.contenders if c.kind == "pion" or c.name == OWN]
    loops = {c.name: c.loop for c in results.contenders if c.loop in results.names}
    figure, axes = panels(len(kinds), columns=1)
    figure.set_size_inches(11, 10)
    width = 0.8 / len(names)
    for ax, kind in zip(axes, kinds, strict=True):
        shapes = [shape for shape in results.shapes if shape[1] in kind]
        for i, name in enumerate(names):
            at = [j + (i - (len(names) - 1) / 2) * width for j in range(len(shapes))]
            heights = [results.ratio(shape, name, BASE) for shape in shapes]
            up = [height - 1.0 for height in heights]
            ax.bar(at, up, width * 0.9, bottom=1.0, color=COLORS[i % len(COLORS)], label=name)
            if loop := loops.get(name):
                marks = [results.ratio(shape, loop, BASE) for shape in shapes]
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
