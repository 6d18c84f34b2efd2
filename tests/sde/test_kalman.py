"""Linear fractional SDEs: transitions, filter and smoother against dense Gaussian conditioning and published values."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import sde.kalman
from sde import (
    BrownianMotion,
    FractionalOrnsteinUhlenbeck,
    LinearSDE,
    MarkovFractionalBrownianMotion,
    MarkovNoise,
    MultifractionalMotion,
    backward_information,
    check_observations,
    kalman_filter,
    kalman_smoother,
    uniform_grid,
)
from sde.linear import lower_factor


def papers(hurst: Any, kind: str = "rl", horizon: float = 1.0) -> MarkovFractionalBrownianMotion:
    return MarkovFractionalBrownianMotion(hurst, 5, 20.0, horizon, kind, "gamma", "geometric")


def f64(*values: float) -> Tensor:
    return torch.tensor(values if len(values) > 1 else values[0], dtype=torch.float64)


TIMES = torch.arange(1, 21).double() / 20
Y = torch.sin(3 * TIMES)[:, None, None]


@pytest.mark.parametrize(
    ("kind", "theta", "values"),
    [
        ("rl", 0.0, {0.3: -8.360318, 0.5: -3.266535, 0.7: -2.198794}),
        ("mvn", 0.0, {0.3: -8.364416, 0.5: -3.224755, 0.7: -2.050601}),
        ("rl", 1.5, {0.3: -8.264080, 0.7: -2.184320}),
        ("mvn", 1.5, {0.3: -8.163166, 0.7: -1.917240}),
    ],
)
def test_published_log_likelihoods(kind: str, theta: float, values: dict[float, float]) -> None:
    for hurst, value in values.items():
        own = kalman_filter(LinearSDE(papers(hurst, kind), theta), TIMES, Y, 0.3).log_likelihood
        assert float(own) == pytest.approx(value, abs=6e-7)


class Dense:
    """The same model as one Gaussian vector: the covariance of X by quadrature of its response to W and V(0)."""

    def __init__(self, model: LinearSDE, times: Tensor, d: int = 0) -> None:
        def of(value: Any) -> Tensor:
            value = torch.as_tensor(value, dtype=torch.float64)
            return value[d] if value.ndim else value

        noise = model.noise
        g = noise.speeds
        w = noise.weights[d] if noise.dims else noise.weights
        loadings = noise.loadings[d] if noise.dims else noise.loadings
        start = noise.initial_factor[d] if noise.dims else noise.initial_factor
        th, s, c = of(model.theta), of(model.scale), of(model.constant)

        def response(u: Tensor, coefficients: Tensor) -> Tensor:
            """X at lag u after a unit move of every V_k: coefficients times (g e^(-gu) - th e^(-th u)) / (g - th)."""
            u = u.unsqueeze(-1)
            ratio = (g * torch.exp(-g * u) - th * torch.exp(-th * u)) / (g - th)
            return s * (coefficients * ratio).sum(-1)

        # Composite Gauss-Legendre, panels halving towards each time: there the fastest process still remembers.
        nodes, weights = (torch.from_numpy(x) for x in __import__("numpy").polynomial.legendre.leggauss(24))
        stops = torch.cat([f64(0.0).reshape(1), times[times > 0]])
        shares = torch.cat([1 - 0.5 ** torch.arange(12).double(), torch.ones(1).double()])
        edges = torch.cat([(stops[:-1, None] + stops.diff()[:, None] * shares[:-1]).flatten(), stops[-1:]])
        r = (edges[:-1, None] + edges.diff()[:, None] * (nodes + 1) / 2).flatten()
        dr = (edges.diff()[:, None] * weights / 2).flatten()
        lag = times[:, None] - r
        k = torch.where(lag > 0, response(lag.clamp_min(0), w), 0.0) * dr.sqrt()
        decay = (torch.exp(-g * times[:, None]) - torch.exp(-th * times[:, None])) * g / (g - th)
        past = s * (loadings * decay) @ start
        forget = torch.exp(-th * times)
        self.covariance = k @ k.mT + past @ past.mT + of(model.start_std) ** 2 * torch.outer(forget, forget)
        rise = -torch.expm1(-th * times) / th if float(th) else times
        self.mean = of(model.start_mean) * forget + c * rise

    def log_prob(self, y: Tensor, std: float) -> float:
        law = torch.distributions.MultivariateNormal(
            self.mean, self.covariance + std**2 * torch.eye(len(y)).double(), validate_args=False
        )
        return float(law.log_prob(y))

    def condition(self, y: Tensor, here: Tensor, std: float) -> tuple[Tensor, Tensor]:
        gram = self.covariance[here][:, here] + std**2 * torch.eye(int(here.sum())).double()
        gain = torch.linalg.solve(gram, self.covariance[here]).mT
        return self.mean + gain @ (y - self.mean)[here], (self.covariance - gain @ self.covariance[here]).diagonal()


MODELS = [
    LinearSDE(papers(0.3), theta=1.2, scale=0.7, constant=0.4, start_mean=-0.3, start_std=0.5),
    LinearSDE(papers(0.8, "mvn"), theta=0.4, scale=2.0),
    LinearSDE(MarkovFractionalBrownianMotion(0.2), theta=3.0, start_std=0.1),
    LinearSDE(MarkovFractionalBrownianMotion(f64(0.3, 0.7), kind="mvn"), theta=f64(0.5, 2.0), scale=f64(1.0, 0.5)),
    LinearSDE(BrownianMotion(), theta=0.8, start_mean=1.0),
]


@pytest.mark.parametrize("model", MODELS)
def test_filter_and_smoother_equal_dense_conditioning(model: LinearSDE) -> None:
    """Uneven times, two series, values missing, an observation at time 0: all to 1e-8."""
    source = torch.Generator().manual_seed(0)
    times = f64(0.0, 0.07, 0.1, 0.35, 0.36, 0.6, 0.95, 1.0)
    dim = model.dims[0] if model.dims else 1
    y = torch.randn(8, 2, dim, generator=source, dtype=torch.float64)
    mask = torch.rand(8, 2, dim, generator=source) < 0.7
    y = torch.where(mask, y, float("nan"))  # what is masked is not looked at
    filtered = kalman_filter(model, times, y, 0.2, mask)
    smoothed = kalman_smoother(model, times, y, 0.2, mask)
    for b in range(2):
        for d in range(dim):
            dense, here = Dense(model, times, d), mask[:, b, d]
            part = Dense.__new__(Dense)
            part.mean, part.covariance = dense.mean[here], dense.covariance[here][:, here]
            exact = part.log_prob(y[here, b, d], 0.2)
            assert float(filtered.log_likelihood[b, d]) == pytest.approx(exact, abs=1e-8)
            mean, variance = dense.condition(torch.where(here, y[:, b, d], 0.0), here, 0.2)
            torch.testing.assert_close(smoothed.mean[:, b, d], mean, atol=1e-8, rtol=0)
            torch.testing.assert_close(smoothed.variance[:, b, d], variance, atol=1e-8, rtol=0)


@pytest.mark.parametrize("least", [1000, 2])
def test_errors_of_the_observations_may_change_with_time(least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sde.kalman._MIN_SPLIT", least)
    source = torch.Generator().manual_seed(1)
    model, times = MODELS[0], f64(0.0, 0.07, 0.1, 0.35, 0.36, 0.6, 0.95, 1.0)
    y = torch.randn(8, 1, 1, generator=source, dtype=torch.float64)
    std = f64(0.1, 1.0, 0.3, 0.05, 2.0, 0.5, 0.2, 0.7)
    filtered = kalman_filter(model, times, y, std[:, None, None])
    smoothed = kalman_smoother(model, times, y, std[:, None, None])
    dense = Dense(model, times)
    marginal = dense.covariance + std.square().diag()
    law = torch.distributions.MultivariateNormal(dense.mean, marginal, validate_args=False)
    assert float(filtered.log_likelihood) == pytest.approx(float(law.log_prob(y[:, 0, 0])), abs=1e-8)
    gain = torch.linalg.solve(marginal, dense.covariance).mT
    mean, variance = dense.mean + gain @ (y[:, 0, 0] - dense.mean), (dense.covariance - gain @ dense.covariance)
    torch.testing.assert_close(smoothed.mean[:, 0, 0], mean, atol=1e-8, rtol=0)
    torch.testing.assert_close(smoothed.variance[:, 0, 0], variance.diagonal(), atol=1e-8, rtol=0)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("first", [0.0, 0.02])
@pytest.mark.parametrize("shared", [True, False])
def test_blocks_side_by_side_are_the_filter_in_one_piece(
    model: LinearSDE, first: float, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uneven times, values missing, the last block not full, with and without an error of the observations."""
    source = torch.Generator().manual_seed(0)
    times = torch.cat(
        [f64(first).reshape(1), first + torch.rand(36, generator=source, dtype=torch.float64).cumsum(0) / 36]
    )
    dim = model.dims[0] if model.dims else 1
    y = torch.randn(37, 3, dim, generator=source, dtype=torch.float64)
    mask = torch.rand(37, 1 if shared else 3, 1 if shared else dim, generator=source) < 0.7
    found = []
    for least in (1000, 2):
        monkeypatch.setattr("sde.kalman._MIN_SPLIT", least)
        exact = kalman_filter(model, times[1:], y[1:], 0.0, mask[1:])
        filtered, smoothed = (f(model, times, y, 0.1, mask) for f in (kalman_filter, kalman_smoother))
        found.append([*exact, *filtered, *smoothed])
        for factors in (found[-1][2], found[-1][7], found[-1][13]):
            factors.copy_(factors @ factors.mT)  # a factor is one of many
    assert [part.shape for part in found[0]] == [part.shape for part in found[1]]
    for one, many in zip(*found, strict=True):
        torch.testing.assert_close(many, one, rtol=1e-8, atol=1e-8)


