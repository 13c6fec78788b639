"""What an optimizer does to the spectra of a model's weights, from Megatron's checkpoints.

    python tools/spectrum_report.py CKPT [CKPT ...] --out FOLDER

CKPT is a run's folder (all its iterations) or one of its iter_* folders, of --ckpt-format
torch_dist, of any layout and optimizer. Writes FOLDER/report.html and FOLDER/report.json.
docs/spectrum_report.md says what the quantities are. Reads and measures one weight at a time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from checkpoint_weights import Checkpoint, CheckpointError, Weight, natural, pion_config, view
from spectrum_page import write_page
from torch import Tensor

from pion_dist import PionConfig
from pion_dist.classify import Scalar
from pion_dist.matrix_plan import matrix_name
from pion_dist.spectrum import drift, singular_values

POINTS = 64  # singular values at most that are kept of a matrix, for plots and JSON
ENERGY_ROWS = 4096  # more rows than these are sampled for the hyperspherical energy
_NEAR = 1e-6  # distances below it count as it: equal rows would make the energy infinite


@dataclass(frozen=True)
class Matrix:
    """What Pion rotates as one: a weight or a part of it.

    Attributes:
        name: unique in the model.
        weight: that has it.
        part: of the weight's view, and which of the part's matrices.
        layer: its number; None outside of layers.
        kind: the name without the numbers of layer, expert and head.
        shape: rows and columns.
    """

    name: str
    weight: str
    part: tuple[str, int]
    layer: int | None
    kind: str
    shape: tuple[int, int]


@dataclass(frozen=True)
class Measured:
    """A matrix at one checkpoint; the JSON's entry.

    Attributes:
        read: the fp32 master, or the dtype of the model's weight.
        optimizer: that steps it.
        drift: largest relative change of a singular value since the run's start.
        drift_of_largest: largest change of a singular value, to the largest one at the start.
        largest: singular value.
        smallest: singular value.
        condition: largest / smallest; None where the smallest is zero.
        effective_rank: exp of the entropy of the singular values divided by their sum.
        stable_rank: sum of their squares / the largest one's.
        energy: hyperspherical; None for less than two rows that are not zero.
        energy_rows: that it is of.
        values: singular values at ``ranks`` of the report's matrix.
    """

    read: str
    optimizer: str
    drift: float
    drift_of_largest: float
    largest: float
    smallest: float
    condition: float | None
    effective_rank: float
    stable_rank: float
    energy: float | None
    energy_rows: int
    values: list[float]


@dataclass
class Run:
    """Checkpoints of one training, by iteration.

    Attributes:
        name: tells it from the others.
        checkpoints: at least one.
        starts: of each matrix what it is compared with: the common start or the first checkpoint.
        measured: of each matrix what was measured at each checkpoint.
    """

    name: str
    checkpoints: list[Checkpoint]
    starts: dict[str, Measured] = field(default_factory=dict)
    measured: dict[str, list[Measured]] = field(default_factory=dict)

    @property
    def optimizer(self) -> str:
        return str(getattr(self.checkpoints[0].args, "optimizer", "unknown"))

    @property
    def from_masters(self) -> bool:
        """Whether it began with another checkpoint's masters, and not with its model's weights."""
        flags = ("finetune", "no_load_optim")
        return not any(getattr(c.args, flag, False) for c in self.checkpoints for flag in flags)


@dataclass(frozen=True)
class Report:
    """All that was measured.

    Attributes:
        runs: in the order they were given.
        start: the checkpoint that drift is measured against; None for each run's first.
        config: how weights were cut.
        matrices: in the model's order.
        left_out: names of weights that are not shown and why.
    """

    runs: list[Run]
    start: Checkpoint | None
    config: PionConfig
    matrices: list[Matrix]
    left_out: dict[str, str]


def ranks(count: int) -> list[int]:
    """Which of so many singular values are kept, from 0: closest together at both ends."""
    if count <= POINTS:
        return list(range(count))
    angles = (math.pi * i / (POINTS - 1) for i in range(POINTS))
    return sorted({round((1 - math.cos(angle)) / 2 * (count - 1)) for angle in angles})


def effective_rank(values: Tensor) -> float:
    """exp(−Σ p log p) of p = σ / Σσ: Roy and Vetterli, 2007."""
    p = values / values.sum()
    return float(torch.special.entr(p).sum().exp())


def hyperspherical_energy(matrix: Tensor) -> tuple[float | None, int]:
    """Mean of 1 / ‖a − b‖ over all pairs of different rows, each divided by its norm.

    Liu et al., 2018, with s = 1, as a mean and not a sum, so that matrices of any height compare.
    Rows of zeros have no direction and are left out. Of a matrix with more than ENERGY_ROWS rows a
    sample is taken, the same rows of every checkpoint.

    Returns:
        The energy, or None without a pair, and the number of rows it is of.
    """
    rows = matrix
    if len(rows) > ENERGY_ROWS:
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        rows = rows[chosen[:ENERGY_ROWS].sort().values]
    rows = rows.double()
    norms = rows.norm(dim=1, keepdim=True)
    rows = (rows / norms)[norms[:, 0] > 0]
    count = len(rows)
    if count < 2:
        return None, count
    total = 0.0
    for i in range(0, count, 1024):  # 1024 x 4096 distances are 32 MiB
        cosines = rows[i : i + 1024] @ rows.T
        inverse = (2 - 2 * cosines).clamp_min(_NEAR**2).rsqrt()
        inverse.diagonal(i).zero_()
        total += float(inverse.sum())
    return total / (count * (count - 1)), count


def measure(matrix: Tensor, spectrum: Tensor, start: Tensor, *, read: str, by: str) -> Measured:
    """A matrix's numbers, given its singular values now and at the start, and who steps it."""
    energy, energy_rows = hyperspherical_energy(matrix)
    largest, smallest = float(spectrum[0]), float(spectrum[-1])
    change = float((spectrum - start).abs().max())
    return Measured(
        read=read,
        optimizer=by,
        drift=float(drift(start, spectrum)),
        drift_of_largest=change / float(start[0]) if start[0] else 0.0,
        largest=largest,
        smallest=smallest,
        condition=largest / smallest if smallest else None,
        effective_rank=effective_rank(spectrum) if largest else 0.0,
        stable_rank=float(spectrum.square().sum()) / largest**2 if largest else 0.0,
        energy=energy,
        energy_rows=energy_rows,
        values=spectrum[ranks(len(spectrum))].tolist(),
    )


