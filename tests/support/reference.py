"""One Pion step in float64 numpy, written to be read next to the equations and not to be fast.

Everything is dense, a matrix at a time. Shapes: W, G and the ambient moments are m x n; what
belongs to the side "in" is n x n, to the side "out" m x m. With blocks one side's generator is
block-diagonal, and so then are its moments, its sign and its factor; here all of them are the dense
matrices with zeros off the blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from pion_dist import PionConfig
    from pion_dist.matrices import MatrixView

Array = npt.NDArray[np.float64]
Axis = Literal["rows", "cols"] | None

# What the published algorithm (arXiv 2605.12492) has that PionConfig's defaults do not.
PUBLISHED: dict[str, Any] = {"direction": "adaptive", "nesterov": False}

# The matrix sign of a transported average's generators, a side a step.
MSIGN: dict[str, Any] = {"direction": "msign", "momentum": "transported", "side": "alternate"}

# Muon's quintic, https://kellerjordan.github.io/posts/muon/: a small singular value grows by
# 3.4445³ = 41.
NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 3


def skew_in(w: Array, x: Array) -> Array:
    """WᵀX - XᵀW, n x n; of one product, so that it is skew to the last bit."""
    p = w.T @ x
    return p - p.T


def skew_out(w: Array, x: Array) -> Array:
    """XWᵀ - WXᵀ, m x m; of one product, so that it is skew to the last bit."""
    p = x @ w.T
    return p - p.T


SKEW = {"in": skew_in, "out": skew_out}


def block_diagonal(blocks: Sequence[Array]) -> Array:
    """blkdiag(K_1, ..., K_N) of square K_i."""
    sizes = [len(block) for block in blocks]
    k = np.zeros((sum(sizes), sum(sizes)))
    for block, end in zip(blocks, np.cumsum(sizes), strict=True):
        k[end - len(block) : end, end - len(block) : end] = block
    return k


def diagonal_blocks(k: Array, count: int) -> list[Array]:
    """The ``count`` equal diagonal blocks of K: the inverse of ``block_diagonal``."""
    size = len(k) // count
    return [k[i : i + size, i : i + size] for i in range(0, len(k), size)]


def skew_of_blocks(w: Array, x: Array, side: str, count: int) -> Array:
    """The generator of X at W on a side of ``count`` blocks; of one block ``SKEW[side](w, x)``.

    Out: W = [W_1; ...; W_N] and X alike, blkdiag(X_i W_iᵀ - W_i X_iᵀ). In: the mirror image, of
    W = [W_1, ..., W_N].
    """
    axis = {"out": 0, "in": 1}[side]
    pairs = zip(np.split(w, count, axis), np.split(x, count, axis), strict=True)
    return block_diagonal([SKEW[side](w_i, x_i) for w_i, x_i in pairs])


def newton_schulz(k: Array, eps: float) -> Array:
    """The matrix sign of a skew matrix, as far as the quintic steps take it.

    Singular values come in pairs, so that 2 σ₁⁸ <= ‖K⁴‖_F².
    """
    x = k / (np.linalg.norm(k) + eps)
    x = x / max((np.linalg.norm(x @ x @ x @ x) / np.sqrt(2)) ** 0.25, 1e-3 / 2**0.125)
    for a, b, c in NEWTON_SCHULZ:
        xxt = x @ x.T
        x = a * x + b * xxt @ x + c * xxt @ xxt @ x
    return x


def retract(a: Array, retraction: str, degree: int = 2) -> Array:
    """The factor E(A) of a skew A, orthogonal or nearly so."""
    eye = np.eye(len(a))
    match retraction:
        case "taylor":
            powers = (np.linalg.matrix_power(a, k) / math.factorial(k) for k in range(degree + 1))
            return sum(powers, start=np.zeros_like(a))
        case "cubic":
            return eye + a + a @ a / 2 + a @ a @ a / 8
        case "cayley":
            return np.linalg.solve(eye - a / 2, eye + a / 2)
        case "exp":
            # A = -iH with H = iA Hermitian, so e^A = V e^(-iλ) Vᴴ.
            angles, v = np.linalg.eigh(1j * a)
            return ((v * np.exp(-1j * angles)) @ v.conj().T).real
        case _:
            raise ValueError(f"retraction={retraction!r}")


def rotate(x: Array, factors: dict[str, Array]) -> Array:
    """E_out X E_in; a side without a factor rests."""
    for side, factor in factors.items():
        x = x @ factor if side == "in" else factor @ x
    return x


class ReferencePion:
    """One weight matrix and its moments; ``step`` moves them.

    Args:
        w: the weight at the start.
        config: the run's options.
        axis: the matrix's cut axis: with blocks, "rows" is of blocks on the side "out", "cols" on
            the side "in"; a matrix without one is whole.

    Attributes:
        w: the weight.
        m, v: the moments, by side for ``momentum="lie"``, else by the one key "ambient".
        blocks: number of blocks, by side.
        t: steps taken.
        turns: by active side, lr alpha A of the last step: what E was taken of. The spectral norm
            of one is the largest angle by which the step rotated on that side.
    """

    def __init__(self, w: npt.ArrayLike, config: PionConfig, axis: Axis = None) -> None:
        self.w: Array = np.array(w, dtype=np.float64)
        self.config = config
        self.blocks = {
            "in": config.blocks if axis == "cols" else 1,
            "out": config.blocks if axis == "rows" else 1,
        }
        rows, columns = self.w.shape
        shapes = {"in": (columns, columns), "out": (rows, rows), "ambient": (rows, columns)}
        kept = config.sides if config.momentum == "lie" else ("ambient",)
        self.m = {key: np.zeros(shapes[key]) for key in kept}
        self.v = {key: np.zeros(shapes[key]) for key in kept}
        self.t = 0
        self.turns: dict[str, Array] = {}

    def step(self, g: npt.ArrayLike, lr: float) -> None:
        """Move the weight by one step with the gradient ``g`` at the learning rate ``lr``."""
        self.t += 1
        g = np.array(g, dtype=np.float64)
        generators = self._lie(g) if self.config.momentum == "lie" else self._ambient(g)
        alpha = self._alpha(generators)
        self.turns = {side: lr * alpha[side] * a for side, a in generators.items()}
        factors = {
            side: retract(turn, self.config.retraction, self.config.degree)
            for side, turn in self.turns.items()
        }
        self.w = rotate(self.w, factors)
        if self.config.momentum == "transported":
            self.m["ambient"] = rotate(self.m["ambient"], factors)

    def _lie(self, g: Array) -> dict[str, Array]:
        """A by active side; the moments average generators, those of resting sides too."""
        generators = {}
        for side in self.config.sides:
            g_s = skew_of_blocks(self.w, g, side, self.blocks[side])
            look = self._average(side, g_s)
            if self.config.direction == "adaptive":
                self._average_square(side, g_s)
                look = look / (np.sqrt(self.v[side]) + self.config.eps)
            generators[side] = -self._sign(look, side)
        return {side: generators[side] for side in self.config.active_sides(self.t)}

    def _ambient(self, g: Array) -> dict[str, Array]:
        """A by active side; the moments average the gradient, which W then projects."""
        s = self._average("ambient", g)
        if self.config.direction == "adaptive":
            self._average_square("ambient", self.m["ambient"])
            s = s / (np.sqrt(self.v["ambient"]) + self.config.eps)
        generators = {}
        for side in self.config.active_sides(self.t):
            k = skew_of_blocks(self.w, s, side, self.blocks[side])
            generators[side] = -self._sign(k, side)
        return generators

    def _average(self, key: str, g: Array) -> Array:
        """Update a first moment; returns the average that the step looks at."""
        beta = self.config.betas[0]
        self.m[key] = beta * self.m[key] + (1 - beta) * g
        return beta * self.m[key] + (1 - beta) * g if self.config.nesterov else self.m[key]

    def _average_square(self, key: str, x: Array) -> None:
        beta = self.config.betas[1]
        self.v[key] = beta * self.v[key] + (1 - beta) * x * x

    def _sign(self, k: Array, side: str) -> Array:
        """Each block's matrix sign by itself, where the direction is that."""
        if self.config.direction != "msign":
            return k
        blocks = diagonal_blocks(k, self.blocks[side])
        return block_diagonal([newton_schulz(block, self.config.eps) for block in blocks])

    def _alpha(self, generators: dict[str, Array]) -> dict[str, float]:
        """By side: c√(mn) over the norm of the first-order change, or 1."""
        if self.config.scaling == "none":
            return dict.fromkeys(generators, 1.0)
        change = np.zeros_like(self.w)
        for side, a in generators.items():
            change += self.w @ a if side == "in" else a @ self.w
        norm = np.linalg.norm(change)
        alpha = self.config.rms * math.sqrt(self.w.size) / (norm + self.config.eps)
        return dict.fromkeys(generators, float(alpha))

    def state(self) -> dict[str, Array]:
        """The moments as the optimizer keeps them, of this one matrix (without its dimension B).

        Lie moments have the sign of descent there, and of a side with blocks [N, d/N, d/N].
        """
        moments = {}
        for moment, values, sign in (("m", self.m, -1.0), ("v", self.v, 1.0)):
            if moment == "v" and self.config.direction != "adaptive":
                continue
            for key, value in values.items():
                if key == "ambient":
                    moments[moment] = value
                elif self.blocks[key] == 1:
                    moments[f"{moment}_{key}"] = sign * value
                else:
                    blocks = diagonal_blocks(sign * value, self.blocks[key])
                    moments[f"{moment}_{key}"] = np.stack(blocks)
        return moments


