"""Compositional likelihood and its peers against closed forms: the step, its moments, its gauge, its lag, its guards.

X1 to X6 are exact: formulas, an exact variance, quadrature, or an iteration matrix.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.nn import PyroModule
from torch import Tensor

from inference import CaptureWarning, CollapseError, CompositionalLikelihood, SamplerWarning, fit
from inference.objectives.unnormalised import (
    ContrastiveDivergence,
    Cosine,
    DenoisingScoreMatching,
    ExponentialNoiseContrastive,
    InverseTime,
    NoiseContrastive,
    NormalisedSGD,
    Proximal,
    SelfNormalisedLikelihood,
    SlicedScoreMatching,
    TargetVariance,
)
from inference.objectives.unnormalised.compositional import mix
from inference.objectives.unnormalised.pair import Draws
from inference.runtime.generators import generator, scoped_seed
from tests.accelerator import fake_accelerator
from tests.inference.unnormalised_cases import DOUBLE, Quadratic, Tilted, data, grid_noise, normal_noise


@pytest.fixture(autouse=True)
def _own_random_numbers() -> Iterator[None]:
    with scoped_seed(0):
        yield


# ---------------------------------------------------------------- X1: the step
def test_a_step_is_the_papers(monkeypatch: pytest.MonkeyPatch) -> None:
    """log u, the weights and the gradient of two steps equal the formulas, to 1e-12."""
    model, z = Tilted(0.3), torch.tensor([-1.0, 0.5, 2.0, 0.1], dtype=DOUBLE)
    x = torch.tensor([0.2, 1.4, -0.6], dtype=DOUBLE)
    objective = CompositionalLikelihood(model, normal_noise(0.0, 1.5), 4, beta=0.25, correction="none", warmup_steps=0)
    objective(x)
    objective.step.zero_()
    fixed = Draws({"x": z}, dist.Normal(0.0, 1.5).log_prob(z))
    monkeypatch.setattr(objective.pair, "draw", lambda *a, **k: fixed)
    u = None
    for theta in (0.3, 0.7):
        with torch.no_grad():
            model.theta.fill_(theta)
        model.zero_grad()
        loss = objective(x)
        loss.backward()
        a = theta * z - z**2 / 2 - dist.Normal(0.0, 1.5).log_prob(z)
        g = a.exp().mean()
        u = g if u is None else 0.75 * u + 0.25 * g
        weights = a.exp() / (4 * u)
        log_p = theta * x - x**2 / 2
        assert abs(float(objective.log_u - u.log())) < 1e-12
        assert abs((loss - (u.log() - log_p.mean())).item()) < 1e-12
        assert abs(float(model.theta.grad - (-x.mean() + (weights * z).sum()))) < 1e-12


def test_a_constant_of_the_density_has_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default; and where u is e^2 off, the gradient is g / u times the self-normalised one."""
    model, z = Tilted(0.3), torch.tensor([-1.0, 0.5, 2.0, 0.1], dtype=DOUBLE)
    model.gauge = torch.nn.Parameter(torch.tensor(0.7, dtype=DOUBLE))
    x = torch.tensor([0.2, 1.4, -0.6], dtype=DOUBLE)
    objective = CompositionalLikelihood(model, normal_noise(0.0, 1.5), 4, beta=0.25, warmup_steps=0)
    objective(x)
    fixed = Draws({"x": z}, dist.Normal(0.0, 1.5).log_prob(z))
    monkeypatch.setattr(objective.pair, "draw", lambda *a, **k: fixed)
    a = 0.3 * z - z**2 / 2 + 0.7 - fixed.log_q
    objective.log_u.copy_(torch.logsumexp(a.detach(), 0) - math.log(4) + 2)
    model.zero_grad()
    objective(x).backward()
    share = (torch.logsumexp(a, 0) - math.log(4) - objective.log_u).exp()
    assert share < 0.2
    assert abs(float(model.gauge.grad)) < 1e-15
    assert abs(float(model.theta.grad - share * (-x.mean() + (a.softmax(0) * z).sum()))) < 1e-12


