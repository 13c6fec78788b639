"""Every option equals the float64 reference, on every kind of shape."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch
from reference import (
    MSIGN,
    PUBLISHED,
    Array,
    Axis,
    ReferencePion,
    ReferenceWeight,
    reference_of,
    retract,
)
from reference_cases import (
    CUT_STEPS,
    CUT_VIEWS,
    RETRACTIONS,
    SHAPES,
    TOLERANCE,
    TOLERANCE32,
    UNIT32,
    VALUES,
    config_of,
    covering,
    distance,
    draw,
    error_of,
    moderate_lr,
    parameters,
    readable,
    set_gradients,
)

from pion_dist import Pion, PionConfig
from pion_dist.config import choices
from pion_dist.matrices import MatrixView, interleaved, stacked, whole

STEPS = 6
OPTIONS = tuple(itertools.product(*VALUES))


def words_of(config: PionConfig) -> str:
    """The id of a config: the options that are not the same in all of a test's."""
    if config.direction == "polar":
        return f"polar-{readable(config.nesterov)}"
    retraction = readable((config.retraction, config.degree))
    return f"{config.momentum}-{config.direction}-{retraction}"


def test_every_choice_has_a_reference() -> None:
    """Else a value that PionConfig allows could be computed as another one, unseen."""
    momenta, directions, _, scalings, sides, retractions = VALUES
    allowed = choices()
    assert set(momenta) == set(allowed["momentum"])
    assert {"polar", *directions} == set(allowed["direction"])
    assert set(scalings) == set(allowed["scaling"])
    assert set(sides) == set(allowed["side"])
    assert {name for name, _ in retractions} == set(allowed["retraction"])


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


@pytest.mark.parametrize(
    "others",
    [PUBLISHED | {"rms": 0.3}, {"side": "alternate", "rms": 0.3}, {"scaling": "none"}],
    ids=["published", "alternate", "none"],
)
@pytest.mark.parametrize("momentum", ["lie", "transported", "ambient"])
@pytest.mark.parametrize("direction", ["adaptive", "momentum", "msign"])
def test_eps_of_the_size_of_the_denominators(
    momentum: str, direction: str, others: dict[str, object]
) -> None:
    """Gradients of 1e-4 and eps 1e-3: each denominator is a sum of two like numbers.

    Where eps stands matters by a factor here, and by 1e-8 above. The learning rate and the decay
    rates are not the defaults either, and the rate changes from step to step.
    """
    numbers = {"eps": 1e-3, "betas": (0.7, 0.6)}
    config = PionConfig(**others | {"momentum": momentum, "direction": direction} | numbers)
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
    config = PionConfig(**PUBLISHED | {"momentum": momentum, "retraction": "exp"})
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
        options = {"momentum": momentum, "direction": "momentum", "retraction": "exp"}
        config = PionConfig(**PUBLISHED | options | {"side": side})
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
@pytest.mark.parametrize(
    "options",
    [{}, MSIGN, *(PUBLISHED | {"momentum": m, "nesterov": True} for m in VALUES[0])],
    ids=["default", "msign", *VALUES[0]],
)
def test_a_transposed_view_is_a_weight_like_any_other(
    options: dict[str, object], shape: tuple[int, int]
) -> None:
    """Weight and gradient as views of other storage, which is written in place and stays."""
    config = PionConfig(**options)
    rng = np.random.default_rng(4)
    (w,) = draw(rng, [shape], 0.2)
    storage = torch.tensor(w.T.copy())
    p = torch.nn.Parameter(storage.t())
    assert p.is_contiguous() == (1 in shape)
    reference, lr = reference_of(w, config), moderate_lr(config)
    optimizer = Pion([p], lr=lr, config=config)
    for _ in range(3):
        (g,) = draw(rng, [shape], 1.0)
        p.grad = torch.tensor(g.T.copy()).t()
        optimizer.step()
        reference.step(g, lr)
        assert distance(p, reference.w) <= TOLERANCE
        assert distance(storage.t(), reference.w) <= TOLERANCE


FLOAT32 = [
    PionConfig(),
    PionConfig(nesterov=False),
    *(
        config_of(momentum, direction, False, "rms", "both", retraction)
        for retraction, momentum, direction in itertools.product(RETRACTIONS, *VALUES[:2])
    ),
]


