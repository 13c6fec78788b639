"""Where a moment lies among all ranks' moments of a weight: no Megatron types, no tensors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Record:
    """A moment's place.

    Attributes:
        dim: of the moment, which tensor parallelism cuts into ``count`` equal shares.
        index: the share that this is.
        count: 1 where it is all of it.
        replica: rank among those that hold the same moment; the first one's is written.
    """

    dim: int = 0
    index: int = 0
    count: int = 1
    replica: int = 0