def test_weights_never_exceed_one_over_beta() -> None:
    """sum_j w_j <= 1 / beta as u contains its own batch, for weights spread over e^{-400} to e^{400}."""
    draw = generator(0, "weights")
    beta, log_u = torch.tensor(0.05, dtype=DOUBLE), torch.tensor(0.0, dtype=DOUBLE)
    largest = 0.0
    for _ in range(1000):
        a = 800 * torch.rand(8, generator=draw, dtype=DOUBLE) - 400
        log_g = torch.logsumexp(a, 0) - math.log(8)
        log_u = mix(log_u, log_g, beta)
        largest = max(largest, float((a - log_u).exp().sum() / 8))
        assert math.isfinite(float(log_u))
    assert largest <= 20 * (1 + 1e-12)
    assert largest > 15  # the bound is met, so that with u of the step before it would be passed


# ---------------------------------------------------------------- X2: moments of u
def test_stationary_variance_of_the_running_estimate() -> None:
    """beta / (2 - beta) (E_q[(p / q)^2] - 1) / M for p = N(1, 1), q = N(0, 1): e - 1 in place of the moment.

    300 chains of 240 steps after a start of 60: the standard error of the variance is 2.3 %.
    """
    draw, beta, m, chains = generator(1, "variance"), torch.tensor(0.1, dtype=DOUBLE), 64, 300
    log_u, kept = torch.zeros(chains, dtype=DOUBLE), []
    for step in range(300):
        z = torch.randn(m, chains, generator=draw, dtype=DOUBLE)
        log_u = mix(log_u, torch.logsumexp(z - 0.5, 0) - math.log(m), beta)
        if step >= 60:
            kept.append(log_u.exp())
    u = torch.stack(kept)
    exact = 0.1 / 1.9 * (math.e - 1) / m
    assert exact == pytest.approx(0.0014131, rel=1e-4)
    assert abs(float(u.var() / exact) - 1) < 0.05
    assert abs(float(u.mean()) - 1) < 0.002


# ---------------------------------------------------------------- X3: gauge
@pytest.mark.parametrize(("dtype", "tolerance"), [(DOUBLE, 1e-8), (torch.float32, 2e-3)])
def test_a_constant_in_the_energy_moves_log_z_alone(dtype: torch.dtype, tolerance: float) -> None:
    x = data(200, 1.0, 1.0, 2, dtype)
    found = []
    for gauge in (0.0, 1e3, -1e3):
        model = Tilted(0.0, gauge, dtype)
        objective = CompositionalLikelihood(model, normal_noise(0.0, 1.5, dtype), 32)
        fit(objective, x, num_steps=80, batch_size=50, lr=0.03, progress=False)
        found.append((model.theta.item(), float(objective.log_u) - gauge))
    for theta, log_u in found[1:]:
        assert abs(theta - found[0][0]) < tolerance
        assert abs(log_u - found[0][1]) < tolerance


# ---------------------------------------------------------------- X4: lag
def lag_matrix(eta: float, beta: float, r: float) -> np.ndarray:
    """Linearised gradient descent with the running estimate: parameters and log u's error."""
    return np.array([[1 - eta, eta * r], [(1 - beta) * eta * r, (1 - beta) * (1 - eta * r**2)]])


def test_where_the_running_estimate_lags_too_far() -> None:
    """R = 16, beta = 0.1: stable at eta = 0.008 and not at 0.0085; the objective without noise follows the matrix."""
    assert max(abs(np.linalg.eigvals(lag_matrix(0.008, 0.1, 16.0)))) < 1
    assert max(abs(np.linalg.eigvals(lag_matrix(0.0085, 0.1, 16.0)))) > 1
    x = torch.full((4,), 16.0, dtype=DOUBLE)
    for eta in (0.008, 0.0085):
        model = Tilted(16.0 + 1e-6)
        objective = CompositionalLikelihood(
            model,
            grid_noise(4.0, 28.0),
            beta=0.1,
            correction="none",
            warmup_steps=0,
            on_collapse="ignore",
        )
        objective(x)
        objective.log_u.fill_(model.log_z())
        objective.step.fill_(1)
        state = np.array([1e-6, 0.0])
        matrix = lag_matrix(eta, 0.1, 16.0)
        for _ in range(40):
            model.zero_grad()
            objective(x).backward()
            with torch.no_grad():
                model.theta.sub_(eta * model.theta.grad)
        # the matrix's second coordinate is log u's error before the step, with which the first step starts at zero
        for _ in range(40):
            state = matrix @ state
        assert abs(model.theta.item() - 16.0 - state[0]) < 2e-2 * 1e-6 + 0.3 * abs(state[0])


