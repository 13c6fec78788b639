"""Predictions as a plot: the optimizer's share over numbers of GPUs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from .describe import Cluster, Layout
from .report import KINDS, Predictions, best, even

# Okabe and Ito's palette: told apart by colour-blind readers too.
COLORS = ("#000000", "#E69F00", "#D55E00", "#0072B2", "#009E73", "#CC79A7")


def plot(
    models: Mapping[str, Sequence[tuple[Layout, Predictions]]], cluster: Cluster, path: Path
) -> None:
    """Draw the optimizer's share over GPUs, a panel for each model.

    Raises:
        ValueError: matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    columns = min(2, len(models))
    lines = -(-len(models) // columns)
    figure, panels = plt.subplots(
        lines,
        columns,
        figsize=(5.2 * columns, 3.6 * lines + 0.8),
        layout="constrained",
        squeeze=False,
        sharey=True,
    )
    for axes in panels.flat[len(models) :]:
        axes.set_visible(False)
    for axes, (name, rows) in zip(panels.flat, models.items(), strict=False):
        for color, (kind, label) in zip(COLORS, KINDS.items(), strict=False):
            bests = [(layout.gpus, best(each, cluster, among=kind)) for layout, each in rows]
            points = [(gpus, 100 * b[2].share) for gpus, b in bests if b is not None]
            if points:
                axes.plot(*zip(*points, strict=True), "o-", color=color, label=label, ms=4)
        points = [(layout.gpus, 100 * even(each)) for layout, each in rows]
        axes.plot(
            *zip(*points, strict=True), ":", color=COLORS[3], label="Pion's FLOP, dealt evenly"
        )
        axes.axhline(3, color="0.6", lw=0.8)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = (0.5, 1, 2, 5, 10, 20, 50, 100)
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        gpus = [layout.gpus for layout, _ in rows]
        axes.set_xticks(gpus, [f"{g:,}" for g in gpus])
        axes.set_title(name)
        axes.set_xlabel("GPUs")
    for axes in panels[:, 0]:
        axes.set_ylabel("optimizer's share, %")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
