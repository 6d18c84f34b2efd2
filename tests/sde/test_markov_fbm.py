"""Markov-approximate fractional noise: the published weights and errors, derivatives in H, covariance, samples."""

import math
import warnings
from typing import Any

import mpmath as mp
import numpy as np
import pytest
import torch
from torch import Tensor

from sde import (
    BrownianMotion,
    FractionalBrownianMotion,
    MarkovFractionalBrownianMotion,
    MarkovNoise,
    MixedNoise,
    MultifractionalMotion,
    NoiseWarning,
    discretise,
    geometric_speeds,
    motion_covariance,
)
from sde.past import past_covariance
from sde.special import mvn_variance, rl_variance


def papers(hurst: Any, k: int = 5, top: float = 20.0, horizon: float = 1.0, kind: str = "rl") -> Any:
    return MarkovFractionalBrownianMotion(hurst, k, top, horizon, kind, "gamma", "geometric")


def f64(*values: float) -> Tensor:
    return torch.tensor(values if len(values) > 1 else values[0], dtype=torch.float64)


# kind, H, K, max_speed, T, weights, error, relative error: the method sheet's E1, from 40-digit arithmetic
PUBLISHED: list[tuple[Any, ...]] = [
    ("mvn", 0.3, 5, 20, 1, (0.804407691, -0.111518979, 0.48741451, 0.0845057554, 1.1873324),
     0.0143508733, 0.0165980846),
    ("mvn", 0.3, 5, 20, 2.4, (0.784095108, -0.0721239343, 0.446202109, 0.108294051, 1.17753061),
     0.0448263754, 0.0127754228),
    ("mvn", 0.7, 5, 20, 2, (2.27051367, -1.47738865, 0.0972764073, -0.407027236, -0.111625216),
     0.320869974, 0.14662458),
    ("mvn", 0.7, 5, 20, 6, (2.29797701, -1.69847957, 0.376825531, -0.694236074, 0.0768825528), 8.34956767, 0.27318112),
    ("mvn", 0.5, 5, 20, 2.4, (1.40145445, -0.550365127, 0.202357693, -0.12513333, 0.0716863099),
     0.0871510452, 0.0302607796),
    ("mvn", 0.9, 5, 10, 2.4, (3.58402947, -3.87307247, 1.41070841, -1.27415415, 0.26656948), 5.32679661, 0.665911024),
    ("mvn", 0.1, 5, 20, 6, (0.408722915, 0.0366559357, 0.788141712, -0.205901186, 4.56433835), 5.45265885, 0.216228502),
    ("mvn", 0.25, 7, 100, 1,
     (0.443638171, 0.0158170745, 0.310783493, 0.274795622, 0.640125784, 0.300206878, 2.52171913),
     0.0178581573, 0.0167864108),
    ("rl", 0.3, 5, 20, 1, (28.1741218, -38.3511066, 13.262473, -2.29150608, 1.77234643), 0.00596505502, 0.00776181068),
    ("rl", 0.3, 5, 20, 2.4, (1.74660942, -1.51917272, 1.11389023, -0.158107693, 1.29915589),
     0.0156569763, 0.00502017086),
    ("rl", 0.7, 5, 20, 2, (2.17989632, -1.0660698, -0.351565304, -0.127758759, -0.263463314),
     0.000109464849, 5.87471739e-5),
    ("rl", 0.7, 5, 20, 6, (2.69254571, -1.86609635, 0.0477017278, -0.29950397, -0.183621453),
     0.0015039644, 5.77908179e-5),
    ("rl", 0.5, 5, 20, 2.4, (1.44809369, -0.496833378, 0.0537911798, -0.00630797537, 0.00156368684),
     5.73458606e-8, 1.99117572e-8),
    ("rl", 0.9, 5, 10, 2.4, (4.21983562, -3.73008066, 0.0867751136, -0.130843076, -0.287475555),
     0.000143084054, 4.89255639e-5),
    ("rl", 0.1, 5, 20, 6, (0.657412818, -0.408903207, 1.13998315, -0.475631531, 4.73491447), 2.7052918, 0.167704761),
    ("rl", 0.25, 7, 100, 1, None, 0.00856148148, 0.00964223642),
]  # fmt: skip


