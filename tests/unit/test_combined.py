"""PionWithAdamW is Pion and AdamW to the bit, behind one optimizer's interface."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from reference import PUBLISHED
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.lr_scheduler import LambdaLR

from pion_dist import Pion, PionConfig, PionWithAdamW, split_parameters

ADAMW: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": 0.1}


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 6)
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6, bias=False)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.down(torch.relu(self.up(self.embed(x))))) @ self.embed.weight.mT


def loss(model: nn.Module, step: int) -> Tensor:
    tokens = torch.randint(10, (4, 5), generator=torch.Generator().manual_seed(step))
    return nn.functional.cross_entropy(model(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:])


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(p.equal(q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def made(model: nn.Module, **options: Any) -> PionWithAdamW:
    return PionWithAdamW(model, 0.02, pion_lr_mult=0.5, adamw=ADAMW, **options)


def test_a_state_before_the_first_step_changes_no_step() -> None:
    """AdamW's is made for it, weights and gradients staying as they are."""
    asked, other = Tiny(), Tiny()
    one, two = made(asked), made(other)
    loss(asked, 0).backward()
    grads = [p.grad.clone() for p in asked.parameters()]
    state = one.state_dict()["state"]
    assert len(state) == len(grads) and all(state.values())
    assert all(not x["step"] for x in state.values() if "step" in x) and same(asked, other)
    assert all(p.grad.equal(g) for p, g in zip(asked.parameters(), grads, strict=True))
    assert [group["lr"] for group in one.param_groups] == [0.01, 0.02]
    for each, optimizer in ((asked, one), (other, two)):
        train(each, optimizer, range(3))
    assert same(asked, other)


def test_it_is_both_optimizers_on_one_schedule() -> None:
    together, apart = Tiny(), Tiny()
    one = made(together)
    matrices, others = split_parameters(apart)
    two = [Pion(matrices, 0.01), torch.optim.AdamW(others, 0.02, **ADAMW)]
    schedules = [LambdaLR(each, lambda step: 0.9**step) for each in (one, *two)]
    for step in range(4):
        one.zero_grad()
        train(together, one, range(step, step + 1))
        loss(apart, step).backward()
        for each in two:
            each.step()
            each.zero_grad()
        for schedule in schedules:
            schedule.step()
        assert same(together, apart), step
    pion, adamw = one.param_groups
    assert adamw["lr"] == pytest.approx(0.02 * 0.9**4) and pion["lr"] == adamw["lr"] / 2
    assert one.state.keys() == set(together.parameters())


@pytest.mark.parametrize("config", [PionConfig(), PionConfig(**PUBLISHED)], ids=["polar", "lie"])
def test_resume_equals_straight(config: PionConfig) -> None:
    straight, resumed = Tiny(), Tiny()
    train(straight, made(straight, config=config), range(6))
    first = made(resumed, config=config)
    train(resumed, first, range(3))
    saved = copy.deepcopy(first.state_dict())
    again = PionWithAdamW(resumed, 0.5, config=config)
    again.load_state_dict(saved)
    train(resumed, again, range(3, 6))
    assert same(straight, resumed)


def test_a_copy_goes_on_by_itself() -> None:
    model = Tiny()
    train(model, (optimizer := made(model)), range(2))
    for copied in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
        other, its = copied((model, optimizer))
        assert all(
            any(p is q for q in other.parameters()) for g in its.param_groups for p in g["params"]
        )
        train(other, its, range(2, 4))
        assert not same(other, model)
        expected, own = copy.deepcopy((model, optimizer))
        train(expected, own, range(2, 4))
        assert same(other, expected)


def test_torchs_checkpoints_take_it() -> None:
    """Names in place of numbers, as torch.distributed.checkpoint saves states."""
    straight, resumed = Tiny(), Tiny()
    train(straight, made(straight), range(4))
    train(resumed, (optimizer := made(resumed)), range(2))
    saved = copy.deepcopy(get_optimizer_state_dict(resumed, optimizer))
    assert {"up.weight", "norm.bias"} <= saved["state"].keys()
    again = made(resumed)
    set_optimizer_state_dict(resumed, again, saved)
    train(resumed, again, range(2, 4))
    assert same(straight, resumed)


def test_a_closure_is_called_once() -> None:
    model, calls = Tiny(), []
    optimizer = made(model)

    def closure() -> float:
        calls.append(torch.is_grad_enabled())
        value = loss(model, 0)
        value.backward()
        return value.item()

    assert optimizer.step(closure) > 0.0 and calls == [True]


def test_a_grad_scaler_skips_both() -> None:
    model, before = Tiny(), Tiny()
    optimizer, scaler = made(model), torch.amp.GradScaler("cpu")
    scaler.scale(loss(model, 0)).backward()
    model.up.weight.grad.fill_(torch.inf)
    scaler.step(optimizer)
    assert same(model, before)
    optimizer.zero_grad()
    scaler.update()
    scaler.scale(loss(model, 0)).backward()
    scaler.step(optimizer)
    assert not any(p.equal(q) for p, q in zip(model.parameters(), before.parameters(), strict=True))


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="no trainable matrix for Pion"):
        PionWithAdamW(nn.LayerNorm(4))
    model = Tiny()
    optimizer = made(model)
    with pytest.raises(ValueError, match=r"optimizers\[0\], which is Pion"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))]})
    for name in ("param_groups", "state"):
        with pytest.raises(AttributeError, match=name):
            setattr(optimizer, name, getattr(optimizer, name))
    train(model, optimizer, range(1))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"groups of \[1, 5\] parameters, this optimizer \[2, 4\]"):
        optimizer.load_state_dict(made(Tiny(), exclude=["up"]).state_dict())
    other = made(Tiny(), config=PionConfig(**PUBLISHED)).state_dict()
    with pytest.raises(ValueError, match="momentum"):
        optimizer.load_state_dict(other)
    assert str(optimizer.state_dict()) == str(before)
    alone = PionWithAdamW(nn.Linear(3, 2, bias=False), 0.1)
    assert len(alone.optimizers) == len(alone.param_groups) == 1
