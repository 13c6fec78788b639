"""``--pion-init``: initial weights that are the same in every layout."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from .parameters import places


@torch.no_grad()
def fan_in(
    model_chunks: Sequence[torch.nn.Module],
    params: Sequence[torch.nn.Parameter],
    *,
    seed: int,
) -> None:
    """Redraw weights as N(0, 1/fan-in), fan-in being the columns (modified in place).

    A weight is drawn whole, on the CPU, from a seed made of ``seed`` and its place in the model's
    checkpoint, and each rank keeps its own piece: TP, PP, EP and DP do not change it.

    Args:
        model_chunks: as get_megatron_optimizer gets them.
        params: 2-D weights of these chunks.
        seed: of the run.
    """
    for piece in (piece for group in places(model_chunks, params) for piece in group):
        rows, cols = piece.global_shape[piece.prepend_axis_num :]
        row, col = piece.global_offset[piece.prepend_axis_num :]
        height, width = piece.local_shape
        whole = torch.randn(rows, cols, generator=_generator(piece, seed), device="cpu")
        whole.mul_(cols**-0.5)
        assert piece.data is not None
        piece.data.copy_(whole[row : row + height, col : col + width])


def _generator(piece: ShardedTensor, seed: int) -> torch.Generator:
    place = piece.global_offset[: piece.prepend_axis_num]
    digest = hashlib.sha256(f"{seed} {piece.key} {place}".encode()).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:7]))
