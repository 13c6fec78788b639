"""Seconds of kernels and collectives on a described cluster."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from .describe import Cluster
from .trace import Kernel

# Bytes of an element, with --bf16: gradients are reduced in float32.
GRAD, PARAM, MASTER = 4, 2, 4
# Around Pion's and Muon's step: a look for NaN in the gradient 4, master to bf16 6.
AROUND = 10


@dataclass(frozen=True, kw_only=True)
class Stepped:
    """What a pool's ranks take for a step, the list of each rank's figures in their order.

    Attributes:
        compute: seconds of kernels.
        done: seconds until the rank has stepped, waits for others included.
        state: bytes of moments on the device, of offloaded ones those that are there at a time.
        on_host: bytes of offloaded moments; empty where there are none.
        masters: bytes of float32 masters.
        moved: bytes that the busiest rank hands to collectives, by group and operation.
    """

    compute: Sequence[float]
    done: Sequence[float]
    state: Sequence[int]
    masters: Sequence[int]
    on_host: Sequence[int] = ()
    moved: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """Ranks of a collective, and the links between them.

    Attributes:
        size: number of ranks.
        cluster: has the links.
        apart: distance of neighbours in the order of all ranks, of which a node has consecutive
            ones.
    """

    size: int
    cluster: Cluster
    apart: int = 1

    def seconds(self, op: str, sent: float, calls: int) -> float:
        """Time of ``calls`` collectives of ``sent`` input bytes together, in ring algorithms."""
        if self.size == 1 or not calls:
            return 0.0
        c = self.cluster
        rate, latency = c.nvlink, c.latency
        if self.size * self.apart > c.node:
            latency = c.network_latency
            # Rings enter and leave a node once, each through the adapter of another of its GPUs.
            rings = 1 if op == "all_to_all" else max(1, c.node // self.apart)
            rate = min(rate, rings * c.network)
        others = self.size - 1
        passes = {
            "all_gather": others,
            "reduce_scatter": others / self.size,
            "all_to_all": others / self.size,
            "all_reduce": 2 * others / self.size,
        }[op]
        return passes * sent / (c.link * rate) + calls * latency * math.ceil(math.log2(self.size))


def priced(launched: Sequence[Kernel], cluster: Cluster) -> float:
    """Seconds of kernels one after another, each the longest of its arithmetic, memory, launch."""
    rates = {
        "float32": cluster.fp32 * cluster.matmul,
        "tf32": cluster.tf32 * cluster.matmul,
        "bf16": cluster.bf16 * cluster.matmul,
        "solver": cluster.fp32 * cluster.solver,
    }
    total = 0.0
    for k in launched:
        arithmetic = k.flop / rates[k.kind] if k.kind in rates else 0.0
        total += max(arithmetic, streamed(k.read + k.written, cluster), cluster.launch)
    return total


def streamed(size: float, cluster: Cluster) -> float:
    """Seconds of elementwise work that reads and writes so many bytes."""
    return size / (cluster.memory * cluster.stream)
