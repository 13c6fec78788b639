"""What every function of ``pion_dist.kernels`` has to give, on whatever computes it.

As a program, on Triton's interpreter (TRITON_INTERPRET=1): Triton decides when kernels are
decorated whether to interpret them.

Bounds count roundings, each at most u of its result in the dtype of the computation:

- K = X - Xᵀ has 1, K∘K 3, of which 2 are K's.
- beta m + (1 - beta) K as torch.lerp and the kernels have it: 1 - beta, once or twice, a
  difference, a product, a sum: 5, of numbers at most |m| + |K|, and K's own.
- the direction from a numerator: the root, eps and the sum, the quotient: 4 of the result.

What is expected is computed in float64 and, where that is the dtype under test, has as many
roundings again: twice the count is allowed.
"""

from __future__ import annotations

import itertools
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from pion_dist import kernels
from pion_dist.kernels import fold, unfold

BETA1, BETA2, EPS = 0.9, 0.95, 1e-8
LERP, SQUARE, QUOTIENT = 2 * 6, 2 * 8, 2 * 4
U = {torch.float32: 2.0**-24, torch.float64: 2.0**-53, torch.bfloat16: 2.0**-8}


class Case(NamedTuple):
    """How the moments of generators are kept and used."""

    d: int
    folded: bool = True
    dtype: torch.dtype = torch.float32  # of the computation
    kept: torch.dtype = torch.float32  # of the moments
    second: bool = True
    nesterov: bool = False


def cases(*sizes: int) -> list[Case]:
    """All layouts, dtypes and uses, at every size."""
    dtypes = [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float64),
    ]
    return [
        Case(d, folded, *types, second, nesterov)
        for d, folded, types, second, nesterov in itertools.product(
            sizes, (False, True), dtypes, (False, True), (False, True)
        )
    ]


def near(actual: Tensor, expected: Tensor, bound: Tensor | float) -> None:
    """Within the bound, element by element; NaN never is."""
    excess = (actual.double() - expected).abs() - bound
    assert bool((excess <= 0).all()), f"{float(excess.max()):.2e} past the bound"


def skew_normal(d: int, seed: int, device: str) -> Tensor:
    x = torch.randn(2, d, d, generator=torch.Generator().manual_seed(seed)).to(device)
    return x - x.mT


def check_lie_moments(run: ModuleType, device: str, case: Case, *, cut: float = 0.0) -> None:
    """One step, then one where ``grads_finite`` is False, on a NaN product.

    Args:
        run: has the function.
        device: of the tensors.
        case: the moments.
        cut: by how much the device rounds to bfloat16, relative, if not to nearest.
    """
    u, kept = U[case.dtype], cut or U[case.kept] if case.kept == torch.bfloat16 else 0.0
    generator = torch.Generator().manual_seed(case.d)
    x = torch.randn(2, case.d, case.d, generator=generator).to(device, case.dtype)
    old_m = skew_normal(case.d, 1, device).to(case.kept)
    old_v = skew_normal(case.d, 2, device).square().to(case.kept)
    m = fold(old_m) if case.folded else old_m.clone()
    v = (fold(old_v) if case.folded else old_v.clone()) if case.second else None

    def call(x: Tensor, grads_finite: bool, *, wanted: bool = True) -> Tensor | None:
        a: Tensor | None = run.lie_moments(
            x,
            m,
            v,
            beta1=BETA1,
            beta2=BETA2,
            eps=EPS,
            nesterov=case.nesterov,
            grads_finite=torch.tensor(grads_finite, device=device),
            wanted=wanted,
        )
        return a

    def dense() -> tuple[Tensor, Tensor | None]:
        if not case.folded:
            return m.double(), None if v is None else v.double()
        second = None if v is None else unfold(v, case.d, skew=False).double()
        return unfold(m, case.d, skew=True).double(), second

    def direction(numerator: Tensor, second: Tensor | None) -> tuple[Tensor, Tensor | float]:
        """What is expected and what it was divided by."""
        if second is None:
            return numerator, 1.0
        return numerator / (second.sqrt() + EPS), second.sqrt() + EPS

    a = call(x.clone(), True)
    assert a is not None and a.dtype == case.dtype and torch.equal(a, -a.mT)
    k = x.double() - x.double().mT
    new_m, new_v = dense()
    assert torch.equal(new_m, -new_m.mT)
    expected = BETA1 * old_m.double() + (1 - BETA1) * k
    terms = old_m.double().abs() + k.abs()
    near(new_m, expected, LERP * u * terms + 1.01 * kept * expected.abs())
    if new_v is not None:
        assert torch.equal(new_v, new_v.mT)
        expected = BETA2 * old_v.double() + (1 - BETA2) * k.square()
        near(new_v, expected, (SQUARE * u + 1.01 * kept) * (old_v.double() + k.square()))
    # From what has been stored: its rounding is not in the bound.
    ahead = BETA1 * new_m + (1 - BETA1) * k if case.nesterov else new_m
    slack = LERP * u * (new_m.abs() + k.abs()) if case.nesterov else 0.0
    expected, divisor = direction(ahead, new_v)
    near(a, expected, slack / divisor + QUOTIENT * u * expected.abs())

    before = [y.clone() for y in (m, v) if y is not None]
    a = call(torch.full_like(x, torch.nan), False)
    after = [y for y in (m, v) if y is not None]
    assert all(torch.equal(y, z) for y, z in zip(before, after, strict=True))
    expected, _ = direction(new_m, new_v)
    assert a is not None and torch.equal(a, -a.mT)
    near(a, expected, QUOTIENT * u * expected.abs())
    m.zero_()
    assert call(torch.full_like(x, torch.nan), False, wanted=False) is None
    assert not m.count_nonzero() and not m.signbit().any()  # -0 would be another bit pattern