@pytest.mark.parametrize("case", PUBLISHED, ids=lambda c: f"{c[0]}-{c[1]}-{c[4]}")
def test_weights_and_errors_are_the_published_ones(case: tuple[Any, ...]) -> None:
    kind, hurst, k, top, horizon, weights, error, relative = case
    noise = papers(hurst, k, top, horizon, kind)
    assert noise.weights.dtype == torch.float64
    # The table has nine digits: its last one is what limits the comparison.
    assert float(noise.error) == pytest.approx(error, rel=1e-8)
    assert float(noise.relative_error) == pytest.approx(relative, rel=1e-8)
    if weights is not None:
        torch.testing.assert_close(noise.weights, f64(*weights), atol=1e-8 * max(map(abs, weights)), rtol=0)


@pytest.mark.parametrize(
    ("kind", "hurst", "errors"),
    [
        ("mvn", 0.3, (0.03655, 0.01693, 0.01700, 0.01660, 0.01616, 0.01521, 0.01329)),
        ("mvn", 0.7, (0.2024, 0.1224, 0.1062, 0.09786, 0.09075, 0.08531, 0.07232)),
        ("rl", 0.3, (0.01131, 0.008447, 0.008358, 0.007762, 0.00705, 0.006377, 0.004812)),
        ("rl", 0.7, (0.01242, 1.492e-4, 1.432e-4, 1.341e-4, 1.111e-4, 8.931e-5, 4.691e-5)),
    ],
)
def test_ablation_over_the_number_of_processes(kind: str, hurst: float, errors: tuple[float, ...]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoiseWarning)  # of the weights of ten processes
        measured = [float(papers(hurst, k, kind=kind).relative_error) for k in (2, 3, 4, 5, 6, 7, 10)]
    assert measured == pytest.approx(errors, rel=6e-4)  # four digits were published


def test_weights_against_forty_digits_where_the_system_is_ill_conditioned() -> None:
    """Seven speeds up to 100: the condition number is 1.5e12, and float32 loses the weights altogether."""
    noise = papers(0.25, 7, 100.0)
    with mp.workdps(40):
        g, a = [mp.mpf(float(s)) for s in noise.speeds], mp.mpf("0.75")
        gram = mp.matrix(7, 7)
        for i in range(7):
            for j in range(7):
                z = g[i] + g[j]
                gram[i, j] = (z + mp.expm1(-z)) / z**2
        b = mp.matrix([[x**-a * mp.gammainc(a, 0, x, regularized=True)
                        - a * x ** (-a - 1) * mp.gammainc(a + 1, 0, x, regularized=True)] for x in g])  # fmt: skip
        exact = [float(w) for w in mp.lu_solve(gram, b)]
    assert max(map(abs, exact)) == pytest.approx(7595, abs=1)
    # The least-squares form sees the root of the condition number.
    torch.testing.assert_close(noise.weights, f64(*exact), atol=1e-9 * 7595, rtol=0)
    z = noise.speeds.float().unsqueeze(-1) + noise.speeds.float()
    single = torch.linalg.solve((z + torch.expm1(-z)) / z**2, torch.tensor([float(x) for x in b]))
    assert (single - f64(*exact).float()).abs().max() > 100


def test_the_authors_errors_are_wrong() -> None:
    """Their type I cost has -b'w for -2b'w and lacks V_H in c (the method sheet's section 6, item 2)."""
    noise = papers(0.7, 5, 20.0, 2.0, "mvn")
    c, v = 2**2.4 / 2.4, float(mvn_variance(f64(0.7)))
    explained = v * c - 0.320869974  # b'w
    assert abs((c - explained) - float(noise.error)) > 0.01
    assert float(noise.error) == pytest.approx(0.320869974, rel=1e-8)


