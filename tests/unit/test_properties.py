"""Generators are skew and singular values stay, whatever the matrix, gradient and options.

Steps are taken by the public ``Pion`` in float64; the reference tells the angles of a step, and is
itself the subject where a property is of generators or retractions alone.

A step's own rounding: its products have inner lengths k ≤ 30 and a relative error of at most
k u = 3e-15 each (u = 1.1e-16), and there are about 10 of them on the way from W to W. ROUNDING =
1e-12 of the largest singular value leaves a factor of 30 for the three steps and for SVDs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference import (
    NEWTON_SCHULZ,
    SKEW,
    Array,
    ReferencePion,
    newton_schulz,
    reference_of,
    retract,
)

from pion_dist import Pion, PionConfig

ROUNDING = 1e-12
STEPS = 3
examples = settings(max_examples=150)

RETRACTIONS = (("taylor", 2), ("taylor", 4), ("cayley", 2), ("exp", 2))
SWAPPED = {"both": "both", "in": "out", "out": "in"}


@dataclass(frozen=True)
class Problem:
    """A weight and a gradient for each step, of independent normal entries."""

    w: Array
    gradients: tuple[Array, ...]

    def map(self, f: Callable[[Array], Array]) -> Problem:
        return Problem(f(self.w), tuple(f(g) for g in self.gradients))


def spectral(a: Array) -> float:
    return float(np.linalg.norm(a, 2))


def normal_problem(shape: tuple[int, int], scale: float, seed: int) -> Problem:
    rng = np.random.default_rng(seed)
    w = scale * rng.standard_normal(shape)
    return Problem(w, tuple(rng.standard_normal(shape) for _ in range(STEPS)))


def skew_of_angle(n: int, angle: float, seed: int) -> Array:
    """A skew matrix whose spectral norm is ``angle``."""
    a = np.random.default_rng(seed).standard_normal((n, n))
    a -= a.T
    return angle / spectral(a) * a


LENGTHS = st.integers(1, 10)
SEEDS = st.integers(0, 2**32 - 1)


# Very wide and very tall ones apart: the implementation has low-rank forms for them.
SHAPES = st.tuples(LENGTHS, LENGTHS) | st.sampled_from([(2, 30), (30, 2), (3, 17)])


def problems(shapes: st.SearchStrategy[tuple[int, int]] = SHAPES) -> st.SearchStrategy[Problem]:
    return st.builds(normal_problem, shapes, st.sampled_from([0.02, 0.2, 1.0]), SEEDS)


def skews(*, angle: float) -> st.SearchStrategy[Array]:
    return st.builds(skew_of_angle, st.integers(2, 12), st.floats(1e-3, angle), SEEDS)


def configs(
    *,
    momentum: Sequence[str] = ("lie", "transported", "ambient"),
    direction: Sequence[str] = ("adaptive", "momentum", "msign"),
    scaling: Sequence[str] = ("rms", "none"),
    side: Sequence[str] = ("both", "alternate", "in", "out"),
    retraction: Sequence[tuple[str, int]] = RETRACTIONS,
) -> st.SearchStrategy[PionConfig]:
    def build(retraction: tuple[str, int], **options: object) -> PionConfig:
        name, degree = retraction
        return PionConfig(retraction=name, degree=degree, **options)

    return st.builds(
        build,
        st.sampled_from(retraction),
        momentum=st.sampled_from(momentum),
        direction=st.sampled_from(direction),
        nesterov=st.booleans(),
        scaling=st.sampled_from(scaling),
        side=st.sampled_from(side),
    )


def polars() -> st.SearchStrategy[PionConfig]:
    betas = st.tuples(st.sampled_from([0.0, 0.5, 0.95]), st.just(0.95))
    return st.builds(PionConfig, betas=betas, nesterov=st.booleans())


def angles(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(math.log(low), math.log(high)).map(math.exp)


def lr_turning_by(angle: float, problem: Problem, config: PionConfig) -> float:
    """The lr at which the first step's largest angle is ``angle``: angles are linear in lr."""
    probe = ReferencePion(problem.w, config)
    probe.step(problem.gradients[0], 1.0)
    largest = max(spectral(turn) for turn in probe.turns.values())
    return angle / largest if largest > 0 else angle


