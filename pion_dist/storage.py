"""Moments as tensors: allocated, stored packed or rounded as ``state`` says, read as matrices."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .kernels import fold, from_eight_bit, to_eight_bit, unfold
from .state import Moment


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype that computes a weight: float64 for float64, float32 for the smaller."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def zeros(moment: Moment, ranks: int, p: Tensor, *, on_host: bool) -> Tensor:
    """Allocate a moment of a parameter's matrices, as one of ``ranks`` ranks stores it.

    Args:
        moment: its description.
        ranks: number of ranks that share it.
        p: the parameter.
        on_host: whether it is in host memory (pinned, for a GPU's copies), not on p's device.
    """
    shape, dtype = moment.held(ranks, compute_dtype(p).itemsize), dtype_of(moment, p)
    if on_host and not p.is_meta:
        return torch.zeros(shape, dtype=dtype, device="cpu", pin_memory=p.is_cuda)
    return torch.zeros(shape, dtype=dtype, device=p.device)


def dtype_of(moment: Moment, p: Tensor) -> torch.dtype:
    """Return the dtype in which a moment of a parameter's matrices is held."""
    computed = compute_dtype(p)
    dtypes = {
        "fp64": torch.float64,
        "fp32": computed,
        "bf16": torch.bfloat16,
        "int8": torch.int8,
    }
    return dtypes[moment.held_in(computed.itemsize)]


def store(x: Tensor, stored: Tensor, moment: Moment, ranks: int, name: str) -> None:
    """Write a moment's matrices in their stored form.

    Args:
        x: matrices in the moment's local shape.
        stored: a tensor of ``zeros``. (modified in place)
        moment: its description.
        ranks: number of ranks that share it.
        name: name of the moment, or its key.
    """
    if moment.packed:
        x = fold(x.reshape(-1, *x.shape[-2:])).view(moment.used(ranks))
    if stored.dtype == torch.int8:
        x, always = x.to(stored.device, torch.float32), stored.new_ones((), dtype=torch.bool)
        to_eight_bit(x, stored, root=_is_root(name), grads_finite=always)
    else:
        stored.copy_(x)


def matrices(stored: Tensor, moment: Moment, ranks: int, name: str) -> Tensor:
    """Read a moment's matrices, the inverse of ``store``: skew first or symmetric second ones."""
    shape = moment.local(ranks)
    if stored.dtype == torch.int8:
        stored = from_eight_bit(stored, moment.used(ranks), root=_is_root(name))
    if not moment.packed:
        return stored
    flat = unfold(stored.reshape(-1, *stored.shape[-3:]), shape[-1], skew=not _is_root(name))
    return flat.view(shape)


def decode(stored: Mapping[str, Tensor], moments: Mapping[str, Moment]) -> dict[str, Tensor]:
    """Return moments as a step of whole matrices computes them: those of 8 bits as float32.

    Args:
        stored: a batch's moments, by name.
        moments: their descriptions, by name.
    """
    return {
        name: from_eight_bit(x, moments[name].used(1), root=_is_root(name))
        if x.dtype == torch.int8
        else x
        for name, x in stored.items()
    }


def encode(
    decoded: Mapping[str, Tensor], stored: Mapping[str, Tensor], *, grads_finite: Tensor
) -> None:
    """Round the moments that ``decode`` returned, after a step has changed them.

    Args:
        decoded: moments after the step, by name.
        stored: the moments they were decoded from. (modified in place)
        grads_finite: boolean scalar; where it is False nothing changes.
    """
    for name, x in stored.items():
        if x.dtype == torch.int8:
            to_eight_bit(decoded[name], x, root=_is_root(name), grads_finite=grads_finite)


def _is_root(name: str) -> bool:
    """Tell whether a moment is a second one, of which 8 bits store the root."""
    return name.startswith("v")
