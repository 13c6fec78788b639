"""Pion is a torch optimizer: it resumes exactly, and a refused step or state changes nothing."""

import copy
import io
import logging
import pickle
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from optimizer_cases import CONFIGS, set_grads, weights
from reference import MSIGN, PUBLISHED
from reference_cases import TOLERANCE
from torch import nn

from pion_dist import Pion, PionConfig
from pion_dist.matrices import stacked
from pion_dist.plan import BATCH_BYTES

each_config = pytest.mark.parametrize(
    "config", CONFIGS, ids=lambda config: f"{config.momentum}-{config.direction}"
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@each_config
def test_resume_equals_straight(config: PionConfig, dtype: torch.dtype) -> None:
    straight, resumed = weights((6, 4), (3, 9), dtype=dtype), weights((6, 4), (3, 9), dtype=dtype)
    a, b = Pion(straight, lr=0.02, config=config), Pion(resumed, lr=0.02, config=config)
    for step in range(3):
        for params, optimizer in ((straight, a), (resumed, b)):
            set_grads(params, step)
            optimizer.step()
    saved = copy.deepcopy(b.state_dict())
    b = Pion(resumed, lr=0.5, config=config)
    b.load_state_dict(saved)
    for step in range(3, 6):
        for params, optimizer in ((straight, a), (resumed, b)):
            set_grads(params, step)
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(straight, resumed, strict=True))


@each_config
def test_moments_of_low_precision_weights_are_float32(config: PionConfig) -> None:
    (p,) = weights((4, 3), dtype=torch.bfloat16)
    optimizer = Pion([p], config=config)
    optimizer.load_state_dict(optimizer.state_dict())
    assert {moment.dtype for moment in optimizer.state[p].values()} == {torch.float32}


def test_groups_have_their_own_lr_and_schedulers_move_it() -> None:
    still, moving = weights((4, 3), (4, 3))
    optimizer = Pion([{"params": [still], "lr": 0.0}, {"params": [moving]}], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    before = still.detach().clone(), moving.detach().clone()
    set_grads([still, moving], 0)
    optimizer.step()
    schedule.step()
    assert torch.equal(still, before[0]) and not torch.equal(moving, before[1])
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.05]


def test_closure_and_missing_gradients() -> None:
    used, unused = weights((4, 3), (4, 3))
    optimizer = Pion([used, unused], lr=0.1)
    before = unused.detach().clone()

    def closure() -> float:
        optimizer.zero_grad()
        loss = (used @ torch.ones(3)).square().sum()
        loss.backward()
        return loss.item()

    losses = [optimizer.step(closure) for _ in range(20)]
    assert losses[-1] < losses[0]
    assert torch.equal(unused, before)


@each_config
def test_views_are_rotated_as_separate_matrices(config: PionConfig) -> None:
    (joined,) = weights((8, 3), dtype=torch.float64)
    apart = [nn.Parameter(half.clone()) for half in joined.detach().chunk(2)]
    views = {joined: stacked(8, 3, name="gate_up", count=2)}
    one = Pion([joined], lr=0.1, config=config, views=views)
    two = Pion(apart, lr=0.1, config=config)
    for step in range(3):
        set_grads([joined], step)
        for p, grad in zip(apart, joined.grad.chunk(2), strict=True):
            p.grad = grad.clone()
        one.step()
        two.step()
    # One batched product or two single ones: fewer and smaller than TOLERANCE is derived for.
    assert (joined - torch.cat(apart)).abs().max() <= TOLERANCE * joined.abs().max()


@pytest.mark.parametrize(
    "config",
    [
        *CONFIGS,
        PionConfig(state_dtype="bf16"),
        PionConfig(**MSIGN, state_dtype="bf16"),
        PionConfig(**MSIGN, blocks=3),
    ],
    ids=lambda config: f"{config.momentum}-{config.direction}-{config.state_dtype}-{config.blocks}",
)
def test_batches_of_other_sizes_change_nothing(
    monkeypatch: pytest.MonkeyPatch, config: PionConfig
) -> None:
    """One matrix at a time, or all of one shape, other parameters' too; each at its own rate."""
    results = []
    for budget in (1, 1 << 30):
        monkeypatch.setitem(BATCH_BYTES, "cpu", budget)
        params = weights((12, 6), (3, 6), (6, 3), (3, 6), (3, 6), dtype=torch.float64)
        heads, *others, slow = params
        views = {heads: stacked(12, 6, name="head", count=4, axis="rows")}
        groups = [{"params": [heads, *others]}, {"params": [slow], "lr": 0.01}]
        optimizer = Pion(groups, lr=0.1, config=config, views=views)
        for step in range(3):
            set_grads(params, step)
            others[step].grad = None  # what has no gradient stays, in a batch or not
            optimizer.step()
        moments = [x for p in params for x in optimizer.state[p].values()]
        results.append([*(p.detach() for p in params), *moments])
    for one, together in zip(*results, strict=True):
        # Its derivation's sums; a moment that is rounded may fall to the other side: 2^-8.
        limit = TOLERANCE if one.dtype == torch.float64 else 2.0**-8
        assert (one - together).abs().max() <= limit * one.abs().max()