def test_derivative_of_the_weights_in_the_hurst_index() -> None:
    published = {
        ("rl", 0.7, 2.0): (5.89989943, -6.26977035, -0.754945502, -0.661782064, -0.140689763),
        ("mvn", 0.3, 2.4): (2.38617978, -1.23506124, -1.59440906, -0.335043988, -9.71962256),
    }
    for (kind, hurst, horizon), values in published.items():
        noise = papers(0.5, horizon=horizon, kind=kind)
        jacobian = torch.autograd.functional.jacobian(lambda h, noise=noise: noise.with_hurst(h).weights, f64(hurst))
        torch.testing.assert_close(jacobian, f64(*values), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["mvn", "rl"])
@pytest.mark.parametrize("grid", ["horizon", "geometric"])
@pytest.mark.parametrize("normalisation", ["unit", "gamma"])
def test_everything_is_differentiable_in_the_hurst_index(kind: str, grid: str, normalisation: str) -> None:
    noise = MarkovFractionalBrownianMotion(0.5, 5, None, 2.0, kind, normalisation, grid)
    times = f64(0.3, 1.0, 2.0)
    hurst = f64(0.05, 0.5, 0.95).requires_grad_()  # one per dimension, and H = 1/2, where the past vanishes

    def quantities(h: Tensor) -> tuple[Tensor, ...]:
        other = noise.with_hurst(h)
        return other.weights, other.covariance(times), other.error

    assert torch.autograd.gradcheck(quantities, (hurst,))


def test_extreme_arguments_of_the_weights() -> None:
    """Speeds times horizon from 1e-6 to 1e4 in one grid."""
    noise = MarkovFractionalBrownianMotion(0.5, kind="mvn", grid=torch.logspace(-6, 4, 6).double(), start="stationary")
    hurst = f64(0.05, 0.5, 0.95).requires_grad_()
    assert torch.autograd.gradcheck(lambda h: noise.with_hurst(h).error, (hurst,))
    assert bool((noise.with_hurst(hurst).relative_error > 0).all())


@pytest.mark.parametrize("kind", ["mvn", "rl"])
def test_scaling_law(kind: str) -> None:
    """w(H, g / s, s T) = s^(H - 1/2) w(H, g, T), exactly."""
    speeds = geometric_speeds(5, 20.0)
    short = MarkovFractionalBrownianMotion(0.3, horizon=1.0, kind=kind, normalisation="gamma", grid=speeds)
    long = MarkovFractionalBrownianMotion(0.3, horizon=7.0, kind=kind, normalisation="gamma", grid=speeds / 7)
    torch.testing.assert_close(long.weights, 7**-0.2 * short.weights, rtol=1e-11, atol=1e-11)
    times = f64(0.2, 0.5, 1.0)
    torch.testing.assert_close(long.covariance(7 * times), 7**0.6 * short.covariance(times), rtol=1e-10, atol=0)


def test_error_against_the_covariances() -> None:
    """At the optimum E Bhat (B - Bhat) integrates to 0, so that the error is int Var B - int Var Bhat."""
    u, weight = (torch.from_numpy(x) for x in __import__("numpy").polynomial.legendre.leggauss(120))
    for kind, start in (("rl", "auto"), ("mvn", "stationary"), ("mvn", "hybrid")):
        noise = MarkovFractionalBrownianMotion(0.4, 4, 30.0, 1.5, kind, "gamma", "geometric", start)
        # t = T u^3: Var is t^(2H) near 0.
        times = 1.5 * ((u + 1) / 2) ** 3
        measure = 1.5 * weight / 2 * 3 * ((u + 1) / 2) ** 2
        own = noise.covariance(times).diagonal()
        exact = motion_covariance(times, f64(0.4), kind, "gamma").diagonal()
        assert float(((exact - own) * measure).sum()) == pytest.approx(float(noise.error), rel=1e-7), (kind, start)


