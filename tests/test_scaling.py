"""Spectral scaling: the estimate against the exact norm, and the angles that steps turn by.

k products from a unit vector whose part in the plane of A's largest singular values has the weight
p (squared length): ‖A^k x‖² ≥ p σ^2k. It is also the product of the k squared estimates, and these
never fall, so that the last is between p^(1/2k) σ and σ.

Of a vector that has arrived in the plane, where the other values are at most r σ: FRESH of the
fixed vector leads at most FRESH / (1 - FRESH) out of it, of which the first k - 1 products leave
r^(k-1). The last estimate is then at least (1 - lost(r)) σ.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pion_dist import Pion, PionConfig
from pion_dist.iterations import NORM_PRODUCTS
from pion_dist.update.arrangement import Blocks
from pion_dist.update.scaling import FRESH, fixed, power_iteration

# Of a dozen products and norms of length ≤ 40 in float64, relative: 12 · 40 · 1.1e-16 = 5e-14.
ROUNDING = 1e-13


def lost(r: float) -> float:
    """See above; √(1 - x) ≥ 1 - 0.6 x for x ≤ 0.5, which also has room for what is not FRESH."""
    return 0.6 * (FRESH / (1 - FRESH) * r ** (NORM_PRODUCTS - 1)) ** 2


def skew_of(values: list[float], seed: int, extra: int = 0) -> torch.Tensor:
    """Skew, with each of the values twice and ``extra`` zeros as its singular values."""
    a = torch.block_diag(
        *(torch.tensor([[0.0, value], [-value, 0.0]], dtype=torch.float64) for value in values),
        torch.zeros(extra, extra, dtype=torch.float64),
    )
    q = np.linalg.qr(np.random.default_rng(seed).standard_normal(a.shape))[0]
    return torch.tensor(q) @ a @ torch.tensor(q.T)


def weight_in_plane(a: torch.Tensor, x: torch.Tensor) -> float:
    """Of a unit x: the squared length of its part in the plane of A's largest values."""
    _, _, vh = torch.linalg.svd(a)
    return float(((vh[:2] @ x.flatten()) / x.norm()).square().sum())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=8),
    st.integers(0, 1),
    st.integers(0, 2**32 - 1),
    st.sampled_from([1e-12, 1.0, 1e12]),
)
def test_estimates_are_between_their_bounds_while_the_matrix_changes(
    values: list[float], extra: int, seed: int, unit: float
) -> None:
    u = torch.zeros(1, 2 * len(values) + extra, 1, dtype=torch.float64)
    start = skew_of(values, seed, extra)
    for step in range(4):
        a = unit * (start + 0.1 * step * skew_of(values[::-1], seed + 1, extra))
        exact = float(torch.linalg.matrix_norm(a, ord=2))
        p = weight_in_plane(a, u + FRESH * fixed(u))
        norm, u = power_iteration(lambda x, a=a: a @ x, u)
        assert norm.item() <= exact * (1 + ROUNDING)
        assert norm.item() >= p ** (1 / (2 * NORM_PRODUCTS)) * exact * (1 - ROUNDING)
        assert abs(float(u.norm()) - 1) <= ROUNDING


def test_a_zero_matrix_has_norm_zero_and_the_next_one_is_found() -> None:
    zero, a = torch.zeros(6, 6, dtype=torch.float64), skew_of([1.0, 0.3, 0.2], 0)
    norm, u = power_iteration(lambda x: zero @ x, torch.zeros(1, 6, 1, dtype=torch.float64))
    assert norm.item() == 0.0 and not u.any()
    for _ in range(5):
        norm, u = power_iteration(lambda x: a @ x, u)
    assert 1 - lost(0.3) <= norm.item() <= 1 + ROUNDING


def test_a_vector_without_a_part_in_the_plane_finds_it() -> None:
    """Two planes that share no coordinate: without the fixed vector the estimate would be 0."""
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    none = torch.zeros(2, 2, dtype=torch.float64)
    first, second = torch.block_diag(turn, none), torch.block_diag(none, 2 * turn)
    _, u = power_iteration(lambda x: first @ x, torch.zeros(1, 4, 1, dtype=torch.float64))
    assert not u[0, 2:].any()
    norm, _ = power_iteration(lambda x: second @ x, u)
    # Of rank 2: after the first product all that is left is in the plane.
    assert norm.item() == pytest.approx(2.0, rel=ROUNDING)


@pytest.mark.parametrize("side", ["in", "out"])
def test_the_norm_of_blocks_is_the_largest_one_s(side: str) -> None:
    blocks = [skew_of([value, value / 3], seed) for seed, value in enumerate((0.5, 2.0, 1.0))]
    lies = Blocks(side, count=3)  # type: ignore[arg-type]
    a = lies.generator(torch.stack(blocks)[None], side=side)  # type: ignore[arg-type]
    u = torch.zeros(1, 3, *((1, 4) if side == "in" else (4, 1)), dtype=torch.float64)
    for _ in range(5):
        norm, u = lies.spectral_norm(a, u)
    assert norm.shape == (1, 1, 1)
    assert 2 * (1 - lost(1 / 3)) <= norm.item() <= 2 * (1 + ROUNDING)


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("lr", [1e-3, 0.3])
@pytest.mark.parametrize("momentum", ["lie", "transported", "ambient"])
def test_lr_is_the_largest_angle(momentum: str, lr: float, side: str) -> None:
    """W = I and G skew: W turns about G's planes alone, and so do all generators.

    A plane's value is that of G times the cosine of the angle that W has turned in it so far, at
    least cos(0.6) = 0.8: the others' are less than half of the largest.
    """
    g = skew_of([1.0, 0.3, 0.2, 0.1], 3)
    p = torch.nn.Parameter(torch.eye(8, dtype=torch.float64))
    config = PionConfig(
        momentum=momentum,
        direction="momentum",
        side=side,
        scaling="spectral",
        retraction="exp",
    )
    optimizer = Pion([p], lr=lr, config=config)
    largest = []
    for _ in range(3):
        before = p.detach().clone()
        p.grad = g.clone()
        optimizer.step()
        turned = torch.linalg.eigvals(torch.linalg.solve(before, p.detach()))
        largest.append(float(turned.angle().abs().max()))
    # One step's four products have left 0.3^4 of what was not in the plane. 1 / (1 - x) ≤ 1 + 2 x;
    # eps is 1e-8 of a norm of 0.1 or more.
    for angle in largest[1:]:
        assert lr * (1 - 1e-7) <= angle <= lr * (1 + 2 * lost(0.5))
