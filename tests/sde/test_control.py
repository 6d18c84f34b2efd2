"""Girsanov weights, controls and guides: published bounds, exact identities, and 4-standard-error checks."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sde import (
    LinearPlusResidual,
    LinearSDE,
    MarkovFractionalBrownianMotion,
    Path,
    Step,
    effective_sample_size,
    evidence_bound,
    frozen_control,
    importance_bound,
    information_control,
    kalman_filter,
    kalman_smoother,
    path_kl,
    path_log_ratio,
    solve,
    step_guide,
    uniform_grid,
)


def papers(hurst: Any, kind: str = "rl", horizon: float = 6.0) -> MarkovFractionalBrownianMotion:
    return MarkovFractionalBrownianMotion(hurst, 5, 20.0, horizon, kind, "gamma", "geometric")


def still(t: Tensor, x: Tensor) -> Tensor:
    return torch.zeros_like(x)


def log_likelihood(x: Tensor, o: float, sig: float) -> Tensor:
    return (-0.5 * ((o - x) / sig) ** 2 - 0.5 * math.log(2 * math.pi * sig**2)).sum(-1)


def ones(step: Step, x: Tensor, y: Tensor) -> Tensor:
    return torch.full_like(x, 1.5)


@pytest.mark.parametrize(
    ("kind", "hurst", "horizon", "shift"), [("rl", 0.7, 2.0, 2.08400302), ("mvn", 0.3, 2.4, 2.12816332)]
)
def test_constant_control(kind: str, hurst: float, horizon: float, shift: float) -> None:
    """KL = u^2 T / 2 exactly; the mean moves by u sum w_k (1 - e^(-g_k T)) / g_k; the noise by nothing."""
    noise = papers(hurst, kind, horizon)
    x0, grid = torch.zeros(3, 2).double(), noise.discretise(uniform_grid(horizon, 7))
    free = solve(still, 1.0, noise, grid, x0, seed=0, control=lambda s, x, y: 0 * x)
    moved = solve(still, 1.0, noise, grid, x0, seed=0, control=ones)
    torch.testing.assert_close(moved.kl, torch.full((3, 2), 1.125 * horizon, dtype=torch.float64))
    torch.testing.assert_close(
        moved.x[-1] - free.x[-1], torch.full((3, 2), 1.5 * shift, dtype=torch.float64), atol=2e-8, rtol=0
    )


@pytest.mark.parametrize("segments", [None, 3])
def test_kl_by_the_trapezoidal_rule(segments: int | None) -> None:
    """1/2 int_0^2 cos^2 2t dt = 1/2 + sin(8) / 16: twice the steps leave a quarter of the error, by default half."""
    truth, noise = 0.5 + math.sin(8) / 16, papers(0.7, "rl", 2.0)
    errors = {}
    for rule in ("chain", "trapezoid"):
        for steps in (50, 100):
            path = solve(
                still, 1.0, noise, uniform_grid(2.0, steps), torch.zeros(2, 2).double().requires_grad_(), seed=0,
                control=lambda s, x, y: torch.cos(2 * s.time).expand_as(x), kl_rule=rule, keep=[steps],
                checkpoint_segments=segments,
            )  # fmt: skip
            errors[rule, steps] = float(path_kl(path)[0].detach() / 2 - truth)
    assert errors["chain", 100] / errors["chain", 50] == pytest.approx(0.5, abs=0.02)
    assert errors["trapezoid", 100] / errors["trapezoid", 50] == pytest.approx(0.25, abs=0.01)


def test_kl_rules_are_checked() -> None:
    noise, x0 = papers(0.7, "rl", 2.0), torch.zeros(2, 2).double()
    with pytest.raises(ValueError, match="kl_rule must be 'chain' or 'trapezoid'"):
        solve(still, 1.0, noise, [0.0, 1.0], x0, seed=0, control=ones, kl_rule="left")
    with pytest.raises(ValueError, match="give a control"):
        solve(still, 1.0, noise, [0.0, 1.0], x0, seed=0, kl_rule="trapezoid")


@pytest.mark.parametrize(("kind", "hurst"), [("rl", 0.7), ("mvn", 0.3)])
def test_girsanov_weights_of_a_nonlinear_control(kind: str, hurst: float) -> None:
    """E_q[w] = 1 and E_q[w X^2] = Var_p X within 4 standard errors; no weights, or -KL alone, would fail."""
    noise = papers(hurst, kind, 2.0)

    def control(step: Step, x: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(2 * x - y[..., 0]) + 0.5

    path = solve(
        still, 1.0, noise, uniform_grid(2.0, 40), torch.zeros(40_000, 1).double(), seed=0, control=control, keep=[40]
    )
    weight = path_log_ratio(path).exp()
    assert abs(float(weight.mean()) - 1) < 4 * float(weight.std()) / 200
    x2 = path.x[-1, :, 0] ** 2
    variance = float(noise.covariance([2.0]))
    if kind == "rl":
        assert variance == pytest.approx(2.2331, abs=5e-5)
    assert abs(float((weight * x2).mean()) - variance) < 4 * float((weight * x2).std()) / 200
    assert abs(float(x2.mean()) - variance) > 0.5  # unweighted
    without_martingale = torch.exp(-path_kl(path))
    assert float(without_martingale.mean()) < 0.9
    # KL(Q || P) two ways: E_q of the running cost and E_q of -log w.
    gap = path_kl(path) + path_log_ratio(path)
    assert abs(float(gap.mean())) < 4 * float(gap.std()) / 200


def test_identical_dimensions_add_up() -> None:
    """D copies cost D times the KL: the authors' mean over dimensions weighs the path's KL by 1 / D."""
    noise = papers(0.7)
    model = LinearSDE(noise)
    grid = noise.discretise(uniform_grid(2.0, 20))
    obs, where = torch.ones(1, 1, 1).double(), torch.tensor([20])
    control, _ = frozen_control(model.euler_transitions(grid), model.start(), where, obs, 0.5)
    normals = torch.randn(20, 50, 1, grid.rank, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one = solve(still, 1.0, noise, grid, torch.zeros(50, 1).double(), normals=normals, control=control)
    six = solve(
        still, 1.0, noise, grid, torch.zeros(50, 6).double(), normals=normals.expand(-1, -1, 6, -1), control=control
    )
    torch.testing.assert_close(path_kl(six), 6 * path_kl(one))
    torch.testing.assert_close(path_log_ratio(six), 6 * path_log_ratio(one))
    y = torch.ones(1, 1, 6).double()
    evidence = kalman_filter(model, [2.0], y, 0.5).log_likelihood
    torch.testing.assert_close(evidence.sum(-1), 6 * kalman_filter(model, [2.0], obs, 0.5).log_likelihood[:, 0])


FLOORS = [
    ("rl", 0.7, 1.0, -1.588930, -1.573989),
    ("mvn", 0.9, 0.0, -1.444151, -1.363347),
    ("mvn", 0.3, 1.0, -1.641758, -1.553758),
]


@pytest.mark.parametrize(("kind", "hurst", "o", "floor", "evidence"), FLOORS)
def test_published_floor_is_reached(kind: str, hurst: float, o: float, floor: float, evidence: float) -> None:
    """The best mean shift on 100 steps, in closed form, and its ELBO over 20 000 paths within 4 standard errors."""
    noise, sig = papers(hurst, kind), 0.5
    model, obs, where = LinearSDE(noise), torch.full((1, 1, 1), o, dtype=torch.float64), torch.tensor([100])
    grid = noise.discretise(uniform_grid(2.0, 100))
    control, bound = frozen_control(model.euler_transitions(grid), model.start(), where, obs, sig)
    assert float(bound) == pytest.approx(floor, abs=6e-7)
    exact = float(kalman_filter(model, [2.0], obs, sig).log_likelihood)
    assert exact == pytest.approx(evidence, abs=6e-7)
    x0 = torch.zeros(20_000, 1).double()
    path = solve(still, 1.0, noise, grid, x0, seed=0, control=control, keep=[100])
    terms = evidence_bound(path, log_likelihood(path.x[-1], o, sig))
    assert abs(float(terms.mean()) - floor) < 4 * float(terms.std()) / math.sqrt(20_000)
    # Importance weights close the gap.
    log_weights = log_likelihood(path.x[-1], o, sig) + path_log_ratio(path)
    assert float(importance_bound(log_weights, 20_000)) == pytest.approx(exact, abs=0.015)
    assert 0.3 < float(effective_sample_size(log_weights)) / 20_000 <= 1
    # A KL of mean over, say, six dimensions instead of the sum would be far off.
    assert abs(float((terms + path_kl(path) * 5 / 6).mean()) - floor) > 0.1


def test_the_floor_is_the_published_formula() -> None:
    """-1/2 log 2 pi sig^2 - 1/2 sum q_n / R_{n+1} - 1/2 E (o - m_0)^2 / R_0 of the sheet, from quadrature of the
    kernel.
    """
    noise, sig, n, o = papers(0.7), 0.5, 50, 1.0
    nodes, weights = (torch.from_numpy(x) for x in __import__("numpy").polynomial.legendre.leggauss(20))
    h = 2.0 / n
    tau = 2.0 - h * torch.arange(n).double()[:, None] - h * (nodes + 1) / 2
    kernel = (noise.weights * torch.exp(-noise.speeds * tau.unsqueeze(-1))).sum(-1)
    d, q = (kernel * weights).sum(-1) * h / 2, (kernel**2 * weights).sum(-1) * h / 2
    r = torch.cat([(d**2 / h).flip(0).cumsum(0).flip(0), torch.zeros(1)]) + sig**2
    published = -0.5 * math.log(2 * math.pi * sig**2) - 0.5 * float((q / r[1:]).sum()) - 0.5 * o**2 / float(r[0])
    model, grid = LinearSDE(noise), noise.discretise(uniform_grid(2.0, n))
    obs, where = torch.full((1, 1, 1), o, dtype=torch.float64), torch.tensor([n])
    control, bound = frozen_control(model.euler_transitions(grid), model.start(), where, obs, sig)
    assert float(bound) == pytest.approx(published, abs=1e-9)
    # u_n = (D_n / h) (o - m_n) / R_n at the start, where m = 0
    assert float(control.offset[0]) == pytest.approx(float(d[0] / h * o / r[0]), rel=1e-9)


def test_information_control_is_the_published_closed_form() -> None:
    """u* = g(tau) (o - m) / (v + sig^2) for one observation and theta > 0, scale 1 (the sheet's section 2)."""
    noise, theta, sig, o = papers(0.3), 0.7, 0.4, 1.2
    model, times = LinearSDE(noise, theta), uniform_grid(2.0, 8)
    control = information_control(
        model, model.transitions(times), torch.tensor([8]), torch.full((1, 1, 1), o, dtype=torch.float64), sig
    )
    source = torch.Generator().manual_seed(0)
    x, y = (torch.randn(*s, generator=source, dtype=torch.float64) for s in ((4, 1), (4, 1, 5)))
    g, w = noise.speeds, noise.weights
    nodes, weights = (torch.from_numpy(v) for v in __import__("numpy").polynomial.legendre.leggauss(200))
    for n in range(8):
        tau = 2.0 - float(times[n])

        def kernel(lag: Tensor) -> Tensor:
            lag = lag.unsqueeze(-1)
            return (w * (g * torch.exp(-g * lag) - theta * torch.exp(-theta * lag)) / (g - theta)).sum(-1)

        v = float((kernel(tau * (nodes + 1) / 2) ** 2 * weights).sum()) * tau / 2
        forget = (math.exp(-theta * tau) - torch.exp(-g * tau)) / (g - theta)
        m = math.exp(-theta * tau) * x - (w * g * y * forget).sum(-1)
        expected = kernel(torch.tensor(tau, dtype=torch.float64)) * (o - m) / (v + sig**2)
        own = control(Step(n, times[n], times[1]), x, y)
        torch.testing.assert_close(own, expected, rtol=1e-8, atol=1e-10)


SEVERAL: dict[str, Any] = {"theta": 0.7, "scale": 0.5, "constant": 0.2, "start_mean": 0.3}


def several() -> tuple[Any, ...]:
    noise = papers(0.7)
    grid = noise.discretise(uniform_grid(2.0, 25))
    obs, where = torch.tensor([0.5, 1.0]).double()[:, None, None], torch.tensor([10, 25])
    return noise, LinearSDE(noise, **SEVERAL), grid, obs, where


def total(path: Path, obs: Tensor, where: Tensor, sig: float) -> Tensor:
    return sum(
        (log_likelihood(path.x[int(n)], float(o), sig) for n, o in zip(where, obs, strict=True)), torch.zeros(())
    )


def test_step_guide_has_no_gap_at_all() -> None:
    """With the step noise shrunk as well, the weight is the same constant on every path: the chain's evidence.

    sig = .1, where the best mean shift loses half a nat at 25 steps.
    """
    noise, model, grid, obs, where = several()
    transitions = model.euler_transitions(grid)
    guide = step_guide(transitions, where, obs, 0.1)
    x0 = torch.full((2000, 1), 0.3, dtype=torch.float64)
    field = lambda t, x: 0.2 - 0.7 * x  # noqa: E731
    path = solve(field, 0.5, noise, grid, x0, seed=0, guide=guide)
    log_weights = total(path, obs, where, 0.1) + path_log_ratio(path)
    assert float(log_weights.std()) < 1e-10
    bound = evidence_bound(path, total(path, obs, where, 0.1))
    assert abs(float(bound.mean() - log_weights.mean())) < 4 * float(bound.std()) / math.sqrt(2000)
    # The chain's evidence differs from the SDE's by its Euler steps alone.
    exact = float(kalman_filter(model, [0.8, 2.0], obs, 0.1).log_likelihood)
    assert float(log_weights.mean()) == pytest.approx(exact, abs=0.01)
    floor = float(frozen_control(transitions, model.start(), where, obs, 0.1)[1])
    assert exact - floor > 0.4
    control = frozen_control(transitions, model.start(), where, obs, 0.1)[0]
    shifted = solve(field, 0.5, noise, grid, x0, seed=0, control=control)
    terms = evidence_bound(shifted, total(shifted, obs, where, 0.1))
    assert abs(float(terms.mean()) - floor) < 4 * float(terms.std()) / math.sqrt(2000)


def test_guided_paths_are_posterior_draws() -> None:
    noise, model, grid, obs, where = several()
    guide = step_guide(model.euler_transitions(grid), where, obs, 0.1)
    x0 = torch.full((4000, 1), 0.3, dtype=torch.float64)
    path = solve(lambda t, x: 0.2 - 0.7 * x, 0.5, noise, grid, x0, seed=0, guide=guide)
    times = grid.times[[5, 10, 20, 25]]
    mask = torch.tensor([False, True, False, True])[:, None, None]
    values = torch.tensor([0.0, 0.5, 0.0, 1.0]).double()[:, None, None]
    exact = kalman_smoother(model, times, values, 0.1, mask)
    own = path.x[[5, 10, 20, 25], :, 0]
    torch.testing.assert_close(own.mean(1), exact.mean[:, 0, 0], atol=0.02, rtol=0)
    torch.testing.assert_close(own.var(1), exact.variance[:, 0, 0], atol=0, rtol=0.1)


def test_controls_of_many_series_and_missing_values() -> None:
    """A batch with a mask has, series by series, the control of its own observations."""
    _, model, grid, obs, where = several()
    transitions = model.euler_transitions(grid)
    both = torch.cat([obs, 2 * obs], 1)
    mask = torch.tensor([[True, False], [True, True]]).unsqueeze(-1)
    x, y = torch.ones(2, 1).double(), torch.ones(2, 1, 5).double()
    step = Step(3, grid.times[3], grid.steps[3])
    control, bound = frozen_control(transitions, model.start(), where, both, 0.1, mask)
    guide = step_guide(transitions, where, both, 0.1, mask)
    information = information_control(model, transitions, where, both, 0.1, mask)
    for b, (own, at) in enumerate(((obs, where), (2 * obs[1:], where[1:]))):
        single, value = frozen_control(transitions, model.start(), at, own, 0.1)
        torch.testing.assert_close(control(step, x, y)[b : b + 1], single(step, x[:1], y[:1]))
        torch.testing.assert_close(bound[b : b + 1], value)
        alone = step_guide(transitions, at, own, 0.1)
        for part, other in zip(guide(step, x, y), alone(step, x[:1], y[:1]), strict=True):
            torch.testing.assert_close(part[b : b + 1], other)
        alone_information = information_control(model, transitions, at, own, 0.1)
        torch.testing.assert_close(information(step, x, y)[b : b + 1], alone_information(step, x[:1], y[:1]))


def test_errors_may_differ_by_series() -> None:
    """As where a change of coordinates makes them depend on the values."""
    _, model, grid, obs, where = several()
    transitions, both = model.euler_transitions(grid), torch.cat([obs, 2 * obs], 1)
    std = torch.tensor([[0.1, 0.3], [0.2, 0.05]], dtype=torch.float64).unsqueeze(-1)
    control, bound = frozen_control(transitions, model.start(), where, both, std)
    guide = step_guide(transitions, where, both, std)
    for b in range(2):
        data = (where, both[:, b : b + 1], std[:, b : b + 1])
        single, value = frozen_control(transitions, model.start(), *data)
        torch.testing.assert_close(bound[b : b + 1], value)
        for own, other in zip((*control, *guide), (*single, *step_guide(transitions, *data)), strict=True):
            torch.testing.assert_close(own[:, b : b + 1], other)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, step: Step, x: Tensor, y: Tensor) -> Tensor:
        return self.gain * torch.sin(x)


