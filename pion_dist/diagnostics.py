"""What Pion does to its matrices, in numbers: drift of their spectra, and the last step's factors.

    watch = Diagnostics(optimizer)  # the spectra at start are those of now
    ...
    watch.record()  # the next step
    optimizer.step()
    report = watch.report()
    print(report.names[report.values[:, 0].argmax()], report.values.amax(0))

Nothing is measured in other steps. ``docs/diagnostics.md`` says what the numbers mean.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from . import spectrum
from .optimizer import Pion
from .update import readings

# Matrices whose smaller side k is longer are measured by norms: all singular values take a product
# of 2 k² max(m, n) operations and a decomposition of 4/3 k³, norms 512 mn.
EXACT_SIDE = 1024

COLUMNS = ("drift", "shift", *readings.COLUMNS)


@dataclass(frozen=True)
class Report:
    """Numbers of the matrices that this rank reports; ranks that share a matrix report it once.

    Attributes:
        names: weight, part and number of each matrix, the same in every layout.
        exact: whether its drift is of all singular values, or of their norms.
        sizes: elements of each.
        values: [matrices, 7] in float64, on the CPU, with COLUMNS: since start, drift, and shift
            (NaN where it is not exact), see ``spectrum``; of the step that was recorded,
            orthogonality, angle, alpha, kept, update_rms, see ``update.readings`` (NaN where none
            was).
    """

    names: list[str]
    exact: list[bool]
    sizes: list[int]
    values: Tensor


class Diagnostics:
    """Measures a Pion's matrices, now and in steps that are asked for.

    Where an optimizer keeps the spectra at start (``spectrum_reset_interval``), also in a
    checkpoint, drift is against those; else against the weights when this is made.

    Making it and ``report`` are collectives of the ranks that share weights.

    Args:
        optimizer: whose weights are initialised, or loaded.
        exact: measure all singular values of matrices of any size. Else of those whose smaller
            side is at most EXACT_SIDE, and two norms of the others.
        elsewhere: weights, by name, that others report: where several groups of ranks have the
            same ones.
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
        """Keep what the next step's factors do, until ``report``."""
        self._optimizer.readings = []

    def report(self) -> Report:
        """Drift now, and what was recorded."""
        pion = self._optimizer
        found = Report([], [], [], torch.empty(0, len(COLUMNS), dtype=torch.float64))
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
            found.names.extend(pion.names(i))
            found.exact.extend([exact] * x.batch)
            found.sizes.extend([x.m * x.n] * x.batch)
        return Report(found.names, found.exact, found.sizes, torch.cat([found.values, *columns]))

    def _is_exact(self, i: int) -> bool:
        x = self._optimizer.plan.matrices[i]
        return self._exact or min(x.m, x.n) <= EXACT_SIDE

    @torch.no_grad()
    def _measured(self) -> dict[int, Tensor]:
        """Singular values or norms of the matrices that this rank measures, by number in the plan.

        Of ranks that share a matrix it is the owner, or else one after the other.
        """
        pion, found = self._optimizer, {}
        for i in self._numbers:
            x, whole = pion.plan.matrices[i], pion.whole(i)
            if x.shared and x.group is not None:
                group = pion.groups[x.group]
                if group.rank() != (i % group.size() if x.owner is None else x.owner):
                    continue
            if self._is_exact(i):
                found[i] = spectrum.values_of(spectrum.gram(whole))
            else:
                found[i] = spectrum.norms_of(whole)
        return found
