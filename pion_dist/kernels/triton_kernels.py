"""``reference`` in Triton, for float32 operands: every operand is read once and written once.

A kernel on square matrices goes over tiles of the two folded planes (see ``fold``), whether the
moments are folded or dense. Each tile stands for a tile of the matrix and its mirror image across
the diagonal. One of two mirrored elements is computed and the other is its negative, so a result is
exactly skew. The other kernels go over a matrix's elements in memory order.

Each matrix of a batch has to be contiguous; ``x_batch`` is the distance from one to the next.
"""

# Neither a kernel's arguments nor torch.cuda.device_of have Python types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..state import folded_shape
from .fold import is_folded

# Rows and columns of a tile. Rows of 32 are whole cache lines; with 64 a thread of 8 warps
# needs 215 registers on sm_90, which leaves room for one program on a multiprocessor.
TILE, TILE_WARPS = 32, 4
# Elements of an elementwise program, and of one that sums: 16 and 32 a thread.
BLOCK, SUM_BLOCK, SUM_WARPS = 2048, 8192, 8


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
def _at(row, col, width):
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
def _lerp(start, end, weight):
    """Interpolate by torch.lerp's two forms, each of which is exact at its own end."""
    difference = end - start
    return tl.where(weight < 0.5, start + weight * difference, end - difference * (1.0 - weight))


