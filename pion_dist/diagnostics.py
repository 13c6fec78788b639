"""Metrics of Pion's matrices: the drift of their spectra, and the factors of a recorded step.

    watch = Diagnostics(optimizer)  # the spectra at start are the present ones
    ...
    watch.record()  # record the next step
    optimizer.step()
    report = watch.report()
    print(report.names[report.values[:, 0].argmax()], report.values.amax(0))

Other steps measure nothing. ``docs/diagnostics.md`` explains the numbers.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import spectrum
from .optimizer import Pion
from .update import readings

# Matrices whose smaller side k is longer than this are measured by norms, in 512 mn operations. All
# singular values take a product of 2 k² max(m, n) operations and a decomposition of 4/3 k³.
EXACT_SIDE = 1024

COLUMNS = ("drift", "shift", *readings.COLUMNS)


@dataclass(frozen=True)
class Report:
    """Metrics of the matrices that this rank reports; ranks that share a matrix report it once.

    Attributes:
        names: weight, part and number of each matrix, identical in every layout.
        exact: for each matrix, whether its drift is that of all singular values, or of norms.
        sizes: number of elements of each matrix.
        values: [matrices, 7] in float64, on the CPU, with COLUMNS. Drift and shift are since the
            start, see ``spectrum``; shift is NaN where a matrix is not exact. Orthogonality, angle,
            alpha, kept and update_rms are of the recorded step, see ``update.readings``; they are
            NaN where none was recorded.
    """

    names: list[str]
    exact: list[bool]
    sizes: list[int]
    values: Tensor


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

    def report(self) -> Report:
        """Report the drift so far, and the recorded step."""
        pion = self._optimizer
        report = Report([], [], [], torch.empty(0, len(COLUMNS), dtype=torch.float64))
        steps = {
            member: row
            for members, rows in pion.readings or ()
            for member, row in zip(members, rows, strict=True)
        }
        pion.readings = None
        columns = []
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
            columns.append(torch.cat((torch.stack((drift, shift), -1), rows), -1).cpu())
            report.names.extend(pion.names(i))
            report.exact.extend([exact] * x.batch)
            report.sizes.extend([x.m * x.n] * x.batch)
        return replace(report, values=torch.cat([report.values, *columns]))

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
