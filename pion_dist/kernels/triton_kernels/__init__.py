"""``reference`` in Triton, for float32 operands: every operand is read once and written once.

``tiles`` has the kernels on square matrices that are skew or symmetric, ``turns`` that of a polar
step's angles, ``elementwise`` those that go over a matrix's elements in memory order.

Each matrix of a batch has to be contiguous; ``x_batch`` is the distance from one to the next.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .elementwise import average, frobenius, moved
from .tiles import lie_moments, skew
from .turns import angles

__all__ = ["angles", "average", "frobenius", "lie_moments", "moved", "skew", "takes"]


def takes(tensors: Sequence[Tensor | None], *, moments: Sequence[int] = ()) -> bool:
    """Tell whether the kernels take these: float32 (but for moments), each matrix contiguous."""
    return all(
        x is None
        or (x.numel() > 0 and x[0].is_contiguous() and (i in moments or x.dtype == torch.float32))
        for i, x in enumerate(tensors)
    )
