"""A small Llama of bytes, and how it is divided: tensor and sequence parallelism, then FSDP2."""

from typing import Any

import torch
from loop import shard_layers
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional as F

BYTES = 256


def rotary(x: Tensor) -> Tensor:
    """Rotate queries or keys by their positions."""
    length, width = x.shape[-2:]
    rates = 1e4 ** -(torch.arange(0, width, 2, device=x.device) / width)
    angles = torch.arange(length, device=x.device)[:, None] * rates
    a, b = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1).type_as(x)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_width = width // heads
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            w(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for w in (self.wq, self.wk, self.wv)
        )
        x = F.scaled_dot_product_attention(rotary(q), rotary(k), v, is_causal=True)
        return self.wo(x.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = Attention(width, heads)
        self.feed_forward = FeedForward(width, 8 * width // 3 // 16 * 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class Llama(nn.Module):
    def __init__(self, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(BYTES, width)
        self.layers = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.output = nn.Linear(width, BYTES, bias=False)
        for p in self.layers.parameters():
            if p.dim() == 2:  # Pion keeps the singular values: torch's are 0.6 of these
                nn.init.normal_(p, std=p.shape[1] ** -0.5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tok_embeddings(ids)
        for layer in self.layers:
            x = layer(x)
        return self.output(self.norm(x))


def parallelize(model: Llama, dp: DeviceMesh, tp: DeviceMesh) -> None:
    """Divide a model by tensor and sequence parallelism, then by FSDP2."""
    if tp.size() > 1:
        columns, rows = ColwiseParallel(), RowwiseParallel(output_layouts=Shard(1))
        enter = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
        plan: dict[str, Any] = {
            "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
            "norm": SequenceParallel(),
            "output": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
        }
        for i in range(len(model.layers)):
            layer = {
                "attention_norm": SequenceParallel(),
                "attention": enter,
                **{f"attention.{name}": columns for name in ("wq", "wk", "wv")},
                "attention.wo": rows,
                "ffn_norm": SequenceParallel(),
                "feed_forward": enter,
                **{f"feed_forward.{name}": columns for name in ("w1", "w3")},
                "feed_forward.w2": rows,
            }
            plan |= {f"layers.{i}.{name}": style for name, style in layer.items()}
        parallelize_module(model, tp, plan)
    shard_layers(model, model.layers, dp)
