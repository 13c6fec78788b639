"""The drift is the largest relative change of a singular value, matrix by matrix."""

import torch

from pion_dist.spectrum import (
    drift,
    gram,
    largest,
    norms_of,
    norms_of_values,
    restored,
    singular_values,
    values_of,
)


def test_drift_is_per_matrix_and_relative_to_each_value() -> None:
    start = torch.diag_embed(torch.tensor([[4.0, 2.0, 1.0], [8.0, 8.0, 8.0]]))
    now = start.clone()
    now[0, 2, 2] = 1.1
    measured = drift(singular_values(start), singular_values(now))
    # 1.1 and 1.0 are float32 numbers, each within 2**-24 of what is written.
    torch.testing.assert_close(measured, torch.tensor([0.1, 0.0]).double(), rtol=0, atol=1e-6)


def test_rotations_do_not_drift_and_scaling_does() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    q = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q
    start = singular_values(x)
    assert drift(start, singular_values(q @ x)) < 1e-13  # backward error of the SVD, 6 * 2**-52
    torch.testing.assert_close(drift(start, singular_values(1.5 * x)).item(), 0.5)


def test_values_that_are_zero_do_not_blow_up() -> None:
    start, now = torch.tensor([[1.0, 0.0], [1.0, 1e-9]], dtype=torch.float64)
    torch.testing.assert_close(drift(start, now).item(), 1e-9 / 1e-6)
    assert drift(torch.zeros(2), torch.zeros(2)) == 0
    assert drift(torch.zeros(2), torch.ones(2)) == torch.inf


def test_values_by_squares_and_norms_are_the_singular_values_() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 8, 5), (3, 5, 8), (2, 7, 7)):
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        expected = singular_values(x)
        # Squares are exact to 2**-53 * 8 of the largest; of 19 values none is below 0.05 of it.
        torch.testing.assert_close(values_of(gram(x)), expected, rtol=1e-12, atol=0)
        # Sums of 56 squares, and a largest value that is found in a space of all dimensions.
        norms = torch.stack((torch.linalg.matrix_norm(x), expected[:, 0]), -1)
        torch.testing.assert_close(norms_of(x), norms, rtol=1e-13, atol=0)
        torch.testing.assert_close(norms_of_values(expected), norms, rtol=1e-13, atol=0)


def test_the_largest_value_of_a_wide_spectrum_is_found() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(300, 400, generator=generator, dtype=torch.float64)
    expected = singular_values(x)[0]
    torch.testing.assert_close(largest(x), expected, rtol=1e-13, atol=0)
    assert largest(torch.zeros(4, 3)) == 0


def test_restored_has_the_values_and_is_the_nearest() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
    values = singular_values(x) * torch.tensor([1.1, 0.9, 1.2, 0.8])
    result = restored(x, values)
    # Sums of up to 6 of values around 3.
    torch.testing.assert_close(
        singular_values(result), values.sort(-1, descending=True)[0], rtol=1e-13, atol=0
    )
    # No matrix with these values is nearer than their distance (Mirsky 1960).
    nearest = (values - singular_values(x)).norm(dim=-1)
    torch.testing.assert_close((result - x).norm(dim=(-2, -1)), nearest, rtol=1e-12, atol=0)
