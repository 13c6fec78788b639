"""Ranges of buffers that ranks store, and teams for matrices, so that ranks have even loads."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def ranges(
    start: int, stop: int, bucket: tuple[int, int], ranks: int
) -> tuple[tuple[int, int], ...]:
    """The elements [a, b) of a weight that each of ``ranks`` ranks stores, counted from its start.

    Args:
        start: of the weight, in its buffer.
        stop: of the weight.
        bucket: start and stop of the bucket that has it, which is divided evenly.
        ranks: that divide the bucket.
    """
    share = (bucket[1] - bucket[0]) // ranks
    ends = [min(max(bucket[0] + rank * share, start), stop) - start for rank in range(ranks + 1)]
    return tuple(itertools.pairwise(ends))


def deal(costs: Sequence[float], sizes: Sequence[int], ranks: int) -> list[tuple[int, ...]]:
    """A team of neighbours for each item, so that no rank has much more than the others.

    The largest teams first, and of those of one size the costliest item; the same on every rank,
    for ties go to the earlier item and the earlier team.

    Args:
        costs: of each item, for each rank of its team.
        sizes: of each item's team; each divides ``ranks``.
        ranks: that are in teams.
    """
    loads = [0.0] * ranks
    teams: list[tuple[int, ...]] = [()] * len(costs)
    for item in sorted(range(len(costs)), key=lambda i: (-sizes[i], -costs[i], i)):
        size = sizes[item]
        busy = loads if size == 1 else [max(loads[r : r + size]) for r in range(0, ranks, size)]
        place = busy.index(min(busy)) * size
        teams[item] = tuple(range(place, place + size))
        for rank in teams[item]:
            loads[rank] += costs[item]
    return teams


def loads_of(costs: Sequence[float], teams: Sequence[tuple[int, ...]], ranks: int) -> list[float]:
    """What every rank has of items that were dealt."""
    loads = [0.0] * ranks
    for each, team in zip(costs, teams, strict=True):
        for rank in team:
            loads[rank] += each
    return loads