@pytest.mark.parametrize("config", FLOAT32, ids=words_of)
def test_float32_is_the_reference_to_its_own_rounding(config: PionConfig) -> None:
    rng = np.random.default_rng(5)
    params = parameters(draw(rng, SHAPES, 0.2), torch.float32)
    references = [reference_of(p.detach().numpy(), config) for p in params]
    lr = moderate_lr(config)
    optimizer = Pion(params, lr=lr, config=config)
    for step in range(1, STEPS + 1):
        set_gradients(params, draw(rng, SHAPES, 1.0))
        optimizer.step()
        for p, reference in zip(params, references, strict=True):
            assert p.grad is not None
            reference.step(p.grad.numpy(), lr)
            error = distance(p, reference.w) / UNIT32
            limit = TOLERANCE32[config.direction]
            assert error <= limit, f"step {step}, {tuple(p.shape)}: {error:.0f} u"


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
@pytest.mark.parametrize(
    "options",
    [
        {},
        *(
            options | {"retraction": retraction}
            for options in (PUBLISHED, MSIGN)
            for retraction in ("taylor", "cayley", "exp")
        ),
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "default",
)
def test_float32_products_are_ieee_whatever_the_process_asks_for(
    options: dict[str, object], device: str
) -> None:
    """The same bits for all of ASKED, and the process finds its settings as it left them.

    Bits are equal because the same kernels run on the same numbers; TF32 would differ by 1e-3.
    """
    config = PionConfig(**options)
    expected = three_float32_steps(config, device)
    for name, ask in ASKED.items():
        ask()
        before = precision_settings()
        stepped = three_float32_steps(config, device)
        assert precision_settings() == before, name
        for p, q in zip(stepped, expected, strict=True):
            assert torch.equal(p, q), name
        torch.set_float32_matmul_precision("highest")


def cut_problem(
    views: Sequence[MatrixView], config: PionConfig, rng: np.random.Generator
) -> tuple[list[torch.nn.Parameter], list[ReferenceWeight]]:
    weights = draw(rng, [(view.rows, view.cols) for view in views], 0.2)
    references = [ReferenceWeight(w, view, config) for w, view in zip(weights, views, strict=True)]
    return parameters(weights, torch.float64), references


@pytest.mark.parametrize(
    ("momentum", "direction", "nesterov", "scaling", "side", "retraction", "blocks"),
    covering(*VALUES, (2, 4)),
    ids=readable,
)
def test_every_option_is_the_reference_with_blocks(
    momentum: str,
    direction: str,
    nesterov: bool,
    scaling: str,
    side: str,
    retraction: tuple[str, int],
    blocks: int,
) -> None:
    config = config_of(momentum, direction, nesterov, scaling, side, retraction, blocks=blocks)
    rng = np.random.default_rng(7)
    params, references = cut_problem(CUT_VIEWS, config, rng)
    lr = moderate_lr(config)
    views = dict(zip(params, CUT_VIEWS, strict=True))
    optimizer = Pion(params, lr=lr, config=config, views=views)
    for step in range(1, CUT_STEPS + 1):
        gradients = draw(rng, [(view.rows, view.cols) for view in CUT_VIEWS], 1.0)
        set_gradients(params, gradients)
        optimizer.step()
        for p, g, reference in zip(params, gradients, references, strict=True):
            reference.step(g, lr)
            matrices = views[p].split(p.detach())
            for part, expected in reference.weights().items():
                error = error_of(matrices[part], expected)
                assert error <= TOLERANCE, f"step {step}, {views[p]}: {error:.1e}"
    states = optimizer.state_dict()["state"]  # as matrices, however they are held
    for index, (p, reference) in enumerate(zip(params, references, strict=True)):
        moments = reference.state()
        assert set(states[index]) == set(moments)
        for key, expected in moments.items():
            error = error_of(states[index][key], expected)
            assert error <= TOLERANCE, f"{key} of {views[p]}: {error:.1e}"


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (8, 8)], ids=str)
def test_a_weight_without_a_view_is_cut_along_its_longer_dimension(shape: tuple[int, int]) -> None:
    """The rows where it is square; at lr 0.2 the other cut is another update by far."""
    axis: Axis = "rows" if shape[0] >= shape[1] else "cols"
    other: Axis = "cols" if axis == "rows" else "rows"
    config = PionConfig(blocks=4, **PUBLISHED)
    rng = np.random.default_rng(8)
    ((w,), (g,)) = draw(rng, [shape], 0.2), draw(rng, [shape], 1.0)
    params = parameters([w], torch.float64)
    set_gradients(params, [g])
    Pion(params, lr=0.2, config=config).step()
    distances = {}
    for cut in (axis, other):
        reference = ReferencePion(w, config, cut)
        reference.step(g, 0.2)
        distances[cut] = distance(params[0], reference.w)
    assert distances[axis] <= TOLERANCE and distances[other] > 1e-3


def singular_values(w: torch.Tensor) -> Array:
    return np.linalg.svd(w.detach().numpy(), compute_uv=False)