def test_matrices_of_one_shape_are_one_batch() -> None:
    """Others' sides, and rates, are their own; a batch has no more than its bytes."""
    params = weights((3, 6), (3, 6), (6, 3), (3, 6), (700, 700), (700, 700))
    optimizer = Pion([{"params": params[:3]}, {"params": params[3:], "lr": 0.1}])
    plan = optimizer.plan
    assert plan.batches(plan.in_place(), "cpu") == [[0, 1], [2], [3], [4], [5]]
    assert plan.batches(plan.in_place(), "cuda") == [[0, 1], [2], [3], [4, 5]]


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (nn.Parameter(torch.zeros(3)), "AdamW"),
        (nn.Parameter(torch.zeros(2, 2, 2, 2)), "AdamW"),
        (nn.Parameter(torch.ones(2, 3, 2).mT), "not contiguous"),
        (nn.Parameter(torch.zeros(0, 2)), "AdamW"),
        (nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64)), "complex64"),
    ],
    ids=["1-D", "4-D", "strided", "empty", "complex"],
)
def test_other_parameters_are_refused(bad: nn.Parameter, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Pion([*weights((2, 2)), bad])


@each_config
def test_fused_experts_step_as_if_they_were_apart(config: PionConfig) -> None:
    """Also gradients of other strides; and their state is saved and goes on."""
    apart = weights(*[(3, 5)] * 4, dtype=torch.float64)
    fused = nn.Parameter(torch.stack(list(apart)).detach())
    one, several = Pion([fused], 0.02, config=config), Pion(apart, 0.02, config=config)
    for step in range(4):
        set_grads(apart, step)
        fused.grad = torch.stack([p.grad.mT.contiguous() for p in apart]).mT
        one.step()
        several.step()
        if step == 1:
            saved = copy.deepcopy(one.state_dict())
            one = Pion([fused], 0.02, config=config)
            one.load_state_dict(saved)
    for mine, expert in zip(fused, apart, strict=True):
        assert (mine - expert).abs().max() <= TOLERANCE * expert.abs().max()
    assert [name for name, _ in one.matrices()][1] == "parameter 0 of group 0:expert[1]"


def test_refusals_name_the_parameter() -> None:
    with pytest.raises(ValueError, match=r"bias has shape \(2,\)"):
        Pion(nn.Linear(3, 2).named_parameters())


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(4, 3, sparse=True)
    optimizer = Pion(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse"):
        optimizer.step()


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"weight_decay": 0.1}, "spectrum"),
        ({"betas": (0.9, 0.99)}, r"PionConfig\(betas=...\)"),
        ({"eps": 1e-6}, r"PionConfig\(eps=...\)"),
        ({"nesterov": False}, r"PionConfig\(nesterov=...\)"),
        ({"maximize": True}, "no such option"),
        ({"amsgrad": True}, "no such option"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_of_a_group_are_refused_by_name_and_nothing_changes(
    option: dict[str, object], says: str
) -> None:
    (name,) = option
    first, second = weights((4, 3), (4, 3))
    with pytest.raises(ValueError, match=f"^{name}=.* of group 0: .*{says}"):
        Pion([{"params": [first], **option}])
    optimizer = Pion([first])
    with pytest.raises(ValueError, match=f"^{name}=.* of group 1: .*{says}"):
        optimizer.add_param_group({"params": [second], **option})
    assert len(optimizer.param_groups) == len(optimizer.plan.matrices) == 1


def test_options_that_are_off_and_keys_of_the_caller_stay() -> None:
    """As Megatron has them in its groups, and its scheduler writes them."""
    keys = {"weight_decay": 0.0, "foreach": None, "initial_lr": 0.1, "max_lr": 0.1, "wd_mult": 1.0}
    optimizer = Pion([{"params": weights((4, 3)), **keys}])
    assert optimizer.param_groups[0].items() >= keys.items()
    optimizer.param_groups[0]["weight_decay"] = 0.1
    optimizer.load_state_dict(optimizer.state_dict())
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=4, cycle_momentum=False)
    Pion(optimizer.param_groups[0]["params"]).load_state_dict(optimizer.state_dict())


