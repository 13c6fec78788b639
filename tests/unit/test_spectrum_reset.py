"""spectrum_reset_interval gives each matrix its first singular values back, in its turn."""

import copy
import logging
import math
from dataclasses import replace

import pytest
import torch
from optimizer_cases import CONFIGS, set_grads, weights
from reference import MSIGN
from torch import Tensor, nn

from pion_dist import Pion, PionConfig
from pion_dist.matrices import stacked
from pion_dist.plan import due
from pion_dist.spectrum import singular_values

INTERVAL = 3
SHAPES = ((12, 8), (8, 16), (24, 6))
GENERATORS = [config for config in CONFIGS if config.direction != "polar"]
each_config = pytest.mark.parametrize(
    "config", GENERATORS, ids=lambda config: f"{config.momentum}-{config.direction}"
)


def optimizer_of(params: list[nn.Parameter], config: PionConfig, **options: object) -> Pion:
    views = {params[2]: stacked(24, 6, name="head", count=4, axis=None)}
    config = replace(config, spectrum_reset_interval=INTERVAL, **options)
    return Pion(params, lr=0.1, config=config, views=views)


def spectra(optimizer: Pion) -> dict[str, Tensor]:
    return {name: singular_values(x) for name, x in optimizer.matrices()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@each_config
def test_each_matrix_gets_its_values_back_in_its_turn(
    config: PionConfig, dtype: torch.dtype
) -> None:
    """W = U S₀ Vᵀ is rounded once: singular values are off by ‖ΔW‖₂ ≤ u ‖W‖_F at most.

    In float64 its products and S₀ itself are rounded as well, sums of up to 24: 50 of that.
    """
    params = weights(*SHAPES, dtype=dtype)
    optimizer = optimizer_of(params, config)
    start = spectra(optimizer)
    turns = dict.fromkeys(start, 0)
    unit = torch.finfo(dtype).eps / 2 * (1 if dtype == torch.float32 else 50)
    for step in range(1, 3 * INTERVAL + 1):
        if step > 1:  # once the start is measured
            with torch.no_grad():
                for p in params:
                    p.mul_(1.01)
        set_grads(params, step)
        optimizer.step()
        for name, now in spectra(optimizer).items():
            error = (now - start[name]).abs().max()
            if due(name, step, INTERVAL):
                turns[name] += 1
                assert error <= unit * start[name].norm(), (name, step)
            elif step > 1:
                assert error > 5e-3 * start[name].max()
    assert set(turns.values()) == {3}


def test_turns_are_spread_and_are_the_names() -> None:
    names = [
        f"decoder.layers.{i}.mlp.linear_fc1.weight:{part}[0]"
        for i in range(200)
        for part in ("gate", "up")
    ]
    counts = [sum(due(name, step, 20) for name in names) for step in range(1, 21)]
    # 400 names in 20 turns, 20 in each: a binomial of deviation 4.4, 5 of them.
    assert sum(counts) == 400 and max(counts) <= 42
    assert [due(names[0], step, 1) for step in range(3)] == [True] * 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@each_config
def test_resume_equals_straight(config: PionConfig, dtype: torch.dtype) -> None:
    straight, resumed = weights(*SHAPES, dtype=dtype), weights(*SHAPES, dtype=dtype)
    a, b = optimizer_of(straight, config), optimizer_of(resumed, config)

    def steps(first: int, last: int) -> None:
        for step in range(first, last):
            for params, optimizer in ((straight, a), (resumed, b)):
                with torch.no_grad():
                    for p in params:
                        p.mul_(1.01)
                set_grads(params, step)
                optimizer.step()

    steps(0, 2)
    saved = copy.deepcopy(b.state_dict())
    b = optimizer_of(resumed, config)
    b.load_state_dict(saved)
    starts = [x for state in b.state.values() for key, x in state.items() if key[:2] == "s."]
    assert len(starts) == 3 and all(x.dtype == torch.float64 for x in starts)
    steps(2, 3 * INTERVAL)
    assert all(torch.equal(p, q) for p, q in zip(straight, resumed, strict=True))


def test_a_state_without_spectra_takes_the_weights_and_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    params = weights(*SHAPES, dtype=torch.float64)
    config, views = PionConfig(**MSIGN), {params[2]: stacked(24, 6, name="head", count=4)}
    old = Pion(params, lr=0.1, config=config, views=views)
    set_grads(params, 0)
    old.step()
    optimizer = optimizer_of(params, config)
    with caplog.at_level(logging.WARNING, logger="pion_dist"):
        optimizer.load_state_dict(copy.deepcopy(old.state_dict()))
    (record,) = caplog.records
    assert "no spectra at start (of parameter 0 of group 0, and 2 more)" in record.getMessage()
    loaded = spectra(optimizer)
    for step in range(INTERVAL):
        set_grads(params, step)
        optimizer.step()
    for name, now in spectra(optimizer).items():
        torch.testing.assert_close(now, loaded[name], rtol=0, atol=1e-4)
    again = Pion(params, lr=0.1, config=config, views=views)
    again.load_state_dict(optimizer.state_dict())  # where spectra are not reset, they are left out
    assert not [key for state in again.state.values() for key in state if key[0] == "s"]


def test_nothing_moves_in_a_step_of_non_finite_gradients() -> None:
    params = weights(*SHAPES)
    optimizer = optimizer_of(params, PionConfig(**MSIGN))
    for step in range(2 * INTERVAL):
        with torch.no_grad():
            for p in params:
                p.mul_(1.01)
        before = [p.detach().clone() for p in params]
        set_grads(params, step)
        params[1].grad[0, 0] = math.nan
        optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


def test_a_parameter_whose_first_gradient_is_late_is_measured_then() -> None:
    params = weights(*SHAPES, dtype=torch.float64)
    optimizer = optimizer_of(params, PionConfig(**MSIGN))
    set_grads(params, 0)
    params[1].grad = None
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer = optimizer_of(params, PionConfig(**MSIGN))
    optimizer.load_state_dict(saved)  # with zeros
    with torch.no_grad():
        params[1].mul_(2.0)
    late = singular_values(params[1])
    for step in range(1, 1 + INTERVAL):
        set_grads(params, step)
        optimizer.step()
    torch.testing.assert_close(singular_values(params[1]), late, rtol=1e-4, atol=0)


def test_off_there_is_nothing_of_it() -> None:
    params = weights(*SHAPES)
    optimizer = Pion(params, config=PionConfig(**MSIGN))
    assert not [key for state in optimizer.state.values() for key in state if key[0] == "s"]
    assert not any("spectrum" in line for line in optimizer.plan.lines(0))
    assert not any("spectrum" in line for line in optimizer.config.lines())
    lines = PionConfig(**MSIGN, spectrum_reset_interval=7).lines()
    assert any("spectrum_reset_interval=7" in x for x in lines)


@pytest.mark.parametrize("interval", [-1, 2.5, True, "3"])
def test_bad_intervals_are_refused(interval: object) -> None:
    with pytest.raises(ValueError, match="spectrum_reset_interval"):
        PionConfig(spectrum_reset_interval=interval)
