"""Trainings of a study: what they are, and how they run side by side and are found again."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import queue
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
from study_records import Record, Records, key_of, resolved, summary  # noqa: E402

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
    batch: int = 8
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
    *("--lr-decay-style", "cosine", "--lr-warmup-fraction", "0.1", "--clip-grad", "1.0"),
    *("--weight-decay", "0.1", "--adam-beta2", "0.95", "--split", "9,1,0"),
    *("--eval-interval", "1000000", "--log-interval", "50", "--num-workers", "0"),
    *("--no-create-attention-mask-in-dataloader", "--no-check-for-nan-in-loss-and-grad"),
    *PLAIN_FLAGS,
    *prepare_corpus.TOKENIZER_FLAGS,
]
EVALUATED = 40  # batches, at the end


@dataclass(frozen=True)
class Method:
    """An optimizer and its options, but for learning rates.

    Attributes:
        name: in tables.
        flags: Megatron's.
        lr: of the matrices, where a search starts.
        rest: Adam's for the embedding and the output layer; also for norms with Pion and Muon.
        final: share of both learning rates that the cosine ends at.
    """

    name: str
    flags: tuple[str, ...]
    lr: float
    rest: float
    final: float = 0.1

    def arguments(self) -> list[str]:
        """Megatron's and the studies' own, learning rates among them."""
        rest, mult = self.rest, self.lr / self.rest
        lrs = ["--lr", f"{rest:.6g}", "--min-lr", f"{rest * self.final:.6g}"]
        kind = self.flags[self.flags.index("--optimizer") + 1]
        if kind == "pion":
            lrs += ["--pion-lr-mult", f"{mult:.6g}"]
        elif "--study-iso" in self.flags:
            lrs += ["--muon-extra-scale-factor", f"{mult:.6g}"]
        elif kind == "muon":  # 0.2: the root mean square of AdamW's changes, as Moonlight has it
            lrs += ["--muon-extra-scale-factor", f"{0.2 * mult:.6g}"]
            if "--study-decay-mult" not in self.flags:  # else decay would follow Adam's rate
                lrs += ["--study-decay-mult", f"{mult:.6g}"]
        else:
            lrs = ["--lr", f"{self.lr:.6g}", "--min-lr", f"{self.lr * self.final:.6g}"]
            lrs += ["--decoupled-lr", f"{rest:.6g}"]
            lrs += ["--decoupled-min-lr", f"{rest * self.final:.6g}"]
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
        record: as `study_records.summary` has it; of a run that is watched also the largest
            activations and attention logits.
    """

    run: Run
    record: Record = field(repr=False)

    @property
    def loss(self) -> float:
        """Validation loss in nats per byte; infinite for a run that diverged."""
        loss: float = self.record.get("loss", math.inf)
        return loss

    @property
    def drift(self) -> float:
        """Largest relative change of a singular value; infinite for a run that diverged."""
        drift: float = self.record.get("drift", math.inf)
        return drift

    @property
    def seconds(self) -> float:
        """Of an iteration: the fastest tenth's slowest."""
        seconds: float = self.record["seconds"]
        return seconds


class StudyError(Exception):
    """What went wrong and where to look, for the user."""


class OutOfTime(Exception):
    """The minutes of a study are over, and a training has not been started."""


