"""What Pion has to know of a Megatron model's parameters: global names, geometry, decisions."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate

from pion_dist import PionConfig
from pion_dist.classify import ZEROS, ParamInfo, Rotated, Scalar, classify, query_group

from . import transformer_engine
from .process_groups import of_all_ranks, rank

logger = logging.getLogger("pion_dist")

_DECISION = "pion_decision"
Decisions = Sequence[tuple[ParamInfo, torch.nn.Parameter, Rotated | Scalar]]


def named_parameters(
    model_chunks: Sequence[torch.nn.Module],
) -> Iterator[tuple[ParamInfo, torch.nn.Parameter]]:
    """Every trainable parameter of this rank with what a decision needs, in the model's order.

    Args:
        model_chunks: as get_megatron_optimizer gets them, wrapped or not.
    """
    for chunk in model_chunks:
        modules = dict(chunk.named_modules())
        for name, param in chunk.named_parameters():
            if param.requires_grad:
                yield _info(name, param, modules, chunk.config), param


def _info(
    name: str, param: torch.nn.Parameter, modules: dict[str, Any], model_config: Any
) -> ParamInfo:
    path, _, leaf = name.rpartition(".")
    parent_path, _, linear = path.rpartition(".")
    parent = modules[parent_path]
    config: Any = getattr(parent, "config", None) or model_config
    geometry: dict[str, Any] = {}
    if leaf == "weight" and linear == "linear_qkv" and param.dim() == 2:
        heads = config.num_attention_heads // config.num_query_groups
        geometry = {  # as Attention.get_query_key_value_tensors cuts it
            "qkv": query_group(config.kv_channels, heads=heads, gated=config.attention_output_gate),
            "head_dim": config.kv_channels,
            "split_groups": config.num_query_groups < config.tensor_model_parallel_size,
        }
    elif re.fullmatch(r"weight\d*", leaf) and linear == "linear_fc1":
        geometry = {
            "gated": bool(config.gated_linear_unit),
            "gate_interleave": getattr(config, "moe_mlp_glu_interleave_size", None) or 0,
        }
    if getattr(param, "tensor_model_parallel", False):
        partition_dim: int = getattr(param, "partition_dim")  # noqa: B009
        geometry["tp_axis"] = "rows" if partition_dim == 0 else "cols"
        geometry["tp_size"] = _tp_size(name, config)
        if linear == "in_proj" and geometry["tp_size"] > 1:
            geometry["unsupported"] = (
                "each rank has rows of all of Mamba's projections; with "
                "--tensor-model-parallel-size above 1 leave the weight to Adam with "
                "--pion-exclude in_proj"
            )
    return ParamInfo(
        name=_global_name(name, modules),
        shape=tuple(param.shape),
        embedding_or_output=bool(getattr(param, "is_embedding_or_output_parameter", False)),
        initialized=_initialized(path, modules),
        **geometry,
    )


def _initialized(path: str, modules: dict[str, Any]) -> bool:
    """Whether a module's weights have initial values, by the nearest config that says so.

    An adapter that is added to a model without them, which is to be loaded, can have its own.
    """
    words = path.split(".")
    for length in range(len(words), -1, -1):
        config: Any = getattr(modules[".".join(words[:length])], "config", None)
        if hasattr(config, "perform_initialization"):
            on_meta = getattr(config, "init_model_with_meta_device", False)
            return bool(config.perform_initialization and not on_meta)
    return True


def _tp_size(name: str, config: Any) -> int:
    size = config.expert_tensor_parallel_size if is_expert(name) else None
    return int(size or config.tensor_model_parallel_size)


def is_expert(name: str) -> bool:
    """Whether a parameter is a routed expert's: the rule by which Megatron picks its groups."""
    return "experts" in name and "shared" not in name


def _global_name(name: str, modules: dict[str, Any]) -> str:
    """The parameter's name without wrappers, its layer and expert numbered in the whole model."""
    path = name.split(".")
    parts = list(path)
    for position in range(1, len(path)):
        module: Any = modules.get(".".join(path[: position + 1]))
        number = getattr(module, "layer_number", None)
        if path[position - 1] == "layers" and path[position].isdigit() and isinstance(number, int):
            parts[position] = str(number - 1)
        if path[position] == "experts" and getattr(module, "ep_group", None) is not None:
            first = module.ep_group.rank() * module.num_local_experts  # of this rank's experts
            if path[position + 1] == "local_experts":
                parts[position + 2] = str(first + int(path[position + 2]))
            elif found := re.fullmatch(r"(weight|bias)(\d+)", path[-1]):  # linear_fc1.weight0
                parts[-1] = f"{found[1]}{first + int(found[2])}"
    while parts[0] == "module":
        parts.pop(0)
    return ".".join(parts)


