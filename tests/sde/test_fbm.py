"""Exact fractional motions and noises against closed forms, quadrature and their own samples."""

import math
from typing import Any

import mpmath as mp
import numpy as np
import pytest
import torch
from torch import Tensor

from sde import (
    FractionalBrownianMotion,
    FractionalOrnsteinUhlenbeck,
    fractional_gaussian_noise,
    increment_autocovariance,
    motion_covariance,
    ornstein_uhlenbeck_covariance,
)
from sde.fbm import _fast_length
from sde.special import mvn_variance


def f64(*values: float) -> Tensor:
    return torch.tensor(values if len(values) > 1 else values[0], dtype=torch.float64)


def test_published_riemann_liouville_covariance() -> None:
    covariance = FractionalBrownianMotion(0.7, "rl", "gamma").covariance([0.25, 0.5, 1.0, 2.0])
    diagonal = f64(0.12165864, 0.32105908, 0.84728, 2.23598533)
    torch.testing.assert_close(covariance.diagonal(), diagonal, atol=5e-9, rtol=0)
    assert float(covariance[2, 3]) == pytest.approx(1.07548797, abs=5e-9)


@pytest.mark.parametrize("hurst", [0.1, 0.45, 0.8])
def test_riemann_liouville_covariance_against_quadrature(hurst: float) -> None:
    """int_0^s (s - r)^(a-1) (t - r)^(a-1) dr / Gamma(a)^2, in x = (s - r)^a to lift the singularity."""
    a = mp.mpf(hurst) + mp.mpf(1) / 2
    own = FractionalBrownianMotion(hurst, "rl", "gamma").covariance([0.4, 0.41, 2.0])
    for (i, s), (j, t) in (((0, 0.4), (1, 0.41)), ((1, 0.41), (2, 2.0))):
        lag = mp.mpf(t) - mp.mpf(s)
        points = [0, min(lag, s / 2) ** a, mp.mpf(s) ** a]
        exact = mp.quad(lambda x, lag=lag: (x ** (1 / a) + lag) ** (a - 1) / a, points) / mp.gamma(a) ** 2
        assert float(own[i, j]) == pytest.approx(float(exact), rel=1e-9)


@pytest.mark.parametrize(
    ("hurst", "theta", "variances"),
    [
        (0.3, 1.0, (0.461798846, 0.455497265)),
        (0.7, 1.0, (0.414900726, 0.564320068)),
        (0.7, 2.0, (0.213837319, 0.23351298)),
    ],
)
def test_published_fractional_ornstein_uhlenbeck(hurst: float, theta: float, variances: tuple[float, ...]) -> None:
    own = FractionalOrnsteinUhlenbeck(hurst, theta).covariance([1.0, 2.0]).diagonal()
    torch.testing.assert_close(own, f64(*variances), atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("hurst", "theta", "s", "t"), [(0.1, 1.5, 0.5, 2.0), (0.9, 1.5, 0.5, 2.0), (0.3, 12.0, 0.3, 1.4)]
)
def test_fractional_ornstein_uhlenbeck_against_quadrature(hurst: float, theta: float, s: float, t: float) -> None:
    """X_t = B_t - theta int e^(-theta (t-u)) B_u du, as in the method sheet, the double integral split at its kink."""
    h, th, ss, tt = (mp.mpf(x) for x in (hurst, theta, s, t))

    def k(x: Any, y: Any) -> Any:
        return (x ** (2 * h) + y ** (2 * h) - abs(x - y) ** (2 * h)) / 2

    with mp.workdps(12):
        exact = k(ss, tt) - th * mp.quad(lambda u: mp.exp(-th * (tt - u)) * k(ss, u), [0, ss, tt])
        exact -= th * mp.quad(lambda u: mp.exp(-th * (ss - u)) * k(u, tt), [0, ss])
        # The weight e^(-th (s+t-u-v)) times the covariance of the increments, reduced to one dimension in w = v - u
        exact += th**2 * mp.quad(
            lambda u: mp.quad(lambda v: mp.exp(-th * (ss - u) - th * (tt - v)) * k(u, v), [0, u, tt], maxdegree=4),
            [0, ss],
            maxdegree=4,
        )
    own = FractionalOrnsteinUhlenbeck(hurst, theta).covariance([s, t])
    assert float(own[0, 1]) == pytest.approx(float(exact), abs=1e-8)


