"""The folded layout of a skew matrix, or of a symmetric one with zero diagonal: half the elements.

With h = ⌈d/2⌉ a matrix is [[L11, .], [L21, L22]]; its strict lower triangle is all of L21 and the
strict lower triangles of L11 and L22. Folded it is two dense planes [2, h, h], of d²/2 elements:

    plane 0    L21, with a last row of zeros where d is odd
    plane 1    L11 below the diagonal, L22 transposed above it, zeros on it

A square tile of a plane is a square tile of the matrix, shifted by 0 or h along either axis and
mirrored in L22: a kernel that goes over tiles of the planes reads and writes whole rows of both.
"""

from __future__ import annotations

from torch import Tensor


def folded_shape(d: int) -> tuple[int, int, int]:
    """The shape [2, h, h] of a folded d x d matrix."""
    h = (d + 1) // 2
    return 2, h, h


def is_folded(x: Tensor, d: int) -> bool:
    """Whether x is a batch of folded d x d matrices [B, 2, h, h], and not of dense ones [B, d, d].

    Raises:
        ValueError: it is neither.
    """
    if tuple(x.shape[1:]) not in ((d, d), folded_shape(d)):
        raise ValueError(
            f"{tuple(x.shape)} is no batch of {d}x{d} matrices, dense or folded "
            f"to {folded_shape(d)}"
        )
    return x.dim() == 4


def fold(x_Bdd: Tensor) -> Tensor:
    """Fold the strict lower triangle of each matrix.

    Args:
        x_Bdd: [B, d, d]; the diagonal and what is above it do not matter.

    Returns:
        [B, 2, h, h].
    """
    x11, _, x21, x22 = _quarters(x_Bdd)
    return _joined(x11, x21, x22.mT)


def fold_skew(x_Bdd: Tensor) -> Tensor:
    """``fold`` of X − Xᵀ, which is not formed: [B, 2, h, h]."""
    x11, x12, x21, x22 = _quarters(x_Bdd)
    return _joined(x11 - x11.mT, x21 - x12.mT, x22.mT - x22)


def unfold(f: Tensor, d: int, *, skew: bool) -> Tensor:
    """The inverse of ``fold``.

    Args:
        f: [B, 2, h, h].
        d: rows of the matrices, 2h or 2h − 1.
        skew: the upper triangle is minus the mirrored lower one, else the mirrored one itself.

    Returns:
        [B, d, d], its diagonal zero.
    """
    x = f.new_empty(f.shape[0], d, d)
    x11, x12, x21, x22 = _quarters(x)
    l11, l21, l22 = f[:, 1].tril(-1), f[:, 0, : d - f.shape[2]], _corner(f, d).triu(1).mT
    for quarter, lower in ((x11, l11), (x22, l22)):
        quarter.copy_(lower).sub_(lower.mT) if skew else quarter.copy_(lower).add_(lower.mT)
    x21.copy_(l21)
    x12.copy_(-l21.mT if skew else l21.mT)
    return x


def _quarters(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h = folded_shape(x.shape[-1])[1]
    return x[:, :h, :h], x[:, :h, h:], x[:, h:, :h], x[:, h:, h:]


def _corner(f: Tensor, d: int) -> Tensor:
    """The part of plane 1 that L22, [d − h, d − h], covers."""
    low = d - f.shape[2]
    return f[:, 1, :low, :low]


def _joined(l11: Tensor, l21: Tensor, l22_mirrored: Tensor) -> Tensor:
    batch, low, h = l21.shape
    f = l11.new_empty(batch, 2, h, h)
    f[:, 0, :low] = l21
    f[:, 0, low:] = 0.0
    f[:, 1] = l11.tril(-1)
    _corner(f, low + h).add_(l22_mirrored.triu(1))
    return f
