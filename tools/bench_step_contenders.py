"""Contenders of `bench_step`: the weights that they step, and what each of their steps costs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from emerging_optimizers.orthogonalized_optimizers import Muon, MuonHyperball
from peers import Iso, Weights
from released import ReleasedPion, released_flop
from torch import Tensor
from torch.optim import Optimizer

from pion_dist import RECIPES, Pion, PionConfig
from pion_dist.config import Axis
from pion_dist.cost import step_flop
from pion_dist.matrices import stacked
from pion_dist.recipes import in_bf16
from pion_dist.state import moments

FLOAT = 4  # bytes
EXPERTS = 16  # of the 128: what one of 8 expert-parallel ranks has


@dataclass(frozen=True)
class Weight:
    """A stored weight: ``count`` matrices of [m, n], one below the other.

    Attributes:
        count: of matrices.
        m: rows of one.
        n: columns.
        projections: rows of each matrix that Muon has instead, where Pion's are heads.
    """

    count: int
    m: int
    n: int
    projections: tuple[int, ...] = ()

    @property
    def numel(self) -> int:
        return self.count * self.m * self.n


@dataclass(frozen=True)
class Group:
    """Weights of a layer that are timed together."""

    name: str
    weights: tuple[Weight, ...]

    @property
    def matrix(self) -> int:
        """Bytes of the largest matrix."""
        return FLOAT * max(w.m * w.n for w in self.weights)

    @property
    def square(self) -> int:
        """Bytes of the largest generator."""
        return FLOAT * max(max(w.m, w.n) ** 2 for w in self.weights)


@dataclass(frozen=True)
class Model:
    """Sizes of a layer.

    Attributes:
        title: in the plot.
        hidden: size.
        ffn: of the MLP or of one expert.
        heads: of queries.
        query_groups: of keys and values.
        head_dim: rows of a head.
        cpu: what all lengths are multiplied by on a CPU; numbers of matrices stay.
        moe: the MLP is of experts.
    """

    title: str
    hidden: int
    ffn: int
    heads: int
    query_groups: int
    head_dim: int
    cpu: float = 1.0
    moe: bool = False

    def groups(self, scale: float) -> tuple[Group, ...]:
        """Attention's projections, its QKV as heads, and the MLP; lengths are ``scale`` times."""
        h, f, d = (max(1, round(x * scale)) for x in (self.hidden, self.ffn, self.head_dim))
        q, kv = self.heads * d, self.query_groups * d
        heads = Weight(self.heads + 2 * self.query_groups, d, h, (q, kv, kv))
        projections = (Weight(1, q, h), Weight(1, kv, h), Weight(1, kv, h), Weight(1, h, q))
        mlp = (Weight(2, f, h), Weight(1, h, f))  # gate over up, down
        return (
            Group("attention", projections),
            Group("QKV by heads", (heads,)),
            Group("experts", mlp * EXPERTS) if self.moe else Group("MLP", mlp),
        )


MODELS = {
    "60m": Model("Llama 60M", 512, 1376, 8, 8, 64),
    "1.3b": Model("Llama 1.3B", 2048, 5460, 32, 32, 64, cpu=1 / 8),
    "8b": Model("Llama 8B", 4096, 14336, 32, 8, 128, cpu=1 / 8),
    "70b": Model("Llama 70B", 8192, 28672, 64, 8, 128, cpu=1 / 32),
    "moe": Model("Qwen3 30B-A3B", 2048, 768, 32, 4, 128, cpu=1 / 8, moe=True),
}


@dataclass(frozen=True)
class Stored:
    """A weight and its gradient; all contenders have the same."""

    shape: Weight
    weight: Tensor
    grad: Tensor

    def rows(self, heights: Sequence[int]) -> list[torch.nn.Parameter]:
        """Parameters of so many rows each."""
        parameters = []
        for w, g in zip(self.weight.split(heights), self.grad.split(heights), strict=True):
            parameters.append(torch.nn.Parameter(w))
            parameters[-1].grad = g
        return parameters

    def matrices(self) -> list[torch.nn.Parameter]:
        return self.rows([self.shape.m] * self.shape.count)


