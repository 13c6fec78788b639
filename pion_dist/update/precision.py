"""Matrix products at a chosen precision, whatever the process's global settings say."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# torch's own names of the float32 precisions, one setting per backend that can lower it.
_IEEE, _TF32 = "ieee", "tf32"


def _settings() -> list[Any]:
    return [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]


@contextlib.contextmanager
def float32_precision(name: str) -> Iterator[None]:
    """Run the block's float32 products at ``name``; the global settings are as before after it.

    torch has no precision argument per product, so where a setting differs it is changed for the
    kernels launched inside and put back on every way out (under 2 us a product).

    Args:
        name: ``ieee`` or ``tf32``.
    """
    others = [(s, s.fp32_precision) for s in _settings() if s.fp32_precision != name]
    try:
        for setting, _ in others:
            setting.fp32_precision = name
        yield
    finally:
        for setting, value in others:
            setting.fp32_precision = value


def exact(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in IEEE arithmetic of their dtype: for what the spectrum depends on to first order."""
    if a.dtype != torch.float32:
        return a @ b
    with float32_precision(_IEEE):
        return a @ b


def fast_tf32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in TF32 with float32 accumulation where the device has it; float64 stays float64."""
    if a.dtype != torch.float32:
        return a @ b
    with float32_precision(_TF32 if a.is_cuda else _IEEE):
        return a @ b


def fast_bf16(a: Tensor, b: Tensor) -> Tensor:
    """Round a and b to bf16, multiply, accumulate and return in float32; float64 stays float64."""
    if a.dtype != torch.float32:
        return a @ b
    low_a, low_b = a.bfloat16(), b.bfloat16()
    if a.is_cuda:
        return torch.bmm(low_a, low_b, out_dtype=torch.float32)
    # The CPU's bf16 product rounds its result to bf16; products of bf16 numbers are exact in
    # float32, so this is the tensor core's arithmetic.
    return exact(low_a.float(), low_b.float())


FAST = {"highest": exact, "high": fast_tf32, "bf16": fast_bf16}
"""The product for generators, the matrix sign and second-order terms, by matmul_precision."""
