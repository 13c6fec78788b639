"""Polar factors have singular values near one, by Newton-Schulz and from Gram matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pion_dist.update.direction import inverse_root, polar
from pion_dist.update.precision import Products, exact
from pion_dist.update.squares import Squares

# Of Newton-Schulz's, for singular values above 0.02 of the largest, see direction.py.
LOW, HIGH = 0.68, 1.21
BF16 = Products(stored=torch.bfloat16)


def drawn(m: int, n: int, *, values: Tensor | None = None) -> Tensor:
    """Two matrices of Frobenius norm 1, of given singular values up to a factor."""
    generator = torch.Generator().manual_seed(m + n)
    x = torch.randn(2, m, n, generator=generator, dtype=torch.float64)
    if values is not None:
        u, _, vt = torch.linalg.svd(x, full_matrices=False)
        x = (u * values) @ vt
    return x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)


def polar_of(x: Tensor, matmul: Products = exact) -> Tensor:
    return polar([x.clone()], squares=Squares(matmul))


def inverse_root_of(gram: Tensor, matmul: Products = exact) -> tuple[Tensor, Tensor]:
    h, root = inverse_root(matmul.rounded(gram), squares=Squares(matmul))
    return h.to(gram.dtype), root.to(gram.dtype)


@pytest.mark.parametrize("shape", [(40, 8), (12, 9), (9, 8), (8, 8), (6, 1)])
def test_the_polar_factor_has_singular_values_near_one(shape: tuple[int, int]) -> None:
    """Those of X that are above 0.02 of its largest, with X's own singular vectors.

    HᵀX is then symmetric, and not negative: to 10 products of 40 terms in float64, enlarged 41
    times, 41 · 10 · 40 u = 2e-12 of its largest.
    """
    x = drawn(*shape)
    h = polar_of(x)
    values, before = torch.linalg.svdvals(h), torch.linalg.svdvals(x)
    large = before > 0.02 * before[:, :1]
    assert large.any(-1).all() and ((values > LOW) & (values < HIGH)).sum() >= large.sum()
    assert values.max() < HIGH
    inner = h.mT @ x
    bound = 2e-12 * inner.abs().max()
    assert (inner - inner.mT).abs().max() <= bound
    assert torch.linalg.eigvalsh(inner).min() >= -bound


@pytest.mark.parametrize("shape", [(40, 8), (12, 9), (8, 8), (6, 1)])
@pytest.mark.parametrize("low", [0.3, 0.02, 1e-3])
def test_the_inverse_root_makes_the_polar_factor(shape: tuple[int, int], low: float) -> None:
    """X H is polar(X), and H G H is (X H)ᵀ X H, for singular values down to ``low``.

    G = XᵀX is rounded by k u of its largest value 1 or less, k ≤ 40 terms, so that a singular
    value s has an error of k u / 2 s, which three steps enlarge by 41: 41 · 40 u / 2 s = 1e-13 / s.
    """
    values = torch.linspace(1, low, min(shape), dtype=torch.float64)
    x = drawn(*shape, values=values)
    h, root = inverse_root_of(x.mT @ x)
    tolerance = 1e-13 / low
    assert (x @ h - polar_of(x)).abs().max() <= tolerance
    assert (root - (x @ h).mT @ (x @ h)).abs().max() <= 2 * tolerance


def test_directions_below_the_rounding_of_the_gram_matrix_are_bounded() -> None:
    """In float32 and bf16: G may have lost them, or have them negative.

    A value of G that is wrong by its rounding, k u, is multiplied by H's 41 at the most: X H stays
    below HIGH for float32. In bf16 ten products and stores round by 2^-8 each.
    """
    x = drawn(96, 64, values=torch.logspace(0, -9, 64, dtype=torch.float64)).float()
    for matmul, limit in ((exact, HIGH), (BF16, HIGH * (1 + 10 * 2.0**-8))):
        h, _ = inverse_root_of(x.mT @ x, matmul)
        for made in (x @ h, polar_of(x, matmul)):
            assert made.isfinite().all() and torch.linalg.matrix_norm(made, 2).max() < limit


@pytest.mark.parametrize("matmul", [exact, BF16], ids=["exact", "bf16"])
def test_zeros_have_a_polar_factor_of_zeros(matmul: Products) -> None:
    x = torch.zeros(2, 9, 6)
    h, root = inverse_root_of(x.mT @ x, matmul)
    assert h.isfinite().all() and not root.any()
    assert not (x @ h).any() and not polar_of(x, matmul).any()
