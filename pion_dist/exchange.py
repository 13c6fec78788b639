"""The communication of ranks that share matrices; it knows no optimizer.

``run`` brings the shards of matrices together and sends them back, in a constant number of
collectives however many there are: it takes what to send, what to do with whole matrices, and where
results go. ``GroupPeers`` is what shards need of each other where none has a whole matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup as ProcessGroup

from .config import TpMode
from .plan import differences


@dataclass(frozen=True)
class Piece:
    """A rank's shard of a part whose matrices are cut; the same on every rank but for the data.

    Attributes:
        shape: [B, m, n] of the shard.
        dim: of the shape, where the shards join.
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
    group: ProcessGroup,
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
            raise ValueError(f"mode={mode!r}: only 'owner' and 'duplicated' join matrices")


def _owner(
    pieces: Sequence[Piece],
    prepare: Prepare,
    compute: Compute,
    finalize: Finalize,
    *,
    group: ProcessGroup,
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
    group: ProcessGroup,
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


def agree(ok: Tensor, groups: Sequence[ProcessGroup]) -> Tensor:
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


class GroupPeers:
    """The ranks of a process group, as ``update.arrangement.Peers``."""

    def __init__(self, group: ProcessGroup) -> None:
        """The ranks that share matrices."""
        self.group, self.size, self.rank = group, group.size(), group.rank()

    def total(self, x: Tensor) -> Tensor:
        """The ranks' sum (modified in place)."""
        dist.all_reduce(x, group=self.group)
        return x

    def gathered(self, x: Tensor, dim: int) -> Tensor:
        """The ranks' tensors, joined along ``dim``."""
        parts = x.new_empty(self.size, *x.shape)
        dist.all_gather_into_tensor(parts.view(-1), x.contiguous().view(-1), group=self.group)
        return torch.cat(list(parts), dim=dim)

    def scattered(self, x: Tensor, dim: int) -> Tensor:
        """This rank's share, along ``dim``, of the ranks' sum."""
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
    # A rank that agrees with the first has to name one that does not.
    raise RuntimeError(f"{what} differ between ranks: {differences(lines, everyone)}")