def run(
    problem: Problem, config: PionConfig, lr: float, *, dtype: torch.dtype = torch.float64
) -> list[Array]:
    """The weight after each step of Pion."""
    p = torch.nn.Parameter(torch.tensor(problem.w, dtype=dtype))
    optimizer = Pion([p], lr=lr, config=config)
    weights = []
    for g in problem.gradients:
        p.grad = torch.tensor(g, dtype=dtype)
        optimizer.step()
        weights.append(p.detach().to(torch.float64, copy=True).numpy())
    return weights


def run_reference(problem: Problem, config: PionConfig, lr: float) -> list[dict[str, Array]]:
    """What the reference turned by, by active side, in each step."""
    reference = reference_of(problem.w, config)
    turns = []
    for g in problem.gradients:
        reference.step(g, lr)
        turns.append(reference.turns)
    return turns


def singular_values(w: Array) -> Array:
    return np.linalg.svd(w, compute_uv=False)


# --- generators and retractions ---------------------------------------------------------------


@examples
@given(problems())
def test_generators_are_skew(problem: Problem) -> None:
    """To the last bit: P - Pᵀ and its transpose round alike."""
    for skew in SKEW.values():
        g = skew(problem.w, problem.gradients[0])
        assert np.array_equal(g, -g.T)


@examples
@given(problems(), configs())
def test_what_a_step_turns_by_is_skew(problem: Problem, config: PionConfig) -> None:
    """Directions and scaling keep skewness, Newton-Schulz to its rounding times 115."""
    for turns in run_reference(problem, config, 0.1):
        for turn in turns.values():
            assert np.abs(turn + turn.T).max() <= 115 * 1e-14 * np.abs(turn).max()


@examples
@given(skews(angle=1.0))
def test_newton_schulz_acts_on_singular_values_alone(k: Array) -> None:
    """NS(K) is an odd polynomial in K: it commutes with K, and maps the singular values.

    An error of k u in one of the values grows to 41 · 1.1 n^(3/8) k u = 115 k u = 2e-13 (n ≤ 12) if
    the value is small.
    """
    u = newton_schulz(k, 1e-8)
    assert spectral(u @ k - k @ u) <= 1e-12 * spectral(k)
    s = singular_values(k) / (np.linalg.norm(k) + 1e-8)
    s /= max((np.sum(s**8) / 2) ** 0.125, 1e-3 / 2**0.125)
    assert s.max() <= 1 + 1e-14
    for a, b, c in NEWTON_SCHULZ:
        s = a * s + b * s**3 + c * s**5
    np.testing.assert_allclose(singular_values(u), np.sort(s)[::-1], rtol=0, atol=1e-12)


@examples
@given(skews(angle=2.0))
def test_how_orthogonal_a_retraction_is(a: Array) -> None:
    """By how much, to rounding: a dozen products of n ≤ 12, norms ≤ 2⁶/64 + 2⁴/4.

    The cubic is what polar turns its frames by.
    """
    eye = np.eye(len(a))
    fourth, sixth = (np.linalg.matrix_power(a, k) for k in (4, 6))
    excess = {
        ("taylor", 2): fourth / 4,
        ("cubic", 2): -sixth / 64,
        ("cayley", 2): 0 * eye,
        ("exp", 2): 0 * eye,
    }
    for (name, degree), expected in excess.items():
        e = retract(a, name, degree)
        np.testing.assert_allclose(e.T @ e, eye + expected, rtol=0, atol=1e-13)


