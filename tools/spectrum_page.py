"""The page of spectrum_report: one HTML file of what report.json says, with plots in it."""

from __future__ import annotations

import base64
import io
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

# Okabe and Ito's palette without its yellow, told apart by colour-blind readers too; and lines.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("solid", "dashed", "dotted")  # as matplotlib and CSS call them
GREY = "#BBBBBB"
COLUMNS = 4  # panels beside each other
EPSILON = 1e-9  # drifts below it are drawn as it: float64's own noise, and no logarithm of zero
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.formatter.useoffset": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": 100,
    "svg.hashsalt": "spectrum_report",  # the same page for the same checkpoints
    "svg.fonttype": "none",
}
TRENDS = {  # of a matrix: what, and its label
    "drift": "drift",
    "condition": "condition number / at the start",
    "effective_rank": "effective rank / at the start",
    "energy": "hyperspherical energy / at the start",
}
TABLE = (  # column, its explanation
    ("matrix", "layer and expert numbers count from 0"),
    ("size", "rows × columns"),
    ("run", ""),
    ("optimizer", "that steps the weight"),
    ("iteration", "the run's last"),
    ("drift", "largest |σ − σ_start| / σ_start"),
    ("of σ₁", "largest |σ − σ_start|, divided by the largest singular value"),
    ("σ₁", "largest singular value"),
    ("σ_min", "smallest singular value"),
    ("condition", "largest / smallest"),
    ("eff. rank", "exp of the entropy of the singular values"),
    ("stable rank", "squared Frobenius norm / squared largest singular value"),
    ("energy", "hyperspherical: mean inverse distance of two rows' directions; * of a sample"),
    ("read", "what was read: the optimizer's float32 master, or the model's weight"),
)


def write_page(contents: dict[str, Any], path: Path) -> list[str]:
    """Write the page.

    Args:
        contents: what report.json has.
        path: of the page.

    Returns:
        A line of text for every run.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    rows = summary(contents)
    with plt.rc_context(STYLE):
        page = environment.get_template("spectrum_page.html").render(
            contents=contents,
            summary=rows,
            overview=overview(contents),
            trends=trends(contents),
            legend=legend(contents),
            layers=layers(contents),
            columns=TABLE,
            table=table(contents),
            low=sorted(low_precision(contents)),
        )
    path.write_text(page)
    return [", ".join(f"{name}: {value}" for name, value in row.items()) for row in rows]


def summary(contents: dict[str, Any]) -> list[dict[str, str]]:
    """A row of text for every run."""
    rows = []
    for i, run in enumerate(contents["runs"]):
        last = {m["name"]: m["runs"][i]["checkpoints"][-1] for m in contents["matrices"]}
        drifts = {name: each["drift"] for name, each in last.items()}
        worst = max(drifts, key=lambda name: drifts[name])
        reads = [each["read"] for m in contents["matrices"] for each in m["runs"][i]["checkpoints"]]
        row = {
            "run": run["name"],
            "optimizer": run["optimizer"],
            "iterations": ", ".join(str(c["iteration"]) for c in run["checkpoints"]),
            "read": " and ".join(sorted(set(reads))),
        }
        if moved(contents, i):
            row |= {
                "largest drift": f"{drifts[worst]:.2g}",
                "median": f"{statistics.median(drifts.values()):.2g}",
                "largest in": worst,
            }
        else:
            row |= dict.fromkeys(("largest drift", "median", "largest in"), "one checkpoint")
        rows.append(row)
    return rows


def moved(contents: dict[str, Any], run: int) -> bool:
    """Whether a run has a start and something after it."""
    return bool(contents["start"]) or len(contents["runs"][run]["checkpoints"]) > 1


def low_precision(contents: dict[str, Any]) -> set[str]:
    """Dtypes of weights whose float32 masters could not be read."""
    return {
        each["read"]
        for m in contents["matrices"]
        for run in m["runs"]
        for each in run["checkpoints"]
        if each["read"] not in ("fp32 master", "float32", "float64")
    }


def color(run: int) -> str:
    return COLORS[run % len(COLORS)]


def line(run: int) -> str:
    return LINES[run // len(COLORS) % len(LINES)]


def shade(index: int, count: int) -> float:
    """How opaque a run's checkpoint is drawn: the last one fully."""
    return 1.0 if count == 1 else 0.3 + 0.7 * index / (count - 1)


def worst_of(contents: dict[str, Any]) -> dict[tuple[int | None, str], list[dict[str, Any]]]:
    """Matrices by layer and kind; several are experts or heads, the farthest moved comes first."""
    groups: dict[tuple[int | None, str], list[dict[str, Any]]] = {}
    for m in contents["matrices"]:
        groups.setdefault((m["layer"], m["kind"]), []).append(m)
    for group in groups.values():
        group.sort(key=lambda m: -max(run["checkpoints"][-1]["drift"] for run in m["runs"]))
    return groups


