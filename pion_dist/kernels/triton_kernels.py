"""``reference`` in Triton, for float32 operands: every operand is read once and written once.

A kernel on square matrices goes over tiles of the two folded planes (see ``fold``), each of which
is a tile of the matrix and its mirror image across the diagonal, whichever layout the moments
have. Of two mirrored elements one is computed, the other is its negative: so a result is exactly
skew. The other kernels go over a matrix's elements in the order in which they lie in memory.

Each matrix of a batch has to be contiguous; ``x_batch`` is the distance from one to the next.
"""

# Triton and torch.cuda.device_of have no types.
# mypy: disable-error-code="untyped-decorator, no-untyped-call"

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fold import folded_shape

# Rows and columns of a tile, which has a warp for each 8 rows. The small one is for heads.
TILE, SMALL_TILE = 64, 32
# Elements of a program that maps, and of one that sums: 16 and 32 a thread.
BLOCK, SUM_BLOCK, SUM_WARPS = 2048, 8192, 8


@triton.jit
def _tile(d: Any, h: Any, TILE: tl.constexpr) -> Any:
    """This program's tile: its matrix in the batch, its indices in a plane, its place in X.

    A row of tiles is plane 0's and then plane 1's, whose tile on the diagonal comes twice: once
    for each of its triangles.

    Returns:
        The matrix; p [TILE] and q [TILE], which may be past the edge; how far down and right of
        them the elements are in X; whether the plane is 0.
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
    steps = tl.arange(0, TILE)
    down, right = tl.where(square | upper, h, 0), tl.where(upper, h, 0)
    return matrix, i * TILE + steps, j * TILE + steps, down, right, square


@triton.jit
def _own(p: Any, q: Any, d: Any, h: Any, down: Any, right: Any, square: Any) -> Any:
    """Which elements p, q of a tile are its program's, without and with the diagonal."""
    inside = (p < tl.where(down > 0, d - h, h)) & (q < tl.where(right > 0, d - h, h))
    own = inside & (square | tl.where(right > 0, p < q, p > q))
    return own, inside & (own | (p == q))


@triton.jit
def _lerp(start: Any, end: Any, weight: Any) -> Any:
    """torch.lerp's two forms, of which each is exact at its own end."""
    difference = end - start
    return tl.where(weight < 0.5, start + weight * difference, end - difference * (1.0 - weight))


@triton.jit
def _skew(
    x_ptr: Any, a_ptr: Any, x_batch: Any, d: Any, h: Any, scale: Any, TILE: tl.constexpr
) -> None:
    matrix, p, q, down, right, square = _tile(d, h, TILE)
    own, full = _own(p[:, None], q[None, :], d, h, down, right, square)
    own_t, full_t = _own(p[None, :], q[:, None], d, h, down, right, square)
    row, col = (down + p).to(tl.int64), (right + q).to(tl.int64)
    here, there = row[:, None] * d + col[None, :], col[:, None] * d + row[None, :]
    # Elements that are not this program's are 0 from here on, the diagonal among them.
    x = tl.load(x_ptr + matrix * x_batch + here, mask=own, other=0.0)
    mirror = tl.load(x_ptr + matrix * x_batch + there, mask=own_t, other=0.0)
    a = scale * (x - tl.trans(mirror))
    out = a_ptr + matrix * d * d
    tl.store(out + here, a.to(a_ptr.dtype.element_ty), mask=full)
    tl.store(out + there, tl.trans(-a).to(a_ptr.dtype.element_ty), mask=full_t)