@examples
@given(skews(angle=1.0))
def test_how_near_a_retraction_is_to_the_exponential(a: Array) -> None:
    """By eigenvalue, on the imaginary axis, where Taylor's remainder is the first term left out.

    taylor d: θ^(d+1) / (d+1)!.   cubic: (1/6 - 1/8) θ³ + θ⁴/24.   cayley turns by 2 atan(θ/2),
    short of θ by at most θ³/12.
    """
    theta = spectral(a)
    exp = retract(a, "exp")
    bounds = {("taylor", d): theta ** (d + 1) / math.factorial(d + 1) for d in range(2, 9)}
    bounds |= {("cubic", 2): theta**3 / 24 + theta**4 / 24, ("cayley", 2): theta**3 / 12}
    for (name, degree), bound in bounds.items():
        assert spectral(retract(a, name, degree) - exp) <= bound + 1e-14 * len(a)


# --- the spectrum -----------------------------------------------------------------------------


@examples
@given(
    problems(),
    configs(retraction=[("cayley", 2), ("exp", 2)]),
    angles(1e-3, 3.0),
)
def test_orthogonal_retractions_keep_singular_values(
    problem: Problem, config: PionConfig, angle: float
) -> None:
    before = singular_values(problem.w)
    for w in run(problem, config, lr_turning_by(angle, problem, config)):
        after = singular_values(w)
        assert np.abs(after - before).max() <= ROUNDING * before.max()
        before = after


@examples
@given(
    problems(st.tuples(st.integers(2, 4), st.integers(2, 4))),
    configs(scaling=["rms"], retraction=[("cayley", 2), ("exp", 2)]),
    angles(0.1, 1.0),
)
def test_orthogonal_retractions_keep_singular_values_in_float32(
    problem: Problem, config: PionConfig, angle: float
) -> None:
    """To float32's own rounding, u = 6e-8.

    A factor, from a dozen products or one solution, is orthogonal to 5 √k u = 10 u (k ≤ 4) and the
    product with it exact to √k u = 2 u of the largest singular value; two sides: 24 u. Steps after
    the first turn by other angles θ, where the two sides' changes nearly cancel by large ones; an
    entry of θ A is wrong by θ u, and its exponential by as much. Small
    matrices, because torch's own exponential of a single one (up to 2.14) loses 500 u of its
    orthogonality at an angle of 0.57 in two dimensions, and less in more (pytorch issue 196592).
    """
    lr = lr_turning_by(angle, problem, config)
    before = singular_values(problem.w.astype(np.float32).astype(np.float64))
    steps = run(problem, config, lr, dtype=torch.float32)
    for w, turns in zip(steps, run_reference(problem, config, lr), strict=True):
        after = singular_values(w)
        theta = max(1.0, *(spectral(turn) for turn in turns.values()))
        assert np.abs(after - before).max() <= 24 * theta * 2.0**-24 * before.max()
        before = after


def assert_stretch_is_bounded(
    problem: Problem, config: PionConfig, angle: float, stretch: Callable[[float], float]
) -> None:
    """Singular values grow, and on each side by ``stretch(θ)`` at most.

    If the singular values of E lie in [1, q], then those of W E lie between those of W and q
    times those, in their order (s_i(XY) ≤ s_i(X) ‖Y‖, for X = W and for X = W E, Y = E⁻¹).
    The two sides of a step follow one another, so their factors multiply.
    """
    lr = lr_turning_by(angle, problem, config)
    before = singular_values(problem.w)
    for w, turns in zip(run(problem, config, lr), run_reference(problem, config, lr), strict=True):
        after = singular_values(w)
        factor = math.prod(stretch(spectral(turn)) for turn in turns.values())
        rounding = ROUNDING * after.max()
        assert np.all(after >= before - rounding)
        assert np.all(after <= before * factor + rounding)
        before = after


