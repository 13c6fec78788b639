"""Run through te_on_cpu.py, on one rank or more: Pion with Transformer Engine's layers.

The layers, their weights in bf16 or FP8 and Megatron's optimizers are the real ones; only what
Transformer Engine computes on a GPU when it writes an FP8 weight is not. Nothing is trained: every
rank has the same made-up gradients.
"""

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import te_on_cpu
import torch
import torch.distributed as dist
import transformer_engine.pytorch as te
from transformer_engine.common.recipe import Float8CurrentScaling

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from megatron.core import dist_checkpointing
from megatron.core import parallel_state as mpu
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.training.arguments import parse_and_validate_args
from megatron.training.initialize import initialize_megatron
from megatron.training.training import get_megatron_optimizer_config, get_model
from pretrain_bytes import add_arguments, model_provider

from megatron_patches import SeamError, transformer_engine
from megatron_patches.distributed_optimizer import leaves
from megatron_patches.megatron_optimizer import refuse_without_ranges
from megatron_patches.parameters import decided
from megatron_patches.transformer_engine import is_fp8
from pion_dist import PionConfig
from pion_dist.classify import ParamInfo, Rotated, classify

RECIPES = ("delayed", "tensorwise", "blockwise")  # of FP8 weights
BF16_RECIPES = (*RECIPES, "mxfp8", "nvfp4")
STEPS = 3


def setup(
    recipe: str | None = None, *, weights: str = "fp8", impl: str = "transformer_engine"
) -> tuple[list[Any], Any]:
    """A fresh model, with weights in FP8 or bf16, and its optimizer, as pretrain() makes."""
    from megatron.core.optimizer import get_megatron_optimizer

    ARGS.transformer_impl = impl
    ARGS.fp4 = "e2m1" if recipe == "nvfp4" else None
    ARGS.fp8 = "e4m3" if recipe and not ARGS.fp4 else None
    ARGS.fp8_recipe = recipe if ARGS.fp8 else "delayed"
    ARGS.fp8_param_gather = recipe is not None and weights == "fp8"
    torch.manual_seed(ARGS.seed)  # Adam's parameters
    model_parallel_cuda_manual_seed(ARGS.seed)
    model = get_model(model_provider, ModelType.encoder_or_decoder)
    config, overrides = get_megatron_optimizer_config(ARGS)
    return model, get_megatron_optimizer(config, model, config_overrides=overrides)


def rotated(model: list[Any]) -> dict[str, torch.nn.Parameter]:
    """Pion's weights, by their names in the whole model."""
    weights = {}
    for chunk in model:
        for p in chunk.parameters():
            info, decision = decided(p)
            if isinstance(decision, Rotated):
                weights[info.name] = p
    return weights


def shard(p: Any) -> tuple[int, int]:
    """Which shard of the weights, or which of the experts, this rank has."""
    if getattr(p, "allreduce", True):
        return mpu.get_tensor_model_parallel_rank(), 0
    return mpu.get_expert_tensor_parallel_rank(), mpu.get_expert_model_parallel_rank()


def masters(model: list[Any], optimizer: Any) -> dict[str, torch.Tensor]:
    """The float32 masters of this rank's weights of Pion's, of which ranks have ranges, by name."""
    own: dict[tuple[str, tuple[int, int]], dict[int, torch.Tensor]] = {}
    for leaf in leaves(optimizer):
        for weights, parts in zip(
            leaf.model_float16_groups, leaf.shard_fp32_from_float16_groups, strict=True
        ):
            for p, master in zip(weights, parts, strict=True):
                start = leaf._get_model_param_range_map(p)["param"].start
                own.setdefault((decided(p)[0].name, shard(p)), {})[start] = master.detach().clone()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    ranges: dict[tuple[str, tuple[int, int]], dict[int, torch.Tensor]] = {}
    for each in everyone:
        for place, parts in each.items():
            ranges.setdefault(place, {}).update(parts)
    return {
        name: torch.cat([part for _, part in sorted(ranges[name, shard(p)].items())]).view(p.shape)
        for name, p in rotated(model).items()
    }


