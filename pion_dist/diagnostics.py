"""Metrics of Pion's matrices: the drift of their spectra, and the factors of a recorded step.

    watch = Diagnostics(optimizer)  # the spectra at start are the present ones
    ...
    watch.record()  # record the next step
    optimizer.step()
    print(line(watch.report(), step))

Other steps measure nothing. ``docs/diagnostics.md`` explains the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import spectrum
from .optimizer import Pion
from .update import readings

# Matrices whose smaller side k is longer than this are measured by norms, in 512 mn operations. All
# singular values take a product of 2 k² max(m, n) operations and a decomposition of 4/3 k³.
EXACT_SIDE = 1024


@dataclass(frozen=True)
class Row:
    """Metrics of a matrix.

    Attributes:
        name: weight, part and number of the matrix, identical in every layout.
        exact: whether its drift is that of all singular values, or of norms.
        size: number of its elements.
        drift, shift: since the start, see ``spectrum``; shift is NaN where drift is not exact.
        orthogonality, angle, alpha, kept, update_rms: of the recorded step, see
            ``update.readings``; NaN where none was recorded.
    """

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

    @property
    def stepped(self) -> bool:
        """Whether a step was recorded."""
        return not math.isnan(self.angle)


class Diagnostics:
    """A measurement of an optimizer's matrices, at any time and in the steps to record.

    Drift is relative to the spectra at start where the optimizer stores these
    (``spectrum_reset_interval``), in a checkpoint too; else to the weights at construction.

    Construction and ``report`` are collectives of the ranks that share weights.

    Args:
        optimizer: a Pion whose weights are initialised, or loaded.
        exact: whether to measure all singular values of matrices of any size. If not, a matrix
            whose smaller side exceeds EXACT_SIDE is measured by two norms.
        elsewhere: names of weights that other ranks report, where several groups of ranks have
            the same weights.
    """

    def __init__(
        self, optimizer: Pion, *, exact: bool = False, elsewhere: Collection[str] = ()
    ) -> None:
        """See the class."""
        self._optimizer = optimizer
        self._exact = exact
        matrices = enumerate(optimizer.plan.matrices)
        self._numbers = [i for i, x in matrices if x.weight not in elsewhere]
        self._start = self._measured()

    def record(self) -> None:
        """Record the metrics of the next step's factors, until ``report``."""
        self._optimizer.readings = []

    def report(self) -> list[Row]:
        """Report the drift so far, and the recorded step.

        Returns:
            The matrices that this rank reports; of those that ranks share one rank reports each.
        """
        pion = self._optimizer
        report = []
        steps = {
            member: row
            for members, rows in pion.readings or ()
            for member, row in zip(members, rows, strict=True)
        }
        pion.readings = None
        for i, now in self._measured().items():
            x, start = pion.plan.matrices[i], pion.start(i)
            exact = self._is_exact(i)
            if start is None:
                start = self._start[i]
            elif not exact:
                start = spectrum.norms_of_values(start)
            nothing = now.new_full((len(readings.COLUMNS),), torch.nan)
            rows = torch.stack([steps.get((i, index), nothing) for index in range(x.batch)])
            drift = spectrum.drift(start, now)
            shift = spectrum.shift(start, now) if exact else torch.full_like(drift, torch.nan)
            values = torch.cat((torch.stack((drift, shift), -1), rows), -1).tolist()
            each = zip(x.names(), values, strict=True)
            report += [Row(name, exact, x.m * x.n, *numbers) for name, numbers in each]
        return report

    def _is_exact(self, i: int) -> bool:
        x = self._optimizer.plan.matrices[i]
        return self._exact or min(x.m, x.n) <= EXACT_SIDE

    @torch.no_grad()
    def _measured(self) -> dict[int, Tensor]:
        """Measure matrices, each on one of the ranks that store it, by number in the plan."""
        return self._optimizer.measured(self._numbers, self._measure)

    def _measure(self, i: int, matrices: Tensor) -> Tensor:
        """Compute singular values or norms."""
        if self._is_exact(i):
            return spectrum.values_of(spectrum.gram(matrices))
        return spectrum.norms_of(matrices)


# Tag of a kind of number; whether a row has one, what it is, and which of two is worse.
_KINDS: tuple[
    tuple[str, Callable[[Row], bool], Callable[[Row], float], Callable[..., Any]], ...
] = (
    ("drift", lambda row: row.exact, lambda row: row.drift, max),
    ("shift", lambda row: row.exact, lambda row: row.shift, max),
    ("norm-drift", lambda row: not row.exact, lambda row: row.drift, max),
    ("orthogonality", lambda row: row.stepped, lambda row: row.orthogonality, max),
    ("angle", lambda row: row.stepped, lambda row: row.angle, max),
    ("kept", lambda row: not math.isnan(row.kept), lambda row: row.kept, min),
)


def scalars(rows: Sequence[Row]) -> dict[str, float]:
    """Compute the scalars for TensorBoard and the like, by tag: of all matrices, and by part."""
    by_tag = {}
    for kind, has, value, worse in _KINDS:
        parts: dict[str, float] = {}
        for row in filter(has, rows):
            part = row.name.rpartition("[")[0]
            parts[part] = worse(value(row), parts.get(part, value(row)))
        if parts:
            by_tag[f"pion/{kind}"] = worse(parts.values())
        by_tag |= {f"pion-{kind}/{part}": number for part, number in parts.items()}
    if stepped := [row for row in rows if row.stepped]:
        size = sum(row.size for row in stepped)
        squares = sum(row.size * row.update_rms**2 for row in stepped)
        by_tag["pion/update-rms"] = math.sqrt(squares / size)
        if alphas := [row.alpha for row in stepped if not math.isnan(row.alpha)]:
            by_tag |= {"pion/alpha-min": min(alphas), "pion/alpha-max": max(alphas)}
    return by_tag


def line(rows: Sequence[Row], iteration: int) -> str:
    """Write a line for the log, which names the worst matrix of each kind of number."""
    values = scalars(rows)
    words = [f" pion at iteration {iteration}"]
    for kind, has, value, worse in _KINDS:
        if some := list(filter(has, rows)):
            worst: Row = worse(some, key=value)
            words.append(f"{kind}: {value(worst):.3E} ({worst.name})")
    if "pion/alpha-min" in values:
        words.append(f"alpha: {values['pion/alpha-min']:.3E} to {values['pion/alpha-max']:.3E}")
    if "pion/update-rms" in values:
        words.append(f"update rms: {values['pion/update-rms']:.3E}")
    else:
        words.append("no step was taken")
    return " | ".join(words) + " |"
