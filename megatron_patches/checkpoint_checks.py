"""Refusals of checkpoints without this run's optimizer state, before anything is loaded."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.strategies.torch import _get_filesystem_reader

from pion_dist.state import is_start

from . import groups, seams
from .distributed_optimizer import leaves
from .sharded_state import pieces

NEW_RATES = "new_rates"  # in what is loaded: whether --override-opt-param-scheduler is given
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
        if isinstance(wanted, dict) and groups.MARK in wanted:
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


def _refuse_other_state(wanted: dict[str, Any], checkpoint: str) -> None:
    """Refuse a torch_dist checkpoint whose state is not of this run's matrices and options."""
    where = f"--load {Path(checkpoint).parent}: the checkpoint"
    saved = dist_checkpointing.load_common_state_dict(checkpoint).get("optimizer")
    if not isinstance(saved, dict) or groups.MARK not in saved:
        raise _no_state(where)
    _refuse_other_options(where, wanted[groups.MARK], saved[groups.MARK])
    mine, theirs = (each["param_groups"].values() for each in (wanted, saved))
    _matched(where, mine, theirs, wanted[NEW_RATES].unwrap())
    # Megatron's load_tensors_metadata fails with torch 2.15, whose metadata have strides.
    have = set(_get_filesystem_reader(checkpoint).read_metadata().state_dict_metadata)
    _leave_out_missing_starts(wanted["state"], have)
    records = (piece for each in nested_values(wanted["state"]) for piece in pieces(each))
    if lacks := sorted({record.key for record in records} - have):
        raise _other_parameters(where, f"no {lacks[0]} ({len(lacks)} such)")


def _leave_out_missing_starts(state: dict[int, Any], have: set[str]) -> None:
    """Do not ask for spectra at start that were not recorded (modified in place); Pion says so."""
    for moments in (moments for params in state.values() for moments in params.values()):
        for key in [key for key in moments if is_start(key)]:
            if any(record.key not in have for record in pieces(moments[key])):
                del moments[key]


def fitted_state(optimizer: Any, state_dict: Any, own: dict[str, Any], new_rates: bool) -> Any:
    """State of --ckpt-format torch with this run's rates, unless it does not fit and is refused."""
    where = "--load: the checkpoint"
    members = state_dict if isinstance(state_dict, list) else [state_dict]  # of a chain
    saved = [member.get("optimizer", member).get("param_groups", []) for member in members]
    mine = [leaf.param_groups for leaf in leaves(optimizer)]
    theirs = [group[groups.MARK] for each in saved for group in each if groups.MARK in group]
    if theirs:
        _refuse_other_options(where, own, theirs[0])
    elif any(groups.MARK in group for each in mine for group in each):
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
