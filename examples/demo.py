"""Train the same small byte-level GPT in Megatron with Pion, Muon and AdamW, and compare them.

    python examples/demo.py --out demo_out [--text book.txt notes/]

Prints losses and how far each optimizer moved the singular values, and draws OUT/demo.png: losses,
spectra at start and end, and what Pion's steps did.
"""

import argparse
import re
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.ticker import LogLocator, NullFormatter
from megatron_job import LLAMA_FLAGS, PLAIN_FLAGS, JobError, launcher, lines_of
from prepare_corpus import TOKENIZER_FLAGS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from pion_dist import PionConfig
from pion_dist.classify import ParamInfo, Rotated, classify
from pion_dist.spectrum import drift, singular_values

EXAMPLES = Path(__file__).resolve().parent
HEADS, QUERY_GROUPS = 4, 2
# Wider heads than hidden size / heads: no weight is square. The smallest singular value of a square
# random matrix is so near zero that float32's rounding shows in it.
HEAD_DIM = 48
QUERY_GROUP = (("q", HEADS // QUERY_GROUPS * HEAD_DIM), ("k", HEAD_DIM), ("v", HEAD_DIM))
MODEL_FLAGS = [
    *("--num-layers", "4", "--hidden-size", "128", "--ffn-hidden-size", "352"),
    *("--num-attention-heads", str(HEADS), "--kv-channels", str(HEAD_DIM)),
    *("--group-query-attention", "--num-query-groups", str(QUERY_GROUPS), "--seq-length", "256"),
    *("--max-position-embeddings", "256"),
    *LLAMA_FLAGS,
]
# An iteration of 16 x 256 bytes takes 0.3 to 0.4 s on two cores with bf16 units, 0.6 s on two
# without.
TRAIN_FLAGS = [
    *("--micro-batch-size", "16", "--global-batch-size", "16", "--bf16"),
    *("--lr-decay-style", "cosine", "--lr-warmup-fraction", "0.1", "--clip-grad", "1.0"),
    *("--weight-decay", "0.1", "--adam-beta2", "0.95", "--pion-init", "fan_in"),
    *("--split", "9,1,0", "--eval-interval", "100", "--eval-iters", "20", "--log-interval", "5"),
    *("--num-workers", "0", "--no-create-attention-mask-in-dataloader"),
    *("--ckpt-format", "torch_dist", "--save-interval", "1000000"),  # only at the end
]
FINAL_LR = 0.1  # of the first, at the end of the cosine


def pion_flags(lr: float, rest: float) -> list[str]:
    """Pion's defaults; ``rest``: Adam's learning rate for all that is not Pion's."""
    lrs = ["--lr", str(rest), "--min-lr", str(rest * FINAL_LR), "--pion-lr-mult", str(lr / rest)]
    return ["--optimizer", "pion", *lrs]


def peer_flags(optimizer: str, lr: float, rest: float) -> list[str]:
    """``rest``: the learning rate of the embedding and the output layer."""
    lrs = ["--lr", str(lr), "--min-lr", str(lr * FINAL_LR)]
    lrs += ["--decoupled-lr", str(rest), "--decoupled-min-lr", str(rest * FINAL_LR)]
    return ["--optimizer", optimizer, *lrs]


REPORT_INTERVAL = 10  # iterations between reports of Pion's steps
# Pion's and Muon's are the same, and the first that were tried.
PION_FLAGS = [*pion_flags(2e-2, 4e-2), "--pion-spectrum-interval", str(REPORT_INTERVAL)]
# AdamW's (lr, rest) are the best of a few, by validation loss after 200 iterations from fan_in
# weights, one seed: 1.803, and 1.845 at (1.5e-3, 4e-2), 1.838 at (2.5e-3, 8e-2), 1.901 at (5e-3,
# 4e-2), 1.876 at (5e-3, 8e-2), 2.147 at (1e-2, 4e-2), 2.192 at (1e-2, 8e-2).
ADAMW_FLAGS = peer_flags("adam", 2.5e-3, 4e-2)
MUON_FLAGS = [
    *peer_flags("muon", 2e-2, 4e-2),
    *("--muon-nesterov", "--muon-momentum", "0.95"),
    *("--muon-extra-scale-factor", "0.2"),  # steps of AdamW's root mean square
]
BETWEEN_LINES_S = 4.0  # of progress, where it is not a terminal
LAST = 25  # iterations whose mean is printed as the final train loss

STEP = re.compile(r"iteration +(\d+)/ *\d+ .*lm loss: (\S+)")
VALIDATION = re.compile(r"validation loss at iteration (\d+) .*lm loss value: (\S+)")
# Okabe and Ito's palette: told apart by colour-blind readers too.
BLUE, VERMILION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#BBBBBB"
KIND_COLORS = (BLUE, VERMILION, GREEN, "#CC79A7")
LAYERS = [f"decoder.layers.{number}." for number in range(4)]
SHOWN = {  # panel title: matrix, one of each kind
    "key": "self_attention.linear_qkv.weight:k",
    "attention output": "self_attention.linear_proj.weight:whole",
    "gate": "mlp.linear_fc1.weight:gate",
    "down projection": "mlp.linear_fc2.weight:whole",
}
# What Pion reported of its steps: by TensorBoard's tag, numbers by iteration.
Reports = dict[str, dict[int, float]]
# Singular values by matrix name, at the start and at the end of a run.
Spectra = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]


@dataclass
class Run:
    """One training run: what to start, and what its log said."""

    name: str
    color: str
    folder: Path
    flags: list[str]
    train: list[tuple[int, float]] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def initial(self) -> Path:
        return self.folder / "initial.pt"

    @property
    def events(self) -> Path:
        return self.folder / "tensorboard"

    def final_train_loss(self) -> float:
        tail = [loss for step, loss in self.train if step > self.train[-1][0] - LAST]
        return sum(tail) / len(tail)


class Progress:
    """One line that is rewritten on a terminal, and a line every few seconds elsewhere."""

    def __init__(self) -> None:
        self.live = sys.stdout.isatty()
        self.last = float("-inf")

    def show(self, text: str) -> None:
        now = time.monotonic()
        if self.live:
            print(f"\r\033[K{text}", end="", flush=True)
        elif now - self.last >= BETWEEN_LINES_S:
            self.last = now
            print(text, flush=True)

    def done(self, text: str) -> None:
        print(f"\r\033[K{text}" if self.live else text, flush=True)


def prepare(out: Path, text: list[Path]) -> Path:
    """Write the corpus; its prefix."""
    prefix = out / "corpus" / "bytes"
    # Megatron's index of the samples is found again by path alone, whatever the text now is.
    shutil.rmtree(prefix.parent / "cache", ignore_errors=True)
    sources = ["--text", *(str(path.resolve()) for path in text)] if text else []
    command = [sys.executable, str(EXAMPLES / "prepare_corpus.py"), str(prefix), *sources]
    print("corpus: ", end="", flush=True)
    *_, last = lines_of(command, out / "corpus.log")
    print(last, end="")
    return prefix


def train(run: Run, corpus: Path, iterations: int, seed: int) -> None:
    """Train in a Megatron of its own and fill in the run's losses."""
    if (run.checkpoint / "latest_checkpointed_iteration.txt").exists():
        shutil.rmtree(run.checkpoint)
    shutil.rmtree(run.events, ignore_errors=True)
    run.folder.mkdir(parents=True, exist_ok=True)
    gpu = torch.cuda.is_available()
    command = [
        *(*launcher(cpu=not gpu), str(EXAMPLES / "pretrain_bytes.py")),
        *(*MODEL_FLAGS, *TRAIN_FLAGS, *PLAIN_FLAGS, *TOKENIZER_FLAGS, *run.flags),
        *("--distributed-backend", "nccl" if gpu else "gloo", "--seed", str(seed)),
        *("--train-iters", str(iterations), "--data-path", str(corpus)),
        *("--data-cache-path", str(corpus.parent / "cache"), "--save", str(run.checkpoint)),
        *("--save-initial", str(run.initial), "--tensorboard-dir", str(run.events)),
    ]
    progress, start, since = Progress(), time.monotonic(), None
    progress.show(f"{run.name}: starting Megatron on {'the GPU' if gpu else 'the CPU'} ...")
    for line in lines_of(command, run.folder.with_suffix(".log")):
        if match := STEP.search(line):
            step, loss = int(match[1]), float(match[2])
            run.train.append((step, loss))
            since, now = since or (step, time.monotonic()), time.monotonic()
            eta = (iterations - step) * (now - since[1]) / max(1, step - since[0])
            progress.show(
                f"{run.name}: iteration {step}/{iterations}, loss {loss:.3f}, {eta:.0f} s to go"
            )
        elif match := VALIDATION.search(line):
            run.validation.append((int(match[1]), float(match[2])))
            progress.show(f"{run.name}: iteration {match[1]}, validation loss {match[2]}")
        elif "saving checkpoint" in line:
            progress.show(f"{run.name}: saving the checkpoint ...")
    if not (run.train and run.validation):
        raise JobError(f"no losses found in {run.folder.with_suffix('.log')}: read it for why")
    progress.done(
        f"{run.name}: {iterations} iterations in {time.monotonic() - start:.0f} s, "
        f"validation loss {run.validation[-1][1]:.3f}"
    )


def master_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The fp32 master weights in a torch_dist checkpoint, layers apart, by parameter name."""
    prefix = "optimizer.state.fp32_param."
    entries = FileSystemReader(folder).read_metadata().state_dict_metadata.items()
    stacked = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries
        if key.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings(action="ignore"):  # it says that it assumes a single process
        load(stacked, checkpoint_id=folder, no_dist=True)
    weights = {}
    for key, value in stacked.items():
        name = key.removeprefix(prefix)
        if re.search(r"\.layers\.(?!\d)", name):  # the layers of a kind in one tensor
            weights |= {name.replace(".layers.", f".layers.{i}."): w for i, w in enumerate(value)}
        else:
            weights[name] = value
    return weights


def matrices(weights: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and batch of all that Pion rotates: Q, K, V, gate and up apart, other weights whole."""
    for name, weight in weights.items():
        info = ParamInfo(
            name=name,
            shape=tuple(weight.shape),
            embedding_or_output=not name.startswith("decoder."),
            qkv=QUERY_GROUP if name.endswith("linear_qkv.weight") else (),
            gated=name.endswith("linear_fc1.weight"),
        )
        decision = classify(info, PionConfig())
        if isinstance(decision, Rotated):
            for part, batch in decision.view.split(weight).items():
                yield f"{name}:{part}", batch


def spectra(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: singular_values(batch) for name, batch in matrices(weights)}


def largest_drift(
    start: dict[str, torch.Tensor], end: dict[str, torch.Tensor]
) -> tuple[float, str]:
    """Largest |change| of a singular value over that value, and the matrix it is in."""
    return max((drift(values, end[name]).max().item(), name) for name, values in start.items())


def start_and_end(run: Run) -> Spectra:
    iteration = int((run.checkpoint / "latest_checkpointed_iteration.txt").read_text())
    end = master_weights(run.checkpoint / f"iter_{iteration:07d}")
    # The masters started as copies of these bf16 weights, bit for bit.
    return spectra(torch.load(run.initial, map_location="cpu")), spectra(end)


def reports(run: Run) -> Reports:
    """What Pion has reported of its steps."""
    events = EventAccumulator(str(run.events)).Reload()
    return {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
        if tag.startswith("pion")
    }


def draw_losses(axes: Axes, runs: list[Run]) -> None:
    for run in runs:
        steps, losses = zip(*run.train, strict=True)
        around = [losses[max(0, i - 2) : i + 3] for i in range(len(losses))]
        smooth = [sum(near) / len(near) for near in around]
        axes.plot(steps, smooth, color=run.color, lw=2, label=f"{run.name}, training")
        steps, losses = zip(*dict(run.validation).items(), strict=True)
        axes.plot(steps, losses, "o", color=run.color, mec="white", ms=9, label="validation")
    axes.set_title("Loss", fontsize=13)
    axes.set(xlabel="iteration", ylabel="nats per byte")
    lowest = min(loss for run in runs for _, loss in run.train + run.validation)
    axes.set_ylim(lowest * 0.93, lowest * 2)  # the first few iterations would flatten the rest
    axes.legend(ncols=len(runs), frameon=False)


def draw_steps(figure: SubFigure, steps: Reports) -> None:
    """By depth the share of Muon's step that is kept and the angles, over time orthonormality."""
    kept, angle, orthonormality = figure.subplots(1, 3)
    for axes, kind in ((kept, "kept"), (angle, "angle")):
        for color, (title, name) in zip(KIND_COLORS, SHOWN.items(), strict=True):
            means = [mean(steps[f"pion-{kind}/{layer}{name}"].values()) for layer in LAYERS]
            axes.plot(range(1, len(LAYERS) + 1), means, "o-", color=color, label=title)
        axes.set(xlabel="layer", xticks=range(1, len(LAYERS) + 1), ylim=0)
    kept.set_title("Share of Muon's step that is kept", fontsize=11)
    angle.set_title("Largest angle of a step", fontsize=11)
    angle.set_ylabel("radians")
    kept.set_ylim(0, 1)
    kept.legend(frameon=False)
    orthonormality.semilogy(*zip(*steps["pion/orthogonality"].items(), strict=True), color=BLUE)
    orthonormality.set(xlabel="iteration", ylim=(1e-7, 1e-3))
    orthonormality.set_title("Frames' distance from orthonormal, the largest", fontsize=11)
    figure.suptitle("Pion's steps", fontsize=13)


def draw(runs: list[Run], measured: list[Spectra], steps: Reports, path: Path) -> None:
    """Left the losses, right spectra at start and end, below what Pion's steps do."""
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure = plt.figure(figsize=(14, 9.5), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[6, 3.5], hspace=0.03)
    left, right = top.subfigures(1, 2, width_ratios=[1, 1.15], wspace=0.03)
    draw_steps(bottom, steps)
    draw_losses(left.subplots(), runs)
    panels = right.subplots(2, 2)
    start = "start, all" if len(runs) > 1 else "start"  # the same weights: --seed and --pion-init
    for axes, (title, name) in zip(panels.flat, SHOWN.items(), strict=True):
        name = LAYERS[-1] + name
        axes.semilogy(measured[0][0][name][0], color=GREY, lw=7, label=start)
        for run, (_, end) in zip(reversed(runs), reversed(measured), strict=True):
            style = "--" if run is runs[0] else "-"
            axes.semilogy(end[name][0], style, color=run.color, lw=2, label=f"{run.name}, end")
        axes.set_title(title, fontsize=11)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    right.suptitle("Singular values in the last layer, largest first", fontsize=13)
    right.legend(
        *panels.flat[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=4,
        frameon=False,
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def report(runs: list[Run], measured: list[Spectra]) -> None:
    print("\n         start   train  validation  largest relative singular-value drift")
    for run, (start, end) in zip(runs, measured, strict=True):
        change, name = largest_drift(start, end)
        losses = (run.train[0][1], run.final_train_loss(), run.validation[-1][1])
        print("{:6}{:8.4f}{:8.4f}{:12.4f}  ".format(run.name, *losses), end="")
        print(f"{change:.1e} in {name}")
    print(f"(losses in nats per byte; train: mean of the last {LAST} iterations)\n")


def demo(args: argparse.Namespace) -> None:
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    runs = [Run("Pion", BLUE, out / "pion", PION_FLAGS)]
    if not args.pion_only:
        runs.append(Run("Muon", GREEN, out / "muon", MUON_FLAGS))
        runs.append(Run("AdamW", VERMILION, out / "adamw", ADAMW_FLAGS))
    corpus = prepare(out, args.text)
    for run in runs:
        train(run, corpus, args.iterations, args.seed)
    measured = [start_and_end(run) for run in runs]
    draw(runs, measured, reports(runs[0]), out / "demo.png")
    report(runs, measured)
    print(f"checkpoint: {runs[0].checkpoint}\nfigure:     {out / 'demo.png'}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Pion against Muon and AdamW in Megatron, on a small GPT."
    )
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="default: %(default)s")
    parser.add_argument(
        "--text",
        type=Path,
        nargs="+",
        default=[],
        metavar="PATH",
        help="files or folders to train on (default: Python's library)",
    )
    parser.add_argument("--iterations", type=int, default=150, help="default: %(default)s")
    parser.add_argument("--pion-only", action="store_true", help="train with Pion alone")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    try:
        demo(parser.parse_args())
    except JobError as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
