"""Run unmodified Megatron on CPU and gloo, for tests and demonstrations without a GPU.

`install()` makes ``torch.cuda`` look present while every "cuda" device is the CPU, puts gloo in
nccl's place (``cpu_collectives.py``) and mends bf16 products (``cpu_products.py``);
`patch_megatron()` then mends the one place of Megatron itself that needs it. Importing this module
changes nothing. Megatron's logic, sharding and collectives run for real; CUDA kernels, stream
ordering, memory and speed do not. Places named FILE:LINE are megatron-core 0.19.2's.

Functions are replaced rather than caught by a ``TorchFunctionMode``, because a mode is
thread-local and Megatron builds tensors in other threads too (checkpoint workers, data loaders).
"""

from __future__ import annotations

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
from typing import Any

import torch
from torch.utils.data import DataLoader

from . import cpu_collectives, cpu_products
from .fused_adam import FusedAdam

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
    cpu_collectives.install()
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


def _device_count() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _fake_cuda() -> None:
    cuda = torch.cuda
    # initialize.py:66 asserts the first; random.py:14 imports the others, and sets the generator's
    # state through the last.
    _replace(cuda, is_available=_always(True), _lazy_init=_always(None))
    _replace(cuda, _lazy_call=lambda function, **_: function())
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


def _replace_optional_packages() -> None:
    # Where Transformer Engine or apex are installed Megatron would take their CUDA kernels. An
    # import of a name whose entry is None raises ModuleNotFoundError.
    modules: dict[str, Any] = sys.modules
    modules["transformer_engine"] = modules["apex"] = None
    # optimizer/__init__.py:20 and distrib_optimizer.py:29 import this submodule, and only it.
    optimizers = types.ModuleType("apex.optimizers")
    _replace(optimizers, FusedAdam=FusedAdam, FusedSGD=torch.optim.SGD)
    modules["apex.optimizers"] = optimizers


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
