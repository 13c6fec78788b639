"""Time whole iterations of real Megatron: AdamW, Megatron's Muon and Pion, side by side.

    python tools/bench_train.py --out bench_out
    python tools/bench_train.py --device cuda --nproc 8 --model 1.3b -- \\
        --tensor-model-parallel-size 2 --use-distributed-optimizer

Trains each in a Megatron of its own, by turns, round after round; what stands after -- are further
flags of Megatron's, for all alike. Reads Megatron's own timers; writes tables, JSON and a plot.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from bench_step import cpu_name
from bench_step_contenders import MODELS as LAYERS
from bench_step_contenders import Model as Layer
from matplotlib.figure import Figure
from study_report import COLORS, Table, panels, write

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
from megatron_job import (  # noqa: E402
    LLAMA_FLAGS,
    PLAIN_FLAGS,
    JobError,
    launcher,
    lines_of,
    threads,
)
from prepare_corpus import TOKENIZER_FLAGS  # noqa: E402


@dataclass(frozen=True)
class Model:
    """What is trained.

    Attributes:
        layer: its sizes.
        layers: how many.
        vocabulary: entries; the text's are bytes.
        seq: tokens of a sample.
        batch: tokens of an iteration on GPUs, where they are published those.
        micro: samples of a micro-batch, at most.
    """

    layer: Layer
    layers: int
    vocabulary: int
    seq: int
    batch: int
    micro: int

    def flags(self) -> list[str]:
        one = self.layer
        return [
            *("--num-layers", str(self.layers), "--hidden-size", str(one.hidden)),
            *("--ffn-hidden-size", str(one.ffn), "--num-attention-heads", str(one.heads)),
            *("--kv-channels", str(one.head_dim), "--group-query-attention"),
            *("--num-query-groups", str(one.query_groups), *LLAMA_FLAGS),
            *TOKENIZER_FLAGS,
            *("--vocab-size", str(self.vocabulary)),
        ]


MODELS = {
    "tiny": Model(Layer("tiny", 128, 352, 8, 4, 24), 4, 256, 128, 2048, 16),
    "60m": Model(LAYERS["60m"], 8, 32000, 256, 131072, 16),
    "1.3b": Model(LAYERS["1.3b"], 24, 32000, 256, 131072, 16),
    "8b": Model(LAYERS["8b"], 32, 128256, 4096, 524288, 1),
}
# The first is what the others are compared with.
CONTENDERS = {
    "adamw": ("--optimizer", "adam"),
    "muon": ("--optimizer", "muon"),
    "pion": ("--optimizer", "pion"),
    "pion-float32": ("--optimizer", "pion", "--pion-matmul-precision", "highest"),
    "pion-lie": ("--optimizer", "pion", "--pion-recipe", "paper-1.3b"),
}

COMMON = [
    *("--bf16", "--lr", "1e-3", "--lr-decay-style", "constant", "--clip-grad", "1.0"),
    *("--weight-decay", "0.1", "--split", "1,0,0", "--seed", "1"),
    *("--eval-iters", "0", "--eval-interval", "1000000"),
    *("--log-interval", "1", "--timing-log-level", "1", "--num-workers", "0"),
    *("--no-create-attention-mask-in-dataloader",),
]
# What would not be measured as the tables say, and what to use instead.
OWN = {
    "--optimizer": "use --contenders",
    "--train-iters": "use --iterations",
    "--seq-length": "use --seq-length before --",
    "--global-batch-size": "use --batch-tokens",
    "--log-interval": "every iteration's timers are read",
    "--timing-log-level": "the optimizer's share is of Megatron's timers of level 1",
}
WARM = 4  # first iterations, which are left out: state is made, kernels are chosen
MEBI = 2**20


class Training:
    """One training's times.

    Attributes:
        contender: its name.
        round: from 0.
        tokens: of an iteration.
        seconds: by timer, of every two iterations after the first ones, halved: half of Pion's
            modes alternate sides. Of several ranks the slowest.
        state: bytes of moments, of each rank.
        peak: bytes that the device's allocator held at most, of each rank; 0 without one.
    """

    def __init__(self, contender: str, number: int, ranks: Sequence[dict[str, Any]]) -> None:
        self.contender, self.round, first = contender, number, ranks[0]
        self.tokens: int = first["tokens"]
        self.layout = {name: first[name] for name in ("seq_length", "micro_batch", "data_parallel")}
        # With tensor parallelism norms are counted once a rank.
        self.parameters = sum(r["parameters"] for r in ranks) // first["data_parallel"]
        self.seconds = {
            name: [
                max(each) for each in zip(*(pairs(r["totals"][name]) for r in ranks), strict=True)
            ]
            for name in first["totals"]
        }
        self.state = [r["state_bytes"] for r in ranks]
        self.peak = [r["peak_bytes"] for r in ranks]

    def median(self, timer: str) -> float:
        return statistics.median(self.seconds[timer])


def pairs(totals: Sequence[float]) -> list[float]:
    """Seconds an iteration of every two, of a timer's sums."""
    return [(b - a) / 2 for a, b in zip(totals[WARM - 1 :: 2], totals[WARM + 1 :: 2], strict=False)]


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        model: name.
        device: cpu or cuda.
        processes: on this machine.
        seq: tokens of a sample.
        batch: tokens of an iteration.
        contenders: names.
        rounds: of all contenders.
        iterations: of a training.
        extra: the user's flags.
    """

    model: str
    device: str
    processes: int
    seq: int
    batch: int
    contenders: tuple[str, ...]
    rounds: int
    iterations: int
    extra: tuple[str, ...]

    def command(self, folder: Path, contender: str, corpus: Path) -> list[str]:
        model, samples = MODELS[self.model], self.batch // self.seq
        micro = math.gcd(model.micro, max(1, samples // self.processes))
        cpu = self.device == "cpu"
        plain = cpu or importlib.util.find_spec("transformer_engine") is None
        return [
            *launcher(self.processes, cpu=cpu),
            *(str(ROOT / "tools" / "timed_training.py"), str(folder)),
            *(*model.flags(), *COMMON, *(PLAIN_FLAGS if plain else [])),
            *("--seq-length", str(self.seq), "--max-position-embeddings", str(self.seq)),
            *("--micro-batch-size", str(micro), "--global-batch-size", str(samples)),
            *("--train-iters", str(self.iterations), "--data-path", str(corpus)),
            *("--data-cache-path", str(corpus.parent / "cache")),
            *("--distributed-backend", "gloo" if cpu else "nccl"),
            *(*self.extra, *CONTENDERS[contender]),
        ]


def train(plan: Plan, contender: str, number: int, out: Path, corpus: Path) -> Training:
    """Train one contender once.

    Raises:
        JobError: Megatron failed, with the end of its log.
    """
    folder = out / "trainings" / f"{number + 1}-{contender}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log = folder / "log"
    command = plan.command(folder, contender, corpus)
    said = time.monotonic()
    for line in lines_of(command, log, processes=plan.processes):
        if " iteration " in line and " elapsed time " in line and time.monotonic() - said > 20.0:
            said = time.monotonic()
            progress("  " + line[line.index(" iteration ") :].partition("|")[0].strip())
    records = [folder / f"{rank}.json" for rank in range(plan.processes)]
    if missing := [record.name for record in records if not record.exists()]:
        raise JobError(f"{contender}: no {missing[0]} in {folder}: {log} says why")
    return Training(contender, number, [json.loads(record.read_text()) for record in records])


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measure(plan: Plan, out: Path) -> list[Training]:
    """All trainings, by turns, so that a machine that gets slower or faster does so for all."""
    corpus = out / "corpus" / "bytes"
    # Megatron's index of the samples is trainings again by path alone, whatever the text now is.
    shutil.rmtree(corpus.parent, ignore_errors=True)
    progress("preparing the text: the sources of Python's library")
    script = ROOT / "examples" / "prepare_corpus.py"
    for _ in lines_of([sys.executable, str(script), str(corpus)], out / "corpus.log"):
        pass
    trainings = []
    for number in range(plan.rounds):
        for name in plan.contenders:
            progress(f"round {number + 1} of {plan.rounds}: {name}")
            trainings.append(train(plan, name, number, out, corpus))
            milliseconds = 1e3 * trainings[-1].median("interval-time")
            progress(f"  {milliseconds:.1f} ms an iteration")
    return trainings


class Trainings:
    """All trainings, and medians over rounds."""

    def __init__(self, trainings: Sequence[Training]) -> None:
        self.names = list(dict.fromkeys(t.contender for t in trainings))
        self.of = {n: [t for t in trainings if t.contender == n] for n in self.names}
        self.any = trainings[0]

    def seconds(self, name: str, timer: str = "interval-time") -> float:
        return statistics.median(t.median(timer) for t in self.of[name])

    def share(self, name: str) -> float:
        """Of MegatronOptimizer.step in an iteration."""
        return statistics.median(
            t.median("optimizer") / t.median("interval-time") for t in self.of[name]
        )

    def speeds(self, name: str) -> list[float]:
        """Tokens a second over the first contender's, of every round."""
        both = zip(self.of[self.names[0]], self.of[name], strict=True)
        return [base.median("interval-time") / t.median("interval-time") for base, t in both]

    def state(self, name: str) -> int:
        """Bytes of the rank that has most."""
        return max(self.of[name][0].state)

    def peak(self, name: str) -> int:
        return max(max(t.peak) for t in self.of[name])