def check_angles(run: ModuleType, device: str, r: int) -> None:
    """Of random steps, of a length of 0 too; with equal and zero singular values.

    P and Q have 9 roundings each (a sum, a product, a square and its sum with two more, a quotient,
    a half), of which the sum of terms of one sign enlarges none; but δ, a difference, is wrong by
    itself only where σ are, and they are exact. X and Y are a sum of both: 2 · 10 of |P| + |Q|. A
    column's norm has r + 1, of which c sees less than itself: 2 (r + 6) of c.
    """
    generator = torch.Generator().manual_seed(r)
    b = torch.randn(2, r, r, generator=generator).to(device)
    sigma = torch.rand(2, r, generator=generator).sort(descending=True).values
    sigma[0, r // 2 :] = 0.0
    sigma[1, : r // 2] = 1.0
    sigma = sigma.to(device)
    u = U[torch.float32]
    for length in (0.3, torch.tensor(0.3, device=device), 100.0, 0.0):
        step = b * 0.0 if length == 0.0 else b
        x, y, c = run.angles(step, None, sigma, scale=length)
        assert torch.equal(x, -x.mT) and torch.equal(y, -y.mT)
        rows = slice(r // 3, r // 3 + max(1, r // 2))
        some = [step[:, rows].contiguous(), step.mT[:, rows].contiguous()]
        some = run.angles(*some, sigma, scale=length, first=rows.start)
        exact = kernels.reference.angles(step.double(), None, sigma.double(), scale=float(length))
        p, q = (exact[0] + exact[1]).abs() / 2, (exact[0] - exact[1]).abs() / 2
        bounds = [20 * u * (p + q), 20 * u * (p + q), 2 * (r + 6) * u * exact[2]]
        for whole, part, expected, bound in zip((x, y, c), some, exact, bounds, strict=True):
            near(whole, expected, bound + 1e-30)
            near(part, expected[:, rows], bound[:, rows] + 1e-30)


def check_skew(run: ModuleType, device: str, d: int, *, cut: float = 0.0) -> None:
    """Scaled and rounded once."""
    x = torch.randn(2, d, d, generator=torch.Generator().manual_seed(d)).to(device)
    exact = 0.5 * (x.double() - x.double().mT)
    for dtype in (torch.float32, torch.bfloat16):
        skew = run.skew(x.clone(), scale=0.5, dtype=dtype)
        assert skew.dtype == dtype and torch.equal(skew, -skew.mT)
        rounding = cut or U[dtype] if dtype == torch.bfloat16 else 0.0
        near(skew, exact, (2 * U[torch.float32] + 1.01 * rounding) * exact.abs())


def check_elementwise(run: ModuleType, device: str, m: int, n: int, *, cut: float = 0.0) -> None:
    """``average``, ``moved`` and ``frobenius``, on matrices of a batch with gaps between them."""
    generator = torch.Generator().manual_seed(m + n)
    gapped = [torch.randn(3, m + 1, n, generator=generator).to(device)[:, :m] for _ in range(2)]
    w, g = gapped
    u, yes, no = U[torch.float32], torch.tensor(True).to(device), torch.tensor(False).to(device)
    nan = torch.full_like(g, torch.nan)
    for kept, nesterov in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        rounding = cut or U[kept] if kept == torch.bfloat16 else 0.0
        moment = w.to(kept)
        old = moment.double()
        s = run.average(moment, g, beta=BETA1, nesterov=nesterov, grads_finite=yes)
        assert s.dtype == g.dtype
        expected, terms = BETA1 * old + (1 - BETA1) * g.double(), old.abs() + g.double().abs()
        near(moment, expected, LERP * u * terms + 1.01 * rounding * expected.abs())
        stored = moment.double()
        expected = BETA1 * stored + (1 - BETA1) * g.double() if nesterov else stored
        near(s, expected, LERP * u * (stored.abs() + g.double().abs()) if nesterov else 0.0)
        before = moment.clone()
        s = run.average(moment, nan, beta=BETA1, nesterov=nesterov, grads_finite=no)
        assert torch.equal(moment, before) and torch.equal(s, before.to(g.dtype))

    # The sum of squares: a square 1, X + Y 2 more, and at most mn additions; half of that is the
    # root's, relative, and one is its own.
    for other in (None, g):
        total = w.double() if other is None else w.double() + g.double()
        exact = total.square().sum((-2, -1), keepdim=True).sqrt()
        near(run.frobenius(w, other), exact, ((3 + m * n) / 2 + 1) * u * exact)
        assert torch.equal(run.frobenius(w, other), run.frobenius(w, other))

    before = w.clone()
    run.moved(w, nan, grads_finite=no)
    assert torch.equal(w, before)
    expected = w.double() + g.double()
    run.moved(w, g.clone(), grads_finite=yes)
    near(w, expected, u * expected.abs())

    # A moment that is turned: no kernel takes it, so that all devices round to nearest.
    moment = before.bfloat16()
    old, expected = moment.clone(), moment.double() + g.double()
    run.moved(moment, nan.clone(), grads_finite=no)
    assert torch.equal(moment, old)
    run.moved(moment, g.clone(), grads_finite=yes)
    near(moment, expected, (u + 1.01 * U[torch.bfloat16]) * expected.abs())


# Triton 3.7's interpreter cuts float32 off where it should round to bfloat16.
CUT = 2.0**-7


def main() -> None:
    """On the interpreter, which takes 10 ms and more a program: a few cases, each size once."""
    assert kernels.backend(torch.device("cpu")) == "triton"
    full = dict(second=True, nesterov=True)
    chosen = [
        Case(1),
        Case(2, nesterov=True),
        Case(5, folded=False),
        Case(33, kept=torch.bfloat16, **full),
        Case(34, folded=False, kept=torch.bfloat16, **full),
        Case(66, folded=True, second=False),
        Case(67, folded=True),
        Case(67, folded=False, second=False),
        Case(67, folded=False, second=False, nesterov=True),
    ]
    for case in chosen:
        check_lie_moments(kernels, "cpu", case, cut=CUT)
        print(case)
    for d in (1, 2, 35, 67):
        check_skew(kernels, "cpu", d, cut=CUT)
        print("skew", d)
    for r in (1, 5, 35):
        check_angles(kernels, "cpu", r)
        print("angles", r)
    for m, n in ((1, 1), (3, 7), (50, 90), (130, 129)):
        check_elementwise(kernels, "cpu", m, n, cut=CUT)
        print("elementwise", m, n)


if __name__ == "__main__":
    main()
