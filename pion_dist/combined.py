"""Pion for matrices and AdamW for the rest, as one optimizer object for trainers that want one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn

from .config import PionConfig
from .matrices import MatrixView
from .optimizer import Pion
from .parameters import split_parameters


class PionWithAdamW(torch.optim.Optimizer):
    """Steps a model's matrices by Pion and its other parameters by ``torch.optim.AdamW``.

    The groups of both are ``param_groups``, Pion's first, so that one scheduler sets all rates and
    keeps their ratio. The state dict has torch's usual form and both states. ``split_parameters``
    decides what is Pion's: make the optimizer when the model has its initial weights, and load a
    checkpoint afterwards.

    A gradient that is not finite stops Pion's part of a step alone. AdamW takes its part, as it
    does without Pion.

    Args:
        model: it may be wrapped; see ``split_parameters``.
        lr: AdamW's learning rate.
        pion_lr_mult: Pion's rate is ``lr`` times this, as with Megatron's ``--pion-lr-mult``.
        config: Pion's options.
        exclude: regular expressions of parameters that are AdamW's, searched in their names.
        views: how Pion sees a parameter as matrices; see ``Pion``.
        adamw: further arguments of ``torch.optim.AdamW``.

    Attributes:
        optimizers: ``Pion`` and, unless the model has matrices alone, ``AdamW``.

    Raises:
        ValueError: no parameter is Pion's, or an argument does not fit; see ``Pion``.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        *,
        pion_lr_mult: float = 1.0,
        config: PionConfig | None = None,
        exclude: Sequence[str] = (),
        views: Mapping[Tensor, MatrixView] | None = None,
        adamw: Mapping[str, Any] | None = None,
    ) -> None:
        """See the class."""
        matrices, others = split_parameters(model, exclude=exclude)
        if not matrices:
            raise ValueError("the model has no trainable matrix for Pion: use torch.optim.AdamW")
        self.optimizers: list[torch.optim.Optimizer] = [
            Pion(matrices, lr * pion_lr_mult, config=config, views=views)
        ]
        if others:
            self.optimizers.append(torch.optim.AdamW(others, lr=lr, **(adamw or {})))
        super().__init__(self.param_groups, {})

    # torch's constructor assigns the next two, empty. What is in them is the optimizers' own.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of both optimizers; a change of one reaches its optimizer."""
        return [group for each in self.optimizers for group in each.param_groups]

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        if groups:
            raise AttributeError("param_groups: change the groups that are there, or optimizers'")

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The state of both optimizers, by parameter."""
        both = ((p, state) for each in self.optimizers for p, state in each.state.items())
        return defaultdict(dict, both)

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        if state:
            raise AttributeError("state: call load_state_dict, or set that of one of optimizers")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse a further group: nothing tells whose it is.

        Raises:
            ValueError: names the way.
        """
        if not any(param_group is group for group in self.param_groups):  # torch's constructor
            raise ValueError(
                "add_param_group: call it of optimizers[0], which is Pion, or optimizers[1], AdamW"
            )

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take a step of both; the closure, if there is one, is called once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for each in self.optimizers:
            each.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the state of both in torch's form, with parameters numbered through.

        AdamW's state is there before its first step too, for ``torch.distributed.checkpoint``: that
        loads what it finds here, and makes none where Pion has some.
        """
        for adamw in self.optimizers[1:]:
            _make_state(adamw)
        state: dict[int, Any] = {}
        groups: list[dict[str, Any]] = []
        first = 0
        for each in self.optimizers:
            own = each.state_dict()
            state |= {first + index: value for index, value in own["state"].items()}
            for group in own["param_groups"]:
                numbers = [first + index for index in group["params"]]
                groups.append({**group, "params": numbers})
            first += sum(len(group["params"]) for group in own["param_groups"])
        return {"state": state, "param_groups": groups}

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned, or refuse all of it.

        Raises:
            ValueError: the state is of other parameters or of other options of Pion's.
        """
        groups = list(state_dict["param_groups"])
        theirs, mine = ([len(g["params"]) for g in some] for some in (groups, self.param_groups))
        if theirs != mine:
            raise ValueError(f"the state has groups of {theirs} parameters, this optimizer {mine}")
        for each in self.optimizers:
            own = [groups.pop(0) for _ in each.param_groups]
            # Numbers, or names from torch.distributed.checkpoint; the order is what counts.
            keys = {key for group in own for key in group["params"]}
            state = {key: value for key, value in state_dict["state"].items() if key in keys}
            each.load_state_dict({"state": state, "param_groups": own})

    def __getstate__(self) -> dict[str, Any]:
        """Everything that a copy needs."""
        return {"defaults": self.defaults, "optimizers": self.optimizers}


@torch.no_grad()
def _make_state(adamw: torch.optim.Optimizer) -> None:
    """Make the state of parameters that have none, as the first step would; they do not move."""
    params = [p for group in adamw.param_groups for p in group["params"]]
    fresh = [p for p in params if not adamw.state.get(p)]
    if not fresh:
        return
    grads, rates = [p.grad for p in params], [group["lr"] for group in adamw.param_groups]
    for p in params:
        p.grad = None
    for p in fresh:
        p.grad = torch.zeros_like(p)
    for group in adamw.param_groups:
        group["lr"] = 0.0 * group["lr"]  # a tensor, where it is one
    adamw.step()
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad
    for group, rate in zip(adamw.param_groups, rates, strict=True):
        group["lr"] = rate
    for p in fresh:
        adamw.state[p]["step"].zero_()