def stored(shape: Weight, device: torch.device) -> Stored:
    """Random weights whose first-order changes are of ordinary size, and random gradients."""
    size = (shape.count * shape.m, shape.n)
    weight = torch.randn(size, device=device) / shape.n**0.5
    return Stored(shape, weight, torch.randn(size, device=device))


@dataclass(frozen=True)
class Contender:
    """What is timed.

    Attributes:
        name: in the tables.
        options: what it is.
        kind: of whose code.
        precision: of most of its products.
        build: the optimizer of some weights.
        flop: of a step of a weight, counted.
        state: bytes of moments of some weights, counted.
        config: Pion's.
        loop: name of the published arithmetic to compare with.
        batched: it computes with all matrices of a weight at once, on a CPU too.
    """

    name: str
    options: str
    kind: Literal["pion", "loop", "peer"]
    precision: str
    build: Callable[[Sequence[Stored]], Optimizer]
    flop: Callable[[Weight], float]
    state: Callable[[Sequence[Weight]], int]
    config: PionConfig = RECIPES["pretrain"]
    loop: str = ""
    batched: bool = False


LR = 1e-4  # small: no contender moves the weights that all share by much

DEFAULT = RECIPES["pretrain"]
LIE = RECIPES["paper-1.3b"]
LIE_ALTERNATE = RECIPES["paper-rl"]
TRANSPORTED = RECIPES["paper-60m"]
MSIGN = replace(
    LIE, momentum="ambient", direction="msign", side="alternate", scaling="none"
)  # the published code's second update


def options(config: PionConfig) -> str:
    """Those that decide the cost."""
    nesterov = "Nesterov, " if config.nesterov else ""
    if config.direction == "polar":
        return f"{nesterov}polar"
    retraction = "Taylor 2" if config.retraction == "taylor" else config.retraction
    return (
        f"{config.momentum}, {config.direction}, {nesterov}{config.side}, "
        f"scaling {config.scaling}, {retraction}"
    )


def pion_state(config: PionConfig, weights: Sequence[Weight], axis: Axis | None = None) -> int:
    """Bytes of Pion's moments of weights that are cut along an axis."""
    held = (moments(w.count, w.m, w.n, config, axis).values() for w in weights)
    return sum(moment.nbytes(FLOAT) for of_weight in held for moment in of_weight)


def viewed(weights: Sequence[Stored], *, copy: bool) -> Weights:
    """Parameters of whole weights or of copies, and how each is cut into Pion's matrices."""
    held = []
    for each in weights:
        rows, cols = each.weight.shape
        own = replace(each, weight=each.weight.clone()) if copy else each
        [p] = own.rows([rows])
        held.append((p, stacked(rows, cols, name="matrix", count=each.shape.count)))
    return held


def pion(
    name: str, config: PionConfig, *, device: str, recipe: str = "", loop: str = ""
) -> Contender:
    def build(weights: Sequence[Stored]) -> Pion:
        # Others' steps would change the weights, whose factors would be taken anew.
        held = viewed(weights, copy=config.direction == "polar")
        return Pion([p for p, _ in held], LR, config=config, views=dict(held))

    return Contender(
        name,
        "pion_dist: " + options(config) + recipe,
        "pion",
        "bf16" if config.matmul_precision == "bf16" else "float32",
        build,
        lambda w: w.count * step_flop(w.m, w.n, config, device=device),
        lambda weights: pion_state(config, weights),
        config,
        loop,
    )


def released(name: str, config: PionConfig) -> Contender:
    return Contender(
        name,
        "tools/released.py: " + options(config),
        "loop",
        "float32",
        lambda weights: ReleasedPion([p for w in weights for p in w.matrices()], LR, config=config),
        lambda w: w.count * released_flop(w.m, w.n, config),
        lambda weights: pion_state(replace(config, state_layout="dense"), weights),
        config,
    )


