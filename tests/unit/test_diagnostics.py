"""Diagnostics' numbers are what NumPy finds in the weights before and after a step."""

import copy
import math
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from optimizer_cases import set_grads, weights
from reference import MSIGN, PUBLISHED
from torch import Tensor, nn

from megatron_patches.diagnostics import _write
from pion_dist import Pion, PionConfig
from pion_dist.diagnostics import Diagnostics, Row, line, scalars
from pion_dist.matrices import interleaved, stacked

UNIT32 = 2.0**-24

CONFIGS = [
    PionConfig(),
    PionConfig(**PUBLISHED),
    PionConfig(momentum="ambient", direction="momentum", retraction="cayley"),
    PionConfig(**MSIGN | {"retraction": "exp"}, blocks=2),
]
each_config = pytest.mark.parametrize(
    "config", CONFIGS, ids=["polar", "lie-taylor", "ambient-cayley", "transported-exp"]
)


def watched_step(
    watch: Diagnostics, optimizer: Pion, params: list[nn.Parameter], step: int
) -> list[Row]:
    set_grads(params, step)
    watch.record()
    optimizer.step()
    return watch.report()


def column(rows: list[Row], name: str) -> dict[str, float]:
    return {row.name: getattr(row, name) for row in rows}


def numbers(rows: list[Row]) -> Tensor:
    """[matrices, 7]: all but names and sizes."""
    return torch.tensor([astuple(row)[3:] for row in rows], dtype=torch.float64)


def values_of(w: Tensor) -> np.ndarray:
    return np.linalg.svd(w.detach().double().numpy(), compute_uv=False)


def values_at_start(w: Tensor, config: PionConfig) -> np.ndarray:
    """What drift is measured from: of polar Σ, which is held as the weights are."""
    values = values_of(w)
    if config.direction == "polar":
        return torch.from_numpy(values).to(w.dtype).double().numpy()
    return values


def by_numpy(old: np.ndarray, new: np.ndarray) -> tuple[float, float]:
    """Drift and shift."""
    change = np.abs(new - old)
    return float((change / old).max()), float((change / old[0]).max())


@each_config
def test_drift_is_what_numpy_finds(config: PionConfig) -> None:
    params = weights((12, 8), (8, 16), (24, 6))
    views = {
        params[0]: stacked(12, 8, name="gate_up", count=2, axis="rows"),
        params[2]: interleaved(24, 6, repeated=[("q", 4), ("k", 2)], per_repetition=True),
    }
    optimizer = Pion(params, lr=0.1, config=config, views=views)
    start = {name: values_at_start(x, config) for name, x in optimizer.matrices()}
    watch = Diagnostics(optimizer)
    for step in range(4):
        report = watched_step(watch, optimizer, params, step)
    expected = {name: by_numpy(start[name], values_of(x)) for name, x in optimizer.matrices()}
    assert column(report, "name").keys() == expected.keys() and len(expected) == 11
    shifts = column(report, "shift")
    for name, drift in column(report, "drift").items():
        # Squares of singular values are exact to 2**-53 k of the largest, so values here, with
        # conditions up to 100, to 1e-16 * 8 * 100**2.
        assert abs(drift - expected[name][0]) <= 1e-11, name
        assert abs(shifts[name] - expected[name][1]) <= 1e-11, name
        assert 0 < shifts[name] <= drift < 2e-3


@pytest.mark.parametrize("direction", ["momentum", "msign"])
@pytest.mark.parametrize("retraction", ["taylor", "cayley", "exp"])
@pytest.mark.parametrize(("shape", "side"), [((5, 9), "out"), ((9, 5), "in"), ((6, 6), "out")])
def test_the_factor_is_read_as_it_is(
    shape: tuple[int, int], side: str, retraction: str, direction: str
) -> None:
    """Of a step with one side, the factor follows from the weights: E = W' W⁺."""
    (p,) = params = weights(shape, dtype=torch.float64)
    options = MSIGN | {"side": side, "retraction": retraction, "direction": direction}
    config = PionConfig(**options)
    optimizer = Pion(params, lr=0.5, config=config)
    before = p.detach().clone().numpy()
    report = watched_step(Diagnostics(optimizer), optimizer, params, 0)
    after = p.detach().numpy()
    # The factor turns what W spans.
    e = after @ np.linalg.pinv(before) if side == "out" else np.linalg.pinv(before) @ after
    angle = np.abs(np.angle(np.linalg.eigvals(e))).max()
    error = np.linalg.norm(e.T @ e - np.eye(len(e)), 2)
    orthogonality, reported, alpha, kept, rms = numbers(report)[0, 2:].tolist()
    assert 0.1 < angle < 1.5
    # The vector ends in the plane of the largest turn to (σ₂/σ₁)^32, which is squared in both; the
    # matrix sign's planes are alike.
    tolerance = 0.02 if direction == "momentum" else 0.15
    assert (1 - tolerance) * angle <= reported <= angle + 1e-12
    if retraction == "taylor":
        assert error > 1e-6 and 0.3 * error <= orthogonality <= error * (1 + 1e-6) + 1e-14
    else:
        assert max(error, orthogonality) < 1e-13
    np.testing.assert_allclose(rms, np.sqrt(np.mean((after - before) ** 2)), rtol=1e-6)
    assert alpha > 0 and math.isnan(kept)