def test_the_ratio_correction_removes_the_lag() -> None:
    """Mean 16, rate 0.05: the plain estimator loses log Z, the corrected one holds it (both without noise)."""
    x = torch.full((4,), 16.0, dtype=DOUBLE)
    errors = {}
    for correction in ("none", "ratio"):
        model = Tilted(15.0)
        objective = CompositionalLikelihood(
            model,
            grid_noise(0.0, 32.0),
            beta=0.1,
            correction=correction,
            warmup_steps=0,
            on_collapse="ignore",
        )
        optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(60):
            optimiser.zero_grad()
            before = model.log_z()
            objective(x).backward()
            errors[correction] = abs(float(objective.log_u) - before)
            optimiser.step()
    assert errors["ratio"] < 1e-6
    assert errors["none"] > 1.0


# ---------------------------------------------------------------- X5: NCE and eNCE
@pytest.mark.parametrize(
    ("kind", "r", "smallest", "largest"),
    [
        ("nce", 2.0, 0.0284, 0.263),
        ("ence", 2.0, 0.0579, 0.397),
        ("nce", 4.0, 1.030e-3, 0.0901),
        ("ence", 4.0, 5.80e-3, 0.197),
    ],
)
def test_curvature_of_the_contrastive_losses(kind: str, r: float, smallest: float, largest: float) -> None:
    """Hessian at the optimum for P = N(R, 1), Q = N(0, 1), by quadrature with the product's own losses.

    NCE's loss is the sum of both halves, twice the tabled mean of the halves.
    """
    grid = torch.linspace(-14.0, r + 14.0, 4001, dtype=DOUBLE)
    width = grid[1] - grid[0]
    p, q = (dist.Normal(m, 1.0).log_prob(grid).exp() * width for m in (r, 0.0))

    class Expectation(torch.nn.Module):
        """The loss with quadrature in place of the means over rows."""

        def at(self, theta: Tensor) -> Tensor:
            ratio = theta[0] * grid - grid**2 / 2 - theta[1] - dist.Normal(0.0, 1.0).log_prob(grid)
            kinds = {"nce": NoiseContrastive, "ence": ExponentialNoiseContrastive}
            objective = kinds[kind](Tilted(), normal_noise(0.0, 1.0))
            objective.pair.log_q = lambda *a, **k: torch.zeros((), dtype=DOUBLE)  # type: ignore[method-assign]
            rows = torch.zeros((), dtype=DOUBLE)

            def one(value: Tensor, where: str) -> Tensor:
                far = torch.full((1,), 1e4 if kind == "nce" else 1e5, dtype=DOUBLE)
                at = (value[None], -far) if where == "data" else (far, value[None])
                return objective._loss(at[0], at[1], rows, rows, (grid[:1],))

            objective.pair.data = lambda batch: {}  # type: ignore[method-assign]
            of_data = torch.func.vmap(lambda v: one(v, "data"))(ratio)
            of_noise = torch.func.vmap(lambda v: one(v, "noise"))(ratio)
            return (p * of_data).sum() + (q * of_noise).sum()

    expectation = Expectation()
    best = torch.tensor([r, 0.5 * math.log(2 * math.pi) + r**2 / 2], dtype=DOUBLE)
    gradient = torch.func.grad(expectation.at)(best)
    assert float(gradient.abs().max()) < 1e-10
    eigenvalues = torch.linalg.eigvalsh(torch.func.hessian(expectation.at)(best))
    scale = 2.0 if kind == "nce" else 1.0
    assert float(eigenvalues[0]) / scale == pytest.approx(smallest, rel=2e-3)  # the table has three or four figures
    assert float(eigenvalues[1]) / scale == pytest.approx(largest, rel=2e-3)