def test_a_filter_takes_the_root_of_its_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """In batched steps, of which each has a factorisation; and its gradient is that of one block after the other."""
    calls: list[int] = []
    factorise = sde.kalman.lower_factor
    monkeypatch.setattr("sde.kalman.lower_factor", lambda columns: (calls.append(1), factorise(columns))[1])
    times = torch.rand(900, generator=torch.Generator().manual_seed(0), dtype=torch.float64).cumsum(0) / 450
    slopes = []
    for least, most in ((1000, 900), (64, 4 * 30)):
        monkeypatch.setattr("sde.kalman._MIN_SPLIT", least)
        calls.clear()
        hurst, theta = f64(0.3).requires_grad_(), f64(0.5).requires_grad_()
        model = LinearSDE(MarkovFractionalBrownianMotion(hurst, horizon=4.0), theta, start_std=0.3)
        total = kalman_filter(model, times, torch.sin(times).reshape(-1, 1, 1), 0.1).log_likelihood.sum()
        assert len(calls) <= most
        slopes.append(torch.stack(torch.autograd.grad(total, (hurst, theta))))
    torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-8, atol=1e-8)


def test_masks_shared_by_the_batch_cost_one_covariance() -> None:
    y = Y.expand(-1, 7, 1)
    mask = torch.arange(20).reshape(-1, 1, 1) % 3 > 0
    shared = kalman_filter(MODELS[0], TIMES, y, 0.3, mask)
    assert shared.factor.shape == (20, 1, 1, 6, 6)
    single = kalman_filter(MODELS[0], TIMES, y, 0.3, mask.expand(-1, 7, 1))
    assert single.factor.shape == (20, 7, 1, 6, 6)
    torch.testing.assert_close(shared.log_likelihood, single.log_likelihood)


