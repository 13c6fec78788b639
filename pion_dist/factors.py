"""Keep the polar direction's factors W = U Σ Vᵀ in step with their weights.

The weight decides. Where it is not the product of its factors, a singular value decomposition
computes them anew: before the first step, after weights were loaded without state, or after a
script wrote into them. A weight is checked only if torch has counted a change that is not Pion's,
so other steps pay nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from .config import Axis
from .dtensor import version
from .exchange import is_first
from .state import DIM, LEFT, RIGHT, SIGMA
from .update import polar
from .update.peers import Peers

logger = logging.getLogger("pion_dist")

# Elements of matrices that are decomposed together; each takes several copies in float64.
_BATCH_NUMEL = 1 << 22
_SECONDS = 10.0  # between two lines of progress
# The log names weights that are further than this from the product of their factors. A model that
# was converted to float64 is nearer: its factors are of float32.
_WARN_ABOVE = 1e-4


class Rows:
    """The division of matrices' rows on the larger side over the ranks of a team."""

    def __init__(self, peers: Peers | None, along: Axis) -> None:
        """Take the ranks that divide the rows; without any this rank has them all."""
        self.peers, self.dim = peers, DIM[along]

    def gather(self, rows: Tensor) -> Tensor:
        """Join all ranks' rows."""
        return rows if self.peers is None else self.peers.all_gather(rows, self.dim)

    def own(self, whole: Tensor, dim: int) -> Tensor:
        """Return this rank's rows of a factor if ``dim`` is the divided one, else the factor."""
        if self.peers is None or dim != self.dim:
            return whole
        return whole.chunk(self.peers.size, 1)[self.peers.rank]

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """Sum over the ranks that divide the rows (modified in place)."""
        return x if self.peers is None else self.peers.all_reduce_sum(x)


class Factors:
    """A record of which weights may have changed since Pion's last step; it factorizes those.

    Attributes:
        matrices: number of matrices that this rank computes, for the lines of progress.
        doubt: whether every weight is checked in the next step. It is the same on all ranks that
            share weights, which ``forget`` at the same time.
    """

    def __init__(self) -> None:
        """Start with all weights in doubt."""
        self.matrices = 0
        self.doubt = True
        self._versions: dict[Tensor, tuple[int, int]] = {}
        self._unsure: set[Tensor] = set()
        self._done = 0
        self._began = self._told = 0.0

    def forget(self) -> None:
        """Have every weight checked in the next step, since weights or state were loaded."""
        self.doubt = True
        self._versions.clear()

    def begin(self, params: Iterable[Tensor]) -> None:
        """Begin a step: note which parameters were changed since the last one."""
        self._unsure = {p for p in params if self._versions.get(p) != version(p)}
        self._done = 0

    def end(self, params: Iterable[Tensor]) -> None:
        """End a step: note the parameters as it has left them."""
        self.doubt = False
        self._versions.update((p, version(p)) for p in params)

    def unsure(self, p: Tensor) -> bool:
        """Tell whether a parameter may not be the product of its factors in this step."""
        return p in self._unsure

    def match(
        self,
        names: Sequence[str],
        params: Sequence[Tensor],
        w: Tensor,
        moments: Mapping[str, Tensor],
        rows: Rows,
        *,
        computed_by: int,
    ) -> None:
        """Factorize the weights that are not the product of their factors.

        This is a collective of the ranks that divide the rows. It waits for the device.

        Args:
            names: name of each matrix.
            params: the parameter that each matrix is part of.
            w: weights [B, m, n], or this rank's share of them.
            moments: U, Σ and V. (modified in place)
            rows: how ranks divide the rows.
            computed_by: the rank that decomposes, among those that divide the rows.

        Raises:
            ValueError: a weight is not finite.
        """
        errors = polar.mismatch(w, moments, all_reduce_sum=rows.all_reduce_sum).tolist()
        known = moments[SIGMA].any(-1).tolist()
        stale = []
        for index, (p, error) in enumerate(zip(params, errors, strict=True)):
            if error <= _rounding(p.dtype):
                continue
            stale.append(index)
            if known[index] and error > _WARN_ABOVE:
                logger.warning(
                    "%s is not the product of its factors: it was changed since Pion's last step, "
                    "or is not of the state that was loaded. Its singular values are taken anew",
                    names[index],
                )
        stride = max(1, _BATCH_NUMEL // (w.shape[1] * w.shape[2]))
        for first in range(0, len(stale), stride):
            some = stale[first : first + stride]
            whole = rows.gather(w[some])
            if not whole.isfinite().all():
                raise ValueError(f"one of {', '.join(names[i] for i in some)} is not finite")
            batch, m, n = whole.shape
            r = min(m, n)
            if rows.peers is None or rows.peers.rank == computed_by:
                u, sigma, v = polar.factorize(whole)
            else:
                shapes = ((batch, m, r), (batch, r), (batch, n, r))
                u, sigma, v = (whole.new_zeros(shape) for shape in shapes)
            u, sigma, v = (rows.all_reduce_sum(x) for x in (u, sigma, v))
            moments[LEFT][some] = rows.own(u, 1)
            moments[SIGMA][some] = sigma
            moments[RIGHT][some] = rows.own(v, 2)
            self._report(len(some), m, n)

    def _report(self, count: int, m: int, n: int) -> None:
        """Log the progress of the decompositions, every ten seconds."""
        now = time.monotonic()
        if self._done == 0:
            self._began = self._told = now
        self._done += count
        if is_first() and now - self._told >= _SECONDS:
            self._told = now
            logger.warning(
                "singular values before the first step: %d of %d matrices, now %d x %d; %.0f s",
                self._done,
                self.matrices,
                m,
                n,
                now - self._began,
            )


def _rounding(dtype: torch.dtype) -> float:
    """Return how far a weight may be from the product of its factors, by rounding."""
    # Split products leave 2^-16 of a term; bf16 rounds to 2^-9 of an element.
    return {torch.float64: 1e-10, torch.float32: _WARN_ABOVE}.get(dtype, 2.0**-7)
