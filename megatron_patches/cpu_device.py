"""Run unmodified Megatron on CPU and gloo, for tests and demonstrations without a GPU.

`install()` makes ``torch.cuda`` look present while every "cuda" device is the CPU and nccl is gloo,
and mends bf16 products (``cpu_products.py``); `patch_megatron()` then mends the one place of
Megatron itself that needs it. Importing this module changes nothing. Megatron's logic, sharding and
collectives run for real; CUDA kernels, stream ordering, memory and speed do not. Places named
FILE:LINE are megatron-core 0.19.2's.

Functions are replaced rather than caught by a ``TorchFunctionMode``, because a mode is
thread-local and Megatron builds tensors in other threads too (checkpoint workers, data loaders).
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import copy
import functools
import logging
import os
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.adam import adam
from torch.utils.data import DataLoader

from . import cpu_products

_installed = False


def install() -> None:
    """Put torch on the CPU behind a ``torch.cuda`` that looks present (idempotent).

    Call it before anything imports megatron: Megatron takes names out of torch at import
    (``from torch.cuda import _lazy_init``), and those would stay the real ones.

    Raises:
        RuntimeError: ``megatron.core`` was imported first.
    """
    global _installed
    if _installed:
        return
    if "megatron.core" in sys.modules:
        raise RuntimeError(
            "megatron_patches.cpu_device.install() must run before megatron.core is imported: "
            "Megatron imports names from torch.cuda, and those are already bound to the real ones"
        )
    _set_environment()
    _redirect_factories()
    _redirect_tensor_methods()
    _fake_cuda()
    _share_one_generator()
    _redirect_collectives()
    _replace_optional_packages()
    cpu_products.install()
    _installed = True


def _replace(owner: Any, **attributes: Any) -> None:
    for name, value in attributes.items():
        setattr(owner, name, value)


def _always(value: Any) -> Callable[..., Any]:
    """A new function each time: torch._dynamo refuses one object under several torch names."""
    return lambda *_args, **_kwargs: value


def _set_environment() -> None:
    env = os.environ
    # core/jit.py makes jit_fuser a torch.compile: minutes of C++ compilation for a tiny model.
    env.setdefault("TORCHDYNAMO_DISABLE", "1")
    if "torch._dynamo" in sys.modules:  # it read the variable when it was imported
        _replace(sys.modules["torch._dynamo"].config, disable=True)
    # arguments.py:1437 asserts it for TP > 1 before Blackwell.
    env.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    env["CUDA_VISIBLE_DEVICES"] = ""  # a GPU that is there stays untouched


# ---------------------------------------------------------------------------- devices

_CPU = torch.device("cpu")

_FACTORIES = (
    "arange as_tensor asarray empty empty_like empty_permuted empty_strided eye full full_like "
    "linspace logspace normal ones ones_like rand rand_like randint randint_like randn randn_like "
    "randperm scalar_tensor tensor tril_indices triu_indices zeros zeros_like"
)
_NEW_METHODS = "new_empty new_empty_strided new_full new_ones new_tensor new_zeros"


def _on_cpu(device: Any) -> Any:
    """The CPU for whatever names a CUDA device, as a bare index does; anything else unchanged."""
    is_index = isinstance(device, int) and not isinstance(device, bool)
    is_cuda = isinstance(device, (str, torch.device)) and str(device).partition(":")[0] == "cuda"
    return _CPU if is_index or is_cuda else device


def _factory_on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        kwargs.pop("pin_memory", None)  # needs a driver
        return function(*args, **kwargs)

    return on_cpu


def _redirect_factories() -> None:
    # Some 200 calls say device=torch.cuda.current_device() or device="cuda".
    for owner, names in ((torch, _FACTORIES), (torch.Tensor, _NEW_METHODS)):
        for name in names.split():
            setattr(owner, name, _factory_on_cpu(getattr(owner, name)))

    real_load, real_generator = torch.load, torch.Generator

    @functools.wraps(real_load)
    def load(f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        # Without a map, or by a map to devices, a checkpoint of a GPU run wants its "cuda:0" back.
        if map_location is None or isinstance(map_location, dict):
            map_location = _CPU
        return real_load(f, _on_cpu(map_location), *args, **kwargs)

    class AnyGenerator(type(real_generator)):  # type: ignore[misc]
        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, real_generator)

    # A class still: random.py:196 and annotations use it as one.
    class Generator(real_generator, metaclass=AnyGenerator):  # type: ignore[misc, valid-type]
        def __new__(cls, device: Any = _CPU) -> Any:
            return real_generator(_on_cpu(device))

    _replace(torch, load=load, Generator=Generator)


def _redirect_tensor_methods() -> None:
    real_to, real_type = torch.Tensor.to, torch.Tensor.type

    @functools.wraps(real_to)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        return real_to(self, *map(_on_cpu, args[:1]), *args[1:], **kwargs)

    # The optimizers sort parameters by the *string*: 'torch.cuda.FloatTensor' is fp32, and what is
    # not 'torch.cuda.*' is refused (optimizer.py:1009-1038, distrib_optimizer.py:401-482).
    @functools.wraps(real_type)
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = real_type(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.") if isinstance(result, str) else result

    def itself(self: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        return self

    # nn.Module.cuda goes through Tensor.cuda; pinning and record_stream raise without a driver.
    _replace(torch.Tensor, to=to, type=type_, cuda=itself, pin_memory=itself)
    _replace(torch.Tensor, record_stream=_always(None))


# ---------------------------------------------------------------------------- torch.cuda


class _Event:
    """An event that times with the wall clock."""

    synchronize = wait = _always(None)
    query = _always(True)

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        self.recorded = 0.0

    def record(self, *_args: Any) -> None:
        self.recorded = time.perf_counter()

    def elapsed_time(self, end: _Event) -> float:
        return (end.recorded - self.recorded) * 1e3


class _Stream:
    """A stream on which everything has already happened: the CPU runs in program order."""

    synchronize = wait_event = wait_stream = _always(None)
    record_event = _always(_Event())
    priority_range = staticmethod(_always((0, -1)))

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...


def _call_now(function: Callable[[], None], **_kwargs: Any) -> None:
    function()


def _device_count() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _fake_cuda() -> None:
    cuda = torch.cuda
    # initialize.py:66 asserts the first; random.py:14 imports the others, and sets the generator's
    # state through the last.
    _replace(cuda, is_available=_always(True), _lazy_init=_always(None), _lazy_call=_call_now)
    # Every rank is on device 0: set_device(local_rank) has nothing to choose from.
    _replace(cuda, current_device=_always(0), set_device=_always(None))
    _replace(cuda, device=contextlib.nullcontext, device_count=_device_count)
    # Ampere: new enough for bf16 and grouped GEMM (arguments.py:1339), too old for the paths that
    # only Hopper and Blackwell have (token_dispatcher.py:1546, Muon's SYRK kernel).
    ampere = types.SimpleNamespace(
        name="CPU", major=8, minor=0, multi_processor_count=1, total_memory=16 << 30
    )
    _replace(cuda, get_device_properties=_always(ampere))
    # Timers, DDP's overlap, the side streams of MoE and of the pipeline; CUDA graphs never.
    _replace(cuda, Event=_Event, Stream=_Stream, stream=contextlib.nullcontext)
    _replace(cuda, current_stream=_always(_Stream()), set_stream=_always(None))
    _replace(cuda, synchronize=_always(None), is_current_stream_capturing=_always(False))
    # Only reported, and only if asked for (training.py:2742, common_utils.py:327, utils.py:1717).
    _replace(cuda, memory_stats=_always(collections.defaultdict(int)))
    for name in ("device_memory_used", "utilization", "temperature", "power_draw", "clock_rate"):
        setattr(cuda, name, _always(0))
    # torch's own look at the accelerator (DataLoader's pinning, the optimizers' graph-capture
    # check) must not believe in the device above.
    _replace(torch.accelerator, current_accelerator=_always(None))


# ---------------------------------------------------------------------------- random numbers


def _share_one_generator() -> None:
    """Let the CPU's default generator be Megatron's "cuda" generator too, as kernels draw of it."""
    generator = torch.default_generator

    def get_rng_state(device: Any = "cuda") -> torch.Tensor:
        return generator.get_state()

    def set_rng_state(new_state: torch.Tensor, device: Any = "cuda") -> None:
        generator.set_state(new_state)

    def manual_seed(seed: int) -> None:
        generator.manual_seed(int(seed))

    # random.py takes them from torch.cuda and (:118) from torch.cuda.random; torch.manual_seed
    # calls the last.
    for module in (torch.cuda, torch.cuda.random):
        _replace(module, get_rng_state=get_rng_state, set_rng_state=set_rng_state)
        _replace(module, manual_seed=manual_seed, manual_seed_all=manual_seed)
    _replace(torch.cuda, default_generators=(generator,) * torch.cuda.device_count())

    # A DataLoader draws its workers' base seed from the CPU generator whenever it is iterated, and
    # a resumed run does so after it has loaded the RNG state: with one generator for both, dropout
    # would differ from the run that went on. So what starting an iterator draws is put back.
    real_iter = DataLoader.__iter__

    @functools.wraps(real_iter)
    def iter_without_drawing(self: DataLoader[Any]) -> Any:
        state = generator.get_state()
        iterator = real_iter(self)
        generator.set_state(state)
        return iterator

    _replace(DataLoader, __iter__=iter_without_drawing)

    # Megatron's warning that both generators moved together (random.py:333) is always true here.
    def is_news(record: logging.LogRecord) -> bool:
        return "CPU RNG state changed within GPU RNG context" not in record.getMessage()

    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(is_news)


# ---------------------------------------------------------------------------- torch.distributed


class _Done:
    """The handle of a collective that was carried out at once."""

    wait = is_completed = _always(True)


def _redirect_collectives() -> None:
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

    for module in (dist, dist.distributed_c10d):
        _replace(module, init_process_group=init_process_group, new_group=new_group)
        _replace(module, all_gather=all_gather, all_to_all_single=all_to_all_single)


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
    if world_size == _device_count():
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")


def _gloo_for_nccl(backend: str | None) -> str | None:
    return "gloo" if backend and "nccl" in backend else backend


def _as_list(argument: Any) -> Any:
    return argument.tolist() if isinstance(argument, torch.Tensor) else argument


# ---------------------------------------------------------------------------- optional packages


def _replace_optional_packages() -> None:
    # Where Transformer Engine or apex are installed Megatron would take their CUDA kernels. An
    # import of a name whose entry is None raises ModuleNotFoundError.
    modules: dict[str, Any] = sys.modules
    modules["transformer_engine"] = modules["apex"] = None
    # optimizer/__init__.py:20 and distrib_optimizer.py:29 import this submodule, and only it.
    optimizers = types.ModuleType("apex.optimizers")
    _replace(optimizers, FusedAdam=FusedAdam, FusedSGD=torch.optim.SGD)
    modules["apex.optimizers"] = optimizers


class FusedAdam(torch.optim.Optimizer):
    """Adam(W) with apex's interface: the step is counted in the group, not in each parameter.

    Megatron's DistributedOptimizer stores a group's step and creates the moments itself; with
    torch's AdamW, whose step is per parameter, it saves but cannot resume. The arithmetic is
    torch's own loop, bitwise that of `torch.optim.AdamW`, and not the fused CPU kernel, which
    handles the tail of a tensor apart: results could then depend on how parameters are sharded.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        if capturable:
            raise ValueError("capturable=True needs CUDA graphs")
        self.adam_w_mode = adam_w_mode
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient (modified in place)."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["params"]:  # as in apex and TE, an empty group counts no step
                self._update(group)
        return loss

    def _update(self, group: dict[str, Any]) -> None:
        done = int(group.get("step", 0))
        group["step"] = done + 1
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            if not self.state[p]:
                self.state[p] = {k: torch.zeros_like(p) for k in ("exp_avg", "exp_avg_sq")}
        adam(
            params,
            [p.grad for p in params],
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
            [],
            [torch.tensor(float(done)) for _ in params],  # counted up inside
            foreach=False,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
            decoupled_weight_decay=self.adam_w_mode,
        )


# ---------------------------------------------------------------------------- megatron


def patch_megatron() -> None:
    """Mend the one place of Megatron that stops it on the CPU (idempotent; imports megatron)."""
    # torch_norm.py:50 refuses sequence parallelism because torch's norms lack the mark by which
    # finalize_model_grads.py sums their gradients over the tensor-parallel group. So set it.
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    real_new = WrappedTorchNorm.__new__
    if hasattr(real_new, "__wrapped__"):
        return

    @functools.wraps(real_new)
    def new(cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:
        if not config.sequence_parallel:
            return real_new(cls, config, *args, **kwargs)
        config = copy.copy(config)
        config.sequence_parallel = False
        norm = real_new(cls, config, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = True
        return norm

    _replace(WrappedTorchNorm, __new__=staticmethod(new))
