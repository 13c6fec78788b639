"""Which parameters of a PyTorch model are Pion's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from .classify import ParamInfo, Rotated, classify
from .config import PionConfig

Named = list[tuple[str, nn.Parameter]]


def split_parameters(model: nn.Module, *, exclude: Sequence[str] = ()) -> tuple[Named, Named]:
    """Pion's parameters of a model and the others, which are AdamW's, each with its name.

    2-D weights are Pion's, but for embeddings, the output layer and what ``exclude`` names. The
    output layer is what the model's ``get_output_embeddings`` returns, which Hugging Face's models
    have; name that of another model, and classification or value heads. Of a weight that is shared
    with an embedding, the embedding decides. Frozen parameters are in neither list.

    A weight in which a model has fused others (as ``qkv_proj``, ``gate_up_proj``) is one matrix to
    Pion unless its ``views`` say otherwise; 3-D weights of fused experts are AdamW's. A weight that
    starts as zeros, such as LoRA's second factor, would stay zero under Pion: ``exclude`` it.

    Args:
        model: before it is wrapped.
        exclude: regular expressions, searched in a parameter's name.

    Returns:
        Names and parameters for ``Pion`` and for AdamW, in the model's order.
    """
    outside = [m for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    find_output: Any = getattr(model, "get_output_embeddings", None)
    if find_output is not None and (output := find_output()) is not None:
        outside.append(output)
    kept = {p for module in outside for p in module.parameters()}
    pion: Named = []
    others: Named = []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        info = ParamInfo(name=name, shape=tuple(p.shape), embedding_or_output=p in kept)
        decision = classify(info, PionConfig(), exclude=exclude)
        (pion if isinstance(decision, Rotated) else others).append((name, p))
    return pion, others
