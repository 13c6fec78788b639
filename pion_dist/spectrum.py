"""Singular values: measure them, compare them with earlier ones, and restore them."""

from __future__ import annotations

import torch
from torch import Tensor

# Singular values below this fraction of the largest are noise of a matrix without full rank. Their
# change is taken relative to the fraction, so that 0 -> 1e-8 does not read as infinite.
_FLOOR = 1e-6

# Dimensions of a Krylov space. With 128 the largest singular value of Gaussian matrices of 1100 to
# 4096 rows is exact to 1e-14; with 64 it was too small by up to 2e-7 (measured).
_KRYLOV = 128


def singular_values(x_Bmn: Tensor) -> Tensor:
    """Compute singular values in float64, descending: [..., min(m, n)]."""
    values: Tensor = torch.linalg.svdvals(x_Bmn.detach().double())
    return values


def drift(start: Tensor, now: Tensor) -> Tensor:
    """Compute the largest relative change of a singular value, for each matrix.

    Args:
        start: singular values [..., k], descending.
        now: later singular values of the same matrices.

    Returns:
        max |now − start| / start over the k values, [...].
    """
    scale = torch.maximum(start, _FLOOR * start.amax(-1, keepdim=True))
    change = ((now - start).abs() / scale).nan_to_num(nan=0.0, posinf=torch.inf)
    return change.amax(-1)


def shift(start: Tensor, now: Tensor) -> Tensor:
    """Compute ``drift`` relative to the largest value at start, as rounding errors are."""
    change = (now - start).abs() / start.amax(-1, keepdim=True)
    return change.nan_to_num(nan=0.0, posinf=torch.inf).amax(-1)


def gram(x_Bmn: Tensor) -> Tensor:
    """Compute the smaller of X Xᵀ and Xᵀ X in float64; its eigenvalues are the σ² of X."""
    x = x_Bmn.detach().double()
    return x @ x.mT if x.shape[-2] <= x.shape[-1] else x.mT @ x


def values_of(gram_Bkk: Tensor) -> Tensor:
    """Compute singular values [B, k], descending, from Gram matrices.

    They are infinite where W is not finite, which LAPACK refuses. The squares are exact to
    float64's rounding of the largest, 1e-16 σ₁², so a value σ is exact to 1e-16 σ₁² / 2σ. That is
    less than the rounding of float32 weights, 6e-8 σ₁, while σ > 1e-9 σ₁.
    """
    finite = gram_Bkk.isfinite().all(-1).all(-1, keepdim=True)
    squares = torch.linalg.eigvalsh(torch.where(finite[..., None], gram_Bkk, 0.0))
    return torch.where(finite, squares.clamp_min(0.0).sqrt().flip(-1), torch.inf)


def norms_of(x_Bmn: Tensor) -> Tensor:
    """Compute two norms that no rotation changes, (Σσ²)^(1/2) and the largest σ: [B, 2].

    They take products with vectors only, in float64; they are infinite where W is not finite.
    """
    matrix_norms = []
    for x in x_Bmn.detach():
        finite = x.isfinite().all()
        x = torch.where(finite, x.double(), 0.0)
        norms = torch.stack((torch.linalg.matrix_norm(x), largest(x)))
        matrix_norms.append(torch.where(finite, norms, torch.inf))
    return torch.stack(matrix_norms)


def norms_of_values(values_Bk: Tensor) -> Tensor:
    """Compute ``norms_of`` from singular values."""
    norms = [torch.linalg.vector_norm(values_Bk, p, dim=-1) for p in (2, torch.inf)]
    return torch.stack(norms, -1)


def largest(matrix: Tensor) -> Tensor:
    """Compute the largest singular value of one matrix [m, n], in its dtype."""
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT
    length = tall.shape[1]
    basis = tall.new_zeros(length, min(_KRYLOV, length))
    vector = tall.new_full((length,), length**-0.5)
    for column in basis.unbind(1):
        column.copy_(vector)
        vector = tall.mT @ (tall @ vector)
        for _ in range(2):  # a single pass leaves the error of cancellation
            vector = vector - basis @ (basis.mT @ vector)
        vector = vector / vector.norm().clamp_min(torch.finfo(vector.dtype).tiny)
    norm: Tensor = torch.linalg.matrix_norm(tall @ basis, ord=2)
    return norm


def restored(x_Bmn: Tensor, values_Bk: Tensor) -> Tensor:
    """Compute the nearest matrices with given singular values: U S Vᵀ, in float64.

    Args:
        x_Bmn: X = U S' Vᵀ.
        values_Bk: S, descending.

    Returns:
        U S Vᵀ [B, m, n], in X's dtype.
    """
    u, _, v = torch.linalg.svd(x_Bmn.double(), full_matrices=False)
    restored_Bmn: Tensor = (u * values_Bk.unsqueeze(-2)) @ v
    return restored_Bmn.to(x_Bmn.dtype)
