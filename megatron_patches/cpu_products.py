"""bf16 products on a CPU without bf16 units: computed in float32 and rounded once, as units do."""

from __future__ import annotations

from typing import Any

import torch

from pion_dist.update.precision import cpu_has_bf16_units

# The products that torch has a scalar loop for, and what they write into, if not into a new tensor.
_RESULT = {
    **dict.fromkeys(("mm", "bmm", "addmm", "baddbmm", "addmv")),
    **dict.fromkeys(("mm.out", "bmm.out", "addmm.out", "baddbmm.out", "addmv.out"), "out"),
    **dict.fromkeys(("addmm_", "baddbmm_", "addmv_"), "self"),
}
# Kernels stay registered as long as their library lives: for good.
_libraries: list[Any] = []


def install() -> None:
    """Replace torch's CPU kernels of bf16 products if the CPU has no bf16 units (idempotent).

    The dispatcher is the one place that every product passes: Megatron multiplies in autograd
    functions of its own, into buffers, and by einsum. A profile of examples/demo.py's training
    shows nothing else that is slow in bf16 on such a CPU: an iteration of AdamW's then takes twice
    as long as with units.
    """
    if cpu_has_bf16_units() or _libraries:
        return
    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    _libraries.append(library)
    for name, result in _RESULT.items():
        library.impl(name, _in_float32(name, result), "CPU", with_keyset=True)


def _in_float32(name: str, result: str | None) -> Any:
    original: Any = torch.library.get_kernel(f"aten::{name}", "CPU")

    def kernel(keys: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        if any(x.dtype != torch.bfloat16 for x in tensors):  # torch refuses a mixture
            return original.call_boxed(keys, *args, **kwargs)
        wide = [_widened(x) for x in args]
        computed = original.call_boxed(keys, *wide, **{k: _widened(x) for k, x in kwargs.items()})
        if result is None:
            return computed.bfloat16()
        out = args[0] if result == "self" else kwargs["out"]
        return (out if out.shape == computed.shape else out.resize_(computed.shape)).copy_(computed)

    return kernel


def _widened(x: Any) -> Any:
    return x.float() if isinstance(x, torch.Tensor) else x
