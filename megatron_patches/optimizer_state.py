"""The optimizer's state in torch_dist checkpoints, in one form whatever optimizers hold it.

Megatron's optimizers each have a form of their own: the plain ones record whole parameters, the
distributed one its flat buffers, and chains number their members. Here every state tensor is
recorded under the plain optimizer's key with its parameter's whole shape, and a parameter group by
what tells it from the others. So a checkpoint moves between all of them.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject
from megatron.core.dist_checkpointing.optimizer import (
    get_param_id_to_sharded_param_map,
    make_sharded_optimizer_tensor,
)
from megatron.core.dist_checkpointing.strategies.torch import _get_filesystem_reader
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from pion_dist.state import identity, is_start

from . import groups, seams, stacks
from .arguments import pion_config
from .distributed_optimizer import PionAndAdam, leaves, pions, stored_ranges, stored_shards
from .parameters import of_all_ranks, pieces
from .sharded_state import record

_MARK = "pion"  # in the optimizer's state: identity() of the options that it was saved with
_NEW_RATES = "new_rates"  # in what is loaded: whether --override-opt-param-scheduler is given
_MASTER = "fp32_param"
_ADAMS = ("exp_avg", "exp_avg_sq")
# The option that decides an entry of identity(), where it is not of the same name.
_FLAGS = {"second_moment": "direction", "sides": "side", "split_gate": "no-split-gate"}
_FRESH = (
    "To start with fresh optimizer state, load the weights alone, with --no-load-optim (keeps the "
    "iteration, restarts the learning rate's schedule) or --finetune (starts at iteration 0)."
)


def apply() -> None:
    """Refuse checkpoints without this run's state, torch_dist ones before they are read."""
    original = dist_checkpointing.load

    @functools.wraps(original)
    def load(sharded_state_dict: Any, checkpoint_dir: Any, *args: Any, **kwargs: Any) -> Any:
        wanted = sharded_state_dict.get("optimizer")
        if isinstance(wanted, dict) and _MARK in wanted:
            _refuse_other_state(wanted, str(checkpoint_dir))
        return original(sharded_state_dict, checkpoint_dir, *args, **kwargs)

    dist_checkpointing.load = load
    if seams.has_training():
        metadata = dist_checkpointing.load_content_metadata
        dist_checkpointing.load_content_metadata = _reshardable(metadata)
        checkpointing: Any = importlib.import_module("megatron.training.checkpointing")
        checkpointing._load_base_checkpoint = _with_optimizer(checkpointing._load_base_checkpoint)


def _reshardable(original: Any) -> Any:
    """Say of every checkpoint that a distributed optimizer's state loads into any layout.

    Megatron refuses another TP or PP where its own form of the state would not.
    """

    @functools.wraps(original)
    def load_content_metadata(*args: Any, **kwargs: Any) -> Any:
        metadata = original(*args, **kwargs)
        training: Any = importlib.import_module("megatron.training.global_vars")
        options = training._GLOBAL_ARGS  # None in a script that uses megatron.core alone
        if metadata is None or getattr(options, "optimizer", "") != "pion":
            return metadata
        return {**metadata, "distrib_optim_sharding_type": "fully_reshardable"}

    return load_content_metadata


def _with_optimizer(original: Any) -> Any:
    """Refuse a checkpoint without optimizer state, of which Megatron says KeyError."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def load_base_checkpoint(*args: Any, **kwargs: Any) -> Any:
        loaded = original(*args, **kwargs)
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        options, (state_dict, _, release, _) = given.arguments["args"], loaded
        wanted = options.optimizer == "pion" and not given.arguments["rank0"]
        wanted = wanted and not (release or options.finetune or options.no_load_optim)
        if wanted and state_dict is not None and "optimizer" not in state_dict:
            raise _no_state(f"--load {given.arguments['load_dir']}: the checkpoint")
        return loaded

    return load_base_checkpoint


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
        if _MARK in state_dict:
            _load(optimizer, state_dict)
        else:  # --ckpt-format torch
            load_state_dict(_fitted(optimizer, state_dict, own, new_rates))

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
        state_of = _flat_state if distributed else _whole_state
        by_number, recorded = state_of(leaf, model_sharded_state_dict, is_loading)
        # What has no state here would stay in the common part, which is one rank's.
        states[index] = {number: entries for number, entries in by_number.items() if entries}
        for group, saved in zip(leaf.param_groups, recorded, strict=True):
            here[groups.name(group)] = (bool(group["params"]), saved)
    everyone = of_all_ranks((here, stacks.stacks(states.values())))
    stacks.take_apart(states.values(), stacks.incomplete(each for _, each in everyone))
    common = {
        _MARK: own,
        "state": states,
        "param_groups": groups.filled(each for each, _ in everyone),
    }
    if is_loading:
        common[_NEW_RATES] = LocalNonpersistentObject(new_rates)
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
            state.setdefault(index, {})[_MASTER] = master
    if step is not None:
        recorded = [{"step": step, **group} for group in recorded]
    return state, recorded


def _flat_state(
    leaf: Any, model_sharded_state_dict: Any, is_loading: bool
) -> tuple[dict[int, Any], list[dict[str, Any]]]:
    """Records and groups of a distributed optimizer, whose ranks have ranges of parameters.

    Adam's state and the masters are joined on one rank each, which alone records them. When they
    are loaded every rank that has a range asks for the whole, as copies of the first's.
    """
    params, shards = _flat_parameters(leaf), stored_shards(leaf)
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
    return state, [group if _MARK in group else {**group, **step} for group in groups_of]


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


def _flat_parameters(leaf: Any) -> list[torch.nn.Parameter]:
    """All parameters of a distributed optimizer's buffers, in an order common to its ranks."""
    return [param for buffer in leaf.buffers for param in buffer.param_index_map]