def tables(plan: Plan, trainings: Trainings) -> list[Table]:
    base = trainings.names[0]
    legend = Table("What is trained with", ("name", "Megatron's flags"))
    legend.rows += [(name, f"`{' '.join(CONTENDERS[name])}`") for name in trainings.names]
    main = Table(
        "An iteration, medians",
        [
            *("", "ms", "tokens/s", f"over {base}'s", "in each round"),
            *("optimizer, ms", "share", "own step, ms", "forward and backward, ms"),
        ],
    )
    memory = Table("Memory of the rank with most", ["", "state, MiB", f"over {base}'s"])
    peaks = all(trainings.peak(name) for name in trainings.names)
    memory.head = [*memory.head, *(["peak, MiB", f"over {base}'s"] if peaks else [])]
    for name in trainings.names:
        seconds, ratios = trainings.seconds(name), trainings.speeds(name)
        main.rows.append(
            [
                *(name, f"{1e3 * seconds:.1f}", f"{trainings.any.tokens / seconds:,.0f}"),
                *(f"{statistics.median(ratios):.3f}", f"{min(ratios):.3f} to {max(ratios):.3f}"),
                f"{1e3 * trainings.seconds(name, 'optimizer'):.2f}",
                f"{trainings.share(name):.1%}",
                f"{1e3 * trainings.seconds(name, 'optimizer-inner-step'):.2f}",
                f"{1e3 * trainings.seconds(name, 'forward-backward'):.1f}",
            ]
        )
        row = [name]
        for measured in (trainings.state, trainings.peak)[: 1 + peaks]:
            row += [f"{measured(name) / MEBI:,.2f}", f"{measured(name) / measured(base):.2f}"]
        memory.rows.append(row)
    return [setting(plan, trainings), legend, main, memory]


