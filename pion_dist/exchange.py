"""The communication of ranks that store matrices together; it knows no optimizer.

``run`` brings what ranks store of matrices to the teams that compute them and takes the results
back, in a constant number of collectives however many matrices there are: it takes what to send,
what to do with the matrices, and where results go. ``GroupPeers`` is what the ranks of a team need
of each other where none has a whole matrix.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup as ProcessGroup

from .matrix_plan import Box
from .plan import differences
from .route import Route
from .teams import neighbours

Stored = Callable[[int], list[Tensor]]
Given = dict[int, list[Tensor]]
Computed = dict[int, tuple[Tensor, Tensor | None]]
Compute = Callable[[Given], Computed]
Finalize = Callable[[int, Tensor, Tensor | None], None]


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
        compute: takes this rank's share of the pieces that it computes, and returns weights of the
            same shape; and of each piece flags, if it has any.
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
        flat = {i: stored(i) for i in dict.fromkeys(i for each in route.sent for i, _ in each)}
        parts = [
            _of_run(x, box)
            for pieces in route.sent
            for i, boxes in pieces
            for x in flat[i]
            for box in boxes
        ]
        self.sent = _packed(parts, like)
        del flat, parts
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
        shares = self._shares()
        self.sent = self.received = self.received.new_empty(0)
        results = compute(shares)
        if not back:
            return
        route = self.route
        self.sent = _packed(list(self._taken_apart(results)), self.received)
        self.received = self.sent.new_empty(sum(route.back_from))
        self.work = self._move(route.back_from, route.back_to)

    def _shares(self) -> Given:
        """This rank's share of each piece's tensors, from what ranks sent."""
        pieces = self.route.pieces
        shares = {
            i: [self.received.new_empty(pieces[i].share_shape) for _ in range(self.tensors)]
            for i in self.route.mine
        }
        start = 0
        for i, boxes in itertools.chain(*self.route.got):
            for share, box in itertools.product(shares[i], boxes):
                _at(share, box).copy_(self.received[start : start + box.numel].view(box.shape))
                start += box.numel
        return shares

    def _taken_apart(self, results: Computed) -> Iterator[Tensor]:
        """What each rank stores of the results, in the order in which they travel back."""
        for i, boxes in itertools.chain(*self.route.got):
            weight, moved = results[i]
            if moved is not None:
                yield moved
            yield from (_at(weight, box) for box in boxes)

    def finish(self, finalize: Finalize) -> None:
        _wait(self.work)
        weights: dict[int, tuple[Tensor, Tensor | None]] = {}
        start = 0
        for i, boxes in itertools.chain(*self.route.sent):
            moved = self.received[start : start + self.route.flags[i]]
            start += len(moved)
            if len(self.route.pieces[i].team) == 1:  # boxes are neighbours
                count = self.route.stored(i)
                weight = self.received[start : start + count]
                start += count
            else:
                weight = weights[i][0] if i in weights else self._empty(i)
                for box in boxes:
                    part = self.received[start : start + box.numel].view(box.shape)
                    _of_run(weight, box).copy_(part)
                    start += box.numel
            weights[i] = weight, moved if len(moved) else None
        for i, (weight, flagged) in weights.items():
            finalize(i, weight, flagged)

    def _empty(self, i: int) -> Tensor:
        return self.received.new_empty(self.route.stored(i))


def _of_run(flat: Tensor, box: Box) -> Tensor:
    """A box of what a rank stores, [b, r, c]; a view."""
    run = flat[box.start : box.start + math.prod(box.run)].view(box.run)
    return run.narrow(box.dim, box.first, box.shape[box.dim])


def _at(share: Tensor, box: Box) -> Tensor:
    """A box of a member's share [B, m, n]; a view."""
    b, r, c = (slice(at, at + size) for at, size in zip(box.at, box.shape, strict=True))
    return share[b, r, c]


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


def in_a_node(group: ProcessGroup) -> int:
    """``teams.neighbours`` of a group. The launcher says how many ranks a node has, or its GPUs."""
    node = int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or max(1, torch.cuda.device_count())
    return neighbours(dist.get_process_group_ranks(group), node)


def is_first() -> bool:
    """Whether this is the first of all ranks, or the only one: it speaks for all."""
    return not dist.is_initialized() or dist.get_rank() == 0


class GroupPeers:
    """The ranks of a process group, as ``update.peers.Peers``."""

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
        # A copy only where something lies outside of ``dim``.
        return parts.movedim(0, dim).flatten(dim, dim + 1)

    def reduce_scatter(self, x: Tensor, dim: int) -> Tensor:
        """Sum the ranks' tensors, and return this rank's share along ``dim``."""
        parts = torch.unflatten(x, dim, (self.size, -1)).movedim(dim, 0).contiguous()
        mine = torch.empty_like(parts[0])
        dist.reduce_scatter_tensor(mine.view(-1), parts.view(-1), group=self.group)
        return mine

    def transposed(self, x: Tensor) -> Tensor:
        """Return this rank's rows of the transpose of a square matrix whose rows these are."""
        parts = torch.unflatten(x, -1, (self.size, -1)).permute(2, 0, 3, 1).contiguous()
        received = torch.empty_like(parts)
        dist.all_to_all_single(received.view(-1), parts.view(-1), group=self.group)
        return received.movedim(0, 2).flatten(2)


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
