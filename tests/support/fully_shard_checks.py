"""Pion under ``fully_shard`` and tensor parallelism by DTensor: one process a rank, gloo.

    python tests/support/fully_shard_checks.py RANKS FOLDER [WORD]

prints the checks that passed, of those with WORD in their names. Each launch goes on from the
checkpoints that others left in the folder, and leaves its own with the losses of its straight run.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rank_checks import Collectives
from reference import MSIGN, PUBLISHED
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import Replicate, Shard
from torch.multiprocessing import spawn

from pion_dist import Pion, PionConfig, PionWithAdamW, split_parameters
from pion_dist.matrices import stacked

BATCH, WORDS, WIDTH = 8, 11, 12
CONFIGS = {
    "polar": PionConfig(),
    "published": PionConfig(**PUBLISHED),  # type: ignore[arg-type]
    "msign": PionConfig(**MSIGN),  # type: ignore[arg-type]
    "int8": PionConfig(state_dtype="int8"),
}
ONE_OBJECT = "one object"  # for polar and AdamW
# A step passes on the rounding of a gradient's sum in another order, 2^-53 a term, by as much as
# rows of few elements and small singular values enlarge it (measured: weights 9e-16 after four
# steps, losses 2e-16).
TOLERANCE = 1e-12


class Experts(nn.Module):
    """Fused, as in Hugging Face's mixtures: fewer of them than four ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, WIDTH, 8) / WIDTH**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bd,edf->bf", x, self.up)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Linear(WIDTH, 2 * 10, bias=False)  # one of two matrices, see ``views``
        self.down = nn.Linear(10, WIDTH, bias=False)
        self.narrow = nn.Linear(WIDTH, 3)  # fewer rows than four ranks
        self.wide = nn.Linear(3, WIDTH, bias=False)
        self.experts = Experts()
        self.back = nn.Linear(8, WIDTH, bias=False)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        x = x + self.down(torch.tanh(gate) * up)
        x = x + self.wide(torch.tanh(self.narrow(x)))
        return self.norm(x + self.back(self.experts(x)))


class Model(nn.Module):
    """Its head is its embedding, and a weight of each block is frozen."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(blocks)])
        self.blocks[0].back.requires_grad_(False)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def made(dtype: torch.dtype = torch.float64, blocks: int = 2) -> Model:
    torch.manual_seed(3)
    return Model(blocks).to(dtype)


def sharded(model: Model, mesh: DeviceMesh | None, **options: Any) -> Model:
    """Divide its weights: replicas, shards and tensor parallelism, as the mesh's names say."""
    if mesh is None:
        return model
    names = mesh.mesh_dim_names or ()
    if "tp" in names:
        for block in model.blocks:
            columns = ColwiseParallel(output_layouts=Replicate())
            rows = RowwiseParallel(input_layouts=Replicate())
            plan = {"gate_up": columns, "narrow": columns, "down": rows}
            parallelize_module(block, mesh["tp"], plan)
    data = tuple(name for name in names if name != "tp")
    if data:
        for block in model.blocks:
            fully_shard(block, mesh=mesh[data], **options)
        fully_shard(model, mesh=mesh[data], **options)
    return model


def views(model: Model) -> dict[Tensor, Any]:
    return {
        block.gate_up.weight: stacked(20, WIDTH, name="gate_up", count=2, axis="rows")
        for block in model.blocks
    }


def optimizers_of(model: Model, kind: str) -> tuple[torch.optim.Optimizer, ...]:
    if kind == ONE_OBJECT:
        return (PionWithAdamW(model, 1e-2, pion_lr_mult=5.0, views=views(model)),)
    return optimizers(model, CONFIGS[kind])


def optimizers(model: Model, config: PionConfig) -> tuple[Pion, torch.optim.AdamW]:
    pion, others = split_parameters(model)
    assert [name for name, _ in pion if "0" in name] == [
        f"blocks.0.{name}"
        for name in ("gate_up.weight", "down.weight", "narrow.weight", "wide.weight", "experts.up")
    ]
    return (
        Pion(pion, lr=0.05, config=config, views=views(model)),
        torch.optim.AdamW(others, lr=1e-2),
    )


