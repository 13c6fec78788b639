"""Trainings that differ in their layout, a launch for each number of processes, and what they got.

A launch starts up for 10 s and more and trains 20 iterations in 1 to 5, so all trainings of as many
processes share one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron_runs import COMMON, LIMIT_S, LLAMA, NO_DROPOUT, PION, ROOT, launch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pion_dist import PionConfig
from pion_dist.classify import ParamInfo, Rotated, classify
from pion_dist.spectrum import singular_values

HEADS, GROUPS, HEAD_DIM = 8, 4, 8  # of COMMON and LLAMA
EMBEDDING = "embedding.word_embeddings.weight"
MANY_RUNS = ROOT / "tests" / "support" / "many_runs.py"
# Polar starts as runs do, from fan_in, whose singular values are apart: where all are equal half of
# its angles vanish. Generators' runs pass on least of what they round differently where all are
# equal, so that their bounds are the tightest. From fan_in those of the published algorithm differ
# by up to 20 times as much: its step is divided by the root of second moments, however small.
FLAT = "--pion-init=orthogonal"
OF_THE_START = ("--bf16", FLAT)  # options that decide the first weights
FEW = "linear_(qkv|fc1)"  # is Adam's
# Two layers, a pipeline stage each, show what four do in half of the time.
SHALLOW, DEEP = ("--num-layers", "2"), ("--num-layers", "4")
MOE = [
    *(*LLAMA, "--num-experts", "4", "--moe-router-topk", "2", "--moe-ffn-hidden-size", "48"),
    *("--moe-shared-expert-intermediate-size", "96"),
    *("--moe-router-load-balancing-type", "none", "--moe-token-dispatcher-type", "alltoall"),
]
MODELS = {
    "llama": LLAMA,
    "deep": [*LLAMA, *DEEP],  # 2 pipeline stages of 2 chunks
    "few": [*LLAMA, "--num-layers", "1", "--pion-exclude", FEW],  # two of Pion's
    "one group": [*LLAMA, "--num-query-groups", "1"],  # of which TP 2 has a half
    "plain": [],  # multi-head attention, plain MLP, LayerNorm, biases
    # With two layers the embedding differs by up to 3e-3 in some layouts, by 5e-5 with four.
    "moe": [*MOE, *DEEP],
    # Its router's gradient has full rank, which a softmax's has not: test_layouts.ROUTER.
    "moe sigmoid": [*MOE, "--moe-router-score-function", "sigmoid"],
    "mla": [
        *("--multi-latent-attention", "--q-lora-rank", "32", "--kv-lora-rank", "16"),
        *("--qk-head-dim", "4", "--qk-pos-emb-head-dim", "4", "--v-head-dim", "8"),
        *("--rope-type", "rope", "--swiglu", "--normalization", "RMSNorm", "--disable-bias-linear"),
    ],
    "mtp": [*LLAMA, "--mtp-num-layers", "1"],
    "zeros": [*LLAMA, "--start-zeros"],  # many_runs.start_zeros
}


@dataclass(frozen=True)
class Run:
    """A training of 20 iterations from its model's start, or of the last 10 of them.

    Attributes:
        name: in the table.
        processes: that it takes.
        layout: Megatron's flags that must not change the result.
        model: one of MODELS.
        options: flags that do change it.
        against: what it has to equal; one process, if None.
        source: the run whose checkpoint of iteration 10 it goes on from, if any.
    """

    name: str
    processes: int = 1
    layout: tuple[str, ...] = ()
    model: str = "llama"
    options: tuple[str, ...] = ()
    against: Run | None = None
    source: Run | None = None

    @property
    def reference(self) -> Run:
        return self.against or self.one_process

    @property
    def one_process(self) -> Run:
        name = "one process" if self.model == "llama" else f"{self.model} one process"
        return Run(name, model=self.model, options=self.options)

    @property
    def start(self) -> Run:
        """The run whose first step made the weights that all runs of the model start from."""
        kept = tuple(option for option in self.options if option in OF_THE_START)
        return Run("start", model=self.model, options=kept)

    def moved_to(self, run: Run) -> Run:
        """``run``'s last 10 iterations, from this run's checkpoint."""
        return replace(run, name=f"{self.name} to {run.name}", source=self)


@dataclass(frozen=True)
class Result:
    """What a run has left behind."""

    run: Run
    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / "steps.json"

    @cached_property
    def steps(self) -> dict[int, tuple[float, float]]:
        """Loss and grad norm of each iteration."""
        steps = json.loads(self.file.read_text())
        return {s["iteration"]: (s["losses"]["lm loss"], s["grad_norm"]) for s in steps}

    @cached_property
    def factorizations(self) -> list[tuple[int, int]]:
        """How often polar factors were looked at, and taken anew, in each iteration."""
        steps = json.loads(self.file.read_text())
        return [(s["mismatch"], s["factorize"]) for s in steps]

    @cached_property
    def scalars(self) -> dict[str, dict[int, float]]:
        """What was written to TensorBoard: by tag, by iteration."""
        events = EventAccumulator(str(self.folder / "tensorboard"), size_guidance={"scalars": 0})
        events.Reload()
        return {
            tag: {event.step: event.value for event in events.Scalars(tag)}
            for tag in events.Tags()["scalars"]
        }

    @cached_property
    def weights(self) -> dict[str, torch.Tensor]:
        """The model's last weights, whole, by their names in the checkpoint."""
        (*_, last) = sorted((self.folder / "checkpoint").glob("iter_*"))
        reader = dcp.FileSystemReader(last)
        tensors = {
            name: torch.empty(stored.size, dtype=stored.properties.dtype)
            for name, stored in reader.read_metadata().state_dict_metadata.items()
            if hasattr(stored, "size") and not name.startswith("optimizer.")
        }
        dcp.load(tensors, storage_reader=reader, no_dist=True)
        return tensors

    def matrices(self, run: Run) -> dict[str, torch.Tensor]:
        """What ``run``'s Pion rotates of the weights: a part's matrices [..., m, n] by name."""
        return {
            f"{name}:{part}": torch.stack([split(name, w, run)[part] for w in layers])
            for name, layers in (
                (name, list(weight.reshape(-1, *weight.shape[-2:])))
                for name, weight in self.weights.items()
            )
            for part in split(name, layers[0], run)
        }

    def drift_since(self, start: Result) -> float:
        """The largest change of a singular value, to the largest of its matrix.

        So rounding weighs the same for all of them.
        """
        before, now = start.matrices(self.run), self.matrices(self.run)
        pairs = [(singular_values(before[name]), singular_values(now[name])) for name in now]
        return max(((b - a).abs() / a.amax(-1, keepdim=True)).max().item() for a, b in pairs)


