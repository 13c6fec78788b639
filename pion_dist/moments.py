"""The moments of a state dict: matrices of the weight, in whatever form this rank holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import state, storage
from .local_plan import LocalPlan
from .storage import compute_dtype


def show(local: LocalPlan, p: Tensor, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a parameter's moments as a state dict has them.

    Moments that are held packed or coded become matrices, made on the CPU, since devices may not
    have room for all. Those of a DTensor that ranks divide become DTensors, which is a collective.

    Args:
        local: this rank's plan.
        p: the parameter.
        held: its moments on this rank, by key.
    """
    shown, spreads = dict(held), local.spreads(p)
    for key, (moment, ranks) in local.moments(p).items():
        if moment.held(ranks, compute_dtype(p).itemsize) != moment.local(ranks):
            x = shown[key] if spreads else shown[key].cpu()
            shown[key] = storage.matrices(x, moment, ranks, key)
    for key, spread in spreads.items():
        dtype = storage.dtype_of(spread.moment, p)
        dtype = torch.float32 if dtype == torch.int8 else dtype
        like = torch.empty(0, dtype=dtype, device=p.device)
        shown[key] = spread.scatter(shown.get(key), like)
    return shown


def take(
    local: LocalPlan, p: Tensor, shown: Mapping[str, Any]
) -> tuple[dict[str, Tensor], list[str]]:
    """Return a parameter's moments as this rank holds them; the inverse of ``show``.

    Returns:
        The moments by key, and the keys that ``shown`` lacks, which are zero.
    """
    if spreads := local.spreads(p):
        some = {key: spread for key, spread in spreads.items() if key in shown}
        shown = {key: spread.gather(shown[key]) for key, spread in some.items()}
    held, lacking = local.elsewhere(p), []
    for key, (moment, ranks) in local.moments(p).items():
        held[key] = local.zeros(moment, ranks, p)
        value = shown.get(key)
        if value is None:
            lacking.append(key)
        else:
            storage.store(value, held[key], moment, ranks, key)
    return held, lacking


def refuse_others(local: LocalPlan, p: Tensor, shown: Mapping[str, Any]) -> None:
    """Refuse moments of a state dict that do not fit a parameter.

    Raises:
        ValueError: names the weight and the moment.
    """
    name, spreads = local.slots[p].name, local.spreads(p)
    shapes = {key: spread.shape for key, spread in spreads.items()} or {
        key: moment.local(ranks) for key, (moment, ranks) in local.moments(p).items()
    }
    for key, shape in shapes.items():
        if key not in shown and state.is_start(key):
            continue
        if key not in shown or tuple(shown[key].shape) != shape:
            has = tuple(shown[key].shape) if key in shown else "nothing"
            raise ValueError(f"{name}: {key} must be {shape}, the state has {has}")
        if spreads and (why := spreads[key].unfit(shown[key])):
            raise ValueError(f"{name}: {key} {why}")


def refuse_other_groups(
    groups: Sequence[Mapping[str, Any]], shown: Sequence[Mapping[str, Any]], sizes: Sequence[int]
) -> None:
    """Refuse the groups of a state dict of other parameters or options.

    Args:
        groups: the optimizer's.
        shown: the state dict's.
        sizes: parameters of each of the optimizer's.

    Raises:
        ValueError: says what differs.
    """
    theirs = [len(group["params"]) for group in shown]
    if theirs != list(sizes):
        raise ValueError(
            f"the state has groups of {theirs} parameters, this optimizer {list(sizes)}"
        )
    for group, other in zip(groups, shown, strict=True):
        if "pion" not in other:
            raise ValueError("the state is not Pion's: it is of another optimizer")
        for option, value in group["pion"].items():
            # An empty list is left out by torch.distributed.checkpoint.
            saved = other["pion"].get(option, [])
            if saved != value:
                raise ValueError(
                    f"the state was made with {option}={saved!r}, this run has {option}={value!r}"
                )
