"""Pretrain titan.py's Llama in Lightning, with one optimizer object and one schedule.

    python examples/lightning_module.py --text FILES --out OUT
    torchrun --nproc-per-node 8 examples/lightning_module.py --tp 2 ...    # FSDP2 and TP
    python examples/lightning_module.py --smoke --out OUT    # a tiny model, on the CPU, offline

Text, steps and options are titan.py's. A run that was stopped goes on from Lightning's last
checkpoint when it is started again; one that torchrun starts may have another --tp then. Either
keeps the checkpoint's learning rates, whatever --lr and --adam-lr say.
"""

import argparse
import os
from collections.abc import Iterator
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from llama import Llama, parallelize
from loop import CLIP, leave
from titan import arguments, batch_of, loss_of, parse, read_text, scheduled_of
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh


class Pretraining(LightningModule):
    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.args, self.text = args, read_text(args.text, args.length)
        torch.manual_seed(0)
        self.model = Llama(args.layers, args.width, args.heads)

    def configure_model(self) -> None:
        if mesh := self.device_mesh:  # of ModelParallelStrategy
            parallelize(self.model, mesh["data_parallel"], mesh["tensor_parallel"])

    def configure_optimizers(self) -> dict[str, Any]:
        both = scheduled_of(self.model, self.args)
        schedule = {"scheduler": both.schedule, "interval": "step"}
        return {"optimizer": both.optimizer, "lr_scheduler": schedule}

    def train_dataloader(self) -> Iterator[Tensor]:
        """Batches of this rank, from the step that the run goes on at."""
        dp: DeviceMesh | None = self.device_mesh and self.device_mesh["data_parallel"]
        for step in range(self.global_step, self.args.steps):
            yield batch_of(self.text, step, self.args, dp)

    def training_step(self, rows: Tensor) -> Tensor:
        return loss_of(self.model, rows)

    def on_train_batch_end(self, outputs: dict[str, Tensor], rows: Tensor, index: int) -> None:
        loss = self.trainer.strategy.reduce(outputs["loss"])
        self.print(f"step {self.global_step}/{self.args.steps}  loss {loss:.6f}", flush=True)


def train(args: argparse.Namespace) -> None:
    """Train and save checkpoints."""
    ranks, devices = (int(os.environ.get(f"{each}WORLD_SIZE", 1)) for each in ("", "LOCAL_"))
    strategy: Any = "auto"
    if "RANK" in os.environ:
        strategy = ModelParallelStrategy(ranks // args.tp, args.tp)
    trainer = Trainer(
        strategy=strategy,
        devices=devices,
        num_nodes=ranks // devices,
        # shard_layers decides what is bf16 under FSDP2.
        precision="bf16-mixed" if strategy == "auto" and torch.cuda.is_available() else None,
        max_steps=args.steps,
        gradient_clip_val=CLIP,
        callbacks=ModelCheckpoint(
            args.out / "lightning", every_n_train_steps=args.save_every, save_last=True
        ),
        logger=False,
        enable_progress_bar=False,
    )
    trainer.fit(Pretraining(args), ckpt_path="last")
    trainer.save_checkpoint(args.out / "trained.ckpt")


def main() -> None:
    train(parse(arguments(__doc__)))
    leave()


if __name__ == "__main__":
    main()
