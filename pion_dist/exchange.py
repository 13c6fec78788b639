"""The communication of ranks that share matrices; it knows no optimizer.

``run`` brings the shards of matrices together and sends them back, in a constant number of
collectives however many there are: it takes what to send, what to do with whole matrices, and where
results go. ``GroupPeers`` is what shards need of each other where none has a whole matrix.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup as ProcessGroup

from .plan import differences


@dataclass(frozen=True)
class Piece:
    """A rank's shard of a part whose matrices are cut; the same on every rank but for the data.

    Attributes:
        shape: [B, m, n] of the shard.
        dim: of the shape, where the shards join.
        owner: the rank that computes it.
    """

    shape: tuple[int, int, int]
    dim: int
    owner: int

    @property
    def numel(self) -> int:
        """Elements of the shard."""
        b, m, n = self.shape
        return b * m * n


Prepare = Callable[[int], tuple[Tensor, Tensor]]
Compute = Callable[[int, Tensor, Tensor], None]
Finalize = Callable[[int, Tensor], None]


def run(
    waves: Sequence[Mapping[int, Piece]],
    prepare: Prepare,
    compute: Compute,
    finalize: Finalize,
    *,
    group: ProcessGroup,
) -> None:
    """Have every piece's matrices computed whole by its owner, and hand back the shards.

    Two all-to-alls a wave. What a wave needs travels while the wave before it is computed.

    Args:
        waves: pieces by number; the same, in the same order, on every rank of the group.
        prepare: shards [B, m, n] of weight and gradient of piece i.
        compute: steps piece i, given whole: weight (modified in place) and gradient.
        finalize: takes the stepped shard of piece i.
        group: the ranks that share the pieces.
    """
    computed: list[_Wave] = []
    coming: _Wave | None = None
    for wave in [*waves, None]:
        current, coming = coming, None
        if wave is not None:
            coming = _Wave(wave, prepare, group)
        if current is not None:
            current.compute(compute)
            computed.append(current)
    for each in computed:
        each.finish(finalize)


class _Wave:
    """A wave of pieces that each travel to their owner and back."""

    def __init__(self, pieces: Mapping[int, Piece], prepare: Prepare, group: ProcessGroup) -> None:
        self.pieces, self.group = pieces, group
        self.size, self.rank = group.size(), group.rank()
        owned = [[i for i, p in pieces.items() if p.owner == r] for r in range(self.size)]
        self.mine, self.order = owned[self.rank], [i for indices in owned for i in indices]
        self.counts = [sum(pieces[i].numel for i in indices) for indices in owned]
        self.sent = _packed(shard for i in self.order for shard in prepare(i))
        self.received = self.sent.new_empty(self.size, 2 * self.counts[self.rank])
        self.work = dist.all_to_all_single(
            self.received.view(-1),
            self.sent,
            [2 * self.counts[self.rank]] * self.size,
            [2 * count for count in self.counts],
            group=group,
            async_op=True,
        )

    def compute(self, compute: Compute) -> None:
        _wait(self.work)
        stepped: list[tuple[Tensor, ...]] = []
        for i, whole in _joined(self.received, [(i, self.pieces[i]) for i in self.mine]):
            weight, grad = whole
            compute(i, weight, grad)
            stepped.append(weight.chunk(self.size, self.pieces[i].dim))
        shards = (shards[r] for r in range(self.size) for shards in stepped)
        self.sent = _packed(shards, like=self.received)
        self.received = self.sent.new_empty(sum(self.counts))
        self.work = dist.all_to_all_single(
            self.received,
            self.sent,
            self.counts,
            [self.counts[self.rank]] * self.size,
            group=self.group,
            async_op=True,
        )

    def finish(self, finalize: Finalize) -> None:
        _wait(self.work)
        shards = torch.split(self.received, [self.pieces[i].numel for i in self.order])
        for i, shard in zip(self.order, shards, strict=True):
            finalize(i, shard.view(self.pieces[i].shape))


def _wait(work: dist.Work | None) -> None:
    """Wait for an asynchronous collective; torch gives None to ranks outside of its group."""
    assert work is not None, "ranks have plans for their own groups alone"
    work.wait()


def _packed(shards: Iterator[Tensor], *, like: Tensor | None = None) -> Tensor:
    flat = [shard.reshape(-1) for shard in shards]
    if not flat:
        assert like is not None, "a rank that shares pieces has a shard of each"
        return like.new_empty(0)
    return torch.cat(flat)


def _joined(
    received: Tensor, pieces: Sequence[tuple[int, Piece]]
) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
    """Weight and gradient of each piece from what all ranks [ranks, elements] sent of it."""
    start = 0
    for i, piece in pieces:
        columns = received[:, start : start + 2 * piece.numel]
        start += 2 * piece.numel
        shards = columns.view(-1, 2, *piece.shape)
        weight, grad = torch.cat(list(shards), dim=1 + piece.dim)
        yield i, (weight, grad)


def agree(grads_finite: Tensor, groups: Sequence[ProcessGroup]) -> Tensor:
    """Whether ``grads_finite`` holds on every rank of every group; one small collective a group.

    Args:
        grads_finite: boolean scalar.
        groups: of this rank.
    """
    if not groups:
        return grads_finite
    flag = grads_finite.to(torch.int32)
    for group in groups:
        dist.all_reduce(flag, dist.ReduceOp.MIN, group=group)
    return flag.bool()


def is_first() -> bool:
    """Whether this is the first of all ranks, or the only one: it speaks for all."""
    return not dist.is_initialized() or dist.get_rank() == 0


def cut_elsewhere(x: Tensor) -> str:
    """Why a parameter's data cannot be stepped here, or an empty string: others have cut it."""
    if (tensors := _loaded("torch.distributed.tensor")) and isinstance(x, tensors.DTensor):
        return (
            "is a DTensor (fully_shard, FSDP2, or tensor parallelism by DTensor), which Pion does "
            "not take: use DistributedDataParallel and, for tensor parallelism, Pion's shards=; or "
            "give it to torch.optim.AdamW"
        )
    return ""


