"""Fine-tune a Hugging Face causal LM in transformers' Trainer, with one optimizer object.

    python examples/trainer.py --model MODEL --data pairs.jsonl --out OUT
    python examples/trainer.py --smoke --out OUT        # a tiny model, on the CPU, offline

MODEL, the data and the loss are sft.py's. A run that was stopped goes on from the Trainer's last
checkpoint when it is started again; the trained model is in OUT/model.
"""

import argparse

import torch
from hf import read_pairs
from sft import IGNORED, arguments, batch_of, encode, smoke
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    get_scheduler,
)
from transformers.trainer_utils import get_last_checkpoint

from pion_dist import RECIPES, PionWithAdamW


def train(args: argparse.Namespace) -> None:
    """Train and save the model."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    examples = [encode(tokenizer, *pair, args.max_length) for pair in read_pairs(args.data)]
    examples = [each for each in examples if any(label != IGNORED for label in each[1])]
    if not examples:
        raise SystemExit(f"{args.data}: no response within --max-length {args.max_length}")
    steps = args.steps or max(1, args.epochs * len(examples) // args.batch)
    optimizer = PionWithAdamW(
        model, args.adam_lr, pion_lr_mult=args.lr / args.adam_lr, config=RECIPES[args.recipe]
    )
    schedule = get_scheduler(
        "cosine_with_min_lr",
        optimizer,
        num_warmup_steps=max(1, steps // 20),
        num_training_steps=steps,
        scheduler_specific_kwargs={"min_lr_rate": 0.1},
    )
    gpu = torch.cuda.is_available()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.out / "trainer"),
            max_steps=steps,
            per_device_train_batch_size=args.batch,
            bf16=gpu,
            use_cpu=not gpu,
            save_steps=args.save_every,
            logging_steps=args.log_every,
            report_to="none",
        ),
        train_dataset=examples,
        data_collator=lambda some: batch_of(some, pad, torch.device("cpu")),
        optimizers=(optimizer, schedule),
    )
    args.out.mkdir(parents=True, exist_ok=True)
    folder = args.out / "trainer"
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.exists() else None)
    trainer.save_model(str(args.out / "model"))
    tokenizer.save_pretrained(args.out / "model")


def main() -> None:
    args = arguments().parse_args()
    if args.smoke:
        smoke(args)
    elif not args.model or not args.data:
        raise SystemExit("--model and --data are needed, or --smoke")
    train(args)


if __name__ == "__main__":
    main()
