"""What sft.py and rl.py share: ranks, the optimizer and its schedule, checkpoints, a tiny model."""

import json
import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from pion_dist import RECIPES, PionWithAdamW

CLIP = 1.0  # norm of the gradient


def join() -> None:
    """Join torchrun's ranks, if it started this process."""
    if "RANK" not in os.environ:
        return
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def leave() -> None:
    """Leave the ranks and, on CPUs, end the process: call it last."""
    if not dist.is_initialized():
        return
    dist.destroy_process_group()
    if not torch.cuda.is_available():
        # FSDP2 keeps gloo's threads alive. While Python ends, one that still has to let go of a
        # tensor would abort the process.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def ranks() -> tuple[int, int]:
    """This rank and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def mean_of_ranks(x: torch.Tensor) -> float:
    """The mean of a scalar over all ranks."""
    total = x.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.item() / ranks()[1]


def load_model(name: str, device: torch.device, *, shard: bool) -> Any:
    """Load a model in float32: on a device, or divided over all ranks by FSDP2, layer by layer."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    if not shard:
        return model.to(device)
    options: dict[str, Any] = {"mesh": init_device_mesh(device.type, (ranks()[1],))}
    if device.type == "cuda":
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for module in model.modules():
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, **options)
    return fully_shard(model, **options)


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


def save(folder: Path, scheduled: Scheduled, step: int) -> None:
    """Write a checkpoint in place of the last one; all ranks do so together.

    One is whole at any moment: under the folder's name, or the last one beside it.
    """
    part, last = folder.with_suffix(".part"), folder.with_suffix(".last")
    dcp.save(_states(scheduled, step), checkpoint_id=part)  # returns when all ranks have written
    if ranks()[0] == 0:
        if folder.exists():
            shutil.rmtree(last, ignore_errors=True)
            os.replace(folder, last)
        os.replace(part, folder)
        shutil.rmtree(last, ignore_errors=True)


def resume(folder: Path, scheduled: Scheduled) -> int:
    """Load a checkpoint of any number of ranks if there is one; the number of steps taken."""
    if not folder.exists():  # stopped while the last one was replaced
        folder = folder.with_suffix(".last")
    if not folder.exists():
        return 0
    states = _states(scheduled, 0)
    dcp.load(states, checkpoint_id=folder)
    set_state_dict(
        scheduled.model,
        scheduled.optimizer,
        model_state_dict=states["model"],
        optim_state_dict=states["optimizer"],
    )
    scheduled.schedule.load_state_dict(states["schedule"])
    return int(states["step"])


def _states(scheduled: Scheduled, step: int) -> dict[str, Any]:
    model, optimizer = get_state_dict(scheduled.model, scheduled.optimizer)
    schedule = scheduled.schedule.state_dict()
    return {"model": model, "optimizer": optimizer, "schedule": schedule, "step": step}


def save_trained(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write the model as Hugging Face does; all ranks do so together."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    if ranks()[0] == 0:
        model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)


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
