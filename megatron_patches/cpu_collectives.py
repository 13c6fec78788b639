"""gloo in nccl's place, for Megatron on CPUs. Places named FILE:LINE are megatron-core 0.19.2's."""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def install() -> None:
    """Have torch.distributed take gloo for nccl, and gloo what nccl takes; call it once."""
    real_init, real_new_group = dist.init_process_group, dist.new_group
    real_all_gather, real_all_to_all = dist.all_gather, dist.all_to_all_single

    # nccl is --distributed-backend's default; its options and a bound device mean nothing to gloo
    # (parallel_state.py:259 passes them).
    @functools.wraps(real_init)
    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
        kwargs |= {"device_id": None, "pg_options": None}
        _set_rendezvous_defaults(kwargs.get("world_size", -1))
        real_init(_gloo_for_nccl(backend or "nccl"), *args, **kwargs)
        atexit.register(_end_groups)

    @functools.wraps(real_new_group)
    def new_group(
        ranks: Any = None, timeout: Any = None, backend: str | None = None, **kwargs: Any
    ) -> Any:
        kwargs |= {"device_id": None, "pg_options": None}
        return real_new_group(ranks, timeout, _gloo_for_nccl(backend), **kwargs)

    # nccl gathers tensors of different sizes, gloo refuses them; Muon's layer-wise optimizer
    # relies on it (layer_wise_optimizer.py:772, param_and_grad_buffer.py:472).
    @functools.wraps(real_all_gather)
    def all_gather(
        tensor_list: list[torch.Tensor],
        tensor: torch.Tensor,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        sizes = [out.numel() for out in tensor_list]
        if len(set(sizes)) == 1:
            return real_all_gather(tensor_list, tensor, group, async_op)
        padded = tensor.new_zeros(max(sizes))
        padded[: tensor.numel()] = tensor.detach().flatten()
        received = [torch.empty_like(padded) for _ in sizes]
        real_all_gather(received, padded, group)
        with torch.no_grad():
            for out, buffer in zip(tensor_list, received, strict=True):
                out.copy_(buffer[: out.numel()].view(out.shape))
        return _Done() if async_op else None

    # Split sizes must be lists; the MoE dispatcher converts only those that it finds on a GPU
    # (moe_utils.py:1184).
    @functools.wraps(real_all_to_all)
    def all_to_all_single(
        output: torch.Tensor, input: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        kwargs = {name: _as_list(value) for name, value in kwargs.items()}
        return real_all_to_all(output, input, *map(_as_list, args), **kwargs)

    ours: tuple[Any, ...] = (init_process_group, new_group, all_gather, all_to_all_single)
    for module, function in itertools.product((dist, dist.distributed_c10d), ours):
        setattr(module, function.__name__, function)


class _Done:
    """The handle of a collective that was carried out at once."""

    def wait(self, *_args: Any) -> bool:
        return True

    is_completed = wait


def _end_groups() -> None:
    # Megatron keeps its groups to the end, and they gloo's threads. One that still has to let go of
    # a tensor while Python ends would abort the process: wait until all sleep.
    if dist.is_initialized():
        dist.destroy_process_group()
    for _ in range(10_000):  # not for ever: a thread may hang
        time.sleep(0.001)
        if not any(map(_is_gloo_and_runs, Path("/proc/self/task").glob("*/stat"))):
            return


def _is_gloo_and_runs(thread: Path) -> bool:
    with contextlib.suppress(OSError):  # it has ended
        name, _, rest = thread.read_text().rpartition(") ")
        return "gloo" in name and rest.startswith("R")
    return False


def _set_rendezvous_defaults(world_size: int) -> None:
    env = os.environ
    if world_size == 1:  # a plain process, without torchrun: any free port
        env.setdefault("MASTER_ADDR", "127.0.0.1")
        env.setdefault("MASTER_PORT", "0")
    # Within one node gloo needs no other interface than this, and a host name that does not
    # resolve is no trouble then. Several nodes choose their own.
    if world_size < 0:
        world_size = int(env.get("WORLD_SIZE", "1"))
    if world_size == torch.cuda.device_count():
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")


def _gloo_for_nccl(backend: str | None) -> str | None:
    return "gloo" if backend and "nccl" in backend else backend


def _as_list(argument: Any) -> Any:
    return argument.tolist() if isinstance(argument, torch.Tensor) else argument
