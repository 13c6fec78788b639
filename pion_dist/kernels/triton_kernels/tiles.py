"""Kernels on square matrices, by tiles of the two folded planes (``fold``).

Moments may be folded or dense. Each tile stands for a tile of the matrix and its mirror image
across the diagonal. One of two mirrored elements is computed and the other is its negative, so a
result is exactly skew.
"""

# Neither a kernel's arguments nor torch.cuda.device_of have Python types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...state import folded_shape
from ..fold import is_folded
from .elementwise import lerp, rounded

# Rows and columns of a tile. Rows of 32 are whole cache lines; with 64 a thread of 8 warps
# needs 215 registers on sm_90, which leaves room for one program on a multiprocessor.
TILE, TILE_WARPS = 32, 4


@triton.jit
def _tile(d, h, TILE: tl.constexpr):
    """Locate this program's tile: its matrix in the batch, and its place in a plane and in X.

    A row of tiles is plane 0's followed by plane 1's. Plane 1's tile on the diagonal comes twice,
    once for each of its triangles.

    Returns:
        Index of the matrix; the tile's corner p, q; how far below and right of it the elements are
        in X; whether the plane is 0.
    """
    across = tl.cdiv(h, TILE)
    tiles = across * (2 * across + 1)
    matrix = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    i = tile // (2 * across + 1)
    j = tile % (2 * across + 1)
    square = j < across
    upper = j > across + i
    j = tl.where(square, j, tl.where(upper, j - across - 1, j - across))
    down, right = tl.where(square | upper, h, 0), tl.where(upper, h, 0)
    return matrix, i * TILE, j * TILE, down, right, square


@triton.jit
def offset(row, col, width):
    """Compute an element's offset in a matrix, which may exceed 2^31."""
    return row.to(tl.int64) * width + col


@triton.jit
def _inside(p, q, d, h, down, right, TILE: tl.constexpr):
    """Mask the elements of a tile that lie in the matrix, and those of its mirror image."""
    i = p + tl.arange(0, TILE) < tl.where(down > 0, d - h, h)
    j = q + tl.arange(0, TILE) < tl.where(right > 0, d - h, h)
    return i[:, None] & j[None, :], j[:, None] & i[None, :]


@triton.jit
def _store(ptr, value, within, inside, triangle, diagonal):
    """Store a tile; mask its triangle, which hinders wide stores, only on the diagonal."""
    if diagonal:
        tl.store(ptr + within, value, mask=inside & triangle)
    else:
        tl.store(ptr + within, value, mask=inside)


@triton.jit
def _skew(x_ptr, a_ptr, x_batch, d, h, scale, TILE: tl.constexpr):
    matrix, p, q, down, right, square = _tile(d, h, TILE)
    inside, inside_t = _inside(p, q, d, h, down, right, TILE)
    i, j = tl.arange(0, TILE)[:, None], tl.arange(0, TILE)[None, :]
    diagonal = (p == q) & (square == 0)
    here, there, within = offset(down + p, right + q, d), offset(right + q, down + p, d), i * d + j
    x = tl.load(x_ptr + matrix * x_batch + here + within, mask=inside, other=0.0)
    mirror = tl.load(x_ptr + matrix * x_batch + there + within, mask=inside_t, other=0.0)
    a = tl.where(diagonal & (i == j), 0.0, scale * (x - tl.trans(mirror)))
    out = a_ptr + matrix * d * d
    own, own_t = tl.where(right > 0, i <= j, i >= j), tl.where(right > 0, i >= j, i <= j)
    _store(out + here, a, within, inside, own, diagonal)
    _store(out + there, tl.trans(-a), within, inside_t, own_t, diagonal)


