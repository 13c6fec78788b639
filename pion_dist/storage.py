"""Moments as tensors: made, held packed or rounded as ``state`` says, and as matrices."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .kernels import fold, from_eight_bit, to_eight_bit, unfold
from .state import Moment


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype a weight is computed in: float64 for float64, float32 for everything smaller."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def zeros(moment: Moment, ranks: int, p: Tensor) -> Tensor:
    """A moment of a parameter's matrices, as one of ``ranks`` ranks holds it."""
    computed = compute_dtype(p)
    dtypes = {
        "fp64": torch.float64,
        "fp32": computed,
        "bf16": torch.bfloat16,
        "int8": torch.int8,
    }
    return torch.zeros(
        moment.held(ranks, computed.itemsize),
        dtype=dtypes[moment.held_in(computed.itemsize)],
        device=p.device,
    )


def hold(x: Tensor, held: Tensor, moment: Moment, ranks: int, name: str) -> None:
    """Write a moment's matrices as they are held.

    Args:
        x: in the moment's local shape.
        held: as ``zeros`` makes it. (modified in place)
        moment: what it is.
        ranks: that share it.
        name: of the moment, or its key.
    """
    if moment.packed:
        x = fold(x.reshape(-1, *x.shape[-2:])).view(moment.used(ranks))
    if held.dtype == torch.int8:
        x, always = x.to(held.device, torch.float32), held.new_ones((), dtype=torch.bool)
        to_eight_bit(x, held, root=_is_root(name), grads_finite=always)
    else:
        held.copy_(x)


def matrices(held: Tensor, moment: Moment, ranks: int, name: str) -> Tensor:
    """The inverse of ``hold``: first moments are skew, second ones symmetric."""
    shape = moment.local(ranks)
    if held.dtype == torch.int8:
        held = from_eight_bit(held, moment.used(ranks), root=_is_root(name))
    if not moment.packed:
        return held
    flat = unfold(held.reshape(-1, *held.shape[-3:]), shape[-1], skew=not _is_root(name))
    return flat.view(shape)


def used(held: Mapping[str, Tensor], moments: Mapping[str, Moment]) -> dict[str, Tensor]:
    """What a step of whole matrices computes with: moments of 8 bits as float32.

    Args:
        held: a batch's moments, by name.
        moments: what they are.
    """
    return {
        name: from_eight_bit(x, moments[name].used(1), root=_is_root(name))
        if x.dtype == torch.int8
        else x
        for name, x in held.items()
    }


def put_back(
    used: Mapping[str, Tensor], held: Mapping[str, Tensor], *, grads_finite: Tensor
) -> None:
    """Round what ``used`` gave, after a step.

    Args:
        used: stepped.
        held: where it came from. (modified in place)
        grads_finite: boolean scalar; where it is False nothing changes.
    """
    for name, x in held.items():
        if x.dtype == torch.int8:
            to_eight_bit(used[name], x, root=_is_root(name), grads_finite=grads_finite)


def _is_root(name: str) -> bool:
    """Whether a moment is a second one, whose root is kept in 8 bits."""
    return name.startswith("v")
