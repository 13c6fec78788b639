"""Every choice that decides what a Pion step computes, validated once."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

Momentum = Literal["lie", "transported", "ambient"]
Direction = Literal["polar", "adaptive", "momentum", "msign"]
Side = Literal["in", "out"]
ActiveSides = Literal["both", "alternate", "in", "out"]
Scaling = Literal["rms", "none"]
Retraction = Literal["taylor", "cayley", "exp"]
QkvGranularity = Literal["qkv", "head", "group", "whole"]
MatmulPrecision = Literal["highest", "high", "bf16"]
Axis = Literal["rows", "cols"]
StateLayout = Literal["packed", "dense"]
StateDtype = Literal["fp32", "bf16", "int8"]
TeamSize = int | Literal["auto"]

SIDE_OF: dict[Axis, Side] = {"rows": "out", "cols": "in"}
"""The side whose factor is as large as the axis is long."""


# Options that decide how moments become skew generators, and what these do.
_OF_GENERATORS = (
    *("momentum", "eps", "side", "scaling", "rms", "retraction", "degree"),
    *("state_layout", "blocks", "spectrum_reset_interval"),
)


@dataclass(frozen=True, kw_only=True)
class PionConfig:
    """The options of a Pion run; the defaults are what trains best in docs/TRAINING.md.

    ``recipes.RECIPES`` has those of the published runs (arXiv 2605.12492).

    Attributes:
        direction: ``polar``: Muon's step of the gradient's average, by as much of it as turns the
            singular frames of W = U S Vᵀ, S fixed (``update/polar.py``). Its steps have AdamW's
            root mean square, 0.2 lr. The others make a skew generator for each side from moments
            and turn W by their factors. ``adaptive``: from m / (sqrt(v) + eps); ``momentum``: from
            m; ``msign``: the matrix sign of the generator.
        momentum: what the other directions' first moment averages. ``lie``: the generators;
            ``transported``: the gradient, rotated along with the weight; ``ambient``: the gradient
            as it is, which is what ``polar`` averages too.
        nesterov: use the look-ahead average beta1 m + (1 - beta1) g in place of m.
        betas: decay of the first and of the second moment, each in [0, 1). The second is used by
            ``direction="adaptive"`` only.
        eps: added to denominators; > 0. ``polar`` does not use it, nor the options from here to
            ``degree``, ``state_layout``, ``blocks`` and ``spectrum_reset_interval``.
        side: which factors a step applies. ``alternate``: in on odd steps (the first is 1), out
            on even ones.
        scaling: ``rms`` makes the root mean square of the first-order change ``lr * rms``;
            ``none`` leaves the angle at ``lr`` times the generator.
        rms: the root mean square that ``scaling="rms"`` aims at, per unit of lr; > 0.
        retraction: from a skew generator to an orthogonal factor. ``taylor``: exp cut at
            ``degree``; ``cayley`` and ``exp``: orthogonal to rounding.
        degree: degree of ``retraction="taylor"``, 2 to 8. (Degree 1 stretches by the square of
            the angle and is not offered.)
        qkv: what a fused QKV weight is to Pion. ``qkv``: Q, K and V as three matrices; ``head``:
            every head one; ``group``: per query group its Q, its K and its V; ``whole``: one.
        split_gate: treat a gated fc1 as two matrices, gate and up.
        matmul_precision: precision of the products that only decide where a weight moves: all of
            ``polar`` but UᵀU, VᵀV and U S Vᵀ; generators, the matrix sign, and the turning of
            moments. ``highest``: IEEE float32; ``high``: TF32 where the device has it; ``bf16``.
            What moves the weight itself is IEEE float32 on CPUs and with ``highest``; else three
            bf16 products of float32's pieces, which lose less than 2^-16, so that its spectrum is
            kept as well (``update/precision.py``).
        state_layout: storage of Lie moments. ``packed``: the strict lower triangle, half the bytes,
            where a rank has whole generators (teams divide their rows, which stay dense);
            ``dense``: all elements. Checkpoints are the same.
        state_dtype: dtype of averages (factors stay float32). ``fp32``: as they are computed
            (float64 for float64 weights); ``bf16``: rounded to nearest when stored, for betas up to
            0.99, since the changes of an average over more steps would be lost; ``int8``: likewise,
            with a scale for each 128 elements of a matrix (``kernels/eight_bit.py``), for betas up
            to 0.95.
        offload_state: keep all moments in host memory, pinned where a GPU computes, and bring each
            batch of matrices' to the device while the batch before is computed (``offload.py``).
            The digits are the same. Read moments from a new ``state_dict``, which waits for the
            copies. Clone what is to outlast the next step, which writes into them.
        team_size: how many of the ranks that together store a matrix compute it together, at most,
            each its rows of the longer dimension; a power of two. ``auto``: as many as make the
            busiest rank's step shortest, by a count of FLOP and bytes. The result is the same.
        blocks: number of blocks. 2 or more are another algorithm, on one rank too: the factor on
            the axis that tensor parallelism cuts is block-diagonal, with so many blocks; the other
            is shared by all. A multiple of the tensor-parallel ranks, which each compute their own
            blocks.
        spectrum_reset_interval: number of steps after which a matrix gets back the singular values
            that it had at the first step, against rounding over millions of steps: W = U S Vᵀ
            becomes U S₀ Vᵀ. Each matrix has its own turn, by its name. 0: never.

    Raises:
        TypeError: an option is not a field, or was given by position.
        ValueError: a value is not allowed, or two values contradict each other.
    """

    direction: Direction = "polar"
    momentum: Momentum = "lie"
    nesterov: bool = True
    betas: tuple[float, float] = (0.95, 0.95)
    eps: float = 1e-8
    side: ActiveSides = "both"
    scaling: Scaling = "rms"
    rms: float = 0.2
    retraction: Retraction = "taylor"
    degree: int = 2
    qkv: QkvGranularity = "qkv"
    split_gate: bool = True
    matmul_precision: MatmulPrecision = "highest"
    state_layout: StateLayout = "packed"
    state_dtype: StateDtype = "fp32"
    offload_state: bool = False
    team_size: TeamSize = "auto"
    blocks: int = 1
    spectrum_reset_interval: int = 0

    def __post_init__(self) -> None:
        for name, allowed in choices().items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(
                    f"{name}={value!r}: must be one of {', '.join(map(repr, allowed))}"
                )
        for name in ("nesterov", "split_gate", "offload_state"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}: must be True or False")
        self._check_numbers()
        self._check_combinations()

    def _check_numbers(self) -> None:
        if len(self.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas={self.betas!r}: must be two numbers in [0, 1)")
        for name in ("eps", "rms"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0.0):
                raise ValueError(f"{name}={value!r}: must be a positive number")
        if type(self.degree) is not int or not 2 <= self.degree <= 8:
            raise ValueError(f"degree={self.degree!r}: must be an integer from 2 to 8")
        size = self.team_size
        if size != "auto" and (type(size) is not int or size < 1 or size & (size - 1)):
            raise ValueError(f"team_size={size!r}: must be 'auto' or a power of two")
        if type(self.blocks) is not int or self.blocks < 1:
            raise ValueError(f"blocks={self.blocks!r}: must be a positive integer")
        interval = self.spectrum_reset_interval
        if type(interval) is not int or interval < 0:
            raise ValueError(
                f"spectrum_reset_interval={interval!r}: must be a number of steps, or 0 for never"
            )

    def _check_combinations(self) -> None:
        if self.direction == "polar":
            self._check_polar()
        if self.retraction != "taylor" and self.degree != _default("degree"):
            raise ValueError(
                f"degree={self.degree} is of retraction='taylor'; with "
                f"retraction={self.retraction!r} leave it out"
            )
        if self.scaling != "rms" and self.rms != _default("rms"):
            raise ValueError(
                f"rms={self.rms} is of scaling='rms'; with scaling={self.scaling!r} leave it out"
            )
        self._check_state()
        if self.blocks > 1 and self.team_size != "auto":
            raise ValueError(
                f"team_size={self.team_size}: with blocks={self.blocks} the tensor-parallel ranks "
                "compute their own blocks; leave it out"
            )

    def _check_polar(self) -> None:
        for name in _OF_GENERATORS:
            if getattr(self, name) != _default(name):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is of other directions: with "
                    "direction='polar' leave it out"
                )

    def _check_state(self) -> None:
        # bf16 has 8 bits: (1 − β) of a difference is lost where that is below 2^-9 / (1 − β) of m,
        # a fifth of it at 0.99, twice it at 0.999. In 8 bits half a code is 1/254 of the largest
        # of 128, whose root mean square is about a third of it: 1/85 / (1 − β) of m, a quarter of
        # it at 0.95, and of a root, which changes half as much, half.
        used = self.betas if self.direction == "adaptive" else self.betas[:1]
        limit = {"fp32": 1.0, "bf16": 0.99, "int8": 0.95}[self.state_dtype]
        if max(used) > limit:
            raise ValueError(
                f"state_dtype={self.state_dtype!r} would lose most of what betas={self.betas} "
                f"average: use betas up to {limit}, or state_dtype='fp32'"
            )
        if self.state_dtype != "int8":
            return
        for name, whole in (("team_size", ("auto", 1)), ("blocks", (1,))):
            if (value := getattr(self, name)) not in whole:
                raise ValueError(
                    f"state_dtype='int8' has scales for parts of whole matrices, which {name}="
                    f"{value} divides: leave it out, or use state_dtype='bf16'"
                )
        lie = self.momentum == "lie" and self.direction != "polar"
        if lie and self.state_layout != "packed":
            raise ValueError(
                "state_dtype='int8' has scales for parts of packed moments: use "
                "state_layout='packed', or state_dtype='bf16'"
            )

    def lines(self) -> list[str]:
        """An option a line, to compare with other ranks'; of a reset that is off, none."""
        off = () if self.spectrum_reset_interval else ("spectrum_reset_interval",)
        names = [field.name for field in fields(self) if field.name not in off]
        return [f"{name}={getattr(self, name)!r}" for name in names]

    def blocks_of(self, axis: Axis | None) -> dict[Side, int]:
        """Number of blocks of the factor on the side whose dimension ``axis`` is; empty if one."""
        return {} if axis is None or self.blocks == 1 else {SIDE_OF[axis]: self.blocks}

    @property
    def sides(self) -> tuple[Side, ...]:
        """The sides that a run ever moves, ``("in", "out")`` or one of them."""
        return (self.side,) if self.side == "in" or self.side == "out" else ("in", "out")

    def active_sides(self, step: int) -> tuple[Side, ...]:
        """The sides that step number ``step`` (the first is 1) applies."""
        if self.side == "alternate":
            return ("in",) if step % 2 == 1 else ("out",)
        return self.sides


def choices() -> dict[str, tuple[Any, ...]]:
    """The allowed values of every option that has a fixed list of them, by option name."""
    hints = get_type_hints(PionConfig)
    return {name: get_args(t) for name, t in hints.items() if get_origin(t) is Literal}


def _default(name: str) -> Any:
    return next(f.default for f in fields(PionConfig) if f.name == name)