@pytest.mark.parametrize("hurst", [0.1, 0.7])
def test_riemann_liouville_ornstein_uhlenbeck_against_quadrature(hurst: float) -> None:
    a, th = mp.mpf(hurst) + mp.mpf(1) / 2, mp.mpf("1.5")

    def response(u: Any) -> Any:
        return u ** (a - 1) * (1 - th * u * mp.hyp1f1(1, a + 1, -th * u) / a)

    exact = mp.quad(lambda x: response(x) * response(x + 0.75), [0, 1e-6, 1e-3, 0.1, 0.5]) / mp.gamma(a) ** 2
    own = FractionalOrnsteinUhlenbeck(hurst, 1.5, "rl", "gamma").covariance([0.5, 1.25])
    assert float(own[0, 1]) == pytest.approx(float(exact), rel=1e-8)


@pytest.mark.parametrize("kind", ["mvn", "rl"])
def test_no_reversion_is_the_motion(kind: str) -> None:
    times = f64(0.0, 0.01, 0.5, 0.50001, 3.0)
    for hurst in (0.03, 0.5, 0.97):
        own = ornstein_uhlenbeck_covariance(times, f64(hurst), f64(0.0), kind)
        torch.testing.assert_close(own, motion_covariance(times, f64(hurst), kind), atol=1e-11, rtol=1e-11)


def test_half_is_the_classical_ornstein_uhlenbeck_process() -> None:
    times, theta = torch.linspace(0.1, 40.0, 12).double(), 1.3
    exact = (torch.exp(-theta * (times - times[:, None]).abs()) - torch.exp(-theta * (times + times[:, None]))) / (
        2 * theta
    )
    for kind in ("mvn", "rl"):
        own = FractionalOrnsteinUhlenbeck(0.5, theta, kind).covariance(times)
        torch.testing.assert_close(own, exact, atol=1e-13, rtol=1e-10)


def test_the_process_from_zero_is_not_the_conditioned_stationary_one() -> None:
    """The authors' bridge conditions a stationary process on X(0) = 0: std .51626 at t = 1 for H = .7, not .52818."""
    c = FractionalOrnsteinUhlenbeck(0.7, 1.0).covariance([1.0, 2.0])
    std = math.sqrt(c[0, 0] - c[0, 1] ** 2 / (c[1, 1] + 0.01))
    assert std == pytest.approx(0.528183, abs=5e-7)
    late = FractionalOrnsteinUhlenbeck(0.7, 1.0).covariance([60.0, 61.0, 62.0])  # stationary by then
    rest = late - torch.outer(late[0], late[0]) / late[0, 0]
    wrong = math.sqrt(rest[1, 1] - rest[1, 2] ** 2 / (rest[2, 2] + 0.01))
    assert wrong == pytest.approx(0.51626, abs=5e-6)


@pytest.mark.parametrize(("hurst", "theta"), [(0.2, 30.0), (0.8, 0.5)])  # both branches of the type I formula
def test_covariances_are_differentiable(hurst: float, theta: float) -> None:
    times = f64(0.0, 0.2, 1.0)
    h, th = f64(hurst).requires_grad_(), f64(theta).requires_grad_()
    for kind in ("mvn", "rl"):
        # The fast mode checks one random direction: the type II quadrature is long to differentiate entry by entry.
        assert torch.autograd.gradcheck(lambda h, k=kind: motion_covariance(times, h, k), (h,))
        assert torch.autograd.gradcheck(
            lambda h, th, k=kind: ornstein_uhlenbeck_covariance(times, h, th, k), (h, th), fast_mode=True
        )
    assert torch.autograd.gradcheck(lambda h: increment_autocovariance(h, 30), (h,))


def test_autocovariance_keeps_its_digits_at_long_lags() -> None:
    hurst, lag = 0.3, 100_000
    own = increment_autocovariance(f64(hurst), lag + 1)
    with mp.workdps(40):
        for k in (1, 20, 21, lag):
            e = 2 * mp.mpf(hurst)
            exact = (mp.mpf(k + 1) ** e - 2 * mp.mpf(k) ** e + mp.mpf(k - 1) ** e) / 2
            assert abs(float(own[k]) / exact - 1) < 5e-12, k


