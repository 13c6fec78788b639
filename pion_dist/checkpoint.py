"""Where a moment lies among all ranks' moments of a weight: no Megatron types, no tensors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Record:
    """A moment's place.

    Attributes:
        cuts: of each dimension that ranks divide, which it is, the number of equal shares and the
            index of this one.
        replica: rank among those that hold the same moment; the first one's is written.
    """

    cuts: tuple[tuple[int, int, int], ...] = ()
    replica: int = 0