@pytest.mark.parametrize(
    ("hurst", "stationary", "hybrid"), [(0.3, 0.0103, 0.0059), (0.7, 0.155, 0.0006), (0.9, 0.596, 0.0002)]
)
def test_the_hybrid_start_has_the_smaller_error(hurst: float, stationary: float, hybrid: float) -> None:
    """Relative Frobenius error of the covariance, K = 5, fastest speed 20, T = 2 (the sheet's section 10, item 1)."""
    times = torch.linspace(0.1, 2.0, 20, dtype=torch.float64)
    exact = motion_covariance(times, f64(hurst))
    for start, bound in (("stationary", stationary), ("hybrid", hybrid)):
        noise = MarkovFractionalBrownianMotion(hurst, 5, 20.0, 2.0, "mvn", "unit", "geometric", start)
        error = float((noise.covariance(times) - exact).norm() / exact.norm())
        assert error == pytest.approx(bound, rel=0.1), start


def test_the_hybrid_wins_on_every_grid_and_index() -> None:
    hursts = torch.linspace(0.05, 0.95, 10, dtype=torch.float64)
    for k in (3, 5, 8):
        for top in (20.0, 100.0, 1000.0):
            errors = [
                MarkovFractionalBrownianMotion(hursts, k, top, 1.0, start=start).relative_error
                for start in ("hybrid", "stationary")
            ]
            assert bool((errors[0] < errors[1]).all()), (k, top)


def test_default_choices() -> None:
    assert papers(0.7, kind="mvn").start == "stationary"
    assert MarkovFractionalBrownianMotion(0.7).start == "hybrid"
    assert MarkovFractionalBrownianMotion(0.7, kind=2).start == "zero"
    hursts = torch.linspace(0.2, 0.95, 16, dtype=torch.float64)
    for kind in ("mvn", "rl"):
        assert float(MarkovFractionalBrownianMotion(hursts, kind=kind).relative_error.max()) < 0.02
    # Unit variance for every H: the default normalisation takes the scale out of H.
    noise = MarkovFractionalBrownianMotion(torch.linspace(0.25, 0.95, 8).double(), horizon=3.0)
    torch.testing.assert_close(noise.covariance([1.0])[:, 0, 0], torch.ones(8).double(), atol=0.02, rtol=0)


def test_the_past_is_the_difference_of_the_two_motions() -> None:
    times = f64(0.01, 0.3, 1.0, 2.5)
    for hurst in (0.05, 0.3, 0.7, 0.95):
        h = f64(hurst)
        exact = motion_covariance(times, h, "mvn", "gamma") - motion_covariance(times, h, "rl", "gamma")
        torch.testing.assert_close(past_covariance(h, times), exact, rtol=1e-9, atol=1e-11)
    assert past_covariance(f64(0.5), times).abs().max() == 0


def test_published_moments_of_the_noise() -> None:
    """The sheet's E8: Var Bhat(T), and for type I the part of the past in it."""
    assert float(papers(0.7, horizon=2.0).covariance([2.0])) == pytest.approx(2.23313143, abs=5e-9)
    noise = papers(0.3, horizon=2.4, kind="mvn")
    assert float(noise.covariance([2.4])) == pytest.approx(2.3241196, abs=5e-8)
    future = MarkovNoise(noise.speeds, noise.weights)
    assert float(noise.covariance([2.4]) - future.covariance([2.4])) == pytest.approx(0.309918063, abs=5e-9)
    # sum w, the root of the quadratic variation's rate, for RL H = 0.3 and T = 1
    assert float(papers(0.3).weights.sum()) == pytest.approx(2.566329, abs=5e-6)


