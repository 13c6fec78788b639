"""Pion's state in Megatron's torch_dist checkpoints.

Megatron records state of a weight's own shape. Pion's moments belong to the weight's matrices; they
are recorded here, by part, with the weight's layer or expert.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.dist_checkpointing import optimizer as target
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from pion_dist.state import is_key

from .parameters import pieces

_PREFIX = "optimizer.state."


def apply() -> None:
    """Let Megatron's optimizers record Pion's moments."""
    original = target.make_sharded_optimizer_tensor

    @functools.wraps(original)
    def make_sharded_optimizer_tensor(
        model_param: ShardedTensor | ShardedTensorFactory, optim_param: torch.Tensor, prefix: str
    ) -> Any:
        if is_key(prefix.removeprefix(_PREFIX)):
            return record(model_param, optim_param, prefix)
        return original(model_param, optim_param, prefix)

    target.make_sharded_optimizer_tensor = make_sharded_optimizer_tensor


def record(
    model_param: ShardedTensor | ShardedTensorFactory, moment: torch.Tensor, prefix: str
) -> ShardedTensor:
    """The record of a moment [B, ., .]: the weight's place (layer, expert), the moment's shape.

    Args:
        model_param: the weight's own record.
        moment: of all of a part's matrices.
        prefix: of the key.
    """
    weight = pieces(model_param)[0]
    places = weight.prepend_axis_num
    shape = tuple(moment.shape)
    fragments = weight.axis_fragmentations or weight.global_shape
    return ShardedTensor(
        key=f"{prefix}.{model_param.key}",
        data=moment,
        dtype=moment.dtype,
        local_shape=shape,
        global_shape=(*weight.global_shape[:places], *shape),
        global_offset=(*weight.global_offset[:places], 0, 0, 0),
        axis_fragmentations=(*fragments[:places], 1, 1, 1),
        replica_id=model_param.replica_id,
        prepend_axis_num=places,
    )
