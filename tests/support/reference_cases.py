"""Cases for Pion against the float64 reference, and how far rounding may move it from there."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import numpy as np
import torch
from reference import Array

from pion_dist import PionConfig
from pion_dist.matrices import interleaved, stacked, whole

# Square, mildly and very wide and tall (the last take low-rank forms), one row, one column, one
# number; two of one shape, so that what is computed for them together must stay apart.
SHAPES = (
    (8, 8), (9, 12), (9, 12), (12, 9), (4, 40), (40, 4), (3, 23), (23, 3), (1, 6), (6, 1), (1, 1),
)  # fmt: skip
RETRACTIONS = (("taylor", 2), ("taylor", 4), ("cayley", 2), ("exp", 2))
VALUES = (
    ("lie", "transported", "ambient"),
    ("adaptive", "momentum", "msign"),
    (False, True),
    ("rms", "none"),
    ("both", "alternate", "in", "out"),
    RETRACTIONS,
)

# Relative to max|W|, after every step. One step is a chain of about 10 products of inner length
# k ≤ 40, each wrong by at most k u = 4e-15 of its factors' norms (u = 1.1e-16); steps add up, to
# 6 · 10 · 4e-15 = 3e-13. Two places enlarge a rounding error √k u = 7e-16 of a generator:
#   adaptive divides by √v, entry by entry, that is by |g_ij| / |g|_typical, at the least about 1e-4
#     with these seeds: 7e-12 in one entry of A. W sees it times the angle, ≤ 0.5, and as one of
#     √40 entries at least: 6e-13;
#   Newton-Schulz multiplies it by 41 · 1.1 k^(3/8) = 180 at the most: 1e-13, times the angle. What
#     the steps before left in W it enlarges likewise, where a singular value is small.
# Measured: 2e-14, with msign 2e-13.
TOLERANCE = 1e-12


def config_of(
    momentum: str,
    direction: str,
    nesterov: bool,
    scaling: str,
    side: str,
    retraction: tuple[str, int],
    **others: object,
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
        **others,
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
    if config.direction == "polar":
        return 0.02
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


# float32, relative to max|W|, with the unit roundoff u = 6e-8 and products of inner length k ≤ 40
# (error about √k u of the factors' norms; √40 = 6.3):
#   a step rounds W in the product W + ΔW            3 u     (two sides, each a sum and a store)
#   a generator is wrong by √k u, relative to its typical entry; W sees it times the angle θ ≤ 0.5.
#     momentum: as it is                             0.5 · 6.3 u           ≈ 3 u
#     adaptive: entry by entry over |g_ij|; of N ≤ 1600 entries the least is about 1/N of the
#       typical one, so one entry of A is wrong by N √k u, and one entry of W by that times
#       θ / √N (the share of one entry of A in W A)  0.5 · 6.3 u · √1600   ≈ 130 u
#     msign: Newton-Schulz enlarges an error in a small singular value at most 180 times, as above,
#       and it meets 1 of ≥ 4 directions             0.5 · 6.3 u · 180 / 4 ≈ 140 u
# A moment carries its errors on, but averages them. Over 6 steps, errors adding up.
#     polar: Muon's step D likewise, as the same polynomial of the average, at angles θ ≤ 0.1 (of lr
#       0.02); a Gram matrix loses nothing of averages of condition 2, and others have it not
#                                                    0.1 · 6.3 u · 180 / 4 ≈ 28 u
#       W = U Σ Vᵀ is made anew, so that its rounding does not add up: 3 u of U, Σ and V as they
#       are stored, √12 u of the product, and 6.3 u / 2 of each frame's Gram matrix
#                                                    13 u
#       Near singular values leave the pair's frames to rounding, but W does not see which they are.
#       (Measured over 12 seeds: 5.4 u, and no more after 6 steps than after one.)
UNIT32 = 2.0**-24
TOLERANCE32 = {"momentum": 6 * 6, "adaptive": 6 * 130, "msign": 6 * 140, "polar": 6 * 28 + 13}


# Blocks. Cut lengths divide by 4, the others need not; as above square, and very wide and tall ones
# cut either way (k ≤ 40, so TOLERANCE's derivation holds), blocks of one row, two of one shape.
# Parts of a view have matrices of different heights.
CUT_VIEWS = (
    *(whole(8, 8, axis=axis) for axis in ("rows", "cols", None)),
    *(whole(12, 9, axis="rows") for _ in range(2)),
    whole(9, 12, axis="cols"),
    *(whole(8, 40, axis=axis) for axis in ("rows", "cols")),
    *(whole(40, 8, axis=axis) for axis in ("rows", "cols")),
    *(whole(40, 3, axis="rows"), whole(3, 40, axis="cols")),
    *(whole(4, 9, axis="rows"), whole(9, 4, axis="cols")),
    *(whole(8, 1, axis="rows"), whole(1, 8, axis="cols")),
    stacked(16, 9, name="gate_up", count=2, axis="rows"),
    stacked(10, 12, name="expert", count=2, axis="cols"),
    stacked(12, 9, name="head", count=4),
    *(
        interleaved(
            24, 12, repeated=[("q", 8), ("k", 4)], per_repetition=per_repetition, axis=axis
        )
        for per_repetition in (False, True)
        for axis in ("rows", "cols", None)
    ),
)  # fmt: skip
# TOLERANCE is derived for errors that add up over steps. With msign a step may enlarge those of the
# steps before it, where a generator has a small singular value: over 720 options with 2 and 4
# blocks at most 2e-13 after 4 steps, and 3e-12 after 6.
CUT_STEPS = 4


def covering(*options: Sequence[object], together: int = 3) -> list[tuple[object, ...]]:
    """Few elements of the options' product that show all that it has of so many values together."""
    product = list(itertools.product(*options))
    random.Random(0).shuffle(product)
    seen: set[object] = set()
    kept = []
    for element in product:
        shown = set(itertools.combinations(enumerate(element), together))
        if not shown <= seen:
            kept.append(element)
            seen |= shown
    return kept


def error_of(actual: torch.Tensor, expected: Array) -> float:
    """Largest difference relative to the largest expected entry; where all are 0, none will do."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)}, expected {expected.shape}"
    difference = np.abs(actual.detach().double().numpy() - expected).max()
    return float(difference / np.abs(expected).max()) if difference else 0.0