def muon(
    name: str, about: str, precision: str, *, optimizer: type[Muon] = Muon, **given: Any
) -> Contender:
    def build(weights: Sequence[Stored]) -> Optimizer:
        parts = [
            w.rows(w.shape.projections) if w.shape.projections else w.matrices() for w in weights
        ]
        return optimizer([p for part in parts for p in part], lr=LR, **given)

    def flop(w: Weight) -> float:
        total = 0.0
        for rows in w.projections or (w.m,) * w.count:
            short, long = sorted((rows, w.n))
            total += 5 * (4.0 * short * short * long + 2.0 * short**3)
        return total

    return Contender(
        name, about, "peer", precision, build, flop, lambda ws: FLOAT * sum(w.numel for w in ws)
    )


def qr_flop(m: int, r: int) -> float:
    """Count the FLOP of torch.linalg.qr of an m x r matrix, m >= r, with Q as m x r.

    It calls LAPACK's GEQRF and ORGQR, which reflect columns by Householder's method. Each takes
    2 m r² − 2 r³ / 3 FLOP and terms of lower order, which are not counted (LAPACK Working Note 41,
    https://www.netlib.org/lapack/lawnspdf/lawn41.pdf).
    """
    return 4.0 * m * r**2 - 4.0 * r**3 / 3.0


def iso() -> Contender:
    def build(weights: Sequence[Stored]) -> Iso:
        # It keeps factors of its weights, which others' steps would change.
        held = viewed(weights, copy=True)
        return Iso([p for p, _ in held], lr=LR, held=held)

    def flop(w: Weight) -> float:
        """Count G V, Gᵀ U and U diag(s) Vᵀ; for each frame the tangent's two products, and QR."""
        r = min(w.m, w.n)
        frames = sum(2 * 2.0 * d * r**2 + qr_flop(d, r) for d in (w.m, w.n))
        return w.count * (3 * 2.0 * w.m * w.n * r + frames)

    def state(weights: Sequence[Weight]) -> int:
        """Count the bytes of U, V, their momenta, and s."""
        ranks = ((w, min(w.m, w.n)) for w in weights)
        return FLOAT * sum(w.count * r * (2 * (w.m + w.n) + 1) for w, r in ranks)

    return Contender(
        "ISO",
        "tools/peers.py: momenta of U and V, QR; the SVD at the start is in no step",
        "peer",
        "float32",
        build,
        flop,
        state,
        batched=True,
    )


def adamw() -> Contender:
    def build(weights: Sequence[Stored]) -> Optimizer:
        parameters = [p for w in weights for p in w.rows([len(w.weight)])]
        return torch.optim.AdamW(parameters, lr=LR, fused=True)

    return Contender(
        "AdamW",
        "torch.optim.AdamW, fused",
        "peer",
        "float32",
        build,
        lambda w: 0.0,
        lambda ws: 2 * FLOAT * sum(w.numel for w in ws),
    )


BASE, OWN = "Muon float32", "Muon"


def contenders(device: torch.device) -> list[Contender]:
    """All that is timed, in the tables' order."""
    of = functools.partial(pion, device=device.type)
    return [
        of("default float32", DEFAULT, recipe=" (pretrain)"),
        of("default bf16", in_bf16("pretrain"), recipe=", bf16 products"),
        of("msign", MSIGN, loop="loop: msign"),
        of("lie both", LIE, recipe=" (paper-1.3b)", loop="loop: lie both"),
        of("lie alternate", LIE_ALTERNATE, recipe=" (paper-rl)", loop="loop: lie alternate"),
        of("transported", TRANSPORTED, recipe=" (paper-60m)", loop="loop: transported"),
        released("loop: msign", MSIGN),
        released("loop: lie both", LIE),
        released("loop: lie alternate", LIE_ALTERNATE),
        released("loop: transported", TRANSPORTED),
        muon(OWN, "emerging_optimizers' own defaults: 5 quintic steps in bf16", "bf16"),
        muon(BASE, "the same, fp32_matmul_prec='highest'", "float32", fp32_matmul_prec="highest"),
        muon(
            "fixed-norm Muon",
            "emerging_optimizers' MuonHyperball, without the decay that would shrink its norms",
            "bf16",
            optimizer=MuonHyperball,
            weight_decay=0.0,
        ),
        iso(),
        adamw(),
    ]
