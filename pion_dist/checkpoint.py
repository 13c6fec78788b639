"""Where a moment lies among all ranks' moments of a weight: no Megatron types, no tensors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Record:
    """A moment's place.

    Attributes:
        index: which of ``count`` equal shares of the part's matrices (dimension B) it holds.
        count: 1 where it holds all of them.
        replica: rank among those that hold the same moment because tensor parallelism duplicates
            the work; the first one's is written.
    """

    index: int = 0
    count: int = 1
    replica: int = 0