def polynomial_polar(m: Array) -> Array:
    """The polar factor M (MᵀM)^(−1/2), as far as the quintic steps take its singular values.

    From M over the bound (Σ σ⁸)^(1/8) of its largest.
    """
    u, s, vt = np.linalg.svd(m, full_matrices=False)
    s = s / max(np.linalg.norm(s), np.finfo(float).tiny)
    s = s / max(np.sum(s**8) ** (1 / 8), 1e-3)
    for a, b, c in NEWTON_SCHULZ:
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ vt


def polished(frame: Array) -> Array:
    """The frame with each singular value s, which are near 1, replaced by s (3 − s²) / 2."""
    p, s, qt = np.linalg.svd(frame, full_matrices=False)
    return (p * (s * (3 - s**2) / 2)) @ qt


class ReferencePolar:
    """One weight matrix under ``direction="polar"``, from the definition; ``step`` moves it.

    Args:
        w: the weight at the start.
        config: the run's options.

    Attributes:
        w: the weight, U diag(σ) Vᵀ.
        u, sigma, v: its factors, U [m, r], σ [r] and V [n, r].
        m: the average of the gradient.
        d: the last step of Muon, which W loses; what of it would change σ is dropped.
        turns: by side, the skew A of the last step, of which E turned the frame.
    """

    def __init__(self, w: npt.ArrayLike, config: PionConfig) -> None:
        self.w: Array = np.array(w, dtype=np.float64)
        self.config = config
        self.u, self.sigma, vt = np.linalg.svd(self.w, full_matrices=False)
        self.v = vt.T
        self.m = np.zeros_like(self.w)
        self.d = np.zeros_like(self.w)
        self.turns: dict[str, Array] = {}

    def step(self, g: npt.ArrayLike, lr: float) -> None:
        """Move the weight by one step with the gradient ``g`` at the learning rate ``lr``."""
        beta = self.config.betas[0]
        g = np.array(g, dtype=np.float64)
        self.m = beta * self.m + (1 - beta) * g
        s = beta * self.m + (1 - beta) * g if self.config.nesterov else self.m
        rows, columns = self.w.shape
        length = lr * 0.2 * math.sqrt(max(rows, columns))  # of D's singular values
        self.d = length * polynomial_polar(s)
        b = self.u.T @ self.d @ self.v
        x, y = self._angles(b, length)
        u, v = self.u, self.v
        self.turns = {
            "out": self._turn(u, x, self.d @ v - u @ b, b, length),
            "in": self._turn(v, y, self.d.T @ u - v @ b.T, b.T, length),
        }
        self.u = polished(retract(self.turns["out"], "cubic") @ u)
        self.v = polished(retract(self.turns["in"], "cubic") @ v)
        if length > 0 and s.any():
            self.w = (self.u * self.sigma) @ self.v.T

    def _angles(self, b: Array, length: float) -> tuple[Array, Array]:
        """X and Y, with X diag(σ) − diag(σ) Y near −B off the diagonal."""
        r = len(self.sigma)
        x, y = np.zeros((r, r)), np.zeros((r, r))
        for i in range(r):
            for j in range(r):
                if i == j or length == 0:
                    continue
                near, far = self.sigma[j] - self.sigma[i], self.sigma[i] + self.sigma[j]
                plus, minus = b[i, j] + b[j, i], b[i, j] - b[j, i]
                p = -plus * near / (near**2 + plus**2 + length**2)
                q = -minus * far / (far**2 + minus**2 + length**2)
                x[i, j], y[i, j] = (p + q) / 2, (p - q) / 2
        return x, y

    def _turn(self, frame: Array, inner: Array, z: Array, b: Array, length: float) -> Array:
        """The skew A with A U = U X − Z diag(c) that is zero off U and Z."""
        if len(frame) == len(inner):
            z = np.zeros_like(z)
        beside = np.maximum(length**2 - np.sum(b**2, axis=0), 0)  # ‖z_j‖², were D orthonormal
        below = self.sigma**2 + beside + length**2
        zc = z * np.divide(self.sigma, below, out=np.zeros_like(below), where=below > 0)
        return frame @ inner @ frame.T - zc @ frame.T + frame @ zc.T

    def state(self) -> dict[str, Array]:
        """The moments as the optimizer keeps them; frames are unique up to the columns' signs."""
        return {"m": self.m, "left": self.u, "sigma": self.sigma, "right": self.v}


