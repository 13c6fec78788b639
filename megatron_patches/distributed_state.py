"""State of a DistributedOptimizer, whose ranks have ranges of parameters, as that of whole ones."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing.optimizer import (
    get_param_id_to_sharded_param_map,
    make_sharded_optimizer_tensor,
)

from . import groups
from .distributed_optimizer import PionAndAdam, stored_ranges, stored_shards
from .sharded_state import record

MASTER = "fp32_param"
_ADAMS = ("exp_avg", "exp_avg_sq")


def distributed_state(
    leaf: Any, model_sharded_state_dict: Any, is_loading: bool
) -> tuple[dict[int, Any], list[dict[str, Any]]]:
    """Records and groups of a distributed optimizer, whose ranks have ranges of parameters.

    Adam's state and the masters are joined on one rank each, which alone records them. When they
    are loaded every rank that has a range asks for the whole, as copies of the first's.
    """
    params, shards = _parameters(leaf), stored_shards(leaf)
    places = get_param_id_to_sharded_param_map(model_sharded_state_dict, params)
    pion, adam = _inner(leaf)
    ranks, rank = leaf.data_parallel_group.size(), leaf.data_parallel_group.rank()
    state: dict[int, Any] = {}

    def add(index: int, key: str, entry: Any, copy: int = 0) -> None:
        replica = leaf.distributed_optimizer_instance_id * ranks + copy
        entry.replica_id = (*entry.replica_id[:2], replica)
        state.setdefault(index, {})[key] = entry

    for index, param in enumerate(params):
        copy = _copy(leaf, param) if is_loading else 0
        for key in _keys(param, of_pion=param in pion):
            if is_loading:
                whole = torch.empty(param.shape) if param in shards else None
            else:
                whole = _joined(leaf, param, shards.get(param), key, to=index % ranks)
                whole = whole if rank == index % ranks else None
            if whole is not None:
                prefix = f"optimizer.state.{key}"
                entry = make_sharded_optimizer_tensor(places[index], whole, prefix=prefix)
                add(index, key, entry, copy=copy)
        for key, moment in pion.get(param, {}).items():
            add(index, key, record(places[index], moment, f"optimizer.state.{key}"))
    groups_of = [{k: v for k, v in g.items() if k != "params"} for g in leaf.param_groups]
    # FusedAdam cannot count on from None; it has no count before its first step.
    step = {} if (count := _adam_step(adam)) is None else {"step": count}
    return state, [group if groups.MARK in group else {**group, **step} for group in groups_of]


@torch.no_grad()
def load_distributed(leaf: Any, state: dict[int, Any], saved: list[groups.Group]) -> None:
    """Load ``distributed_state`` into a distributed optimizer (modified in place)."""
    loaded: dict[torch.Tensor, dict[str, Any]] = {}
    shards = stored_shards(leaf)
    for index, param in enumerate(_parameters(leaf)):
        loaded[param] = dict(state.get(index, {}))
        if (shard := shards.get(param)) is not None:
            place = _range(leaf, param)
            if (master := loaded[param].pop(MASTER, None)) is not None:
                shard.copy_(master.flatten()[place])
            for key in _ADAMS:
                if (whole := loaded[param].pop(key, None)) is not None:
                    part = whole.flatten()[place].to(param.device)
                    loaded.setdefault(shard, {})[key] = part
    adam = leaf.optimizer
    if isinstance(adam, PionAndAdam):
        pion, weights, adam = adam.pion, adam.weights, adam.adam
        own = groups.numbered((group for group in saved if groups.MARK in group), pion.members())
        moments = {index: loaded[param] for index, param in enumerate(weights)}
        pion.load_state_dict({"state": moments, "param_groups": own})
    members = [group["params"] for group in adam.param_groups]
    own = groups.numbered((group for group in saved if groups.MARK not in group), members)
    counted = isinstance(adam, (torch.optim.Adam, torch.optim.AdamW))
    moments = {}
    for group, shards_of in zip(own, members, strict=True):
        step = {"step": torch.tensor(float(group.get("step", 0)))} if counted else {}
        for index, shard in zip(group["params"], shards_of, strict=True):
            moments[index] = {**loaded[shard], **step}
    adam.load_state_dict({"state": moments, "param_groups": own})


def _copy(leaf: Any, param: torch.Tensor) -> int:
    """How far this rank is behind the first that stores a range of a parameter."""
    parts = stored_ranges(leaf, param)
    first = next(rank for rank, (start, stop) in enumerate(parts) if start < stop)
    return int(leaf.data_parallel_group.rank()) - first


def _inner(leaf: Any) -> tuple[dict[torch.Tensor, dict[str, torch.Tensor]], Any]:
    """Pion's moments that this rank has, by model parameter, and Adam."""
    if not isinstance(leaf.optimizer, PionAndAdam):
        return {}, leaf.optimizer
    moments = leaf.optimizer.pion.state_dict()["state"]
    weights = enumerate(leaf.optimizer.weights)
    return {param: moments.get(index, {}) for index, param in weights}, leaf.optimizer.adam


def _adam_step(adam: Any) -> int | None:
    """Steps that Adam has taken; torch counts them by parameter, FusedAdam by group."""
    steps = [group["step"] for group in adam.param_groups if group["params"] and "step" in group]
    steps += [int(state["step"]) for state in adam.state.values() if "step" in state]
    return max(steps, default=None)


def _parameters(leaf: Any) -> list[torch.nn.Parameter]:
    """All parameters of a distributed optimizer's buffers, in an order common to its ranks."""
    return [param for buffer in leaf.buffers for param in buffer.param_index_map]


def _keys(param: torch.Tensor, *, of_pion: bool) -> tuple[str, ...]:
    masters = () if param.dtype == torch.float32 else (MASTER,)
    return masters if of_pion else (*masters, *_ADAMS)


def _joined(
    leaf: Any, param: torch.Tensor, shard: torch.Tensor | None, key: str, *, to: int
) -> torch.Tensor:
    """A state tensor in its parameter's shape, from all ranks' ranges, on rank ``to`` alone."""
    whole = torch.zeros(param.numel(), dtype=torch.float32, device=param.device)
    if shard is not None:
        state = {MASTER: shard, **leaf.optimizer.state.get(shard, {})}
        if key in state:  # before its first step Adam's averages are the zeros that are there
            whole[_range(leaf, param)] = state[key].detach().float()
    torch.distributed.reduce(whole, group_dst=to, group=leaf.data_parallel_group)
    return whole.cpu().view(param.shape)


def _range(leaf: Any, param: torch.Tensor) -> slice:
    in_buffer = leaf._get_model_param_range_map(param)["param"]
    return slice(in_buffer.start, in_buffer.end)