def test_linear_plus_residual_starts_at_the_linear_optimum_and_learns() -> None:
    noise, model, grid, obs, where = several()
    linear, _ = frozen_control(model.euler_transitions(grid), model.start(), where, obs, 0.1)
    control = LinearPlusResidual(linear, Residual())
    x0 = torch.full((200, 1), 0.3, dtype=torch.float64)
    runs = [solve(lambda t, x: 0.2 - 0.7 * x, 0.5, noise, grid, x0, seed=0, control=c) for c in (linear, control)]
    torch.testing.assert_close(runs[0].x, runs[1].x)
    loss = -evidence_bound(runs[1], total(runs[1], obs, where, 0.1)).mean()
    (slope,) = torch.autograd.grad(loss, control.residual.gain)
    assert bool(torch.isfinite(slope))
    assert float(slope) != 0


def test_importance_bound_rises_with_the_particles() -> None:
    log_weights = torch.randn(640, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one, many = importance_bound(log_weights, 1), importance_bound(log_weights, 64)
    assert one.shape == (640,)
    assert many.shape == (10,)
    # E w = e^(1/2)
    assert float(one.mean()) < float(many.mean()) < 0.5 + 0.2
    torch.testing.assert_close(many[0], torch.logsumexp(log_weights[::10], 0) - math.log(64))
    assert float(effective_sample_size(torch.zeros(9))) == pytest.approx(9.0)


@pytest.mark.parametrize("shape", [(0,), (7,), (4, 2)])
def test_bad_weights(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="log_weights"):
        importance_bound(torch.zeros(shape), 4)


def test_one_log_likelihood_a_path() -> None:
    noise = papers(0.5)
    path = solve(still, 1.0, noise, [0.0, 1.0], torch.zeros(3, 2), seed=0)
    with pytest.raises(ValueError, match="one a path"):
        evidence_bound(path, torch.zeros(3, 2))