def _keys(param: torch.Tensor, *, of_pion: bool) -> tuple[str, ...]:
    masters = () if param.dtype == torch.float32 else (_MASTER,)
    return masters if of_pion else (*masters, *_ADAMS)


def _joined(
    leaf: Any, param: torch.Tensor, shard: torch.Tensor | None, key: str, *, to: int
) -> torch.Tensor:
    """A state tensor in its parameter's shape, from all ranks' ranges, on rank ``to`` alone."""
    whole = torch.zeros(param.numel(), dtype=torch.float32, device=param.device)
    if shard is not None:
        state = {_MASTER: shard, **leaf.optimizer.state.get(shard, {})}
        if key in state:  # before its first step Adam's averages are the zeros that are there
            whole[_range(leaf, param)] = state[key].detach().float()
    torch.distributed.reduce(whole, group_dst=to, group=leaf.data_parallel_group)
    return whole.cpu().view(param.shape)


def _range(leaf: Any, param: torch.Tensor) -> slice:
    in_buffer = leaf._get_model_param_range_map(param)["param"]
    return slice(in_buffer.start, in_buffer.end)


def _load(optimizer: Any, state_dict: dict[str, Any]) -> None:
    """Load the common form; ``_refuse_other_state`` has found that it fits."""
    every = list(leaves(optimizer))
    mine = [group for leaf in every for group in leaf.param_groups]
    saved = state_dict["param_groups"].values()
    matched = groups.match(mine, saved, new_rates=state_dict[_NEW_RATES])
    for index, leaf in enumerate(every):
        state = state_dict["state"].get(index, {})
        load = _load_flat if isinstance(leaf, DistributedOptimizer) else _load_whole
        load(
            leaf,
            state,
            [groups.with_own_rates(matched[groups.name(g)], g) for g in leaf.param_groups],
        )


def _fitted(optimizer: Any, state_dict: Any, own: dict[str, Any], new_rates: bool) -> Any:
    """State of --ckpt-format torch with this run's rates, unless it does not fit and is refused."""
    where = "--load: the checkpoint"
    members = state_dict if isinstance(state_dict, list) else [state_dict]  # of a chain
    saved = [member.get("optimizer", member).get("param_groups", []) for member in members]
    mine = [leaf.param_groups for leaf in leaves(optimizer)]
    theirs = [group[_MARK] for each in saved for group in each if _MARK in group]
    if theirs:
        _refuse_other_options(where, own, theirs[0])
    elif any(_MARK in group for each in mine for group in each):
        raise _no_state(where)
    if len(saved) != len(mine):
        raise _other_parameters(where, f"{len(saved)} optimizers' state instead of {len(mine)}")
    fitted = [
        _with_groups(member, _fitted_groups(where, want, have, new_rates))
        for member, have, want in zip(members, saved, mine, strict=True)
    ]
    return fitted if isinstance(state_dict, list) else fitted[0]


def _fitted_groups(
    where: str, mine: list[groups.Group], saved: list[groups.Group], new_rates: bool
) -> list[groups.Group]:
    matched = _matched(where, mine, saved, new_rates)
    fitted = [groups.with_own_rates(matched[groups.name(group)], group) for group in mine]
    for group, its in zip(mine, fitted, strict=True):
        if len(its["params"]) != len(group["params"]):
            what = f"{len(its['params'])} instead of {len(group['params'])} in a group"
            raise _other_parameters(where, f"other parameters, {what}")
    return fitted


def _with_groups(member: dict[str, Any], own: list[groups.Group]) -> dict[str, Any]:
    """An optimizer's state with other groups: with float32 masters they are one level deeper."""
    if "optimizer" in member:
        return {**member, "optimizer": {**member["optimizer"], "param_groups": own}}
    return {**member, "param_groups": own}


def _load_whole(leaf: Any, state: dict[int, Any], saved: list[groups.Group]) -> None:
    # Not by the optimizer's state_dict, which would copy every moment.
    own = groups.numbered(saved, [group["params"] for group in leaf.optimizer.param_groups])
    # A shard whose matrices other ranks compute has no state here.
    masters = [[state.get(i, {}).pop(_MASTER, None) for i in group["params"]] for group in own]
    inner: dict[str, Any] = {"state": state, "param_groups": own}
    if isinstance(leaf.optimizer, torch.optim.Adam) and "step" in saved[0]:  # counts in the state
        inner["state"] = {**state, "common_step": saved[0]["step"]}
    if hasattr(leaf, "fp32_from_float16_groups"):
        leaf.load_state_dict({"optimizer": inner, "fp32_from_fp16_params": masters})
    else:
        leaf.load_state_dict(inner)


