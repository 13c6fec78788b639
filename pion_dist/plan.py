"""The plan of a step: what each parameter is, and what the whole costs. Integers and strings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from . import cost
from .classify import Rotated, Scalar
from .config import PionConfig

ADAM_STATE_BYTES = 8  # exp_avg and exp_avg_sq in float32
_MOMENT_BYTES = 4
_DIMS = {"rows": 1, "cols": 2}


@dataclass(frozen=True)
class WeightPlan:
    """One parameter of the plan.

    Attributes:
        name: of the parameter.
        shape: of the parameter.
        matrices: for each part its name and the shape (B, m, n) of its matrices, whole, that this
            rank has or shares; empty where it is not Pion's.
        reason: why it is not Pion's; empty where it is.
    """

    name: str
    shape: tuple[int, ...]
    matrices: tuple[tuple[str, tuple[int, int, int]], ...]
    reason: str


@dataclass(frozen=True)
class StepPlan:
    """What a rank does in a step; what it shares with others counts by its part, on average.

    Attributes:
        weights: every parameter, in the model's order.
        count: matrices that this rank has or shares.
        flop: of their step, on average over steps; products only.
        state_bytes: Pion's state.
        adam_bytes: what Adam's state of the same weights would take.
    """

    weights: tuple[WeightPlan, ...]
    count: int
    flop: float
    state_bytes: int
    adam_bytes: int

    def rows(self) -> list[str]:
        """A line for every parameter."""
        width = max((len(w.name) for w in self.weights), default=0)
        lines = []
        for weight in self.weights:
            shape = "x".join(map(str, weight.shape))
            what = f"Adam: {weight.reason}"
            if weight.matrices:
                parts = (f"{part} {b} of {m}x{n}" for part, (b, m, n) in weight.matrices)
                what = "Pion: " + ", ".join(parts)
            lines.append(f"{weight.name:<{width}}  {shape:>12}  {what}")
        return lines

    def totals(self) -> str:
        """One line of totals."""
        rotated = sum(bool(w.matrices) for w in self.weights)
        ratio = self.state_bytes / self.adam_bytes if self.adam_bytes else 0.0
        return (
            f"Pion: {self.count} matrices in {rotated} weights, {self.flop:.3e} FLOP a step, "
            f"{self.state_bytes:,} bytes of state on a rank, {ratio:.2f} of Adam's for the same "
            f"weights; Adam: {len(self.weights) - rotated} parameters"
        )


def deal(costs: Sequence[float], ranks: int) -> list[int]:
    """An owner for each cost, so that no rank has much more than the others: largest first.

    The same on every rank: ties go to the earlier item and the lower rank.
    """
    loads = [0.0] * ranks
    owners = [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owners[item] = min(range(ranks), key=lambda rank: (loads[rank], rank))
        loads[owners[item]] += costs[item]
    return owners


def build_plan(
    decisions: Iterable[tuple[str, tuple[int, ...], Rotated | Scalar]], config: PionConfig
) -> StepPlan:
    """The plan of a rank whose parameters are classified.

    Args:
        decisions: name, shape and class of every parameter, in the model's order.
        config: the run's options.
    """
    weights, count, flop, elements, parameters = [], 0, 0.0, 0.0, 0
    for name, shape, decision in decisions:
        if isinstance(decision, Scalar):
            weights.append(WeightPlan(name, shape, (), decision.reason))
            continue
        matrices = tuple((part, _whole(decision, part)) for part in decision.view.shapes)
        weights.append(WeightPlan(name, shape, matrices, ""))
        parameters += decision.view.rows * decision.view.cols
        for part, (batch, m, n) in matrices:
            shared = dict(decision.cuts).get(part) in _DIMS and config.tp_mode == "owner"
            mine = batch / decision.ranks if shared else batch
            count += batch
            flop += mine * cost.step_flop(m, n, config)
            elements += mine * cost.state_elements(m, n, config)
    return StepPlan(
        tuple(weights), count, flop, round(elements * _MOMENT_BYTES), parameters * ADAM_STATE_BYTES
    )


def _whole(decision: Rotated, part: str) -> tuple[int, int, int]:
    """Shape of a part's matrices when the ranks' shards are joined."""
    sizes = list(decision.view.shapes[part])
    cut = dict(decision.cuts).get(part)
    if cut in _DIMS:
        sizes[_DIMS[cut]] *= decision.ranks
    return sizes[0], sizes[1], sizes[2]
