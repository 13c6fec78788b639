"""Pion as the published code computes it: a loop over matrices, products in their plain form.

Written from the equations of arXiv 2605.12492: what `tools/bench_step.py` times Pion against. A
side costs four products: the generator, the norm, and two for E.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from pion_dist import PionConfig
from pion_dist.config import Side

# Muon's (K. Jordan, 2024, https://kellerjordan.github.io/posts/muon/).
QUINTIC, STEPS = (3.4445, -4.7750, 2.0315), 5


def unpublished(config: PionConfig) -> str:
    """What of the options the published code does not have, or an empty string."""
    if config.retraction != "taylor" or config.degree != 2:
        return "E is the exponential cut at degree 2"
    if config.side not in ("both", "alternate"):
        return "sides are both or alternate"
    if config.nesterov:
        return "there is no Nesterov momentum"
    if config.direction == "msign":
        released = ("ambient", "alternate", "none")
        if (config.momentum, config.side, config.scaling) != released:
            return "the matrix sign is of the ambient average, sides alternate, nothing is scaled"
    elif config.direction != "momentum" or config.momentum == "ambient" or config.scaling != "rms":
        return "the step follows Lie or transported momentum, scaled by its root mean square"
    return ""


class ReleasedPion(torch.optim.Optimizer):
    """The update of every matrix by itself.

    Args:
        matrices: parameters, each one matrix.
        lr: η.
        config: options that the published runs have.

    Raises:
        ValueError: the published code has no such options.
    """

    def __init__(self, matrices: Iterable[Tensor], lr: float, *, config: PionConfig) -> None:
        if why := unpublished(config):
            raise ValueError(f"not published: {why}")
        super().__init__(matrices, {"lr": lr})
        self.config = config
        self.steps = 0
        for p in self.param_groups[0]["params"]:
            m, n = p.shape
            lie = {"in": p.new_zeros(n, n), "out": p.new_zeros(m, m)}
            self.state[p] = lie if config.momentum == "lie" else {"average": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        self.steps += 1
        for p in self.param_groups[0]["params"]:
            self._step(p, p.grad, self.state[p])

    def _step(self, w: Tensor, g: Tensor, state: dict[str, Tensor]) -> None:
        config, lr = self.config, self.param_groups[0]["lr"]
        active = config.active_sides(self.steps)
        beta = config.betas[0]
        for key, m in state.items():
            new = g if key == "average" else _generator(w, g, key)
            m.mul_(beta).add_(new, alpha=1.0 - beta)
        a = {
            side: -state[side]
            if config.momentum == "lie"
            else -_generator(w, state["average"], side)
            for side in active
        }
        if config.direction == "msign":
            a = {side: _matrix_sign(k / 2, config.eps) for side, k in a.items()}
        if config.scaling == "rms":
            change = sum(w @ x if side == "in" else x @ w for side, x in a.items())
            lr = lr * config.rms * math.sqrt(w.numel()) / (torch.linalg.norm(change) + config.eps)
        moved = [w, state["average"]] if config.momentum == "transported" else [w]
        for x in moved:
            x.copy_(_rotated(x, a, lr))


def _generator(w: Tensor, g: Tensor, side: str) -> Tensor:
    """WᵀG − GᵀW (in) or GWᵀ − WGᵀ (out): one product, minus its transpose."""
    product = w.T @ g if side == "in" else g @ w.T
    return product - product.T


def _matrix_sign(k: Tensor, eps: float) -> Tensor:
    """By Muon's Newton-Schulz iteration, three products a step."""
    x = k / (torch.linalg.norm(k) + eps)
    a, b, c = QUINTIC
    for _ in range(STEPS):
        p = x @ x.T
        x = a * x + (b * p + c * (p @ p)) @ x
    return x


def _rotated(x: Tensor, a: dict[Side, Tensor], angle: float | Tensor) -> Tensor:
    """E(A_out) X E(A_in) with E(A) = I + A + A²/2, a side after the other."""
    for side, k in a.items():
        first = x @ k if side == "in" else k @ x
        second = first @ k if side == "in" else k @ first
        x = x + angle * first + (angle**2 / 2) * second
    return x


def released_flop(m: int, n: int, config: PionConfig) -> float:
    """FLOP of a step of one m x n matrix, averaged over steps; a product [a, b] [b, c] is 2abc."""
    total, share = 0.0, 0.5 if config.side == "alternate" else 1.0
    for d, other in ((n, m), (m, n)):
        product = 2.0 * other * d * d
        total += product * (1.0 if config.momentum == "lie" else share)  # the generator
        used = 2 + (config.scaling == "rms") + 2 * (config.momentum == "transported")
        total += share * used * product
        if config.direction == "msign":
            total += share * 3 * STEPS * 2.0 * d**3
    return total