# ---------------------------------------------------------------- X6: schedules, SNL
def test_proximal_beta_is_the_argmin() -> None:
    """nu' = argmin (u_hat e^{-nu} + nu) + D(nu, nu_0) / alpha with the Bregman divergence of e^{-nu}: mixes u and g."""
    alpha, u, g = 0.7, 2.3, 5.1
    beta = Proximal(alpha)(torch.tensor(3), torch.tensor(math.log(u), dtype=DOUBLE), torch.tensor(1.0), 8)
    assert float(beta) == pytest.approx(alpha * u / (1 + alpha * u), abs=1e-12)
    new = mix(torch.tensor(math.log(u), dtype=DOUBLE), torch.tensor(math.log(g), dtype=DOUBLE), beta)
    # stationarity: -g e^{-nu} + 1 + (e^{-nu_0} - e^{-nu}) / alpha = 0
    nu = float(new)
    assert -g * math.exp(-nu) + 1 + (1 / u - math.exp(-nu)) / alpha == pytest.approx(0.0, abs=1e-10)


def test_other_schedules() -> None:
    zero, log_u = torch.tensor(0), torch.tensor(0.0, dtype=DOUBLE)
    share = torch.tensor(0.5, dtype=DOUBLE)
    assert float(InverseTime(10.0)(torch.tensor(10), log_u, share, 4)) == pytest.approx(0.5)
    cosine = Cosine(0.5, 0.1, 100)
    assert [float(cosine(torch.tensor(t), log_u, share, 4)) for t in (0, 50, 100, 200)] == pytest.approx(
        [0.5, 0.3, 0.1, 0.1]
    )
    beta = float(TargetVariance(1e-3)(zero, log_u, share, 64))
    assert beta / (2 - beta) * (1 / 0.5 - 1) / 64 == pytest.approx(1e-3)


def test_self_normalised_loss_is_the_likelihood_at_its_optimum() -> None:
    model, x = Tilted(1.2), data(50, 1.0, 1.0, 3)
    objective = SelfNormalisedLikelihood(model, grid_noise(-12.0, 14.0))
    objective(x)
    with torch.no_grad():
        objective.log_z.fill_(model.log_z())
    assert objective(x).item() == pytest.approx(model.log_z() - float((1.2 * x - x**2 / 2).mean()), abs=1e-9)


# ---------------------------------------------------------------- fits
def test_maximum_likelihood_of_a_gaussian() -> None:
    """Both parameters and log Z against closed forms; one short run (three long ones are among the reproductions)."""
    x = data(2000, 2.0, 1.5, 4, torch.float32)
    model = Quadratic()
    noise = normal_noise(float(x.mean()), 1.5 * float(x.std()), torch.float32)
    objective = CompositionalLikelihood(model, noise, 512)
    fit(objective, x, num_steps=600, batch_size=256, lr=0.03, average_last=0.5, progress=False)
    mean, variance, log_z = model.moments()
    last = float(objective.history["log_partition"][-1])
    assert abs(last - log_z) > 0.01  # the running u belongs to the last step's parameters, not to their average
    assert abs(float(objective.log_u) - log_z) < 0.006  # four standard errors
    assert objective.refreshed is not None and objective.refreshed.standard_error < 0.0015
    assert abs(mean - float(x.mean())) < 0.03
    assert abs(variance / float(x.var()) - 1) < 0.02
    found = objective.log_partition(20_000)
    assert abs(found.value - log_z) < 4 * found.standard_error + 1e-3
    assert found.lower <= found.upper
    assert found.khat < 0.5
    objective.refresh(20_000)
    assert abs(float(objective.log_u) - log_z) < 4 * found.standard_error + 1e-3
    assert set(objective.history) == {"log_partition", "log_partition_batch", "ess", "beta"}
    assert len(objective.history["ess"]) == 600
    assert float(objective.history["beta"][50]) == 1.0 and float(objective.history["beta"][500]) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda m, q: NoiseContrastive(m, q, 256), {}),
        (lambda m, q: SelfNormalisedLikelihood(m, q, 256), {}),
        (lambda m, q: DenoisingScoreMatching(m, sigma=0.1), {}),
        (lambda m, q: SlicedScoreMatching(m), {}),
        (lambda m, q: ContrastiveDivergence(m, q, num_steps=5, step_size=0.3), {}),
        (lambda m, q: ContrastiveDivergence(m, q, num_steps=5, step_size=0.3, start="buffer", buffer_size=500), {}),
        (lambda m, q: ExponentialNoiseContrastive(m, q, 256), {"optimizer": lambda p: NormalisedSGD(p, lr=0.02)}),
    ],
    ids=["nce", "snl", "dsm", "ssm", "cd", "pcd", "ence"],
)
def test_peers_find_the_gaussian_too(make: Any, options: dict[str, Any]) -> None:
    """From the prior's mean 0 to a data mean of 1: the sign and scale of each loss."""
    x = data(1000, 1.0, 1.0, 5, torch.float32)
    model = Quadratic()
    objective = make(model, normal_noise(1.0, 1.6, torch.float32))
    chosen = {"lr": 0.03, "average_last": 0.4, **options}
    if "optimizer" in options:
        chosen.pop("lr")
    fit(objective, x, num_steps=250, batch_size=256, progress=False, **chosen)
    mean, variance, _ = model.moments()
    assert abs(mean - float(x.mean())) < 0.15
    assert abs(variance - float(x.var())) < 0.25


