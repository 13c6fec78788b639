"""Tables and plots of a study."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

if TYPE_CHECKING:
    from study_runner import Result

# Okabe and Ito's palette: told apart by colour-blind readers too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})


@dataclass
class Table:
    """Rows of text under a heading."""

    title: str
    head: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)

    def markdown(self) -> str:
        """With columns as wide as their widest cell."""
        widths = [max(map(len, column)) for column in zip(self.head, *self.rows, strict=True)]
        lines = [self.head, ["-" * width for width in widths], *self.rows]
        cells = ([c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in lines)
        return "\n".join([f"{self.title}\n", *("| " + " | ".join(line) + " |" for line in cells)])


def write(
    name: str,
    tables: Sequence[Table],
    figure: Figure | None,
    out: Path,
    *,
    data: object | None = None,
) -> None:
    """Print the tables and write OUT/NAME.md, .json (of ``data``, or the tables) and .png."""
    text = "\n\n".join(table.markdown() for table in tables) + "\n"
    print("\n" + text)
    (out / f"{name}.md").write_text(text)
    if data is None:
        data = [{"title": t.title, "head": t.head, "rows": t.rows} for t in tables]
    (out / f"{name}.json").write_text(json.dumps(data, indent=1))
    written = [f"{name}.md", f"{name}.json"]
    if figure is not None:
        figure.savefig(out / f"{name}.png", dpi=130)
        plt.close(figure)
        written.append(f"{name}.png")
    print("written:", ", ".join(str(out / each) for each in written))


def panels(count: int, *, columns: int = 3, share: bool = True) -> tuple[Figure, list[Axes]]:
    """A figure of so many axes."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(4.6 * columns, 3.8 * rows),
        layout="constrained",
        squeeze=False,
        sharey=share,
    )
    return figure, list(axes.flat)[:count]


def sweep(axes: Axes, results: Sequence[Result], label: str, color: str) -> None:
    """Validation loss over the learning rate of results."""
    rates(axes, [(r.run.method.lr, r.loss) for r in results], label, color)


def rates(axes: Axes, trained: Sequence[tuple[float, float]], label: str, color: str) -> None:
    """Validation loss over the learning rate; trainings that diverged are left out."""
    done = sorted((lr, loss) for lr, loss in trained if loss < float("inf"))
    axes.semilogx([lr for lr, _ in done], [y for _, y in done], "o-", color=color, label=label)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("learning rate")
    axes.set_ylabel("validation loss, nats per byte")


def points(
    axes: Axes, names: Sequence[str], columns: Mapping[str, Sequence[Sequence[Result]]]
) -> None:
    """A line of validation losses for each name: all seeds, and a bar at their mean."""
    for color, (label, cells) in zip(COLORS, columns.items(), strict=False):
        for row, results in enumerate(cells):
            losses = [r.loss for r in results if r.loss < float("inf")]
            axes.plot(losses, [row] * len(losses), "o", color=color, ms=4, alpha=0.6)
            if losses:
                axes.plot(statistics.fmean(losses), row, "|", color=color, ms=14, mew=2)
        axes.plot([], [], "o", color=color, label=label)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="y", alpha=0.3)
    axes.set_xlabel("validation loss, nats per byte")


def smoothed(values: Sequence[float], around: int = 5) -> list[float]:
    """Running means."""
    return [
        statistics.fmean(values[max(0, i - around) : i + around + 1]) for i in range(len(values))
    ]


def spread(results: Sequence[Result], seeds: int) -> str:
    """Mean validation loss over seeds, and their standard deviation; how many, if not all."""
    losses = [result.loss for result in results]
    if not losses:
        return "—"
    if float("inf") in losses:
        return f"{losses.count(float('inf'))} of {len(losses)} diverged"
    some = f" ({len(losses)} of {seeds} seeds)" if len(losses) < seeds else ""
    if len(losses) == 1:
        return f"{losses[0]:.4f}{some}"
    return f"{statistics.fmean(losses):.4f} ± {statistics.stdev(losses):.4f}{some}"
