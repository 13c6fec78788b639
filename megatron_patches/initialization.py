"""``--pion-init``: initial weights that are the same in every layout."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from pion_dist import PionConfig
from pion_dist.classify import ParamInfo, Rotated, classify
from pion_dist.initialization import KINDS
from pion_dist.matrices import MatrixView

from . import transformer_engine
from .parameters import Decisions
from .sharded_state import entries, pieces


@torch.no_grad()
def draw(
    model_chunks: Sequence[torch.nn.Module],
    decisions: Decisions,
    config: PionConfig,
    *,
    kind: str,
    scale: float,
    seed: int,
) -> None:
    """Redraw every weight of Pion's (modified in place).

    A weight is drawn whole, on the CPU, from a seed made of ``seed`` and its place in the model's
    checkpoint; its matrices are shaped, on the weight's device; and each rank keeps its own piece.
    So TP, PP, EP and DP do not change it.

    Args:
        model_chunks: as get_megatron_optimizer gets them.
        decisions: ``parameters.decide`` of these chunks.
        config: by which the matrices were decided.
        kind: of KINDS.
        scale: of the matrices.
        seed: of the run.

    Raises:
        ValueError: a weight's matrices cannot be told from its pieces in a checkpoint.
    """
    rotated = [(info, p) for info, p, decision in decisions if isinstance(decision, Rotated)]
    records = entries(model_chunks, [p for _, p in rotated])
    views = [
        _whole_view(
            info, _pieces(entry, torch.empty(p.shape, dtype=p.dtype, device="meta")), config, kind
        )
        for (info, p), entry in zip(rotated, records, strict=True)
    ]
    for (info, p), entry, view in zip(rotated, records, views, strict=True):
        fp8 = transformer_engine.is_fp8(p)
        own = torch.empty(p.shape, dtype=p.dtype, device=p.device) if fp8 else p
        parts = _pieces(entry, own)
        sources = _sources(parts)
        drawn = [_gaussian(piece, source, seed) for source, piece in sources.items()]
        whole = torch.cat(drawn).to(p.device)
        matrices = view.split(whole)
        for batch in matrices.values():
            for matrix in batch:
                matrix.copy_(KINDS[kind](matrix, scale))
        view.merge(matrices, whole)
        shaped = dict(zip(sources, torch.split(whole, [len(x) for x in drawn]), strict=True))
        for piece in parts:
            row, col = piece.global_offset[piece.prepend_axis_num :]
            height, width = piece.local_shape
            assert piece.data is not None
            piece.data.copy_(shaped[_source(piece)][row : row + height, col : col + width])
        if fp8:
            transformer_engine.start_from(p, own, info.name)


def _pieces(entry: ShardedTensor | ShardedTensorFactory, data: Tensor) -> list[ShardedTensor]:
    """The pieces of a parameter's entry, as views of a tensor in its place."""
    return pieces(dataclasses.replace(entry, data=data))


def _sources(pieces: Sequence[ShardedTensor]) -> dict[str, ShardedTensor]:
    """A piece of each drawing: gate and up are of one or, under keys of their own, of one each."""
    return {_source(piece): piece for piece in pieces}


def _source(piece: ShardedTensor) -> str:
    """What the seed is made of, besides the run's: the key, and the layer or expert."""
    return f"{piece.key} {piece.global_offset[: piece.prepend_axis_num]}"


def _gaussian(piece: ShardedTensor, source: str, seed: int) -> Tensor:
    digest = hashlib.sha256(f"{seed} {source}".encode()).digest()
    generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:7]))
    return torch.randn(*_whole_shape(piece), generator=generator, device="cpu")


def _whole_shape(piece: ShardedTensor) -> tuple[int, int]:
    rows, cols = piece.global_shape[piece.prepend_axis_num :]
    return rows, cols


def _whole_view(
    info: ParamInfo, pieces: Sequence[ShardedTensor], config: PionConfig, kind: str
) -> MatrixView:
    """The matrices of a whole weight, in a checkpoint's order of rows; ``info`` has a shard."""
    if info.gate_interleave and info.tp_size > 1 and kind != "fan_in":
        raise ValueError(
            f"{info.name}: --pion-init {kind} of interleaved gates needs "
            "--expert-tensor-parallel-size 1, since checkpoints have each rank's rows in two "
            "halves; or use --pion-init fan_in"
        )
    shapes = [_whole_shape(piece) for piece in _sources(pieces).values()]
    shape = (sum(rows for rows, _ in shapes), shapes[0][1])
    rows, cols = info.shape
    of_all = {"rows": (info.tp_size * rows, cols), "cols": (rows, info.tp_size * cols)}
    expected = of_all[info.tp_axis] if info.tp_axis else info.shape
    if shape != expected:
        raise ValueError(
            f"{info.name}: --pion-init found a weight of {shape} in the model's checkpoint, not of "
            f"{expected}; leave it to Adam with --pion-exclude, or use --pion-init keep"
        )
    decision = classify(dataclasses.replace(info, shape=shape, tp_size=1), config)
    assert isinstance(decision, Rotated)
    return decision.view