@pytest.mark.parametrize("hurst", [0.1, 0.5, 0.9])
def test_circulant_samples_have_the_autocovariance(hurst: float) -> None:
    """n = 1024, 4000 paths, lags 0 to 5: within 4 standard errors, taken from the scatter between paths."""
    paths = fractional_gaussian_noise(hurst, 1024, 4000, seed=0)
    assert paths.shape == (1024, 4000)
    exact = increment_autocovariance(f64(hurst), 6)
    for lag in range(6):
        per_path = (paths[: 1024 - lag] * paths[lag:]).mean(0)
        error = per_path.std() / math.sqrt(4000)
        assert abs(float(per_path.mean() - exact[lag])) < 4 * float(error), lag


def test_a_circulant_of_n_instead_of_two_n_would_fail() -> None:
    """A circulant of length n wraps around: the first and the last increment would be neighbours."""
    paths = fractional_gaussian_noise(0.9, 64, 20_000, seed=0)
    correlation = float((paths[0] * paths[-1]).mean())
    assert correlation == pytest.approx(float(increment_autocovariance(f64(0.9), 64)[-1]), abs=0.03)
    assert correlation < 0.5 < float(increment_autocovariance(f64(0.9), 2)[1])


@pytest.mark.parametrize(
    ("process", "times"),
    [
        (FractionalBrownianMotion(0.2), torch.linspace(0, 1, 9)),
        (FractionalBrownianMotion(0.8, normalisation="gamma"), torch.linspace(0.5, 4.0, 8)),
        (FractionalBrownianMotion(0.3, "rl"), f64(0.0, 0.1, 0.5, 0.6)),
        (FractionalBrownianMotion(0.3), f64(0.1, 0.5, 0.6)),
        (FractionalOrnsteinUhlenbeck(0.3, 2.0), f64(0.1, 0.5, 0.6)),
    ],
)
def test_samples_have_the_covariance(process: Any, times: Tensor) -> None:
    paths = process.sample(times, 20_000, seed=2)
    assert paths.shape == (len(times), 20_000)
    exact = process.covariance(times)
    spread = ((exact**2 + torch.outer(exact.diagonal(), exact.diagonal())) / 20_000).sqrt()
    assert bool(((paths @ paths.mT / 20_000 - exact).abs() <= 4.5 * spread).all())


def test_unit_and_gamma_normalisation_are_kept_apart() -> None:
    unit = fractional_gaussian_noise(0.1, 8, 20_000, seed=0, step=0.5)
    gamma = fractional_gaussian_noise(0.1, 8, 20_000, seed=0, step=0.5, normalisation="gamma")
    torch.testing.assert_close(gamma, unit * mvn_variance(f64(0.1)).sqrt())
    assert float(unit.var()) == pytest.approx(0.5**0.2, rel=0.02)


def test_seeds_dimensions_and_precision() -> None:
    motion = FractionalBrownianMotion(f64(0.2, 0.7))
    for times in ([0.0, 0.5, 1.0], [0.1, 0.5, 1.0]):
        a = motion.sample(times, 4, seed=3)
        assert a.shape == (3, 4, 2)
        assert torch.equal(a, motion.sample(times, 4, seed=3))
        assert not torch.equal(a, motion.sample(times, 4, seed=4))
        assert motion.sample(times, 4, seed=3, dtype=torch.float32).dtype == torch.float32
    g = torch.Generator().manual_seed(1)
    first = fractional_gaussian_noise(0.4, 5, 2, generator=g)
    assert not torch.equal(first, fractional_gaussian_noise(0.4, 5, 2, generator=g))
    assert fractional_gaussian_noise(0.4, 1, 1, seed=0).shape == (1, 1)


def test_the_first_paths_of_a_seed_are_the_same_however_many_are_drawn() -> None:
    """They are drawn in blocks of some thirty here, and every block has noise of its own."""
    many = fractional_gaussian_noise(0.7, 1000, 100, seed=0)
    torch.testing.assert_close(fractional_gaussian_noise(0.7, 1000, 3, seed=0), many[:, :3])
    assert many.unique(dim=1).shape == (1000, 100)


def test_circulant_samples_are_differentiable_in_the_hurst_index() -> None:
    hurst = f64(0.7).requires_grad_()
    noise = fractional_gaussian_noise(hurst, 2, 40_000, seed=0)
    (slope,) = torch.autograd.grad((noise[0] * noise[1]).mean(), hurst)
    exact = torch.autograd.functional.jacobian(lambda h: increment_autocovariance(h, 2)[1], f64(0.7))
    assert float(slope) == pytest.approx(float(exact), rel=0.05)