@examples
@given(problems(), configs(retraction=[("taylor", 2)]), angles(1e-3, 1.0))
def test_degree_two_stretches_by_the_fourth_power(
    problem: Problem, config: PionConfig, angle: float
) -> None:
    """E₂ᵀE₂ = I + A⁴/4, so E₂'s singular values are √(1 + θ⁴/4) ≤ 1 + θ⁴/8, one for each angle."""
    assert_stretch_is_bounded(problem, config, angle, lambda theta: 1 + theta**4 / 8)


@examples
@given(problems(), configs(retraction=[("exp", 2)]), angles(1e-3, 1.0))
def test_degree_eight_is_nearly_the_exponential(
    problem: Problem, config: PionConfig, angle: float
) -> None:
    """A side's factor is off by d = θ⁹/9! at most (test_how_near_...), so of norm 1 + d at most.

    E'WE - e^B W e^A = (E' - e^B) W E + e^B W (E - e^A): by d' (1 + d) + d < (1 + d')(1 + d) - 1
    times ‖W‖ in all. One step only: a moment would see the difference and act on it.
    """
    lr = lr_turning_by(angle, problem, config)
    exact = run(problem, config, lr)[0]
    near = run(problem, replace(config, retraction="taylor", degree=8), lr)[0]
    turns = run_reference(problem, config, lr)[0].values()
    off = [spectral(turn) ** 9 / math.factorial(9) for turn in turns]
    bound = math.prod(1 + d for d in off) - 1
    assert spectral(near - exact) <= (bound + ROUNDING) * spectral(problem.w)


# --- what moves a weight, and what does not -----------------------------------------------------


@examples
@given(problems(), configs() | polars())
def test_lr_zero_moves_no_weight(problem: Problem, config: PionConfig) -> None:
    """Bitwise: factors are I exactly, or changes 0; polar takes no step."""
    for w in run(problem, config, 0.0):
        assert np.array_equal(w, problem.w)


@examples
@given(problems(), configs() | polars())
def test_zero_gradients_move_no_weight(problem: Problem, config: PionConfig) -> None:
    """Bitwise, although every denominator is eps and rms scaling then multiplies by 1e8."""
    still = Problem(problem.w, tuple(0 * g for g in problem.gradients))
    for w in run(still, config, 0.1):
        assert np.array_equal(w, problem.w)


@examples
@given(problems(), configs(), st.integers(-20, 20))
def test_the_unit_of_the_loss_does_not_matter(
    problem: Problem, config: PionConfig, exponent: int
) -> None:
    """Gradients times 1e-6 to 1e6 give the same weights, unless neither rule is in force.

    Bitwise for powers of 2: every rounding is then the same, and eps = 1e-30 is under the last bit
    of any denominator but a zero.
    """
    assume(config.direction != "momentum" or config.scaling != "none")
    config = replace(config, eps=1e-30)
    scaled = Problem(problem.w, tuple(2.0**exponent * g for g in problem.gradients))
    lr = lr_turning_by(0.1, problem, config)
    assert np.array_equal(run(problem, config, lr), run(scaled, config, lr))


@examples
@given(problems(), configs(scaling=["rms"]))
def test_rms_scaling_sets_the_size_of_the_change(problem: Problem, config: PionConfig) -> None:
    """rms(ΔW) = lr rms, up to what is of second order and up to eps.

    ΔW - D is the sum of A^k W B^l / (k! l!) with k + l ≥ 2, (θ + θ')²/2 · ‖W‖ and at θ ≤ 1e-4 a
    relative 1e-4 more. eps takes a relative eps/‖D‖ of D's size; an adaptive D is of size 1.
    """
    config = replace(config, eps=1e-30)
    lr = lr_turning_by(1e-4, problem, config)
    turns = run_reference(problem, config, lr)[0]
    assume(any(turn.any() for turn in turns.values()))
    second_order = sum(map(spectral, turns.values())) ** 2 / 2 * np.linalg.norm(problem.w)
    change = np.linalg.norm(run(problem, config, lr)[0] - problem.w)
    expected = lr * config.rms * math.sqrt(problem.w.size)
    assert abs(change - expected) <= 1.001 * second_order + ROUNDING * np.linalg.norm(problem.w)


