"""Which ranks compute which matrices: teams of neighbours, dealt evenly by what a step costs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from .config import PionConfig
from .dealing import deal, loads_of
from .matrix_plan import MatrixPlan
from .plan import StepPlan
from .state import divides

# Ranks of the largest team that `auto` chooses: four nodes of eight.
LARGEST_TEAM = 32


@dataclass(frozen=True)
class GroupSizes:
    """Ranks that together store weights.

    Attributes:
        ranks: all.
        teams: sizes of the teams of neighbours that can compute a matrix, in ascending order. Each
            divides the number of ranks.
        near: neighbours that are in one node, wherever a team of so many begins.
    """

    ranks: int
    teams: tuple[int, ...] = (1,)
    near: int = 1


def build_plan(
    matrices: Sequence[MatrixPlan], groups: Sequence[GroupSizes], config: PionConfig
) -> StepPlan:
    """The plan for matrices whose teams are to be chosen: evenly by cost.

    Args:
        matrices: in the same order on every rank that stores them.
        groups: their process groups.
        config: the run's options.
    """
    dealt = list(matrices)
    for group, sizes in enumerate(groups):
        indices = [i for i, x in enumerate(matrices) if x.group == group]
        chosen = _teams([matrices[i] for i in indices], sizes, config)
        for i, team in zip(indices, chosen, strict=True):
            dealt[i] = dataclasses.replace(dealt[i], team=team)
    ranks, near = tuple(x.ranks for x in groups), tuple(x.near for x in groups)
    return StepPlan(config, ranks, near, tuple(dealt))


def _teams(
    matrices: Sequence[MatrixPlan], group: GroupSizes, config: PionConfig
) -> list[tuple[int, ...]]:
    """The team of each matrix: of some dealings that in which the busiest rank has least to do.

    Of equal ones it is that in which all together have least.

    Matrices that cost the same on every size of team are a kind, and have teams of one size. Tried
    are one size for all kinds, the smallest of each that takes no longer than some kind on some
    team, and, from the best of these on, another size of one kind as long as that is better.
    """
    costs = [
        tuple(
            (size, dataclasses.replace(x, team=tuple(range(size))).seconds(config, group.near))
            for size in _sizes(x, group, config)
        )
        for x in matrices
    ]
    kinds = list(dict.fromkeys(costs))
    best = math.inf, math.inf  # of the busiest rank, and of all on average
    teams: list[tuple[int, ...]] = []
    chosen: tuple[int, ...] = ()

    def tried(sizes: tuple[int, ...]) -> bool:
        """Deal with a size for each kind, and keep it if it is the best."""
        nonlocal best, teams, chosen
        of = dict(zip(kinds, sizes, strict=True))
        counts = [of[kind] for kind in costs]
        each = [dict(kind)[size] for kind, size in zip(costs, counts, strict=True)]
        mean = sum(map(math.prod, zip(each, counts, strict=True))) / group.ranks
        if mean > best[0]:
            return False
        dealt = deal(each, counts, group.ranks)
        score = max(loads_of(each, dealt, group.ranks)), mean
        if score >= best:
            return False
        best, teams, chosen = score, dealt, sizes
        return True

    for most in sorted({size for kind in kinds for size, _ in kind}):
        tried(tuple(max([kind[0][0], *(s for s, _ in kind if s <= most)]) for kind in kinds))
    for limit in sorted({value for kind in kinds for _, value in kind}):
        within = [[size for size, value in kind if value <= limit] for kind in kinds]
        if all(within):
            tried(tuple(map(min, within)))
    better = bool(kinds)
    while better:
        others = [
            (*chosen[:place], size, *chosen[place + 1 :])
            for place, kind in enumerate(kinds)
            for size, _ in kind
        ]
        better = any([tried(sizes) for sizes in others])
    return teams


def neighbours(ranks: Sequence[int], node: int) -> int:
    """Neighbours of a group that are in one node, wherever a team of so many begins.

    Args:
        ranks: the group's, among all of the run.
        node: ranks of a node.
    """
    size = 1
    while len(ranks) % (2 * size) == 0 and all(
        len({rank // node for rank in ranks[first : first + 2 * size]}) == 1
        for first in range(0, len(ranks), 2 * size)
    ):
        size *= 2
    return size


def team_sizes(ranks: int, config: PionConfig, *, cut: int) -> tuple[int, ...]:
    """The sizes of the teams of neighbours that so many ranks can form, in ascending order.

    Args:
        ranks: that together store weights.
        config: the run's options.
        cut: of them, that have the shards of a weight.
    """
    if config.blocks > 1:
        return (cut,)
    most = LARGEST_TEAM if config.team_size == "auto" else config.team_size
    powers = (1 << power for power in range(most.bit_length()))
    return tuple(size for size in powers if ranks % size == 0)


def _sizes(x: MatrixPlan, group: GroupSizes, config: PionConfig) -> list[int]:
    """The sizes of teams that can compute matrices."""
    if config.blocks > 1:
        return [x.cut]
    sizes = [size for size in group.teams if divides(x.m, x.n, config, size)]
    if config.team_size == "auto":
        return sizes
    return [max(size for size in sizes if size <= config.team_size)]
