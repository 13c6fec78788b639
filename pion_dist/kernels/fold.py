"""The folded layout of a skew matrix, or a symmetric one with zero diagonal: half the elements.

With h = ⌈d/2⌉ a matrix is [[L11, .], [L21, L22]]; its strict lower triangle is all of L21 and the
strict lower triangles of L11 and L22. Folded, it is two dense planes [2, h, h] of d²/2 elements:

    plane 0    L21, with a last row of zeros where d is odd
    plane 1    L11 below the diagonal, L22 transposed above it, zeros on it

A square tile of a plane is a square tile of the matrix, shifted by 0 or h along each axis, and
mirrored in L22. So a kernel that goes over tiles of the planes reads and writes whole rows of both.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..state import folded_shape


def is_folded(x: Tensor, d: int) -> bool:
    """Tell a batch of folded d x d matrices [B, 2, h, h] from one of dense matrices [B, d, d].

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
        x_Bdd: [B, d, d]; the diagonal and the elements above it are ignored.

    Returns:
        [B, 2, h, h].
    """
    x11, _, x21, x22 = _quarters(x_Bdd)
    f, plane0, plane1, corner = _planes(x_Bdd)
    plane0.copy_(x21)
    plane1.copy_(x11).tril_(-1)
    corner.add_(x22.mT.triu(1))
    return f


def fold_skew(x_Bdd: Tensor) -> Tensor:
    """Fold X − Xᵀ without forming it: [B, 2, h, h]."""
    x11, _, x21, x22 = _quarters(x_Bdd)
    t11, _, t21, t22 = _quarters(transposed(x_Bdd))
    f, plane0, plane1, corner = _planes(x_Bdd)
    torch.sub(x21, t21, out=plane0)
    plane1.copy_((x11 - t11).tril_(-1))
    corner.sub_((x22 - t22).triu_(1))
    return f


def fold_product(
    u_Bdr: Tensor, v_Bdr: Tensor, *, matmul: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Fold U Vᵀ − V Uᵀ = [U V] [V −U]ᵀ for even d, by a product for each quarter that it stores.

    These take 3r FLOP an element where U Vᵀ takes 2r, but nothing is read by columns.
    """
    h = u_Bdr.shape[1] // 2
    u, v = u_Bdr.mT, v_Bdr.mT  # their rows are contiguous where W is wide
    u1, u2 = torch.cat((u, v), 1).mT.split_with_sizes((h, h), 1)
    v1, v2 = torch.cat((v, -u), 1).split_with_sizes((h, h), 2)
    f = u.new_empty(u.shape[0], 2, h, h)
    plane0, plane1 = f.unbind(1)
    plane0.copy_(matmul(u2, v1))
    plane1.copy_(matmul(u1, v1).tril_(-1)).sub_(matmul(u2, v2).triu_(1))
    return f


def unfold(f: Tensor, d: int, *, skew: bool) -> Tensor:
    """Undo ``fold``.

    Args:
        f: [B, 2, h, h].
        d: rows of the matrices, 2h or 2h − 1.
        skew: whether to negate the lower triangle when it is mirrored into the upper one.

    Returns:
        [B, d, d], with a diagonal of zeros.
    """
    x = f.new_empty(f.shape[0], d, d)
    x11, x12, x21, x22 = _quarters(x)
    plane0, plane1, corner = _parts(f, d)
    lower = _empty(f, plane1.shape[-1]).copy_(plane1).tril_(-1)
    upper = _empty(f, corner.shape[-1])
    torch.sub(corner, lower if d % 2 == 0 else lower[:, :-1, :-1], out=upper)
    join = torch.sub if skew else torch.add
    join(lower, lower.mT, out=x11)
    join(upper.mT, upper, out=x22)
    x21.copy_(plane0)
    if skew:
        torch.neg(plane0.mT, out=x12)
    else:
        x12.copy_(plane0.mT)
    return x


# When a matrix is read by columns, rows of a multiple of 512 bytes compete for the same lines of a
# CPU's cache. X − Xᵀ takes 0.8 ns an element of 256 x 256 float32 matrices, 2.1 ns of
# 512 x 512, and 0.6 ns with a copy whose rows are a cache line longer (one core, torch 2.13). Below
# SMALL the copy costs as much as it saves. From LARGE on a column is longer than the first cache: a
# copy by tiles, which torch makes of a single matrix, takes 1.5 ns, and longer rows 2 to 8 ns.
SMALL, LARGE, LINE = 128, 640, 16


def transposed(x_Bdd: Tensor) -> Tensor:
    """Return Xᵀ for reading once: a view of X, or of a copy where that is faster."""
    d = x_Bdd.shape[-1]
    if x_Bdd.device.type != "cpu" or d < SMALL:
        return x_Bdd.mT
    if d < LARGE:
        return _empty(x_Bdd, d).copy_(x_Bdd).mT
    mirrored = torch.empty_like(x_Bdd)
    for to, matrix in zip(mirrored, x_Bdd, strict=True):
        to.copy_(matrix.t())
    return mirrored


def _empty(x: Tensor, d: int) -> Tensor:
    """Allocate a batch [B, d, d] like X whose memory suits reads by columns."""
    if x.device.type != "cpu" or d < SMALL:
        return x.new_empty(x.shape[0], d, d)
    return x.new_empty(x.shape[0], d, d + LINE)[..., :d]


def _quarters(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h, low = folded_shape(x.shape[-1])[1], x.shape[-1] // 2
    top, bottom = x.split_with_sizes((h, low), 1)
    x11, x12 = top.split_with_sizes((h, low), 2)
    x21, x22 = bottom.split_with_sizes((h, low), 2)
    return x11, x12, x21, x22


def _planes(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Allocate X's folded form, zero where L21 does not reach; return it and its ``_parts``."""
    d = x.shape[-1]
    f = x.new_empty(x.shape[0], *folded_shape(d))
    if d % 2:
        f[:, 0, -1] = 0.0
    return f, *_parts(f, d)


def _parts(f: Tensor, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the views of L21, of plane 1, and of the corner that L22 [d − h, d − h] covers."""
    plane0, plane1 = f.unbind(1)
    if d % 2:
        return plane0[:, :-1], plane1, plane1[:, :-1, :-1]
    return plane0, plane1, plane1
