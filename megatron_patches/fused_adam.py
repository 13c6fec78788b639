"""Adam as Megatron takes it from apex, in torch operations: for CPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.adam import adam


class FusedAdam(torch.optim.Optimizer):
    """Adam(W) with apex's interface: the step is counted in the group, not in each parameter.

    Megatron's DistributedOptimizer stores a group's step and creates the moments itself; with
    torch's AdamW, whose step is per parameter, it saves but cannot resume. The arithmetic is
    torch's own loop, bitwise that of `torch.optim.AdamW`, and not the fused CPU kernel, which
    handles the tail of a tensor apart: results could then depend on how parameters are sharded.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        if capturable:
            raise ValueError("capturable=True needs CUDA graphs")
        self.adam_w_mode = adam_w_mode
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient (modified in place)."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["params"]:  # as in apex and TE, an empty group counts no step
                self._update(group)
        return loss

    def _update(self, group: dict[str, Any]) -> None:
        done = int(group.get("step", 0))
        group["step"] = done + 1
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            if not self.state[p]:
                self.state[p] = {k: torch.zeros_like(p) for k in ("exp_avg", "exp_avg_sq")}
        adam(
            params,
            [p.grad for p in params],
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
            [],
            [torch.tensor(float(done)) for _ in params],  # counted up inside
            foreach=False,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
            decoupled_weight_decay=self.adam_w_mode,
        )