def matrices_of(weight: Weight, checkpoint: Checkpoint, config: PionConfig) -> list[Matrix]:
    """The matrices of a weight.

    Raises:
        LookupError: it is none of those that Pion rotates; with the reason.
    """
    cut = view(weight, checkpoint.args, config)
    if isinstance(cut, Scalar):
        raise LookupError(cut.reason)
    number = re.search(r"\.layers\.(\d+)\.", weight.name)
    kind = re.sub(r"\.(layers|experts)\.\d+\.", r".\1.", weight.name)
    return [
        Matrix(
            name=matrix_name(weight.name, part, i),  # as in a training's log
            weight=weight.name,
            part=(part, i),
            layer=int(number[1]) if number else None,
            kind=f"{kind}:{part}",
            shape=(m, n),
        )
        for part, (batch, m, n) in cut.shapes.items()
        for i in range(batch)
    ]


def runs_of(paths: Sequence[Path]) -> list[Run]:
    """The runs that paths name, iterations in order.

    Raises:
        CheckpointError: a path is no checkpoint.
    """
    folders: dict[Path, dict[Path, None]] = {}
    for path in (Path(os.path.abspath(path)) for path in paths):
        inside = sorted(path.glob("iter_*"), key=lambda p: natural(p.name))
        single = not inside or (path / "metadata.json").exists()
        for folder in [path] if single else inside:
            folders.setdefault(path.parent if single else path, {})[folder] = None
    common = os.path.commonpath([folder.parent for folder in folders])
    return [
        Run(os.path.relpath(folder, common), sorted(map(Checkpoint, each), key=_iteration))
        for folder, each in folders.items()
    ]


def _iteration(checkpoint: Checkpoint) -> int:
    return checkpoint.iteration


def check_same_model(first: Checkpoint, other: Checkpoint) -> None:
    """Refuse checkpoints of different models.

    Raises:
        CheckpointError: naming the first weight that differs.
    """
    for name in sorted(first.weights.keys() | other.weights.keys(), key=natural):
        a, b = (checkpoint.weights.get(name) for checkpoint in (first, other))
        if a is None or b is None or a.shape != b.shape:
            here, there = ("missing" if w is None else "{}x{}".format(*w.shape) for w in (a, b))
            raise CheckpointError(
                f"different models: {name} is {here} in {first.folder} and {there} in "
                f"{other.folder}; report them apart"
            )


def build(runs: list[Run], start: Checkpoint | None, only: re.Pattern[str]) -> Report:
    """Measure everything.

    Args:
        runs: as ``runs_of`` finds them; ``measured`` is filled in.
        start: the checkpoint that drift is measured against, or None for each run's first.
        only: searched in the names of matrices.

    Raises:
        CheckpointError: of different models, or a file is damaged, or nothing is left to measure.
    """
    every = [checkpoint for run in runs for checkpoint in run.checkpoints]
    first = every[0]
    for other in [*every[1:], *([start] if start else [])]:
        check_same_model(first, other)
    # Who was trained by Pion says what its matrices are, and the others are looked at in the same.
    of_pion = [c for c in every if getattr(c.args, "optimizer", "") == "pion"]
    described = [c for c in [*of_pion, *every] if vars(c.args)]
    guide = described[0] if described else first
    config = pion_config(guide.args)
    wanted: dict[str, list[Matrix]] = {}
    left_out = {}
    for weight in first.weights.values():
        try:
            matrices = matrices_of(weight, guide, config)
        except LookupError as reason:
            left_out[weight.name] = str(reason)
            continue
        if chosen := [matrix for matrix in matrices if only.search(matrix.name)]:
            wanted[weight.name] = chosen
    if not wanted:
        raise CheckpointError(f"no matrix has a name in which --only {only.pattern!r} is found")
    progress = Progress(len(wanted))
    for name, chosen in wanted.items():
        measure_weight(name, chosen, runs, start, guide, config)
        progress.done(name)
    return Report(runs, start, config, [m for each in wanted.values() for m in each], left_out)


