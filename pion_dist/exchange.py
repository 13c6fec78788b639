"""The communication of ranks that store matrices together; it knows no optimizer.

``run`` brings what ranks store of matrices to the teams that compute them and takes the results
back, in a constant number of collectives however many matrices there are: it takes what to send,
what to do with the matrices, and where results go. ``GroupPeers`` is what the ranks of a team need
of each other where none has a whole matrix.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup as ProcessGroup

from .plan import MatrixPlan, differences

Stored = Callable[[int], list[Tensor]]
Given = dict[int, list[Tensor]]
Computed = dict[int, tuple[Tensor, Tensor | None]]
Compute = Callable[[Given], Computed]
Finalize = Callable[[int, Tensor, Tensor | None], None]


class Route:
    """What a rank sends and gets of a wave of matrices; made once, used in every step."""

    def __init__(
        self, pieces: Mapping[int, MatrixPlan], flags: Mapping[int, int], *, rank: int, size: int
    ) -> None:
        """Work out the counts.

        Args:
            pieces: matrices by number; the same, in the same order, on every rank of the group.
            flags: elements that travel back beside each one's weights.
            rank: this one's in the group.
            size: of the group.
        """
        self.pieces, self.flags, self.rank, self.size = pieces, flags, rank, size
        self.mine = [i for i, x in pieces.items() if rank in x.team]
        stored = [(x.member(rank), i) for i, x in pieces.items() if x.flow(rank, x.member(rank))]
        # To each rank, in its order of pieces: what it computes of this rank's.
        self.sent = [i for _, i in sorted(stored, key=lambda each: each[0])]
        self.sent_to = [0] * size
        self.back_from = [0] * size
        for member, i in stored:
            count = pieces[i].flow(rank, member)
            self.sent_to[member] += count
            self.back_from[member] += count + flags[i]
        # From each rank: pieces that this one computes, with their elements.
        self.got = [
            [(i, count) for i in self.mine if (count := pieces[i].flow(other, rank))]
            for other in range(size)
        ]
        self.got_from = [sum(count for _, count in each) for each in self.got]
        self.back_to = [sum(count + flags[i] for i, count in each) for each in self.got]

    def stored(self, i: int) -> int:
        """Elements of a piece that this rank stores."""
        return self.pieces[i].flow(self.rank, self.pieces[i].member(self.rank))


def run(
    routes: Sequence[Route],
    tensors: int,
    stored: Stored,
    compute: Compute,
    finalize: Finalize | None,
    *,
    like: Tensor,
    group: ProcessGroup,
) -> None:
    """Have every piece's matrices computed by its team, and hand back what each rank stores.

    An all-to-all a wave each way. What a wave needs travels while the wave before it is computed.

    Args:
        routes: of the waves; made alike on every rank of the group.
        tensors: that travel to the teams, of each piece.
        stored: so many flat tensors, of what this rank stores of piece i.
        compute: takes the tensors of the pieces that this rank computes, whole or its shards, and
            returns weights of the same shape; and of each piece flags, if it has any.
        finalize: takes the flat weights that this rank stores of piece i, and its flags. Without it
            nothing travels back.
        like: a tensor of the dtype and on the device of what travels.
        group: the ranks that store the pieces.
    """
    waves: list[_Wave] = []
    coming: _Wave | None = None
    for route in [*routes, None]:
        current, coming = coming, None
        if route is not None:
            coming = _Wave(route, tensors, stored, like, group)
        if current is not None:
            current.compute(compute, back=finalize is not None)
            waves.append(current)
    if finalize is not None:
        for each in waves:
            each.finish(finalize)


class _Wave:
    """A wave of pieces that each travel to their team and back."""

    def __init__(
        self, route: Route, tensors: int, stored: Stored, like: Tensor, group: ProcessGroup
    ) -> None:
        self.route, self.tensors, self.group = route, tensors, group
        self.sent = _packed([x for i in route.sent for x in stored(i)], like)
        self.received = like.new_empty(tensors * sum(route.got_from))
        self.work = self._move(
            [tensors * count for count in route.got_from],
            [tensors * count for count in route.sent_to],
        )

    def _move(self, got: list[int], sent: list[int]) -> dist.Work | None:
        work: dist.Work | None = dist.all_to_all_single(
            self.received, self.sent, got, sent, group=self.group, async_op=True
        )
        return work

    def compute(self, compute: Compute, *, back: bool) -> None:
        _wait(self.work)
        results = compute(self._joined())
        if not back:
            return
        route = self.route
        self.sent = _packed(list(self._taken_apart(results)), self.received)
        self.received = self.sent.new_empty(sum(route.back_from))
        self.work = self._move(route.back_from, route.back_to)

    def _joined(self) -> Given:
        """The tensors of each piece, whole or this rank's shard of it, from what ranks sent."""
        whole: dict[int, list[list[list[Tensor]]]] = {}
        for i in self.route.mine:
            x = self.route.pieces[i]
            shards = x.cut if len(x.team) == 1 else 1
            whole[i] = [[[] for _ in range(shards)] for _ in range(self.tensors)]
        start = 0
        for other, pieces in enumerate(self.route.got):
            for i, count in pieces:
                x = self.route.pieces[i]
                shard = other % x.cut if len(x.team) == 1 else 0
                for t in range(self.tensors):
                    whole[i][t][shard].append(self.received[start : start + count])
                    start += count
        return {
            i: [self._matrices(self.route.pieces[i], shards) for shards in tensors]
            for i, tensors in whole.items()
        }

    @staticmethod
    def _matrices(x: MatrixPlan, shards: list[list[Tensor]]) -> Tensor:
        joined = [torch.cat(each).view(x.shard_shape) for each in shards]
        return joined[0] if len(joined) == 1 else torch.cat(joined, x.cut_dim)

    def _taken_apart(self, results: Computed) -> Iterator[Tensor]:
        """What each rank stores of the results, in the order in which they travel back."""
        shards: dict[int, list[Tensor]] = {}
        for i, (weight, _) in results.items():
            x = self.route.pieces[i]
            cut = weight.chunk(x.cut, x.cut_dim) if len(x.team) == 1 else (weight,)
            shards[i] = [each.reshape(-1) for each in cut]
        for other, pieces in enumerate(self.route.got):
            for i, _ in pieces:
                x = self.route.pieces[i]
                if (moved := results[i][1]) is not None:
                    yield moved
                start, stop = x.interval(other)
                yield shards[i][other % x.cut if len(x.team) == 1 else 0][start:stop]

    def finish(self, finalize: Finalize) -> None:
        _wait(self.work)
        counts = [(self.route.flags[i], self.route.stored(i)) for i in self.route.sent]
        parts = iter(torch.split(self.received, list(itertools.chain(*counts))))
        for i, (flags, _) in zip(self.route.sent, counts, strict=True):
            moved = next(parts)
            finalize(i, next(parts), moved if flags else None)


def _wait(work: dist.Work | None) -> None:
    """Wait for an asynchronous collective; torch gives None to ranks outside of its group."""
    assert work is not None, "ranks have plans for their own groups alone"
    work.wait()


def _packed(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.cat([x.reshape(-1) for x in parts]) if parts else like.new_empty(0)


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