class Runner:
    """Runs trainings on every core or GPU, and keeps what they measured.

    Args:
        out: folder of logs, checkpoints and full measurements.
        jobs: processes at a time; GPUs are dealt to them where there are any.
        data: file of records; a training that has one is not run again.
        bf16: train in bf16 with float32 masters, not in float32.
        minutes: after which no training is started.
    """

    def __init__(
        self,
        out: Path,
        jobs: int,
        *,
        data: Path,
        bf16: bool = False,
        minutes: float = math.inf,
    ) -> None:
        import torch

        self.out, self.results = out, out / "runs"
        self.records, self.bf16, self.minutes = Records(data), bf16, minutes
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
        """Do independent parts of a study side by side: each may train.

        Raises:
            OutOfTime: a part lacks a training; the others are done.
        """
        results = self.attempt(works)
        if None in results:
            raise OutOfTime
        return results

    def attempt(self, works: Sequence[Callable[[], Any]], *, at_once: int = 0) -> list[Any]:
        """Do independent parts of a study, with None in place of each that there is no time for.

        Args:
            works: the parts, in the order in which they begin.
            at_once: how many go on side by side; 0 for all.
        """

        def in_time(work: Callable[[], Any]) -> Any:
            try:
                return work()
            except OutOfTime:
                return None

        with ThreadPoolExecutor(at_once or max(1, len(works))) as threads:
            done = [threads.submit(in_time, work) for work in works]
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
            OutOfTime: it has none, and the study's minutes are over.
            StudyError: Megatron failed, with the end of its log.
        """
        with self._lock:
            lock = self._locks.setdefault(run, threading.Lock())
        with lock:
            key = self.key(run)
            record = self.records.get(key)
            # What is not in the records: a checkpoint, and what is watched.
            if record is not None and not run.keep and not run.watch:
                return Result(run, record)
            if run.start is not None:
                self.train(run.start)
            path = self.results / f"{self._name(run)}.json"
            if not path.exists():
                self._train(run, path)
            measured = json.loads(path.read_text())
            new = self._described(run, key) | summary(measured)
            if record is None:
                self.records.add(new)
            watched = {name: measured[name] for name in ("activation", "logit") if run.watch}
            return Result(run, new | watched)

    def key(self, run: Run) -> str:
        """A digest of whatever decides the run's result."""
        flags = self._flags(run, Path("run"))
        start = None if run.start is None else self.key(run.start)
        decides = resolved(flags) | {"corpus": self._corpora[run.corpus][1], "start": start}
        decides.pop("--load", None)  # the start's place, not its weights
        return key_of(decides)

    def _name(self, run: Run) -> str:
        """Of a run's files: legible, with all of its key."""
        legible = "".join(c if c.isalnum() else "-" for c in run.method.name.lower())
        more = "".join(f"-{word}" for word in ("keep", "watch") if getattr(run, word))
        return f"{legible}-{run.model.width}-{run.method.lr:.2g}-{self.key(run)}{more}"

    def _described(self, run: Run, key: str) -> Record:
        """What a record says of its run."""
        model, method, (_, digest) = run.model, run.method, self._corpora[run.corpus]
        options = resolved(self._flags(run, Path("run")))
        own = {flag for flag in (*method.flags, *model.flags) if flag.startswith("--")}
        record = {
            "key": key,
            "method": method.name,
            "lr": float(f"{method.lr:.6g}"),
            "rest": float(f"{method.rest:.6g}"),
            "width": model.width,
            "layers": model.layers,
            "seq": model.seq,
            "batch": model.batch,
            "iterations": run.iterations,
            "tokens": run.iterations * model.tokens,
            "seed": run.seed,
            "corpus": run.corpus,
            "digest": digest[:12],
            "optimizer": options["optimizer"],
            "pion": options["pion"],
            "flags": {flag: " ".join(options[flag]) for flag in sorted(own & options.keys())},
        }
        if run.start is not None:
            record["start"] = self.key(run.start)
        return record

    def _flags(self, run: Run, folder: Path) -> list[str]:
        flags = [*run.model.arguments(), *COMMON, *run.method.arguments()]
        flags += ["--bf16"] if self.bf16 else []
        flags += ["--train-iters", str(max(1, run.iterations)), "--seed", str(run.seed)]
        flags += [] if run.iterations else ["--skip-train"]
        flags += ["--eval-iters", str(EVALUATED)]
        if run.keep:
            flags += ["--save", str(folder), "--ckpt-format", "torch_dist"]
            flags += ["--save-interval", "1000000", "--no-save-optim", "--no-save-rng"]
        if run.start is not None:
            start = self.results / self._name(run.start)
            flags += ["--load", str(start), "--finetune", "--no-load-optim", "--no-load-rng"]
        return flags

    def _train(self, run: Run, path: Path) -> None:
        import torch

        self.asked += 1
        device = self._slots.get()
        try:
            begun = time.monotonic()
            if begun > self._start + 60 * self.minutes:
                self.asked -= 1
                raise OutOfTime
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
        loss = Result(run, summary(json.loads(path.read_text()))).loss
        minutes = (time.monotonic() - self._start) / 60
        print(
            f"[{minutes:5.1f} min, {self.trained} trained, {self.asked - self.trained} under way] "
            f"{run.method.name}, width {run.model.width}, lr {run.method.lr:.3g}, rest "
            f"{run.method.rest:.3g}, {run.iterations} iterations, seed {run.seed}: "
            f"{loss:.4f} ({time.monotonic() - begun:.0f} s)",
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
    results: dict[int, Result] = {}
    while True:
        new = [power for power in range(low, high + 1) if power not in results]
        results |= dict(zip(new, runner.all(map(at, new)), strict=True))
        best = min(results, key=lambda power: results[power].loss)
        if len(results) >= most or low < best < high:
            return [results[power] for power in sorted(results)]
        low, high = min(low, best - 1), max(high, best + 1)


def best(results: Iterable[Result]) -> Result:
    """Of the lowest validation loss."""
    return min(results, key=lambda result: result.loss)