@torch.no_grad()
def _load_flat(leaf: Any, state: dict[int, Any], saved: list[groups.Group]) -> None:
    """Load ``_flat_state`` into a distributed optimizer (modified in place)."""
    loaded: dict[torch.Tensor, dict[str, Any]] = {}
    shards = stored_shards(leaf)
    for index, param in enumerate(_flat_parameters(leaf)):
        loaded[param] = dict(state.get(index, {}))
        if (shard := shards.get(param)) is not None:
            place = _range(leaf, param)
            if (master := loaded[param].pop(_MASTER, None)) is not None:
                shard.copy_(master.flatten()[place])
            for key in _ADAMS:
                if (whole := loaded[param].pop(key, None)) is not None:
                    part = whole.flatten()[place].to(param.device)
                    loaded.setdefault(shard, {})[key] = part
    adam = leaf.optimizer
    if isinstance(adam, PionAndAdam):
        pion, weights, adam = adam.pion, adam.weights, adam.adam
        own = groups.numbered((group for group in saved if _MARK in group), pion.members())
        moments = {index: loaded[param] for index, param in enumerate(weights)}
        pion.load_state_dict({"state": moments, "param_groups": own})
    members = [group["params"] for group in adam.param_groups]
    own = groups.numbered((group for group in saved if _MARK not in group), members)
    counted = isinstance(adam, (torch.optim.Adam, torch.optim.AdamW))
    moments = {}
    for group, shards_of in zip(own, members, strict=True):
        step = {"step": torch.tensor(float(group.get("step", 0)))} if counted else {}
        for index, shard in zip(group["params"], shards_of, strict=True):
            moments[index] = {**loaded[shard], **step}
    adam.load_state_dict({"state": moments, "param_groups": own})


def _leave_out_missing_starts(state: dict[int, Any], have: set[str]) -> None:
    """Do not ask for spectra at start that were not recorded (modified in place); Pion says so."""
    for moments in (moments for params in state.values() for moments in params.values()):
        for key in [key for key in moments if is_start(key)]:
            if any(record.key not in have for record in pieces(moments[key])):
                del moments[key]


def _refuse_other_state(wanted: dict[str, Any], checkpoint: str) -> None:
    """Refuse a torch_dist checkpoint whose state is not of this run's matrices and options."""
    where = f"--load {Path(checkpoint).parent}: the checkpoint"
    saved = dist_checkpointing.load_common_state_dict(checkpoint).get("optimizer")
    if not isinstance(saved, dict) or _MARK not in saved:
        raise _no_state(where)
    _refuse_other_options(where, wanted[_MARK], saved[_MARK])
    mine, theirs = (each["param_groups"].values() for each in (wanted, saved))
    _matched(where, mine, theirs, wanted[_NEW_RATES].unwrap())
    # Megatron's load_tensors_metadata fails with torch 2.15, whose metadata have strides.
    have = set(_get_filesystem_reader(checkpoint).read_metadata().state_dict_metadata)
    _leave_out_missing_starts(wanted["state"], have)
    records = (piece for each in nested_values(wanted["state"]) for piece in pieces(each))
    if lacks := sorted({record.key for record in records} - have):
        raise _other_parameters(where, f"no {lacks[0]} ({len(lacks)} such)")


def _refuse_other_options(where: str, mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    for option in {**mine, **theirs}:
        if mine.get(option) != theirs.get(option):
            values = theirs.get(option), mine.get(option)
            flag = "direction" if "polar" in values else _FLAGS.get(option, option)
            raise ValueError(
                f"{where} was saved with another --pion-{flag.replace('_', '-')}: its {option} is "
                f"{values[0]!r}, this run's {values[1]!r}. Set the option as it "
                f"was. {_FRESH}"
            )


def _matched(
    where: str, mine: Iterable[groups.Group], saved: Iterable[groups.Group], new_rates: bool
) -> dict[str, groups.Group]:
    """The saved group of every one of this run's, by name; refuses a run where one has none."""
    mine, saved = list(mine), list(saved)
    matched = groups.match(mine, saved, new_rates=new_rates)
    if missing := [name for name in map(groups.name, mine) if name not in matched]:
        keys = ", ".join(groups.IDENTIFIERS)
        what = f"no parameter group with pion, {keys} = {missing[0]}"
        if missing[0] not in groups.match(mine, saved, new_rates=True):
            raise _other_parameters(where, what)
        raise ValueError(
            f"{where} has {what}. Set the learning rates as they were, or give "
            f"--override-opt-param-scheduler to train on with others. {_FRESH}"
        )
    return matched


def _no_state(where: str) -> ValueError:
    return ValueError(
        f"{where} has no state of --optimizer pion, but of another optimizer or of none. {_FRESH}"
    )


def _other_parameters(where: str, what: str) -> ValueError:
    return ValueError(
        f"{where} has {what}. Set --pion-exclude, the parameters that are trained, the options of "
        f"their groups and the model as they were. {_FRESH}"
    )