def test_fast_lengths() -> None:
    lengths = [2**i * 3**j * 5**k for i in range(12) for j in range(8) for k in range(6)]
    for size in range(1, 400):
        assert _fast_length(size) == min(n for n in lengths if n >= size)


@pytest.mark.parametrize(
    ("kind", "normalisation", "values"),
    [
        ("rl", "gamma", (-8.456931, -3.266546, -2.217011)),
        ("mvn", "unit", (-6.865052, -3.266546, -2.144687)),
        ("mvn", "gamma", (-8.506125, -3.266546, -2.147522)),
    ],
)
def test_published_log_likelihoods(kind: str, normalisation: str, values: tuple[float, ...]) -> None:
    times = torch.arange(1, 21).double() / 20
    y = torch.sin(3 * times).unsqueeze(-1)
    for hurst, value in zip((0.3, 0.5, 0.7), values, strict=True):
        own = FractionalBrownianMotion(hurst, kind, normalisation).log_prob(times, y, 0.3)
        assert float(own) == pytest.approx(value, abs=6e-7)
    if (kind, normalisation) == ("mvn", "gamma"):
        for hurst, value in ((0.3, -8.303542), (0.7, -1.934732)):
            own = FractionalOrnsteinUhlenbeck(hurst, 1.5, kind, normalisation).log_prob(times, y, 0.3)
            assert float(own) == pytest.approx(value, abs=6e-7)


def test_log_prob_sums_over_dimensions() -> None:
    times, source = f64(0.2, 0.5, 1.1), torch.Generator().manual_seed(0)
    values = torch.randn(3, 4, 2, generator=source, dtype=torch.float64)
    both = FractionalBrownianMotion(f64(0.2, 0.7)).log_prob(times, values)
    apart = [FractionalBrownianMotion(h).log_prob(times, values[..., d]) for d, h in enumerate((0.2, 0.7))]
    torch.testing.assert_close(both, apart[0] + apart[1])
    with pytest.raises(ValueError, match="values"):
        FractionalBrownianMotion(0.3).log_prob(times, values)
    listed = FractionalBrownianMotion([0.2, 0.7]).log_prob(times, values.tolist())
    torch.testing.assert_close(listed, both)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: fractional_gaussian_noise(1.0, 5, 5), ValueError, "hurst"),
        (lambda: fractional_gaussian_noise(0.5, 0, 5), ValueError, "num_steps"),
        (lambda: fractional_gaussian_noise(0.5, 5, 5, step=-1.0), ValueError, "step"),
        (lambda: FractionalOrnsteinUhlenbeck(0.5, -1.0), ValueError, "theta"),
        (lambda: FractionalOrnsteinUhlenbeck(0.5, float("nan")), ValueError, "theta"),
        (lambda: FractionalBrownianMotion(0.5).sample([1.0, 0.5], 1), ValueError, "strictly increasing"),
        (lambda: FractionalBrownianMotion(0.5).covariance([]), ValueError, "at least 1"),
        (lambda: FractionalBrownianMotion(0.5).covariance("now"), TypeError, "times"),
        (lambda: FractionalBrownianMotion(0.5).log_prob([0.0, 1.0], torch.zeros(2, 1)), ValueError, "must be positive"),
        (lambda: FractionalBrownianMotion(0.5).log_prob([0.5], "x"), TypeError, "values"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()


def test_an_even_grid_in_single_precision_is_an_even_grid() -> None:
    """Its rounding sent paths on it from the circulant embedding to a Cholesky factor of all times."""
    motion = FractionalBrownianMotion(0.7)
    for single in (torch.linspace(0, 1, 101), torch.arange(1, 101) / 252, np.linspace(0.1, 2, 50, dtype=np.float32)):
        first, last = float(single[0]), float(single[-1])
        even = torch.linspace(first, last, len(single), dtype=torch.float64)
        assert torch.equal(motion.sample(single, 2, seed=0), motion.sample(even, 2, seed=0))
    uneven = torch.tensor([0.1, 0.2, 0.3001])
    assert torch.equal(motion.covariance(uneven), motion.covariance(uneven.double()))
