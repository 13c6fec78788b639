"""How far singular values have moved, as tensors; what to do with them is the caller's."""

from __future__ import annotations

import torch
from torch import Tensor

# Singular values below this part of the largest are noise of a matrix that lacks rank: they are
# measured against it, so that 0 -> 1e-8 does not read as infinite.
_FLOOR = 1e-6


def singular_values(x_Bmn: Tensor) -> Tensor:
    """Singular values in float64, descending: [..., min(m, n)]."""
    values: Tensor = torch.linalg.svdvals(x_Bmn.detach().double())
    return values


def drift(start: Tensor, now: Tensor) -> Tensor:
    """Largest relative change of a singular value, for each matrix.

    Args:
        start: singular values [..., k], descending.
        now: the same matrices' later.

    Returns:
        max |now − start| / start over the k values, [...].
    """
    scale = torch.maximum(start, _FLOOR * start.amax(-1, keepdim=True))
    change = ((now - start).abs() / scale).nan_to_num(nan=0.0, posinf=torch.inf)
    return change.amax(-1)