def decide(
    model_chunks: Sequence[torch.nn.Module], config: PionConfig, *, exclude: Sequence[str]
) -> Decisions:
    """Classify every parameter of this rank and note the decision on it; a collective of all ranks.

    A weight with a matrix of zeros is Adam's on all ranks that have a piece or a copy of it. What a
    parameter starts with is looked at once, the first time that it is seen here: before buffers are
    made, and before a checkpoint is loaded. So a resume decides as the start did.

    Raises:
        ValueError: a fused weight's rows do not fit its geometry.
    """
    decisions = [
        (info, param, classify(info, config, exclude=exclude))
        for info, param in named_parameters(model_chunks)
    ]
    unseen = [
        (info, param, decision)
        for info, param, decision in decisions
        if isinstance(decision, Rotated)
        and not (isinstance(_noted(param), Rotated) or _noted(param) == ZEROS)
    ]
    zeros = _with_zeros(unseen)
    if zeros and rank() == 0:
        logger.warning("Adam's, not Pion's: %s, which %s", ", ".join(sorted(zeros)), ZEROS.reason)
    decisions = [
        (info, param, ZEROS)
        if isinstance(decision, Rotated) and (info.name in zeros or _noted(param) == ZEROS)
        else (info, param, decision)
        for info, param, decision in decisions
    ]
    for info, param, decision in decisions:
        setattr(param, _DECISION, (info, decision))
    return decisions


def _noted(param: torch.Tensor) -> Rotated | Scalar | None:
    """The decision that an earlier call has noted of a parameter."""
    return decided(param)[1] if hasattr(param, _DECISION) else None


def _with_zeros(weights: Sequence[tuple[ParamInfo, torch.nn.Parameter, Rotated]]) -> set[str]:
    """Names of all ranks' weights of which a matrix is zero; a collective of all ranks.

    A matrix is zero if it is on every rank that has a piece or a copy of it: shards of tensor
    parallelism have the name of their weight in common, and replicas have too.
    """
    zero: set[tuple[str, str, int, int]] = set()
    others: set[tuple[str, str, int, int]] = set()
    for info, param, decision in weights:
        values = _initial_values(param) if info.initialized else None
        if values is None:
            continue
        # Where ranks are dealt whole matrices, each has its own.
        dealt = decision.ranks > 1 and decision.view.axis is None and not decision.of_whole
        own = rank() if dealt else -1
        if decision.of_whole:
            values = _among_zeros(values, decision)
        for part in decision.view.shapes:
            for index, nonzero in enumerate(decision.view.nonzero(values, part).tolist()):
                (others if nonzero else zero).add((info.name, part, index, own))
    anywhere = set().union(*of_all_ranks(zero))
    if anywhere:
        anywhere -= set().union(*of_all_ranks(anywhere & others))
    return {name for name, *_ in anywhere}


def _among_zeros(shard: torch.Tensor, decision: Rotated) -> torch.Tensor:
    """The whole weight of which this rank has a run of rows, the others' being zeros."""
    whole = shard.new_zeros(decision.view.rows, decision.view.cols)
    whole.chunk(decision.ranks)[parallel_state.get_tensor_model_parallel_rank()].copy_(shard)
    return whole


def _initial_values(param: torch.nn.Parameter) -> torch.Tensor | None:
    """What a parameter starts with, or None where that is not known."""
    if transformer_engine.is_fp8(param):
        return transformer_engine.before_rounding(param)
    return None if param.is_meta else param.detach()


def decided(param: torch.Tensor) -> tuple[ParamInfo, Rotated | Scalar]:
    """What ``decide`` has noted of a parameter.

    Raises:
        RuntimeError: ``decide`` has not seen it.
    """
    if not hasattr(param, _DECISION):
        raise RuntimeError(
            "--optimizer pion: get_megatron_optimizer was imported by name before "
            "megatron_patches.apply() ran; call apply() first"
        )
    info, decision = getattr(param, _DECISION)
    return info, decision


def is_scalar(param: torch.Tensor) -> bool:
    """Whether a parameter is not Pion's."""
    return isinstance(decided(param)[1], Scalar)


# Megatron's key of the parameters that are Adam's.
NOT_PION = ParamKey(predicate=ParamPredicate(name="not_pion", fn=is_scalar))