def setting(plan: Plan, trainings: Trainings) -> Table:
    one, layout = trainings.any, trainings.any.layout
    table = Table("The run", ("", ""))
    table.rows += [
        ("machine", machine(plan)),
        ("versions", versions(plan)),
        ("model", f"{plan.model}, {one.parameters / 1e6:,.1f}M parameters"),
        (
            "an iteration",
            f"{one.tokens:,} tokens: {one.tokens // layout['seq_length']} samples of "
            f"{layout['seq_length']}, micro-batches of {layout['micro_batch']}",
        ),
        ("layout", f"ranks: {plan.processes}, data-parallel: {layout['data_parallel']}"),
        ("further flags", f"`{' '.join(plan.extra)}`" if plan.extra else "none"),
        (
            "rounds",
            f"{plan.rounds} of {plan.iterations} iterations, without the first {WARM}, by twos",
        ),
        (
            "clock",
            "Megatron's timers: optimizer is MegatronOptimizer.step (gradients to float32, "
            "norm, the optimizer's own step, weights to bf16 and to other ranks); ranks start "
            "a timer together",
        ),
    ]
    return table


def machine(plan: Plan) -> str:
    if plan.device == "cuda":
        return f"{torch.cuda.get_device_name()}, nccl"
    cores = len(os.sched_getaffinity(0))
    each = os.environ.get("OMP_NUM_THREADS", str(threads(plan.processes)))
    return f"{cpu_name()}, cores: {cores}, threads of a rank: {each}, gloo"


def versions(plan: Plan) -> str:
    names = ["torch", "megatron-core", "emerging-optimizers"]
    installed = [f"{name} {version(name)}" for name in names]
    if plan.device == "cuda":
        engine = importlib.util.find_spec("transformer_engine") is not None
        installed.append(("with" if engine else "without") + " Transformer Engine")
    return ", ".join([f"Python {platform.python_version()}", *installed])


