"""Run a script with Transformer Engine's Python on the CPU: python te_on_cpu.py SCRIPT [ARGS…]

The kernels that writing FP8 weights needs are torch operations here.
Its layers can be built then, with weights in FP8, and Megatron's optimizers write them; no layer
can run. What this checks is which rank writes what, when and with which scale. TE's own kernels
and their rounding are not in it.
"""

from __future__ import annotations

import contextlib
import functools
import runpy
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import megatron_patches
from megatron_patches import cpu_device, fused_adam

BLOCK = 128
TORCH = {"kFloat8E4M3": torch.float8_e4m3fn, "kFloat8E5M2": torch.float8_e5m2}


def main() -> None:
    """As python -m megatron_patches --cpu does, but with Transformer Engine in Megatron's sight."""
    cpu_device.install()
    install()
    cpu_device.patch_megatron()
    gather_one_by_one()
    megatron_patches.apply()
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
    runpy.run_path(sys.argv[0], run_name="__main__")


def gather_one_by_one() -> None:
    """Spare gloo buckets of bf16 and of bytes at a time, which it would join as numbers."""
    from megatron.core.distributed import param_and_grad_buffer as target

    @contextlib.contextmanager
    def apart(*_args: Any, **_options: Any) -> Iterator[Any]:
        yield types.SimpleNamespace(wait=lambda: None)

    def at_once(collective: Any) -> Any:
        @functools.wraps(collective)
        def call(*args: Any, async_op: bool = False, **options: Any) -> Any:
            return collective(*args, async_op=False, **options)

        return call

    target._coalescing_manager = apart
    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        setattr(target, name, at_once(getattr(target, name)))


def install() -> None:
    """Import Transformer Engine and replace its kernels."""
    del sys.modules["transformer_engine"]  # cpu_device hides it
    import transformer_engine.pytorch as te  # noqa: F401  loads the library
    import transformer_engine_torch as tex
    from transformer_engine.pytorch import optimizers
    from transformer_engine.pytorch.tensor import utils

    for kernel in (
        *(quantize, compute_amax, fp8_transpose, multi_tensor_scale),
        *(multi_tensor_compute_scale_and_scale_inv, fp8_block_scaling_compute_partial_amax),
        fp8_block_scaling_partial_cast,
    ):
        setattr(tex, kernel.__name__, kernel)
        if hasattr(utils, kernel.__name__):  # imported by name
            setattr(utils, kernel.__name__, kernel)
    for name, value in (
        ("FusedAdam", fused_adam.FusedAdam),
        ("FusedSGD", torch.optim.SGD),
        ("multi_tensor_scale", multi_tensor_scale),
        ("multi_tensor_scale_tensor", multi_tensor_scale),
        ("multi_tensor_l2norm", multi_tensor_l2norm),
    ):
        setattr(optimizers, name, value)


