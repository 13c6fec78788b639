"""Transformer Engine: what is held on to in it, and weights that it keeps in FP8.

With ``--fp8-param-gather`` a model's weights are FP8 and the optimizer's float32 masters are what
is trained. Megatron's layer-wise optimizer has no part in that: it starts masters from the FP8
values, and writes each weight on the rank that steps it alone, so that the others get its bytes and
not its scales. Here masters start from the values before rounding, and are written as Megatron's
DistributedOptimizer writes them: by all data-parallel ranks together, with one scale.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pion_dist import Pion
from pion_dist.classify import ParamInfo, Rotated, Scalar

from .arguments import FP8_WEIGHT_RECIPES
from .seams import Seam, SeamError, missing

# Formats that are written as above: one scale a weight (--fp8-recipe delayed, tensorwise), or one a
# block. Megatron gathers MXFP8 as bf16, through a buffer that its layer-wise optimizer does not
# fill, and NVFP4 in a buffer of half the size.
FORMATS = ("Float8Tensor", "Float8BlockwiseQTensor")
TESTED = "2.20.2"

LAYERS = (
    Seam(
        "transformer_engine.pytorch",
        "Linear",
        "knows weights by name",
        parameters=("in_features", "out_features", "parallel_mode"),
    ),
    Seam(
        "transformer_engine.pytorch",
        "LayerNormLinear",
        "knows weights by name",
        parameters=("in_features", "out_features", "parallel_mode"),
    ),
    Seam(
        "transformer_engine.pytorch",
        "GroupedLinear",
        "knows weights by name",
        parameters=("num_gemms", "in_features", "out_features"),
    ),
)

FP8_WEIGHTS = (
    Seam(
        "transformer_engine.pytorch.tensor",
        "QuantizedTensor",
        "tells weights that are kept in FP8",
        attributes=("dequantize", "quantize_"),
    ),
    *(
        Seam(
            "transformer_engine.pytorch.tensor",
            name,
            "tells the formats whose scales ranks agree on",
            attributes=("dequantize", "quantize_"),
        )
        for name in FORMATS
    ),
    Seam(
        "transformer_engine.pytorch",
        "fp8_model_init",
        "has Megatron keep weights as they were before rounding",
        parameters=("enabled", "recipe", "preserve_high_precision_init_val"),
    ),
    Seam(
        "transformer_engine.pytorch.tensor.utils",
        "cast_master_weights_to_fp8",
        "has Megatron write masters into FP8",
        parameters=(
            "model_weights",
            "master_weights",
            "start_offsets",
            "group",
            "manual_post_all_gather_processing",
        ),
    ),
    Seam(
        "transformer_engine.pytorch.tensor.utils",
        "post_all_gather_processing",
        "has Megatron make the transposes of gathered weights",
        parameters=("model_weights",),
    ),
    Seam(
        "megatron.core.fp8_utils",
        "quantize_param_shard",
        "writes masters into FP8",
        parameters=("model_params", "main_params", "start_offsets", "data_parallel_group"),
    ),
    Seam(
        "megatron.core.optimizer.optimizer",
        "Float16OptimizerWithFloat16Params",
        "writes masters into FP8",
        attributes=("_copy_main_params_to_model_params",),
    ),
    *(
        Seam(
            f"megatron.core.optimizer.{module}",
            name,
            "gathers weights when all are stepped",
            attributes=("start_param_sync_for_bucket_group_subset",),
        )
        for module, name in (
            ("layer_wise_optimizer", "LayerWiseDistributedOptimizer"),
            ("distrib_optimizer", "DistributedOptimizer"),
        )
    ),
)


def installed() -> str | None:
    """Transformer Engine's version, or None where it is not installed or hidden (``--cpu``)."""
    try:
        found = importlib.util.find_spec("transformer_engine")
    except ValueError:  # None stands in sys.modules
        return None
    return importlib.metadata.version("transformer-engine") if found is not None else None


def is_fp8(param: Tensor) -> bool:
    """Whether a parameter is kept in FP8 or another format of Transformer Engine's."""
    utils: Any = importlib.import_module("megatron.core.fp8_utils")
    return bool(utils.is_float8tensor(param))