def draw(trainings: Trainings, title: str) -> Figure:
    """What an iteration is made of, a bar for each contender."""
    figure, (axes,) = panels(1)
    figure.set_size_inches(9, 1.4 + 0.55 * len(trainings.names))
    own = [trainings.seconds(name, "optimizer-inner-step") for name in trainings.names]
    whole = [trainings.seconds(name, "optimizer") for name in trainings.names]
    passes = [trainings.seconds(name, "forward-backward") for name in trainings.names]
    total = [trainings.seconds(name) for name in trainings.names]
    parts = {
        "forward and backward": passes,
        "the optimizer's own step": own,
        "norm, copies, exchange": [a - b for a, b in zip(whole, own, strict=True)],
        "the rest": [t - f - o for t, f, o in zip(total, passes, whole, strict=True)],
    }
    left = [0.0] * len(total)
    for color, (label, part) in zip(COLORS, parts.items(), strict=False):
        wide = [1e3 * seconds for seconds in part]
        axes.barh(trainings.names, wide, left=left, color=color, label=label)
        left = [a + b for a, b in zip(left, wide, strict=True)]
    for row, name in enumerate(trainings.names):
        rate = trainings.any.tokens / total[row]
        text = f" {rate:,.0f} tokens/s, optimizer {trainings.share(name):.1%}"
        axes.text(left[row], row, text, va="center", fontsize=9)
    axes.set_xlim(0.0, 1.45 * max(left))
    axes.invert_yaxis()
    axes.set_xlabel(f"ms an iteration: {title}")
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    return figure


def parsed(arguments: Sequence[str]) -> tuple[Plan, Path]:
    """The user's wishes, checked."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        usage="%(prog)s [options] [-- FLAG ...]",
        epilog="What stands after -- are flags of Megatron's for all contenders, such as "
        "--use-distributed-optimizer or --num-layers 4; they win over a model's.",
    )
    parser.add_argument("--model", choices=MODELS, default="tiny", help="default: %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--nproc", type=int, default=1, help="ranks, of this machine (default: 1)")
    parser.add_argument("--seq-length", type=int, help="default: the model's")
    parser.add_argument(
        "--batch-tokens",
        type=int,
        help="of an iteration (default: the model's on GPUs, on a CPU a micro-batch a process)",
    )
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=CONTENDERS,
        help="the first is what others are compared with (default: all)",
    )
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--iterations", type=int, default=24, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("bench_out"), help="default: %(default)s")
    args = parser.parse_args(arguments[:cut])
    extra = tuple(arguments[cut + 1 :])
    model = MODELS[args.model]
    seq = model.seq if args.seq_length is None else args.seq_length
    positive = {"--nproc": args.nproc, "--seq-length": seq, "--rounds": args.rounds}
    for name, value in positive.items():
        if value < 1:
            parser.error(f"{name} {value}: must be at least 1")
    batch = args.batch_tokens
    if batch is None:
        least = model.micro * args.nproc * seq
        batch = least if args.device == "cpu" else max(model.batch // seq, 1) * seq
    if batch < seq or batch % seq:
        parser.error(f"--batch-tokens {batch}: must be a multiple of the samples' length, {seq}")
    if args.iterations < WARM + 2:
        parser.error(
            f"--iterations {args.iterations}: must be at least {WARM + 2}, of which the first "
            f"{WARM} are not counted"
        )
    for flag in extra:
        if (name := flag.partition("=")[0]) in OWN:
            parser.error(f"{name} after --: {OWN[name]}")
    if args.device == "cuda" and torch.cuda.device_count() < args.nproc:
        parser.error(
            f"--device cuda --nproc {args.nproc}: torch sees {torch.cuda.device_count()} GPUs"
        )
    names = args.contenders or list(CONTENDERS)
    names = tuple(dict.fromkeys(names))
    plan = Plan(
        args.model, args.device, args.nproc, seq, batch, names, args.rounds, args.iterations, extra
    )
    return plan, args.out.resolve()


def main() -> None:
    plan, out = parsed(sys.argv[1:])
    out.mkdir(parents=True, exist_ok=True)
    try:
        runs = measure(plan, out)
    except JobError as error:
        sys.exit(f"bench_train: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    trainings = Trainings(runs)
    title = f"{plan.model}, {trainings.any.tokens:,} tokens"
    setup = asdict(plan) | {"machine": machine(plan), "versions": versions(plan)}
    write(
        "train",
        tables(plan, trainings),
        draw(trainings, title),
        out,
        data={"setup": setup, "contenders": CONTENDERS, "trainings": [vars(run) for run in runs]},
    )


if __name__ == "__main__":
    main()
