"""The elementwise parts and the norms of a step, fused in Triton or in plain torch operations.

``reference`` says what each function computes, and on what runs it: the results differ by rounding
alone. ``fold`` is the layout in which half of a skew matrix is kept; ``eight_bit`` holds moments
in 8 bits.
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


# Read once, as Triton does when kernels are decorated.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def backend(device: torch.device) -> Literal["triton", "torch"]:
    """What computes on a device: Triton on a GPU where it is installed, else torch.

    With TRITON_INTERPRET=1 Triton's interpreter runs the kernels on the CPU too, for tests of their
    logic. torch remains what computes on float64 and on matrices that are not contiguous.
    """
    asked = device.type == "cuda" or _INTERPRETED
    return "triton" if asked and _triton() is not None else "torch"


@functools.cache
def _triton() -> ModuleType | None:
    """The kernels, imported when they are first needed: Triton takes a while."""
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
    """The reference's function, or its kernel where that takes the tensors.

    Args:
        function: its positional arguments are tensors or None.
        moments: which of them may be of another dtype than the computation.
    """

    @functools.wraps(function)
    def best(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, Tensor)
        kernels = _triton() if backend(first.device) == "triton" else None
        if kernels is not None and kernels.takes(args, moments=moments):
            result: R = getattr(kernels, function.__name__)(*args, **kwargs)
            return result
        return function(*args, **kwargs)

    return best


# Of how many columns U and V may have for K to be made by products on the CPU: an element of it
# takes r FLOP more, and of X − Xᵀ one nanosecond, in which a core does 60 to 90.
THIN = 64


def outer(u_Bdr: Tensor, v_Bdr: Tensor, *, matmul: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """What ``lie_moments`` takes of U and V: X = U Vᵀ, or K folded where that takes less time."""
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