def check(
    model_chunks: Sequence[torch.nn.Module],
    decisions: Sequence[tuple[ParamInfo, torch.nn.Parameter, Rotated | Scalar]],
) -> None:
    """Check what is held on to of Transformer Engine, as far as the model's weights are its.

    Args:
        model_chunks: as get_megatron_optimizer gets them.
        decisions: ``parameters.decide`` of these chunks.

    Raises:
        SeamError: names the version and everything that is missing or has moved.
    """
    rotated = {p: info for info, p, decision in decisions if isinstance(decision, Rotated)}
    layers = [m for chunk in model_chunks for m in chunk.modules() if _is_layer(m)]
    fp8 = any(is_fp8(p) for p in rotated)
    if not layers and not fp8:
        return
    moved = missing((*LAYERS, *FP8_WEIGHTS) if fp8 else LAYERS)
    first: dict[str, str] = {}  # what is wrong, and the first weight of which it is
    for layer in layers:
        parallel, ranks = (getattr(layer, name, None) for name in ("parallel_mode", "tp_size"))
        cut = parallel in ("column", "row") and ranks != 1
        for leaf, p in layer.named_parameters(recurse=False):
            if p not in rotated:
                continue
            info = rotated[p]
            if not re.fullmatch(r"weight\d*", leaf):
                what = f"is of Transformer Engine's {_layer_class(layer)}, whose weights are named "
                first.setdefault(what + "weight or weight0, weight1, ...", info.name)
            if cut and info.tp_size == 1:
                first.setdefault("is one rank's shard without tensor_model_parallel", info.name)
            if is_fp8(p) and not hasattr(p, "get_high_precision_init_val"):
                what = "has no get_high_precision_init_val (starts masters before rounding)"
                first.setdefault(what, info.name)
    moved += [f"  {name} {what}" for what, name in first.items()]
    if moved:
        raise SeamError(
            f"transformer-engine {installed()} does not have what pion_dist holds on to; {TESTED} "
            "does:\n" + "\n".join(moved)
        )


def _layer_class(module: torch.nn.Module) -> str:
    """The name of the class of Transformer Engine's that a module is of, or an empty string."""
    own = (c for c in type(module).__mro__ if c.__module__.startswith("transformer_engine."))
    return next((c.__name__ for c in own), "")


def _is_layer(module: torch.nn.Module) -> bool:
    return bool(_layer_class(module))


def refuse_unwritable(
    model_chunks: Sequence[Any],
    decisions: Sequence[tuple[ParamInfo, torch.nn.Parameter, Rotated | Scalar]],
    config: Any,
) -> None:
    """Refuse FP8 weights of Pion's that this run's optimizer could not write.

    Args:
        model_chunks: as get_megatron_optimizer gets them.
        decisions: ``parameters.decide`` of these chunks.
        config: Megatron's OptimizerConfig.

    Raises:
        ValueError: names the first such weight, its format and what to do.
    """
    for info, p, decision in decisions:
        if not isinstance(decision, Rotated) or not is_fp8(p):
            continue
        weight = f"{info.name} is kept as {type(p).__name__} (--fp8-param-gather)"
        if type(p).__name__ not in FORMATS:
            raise ValueError(
                f"{weight}, which --optimizer pion does not support: use --fp8-recipe "
                f"{', '.join(FP8_WEIGHT_RECIPES)}, or leave --fp8-param-gather out"
            )
        ddp = getattr(model_chunks[0], "ddp_config", None)
        if not (
            config.bf16
            and config.use_layer_wise_distributed_optimizer
            and getattr(ddp, "use_distributed_optimizer", False)
        ):
            raise ValueError(
                f"{weight}, which --optimizer pion supports with --bf16, "
                "--use-distributed-optimizer and the layer-wise optimizer's parameter layout (by "
                "model_provider, without --no-use-layer-wise-param-layout): or leave "
                "--fp8-param-gather out"
            )


