"""Predictions as tables and sentences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from ..config import MatmulPrecision, PionConfig, TeamSize
from .describe import Cluster, Layout, Model
from .muon import Path as MuonPath
from .predict import Method, Prediction, largest_matrix, predict

Predictions = Mapping[str, tuple[Method, Prediction]]
"""What was predicted of each method, by its name."""

ASSUMED = ("matmul", "solver", "stream", "link", "mfu")
"""Shares of a cluster's peaks that nothing here was measured on."""

TEAMS: tuple[TeamSize, ...] = ("auto", 1, 2, 4, 8, 16, 32)


def methods(layout: Layout, config: PionConfig, blocks: int) -> dict[str, Method]:
    """The methods that a layout lets choose from, by name; the same result in ``exact`` ones."""
    by_name = {"AdamW": Method(optimizer="adamw")}
    paths: tuple[MuonPath, ...] = ("buffers", "lists")
    for path in paths:
        by_name[f"Muon duplicated, {path}"] = Method(optimizer="muon", path=path)
        if layout.tp > 1:
            by_name[f"Muon blockwise, {path}"] = Method(
                optimizer="muon", path=path, muon="blockwise"
            )
    for size in TEAMS:
        name = "Pion, auto" if size == "auto" else f"Pion, teams of {size}"
        by_name[name] = Method(config=replace(config, team_size=size, blocks=1))
    if blocks > 1 and config.direction != "polar":  # has no blocks
        here = replace(config, team_size="auto", blocks=blocks)
        by_name[f"Pion in {blocks} blocks"] = Method(config=here)
    return by_name


def exact(method: Method) -> bool:
    """Whether a method is Pion, and its result that of one process whatever the layout."""
    return method.optimizer == "pion" and method.config.blocks == 1


def best(
    predictions: Predictions, cluster: Cluster, *, among: str
) -> tuple[str, Method, Prediction] | None:
    """The method with the smallest share of those that fit the GPUs' memory.

    Args:
        predictions: to choose from.
        cluster: has the memory.
        among: ``exact``: Pion's exact modes; else what the names begin with.
    """
    fitting = [
        (name, method, p)
        for name, (method, p) in predictions.items()
        if p.memory <= cluster.capacity
        and (exact(method) if among == "exact" else name.startswith(among))
    ]
    return min(fitting, key=lambda each: each[2].share, default=None)


def flags(method: Method) -> str:
    """A method's flags for Megatron."""
    parts = ["--use-distributed-optimizer"]
    if method.config.blocks > 1:
        parts.append(f"--pion-blocks {method.config.blocks}")
    else:
        parts.append(f"--pion-team-size {method.config.team_size}")
    parts.append(f"--pion-matmul-precision {method.config.matmul_precision}")
    return " ".join(parts)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown, columns as wide as their widest cell."""
    lines = [list(head), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    cells = ([c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def overview(predictions: Predictions, cluster: Cluster) -> str:
    """A row for each method."""
    head = ("optimizer", "step", "exchange", "DP exposed", "share", "state max", "state mean")
    adamw = predictions["AdamW"][1].memory
    return table(
        (*head, "memory", "of AdamW's", "busiest / mean"),
        (
            (
                name,
                milliseconds(p.step),
                milliseconds(p.exchange),
                milliseconds(p.exposed),
                f"{p.share:.1%}",
                gigabytes(p.state_max),
                gigabytes(p.state_mean),
                gigabytes(p.memory) + (" (too much)" if p.memory > cluster.capacity else ""),
                f"{p.memory / adamw:.2f}",
                f"{p.imbalance:.2f}",
            )
            for name, (_, p) in predictions.items()
        ),
    )


def communication(predictions: Predictions) -> str:
    """Bytes that the busiest rank hands to each group's collectives in a step."""
    ops = list(dict.fromkeys(op for _, p in predictions.values() for op in p.moved))
    return table(
        ("optimizer", *ops),
        (
            (name, *(f"{p.moved[op]:,.0f}" if op in p.moved else "" for op in ops))
            for name, (_, p) in predictions.items()
        ),
    )


PRECISIONS: tuple[MatmulPrecision, ...] = ("highest", "high", "bf16")


def precisions(model: Model, layout: Layout, cluster: Cluster, predictions: Predictions) -> str:
    """The best exact mode at every matmul precision, and what bounds it."""
    rows, teams = [], (1, 2, 4, 8)
    for precision in PRECISIONS:
        here = {
            name: (other, predict(model, layout, cluster, other))
            for name, (method, _) in predictions.items()
            if exact(method)
            for other in [replace(method, config=_at(precision, method.config))]
        }
        chosen = best(here, cluster, among="exact")
        if chosen is None:
            continue
        name, method, p = chosen
        # The whole matrices' arithmetic: teams repeat some of it.
        owner = replace(method.config, team_size=1)
        mean = predict(model, layout, cluster, replace(method, config=owner)).mean
        rows.append(
            (
                precision,
                name.removeprefix("Pion, "),
                milliseconds(p.step),
                f"{p.share:.1%}",
                milliseconds(mean),
                f"{mean / (p.model + mean):.1%}",
                *(
                    milliseconds(largest_matrix(model, layout, cluster, owner, ranks=ranks))
                    for ranks in teams
                ),
            )
        )
    head = ("--pion-matmul-precision", "best exact mode", "step", "share")
    even = ("dealt evenly over all ranks", "share if that were all")
    largest = ("largest matrix on one rank", *(f"on each of {ranks}" for ranks in teams[1:]))
    return table((*head, *even, *largest), rows)


