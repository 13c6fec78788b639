"""Products at lower precision turn weights elsewhere, and keep their spectra all the same."""

from __future__ import annotations

import pytest
import torch
from reference import MSIGN, PUBLISHED
from torch import Tensor

from pion_dist import Pion, PionConfig
from pion_dist.iterations import panels
from pion_dist.update import polar, step
from pion_dist.update.precision import DIRECTION_PRODUCTS, Products, Split

# The last two have generators in factors, where the other dimension is more than twice as long.
SHAPES = ((16, 16), (12, 9), (32, 6), (6, 32))
STEPS, LR = 10, 0.1
# Turns by LR, the angles of the matrix sign.
EXACT_MSIGN = MSIGN | {"retraction": "exp", "scaling": "none"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", DIRECTION_PRODUCTS)
def test_into_is_the_product_whatever_was_there(name: str, dtype: torch.dtype) -> None:
    """Products and sums of numbers as ``rounded``, of k = 7 terms and one, to (k + 2) u and a last
    rounding to what is stored.
    """
    matmul = DIRECTION_PRODUCTS[name]
    generator = torch.Generator().manual_seed(0)
    a, b, c = (
        matmul.rounded(torch.randn(2, 7, 7, generator=generator, dtype=torch.float64).to(dtype))
        for _ in range(3)
    )
    u = torch.finfo(dtype).eps / 2
    stored = u if a.dtype == dtype else torch.finfo(a.dtype).eps / 2
    for add, beta, alpha in ((None, 0.0, 1.0), (c, 2.5, -0.75)):
        exact = alpha * (a.double() @ b.double()) + beta * c.double()
        terms = abs(alpha) * (a.double().abs() @ b.double().abs()) + beta * c.double().abs()
        for out in (torch.full_like(a, torch.nan), torch.full_like(a, torch.nan).mT):
            result = matmul.into(out, a, b, add=add, beta=beta, alpha=alpha)
            assert result is out and out.dtype == a.dtype
            error = (out.double() - exact).abs()
            assert (error <= 9 * u * terms + 1.01 * stored * exact.abs()).all()


def test_split_products_lose_what_their_pieces_lose() -> None:
    """Three parts of 2^-18 of each term, of 40, and the rounding of float32's sum of 120."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(3, 24, 40, generator=generator) * torch.logspace(-6, 6, 40)
    b = torch.randn(3, 16, 40, generator=generator).mT / torch.logspace(-6, 6, 40)[:, None]
    product, terms = Split()(a, b), a.double().abs() @ b.double().abs()
    error = (product.double() - a.double() @ b.double()).abs()
    assert product.dtype == torch.float32
    assert (error <= (3 * 2.0**-18 + 120 * 2.0**-24) * terms).all()
    assert torch.equal(Split()(a.double(), b.double()), a.double() @ b.double())


def trained(config: PionConfig) -> tuple[list[Tensor], list[Tensor]]:
    """Weights before and after."""
    generator = torch.Generator().manual_seed(1)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    before = [p.detach().clone() for p in params]
    pion = Pion(params, lr=LR, config=config)
    for _ in range(STEPS):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        pion.step()
    return before, [p.detach() for p in params]


@pytest.mark.parametrize("precision", ["high", "bf16"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        EXACT_MSIGN,
        EXACT_MSIGN | {"side": "both", "scaling": "rms"},
        PUBLISHED | {"retraction": "exp"},
        MSIGN | {"direction": "momentum", "retraction": "cayley"},
    ],
    ids=["default", "msign", "both", "lie", "cayley"],
)
def test_low_precision_keeps_the_spectrum(options: dict[str, str], precision: str) -> None:
    """As exactly as float32 does: products in bf16 of what moves W would leave 2^-8 of 0.1 a step.

    A step turns by 0.1 at most: it rounds W by 3 u, and two sides' five products of inner length
    k <= 32, of 0.1 W, by 10 sqrt(k) u / 10 = 6 u. Ten steps add up to 100 u of the largest singular
    value, u = 2^-24. Polar's frames are orthonormal to 10 sqrt(k) u, but for bf16's 2^-8 of how far
    they were before they were polished, angle^6 / 64 = 4e-6 at 0.25. Where the weights go differs
    by bf16's 2^-8, and more where a sign or a polar factor enlarges a small singular value
    (measured: 0.02).
    """
    before, after = trained(PionConfig(matmul_precision=precision, **options))
    _, full = trained(PionConfig(**options))
    for old, new, other in zip(before, after, full, strict=True):
        s = torch.linalg.svdvals(old.double())
        assert (torch.linalg.svdvals(new.double()) - s).abs().max() <= 100 * 2.0**-24 * s[0]
        apart = (new - other).norm() / (other - old).norm()
        if precision == "bf16":  # on the CPU TF32 is float32
            assert 0.0 < apart < 0.1
        else:
            assert apart == 0.0


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({}, 4 * 2.0**-18),
        (EXACT_MSIGN, 0.1 * 2.0**-18 * 50**0.5),
        (EXACT_MSIGN | {"retraction": "cayley"}, 0.1 * 2.0**-18 * 50**0.5),
    ],
    ids=["default", "exp", "cayley"],
)
def test_what_tensor_cores_move_keeps_the_spectrum(
    options: dict[str, str], limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As GPUs compute it, on the CPU: the pieces of bf16, added up in float32.

    Errors of a product's terms, up to 2^-17 and of any sign, leave 2^-18 of a change of 0.1 W: as a
    random matrix that has 0.1 2^-18 of W's largest singular value. Five products a step and ten
    steps add up to sqrt(50) of that. (Plain bf16 leaves 2^8 times as much.)

    Polar makes W anew: nothing adds up. An element of a product of orthonormal columns is a sum of
    r terms of 1 / r, wrong by 2^-18 / sqrt(r), and such a matrix has the norm 2 · 2^-18. W is one,
    and half of the Gram matrix of each frame is how far that is off: 4 · 2^-18.
    """
    worst = {}
    for products in Split(), Products(stored=torch.bfloat16):
        for module in step, polar:
            monkeypatch.setattr(
                module, "choose_weight_products", lambda precision, device, it=products: it
            )
        before, after = trained(PionConfig(**options))
        spectra = [[torch.linalg.svdvals(x.double()) for x in each] for each in (before, after)]
        worst[type(products)] = max(
            ((b - a).abs().max() / a[0]) for a, b in zip(*spectra, strict=True)
        )
    print(f"of the largest singular value {worst[Split]:.1e}, by plain bf16 {worst[Products]:.1e}")
    assert worst[Split] <= limit < worst[Products]


@pytest.mark.parametrize("d", [1, 319, 320, 643, 1000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_mirrored_product_is_the_whole_one(d: int, dtype: torch.dtype) -> None:
    """On 1 to 4 panels: to rounding of d terms, 2^-53 each, or of the result to 8 bits.

    8 and 16 times that where 2 P or 3 X is added, whose elements are up to so many times X²'s.
    """
    x = torch.randn(2, d, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = (x - x.mT).to(dtype) / d**0.5
    p, q, skew = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
    exact = x.double() @ x.double()
    bound = 8 * d * 2.0**-53 if dtype == torch.float64 else 2.0**-8
    bound *= exact.abs().max()
    products = Products()
    assert (products.mirrored(p, x, x, sign=1).double() - exact).abs().max() <= bound
    products.mirrored(q, p, p, sign=1, add=p, beta=-2.0, alpha=0.5)
    exact = 0.5 * p.double() @ p.double() - 2.0 * p.double()
    assert (q.double() - exact).abs().max() <= 8 * bound
    products.mirrored(skew, x, q, sign=-1, add=x, beta=3.0)
    exact = x.double() @ q.double() + 3.0 * x.double()
    # Of bf16 q is not the exact polynomial in x, nor the product skew: by its rounding.
    assert (skew.double() - exact).abs().max() <= 16 * bound * max(1.0, q.abs().max().item())
    for low, high in panels(d, "cpu")[1:]:
        for y, sign in (p, 1), (q, 1), (skew, -1):
            assert torch.equal(y[:, :low, low:high], sign * y[:, low:high, :low].mT)