def test_noise_that_adapts_comes_to_the_model() -> None:
    """SNIS cross-entropy pulls a wrong normal to the model's moments, as does data likelihood to the data's."""
    x = data(1000, 1.0, 0.8, 6, torch.float32)
    for adapt in ("cross_entropy", "data"):

        class Guide(PyroModule):
            def __init__(self) -> None:
                super().__init__()
                self.mean = torch.nn.Parameter(torch.tensor(0.0))
                self.log_scale = torch.nn.Parameter(torch.tensor(0.5))

            def forward(self) -> None:
                pyro.sample("x", dist.Normal(self.mean, self.log_scale.exp()))

        guide, model = Guide(), Quadratic()
        objective = CompositionalLikelihood(model, guide, 256, adapt=adapt)
        fit(objective, x, num_steps=220, batch_size=256, lr=0.05, progress=False)
        assert abs(guide.mean.item() - 1.0) < 0.1
        assert abs(guide.log_scale.exp().item() - 0.8) < 0.1
        assert float(objective.history["ess"][-50:].mean()) > 0.85


# ---------------------------------------------------------------- any Pyro model
def test_pyro_functions_plates_and_guides_of_all_kinds() -> None:
    """Parameters of functions; subsampled scales do not count; guides of one row, of the batch, of an own plate."""
    x = data(300, 0.7, 1.0, 7, torch.float32)

    def model(x: Tensor) -> None:
        theta = pyro.param("theta", lambda: torch.tensor(0.0))
        with pyro.plate("data", 10 * len(x), subsample=torch.arange(len(x))):
            pyro.sample("x", dist.ImproperUniform(constraints.real, (), ()), obs=x)
            pyro.factor("energy", theta * x - x**2 / 2)

    def of_rows(x: Tensor) -> None:
        with pyro.plate("noise", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.5))

    def own_plate() -> None:
        with pyro.plate("noise", 96):
            pyro.sample("x", dist.Normal(0.0, 1.5))

    found = []
    for guide, m in ((normal_noise(0.0, 1.5, torch.float32), 96), (of_rows, 96), (own_plate, None)):
        objective = CompositionalLikelihood(model, guide, m)
        fit(objective, x, num_steps=150, batch_size=64, lr=0.05, average_last=0.3, progress=False)
        assert objective.noise_samples == 96
        (theta,) = (p for n, p in objective.named_parameters() if n.endswith("theta"))
        found.append(theta.item())
    assert found == pytest.approx([0.7, 0.7, 0.7], abs=0.2)


