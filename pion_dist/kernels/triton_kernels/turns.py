"""The kernel of a polar step's angles."""

# Neither a kernel's arguments nor torch.cuda.device_of have Python types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import TILE, TILE_WARPS, offset


@triton.jit
def _angles(
    b_ptr,
    transposed_ptr,
    sigma_ptr,
    scale_ptr,
    x_ptr,
    y_ptr,
    c_ptr,
    b_batch,
    transposed_batch,
    rows,
    r,
    first,
    TILE: tl.constexpr,
):
    """Compute angles; a program goes along a tile's rows. transposed_ptr is None if B is square."""
    down = tl.cdiv(rows, TILE)
    matrix = (tl.program_id(0) // down).to(tl.int64)
    i = (tl.program_id(0) % down) * TILE + tl.arange(0, TILE)
    b_ptr += matrix * b_batch
    sigma_ptr += matrix * r
    x_ptr += matrix * rows * r
    y_ptr += matrix * rows * r
    row = tl.load(sigma_ptr + first + i, mask=i < rows, other=0.0)
    length = tl.load(scale_ptr)
    square = length * length
    least = square + 1.1754943508222875e-38  # B is 0 where the length and δ are 0
    norms = tl.zeros([TILE], tl.float32)
    for start in range(0, r, TILE):
        j = start + tl.arange(0, TILE)
        column = tl.load(sigma_ptr + j, mask=j < r, other=0.0)
        inside = (i < rows)[:, None] & (j < r)[None, :]
        here = offset(i[:, None], j[None, :], r)
        b = tl.load(b_ptr + here, mask=inside, other=0.0)
        if transposed_ptr is None:
            inside_t = (j < r)[:, None] & (i < rows)[None, :]
            there = offset(j[:, None], i[None, :], r)
            mirror = tl.trans(tl.load(b_ptr + there, mask=inside_t, other=0.0))
        else:
            mirror = tl.load(
                transposed_ptr + matrix * transposed_batch + here, mask=inside, other=0.0
            )
        plus, minus = b + mirror, b - mirror
        near, far = column[None, :] - row[:, None], column[None, :] + row[:, None]
        p = -0.5 * (plus * near / (plus * plus + near * near + least))
        q = -0.5 * (minus * far / (minus * minus + far * far + least))
        tl.store(x_ptr + here, p + q, mask=inside)
        tl.store(y_ptr + here, p - q, mask=inside)
        norms += tl.sum(mirror * mirror, axis=1)
    beside = tl.maximum(square - norms, 0.0)
    c = row / (beside + row * row + least)
    tl.store(c_ptr + matrix * rows + i, c, mask=i < rows)


def angles(
    b_Bpr: Tensor,
    transposed_Bpr: Tensor | None,
    sigma_Br: Tensor,
    *,
    scale: float | Tensor,
    first: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``reference.angles``."""
    batch, rows, r = b_Bpr.shape
    x, y = (b_Bpr.new_empty(b_Bpr.shape) for _ in range(2))
    c, length = sigma_Br.new_empty(batch, rows), sigma_Br.new_empty(1)
    length.copy_(scale) if isinstance(scale, Tensor) else length.fill_(scale)
    with torch.cuda.device_of(b_Bpr):
        _angles[(batch * triton.cdiv(rows, TILE),)](
            b_Bpr,
            transposed_Bpr,
            sigma_Br.contiguous(),
            length,
            x,
            y,
            c,
            b_Bpr.stride(0),
            0 if transposed_Bpr is None else transposed_Bpr.stride(0),
            rows,
            r,
            first,
            TILE=TILE,
            num_warps=TILE_WARPS,
        )
    return x, y, c
