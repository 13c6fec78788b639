"""Models and clusters by name, whose fields flags override."""

from __future__ import annotations

from collections.abc import Mapping

from .describe import Cluster, Model

# Shapes: Llama 3's from arXiv 2407.21783, table 3; Qwen3's and Kimi K2's from the config.json of
# Qwen/Qwen3-235B-A22B and moonshotai/Kimi-K2-Base. moe-1t is K2's 60 layers of experts; its
# attention is grouped queries here, where K2 has MLA (1% of its parameters).
# Layouts: Llama 405B's is of the same paper, table 4; the others are common choices.
MODELS = {
    m.name: m
    for m in (
        Model(
            name="llama-8b",
            layers=32,
            hidden=4096,
            ffn=14336,
            heads=32,
            groups=8,
            vocab=128256,
            tp=2,
        ),
        Model(
            name="llama-70b",
            layers=80,
            hidden=8192,
            ffn=28672,
            heads=64,
            groups=8,
            vocab=128256,
            tp=8,
            pp=4,
        ),
        Model(
            name="llama-405b",
            layers=126,
            hidden=16384,
            ffn=53248,
            heads=128,
            groups=8,
            vocab=128256,
            tp=8,
            pp=16,
        ),
        Model(
            name="qwen3-235b",
            layers=94,
            hidden=4096,
            heads=64,
            groups=4,
            vocab=151936,
            experts=128,
            top_k=8,
            expert_ffn=1536,
            tp=4,
            pp=8,
            ep=32,
        ),
        Model(
            name="moe-1t",
            layers=60,
            hidden=7168,
            heads=64,
            groups=8,
            vocab=163840,
            experts=384,
            top_k=8,
            expert_ffn=2048,
            shared_ffn=2048,
            tp=8,
            pp=4,
            ep=64,
        ),
    )
}

# Peaks without sparsity: NVIDIA's data sheets of H100 (SXM), H200 (SXM) and DGX B200 (an eighth of
# the system's figures). NVLink's 900 and 1,800 GB/s are both ways. Networks: ConnectX-7, 400 Gbit/s
# for each GPU. Hosts: PCIe 5.0 x16. Shares reached are assumptions, no GPU was at hand; mfu is what
# arXiv 2407.21783, table 4, reports for Llama 405B on 8,192 and 16,384 H100 (0.38 to 0.43).
CLUSTERS = {
    c.name: c
    for c in (
        Cluster(
            name="h100",
            bf16=989e12,
            tf32=494e12,
            fp32=67e12,
            memory=3.35e12,
            capacity=80e9,
            nvlink=450e9,
            network=50e9,
        ),
        Cluster(
            name="h200",
            bf16=989e12,
            tf32=494e12,
            fp32=67e12,
            memory=4.8e12,
            capacity=141e9,
            nvlink=450e9,
            network=50e9,
        ),
        Cluster(
            name="b200",
            bf16=2250e12,
            tf32=1125e12,
            fp32=75e12,
            memory=8e12,
            capacity=180e9,
            nvlink=900e9,
            network=50e9,
        ),
    )
}


def named[T](table: Mapping[str, T], what: str, name: str) -> T:
    """The entry of a table.

    Raises:
        ValueError: lists the known names.
    """
    if name not in table:
        raise ValueError(f"--{what} {name}: unknown; known are {', '.join(table)}")
    return table[name]