@pytest.mark.parametrize(
    ("kind", "stds"),
    [("mvn", {0.3: 0.91457, 0.7: 0.54541, 0.9: 0.41709}), ("rl", {0.3: 0.90925, 0.7: 0.57932, 0.9: 0.48159})],
)
def test_published_bridge_of_the_approximation(kind: str, stds: dict[float, float]) -> None:
    """Posterior std at t = 1 given X(2) = o, sig = .1, weights for T = 6; through the smoother, with a masked time."""
    mask = torch.tensor([False, True])[:, None, None]
    for hurst, std in stds.items():
        smoothed = kalman_smoother(LinearSDE(papers(hurst, kind, 6.0)), [1.0, 2.0], torch.zeros(2, 1, 1), 0.1, mask)
        assert float(smoothed.variance[0].sqrt()) == pytest.approx(std, abs=6e-6)


@pytest.mark.parametrize(
    ("theta", "stds"),
    [
        (0.0, (0.845756, 0.789655, 0.708864, 0.585437, 0.363239)),
        (1.0, (0.718304, 0.670274, 0.617921, 0.528183, 0.340680)),
    ],
)
def test_published_exact_bridge_and_how_near_the_default_comes(theta: float, stds: tuple[float, ...]) -> None:
    mask = torch.tensor([False, True])[:, None, None]
    for hurst, std in zip((0.1, 0.3, 0.5, 0.7, 0.9), stds, strict=True):
        c = FractionalOrnsteinUhlenbeck(hurst, theta).covariance([1.0, 2.0])
        exact = math.sqrt(c[0, 0] - c[0, 1] ** 2 / (c[1, 1] + 0.01))
        assert exact == pytest.approx(std, abs=6e-7)
        noise = MarkovFractionalBrownianMotion(hurst, horizon=2.0)
        own = kalman_smoother(LinearSDE(noise, theta), [1.0, 2.0], torch.zeros(2, 1, 1), 0.1, mask)
        # The paper's grid misses by 7 % (H = .7) and 15 % (H = .9); H = .1 would need far faster speeds.
        assert float(own.variance[0].sqrt()) == pytest.approx(exact, rel=0.1 if hurst < 0.2 else 0.005)


