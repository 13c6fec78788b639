"""Named sets of options: the recommended ones, and those of the published runs."""

from __future__ import annotations

from dataclasses import replace

from .config import PionConfig

# Every option is given here, so that a change of PionConfig's defaults changes no published run.
_PAPER_1_3B = PionConfig(
    momentum="lie",
    direction="momentum",
    nesterov=False,
    betas=(0.9, 0.999),
    eps=1e-8,
    side="both",
    scaling="rms",
    rms=0.2,
    retraction="taylor",
    degree=2,
    qkv="qkv",
    split_gate=True,
    matmul_precision="highest",
    state_layout="packed",
    state_dtype="fp32",
    offload_state=False,
    team_size="auto",
    blocks=1,
    spectrum_reset_interval=0,
)

RECIPES: dict[str, PionConfig] = {
    "pretrain": PionConfig(),
    "finetune": PionConfig(),
    "paper-60m": replace(
        _PAPER_1_3B, momentum="transported", betas=(0.9, 0.95), side="alternate", qkv="head"
    ),
    "paper-1.3b": _PAPER_1_3B,
    "paper-rl": replace(_PAPER_1_3B, side="alternate"),
}
"""Options by name.

``pretrain``, the default, is for training from scratch; ``finetune`` is for trained weights. The
others are the options of the runs in arXiv 2605.12492 and stay as they are. Those runs also had
settings that no config holds:

- ``paper-60m``: 8 layers of 512, 9.6B tokens in batches of 512 times 256; lr 1e-3, by a cosine
  without warm-up to 1e-5; float32 masters.
- ``paper-1.3b``: 24 layers of 2048, 54B tokens in batches of 512 times 256; lr 5e-4, by a cosine
  without warm-up to 5e-6; bf16 without masters.
- ``paper-rl``: GRPO from trained weights, lr 1e-6.

Both pretraining runs began with standard deviation 0.02 in every layer, output projections too.
They clipped gradients at norm 1, did not tie embeddings, and left all but hidden matrices to AdamW.
"""


def in_bf16(name: str) -> PionConfig:
    """Return a recipe's options for a model that is trained in bf16.

    Such a model's gradients are rounded to 8 bits already. Rounding the products that only decide
    where a weight moves changes losses by less than seeds do (docs/TRAINING.md); by data sheets
    GPUs compute them 15 times as fast. With a bf16 average, state and masters take no more memory
    than AdamW's. The published options stay as they are.
    """
    config = RECIPES[name]
    own = name in ("pretrain", "finetune")
    return replace(config, matmul_precision="bf16", state_dtype="bf16") if own else config