def saved_and_loaded(both: tuple[nn.Parameter, Pion]) -> tuple[nn.Parameter, Pion]:
    file = io.BytesIO()
    torch.save(both, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[tuple[nn.Parameter, Pion]], tuple[nn.Parameter, Pion]]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda both: pickle.loads(pickle.dumps(both)),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize(
    "config",
    [
        *CONFIGS,
        PionConfig(state_dtype="int8"),
        PionConfig(**MSIGN, state_dtype="int8", spectrum_reset_interval=2),
    ],
    ids=lambda config: f"{config.momentum}-{config.direction}-{config.state_dtype}",
)
def test_a_copy_steps_as_the_original(
    config: PionConfig, copied: Callable[[tuple[nn.Parameter, Pion]], tuple[nn.Parameter, Pion]]
) -> None:
    (p,) = weights((8, 3))
    optimizer = Pion([("p", p)], lr=0.1, config=config, views={p: stacked(8, 3, name="h", count=2)})
    for step in range(2):
        set_grads([p], step)
        optimizer.step()
    q, other = copied((p, optimizer))
    assert q is not p and other.param_groups[0]["params"] == [q]
    for step in range(2, 5):
        for mine, each in ((p, optimizer), (q, other)):
            set_grads([mine], step)
            each.step()
        assert torch.equal(p, q)
    (more,) = weights((4, 3))
    other.add_param_group({"params": [("more", more)]})
    set_grads([q, more], 5)
    other.step()
    assert [name for name, _ in other.matrices()] == ["p:h[0]", "p:h[1]", "more:whole[0]"]


def test_a_copy_with_process_groups_is_refused() -> None:
    (p,) = weights((4, 3))
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        optimizer = Pion([p], shards={p: dist.group.WORLD})
        for copied in (copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match=r"DTensors cannot be copied .* state_dict\(\)"):
                copied(optimizer)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize(
    "config",
    [
        *CONFIGS,
        PionConfig(state_dtype="int8"),
        PionConfig(**MSIGN, state_dtype="int8"),
        PionConfig(**MSIGN, spectrum_reset_interval=2),
    ],
    ids=lambda config: f"{config.momentum}-{config.direction}-{config.state_dtype}",
)
def test_a_converted_model_is_followed(config: PionConfig, steps: int) -> None:
    """The moments are those of the model as it is now, and state_dict's too."""
    model = nn.ModuleList([nn.Linear(6, 4, bias=False), nn.Linear(4, 8, bias=False)])
    params = list(model.parameters())
    optimizer = Pion(params, lr=0.1, config=config)
    for step in range(steps):
        set_grads(params, step)
        optimizer.step()
    model.double()
    straight = [nn.Parameter(p.detach().clone()) for p in params]
    expected = Pion(straight, lr=0.1, config=config)
    if steps:
        expected.load_state_dict(optimizer.state_dict())
    for step in range(steps, steps + 2):
        for each in (params, straight):
            set_grads(each, step)
        optimizer.step()
        expected.step()
    assert all(torch.equal(p, q) for p, q in zip(params, straight, strict=True))
    moments = optimizer.state_dict()["state"]
    for index, state in expected.state_dict()["state"].items():
        for key, moment in state.items():
            assert moment.dtype == moments[index][key].dtype == torch.float64
            assert torch.equal(moments[index][key], moment)


def test_a_model_of_low_precision_and_back_is_followed() -> None:
    model = nn.Linear(6, 4, bias=False)
    optimizer = Pion(model.parameters(), lr=0.1, config=PionConfig(state_dtype="int8"))
    for convert in (model.bfloat16, model.double, model.float):
        convert()
        before = model.weight.detach().clone()
        model(torch.ones(2, 6, dtype=before.dtype)).square().sum().backward()
        optimizer.step()
        assert not torch.equal(model.weight, before), convert
        optimizer.zero_grad()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile_goes_around_a_step(backend: str) -> None:
    results = []
    for compiled in (lambda f: f, torch.compile(backend=backend)):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = nn.Linear(6, 4, bias=False)
        optimizer = Pion(model.parameters(), lr=0.1)

        def train(model: nn.Module, optimizer: Pion) -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(torch.ones(2, 6)).square().sum()
            loss.backward()
            optimizer.step()
            return loss

        losses = [compiled(train)(model, optimizer).item() for _ in range(3)]
        compiled(optimizer.step)()
        results.append((losses, model.weight.detach()))
    # The same operations but for the loss, whose backward may sum 2 terms in another order.
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert torch.allclose(results[0][1], results[1][1], rtol=0, atol=1e-5)


LIE = PionConfig(**PUBLISHED)
AVERAGE = PionConfig(**MSIGN)