def loss_of(model: Model, step: int, rows: slice = slice(None)) -> Tensor:
    """The loss of some of a step's rows."""
    ids = torch.randint(WORDS, (BATCH, 2), generator=torch.Generator().manual_seed(step))
    return nn.functional.cross_entropy(model(ids[rows, 0]), ids[rows, 1])


def train(
    model: Model, optimizers: Sequence[torch.optim.Optimizer], steps: range, data: Any = None
) -> list[float]:
    """Train steps, whose rows the ranks of ``data`` divide; the mean losses."""
    losses = []
    for step in steps:
        rows, ranks = slice(None), 1
        if data is not None:
            ranks, each = data.size(), BATCH // data.size()
            rows = slice(data.rank() * each, (data.rank() + 1) * each)
        loss = loss_of(model, step, rows)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        mean = loss.detach().clone()
        if data is not None:
            dist.all_reduce(mean, group=data)
        losses.append((mean / ranks).item())
    return losses


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def compare(model: Model, expected: Model, tolerance: float = TOLERANCE) -> None:
    for (name, a), b in zip(model.named_parameters(), expected.parameters(), strict=True):
        error = (whole(a.detach()) - b).norm() / b.norm()
        assert error <= tolerance, f"{name}: {error:.1e}"


def meshes(ranks: int) -> Iterator[tuple[str, DeviceMesh, Any]]:
    """Meshes by name, each with the ranks that divide the rows of a batch."""
    yield (
        "fsdp",
        (mesh := init_device_mesh("cpu", (ranks,), mesh_dim_names=("fsdp",))),
        mesh.get_group(),
    )
    if ranks == 2:
        yield "tp", init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), None
    if ranks == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "fsdp"))
        yield "hsdp", mesh, dist.group.WORLD
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
        yield "fsdp and tp", mesh, mesh.get_group("fsdp")


def check_one_process(mesh: DeviceMesh, data: Any, config: PionConfig) -> None:
    """Losses and weights are those of one process, whose spectra stay."""
    model, alone = sharded(made(), mesh), made()
    steps = range(4)
    losses = train(model, optimizers(model, config), steps, data)
    expected = train(alone, optimizers(alone, config), steps)
    error = max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True))
    assert error <= TOLERANCE, f"losses: {error:.1e}"
    compare(model, alone)


def check_one_object(mesh: DeviceMesh, data: Any) -> None:
    model, alone = sharded(made(), mesh), made()
    for each, group in ((model, data), (alone, None)):
        train(each, [PionWithAdamW(each, 1e-2, views=views(each))], range(3), group)
    compare(model, alone)


def check_replaced(mesh: DeviceMesh, data: Any) -> None:
    """An optimizer that was made before its model was sharded, as Accelerate makes it."""

    def replaced() -> tuple[nn.Module, PionWithAdamW]:
        model = made()
        optimizer = PionWithAdamW(model, 1e-2, views=views(model))
        names = {p: name for name, p in model.named_parameters()}
        groups = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
        params = dict(sharded(model, mesh).named_parameters())
        for group, its in zip(optimizer.param_groups, groups, strict=True):
            group["params"] = [params[name] for name in its]
        return model, optimizer

    alone = made()
    model, optimizer = replaced()
    train(model, [optimizer], range(3), data)
    train(alone, [PionWithAdamW(alone, 1e-2, views=views(alone))], range(3))
    compare(model, alone)
    resumed, again = replaced()
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with torch.no_grad():
        for new, old in zip(resumed.parameters(), model.parameters(), strict=True):
            new.copy_(old)
    expected = train(model, [optimizer], range(3, 5), data)
    losses = train(resumed, [again], range(3, 5), data)
    assert losses == expected, (losses, expected)
    group = optimizer.param_groups[0]
    group["params"] = [nn.Parameter(whole(p.detach())) for p in group["params"]]
    refused(optimizer.step, "put a sharded model's there before the first step")