@pytest.mark.parametrize("blocks", [2, 4])
@pytest.mark.parametrize("axis", ["rows", "cols"])
@pytest.mark.parametrize("shape", [(12, 16), (16, 12), (8, 40), (40, 8)], ids=str)
@pytest.mark.parametrize("retraction", ["cayley", "exp"])
@pytest.mark.parametrize(
    "options",
    [PUBLISHED, PUBLISHED | {"momentum": "transported"}, MSIGN],
    ids=["published", "transported", "msign"],
)
def test_blocks_keep_the_spectrum_and_their_own(
    options: dict[str, object], retraction: str, shape: tuple[int, int], axis: str, blocks: int
) -> None:
    """diag(R_i) W P keeps W's singular values, and W_i P's are those of W_i, block by block.

    The first fails where blocks have right factors of their own, the second where blocks mix. The
    whole matrix's update mixes them: it keeps the first and moves the second. The 6 steps have
    about 10 products and solves of inner length ≤ 40 each: 6 · 10 · 40 u = 3e-13 of the largest.
    """
    options = options | {"retraction": retraction}
    dim = 0 if axis == "rows" else 1
    rng = np.random.default_rng(9)
    (w,) = draw(rng, [shape], 0.2)
    drift, own_drift = {}, {}
    for count in (1, blocks):
        mode = {"blocks": count} if count > 1 else {}
        params = parameters([w], torch.float64)
        views = {params[0]: whole(*shape, axis=axis)}
        optimizer = Pion(params, lr=0.2, config=PionConfig(**options, **mode), views=views)
        before = singular_values(params[0])
        own = [singular_values(block) for block in params[0].chunk(blocks, dim)]
        for _ in range(STEPS):
            set_gradients(params, draw(rng, [shape], 1.0))
            optimizer.step()
        drift[count] = np.abs(singular_values(params[0]) - before).max() / before.max()
        own_drift[count] = max(
            np.abs(singular_values(block) - values).max() / values.max()
            for block, values in zip(params[0].chunk(blocks, dim), own, strict=True)
        )
    assert max(drift.values()) <= TOLERANCE
    assert own_drift[blocks] <= TOLERANCE and own_drift[1] > 1e-3


@pytest.mark.parametrize("axis", ["rows", "cols"])
@pytest.mark.parametrize("direction", ["adaptive", "momentum", "msign"])
@pytest.mark.parametrize("momentum", ["lie", "transported", "ambient"])
def test_a_block_moves_by_its_own_gradient(momentum: str, direction: str, axis: str) -> None:
    """Blocked side alone, no common scale: a block without gradient rests, bit for bit.

    And a block moves as it would as a weight by itself: its generator, its sign's norm and its
    factor are its own.
    """
    side, dim = ("out", 0) if axis == "rows" else ("in", 1)
    options = PUBLISHED | {"momentum": momentum, "direction": direction}
    options |= {"side": side, "scaling": "none"}
    shape = (12, 8) if axis == "rows" else (8, 12)
    rng = np.random.default_rng(10)
    (w,) = draw(rng, [shape], 0.2)
    params = parameters([w], torch.float64)
    alone = [torch.nn.Parameter(block.clone()) for block in params[0].detach().chunk(4, dim)]
    one = Pion(
        params,
        lr=3e-2,
        config=PionConfig(blocks=4, **options),
        views={params[0]: whole(*shape, axis=axis)},
    )
    each = Pion(alone, lr=3e-2, config=PionConfig(**options))
    for step in range(STEPS):
        (g,) = draw(rng, [shape], 1.0)
        np.split(g, 4, dim)[1][:] = 0.0
        set_gradients(params, [g])
        set_gradients(alone, np.split(g, 4, dim))
        one.step()
        each.step()
        for i, block in enumerate(params[0].detach().chunk(4, dim)):
            expected = np.split(w, 4, dim)[1] if i == 1 else alone[i].detach().numpy()
            assert error_of(block, expected) <= (0.0 if i == 1 else TOLERANCE), f"{i}, {step}"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"blocks": 0}, "blocks=0"),
        ({"blocks": 2.0}, r"blocks=2\.0"),
        ({"blocks": 2, "team_size": 2}, "team_size=2: with blocks=2"),
        ({"team_size": 3}, "team_size=3: must be 'auto' or a power of two"),
        ({"team_size": 0}, "team_size=0"),
        ({"team_size": "all"}, "team_size='all'"),
        ({"team_size": True}, "team_size=True"),
    ],
    ids=str,
)
def test_blocks_and_teams_that_cannot_be_are_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        PionConfig(**PUBLISHED | options)


@pytest.mark.parametrize(
    "view",
    [
        whole(10, 8, axis="rows"),
        whole(8, 10, axis="cols"),
        whole(2, 8, axis="rows"),
        stacked(12, 8, name="gate_up", count=2, axis="rows"),
        interleaved(12, 8, repeated=[("q", 4), ("k", 2)], per_repetition=True, axis="rows"),
    ],
    ids=["rows", "cols", "fewer", "stacked", "one_part"],
)
def test_what_does_not_divide_into_the_blocks_is_refused(view: MatrixView) -> None:
    """10, 2, 6 and, in one part only, 2 are not multiples of 4."""
    fits, bad = parameters([np.zeros((8, 8)), np.zeros((view.rows, view.cols))], torch.float64)
    config = PionConfig(blocks=4, **PUBLISHED)
    with pytest.raises(ValueError, match=r"odd\.weight"):
        Pion([("even.weight", fits), ("odd.weight", bad)], config=config, views={bad: view})
    # The same matrices without a cut axis are updated whole.
    uncut = MatrixView(view.rows, view.cols, view.parts, axis=None)
    Pion([("even.weight", fits), ("odd.weight", bad)], config=config, views={bad: uncut})
