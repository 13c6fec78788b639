"""Kernels that go over a matrix's elements in memory order."""

# Neither a kernel's arguments nor torch.cuda.device_of have Python types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of an elementwise program, and of one that sums: 16 and 32 a thread.
BLOCK, SUM_BLOCK, SUM_WARPS = 2048, 8192, 8


@triton.jit
def lerp(start, end, weight):
    """Interpolate by torch.lerp's two forms, each of which is exact at its own end."""
    difference = end - start
    return tl.where(weight < 0.5, start + weight * difference, end - difference * (1.0 - weight))


@triton.jit
def rounded(x, ptr):
    """Round x as a store at ptr does."""
    return x.to(ptr.dtype.element_ty).to(tl.float32)


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
    m = rounded(lerp(m, tl.where(grads_finite, g, m), weight), m_ptr)
    tl.store(m_ptrs, m, mask=(at < size) & grads_finite)
    if s_ptr is not None:
        s = m
        if NESTEROV:
            s = lerp(m, tl.where(grads_finite, g, m), weight)
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
def _roots(sums_ptr, norm_ptr, count, BLOCK: tl.constexpr):
    """Compute the root of each matrix's total; its ``count`` sums are added in a fixed order."""
    matrix = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(sums_ptr + matrix * count + at, mask=at < count, other=0.0)
    tl.store(norm_ptr + matrix, tl.sqrt_rn(tl.sum(total, axis=0)))


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
