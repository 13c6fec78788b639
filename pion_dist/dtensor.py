"""DTensors, as ``fully_shard`` makes of weights: what each rank stores, and moments in that form.

Ranks divide a weight's rows, its columns, or both, and each row range is a range of the weight's
elements. So a rank's part is what ``slots.Storage`` describes, and the step is the same as with
Megatron's distributed optimizer.

A moment is on the team that computes its matrices. For checkpoints it becomes a DTensor over the
weight's mesh, so that ``torch.distributed.checkpoint`` moves it to any number of ranks.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from .state import Moment

Span = tuple[int, int]
Box = list[Span]  # of each dimension


def is_dtensor(x: Tensor) -> bool:
    """Tell whether a tensor is a DTensor."""
    tensors = _loaded("torch.distributed.tensor")
    return tensors is not None and isinstance(x, tensors.DTensor)


def local(x: Tensor) -> Tensor:
    """Return what this rank stores of a DTensor, in its memory; any other tensor is returned."""
    return x._local_tensor if is_dtensor(x) else x  # type: ignore[attr-defined]


def version(x: Tensor) -> tuple[int, int]:
    """Return what changes with every write into a tensor that torch counts.

    One into a DTensor counts there, one into its memory on this rank counts in that.
    """
    return x._version, local(x)._version


def any_nonzero(p: Tensor) -> bool:
    """Tell whether each matrix of a parameter has an element other than zero.

    For a DTensor this is a collective of the ranks that divide it.
    """
    counts: Any = p.detach().ne(0).sum((-2, -1))
    return bool((counts.full_tensor() if is_dtensor(counts) else counts).all())


def flattened_by(module: torch.nn.Module) -> str:
    """Why the parameters in a module are no matrices, or an empty string: FSDP1 has cut them."""
    fsdp = _loaded("torch.distributed.fsdp")
    if fsdp and isinstance(module, fsdp.FullyShardedDataParallel):
        return (
            "is wrapped in FullyShardedDataParallel, which leaves flat pieces of its weights: Pion "
            "needs whole matrices. Use fully_shard or DistributedDataParallel"
        )
    return ""


def _loaded(name: str) -> Any:
    """A module of torch.distributed's that only its users import, since that takes a second."""
    return sys.modules.get(name)


@dataclass(frozen=True)
class Division:
    """How ranks divide a DTensor [..., m, n].

    Attributes:
        group: the ranks that together have it; None where this one has all.
        columns: the ranks that divide its columns, evenly, neighbours in ``group``; None for none.
        ranges: elements [start, stop), flat, of the columns that a rank has, by rank of ``group``
            without those that divide columns. Empty where none divide rows.
    """

    group: ProcessGroup | None
    columns: ProcessGroup | None
    ranges: tuple[Span, ...]


