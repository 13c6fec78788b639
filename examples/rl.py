"""Reinforce a Hugging Face causal LM's right answers, with Pion and AdamW in plain PyTorch.

    python examples/rl.py --model MODEL --data pairs.jsonl --out OUT
    torchrun --nproc-per-node 8 examples/rl.py --shard ...   # FSDP2: an eighth of the model each
    python examples/rl.py --smoke --out OUT    # a tiny model, half trained before, on the CPU

A line of the data is {"prompt": ..., "response": ...}; the reward of an answer is 1 if it is the
response and 0 if not. A step samples a group of answers to each of some prompts, and follows the
policy gradient with each reward less its group's mean, over their standard deviation (GRPO's
advantage; one update for each batch of answers, so there is no ratio to clip, and no KL term). With
--shard each rank has prompts of its own. The trained model is in OUT/model.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hf import load_model, prompt_text, read_pairs, save_trained
from loop import Scheduled, join, leave, mean_of_ranks, ranks
from transformers import AutoTokenizer

from pion_dist import RECIPES


def answers(
    model: Any, tokenizer: Any, prompts: list[str], group: int, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts with ``group`` sampled answers each, and where the answers are; 0: the likeliest one.

    Returns:
        Tokens [N, T], prompts filled up on the left, and a mask [N, T] of the answers with their
        end of text.
    """
    texts = [prompt_text(tokenizer, prompt) for prompt in prompts]
    inputs = tokenizer(
        [text for text, _ in texts],
        return_tensors="pt",
        padding=True,
        padding_side="left",
        add_special_tokens=texts[0][1],
    )
    start = inputs["input_ids"].shape[1]
    how: dict[str, Any] = {"do_sample": False}
    if group:  # from the model's own probabilities, whatever its generation_config says
        how = {"do_sample": True, "num_return_sequences": group}
        how |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    tokens = model.generate(
        input_ids=inputs["input_ids"].to(model.device),
        attention_mask=inputs["attention_mask"].to(model.device),
        max_new_tokens=length,
        pad_token_id=tokenizer.pad_token_id,
        synced_gpus=dist.is_initialized(),  # a sharded model's layers are gathered by all
        **how,
    )
    ended = (tokens[:, start:] == tokenizer.eos_token_id).int().cumsum(dim=1)
    first = torch.nn.functional.pad(ended, (1, 0))[:, :-1] == 0  # the end itself is in it
    return tokens, torch.nn.functional.pad(first, (start, 0))


