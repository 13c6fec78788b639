"""Coefficients, counts and panels of a step's iterations, shared by ``update`` and ``cost``."""

from __future__ import annotations

from itertools import pairwise

# Muon's quintic (K. Jordan, 2024, https://kellerjordan.github.io/posts/muon/). From a tight bound
# of the largest singular value, 3 steps achieve what 5 do from the Frobenius norm: values above
# 0.02 of the bound end in [0.68, 1.21].
NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 3

# The least rows of a panel, and the most panels: panels of fewer rows keep a device less busy. On
# one CPU core panels reduce a product's time to 0.78, 0.73 and 0.71 at d = 512, 1024 and 2048 in
# float32, and 0.88, 0.85 and 0.73 in bf16; at 256 they would increase it (4 panels, by hand). On an
# H100 2048 rows by 2048 are 128 of cuBLAS's tiles for 132 multiprocessors (not measured).
_PANEL_ROWS = {"cpu": 160}
_PANEL_ROWS_OF_OTHERS = 2048
_PANELS = 4

# The least r for which the ranks of a team divide r x r matrices. By pion_dist.scale's rates of an
# H100 (not measured) a step of 7168 x 2048 on four takes 2.3 ms so and 2.4 without, one of 11008 x
# 3072 takes 4.6 and 6.4.
DIVIDED_ROWS = 2048


def divides_squares(r: int, ranks: int) -> bool:
    """Whether ranks of a team divide the rows of r x r matrices: ``update.squares``."""
    return ranks > 1 and r >= DIVIDED_ROWS and r % (2 * ranks) == 0


def panels(d: int, device: str) -> list[tuple[int, int]]:
    """Return the first row and the end of each panel of a d x d product: ``Products.mirrored``.

    Args:
        d: rows of the product.
        device: type of the device that computes it.
    """
    count = max(1, min(_PANELS, d // _PANEL_ROWS.get(device, _PANEL_ROWS_OF_OTHERS)))
    edges = [d * i // count for i in range(count + 1)]
    return list(pairwise(edges))
