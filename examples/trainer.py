"""Fine-tune a Hugging Face causal LM in transformers' Trainer, with one optimizer object.

    python examples/trainer.py --model MODEL --data pairs.jsonl --out OUT
    python examples/trainer.py --smoke --out OUT        # a tiny model, on the CPU, offline

MODEL, the data, the batch and the loss are sft.py's. A run that was stopped goes on from the
Trainer's last checkpoint when it is started again. It then keeps the checkpoint's learning rates,
whatever --lr and --adam-lr say. The trained model is in OUT/model.
"""

import argparse

import torch
from sft import arguments, batch_of, divided, read_examples, smoke, steps_of
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    get_scheduler,
)
from transformers.trainer_utils import get_last_checkpoint

from pion_dist import RECIPES, PionWithAdamW


def settings(args: argparse.Namespace) -> TrainingArguments:
    """The Trainer's options; each device's batch and the steps are still to come."""
    gpu = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(args.out / "trainer"),
        bf16=gpu,
        use_cpu=not gpu,
        save_steps=args.save_every,
        logging_steps=args.log_every,
        report_to="none",
    )


def train(args: argparse.Namespace, training: TrainingArguments) -> None:
    """Train and save the model."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    examples = read_examples(tokenizer, args)
    training.max_steps = steps = steps_of(args, len(examples))
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
    trainer = Trainer(
        model=model,
        args=training,
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
    parser = arguments(__doc__)
    args = parser.parse_args()
    if args.shard:
        parser.error("--shard is of sft.py; the Trainer shards by the fsdp of TrainingArguments")
    training = settings(args)  # joins torchrun's ranks
    devices = training.world_size * max(1, training.n_gpu)  # a process may have several GPUs
    if args.smoke:
        smoke(args)
    elif not (args.model and args.data):
        parser.error("give --model and --data, or --smoke")
    training.per_device_train_batch_size = divided(parser, args.batch, devices)
    train(args, training)


if __name__ == "__main__":
    main()
