"""The polar direction: equal to its float64 definition; the spectrum is kept over any run."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from reference import Array, ReferencePolar, reference_of
from reference_cases import CUT_VIEWS, SHAPES, distance, draw, error_of, parameters, set_gradients

from pion_dist import Pion, PionConfig
from pion_dist.diagnostics import Diagnostics
from pion_dist.update import muon

POLAR = PionConfig(direction="polar", betas=(0.95, 0.95))
# Relative to max|W|. A step is a chain of about 20 products of inner length k ≤ 40, each wrong by
# k u = 4e-15 of its factors' norms, of which three Newton–Schulz steps may enlarge what is in the
# average's smallest direction 41 times; the Gram matrix squares its condition, so that of a random
# 40 x 4 average (2) nothing is lost, and of one that is nearly square 1e-16 / 0.02². 6 steps add.
# The cheap form takes U as orthonormal, which the step before has left off by (angle⁶ / 64)²: 1e-13
# at lr 0.05, where the largest angle is 0.25 (1e-10 at lr 0.2).
TOLERANCE = 1e-12
STEPS = 6


def random_run(
    shapes: Sequence[tuple[int, int]], config: PionConfig = POLAR, *, seed: int = 0
) -> tuple[list[torch.nn.Parameter], list[ReferencePolar], np.random.Generator]:
    rng = np.random.default_rng(seed)
    weights = draw(rng, shapes, 0.2)
    params = parameters(weights, torch.float64)
    return params, [ReferencePolar(w, config) for w in weights], rng


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("gram", [True, False, None], ids=["gram", "direct", "cheaper"])
def test_every_shape_is_the_definition(
    nesterov: bool, gram: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways to Muon's step, whichever is the cheaper; learning rates change on the way."""
    if gram is not None:
        monkeypatch.setattr(muon, "uses_gram", lambda rows, r: gram and rows != r)
    config = PionConfig(direction="polar", betas=(0.8, 0.8), nesterov=nesterov)
    params, references, rng = random_run((*SHAPES, (16, 12), (12, 16)), config)
    optimizer = Pion(params, config=config)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = lr = (0.02, 0.05, 0.01)[step % 3]
        gradients = draw(rng, [r.w.shape for r in references], 1.0)
        set_gradients(params, gradients)
        optimizer.step()
        for p, g, reference in zip(params, gradients, references, strict=True):
            reference.step(g, lr)
            error = distance(p, reference.w)
            assert error <= TOLERANCE, f"step {step}, {tuple(p.shape)}: {error:.1e}"


def test_parts_of_a_weight_are_matrices_of_their_own() -> None:
    rng = np.random.default_rng(1)
    weights = draw(rng, [(view.rows, view.cols) for view in CUT_VIEWS], 0.2)
    params = parameters(weights, torch.float64)
    views = dict(zip(params, CUT_VIEWS, strict=True))
    optimizer = Pion(params, lr=0.05, config=POLAR, views=views)
    references = {
        p: {
            part: [reference_of(matrix.numpy(), POLAR, view.axis) for matrix in batch]
            for part, batch in view.split(p.detach()).items()
        }
        for p, view in views.items()
    }
    for _ in range(STEPS):
        set_gradients(params, draw(rng, [p.shape for p in params], 1.0))
        optimizer.step()
    rng = np.random.default_rng(1)
    draw(rng, [p.shape for p in params], 0.2)
    for _ in range(STEPS):
        for p, g in zip(params, draw(rng, [p.shape for p in params], 1.0), strict=True):
            for part, batch in views[p].split(torch.tensor(g)).items():
                for reference, gradient in zip(references[p][part], batch, strict=True):
                    reference.step(gradient.numpy(), 0.05)
    for p, view in views.items():
        for part, batch in view.split(p.detach()).items():
            expected = np.stack([reference.w for reference in references[p][part]])
            assert error_of(batch, expected) <= TOLERANCE, f"{view}, {part}"


def one(w: Array, lr: float = 0.05, config: PionConfig = POLAR) -> tuple[torch.Tensor, Pion]:
    (p,) = parameters([w], torch.float64)
    return p, Pion([p], lr=lr, config=config)


def stepped(w: Array, gradients: Sequence[Array], config: PionConfig = POLAR) -> torch.Tensor:
    p, optimizer = one(w, config=config)
    for g in gradients:
        set_gradients([p], [g])
        optimizer.step()
    return p.detach()


SPECIAL = ("square", "tall", "wide")
SHAPE = {"square": (8, 8), "tall": (12, 5), "wide": (5, 12)}


