"""Special functions against mpmath in 40 digits, and their derivatives in H against finite differences."""

import mpmath as mp
import pytest
import torch
from torch import Tensor

from sde.special import (
    backward_mean,
    forward_mean,
    mvn_projection,
    mvn_variance,
    phi2,
    rl_hypergeometric,
    rl_variance,
    scaled_upper_gamma,
)

HURSTS = (0.02, 0.05, 0.3, 0.5, 0.5001, 0.7, 0.95, 0.98)
ARGUMENTS = (1e-6, 1e-2, 1.0, 1.999, 2.001, 7.99, 8.01, 35.9, 36.1, 100.0, 1e4)


def f64(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize(
    ("a", "z", "value"),
    [
        (0.8, 9.9, 0.533175151874),
        (0.8, 10.1, 0.531223321242),
        (1.2, 48.0, 2.37193385929),
        (0.6, 5000.0, 0.0222549434962),
    ],
)
def test_scaled_upper_gamma_has_the_published_values(a: float, z: float, value: float) -> None:
    assert float(scaled_upper_gamma(f64(a), f64(z))) == pytest.approx(value, rel=1e-10)


def truth(name: str, hurst: float, z: float) -> mp.mpf:
    h, x = mp.mpf(hurst), mp.mpf(z)
    a, b = h + mp.mpf(1) / 2, 2 * h
    if name == "phi2":
        return (x + mp.expm1(-x)) / x**2
    if name == "upper":
        return mp.exp(x) * mp.gammainc(b, x, mp.inf, regularized=True)
    if name == "forward":
        return x**-b * mp.gammainc(b, 0, x)
    if name == "backward":
        return mp.hyp1f1(1, b + 1, -x) / b
    upper = mp.exp(x) * mp.gammainc(a, x, mp.inf, regularized=True)
    return 2 * x**-a - 1 / (x * mp.gamma(a + 1)) + (mp.exp(-x) - upper) * x ** (-a - 1)


# mvn_projection subtracts two numbers of the order e^z up to its switch at z = 8, which costs it three digits.
@pytest.mark.parametrize(
    ("name", "function", "tolerance"),
    [
        ("phi2", lambda h, z: phi2(z), 1e-14),
        ("upper", lambda h, z: scaled_upper_gamma(2 * h, z), 1e-12),
        ("forward", lambda h, z: forward_mean(2 * h, z), 1e-12),
        ("backward", lambda h, z: backward_mean(2 * h, z), 1e-12),
        ("projection", lambda h, z: mvn_projection(h + 0.5, z), 5e-12),
    ],
)
def test_against_mpmath(name: str, function, tolerance: float) -> None:  # type: ignore[no-untyped-def]
    with mp.workdps(40):
        for hurst in HURSTS:
            for z in ARGUMENTS:
                value, exact = float(function(f64(hurst), f64(z))), truth(name, hurst, z)
                assert abs(value - exact) <= tolerance * abs(exact), (hurst, z)


def test_hypergeometric_against_mpmath_on_both_sides_of_its_switch() -> None:
    with mp.workdps(40):
        for hurst in HURSTS:
            for x in (0.0, 1e-3, 0.3, 0.5, 0.5000001, 0.7, 0.99, 0.999999, 1.0):
                half = mp.mpf(1) / 2
                exact = (
                    mp.hyp2f1(half - mp.mpf(hurst), 1, mp.mpf(hurst) + 3 * half, mp.mpf(x))
                    if x < 1
                    else (mp.mpf(hurst) + half) / (2 * mp.mpf(hurst))
                )
                assert abs(float(rl_hypergeometric(f64(hurst), f64(x))) - exact) <= 1e-13 * exact, (hurst, x)


def test_variances_have_the_published_values() -> None:
    hurst = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
    published = torch.tensor([3.524481, 1.383376, 1.0, 0.995088, 1.930263], dtype=torch.float64)
    torch.testing.assert_close(mvn_variance(hurst), published, atol=5e-7, rtol=0)
    # At time 2 the Riemann-Liouville motion of H = 0.7 has variance 2.23598533 (the method sheet's E5).
    assert float(rl_variance(hurst[3]) * 2**1.4) == pytest.approx(2.23598533, abs=5e-9)


@pytest.mark.parametrize("hurst", [0.05, 0.5, 0.95])
def test_derivatives_in_the_hurst_index(hurst: float) -> None:
    h = f64(hurst).requires_grad_()
    z = torch.tensor(ARGUMENTS, dtype=torch.float64)
    x = torch.tensor([0.0, 0.2, 0.49, 0.51, 0.9, 1.0], dtype=torch.float64)
    for function in (
        lambda h: mvn_projection(h + 0.5, z),
        lambda h: scaled_upper_gamma(h + 0.5, z),
        lambda h: forward_mean(2 * h, z),
        lambda h: backward_mean(2 * h, z),
        lambda h: rl_hypergeometric(h, x),
        mvn_variance,
        rl_variance,
    ):
        assert torch.autograd.gradcheck(function, (h,))


def test_the_naive_form_of_phi2_would_fail() -> None:
    """The form in the literature has no digit left at 1e-8, where the series is exact."""
    z = f64(1e-8)
    naive = (z + torch.exp(-z) - 1) / z**2
    assert abs(float(phi2(z)) - 0.5) < 1e-8
    assert abs(float(naive) - 0.5) > 0.1
