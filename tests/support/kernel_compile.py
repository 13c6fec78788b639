"""Every Triton kernel and variant compiled for sm_90 and sm_100, without a GPU.

Run as a program, since Triton decides when kernels are decorated whether to interpret them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pion_dist.kernels.triton_kernels import elementwise, tiles, turns

CAPABILITIES = (90, 100)
FLOAT, BF16 = "*fp32", "*bf16"
TILE, BLOCK = {"TILE": tiles.TILE}, {"BLOCK": elementwise.BLOCK}


def variants() -> Iterator[tuple[Any, dict[str, Any], int]]:
    """Kernel, its arguments, warps.

    An argument is a type, a constant, or None. As Triton does at launch: "i32*" is an integer that
    16 divides, "i64" one past 2^31, and 1 is a constant.
    """
    even = {"x_batch": "i32*", "m_batch": "i32*", "v_batch": "i32*", "d": "i32*", "h": "i32*"}
    odd = {"x_batch": "i32", "m_batch": "i32", "v_batch": "i32", "d": "i32", "h": "i32"}
    one = {name: 1 for name in even}
    for out, sizes in ((FLOAT, even), (BF16, even), (FLOAT, odd), (FLOAT, one)):
        args = {"x_ptr": FLOAT, "a_ptr": out, "scale": "fp32", **sizes, **TILE}
        yield tiles._skew, args, tiles.TILE_WARPS
    for m, v, a, folded, nesterov, sizes in (
        (FLOAT, FLOAT, FLOAT, True, False, even),
        (BF16, BF16, FLOAT, True, True, odd),
        (FLOAT, FLOAT, None, True, False, even),
        (FLOAT, None, FLOAT, True, True, one),
        (FLOAT, FLOAT, FLOAT, False, True, even),
        (BF16, FLOAT, FLOAT, False, False, odd),
        (FLOAT, None, None, False, False, even),
    ):
        args = {
            "x_ptr": FLOAT,
            "m_ptr": m,
            "v_ptr": v,
            "a_ptr": a,
            "grads_finite_ptr": "*u8",
            **sizes,
        }
        args |= {"weight1": "fp32", "weight2": "fp32", "eps": "fp32"}
        args |= {"FOLDED": folded, "NESTEROV": nesterov, **TILE}
        yield tiles._lie_moments, args, tiles.TILE_WARPS
    for m, s, nesterov, size in (
        (FLOAT, FLOAT, True, "i32*"),
        (FLOAT, None, False, 1),
        (BF16, FLOAT, False, "i64"),
    ):
        args = {"m_ptr": m, "g_ptr": FLOAT, "s_ptr": s, "grads_finite_ptr": "*u8", "weight": "fp32"}
        args |= {"m_batch": size, "g_batch": size, "size": size, "NESTEROV": nesterov, **BLOCK}
        yield elementwise._average, args, 4
    for transposed, sizes in (
        (None, {"b_batch": "i32*", "transposed_batch": 0, "rows": "i32*", "r": "i32*", "first": 0}),
        (
            FLOAT,
            {**dict.fromkeys(("b_batch", "transposed_batch"), "i64"), "rows": "i32", "r": "i32"},
        ),
    ):
        names = ("b_ptr", "sigma_ptr", "scale_ptr", "x_ptr", "y_ptr", "c_ptr")
        args = {**dict.fromkeys(names, FLOAT), "transposed_ptr": transposed}
        args |= {"first": "i32", **sizes, **TILE}
        yield turns._angles, args, tiles.TILE_WARPS
    args = {"w_ptr": FLOAT, "change_ptr": FLOAT, "grads_finite_ptr": "*u8", **BLOCK}
    yield elementwise._moved, args | {"w_batch": "i32*", "change_batch": "i32*", "size": "i32*"}, 4
    for y in (None, FLOAT):
        args = {"x_ptr": FLOAT, "y_ptr": y, "sums_ptr": FLOAT, "BLOCK": elementwise.SUM_BLOCK}
        args |= {"x_batch": "i32*", "y_batch": "i32*", "size": "i32*"}
        yield elementwise._square_sums, args, elementwise.SUM_WARPS
    for count in ("i32", 1):
        args = {"sums_ptr": FLOAT, "norm_ptr": FLOAT, "count": count, **BLOCK}
        yield elementwise._roots, args, 4


def compiled(kernel: Any, args: dict[str, Any], warps: int, capability: int) -> dict[str, int]:
    """Bytes of what the compiler makes of a variant."""
    signature, constants, aligned = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        kind = args[name]
        if not isinstance(kind, str):
            signature[name], constants[name] = "constexpr", kind
            continue
        signature[name] = kind.removesuffix("*")
        if "*" in kind:  # torch's allocations are aligned too
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    target = GPUTarget("cuda", capability, 32)
    made = triton.compile(source, target=target, options={"num_warps": warps}).asm
    return {name: len(made[name]) for name in ("ptx", "cubin")}


def main() -> None:
    """A line of JSON for every variant and capability."""
    for kernel, args, warps in variants():
        for capability in CAPABILITIES:
            sizes = compiled(kernel, args, warps, capability)
            line = {"kernel": kernel.__name__, "capability": capability, **sizes}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
