"""Pretrain a small Llama of bytes in plain PyTorch, in the pattern of torchtitan's train.py.

    torchrun --nproc-per-node 8 examples/titan.py --text FILES --out OUT    # FSDP2
    torchrun --nproc-per-node 8 examples/titan.py --tp 2 ...    # and tensor parallelism: a 2-D mesh
    torchrun --nproc-per-node 2 examples/titan.py --smoke --out OUT    # tiny, on the CPU, offline

The default text is Python's own library. A run that was stopped goes on from its last checkpoint
when it is started again, on any number of ranks and with any --tp. It then keeps the checkpoint's
learning rates, whatever --lr and --adam-lr say.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from llama import Llama, parallelize
from loop import Scheduled, join, leave, mean_of_ranks, resume, save
from prepare_corpus import LIBRARY_BYTES, CorpusError, documents, stdlib_sources, user_files
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn import functional as F


def read_text(paths: list[Path], length: int) -> Tensor:
    """The bytes of files, or of Python's library."""
    try:
        files = user_files(paths) if paths else stdlib_sources()
        texts = [t for t, _ in documents(files, sys.maxsize if paths else LIBRARY_BYTES, "text")]
    except CorpusError as error:
        raise SystemExit(str(error)) from error
    data = bytearray("\0".join(texts).encode())
    if len(data) <= length:
        raise SystemExit(f"--text: {len(data)} bytes of text; --length {length} needs more")
    return torch.frombuffer(data, dtype=torch.uint8)


def batch_of(text: Tensor, step: int, args: argparse.Namespace, dp: DeviceMesh | None) -> Tensor:
    """This rank's rows of a step, of --length + 1 bytes: together the same in every layout."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(text) - args.length, (args.batch, 1), generator=generator)
    mine = starts[dp.get_local_rank() :: dp.size()] if dp else starts
    return text[mine + torch.arange(args.length + 1)].long()


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1).float(), rows[:, 1:].flatten())


def scheduled_of(model: Llama, args: argparse.Namespace) -> Scheduled:
    """Make the optimizer, one object of Pion and AdamW, and its schedule."""
    return Scheduled(
        model,
        recipe="pretrain",
        lr=args.lr,
        adam_lr=args.adam_lr,
        steps=args.steps,
        exclude=["^output"],  # AdamW's: no name says to Pion that this layer is the last
    )


def train(args: argparse.Namespace) -> None:
    """Train and save checkpoints."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = (dist.get_world_size() // args.tp, args.tp)
    mesh = init_device_mesh(device, shape, mesh_dim_names=("dp", "tp"))
    torch.manual_seed(0)
    model = Llama(args.layers, args.width, args.heads).to(device)
    parallelize(model, mesh["dp"], mesh["tp"])
    training = scheduled_of(model, args)
    checkpoint = args.out / "checkpoint"
    text = read_text(args.text, args.length)
    for step in range(resume(checkpoint, training), args.steps):
        loss = loss_of(model, batch_of(text, step, args, mesh["dp"]).to(device))
        loss.backward()
        training.step()
        mean = mean_of_ranks(loss)
        if dist.get_rank() == 0:
            print(f"step {step + 1}/{args.steps}  loss {mean:.6f}", flush=True)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save(checkpoint, training, step + 1)


def arguments(doc: str) -> argparse.ArgumentParser:
    """The options, under the first line of a script's docstring."""
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="files or folders")
    parser.add_argument("--out", type=Path, default=Path("titan_out"), help="default: %(default)s")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks")
    for name, value in {"layers": 12, "width": 768, "heads": 12, "length": 1024}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help="default: %(default)s")
    parser.add_argument("--lr", type=float, default=1e-2, help="Pion's; default: %(default)s")
    parser.add_argument("--adam-lr", type=float, default=3e-3, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=64, help="of all ranks; default: %(default)s")
    parser.add_argument("--steps", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--save-every", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, 30 steps")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options, checked; --smoke changes defaults."""
    if parser.parse_args().smoke:
        torch.set_num_threads(1)  # more would only wait for each other, for long on a busy machine
        parser.set_defaults(layers=2, width=64, heads=4, length=64, batch=16, steps=30)
    args = parser.parse_args()
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if args.tp < 1 or ranks % args.tp or args.heads % args.tp or args.length % args.tp:
        parser.error(f"--tp {args.tp}: must divide the {ranks} ranks, --heads and --length")
    dp = ranks // args.tp
    if args.batch < 1 or args.batch % dp:
        parser.error(f"--batch {args.batch}: must be a positive multiple of {dp} (ranks / --tp)")
    return args


def main() -> None:
    parser = arguments(__doc__)
    args = parse(parser)
    if "RANK" not in os.environ:
        parser.error("start it with torchrun, on one rank too")
    join()
    train(args)
    leave()


if __name__ == "__main__":
    main()
