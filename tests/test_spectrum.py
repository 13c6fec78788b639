"""The drift is the largest relative change of a singular value, matrix by matrix."""

import torch

from pion_dist.spectrum import drift, singular_values


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
