"""What Pion does on several ranks, in plain PyTorch: one process a rank, gloo on this machine.

    python tests/support/rank_checks.py RANKS

prints a line of JSON for every check, {"name": ..., "failures": {rank: what it said}}. A launch
takes longer than a check, so that they share one; ``test_ranks.py`` launches and reports. A check
does the same on every rank. One that failed may leave ranks inside different collectives, so the
next gets a new group.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from datetime import timedelta
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from reference import MSIGN, PUBLISHED, Array, ReferenceWeight
from reference_cases import (
    CUT_STEPS,
    TOLERANCE,
    TOLERANCE32,
    UNIT32,
    VALUES,
    config_of,
    covering,
    moderate_lr,
    readable,
)
from torch.multiprocessing import spawn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from pion_dist import Pion, PionConfig, iterations, kernels
from pion_dist.diagnostics import Diagnostics
from pion_dist.matrices import MatrixView, interleaved, stacked, whole
from pion_dist.plan import WAVES
from pion_dist.slots import Storage

# A collective that not every rank enters is an error after so long, and so a named failure.
TIMEOUT = timedelta(seconds=30)
DIM = {"rows": 1, "cols": 2, None: 0}  # of [B, m, n], where ranks' shares join


@dataclass(frozen=True)
class Weight:
    """A weight of the checks.

    Attributes:
        name: for messages.
        view: of one of so many ranks' shard; of 1, of the whole weight.
        shared: the ranks have a shard each; else each has all of it.
    """

    name: str
    view: Callable[[int], MatrixView]
    shared: bool = True

    @property
    def whole(self) -> MatrixView:
        return self.view(1)

    @property
    def shape(self) -> tuple[int, int]:
        return self.whole.rows, self.whole.cols

    def share(self, matrices: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
        """A rank's share of [B, m, n], or of [B] where the axis is None."""
        return matrices.chunk(ranks, DIM[self.whole.axis])[rank] if self.shared else matrices

    def shard(self, w: Array, rank: int, ranks: int) -> torch.Tensor:
        """A rank's shard of the weight or of its gradient."""
        view = self.view(ranks if self.shared else 1)
        shard = torch.empty(view.rows, view.cols, dtype=torch.float64)
        parts = self.whole.split(torch.tensor(w)).items()
        view.merge({part: self.share(x, rank, ranks) for part, x in parts}, shard)
        return shard