def measure_weight(
    name: str,
    chosen: Sequence[Matrix],
    runs: Sequence[Run],
    start: Checkpoint | None,
    guide: Checkpoint,
    config: PionConfig,
) -> None:
    """Fill in what the runs have of one weight's matrices; only this weight is in memory."""

    def look(
        checkpoint: Checkpoint, starts: dict[str, Tensor], *, master: bool = True
    ) -> dict[str, Measured]:
        """Measure the matrices; those without a spectrum at the start get theirs noted there."""
        weight = checkpoint.weights[name]
        cut = view(weight, guide.args, config)
        assert not isinstance(cut, Scalar)
        parts = cut.split(checkpoint.read(weight, master=master))
        read = checkpoint.origin(weight, master=master)
        measured = {}
        for matrix in chosen:
            x = parts[matrix.part[0]][matrix.part[1]]
            spectrum = singular_values(x)
            against = starts.setdefault(matrix.name, spectrum)
            by = checkpoint.optimizer(weight)
            measured[matrix.name] = measure(x, spectrum, against, read=read, by=by)
        return measured

    for run in runs:
        starts: dict[str, Tensor] = {}
        if start:
            run.starts |= look(start, starts, master=run.from_masters)
        for checkpoint in run.checkpoints:
            for matrix, values in look(checkpoint, starts).items():
                run.starts.setdefault(matrix, values)
                run.measured.setdefault(matrix, []).append(values)


class Progress:
    """A line now and then."""

    def __init__(self, total: int) -> None:
        self.total, self.count, self.began = total, 0, time.monotonic()
        self.last = self.began

    def done(self, name: str) -> None:
        self.count += 1
        now = time.monotonic()
        if self.count == self.total or now - self.last > 10:
            self.last = now
            left = (now - self.began) / self.count * (self.total - self.count)
            line = f"{self.count}/{self.total} weights, {left:.0f} s to go: {name}"
            print(line, file=sys.stderr, flush=True)


def as_json(report: Report) -> dict[str, Any]:
    """The report's numbers, for other programs."""
    return {
        "format": 1,
        "cut": {"qkv": report.config.qkv, "split_gate": report.config.split_gate},
        "start": str(report.start.folder) if report.start else None,
        "runs": [
            {
                "name": run.name,
                "optimizer": run.optimizer,
                "checkpoints": [
                    {"iteration": c.iteration, "folder": str(c.folder)} for c in run.checkpoints
                ],
            }
            for run in report.runs
        ],
        "matrices": [
            {
                "name": matrix.name,
                "weight": matrix.weight,
                "kind": matrix.kind,
                "layer": matrix.layer,
                "shape": matrix.shape,
                "ranks": ranks(min(matrix.shape)),
                "runs": [
                    {
                        "start": vars(run.starts[matrix.name]),
                        "checkpoints": [vars(each) for each in run.measured[matrix.name]],
                    }
                    for run in report.runs
                ],
            }
            for matrix in report.matrices
        ],
        "left_out": report.left_out,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Spectra of a model's weights in Megatron's torch_dist checkpoints."
    )
    parser.add_argument(
        "checkpoints",
        nargs="+",
        type=Path,
        metavar="CKPT",
        help="a run's folder (all its iterations) or an iter_* folder in it; several of one "
        "folder are one run",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for report.html and .json")
    parser.add_argument(
        "--start",
        type=Path,
        metavar="CKPT",
        help="iter_* folder that all runs' drift is measured against (default: each run's first "
        "checkpoint that is given)",
    )
    parser.add_argument(
        "--only",
        type=_pattern,
        default="",
        metavar="PATTERN",
        help=r"regular expression: matrices with it in their name, as '\.(0|40|79)\.' for three "
        "layers",
    )
    args = parser.parse_args()
    try:
        runs = runs_of(args.checkpoints)
        start = Checkpoint(args.start) if args.start else None
        report = build(runs, start, args.only)
    except CheckpointError as error:
        sys.exit(f"spectrum_report: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    args.out.mkdir(parents=True, exist_ok=True)
    contents = as_json(report)
    (args.out / "report.json").write_text(json.dumps(contents, allow_nan=False) + "\n")
    for line in write_page(contents, args.out / "report.html"):
        print(line)
    print(f"written: {args.out / 'report.html'}, {args.out / 'report.json'}")


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None


if __name__ == "__main__":
    main()