def overview(contents: dict[str, Any]) -> str:
    """A map for every run: each kind of matrix, each layer, how far its spectrum has moved."""
    shown = [i for i in range(len(contents["runs"])) if moved(contents, i)]
    if not shown:
        return ""
    groups = worst_of(contents)
    kinds = list(dict.fromkeys(kind for _, kind in groups))
    numbers = sorted({-1 if layer is None else layer for layer, _ in groups})
    cells = []
    for i in shown:
        rows = [[math.nan] * len(numbers) for _ in kinds]
        for (layer, kind), group in groups.items():
            value = max(m["runs"][i]["checkpoints"][-1]["drift"] for m in group)
            column = numbers.index(-1 if layer is None else layer)
            rows[kinds.index(kind)][column] = max(EPSILON, value)
        cells.append(rows)
    drawn = [value for rows in cells for row in rows for value in row if not math.isnan(value)]
    low = 10 ** math.floor(math.log10(min(drawn)))
    norm = LogNorm(low, max(10 * low, 10 ** math.ceil(math.log10(max(drawn)))))
    columns = max(1, min(len(shown), 60 // (len(numbers) + 6)))
    figure, panels = plt.subplots(
        -(-len(shown) // columns),
        columns,
        figsize=(
            min(18, columns * (2.6 + 0.22 * len(numbers))) + 1.6,
            -(-len(shown) // columns) * (0.9 + 0.24 * len(kinds)),
        ),
        layout="constrained",
        squeeze=False,
        sharey=True,
    )
    for axes in panels.flat[len(shown) :]:
        axes.set_axis_off()
    for axes, i, rows in zip(panels.flat, shown, cells, strict=False):
        image = axes.imshow(rows, norm=norm, cmap="cividis", aspect="auto")
        last = contents["runs"][i]["checkpoints"][-1]["iteration"]
        axes.set_title(f"{contents['runs'][i]['name']}, iteration {last}", color=color(i))
        axes.set_yticks(range(len(kinds)), [kind.replace(".layers", "") for kind in kinds])
        step = -(-len(numbers) // 24)
        labels = ["none" if n < 0 else str(n) for n in numbers]
        axes.set_xticks(range(0, len(numbers), step), labels[::step])
        axes.set_xlabel("layer")
        axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=list(panels.flat), fraction=0.05, pad=0.01)
    bar.set_label("drift since the start")
    return picture(figure)


def change_of(m: dict[str, Any], run: int, checkpoint: int, what: str) -> float | None:
    """A number of TRENDS."""
    each = m["runs"][run]
    now, start = each["checkpoints"][checkpoint][what], each["start"][what]
    if what == "drift":
        return max(EPSILON, float(now))
    return float(now / start) if now and start else None


def trends(contents: dict[str, Any]) -> str:
    """Over iterations: the median and the range over all matrices of a run."""
    shown = [i for i in range(len(contents["runs"])) if moved(contents, i)]
    if not shown:
        return ""
    figure, panels = plt.subplots(1, len(TRENDS), figsize=(15, 3.3), layout="constrained")
    for axes, (what, label) in zip(panels, TRENDS.items(), strict=True):
        for i in shown:
            draw_trend(axes, contents, i, what)
        if what == "drift":
            axes.set_yscale("log")
        elif axes.get_ylim()[1] > 3:  # times the start: a few matrices would flatten the rest
            axes.set_yscale("log")
            label_values(axes)
        axes.set_title(label, loc="left")
        axes.set_xlabel("iteration")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(axis="y", alpha=0.3)
    return picture(figure)


def draw_trend(axes: Axes, contents: dict[str, Any], run: int, what: str) -> None:
    points = []
    for c, checkpoint in enumerate(contents["runs"][run]["checkpoints"]):
        if what == "drift" and c == 0 and not contents["start"]:
            continue  # the start itself
        values = [change_of(m, run, c, what) for m in contents["matrices"]]
        if known := sorted(value for value in values if value is not None):
            points.append((checkpoint["iteration"], known[0], statistics.median(known), known[-1]))
    if points:
        x, low, middle, high = zip(*points, strict=True)
        axes.vlines(x, low, high, color=color(run), alpha=0.25, lw=5)
        axes.fill_between(x, low, high, color=color(run), alpha=0.12, lw=0)
        axes.plot(x, middle, ls=line(run), color=color(run), marker="o", ms=4)


def label_values(axes: Axes) -> None:
    """1, 2, 5, 10 and so on, at a logarithmic axis, or its powers of ten if it is long."""
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1e3 * low else (1,)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()


def legend(contents: dict[str, Any]) -> list[tuple[str, str]]:
    """Of the start and every run, the CSS of its line, the same in every plot, and what it is."""
    label = "start" if contents["start"] else "each run's first checkpoint"
    keys = [(f"5px solid {GREY}", label)]
    for i, run in enumerate(contents["runs"]):
        first, last = (run["checkpoints"][c]["iteration"] for c in (0, -1))
        text = (
            f"iterations {first} to {last}, pale to full" if first != last else f"iteration {last}"
        )
        keys.append((f"2px {line(i)} {color(i)}", f"{run['name']}, {text}"))
    return keys


def layers(contents: dict[str, Any]) -> list[tuple[str, str, str]]:
    """For each layer its title, its farthest moved matrix, and plots of spectra."""
    groups = worst_of(contents)
    numbers = list(dict.fromkeys(layer for layer, _ in groups))
    pages = []
    for number in numbers:
        some = [group for (layer, _), group in groups.items() if layer == number]
        count = sum(len(group) for group in some)
        title = "outside of layers" if number is None else f"layer {number}"
        note = f"{count} matrices"
        if count > len(some):
            note += "; of experts and heads the one whose spectrum moved most"
        pages.append((title, note, spectra(contents, [group[0] for group in some])))
    return pages


def spectra(contents: dict[str, Any], shown: Sequence[dict[str, Any]]) -> str:
    """Singular values of some matrices, every checkpoint's over each other."""
    rows = -(-len(shown) // COLUMNS)
    figure, panels = plt.subplots(
        rows, COLUMNS, figsize=(15, 2.9 * rows), layout="constrained", squeeze=False
    )
    for axes in panels.flat[len(shown) :]:
        axes.set_axis_off()
    told = [i for i in range(len(contents["runs"])) if moved(contents, i)][:6]
    for axes, m in zip(panels.flat, shown, strict=False):
        for i, run in enumerate(m["runs"]):
            draw_spectra(axes, [rank + 1 for rank in m["ranks"]], run, i, moved(contents, i))
        short = m["name"].partition(f".{m['layer']}.")[2] if m["layer"] is not None else m["name"]
        axes.set_title("{}  {}×{}".format(short, *m["shape"]), loc="left")
        for place, i in enumerate(reversed(told)):
            axes.text(
                0.03,
                0.04 + 0.09 * place,
                f"drift {m['runs'][i]['checkpoints'][-1]['drift']:.2g}",
                color=color(i),
                transform=axes.transAxes,
            )
        label_values(axes)
    for axes in panels[:, 0]:
        axes.set_ylabel("singular value")
    figure.supxlabel("rank of the singular value, largest first", fontsize=9)
    return picture(figure)


def draw_spectra(
    axes: Axes, x: Sequence[int], run: dict[str, Any], index: int, with_start: bool
) -> None:
    """Zeros are left out of the logarithmic axis."""
    marker = "." if len(x) == 1 else ""
    style: dict[str, Any] = {"color": color(index), "ls": line(index), "lw": 1.3}
    if with_start:
        start = [value or math.nan for value in run["start"]["values"]]
        axes.semilogy(x, start, marker, color=GREY, lw=5, zorder=1, solid_capstyle="butt")
    count = len(run["checkpoints"])
    for c, each in enumerate(run["checkpoints"]):
        if each["values"] != run["start"]["values"] or not with_start:
            values = [value or math.nan for value in each["values"]]
            axes.semilogy(x, values, marker=marker, alpha=shade(c, count), **style)


def table(contents: dict[str, Any]) -> list[list[tuple[str, str]]]:
    """The last checkpoint of every run: for each cell its text and what it is sorted by."""
    rows = []
    for m in contents["matrices"]:
        for i, run in enumerate(contents["runs"]):
            each = m["runs"][i]["checkpoints"][-1]
            sampled = "*" if each["energy_rows"] < m["shape"][0] else ""
            drifts = [number(each[k], ".2g") for k in ("drift", "drift_of_largest")]
            rows.append(
                [
                    (m["name"], ""),
                    ("{}×{}".format(*m["shape"]), str(math.prod(m["shape"]))),
                    (run["name"], ""),
                    (each["optimizer"], ""),
                    (str(run["checkpoints"][-1]["iteration"]),) * 2,
                    *(drifts if moved(contents, i) else [number(None, "")] * 2),
                    number(each["largest"], ".4g"),
                    number(each["smallest"], ".3g"),
                    number(each["condition"], ".3g", "∞"),
                    number(each["effective_rank"], ".1f"),
                    number(each["stable_rank"], ".1f"),
                    number(each["energy"], ".5f", after=sampled),
                    (each["read"], ""),
                ]
            )
    return rows


def number(value: float | None, form: str, missing: str = "–", after: str = "") -> tuple[str, str]:
    """A cell's text and what it is sorted by."""
    if value is None:
        return missing, "inf" if missing == "∞" else "-inf"
    return f"{value:{form}}{after}", repr(value)


def picture(figure: Figure) -> str:
    """An image for the page. Inside of one, ids of two figures do not meet."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    plt.close(figure)
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()
