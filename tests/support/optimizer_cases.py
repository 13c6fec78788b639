"""Configs, weights and gradients for the tests of Pion as a torch optimizer."""

import torch
from reference import MSIGN, PUBLISHED
from torch import nn

from pion_dist import PionConfig

CONFIGS = [
    PionConfig(),
    PionConfig(**PUBLISHED),
    PionConfig(**MSIGN),
    PionConfig(**PUBLISHED | {"momentum": "ambient", "retraction": "cayley"}),
    PionConfig(direction="momentum", side="out", scaling="none"),
]


def weights(*shapes: tuple[int, int], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(1)
    return [nn.Parameter(torch.randn(shape, dtype=dtype) / shape[1] ** 0.5) for shape in shapes]


def set_grads(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
