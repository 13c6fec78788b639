"""On the CPU layer Megatron's cuda is the CPU, and nothing changes before it is installed."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron_runs import LIMIT_S, ROOT

from megatron_patches.fused_adam import FusedAdam


def python(code: str, *args: str) -> None:
    """Run `code` in a new interpreter, as a plain process."""
    hidden = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {k: v for k, v in os.environ.items() if k not in hidden}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code), *args]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=LIMIT_S)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.slow
def test_nothing_changes_before_install_or_after_megatron() -> None:
    python(
        """
        import os, sys, types
        import torch, torch.optim.adam, torch.distributed as dist
        from torch.utils.data import DataLoader

        def snapshot():
            owners = torch, torch.Tensor, torch.cuda, torch.cuda.random, torch.accelerator
            owners += dist, dist.distributed_c10d, DataLoader, os
            attributes = [{k: id(v) for k, v in vars(owner).items()} for owner in owners]
            return attributes, dict(os.environ), [m for m in sys.modules if "apex" in m]

        before = snapshot()
        from megatron_patches.cpu_device import install
        assert snapshot() == before

        sys.modules["megatron.core"] = types.ModuleType("megatron.core")
        try:
            install()
        except RuntimeError as error:
            assert "before megatron.core is imported" in str(error)
        else:
            raise AssertionError("not refused")
        assert snapshot() == before

        del sys.modules["megatron.core"]
        install()
        installed = snapshot()
        assert installed != before
        sys.modules["megatron.core"] = types.ModuleType("megatron.core")
        install()  # idempotent, also once megatron is there
        assert snapshot() == installed
        """
    )


@pytest.mark.slow
def test_cuda_is_the_cpu() -> None:
    python(
        """
        import io, os, pathlib, sys
        before = dict(os.environ)
        os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "32"
        import torch
        from megatron_patches import cpu_device, fused_adam
        cpu_device.install()
        assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"  # the user's choice stands
        assert os.environ["TORCHDYNAMO_DISABLE"] == "1"
        assert os.environ.get("OMP_NUM_THREADS") == before.get("OMP_NUM_THREADS")

        here = torch.cuda.current_device()
        for device in "cuda", "cuda:3", torch.device("cuda", 1), here, "cpu", None:
            made = [
                torch.empty(2, device=device, pin_memory=True),
                torch.full((2,), 1.0, device=device),
                torch.arange(3, device=device),
                torch.tensor([1.0], device=device),
                torch.ones(2).new_zeros(3, device=device),
            ]
            if device is not None:
                made += [torch.ones(2).to(device), torch.ones(2).to(device=device)]
                made += [torch.nn.Linear(2, 2).to(device).weight]
                made += [torch.nn.Linear(2, 2, device=device).weight]
            assert {t.device.type for t in made} == {"cpu"}, device
        assert torch.ones(2).to(torch.bfloat16).dtype == torch.bfloat16
        assert torch.empty(2, device="meta").device.type == "meta"
        kept = torch.ones(2)
        assert kept.cuda() is kept and kept.pin_memory() is kept
        assert torch.nn.Linear(2, 2).cuda().weight.device.type == "cpu"
        kept.record_stream(torch.cuda.current_stream())

        assert torch.ones(2).type() == "torch.cuda.FloatTensor"
        assert torch.ones(2).bfloat16().type() == "torch.cuda.BFloat16Tensor"
        assert torch.ones(2).type(torch.float64).dtype == torch.float64

        assert torch.cuda.is_available() and torch.cuda.device_count() == 1
        assert torch.cuda.get_device_capability() == (8, 0) and torch.cuda.is_bf16_supported()
        assert torch.cuda.memory_allocated() == torch.cuda.max_memory_reserved() == 0
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        with torch.cuda.stream(torch.cuda.Stream()):
            end.record()
        torch.cuda.synchronize()
        assert start.elapsed_time(end) >= 0
        assert not torch.accelerator.is_available()

        buffer = io.BytesIO()
        torch.save({"w": torch.ones(2)}, buffer)
        for where in None, "cuda:0", torch.device("cuda"), {"cuda:0": "cuda:1"}, lambda s, _: s:
            buffer.seek(0)
            assert torch.load(buffer, map_location=where)["w"].device.type == "cpu"

        from apex.optimizers import FusedAdam
        assert FusedAdam is fused_adam.FusedAdam
        for name in "apex", "transformer_engine":
            try:
                __import__(name)
            except ModuleNotFoundError:
                continue
            raise AssertionError(name)
        """
    )


@pytest.mark.slow
def test_random_state_round_trip() -> None:
    python(
        """
        import torch
        from megatron_patches import cpu_device
        cpu_device.install()

        torch.cuda.manual_seed(5)
        for module in torch.cuda, torch.cuda.random:
            state = module.get_rng_state()
            drawn = torch.rand(4, device="cuda")
            assert not torch.equal(drawn, torch.rand(4, device="cuda"))
            module.set_rng_state(state)
            assert torch.equal(drawn, torch.rand(4, device="cuda"))
        (generator,) = torch.cuda.default_generators
        torch.cuda._lazy_call(lambda: generator.set_state(state))
        assert torch.equal(drawn, torch.rand(4))

        own = torch.Generator(device="cuda").manual_seed(3)
        assert isinstance(own, torch.Generator) and isinstance(generator, torch.Generator)
        assert not isinstance(state, torch.Generator)
        copied = torch.Generator("cuda:0")
        copied.set_state(own.get_state())
        a, b = (torch.rand(4, generator=g, device="cuda") for g in (own, copied))
        assert torch.equal(a, b)

        # A resumed run starts its data iterator after it has loaded the state.
        state = torch.cuda.get_rng_state()
        data = torch.utils.data.DataLoader(range(4), pin_memory=True)
        assert [int(x) for x in data] == [0, 1, 2, 3]
        assert torch.equal(torch.cuda.get_rng_state(), state)
        """
    )


@pytest.mark.slow
def test_collectives(tmp_path: Path) -> None:
    python(
        """
        import sys, torch, torch.distributed as dist, torch.multiprocessing as mp
        from megatron_patches import cpu_device

        def rank(rank, path):
            cpu_device.install()
            store = dist.FileStore(path, 2)
            device = torch.device("cuda", rank)
            dist.init_process_group("nccl", store=store, rank=rank, world_size=2, device_id=device)
            group = dist.new_group([0, 1], backend="nccl", pg_options=object())
            assert dist.get_backend() == dist.get_backend(group) == "gloo"
            dist.barrier(group=group, device_ids=[rank])

            for sizes in (3, 5), (4, 0), (2, 2), (0, 0):  # nccl takes any
                for async_op in False, True:
                    mine = torch.full((sizes[rank],), float(rank), device="cuda")
                    out = [torch.empty(n, device="cuda") for n in sizes]
                    work = dist.all_gather(out, mine, group=group, async_op=async_op)
                    assert (work is not None) == async_op
                    if async_op:
                        work.wait()
                    for r, (t, n) in enumerate(zip(out, sizes)):
                        assert torch.equal(t, torch.full((n,), float(r)))
            mine = torch.full((rank + 1, 2), float(rank)).bfloat16()
            out = [torch.empty(r + 1, 2).bfloat16() for r in range(2)]
            dist.all_gather(out, mine)
            assert all(torch.equal(t, torch.full_like(t, r)) for r, t in enumerate(out))

            counts = torch.tensor([[1, 2], [4, 3]])  # from, to
            sent, received = counts[rank], counts[:, rank]
            mine = torch.arange(int(sent.sum())) + 10 * rank
            wanted = {0: [0, 10, 11, 12, 13], 1: [1, 2, 14, 15, 16]}[rank]
            for as_given in torch.Tensor.tolist, torch.Tensor.numpy, torch.clone:
                out = torch.empty(int(received.sum()), dtype=torch.int64)
                splits = as_given(received), as_given(sent)
                dist.all_to_all_single(out, mine, *splits, group=group)
                assert out.tolist() == wanted
                out.zero_()
                names = dict(zip(("output_split_sizes", "input_split_sizes"), splits))
                dist.all_to_all_single(out, mine, group=group, **names)
                assert out.tolist() == wanted

            mean = torch.tensor([float(rank)])  # Megatron's MoE metrics rely on the mean
            dist.all_reduce(mean, op=dist.ReduceOp.AVG)
            assert mean.item() == 0.5
            dist.destroy_process_group()

        mp.start_processes(rank, (sys.argv[1],), nprocs=2, start_method="fork")
        """,
        str(tmp_path / "store"),
    )


def parameters(seed: int) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (7, 5), (33,), (1,), (0,)
    return [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]


@pytest.mark.parametrize("adam_w_mode", [True, False])
def test_fused_adam_is_adam(adam_w_mode: bool) -> None:
    """Bitwise, for it is the same arithmetic; over a resume too."""
    options: dict[str, Any] = {"lr": 3e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    ours, theirs = parameters(0), parameters(0)
    fused = FusedAdam([{"params": ours}, {"params": []}], adam_w_mode=adam_w_mode, **options)
    reference = (torch.optim.AdamW if adam_w_mode else torch.optim.Adam)(theirs, **options)
    for step in range(8):
        if step == 4:
            saved = fused.state_dict()
            fused = FusedAdam([{"params": ours}, {"params": []}], adam_w_mode=adam_w_mode)
            fused.load_state_dict(saved)
        for p, q, g in zip(ours, theirs, parameters(step + 1), strict=True):
            p.grad, q.grad = g.detach().clone(), g.detach().clone()
        fused.step()
        reference.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
    assert [group.get("step") for group in fused.param_groups] == [8, None]
    assert all(set(state) == {"exp_avg", "exp_avg_sq"} for state in fused.state.values())


def test_fused_adam_passes_over_missing_gradients() -> None:
    moved, still = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = FusedAdam([moved, still], lr=0.1, weight_decay=0.1)
    moved.grad = torch.ones(3)
    assert optimizer.step(lambda: 2.5) == 2.5
    # The first step of Adam is lr * sign(g), after a decay by lr * weight_decay.
    torch.testing.assert_close(moved.detach(), torch.full((3,), 0.99 - 0.1))
    assert torch.equal(still.detach(), torch.ones(3))
    with pytest.raises(ValueError, match="CUDA graphs"):
        FusedAdam([moved], capturable=True)


@pytest.mark.slow
def test_patches_of_megatron() -> None:
    pytest.importorskip("megatron.core.package_info")
    python(
        """
        import types
        from megatron_patches import cpu_device
        cpu_device.install()
        cpu_device.patch_megatron()
        from megatron.core.transformer.torch_norm import WrappedTorchNorm
        new = WrappedTorchNorm.__new__
        cpu_device.patch_megatron()
        assert WrappedTorchNorm.__new__ is new

        names = "layernorm_zero_centered_gamma persist_layer_norm memory_efficient_layer_norm"
        config = types.SimpleNamespace(**dict.fromkeys(names.split(), False))
        for config.normalization in "LayerNorm", "RMSNorm":
            for config.sequence_parallel in False, True:
                norm = WrappedTorchNorm(config, 8, eps=1e-3)
                assert type(norm).__name__ == config.normalization and norm.eps == 1e-3
                for p in norm.parameters():
                    assert getattr(p, "sequence_parallel", False) is config.sequence_parallel
        """
    )