def reference_of(
    w: npt.ArrayLike, config: PionConfig, axis: Axis = None
) -> ReferencePion | ReferencePolar:
    """The reference of one matrix, by the direction."""
    if config.direction == "polar":
        return ReferencePolar(w, config)
    return ReferencePion(w, config, axis)


class ReferenceWeight:
    """A stored weight: a reference for each of its view's matrices.

    Attributes:
        parts: the references by part, in the order of the batch.
    """

    def __init__(self, w: Array, view: MatrixView, config: PionConfig) -> None:
        self.view = view
        self.parts = {
            part: [reference_of(matrix, config, view.axis) for matrix in batch]
            for part, batch in self._split(w).items()
        }

    def _split(self, x: Array) -> dict[str, Array]:
        return {part: batch.numpy() for part, batch in self.view.split(torch.tensor(x)).items()}

    def step(self, g: Array, lr: float) -> None:
        for part, gradients in self._split(g).items():
            for reference, gradient in zip(self.parts[part], gradients, strict=True):
                reference.step(gradient, lr)

    def weights(self) -> dict[str, Array]:
        """The matrices [B, m, n], by part."""
        return {part: np.stack([r.w for r in batch]) for part, batch in self.parts.items()}

    def state(self) -> dict[str, Array]:
        """The moments [B, ...] by the optimizer's keys."""
        moments = {}
        for part, batch in self.parts.items():
            states = [reference.state() for reference in batch]
            for moment in states[0]:
                moments[f"{moment}.{part}"] = np.stack([state[moment] for state in states])
        return moments
