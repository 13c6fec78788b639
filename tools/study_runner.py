"""Trainings of a study: what they are, and how they run side by side and are found again."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import queue
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
import prepare_corpus  # noqa: E402
from megatron_job import PLAIN_FLAGS  # noqa: E402

from megatron_patches.arguments import DEFAULT_RECIPE, recipe_values  # noqa: E402

HEAD = 16  # hidden size for each head


@dataclass(frozen=True)
class Model:
    """A byte-level GPT as `examples/demo.py` trains one, of any width.

    Attributes:
        width: hidden size, a multiple of 32.
        layers: transformer layers.
        seq: bytes of a sample.
        batch: samples of an iteration.
        flags: further ones of Megatron's.
    """

    width: int
    layers: int = 4
    seq: int = 128
    batch: int = 16
    flags: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """In an iteration."""
        return self.seq * self.batch

    def arguments(self) -> list[str]:
        """Megatron's.

        Heads are wider than their share of the width, and the MLP is 2.75 times as wide, so that no
        matrix is square: the smallest singular values of a square random matrix are so near zero
        that float32's rounding shows in them.
        """
        heads = self.width // HEAD
        return [
            *("--num-layers", str(self.layers), "--hidden-size", str(self.width)),
            *("--ffn-hidden-size", str(self.width * 11 // 4), "--num-attention-heads", str(heads)),
            *("--kv-channels", str(HEAD * 3 // 2), "--group-query-attention"),
            *("--num-query-groups", str(heads // 2), "--seq-length", str(self.seq)),
            *("--max-position-embeddings", str(self.seq), "--position-embedding-type", "rope"),
            *("--swiglu", "--disable-bias-linear", "--untie-embeddings-and-output-weights"),
            *("--attention-dropout", "0", "--hidden-dropout", "0"),
            *("--micro-batch-size", str(self.batch), "--global-batch-size", str(self.batch)),
            *(() if "--normalization" in self.flags else ("--normalization", "RMSNorm")),
            *self.flags,
        ]


COMMON = [
    *("--bf16", "--lr-decay-style", "cosine", "--lr-warmup-fraction", "0.1", "--clip-grad", "1.0"),
    *("--weight-decay", "0.1", "--adam-beta2", "0.95", "--split", "9,1,0"),
    *("--eval-interval", "1000000", "--log-interval", "50", "--num-workers", "0"),
    *("--no-create-attention-mask-in-dataloader", "--no-check-for-nan-in-loss-and-grad"),
    *PLAIN_FLAGS,
    *prepare_corpus.TOKENIZER_FLAGS,
]
EVALUATED = 40  # batches, at the end
FINAL = 0.1  # of the learning rate, at the end of the cosine


@dataclass(frozen=True)
class Method:
    """An optimizer and its options, but for learning rates.

    Attributes:
        name: in tables.
        flags: Megatron's.
        lr: of the matrices, where a search starts.
        rest: Adam's for the embedding and the output layer; also for norms with Pion and Muon.
    """

    name: str
    flags: tuple[str, ...]
    lr: float
    rest: float

    def arguments(self) -> list[str]:
        """Megatron's, learning rates among them."""
        rest = self.rest
        lrs = ["--lr", f"{rest:.6g}", "--min-lr", f"{rest * FINAL:.6g}"]
        kind = self.flags[self.flags.index("--optimizer") + 1]
        if kind == "pion":
            lrs += ["--pion-lr-mult", f"{self.lr / rest:.6g}"]
        elif kind == "muon":  # 0.2: the root mean square of AdamW's changes, as Moonlight has it
            lrs += ["--muon-extra-scale-factor", f"{0.2 * self.lr / rest:.6g}"]
        else:
            lrs = ["--lr", f"{self.lr:.6g}", "--min-lr", f"{self.lr * FINAL:.6g}"]
            lrs += ["--decoupled-lr", f"{rest:.6g}", "--decoupled-min-lr", f"{rest * FINAL:.6g}"]
        return [*self.flags, *lrs]


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        method: how.
        model: what.
        iterations: how long; 0 only evaluates.
        seed: of the weights and of the order of the text.
        corpus: name of the text.
        start: the run whose weights it goes on from, if not from scratch.
        keep: save a checkpoint at the end.
        watch: record activations and logits.
    """

    method: Method
    model: Model
    iterations: int
    seed: int = 1
    corpus: str = "code"
    start: Run | None = None
    keep: bool = False
    watch: bool = False


@dataclass(frozen=True)
class Result:
    """What a training measured.

    Attributes:
        run: the training.
        record: as `study_training` wrote it.
    """

    run: Run
    record: dict[str, Any] = field(repr=False)

    @property
    def loss(self) -> float:
        """Validation loss in nats per byte; infinite for a run that diverged."""
        return math.inf if "diverged" in self.record else self.record["validation"][0]

    @property
    def drift(self) -> float:
        """Largest relative change of a singular value; infinite for a run that diverged."""
        return self.record.get("drift", math.inf)

    @property
    def seconds(self) -> float:
        """Of an iteration: the fastest tenth's slowest, since the first ones warm up."""
        return statistics.quantiles(self.record["seconds"], n=10)[0]


