"""The counted FLOP are the executed ones, and the cheaper form is the one that is chosen."""

from unittest.mock import patch

import pytest
import torch
from reference import PUBLISHED
from torch.utils.flop_counter import FlopCounterMode

from pion_dist import Pion, PionConfig, kernels
from pion_dist.config import choices
from pion_dist.cost import forms, step_flop, uses_gram


def executed(m: int, n: int, config: PionConfig, *, steps: int = 2) -> float:
    p = torch.nn.Parameter(torch.randn(m, n))
    optimizer = Pion([p], config=config)
    if config.direction == "polar":
        p.grad = torch.randn(m, n)
        optimizer.step()  # decomposes
    total = 0.0
    for _ in range(steps):
        p.grad = torch.randn(m, n)
        thin = patch.object(kernels, "THIN", 0)  # products in elementwise work's place
        with thin, FlopCounterMode(display=False) as counter:
            optimizer.step()
        total += counter.get_total_flops()
    return total / steps


PLAIN = ("momentum", "adaptive")  # without a matrix sign or a polar factor


@pytest.mark.parametrize("side", ["both", "alternate", "in", "out"])
@pytest.mark.parametrize("momentum", choices()["momentum"])
@pytest.mark.parametrize("direction", PLAIN)
@pytest.mark.parametrize("shape", [(8, 8), (8, 64), (64, 8), (24, 32)], ids=str)
def test_products_are_counted_exactly(
    shape: tuple[int, int], direction: str, momentum: str, side: str
) -> None:
    config = PionConfig(momentum=momentum, direction=direction, side=side)
    assert step_flop(*shape, config) == executed(*shape, config)


# Square, nearly so, and past where the Gram matrix is the cheaper way; with several panels.
SIGNED = {
    "polar": {},
    "polar, bf16": {"matmul_precision": "bf16"},
    "lie": PUBLISHED | {"direction": "msign"},
    "transported": PUBLISHED | {"direction": "msign", "momentum": "transported"},
}


def test_every_direction_is_counted() -> None:
    signed = {PionConfig(**options).direction for options in SIGNED.values()}
    assert {*PLAIN, *signed} == set(choices()["direction"])


@pytest.mark.parametrize("name", SIGNED)
@pytest.mark.parametrize(
    "shape",
    [(8, 8), (8, 64), (64, 8), (12, 10), (1, 6), (1, 1), (320, 320), (700, 650), (330, 800)],
    ids=str,
)
def test_mirror_images_are_not_counted(shape: tuple[int, int], name: str) -> None:
    """Symmetric products have panels, of as many rows as the device wants."""
    config = PionConfig(**SIGNED[name])
    on_cpu = step_flop(*shape, config, device="cpu")
    assert on_cpu == pytest.approx(executed(*shape, config), rel=1e-12)
    assert on_cpu <= step_flop(*shape, config)  # GPUs have panels from 4096 on
    assert (on_cpu < step_flop(*shape, config)) == (min(shape) >= 320)


def test_the_way_to_muons_step_is_the_cheaper_one() -> None:
    """``uses_gram`` changes sides where the counts cross, for large matrices on a GPU."""
    for n in (4096, 8192):
        for m in range(n + n // 16, 4 * n, n // 16):
            with patch("pion_dist.cost.uses_gram", return_value=True):
                gram = step_flop(m, n, PionConfig())
            with patch("pion_dist.cost.uses_gram", return_value=False):
                direct = step_flop(m, n, PionConfig())
            near = 0.03 * direct  # where they cross
            assert gram <= direct + near if uses_gram(m, n) else direct <= gram + near, (m, n)


def muon_flop(m: int, n: int) -> float:
    """Five quintic steps: XᵀX and a product with X, and one of the Gram matrix (POLAR)."""
    rows, r = max(m, n), min(m, n)
    return 5 * (4.0 * rows * r * r + 2.0 * r**3)


def test_a_llama_8b_layer_costs_about_muons_flop() -> None:
    """docs/PERFORMANCE.md has the numbers."""
    layer = [*2 * [(4096, 4096)], *2 * [(1024, 4096)], *2 * [(14336, 4096)], (4096, 14336)]
    for precision, most in (("highest", 1.145), ("bf16", 1.155)):
        config = PionConfig(matmul_precision=precision)
        polar = sum(step_flop(m, n, config) for m, n in layer)
        assert polar <= most * sum(muon_flop(m, n) for m, n in layer)


def test_the_reuse_form_costs_seven_products() -> None:
    # 3 with the generator of the side that goes first and 4 with the other: PION.md's identity.
    assert step_flop(32, 32, PionConfig(**PUBLISHED)) == 7 * 2 * 32**3


def test_wide_matrices_of_averages_are_held_in_factors() -> None:
    for momentum in ("transported", "ambient"):
        config = PionConfig(direction="momentum", momentum=momentum)
        assert forms(8, 512, config) == {"in": "factors", "out": "dense"}
        assert forms(512, 8, config) == {"in": "dense", "out": "factors"}
        assert forms(64, 64, config) == {"in": "dense", "out": "dense"}
    assert forms(8, 512, PionConfig(**PUBLISHED)) == {"in": "dense", "out": "dense"}
