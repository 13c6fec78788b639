"""Pion against the float64 reference, over every option and every kind of shape."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch
from reference import Array, ReferencePion, retract

from pion_dist import Pion, PionConfig

STEPS = 6
# Square, mildly and very wide and tall (the last take low-rank forms), one row, one column, one
# number; two of one shape, so that what is computed for them together must stay apart.
SHAPES = (
    (8, 8), (9, 12), (9, 12), (12, 9), (4, 40), (40, 4), (3, 23), (23, 3), (1, 6), (6, 1), (1, 1),
)  # fmt: skip
RETRACTIONS = (("taylor", 2), ("taylor", 4), ("cubic", 2), ("cayley", 2), ("exp", 2))
OPTIONS = tuple(
    itertools.product(
        ("lie", "transported", "ambient"),
        ("adaptive", "momentum", "msign"),
        (False, True),
        ("rms", "none"),
        ("both", "alternate", "in", "out"),
        RETRACTIONS,
    )
)

# Relative to max|W|, after every step. One step is a chain of about 10 products of inner length
# k ≤ 40, each wrong by at most k u = 4e-15 of its factors' norms (u = 1.1e-16); steps add up, to
# 6 · 10 · 4e-15 = 3e-13. Two places enlarge a rounding error √k u = 7e-16 of a generator:
#   adaptive divides by √v, entry by entry, that is by |g_ij| / |g|_typical, at the least about 1e-4
#     with these seeds: 7e-12 in one entry of A. W sees it times the angle, ≤ 0.5, and as one of
#     √40 entries at least: 6e-13;
#   Newton-Schulz multiplies it by 3.4445⁵ = 485 at the most: 3e-13, times the angle.
# Measured: 2e-14, with msign 2e-13.
TOLERANCE = 1e-12


def config_of(
    momentum: str,
    direction: str,
    nesterov: bool,
    scaling: str,
    side: str,
    retraction: tuple[str, int],
) -> PionConfig:
    name, degree = retraction
    return PionConfig(
        momentum=momentum,
        direction=direction,
        nesterov=nesterov,
        scaling=scaling,
        side=side,
        retraction=name,
        degree=degree,
    )


def readable(option: object) -> str | None:
    """The id of one option: its value, and what kind of value it is where that is not plain."""
    match option:
        case bool():
            return "nesterov" if option else "plain"
        case (str(name), int(degree)):
            return f"{name}{degree}" if name == "taylor" else name
        case "rms" | "none":
            return f"scaling_{option}"
    return None


def moderate_lr(config: PionConfig) -> float:
    """A learning rate at which one step turns by 0.003 to 0.5 (SHAPES, weights 0.2, gradients 1).

    Smaller angles would hide an error of second order, larger ones make degree 2 blow up.
    """
    if config.scaling == "rms":
        return 0.2
    match config.direction, config.momentum:
        case "adaptive", "lie":
            return 3e-2
        case "adaptive", _:
            return 3e-3
        case "momentum", _:
            return 3e-2
    return 0.2


def draw(rng: np.random.Generator, shapes: Sequence[tuple[int, int]], scale: float) -> list[Array]:
    return [scale * rng.standard_normal(shape) for shape in shapes]


def parameters(weights: Sequence[Array], dtype: torch.dtype) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.tensor(w).to(dtype)) for w in weights]


def set_gradients(params: Sequence[torch.Tensor], gradients: Sequence[Array]) -> None:
    for p, g in zip(params, gradients, strict=True):
        p.grad = torch.tensor(g).to(device=p.device, dtype=p.dtype)


def distance(w: torch.Tensor, reference: Array) -> float:
    """Largest difference relative to the largest entry."""
    difference = np.abs(w.detach().cpu().double().numpy() - reference).max()
    return float(difference / np.abs(reference).max())


@pytest.mark.parametrize(
    ("momentum", "direction", "nesterov", "scaling", "side", "retraction"), OPTIONS, ids=readable
)
def test_every_option_is_the_reference(
    momentum: str,
    direction: str,
    nesterov: bool,
    scaling: str,
    side: str,
    retraction: tuple[str, int],
) -> None:
    config = config_of(momentum, direction, nesterov, scaling, side, retraction)
    rng = np.random.default_rng(0)
    weights = draw(rng, SHAPES, 0.2)
    params = parameters(weights, torch.float64)
    references = [ReferencePion(w, config) for w in weights]
    lr = moderate_lr(config)
    optimizer = Pion(params, lr=lr, config=config)
    for step in range(1, STEPS + 1):
        gradients = draw(rng, SHAPES, 1.0)
        set_gradients(params, gradients)
        optimizer.step()
        for p, g, reference in zip(params, gradients, references, strict=True):
            reference.step(g, lr)
            error = distance(p, reference.w)
            assert error <= TOLERANCE, f"step {step}, {tuple(p.shape)}: {error:.1e}"


@pytest.mark.parametrize("momentum", ["lie", "transported", "ambient"])
@pytest.mark.parametrize("direction", ["adaptive", "momentum", "msign"])
def test_eps_of_the_size_of_the_denominators(momentum: str, direction: str) -> None:
    """Gradients of 1e-4 and eps 1e-3: each denominator is a sum of two like numbers.

    Where eps stands matters by a factor here, and by 1e-8 above. The learning rate and the decay
    rates are not the defaults either, and the rate changes from step to step.
    """
    config = PionConfig(momentum=momentum, direction=direction, eps=1e-3, rms=0.3, betas=(0.7, 0.6))
    rng = np.random.default_rng(1)
    weights = draw(rng, SHAPES, 0.2)
    params = parameters(weights, torch.float64)
    references = [ReferencePion(w, config) for w in weights]
    optimizer = Pion(params, lr=0.5, config=config)
    for lr in (0.1, 0.2, 0.05, 0.15):
        optimizer.param_groups[0]["lr"] = lr
        gradients = draw(rng, SHAPES, 1e-4)
        set_gradients(params, gradients)
        optimizer.step()
        for p, g, reference in zip(params, gradients, references, strict=True):
            reference.step(g, lr)
            assert distance(p, reference.w) <= TOLERANCE


@pytest.mark.parametrize("momentum", ["lie", "transported", "ambient"])
def test_the_update_is_the_product_and_not_the_printed_sum(momentum: str) -> None:
    """W ← e^B W e^A, and not the ``W e^A + e^B W - W`` of the released documentation.

    The two differ by (e^B - I) W (e^A - I), of second order in the angle: at angles of about 0.3
    by some percent of W. A tenth of a percent is asked for.
    """
    config = PionConfig(momentum=momentum, retraction="exp")
    rng = np.random.default_rng(2)
    (w,) = draw(rng, [(9, 12)], 0.2)
    (g,) = draw(rng, [(9, 12)], 1.0)
    reference = ReferencePion(w, config)
    reference.step(g, 0.3)
    right, left = (retract(reference.turns[side], "exp") for side in ("in", "out"))
    printed = w @ right + left @ w - w

    params = parameters([w], torch.float64)
    set_gradients(params, [g])
    Pion(params, lr=0.3, config=config).step()
    assert distance(params[0], left @ w @ right) <= TOLERANCE
    assert distance(params[0], printed) > 1e-3

    before = np.linalg.svd(w, compute_uv=False)
    assert np.abs(np.linalg.svd(printed, compute_uv=False) - before).max() > 1e-3 * before.max()


@pytest.mark.parametrize("side", ["both", "alternate"])
def test_transported_momentum_is_rotated_with_the_weight(side: str) -> None:
    """With a zero gradient at step 2 the moment alone speaks, and only its rotation differs.

    At lr 0.2 the first step turns by about 0.2 and hence moves the moment, the generator and the
    next change of W (itself about 0.1 of W) by a fraction of that: 1e-3 of W at the least.
    """
    rng = np.random.default_rng(3)
    (w,) = draw(rng, [(9, 12)], 0.2)
    (g,) = draw(rng, [(9, 12)], 1.0)
    moved = {}
    for momentum in ("transported", "ambient"):
        config = PionConfig(momentum=momentum, direction="momentum", side=side, retraction="exp")
        reference = ReferencePion(w, config)
        params = parameters([w], torch.float64)
        optimizer = Pion(params, lr=0.2, config=config)
        for gradient in (g, np.zeros_like(g)):
            set_gradients(params, [gradient])
            optimizer.step()
            reference.step(gradient, 0.2)
        assert distance(params[0], reference.w) <= TOLERANCE
        moved[momentum] = params[0].detach().numpy()
    assert distance(torch.tensor(moved["ambient"]), moved["transported"]) > 1e-3


@pytest.mark.parametrize("shape", [(9, 12), (4, 40), (40, 4)], ids=str)
@pytest.mark.parametrize("momentum", ["lie", "transported", "ambient"])
def test_a_transposed_view_is_a_weight_like_any_other(
    momentum: str, shape: tuple[int, int]
) -> None:
    """Weight and gradient as views of other storage, which is written in place and stays."""
    config = PionConfig(momentum=momentum, direction="adaptive", nesterov=True)
    rng = np.random.default_rng(4)
    (w,) = draw(rng, [shape], 0.2)
    storage = torch.tensor(w.T.copy())
    p = torch.nn.Parameter(storage.t())
    assert p.is_contiguous() == (1 in shape)
    reference = ReferencePion(w, config)
    optimizer = Pion([p], lr=0.2, config=config)
    for _ in range(3):
        (g,) = draw(rng, [shape], 1.0)
        p.grad = torch.tensor(g.T.copy()).t()
        optimizer.step()
        reference.step(g, 0.2)
        assert distance(p, reference.w) <= TOLERANCE
        assert distance(storage.t(), reference.w) <= TOLERANCE


# float32, relative to max|W|, with the unit roundoff u = 6e-8 and products of inner length k ≤ 40
# (error about √k u of the factors' norms; √40 = 6.3):
#   a step rounds W in the product W + ΔW            3 u     (two sides, each a sum and a store)
#   a generator is wrong by √k u, relative to its typical entry; W sees it times the angle θ ≤ 0.5.
#     momentum: as it is                             0.5 · 6.3 u           ≈ 3 u
#     adaptive: entry by entry over |g_ij|; of N ≤ 1600 entries the least is about 1/N of the
#       typical one, so one entry of A is wrong by N √k u, and one entry of W by that times
#       θ / √N (the share of one entry of A in W A)  0.5 · 6.3 u · √1600   ≈ 130 u
#     msign: Newton-Schulz enlarges an error in a small singular value at most 3.4445⁵ = 485 times,
#       and it meets 1 of ≥ 4 directions             0.5 · 6.3 u · 485 / 4 ≈ 380 u
# A moment carries its errors on, but averages them. Over 6 steps, errors adding up:
UNIT32 = 2.0**-24
TOLERANCE32 = {"momentum": 6 * 6, "adaptive": 6 * 130, "msign": 6 * 380}


@pytest.mark.parametrize("direction", list(TOLERANCE32))
@pytest.mark.parametrize("momentum", ["lie", "transported", "ambient"])
@pytest.mark.parametrize("retraction", RETRACTIONS, ids=readable)
def test_float32_is_the_reference_to_its_own_rounding(
    momentum: str, direction: str, retraction: tuple[str, int]
) -> None:
    config = config_of(momentum, direction, False, "rms", "both", retraction)
    rng = np.random.default_rng(5)
    params = parameters(draw(rng, SHAPES, 0.2), torch.float32)
    references = [ReferencePion(p.detach().numpy(), config) for p in params]
    optimizer = Pion(params, lr=0.2, config=config)
    for step in range(1, STEPS + 1):
        set_gradients(params, draw(rng, SHAPES, 1.0))
        optimizer.step()
        for p, reference in zip(params, references, strict=True):
            assert p.grad is not None
            reference.step(p.grad.numpy(), 0.2)
            error = distance(p, reference.w) / UNIT32
            assert error <= TOLERANCE32[direction], f"step {step}, {tuple(p.shape)}: {error:.0f} u"


DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    ),
]


def ask_medium_then_tf32() -> None:
    torch.set_float32_matmul_precision("medium")
    torch.backends.cuda.matmul.allow_tf32 = True


def ask_by_backend() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


# Every way to let float32 products be less. After the last two torch refuses to read its own
# legacy settings ("mix of the legacy and new APIs"); a step must not stumble over that.
ASKED: dict[str, Callable[[], None]] = {
    "highest": lambda: torch.set_float32_matmul_precision("highest"),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "medium_then_allow_tf32": ask_medium_then_tf32,
    "by_backend": ask_by_backend,
}
SETTINGS: dict[str, Callable[[], object]] = {
    "float32_matmul_precision": torch.get_float32_matmul_precision,
    "cuda.allow_tf32": lambda: torch.backends.cuda.matmul.allow_tf32,
    "cuda.fp32_precision": lambda: torch.backends.cuda.matmul.fp32_precision,
    "mkldnn.fp32_precision": lambda: torch.backends.mkldnn.matmul.fp32_precision,
    "fp32_precision": lambda: torch.backends.fp32_precision,
}


def precision_settings() -> dict[str, object]:
    """What torch answers for each of its settings; its refusal where it refuses to."""
    answers: dict[str, object] = {}
    for name, read in SETTINGS.items():
        try:
            answers[name] = read()
        except RuntimeError as refusal:
            answers[name] = type(refusal)
    return answers


@pytest.fixture
def ieee_before_and_after() -> Iterator[None]:
    """Setting the legacy precision sets all that ASKED sets, whatever it was."""
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision("highest")


def three_float32_steps(config: PionConfig, device: str) -> list[torch.Tensor]:
    # 256 and more: below about 100 no library leaves IEEE products for TF32 or bf16 kernels.
    shapes = [(256, 384), (384, 256), (64, 512)]
    rng = np.random.default_rng(6)
    params = parameters(draw(rng, shapes, 0.05), torch.float32)
    params = [torch.nn.Parameter(p.detach().to(device)) for p in params]
    optimizer = Pion(params, lr=0.1, config=config)
    for _ in range(3):
        set_gradients(params, draw(rng, shapes, 1.0))
        optimizer.step()
    return [p.detach().clone() for p in params]


@pytest.mark.usefixtures("ieee_before_and_after")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("retraction", ["taylor", "cayley", "exp"])
@pytest.mark.parametrize(("momentum", "direction"), [("lie", "adaptive"), ("transported", "msign")])
def test_float32_products_are_ieee_whatever_the_process_asks_for(
    momentum: str, direction: str, retraction: str, device: str
) -> None:
    """The same bits for all of ASKED, and the process finds its settings as it left them.

    Bits are equal because the same kernels run on the same numbers; TF32 would differ by 1e-3.
    """
    config = PionConfig(momentum=momentum, direction=direction, retraction=retraction)
    expected = three_float32_steps(config, device)
    for name, ask in ASKED.items():
        ask()
        before = precision_settings()
        found = three_float32_steps(config, device)
        assert precision_settings() == before, name
        for p, q in zip(found, expected, strict=True):
            assert torch.equal(p, q), name
        torch.set_float32_matmul_precision("highest")