def flattened_by(module: torch.nn.Module) -> str:
    """Why the parameters in a module are no matrices, or an empty string: FSDP1 has cut them."""
    fsdp = _loaded("torch.distributed.fsdp")
    if fsdp and isinstance(module, fsdp.FullyShardedDataParallel):
        return (
            "is wrapped in FullyShardedDataParallel, which leaves flat pieces of its weights: Pion "
            "needs whole matrices. Use DistributedDataParallel"
        )
    return ""


def _loaded(name: str) -> Any:
    """A module of torch.distributed's that only its users import, since that takes a second."""
    return sys.modules.get(name)


class GroupPeers:
    """The ranks of a process group, as ``update.layout.Peers``."""

    def __init__(self, group: ProcessGroup) -> None:
        """The ranks that share matrices."""
        self.group, self.size, self.rank = group, group.size(), group.rank()

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """Sum the ranks' tensors (modified in place)."""
        dist.all_reduce(x, group=self.group)
        return x

    def all_reduce_max(self, x: Tensor) -> Tensor:
        """Take the ranks' maximum of each element (modified in place)."""
        dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)
        return x

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """Join the ranks' tensors along ``dim``."""
        parts = x.new_empty(self.size, *x.shape)
        dist.all_gather_into_tensor(parts.view(-1), x.contiguous().view(-1), group=self.group)
        return torch.cat(list(parts), dim=dim)

    def all_to_all(self, x: Tensor, join_dim: int, cut_dim: int) -> Tensor:
        """Join shards along ``join_dim``, of which each rank gets its share along ``cut_dim``."""
        parts = torch.stack(x.chunk(self.size, cut_dim))
        received = torch.empty_like(parts)
        dist.all_to_all_single(received.view(-1), parts.view(-1), group=self.group)
        return torch.cat(list(received), dim=join_dim)

    def reduce_scatter(self, x: Tensor, dim: int) -> Tensor:
        """Sum the ranks' tensors, and return this rank's share along ``dim``."""
        parts = torch.stack(x.chunk(self.size, dim))
        mine = torch.empty_like(parts[0])
        dist.reduce_scatter_tensor(mine.view(-1), parts.view(-1), group=self.group)
        return mine


def compare(digest: str, lines: Sequence[str], *, group: ProcessGroup, what: str) -> None:
    """Stop every rank of a group if one has another plan; a collective.

    Args:
        digest: of ``lines``, which travel only where it differs.
        lines: what has to be alike.
        group: the ranks that compare.
        what: is compared, for the message.

    Raises:
        RuntimeError: names the first line that differs.
    """
    digests = [""] * group.size()
    dist.all_gather_object(digests, digest, group=group)
    if len(set(digests)) == 1:
        return
    everyone: list[Sequence[str]] = [()] * group.size()
    dist.all_gather_object(everyone, list(lines), group=group)
    raise RuntimeError(f"{what} differ between ranks: {differences(lines, everyone)}")
