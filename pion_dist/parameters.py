"""Which of a PyTorch model's parameters are Pion's."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

from torch import nn

from . import dtensor
from .classify import ZEROS, ParamInfo, Rotated, classify
from .config import PionConfig
from .matrices import shape_of_rows

logger = logging.getLogger("pion_dist")

Named = list[tuple[str, nn.Parameter]]


def split_parameters(model: nn.Module, *, exclude: Sequence[str] = ()) -> tuple[Named, Named]:
    """Split a model's named parameters into Pion's and the others, which are AdamW's.

    2-D weights are Pion's, but for embeddings, output layers, biases, weights of zeros and what
    ``exclude`` names. An output layer is what ``get_output_embeddings`` returns, which Hugging
    Face's models have; name that of another model, and classification or value heads. Of a weight
    that is shared with an embedding, the embedding decides. Frozen parameters are in neither list.

    A weight of zeros, such as LoRA's second factor, would stay zero under Pion, so that it is
    AdamW's and the log names it. Hence call this when the model has its initial weights, and load a
    checkpoint's afterwards, at a resume too: what has moved from zero in the meantime would become
    Pion's, and the state would not fit. Memory that nothing has filled yet (``skip_init``) may be
    zeros by chance; weights on the meta device are not looked at.

    A weight in which a model has fused others (as ``qkv_proj``, ``gate_up_proj``) is one matrix to
    Pion unless its ``views`` say otherwise. A 3-D parameter of a module called ``experts`` is a
    matrix for each expert; other 3-D ones, as of convolutions, are AdamW's.

    Args:
        model: it may be wrapped by DistributedDataParallel, ``torch.compile`` or PEFT, or have
            modules that are: parameters have the names of the bare model then. And by
            ``fully_shard``: all of its ranks call this, since they look at weights together.
        exclude: regular expressions, searched in a parameter's name.

    Returns:
        Names and parameters for ``Pion`` and for AdamW, in the model's order.

    Raises:
        ValueError: FullyShardedDataParallel has flattened weights.
    """
    for path, module in model.named_modules():
        if why := dtensor.flattened_by(module):
            raise ValueError(f"{path or 'the model'} {why}")
    outside = [m for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    kept = {p for module in [*outside, *_output_layers(model)] for p in module.parameters()}
    added = _added_by_wrappers(model)
    pion: Named = []
    others: Named = []
    zeros = []
    for path, p in model.named_parameters():
        if not p.requires_grad:
            continue
        name = _bare_name(path, added)
        shape = shape_of_rows(p) if _fused_experts(name, p) else p.shape
        info = ParamInfo(name=name, shape=tuple(shape), embedding_or_output=p in kept)
        decision = classify(info, PionConfig(), exclude=exclude)
        if isinstance(decision, Rotated) and not p.is_meta and not dtensor.any_nonzero(p):
            decision = ZEROS
            zeros.append(name)
        (pion if isinstance(decision, Rotated) else others).append((name, p))
    if zeros:
        logger.warning("AdamW's, not Pion's: %s, which %s", ", ".join(zeros), ZEROS.reason)
    return pion, others


def _fused_experts(name: str, p: nn.Parameter) -> bool:
    """Whether a parameter is a matrix for each expert, as Hugging Face's MoE layers store them."""
    return p.dim() == 3 and "experts" in name.split(".")[:-1]


def _output_layers(model: nn.Module) -> Iterator[nn.Module]:
    """What the model, or a model in it, calls its output layer."""
    for module in model.modules():
        # The class is asked, since wrappers hand attributes on to what they wrap.
        if hasattr(type(module), "get_output_embeddings"):
            output = module.get_output_embeddings()  # type: ignore[operator]
            if output is not None:
                yield output


def _added_by_wrappers(model: nn.Module) -> set[str]:
    """The paths of modules whose last word a wrapper has put into the names below them."""
    paths = {module: path for path, module in model.named_modules(remove_duplicate=True)}
    added = set()
    for wrapper, path in paths.items():
        for inner in _wrapped(wrapper):
            if (end := paths.get(inner)) is None:
                continue
            words = end.split(".")
            start = path.count(".") + 1 if path else 0
            added |= {".".join(words[: stop + 1]) for stop in range(start, len(words))}
    return added


def _wrapped(module: nn.Module) -> Iterator[nn.Module]:
    """The bare model in a wrapper."""
    if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        yield module.module
    elif "_orig_mod" in module._modules:  # torch.compile's OptimizedModule
        yield module.get_submodule("_orig_mod")
    elif hasattr(type(module), "get_base_model"):  # PEFT's PeftModel
        yield module.get_base_model()  # type: ignore[operator]


def _bare_name(path: str, added: set[str]) -> str:
    words = path.split(".")
    return ".".join(w for i, w in enumerate(words) if ".".join(words[: i + 1]) not in added)