UNCUT = Weight("uncut", lambda _: whole(6, 10), shared=False)
QKV = (("q", 4), ("k", 2), ("v", 2))
# For 2 and 4 ranks with up to 8 blocks. Wide and tall ones cut either way (k ≤ 40, as TOLERANCE
# wants), two of one shape, square, fused; what is dealt and what is not shared.
WEIGHTS = (
    Weight("fc1", lambda ranks: whole(16 // ranks, 8, axis="rows")),
    Weight("fc2", lambda ranks: whole(8, 16 // ranks, axis="cols")),
    Weight("fc1.second", lambda ranks: whole(16 // ranks, 8, axis="rows")),
    Weight("square", lambda ranks: whole(16 // ranks, 16, axis="rows")),
    Weight("tall.rows", lambda ranks: whole(40 // ranks, 4, axis="rows")),
    Weight("tall.cols", lambda ranks: whole(40, 16 // ranks, axis="cols")),
    Weight("wide.rows", lambda ranks: whole(16 // ranks, 40, axis="rows")),
    Weight("wide.cols", lambda ranks: whole(4, 40 // ranks, axis="cols")),
    Weight("gate_up", lambda ranks: stacked(32 // ranks, 12, name="gate_up", count=2, axis="rows")),
    Weight("experts", lambda ranks: stacked(24, 16 // ranks, name="expert", count=2, axis="cols")),
    Weight(
        "qkv",
        lambda ranks: interleaved(64 // ranks, 12, repeated=QKV, per_repetition=False, axis="rows"),
    ),
    Weight("heads", lambda ranks: stacked(24 // ranks, 10, name="head", count=4 // ranks)),
    Weight(
        "groups",
        lambda ranks: interleaved(32 // ranks, 10, repeated=QKV, per_repetition=True),
    ),
    UNCUT,
    Weight("uncut.rows", lambda _: whole(16, 6, axis="rows"), shared=False),
)
# A side does not divide by the ranks, so that teams of generators are of one rank; or neither does.
ODD_WEIGHTS = (
    Weight("odd.fc1", lambda ranks: whole(16 // ranks, 9, axis="rows")),
    Weight("odd.fc2", lambda ranks: whole(7, 16 // ranks, axis="cols")),
    Weight("odd.experts", lambda ranks: stacked(10, 16 // ranks, name="e", count=2, axis="cols")),
    Weight("odd.wide", lambda ranks: whole(8 // ranks, 9, axis="rows")),
)
ALL_WEIGHTS = (*WEIGHTS, *ODD_WEIGHTS)


@dataclass(frozen=True)
class Place:
    """A rank of a group."""

    group: dist.ProcessGroup

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def ranks(self) -> int:
        return dist.get_world_size(self.group)

    def everyones(self, mine: object) -> list[object]:
        gathered: list[object] = [None] * self.ranks
        dist.all_gather_object(gathered, mine, group=self.group)
        return gathered

    def all_fail(self, wrong: Sequence[str]) -> None:
        """Fail on every rank where one has something wrong: none then waits for another."""
        everyones = self.everyones(list(wrong))
        assert not any(everyones), everyones


class Run:
    """Weights, their gradients and an optimizer on one rank; the reference where it is wanted."""

    def __init__(
        self,
        place: Place,
        config: PionConfig,
        weights: Sequence[Weight],
        *,
        dtype: torch.dtype | None = None,
        lr: float | None = None,
        reference: bool = True,
        elsewhere: Mapping[str, Place] | None = None,
    ) -> None:
        self.elsewhere = elsewhere or {}  # groups of weights that ``place`` does not share
        self.place, self.config, self.weights = place, config, weights
        usual = moderate_lr(config) if config.direction == "polar" else 0.2
        self.lr = usual if lr is None else lr
        self.rng = np.random.default_rng(11)
        if dtype is None:  # bf16 and 8 bits are in place of float32
            low = config.matmul_precision == "bf16" or config.state_dtype != "fp32"
            dtype = torch.float32 if low else torch.float64
        values = [self._round(0.2 * self.rng.standard_normal(w.shape), dtype) for w in weights]
        self.params = [
            torch.nn.Parameter(self.shard(w, value).to(dtype))
            for w, value in zip(weights, values, strict=True)
        ]
        self.references = [
            ReferenceWeight(value, w.whole, config)
            for w, value in zip(weights, values, strict=True)
            if reference
        ]
        self.optimizer = self.new_optimizer()

    @staticmethod
    def _round(x: Array, dtype: torch.dtype) -> Array:
        return torch.tensor(x).to(dtype).double().numpy()

    def place_of(self, weight: Weight) -> Place:
        return self.elsewhere.get(weight.name, self.place)

    def view(self, weight: Weight) -> MatrixView:
        return weight.view(self.place_of(weight).ranks if weight.shared else 1)

    def shard(self, weight: Weight, value: Array) -> torch.Tensor:
        place = self.place_of(weight)
        return weight.shard(value, place.rank, place.ranks)

    def new_optimizer(self) -> Pion:
        pairs = list(zip(self.weights, self.params, strict=True))
        return Pion(
            [(w.name, p) for w, p in pairs],
            lr=self.lr,
            config=self.config,
            views={p: self.view(w) for w, p in pairs},
            shards={p: self.place_of(w).group for w, p in pairs if w.shared},
            teams=self.teams(),
        )

    def teams(self) -> dict[dist.ProcessGroup, list[dist.ProcessGroup]]:
        """Of four ranks each half; of all others those that Pion finds by itself."""
        if self.place.ranks != 4:
            return {}
        halves = [group_of(range(first, first + 2)) for first in (0, 2)]
        return {self.place.group: [halves[self.place.rank // 2], self.place.group]}

    def set_gradients(self) -> None:
        """Draw the next gradients; the references step by them."""
        for index, (w, p) in enumerate(zip(self.weights, self.params, strict=True)):
            g = self._round(self.rng.standard_normal(w.shape), p.dtype)
            p.grad = self.shard(w, g).to(p.dtype)
            if self.references:
                self.references[index].step(g, self.lr)

    def step(self) -> None:
        self.set_gradients()
        self.optimizer.step()

    def shards(self) -> Iterator[tuple[Weight, str, torch.Tensor, Array, Array]]:
        """Weight, part, this rank's matrices, what they are to be, and that on all ranks."""
        for w, p, reference in zip(self.weights, self.params, self.references, strict=True):
            mine = self.view(w).split(p.detach())
            for part, expected in reference.weights().items():
                place = self.place_of(w)
                share = w.share(torch.tensor(expected), place.rank, place.ranks)
                yield w, part, mine[part], share.numpy(), expected

    def snapshot(self) -> list[torch.Tensor]:
        """Every weight and moment, copied."""
        moments = [m for p in self.params for _, m in sorted(self.optimizer.state[p].items())]
        return [x.detach().clone() for x in (*self.params, *moments)]


def group_of(ranks: Iterable[int]) -> dist.ProcessGroup:
    """A process group that every rank asks for, and that is made once.

    Each has threads that wake up every 10 ms as long as the process lives.
    """
    return _made(tuple(ranks))


@functools.cache
def _made(ranks: tuple[int, ...]) -> dist.ProcessGroup:
    return dist.new_group(ranks, timeout=TIMEOUT)


class StoredRun(Run):
    """Weights of which data-parallel ranks store ranges, as Megatron's distributed optimizer does.

    Half of the ranks, and of two one, are tensor parallel. Some ranges are empty.
    """

    def __init__(self, place: Place, config: PionConfig, weights: Sequence[Weight]) -> None:
        self.everyone = place
        cut = place.ranks // 2
        rows = [group_of(range(d * cut, d * cut + cut)) for d in (0, 1)]
        cols = [group_of((t, cut + t)) for t in range(cut)]
        self.number, self.columns = place.rank // cut, Place(cols[place.rank % cut])
        super().__init__(Place(rows[self.number]), config, weights)

    def ranges(self, p: torch.Tensor) -> tuple[tuple[int, int], ...]:
        """Of a shard: the first rank has less and less of it, from all to nothing."""
        here = next(i for i, q in enumerate(self.params) if q is p)
        middle = p.numel() - p.numel() * here // (len(self.params) - 1)
        return (0, middle), (middle, p.numel())

    def own(self, p: torch.Tensor) -> slice:
        return slice(*self.ranges(p)[self.number])

    def new_optimizer(self) -> Pion:
        self.data = [p.detach().reshape(-1)[self.own(p)].clone() for p in self.params]
        pairs = list(zip(self.weights, self.params, strict=True))
        stored = {}
        for (w, p), data in zip(pairs, self.data, strict=True):
            cut = w.shared and self.view(w).axis is not None
            group = self.everyone.group if cut else self.columns.group
            stored[p] = Storage(data, group, self.ranges(p))
        return Pion(
            [(w.name, p) for w, p in pairs],
            lr=self.lr,
            config=self.config,
            views={p: self.view(w) for w, p in pairs},
            shards={p: self.place.group for w, p in pairs if w.shared},
            stored=stored,
            teams={self.everyone.group: [self.place.group, self.everyone.group]},
        )

    def step(self) -> None:
        self.set_gradients()
        for p, data in zip(self.params, self.data, strict=True):
            data.grad = p.grad.reshape(-1)[self.own(p)] if data.numel() else None
        self.optimizer.step()
        for p, data in zip(self.params, self.data, strict=True):
            others = torch.zeros(p.numel(), dtype=p.dtype)
            others[self.own(p)] = data
            dist.all_reduce(others, group=self.columns.group)
            p.data = others.view(p.shape)


def check_weights(run: Run, tolerance: float) -> None:
    """Each rank's shards are the reference's, so the joined matrices are; relative to max|W|."""
    wrong = []
    for w, part, mine, share, all_of_it in run.shards():
        error = np.abs(mine.double().numpy() - share).max() / np.abs(all_of_it).max()
        if not error <= tolerance:
            wrong.append(f"{w.name}, {part}: {error:.1e}, allowed {tolerance:.1e}")
    run.place.all_fail(wrong)


def moment_share(run: Run, weight: Weight, key: str, moment: Array) -> Array:
    """What this rank has of a moment [B, ...]: a share where ranks share its matrices.

    Of generators their rows or their blocks, of averages those of the longer side or of the blocks.
    """
    axis, team = weight.whole.axis, team_of(run, weight, key)
    if not weight.shared:
        return moment
    if axis is None:  # matrices of its own
        return np.split(moment, run.place.ranks, 0)[run.place.rank]
    name, _, of = key.partition(".")
    blocks, polar = run.config.blocks > 1, run.config.direction == "polar"
    if len(team) == 1 or (not polar and blocks and moment.ndim == 3 and name[1:] in SIDES):
        return moment  # or of the side that all blocks share
    _, m, n = weight.whole.shapes[of]
    long = "rows" if m > n or (m == n and axis == "rows") else "cols"
    dims = {"left": long == "rows", "right": long == "cols", "sigma": 0}
    dim = int(dims.get(name, 1 if name[1:] in SIDES else DIM[axis if blocks else long]))
    return np.split(moment, len(team), dim)[team.index(run.place.rank)] if dim else moment


SIDES = ("_in", "_out")  # of names of Lie moments


def team_of(run: Run, weight: Weight, key: str) -> tuple[int, ...]:
    """The ranks that compute a part's matrices, as the plan says."""
    part = key.partition(".")[2]
    (team,) = (
        x.team for x in run.optimizer.plan.matrices if (x.weight, x.part) == (weight.name, part)
    )
    return team


def check_moments(run: Run) -> None:
    """Each moment is the reference's, and on the ranks of its team."""
    keys = run.place.everyones([set(run.optimizer.state[p]) for p in run.params])
    states = run.optimizer.state_dict()["state"]  # as matrices, however they are held
    for index, (w, _) in enumerate(pairs(run)):
        state = states.get(index, {})
        expected = run.references[index].state()
        for key, moment in expected.items():
            holders = tuple(rank for rank, held in enumerate(keys) if key in held[index])
            cut = w.shared and w.whole.axis is not None
            held_by = team_of(run, w, key) if cut else tuple(range(run.place.ranks))
            assert holders == held_by, f"{key} of {w.name} is held by ranks {holders}"
            if run.place.rank in holders:
                share = moment_share(run, w, key, moment)
                kept = state[key].numpy()
                if key.partition(".")[0] in ("left", "right"):  # unique up to columns' signs
                    kept, share = np.abs(kept), np.abs(share)
                assert kept.shape == share.shape, f"{key} of {w.name}: {kept.shape}"
                error = np.abs(kept - share).max() / (np.abs(moment).max() or 1.0)
                assert error <= TOLERANCE, f"{key} of {w.name}: {error:.1e}"
        assert set(state) <= set(expected), f"{w.name} has {set(state) - set(expected)}"


def check_reference(place: Place, config: PionConfig) -> None:
    run = Run(place, config, ALL_WEIGHTS, lr=moderate_lr(config))
    for _ in range(CUT_STEPS):
        run.step()
        check_weights(run, TOLERANCE)
    check_moments(run)


def check_float32(place: Place, config: PionConfig) -> None:
    """The reference to float32's rounding, and the joined matrices' spectra likewise."""
    run = Run(place, config, ALL_WEIGHTS, dtype=torch.float32)
    start = [reference.weights() for reference in run.references]
    for _ in range(CUT_STEPS):
        run.step()
    tolerance = TOLERANCE32[config.direction] * UNIT32
    check_weights(run, tolerance)
    everyones = run.place.everyones([run.view(w).split(p.detach()) for w, p in pairs(run)])
    for index, (w, _) in enumerate(pairs(run)):
        for part, before in start[index].items():
            shards = [shards[index][part] for shards in everyones]
            joined = torch.cat(shards, DIM[w.whole.axis]) if w.shared else shards[place.rank]
            old = np.linalg.svd(before, compute_uv=False)
            drift = np.abs(np.linalg.svd(joined.double().numpy(), compute_uv=False) - old).max()
            # Factors orthogonal to rounding, so what moves singular values is float32: of products
            # and solves of inner length ≤ 40 and of the store, 10 a step, relative to the norm.
            allowed = CUT_STEPS * 10 * np.sqrt(40) * UNIT32
            assert drift <= allowed * old.max(), f"{w.name}, {part}: {drift / old.max():.1e}"


def pairs(run: Run) -> list[tuple[Weight, torch.nn.Parameter]]:
    return list(zip(run.weights, run.params, strict=True))


def check_nan(place: Place, config: PionConfig) -> None:
    """Where one rank's gradient has a NaN, no rank moves anything; the next step does."""
    names = ("fc1", "fc2", "qkv", "heads", "uncut")
    run = Run(place, config, [w for w in WEIGHTS if w.name in names], reference=False)
    run.step()
    for index, name in enumerate(names):
        before = run.snapshot()
        run.set_gradients()
        if place.rank == index % place.ranks:
            run.params[index].grad[0, 0] = float("nan")
        run.optimizer.step()
        place.all_fail([f"moved by a NaN in {name}"] if moved(run, before) else [])
    before = [p.detach().clone() for p in run.params]
    run.step()
    for (w, p), old in zip(pairs(run), before, strict=True):
        assert p.isfinite().all() and not torch.equal(p, old), f"{w.name} rests after a NaN"


def moved(run: Run, before: Sequence[torch.Tensor]) -> bool:
    """Whether a weight or a moment is not, bit for bit, as it was."""
    pairs = zip(before, run.snapshot(), strict=True)
    return not all(torch.equal(old, new) for old, new in pairs)


def check_resume(place: Place, config: PionConfig) -> None:
    """A new optimizer that loads the state goes on as the old one would have, bit for bit."""
    weights = ALL_WEIGHTS
    straight, resumed = (Run(place, config, weights, reference=False) for _ in range(2))
    for _ in range(2):
        straight.step()
        resumed.step()
    saved = copy.deepcopy(resumed.optimizer.state_dict())
    resumed.optimizer = resumed.new_optimizer()
    resumed.optimizer.load_state_dict(saved)
    again = resumed.optimizer.state_dict()["state"]
    assert {i: s.keys() for i, s in again.items()} == {
        i: s.keys() for i, s in saved["state"].items()
    }
    for _ in range(2):
        straight.step()
        resumed.step()
    for old, new in zip(straight.snapshot(), resumed.snapshot(), strict=True):
        assert torch.equal(old, new)


# Names of torch 2.13's dispatched operations: the plan's name for each, and which argument is the
# input. Another operation counts under its own name, so that it is seen.
INPUTS = {
    "c10d::allreduce_": ("all_reduce", 0),
    "c10d::alltoall_base_": ("all_to_all", 1),
    "c10d::alltoall_": ("all_to_all", 1),
    "c10d::_allgather_base_": ("all_gather", 1),
    "c10d::allgather_": ("all_gather", 1),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", 1),
    "c10d::reduce_scatter_": ("reduce_scatter", 1),
}


class Collectives(TorchDispatchMode):
    """Counts this rank's collectives and the bytes of their inputs.

    Attributes:
        seen: calls and bytes by the plan's names.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, tuple[int, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        operation = func._schema.name
        if operation.startswith(("c10d::", "_c10d_functional::")):
            name, place = INPUTS.get(operation, (operation, 0))
            tensors = [x for x in tree_leaves(args[place]) if isinstance(x, torch.Tensor)]
            calls, size = self.seen.get(name, (0, 0))
            self.seen[name] = (calls + 1, size + sum(x.nbytes for x in tensors))
        return func(*args, **(kwargs or {}))


def counted_step(run: Run) -> dict[str, tuple[int, int]]:
    with Collectives() as collectives:
        run.step()
    return collectives.seen


def check_counting(place: Place) -> None:
    """The counter itself, on collectives of known sizes."""
    x, size = torch.zeros(3 * place.ranks, dtype=torch.float64), place.ranks
    part = x.new_empty(3)
    with Collectives() as collectives:
        dist.all_reduce(x, group=place.group)
        dist.all_reduce(x[:1].int(), group=place.group)
        dist.all_to_all_single(torch.empty_like(x), x, group=place.group)
        dist.all_gather_into_tensor(torch.empty_like(x), part, group=place.group)
        dist.all_gather([torch.empty_like(part) for _ in range(size)], part, group=place.group)
        dist.reduce_scatter_tensor(part, x, group=place.group)
        dist.broadcast(part, group_src=0, group=place.group)
    assert collectives.seen == {
        "all_reduce": (2, 24 * size + 4),
        "all_to_all": (1, 24 * size),
        "all_gather": (2, 48),
        "reduce_scatter": (1, 24 * size),
        "c10d::broadcast_": (1, 24),
    }, collectives.seen


def check_collectives(place: Place, config: PionConfig) -> None:
    """Steps exchange what the plan says, call by call and byte by byte, on every rank."""
    run = Run(place, config, ALL_WEIGHTS, reference=False)
    steps = (1, 2)
    if config.spectrum_reset_interval or config.direction == "polar":
        run.step()  # measures spectra
        steps = range(2, 2 + max(1, config.spectrum_reset_interval))
    for step in steps:
        seen = counted_step(run)
        moved = run.optimizer.plan.collectives([place.rank], step)
        planned = {name: (each.calls, each.bytes) for name, each in moved.items()}
        assert seen == planned, f"step {step}: counted {seen}, planned {planned}"


def check_work(place: Place, config: PionConfig) -> None:
    """Over an odd and an even step, a rank's products and state are what the plan counts."""
    run = Run(place, config, ALL_WEIGHTS, reference=False)
    if config.direction == "polar":
        run.step()  # decomposes
    executed = 0.0
    for _ in range(2):
        thin = patch.object(kernels, "THIN", 0)  # products in elementwise work's place
        with thin, FlopCounterMode(display=False) as counter:
            run.step()
        executed += counter.get_total_flops() / 2
    planned = run.optimizer.plan.flop([place.rank])
    assert math.isclose(executed, planned, rel_tol=1e-9), f"{executed} FLOP, planned {planned}"
    held = sum(t.nbytes for state in run.optimizer.state.values() for t in state.values())
    assert held == run.optimizer.plan.state_bytes([place.rank])


def check_exact_volume(place: Place, config: PionConfig) -> None:
    """What teams of one rank exchange follows from their definition.

    Ranks send their shards of G once, and of W unless polar's factors tell it, which they do from
    the second step on; the teams then send W back, as often as the ranks together have an element,
    and polar's a flag for each matrix. Besides there is the agreement on finite gradients.
    """
    run = Run(place, config, WEIGHTS, reference=False)
    cut = [(w, p) for w, p in pairs(run) if w.shared and w.whole.axis is not None]
    shards = sum(p.nbytes for _, p in cut)
    polar = config.direction == "polar"
    flags = sum(8 * b for w, _ in cut for b, _, _ in w.whole.shapes.values()) if polar else 0
    for sent in (3, 2 if polar else 3):
        seen = counted_step(run)
        everyones = run.place.everyones(seen)
        assert seen.pop("all_reduce")[0] == 1
        assert set(seen) == {"all_to_all"} and seen["all_to_all"][0] == 2 * WAVES, seen
        total = sum(each["all_to_all"][1] for each in everyones)
        assert total == (sent * shards + flags) * place.ranks, f"{total} bytes, {sent}"


def check_stored(place: Place, config: PionConfig) -> None:
    """Ranges of weights are stepped as whole ones; bytes, work and state are as planned."""
    run = StoredRun(place, config, ALL_WEIGHTS)
    pion, plan = run.optimizer, run.optimizer.plan
    run.step()
    check_weights(run, TOLERANCE)
    for step in (2, 3):
        seen = counted_stored(run)
        moved = plan.collectives(pion.ranks, step)
        planned = {name: (each.calls, each.bytes) for name, each in moved.items()}
        assert seen == planned, f"step {step}: counted {seen}, planned {planned}"
        check_weights(run, TOLERANCE)
    held = sum(t.nbytes for state in pion.state.values() for t in state.values())
    assert held == plan.state_bytes(pion.ranks)
    computed = [sum(p.numel() for p in run.data), plan.stored_numel(pion.ranks)]
    assert computed[0] == computed[1], computed
    # Every matrix has one team.
    names = [
        x.weight
        for i in plan.computed(range(len(plan.matrices)), pion.ranks)
        for x in [plan.matrices[i]]
    ]
    everyones = place.everyones(names)
    for w in run.weights:
        members = sum(w.name in each for each in everyones)
        assert members >= 1, w.name


def counted_stored(run: StoredRun) -> dict[str, tuple[int, int]]:
    """A step's collectives, without those that this test gathers weights by."""
    with Collectives() as collectives:
        run.step()
    seen, gathered = collectives.seen, sum(p.nbytes for p in run.params)
    calls, size = seen["all_reduce"]
    seen["all_reduce"] = calls - len(run.params), size - gathered
    return seen


def check_stored_state(place: Place, config: PionConfig) -> None:
    """A state that is loaded into another optimizer goes on, bit for bit; reports are one's."""
    runs = [StoredRun(place, config, ALL_WEIGHTS) for _ in range(2)]
    for run in runs:
        run.step()
        run.step()
    straight, resumed = runs
    saved = copy.deepcopy(resumed.optimizer.state_dict())
    resumed.optimizer = resumed.new_optimizer()
    resumed.optimizer.load_state_dict(saved)
    watches = [Diagnostics(run.optimizer) for run in runs]
    for run, watch in zip(runs, watches, strict=True):
        watch.record()
        run.step()
    for old, new in zip(straight.data, resumed.data, strict=True):
        assert torch.equal(old, new)
    mine, same = (watch.report() for watch in watches)
    assert repr(mine) == repr(same)  # to the bit, NaN included
    reported = [row.name for rows in place.everyones(mine) for row in rows]
    shared = {w.name for w in run.weights if w.shared}
    of_shared = [name for name in reported if name.partition(":")[0] in shared]
    assert len(of_shared) == len(set(of_shared))
    assert {name.partition(":")[0] for name in reported} == {w.name for w in run.weights}


def check_nothing_shared(place: Place, config: PionConfig) -> None:
    """Whole and dealt weights alone exchange no weight, gradient or product."""
    run = Run(place, config, [w for w in WEIGHTS if not w.shared or w.whole.axis is None])
    for _ in range(2):
        seen = counted_step(run)
        assert sum(size for _, size in seen.values()) <= 16, seen
        check_weights(run, TOLERANCE)


def alone(place: Place) -> Place:
    """This rank by itself, for the run that ranks together have to equal."""
    groups = [group_of([rank]) for rank in range(place.ranks)]
    return Place(groups[place.rank])


def check_reset(place: Place, config: PionConfig) -> None:
    """Weights that drift, by hand, get their spectra back as in one process."""
    weights = ALL_WEIGHTS
    runs = [Run(each, config, weights, reference=False) for each in (place, alone(place))]
    for _ in range(config.spectrum_reset_interval + 1):
        for run in runs:
            with torch.no_grad():
                for p in run.params:
                    p.mul_(1.01)
            run.step()
    shared, one = runs
    wrong = []
    for w, p, q in zip(weights, shared.params, one.params, strict=True):
        error = (
            p - w.shard(q.detach().numpy(), place.rank, place.ranks)
        ).abs().max() / q.abs().max()
        wrong += [] if error <= TOLERANCE else [f"{w.name}: {error:.1e}"]
    place.all_fail(wrong)


def check_diagnostics(place: Place, config: PionConfig) -> None:
    """Ranks report what one process does, each shared matrix once; and what is done by hand."""
    weights, reports = ALL_WEIGHTS, []
    for each in (place, alone(place)):
        run = Run(each, config, weights, reference=False)
        watch = Diagnostics(run.optimizer)
        run.step()
        with torch.no_grad():
            run.params[1].mul_(1.5)  # fc2
        run.optimizer.forget_factors()
        watch.record()
        run.step()
        reports.append([(row.name, astuple(row)[3:]) for row in watch.report()])
    mine, one = reports
    everyones = [row for rows in place.everyones(mine) for row in rows]
    expected = dict(one)
    whole = {w.name for w in weights if not w.shared}
    names = [name for name, _ in everyones if name.partition(":")[0] not in whole]
    assert len(names) == len(set(names)) and {name for name, _ in everyones} == set(expected)
    for name, values in everyones:
        # Sums in another order, which the matrix sign and small singular values enlarge.
        assert np.allclose(values, expected[name], rtol=1e-7, atol=1e-12, equal_nan=True), name
    if config.direction == "polar":  # fc2's factors have been taken anew, and the log says so
        assert max(values[0] for _, values in everyones) <= 1e-9
        return
    worst = max(everyones, key=lambda row: row[1][0])
    assert worst[0] == "fc2:whole[0]" and 0.4 < worst[1][0] < 0.6, worst


def check_part_of_the_ranks(place: Place, config: PionConfig) -> None:
    """Each half of the ranks by itself: ranks of a group are not those of the world.

    Halves of one rank each have the whole weights, so that nothing is cut.
    """
    check_reference(half_of(place), config)


def check_two_groups(place: Place, config: PionConfig) -> None:
    """Some weights are shared by all ranks, others by a half of them; a NaN stops them all."""
    half = half_of(place)
    elsewhere = {name: half for name in ("fc2", "gate_up", "experts", "heads", "wide.rows")}
    run = Run(place, config, WEIGHTS, elsewhere=elsewhere)
    for _ in range(CUT_STEPS):
        run.step()
        check_weights(run, TOLERANCE)
    before = run.snapshot()
    run.set_gradients()
    if place.rank == 0:
        run.params[1].grad[0, 0] = float("nan")  # fc2: the other half does not share it
    run.optimizer.step()
    assert not moved(run, before)


def check_zeros(place: Place) -> None:
    """A shard of zeros is no matrix of zeros; matrices that are dealt are each rank's own."""
    weights = [w for w in WEIGHTS if w.name in ("fc1", "fc2", "heads", "uncut")]
    run = Run(place, PionConfig(), weights, reference=False)
    with torch.no_grad():
        if place.rank == 0:
            run.params[0].zero_()  # fc1
            run.params[2][: 24 // 4] = 0  # a head
        run.params[1].zero_()  # fc2
    with patch("pion_dist.optimizer.logger.warning") as warning:
        run.new_optimizer()
    ((_, names),) = (call.args for call in warning.call_args_list)
    assert names == ("fc2, heads" if place.rank == 0 else "fc2"), names


def check_conversion(place: Place, config: PionConfig) -> None:
    """Weights that are converted before the first step are computed as they are then."""
    run = Run(place, config, WEIGHTS, dtype=torch.float32)
    for p in run.params:
        p.data = p.data.double()
    for _ in range(CUT_STEPS):
        run.step()
        check_weights(run, TOLERANCE)


def half_of(place: Place) -> Place:
    half = place.ranks // 2
    groups = [group_of(range(i, i + half)) for i in (0, half)]
    return Place(groups[place.rank // half])


def refusal(make: Callable[[], object], *says: str) -> str:
    """The message of a construction that is refused; it has one of the words."""
    try:
        make()
    except (RuntimeError, ValueError) as error:
        assert any(word in str(error) for word in says), f"none of {says} in {error!r}"
        return str(error)
    raise AssertionError("not refused")


def check_other_plan(place: Place, what: str) -> None:
    """The last rank has another plan: every rank is told what differs, by a weight's name.

    Weights of one shape, so that no collective fails by itself.
    """
    names = ("fc1", "fc1.second", "square")
    weights = [w for w in WEIGHTS if w.name in names]
    options = PUBLISHED | {"blocks": place.ranks}
    if place.rank == place.ranks - 1:
        match what:
            case "order":
                weights[:2] = reversed(weights[:2])
            case "weights":
                weights = weights[:2]
            case "blocks":
                options["blocks"] = 2 * place.ranks
            case "mode":
                options = PUBLISHED | {"team_size": place.ranks}
            case "side":
                options["side"] = "alternate"
            case "shape":
                weights[2] = Weight("square", lambda ranks: whole(16 // ranks, 8, axis="rows"))
            case "axis":
                weights[2] = Weight("square", lambda ranks: whole(16 // ranks, 16, axis="cols"))
    config = PionConfig(**options)
    words = {"blocks": ("blocks",), "mode": ("team_size",), "side": ("side",)}.get(what, ())
    refusal(lambda: Run(place, config, weights, reference=False), *names, *words)


def check_blocks_of_ranks(place: Place) -> None:
    """So many blocks that the ranks do not each have whole ones."""
    blocks = place.ranks + 1
    rows = blocks * place.ranks
    weight = Weight("other.fc1", lambda ranks: whole(rows // ranks, 8, axis="rows"))
    config = PionConfig(**PUBLISHED, blocks=blocks)
    told = refusal(lambda: Run(place, config, [UNCUT, weight], reference=False), "other.fc1")
    for number in (blocks, place.ranks):
        assert re.search(rf"\b{number}\b", told), f"no {number} in {told!r}"


def named(config: PionConfig) -> str:
    retraction = config.retraction, config.degree
    options = (config.momentum, config.direction, config.nesterov, config.scaling, config.side)
    if config.direction == "polar":
        options = ("polar", config.nesterov)
    if config.direction != "polar":
        options = (*options, retraction)
    words = [readable(option) or str(option) for option in options]
    words += [config.state_dtype] if config.state_dtype != "fp32" else []
    words += ["offload"] if config.offload_state else []
    words += ["reset"] if config.spectrum_reset_interval else []
    blocks = [f"{config.blocks}blocks"] if config.blocks > 1 else []
    teams = [] if blocks else [f"teams{config.team_size}"]
    return "-".join([*teams, *blocks, *words])


# Momentum, direction and sides that differ in state and in what is exchanged.
FEW: tuple[dict[str, object], ...] = (
    {},
    PUBLISHED,
    MSIGN,
    PUBLISHED | {"momentum": "ambient", "retraction": "exp", "side": "out"},
    PUBLISHED | {"direction": "momentum", "side": "in", "retraction": "cayley", "scaling": "none"},
    PUBLISHED | {"momentum": "transported", "direction": "momentum"},
    PUBLISHED | {"direction": "msign", "side": "alternate", "retraction": "cayley"},
)
RESET = {"spectrum_reset_interval": 2}
LIE_MSIGN = MSIGN | {"momentum": "lie"}
OFFLOAD = {"offload_state": True}
LOW = {"matmul_precision": "bf16", "state_dtype": "bf16"}
ORTHOGONAL: tuple[dict[str, object], ...] = (
    {},
    MSIGN | {"retraction": "cayley", "side": "both"},
    PUBLISHED | {"retraction": "cayley"},
    PUBLISHED | {"retraction": "exp", "direction": "momentum", "side": "alternate"},
    PUBLISHED | {"momentum": "transported", "retraction": "exp"},
)

# Whose work is products alone.
PRODUCTS: tuple[dict[str, object], ...] = (
    {},
    MSIGN,
    MSIGN | {"direction": "momentum"},
    PUBLISHED | {"direction": "momentum"},
    LIE_MSIGN | {"nesterov": False},
    PUBLISHED | {"momentum": "transported", "direction": "momentum", "side": "out"},
)


TRIED: tuple[tuple[Callable[..., None], Sequence[dict[str, object]]], ...] = (
    (check_reference, ({}, {"nesterov": False}, OFFLOAD)),
    (check_float32, ORTHOGONAL),
    (check_nan, FEW),
    (check_resume, (*FEW[:4], LOW, LOW | MSIGN, LOW | LIE_MSIGN, RESET | MSIGN, OFFLOAD)),
    (check_collectives, (*FEW, LOW, LOW | MSIGN, RESET | MSIGN)),
    (check_reset, (RESET | MSIGN, RESET | PUBLISHED)),
    (check_diagnostics, FEW),
    (check_work, PRODUCTS),
    (check_nothing_shared, FEW[:3]),
    (check_part_of_the_ranks, FEW[:3]),
    (check_two_groups, FEW[:3]),
    (check_conversion, FEW[:3]),
)
# Of what these check nothing depends on how many ranks there are, so two are enough.
AT_TWO = (check_nan, check_reset, check_nothing_shared, check_conversion)
# These depend on the kind of state and of what is exchanged, of which the first three of FEW have
# one each. (With all options, resume, collectives and stored took 45% of a launch of four.)
FIRST_AT_FOUR = (
    check_resume,
    check_collectives,
    check_diagnostics,
    check_stored,
    check_stored_state,
)


def modes(ranks: int, cut: int, *, halves: bool) -> Iterator[dict[str, object]]:
    """Teams of one rank and of all, of a half where that is more than one, and blocks.

    Args:
        ranks: that together store a matrix.
        cut: of these, with a shard each.
        halves: whether teams of a half are wanted.
    """
    sizes = {1, ranks, ranks // 2 if halves else 1}
    yield from ({"team_size": size} for size in sorted(sizes))
    yield {"blocks": 2 * cut}


def fits(mode: Mapping[str, object], options: Mapping[str, object]) -> bool:
    """Whether options go together: polar has no blocks."""
    return "blocks" not in mode or "direction" in options


def tried_of[T](check: Callable[..., None], options: Sequence[T], ranks: int) -> Sequence[T]:
    return options[:3] if ranks > 2 and check in FIRST_AT_FOUR else options


def stored_configs(ranks: int) -> Iterator[tuple[Callable[..., None], PionConfig]]:
    """Half of the ranks are tensor parallel, and there are as many blocks."""
    for check in (check_stored, check_stored_state):
        few = (*tried_of(check, FEW, ranks), OFFLOAD)
        for mode, options in itertools.product(modes(ranks, ranks // 2, halves=True), few):
            if fits(mode, options):
                yield check, PionConfig(**options, **mode)
        yield from ((check, PionConfig(**options)) for options in FEW[:3])


def tried_configs(ranks: int) -> Iterator[tuple[Callable[..., None], PionConfig]]:
    for check, tried in TRIED:
        if ranks > 2 and check in AT_TWO:
            continue
        halves = check in (check_resume, check_collectives)
        some = tried_of(check, tried, ranks)
        for mode, options in itertools.product(modes(ranks, ranks, halves=halves), some):
            if fits(mode, options):
                yield check, PionConfig(**options, **mode)


def checks(ranks: int) -> dict[str, Callable[[Place], None]]:
    """Every check of a launch on so many ranks, by name."""
    by_name: dict[str, Callable[[Place], None]] = {}

    def add(check: Callable[..., None], name: str, *arguments: object) -> None:
        name = f"{check.__name__.removeprefix('check_')}[{name}]"
        assert name not in by_name
        by_name[name] = lambda place: check(place, *arguments)

    add(check_counting, "")
    add(check_zeros, "")
    tried = [tuple(mode.items()) for mode in (*modes(ranks, ranks, halves=True), {"blocks": ranks})]
    # All pairs; test_reference.py has all three together in one process.
    for *options, mode in covering(*VALUES, tried, together=2):
        config = config_of(*options, **dict(mode))
        add(check_reference, named(config), config)
    for check, config in (*tried_configs(ranks), *stored_configs(ranks)):
        add(check, named(config), config)
    for options in FEW[:3]:
        config = PionConfig(**options, team_size=1)
        add(check_exact_volume, named(config), config)
        coded = PionConfig(**options, state_dtype="int8")
        for check in check_resume, check_collectives, check_nan:
            add(check, named(coded), coded)
    for what in ("order", "weights", "shape", "axis", "mode", "blocks", "side"):
        add(check_other_plan, what, what)
    add(check_blocks_of_ranks, "")
    return by_name


def main(rank: int, ranks: int, port: int) -> None:
    """All checks, on one rank."""
    # The host's own name need not resolve.
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    iterations.DIVIDED_ROWS = 8  # of matrices of the checks' size
    store = dist.TCPStore("127.0.0.1", port, timeout=3 * TIMEOUT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=TIMEOUT)
    place = Place(dist.new_group(timeout=TIMEOUT))
    for name, check in checks(ranks).items():
        said = ""
        try:
            check(place)
        except Exception:
            said = traceback.format_exc()
        store.set(f"{name}/{rank}", said)
        everyones = {r: store.get(f"{name}/{r}").decode() for r in range(ranks)}
        failures = {r: text for r, text in everyones.items() if text}
        if rank == 0:
            print(json.dumps({"name": name, "failures": failures}), flush=True)
        if failures:
            place = Place(dist.new_group(timeout=TIMEOUT))
            _made.cache_clear()
    dist.destroy_process_group()


if __name__ == "__main__":
    # The port is found here and stays taken; the processes end with this one.
    number = int(sys.argv[1])
    master = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    spawn(main, (number, master.port), nprocs=number)