def division(p: Any, name: str) -> Division:
    """Read the division off a DTensor; a collective of all ranks where two dimensions are one.

    Args:
        p: a DTensor [m, n], or [E, m, n] of which ranks divide experts.
        name: for messages.

    Raises:
        ValueError: it is divided in a way that Pion does not take.
    """
    mesh, shape = p.device_mesh, p.shape
    dims = _divided_dims(p)
    along = [p.placements[d].dim % p.dim() for d in dims]
    rows = [d for d, dim in zip(dims, along, strict=True) if dim == 0]
    cols = [d for d, dim in zip(dims, along, strict=True) if dim == 1 and p.dim() == 2]
    known = len(rows) + len(cols) == len(dims) and cols in ([], dims[-1:])
    if not known or any(shape[-1] % mesh.size(d) for d in cols):
        raise ValueError(
            f"{name} is a DTensor {tuple(shape)} with placements {p.placements}: Pion takes "
            "Shard(0), and in the mesh's last dimension Shard(1) of a 2-D weight whose columns it "
            "divides. Give this one to torch.optim.AdamW"
        )
    columns = mesh.get_group(cols[0]) if cols else None
    width = prod(shape[1:]) // (columns.size() if columns is not None else 1)
    ranges = [(a * width, b * width) for a, b in _chunks(p, rows, shape[0])] if rows else []
    group, cut = _group(mesh, dims), columns.size() if columns is not None else 1
    if group is not None and ranges:
        (start, stop), has = ranges[group.rank() // cut], local(p)
        if has.numel() != stop - start or not has.is_contiguous():
            raise ValueError(
                f"{name} is a DTensor whose {p.placements} should leave {stop - start} elements in "
                f"a row on this rank, which has {tuple(has.shape)} with strides {has.stride()}"
            )
    return Division(group, columns, tuple(ranges))


def _divided_dims(p: Any) -> list[int]:
    """The dimensions of a DTensor's mesh along which ranks divide it."""
    mesh = p.device_mesh
    if any(placement.is_partial() for placement in p.placements):
        raise ValueError(f"a DTensor with placements {p.placements} is a sum that is still to come")
    return [d for d, x in enumerate(p.placements) if not x.is_replicate() and mesh.size(d) > 1]


def _group(mesh: Any, dims: Sequence[int]) -> ProcessGroup | None:
    """The ranks along some dimensions of a mesh, in its order."""
    if not dims:
        return None
    if len(dims) == 1:
        return mesh.get_group(dims[0])  # type: ignore[no-any-return]
    if mesh.mesh_dim_names is None:
        raise ValueError(f"{mesh} divides a weight along two dimensions: give it mesh_dim_names")
    names = tuple(mesh.mesh_dim_names[d] for d in dims)
    return mesh[names]._flatten().get_group()  # type: ignore[no-any-return]


def _chunks(p: Any, dims: Sequence[int], size: int) -> Iterator[Span]:
    """What each rank along some dimensions of the mesh has of ``size`` rows, in the mesh's order.

    As ``torch.chunk``, in one dimension of the mesh after the other. Rows that are tensor-parallel
    are divided before those of ``fully_shard``, whose dimension comes first (_StridedShard).
    """
    mesh = p.device_mesh
    order = sorted(dims, key=lambda d: type(p.placements[d]).__name__ == "_StridedShard")
    for place in itertools.product(*(range(mesh.size(d)) for d in dims)):
        at = dict(zip(dims, place, strict=True))
        start, stop = 0, size
        for d in order:
            a, b = _chunk(stop - start, mesh.size(d), at[d])
            start, stop = start + a, start + b
        yield start, stop


def _chunk(size: int, count: int, index: int) -> Span:
    each = -(-size // count)
    return min(size, index * each), min(size, (index + 1) * each)


class Spread:
    """A moment's way between the team that computes it and all ranks that divide the weight."""

    def __init__(self, p: Any, moment: Moment, team: Sequence[int]) -> None:
        """Work out who has what.

        Args:
            p: the DTensor, which ranks divide.
            moment: of its matrices.
            team: ranks of the weight's group that compute them.
        """
        from torch.distributed.tensor import Replicate, Shard

        dims = _divided_dims(p)
        self.mesh, self.shape, self.moment = p.device_mesh, moment.shape, moment
        group = _group(self.mesh, dims)
        assert group is not None
        self.group = group
        # The longest dimension along the mesh's first one, and so on. Chunks of chunks would do as
        # well, but torch 2.13 distributes whole tensors to uneven ones wrongly.
        longest = sorted(range(len(self.shape)), key=lambda d: -self.shape[d])
        along = dict(zip(dims, longest, strict=False))
        self.placements = [
            Shard(along[d]) if d in along else Replicate() for d in range(self.mesh.ndim)
        ]
        self.chunks: list[Box | None] = []
        self.first_chunks: list[Box | None] = []  # of what several ranks have, the first one's
        for place in itertools.product(*(range(self.mesh.size(d)) for d in dims)):
            box, at = [(0, size) for size in self.shape], dict(zip(dims, place, strict=True))
            for d, dim in along.items():
                box[dim] = _chunk(self.shape[dim], self.mesh.size(d), at[d])
            self.chunks.append(box)
            first = all(at[d] == 0 for d in dims if d not in along)
            self.first_chunks.append(box if first else None)
        self.shares: list[Box | None] = [None] * len(self.chunks)
        for number, rank in enumerate(team):
            share = [(0, size) for size in self.shape]
            if moment.dim is not None:
                each = self.shape[moment.dim] // len(team)
                share[moment.dim] = number * each, (number + 1) * each
            self.shares[rank] = share
        # Where the whole team has the same, its first rank sends it.
        senders = team[:1] if moment.dim is None else team
        self.sent = [box if rank in senders else None for rank, box in enumerate(self.shares)]

    def scatter(self, mine: Tensor | None, like: Tensor) -> Tensor:
        """Return the moment as a DTensor; a collective of the group.

        Args:
            mine: this rank's share, if it is of the team.
            like: of the moment's dtype, on the device that the group exchanges.
        """
        from torch.distributed.tensor import DTensor

        chunk = self._move(self.sent, mine, self.chunks, like)
        assert chunk is not None
        return DTensor.from_local(
            chunk,
            self.mesh,
            self.placements,
            run_check=False,
            shape=torch.Size(self.shape),
            stride=tuple(prod(self.shape[d + 1 :]) for d in range(len(self.shape))),
        )

    def gather(self, x: Tensor) -> Tensor | None:
        """Return this rank's share of a moment, if it is of the team; a collective of the group.

        Args:
            x: a whole one, or a DTensor.
        """
        if is_dtensor(x):
            return self._move(self.first_chunks, local(x), self.shares, local(x))
        share = self.shares[self.group.rank()]
        return None if share is None else x[_within(share, [(0, size) for size in self.shape])]

    def unfit(self, x: Any) -> str:
        """Why a moment of a state dict is neither whole nor as here, or an empty string."""
        if not is_dtensor(x) or (x.device_mesh, list(x.placements)) == (self.mesh, self.placements):
            return ""
        return (
            f"is divided as {x.placements} over {x.device_mesh}, and not as {self.placements} over "
            f"{self.mesh}: load it with torch.distributed.checkpoint into this optimizer's state"
        )

    def _move(
        self,
        have: Sequence[Box | None],
        x: Tensor | None,
        want: Sequence[Box | None],
        like: Tensor,
    ) -> Tensor | None:
        """Bring what every rank wants of what others have; None where this one wants nothing."""
        here = self.group.rank()
        mine, wanted = have[here], want[here]
        sent = [_overlap(mine, other) for other in want]
        got = [_overlap(wanted, other) for other in have]
        parts = [
            x[_within(box, mine)].reshape(-1) for box in sent if box and mine and x is not None
        ]  # of moments in host memory too
        out = torch.cat(parts).to(like.device) if parts else like.new_empty(0)
        counts, into_counts = [[_numel(box) for box in boxes] for boxes in (sent, got)]
        into = like.new_empty(sum(into_counts))
        dist.all_to_all_single(into, out, into_counts, counts, group=self.group)
        if wanted is None:
            return None
        result = like.new_empty([stop - start for start, stop in wanted])
        for box, piece in zip(got, torch.split(into, into_counts), strict=True):
            if box:
                result[_within(box, wanted)] = piece.view([stop - start for start, stop in box])
        return result


def _overlap(one: Box | None, other: Box | None) -> Box | None:
    if one is None or other is None:
        return None
    box = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True)]
    return box if all(a < b for a, b in box) else None


def _within(box: Box, outer: Box) -> tuple[slice, ...]:
    return tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(box, outer, strict=True))


def _numel(box: Box | None) -> int:
    return prod(b - a for a, b in box) if box else 0
