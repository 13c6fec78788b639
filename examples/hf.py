"""What the scripts for Hugging Face models share: the model, its text, a tiny one."""

import json
from pathlib import Path
from typing import Any

import torch
from loop import ranks, shard_layers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)


def load_model(name: str, device: torch.device, *, shard: bool) -> Any:
    """Load a model in float32: on a device, or divided over all ranks by FSDP2, layer by layer."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    if not shard:
        return model.to(device)
    layers = [m for m in model.modules() if type(m).__name__ in model._no_split_modules]
    shard_layers(model, layers, init_device_mesh(device.type, (ranks()[1],)))
    return model


def save_trained(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write the model as Hugging Face does; all ranks do so together."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    if ranks()[0] == 0:
        model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """Prompt and response of every line of a .jsonl file that is not blank."""
    pairs = []
    with path.open(encoding="utf-8") as lines:  # splitlines() would also cut JSON at U+2028
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
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
