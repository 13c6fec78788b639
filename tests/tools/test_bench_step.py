"""The benchmark of a step: what it times Pion against is right, and what it counts is there."""

from __future__ import annotations

import json
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron_runs import LIMIT_S
from torch.utils.flop_counter import FlopCounterMode

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))
from bench_step import measure, peak_extra  # noqa: E402
from bench_step_contenders import (  # noqa: E402
    MODELS,
    Group,
    Weight,
    contenders,
    qr_flop,
    stored,
)
from bench_step_report import Results, tables  # noqa: E402
from released import ReleasedPion, _matrix_sign  # noqa: E402

from pion_dist import Pion, PionConfig  # noqa: E402
from pion_dist.update.precision import cpu_bf16_products  # noqa: E402

CPU = torch.device("cpu")
# FlopCounterMode knows products alone.
QR = {torch.ops.aten.linalg_qr: lambda a, *_, **__: prod(a[:-2]) * qr_flop(*a[-2:])}
LOOPS = {c.name: c.config for c in contenders(CPU) if c.kind == "loop"}


# The published matrix sign has Muon's coefficients.
@pytest.mark.parametrize("name", [name for name in LOOPS if LOOPS[name].direction != "msign"])
@pytest.mark.parametrize("shape", [(12, 12), (9, 24), (24, 9)], ids=str)
def test_the_released_loop_computes_what_pion_does(name: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    w = torch.randn(shape, dtype=torch.float64)
    theirs, ours = torch.nn.Parameter(w.clone()), torch.nn.Parameter(w.clone())
    loop = ReleasedPion([theirs], 1e-2, config=LOOPS[name])
    pion = Pion([ours], 1e-2, config=LOOPS[name])
    for _ in range(4):
        theirs.grad = ours.grad = torch.randn_like(w)
        loop.step()
        pion.step()
    assert (theirs - w).abs().max() > 1e-3
    # As in test_reference.py: a step is 10 products of inner length k <= 24, each wrong by at
    # most k u = 3e-15 (u = 1.1e-16), and 4 steps add up to 1e-13.
    torch.testing.assert_close(theirs, ours, rtol=0.0, atol=1e-12)


def test_the_released_matrix_sign_is_one() -> None:
    """Muon's five steps end in [0.68, 1.21] (K. Jordan) from 5e-3 of the norm on, and keep K's
    planes.
    """
    torch.manual_seed(0)
    x = torch.randn(12, 12, dtype=torch.float64)
    k = x - x.mT
    sign = _matrix_sign(k, 1e-8)
    s = torch.linalg.svdvals(sign)
    assert torch.linalg.svdvals(k)[-1] > 5e-3 * torch.linalg.norm(k)
    assert s[-1] > 0.68 and s[0] < 1.21
    torch.testing.assert_close(sign @ k, k @ sign, rtol=0.0, atol=1e-10)


def test_options_that_were_not_published_have_no_loop() -> None:
    with pytest.raises(ValueError, match="not published: E is"):
        config = PionConfig(direction="momentum", retraction="exp")
        ReleasedPion([torch.ones(2, 2)], 1e-2, config=config)


@pytest.mark.parametrize("contender", contenders(CPU), ids=lambda c: c.name)
@pytest.mark.parametrize("group", MODELS["8b"].groups(1 / 64), ids=lambda g: g.name)
def test_what_is_counted_is_what_happens(contender, group) -> None:  # type: ignore[no-untyped-def]
    weights = [stored(weight, CPU) for weight in group.weights]
    optimizer = contender.build(weights)
    if contender.config.direction == "polar" or contender.name == "ISO":
        optimizer.step()  # decomposes
    executed = 0.0
    for _ in range(2):
        with FlopCounterMode(display=False, custom_mapping=QR) as counter:
            optimizer.step()
        executed += counter.get_total_flops() / 2
    counted = sum(contender.flop(weight) for weight in group.weights)
    assert contender.state(group.weights) == state_bytes(optimizer.state)
    if contender.kind != "pion":  # tests/unit/test_cost.py
        # Counts of products are whole numbers, and those of QR multiples of 4/3. Each sum rounds
        # by u = 1.1e-16 of it at most, and there are fewer than 1000 terms.
        assert counted == pytest.approx(executed, rel=1e-12, abs=0.0)


def test_flop_of_qr_are_those_of_its_reflections() -> None:
    """Reflection k changes an (m - k) x (r - k) block: a product with a vector and a rank-one
    update, 4 FLOP an element. R has them once, Q once more.
    """
    for m, r in ((64, 64), (200, 64), (1000, 3)):
        reflections = sum(4 * (m - k) * (r - k) for k in range(r))
        # The sum exceeds the integral, whose value is counted, by less than its first term.
        assert 0 < 2 * reflections - qr_flop(m, r) < 2 * 4 * m * r


def test_fixed_norm_muon_and_iso_keep_what_they_fix() -> None:
    built = {c.name: c for c in contenders(CPU)}
    torch.manual_seed(0)
    weights = [stored(Weight(3, 8, 12, (8, 8, 8)), CPU)]
    before = weights[0].weight.clone()

    def after_three_steps(name: str) -> torch.Tensor:
        optimizer = built[name].build(weights)
        optimizer.param_groups[0]["lr"] = 0.1  # decay would change a norm by 1e-3 a step
        for _ in range(3):
            optimizer.step()
        moved = torch.cat([p.detach() for p in optimizer.param_groups[0]["params"]])
        assert (moved - before).norm() > 0.1 * before.norm()
        return moved

    # ISO first: it steps a copy. The SVD, QR and the product are each backward stable in float32:
    # an error of some 12 u of the largest singular value (u = 6e-8), with a constant of LAPACK's
    # that is taken as 10. QR starts afresh at every step, so that errors do not add up.
    moved = after_three_steps("ISO").double().reshape(3, 8, 12)
    s, t = torch.linalg.svdvals(before.double().reshape(3, 8, 12)), torch.linalg.svdvals(moved)
    torch.testing.assert_close(s, t, rtol=0.0, atol=3 * 10 * 12 * 2.0**-24 * s.max().item())
    # A step rounds two norms of 96 elements, each by 96 u at most.
    norms = [
        torch.stack([m.double().norm() for m in w.split(8)])
        for w in (before, after_three_steps("fixed-norm Muon"))
    ]
    torch.testing.assert_close(norms[0], norms[1], rtol=3 * 2 * 96 * 2.0**-24, atol=0.0)


def state_bytes(state: Any) -> int:
    """Bytes of a state's tensors, nested or not, without scalars such as a count of steps."""
    if isinstance(state, dict):
        return sum(map(state_bytes, state.values()))
    return state.nbytes if isinstance(state, torch.Tensor) and state.dim() else 0


def test_peak_memory_counts_what_is_held_at_a_time() -> None:
    def step() -> None:
        for _ in range(2):
            a = torch.ones(1 << 20)
            b = a + 1.0
            del a
            c = b + 1.0
            del b, c

    # Two tensors of 4 MiB at a time; the 1.0 is a tensor of some bytes as well.
    assert 2 * 4 << 20 <= peak_extra(step, CPU) <= (2 * 4 << 20) + 64


def test_what_does_not_fit_is_skipped_with_the_reason() -> None:
    # Generators of 10^6 x 10^6 take 4 TB; in factors of one row, of polar and of Muon, nothing is
    # so large.
    cells = measure("8b", Group("MLP", (Weight(1, 1, 10**6),)), CPU, 1)
    skipped = {cell["contender"]: cell["skipped"] for cell in cells if "skipped" in cell}
    assert set(skipped) == {"lie both", "lie alternate", "msign"} | set(LOOPS)
    assert all("GiB, " in why and why.endswith("are free") for why in skipped.values())
    for cell in measure("8b", Group("MLP", (Weight(1, 10**6, 10**6),)), CPU, 1):
        assert cell["skipped"].startswith("the weights: needs")


def test_what_is_not_asked_for_is_not_timed() -> None:
    group = MODELS["60m"].groups(1 / 32)[0]
    chosen = {"default float32", "Muon float32"}
    cells = measure("60m", group, CPU, 1, chosen)
    assert {cell["contender"] for cell in cells if "seconds" in cell} == chosen
    results = Results(cells, [c for c in contenders(CPU) if c.name in chosen])
    made = {table.title: table for table in tables(results, {"60m": 1 / 32}, CPU)}
    assert made["ms a step"].head == ["", "default float32", "Muon float32"]
    assert "Time, over that of the published loop" not in made and "Not measured" not in made


def test_one_command_writes_tables_json_and_plot(tmp_path: Path) -> None:
    command = [sys.executable, str(TOOLS / "bench_step.py"), "--out", str(tmp_path)]
    command += ["--model", "60m", "--scale", str(1 / 32), "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "step.md").read_text() in done.stdout
    assert (tmp_path / "step.png").stat().st_size > 10_000
    record = json.loads((tmp_path / "step.json").read_text())
    assert cpu_bf16_products() in record["setup"]["machine"]
    names = {contender.name: contender for contender in contenders(CPU)}
    groups = {("60m", group.name): group for group in MODELS["60m"].groups(1 / 32)}
    assert {(c["model"], c["shape"], c["contender"]) for c in record["cells"]} == {
        (*group, name) for group in groups for name in names
    }
    for cell in record["cells"]:
        optimizer = names[cell["contender"]].build(
            [stored(weight, CPU) for weight in groups[cell["model"], cell["shape"]].weights]
        )
        optimizer.step()
        assert cell["state_bytes"] == state_bytes(optimizer.state)
        assert cell["seconds"] > 0.0 and cell["peak_bytes"] >= 0