@pytest.mark.parametrize(("kind", "start"), [("rl", "auto"), ("mvn", "stationary"), ("mvn", "hybrid")])
def test_samples_have_the_covariance(kind: str, start: str) -> None:
    """20 000 paths at ten uneven times: each entry within 4.5 standard errors, and all of them by a chi-square."""
    times = torch.linspace(0.1, 1.4, 10, dtype=torch.float64) ** 2
    noise = MarkovFractionalBrownianMotion(0.3, 5, 20.0, 2.0, kind, "gamma", "geometric", start)
    paths = noise.sample(times, 20_000, seed=1)
    assert paths.shape == (10, 20_000)
    covariance = noise.covariance(times)
    z = (paths @ paths.mT / 20_000 - covariance) / (
        (covariance**2 + torch.outer(covariance.diagonal(), covariance.diagonal())) / 20_000
    ).sqrt()
    assert z.abs().max() < 4.5
    # Whitened, the empirical covariance's distance to 1 has a chi-square law with 55 degrees of freedom.
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), paths, upper=False)
    gap = (white @ white.mT / 20_000 - torch.eye(10)).tril()
    chi2 = float(20_000 * (gap.tril(-1).square().sum() + gap.diagonal().square().sum() / 2))
    assert 55 - 4 * math.sqrt(110) < chi2 < 55 + 4 * math.sqrt(110)