def refused(call: Callable[[], object], says: str) -> None:
    try:
        call()
    except (ValueError, RuntimeError) as error:
        assert says in str(error), error
    else:
        raise AssertionError(f"not refused: {says}")


def check_collectives(mesh: DeviceMesh) -> None:
    """A step's number of collectives does not depend on the number of weights."""
    counts = []
    for blocks in (2, 4):
        model = sharded(made(blocks=blocks), mesh)
        (pion, _) = optimizers(model, PionConfig())
        for step in range(2):  # the first one looks at all weights
            loss_of(model, step).backward()
            with Collectives() as collectives:
                pion.step()
        counts.append({name: calls for name, (calls, _) in collectives.seen.items()})
    assert counts[0] == counts[1], counts
    # Each group of ranks agrees on finite gradients, and exchanges two waves there and back.
    assert sum(counts[0].values()) == 5 * len(pion.groups), counts


def spectra(pion: Pion) -> dict[str, Tensor]:
    """Singular values of each part's matrices, by name."""
    values = pion.measured(
        range(len(pion.plan.matrices)), lambda i, x: torch.linalg.svdvals(x.double()).cpu()
    )
    return {pion.plan.matrices[i].names()[0]: each for i, each in values.items()}


def check_mixed_precision(mesh: DeviceMesh, data: Any) -> None:
    """Gradients of bf16; weights and spectra are of float32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(made(torch.float32), mesh, mp_policy=policy)
    pion, adamw = optimizers(model, PionConfig())
    before = spectra(pion)
    train(model, [pion, adamw], range(5), data)
    for name, values in spectra(pion).items():
        error = ((values - before[name]).abs().amax() / before[name].amax()).item()
        # Float32 rounds elements, and products of up to 20 terms.
        assert error <= 20 * 2.0**-24, f"{name}: {error:.1e}"


def check_changed_weights(mesh: DeviceMesh) -> None:
    """A script's write on one rank stops the step on all that share the weight."""
    model = sharded(made(), mesh)
    pion, _ = optimizers(model, PionConfig())
    train(model, [pion], range(1))
    with torch.no_grad():
        model.blocks[1].down.weight.mul_(1.1)
    loss_of(model, 1).backward()
    refused(pion.step, "blocks.1.down.weight was changed since")
    pion.forget_factors()
    pion.step()


def check_refusals(ranks: int) -> None:
    mesh = init_device_mesh("cpu", (ranks,))
    value = torch.randn(6 * ranks, 2 * ranks + 1)
    weight = nn.Parameter(distribute_tensor(value, mesh, [Shard(1)]))
    refused(lambda: Pion([("a", weight)]), "Pion takes Shard(0)")
    weight = nn.Parameter(distribute_tensor(value, mesh, [Replicate()]))
    Pion([("a", weight)])
    shards = {weight: mesh.get_group()}
    refused(lambda: Pion([("a", weight)], shards=shards), "leave it out of shards and stored")


def state_of(model: Model, both: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
    optimizers = get_optimizer_state_dict(model, both)
    return {"model": get_model_state_dict(model), "optimizers": optimizers}


def save(
    folder: Path, model: Model, both: Sequence[torch.optim.Optimizer], losses: list[float]
) -> None:
    dcp.save(state_of(model, both), checkpoint_id=folder)
    if dist.get_rank() == 0:
        (folder / "losses.json").write_text(json.dumps(losses))
    dist.barrier()


def load(folder: Path, model: Model, both: Sequence[torch.optim.Optimizer]) -> list[float]:
    state = state_of(model, both)
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, both, state["optimizers"])
    losses: list[float] = json.loads((folder / "losses.json").read_text())
    return losses


