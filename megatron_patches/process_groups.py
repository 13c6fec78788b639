"""Process groups of the ranks that store or compute a matrix together; objects of all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from pion_dist import PionConfig
from pion_dist.exchange import ProcessGroup
from pion_dist.teams import team_sizes

Teams = dict[ProcessGroup, list[ProcessGroup]]


def rank() -> int:
    """This process's number in the run."""
    return dist.get_rank() if dist.is_initialized() else 0


def of_all_ranks[T](mine: T) -> list[T]:
    """Gather an object from every rank of the run, in the ranks' order; a collective."""
    if not dist.is_initialized():
        return [mine]
    everyone = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def make_teams(
    groups: Sequence[ProcessGroup], config: PionConfig, tp: ProcessGroup, minutes: int | None
) -> Teams:
    """Make this rank's teams, neighbours that may compute a matrix; a collective of all ranks.

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
    place = ranks.index(dist.get_rank())
    sizes = [size for size in team_sizes(len(ranks), config, cut=tp) if size > 1]
    firsts = [place // size * size for size in sizes]
    return [ranks[first : first + size] for first, size in zip(firsts, sizes, strict=True)]


def grid_of(tp: ProcessGroup, dp: ProcessGroup, minutes: int | None) -> ProcessGroup | None:
    """The process group of all ranks that store a weight; a collective of all ranks of the run.

    Args:
        tp: the ranks that have the other shards.
        dp: the ranks that divide a shard.
        minutes: until a collective that waits fails.

    Returns:
        The group, whose rank r has shard r % tp.size(); None for this rank alone.

    Raises:
        RuntimeError: ranks are in another order.
    """
    if tp.size() == 1:
        return dp if dp.size() > 1 else None
    if dp.size() == 1:
        return tp
    columns: list[Any] = [None] * tp.size()
    dist.all_gather_object(columns, dist.get_process_group_ranks(dp), group=tp)
    mine = tuple(column[place] for place in range(dp.size()) for column in columns)
    if mine != tuple(sorted(mine)):
        raise RuntimeError(
            f"--optimizer pion with --use-distributed-optimizer: ranks {mine} store a weight "
            "together; tensor-parallel ranks must be neighbours"
        )
    return made_by_all({mine}, minutes)[mine]