@torch.no_grad()
def start_from(param: torch.nn.Parameter, value: Tensor, name: str) -> None:
    """Give an FP8 weight another initial value, rounded in it and as it is for its master.

    Args:
        param: kept in FP8 (modified in place).
        value: of its shape.
        name: for the message.

    Raises:
        ValueError: the value before rounding is gone.
    """
    initial = before_rounding(param)
    if initial is None:
        raise ValueError(
            f"{name}: --pion-init found no value before rounding to FP8, which Transformer Engine "
            "keeps until an optimizer has written the weight: make the model anew, or use "
            "--pion-init keep"
        )
    initial.copy_(value)
    param.copy_(value)


def before_rounding(param: Tensor) -> Tensor | None:
    """An FP8 weight's initial value, until an optimizer has written the weight; else None."""
    get = getattr(param, "get_high_precision_init_val", None)
    return None if get is None else get()


def attach(
    optimizer: Any,
    decisions: Sequence[tuple[ParamInfo, torch.nn.Parameter, Rotated | Scalar]],
) -> None:
    """Have masters of FP8 weights started and written as they should be (modified in place).

    Args:
        optimizer: what get_megatron_optimizer made; ``refuse_unwritable`` has found nothing.
        decisions: ``parameters.decide`` of its model.
    """
    fp8 = [p for _, p, decision in decisions if isinstance(decision, Rotated) and is_fp8(p)]
    if not fp8:
        return
    found = list(_layer_wise(optimizer))
    for layer_wise in found:
        groups = layer_wise.pg_collection
        # In the model's order, which is the same on all ranks that have these weights.
        everyone = [
            ([p for p in fp8 if getattr(p, "allreduce", True)], groups.dp_cp),
            ([p for p in fp8 if not getattr(p, "allreduce", True)], groups.expt_dp),
        ]
        for leaf in layer_wise.chained_optimizers:
            if isinstance(leaf.optimizer, Pion):
                _start(leaf)
                leaf._copy_main_params_to_model_params = functools.partial(_write, leaf, everyone)
    if optimizer not in found:
        _gather_last(optimizer)


def _gather_last(chain: Any) -> None:
    """Gather weights once all optimizers of a chain have stepped (modified in place).

    Megatron has each gather its own, but with FP8 weights what is not FP8 joins the last group of
    FP8 buckets: the layer-wise optimizer, which steps first, gathers Adam's parameters in it before
    they are stepped, and Adam leaves them to it.
    """
    *first, last = chain.chained_optimizers
    for each in first:
        each.start_param_sync_for_bucket_group_subset = lambda: None

    def gather() -> None:
        for chunk in last.model_chunks:
            chunk.start_param_sync()

    last.start_param_sync_for_bucket_group_subset = gather


def _layer_wise(optimizer: Any) -> Iterator[Any]:
    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer

    if isinstance(optimizer, LayerWiseDistributedOptimizer):
        yield optimizer
        return
    for each in getattr(optimizer, "chained_optimizers", ()):
        yield from _layer_wise(each)


def _pairs(leaf: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """The weights that are not float32 of an optimizer on this rank, and their masters."""
    for weights, masters in zip(leaf.float16_groups, leaf.fp32_from_float16_groups, strict=True):
        yield from zip(weights, masters, strict=True)


@torch.no_grad()
def _start(leaf: Any) -> None:
    for weight, master in _pairs(leaf):
        initial = before_rounding(weight) if is_fp8(weight) else None
        if initial is not None:
            master.copy_(initial)


@torch.no_grad()
def _write(leaf: Any, everyone: Sequence[tuple[Sequence[Tensor], Any]]) -> None:
    """Write masters into their weights; a collective of the data-parallel ranks.

    Args:
        leaf: the Float16OptimizerWithFloat16Params around Pion.
        everyone: all FP8 weights of Pion's, whichever rank steps them, and the group of each.
    """
    from megatron.core.fp8_utils import quantize_param_shard

    masters = dict(_pairs(leaf))
    for weight, master in masters.items():
        if not is_fp8(weight):
            weight.data.copy_(master)
    for weights, group in everyone:
        flat = [masters[w].view(-1) if w in masters else None for w in weights]
        quantize_param_shard(weights, flat, [None if m is None else 0 for m in flat], group)
