"""Moments in 8 bits: one scale for each block of 128 elements of a matrix, kept beside its codes.

A block is 130 bytes: 128 codes c and a bf16 scale s. First moments are c s with c in [−127, 127].
Second moments span the square of that, so that their roots are kept, (c s)² with c in [0, 127],
and none but zero as zero, since directions divide by them. s is 1/127 of the largest element: c s
and its square's root are exact in float32, bf16's 2^-8 of 127 are less than half a code, and so
what has been rounded once is rounded to itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..state import BLOCK

_END = 127  # the largest code
# Below them the products, or squares, would be subnormal, and not exact: such blocks are zero.
_SMALLEST, _SMALLEST_ROOT = 2.0**-126, 2.0**-63


def to_eight_bit(x: Tensor, held: Tensor, *, root: bool, grads_finite: Tensor) -> None:
    """Round matrices to codes.

    Args:
        x: [B, ...], float32; not below zero with ``root``.
        held: [B, blocks, 130], int8. (modified in place)
        root: of second moments.
        grads_finite: boolean scalar; where it is False ``held`` stays.
    """
    flat = x.flatten(1).sqrt() if root else x.flatten(1)
    padding = held.shape[1] * BLOCK - flat.shape[1]
    blocks = torch.nn.functional.pad(flat, (0, padding)).view(len(x), -1, BLOCK)
    scale = (blocks.abs().amax(-1, keepdim=True) / _END).bfloat16()
    scale = torch.where(scale < (_SMALLEST_ROOT if root else _SMALLEST), 0.0, scale)
    codes = (blocks / scale.float()).round_().nan_to_num_(0.0, 0.0, 0.0).clamp_(-_END, _END)
    if root:
        codes = torch.maximum(codes, (blocks > 0).float())
    new = torch.cat((codes.to(torch.int8), scale.view(torch.int8)), dim=-1)
    torch.where(grads_finite, new, held, out=held)


def from_eight_bit(held: Tensor, shape: Sequence[int], *, root: bool) -> Tensor:
    """The matrices of ``to_eight_bit``.

    Args:
        held: [B, blocks, 130], int8.
        shape: [B, ...] of the matrices.
        root: of second moments.

    Returns:
        [B, ...], float32.
    """
    x = held[..., :BLOCK].float().mul_(held[..., BLOCK:].view(torch.bfloat16))
    if root:
        x.square_()
    return x.flatten(1)[:, : math.prod(shape[1:])].reshape(shape)
