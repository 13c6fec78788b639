"""The direction on a matrix's large side: of what turns W's space, and of what moves it out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pion_dist import Pion
from pion_dist.update.direction import apart
from pion_dist.update.precision import Products, Split, exact

# Of Newton-Schulz's, for singular values above 0.02 of the largest, see direction.py.
LOW, HIGH = 0.68, 1.21


def direction(w: Tensor, s: Tensor, moves: Products = exact) -> tuple[Tensor, Tensor]:
    """The generator [B, d, d], and the basis of W's space."""
    z, q = apart(w, s, eps=1e-30, matmul=exact, moves=moves, total=lambda x: x)
    return z @ q.mT - q @ z.mT, q


def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize(("d", "r"), [(40, 8), (12, 9), (9, 8), (6, 1)])
def test_each_part_has_its_angles_alike(d: int, r: int) -> None:
    """Those of K's parts that are above 0.02 of the part's largest, in the same planes."""
    w, s = drawn(2, d, r), drawn(2, d, r).flip(0)
    a, q = direction(w, s)
    k = w @ s.mT - s @ w.mT
    out = torch.eye(d, dtype=w.dtype) - q @ q.mT
    assert (
        q.mT @ q - torch.eye(r, dtype=w.dtype)
    ).abs().max() < 1e-11  # 8 u of W's condition squared
    for found, given in ((q.mT @ a @ q, q.mT @ k @ q), (out @ a @ q, out @ k @ q)):
        values, before = torch.linalg.svdvals(found), torch.linalg.svdvals(given)
        large = before > 0.02 * before[:, :1].clamp_min(1e-9)
        assert ((values > LOW) & (values < HIGH))[large].all()
        # As a polynomial of K's part has it: their product is symmetric and not negative.
        turned = found @ given.mT
        assert (turned - turned.mT).abs().max() < 1e-9 * turned.abs().max().clamp_min(1e-9)
        assert torch.linalg.eigvalsh(turned).min() > -1e-9


@pytest.mark.parametrize("moves", [exact, Split()], ids=["exact", "pieces"])
@pytest.mark.parametrize("kind", ["zero", "of rank 1", "of half rank", "down to 1e-8"])
def test_weights_that_have_lost_directions(kind: str, moves: Products) -> None:
    """In float32, where rounding of WᵀW is as large as what is left: finite, and bounded.

    Columns of Q are at most of length 1 to rounding, so that ‖A‖₂ is 2 HIGH at the most.
    """
    w, s = drawn(3, 96, 64, dtype=torch.float32), drawn(3, 64, 96, dtype=torch.float32).mT
    if kind == "zero":
        w = torch.zeros_like(w)
    elif kind == "of rank 1":
        w = w[..., :1] @ s[:, :1, :]
    elif kind == "of half rank":
        w = w[..., :32] @ s[:, :32, :]
    else:
        w = w * torch.logspace(0, -8, 64)
    a, _ = direction(w, s, moves)
    assert torch.equal(a, -a.mT)
    assert torch.linalg.matrix_norm(a, 2).max() < 3 * HIGH
    assert (kind == "zero") == bool((a == 0).all())


class Bare(Products):
    """Without what is added to WᵀW for their rounding."""

    def rounding(self, dtype: torch.dtype) -> float:
        return 0.0


def test_where_cholesky_fails_columns_stand_for_the_basis() -> None:
    """W's own, of length 1 to rounding: the direction is finite, and skew."""
    w = drawn(20, 200, 1, dtype=torch.float32) @ drawn(20, 1, 64, dtype=torch.float32)
    _, failed = torch.linalg.cholesky_ex(w.mT @ w)
    w = w[failed != 0]  # all, where this was written
    assert len(w)
    a, q = direction(w, drawn(20, 200, 64, dtype=torch.float32)[: len(w)], Bare())
    assert (q.norm(dim=-2) - 1).abs().max() < 200 * 2.0**-24
    assert a.isfinite().all() and torch.equal(a, -a.mT)


def test_steps_keep_the_spectrum_of_a_weight_without_full_rank() -> None:
    """A step's rounding is 10 u of the largest singular value: ten steps, and u = 2^-24."""
    w = drawn(48, 8, dtype=torch.float32) @ drawn(8, 20, dtype=torch.float32) / math.sqrt(48)
    p = torch.nn.Parameter(w.clone())
    pion = Pion([p], lr=0.1)
    for _ in range(10):
        p.grad = drawn(48, 20, dtype=torch.float32)
        pion.step()
    assert p.isfinite().all() and not torch.equal(p, w)
    before, after = (torch.linalg.svdvals(x.detach().double()) for x in (w, p))
    assert (after - before).abs().max() <= 100 * 2.0**-24 * before[0]