def test_alpha_is_the_scale_of_the_generator() -> None:
    """From the equations: A = W Gᵀ − G Wᵀ of the first gradient G, and ‖lr α A W‖_F / √(mn)."""
    (p,) = params = weights((5, 7), dtype=torch.float64)
    config = PionConfig(momentum="ambient", direction="momentum", betas=(0.0, 0.0), side="out")
    optimizer = Pion(params, lr=0.1, config=config)
    w = p.detach().clone().numpy()
    report = watched_step(Diagnostics(optimizer), optimizer, params, 0)
    g = p.grad.numpy()
    a = w @ g.T - g @ w.T
    expected = config.rms * math.sqrt(w.size) / np.linalg.norm(a @ w)
    np.testing.assert_allclose(column(report, "alpha").popitem()[1], expected, rtol=1e-6)


@each_config
def test_watching_changes_no_bit_and_ends_with_the_step(config: PionConfig) -> None:
    seen, unseen = weights((12, 8), (8, 16)), weights((12, 8), (8, 16))
    a, b = Pion(seen, lr=0.1, config=config), Pion(unseen, lr=0.1, config=config)
    watch = Diagnostics(a)
    for step in range(3):
        report = watched_step(watch, a, seen, step)
        set_grads(unseen, step)
        b.step()
    assert all(torch.equal(p, q) for p, q in zip(seen, unseen, strict=True))
    other = "alpha" if config.direction == "polar" else "kept"
    measured = ("drift", "shift", "orthogonality", "angle", "alpha", "kept", "update_rms")
    for name in measured:
        finite = [math.isfinite(value) for value in column(report, name).values()]
        assert not any(finite) if name == other else all(finite)
    set_grads(seen, 3)
    a.step()  # not recorded
    later = numbers(watch.report())
    assert later[:, :2].isfinite().all() and later[:, 2:].isnan().all()


@each_config
def test_a_step_that_is_not_taken_reads_zero(config: PionConfig) -> None:
    """Drift too, but for polar's: against Σ, which is rounded to float32 at the first step."""
    params = weights((6, 4), (4, 10))
    optimizer = Pion(params, lr=0.1, config=config)
    watch = Diagnostics(optimizer)
    set_grads(params, 0)
    params[1].grad[0, 0] = math.nan
    watch.record()
    optimizer.step()
    values = numbers(watch.report())
    assert not values[:, 2:].any()
    assert (values[:, :2] <= (UNIT32 if config.direction == "polar" else 0.0)).all()


def test_weights_that_are_not_finite_do_not_stop_a_report() -> None:
    params = weights((6, 4), (3, 9))
    optimizer = Pion(params, lr=0.1)
    watch = Diagnostics(optimizer)
    with torch.no_grad():
        params[1][0, 0] = math.nan
    (fine, broken) = column(watch.report(), "drift").values()
    assert fine == 0 and broken == math.inf


def test_large_matrices_are_measured_by_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pion_dist.diagnostics.EXACT_SIDE", 4)
    params = weights((6, 8), (4, 9))
    optimizer = Pion(params, lr=0.1, config=PionConfig(**PUBLISHED))
    watch, exact = Diagnostics(optimizer), Diagnostics(optimizer, exact=True)
    before = np.linalg.svd(params[0].detach().double().numpy(), compute_uv=False)
    for step in range(3):
        set_grads(params, step)
        optimizer.step()
    after = np.linalg.svd(params[0].detach().double().numpy(), compute_uv=False)
    changes = [abs(np.linalg.norm(after, p) / np.linalg.norm(before, p) - 1) for p in (2, np.inf)]
    report = watch.report()
    assert [row.exact for row in report] == [False, True]
    assert all(row.exact for row in exact.report())
    # Sums of 48 float64 numbers, and a largest value that is found in a space of all dimensions.
    assert abs(report[0].drift - max(changes)) < 1e-13
    assert [math.isnan(row.shift) for row in report] == [True, False]
    assert max(changes) > 1e-9


