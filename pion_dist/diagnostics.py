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
        drift, shift: since the start, see ``spectrum``; shift is NaN where they are not exact.
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


# Tag of a kind, whether it is of exact matrices, and a row's number.
_KINDS: tuple[tuple[str, bool, Callable[[Row], float]], ...] = (
    ("drift", True, lambda row: row.drift),
    ("shift", True, lambda row: row.shift),
    ("norm-drift", False, lambda row: row.drift),
)


def scalars(rows: Sequence[Row]) -> dict[str, float]:
    """Compute the scalars for TensorBoard and the like, by tag."""
    by_tag = {}
    for kind, exact, value in _KINDS:
        parts: dict[str, float] = {}
        for row in rows:
            if row.exact == exact:
                part = row.name.rpartition("[")[0]
                parts[part] = max(value(row), parts.get(part, 0.0))
        if parts:
            by_tag[f"pion/{kind}"] = max(parts.values())
        by_tag |= {f"pion-{kind}/{part}": value for part, value in parts.items()}
    stepped = [row for row in rows if not math.isnan(row.angle)]
    if stepped:
        size = sum(row.size for row in stepped)
        squares = sum(row.size * row.update_rms**2 for row in stepped)
        by_tag |= {
            "pion/orthogonality": max(row.orthogonality for row in stepped),
            "pion/angle": max(row.angle for row in stepped),
            "pion/update-rms": math.sqrt(squares / size),
        }
        # Generators have the one, polar the other.
        if alphas := [row.alpha for row in stepped if not math.isnan(row.alpha)]:
            by_tag |= {"pion/alpha-min": min(alphas), "pion/alpha-max": max(alphas)}
        if shares := [row.kept for row in stepped if not math.isnan(row.kept)]:
            by_tag["pion/kept-min"] = min(shares)
    return by_tag


def line(rows: Sequence[Row], iteration: int) -> str:
    """Write a line for the log."""
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
