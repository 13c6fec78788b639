"""Matrix products at a chosen precision, independent of the process's global settings."""

from __future__ import annotations

import contextlib
import functools
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import Tensor

from ..iterations import panels

# torch's own names for the float32 precisions.
_IEEE: Literal["ieee"] = "ieee"
_TF32: Literal["tf32"] = "tf32"


_NOTHING = contextlib.nullcontext()


def _settings() -> list[Any]:
    """Return the settings of the backends that can lower float32 precision."""
    return [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]


@contextlib.contextmanager
def float32_precision(name: str) -> Iterator[None]:
    """Run a block's float32 products at precision ``name``, then restore the global settings.

    torch has no precision argument per product. So a setting that differs is changed for the
    kernels launched inside, and restored on every way out. That takes 20 us: use it around a step,
    not around a product.

    Args:
        name: ``ieee`` or ``tf32``.
    """
    others = [(s, s.fp32_precision) for s in _settings() if s.fp32_precision != name]
    try:
        for setting, _ in others:
            setting.fp32_precision = name
        yield
    finally:
        for setting, value in others:
            setting.fp32_precision = value


@functools.cache
def cpu_has_bf16_units() -> bool:
    """Tell whether this CPU multiplies bf16 itself, and torch's oneDNN uses it.

    Without AVX-512 torch takes a scalar loop: 2.4 GFLOP/s on a core, where float32 has 95 (512 x
    512). With AVX-512 alone oneDNN emulates bf16, 37 GFLOP/s. Products are then computed in float32
    from the bf16 values and rounded once, as bf16 units do: 78 to 97 GFLOP/s, conversions included.
    oneDNN's own variable forces it: ``ONEDNN_MAX_CPU_ISA=AVX2``.
    """
    mkldnn: Any = torch.backends.mkldnn  # untyped
    if not (mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    # On other processors oneDNN's answer is that of the hardware.
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    return not is_x86 or torch.cpu._is_avx512_bf16_supported()


def cpu_bf16_products() -> str:
    """Describe how this CPU computes bf16 products."""
    if cpu_has_bf16_units():
        return "bf16 units"
    return "no bf16 units: bf16 products in float32, rounded once"


def _lacks_units(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not cpu_has_bf16_units()


class Terms(TypedDict, total=False):
    """The options of ``Products.into``: alpha a @ b + beta add."""

    add: Tensor
    beta: float
    alpha: float


@dataclass(frozen=True)
class Products:
    """Products of batches of matrices [B, ., .] at one precision; float64 stays float64.

    Call them inside ``float32_precision("ieee")``, as a step does.

    Attributes:
        setting: ``ieee`` or ``tf32``, for float32 products; TF32 only where the device has it.
        stored: dtype to which float32 inputs are rounded first, and results again. A product adds
            up in float32 (on GPUs parts of long sums may be bf16, unless
            ``torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction`` is off).
    """

    setting: Literal["ieee", "tf32"] = _IEEE
    stored: torch.dtype = torch.float32

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Compute a @ b in their dtype."""
        left, right = self.rounded(a), self.rounded(b)
        if _lacks_units(left):
            return torch.bmm(left.float(), right.float()).to(self.stored).to(a.dtype)
        with self._in_force(a):
            c = torch.bmm(left, right)
        return c if c.dtype == a.dtype else c.to(a.dtype)

    def into(
        self,
        out: Tensor,
        a: Tensor,
        b: Tensor,
        *,
        add: Tensor | None = None,
        beta: float = 0.0,
        alpha: float = 1.0,
    ) -> Tensor:
        """Write alpha a @ b + beta add into ``out``, which is none of them. (modified in place)

        All tensors are ``rounded`` already.
        """
        c = out if add is None else add
        if _lacks_units(a):
            return out.copy_(torch.baddbmm(c.float(), a.float(), b.float(), beta=beta, alpha=alpha))
        if out.stride(-2) == 1 != out.stride(-1):
            # On some CPUs torch writes bf16 products into a transpose element by element: 39 ms for
            # 128 x 96, and not 0.03.
            self.into(out.mT, b.mT, a.mT, add=c.mT, beta=beta, alpha=alpha)
            return out
        with self._in_force(a):
            return torch.baddbmm(c, a, b, beta=beta, alpha=alpha, out=out)

    def mirrored(
        self, out: Tensor, a: Tensor, b: Tensor, *, sign: Literal[1, -1], **terms: Unpack[Terms]
    ) -> Tensor:
        """Do the same as ``into`` for a symmetric (``sign`` 1) or skew (-1) result.

        Only panels up to the diagonal are computed; the elements above them are mirrored.
        """
        for low, high in panels(out.shape[-1], out.device.type):
            self.panel(out[:, low:high, :high], a, b, low, high, **terms)
        return _mirror(out, sign)

    def panel(
        self, out: Tensor, a: Tensor, b: Tensor, low: int, high: int, **terms: Unpack[Terms]
    ) -> None:
        """Write rows ``low`` to ``high`` of the result of ``into``, up to column ``high``."""
        if "add" in terms:
            terms["add"] = terms["add"][:, low:high, :high]
        self.into(out, a[:, low:high], b[..., :high], **terms)

    def added(self, total: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0) -> Tensor:
        """Add alpha a @ b to ``total``. (modified in place)"""
        if self.rounded(a) is a and self.rounded(b) is b and total.dtype == a.dtype:
            with self._in_force(a):
                return torch.baddbmm(total, a, b, alpha=alpha, out=total)
        return total.add_(self(a, b), alpha=alpha)

    def symmetric(self, a: Tensor, b: Tensor, *, sign: Literal[1, -1] = 1) -> Tensor:
        """Compute a symmetric (``sign`` 1) or skew (-1) a @ b in their dtype, by ``mirrored``."""
        left = self.rounded(a)
        right = left if b is a else self.rounded(b)
        out = left.new_empty(a.shape[0], a.shape[1], b.shape[2])
        return self.mirrored(out, left, right, sign=sign).to(a.dtype)

    def rounded(self, x: Tensor) -> Tensor:
        """Round X to the dtype in which it is multiplied."""
        return x if x.dtype in (self.stored, torch.float64) else x.to(self.stored)

    def rounding(self, dtype: torch.dtype) -> float:
        """Return the relative error of a product's terms, for factors of ``dtype``."""
        if dtype == torch.float64:
            return 2.0**-53
        if self.stored == torch.bfloat16:
            return 2.0**-9
        return 2.0**-24 if self.setting == _IEEE else 2.0**-11

    def _in_force(self, a: Tensor) -> contextlib.AbstractContextManager[None]:
        if self.setting == _IEEE or a.dtype != torch.float32 or a.device.type == "cpu":
            return _NOTHING
        return float32_precision(self.setting)


@dataclass(frozen=True)
class Split(Products):
    """Products of float32 matrices from their bf16 pieces, on tensor cores: A₀B₀ + A₀B₁ + A₁B₀.

    A₀ is A rounded to bf16, and A₁ the remainder, rounded too; the pieces of a skew A are skew.
    The pieces miss 2^-18 of an element, and so does leaving out A₁B₁: each term of a product is off
    by less than 2^-16 of it, where TF32's error is 2^-10. The three are computed as one product of
    three times the inner length, which adds up in float32. ``into`` is not split: only the matrix
    sign, which moves no weight, uses it.
    """

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Compute a @ b in their dtype."""
        if a.dtype != torch.float32:
            return super().__call__(a, b)
        left, right = _pieces(a, -1, (0, 0, 1)), _pieces(b, -2, (0, 1, 0))
        if a.device.type == "cpu":  # no bf16 product with a float32 result here; pieces are exact
            return super().__call__(left.float(), right.float())
        return torch.bmm(left, right, out_dtype=torch.float32)

    def symmetric(self, a: Tensor, b: Tensor, *, sign: Literal[1, -1] = 1) -> Tensor:
        """Compute a symmetric or skew a @ b in their dtype, by the panels of ``mirrored``."""
        out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
        for low, high in panels(out.shape[-1], out.device.type):
            out[:, low:high, :high] = self(a[:, low:high], b[..., :high])
        return _mirror(out, sign)

    def added(self, total: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0) -> Tensor:
        """Add alpha a @ b to ``total``. (modified in place)"""
        return total.add_(self(a, b), alpha=alpha)

    def rounding(self, dtype: torch.dtype) -> float:
        """Return the relative error of a product's terms, which for float32 is the pieces'."""
        return 2.0**-16 if dtype == torch.float32 else super().rounding(dtype)


def _mirror(out: Tensor, sign: Literal[1, -1]) -> Tensor:
    """Mirror the panels into the elements above them. (modified in place)"""
    for low, high in panels(out.shape[-1], out.device.type)[1:]:
        torch.mul(out[:, low:high, :low].mT, sign, out=out[:, :low, low:high])
    return out


def _pieces(x: Tensor, dim: int, order: tuple[int, ...]) -> Tensor:
    """Place X rounded to bf16 (0) and the remainder (1) side by side along ``dim``, in order."""
    shape = list(x.shape)
    shape[dim] *= len(order)
    pieces = torch.empty(shape, dtype=torch.bfloat16, device=x.device)
    parts = pieces.chunk(len(order), dim)
    first, second = order.index(0), order.index(1)
    parts[first].copy_(x)
    torch.sub(x, parts[first], out=parts[second])
    for place, piece in enumerate(order):
        if place not in (first, second):
            parts[place].copy_(parts[(first, second)[piece]])
    return pieces


exact = Products()
"""IEEE arithmetic."""

DIRECTION_PRODUCTS = {
    "highest": exact,
    "high": Products(setting=_TF32),
    "bf16": Products(stored=torch.bfloat16),
}
"""Products by ``matmul_precision`` that only decide where a weight moves: those of generators, the
matrix sign, and the turning of moments."""


def choose_weight_products(precision: str, device: torch.device) -> Products:
    """Choose the products that move a weight, on which its spectrum depends.

    Args:
        precision: the run's ``matmul_precision``.
        device: device of the weights. Without tensor cores float32 is faster than its pieces.
    """
    return exact if precision == "highest" or device.type == "cpu" else Split()
