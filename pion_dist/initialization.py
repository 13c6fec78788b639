"""Initial matrices of known spectra, made of Gaussian ones: Pion keeps what a run starts with."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

import torch
from torch import Tensor

from .spectrum import largest


def fan_in(gaussian_mn: Tensor, scale: float) -> Tensor:
    """N(0, scale**2 / n): what has mean squares of 1 comes out with ``scale**2``."""
    deviation: float = scale * gaussian_mn.shape[1] ** -0.5
    return gaussian_mn * deviation


def orthogonal(gaussian_mn: Tensor, scale: float) -> Tensor:
    """Orthonormal rows or columns, uniformly distributed, with ``fan_in``'s mean Frobenius norm.

    All singular values are ``scale * max(1, sqrt(m / n))``.
    """
    m, n = gaussian_mn.shape
    tall = gaussian_mn.double() if m >= n else gaussian_mn.double().mT
    q, r = torch.linalg.qr(tall)
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0)  # without them, q's are Householder's
    weight: Tensor = q * (scale * max(1.0, sqrt(m / n)) * signs)
    return weight if m >= n else weight.mT


def spectral(gaussian_mn: Tensor, scale: float) -> Tensor:
    """Gaussian, with a largest singular value of ``scale * sqrt(m / n)``."""
    m, n = gaussian_mn.shape
    factor = scale * sqrt(m / n) / largest(gaussian_mn.double())
    return gaussian_mn * factor


KINDS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "fan_in": fan_in,
    "orthogonal": orthogonal,
    "spectral": spectral,
}
"""How a Gaussian matrix [m, n] becomes an initial one, given the scale."""