@triton.jit
def _lie_moments(
    x_ptr,
    m_ptr,
    v_ptr,
    a_ptr,
    grads_finite_ptr,
    x_batch,
    m_batch,
    v_batch,
    d,
    h,
    weight1,
    weight2,
    eps,
    FOLDED: tl.constexpr,
    NESTEROV: tl.constexpr,
    TILE: tl.constexpr,
):
    """Average generators; v_ptr is None without a second moment, a_ptr without a direction."""
    matrix, p, q, down, right, square = _tile(d, h, TILE)
    inside, inside_t = _inside(p, q, d, h, down, right, TILE)
    i, j = tl.arange(0, TILE)[:, None], tl.arange(0, TILE)[None, :]
    diagonal = (p == q) & (square == 0)
    here, there, within = offset(down + p, right + q, d), offset(right + q, down + p, d), i * d + j
    own, own_t = tl.where(right > 0, i <= j, i >= j), tl.where(right > 0, i >= j, i <= j)
    off = i != j
    if FOLDED:
        stored, within_stored = offset(tl.where(square, 0, h) + p, q, h), i * h + j
        flip = tl.where(right > 0, -1.0, 1.0)  # plane 1 has L22's triangle below the diagonal
    else:
        stored, within_stored = here, within
        flip = 1.0
    grads_finite = tl.load(grads_finite_ptr) != 0
    live, live_t = inside & grads_finite, inside_t & grads_finite
    x = tl.load(x_ptr + matrix * x_batch + here + within, mask=inside, other=0.0)
    mirror = tl.load(x_ptr + matrix * x_batch + there + within, mask=inside_t, other=0.0)
    k = x - tl.trans(mirror)

    m_ptr += matrix * m_batch
    m = flip * tl.load(m_ptr + stored + within_stored, mask=inside, other=0.0).to(tl.float32)
    m = rounded(lerp(m, tl.where(grads_finite, k, m), weight1), m_ptr)
    _store(m_ptr + stored, flip * m, within_stored, live, own & off, diagonal)
    if not FOLDED:
        _store(m_ptr + there, tl.trans(-m), within, live_t, own_t & off, diagonal)
    a = m
    if NESTEROV:
        a = lerp(m, tl.where(grads_finite, k, m), weight1)
    if v_ptr is not None:
        v_ptr += matrix * v_batch
        v = tl.load(v_ptr + stored + within_stored, mask=inside, other=0.0).to(tl.float32)
        v = rounded(lerp(v, tl.where(grads_finite, k * k, v), weight2), v_ptr)
        _store(v_ptr + stored, v, within_stored, live, own & off, diagonal)
        if not FOLDED:
            _store(v_ptr + there, tl.trans(v), within, live_t, own_t & off, diagonal)
        a = tl.div_rn(a, tl.sqrt_rn(v) + eps)
    if a_ptr is not None:
        a = tl.where(diagonal & (i == j), 0.0, a)
        out = a_ptr + matrix * d * d
        _store(out + here, a, within, inside, own, diagonal)
        _store(out + there, tl.trans(-a), within, inside_t, own_t, diagonal)


def skew(x_Bdd: Tensor, *, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
    """Compute ``reference.skew``."""
    a = x_Bdd.new_empty(x_Bdd.shape, dtype=dtype)
    d, h, programs, constants = _tiled(x_Bdd)
    with torch.cuda.device_of(x_Bdd):
        _skew[(programs,)](x_Bdd, a, x_Bdd.stride(0), d, h, float(scale), **constants)
    return a


def lie_moments(
    x_Bdd: Tensor,
    m: Tensor,
    v: Tensor | None,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    nesterov: bool,
    grads_finite: Tensor,
    wanted: bool,
) -> Tensor | None:
    """Compute ``reference.lie_moments``."""
    folded = is_folded(m, x_Bdd.shape[-1])
    itself = not folded and m.dtype == torch.float32 and v is None and not nesterov
    a = x_Bdd.new_empty(x_Bdd.shape) if wanted and not itself else None
    d, h, programs, constants = _tiled(x_Bdd)
    with torch.cuda.device_of(x_Bdd):
        _lie_moments[(programs,)](
            x_Bdd,
            m,
            v,
            a,
            grads_finite.view(torch.uint8),
            x_Bdd.stride(0),
            m.stride(0),
            0 if v is None else v.stride(0),
            d,
            h,
            1.0 - beta1,
            1.0 - beta2,
            eps,
            FOLDED=folded,
            NESTEROV=nesterov,
            **constants,
        )
    return m if wanted and itself else a


def _tiled(x_Bdd: Tensor) -> tuple[int, int, int, dict[str, int]]:
    """Return d, h, the number of programs, and the tile's constants."""
    d = x_Bdd.shape[-1]
    h = folded_shape(d)[1]
    across = triton.cdiv(h, TILE)
    programs = len(x_Bdd) * across * (2 * across + 1)
    return d, h, programs, {"TILE": TILE, "num_warps": TILE_WARPS}