class StudyError(Exception):
    """What went wrong and where to look, for the user."""


class Runner:
    """Runs trainings on every core or GPU, and keeps what they measured in a folder."""

    def __init__(self, out: Path, jobs: int) -> None:
        """Use ``jobs`` processes at a time; GPUs are dealt to them where there are any."""
        import torch

        self.out, self.results = out, out / "runs"
        self.results.mkdir(parents=True, exist_ok=True)
        self.jobs = jobs
        self._slots: queue.SimpleQueue[str] = queue.SimpleQueue()
        gpus = torch.cuda.device_count()
        for index in range(jobs):
            self._slots.put(str(index % gpus) if gpus else "")
        self._corpora: dict[str, tuple[Path, str]] = {}
        self._locks: dict[Run, threading.Lock] = {}
        self._lock, self._start = threading.Lock(), time.monotonic()
        self._running: list[Any] = []
        self._stopped = False
        self._failed: StudyError | None = None  # the first, for which the others are ended
        self.trained = self.asked = 0
        threads = max(1, len(os.sched_getaffinity(0)) // jobs)
        # Before the server starts, whose children it holds for.
        os.environ["OMP_NUM_THREADS"] = str(threads)
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ["PYTHONWARNINGS"] = "ignore"
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["study_training"])

    def add_corpus(self, name: str, write: Callable[[Path], int]) -> None:
        """Prepare a text once.

        Args:
            name: as runs name it.
            write: writes PREFIX.bin and PREFIX.idx.
        """
        prefix = self.out / "corpora" / name
        if not prefix.with_suffix(".idx").exists():
            write(prefix)
        digest = hashlib.sha256(prefix.with_suffix(".bin").read_bytes()).hexdigest()
        self._corpora[name] = (prefix, digest)
        size = prefix.with_suffix(".bin").stat().st_size
        print(f"text {name!r}: {size:,} bytes, SHA-256 {digest[:12]}", flush=True)

    def all(self, runs: Iterable[Run]) -> list[Result]:
        """Train what has not been trained, as many at a time as there are slots."""
        return self.each([lambda run=run: self.train(run) for run in runs])

    def each(self, works: Sequence[Callable[[], Any]]) -> list[Any]:
        """Do independent parts of a study side by side: each may train."""
        with ThreadPoolExecutor(max(1, len(works))) as threads:
            done = [threads.submit(work) for work in works]
            try:
                return [one.result() for one in done]
            except BaseException:  # a training failed, or Ctrl-C: end the others
                with self._lock:
                    self._stopped = True
                for process in self._running:
                    process.kill()
                raise

    def train(self, run: Run) -> Result:
        """A run's result, from its record if there is one.

        Raises:
            StudyError: Megatron failed, with the end of its log.
        """
        with self._lock:
            lock = self._locks.setdefault(run, threading.Lock())
        with lock:
            if run.start is not None:
                self.train(run.start)
            path = self.results / f"{self.name(run)}.json"
            if not path.exists():
                self._train(run, path)
            return Result(run, json.loads(path.read_text()))

    def name(self, run: Run) -> str:
        """Of a run's files: legible, and different for whatever decides the result."""
        decides = [self._flags(run, Path("run")), self._corpora[run.corpus][1], run.watch]
        if "pion" in run.method.flags:
            # What flags that are not given stand for.
            decides.append(recipe_values(DEFAULT_RECIPE))
        key = json.dumps(decides)
        digest = hashlib.sha256(key.encode()).hexdigest()[:10]
        legible = "".join(c if c.isalnum() else "-" for c in run.method.name.lower())
        return f"{legible}-{run.model.width}-{run.method.lr:.2g}-{digest}"

    def _flags(self, run: Run, folder: Path) -> list[str]:
        flags = [*run.model.arguments(), *COMMON, *run.method.arguments()]
        flags += ["--train-iters", str(max(1, run.iterations)), "--seed", str(run.seed)]
        flags += [] if run.iterations else ["--skip-train"]
        flags += ["--eval-iters", str(EVALUATED)]
        if run.keep:
            flags += ["--save", str(folder), "--ckpt-format", "torch_dist"]
            flags += ["--save-interval", "1000000", "--no-save-optim", "--no-save-rng"]
        if run.start is not None:
            start = self.results / self.name(run.start)
            flags += ["--load", str(start), "--finetune", "--no-load-optim", "--no-load-rng"]
        return flags

    def _train(self, run: Run, path: Path) -> None:
        import torch

        self.asked += 1
        device = self._slots.get()
        try:
            begun = time.monotonic()
            prefix, _ = self._corpora[run.corpus]
            flags = [*self._flags(run, path.with_suffix("")), "--data-path", str(prefix)]
            flags += ["--data-cache-path", str(self.out / "corpora" / "cache")]
            flags += ["--distributed-backend", "nccl" if torch.cuda.is_available() else "gloo"]
            log = path.with_suffix(".log")
            process = self._context.Process(
                target=_child,
                args=(flags, path, log),
                kwargs={"device": device, "watch": run.watch},
            )
            with self._lock:
                if self._stopped:
                    raise self._failed or StudyError("stopped")
                process.start()
                self._running.append(process)
            process.join()
        finally:
            self._slots.put(device)
        # The record alone tells: threads that start and await processes at once read exit codes in
        # each other's place.
        if not path.exists():
            with self._lock:
                if self._failed is None:
                    lines = log.read_text(errors="replace").splitlines(keepends=True)
                    tail = "".join(lines[-25:])
                    self._failed = StudyError(
                        f"a training failed. The end of its log, {log}:\n\n{tail}"
                    )
            raise self._failed
        self.trained += 1
        result = Result(run, json.loads(path.read_text()))
        minutes = (time.monotonic() - self._start) / 60
        print(
            f"[{minutes:5.1f} min, {self.trained} trained, {self.asked - self.trained} under way] "
            f"{run.method.name}, width {run.model.width}, lr {run.method.lr:.3g}, rest "
            f"{run.method.rest:.3g}, {run.iterations} iterations, seed {run.seed}: "
            f"{result.loss:.4f} ({time.monotonic() - begun:.0f} s)",
            flush=True,
        )


