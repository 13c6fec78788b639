"""What a library does that drives Megatron without its arguments: run by test_bridge.py.

``library_run.py`` takes Megatron's own config, ``library_run.py bridge`` Megatron-Bridge's, and its
way of making an optimizer from it: real, but for names of Transformer Engine where that is not
installed. Imports are in the order that a user's script has.
"""

import importlib.abc
import importlib.util
import sys
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from typing import Any

import torch
import torch.distributed as dist

import megatron_patches
from megatron_patches import cpu_device

cpu_device.install()
cpu_device.patch_megatron()
megatron_patches.apply()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
)
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402

from pion_dist import RECIPES, Pion  # noqa: E402

HEADS, GROUPS = 8, 4
COMMON = {"optimizer": "pion", "lr": 1e-2, "min_lr": 1e-3, "bf16": True, "clip_grad": 1.0}


def model() -> DistributedDataParallel:
    """A tiny Llama with grouped queries."""
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        ffn_hidden_size=96,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        bf16=True,
        params_dtype=torch.bfloat16,
    )
    gpt = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=256,
        max_sequence_length=64,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
    )
    return DistributedDataParallel(config, DistributedDataParallelConfig(), gpt.bfloat16())


def plainly(config: OptimizerConfig, chunk: DistributedDataParallel) -> Any:
    return get_megatron_optimizer(config, [chunk])


def check(
    config_class: type, optimizer_of: Callable[[OptimizerConfig, DistributedDataParallel], Any]
) -> None:
    """Pion has its matrices, redrawn as the recipe says, and rotates them."""
    chunk = model()
    weights = {name: p.detach().clone() for name, p in chunk.named_parameters()}
    optimizer = optimizer_of(
        config_class(**COMMON, **{**megatron_patches.recipe("paper-60m"), "pion_side": "both"}),
        chunk,
    )
    (pion,) = (o.optimizer for o in optimizer.chained_optimizers if isinstance(o.optimizer, Pion))
    assert pion.config.side == "both" and pion.config.qkv == RECIPES["paper-60m"].qkv == "head"
    parts = {slot.name: slot.shapes for slot in pion._slots.values()}
    layer = "decoder.layers.1."
    assert len(parts) == 8
    assert parts[layer + "self_attention.linear_qkv.weight"] == {"head": (16, 8, 64)}
    assert parts[layer + "mlp.linear_fc1.weight"] == {
        "gate": (1, 96, 64),
        "up": (1, 96, 64),
    }
    assert all(torch.equal(p, weights[name]) for name, p in chunk.named_parameters())  # keep
    before = {name: torch.linalg.svdvals(x.double()) for name, x in pion.matrices()}
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for p in chunk.parameters():
            p.main_grad.copy_(torch.randn(p.shape, generator=generator))
        assert optimizer.step()[0]
    for name, x in pion.matrices():
        # Root mean square .2 lr = 2e-3 of a change to weights of .02 is an angle of .1 on average,
        # of which the Taylor polynomial of degree 2 stretches by its fourth power over 8: twice
        # that angle on both sides is 4e-4 a step. Steps of Adam's would change values by a tenth.
        drift = (torch.linalg.svdvals(x.double()) - before[name]).abs().max() / before[name].max()
        assert drift < 3 * 4e-4, (name, drift)
    moved = {name for name, p in chunk.named_parameters() if not torch.equal(p, weights[name])}
    assert moved >= {name for name in weights if "linear" in name}


