"""Transformer Engine: what is held on to in it, and weights that it keeps in FP8.

With ``--fp8-param-gather`` a model's weights are FP8 and the optimizer's float32 masters are what
is trained. Megatron's DistributedOptimizer starts masters from the values before rounding, writes
them with scales that all data-parallel ranks agree on, and gathers them, for Pion as for Adam.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pion_dist.classify import ParamInfo, Rotated, Scalar

from .seams import Seam, SeamError, missing

TESTED = "2.20.2"

_SIZES = ("in_features", "out_features")
LAYERS = tuple(
    Seam("transformer_engine.pytorch", name, "knows weights by name", parameters=parameters)
    for name, parameters in (
        ("Linear", (*_SIZES, "parallel_mode")),
        ("LayerNormLinear", (*_SIZES, "parallel_mode")),
        ("GroupedLinear", ("num_gemms", *_SIZES)),
    )
)

FP8_WEIGHTS = (
    Seam(
        "transformer_engine.pytorch.tensor",
        "QuantizedTensor",
        "tells weights that are kept in FP8",
        attributes=("dequantize", "quantize_"),
    ),
    Seam(
        "transformer_engine.pytorch",
        "fp8_model_init",
        "has Megatron keep weights as they were before rounding",
        parameters=("enabled", "recipe", "preserve_high_precision_init_val"),
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
    layers = [m for chunk in model_chunks for m in chunk.modules() if _layer_class(m)]
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