def special(kind: str, spectrum: str, rng: np.random.Generator) -> Array:
    m, n = SHAPE[kind]
    u, _, vt = np.linalg.svd(rng.standard_normal((m, n)), full_matrices=False)
    r = min(m, n)
    sigma = {
        "equal": np.ones(r),
        "half zero": np.r_[np.ones(r - r // 2), np.zeros(r // 2)] * np.linspace(2, 1, r),
        "rank one": np.r_[1.0, np.zeros(r - 1)],
        "pairs": np.repeat(np.arange(r // 2 + 1, 0, -1.0), 2)[:r],
        "tiny": np.geomspace(1, 1e-12, r),
    }[spectrum]
    return (u * sigma) @ vt


@pytest.mark.parametrize("spectrum", ["equal", "half zero", "rank one", "pairs", "tiny"])
@pytest.mark.parametrize("kind", SPECIAL)
def test_special_spectra_are_kept_while_the_weight_moves(kind: str, spectrum: str) -> None:
    """To 1e-9 of the largest: the cubic leaves (angle⁶ / 64)² of it, of angles up to 0.5."""
    rng = np.random.default_rng(2)
    w = special(kind, spectrum, rng)
    moved = stepped(w, draw(rng, [w.shape] * STEPS, 1.0))
    old, new = (np.linalg.svd(x, compute_uv=False) for x in (w, moved.numpy()))
    assert np.abs(new - old).max() <= 1e-9 * old.max()
    assert 1e-3 < np.abs(moved.numpy() - w).max() / np.abs(w).max() < 1.0


def test_a_weight_or_a_gradient_of_zeros_moves_nothing() -> None:
    """Bit for bit, and what follows is as if it had not been."""
    rng = np.random.default_rng(3)
    for w in draw(rng, [(8, 8), (12, 5), (5, 12)], 0.2):
        zero = np.zeros_like(w)
        assert torch.equal(stepped(w, [zero, zero]), torch.tensor(w))
        assert torch.equal(stepped(zero, draw(rng, [w.shape] * 3, 1.0)), torch.tensor(zero))


@pytest.mark.parametrize("power", [-15, -7, 7, 15])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_scale_of_the_gradient_does_not_matter(power: int, dtype: torch.dtype) -> None:
    """A power of 2 near 10^power: every rounding is the same but the division's by a norm."""
    rng = np.random.default_rng(4)
    shapes = [(8, 8), (12, 5), (5, 12)]
    weights, gradients = draw(rng, shapes, 0.2), [draw(rng, shapes, 1.0) for _ in range(3)]
    stepped = []
    for scale in (1.0, 2.0 ** round(power * np.log2(10))):
        params = parameters(weights, dtype)
        optimizer = Pion(params, lr=0.05, config=POLAR)
        for each in gradients:
            set_gradients(params, [scale * g for g in each])
            optimizer.step()
        stepped.append(params)
    for p, q in zip(*stepped, strict=True):
        assert (p - q).abs().max() <= 100 * torch.finfo(dtype).eps * p.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "bound"), [("highest", 2e-6), ("bf16", 3e-5)])
def test_frames_stay_orthonormal_where_averages_are_nearly_of_low_rank(
    precision: str, bound: float
) -> None:
    """In bf16 without the third order of the polish it is 7e-5 at once, and grows."""
    generator = torch.Generator().manual_seed(0)
    m, n = 704, 256
    p = torch.nn.Parameter(torch.randn(m, n, generator=generator) / n**0.5)
    optimizer = Pion([p], lr=0.02, config=PionConfig(matmul_precision=precision))
    left, right = (torch.linalg.qr(torch.randn(k, n, generator=generator))[0] for k in (m, n))
    values = torch.arange(1.0, n + 1.0) ** -2
    watch = Diagnostics(optimizer)
    for _ in range(4):
        p.grad = (left * values) @ right.mT
        watch.record()
        optimizer.step()
        (row,) = watch.report()
        assert row.angle > 0.05 and row.orthogonality < bound


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["highest", "bf16"])
def test_the_spectrum_stays_over_ten_thousand_steps(precision: str) -> None:
    """In float32: within 1e-6 of the largest, 1e-5 with bf16 products, and it does not grow.

    At a rate that turns by up to 0.3 a step. The last thousand steps may be twice as far off as the
    second, of which the largest of ten readings is taken.
    """
    config = PionConfig(direction="polar", betas=(0.95, 0.95), matmul_precision=precision)
    generator = torch.Generator().manual_seed(5)
    shapes = [(24, 16)]
    params = [torch.nn.Parameter(torch.randn(s, generator=generator) / s[1] ** 0.5) for s in shapes]
    start = [torch.linalg.svdvals(p.detach().double()) for p in params]
    optimizer = Pion(params, lr=0.02, config=config)
    shifts = []
    for step in range(1, 10_001):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
        if step % 100 == 0:
            now = [torch.linalg.svdvals(p.detach().double()) for p in params]
            each = [(a - b).abs().max() / b.max() for a, b in zip(now, start, strict=True)]
            shifts.append(max(float(x) for x in each))
    assert max(shifts) <= {"highest": 1e-6, "bf16": 1e-5}[precision]
    assert max(shifts[-10:]) <= 2 * max(shifts[10:20])


def test_what_is_kept_of_muons_step() -> None:
    """All but what would move singular values: −Uᵀ ΔW V is B off the diagonal, to first order.

    At a small rate, on spectra whose values lie well apart, the rest is of second order.
    """
    rng = np.random.default_rng(6)
    for m, n in ((8, 8), (12, 5), (5, 12)):
        r = min(m, n)
        u, _, vt = np.linalg.svd(rng.standard_normal((m, n)), full_matrices=False)
        w = (u * np.arange(r, 0, -1.0)) @ vt
        reference = ReferencePolar(w, POLAR)
        (g,) = draw(rng, [w.shape], 1.0)
        reference.step(g, 1e-4)
        b = reference.d - u @ np.diag(np.diag(u.T @ reference.d @ vt.T)) @ vt
        error = np.abs(w - stepped_at(w, g, 1e-4) - b).max() / np.abs(b).max()
        assert error <= 1e-3


def stepped_at(w: Array, g: Array, lr: float) -> Array:
    p, optimizer = one(w, lr)
    set_gradients([p], [g])
    optimizer.step()
    return p.detach().numpy()


def test_readings_are_what_the_step_did() -> None:
    rng = np.random.default_rng(7)
    weights = draw(rng, [(12, 5), (5, 12), (8, 8)], 0.2)
    params = parameters(weights, torch.float64)
    references = [ReferencePolar(w, POLAR) for w in weights]
    optimizer = Pion(params, lr=0.02, config=POLAR)
    watch = Diagnostics(optimizer)
    watch.record()
    gradients = draw(rng, [w.shape for w in weights], 1.0)
    set_gradients(params, gradients)
    optimizer.step()
    for row, w, g, reference in zip(watch.report(), weights, gradients, references, strict=True):
        reference.step(g, 0.02)
        change, d = reference.w - w, reference.d
        kept = -np.sum(change * d) / np.sum(d * d)
        rms = np.sqrt(np.mean(change**2))
        assert max(row.drift, row.shift, row.orthogonality) <= 1e-9
        assert 0.005 < row.angle < 0.5 and math.isnan(row.alpha)
        assert np.allclose([row.kept, row.update_rms], [kept, rms], rtol=1e-9)


def test_a_change_as_small_as_rounding_is_undone_by_the_next_step(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A float32 weight that is off by 1e-5 is taken for rounded: W = U Σ Vᵀ is made anew."""
    generator = torch.Generator().manual_seed(8)
    p = torch.nn.Parameter(torch.randn(12, 8, generator=generator))
    optimizer = Pion([p], lr=1e-3, config=POLAR)
    start = torch.linalg.svdvals(p.detach().double())
    for factor in (1.0, 1.0 + 1e-5):
        with torch.no_grad():
            p.mul_(factor)
        p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    assert (torch.linalg.svdvals(p.detach().double()) - start).abs().max() <= 1e-6 * start.max()
    assert not caplog.records


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_that_were_changed_are_factorized_anew(
    dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, with a line in the log; a weight that was only rounded or copied is not."""
    generator = torch.Generator().manual_seed(8)
    w = torch.randn(12, 8, generator=generator).to(dtype)
    p = torch.nn.Parameter(w.clone())
    optimizer = Pion([("fc.weight", p)], lr=1e-3, config=POLAR)

    def step() -> None:
        p.grad = torch.randn(p.shape, generator=generator).to(dtype)
        optimizer.step()

    def values() -> torch.Tensor:
        return torch.linalg.svdvals(p.detach().float())

    step()
    with torch.no_grad():
        p.copy_(p.clone())
    step()
    assert not caplog.records
    with torch.no_grad():
        p.mul_(2.0)
    before = values()
    with caplog.at_level(logging.WARNING, "pion_dist"):
        step()
    ((message,),) = ([r.getMessage() for r in caplog.records],)
    assert message.startswith("fc.weight:whole[0] is not the product of its factors")
    # bf16 weights are rounded when stored, by 2^-9 of an element.
    assert (values() - before).abs().max() <= {torch.float32: 1e-6}.get(dtype, 1e-2) * before.max()
    step()
    assert len(caplog.records) == 1


def test_a_model_that_is_converted_to_float64_has_factors_of_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Without a line in the log: the weights are, to float32's rounding, those of their factors."""
    model = torch.nn.Linear(8, 12, bias=False)
    optimizer = Pion(model.parameters(), lr=1e-3, config=POLAR)

    def step() -> None:
        model.weight.grad = torch.randn_like(model.weight)
        optimizer.step()

    step()
    model.double()
    start = torch.linalg.svdvals(model.weight.detach())
    for _ in range(3):
        step()
        assert (torch.linalg.svdvals(model.weight.detach()) - start).abs().max() <= 1e-12
    assert not caplog.records


def test_a_rate_of_zero_moves_the_average_alone() -> None:
    """Bit for bit, also where the rate is a tensor."""
    rng = np.random.default_rng(12)
    for lr in (0.0, torch.tensor(0.0)):
        for w in draw(rng, [(8, 8), (12, 5), (5, 12)], 0.2):
            p, optimizer = one(w)
            for rate in (0.05, lr):
                optimizer.param_groups[0]["lr"] = rate
                before = {"w": p.detach().clone()}
                before |= {key: x.clone() for key, x in optimizer.state[p].items()}
                set_gradients([p], draw(rng, [w.shape], 1.0))
                optimizer.step()
            after = {"w": p.detach(), **optimizer.state[p]}
            changed = {key for key, x in after.items() if not torch.equal(x, before[key])}
            assert changed == {"m.whole"}


def test_a_state_of_other_weights_is_told_and_the_weights_win(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rng = np.random.default_rng(9)
    old, new = draw(rng, [(12, 8)] * 2, 0.2)
    p, optimizer = one(old)
    g, h = draw(rng, [(12, 8)] * 2, 1.0)
    set_gradients([p], [g])
    optimizer.step()
    q, other = one(new)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    set_gradients([q], [h])
    other.step()
    assert len(caplog.records) == 1
    values = np.linalg.svd(q.detach().numpy(), compute_uv=False)
    assert np.abs(values - np.linalg.svd(new, compute_uv=False)).max() <= 1e-9


@pytest.mark.parametrize("state_dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("after", [0, 3])
def test_resuming_is_going_on(state_dtype: str, after: int) -> None:
    """Bit for bit, with float32 weights; also where no step was taken before."""
    config = PionConfig(direction="polar", betas=(0.95, 0.95), state_dtype=state_dtype)
    generator = torch.Generator().manual_seed(10)
    shapes = [(12, 8), (12, 8), (8, 8), (4, 24)]
    params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    optimizer = Pion(params, lr=0.02, config=config)
    gradients = [[torch.randn(s, generator=generator) for s in shapes] for _ in range(after + 3)]

    def go(optimizer: Pion, params: Sequence[torch.Tensor], some: slice) -> None:
        for each in gradients[some]:
            for p, g in zip(params, each, strict=True):
                p.grad = g.clone()
            optimizer.step()

    go(optimizer, params, slice(after))
    copied = [torch.nn.Parameter(p.detach().clone()) for p in params]
    resumed = Pion(copied, lr=0.02, config=config)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    go(optimizer, params, slice(after, None))
    go(resumed, copied, slice(after, None))
    for p, q in zip(params, copied, strict=True):
        assert torch.equal(p, q)


def test_not_finite_gradients_move_nothing() -> None:
    rng = np.random.default_rng(11)
    w, g = draw(rng, [(12, 8)], 0.2)[0], draw(rng, [(12, 8)], 1.0)[0]
    p, optimizer = one(w)
    bad = g.copy()
    bad[3, 3] = np.nan
    for gradient, moves in ((bad, False), (g, True), (bad, False)):
        before = [x.clone() for x in (p.detach(), *optimizer.state[p].values())]
        set_gradients([p], [gradient])
        optimizer.step()
        after = [p.detach(), *optimizer.state[p].values()]
        same = [torch.equal(x, y) for x, y in zip(before, after, strict=True)]
        assert same[0] is not moves and same[1] is not moves  # the weight, and M


def test_a_weight_that_is_not_finite_is_refused_by_name() -> None:
    w = np.ones((4, 3))
    w[1, 1] = np.inf
    p, optimizer = one(w)
    set_gradients([p], [np.ones((4, 3))])
    with pytest.raises(ValueError, match=r"parameter 0 of group 0:whole\[0\] is not finite"):
        optimizer.step()


@pytest.mark.parametrize(
    "option",
    [
        {"momentum": "transported"},
        {"eps": 1e-6},
        {"side": "alternate"},
        {"scaling": "none"},
        {"rms": 0.3},
        {"retraction": "exp"},
        {"degree": 4},
        {"state_layout": "dense"},
        {"blocks": 2},
        {"spectrum_reset_interval": 5},
    ],
    ids=str,
)
def test_options_of_other_directions_are_refused_by_name(option: dict[str, object]) -> None:
    (name,) = option
    with pytest.raises(ValueError, match=f"^{name}=.*direction='polar'"):
        PionConfig(direction="polar", **option)