def check_checkpoints(name: str, mesh: DeviceMesh | None, data: Any, folder: Path) -> None:
    """What any number of ranks has saved goes on here to the losses of its straight run."""
    for kind in (*CONFIGS, ONE_OBJECT):
        ranks = dist.get_world_size()
        for path in sorted(folder.glob(f"{kind}, *")):
            model = sharded(made(), mesh)
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(0.5)
            both = optimizers_of(model, kind)
            straight = load(path, model, both)
            losses = train(model, both, range(2, 4), data)
            # Of int8 another team rounds what another order of a sum has changed: 2^-7 of the
            # average's largest elements, of which one step moves little.
            tolerance = 1e-4 if kind == "int8" else TOLERANCE
            errors = [abs(a / b - 1) for a, b in zip(losses, straight[2:], strict=True)]
            assert max(errors) <= tolerance, f"{path.name}: {errors}"
        own = folder / f"{kind}, {name} {ranks}"
        if own.exists():
            continue
        model = sharded(made(), mesh)
        both = optimizers_of(model, kind)
        losses = train(model, both, range(2), data)
        again = sharded(made(), mesh)
        straight = train(again, optimizers_of(again, kind), range(4), data)
        assert straight[:2] == losses
        save(own, model, both, straight)


def check_whole_state(mesh: DeviceMesh, data: Any) -> None:
    """A whole state dict, as one rank can have it, loads on all; of moments in host memory too."""
    model = sharded(made(), mesh)
    (pion, _) = optimizers(model, PionConfig(offload_state=True))
    train(model, [pion], range(2), data)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    moments = get_optimizer_state_dict(model, pion, options=options)
    expected = train(model, [pion], range(2, 4), data)
    model = sharded(made(), mesh)
    (pion, _) = optimizers(model, PionConfig())
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    if dist.get_rank() > 0:
        weights, moments = {}, {}
    set_model_state_dict(model, weights, options=options)
    set_optimizer_state_dict(model, pion, moments, options=options)
    assert train(model, [pion], range(2, 4), data) == expected


def check_flat_state(mesh: DeviceMesh, data: Any, folder: Path) -> None:
    """Both optimizers' state in torch's flat form, as torchtitan saves it."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model = sharded(made(), mesh)
    both = optimizers(model, PionConfig())
    train(model, both, range(2), data)
    weights = get_model_state_dict(model)
    state = get_optimizer_state_dict(model, both, options=options)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder / f"flat {mesh.ndim}")
    expected = train(model, both, range(2, 4), data)
    model = sharded(made(), mesh)
    both = optimizers(model, PionConfig())
    weights = get_model_state_dict(model)
    state = get_optimizer_state_dict(model, both, options=options)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder / f"flat {mesh.ndim}")
    set_model_state_dict(model, weights)
    set_optimizer_state_dict(model, both, state, options=options)
    assert train(model, both, range(2, 4), data) == expected


def checks(ranks: int, folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    if ranks == 1:
        yield "checkpoints", partial(check_checkpoints, "alone", None, None, folder)
        return
    for name, mesh, data in meshes(ranks):
        for kind in ("polar", "published", "msign"):
            yield f"{name}, {kind}", partial(check_one_process, mesh, data, CONFIGS[kind])
        yield f"{name}, one object", partial(check_one_object, mesh, data)
        yield f"{name}, replaced", partial(check_replaced, mesh, data)
        if name != "tp":
            yield f"{name}, checkpoints", partial(check_checkpoints, name, mesh, data, folder)
            yield f"{name}, whole state", partial(check_whole_state, mesh, data)
            yield f"{name}, flat state", partial(check_flat_state, mesh, data, folder)
            yield f"{name}, mixed precision", partial(check_mixed_precision, mesh, data)
        yield f"{name}, collectives", partial(check_collectives, mesh)
        yield f"{name}, changed weights", partial(check_changed_weights, mesh)
    yield "refusals", partial(check_refusals, ranks)


def main(rank: int, ranks: int, folder: Path, word: str, port: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.TCPStore("127.0.0.1", port)
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=limit)
    for name, check in checks(ranks, folder):
        if word not in name:
            continue
        check()
        if rank == 0:
            print(f"passed: {name}", flush=True)
    dist.destroy_process_group()
    os._exit(0)  # FSDP2 keeps gloo's threads, which may abort a process that ends as Python does


if __name__ == "__main__":
    number, where, *wanted = int(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]
    master = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    spawn(main, (number, where, "".join(wanted), master.port), nprocs=number)
