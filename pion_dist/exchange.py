"""Brings the shards of matrices that tensor parallelism cuts together, and sends them back.

A constant number of collectives a step, however many matrices there are. The exchange knows no
optimizer: ``run`` takes what to send, what to do with whole matrices, and where results go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .config import TpMode

ROWS, COLS = 1, 2  # dimensions of a batch [B, m, n]


@dataclass(frozen=True)
class Shard:
    """How the ranks of a group share a weight.

    Attributes:
        group: the tensor-parallel group.
        dims: parts whose matrices are cut, and the dimension, ROWS or COLS. Parts that are not
            named are whole on their rank.
        dealt: parts of whose matrices every rank has its own (B is cut).
    """

    group: dist.ProcessGroup
    dims: Mapping[str, int]
    dealt: frozenset[str] = frozenset()

    @property
    def ranks(self) -> int:
        """Ranks of the group."""
        return self.group.size()

    @property
    def rank(self) -> int:
        """This rank in the group."""
        return self.group.rank()


@dataclass(frozen=True)
class Piece:
    """A rank's shard of a part whose matrices are cut; the same on every rank but for the data.

    Attributes:
        shape: [B, m, n] of the shard.
        dim: ROWS or COLS, where the shards join.
        owner: the rank that computes it (mode ``owner``).
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
    pieces: Sequence[Piece],
    prepare: Prepare,
    compute: Compute,
    finalize: Finalize,
    *,
    mode: TpMode,
    group: dist.ProcessGroup,
) -> None:
    """Compute every matrix of the pieces whole, once or on every rank, and hand back the shards.

    Args:
        pieces: in the same order on every rank of the group.
        prepare: shards [B, m, n] of weight and gradient of piece i.
        compute: steps piece i, given whole: weight (modified in place) and gradient.
        finalize: takes the stepped shard of piece i.
        mode: ``owner``: each piece is computed by its owner, two all-to-alls; ``duplicated``: by
            every rank, one all-gather.
        group: the ranks that share the pieces.
    """
    if not pieces:
        return
    match mode:
        case "owner":
            _owner(pieces, prepare, compute, finalize, group=group)
        case "duplicated":
            _duplicated(pieces, prepare, compute, finalize, group=group)
        case _:
            raise ValueError(f"mode={mode!r}: must be 'owner' or 'duplicated'")


def _owner(
    pieces: Sequence[Piece],
    prepare: Prepare,
    compute: Compute,
    finalize: Finalize,
    *,
    group: dist.ProcessGroup,
) -> None:
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    owned = [[i for i, p in enumerate(pieces) if p.owner == r] for r in range(size)]
    order = [i for indices in owned for i in indices]
    counts = [sum(pieces[i].numel for i in indices) for indices in owned]
    send = _packed(shard for i in order for shard in prepare(i))
    received = send.new_empty(size, 2 * counts[rank])
    dist.all_to_all_single(
        received.view(-1),
        send,
        [2 * counts[rank]] * size,
        [2 * count for count in counts],
        group=group,
    )
    stepped: list[tuple[Tensor, ...]] = []
    for i, whole in _joined(received, [(i, pieces[i]) for i in owned[rank]]):
        weight, grad = whole
        compute(i, weight, grad)
        stepped.append(weight.chunk(size, pieces[i].dim))
    send = _packed((shards[r] for r in range(size) for shards in stepped), like=received)
    returned = send.new_empty(sum(counts))
    dist.all_to_all_single(returned, send, counts, [counts[rank]] * size, group=group)
    shards = torch.split(returned, [pieces[i].numel for i in order])
    for i, shard in zip(order, shards, strict=True):
        finalize(i, shard.view(pieces[i].shape))


def _duplicated(
    pieces: Sequence[Piece],
    prepare: Prepare,
    compute: Compute,
    finalize: Finalize,
    *,
    group: dist.ProcessGroup,
) -> None:
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    send = _packed(shard for i in range(len(pieces)) for shard in prepare(i))
    received = send.new_empty(size, send.numel())
    dist.all_gather_into_tensor(received.view(-1), send, group=group)
    for i, whole in _joined(received, list(enumerate(pieces))):
        weight, grad = whole
        compute(i, weight, grad)
        finalize(i, weight.chunk(size, pieces[i].dim)[rank])


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


def agree(ok: Tensor, groups: Sequence[dist.ProcessGroup]) -> Tensor:
    """Whether ``ok`` holds on every rank of every group; one small collective a group.

    Args:
        ok: boolean scalar.
        groups: of this rank.
    """
    if not groups:
        return ok
    flag = ok.to(torch.int32)
    for group in groups:
        dist.all_reduce(flag, dist.ReduceOp.MIN, group=group)
    return flag.bool()