def test_gradients_of_the_likelihood() -> None:
    def likelihood(*p: Tensor) -> Tensor:
        hurst, theta, scale, constant, start, std = p
        for kind in ("stationary", "hybrid"):
            noise = MarkovFractionalBrownianMotion(0.5, 4, start=kind).with_hurst(hurst)
            model = LinearSDE(noise, theta, scale, constant, start_std=start)
            total = kalman_filter(model, TIMES[::5], Y[::5], std).log_likelihood.sum()
        return total

    values = [f64(v).requires_grad_() for v in (0.4, 1.0, 0.8, 0.3, 0.1, 0.2)]
    assert torch.autograd.gradcheck(likelihood, values)


def test_gradient_where_the_reversion_meets_a_speed() -> None:
    noise = papers(0.4)
    speed = noise.speeds[2]

    def likelihood(theta: Tensor) -> Tensor:
        return kalman_filter(LinearSDE(noise, theta), TIMES[::5], Y[::5], 0.2).log_likelihood.sum()

    assert torch.autograd.gradcheck(likelihood, (speed.clone().requires_grad_(),))
    assert float(likelihood(speed)) == pytest.approx(float(likelihood(speed * (1 + 1e-9))), abs=1e-8)


def test_smoother_is_differentiable() -> None:
    def mean(hurst: Tensor) -> Tensor:
        model = LinearSDE(papers(0.5, "mvn").with_hurst(hurst), 0.5)
        smoothed = kalman_smoother(model, TIMES[::6], Y[::6], 0.2)
        return torch.cat([smoothed.mean.flatten(), smoothed.variance.flatten()])

    assert torch.autograd.gradcheck(mean, (f64(0.3).requires_grad_(),))


def test_exact_transitions_compose_and_stay_exact_for_stiff_steps() -> None:
    for model in MODELS:
        two, one = model.transitions(f64(0.0, 0.2, 0.5)), model.transitions(f64(0.0, 0.5))
        matrix = two.matrix[1] @ two.matrix[0]
        torch.testing.assert_close(matrix, one.matrix[0], atol=1e-13, rtol=1e-10)
        covariance = two.matrix[1] @ two.factor[0] @ two.factor[0].mT @ two.matrix[1].mT
        covariance = covariance + two.factor[1] @ two.factor[1].mT
        torch.testing.assert_close(covariance, one.factor[0] @ one.factor[0].mT, atol=1e-12, rtol=1e-9)
        offset = (two.matrix[1] @ two.offset[0].unsqueeze(-1)).squeeze(-1) + two.offset[1]
        torch.testing.assert_close(offset, one.offset[0], atol=1e-12, rtol=1e-9)
        response = (two.matrix[1] @ two.response[0].unsqueeze(-1)).squeeze(-1) + two.response[1]
        torch.testing.assert_close(response, one.response[0], atol=1e-12, rtol=1e-9)
    stiff = LinearSDE(MarkovFractionalBrownianMotion(0.3, max_speed=1e4, kind="rl"), theta=1.0)
    dense = Dense(stiff, f64(0.5, 1.0))
    q = stiff.transitions(f64(0.0, 1.0)).factor[0]
    assert float((q @ q.mT)[0, 0]) == pytest.approx(float(dense.covariance[-1, -1]), rel=1e-6)


