"""--pion-spectrum-interval: Pion's numbers in Megatron's log, TensorBoard and Weights & Biases."""

from __future__ import annotations

import functools
import importlib
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pion_dist.diagnostics import Diagnostics
from pion_dist.optimizer import Pion

_WATCH = "pion_watch"  # attribute of the run's optimizer


@dataclass(frozen=True)
class Row:
    """A matrix's numbers; see ``pion_dist.diagnostics.Report``."""

    name: str
    exact: bool
    size: int
    drift: float
    shift: float
    orthogonality: float
    angle: float
    alpha: float
    kept: float
    update_rms: float


def apply() -> None:
    """Have Megatron's training loop report, where ``attach`` says so."""
    training: Any = importlib.import_module("megatron.training.training")
    original, signature = training.train_step, inspect.signature(training.train_step)

    @functools.wraps(original)
    def train_step(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        watch = getattr(given["optimizer"], _WATCH, None)
        if watch is None:
            return original(*args, **kwargs)
        iteration = given["iteration"] + 1  # as it is logged
        watch.before(iteration)
        found = original(*args, **kwargs)
        watch.after(iteration)
        return found

    training.train_step = train_step


def attach(optimizer: Any, pions: Sequence[Pion], *, interval: int, exact: bool) -> None:
    """Have an optimizer's training reported (modified in place).

    Args:
        optimizer: what get_megatron_optimizer returned.
        pions: those in it on this rank.
        interval: report every so many iterations; 0: never.
        exact: measure all singular values of matrices of any size.
    """
    if interval:
        setattr(optimizer, _WATCH, Watch(pions, interval=interval, exact=exact))


class Watch:
    """Reports every so many iterations; every rank has one, and does the same in an iteration."""

    def __init__(self, pions: Sequence[Pion], *, interval: int, exact: bool) -> None:
        """See ``attach``."""
        self._pions, self._interval, self._exact = pions, interval, exact
        self._diagnostics: list[Diagnostics] | None = None

    def before(self, iteration: int) -> None:
        """Before an iteration; before the first one weights are initialised or loaded."""
        if self._diagnostics is None:
            elsewhere = _elsewhere(self._pions)
            self._diagnostics = [
                Diagnostics(pion, exact=self._exact, elsewhere=elsewhere) for pion in self._pions
            ]
        if iteration % self._interval == 0:
            for each in self._diagnostics:
                each.record()

    def after(self, iteration: int) -> None:
        """After an iteration, whether it has moved the weights or not."""
        if iteration % self._interval or self._diagnostics is None:
            return
        mine = [
            Row(name, exact, size, *values.tolist())
            for report in (each.report() for each in self._diagnostics)
            for name, exact, size, values in zip(
                report.names, report.exact, report.sizes, report.values, strict=True
            )
        ]
        rank, last = torch.distributed.get_rank(), torch.distributed.get_world_size() - 1
        everyone: list[Any] | None = [None] * (last + 1) if rank == last else None
        torch.distributed.gather_object(mine, everyone, dst=last)
        if everyone is not None:
            rows = sorted((row for rows in everyone for row in rows), key=lambda row: row.name)
            _write(scalars(rows), iteration)
            print(line(rows, iteration), flush=True)


def _elsewhere(pions: Iterable[Pion]) -> set[str]:
    """Weights of this rank that other ranks report, of those that have the same ones; a collective.

    Replicas of a weight are a group of ranks that share it, or one rank. They are dealt evenly.
    """
    mine: dict[str, int] = {}
    for pion in pions:
        for x in pion.plan.matrices:
            group = None if x.group is None else pion.groups[x.group]
            ranks = [torch.distributed.get_rank()]
            ranks = torch.distributed.get_process_group_ranks(group) if group else ranks
            mine[x.weight] = ranks[0]
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    found: dict[str, set[int]] = {}
    for each in everyone:
        for name, first in each.items():
            found.setdefault(name, set()).add(first)
    chosen = {
        name: sorted(found[name])[number % len(found[name])]
        for number, name in enumerate(sorted(found))
    }
    return {name for name, first in mine.items() if chosen[name] != first}


# Tag of a kind, whether it is of exact matrices, and a row's number.
_KINDS: tuple[tuple[str, bool, Callable[[Row], float]], ...] = (
    ("drift", True, lambda row: row.drift),
    ("shift", True, lambda row: row.shift),
    ("norm-drift", False, lambda row: row.drift),
)


def scalars(rows: Sequence[Row]) -> dict[str, float]:
    """What the writers get, by tag."""
    found = {}
    for kind, exact, value in _KINDS:
        parts: dict[str, float] = {}
        for row in rows:
            if row.exact == exact:
                part = row.name.rpartition("[")[0]
                parts[part] = max(value(row), parts.get(part, 0.0))
        if parts:
            found[f"pion/{kind}"] = max(parts.values())
        found |= {f"pion-{kind}/{part}": value for part, value in parts.items()}
    stepped = [row for row in rows if not math.isnan(row.angle)]
    if stepped:
        size = sum(row.size for row in stepped)
        squares = sum(row.size * row.update_rms**2 for row in stepped)
        found |= {
            "pion/orthogonality": max(row.orthogonality for row in stepped),
            "pion/angle": max(row.angle for row in stepped),
            "pion/update-rms": math.sqrt(squares / size),
        }
        # Generators have the one, polar the other.
        if alphas := [row.alpha for row in stepped if not math.isnan(row.alpha)]:
            found |= {"pion/alpha-min": min(alphas), "pion/alpha-max": max(alphas)}
        if shares := [row.kept for row in stepped if not math.isnan(row.kept)]:
            found["pion/kept-min"] = min(shares)
    return found


def line(rows: Sequence[Row], iteration: int) -> str:
    """What the log gets."""
    values = scalars(rows)
    words = [f" pion at iteration {iteration}"]
    for kind, exact, value in _KINDS:
        if some := [row for row in rows if row.exact == exact]:
            worst = max(some, key=value)
            words.append(f"{kind}: {value(worst):.3E} ({worst.name})")
    if "pion/angle" in values:
        words += [
            f"orthogonality: {values['pion/orthogonality']:.3E}",
            f"angle: {values['pion/angle']:.3E}",
        ]
        if "pion/alpha-min" in values:
            words.append(f"alpha: {values['pion/alpha-min']:.3E} to {values['pion/alpha-max']:.3E}")
        if "pion/kept-min" in values:
            words.append(f"kept: {values['pion/kept-min']:.3E}")
        words.append(f"update rms: {values['pion/update-rms']:.3E}")
    else:
        words.append("no step was taken")
    return " | ".join(words) + " |"


def _write(values: dict[str, float], iteration: int) -> None:
    """To the writers, which the last rank has."""
    writers = importlib.import_module("megatron.training.global_vars")
    tensorboard: Any = writers.get_tensorboard_writer()
    wandb: Any = writers.get_wandb_writer()
    if tensorboard is not None:
        for tag, value in values.items():
            tensorboard.add_scalar(tag, value, iteration)
    if wandb is not None:
        wandb.log(values, iteration)