def test_samples_depend_on_the_seed_alone() -> None:
    noise = MarkovFractionalBrownianMotion(f64(0.3, 0.8), horizon=2.0)
    a, b = noise.sample([0.0, 1.0, 2.0], 3, seed=5), noise.sample([0.0, 1.0, 2.0], 3, seed=5)
    assert a.shape == (3, 3, 2)
    assert torch.equal(a, b)
    assert bool((a[0] == 0).all())
    assert not torch.equal(a, noise.sample([0.0, 1.0, 2.0], 3, seed=6))
    c = noise.sample([1.0, 2.0], 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(c, noise.sample([1.0, 2.0], 3, generator=torch.Generator().manual_seed(0)))
    assert noise.sample([1.0], 2, seed=0, dtype=torch.float32).dtype == torch.float32


def test_a_sample_moves_with_the_hurst_index() -> None:
    """The derivative of E B(2)^2 through the sampler is that of the covariance: standard error .069 over 12 seeds."""
    hurst = f64(0.6).requires_grad_()
    noise = MarkovFractionalBrownianMotion(hurst, horizon=2.0, normalisation="gamma")
    second = noise.sample([0.5, 2.0], 20_000, seed=0)[1].square().mean()
    (sampled,) = torch.autograd.grad(second, hurst, retain_graph=True)
    (exact,) = torch.autograd.grad(noise.covariance([2.0]).sum(), hurst)
    assert abs(float(sampled - exact)) < 3.5 * 0.069


def test_multifractional_motion() -> None:
    """Var X_t = t^(2H(t)) in unit normalisation, through the covariance and through samples."""
    base = MarkovFractionalBrownianMotion(0.5, 7, horizon=2.0, kind="rl", normalisation="unit")
    motion = MultifractionalMotion(lambda t: 0.3 + 0.2 * t, base)
    times = f64(0.5, 1.0, 2.0)
    target = times ** (2 * (0.3 + 0.2 * times))
    torch.testing.assert_close(motion.covariance(times).diagonal(), target, rtol=0.01, atol=0)
    paths = motion.sample(times, 20_000, seed=0)
    torch.testing.assert_close(paths.var(1), motion.covariance(times).diagonal(), rtol=0.05, atol=0)
    two = MultifractionalMotion(lambda t: torch.stack([0.3 + 0 * t, 0.2 + 0.3 * t], -1), base, dims=(2,))
    assert two.covariance(times).shape == (2, 3, 3)
    fixed = base.with_hurst(f64(0.3)).covariance(times)
    torch.testing.assert_close(two.covariance(times)[0], fixed, rtol=1e-10, atol=0)


def test_mixed_noise_shares_its_brownian_motion() -> None:
    rough = papers(0.3, kind="mvn")
    mixed = MixedNoise([(2.0, BrownianMotion()), (0.5, rough)])
    own = 4 + 0.25 * float(rough.covariance([1.0]))
    # E W_1 Bhat_1 = sum w_k (1 - e^(-g_k)) / g_k
    cross = float((rough.weights * -torch.expm1(-rough.speeds) / rough.speeds).sum())
    assert float(mixed.covariance([1.0])) == pytest.approx(own + 2 * cross, rel=1e-12)
    with pytest.raises(ValueError, match="hybrid"):
        MixedNoise([(1.0, MarkovFractionalBrownianMotion(0.3))])


def test_brownian_motion_is_the_case_of_speed_zero() -> None:
    times = f64(0.5, 1.0, 3.0)
    torch.testing.assert_close(BrownianMotion().covariance(times), torch.minimum(times, times.unsqueeze(-1)))
    still = MarkovFractionalBrownianMotion(0.5, kind="mvn", grid=f64(0.0, 1.0), start="stationary")
    torch.testing.assert_close(still.weights, f64(1.0, 0.0), atol=1e-12, rtol=0)
    assert float(still.relative_error) == pytest.approx(0.0, abs=1e-12)


def test_one_process() -> None:
    """The paper's formula divides by zero for K = 1; the speed is then the root of the fastest."""
    assert float(papers(0.5, 1).speeds) == pytest.approx(math.sqrt(20))
    assert 0 < float(papers(0.5, 1).relative_error) < 1


def test_report_warns_of_a_poor_approximation() -> None:
    with pytest.warns(NoiseWarning, match="hybrid"):
        report = papers(0.9, kind="mvn", horizon=2.0).report()
    # The published share of the variance that is left (the sheet's section 6, item 4)
    assert float(report.variance_ratio) == pytest.approx(0.390, abs=5e-4)
    assert float(report.relative_error) == pytest.approx(0.583, abs=5e-4)
    assert MarkovFractionalBrownianMotion(0.7).report().advice == ""


def test_report_warns_of_too_many_processes() -> None:
    noise = MarkovFractionalBrownianMotion(0.7, 30, kind="rl")
    with pytest.warns(NoiseWarning, match="fewer processes"):
        noise.report()
    assert float(noise.relative_error) < 1e-5
    assert bool(torch.isfinite(noise.weights).all())


@pytest.mark.parametrize("count", [16, 20, 30])
def test_any_number_of_processes_keeps_the_covariance(count: int) -> None:
    """With the weights of the least error (1e9 at 20 processes) covariances came out negative and samples 1,000 times
    too large.  Truth: the variance that the very weights have in forty digits.
    """
    times = f64(0.1, 0.5, 1.0)
    for hurst in (0.1, 0.3, 0.7):
        noise = MarkovFractionalBrownianMotion(hurst, count, kind="rl")
        fewer = MarkovFractionalBrownianMotion(hurst, 14, kind="rl")
        assert float(noise.relative_error) < float(fewer.relative_error)
        with mp.workdps(40):
            g, w = ([mp.mpf(float(v)) for v in part] for part in (noise.speeds, noise.weights))
            pairs = [(wi * wj, gi + gj) for wi, gi in zip(w, g, strict=True) for wj, gj in zip(w, g, strict=True)]
            exact = f64(*[float(sum(-c * mp.expm1(-z * mp.mpf(float(t))) / z for c, z in pairs)) for t in times])
        torch.testing.assert_close(noise.covariance(times).diagonal(), exact, rtol=1e-4, atol=0)
        # A variance of 4,000 has a standard error of 2.2 %.
        torch.testing.assert_close(noise.sample(times, 4000, seed=0).var(1), exact, rtol=0.1, atol=0)


def test_weights_that_cancel_are_said_so() -> None:
    """The paper's grid keeps the weights of the least error, which ten processes on [1/20, 20] can't carry."""
    with pytest.warns(NoiseWarning, match="weights up to 1e\\+09 cancel.*fewer than 10"):
        noise = papers(0.3, 10)
    with pytest.warns(NoiseWarning, match="cancel"):
        assert "cancel" in noise.report().advice


def test_numbers_may_come_in_lists_and_arrays() -> None:
    reference = MarkovFractionalBrownianMotion(f64(0.3, 0.7), grid=f64(0.1, 1.0, 10.0), kind="rl").weights
    for hurst in ([0.3, 0.7], np.array([0.3, 0.7])):
        for grid in ([0.1, 1, 10.0], np.array([0.1, 1.0, 10.0])):
            noise = MarkovFractionalBrownianMotion(hurst, grid=grid, kind="rl")
            assert torch.equal(noise.weights, reference)
        assert FractionalBrownianMotion(hurst).sample([1.0], 2, seed=0).shape == (1, 2, 2)


def test_a_noise_keeps_its_transitions_when_h_changes() -> None:
    noise = MarkovFractionalBrownianMotion(0.5, horizon=2.0)
    grid = noise.discretise([0.0, 1.0, 2.0])
    again = discretise(noise.with_hurst(f64(0.9)).speeds, [0.0, 1.0, 2.0])
    assert torch.equal(grid.factor, again.factor)


@pytest.mark.parametrize("hurst", [0.0, 1.0, -0.2, 1.7, float("nan"), f64(0.3, 1.2), torch.empty(0)])
def test_hurst_outside_the_unit_interval(hurst: Any) -> None:
    for build in (MarkovFractionalBrownianMotion, FractionalBrownianMotion):
        with pytest.raises(ValueError, match="hurst must lie strictly between 0 and 1"):
            build(hurst)


@pytest.mark.parametrize(
    ("times", "match"),
    [
        ([0.0, 1.0, 1.0], "strictly increasing"),
        ([1.0, 0.5], "strictly increasing"),
        ([0.0, float("nan")], "finite"),
        ([-1.0, 1.0], "negative"),
        ([], "at least 1"),
        ([[0.0, 1.0]], "vector"),
        ([0.5, 3.0], "horizon=3"),
    ],
)
def test_bad_times(times: Any, match: str) -> None:
    noise = MarkovFractionalBrownianMotion(0.3, horizon=1.0)
    for call in (noise.covariance, lambda t: noise.sample(t, 2, seed=0)):
        with pytest.raises(ValueError, match=match):
            call(times)


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"hurst": "0.5"}, TypeError, "hurst"),
        ({"hurst": True}, TypeError, "hurst"),
        ({"hurst": [0.3, "x"]}, TypeError, "hurst"),
        ({"hurst": [[0.3], [0.4, 0.5]]}, TypeError, "hurst"),
        ({"kind": "III"}, ValueError, "kind"),
        ({"kind": 3}, ValueError, "kind"),
        ({"normalisation": "one"}, ValueError, "normalisation"),
        ({"grid": "linear"}, ValueError, "grid"),
        ({"grid": torch.tensor([2.0, 1.0])}, ValueError, "increasing"),
        ({"grid": "geometric", "max_speed": 1.0}, ValueError, "max_speed"),
        ({"num_processes": 0}, ValueError, "num_processes"),
        ({"num_processes": 2.5}, TypeError, "num_processes"),
        ({"horizon": 0.0}, ValueError, "horizon"),
        ({"horizon": float("inf")}, ValueError, "horizon"),
        ({"start": "zero"}, ValueError, "start"),
        ({"start": "hybrid", "kind": "rl"}, ValueError, "no past"),
    ],
)
def test_bad_settings(settings: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        MarkovFractionalBrownianMotion(**{"hurst": 0.5, **settings})


def test_bad_sampling_arguments() -> None:
    noise = MarkovFractionalBrownianMotion(0.3)
    with pytest.raises(ValueError, match="num_paths"):
        noise.sample([1.0], 0, seed=0)
    with pytest.raises(TypeError, match="seed"):
        noise.sample([1.0], 1, seed=0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not both"):
        noise.sample([1.0], 1, seed=0, generator=torch.Generator())


def test_normalisations_differ_by_the_variance() -> None:
    for kind, variance in (("mvn", mvn_variance), ("rl", rl_variance)):
        unit, gamma = (
            MarkovFractionalBrownianMotion(0.8, horizon=2.0, kind=kind, normalisation=n).covariance([0.5, 2.0])
            for n in ("unit", "gamma")
        )
        torch.testing.assert_close(unit * variance(f64(0.8)), gamma)
