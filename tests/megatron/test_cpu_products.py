"""bf16 products on a CPU without bf16 units are float32's, rounded once."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from megatron_runs import LIMIT_S, MODEL, NO_DROPOUT, PION, ROOT, SCRIPT, launch, steps

from pion_dist.update.precision import cpu_has_bf16_units

WITHOUT_UNITS = {"ONEDNN_MAX_CPU_ISA": "AVX2"}
# Numbers of bf16 and their products in float32, which both ways of multiplying round once.
SETUP = """
import torch
from pion_dist.update.precision import DIRECTION_PRODUCTS, cpu_has_bf16_units
assert not cpu_has_bf16_units()
torch.manual_seed(0)
a, b, c = (torch.randn(3, 24, 24).bfloat16() for _ in range(3))
x, y, z = a.float(), b.float(), c.float()
"""


def python(code: str) -> str:
    """Run code after ``SETUP`` in a process of its own; return what it prints."""
    env = {**os.environ, **WITHOUT_UNITS, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", SETUP + textwrap.dedent(code)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=LIMIT_S)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.mark.slow
def test_torch_s_products_are_float32_s_rounded_once() -> None:
    python(
        """
        from megatron_patches import cpu_products
        cpu_products.install()
        cpu_products.install()  # idempotent

        def same(computed, wide):
            assert computed.dtype == torch.bfloat16 and computed.equal(wide.bfloat16())

        scaled = {"beta": 0.5, "alpha": -2.0}
        same(a[0] @ b[0], x[0] @ y[0])
        same(a @ b.mT, x @ y.mT)
        same(a[0] @ b[0, 0], x[0] @ y[0, 0])
        same(torch.addmm(c[0], a[0], b[0], **scaled), torch.addmm(z[0], x[0], y[0], **scaled))
        same(torch.baddbmm(c, a, b, **scaled), torch.baddbmm(z, x, y, **scaled))
        same(torch.einsum("bij,bjk->bik", a, b), x @ y)
        same(c.clone().baddbmm_(a, b, **scaled), torch.baddbmm(z, x, y, **scaled))
        same(c[0].clone().addmm_(a[0], b[0]), torch.addmm(z[0], x[0], y[0]))
        same(torch.mm(a[0], b[0], out=c[0].clone()), x[0] @ y[0])
        same(torch.mm(a[0], b[0], out=torch.empty(0).bfloat16()), x[0] @ y[0])
        # A buffer's NaN is not read where beta is 0.
        nan = torch.full_like(c, torch.nan)
        same(torch.baddbmm(nan, a, b, beta=0.0, out=nan), x @ y)

        layer = torch.nn.Linear(24, 8, dtype=torch.bfloat16)
        layer(a.requires_grad_()).sum().backward()
        same(layer.weight.grad, torch.ones(72, 8).T @ x.flatten(0, 1))

        # Other dtypes are left alone; a mixture is torch's to refuse.
        assert (x @ y).dtype == torch.float32 and (x.double() @ y.double()).dtype == torch.float64
        try:
            a[0] @ y[0]
        except RuntimeError as error:
            assert "same dtype" in str(error), error
        else:
            raise AssertionError("a mixture was multiplied")
        """
    )


@pytest.mark.slow
def test_pion_s_own_products_are_float32_s_rounded_once() -> None:
    """In the library torch's kernels stay as they are: a model of the user's is not ours."""
    python(
        """
        bf16 = DIRECTION_PRODUCTS["bf16"]
        assert bf16(x, y).equal((x @ y).bfloat16().float())
        out = torch.full_like(a, torch.nan)
        assert bf16.into(out, a, b, alpha=-2.0) is out and out.equal((-2.0 * (x @ y)).bfloat16())
        wide = torch.baddbmm(z, x, y, beta=0.5)
        assert bf16.into(out, a, b, add=c, beta=0.5) is out and out.equal(wide.bfloat16())
        """
    )


@pytest.mark.slow
def test_the_doctor_says_which_products_this_cpu_has(monkeypatch: pytest.MonkeyPatch) -> None:
    def doctor() -> str:
        command = [sys.executable, "-m", "pion_dist.doctor", "--check", "torch"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout

    assert ("no bf16 units" in doctor()) != cpu_has_bf16_units()
    for name, value in WITHOUT_UNITS.items():
        monkeypatch.setenv(name, value)
    assert "no bf16 units: bf16 products in float32, rounded once" in doctor()


@pytest.mark.slow
@pytest.mark.skipif(not cpu_has_bf16_units(), reason="no bf16 units: both trainings are the same")
def test_a_training_is_the_same_on_both_paths(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To bf16's rounding, 2^-8 of a loss.

    Sums of another order round to another bf16 number in 1 of 10,000 elements, and 20 steps pass
    that on (measured: 2e-6 of the first loss, at most 4e-4 later). With Adam at 1e-2, whose first
    steps move an element by its gradient's sign alone, losses differ by 3e-3.
    """
    data = ["--data-path", str(corpus), "--data-cache-path", str(corpus.parent / "cache")]
    flags = [*MODEL, *data, *PION, *NO_DROPOUT, "--bf16", "--pion-init", "fan_in"]
    flags += ["--lr", "1e-3", "--min-lr", "1e-4", "--pion-lr-mult", "10"]
    units = steps(launch(SCRIPT, *flags))
    for name, value in WITHOUT_UNITS.items():
        monkeypatch.setenv(name, value)
    float32 = steps(launch(SCRIPT, *flags))
    losses = [[float(step.loss) for step in run] for run in (units, float32)]
    assert losses[0] != losses[1], "both trainings took the same path"
    assert losses[0] == pytest.approx(losses[1], rel=2**-8)
