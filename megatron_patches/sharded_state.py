"""Pion's state in Megatron's torch_dist checkpoints.

Averages of the gradient have their weight's shape and are recorded as Adam's are. Lie moments have
the shapes of generators, which Megatron refuses; they are recorded here.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.dist_checkpointing import optimizer as target
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from pion_dist.state import is_lie_key

from .parameters import pieces

_PREFIX = "optimizer.state."


def apply() -> None:
    """Let Megatron's optimizers record Lie moments."""
    original = target.make_sharded_optimizer_tensor

    @functools.wraps(original)
    def make_sharded_optimizer_tensor(
        model_param: ShardedTensor | ShardedTensorFactory, optim_param: torch.Tensor, prefix: str
    ) -> Any:
        if is_lie_key(prefix.removeprefix(_PREFIX)):
            return lie_record(model_param, optim_param, prefix)
        return original(model_param, optim_param, prefix)

    target.make_sharded_optimizer_tensor = make_sharded_optimizer_tensor


def lie_record(
    model_param: ShardedTensor | ShardedTensorFactory, moment_Bdd: torch.Tensor, prefix: str
) -> ShardedTensor:
    """The record of a Lie moment [B, d, d]: the weight's place (layer, expert), the moment's shape.

    Args:
        model_param: the weight's own record.
        moment_Bdd: of all of the weight's matrices.
        prefix: of the key.
    """
    weight = pieces(model_param)[0]
    places = weight.prepend_axis_num
    shape = tuple(moment_Bdd.shape)
    fragments = weight.axis_fragmentations or weight.global_shape
    return ShardedTensor(
        key=f"{prefix}.{model_param.key}",
        data=moment_Bdd,
        dtype=moment_Bdd.dtype,
        local_shape=shape,
        global_shape=(*weight.global_shape[:places], *shape),
        global_offset=(*weight.global_offset[:places], 0, 0, 0),
        axis_fragmentations=(*fragments[:places], 1, 1, 1),
        replica_id=model_param.replica_id,
        prepend_axis_num=places,
    )