def check_redrawn(
    config_class: type, optimizer_of: Callable[[OptimizerConfig, DistributedDataParallel], Any]
) -> None:
    """The default recipe draws the weights, and keeps their spectra."""
    redrawn = model()
    optimizer = optimizer_of(config_class(**COMMON, **megatron_patches.recipe("pretrain")), redrawn)
    for name, p in redrawn.named_parameters():
        if "linear" in name:
            # Standard deviation of n normal numbers: relative error 1/sqrt(2n), 5 of them; bf16.
            ratio = p.float().std() * p.shape[1] ** 0.5
            assert abs(ratio - 1) < 5 / (2 * p.numel()) ** 0.5 + 2**-9, (name, ratio)

    (pion,) = (o.optimizer for o in optimizer.chained_optimizers if isinstance(o.optimizer, Pion))
    assert pion.config.direction == "polar"
    before = {name: torch.linalg.svdvals(x.double()) for name, x in pion.matrices()}
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for p in redrawn.parameters():
            p.main_grad.copy_(torch.randn(p.shape, generator=generator))
        assert optimizer.step()[0]
    for name, x in pion.matrices():
        # Frames whose inner products, sums of up to 96 terms, are rounded to 2**-24 a term.
        drift = (torch.linalg.svdvals(x.double()) - before[name]).abs().max() / before[name].max()
        assert drift < 96 * 2**-24, (name, drift)


def check_refusals(
    config_class: type, optimizer_of: Callable[[OptimizerConfig, DistributedDataParallel], Any]
) -> None:
    """What a config cannot have is refused with what to set."""
    refused = {
        "megatron_patches.recipe('paper-60m')": {"pion_recipe": "paper-60m"},
        "in DistributedDataParallelConfig: set both alike": {"use_distributed_optimizer": True},
        "use_layer_wise_distributed_optimizer=True: set it": {
            "use_layer_wise_distributed_optimizer": True
        },
        "optimizer_cpu_offload=True: set pion_offload_state": {"optimizer_cpu_offload": True},
        "pion_recipe='other': must be one of 'pretrain'": {"pion_recipe": "other"},
        "pion_recipe='paper-1.3b' alone": {"pion_recipe": "paper-1.3b", "pion_team_size": 2},
        "use_megatron_fsdp=True: set use_distributed_optimizer": {},
    }
    for says, fields in refused.items():
        chunk = model()
        chunk.ddp_config.use_megatron_fsdp = "fsdp" in says  # of the wrapper's config alone
        try:
            optimizer_of(config_class(**COMMON, **fields), chunk)
        except ValueError as error:
            assert says in str(error), error
        else:
            raise AssertionError(f"not refused: {fields}")


class Names(types.ModuleType):
    """A module in which every name is a class, but for ``ops``, of which every name is one."""

    __path__: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = Names(f"{self.__name__}.ops") if name == "ops" else type(name, (), {})
        setattr(self, name, value)
        return value


class NoTransformerEngine(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports of Transformer Engine where it is not: Bridge's LoRA layers name its classes."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        mine = name.split(".")[0] == "transformer_engine"
        return ModuleSpec(name, self, is_package=True) if mine else None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return Names(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__version__ = "2.20.2"  # type: ignore[attr-defined]


def by_bridge(config: Any, chunk: DistributedDataParallel) -> Any:
    """As megatron.bridge.training.setup does."""
    from megatron.bridge.training.config import SchedulerConfig
    from megatron.bridge.training.optim import setup_optimizer

    config.finalize()
    scheduler = SchedulerConfig(
        lr_decay_style="cosine", start_weight_decay=0.0, end_weight_decay=0.0
    )
    scheduler.lr_warmup_steps, scheduler.lr_decay_steps, scheduler.wd_incr_steps = 0, 10, 10
    optimizer, _ = setup_optimizer(config, scheduler, [chunk])
    return optimizer


def every(
    config_class: type, optimizer_of: Callable[[OptimizerConfig, DistributedDataParallel], Any]
) -> None:
    """All checks of a kind of config."""
    for each in (check, check_redrawn, check_refusals):
        each(config_class, optimizer_of)


def main() -> None:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    if sys.argv[1:] == ["bridge"]:
        # Hidden from Megatron, which would take its kernels; Bridge does not import without it.
        del sys.modules["transformer_engine"]
        if importlib.util.find_spec("transformer_engine") is None:
            sys.meta_path.append(NoTransformerEngine())
        from megatron.bridge.training.config import OptimizerConfig as BridgeConfig

        every(BridgeConfig, by_bridge)
        print("a config of Megatron-Bridge's: passed")
    else:
        every(OptimizerConfig, plainly)
        print("a config of Megatron's: passed")


if __name__ == "__main__":
    main()