@examples
@given(problems(), configs())
def test_the_first_step_descends(problem: Problem, config: PionConfig) -> None:
    """⟨G, ΔW⟩ < 0 at a small angle.

    To first order ⟨G, W A⟩ = ⟨G_in, A⟩ / 2 and likewise outside. At the first step A is -G_in times
    a positive number (momentum), entry by entry so (lie, adaptive), or a polynomial of it that is
    positive on every singular value (msign). An ambient adaptive S is G entry by entry, of which
    the projection need not descend: it is left out.
    """
    assume(config.direction != "adaptive" or config.momentum == "lie")
    g = problem.gradients[0]
    lr = lr_turning_by(1e-6, problem, config)
    assume(any(turn.any() for turn in run_reference(problem, config, lr)[0].values()))
    assert np.sum(g * (run(problem, config, lr)[0] - problem.w)) < 0


# --- how options are related --------------------------------------------------------------------


@examples
@given(problems(), configs(side=["in"]))
def test_alternate_begins_with_in(problem: Problem, config: PionConfig) -> None:
    """Bitwise: the same products of the same numbers."""
    lr = lr_turning_by(0.1, problem, config)
    alternate = run(problem, replace(config, side="alternate"), lr)
    assert np.array_equal(alternate[0], run(problem, config, lr)[0])


@examples
@given(problems(), configs(side=["alternate"]))
def test_alternate_is_in_on_odd_and_out_on_even_steps(problem: Problem, config: PionConfig) -> None:
    """With decay rates of 0 nothing is remembered, so every step is a first step of its side.

    Bitwise: the same products of the same numbers.
    """
    config = replace(config, betas=(0.0, 0.0))
    lr = lr_turning_by(0.1, problem, config)
    w = problem.w
    for index, expected in enumerate(run(problem, config, lr)):
        alone = replace(config, side="out" if index % 2 else "in")
        (w,) = run(Problem(w, problem.gradients[index : index + 1]), alone, lr)
        assert np.array_equal(w, expected)


@examples
@given(problems(), configs(momentum=["ambient"]))
def test_transport_shows_from_the_second_step(problem: Problem, config: PionConfig) -> None:
    """Bitwise equal before: there is no moment to rotate yet."""
    lr = lr_turning_by(0.1, problem, config)
    ambient = run(problem, config, lr)
    transported = run(problem, replace(config, momentum="transported"), lr)
    assert np.array_equal(ambient[0], transported[0])


# Two computations of one step that differ in rounding: an adaptive direction divides an entry's
# rounding error √k u = 6e-16 by that entry of g. Among the 1e5 entries of all examples the smallest
# is 1e-5 of the typical one; W sees one wrong entry of A of √N = 10 to 30, times the angle 0.1:
# 6e-13. Newton-Schulz times 115: 7e-14, times the angle. Three steps.
RELATED = 1e-11


@examples
@given(problems(), configs(side=list(SWAPPED)))
def test_the_transpose_swaps_the_sides(problem: Problem, config: PionConfig) -> None:
    """skew_in(Wᵀ, Gᵀ) = -skew_out(W, G), and E(Aᵀ) = E(A)ᵀ: Wᵀ is moved as W is, transposed."""
    lr = lr_turning_by(0.1, problem, config)
    swapped = replace(config, side=SWAPPED[config.side])
    transposed = run(problem.map(lambda x: x.T.copy()), swapped, lr)
    for w, w_t in zip(run(problem, config, lr), transposed, strict=True):
        assert spectral(w - w_t.T) <= RELATED * spectral(w)


