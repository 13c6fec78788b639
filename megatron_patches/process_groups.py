"""The process groups of teams: neighbours that may compute a matrix together."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from pion_dist import PionConfig
from pion_dist.exchange import ProcessGroup
from pion_dist.teams import team_sizes

from .parameters import of_all_ranks

Teams = dict[ProcessGroup, list[ProcessGroup]]


def make(
    groups: Sequence[ProcessGroup], config: PionConfig, tp: ProcessGroup, minutes: int | None
) -> Teams:
    """Make this rank's teams in some groups; a collective of all ranks of the run.

    Args:
        groups: that together store weights.
        config: the run's options, which say how large teams may be.
        tp: the ranks that have the shards of a weight; it is a team where it is one's size.
        minutes: until a collective that waits fails.
    """
    known = {_ranks(group): group for group in (*groups, tp)}
    blocks = {group: _blocks(_ranks(group), config, tp.size()) for group in groups}
    wanted = {block for each in blocks.values() for block in each}
    known |= made_by_all(wanted - known.keys(), minutes)
    return {group: [known[block] for block in each] for group, each in blocks.items()}


def made_by_all(
    wanted: set[tuple[int, ...]], minutes: int | None
) -> dict[tuple[int, ...], ProcessGroup]:
    """Make the process groups of these ranks; a collective of all ranks of the run."""
    timeout = None if minutes is None else timedelta(minutes=minutes)
    # Every rank makes every group, in one order, as Megatron makes its own.
    everyones = sorted(set().union(*of_all_ranks(wanted)))
    made = {ranks: dist.new_group(ranks, timeout=timeout) for ranks in everyones}
    return {ranks: made[ranks] for ranks in wanted}


def _ranks(group: ProcessGroup) -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(group))


def _blocks(ranks: tuple[int, ...], config: PionConfig, tp: int) -> list[tuple[int, ...]]:
    """This rank's possible teams of more than one, by size."""
    blocks = []
    for size in team_sizes(len(ranks), config, cut=tp):
        if size == 1:
            continue
        first = ranks.index(dist.get_rank()) // size * size
        blocks.append(ranks[first : first + size])
    return blocks
