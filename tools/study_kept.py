"""What all kept trainings say together: a table and a plot, also of studies that are not done."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from matplotlib.figure import Figure
from study_records import Record, Records
from study_report import Table, panels, rates

FIRST_SEED = 1
LAYERS, CORPUS = 4, "code"  # of most trainings


class Size(NamedTuple):
    """What is compared with each other."""

    width: int
    iterations: int
    layers: int
    corpus: str


def kept_table(records: Records) -> Table:
    """A line for each optimizer, size, horizon and learning rate of the rest."""
    table = Table(
        "Validation loss, nats per byte, of all kept trainings, the first seed's best first",
        [
            *("width", "iterations", "optimizer", "rest's lr", "lr: loss of the first seed"),
            *("best lr", "mean of its seeds", "drift"),
        ],
    )
    for size, horizon in _grouped(records.all(), _size):
        rows = sorted(_row(some) for _, some in _grouped(horizon, _contender))
        table.rows += [[_model(size), str(size.iterations), *cells] for _, cells in rows]
    return table


def _row(some: Sequence[Record]) -> tuple[float, list[str]]:
    """What rows are sorted by, and the cells."""
    first = {r["lr"]: _loss(r) for r in some if r["seed"] == FIRST_SEED}
    at = {lr: [_loss(r) for r in some if r["lr"] == lr] for lr in {r["lr"] for r in some}}
    # Of rates that the first seed has tried: others' seeds alone would compare other texts.
    best = min(first or at, key=lambda lr: first.get(lr, statistics.fmean(at[lr])))
    losses = at[best]
    mean = statistics.fmean(losses)
    spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 and mean < math.inf else ""
    drift = max(r.get("drift", math.inf) for r in some)
    return first.get(best, mean), [
        some[0]["method"],
        f"{some[0]['rest']:.2g}",
        ", ".join(f"{lr:.2g}: {_written(first[lr])}" for lr in sorted(first)),
        f"{best:.2g}",
        f"{_written(mean)}{spread} ({len(losses)})",
        f"{drift:.1e}",
    ]


def kept_figure(records: Records, colors: Mapping[str, str]) -> Figure | None:
    """Loss over the learning rate, a panel for each size and horizon; None if nothing is swept.

    Args:
        records: all that is kept.
        colors: by the names of the optimizers that are drawn.
    """
    swept = {}
    for size, some in _grouped(records.all(), _size):
        lines = {}
        for (method, _), each in _grouped(some, _contender):
            points = [(r["lr"], _loss(r)) for r in each if r["seed"] == FIRST_SEED]
            if method in colors and points:
                lines[method] = points
        if any(len(points) > 1 for points in lines.values()):
            swept[size] = lines
    if not swept:
        return None
    figure, axes = panels(len(swept), share=False)
    for where, (size, lines) in zip(axes, swept.items(), strict=True):
        for method, points in lines.items():
            rates(where, points, method, colors[method])
        where.set_title(f"width {_model(size)}, {size.iterations} iterations")
        where.legend(frameon=False, fontsize=8)
    return figure


def _size(record: Record) -> Size:
    return Size(*(record[name] for name in Size._fields))


def _model(size: Size) -> str:
    """The width, and whatever is not as in most trainings."""
    layers = "" if size.layers == LAYERS else f", {size.layers} layers"
    return f"{size.width}{layers}" + ("" if size.corpus == CORPUS else f", {size.corpus}")


def _contender(record: Record) -> tuple[str, float]:
    return record["method"], record["rest"]


def _grouped[K](
    records: Sequence[Record], key: Callable[[Record], K]
) -> list[tuple[K, list[Record]]]:
    ordered = sorted(records, key=key)
    return [(k, list(some)) for k, some in groupby(ordered, key)]


def _loss(record: Record) -> float:
    loss: float = record.get("loss", math.inf)
    return loss


def _written(loss: float) -> str:
    return "diverged" if loss == math.inf else f"{loss:.4f}"