def _at(precision: MatmulPrecision, config: PionConfig) -> PionConfig:
    return replace(config, matmul_precision=precision)


def sensitivity(model: Model, layout: Layout, cluster: Cluster, method: Method) -> str:
    """A method's share with each assumed rate halved."""
    rows = [("as assumed", "", f"{predict(model, layout, cluster, method).share:.1%}")]
    for name in ASSUMED:
        value = getattr(cluster, name)
        slower = replace(cluster, name=cluster.name, **{name: value / 2})
        share = predict(model, layout, slower, method).share
        rows.append((name, f"{value:g} to {value / 2:g}", f"{share:.1%}"))
    return table(("halved", "from", "share"), rows)


def advice(predictions: Predictions, layout: Layout, cluster: Cluster) -> list[str]:
    """The best flags, and what bounds them."""
    chosen = best(predictions, cluster, among="exact")
    if chosen is None:
        return [
            "No exact mode fits the GPUs' memory in this layout, activations left out: change "
            "--tp, --pp or --gpus."
        ]
    _, method, p = chosen
    adamw = predictions["AdamW"][1]
    lines = [
        f"Best exact flags: {flags(method)} ({p.share:.1%} of an iteration, AdamW "
        f"{adamw.share:.1%})."
    ]
    blocks = best(predictions, cluster, among="Pion in")
    if blocks is not None:
        lines.append(
            f"Another algorithm: {flags(blocks[1])} ({blocks[2].share:.1%} of an iteration)."
        )
    return lines + limits(p, adamw)


def limits(p: Prediction, adamw: Prediction) -> list[str]:
    """What keeps a prediction of Pion's from AdamW's, in figures."""
    lines = []
    if p.imbalance > 1.3:
        lines.append(
            f"The busiest rank computes {p.imbalance:.1f} times the mean "
            f"({milliseconds(p.busiest)} and {milliseconds(p.mean)})."
        )
    if p.idle:
        lines.append(f"{p.idle:.0%} of the ranks compute no matrix.")
    if p.exchange > 0.1 * p.step:
        lines.append(f"{p.exchange / p.step:.0%} of the step are exchange that nothing hides.")
    if p.memory > adamw.memory:
        lines.append(
            f"The rank with most takes {p.memory / adamw.memory - 1:.1%} more memory than AdamW's "
            f"({gigabytes(p.memory)} and {gigabytes(adamw.memory)})."
        )
    return lines


def growth(rows: Sequence[tuple[Layout, Predictions]], cluster: Cluster) -> str:
    """A row for each number of GPUs."""
    # Not every direction has blocks.
    names = [name for _, predictions in rows for name in predictions]
    kinds = {k: v for k, v in KINDS.items() if k == "exact" or any(n.startswith(k) for n in names)}
    head = ("GPUs", "DP", "samples", "forward, backward", *kinds.values())
    more = ("by", "its step alone", "dealt evenly", "busiest / mean", "memory, of AdamW's")
    cells = []
    for layout, predictions in rows:
        chosen = {kind: best(predictions, cluster, among=kind) for kind in kinds}
        adamw, pion = predictions["AdamW"][1], chosen["exact"]
        cells.append(
            (
                f"{layout.gpus:,}",
                str(layout.dp),
                str(layout.batch),
                milliseconds(adamw.model),
                *("does not fit" if c is None else f"{c[2].share:.1%}" for c in chosen.values()),
                "" if pion is None else pion[0].removeprefix("Pion, "),
                "" if pion is None else f"{pion[2].step / (pion[2].model + pion[2].step):.1%}",
                f"{even(predictions):.1%}",
                "" if pion is None else f"{pion[2].imbalance:.1f}",
                "" if pion is None else f"{pion[2].memory / adamw.memory:.2f}",
            )
        )
    return table((*head, *more), cells)


def even(predictions: Predictions) -> float:
    """Pion's share if its whole matrices' computation were dealt evenly and nothing else cost."""
    p = predictions["Pion, teams of 1"][1]
    return p.mean / (p.model + p.mean)


KINDS = {
    "AdamW": "AdamW",
    "Muon duplicated": "Muon (duplicated)",
    "Muon blockwise": "Muon (blockwise)",
    "exact": "Pion, best exact mode",
    "Pion in": "Pion, in blocks",
}
"""What is compared over numbers of GPUs, with labels."""


def milliseconds(seconds: float) -> str:
    """With three digits."""
    return f"{1e3 * seconds:,.3g} ms" if seconds < 1 else f"{1e3 * seconds:,.0f} ms"


def gigabytes(size: float) -> str:
    """With three digits."""
    return f"{size / 1e9:.3g} GB"
