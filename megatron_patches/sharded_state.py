"""Records in Megatron's torch_dist checkpoints: of parameters, and of Pion's moments.

Megatron records state of a weight's own shape. Pion's moments belong to the weight's matrices; they
are recorded here, by part, with the weight's layer or expert.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing import optimizer as target
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import get_param_id_to_sharded_param_map
from torch.utils.weak import WeakTensorKeyDictionary

from pion_dist import Pion
from pion_dist.checkpoint import Record
from pion_dist.state import is_key

_PREFIX = "optimizer.state."
# Kept beside the moments and not on them: torch.save would write an attribute of a tensor too.
_PLACES: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


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
    """The record of a moment: the weight's place (layer, expert), the moment's shape.

    Args:
        model_param: the weight's own record.
        moment: of the part's matrices that this rank has; noted by CheckpointedPion.
        prefix: of the key.
    """
    weight = pieces(model_param)[0]
    place: Record = _PLACES[moment]
    places = weight.prepend_axis_num
    whole, offset, cuts = list(moment.shape), [0] * moment.dim(), [1] * moment.dim()
    for dim, count, index in place.cuts:
        whole[dim] *= count
        offset[dim] = moment.shape[dim] * index
        cuts[dim] = count
    fragments = weight.axis_fragmentations or weight.global_shape
    pp, tp, dp = weight.replica_id
    return ShardedTensor(
        key=f"{prefix}.{model_param.key}",
        data=moment,
        dtype=moment.dtype,
        local_shape=tuple(moment.shape),
        global_shape=(*weight.global_shape[:places], *whole),
        global_offset=(*weight.global_offset[:places], *offset),
        axis_fragmentations=(*fragments[:places], *cuts),
        replica_id=(pp, tp + place.replica, dp),
        prepend_axis_num=places,
    )


class CheckpointedPion(Pion):
    """Pion whose ``state_dict`` says of every moment where it lies among all ranks'."""

    def state_dict(self) -> dict[str, Any]:
        """As Pion's, each moment's place noted for ``record``."""
        shown = super().state_dict()
        for index, key, place in self.records():
            _PLACES[shown["state"][index][key]] = place
        return shown

    def _warn_of_zeros(self, params: Iterable[torch.Tensor]) -> None:
        """Say nothing: ``parameters.decide`` has, of weights whose initial values are known."""


def entries(
    model_chunks: Sequence[torch.nn.Module], params: Sequence[torch.nn.Parameter]
) -> list[ShardedTensor | ShardedTensorFactory]:
    """Where each parameter's data lies in the whole model, as Megatron's checkpoints name it.

    Args:
        model_chunks: as get_megatron_optimizer gets them.
        params: parameters of these chunks.

    Returns:
        For each parameter its entry in a checkpoint, whose ``pieces`` are views of the parameter:
        one, or two for a gated weight.

    Raises:
        RuntimeError: a parameter is in no chunk's sharded state.
    """
    if not params:  # of which Megatron would warn
        return []
    sharded = {
        index: chunk.sharded_state_dict()  # type: ignore[operator]
        for index, chunk in enumerate(model_chunks)
    }
    by_index = get_param_id_to_sharded_param_map(sharded, params)
    if len(by_index) != len(params):
        raise RuntimeError(
            f"{len(params) - len(by_index)} parameters are not in the model's sharded_state_dict()"
        )
    return [by_index[index] for index in range(len(params))]


def pieces(entry: ShardedTensor | ShardedTensorFactory) -> list[ShardedTensor]:
    """The sharded tensors of a model parameter's checkpoint entry."""
    if isinstance(entry, ShardedTensorFactory):
        built = entry.build()
        assert isinstance(built, list), "gated weights build a list of gate and up"
        return built
    return [entry]
