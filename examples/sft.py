"""Fine-tune a Hugging Face causal LM with Pion and AdamW together, in plain PyTorch.

    python examples/sft.py --model MODEL --data pairs.jsonl --out OUT
    torchrun --nproc-per-node 8 examples/sft.py ...     # data parallel
    torchrun --nproc-per-node 8 examples/sft.py --shard ...   # FSDP2: an eighth of the model each
    python examples/sft.py --smoke --out OUT            # a tiny model, on the CPU, offline

MODEL is a name or a folder; a line of the data is {"prompt": ..., "response": ...}. The loss is the
mean over the responses' tokens in the batch of all ranks. Weights are float32, products bf16 on a
GPU. A run that was stopped goes on from its last checkpoint when it is started again, on any number
of ranks, sharded or not. It then keeps the checkpoint's learning rates, whatever --lr and --adam-lr
say. The trained model is in OUT/model.
"""

import argparse
import functools
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hf import (
    load_model,
    prompt_text,
    read_pairs,
    save_trained,
    tiny_model,
    tiny_sums,
)
from loop import Scheduled, join, leave, mean_of_ranks, ranks, resume, save, sum_of_ranks
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoTokenizer

from pion_dist import RECIPES

IGNORED = -100  # a label that the loss leaves out

Example = tuple[list[int], list[int]]  # tokens, labels


def encode(tokenizer: Any, prompt: str, response: str, max_length: int) -> Example:
    """Tokens of both, and labels of the response and the end of text."""
    text, special = prompt_text(tokenizer, prompt)
    before = tokenizer(text, add_special_tokens=special)["input_ids"]
    after = tokenizer(response, add_special_tokens=False)["input_ids"]
    after = [*after, tokenizer.eos_token_id]
    return (before + after)[:max_length], ([IGNORED] * len(before) + after)[:max_length]


def read_examples(tokenizer: Any, args: argparse.Namespace) -> list[Example]:
    """The examples of --data that have a token to learn; the first token is never predicted."""
    encoded = [encode(tokenizer, *pair, args.max_length) for pair in read_pairs(args.data)]
    examples = [each for each in encoded if any(label != IGNORED for label in each[1][1:])]
    if not examples:
        raise SystemExit(f"{args.data}: no response within --max-length {args.max_length}")
    return examples


