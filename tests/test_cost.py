"""The counted FLOP are the executed ones, and the cheaper form is the one that is chosen."""

from unittest.mock import patch

import pytest
import torch
from reference import PUBLISHED
from torch.utils.flop_counter import FlopCounterMode

from pion_dist import Pion, PionConfig, kernels
from pion_dist.cost import forms, step_flop


def executed(m: int, n: int, config: PionConfig, *, steps: int = 2) -> float:
    p = torch.nn.Parameter(torch.randn(m, n))
    optimizer = Pion([p], config=config)
    total = 0.0
    for _ in range(steps):
        p.grad = torch.randn(m, n)
        thin = patch.object(kernels, "THIN", 0)  # products in elementwise work's place
        with thin, FlopCounterMode(display=False) as counter:
            optimizer.step()
        total += counter.get_total_flops()
    return total / steps


def solvers(m: int, n: int, config: PionConfig) -> float:
    """What LAPACK does for the basis of a large side, not seen by torch."""
    in_parts = max(m, n) > 2 * min(m, n) and config.momentum != "lie"
    return in_parts * (1 + 1 / 3) * min(m, n) ** 3 / (2 if config.side == "alternate" else 1)


@pytest.mark.parametrize("side", ["both", "alternate", "in", "out"])
@pytest.mark.parametrize("momentum", ["lie", "transported", "ambient"])
@pytest.mark.parametrize("shape", [(8, 8), (8, 64), (64, 8), (24, 32)], ids=str)
@pytest.mark.parametrize(("retraction", "scaling"), [("taylor", "rms"), ("cubic", "spectral")])
def test_products_are_counted_exactly(
    shape: tuple[int, int], momentum: str, side: str, retraction: str, scaling: str
) -> None:
    config = PionConfig(
        momentum=momentum,
        direction="momentum",
        side=side,
        retraction=retraction,
        scaling=scaling,
    )
    assert step_flop(*shape, config) == executed(*shape, config)


@pytest.mark.parametrize(
    "options",
    [*(PUBLISHED | {"direction": "msign", "momentum": m} for m in ("lie", "transported")), {}],
    ids=["lie", "transported", "default"],
)
@pytest.mark.parametrize("shape", [(8, 8), (8, 64), (64, 8)], ids=str)
@pytest.mark.parametrize("scaling", ["rms", "spectral"])
def test_matrix_sign_is_counted_but_for_solvers(
    scaling: str, shape: tuple[int, int], options: dict[str, object]
) -> None:
    config = PionConfig(**options | {"scaling": scaling})
    products = step_flop(*shape, config) - solvers(*shape, config)
    assert products == pytest.approx(executed(*shape, config), rel=1e-12)


@pytest.mark.parametrize("shape", [(320, 320), (700, 650), (800, 330)], ids=str)
def test_mirror_images_in_the_matrix_sign_are_not_counted(shape: tuple[int, int]) -> None:
    config = PionConfig(scaling="rms")
    on_cpu = step_flop(*shape, config, device="cpu")
    products = on_cpu - solvers(*shape, config)
    assert products == pytest.approx(executed(*shape, config), rel=1e-12)
    assert on_cpu < step_flop(*shape, config)  # GPUs have panels from 4096 on


def test_the_reuse_form_costs_seven_products() -> None:
    # 3 with the generator of the side that goes first and 4 with the other: PION.md's identity.
    assert step_flop(32, 32, PionConfig(**PUBLISHED)) == 7 * 2 * 32**3


def test_wide_matrices_of_averages_are_held_in_factors() -> None:
    for config in (PionConfig(), PionConfig(direction="momentum", side="both")):
        assert forms(8, 512, config) == {"in": "factors", "out": "dense"}
        assert forms(512, 8, config) == {"in": "dense", "out": "factors"}
        assert forms(64, 64, config) == {"in": "dense", "out": "dense"}
    assert forms(8, 512, PionConfig(**PUBLISHED)) == {"in": "dense", "out": "dense"}
