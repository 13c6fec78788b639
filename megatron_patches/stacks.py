"""Records of layers and experts: stacked in one tensor or, where some have none, each alone.

Megatron's checkpoints stack what every layer, and every expert of a layer, has. A stack with a hole
can be neither saved nor loaded. So the members of a stack that lacks a layer or an expert are
recorded as Megatron records layers that differ: a tensor each, with its numbers in the key.
Complete stacks keep Megatron's keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from math import prod
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from .sharded_state import pieces

State = dict[int, dict[str, ShardedTensor | ShardedTensorFactory]]
# By key: the numbers of layers and experts that the stack has room for, and who has a record in it.
Stacks = dict[str, tuple[tuple[int, ...], set[tuple[int, ...]]]]

_STACKED = re.compile(r"\.(?:layers|experts\.experts)\.(?!\d)")


def stacks(states: Iterable[State]) -> Stacks:
    """The stacks of which this rank has records, and which of their members it has."""
    members: Stacks = {}
    for entry in (entry for state in states for _, _, entry in _entries(state)):
        record = pieces(entry)[0]
        if axes := record.prepend_axis_num:
            _, places = members.setdefault(entry.key, (record.global_shape[:axes], set()))
            places.add(record.global_offset[:axes])
    return members


def incomplete(everyone: Iterable[Stacks]) -> set[str]:
    """Keys of the stacks in which no rank has a record for some layer or expert."""
    together: Stacks = {}
    for key, (shape, places) in (item for each in everyone for item in each.items()):
        together.setdefault(key, (shape, set()))[1].update(places)
    return {key for key, (shape, places) in together.items() if len(places) < prod(shape)}


def take_apart(states: Iterable[State], keys: set[str]) -> None:
    """Record each member of the stacks of these keys by itself (modified in place)."""
    for state in states:
        for index, name, entry in list(_entries(state)):
            if entry.key in keys:
                state[index][name] = _alone(entry)


def _entries(state: State) -> Iterator[tuple[int, str, ShardedTensor | ShardedTensorFactory]]:
    for index, records in state.items():
        for name, entry in records.items():
            yield index, name, entry


def _alone(entry: ShardedTensor | ShardedTensorFactory) -> ShardedTensor | ShardedTensorFactory:
    """A record out of its stack, under a key with its numbers."""
    if isinstance(entry, ShardedTensorFactory):

        def build(_: str, *given: Any) -> list[ShardedTensor]:
            return [_alone(piece) for piece in entry.build_fn(entry.key, *given)]

        return replace(entry, key=_alone(pieces(entry)[0]).key, build_fn=build)
    axes = entry.prepend_axis_num
    fragments = entry.axis_fragmentations
    return replace(
        entry,
        key=numbered(entry.key, entry.global_offset[:axes]),
        global_shape=entry.global_shape[axes:],
        global_offset=entry.global_offset[axes:],
        axis_fragmentations=fragments and fragments[axes:],
        prepend_axis_num=0,
    )


def numbered(key: str, place: tuple[int, ...]) -> str:
    """A stack's key with the numbers of one of its layers and experts.

    Raises:
        RuntimeError: the key does not say of what it is a stack.
    """
    if len(_STACKED.findall(key)) != len(place):
        raise RuntimeError(
            f"{key} is a stack of {len(place)} axes, some members of which have no state, and its "
            "name does not say that they are layers or experts: it cannot be saved"
        )
    numbers = iter(place)
    return _STACKED.sub(lambda stack: f"{stack[0]}{next(numbers)}.", key)
