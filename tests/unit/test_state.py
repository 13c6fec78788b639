"""The layout of moments changes nothing, their dtype only the rounding."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from reference import MSIGN
from torch import Tensor

from pion_dist import Pion, PionConfig
from pion_dist.config import Direction, StateDtype, StateLayout
from pion_dist.matrices import stacked, whole

# A square one, odd and even sides, a side of one row, and a weight of two matrices.
VIEWS = (
    whole(8, 8, axis="rows"),
    whole(12, 9, axis="rows"),
    whole(1, 6, axis="cols"),
    stacked(16, 9, name="gate_up", count=2, axis="rows"),
)
EXP = {"retraction": "exp"}
BLOCKS = {"blocks": 2}
BLOCK_VIEWS = (whole(8, 8, axis="rows"), whole(12, 9, axis="rows"), whole(5, 10, axis="cols"))


def optimizer(config: PionConfig, dtype: torch.dtype = torch.float64) -> Pion:
    torch.manual_seed(0)
    views = VIEWS if config.blocks == 1 else BLOCK_VIEWS
    weights = [torch.nn.Parameter(torch.randn(v.rows, v.cols, dtype=dtype)) for v in views]
    return Pion(weights, lr=1e-2, config=config, views=dict(zip(weights, views, strict=True)))


def weights_of(pion: Pion) -> list[Tensor]:
    return [p.detach() for group in pion.param_groups for p in group["params"]]


def advance(pion: Pion, steps: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    params = [p for group in pion.param_groups for p in group["params"]]
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        pion.step()
    return [p.detach().clone() for p in params]


def lie(direction: Direction, layout: StateLayout, **options: object) -> PionConfig:
    return PionConfig(momentum="lie", direction=direction, state_layout=layout, **options)


@pytest.mark.parametrize("blocks", [{}, BLOCKS], ids=["whole", "blocks"])
@pytest.mark.parametrize("nesterov", [True, False], ids=["nesterov", "plain"])
@pytest.mark.parametrize("direction", ["momentum", "adaptive", "msign"])
def test_packed_moments_are_the_dense_ones_to_the_bit(
    direction: Direction, nesterov: bool, blocks: dict[str, object]
) -> None:
    """Each element is computed from the same numbers, the mirrored one with its sign changed."""
    options = {"nesterov": nesterov, **blocks}
    packed, dense = (optimizer(lie(direction, layout, **options)) for layout in ("packed", "dense"))
    for p, q in zip(advance(packed, 5), advance(dense, 5), strict=True):
        assert torch.equal(p, q)
    held = [sum(x.numel() for s in pion.state.values() for x in s.values() if x.dim() > 2)
            for pion in (packed, dense)]  # fmt: skip
    assert held[0] < 0.75 * held[1]


@pytest.mark.parametrize("blocks", [{}, BLOCKS], ids=["whole", "blocks"])
@pytest.mark.parametrize("direction", ["momentum", "adaptive"])
def test_a_checkpoint_is_the_same_for_each_layout(
    direction: Direction, blocks: dict[str, object]
) -> None:
    packed, dense = (optimizer(lie(direction, layout, **blocks)) for layout in ("packed", "dense"))
    advance(packed, 3)
    advance(dense, 3)
    saved = [copy.deepcopy(pion.state_dict()) for pion in (packed, dense)]
    for index, moments in saved[0]["state"].items():
        assert moments.keys() == saved[1]["state"][index].keys()
        for key, moment in moments.items():
            assert torch.equal(moment, saved[1]["state"][index][key]), key
    straight = advance(packed, 3, seed=2)
    for layout, state in (("packed", saved[1]), ("dense", saved[0])):
        resumed = optimizer(lie(direction, layout, **blocks))
        with torch.no_grad():
            for p, q in zip(weights_of(resumed), weights_of(dense), strict=True):
                p.copy_(q)
        resumed.load_state_dict(state)
        for p, q in zip(advance(resumed, 3, seed=2), straight, strict=True):
            assert torch.equal(p, q)


@pytest.mark.parametrize(
    "options",
    [{}, EXP | MSIGN, EXP | MSIGN | {"momentum": "lie"}, EXP | {"direction": "adaptive"}],
    ids=["default", "transported", "lie", "lie adaptive"],
)
@pytest.mark.parametrize(("dtype", "part"), [("bf16", 1 / 2), ("int8", 1 / 4)])
def test_rounded_moments_are_smaller_and_keep_the_spectrum(
    options: dict[str, str], dtype: StateDtype, part: float
) -> None:
    """Generators are exactly skew, and frames orthonormal, whatever moments were rounded to.

    Ten float32 steps turn by 0.01: each rounds W by 3 u, and products of inner length k <= 16 by
    4 u of 0.01 W; singular values move by less than 10 * 5 u * sqrt(16), u = 2^-24. Directions
    differ by the moments' 2^-9, or 1/254 of the largest element, and more where a division by a
    small number, or the sign of a small singular value, enlarges it.
    """
    low, full = (
        optimizer(PionConfig(state_dtype=dtype, **options), torch.float32)
        for dtype in (dtype, "fp32")
    )
    before = [torch.linalg.svdvals(p.double()) for p in weights_of(low)]
    start = [p.clone() for p in weights_of(low)]
    for p, q, w, s in zip(advance(low, 10), advance(full, 10), start, before, strict=True):
        if p.shape[0] == 16:
            pairs = zip(p.double().split(8), w.double().split(8), strict=True)
            for half, old in pairs:
                drift = torch.linalg.svdvals(half) - torch.linalg.svdvals(old)
                assert drift.abs().max() <= 200 * 2.0**-24 * s.max()
        else:
            assert (torch.linalg.svdvals(p.double()) - s).abs().max() <= 200 * 2.0**-24 * s.max()
        assert 0 < (p - q).norm() < 0.2 * (p - w).norm() or p.shape[0] == 1
    for one, other in zip(low.state.values(), full.state.values(), strict=True):
        for key in one:
            if key[0] not in "mv":  # factors
                assert one[key].nbytes == other[key].nbytes
                continue
            # Each matrix's last block is filled up.
            scales = (1.0, 0) if dtype == "bf16" else (130 / 128, 130 * len(one[key]))
            expected = part * scales[0] * other[key].nbytes
            assert expected <= one[key].nbytes <= expected + scales[1]


@pytest.mark.parametrize("momentum", ["lie", "transported"])
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e-30])
def test_what_has_been_rounded_to_8_bits_stays(scale: float, momentum: str) -> None:
    """A moment is within a code or half of the largest of its block, and a checkpoint exact.

    bf16's scale is off by 2^-8 of 127 codes at most, which a clamped end loses as well.
    """
    config = PionConfig(momentum=momentum, direction="adaptive", state_dtype="int8")
    coded = optimizer(config, torch.float32)
    saved = optimizer(replace(config, state_dtype="fp32"), torch.float32)
    for p in (p for group in saved.param_groups for p in group["params"]):
        p.grad = scale * torch.randn(p.shape) * torch.logspace(-3, 0, p.shape[1])
    saved.step()
    full = saved.state_dict()
    coded.load_state_dict(full)
    once = copy.deepcopy(coded.state_dict())
    for index, moments in full["state"].items():
        for key, x in moments.items():
            y = once["state"][index][key]
            assert y.dtype == torch.float32
            a, b = (x.sqrt(), y.sqrt()) if key[0] == "v" else (x, y)
            floor = 127 * (2.0**-62 if key[0] == "v" else 2.0**-125)
            code = 1.0 if key[0] == "v" else 0.5  # none but zero becomes zero
            assert (a - b).abs().max() <= (code / 127 + 2.0**-8) * a.abs().max() + floor
            assert key[0] != "v" or scale < 1e-10 or ((y == 0) <= (x == 0)).all()
    coded.load_state_dict(once)
    again = coded.state_dict()
    for index, moments in once["state"].items():
        assert all(torch.equal(x, again["state"][index][key]) for key, x in moments.items())


def test_8_bits_refuse_what_would_have_other_scales() -> None:
    lie = {"direction": "msign", "momentum": "lie"}
    for options, says in (
        ({"team_size": 2}, "team_size=2 divides"),
        (lie | {"blocks": 2}, "blocks=2 divides"),
        (lie | {"state_layout": "dense"}, "state_layout='packed'"),
        ({"betas": (0.96, 0.95)}, r"betas up to 0\.95"),
    ):
        with pytest.raises(ValueError, match=says):
            PionConfig(state_dtype="int8", **options)


@pytest.mark.parametrize("options", [{}, MSIGN], ids=["default", "msign"])
def test_a_state_is_loaded_into_another_dtype(options: dict[str, str]) -> None:
    low, full = (
        optimizer(PionConfig(state_dtype=dtype, **options), torch.float32)
        for dtype in ("bf16", "fp32")
    )
    advance(full, 3)
    low.load_state_dict(full.state_dict())
    for p, q in zip(low.state.values(), full.state.values(), strict=True):
        for key in q:
            expected = torch.bfloat16 if key[0] == "m" else torch.float32
            assert p[key].dtype == expected and torch.equal(p[key], q[key].to(expected))


def test_averages_over_many_steps_are_refused_in_bf16() -> None:
    with pytest.raises(ValueError, match=r"use betas up to 0\.99"):
        PionConfig(state_dtype="bf16", direction="adaptive", betas=(0.9, 0.999))
    PionConfig(state_dtype="bf16", betas=(0.9, 0.999))  # the second is not used
