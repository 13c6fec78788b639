"""What sft.py and rl.py share: the optimizer and its schedule, checkpoints, a tiny model."""

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pion_dist import RECIPES, PionWithAdamW

CLIP = 1.0  # norm of the gradient
STATES = ("model", "optimizer", "schedule")  # of a checkpoint


class Scheduled:
    """PionWithAdamW on a schedule: warm-up, then a cosine to 10%.

    Args:
        model: not wrapped.
        recipe: of Pion's options.
        lr: Pion's; by default steps have the root mean square of AdamW's, 0.2 lr.
        adam_lr: AdamW's.
        steps: of the whole run.
    """

    def __init__(
        self, model: torch.nn.Module, *, recipe: str, lr: float, adam_lr: float, steps: int
    ) -> None:
        self.model = model
        self.optimizer = PionWithAdamW(
            model,
            adam_lr,
            pion_lr_mult=lr / adam_lr,
            config=RECIPES[recipe],
            adamw={"betas": (0.9, 0.95), "weight_decay": 0.0},
        )
        warmup = max(1, steps // 20)

        def scale(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            share = (step - warmup) / max(1, steps - warmup)
            return 0.55 + 0.45 * math.cos(math.pi * min(1.0, share))

        self.schedule = LambdaLR(self.optimizer, scale)

    def step(self) -> None:
        """Clip, step, clear the gradients."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)


def save(path: Path, scheduled: Scheduled, step: int) -> None:
    """Write a checkpoint, which is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    states = {name: getattr(scheduled, name).state_dict() for name in STATES}
    torch.save(states | {"step": step}, part)
    os.replace(part, path)


def resume(path: Path, scheduled: Scheduled) -> int:
    """Load a checkpoint if there is one; the number of steps taken."""
    if not path.exists():
        return 0
    states = torch.load(path, map_location="cpu", weights_only=True)
    for name in STATES:
        getattr(scheduled, name).load_state_dict(states[name])
    return int(states["step"])


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """Prompt and response of every line of a .jsonl file."""
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            pairs.append((str(record["prompt"]), str(record["response"])))
        except (ValueError, KeyError, TypeError) as error:
            raise SystemExit(
                f"{path}, line {number}: must be an object with prompt and response: {error!r}"
            ) from error
    return pairs


def prompt_text(tokenizer: Any, prompt: str) -> tuple[str, bool]:
    """The prompt in the model's chat format, if it has one; whether special tokens are to come."""
    if not tokenizer.chat_template:
        return prompt, True
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return str(text), False


def tiny_model(folder: Path) -> None:
    """Write a random Llama of 0.1M parameters with a tokenizer of bytes, as any model is saved."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>"
    )
    torch.manual_seed(0)
    width = 64
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        # Pion keeps the singular values: Hugging Face's 0.02 would bind the whole run.
        initializer_range=width**-0.5,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def tiny_sums(path: Path) -> None:
    """Write all sums of two digits as prompts and responses."""
    sums = [{"prompt": f"{a}+{b}=", "response": str(a + b)} for a in range(10) for b in range(10)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(each) + "\n" for each in sums))
