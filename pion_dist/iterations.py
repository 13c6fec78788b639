"""How a step's iterations run: coefficients, counts and panels, which ``cost`` counts too."""

from __future__ import annotations

from itertools import pairwise

# Muon's quintic (K. Jordan, 2024, https://kellerjordan.github.io/posts/muon/). From a tight bound
# of the largest singular value, 3 steps do what 5 do from the Frobenius norm: values above 0.02
# of it end in [0.68, 1.21].
NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 3

# Rows of a panel, at least, and panels at most: lower ones keep a device less busy. On one CPU core
# a product takes 0.78, 0.73 and 0.71 of its time at d = 512, 1024 and 2048 in float32, 0.88, 0.85
# and 0.73 in bf16, and at 256 it would take more (4 panels, by hand). On an H100 2048 rows by 2048
# are 128 of cuBLAS's tiles for 132 multiprocessors (not measured).
_PANEL_ROWS = {"cpu": 160}
_PANEL_ROWS_OF_OTHERS = 2048
_PANELS = 4


def panels(d: int, device: str) -> list[tuple[int, int]]:
    """First and last row, exclusive, of each panel of a d x d product, see ``Products.mirrored``.

    Args:
        d: rows.
        device: type of the device that computes it.
    """
    count = max(1, min(_PANELS, d // _PANEL_ROWS.get(device, _PANEL_ROWS_OF_OTHERS)))
    edges = [d * i // count for i in range(count + 1)]
    return list(pairwise(edges))