def fp8(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes of x * scale, rounded and saturated (torch's cast to e5m2 goes to infinity)."""
    limit = torch.finfo(dtype).max
    return (x.float() * scale).clamp(-limit, limit).to(dtype).view(torch.uint8)


def scale_of(amax: Tensor, dtype: torch.dtype, *, power_of_2: bool, epsilon: float) -> Tensor:
    """By which values of at most ``amax`` fill the format; 1 where they are all zero."""
    scale = torch.finfo(dtype).max / amax.clamp(min=epsilon)
    scale = torch.where(amax.clamp(min=epsilon) == 0, 1.0, scale).float()
    return torch.exp2(torch.floor(torch.log2(scale))) if power_of_2 else scale


def blocks(x: Tensor) -> Tensor:
    """[rows, cols] as [row blocks, 128, column blocks, 128], padded by zeros."""
    rows, cols = x.shape
    padded = torch.nn.functional.pad(x, (0, -cols % BLOCK, 0, -rows % BLOCK))
    return padded.view(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)


def amax_of_blocks(x: Tensor) -> Tensor:
    return blocks(x.float().abs()).amax((1, 3))


def each(scale: Tensor, shape: Sequence[int]) -> Tensor:
    """A scale for each element, of scales [row blocks, at least column blocks]."""
    rows, cols = shape
    return scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:rows, :cols]


# ---------------------------------------------------------------- kernels, by their own names


def quantize(src: Tensor, quantizer: Any, dst: Any = None, noop: Any = None) -> Any:
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer

    src = src.detach()
    dtype = TORCH[quantizer.dtype.name]
    if isinstance(quantizer, Float8BlockQuantizer):
        return _quantize_blocks(src, quantizer, dst, dtype)
    amax = src.float().abs().amax()
    if isinstance(quantizer, Float8Quantizer):  # the scale is given, of earlier steps
        scale = quantizer.scale.view(())
        if quantizer.amax.numel():
            quantizer.amax.view(()).copy_(torch.maximum(quantizer.amax.view(()), amax))
    else:
        scale = scale_of(
            amax,
            dtype,
            power_of_2=quantizer.force_pow_2_scales,
            epsilon=quantizer.amax_epsilon,
        )
    data = fp8(src, scale, dtype)
    if dst is None:
        dst = _empty(quantizer, src, data)
    dst._data.view(-1).copy_(data.view(-1))
    dst._scale_inv.view(()).copy_(1.0 / scale)
    if quantizer.columnwise_usage and src.dim() == 2 and dst._data.shape == src.shape:
        dst._transpose = fp8_transpose(dst._data, None, out=dst._transpose)
        dst._transpose_invalid = False
    return dst


def _empty(quantizer: Any, src: Tensor, data: Tensor) -> Any:
    from transformer_engine.pytorch.tensor import Float8Tensor

    return Float8Tensor(
        shape=src.shape,
        dtype=src.dtype,
        data=torch.empty_like(data),
        fp8_scale_inv=torch.empty(1),
        fp8_dtype=quantizer.dtype,
        quantizer=quantizer,
        device=torch.device("cpu"),
    )


def _quantize_blocks(src: Tensor, quantizer: Any, dst: Any, dtype: torch.dtype) -> Any:
    from transformer_engine.pytorch.tensor import Float8BlockwiseQTensor

    if dst is None:
        dst = Float8BlockwiseQTensor(
            shape=src.shape,
            dtype=src.dtype,
            rowwise_data=torch.empty(src.shape, dtype=torch.uint8),
            rowwise_scale_inv=torch.zeros(quantizer.get_scale_shape(src.shape, False)),
            columnwise_data=None,
            columnwise_scale_inv=None,
            fp8_dtype=quantizer.dtype,
            quantizer=quantizer,
            is_2D_scaled=True,
            device=torch.device("cpu"),
        )
    scale = scale_of(
        amax_of_blocks(src),
        dtype,
        power_of_2=quantizer.force_pow_2_scales,
        epsilon=quantizer.amax_epsilon,
    )
    dst._rowwise_data.copy_(fp8(src, each(scale, src.shape), dtype))
    dst._rowwise_scale_inv[:, : scale.shape[1]].copy_(1.0 / scale)
    if quantizer.columnwise_usage:
        dst._create_columnwise()
    return dst


def compute_amax(tensor: Tensor, amax: Tensor) -> None:
    amax.view(()).copy_(tensor.float().abs().amax())


def fp8_transpose(data: Tensor, _dtype: Any, *, out: Tensor | None = None) -> Tensor:
    transposed = data.mT.contiguous()
    return transposed if out is None else out.copy_(transposed)


def multi_tensor_scale(_chunk: int, _noop: Tensor, lists: Any, factor: float | Tensor) -> None:
    for src, dst in zip(*lists, strict=True):
        dst.copy_(src * factor)


def multi_tensor_l2norm(
    _chunk: int, _noop: Tensor, lists: Any, _per_tensor: bool
) -> tuple[Tensor, None]:
    return torch.stack([x.norm() for x in lists[0]]).norm().view(1), None


def multi_tensor_compute_scale_and_scale_inv(
    _chunk: int, _noop: Tensor, lists: Any, limit: float, power_of_2: bool, epsilon: float
) -> None:
    (dtype,) = (t for t in TORCH.values() if torch.finfo(t).max == limit)
    for amax, scale, scale_inv in zip(*lists, strict=True):
        scale.copy_(scale_of(amax, dtype, power_of_2=power_of_2, epsilon=epsilon))
        scale_inv.copy_(1.0 / scale)


def fp8_block_scaling_compute_partial_amax(
    tensor: Tensor, amax: Tensor, rows: int, cols: int, start: int, block: int
) -> None:
    assert block == BLOCK
    whole = tensor.new_zeros(rows * cols)
    whole[start : start + tensor.numel()] = tensor.flatten()
    block_amax = amax_of_blocks(whole.view(rows, cols))
    amax[:, : block_amax.shape[1]] = block_amax


def fp8_block_scaling_partial_cast(
    src: Tensor,
    dst: Tensor,
    scale: Tensor,
    rows: int,
    cols: int,
    start: int,
    block: int,
    dtype: Any,
) -> None:
    assert block == BLOCK
    own = each(scale, (rows, cols)).flatten()[start : start + src.numel()]
    dst.copy_(fp8(src.flatten(), own, TORCH[dtype.name]))


if __name__ == "__main__":
    main()