def split(name: str, weight: torch.Tensor, run: Run) -> dict[str, torch.Tensor]:
    """The matrices that Pion makes of a whole weight of a checkpoint."""
    flags = MODELS[run.model]
    if name.endswith(("norm.weight", "norm_weight", "bias")):
        return {}  # vectors of all layers
    if "linear_proj" in name and "--start-zeros" in flags:
        return {}  # Adam's
    places = [place for place, flag in enumerate(flags) if flag == "--num-query-groups"]
    groups = int(flags[places[-1] + 1]) if places else HEADS
    query_group = (("q", HEADS // groups * HEAD_DIM), ("k", HEAD_DIM), ("v", HEAD_DIM))
    info = ParamInfo(
        name=name,
        shape=tuple(weight.shape),
        embedding_or_output="embedding" in name or "output_layer" in name,
        qkv=query_group if "linear_qkv" in name else (),
        head_dim=HEAD_DIM,
        gated="linear_fc1" in name and "--swiglu" in flags,
    )
    config = PionConfig(
        qkv="head" if "head" in run.options else "qkv",
        split_gate="--pion-no-split-gate" not in run.options,
    )
    decision = classify(info, config, exclude=[FEW] if FEW in flags else [])
    return decision.view.split(weight) if isinstance(decision, Rotated) else {}


@dataclass(frozen=True)
class Difference:
    """Worst relative differences to another run.

    Attributes:
        loss: of an iteration.
        grad_norm: of an iteration.
        weights: of an element of Pion's matrices, to the matrix's largest.
        others: of the other parameters but the embedding, as vectors.
        embedding: as a vector. Most of its rows have a gradient from few tokens. Adam moves an
            element whose gradient is rounding noise by as much as any other.
    """

    loss: float
    grad_norm: float
    weights: float
    others: float
    embedding: float

    @classmethod
    def between(cls, result: Result, expected: Result) -> Difference:
        """Over the iterations and weights of ``result``, which ``expected`` has too."""
        pairs = [(step, expected.steps[i]) for i, step in result.steps.items()]
        loss, norm = (max(abs(a[k] / b[k] - 1) for a, b in pairs) for k in (0, 1))
        assert result.weights.keys() == expected.weights.keys()
        mine, theirs = result.matrices(result.run), expected.matrices(result.run)
        weights = max(
            ((mine[name].double() - x).abs().amax((-2, -1)) / x.abs().amax((-2, -1))).max().item()
            for name, x in ((name, x.double()) for name, x in theirs.items())
        )
        rotated = {name.partition(":")[0] for name in theirs}
        vectors = {
            name: ((result.weights[name].double() - x).norm() / x.norm()).item()
            for name, x in ((n, x.double()) for n, x in expected.weights.items())
            if name not in rotated
        }
        embedding = vectors.pop(EMBEDDING)
        return cls(loss, norm, weights, max(vectors.values()), embedding)


class Table:
    """Trains what is asked for, once, and keeps the results."""

    def __init__(self, corpus: Path, folder: Path) -> None:
        data = ["--data-path", str(corpus), "--data-cache-path", str(corpus.parent / "cache")]
        self.common = [*data, *PION, *NO_DROPOUT, "--ckpt-format", "torch_dist"]
        self.folder = folder
        self.results: dict[Run, Result] = {}
        self.count = 0
        self.repeated: list[tuple[Result, Result]] = []
        self.failures: dict[Run, str] = {}

    def __getitem__(self, run: Run) -> Result:
        if run in self.failures:
            raise AssertionError(self.failures[run])
        return self.results[run]

    def train(self, runs: Iterable[Run]) -> None:
        """Train runs and what they are compared to, each launch being of as many processes."""
        wanted: dict[Run, None] = {}
        for run in runs:
            if run.source is not None:
                wanted |= dict.fromkeys([run.source.start, run.source])
            needed = [run.one_process, run.reference, run]
            wanted |= dict.fromkeys([*(r.start for r in needed), *needed])
        late = [r for r in wanted if r.source is not None and r.source.processes > r.processes]
        early = [r for r in wanted if r not in late]
        for group in (early, late):
            for processes in (1, 2, 4, 8):
                some = [run for run in group if run.processes == processes]
                some.sort(key=lambda run: (run.name != "start", run.source is not None))
                if some:
                    self._launch(processes, some)

    def _launch(self, processes: int, runs: list[Run]) -> None:
        """Train runs one after the other, and the first of few processes once more at the end.

        One that fails takes its launch down; those behind it get another.
        """
        todo = [(run, self._result(run)) for run in runs]
        self.results |= dict(todo)
        straight = [run for run in runs if run.name != "start" and run.source is None]
        if straight and processes <= 2:
            first, repeated = straight[0], self._result(straight[0])
            self.repeated.append((self.results[first], repeated))
            todo.append((first, repeated))
        file = self.folder / "jobs.json"
        while todo:
            file.write_text(json.dumps([self._job(*job) for job in todo]))
            limit = LIMIT_S + 30 * len(todo)
            try:
                launch(MANY_RUNS, str(file), processes=processes, timeout=limit)
                return
            except AssertionError as error:
                todo = [(run, result) for run, result in todo if not result.file.exists()]
                if not todo:
                    raise
                self.failures[todo.pop(0)[0]] = str(error)

    def _result(self, run: Run) -> Result:
        self.count += 1
        return Result(run, self.folder / str(self.count))

    def _job(self, run: Run, result: Result) -> dict[str, Any]:
        result.folder.mkdir(exist_ok=True)
        name = f"{run.name}, {run.model} {' '.join(run.options)}"
        return {"name": name, "flags": self._flags(run, result.folder), "steps": str(result.file)}

    def _flags(self, run: Run, folder: Path) -> list[Any]:
        flags = [*COMMON, *SHALLOW, *MODELS[run.model], *self.common, *run.options]
        if run.processes == 2 and "--bf16" not in run.options:
            # As test_layouts.tp. Not in bf16, where each micro-batch's gradient is rounded: another
            # number of them has other bits.
            flags += ["--micro-batch-size", "4"]
        flags += run.layout
        flags += ["--save", str(folder / "checkpoint"), "--save-interval", "10"]
        if "--pion-spectrum-interval" in run.options:
            flags += ["--tensorboard-dir", str(folder / "tensorboard")]
        if run.name == "start":
            return [*flags, "--exit-interval", "1"]
        source = run.source or run.start
        flags += ["--load", str(self.results[source].folder / "checkpoint")]
        return [*flags, *(["--ckpt-step", "10"] if run.source else ["--finetune"])]
