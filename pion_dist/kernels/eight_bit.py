"""Moments in 8 bits: each block of 128 elements of a matrix has one scale, stored beside its codes.

A block is 130 bytes: 128 codes c and a bf16 scale s. First moments are c s with c in [−127, 127].
Second moments span the square of that range, so their roots are stored: (c s)² with c in [0, 127].
Only zero is stored as zero there, since directions divide by second moments. s is 1/127 of the
largest element. Rounding a rounded moment again changes nothing: c s and the root of its square are
exact in float32, and bf16's error, 2^-8 of 127, is less than half a code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..state import BLOCK

_END = 127  # the largest code
# Smaller scales would make subnormal, inexact products or squares: such blocks are zero.
_SMALLEST, _SMALLEST_ROOT = 2.0**-126, 2.0**-63


def to_eight_bit(x: Tensor, stored: Tensor, *, root: bool, grads_finite: Tensor) -> None:
    """Round matrices to codes.

    Args:
        x: [B, ...], float32; not below zero with ``root``.
        stored: [B, blocks, 130], int8. (modified in place)
        root: whether to store roots, as of second moments.
        grads_finite: boolean scalar; where it is False ``stored`` stays.
    """
    flat = x.flatten(1).sqrt() if root else x.flatten(1)
    padding = stored.shape[1] * BLOCK - flat.shape[1]
    blocks = torch.nn.functional.pad(flat, (0, padding)).view(len(x), -1, BLOCK)
    scale = (blocks.abs().amax(-1, keepdim=True) / _END).bfloat16()
    scale = torch.where(scale < (_SMALLEST_ROOT if root else _SMALLEST), 0.0, scale)
    codes = (blocks / scale.float()).round_().nan_to_num_(0.0, 0.0, 0.0).clamp_(-_END, _END)
    if root:
        codes = torch.maximum(codes, (blocks > 0).float())
    new = torch.cat((codes.to(torch.int8), scale.view(torch.int8)), dim=-1)
    torch.where(grads_finite, new, stored, out=stored)


def from_eight_bit(stored: Tensor, shape: Sequence[int], *, root: bool) -> Tensor:
    """Decode what ``to_eight_bit`` stored.

    Args:
        stored: [B, blocks, 130], int8.
        shape: [B, ...] of the matrices.
        root: whether roots are stored, as of second moments.

    Returns:
        [B, ...], float32.
    """
    x = stored[..., :BLOCK].float().mul_(stored[..., BLOCK:].view(torch.bfloat16))
    if root:
        x.square_()
    return x.flatten(1)[:, : math.prod(shape[1:])].reshape(shape)
