"""The optimizer's state in torch_dist checkpoints, in one form whatever optimizers hold it.

Megatron's optimizers each have a form of their own: the plain ones record whole parameters, the
distributed one its flat buffers, and chains number their members. Here every state tensor is
recorded under the plain optimizer's key with its parameter's whole shape, and a parameter group by
what tells it from the others. So a checkpoint moves between all of them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from pion_dist.state import identity

from . import groups, stacks
from .arguments import pion_config
from .checkpoint_checks import NEW_RATES, fitted_state
from .distributed_optimizer import leaves, pions
from .distributed_state import MASTER, distributed_state, load_distributed
from .process_groups import of_all_ranks


def attach(optimizer: Any, config: Any) -> None:
    """Have the run's optimizer save and load the common form (modified in place).

    Args:
        optimizer: what get_megatron_optimizer returned, of ``--optimizer pion``.
        config: the OptimizerConfig that it was made with.
    """
    load_state_dict = optimizer.load_state_dict
    optimizer.reload_model_params = _forgetting(optimizer)
    own, new_rates = identity(pion_config(config)), config.pion_override_scheduler

    def load_either(state_dict: Any) -> None:
        if groups.MARK in state_dict:
            _load(optimizer, state_dict)
        else:  # --ckpt-format torch
            load_state_dict(fitted_state(optimizer, state_dict, own, new_rates))

    optimizer.load_state_dict = load_either
    optimizer.sharded_state_dict = functools.partial(_sharded_state_dict, optimizer, own, new_rates)


def _forgetting(optimizer: Any) -> Any:
    """Tell every Pion that weights were loaded: Megatron writes them into the masters' ``data``."""
    original = optimizer.reload_model_params

    @functools.wraps(original)
    def reload_model_params(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        for pion in pions(optimizer):
            pion.forget_factors()

    return reload_model_params


def _sharded_state_dict(
    optimizer: Any,
    own: dict[str, Any],
    new_rates: bool,
    model_sharded_state_dict: Any,
    is_loading: bool = False,
    metadata: Any = None,
) -> dict[str, Any]:
    """The common form: a collective of all ranks, whose keys and groups are the whole model's."""
    states: dict[int, Any] = {}
    here: groups.Groups = {}
    for index, leaf in enumerate(leaves(optimizer)):
        distributed = isinstance(leaf, DistributedOptimizer)
        state_of = distributed_state if distributed else _whole_state
        by_number, recorded = state_of(leaf, model_sharded_state_dict, is_loading)
        # What has no state here would stay in the common part, which is one rank's.
        states[index] = {number: entries for number, entries in by_number.items() if entries}
        for group, saved in zip(leaf.param_groups, recorded, strict=True):
            here[groups.name(group)] = (bool(group["params"]), saved)
    everyone = of_all_ranks((here, stacks.stacks(states.values())))
    stacks.take_apart(states.values(), stacks.incomplete(each for _, each in everyone))
    common = {
        groups.MARK: own,
        "state": states,
        "param_groups": groups.filled(each for each, _ in everyone),
    }
    if is_loading:
        common[NEW_RATES] = LocalNonpersistentObject(new_rates)
    return common


def _whole_state(
    leaf: Any, model_sharded_state_dict: Any, is_loading: bool
) -> tuple[dict[int, Any], list[dict[str, Any]]]:
    """Records and groups of an optimizer that has whole parameters."""
    shown = leaf.sharded_state_dict(model_sharded_state_dict, is_loading)
    inner = shown.get("optimizer", shown)  # FP32Optimizer has nothing around it
    state, recorded = inner["state"], inner["param_groups"]
    step = state.pop("common_step", None)
    ids = [group.pop("params").unwrap() for group in recorded]
    for own, masters in zip(ids, shown.get("fp32_from_fp16_params", ()), strict=False):
        for index, master in zip(own, masters, strict=True):
            state.setdefault(index, {})[MASTER] = master
    if step is not None:
        recorded = [{"step": step, **group} for group in recorded]
    return state, recorded


def _load(optimizer: Any, state_dict: dict[str, Any]) -> None:
    """Load the common form; ``checkpoint_checks`` has found that it fits."""
    every = list(leaves(optimizer))
    mine = [group for leaf in every for group in leaf.param_groups]
    saved = state_dict["param_groups"].values()
    matched = groups.match(mine, saved, new_rates=state_dict[NEW_RATES])
    for index, leaf in enumerate(every):
        state = state_dict["state"].get(index, {})
        load = load_distributed if isinstance(leaf, DistributedOptimizer) else _load_whole
        own = [groups.with_own_rates(matched[groups.name(g)], g) for g in leaf.param_groups]
        load(leaf, state, own)


def _load_whole(leaf: Any, state: dict[int, Any], saved: list[groups.Group]) -> None:
    # Not by the optimizer's state_dict, which would copy every moment.
    own = groups.numbered(saved, [group["params"] for group in leaf.optimizer.param_groups])
    # A shard whose matrices other ranks compute has no state here.
    masters = [[state.get(i, {}).pop(MASTER, None) for i in group["params"]] for group in own]
    inner: dict[str, Any] = {"state": state, "param_groups": own}
    if isinstance(leaf.optimizer, torch.optim.Adam) and "step" in saved[0]:  # counts in the state
        inner["state"] = {**state, "common_step": saved[0]["step"]}
    if hasattr(leaf, "fp32_from_float16_groups"):
        leaf.load_state_dict({"optimizer": inner, "fp32_from_fp16_params": masters})
    else:
        leaf.load_state_dict(inner)
