"""Moments in host memory, brought to the device a batch ahead of their use.

A device has two buffers during a step. While a batch is computed in one, the other's goes back to
the host, and then the next one comes into it, on a stream of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import prod

import torch
from torch import Tensor

Moments = Mapping[str, Tensor]
Batch = Sequence[Moments]
"""The moments of matrices of one shape, of each weight by name; each [B, ...]."""


@contextmanager
def joined(batch: Batch) -> Iterator[Moments]:
    """Give a batch's moments as one tensor each, and take over what is written into them."""
    if len(batch) == 1:
        yield batch[0]
        return
    together = {name: torch.cat([each[name] for each in batch]) for name in batch[0]}
    yield together
    for name, x in together.items():
        for each, part in zip(batch, torch.split(x, _counts(batch)), strict=True):
            each[name].copy_(part)


class Offloaded:
    """The moments of a step's batches, which a device computes one after the other.

    Attributes:
        buffers: bytes on the device: of every other batch, those of the largest.
    """

    def __init__(self, batches: Sequence[Batch], device: torch.device) -> None:
        """Allocate the buffers, and begin to bring the first batch.

        Args:
            batches: in the order of their use; in host memory, pinned where the device is a GPU.
            device: that computes them. (On a CPU the copies are as many, and have no use.)
        """
        self._batches, self._device, self._used = batches, device, 0
        self.buffers = [
            torch.empty(max(map(_nbytes, own)), dtype=torch.uint8, device=device)
            for own in (batches[::2], batches[1::2])
            if own
        ]
        self._arrived: list[torch.cuda.Event | None] = [None] * len(self.buffers)
        if device.type == "cuda":
            for buffer in self.buffers:
                buffer.record_stream(_stream(device))
        if batches:
            self._bring(0)

    @contextmanager
    def next(self) -> Iterator[Moments]:
        """Give the next batch's moments as one tensor each, and take back what is written there.

        After an exception nothing is taken back.
        """
        number, self._used = self._used, self._used + 1
        arrived = self._arrived[number % 2]
        if arrived is not None:
            torch.cuda.current_stream(self._device).wait_event(arrived)
        if number + 1 < len(self._batches):
            self._bring(number + 1)
        yield self._views(number)
        with self._copying():
            for host, device in self._pairs(number):
                host.copy_(device, non_blocking=self._device.type == "cuda")

    def _bring(self, number: int) -> None:
        with self._copying():
            for host, device in self._pairs(number):
                device.copy_(host, non_blocking=self._device.type == "cuda")
            if self._device.type == "cuda":
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record()
                self._arrived[number % 2] = event

    def _copying(self) -> AbstractContextManager[object]:
        """The stream of copies, behind what the device was given to do before."""
        if self._device.type != "cuda":
            return nullcontext()
        stream = _stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        return torch.cuda.stream(stream)

    def _pairs(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """What each weight's matrices have in host memory, and its place in the buffer."""
        batch = self._batches[number]
        for name, x in self._views(number).items():
            yield from zip(
                (each[name] for each in batch), torch.split(x, _counts(batch)), strict=True
            )

    def _views(self, number: int) -> dict[str, Tensor]:
        """A batch's moments in its buffer: the widest and largest first.

        This aligns each to its elements, and to 16 bytes where dimensions are multiples of 8.
        """
        batch, buffer = self._batches[number], self.buffers[number % 2]
        count, start, views = sum(_counts(batch)), 0, {}
        for name, x in sorted(batch[0].items(), key=lambda item: _width(item[1]), reverse=True):
            stop = start + count * prod(x.shape[1:]) * x.itemsize
            views[name] = buffer[start:stop].view(x.dtype).view(count, *x.shape[1:])
            start = stop
        return views


def at_home(x: Tensor, device: torch.device) -> Tensor:
    """Return a moment in host memory; a copy, where a trainer has moved it or not pinned it.

    Lightning moves all of an optimizer's state to the device, and ``copy.deepcopy`` pins nothing.

    Args:
        x: the moment.
        device: that computes it.
    """
    pinned = device.type == "cuda"
    if not x.numel() or (x.device.type == "cpu" and (x.is_pinned() or not pinned)):
        return x
    return torch.empty_like(x, device="cpu", pin_memory=pinned).copy_(x)


def wait(device: torch.device) -> None:
    """Wait for the copies between the host and a device, before the host looks at moments."""
    if device.type == "cuda":
        _stream(device).synchronize()


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of a device's copies; one for all steps, which keeps their order."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _counts(batch: Batch) -> list[int]:
    return [len(next(iter(each.values()))) for each in batch]


def _nbytes(batch: Batch) -> int:
    return sum(x.nbytes for each in batch for x in each.values())


def _width(x: Tensor) -> tuple[int, int]:
    return x.itemsize, prod(x.shape[1:])
