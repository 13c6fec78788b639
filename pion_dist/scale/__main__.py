"""Predict what an optimizer step costs: ``python -m pion_dist.scale --help``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields, replace
from pathlib import Path
from typing import Any

from ..config import choices
from ..recipes import RECIPES, in_bf16
from . import report
from .describe import Cluster, Layout, Model
from .plot import plot
from .predict import predict
from .presets import CLUSTERS, MODELS, named

# Llama 3's largest batch, arXiv 2407.21783: 16M tokens.
LARGEST_BATCH = 2048


def main(arguments: Sequence[str] | None = None) -> None:
    """Print predictions, and draw them."""
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        _print(args)
    except ValueError as error:
        parser.error(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pion_dist.scale",
        description="Predict state, communication and time of AdamW's, Muon's and Pion's step on a "
        "described cluster. docs/SCALE.md says what the model counts and what it assumes.",
    )
    parser.add_argument(
        "--model", nargs="+", default=["llama-70b"], help=f"one or more of {', '.join(MODELS)}"
    )
    parser.add_argument("--cluster", default="h100", help=f"one of {', '.join(CLUSTERS)}")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1024])
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw shares over --gpus")
    layout = parser.add_argument_group("layout; by default the model's")
    _numbers(layout, Layout, without=("gpus",))
    pion = parser.add_argument_group("Pion")
    pion.add_argument("--recipe", default="pretrain", choices=list(RECIPES))
    pion.add_argument("--blocks", type=int, help="of the other algorithm; by default --tp")
    for option, values in choices().items():
        pion.add_argument(f"--{option.replace('_', '-')}", choices=values)
    pion.add_argument(
        "--offload-state", action="store_true", help="moments in host memory, as in PionConfig"
    )
    _numbers(parser.add_argument_group("in place of the model's"), Model)
    _numbers(parser.add_argument_group("in place of the cluster's"), Cluster)
    return parser


def _numbers(group: Any, of: type, without: Sequence[str] = ()) -> None:
    """A flag for every numeric field of a dataclass, unless another has it."""
    taken = {flag for action in group._actions for flag in action.option_strings}
    for field in fields(of):
        flag = f"--{field.name.replace('_', '-')}"
        if field.name not in without and flag not in taken and field.type in ("int", "float"):
            kind = int if field.type == "int" else float
            group.add_argument(flag, type=kind, help=_meaning(of, field))


def _meaning(of: type, field: Field[Any]) -> str:
    """What a field's class says of it, in its docstring."""
    lines = (of.__doc__ or "").splitlines()
    start = f"        {field.name}: "
    meaning = next((line.removeprefix(start) for line in lines if line.startswith(start)), "")
    default = "" if field.default is MISSING else f" (default {field.default:g})"
    return (meaning.rstrip(".") + default).replace("%", "%%")


def _print(args: argparse.Namespace) -> None:
    cluster = _overridden(named(CLUSTERS, "cluster", args.cluster), args)
    config = replace(
        in_bf16(args.recipe),
        offload_state=args.offload_state,
        **{k: v for k in choices() if (v := getattr(args, k, None)) is not None},
    )
    if args.blocks is not None and config.direction == "polar":
        raise ValueError(
            f"--blocks {args.blocks} is of other directions than polar: leave it out, or choose "
            "another --direction or --recipe"
        )
    drawn: dict[str, list[tuple[Layout, report.Predictions]]] = {}
    for name in args.model:
        model = _overridden(named(MODELS, "model", name), args)
        for gpus in args.gpus:
            layout = _layout(args, model, gpus)
            blocks = layout.tp if args.blocks is None else args.blocks
            predictions = {
                label: (method, predict(model, layout, cluster, method))
                for label, method in report.methods(layout, config, blocks).items()
            }
            drawn.setdefault(name, []).append((layout, predictions))
        print(f"\n## {name} on {cluster.name}\n")
        if len(args.gpus) > 1:
            print(report.growth(drawn[name], cluster))
        else:
            _one(model, layout, cluster, predictions)
    if args.plot is not None:
        plot(drawn, cluster, args.plot)
        print(f"\nwritten: {args.plot}")


def _one(model: Model, layout: Layout, cluster: Cluster, predictions: report.Predictions) -> None:
    """Everything of one layout."""
    first = predictions["AdamW"][1]
    print(
        f"{layout.gpus:,} GPUs as TP {layout.tp}, PP {layout.pp}, CP {layout.cp}, EP {layout.ep}, "
        f"DP {layout.dp}; {layout.batch} samples of {layout.seq}; forward and backward "
        f"{report.milliseconds(first.model)}\n"
    )
    print(report.overview(predictions, cluster))
    print("\nBytes that the busiest rank hands to collectives in a step:\n")
    print(report.communication(predictions))
    print()
    for line in report.advice(predictions, layout, cluster):
        print(f"- {line}")
    chosen = report.best(predictions, cluster, among="exact")
    if chosen is not None:
        name, method, _ = chosen
        print("\nThe best exact mode at each precision:\n")
        print(report.precisions(model, layout, cluster, predictions))
        print(f"\n{name}, what the assumptions decide:\n")
        print(report.sensitivity(model, layout, cluster, method))
        if method.config.offload_state:
            size = report.gigabytes(predictions[name][1].host_max)
            print(
                f"\nThe moments are in host memory, {size} on the rank with most. All travel to "
                "the GPU and back in a step."
            )


def _overridden[T: (Model, Cluster)](described: T, args: argparse.Namespace) -> T:
    own = {f.name for f in fields(described)} - {"name", "tp", "pp", "ep"}
    given = {k: v for k, v in vars(args).items() if k in own and v is not None}
    return replace(described, **given)


def _layout(args: argparse.Namespace, model: Model, gpus: int) -> Layout:
    """The layout that flags and model give; 2M to 16M tokens, as many as there are GPUs for."""
    own = {f.name for f in fields(Layout)} - {"gpus"}
    given = {k: v for k, v in vars(args).items() if k in own and v is not None}
    sizes = {"tp": model.tp, "pp": model.pp, "ep": model.ep} | given
    return Layout(**{"gpus": gpus, "batch": max(1, min(LARGEST_BATCH, gpus // 2)), **sizes})


if __name__ == "__main__":
    main(sys.argv[1:])
