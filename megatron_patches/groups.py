"""Parameter groups of a run and of its checkpoint: which are the same, and whose rates hold."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from megatron.core.optimizer.optimizer import param_group_identifier_keys

# In Pion's groups and in the optimizer's state: identity() of the options that it was saved with.
MARK = "pion"
Group = dict[str, Any]
# By name: whether it has parameters on this rank, and what is saved of it.
Groups = dict[str, tuple[bool, Group]]

# What --override-opt-param-scheduler lets a run decide; no identifiers in Megatron 0.18.
_RATES = ("max_lr", "min_lr", "start_wd", "end_wd")
# A group of routed experts' parameters of its own: where there is expert parallelism, alone.
_EXPERTS = "is_expert_parallel"
IDENTIFIERS = tuple(
    key for key in dict.fromkeys((*param_group_identifier_keys, *_RATES)) if key != _EXPERTS
)


def name(group: Group, *, without: tuple[str, ...] = ()) -> str:
    """What tells a group from the others, as Megatron pairs groups with saved ones."""
    keys = (key for key in IDENTIFIERS if key not in without)
    return repr([MARK in group, *(group.get(key) for key in keys)])


def match(mine: Iterable[Group], saved: Iterable[Group], *, new_rates: bool) -> dict[str, Group]:
    """The saved group of each of this run's, by its name; those that have none are left out.

    Args:
        mine: this run's groups.
        saved: the checkpoint's.
        new_rates: whether learning rates and weight decay may differ. Groups that nothing else
            tells apart are paired in their order.
    """
    without = _RATES if new_rates else ()
    alike: dict[str, list[Group]] = {}
    for group in saved:
        alike.setdefault(name(group, without=without), []).append(group)
    matched: dict[str, Group] = {}
    for own, group in {name(group): group for group in mine}.items():
        if same := alike.get(name(group, without=without)):
            matched[own] = same.pop(0) if len(same) > 1 else same[0]
    return matched


def with_own_rates(saved: Group, mine: Group) -> Group:
    """A saved group with what identifies this run's, by which Megatron pairs them."""
    own = (*IDENTIFIERS, _EXPERTS, "default_config")
    return {**saved, **{key: mine[key] for key in own if key in mine}}


def numbered(groups: Iterable[Group], members: Iterable[Sequence[Any]]) -> list[Group]:
    """Groups with numbers for their parameters, as a torch optimizer's ``state_dict`` has them."""
    count = itertools.count()
    return [
        {**group, "params": [next(count) for _ in own]}
        for group, own in zip(groups, members, strict=True)
    ]


def filled(everyone: Iterable[Groups]) -> dict[str, Group]:
    """Each group from a rank where it has parameters: FusedAdam counts no steps elsewhere."""
    chosen: Groups = {}
    for own, (has_some, group) in (item for each in everyone for item in each.items()):
        if own not in chosen or (has_some and not chosen[own][0]):
            chosen[own] = (has_some, group)
    return {own: group for own, (_, group) in chosen.items()}
