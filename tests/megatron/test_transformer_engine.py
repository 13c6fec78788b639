"""On the real Transformer Engine FP8 weights are the rounded masters, on every rank."""

import importlib
import importlib.util
from pathlib import Path

import pytest
import te_on_cpu
import torch
from megatron_runs import MODEL, NO_DROPOUT, PION, ROOT, launch, train

from megatron_patches import seams, transformer_engine

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None,
    reason="no Transformer Engine: `make test-te` builds it and runs these",
)

CHECKS = ROOT / "tests" / "support" / "fp8_checks.py"
CONTRACT = (*transformer_engine.LAYERS, *transformer_engine.FP8_WEIGHTS)
EXPERTS = ["--num-experts", "4", "--moe-grouped-gemm", "--moe-token-dispatcher-type", "alltoall"]


def test_the_contract_holds() -> None:
    assert transformer_engine.installed() == transformer_engine.TESTED
    assert seams.missing(CONTRACT) == []


@pytest.mark.parametrize("seam", CONTRACT, ids=lambda seam: seam.name)
def test_a_moved_name_is_told(seam: seams.Seam, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(importlib.import_module(seam.module), seam.name)
    (line,) = seams.missing(CONTRACT)
    assert seam.name in line and seam.why in line


@pytest.mark.parametrize("name", te_on_cpu.TORCH)
def test_fp8_tensors_are_torchs_bytes_times_a_scale(name: str) -> None:
    import transformer_engine.pytorch as te
    from transformer_engine.pytorch.tensor import Float8Tensor

    dtype, scale_inv = te_on_cpu.TORCH[name], torch.tensor([0.37])
    every = torch.arange(256, dtype=torch.uint8).view(16, 16)
    finite = every.view(dtype).float().isfinite()
    data = torch.where(finite, every, 0)
    tensor = Float8Tensor(
        shape=data.shape,
        dtype=torch.bfloat16,
        data=data,
        fp8_scale_inv=scale_inv,
        fp8_dtype=te.DType[name],
        device=torch.device("cpu"),
    )
    expected = data.view(dtype).float() * scale_inv
    assert torch.equal(tensor.float(), expected)
    assert torch.equal(tensor.dequantize(), expected.bfloat16())
    for same in (tensor.detach(), tensor.clone(), tensor.view(-1), torch.nn.Parameter(tensor)):
        assert type(same) is Float8Tensor
        assert torch.equal(same.float().view(16, 16), expected)
    # Rounding a value of the format gives it back, the sign of zero too.
    assert torch.equal(te_on_cpu.fp8(expected, 1 / scale_inv, dtype), data)
    # What is too large saturates, as in Transformer Engine.
    largest = te_on_cpu.fp8(torch.tensor([1e9, -1e9]), torch.ones(1), dtype).view(dtype).float()
    assert largest.tolist() == [torch.finfo(dtype).max, -torch.finfo(dtype).max]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "flags"),
    [
        (1, []),
        (2, []),
        (2, ["--overlap-grad-reduce", "--overlap-param-gather"]),
        (2, ["--tensor-model-parallel-size", "2"]),
        (2, EXPERTS),
        (2, [*EXPERTS, "--expert-model-parallel-size", "2"]),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else " ".join(value) or "plain",
)
def test_fp8_weights_are_the_rounded_masters_on_every_rank(
    processes: int, flags: list[str]
) -> None:
    fixed = [*MODEL, *NO_DROPOUT, *PION, "--bf16", "--use-distributed-optimizer"]
    run = {"processes": processes, "launcher": [te_on_cpu.__file__], "timeout": 600}
    output = launch(CHECKS, *fixed, *flags, **run)
    assert output.count("all checks passed") == processes


@pytest.mark.slow
def test_the_cpu_launcher_hides_it(corpus: Path) -> None:
    assert len(train(corpus, *PION, "--bf16", "--exit-interval", "2")) == 2