def _child(flags: list[str], record: Path, log: Path, *, device: str, watch: bool) -> None:
    import study_training

    study_training.run(flags, record, log, device=device, watch=watch)


def tuned(
    runner: Runner,
    run: Run,
    *,
    factor: float = 2.0,
    points: int = 3,
    vary: str = "lr",
    most: int = 9,
) -> list[Result]:
    """Search a learning rate on a grid of powers of ``factor`` until the best is not at its end.

    Args:
        runner: trains.
        run: whose method has the grid's middle.
        factor: from one point to the next.
        points: of the grid at first.
        vary: ``lr`` or ``rest`` of the method.
        most: points in all; an optimum at the end is then left there.

    Returns:
        All results, by learning rate.
    """
    middle = getattr(run.method, vary)

    def at(power: int) -> Run:
        return replace(run, method=replace(run.method, **{vary: middle * factor**power}))

    low, high = -(points // 2), points - points // 2 - 1
    found: dict[int, Result] = {}
    while True:
        new = [power for power in range(low, high + 1) if power not in found]
        found |= dict(zip(new, runner.all(map(at, new)), strict=True))
        best = min(found, key=lambda power: found[power].loss)
        if len(found) >= most or low < best < high:
            return [found[power] for power in sorted(found)]
        low, high = min(low, best - 1), max(high, best + 1)


def best(results: Iterable[Result]) -> Result:
    """Of the lowest validation loss."""
    return min(results, key=lambda result: result.loss)