def test_a_site_that_is_conditioned_and_two_sites() -> None:
    class Unobserved(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.mean = torch.nn.Parameter(torch.tensor(0.0))

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(self.mean, 1.0))

    x = data(200, 0.5, 1.0, 8, torch.float32)

    class Both(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.mean = torch.nn.Parameter(torch.tensor(0.0))

        def forward(self, x: Tensor, y: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(self.mean, 1.0), obs=x)
                pyro.sample("y", dist.Normal(x, 1.0).mask(True), obs=y)

    def noise() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 2.0))
        pyro.sample("y", dist.Normal(0.0 * x, 3.0))

    both = CompositionalLikelihood(Both(), noise, 64)
    y = x + data(200, 0.0, 1.0, 9, torch.float32)
    fit(both, (x, y), num_steps=5, batch_size=50, progress=False)
    found = both.log_partition(20_000)
    assert abs(found.value) < 5 * found.standard_error  # this model is normalised

    alone = CompositionalLikelihood(Unobserved(), normal_noise(0.0, 1.5, torch.float32), 64)
    fit(alone, x, num_steps=5, batch_size=50, progress=False)
    assert abs(alone.log_partition(20_000).value) < 0.05


def test_gradients_that_the_model_stops_stay_stopped() -> None:
    """A recording would lose the detach; the pair notices and runs in Python."""

    class Stopped(Tilted):
        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.ImproperUniform(constraints.real, (), ()), obs=x)
                pyro.factor("energy", self.theta.detach() * x - self.theta.square() * x**2)

    model, x = Stopped(1.0), torch.tensor([1.0, 2.0], dtype=DOUBLE)
    objective = CompositionalLikelihood(model, normal_noise(0.0, 1.0), 4, correction="none")
    with pytest.warns(CaptureWarning, match="stops gradients inside"):
        objective(x)
    values = objective.pair.log_density({"x": x}, (x,), record=True)
    (gradient,) = torch.autograd.grad(values.sum(), model.theta)
    assert gradient.item() == pytest.approx(-2 * 5.0)


# ---------------------------------------------------------------- guards
def plain_descent(parameters: Any) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=0.05)


def test_noise_that_never_visits_the_model_ends_in_the_collapse_error() -> None:
    """Mean 16 from N(0, 1): no beta rescues it, and it must not end in a number."""
    x = data(500, 16.0, 1.0, 10)
    objective = CompositionalLikelihood(Tilted(), normal_noise(0.0, 1.0), 256)
    with pytest.raises(CollapseError, match=r"noise weights collapsed.*noise does not cover"):
        fit(
            objective,
            x,
            num_steps=1500,
            batch_size=256,
            optimizer=plain_descent,
            progress=False,
        )


def test_collapse_may_warn_instead() -> None:
    x = data(500, 16.0, 1.0, 10)
    objective = CompositionalLikelihood(Tilted(), normal_noise(0.0, 1.0), 256, on_collapse="warn")
    with pytest.warns(SamplerWarning, match="collapsed"):
        fit(objective, x, num_steps=320, batch_size=256, optimizer=plain_descent, progress=False)


# ---------------------------------------------------------------- the same bits
def test_same_bits_after_an_interrupt(tmp_path: Any) -> None:
    x = data(200, 1.0, 1.0, 11, torch.float32)

    def run(num_steps: int, checkpoint: Any = None, interrupt: int | None = None) -> tuple[Tensor, Tensor]:
        model = Quadratic()
        objective = CompositionalLikelihood(model, normal_noise(1.0, 1.5, torch.float32), 32)

        def stop(fields: dict[str, Any]) -> None:
            if interrupt is not None and fields["step"] >= interrupt:
                raise KeyboardInterrupt

        fit(
            objective,
            x,
            num_steps=num_steps,
            batch_size=50,
            lr=0.02,
            checkpoint=checkpoint,
            progress=stop if interrupt is not None else False,
        )
        return model.t.detach().clone(), objective.log_u.clone()

    whole = run(300)
    path = tmp_path / "run"
    run(300, path, interrupt=1)
    resumed = run(300, path)
    assert torch.equal(whole[0], resumed[0]) and torch.equal(whole[1], resumed[1])


def test_on_an_accelerator() -> None:
    with fake_accelerator() as device:
        x = torch.randn(16, device=device)
        model = Quadratic(device)
        law = dist.Normal(torch.zeros((), device=device), torch.ones((), device=device), validate_args=False)
        for kind in (CompositionalLikelihood, NoiseContrastive, SelfNormalisedLikelihood):
            objective = kind(model, lambda: pyro.sample("x", law), 8)
            for _ in range(2):
                objective(x).backward()
            assert model.t.grad.device.type == device.type