@pytest.mark.parametrize("exact", [True, False], ids=["values", "norms"])
@pytest.mark.parametrize(
    "options",
    [{}, PUBLISHED | {"spectrum_reset_interval": 1000}],
    ids=["default", "published"],
)
def test_drift_is_since_the_start_that_a_checkpoint_has(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, object], exact: bool
) -> None:
    monkeypatch.setattr("pion_dist.diagnostics.EXACT_SIDE", 0)
    params = weights((6, 8), (4, 9))
    config = PionConfig(**options)
    optimizer = Pion(params, lr=0.1, config=config)
    values = [values_at_start(p, config) for p in params]
    for step in range(3):
        set_grads(params, step)
        optimizer.step()
    resumed = Pion(params, lr=0.1, config=config)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    report = Diagnostics(resumed, exact=exact).report()
    for p, before, reported in zip(params, values, column(report, "drift").values(), strict=True):
        after = values_of(p)
        if not exact:
            before, after = (
                np.array([np.linalg.norm(x, q) for q in (2, np.inf)]) for x in (before, after)
            )
        # As in the tests above, of conditions up to 100.
        assert abs(reported - np.abs(after / before - 1).max()) <= 1e-11
        assert reported > 1e-9


@pytest.mark.parametrize("exact", [True, False], ids=["values", "norms"])
def test_what_is_done_to_a_weight_by_hand_is_seen(
    monkeypatch: pytest.MonkeyPatch, exact: bool
) -> None:
    """But for polar, whose next step puts W = U Σ Vᵀ back, or takes Σ anew."""
    monkeypatch.setattr("pion_dist.diagnostics.EXACT_SIDE", 0)
    params = weights((24, 16), (16, 20), (32, 8))
    optimizer = Pion(params, lr=0.01, config=PionConfig(**MSIGN))
    watch = Diagnostics(optimizer, exact=exact)
    with torch.no_grad():
        params[1] *= 1.0 + 1e-5
    drifts = column(watched_step(watch, optimizer, params, 0), "drift")
    worst = max(drifts, key=drifts.__getitem__)
    assert worst == "parameter 1 of group 0:whole[0]"
    # Rounding of the product and of the step: 2 units in each element, ‖W‖_F 2**-23 altogether, to
    # a smallest value of ‖W‖_F / 40 at least.
    assert abs(drifts[worst] - 1e-5) < 40 * 2 * UNIT32 * 2
    assert all(drift < 5e-6 for name, drift in drifts.items() if name != worst)


def test_weights_and_biases_has_the_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With Megatron's writer, which is the module itself; where wandb is installed, offline."""
    wandb = pytest.importorskip("wandb")
    from megatron.training import global_vars

    monkeypatch.setattr(global_vars, "_GLOBAL_WANDB_WRITER", wandb)
    run = wandb.init(mode="offline", dir=tmp_path, project="pion")
    numbers = {"pion/drift": 2e-6, "pion-drift/a:q": 1e-6}
    _write(numbers, 7)
    _write({"pion/drift": 3e-6}, 8)  # an iteration is complete when the next one begins
    assert {"_step": 7, **numbers}.items() <= dict(run.summary).items()
    wandb.finish()


def rows_of(*, alphas: tuple[float, ...], kept: tuple[float, ...]) -> list[Row]:
    numbers = (
        ("a:q[0]", True, 10, 1e-6, 2e-7, 1e-9, 0.01),
        ("a:q[1]", True, 10, 2e-6, 1e-7, 1e-9, 0.01),
        ("b:whole[0]", False, 60, 4e-8, math.nan, 1e-7, 0.02),
    )
    each = zip(numbers, alphas, kept, (3e-3, 3e-3, 1e-3), strict=True)
    return [Row(*row, alpha, share, rms) for row, alpha, share, rms in each]


def test_the_log_s_line_names_the_worst_of_each_kind() -> None:
    rows = rows_of(alphas=(0.5, 0.5, 2.0), kept=(math.nan,) * 3)
    assert line(rows, 7) == (
        " pion at iteration 7 | drift: 2.000E-06 (a:q[1]) | shift: 2.000E-07 (a:q[0]) | "
        "norm-drift: 4.000E-08 (b:whole[0]) | orthogonality: 1.000E-07 (b:whole[0]) | "
        "angle: 2.000E-02 (b:whole[0]) | "
        # sqrt((20 · 9e-6 + 60 · 1e-6) / 80)
        "alpha: 5.000E-01 to 2.000E+00 | update rms: 1.732E-03 |"
    )
    by_tag = scalars(rows)
    assert (by_tag["pion-drift/a:q"], by_tag["pion-norm-drift/b:whole"]) == (2e-6, 4e-8)
    assert "pion/kept" not in by_tag
    still = [replace(row, angle=math.nan) for row in rows]
    assert line(still, 8).endswith("(b:whole[0]) | no step was taken |")


def test_the_log_s_line_has_what_polar_keeps_in_alpha_s_place() -> None:
    rows = rows_of(alphas=(math.nan,) * 3, kept=(0.99, 0.97, 0.98))
    assert line(rows, 7).endswith(" | kept: 9.700E-01 (a:q[1]) | update rms: 1.732E-03 |")
    by_tag = scalars(rows)
    assert by_tag["pion/kept"] == 0.97 and "pion/alpha-min" not in by_tag
    assert (by_tag["pion-kept/a:q"], by_tag["pion-kept/b:whole"]) == (0.97, 0.98)