@pytest.mark.parametrize(
    ("config", "other", "says"),
    [
        (PionConfig(), LIE, "momentum='lie'"),
        (LIE, PionConfig(), "momentum='polar'"),
        (PionConfig(), AVERAGE, "momentum='transported'"),
        (AVERAGE, PionConfig(), "momentum='polar'"),
        (AVERAGE, replace(AVERAGE, momentum="ambient"), "momentum='ambient'"),
        (AVERAGE, replace(AVERAGE, direction="adaptive"), "second_moment"),
        (LIE, replace(LIE, direction="momentum"), "second_moment"),
        (LIE, replace(LIE, side="in"), "sides"),
        (PionConfig(), PionConfig(qkv="head"), "qkv='head'"),
        (PionConfig(), PionConfig(split_gate=False), "split_gate"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_state_of_other_options_is_refused_and_nothing_changes(
    config: PionConfig, other: PionConfig, says: str
) -> None:
    params = weights((4, 3))
    optimizer = Pion(params, config=config)
    set_grads(params, 0)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=says):
        optimizer.load_state_dict(Pion(weights((4, 3)), config=other).state_dict())
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, moment in before["state"][0].items():
        assert torch.equal(after["state"][0][key], moment)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (PionConfig(), r"m.whole must be \(1, 4, 3\)"),
        (AVERAGE, r"m.whole must be \(1, 4, 3\)"),
        (LIE, r"m_in.whole must be \(1, 3, 3\)"),
    ],
    ids=["default", "msign", "published"],
)
def test_state_of_another_optimizer_or_shape_is_refused(config: PionConfig, says: str) -> None:
    def pion(*shapes: tuple[int, int]) -> Pion:
        return Pion(weights(*shapes), config=config)

    optimizer = pion((4, 3))
    with pytest.raises(ValueError, match="not Pion's"):
        optimizer.load_state_dict(torch.optim.AdamW(weights((4, 3))).state_dict())
    with pytest.raises(ValueError, match=says):
        optimizer.load_state_dict(pion((4, 5)).state_dict())
    with pytest.raises(ValueError, match="groups"):
        optimizer.load_state_dict(pion((4, 3), (4, 3)).state_dict())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e38])
@each_config
def test_non_finite_gradients_move_nothing_and_are_named(
    config: PionConfig, bad: float, caplog: pytest.LogCaptureFixture
) -> None:
    # 1e38 is finite, but its square is not: no second moment could hold it.
    params = weights((4, 3), (2, 5))
    optimizer = Pion([("first", params[0]), ("second", params[1])], lr=0.1, config=config)
    for step in range(2):
        set_grads(params, step)
        optimizer.step()
    before = copy.deepcopy((params, [dict(optimizer.state[p]) for p in params]))
    set_grads(params, 2)
    params[1].grad[0, 1] = bad
    optimizer.step()
    for p, old in zip(params, before[0], strict=True):
        assert torch.equal(p, old)
    for p, old in zip(params, before[1], strict=True):
        assert all(torch.equal(optimizer.state[p][key], moment) for key, moment in old.items())
    with caplog.at_level(logging.WARNING, logger="pion_dist"):
        set_grads(params, 3)
        optimizer.step()
    assert "second (1 step)" in caplog.text and "first" not in caplog.text
    assert not any(torch.equal(p, old) for p, old in zip(params, before[0], strict=True))
    caplog.clear()
    optimizer.state_dict()
    assert not caplog.text, "a step is reported once"


def test_masters_take_their_weights_place() -> None:
    (p,) = weights((4, 3), dtype=torch.bfloat16)
    optimizer = Pion([p], lr=0.1, views={p: stacked(4, 3, name="head", count=2)})
    master = p.detach().float()
    optimizer.param_groups[0]["params"][0] = master
    optimizer.adopt({p: master})
    master.grad = torch.ones(4, 3)
    before = master.clone()
    optimizer.step()
    assert not torch.equal(master, before)
    assert sum(1 for _ in optimizer.matrices()) == 2


@pytest.mark.parametrize(
    "options",
    [{}, *(options | {"retraction": "exp"} for options in (MSIGN, PUBLISHED))],
    ids=["default", "msign", "published"],
)
def test_trains_a_model_and_keeps_its_spectrum(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32, bias=False), nn.GELU(), nn.Linear(32, 8, bias=False))
    start = [torch.linalg.svdvals(p.detach().double()) for p in model.parameters()]
    target = torch.linalg.qr(torch.randn(8, 8)).Q
    config = PionConfig(**options)
    optimizer = Pion(model.named_parameters(), lr=0.05, config=config)
    x = torch.randn(256, 8)
    losses = []
    for _ in range(100):
        loss = (model(x) - 0.3 * x @ target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    for p, singular in zip(model.parameters(), start, strict=True):
        drift = (torch.linalg.svdvals(p.detach().double()) - singular).abs().max() / singular.max()
        # The factors are orthogonal, so what is left is float32 rounding: sums of at most 32 terms,
        # 32 * 2**-24 = 2e-6 a step, 100 steps.
        assert drift < 2e-4