@triton.jit
def _rounded(x, ptr):
    """Round x as a store at ptr does."""
    return x.to(ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def _skew(x_ptr, a_ptr, x_batch, d, h, scale, TILE: tl.constexpr):
    matrix, p, q, down, right, square = _tile(d, h, TILE)
    inside, inside_t = _inside(p, q, d, h, down, right, TILE)
    i, j = tl.arange(0, TILE)[:, None], tl.arange(0, TILE)[None, :]
    diagonal = (p == q) & (square == 0)
    here, there, within = _at(down + p, right + q, d), _at(right + q, down + p, d), i * d + j
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
    here, there, within = _at(down + p, right + q, d), _at(right + q, down + p, d), i * d + j
    own, own_t = tl.where(right > 0, i <= j, i >= j), tl.where(right > 0, i >= j, i <= j)
    off = i != j
    if FOLDED:
        stored, within_stored = _at(tl.where(square, 0, h) + p, q, h), i * h + j
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
    m = _rounded(_lerp(m, tl.where(grads_finite, k, m), weight1), m_ptr)
    _store(m_ptr + stored, flip * m, within_stored, live, own & off, diagonal)
    if not FOLDED:
        _store(m_ptr + there, tl.trans(-m), within, live_t, own_t & off, diagonal)
    a = m
    if NESTEROV:
        a = _lerp(m, tl.where(grads_finite, k, m), weight1)
    if v_ptr is not None:
        v_ptr += matrix * v_batch
        v = tl.load(v_ptr + stored + within_stored, mask=inside, other=0.0).to(tl.float32)
        v = _rounded(_lerp(v, tl.where(grads_finite, k * k, v), weight2), v_ptr)
        _store(v_ptr + stored, v, within_stored, live, own & off, diagonal)
        if not FOLDED:
            _store(v_ptr + there, tl.trans(v), within, live_t, own_t & off, diagonal)
        a = tl.div_rn(a, tl.sqrt_rn(v) + eps)
    if a_ptr is not None:
        a = tl.where(diagonal & (i == j), 0.0, a)
        out = a_ptr + matrix * d * d
        _store(out + here, a, within, inside, own, diagonal)
        _store(out + there, tl.trans(-a), within, inside_t, own_t, diagonal)


@triton.jit
def _block(size, BLOCK: tl.constexpr):
    """Return the index of this program's matrix in the batch, and its elements' indices there."""
    blocks = tl.cdiv(size, BLOCK)
    matrix = (tl.program_id(0) // blocks).to(tl.int64)
    return matrix, (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _average(
    m_ptr,
    g_ptr,
    s_ptr,
    grads_finite_ptr,
    m_batch,
    g_batch,
    size,
    weight,
    NESTEROV: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Average gradients; s_ptr is None where m itself is the result."""
    matrix, at = _block(size, BLOCK)
    grads_finite = tl.load(grads_finite_ptr) != 0
    m_ptrs = m_ptr + matrix * m_batch + at
    m = tl.load(m_ptrs, mask=at < size, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + matrix * g_batch + at, mask=at < size, other=0.0)
    m = _rounded(_lerp(m, tl.where(grads_finite, g, m), weight), m_ptr)
    tl.store(m_ptrs, m, mask=(at < size) & grads_finite)
    if s_ptr is not None:
        s = m
        if NESTEROV:
            s = _lerp(m, tl.where(grads_finite, g, m), weight)
        tl.store(s_ptr + matrix * size + at, s, mask=at < size)


@triton.jit
def _moved(
    w_ptr,
    change_ptr,
    grads_finite_ptr,
    w_batch,
    change_batch,
    size,
    BLOCK: tl.constexpr,
):
    matrix, at = _block(size, BLOCK)
    live = (at < size) & (tl.load(grads_finite_ptr) != 0)
    w_ptrs = w_ptr + matrix * w_batch + at
    change = tl.load(change_ptr + matrix * change_batch + at, mask=live, other=0.0)
    tl.store(w_ptrs, tl.load(w_ptrs, mask=live, other=0.0) + change, mask=live)


@triton.jit
def _square_sums(
    x_ptr,
    y_ptr,
    sums_ptr,
    x_batch,
    y_batch,
    size,
    BLOCK: tl.constexpr,
):
    """Sum squares, one sum a program; y_ptr is None without Y."""
    matrix, at = _block(size, BLOCK)
    x = tl.load(x_ptr + matrix * x_batch + at, mask=at < size, other=0.0)
    if y_ptr is not None:
        x += tl.load(y_ptr + matrix * y_batch + at, mask=at < size, other=0.0)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(x * x, axis=0))


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
        here = _at(i[:, None], j[None, :], r)
        b = tl.load(b_ptr + here, mask=inside, other=0.0)
        if transposed_ptr is None:
            inside_t = (j < r)[:, None] & (i < rows)[None, :]
            there = _at(j[:, None], i[None, :], r)
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


@triton.jit
def _roots(sums_ptr, norm_ptr, count, BLOCK: tl.constexpr):
    """Compute the root of each matrix's total; its ``count`` sums are added in a fixed order."""
    matrix = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(sums_ptr + matrix * count + at, mask=at < count, other=0.0)
    tl.store(norm_ptr + matrix, tl.sqrt_rn(tl.sum(total, axis=0)))


def takes(tensors: Sequence[Tensor | None], *, moments: Sequence[int] = ()) -> bool:
    """Tell whether the kernels take these: float32 (but for moments), each matrix contiguous."""
    return all(
        x is None
        or (x.numel() > 0 and x[0].is_contiguous() and (i in moments or x.dtype == torch.float32))
        for i, x in enumerate(tensors)
    )


def skew(x_Bdd: Tensor, *, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
    """Compute ``reference.skew``."""
    a = x_Bdd.new_empty(x_Bdd.shape, dtype=dtype)
    d, h, programs, constants = _tiled(x_Bdd)
    with torch.cuda.device_of(x_Bdd):
        _skew[(programs,)](x_Bdd, a, x_Bdd.stride(0), d, h, float(scale), **constants)
    return a


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


def average(
    m_Bmn: Tensor, g_Bmn: Tensor, *, beta: float, nesterov: bool, grads_finite: Tensor
) -> Tensor:
    """Compute ``reference.average``."""
    itself = m_Bmn.dtype == torch.float32 and not nesterov
    s = None if itself else g_Bmn.new_empty(g_Bmn.shape)
    batch, size = len(g_Bmn), g_Bmn[0].numel()
    with torch.cuda.device_of(g_Bmn):
        _average[(batch * triton.cdiv(size, BLOCK),)](
            m_Bmn,
            g_Bmn,
            s,
            grads_finite.view(torch.uint8),
            m_Bmn.stride(0),
            g_Bmn.stride(0),
            size,
            1.0 - beta,
            NESTEROV=nesterov,
            BLOCK=BLOCK,
        )
    return m_Bmn if s is None else s


def moved(w_Bmn: Tensor, change_Bmn: Tensor, *, grads_finite: Tensor) -> None:
    """Compute ``reference.moved``."""
    batch, size = len(w_Bmn), w_Bmn[0].numel()
    with torch.cuda.device_of(w_Bmn):
        _moved[(batch * triton.cdiv(size, BLOCK),)](
            w_Bmn,
            change_Bmn,
            grads_finite.view(torch.uint8),
            w_Bmn.stride(0),
            change_Bmn.stride(0),
            size,
            BLOCK=BLOCK,
        )


def frobenius(x_Bmn: Tensor, y_Bmn: Tensor | None = None) -> Tensor:
    """Compute ``reference.frobenius``."""
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
    """Return d, h, the number of programs, and the tile's constants."""
    d = x_Bdd.shape[-1]
    h = folded_shape(d)[1]
    across = triton.cdiv(h, TILE)
    programs = len(x_Bdd) * across * (2 * across + 1)
    return d, h, programs, {"TILE": TILE, "num_warps": TILE_WARPS}