def test_increments_are_the_differences_of_the_path() -> None:
    """The filter of increments, reset at each time, has the dense likelihood of differenced paths."""
    noise = MarkovFractionalBrownianMotion(0.8, horizon=6.0)
    times = torch.arange(1, 7).double()
    y = torch.randn(6, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    own = kalman_filter(LinearSDE(noise, scale=1.5, constant=0.3), times, y, 0.0, increments=True)
    difference = torch.eye(6).double() - torch.diag(torch.ones(5).double(), -1)
    covariance = 2.25 * difference @ noise.covariance(times) @ difference.mT
    law = torch.distributions.MultivariateNormal(torch.full((6,), 0.3).double(), covariance, validate_args=False)
    assert float(own.log_likelihood) == pytest.approx(float(law.log_prob(y.flatten())), abs=1e-8)
    white = own.innovation / own.innovation_variance.sqrt()
    quadratic = torch.linalg.solve(covariance, y.flatten() - 0.3) @ (y.flatten() - 0.3)
    assert float(white.square().sum()) == pytest.approx(float(quadratic), abs=1e-8)


def test_information_is_the_likelihood_of_the_future() -> None:
    """log p(y | z) is quadratic in z: its curvature and slope by autograd of the dense likelihood."""
    model = LinearSDE(papers(0.3), theta=0.5)
    transitions = model.transitions(uniform_grid(1.0, 4))
    y = f64(0.4, -0.2)[:, None, None]
    info = backward_information(transitions, torch.tensor([2, 4]), y, 0.3)

    def future(z: Tensor) -> Tensor:
        mean, covariance = z, torch.zeros(6, 6).double()
        total = torch.zeros(()).double()
        for n in range(4):
            f, g = transitions.matrix[n], transitions.factor[n]
            mean, covariance = f @ mean, f @ covariance @ f.mT + g @ g.mT
            if n in (1, 3):
                alpha = covariance[0, 0] + 0.09
                error = y[n // 2, 0, 0] - mean[0]
                total = total - 0.5 * error**2 / alpha
                gain = covariance[:, 0] / alpha
                mean, covariance = mean + gain * error, covariance - torch.outer(gain, covariance[0])
        return total

    zero = torch.zeros(6).double()
    root = info.factor[0, 0, 0]
    torch.testing.assert_close(root @ root.mT, -torch.autograd.functional.hessian(future, zero), atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(info.vector[0, 0, 0], torch.autograd.functional.jacobian(future, zero))


def test_the_factor_of_a_singular_matrix_has_a_derivative() -> None:
    """QR's own derivative is NaN where the triangle is singular; the rotation held constant is exact."""
    columns = torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 0.0], [2.0, 4.0, 1.0]]).double().requires_grad_()
    target = torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).double()
    for factor in (lower_factor(columns), columns):
        (grad,) = torch.autograd.grad(((factor @ factor.mT) * target).sum(), columns)
        assert bool(torch.isfinite(grad).all())
        if factor is columns:
            torch.testing.assert_close(kept, grad)  # noqa: F821
        kept = grad  # noqa: F841
    assert lower_factor(torch.ones(3, 1)).shape == (3, 3)
    reference = torch.linalg.qr(columns.mT)[1].mT
    (wrong,) = torch.autograd.grad(((reference @ reference.mT) * target).sum(), columns)
    assert not bool(torch.isfinite(wrong).all())


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda m: kalman_filter(m, TIMES, Y[:5], 0.1), "observations must be"),
        (lambda m: kalman_filter(m, TIMES, Y[..., 0], 0.1), "observations must be"),
        (lambda m: kalman_filter(m, [], torch.zeros(0, 1, 1), 0.1), "at least 1"),
        (lambda m: kalman_filter(m, TIMES * 5, Y, 0.1), "horizon=5"),
        (lambda m: kalman_filter(m, TIMES.flip(0), Y, 0.1), "strictly increasing"),
        (lambda m: kalman_filter(m, TIMES, Y, 0.1, torch.ones(3, 1, 1)), "mask"),
        (lambda m: kalman_filter(MODELS[3], TIMES, Y.expand(-1, 1, 3), 0.1), "dimensions"),
        (lambda m: check_observations(Y, torch.zeros_like(Y)), "no observation"),
        (lambda m: check_observations(Y * float("nan")), "finite"),
        (lambda m: MarkovNoise(f64(1.0), f64(1.0).reshape(1)), "vector"),
        (lambda m: MarkovNoise(f64(1.0, 2.0), torch.ones(3)), "loadings"),
        (lambda m: LinearSDE(_changing()).transitions(TIMES), "loadings change"),
        (lambda m: kalman_smoother(m, TIMES, Y, 0.0), "noise_std"),
    ],
)
def test_bad_input(call: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call(MODELS[0])


def _changing() -> MultifractionalMotion:
    return MultifractionalMotion(lambda t: 0.3 + 0.1 * t, papers(0.5))


@pytest.mark.parametrize("theta", [0.0, 0.7, torch.tensor([0.0, 2.0, 8.0], dtype=torch.float64)])
@pytest.mark.parametrize("start", [0.0, 0.1, 0.35])
def test_moments_at_equal_distances(theta: Any, start: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only as many lags as times are worked out, and the moments are those that uneven times contain."""
    hurst = torch.tensor([0.3, 0.5, 0.8], dtype=torch.float64, requires_grad=True)
    linear = LinearSDE(MarkovFractionalBrownianMotion(hurst, horizon=4.0), theta, 1.3, 0.2, 0.1, 0.4)
    even = start + 0.1 * torch.arange(30, dtype=torch.float64)
    uneven = torch.cat([even[:7], even[6:7] + 0.03, even[7:]])
    kept = torch.arange(31) != 7
    rows: list[int] = []
    first_row = LinearSDE._first_row
    monkeypatch.setattr(LinearSDE, "_first_row", lambda self, h: (rows.append(h.numel()), first_row(self, h))[1])
    mean, covariance = linear.moments(even)
    assert max(rows, default=0) <= 30
    all_means, all_covariances = linear.moments(uneven)
    torch.testing.assert_close(mean, all_means[:, kept], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(covariance, all_covariances[:, kept][:, :, kept], rtol=1e-11, atol=1e-13)
    slopes = [torch.autograd.grad(c.sum(), hurst, retain_graph=True)[0]
              for c in (covariance, all_covariances[:, kept][:, :, kept])]  # fmt: skip
    torch.testing.assert_close(*slopes, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("theta", [1.0, 30.0, 100.0, 500.0, 3000.0])
def test_fast_reversion(theta: float) -> None:
    """With Brownian noise nothing but theta is fast: at 10 reversions a step variances were wrong by 9 %, at 60 by 99.

    The transitions of a step hold up to about 200 reversions.
    """
    t = 0.02 * torch.arange(1, 201, dtype=torch.float64)
    linear = LinearSDE(BrownianMotion(), torch.tensor(theta, dtype=torch.float64), 1.3)
    apart, both = (t.unsqueeze(-1) - t).abs(), t.unsqueeze(-1) + t
    expected = 1.3**2 * (torch.exp(-theta * apart) - torch.exp(-theta * both)) / (2 * theta)
    uneven = t[torch.arange(200) != 7]
    for times, those in ((t, expected), (uneven, expected[torch.arange(200) != 7][:, torch.arange(200) != 7])):
        torch.testing.assert_close(linear.moments(times)[1], those, rtol=1e-11, atol=1e-13 / theta)
    step = linear.transitions(t[:2])
    gained = 1.3**2 * (1 - math.exp(-2 * theta * 0.02)) / (2 * theta)
    assert float(step.factor[0, 0].square().sum()) == pytest.approx(gained, rel=1e-10)
