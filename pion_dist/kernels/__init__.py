"""The elementwise parts and the norms of a step, fused in Triton or in plain torch operations.

``reference`` defines what each function computes; Triton's results differ by rounding alone.
``fold`` is the layout that stores half of a skew matrix; ``eight_bit`` stores moments in 8 bits.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from . import reference
from .eight_bit import from_eight_bit, to_eight_bit
from .fold import fold, fold_product, unfold

__all__ = [
    "angles",
    "average",
    "backend",
    "fold",
    "frobenius",
    "from_eight_bit",
    "lie_moments",
    "moved",
    "outer",
    "skew",
    "to_eight_bit",
    "unfold",
]


# Read once, at import: Triton reads it when kernels are decorated.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def backend(device: torch.device) -> Literal["triton", "torch"]:
    """Name the backend of a device: Triton on a GPU where it is installed, else torch.

    With TRITON_INTERPRET=1 Triton's interpreter runs the kernels on the CPU too, for tests of their
    logic. torch always computes float64 and matrices that are not contiguous.
    """
    asked = device.type == "cuda" or _INTERPRETED
    return "triton" if asked and _triton() is not None else "torch"


@functools.cache
def _triton() -> ModuleType | None:
    """Import the kernels on first use, since importing Triton takes a while."""
    try:
        from . import triton_kernels
    except ModuleNotFoundError as missing:
        if missing.name != "triton":
            raise
        return None
    return triton_kernels


def _dispatched[**P, R](
    function: Callable[P, R], *, moments: tuple[int, ...] = ()
) -> Callable[P, R]:
    """Wrap a function of ``reference`` to call its kernel where that takes the tensors.

    Args:
        function: the reference; its positional arguments are tensors or None.
        moments: positions of arguments that may have another dtype than the computation.
    """

    @functools.wraps(function)
    def dispatched(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, Tensor)
        kernels = _triton() if backend(first.device) == "triton" else None
        if kernels is not None and kernels.takes(args, moments=moments):
            result: R = getattr(kernels, function.__name__)(*args, **kwargs)
            return result
        return function(*args, **kwargs)

    return dispatched


# The most columns of U and V with which the CPU makes K by products. An element of K takes r more
# FLOP so; one of X − Xᵀ takes a nanosecond, in which a core does 60 to 90.
THIN = 64


def outer(u_Bdr: Tensor, v_Bdr: Tensor, *, matmul: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Compute ``lie_moments``'s operand: X = U Vᵀ, or K folded where that takes less time."""
    _, d, r = u_Bdr.shape
    on_cpu = u_Bdr.device.type == "cpu" and backend(u_Bdr.device) == "torch"
    if on_cpu and r <= THIN and r < d and d % 2 == 0:
        return fold_product(u_Bdr, v_Bdr, matmul=matmul)
    return matmul(u_Bdr, v_Bdr.mT)


angles = _dispatched(reference.angles)
skew = _dispatched(reference.skew)
lie_moments = _dispatched(reference.lie_moments, moments=(1, 2))
average = _dispatched(reference.average, moments=(0,))
moved = _dispatched(reference.moved)
frobenius = _dispatched(reference.frobenius)