def trained(model: list[Any], optimizer: Any) -> dict[str, torch.Tensor]:
    """The masters of Pion's weights, and Adam's parameters as this rank has them."""
    values = masters(model, optimizer)
    for p in model[0].parameters():
        info, decision = decided(p)
        if not isinstance(decision, Rotated):
            values[info.name] = p.detach().clone()
    return values


def train(model: list[Any], optimizer: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Take steps; after each, what is trained."""
    for step in range(STEPS):
        for name, p in model[0].named_parameters():
            generator = torch.Generator().manual_seed(hash_of(name) + step)
            p.main_grad.copy_(torch.randn(p.shape, generator=generator) * 1e-3)
        assert optimizer.step()[0]
        if ARGS.overlap_param_gather:  # else the forward pass gathers
            model[0].start_param_sync(force_sync=True)
        yield trained(model, optimizer)


def hash_of(name: str) -> int:
    return sum(ord(letter) * 31**i for i, letter in enumerate(name)) % 2**31


def data(p: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """An FP8 weight's bytes and the reciprocals of its scales."""
    if hasattr(p, "_rowwise_data"):
        return p._rowwise_data, p._rowwise_scale_inv[:, : -(-p.shape[1] // te_on_cpu.BLOCK)]
    return p._data, p._scale_inv


def expected(p: Any, recipe: str, master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``data`` must be: the master rounded to bf16, then to e4m3."""
    value, dtype = master.bfloat16(), torch.float8_e4m3fn
    if recipe == "delayed":
        scale = p._get_quantizer().scale.view(1)
        return te_on_cpu.fp8(value, scale, dtype), 1.0 / scale
    quantizer = p._get_quantizer()
    options = {"power_of_2": quantizer.force_pow_2_scales, "epsilon": quantizer.amax_epsilon}
    if recipe == "tensorwise":
        scale = te_on_cpu.scale_of(value.float().abs().amax().view(1), dtype, **options)
        return te_on_cpu.fp8(value, scale, dtype), 1.0 / scale
    scale = te_on_cpu.scale_of(te_on_cpu.amax_of_blocks(value), dtype, **options)
    return te_on_cpu.fp8(value, te_on_cpu.each(scale, value.shape), dtype), 1.0 / scale


def transposed(p: Any) -> torch.Tensor:
    return p._columnwise_data if hasattr(p, "_rowwise_data") else p._transpose


def check_bf16(recipe: str, plain: list[dict[str, torch.Tensor]]) -> None:
    """A recipe is nothing to Pion where the weights are bf16."""
    model, optimizer = setup(recipe, weights="bf16")
    assert not any(is_fp8(p) for p in rotated(model).values()), recipe
    states = [trained(model, optimizer), *train(model, optimizer)]
    for step, (mine, theirs) in enumerate(zip(states, plain, strict=True)):
        assert_equal(mine, theirs, f"{recipe}, weights in bf16: after step {step}")


def check_fp8(recipe: str, plain: list[dict[str, torch.Tensor]]) -> None:
    """All is the bf16 run's to the last bit, and every rank's FP8 weights are it, rounded."""
    model, optimizer = setup(recipe)
    weights = {name: p for name, p in rotated(model).items() if is_fp8(p)}
    assert len(weights) >= len(rotated(model)) // 2, "the model was not built in FP8"
    assert_equal(trained(model, optimizer), plain[0], f"{recipe}: at the start")
    for step, state in enumerate(train(model, optimizer), 1):
        assert_equal(state, plain[step], f"{recipe}: after step {step}")
        for name, p in weights.items():
            what = f"{recipe}: {name} on rank {dist.get_rank()} after step {step}"
            for have, want in zip(data(p), expected(p, recipe, state[name]), strict=True):
                assert torch.equal(have, want), what
            assert torch.equal(transposed(p), data(p)[0].mT), f"{what}: transpose"
            if recipe == "delayed":  # as a forward pass leaves it, for the next step
                p._get_quantizer().scale.fill_(float(2 ** (step + 4)))
    check_resume(recipe, model, optimizer, state)


def check_resume(
    recipe: str, model: list[Any], optimizer: Any, straight: dict[str, torch.Tensor]
) -> None:
    with tempfile.TemporaryDirectory() as own:
        folder = [own]
        dist.broadcast_object_list(folder)
        records = {"optimizer": optimizer.sharded_state_dict(model[0].sharded_state_dict())}
        dist_checkpointing.save(records, folder[0])
        for into in (recipe, None):
            model, optimizer = setup(into)
            wanted = optimizer.sharded_state_dict(model[0].sharded_state_dict(), True)
            loaded = dist_checkpointing.load({"optimizer": wanted}, folder[0])["optimizer"]
            optimizer.load_state_dict(loaded)
            wanted = {name: straight[name] for name in rotated(model)}
            what = f"{recipe}: resumed with {into or 'bf16'}"
            assert_equal(masters(model, optimizer), wanted, what)
        dist.barrier()


def assert_equal(
    actual: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], what: str
) -> None:
    assert actual.keys() == wanted.keys(), (what, actual.keys() ^ wanted.keys())
    for name, value in wanted.items():
        assert torch.equal(actual[name], value), f"{what}: {name}"


def local_name(name: str) -> str:
    """The name of a grouped expert's weight in Megatron's own layers."""
    head, dot, tail = name.rpartition(".weight")
    if not tail:
        return name
    return head.replace(".experts.", f".experts.local_experts.{tail}.") + dot


def check_names() -> None:
    """Transformer Engine's weights are the same matrices as those of Megatron's own layers."""
    local, te = (
        {name: decided(p) for name, p in rotated(setup(impl=impl)[0]).items()}
        for impl in ("local", "transformer_engine")
    )
    assert {local_name(name) for name in te} == set(local), set(te) ^ set(local)
    for name, (info, decision) in te.items():
        other, same = local[local_name(name)]
        assert decision == same, (name, decision, same)
        assert (info.tp_axis, info.tp_size) == (other.tp_axis, other.tp_size), name


def check_refusals() -> None:
    """What has moved in Transformer Engine, and FP8 weights that would not be written, by name."""

    def init(**options: Any) -> Any:
        return te.fp8_model_init(recipe=Float8CurrentScaling(), **options)

    with init():
        not_kept = te.Linear(64, 64, bias=False)
    with init(preserve_high_precision_init_val=True):
        fp8 = te.Linear(64, 64, bias=False)
    for layer, says in (
        (te.LayerNormMLP(64, 128), "fc1_weight is of Transformer Engine's LayerNormMLP"),
        (te.Linear(64, 64, parallel_mode="column", tp_size=2), "weight is one rank's shard"),
        (not_kept, "weight has no get_high_precision_init_val"),
    ):
        with refused(SeamError, says):
            transformer_engine.check([layer], decisions(layer))
    with refused(ValueError, "weight is kept as Float8Tensor (--fp8-param-gather), which"):
        refuse_without_ranges(decisions(fp8))
    fp8.weight.clear_high_precision_init_val()
    with refused(ValueError, "weight: --pion-init found no value before rounding"):
        transformer_engine.start_from(fp8.weight, torch.zeros(64, 64), "weight")


def decisions(layer: torch.nn.Module) -> list[tuple[ParamInfo, Any, Any]]:
    triples = []
    for name, p in layer.named_parameters():
        info = ParamInfo(name=name, shape=tuple(p.shape))
        triples.append((info, p, classify(info, PionConfig())))
    return triples


@contextlib.contextmanager
def refused(kind: type[Exception], says: str) -> Iterator[None]:
    try:
        yield
    except kind as error:
        assert says in str(error), error
    else:
        raise AssertionError(f"not refused: {says}")


def main() -> None:
    check_refusals()
    check_names()
    model, optimizer = setup()
    plain = [trained(model, optimizer), *train(model, optimizer)]
    pions = len(rotated(model))
    assert pions >= 4 * ARGS.num_layers
    for recipe in BF16_RECIPES:
        check_bf16(recipe, plain)
    for recipe in RECIPES:
        check_fp8(recipe, plain)
    print(f"all checks passed: {pions} weights, {', '.join(RECIPES)}", flush=True)


if __name__ == "__main__":
    ARGS = parse_and_validate_args(add_arguments)
    initialize_megatron()
    main()
    dist.destroy_process_group()
