"""The spectral norm of generators, by power iteration that goes on from step to step.

A skew A has its singular values in equal pairs, and A itself turns the plane of such a pair by a
right angle: x <- A x / ‖A x‖ converges to the largest pair's plane, where ‖A x‖ = ‖A‖₂, as power
iteration with AᵀA does. ‖A x‖ of a unit vector never exceeds ‖A‖₂, and never falls from one
product to the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..iterations import NORM_PRODUCTS
from ..kernels import frobenius

# How much of the fixed vector a step begins with, besides the last step's. A vector of zeros, as
# state begins, or one that a step's A has taken to where the next one's A has nothing, would not
# find the next one's plane otherwise. In the plane it costs 0.5% of the length.
FRESH = 0.1


def power_iteration(product: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Estimate the spectral norms of a batch of skew matrices A, from below.

    Args:
        product: A y (or y A) of column (row) vectors y as ``x``.
        x: the last step's vectors, [B, d, 1] or [B, 1, d]; of the first step, zeros.

    Returns:
        The norms [B, 1, 1], zero for a zero A; and the next vectors: of length 1, or zero.
    """
    z = x.add(fixed(x), alpha=FRESH)
    norm = frobenius(z)
    for _ in range(NORM_PRODUCTS):
        z = product(z / norm.clamp_min(torch.finfo(z.dtype).tiny))
        norm = frobenius(z)
    return norm, z / norm.clamp_min(torch.finfo(z.dtype).tiny)


def fixed(x: Tensor) -> Tensor:
    """A vector of length 1 in x's shape that depends on its length alone: a chirp, cos(√2 i²).

    Its values are spread as a random vector's are; no weight or gradient has its structure.
    """
    i = torch.arange(max(x.shape[1:]), dtype=torch.float64, device=x.device)
    chirp = torch.cos(math.sqrt(2.0) * i.square())
    unit: Tensor = chirp / torch.linalg.vector_norm(chirp)
    return unit.to(x.dtype).view(x.shape[1:])