def steps_of(args: argparse.Namespace, count: int) -> int:
    """The steps of a run, the same on any number of ranks."""
    steps: int = args.steps or max(1, args.epochs * count // args.batch)
    return steps


def batch_of(examples: list[Example], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Examples filled up to the longest."""
    length = max(len(tokens) for tokens, _ in examples)
    rows = [
        (
            tokens + [pad] * (length - len(tokens)),
            [1] * len(tokens) + [0] * (length - len(tokens)),
            labels + [IGNORED] * (length - len(labels)),
        )
        for tokens, labels in examples
    ]
    names = ("input_ids", "attention_mask", "labels")
    return {
        name: torch.tensor(each, device=device)
        for name, each in zip(names, zip(*rows, strict=True), strict=True)
    }


@functools.lru_cache(maxsize=2)
def order(epoch: int, count: int) -> list[int]:
    """The examples shuffled, anew for each epoch and the same when a run goes on."""
    shuffled: list[int] = torch.randperm(
        count, generator=torch.Generator().manual_seed(epoch)
    ).tolist()
    return shuffled


def chosen(step: int, batch: int, count: int) -> list[int]:
    """The examples of a step."""
    places = range(step * batch, (step + 1) * batch)
    return [order(place // count, count)[place % count] for place in places]


def train(args: argparse.Namespace) -> None:
    """Train and save the model."""
    rank, size = ranks()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")  # the process's own, see main
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = load_model(args.model, device, shard=args.shard)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    examples = read_examples(tokenizer, args)
    steps = steps_of(args, len(examples))
    scheduled = Scheduled(model, recipe=args.recipe, lr=args.lr, adam_lr=args.adam_lr, steps=steps)
    checkpoint = args.out / "checkpoint"
    start = resume(checkpoint, scheduled)
    wrapped = DistributedDataParallel(model) if size > 1 and not args.shard else model
    model.train()
    for step in range(start, steps):
        torch.manual_seed(step * size + rank)  # of dropout: a run that goes on has the same
        indices = chosen(step, args.batch, len(examples))[rank::size]
        batch = batch_of([examples[i] for i in indices], pad, device)
        tokens = (batch["labels"][:, 1:] != IGNORED).sum()  # of the rank's own mean
        with torch.autocast(device.type, torch.bfloat16, enabled=gpu):
            loss = wrapped(**batch).loss * (tokens * size / sum_of_ranks(tokens))
        loss.backward()  # ranks' gradients are averaged: that of the mean over all tokens
        scheduled.step()
        if step % args.log_every == 0 or step + 1 == steps:
            mean = mean_of_ranks(loss)
            if rank == 0:
                print(f"step {step + 1}/{steps}  loss {mean:.6f}", flush=True)
        if (step + 1) % args.save_every == 0 or step + 1 == steps:
            save(checkpoint, scheduled, step + 1)
    save_trained(model, tokenizer, args.out / "model")


def arguments(doc: str) -> argparse.ArgumentParser:
    """The options, under the first line of a script's docstring."""
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("--model", help="Hugging Face name or folder")
    parser.add_argument("--data", type=Path, help=".jsonl of prompt and response")
    parser.add_argument("--out", type=Path, default=Path("sft_out"), help="default: %(default)s")
    parser.add_argument("--recipe", choices=RECIPES, default="finetune")
    # First guesses for a trained model of billions; tuned nowhere.
    parser.add_argument("--lr", type=float, default=2e-5, help="Pion's; default: %(default)s")
    parser.add_argument("--adam-lr", type=float, default=1e-5, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=8, help="of all ranks; default: %(default)s")
    parser.add_argument("--epochs", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=0, help="in place of --epochs")
    parser.add_argument("--max-length", type=int, default=2048, help="default: %(default)s")
    parser.add_argument("--log-every", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--save-every", type=int, default=200, help="default: %(default)s")
    parser.add_argument(
        "--shard", action="store_true", help="divide the model over torchrun's ranks"
    )
    parser.add_argument("--smoke", action="store_true", help="a tiny model learns to add digits")
    return parser


def smoke(args: argparse.Namespace) -> None:
    """Write a tiny model and its data, and set the options for them."""
    torch.set_num_threads(1)  # more would only wait for each other, for long on a busy machine
    args.model, args.data = str(args.out / "tiny"), args.out / "sums.jsonl"
    if ranks()[0] == 0:
        tiny_model(args.out / "tiny")
        tiny_sums(args.data)
    if dist.is_initialized():
        dist.barrier()
    # 20 of 100 sums, or as many as the ranks divide.
    size = ranks()[1]
    args.lr, args.adam_lr, args.batch = 1e-2, 1e-2, max(1, 20 // size) * size
    args.steps = args.steps or 100


def divided(parser: argparse.ArgumentParser, batch: int, size: int) -> int:
    """The share of --batch that each of all ranks has; refuse what does not divide."""
    if batch < 1 or batch % size:
        fits = max(1, batch // size) * size
        parser.error(
            f"--batch {batch}: must be a positive multiple of {size} (the ranks, which divide it): "
            f"give --batch {fits}"
        )
    return batch // size


def main() -> None:
    parser = arguments(__doc__)
    args = parser.parse_args()
    join()
    if args.shard and not dist.is_initialized():
        parser.error("--shard divides the model over ranks: start it with torchrun")
    if args.smoke:
        smoke(args)
    elif not (args.model and args.data):
        parser.error("give --model and --data, or --smoke")
    divided(parser, args.batch, ranks()[1])
    train(args)
    leave()


if __name__ == "__main__":
    main()