@examples
@given(problems(), configs(direction=["momentum", "msign"]), SEEDS)
def test_without_adaptivity_no_basis_is_special(
    problem: Problem, config: PionConfig, seed: int
) -> None:
    """Pion(Q W P, Q G P) = Q Pion(W, G) P for orthogonal Q and P: no step looks at entries."""
    rng = np.random.default_rng(seed)
    q, p = (np.linalg.qr(rng.standard_normal((n, n)))[0] for n in problem.w.shape)
    lr = lr_turning_by(0.1, problem, config)
    turned = run(problem.map(lambda x: q @ x @ p), config, lr)
    for w, w_turned in zip(run(problem, config, lr), turned, strict=True):
        assert spectral(w_turned - q @ w @ p) <= RELATED * spectral(w)


# --- polar ------------------------------------------------------------------------------------

RATES = angles(1e-4, 0.1)


@examples
@given(problems(), polars(), RATES)
def test_polar_keeps_singular_values(problem: Problem, config: PionConfig, lr: float) -> None:
    """EᵀE = I - A⁶/64, and polishing leaves 3/8 of the square of that in each of two frames.

    Nothing adds up, but that a step begins with what the one before has left.
    """
    before, theta = singular_values(problem.w), 0.0
    for w, turns in zip(run(problem, config, lr), run_reference(problem, config, lr), strict=True):
        theta = max(theta, *(spectral(turn) for turn in turns.values()))
        assume(theta <= 1.0)
        bound = ROUNDING + (theta**6 / 64) ** 2
        assert np.abs(singular_values(w) - before).max() <= bound * before.max()


@examples
@given(problems(), polars(), RATES)
def test_a_polar_step_is_no_longer_than_muon_s(
    problem: Problem, config: PionConfig, lr: float
) -> None:
    """Of singular values up to 1.21: rms(ΔW) ≤ 1.21 · 0.2 lr, up to what is of second order.

    That is (θ + θ')²/2 · ‖W‖ and a relative θ + θ' more, as for rms scaling above.
    """
    w, turns = run(problem, config, lr)[0], run_reference(problem, config, lr)[0]
    total = sum(spectral(turn) for turn in turns.values())
    assume(total <= 1.0)
    second_order = total**2 / 2 * (1 + total) * np.linalg.norm(problem.w)
    change = np.linalg.norm(w - problem.w)
    longest = 1.21 * 0.2 * lr * math.sqrt(problem.w.size)
    assert change <= longest + second_order + ROUNDING * np.linalg.norm(problem.w)


# Two computations of a polar step that differ in rounding, k u = 3e-15 of the average, which the
# iteration enlarges 41 √10 = 130 times in its smallest direction, and the Gram matrix, of matrices
# that are 5/3 as long as wide, by their condition again: 1e-10 if that is 300. D is at most as long
# as W here, and there are three steps.
POLAR_RELATED = 1e-9


@examples
@given(problems(), polars(), RATES)
def test_polar_moves_the_transpose_as_the_matrix(
    problem: Problem, config: PionConfig, lr: float
) -> None:
    transposed = run(problem.map(lambda x: x.T.copy()), config, lr)
    for w, w_t in zip(run(problem, config, lr), transposed, strict=True):
        assert spectral(w - w_t.T) <= POLAR_RELATED * spectral(w)


@examples
@given(problems(), polars(), RATES, SEEDS)
def test_polar_has_no_special_basis(
    problem: Problem, config: PionConfig, lr: float, seed: int
) -> None:
    """Pion(Q W P, Q G P) = Q Pion(W, G) P for orthogonal Q and P."""
    rng = np.random.default_rng(seed)
    q, p = (np.linalg.qr(rng.standard_normal((n, n)))[0] for n in problem.w.shape)
    turned = run(problem.map(lambda x: q @ x @ p), config, lr)
    for w, w_turned in zip(run(problem, config, lr), turned, strict=True):
        assert spectral(w_turned - q @ w @ p) <= POLAR_RELATED * spectral(w)
