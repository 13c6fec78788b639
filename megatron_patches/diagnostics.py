"""--pion-spectrum-interval: Pion's numbers in Megatron's log, TensorBoard and Weights & Biases."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from pion_dist.diagnostics import Diagnostics, line, scalars
from pion_dist.optimizer import Pion

from .distributed_optimizer import pions
from .process_groups import of_all_ranks, rank

_WATCH = "pion_watch"  # attribute of the run's optimizer


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
        result = original(*args, **kwargs)
        watch.after(iteration)
        return result

    training.train_step = train_step


def attach(optimizer: Any, config: Any) -> None:
    """Have an optimizer's training reported, if it is to be (modified in place).

    Args:
        optimizer: what get_megatron_optimizer returned, of ``--optimizer pion``.
        config: the OptimizerConfig that it was made with.
    """
    if interval := config.pion_spectrum_interval:
        watch = Watch(pions(optimizer), interval=interval, exact=config.pion_spectrum_exact)
        setattr(optimizer, _WATCH, watch)


class Watch:
    """Reports every so many iterations; every rank has one, and does the same in an iteration."""

    def __init__(self, pions: Sequence[Pion], *, interval: int, exact: bool) -> None:
        """Report on these every ``interval`` iterations; ``exact``: on all singular values."""
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
        mine = [row for each in self._diagnostics for row in each.report()]
        last = torch.distributed.get_world_size() - 1
        everyone: list[Any] | None = [None] * (last + 1) if rank() == last else None
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
            ranks = torch.distributed.get_process_group_ranks(group) if group else [rank()]
            mine[x.weight] = ranks[0]
    firsts: dict[str, set[int]] = {}
    for each in of_all_ranks(mine):
        for name, first in each.items():
            firsts.setdefault(name, set()).add(first)
    chosen = {
        name: sorted(firsts[name])[number % len(firsts[name])]
        for number, name in enumerate(sorted(firsts))
    }
    return {name for name, first in mine.items() if chosen[name] != first}


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
