"""Stop a step with non-finite gradients on the device, and log it when the host looks."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

logger = logging.getLogger("pion_dist")


class Guard:
    """A counter of non-finite gradients per parameter, on the device, which it never waits for.

    The count reaches the host by a copy that the next step finds finished, or by ``report``.
    """

    def __init__(self) -> None:
        """Start with no step counted."""
        self._names: list[str] = []
        self._counts: Tensor | None = None
        self._host: Tensor | None = None
        self._copied: torch.cuda.Event | None = None
        self._reported: list[int] = []

    def check(self, names: Sequence[str], grads: Sequence[Tensor]) -> Tensor:
        """Tell whether all gradients are finite, and count those that are not.

        A gradient counts as finite if its sum of squares is, in its own precision but at least
        float32: the moments could not hold a larger one.

        Args:
            names: one per gradient.
            grads: tensors of any devices and floating dtypes, at least one.

        Returns:
            Boolean scalar on the first gradient's device.
        """
        if list(names) != self._names:
            self.report()
            self._names, self._counts = list(names), None
        device = grads[0].device
        norms: list[Tensor] = [grads[0]] * len(grads)
        kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for place, grad in enumerate(grads):
            kinds.setdefault((grad.device, grad.dtype), []).append(place)
        for (_, dtype), places in kinds.items():
            wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else None
            kind_norms = torch._foreach_norm([grads[place] for place in places], 2, wide)
            for place, norm in zip(places, kind_norms, strict=True):
                norms[place] = norm.to(device=device, dtype=torch.float32, non_blocking=True)
        bad = ~torch.isfinite(torch.stack(norms))
        if self._counts is None:
            self._counts = torch.zeros(len(grads), dtype=torch.int64, device=device)
            self._host = torch.zeros(
                len(grads), dtype=torch.int64, pin_memory=device.type == "cuda"
            )
            self._reported = [0] * len(grads)
        self._counts.add_(bad)
        assert self._host is not None
        self._host.copy_(self._counts, non_blocking=True)
        if device.type == "cuda":
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()
        return ~bad.any()

    def look(self) -> None:
        """Log counts that have reached the host since the last look; never wait."""
        if self._host is None or (self._copied is not None and not self._copied.query()):  # type: ignore[no-untyped-call]
            return
        counts = self._host.tolist()
        new = [
            f"{name} ({count - seen} step{'s' if count - seen > 1 else ''})"
            for name, count, seen in zip(self._names, counts, self._reported, strict=True)
            if count > seen
        ]
        if new:
            self._reported = counts
            logger.warning(
                "the gradient was not finite for %s: such a step moves no weight and no moment",
                ", ".join(new),
            )

    def report(self) -> None:
        """Wait for the device, then ``look``."""
        if self._copied is not None:
            self._copied.synchronize()
        self.look()
