"""What the loops in plain PyTorch share: ranks, the optimizer and its schedule, checkpoints."""

import math
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.optim.lr_scheduler import LambdaLR

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
    return sum_of_ranks(x.detach()).item() / ranks()[1]


def sum_of_ranks(x: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all ranks."""
    total = x.clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def shard_layers(model: nn.Module, layers: Iterable[nn.Module], mesh: DeviceMesh) -> None:
    """Divide a model over a mesh's ranks by FSDP2, layer by layer; on GPUs products are bf16."""
    options: dict[str, Any] = {"mesh": mesh}
    if mesh.device_type == "cuda":
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for layer in layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)


class Scheduled:
    """PionWithAdamW on a schedule: warm-up, then a cosine to 10%.

    Args:
        model: not wrapped.
        recipe: of Pion's options.
        lr: Pion's; by default steps have the root mean square of AdamW's, 0.2 lr.
        adam_lr: AdamW's.
        steps: of the whole run.
        exclude: regular expressions of parameters that are AdamW's.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        recipe: str,
        lr: float,
        adam_lr: float,
        steps: int,
        exclude: Sequence[str] = (),
    ) -> None:
        self.model = model
        self.optimizer = PionWithAdamW(
            model,
            adam_lr,
            pion_lr_mult=lr / adam_lr,
            config=RECIPES[recipe],
            exclude=exclude,
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
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
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