def rewards(tokenizer: Any, tokens: torch.Tensor, mask: torch.Tensor, right: list[str]) -> Any:
    """1 for each row whose answer is the right one."""
    texts = [
        tokenizer.decode(row[where], skip_special_tokens=True).strip()
        for row, where in zip(tokens, mask, strict=True)
    ]
    each = len(texts) // len(right)
    same = [text == right[i // each].strip() for i, text in enumerate(texts)]
    return torch.tensor(same, dtype=torch.float32, device=tokens.device)


def policy_loss(
    model: Any, tokens: torch.Tensor, mask: torch.Tensor, advantages: torch.Tensor, pad: int
) -> torch.Tensor:
    """Minus the answers' log-probability times their advantage, a sum over their tokens."""
    # What fills up on the left is no text; a token after it may be the same one (an end of text).
    seen = (tokens != pad).int().cumsum(dim=1).clamp(max=1)
    places = (seen.cumsum(dim=1) - 1).clamp(min=0)
    logits = model(input_ids=tokens, attention_mask=seen, position_ids=places).logits[:, :-1]
    taken = torch.log_softmax(logits.float(), dim=-1).gather(2, tokens[:, 1:, None])[..., 0]
    weights = mask[:, 1:] * advantages[:, None]
    return -(taken * weights).sum()


def train(args: argparse.Namespace) -> None:
    """Train and save the model."""
    rank, size = ranks()
    torch.manual_seed(args.seed * size + rank)
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = load_model(args.model, device, shard=args.shard)
    model.eval()  # no dropout: the probabilities are those that the answers were drawn with
    pairs = read_pairs(args.data)
    scheduled = Scheduled(
        model, recipe=args.recipe, lr=args.lr, adam_lr=args.adam_lr, steps=args.steps
    )

    def sample(some: list[tuple[str, str]], group: int) -> tuple[Any, Any, Any]:
        prompts, right = (list(each) for each in zip(*some, strict=True))
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=gpu):
            tokens, mask = answers(model, tokenizer, prompts, group, args.length)
        return tokens, mask, rewards(tokenizer, tokens, mask, right)

    def accuracy() -> float:
        tested = pairs[: args.tested]
        chunks = [tested[i : i + args.prompts] for i in range(0, len(tested), args.prompts)]
        return torch.cat([sample(chunk, 0)[2] for chunk in chunks]).mean().item()

    def report(text: str) -> None:
        if rank == 0:
            print(text, flush=True)

    report(f"right before: {accuracy():.3f}")
    for step in range(args.steps):
        some = [pairs[int(i)] for i in torch.randperm(len(pairs))[: args.prompts]]
        tokens, mask, reward = sample(some, args.group)
        grouped = reward.view(-1, args.group)
        centred = grouped - grouped.mean(dim=1, keepdim=True)
        advantages = (centred / (grouped.std(dim=1, keepdim=True) + 1e-4)).flatten()
        for part in torch.arange(len(tokens), device=device).split(args.micro_batch):
            with torch.autocast(device.type, torch.bfloat16, enabled=gpu):
                loss = policy_loss(
                    model, tokens[part], mask[part], advantages[part], tokenizer.pad_token_id
                )
            (loss / mask.sum()).backward()
        scheduled.step()
        if step % args.log_every == 0 or step == args.steps - 1:
            report(f"step {step + 1}/{args.steps}  reward {mean_of_ranks(reward.mean()):.3f}")
    report(f"right after: {accuracy():.3f}")
    save_trained(model, tokenizer, args.out / "model")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="Hugging Face name or folder, of trained weights")
    parser.add_argument("--data", type=Path, help=".jsonl of prompt and response")
    parser.add_argument("--out", type=Path, default=Path("rl_out"), help="default: %(default)s")
    # The published GRPO runs: --recipe paper-rl --lr 1e-6 (arXiv 2605.12492). The defaults are a
    # first guess for a trained model of billions; tuned nowhere.
    parser.add_argument("--recipe", choices=RECIPES, default="finetune")
    parser.add_argument("--lr", type=float, default=1e-6, help="Pion's; default: %(default)s")
    parser.add_argument("--adam-lr", type=float, default=1e-6, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=200, help="default: %(default)s")
    parser.add_argument(
        "--prompts", type=int, default=32, help="a step and rank; default: %(default)s"
    )
    parser.add_argument("--group", type=int, default=8, help="answers each; default: %(default)s")
    parser.add_argument("--length", type=int, default=256, help="of answers; default: %(default)s")
    parser.add_argument(
        "--micro-batch", type=int, default=8, help="answers in a forward pass; default: %(default)s"
    )
    parser.add_argument("--tested", type=int, default=256, help="prompts; default: %(default)s")
    parser.add_argument("--log-every", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    parser.add_argument(
        "--shard", action="store_true", help="divide the model over torchrun's ranks"
    )
    parser.add_argument("--smoke", action="store_true", help="a tiny model adds digits")
    return parser


def smoke(args: argparse.Namespace) -> None:
    """Fine-tune the tiny model for a moment, and set the options to go on from there."""
    import sft

    first = sft.arguments(sft.__doc__).parse_args(
        ["--smoke", "--out", str(args.out / "sft"), "--steps", "25"]
    )
    sft.smoke(first)
    sft.train(first)
    if dist.is_initialized():
        dist.barrier()
    args.model, args.data = str(first.out / "model"), first.data
    args.lr, args.adam_lr, args.steps, args.length = 1e-2, 2e-3, 40, 3  # 18 and an end of text
    args.micro_batch = 128


def main() -> None:
    parser = arguments()
    args = parser.parse_args()
    join()
    if args.shard != dist.is_initialized():
        parser.error("--shard and torchrun need each other: several ranks share one model")
    if args.smoke:
        smoke(args)
    elif not (args.model and args.data):
        parser.error("give --model and --data, or --smoke")
    if args.group < 2:
        parser.error(f"--group {args.group}: must be at least 2, to compare answers")
    train(args)
    leave()


if __name__ == "__main__":
    main()
