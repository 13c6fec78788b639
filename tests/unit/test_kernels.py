"""Kernels in Triton and in torch compute the same, and folded moments are the dense ones."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_checks import (
    Case,
    cases,
    check_angles,
    check_elementwise,
    check_lie_moments,
    check_skew,
    skew_normal,
)

from pion_dist import kernels
from pion_dist.kernels import fold, reference, unfold
from pion_dist.kernels.fold import fold_product, fold_skew
from pion_dist.state import folded_shape

ROOT = Path(__file__).parents[2]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("d", range(1, 71))
def test_folding_is_exact_and_reads_the_strict_lower_triangle(d: int) -> None:
    k = skew_normal(d, d, "cpu")
    symmetric = k.abs()
    assert fold(k).shape[1:] == folded_shape(d)
    assert torch.equal(unfold(fold(k), d, skew=True), k)
    assert torch.equal(unfold(fold(symmetric), d, skew=False), symmetric)
    rest = torch.full((d, d), torch.nan).triu()  # the diagonal too
    assert torch.equal(fold(k.tril(-1) + rest), fold(k))
    # Every element of the triangle has one place, and the places that are left are zeros.
    ranks = torch.arange(1.0, d * (d - 1) // 2 + 1)
    x = torch.zeros(1, d, d)
    x[0, *torch.tril_indices(d, d, -1)] = ranks
    assert torch.equal(fold(x).flatten().sort().values[-len(ranks) :], ranks) or d == 1
    assert fold(x).count_nonzero() == len(ranks)


# The last two: of a copy with longer rows, and of one that goes by tiles.
@pytest.mark.parametrize(("small", "large"), [(128, 640), (0, 640), (0, 0)])
@pytest.mark.parametrize("d", [1, 2, 7, 40])
def test_however_columns_are_read_the_numbers_are_the_same(
    d: int, small: int, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folding = importlib.import_module("pion_dist.kernels.fold")  # its name is a function's too
    monkeypatch.setattr(folding, "SMALL", small)
    monkeypatch.setattr(folding, "LARGE", large)
    x = torch.randn(3, d, d)
    k = x - x.mT
    assert torch.equal(fold_skew(x), fold(k))
    assert torch.equal(unfold(fold(k), d, skew=True), k)
    assert torch.equal(reference.skew(x.clone()), k)


def test_folding_of_thin_factors_is_that_of_their_product() -> None:
    """To the rounding of 2r products and their sum, and of X − Xᵀ: 2 (2r + 1) u of the terms."""
    u, v = torch.randn(2, 3, 40, 5)
    terms = u.abs() @ v.mT.abs() + v.abs() @ u.mT.abs()
    folded, exact = fold_product(u, v, matmul=torch.bmm), fold_skew(u.double() @ v.double().mT)
    assert ((folded - exact).abs() <= 2 * 11 * 2.0**-24 * fold(terms)).all()
    x = kernels.outer(u, v, matmul=torch.bmm)
    assert torch.equal(x, folded)
    wide = u.mT, v.mT  # r > d
    assert torch.equal(kernels.outer(*wide, matmul=torch.bmm), torch.bmm(wide[0], v))


def test_a_moment_of_another_size_is_refused() -> None:
    x, grads_finite = torch.randn(1, 6, 6), torch.tensor(True)
    options = dict(
        beta1=0.9, beta2=0.9, eps=1.0, nesterov=False, grads_finite=grads_finite, wanted=False
    )
    for shape in ((5, 5), folded_shape(7), (1, 6, 6)):
        with pytest.raises(ValueError, match="dense or folded"):
            kernels.lie_moments(x, torch.zeros(1, *shape), None, **options)


@pytest.mark.parametrize("case", cases(1, 2, 3, 8, 17, 70), ids=str)
def test_reference_moments_and_directions(case: Case) -> None:
    check_lie_moments(reference, "cpu", case)


@pytest.mark.parametrize("d", [1, 2, 17])
def test_reference_skew(d: int) -> None:
    check_skew(reference, "cpu", d)


@pytest.mark.parametrize("r", [1, 2, 17])
def test_reference_angles(r: int) -> None:
    check_angles(reference, "cpu", r)


@pytest.mark.parametrize(("m", "n"), [(1, 1), (3, 7), (40, 64)])
def test_reference_elementwise(m: int, n: int) -> None:
    check_elementwise(reference, "cpu", m, n)


def test_layouts_agree_bit_for_bit() -> None:
    for d in (1, 2, 9, 32):
        dense, x = skew_normal(d, 1, "cpu"), torch.randn(2, d, d)
        moments = [(dense, dense.square()), (fold(dense), fold(dense.square()))]
        angles = [
            reference.lie_moments(
                x,
                m.clone(),
                v.clone(),
                beta1=0.9,
                beta2=0.99,
                eps=1e-8,
                nesterov=True,
                grads_finite=torch.tensor(True),
                wanted=True,
            )
            for m, v in moments
        ]
        assert angles[0] is not None and angles[1] is not None
        assert torch.equal(angles[0], angles[1])


def test_without_a_gpu_torch_computes() -> None:
    assert kernels.backend(torch.device("cpu")) == "torch"
    x = torch.randn(2, 5, 5)
    assert torch.equal(kernels.skew(x.clone()), reference.skew(x))


def program(name: str, cache: Path, **environment: str) -> list[str]:
    """The lines a program beside this file prints."""
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "support" / name)],
        env=variables | {"TRITON_CACHE_DIR": str(cache)} | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.slow
def test_triton_interpreted(tmp_path: Path) -> None:
    assert program("kernel_checks.py", tmp_path, TRITON_INTERPRET="1")


@pytest.mark.slow
def test_every_triton_kernel_compiles_for_hopper_and_blackwell(tmp_path: Path) -> None:
    built = [json.loads(line) for line in program("kernel_compile.py", tmp_path)]
    assert all(line["ptx"] and line["cubin"] for line in built)
    sources = (ROOT / "pion_dist" / "kernels" / "triton_kernels").glob("*.py")
    launched = {name for x in sources for name in re.findall(r"(\w+)\[\(", x.read_text())}
    for capability in (90, 100):
        assert {x["kernel"] for x in built if x["capability"] == capability} == launched


@needs_gpu
@pytest.mark.parametrize("d", [1, 2, 3, 31, 64, 65, 67, 128, 1000])
def test_triton_moments_and_directions(d: int) -> None:
    assert kernels.backend(torch.device("cuda")) == "triton"
    for case in cases(d):
        check_lie_moments(kernels, "cuda", case)


@needs_gpu
def test_triton_skew_and_elementwise() -> None:
    for d in (1, 2, 64, 67, 1000):
        check_skew(kernels, "cuda", d)
        check_angles(kernels, "cuda", d)
    for m, n in ((1, 1), (3, 7), (50, 90), (512, 1376)):
        check_elementwise(kernels, "cuda", m, n)


@needs_gpu
def test_triton_in_a_cuda_graph() -> None:
    """Nothing waits for the device, and a replay heeds what ``grads_finite`` is by then."""
    x, w = torch.randn(2, 96, 96, device="cuda"), torch.zeros(2, 96, 96, device="cuda")
    m, grads_finite = (
        torch.zeros(2, *folded_shape(96), device="cuda"),
        torch.tensor(True, device="cuda"),
    )

    def step() -> None:
        a = kernels.lie_moments(
            x,
            m,
            None,
            beta1=0.9,
            beta2=0.9,
            eps=1e-8,
            nesterov=False,
            grads_finite=grads_finite,
            wanted=True,
        )
        assert a is not None
        kernels.moved(w, a / kernels.frobenius(a), grads_finite=grads_finite)

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for value in (True, False):
        grads_finite.fill_(value)
        before = [w.clone(), m.clone()]
        graph.replay()
        assert [bool((w != before[0]).any()), bool((m != before[1]).any())] == [value, value]
