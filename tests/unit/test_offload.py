"""Moments in host memory: the same digits, and two batches of them on the device."""

import copy
from dataclasses import replace

import pytest
import torch
from optimizer_cases import set_grads, weights
from reference import MSIGN, PUBLISHED
from torch import nn

from pion_dist import Pion, PionConfig, execute
from pion_dist.matrices import stacked
from pion_dist.offload import Offloaded
from pion_dist.plan import BATCH_BYTES

CONFIGS = {
    "polar": PionConfig(),
    "polar-bf16": PionConfig(state_dtype="bf16"),
    "polar-int8": PionConfig(state_dtype="int8"),
    "published": PionConfig(**PUBLISHED),
    "msign": PionConfig(**MSIGN),
    "reset": PionConfig(**PUBLISHED, spectrum_reset_interval=2),
    "blocks": PionConfig(**PUBLISHED, blocks=3),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def trained(config: PionConfig, device: str = "cpu") -> tuple[list[nn.Parameter], Pion]:
    """Heads, some weights of one shape, one alone; two rates; and a dtype of its own."""
    params = [p.to(device) for p in weights((12, 6), (3, 6), (6, 3), (3, 6), (3, 9))]
    params = [nn.Parameter(p.detach()) for p in params]
    params.append(nn.Parameter(params[1].detach().double()))
    heads, *others, slow = params
    groups = [{"params": [heads, *others]}, {"params": [slow], "lr": 0.01}]
    views = {heads: stacked(12, 6, name="head", count=4, axis="rows")}
    return params, Pion(groups, lr=0.1, config=config, views=views)


def step(params: list[nn.Parameter], optimizer: Pion, number: int) -> None:
    set_grads(params, number)
    params[1 + number % 3].grad = None  # as an expert that no token reached
    if number == 2:
        params[0].grad[0, 0] = torch.nan
    optimizer.step()


# One matrix at a time, some heads at a time, and all of one shape together.
@pytest.mark.parametrize("budget", [1, 3000, 1 << 30])
@each_config
def test_the_digits_are_the_same(
    monkeypatch: pytest.MonkeyPatch, config: PionConfig, budget: int
) -> None:
    """Over steps, also one that is not taken, and over states that each load from the other."""
    monkeypatch.setitem(BATCH_BYTES, "cpu", budget)
    (here, one), (there, two) = (trained(replace(config, offload_state=x)) for x in (False, True))
    for number in range(3):
        step(here, one, number)
        step(there, two, number)
    saved = one.state_dict(), two.state_dict()
    one.load_state_dict(saved[1])
    two.load_state_dict(saved[0])
    for number in range(3, 6):
        step(here, one, number)
        step(there, two, number)
    assert all(torch.equal(p, q) for p, q in zip(here, there, strict=True))
    for mine, theirs in zip(here, there, strict=True):
        assert one.state[mine].keys() == two.state[theirs].keys()
        assert all(torch.equal(x, two.state[theirs][key]) for key, x in one.state[mine].items())


@each_config
def test_two_batches_are_on_the_device(monkeypatch: pytest.MonkeyPatch, config: PionConfig) -> None:
    """As many bytes as the plan says: of every other batch, those of the largest."""
    used: list[Offloaded] = []

    class Counted(Offloaded):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)
            used.append(self)

    monkeypatch.setattr(execute, "Offloaded", Counted)
    monkeypatch.setitem(BATCH_BYTES, "cpu", 1)
    params, optimizer = trained(replace(config, offload_state=True))
    set_grads(params, 0)
    optimizer.step()
    (offloaded,) = used
    plan = optimizer.plan
    counted = sum(x.nbytes for x in offloaded.buffers)
    assert counted == plan.state_bytes_on([], "cpu") < plan.state_bytes([])
    sizes = list(map(plan.part_bytes, plan.in_order([], "cpu")))
    assert counted == max(sizes[::2]) + max(sizes[1::2])
    assert plan.state_bytes([]) == sum(sizes)
    assert f"{counted:,} at a time on the device" in optimizer.totals()


def test_a_step_that_fails_takes_nothing_back() -> None:
    params, optimizer = trained(PionConfig(offload_state=True))
    step(params, optimizer, 0)
    before = {key: x.clone() for key, x in optimizer.state[params[0]].items()}
    with torch.no_grad():
        params[0].fill_(torch.inf)
    set_grads(params, 1)
    with pytest.raises(ValueError, match="is not finite"):
        optimizer.step()
    assert all(torch.equal(x, before[key]) for key, x in optimizer.state[params[0]].items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each_config
def test_a_gpu_has_two_batches_and_the_same_digits(config: PionConfig) -> None:
    results = []
    for offload_state in (False, True):
        params, optimizer = trained(replace(config, offload_state=offload_state), "cuda")
        for number in range(6):
            if offload_state and number == 3:  # as Lightning does
                for p in params:
                    for key, x in optimizer.state[p].items():
                        optimizer.state[p][key] = x.cuda()
            if offload_state and number == 4:  # a copy, whose moments are not pinned
                params, optimizer = copy.deepcopy((params, optimizer))
            step(params, optimizer, number)
        moments = [x for p in params for x in optimizer.state[p].values()]
        assert all(x.is_pinned() == offload_state for x in moments)
        optimizer.state_dict()  # waits for the copies
        results.append([x.cpu() for x in (*params, *moments)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
