"""The ranks that share matrices, as a step sees them."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Peers(Protocol):
    """The ranks that share the matrices, and their collectives."""

    @property
    def size(self) -> int:
        """Number of ranks."""

    @property
    def rank(self) -> int:
        """Index of this rank."""

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """Sum the ranks' tensors (modified in place)."""

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """Join the ranks' tensors along ``dim``."""

    def reduce_scatter(self, x: Tensor, dim: int) -> Tensor:
        """Sum the ranks' tensors, and return this rank's share along ``dim``."""

    def transposed(self, x: Tensor) -> Tensor:
        """Return this rank's rows of the transpose of a square matrix whose rows these are."""