@triton.jit
def _lie_moments(
    x_ptr: Any,
    m_ptr: Any,
    v_ptr: Any,
    a_ptr: Any,
    ok_ptr: Any,
    x_batch: Any,
    m_batch: Any,
    v_batch: Any,
    d: Any,
    h: Any,
    weight1: Any,
    weight2: Any,
    eps: Any,
    FOLDED: tl.constexpr,
    NESTEROV: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """v_ptr is None without a second moment, a_ptr where no direction is wanted."""
    matrix, p, q, down, right, square = _tile(d, h, TILE)
    own, full = _own(p[:, None], q[None, :], d, h, down, right, square)
    own_t, full_t = _own(p[None, :], q[:, None], d, h, down, right, square)
    row, col = (down + p).to(tl.int64), (right + q).to(tl.int64)
    here, there = row[:, None] * d + col[None, :], col[:, None] * d + row[None, :]
    ok = tl.load(ok_ptr) != 0
    x = tl.load(x_ptr + matrix * x_batch + here, mask=own, other=0.0)  # others are 0: see _skew
    mirror = tl.load(x_ptr + matrix * x_batch + there, mask=own_t, other=0.0)
    k = x - tl.trans(mirror)
    if FOLDED:
        held = tl.where(square, 0, h).to(tl.int64) * h + p.to(tl.int64)[:, None] * h + q[None, :]
        flip = tl.where(right > 0, -1.0, 1.0)  # plane 1 has of L22 what is below the diagonal
    else:
        held = here
        flip = 1.0
    m_ptrs = m_ptr + matrix * m_batch
    m = flip * tl.load(m_ptrs + held, mask=own, other=0.0).to(tl.float32)
    stored = _lerp(m, tl.where(ok, k, m), weight1).to(m_ptr.dtype.element_ty)
    m = stored.to(tl.float32)
    tl.store(m_ptrs + held, (flip * m).to(m_ptr.dtype.element_ty), mask=own & ok)
    if not FOLDED:
        tl.store(m_ptrs + there, tl.trans(-m).to(m_ptr.dtype.element_ty), mask=own_t & ok)
    a = m
    if NESTEROV:
        a = _lerp(m, tl.where(ok, k, m), weight1)
    if v_ptr is not None:
        v_ptrs = v_ptr + matrix * v_batch
        v = tl.load(v_ptrs + held, mask=own, other=0.0).to(tl.float32)
        kept = _lerp(v, tl.where(ok, k * k, v), weight2).to(v_ptr.dtype.element_ty)
        tl.store(v_ptrs + held, kept, mask=own & ok)
        if not FOLDED:
            tl.store(v_ptrs + there, tl.trans(kept), mask=own_t & ok)
        a = tl.div_rn(a, tl.sqrt_rn(kept.to(tl.float32)) + eps)
    if a_ptr is not None:
        out = a_ptr + matrix * d * d
        tl.store(out + here, a, mask=full)
        tl.store(out + there, tl.trans(-a), mask=full_t)


@triton.jit
def _block(size: Any, BLOCK: tl.constexpr) -> Any:
    """This program's matrix in the batch and its elements' indices there."""
    blocks = tl.cdiv(size, BLOCK)
    matrix = (tl.program_id(0) // blocks).to(tl.int64)
    return matrix, (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _average(
    m_ptr: Any,
    g_ptr: Any,
    s_ptr: Any,
    ok_ptr: Any,
    m_batch: Any,
    g_batch: Any,
    size: Any,
    weight: Any,
    NESTEROV: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """s_ptr is None where m itself is the result."""
    matrix, at = _block(size, BLOCK)
    ok = tl.load(ok_ptr) != 0
    m_ptrs = m_ptr + matrix * m_batch + at
    m = tl.load(m_ptrs, mask=at < size, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + matrix * g_batch + at, mask=at < size, other=0.0)
    stored = _lerp(m, tl.where(ok, g, m), weight).to(m_ptr.dtype.element_ty)
    tl.store(m_ptrs, stored, mask=(at < size) & ok)
    if s_ptr is not None:
        s = stored.to(tl.float32)
        if NESTEROV:
            s = _lerp(s, tl.where(ok, g, s), weight)
        tl.store(s_ptr + matrix * size + at, s, mask=at < size)


@triton.jit
def _moved(
    w_ptr: Any,
    change_ptr: Any,
    ok_ptr: Any,
    w_batch: Any,
    change_batch: Any,
    size: Any,
    BLOCK: tl.constexpr,
) -> None:
    matrix, at = _block(size, BLOCK)
    live = (at < size) & (tl.load(ok_ptr) != 0)
    w_ptrs = w_ptr + matrix * w_batch + at
    change = tl.load(change_ptr + matrix * change_batch + at, mask=live, other=0.0)
    tl.store(w_ptrs, tl.load(w_ptrs, mask=live, other=0.0) + change, mask=live)


@triton.jit
def _square_sums(
    x_ptr: Any,
    y_ptr: Any,
    sums_ptr: Any,
    x_batch: Any,
    y_batch: Any,
    size: Any,
    BLOCK: tl.constexpr,
) -> None:
    """One sum a program; y_ptr is None without Y."""
    matrix, at = _block(size, BLOCK)
    x = tl.load(x_ptr + matrix * x_batch + at, mask=at < size, other=0.0)
    if y_ptr is not None:
        x += tl.load(y_ptr + matrix * y_batch + at, mask=at < size, other=0.0)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(x * x, axis=0))


@triton.jit
def _roots(sums_ptr: Any, norm_ptr: Any, count: Any, BLOCK: tl.constexpr) -> None:
    """The root of the sum of each matrix's ``count`` sums, which are added in a fixed order."""
    matrix = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(sums_ptr + matrix * count + at, mask=at < count, other=0.0)
    tl.store(norm_ptr + matrix, tl.sqrt_rn(tl.sum(total, axis=0)))


def takes(tensors: Sequence[Tensor | None], *, moments: Sequence[int] = ()) -> bool:
    """Whether the kernels run on these: float32 (some moments aside), each matrix contiguous."""
    return all(
        x is None
        or (x.numel() > 0 and x[0].is_contiguous() and (i in moments or x.dtype == torch.float32))
        for i, x in enumerate(tensors)
    )


def skew(x_Bdd: Tensor, *, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
    """As ``reference.skew``."""
    a = torch.empty(x_Bdd.shape, dtype=dtype or x_Bdd.dtype, device=x_Bdd.device)
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
    ok: Tensor,
    wanted: bool,
) -> Tensor | None:
    """As ``reference.lie_moments``."""
    folded = m.dim() == 4
    itself = not folded and m.dtype == torch.float32 and v is None and not nesterov
    a = torch.empty(x_Bdd.shape, device=x_Bdd.device) if wanted and not itself else None
    d, h, programs, constants = _tiled(x_Bdd)
    with torch.cuda.device_of(x_Bdd):
        _lie_moments[(programs,)](
            x_Bdd,
            m,
            v,
            a,
            ok.view(torch.uint8),
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


def average(m_Bmn: Tensor, g_Bmn: Tensor, *, beta: float, nesterov: bool, ok: Tensor) -> Tensor:
    """As ``reference.average``."""
    itself = m_Bmn.dtype == torch.float32 and not nesterov
    s = None if itself else torch.empty(g_Bmn.shape, device=g_Bmn.device)
    batch, size = len(g_Bmn), g_Bmn[0].numel()
    with torch.cuda.device_of(g_Bmn):
        _average[(batch * triton.cdiv(size, BLOCK),)](
            m_Bmn,
            g_Bmn,
            s,
            ok.view(torch.uint8),
            m_Bmn.stride(0),
            g_Bmn.stride(0),
            size,
            1.0 - beta,
            NESTEROV=nesterov,
            BLOCK=BLOCK,
        )
    return m_Bmn if s is None else s


def moved(w_Bmn: Tensor, change_Bmn: Tensor, *, ok: Tensor) -> None:
    """As ``reference.moved``."""
    batch, size = len(w_Bmn), w_Bmn[0].numel()
    with torch.cuda.device_of(w_Bmn):
        _moved[(batch * triton.cdiv(size, BLOCK),)](
            w_Bmn,
            change_Bmn,
            ok.view(torch.uint8),
            w_Bmn.stride(0),
            change_Bmn.stride(0),
            size,
            BLOCK=BLOCK,
        )


def frobenius(x_Bmn: Tensor, y_Bmn: Tensor | None = None) -> Tensor:
    """As ``reference.frobenius``."""
    batch, size = len(x_Bmn), x_Bmn[0].numel()
    count = triton.cdiv(size, SUM_BLOCK)
    sums, norm = x_Bmn.new_empty(batch, count), x_Bmn.new_empty(batch, 1, 1)
    with torch.cuda.device_of(x_Bmn):
        _square_sums[(batch * count,)](
            x_Bmn,
            y_Bmn,
            sums,
            x_Bmn.stride(0),
            0 if y_Bmn is None else y_Bmn.stride(0),
            size,
            BLOCK=SUM_BLOCK,
            num_warps=SUM_WARPS,
        )
        _roots[(batch,)](sums, norm, count, BLOCK=BLOCK)
    return norm


def _tiled(x_Bdd: Tensor) -> tuple[int, int, int, dict[str, int]]:
    """d, h, the number of programs, and the tile's constants."""
    d = x_Bdd.shape[-1]
    h = folded_shape(d)[1]
    tile = TILE if h > SMALL_TILE else SMALL_TILE
    across = triton.cdiv(h, tile)
    return d, h, len(x_Bdd) * across * (2 * across + 1), {"TILE": tile, "num_warps": tile // 8}
