"""Tempered SMC against closed forms and quadrature; its standard errors against the spread of many runs."""

import math

import pytest
import torch

from inference import NonFiniteError, SamplerWarning
from inference.potential import TemperedFunction
from inference.results.evidence import from_weights
from inference.smc import SMC, genealogical_variance, memory, next_temperature, systematic
from tests.accelerator import fake_accelerator
from tests.inference import evidence_cases as cases

F64 = torch.float64


def run(model, *args, **options) -> SMC:
    return SMC(model, progress=False, **options).run(*args)


@pytest.mark.parametrize("name", cases.MODELS)
def test_log_evidence_within_its_error(name):
    """Within 3.5 standard errors, which are below 0.03; a lost temperature or Jacobian costs 0.3 or more."""
    truth, found = cases.truth(name), run(cases.path(name), num_particles=1000, num_runs=4, seed=1).log_evidence
    assert found.standard_error < 0.03
    assert abs(found.value - truth) < 3.5 * found.standard_error


def test_particles_move_until_they_forget():
    """Wide priors and a scale that sets the width of the others, whose small values are hard to come by: with two moves
    a temperature log Z was 2.4 to 4.6 nats low, with an error of 0.25.
    """
    smc = run(cases.wide_regression, cases.WIDE_X, cases.WIDE_Y, num_runs=4, seed=0)
    found = smc.log_evidence
    assert found.standard_error < 0.1
    assert abs(found.value - cases.wide_regression_evidence()) < 3.5 * found.standard_error
    assert smc.result.moves.unique().numel() > 1  # more where it is harder
    fixed = run(cases.regression, cases.X, cases.Y, num_particles=100, num_moves=3, seed=0).result.moves
    assert fixed.tolist() == [3 + 8] + [3] * (len(fixed) - 1)


def test_memory_of_particles():
    g = torch.Generator().manual_seed(0)
    z, log_l = torch.randn(4000, 3, generator=g), torch.randn(4000, generator=g)
    other = torch.randn(4000, 3, generator=g)
    assert memory(z, log_l, z, log_l) == pytest.approx(1.0)
    assert memory(z, log_l, other, other[:, 0]) < 0.06
    assert memory(z, log_l, other, 0.6 * log_l + 0.8 * other[:, 0]) == pytest.approx(0.6, abs=0.05)
    assert memory(z, log_l, 0.6 * z + 0.8 * other, other[:, 0]) == pytest.approx(0.6, abs=0.05)
    assert memory(z, log_l, z, torch.zeros(4000)) == pytest.approx(1.0)  # what can't be said is not forgotten


@pytest.mark.parametrize(
    ("dim", "options"),
    [(4, {"target_ess": 0.7}), (2, {"target_ess": 0.9}), (2, {"inverse_temperatures": torch.linspace(0.025, 1, 40)})],
    ids=["adaptive", "fine", "fixed"],
)
def test_standard_error_of_a_single_run_is_calibrated(dim, options):
    """z-scores of 200 runs have variance near 1 (their own standard error 0.1), for the genealogical estimate.

    Without the correction for systematic resampling it is 0.67 in the second case, and 0.1 in the third if that is
    resampled at each temperature; the multinomial formula of Lee and Whiteley gives negative variances.
    """
    target, truth, _ = cases.gaussian_target(dim)
    found = run(target, num_particles=200, num_runs=200, num_moves=1, num_steps=4, seed=1, **options).result
    z = (found.log_evidence - truth) / found.variance.sqrt()
    assert 0.7 < z.var() < 1.35
    assert abs(z.mean()) < 0.3


def test_runs_are_combined():
    """The mean of Z over runs; its error is their spread if they are many, else from their genealogies."""
    target, truth, _ = cases.gaussian_target()
    many, few = (run(target, num_particles=200, num_runs=n, seed=4) for n in (100, 4))
    found, typical = many.log_evidence, many.result.variance.mean().sqrt()
    assert abs(found.value - truth) < 3.5 * found.standard_error
    assert found.standard_error == pytest.approx(float(many.result.log_evidence.std()) / 10, rel=0.2)
    assert few.log_evidence.standard_error == pytest.approx(float(typical) / 2, rel=0.35)
    assert found.value == pytest.approx(float(many.result.log_evidence.exp().mean().log()))


def test_posterior_moments():
    """Regression: mean and covariance of the exact posterior, within 4 errors of 4,000 particles that count half."""
    smc = run(cases.regression, cases.X, cases.Y, num_particles=1000, num_runs=4, seed=2)
    assert smc.path is not None and smc.path.captured
    w, exact = smc.get_samples()["w"], cases.regression_posterior()
    error = 4 * exact.variance.sqrt() / math.sqrt(2000)
    assert ((w.mean(0) - exact.mean).abs() < error).all()
    torch.testing.assert_close(torch.cov(w.T), exact.covariance_matrix, rtol=0.15, atol=0.15 * 0.05)


def test_weights_of_two_modes_within_two_percent():
    """0.3 and 0.7; a binomial count of 12,000 draws has error 0.004, and resampling some more."""
    smc = run(cases.two_modes, num_particles=3000, num_runs=4, seed=3)
    z = smc.get_samples()["z"]
    assert z.shape == (12_000, 2)
    upper = z[:, 0] > 0
    assert float(upper.double().mean()) == pytest.approx(cases.WEIGHTS[1], abs=0.02)
    assert float(z[upper].mean()) == pytest.approx(4.0, abs=0.03)
    assert abs(smc.log_evidence.value) < 3.5 * smc.log_evidence.standard_error


def test_systematic_resampling_is_unbiased_and_keeps_order():
    """Over a fine grid of the one uniform, the mean number of children is N w to 1 / grid; each is floor or ceil."""
    g = torch.Generator().manual_seed(0)
    weights = torch.rand(1, 13, generator=g, dtype=F64).square()
    weights = weights / weights.sum()
    grid = (torch.arange(2000, dtype=F64)[:, None] + 0.5) / 2000
    parents = systematic(weights.expand(2000, -1), grid)
    assert (parents.diff(dim=1) >= 0).all()
    children = torch.zeros(2000, 13, dtype=F64).scatter_add(1, parents, torch.ones_like(parents, dtype=F64))
    torch.testing.assert_close(children.mean(0), 13 * weights[0], rtol=0, atol=2e-3)
    assert ((children - 13 * weights).abs() < 1).all()
    equal = torch.full((1, 5), 0.2, dtype=F64)
    assert systematic(equal, torch.tensor([[0.4]], dtype=F64)).tolist() == [[0, 1, 2, 3, 4]]


def test_next_temperature_meets_the_target():
    g = torch.Generator().manual_seed(0)
    beta = torch.tensor(0.1, dtype=F64)
    log_l = 30 * torch.randn(3, 500, generator=g, dtype=F64)
    new = next_temperature(log_l, beta, 0.5)
    weights = torch.softmax((new - beta) * log_l, 1)
    assert float((1 / weights.square().sum(1)).mean()) == pytest.approx(250, rel=1e-6)
    assert float(next_temperature(1e-3 * log_l, beta, 0.5)) == 1.0
    # from a very vague prior the first temperature is tiny, and still found
    tiny = next_temperature(1e9 * log_l, 0 * beta, 0.5)
    assert 0 < float(tiny) < 1e-9
    log_l[:, :400] = -math.inf
    new = next_temperature(log_l, beta, 0.5)
    weights = torch.softmax((new - beta) * log_l, 1)
    assert float((1 / weights.square().sum(1)).mean()) == pytest.approx(50, rel=1e-6)


def test_hard_constraint():
    """The likelihood is 1 where z > 1.5 and 0 elsewhere: Z = P(z > 1.5), and nothing is left outside."""
    base = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(1, dtype=F64), 1.0), 1)
    target = TemperedFunction(lambda z: torch.where(z[:, 0] > 1.5, base.log_prob(z), -math.inf), base)
    smc = run(target, num_particles=2000, num_runs=4)
    truth = math.log(0.5 * math.erfc(1.5 / math.sqrt(2)))
    assert abs(smc.log_evidence.value - truth) < 3.5 * smc.log_evidence.standard_error < 0.3
    x = smc.get_samples()["x"]
    assert bool((x > 1.5).all())
    # the mean of the truncated normal is phi(1.5) / P(z > 1.5)
    assert float(x.mean()) == pytest.approx(math.exp(-1.125 - truth) / math.sqrt(2 * math.pi), abs=0.05)


def test_genealogical_variance_of_plain_importance_sampling():
    """With no resampling it is the weights' own variance; with equal weights it is nothing."""
    g = torch.Generator().manual_seed(0)
    weights = torch.softmax(torch.randn(1, 400, generator=g, dtype=F64), 1)
    expected = (400 * weights[0]).var() / 400
    torch.testing.assert_close(genealogical_variance(weights, torch.zeros(1, dtype=F64))[0], expected)
    equal = torch.full((1, 400), 1 / 400, dtype=F64)
    assert float(genealogical_variance(equal, torch.zeros(1, dtype=F64))) < 1e-20
    assert from_weights(weights[0].log(), "x").standard_error == pytest.approx(float(expected.sqrt()), rel=1e-9)


def test_fixed_ladder_seed_and_record():
    target, _, _ = cases.gaussian_target()
    options = {"num_particles": 100, "num_runs": 3, "inverse_temperatures": [0.2, 0.6, 1.0]}
    first, second = run(target, seed=1, **options), run(target, seed=1, **options)
    assert torch.equal(first.get_samples()["x"], second.get_samples()["x"])
    assert torch.equal(first.result.log_evidence, second.result.log_evidence)
    assert not torch.equal(first.result.log_evidence, run(target, seed=2, **options).result.log_evidence)
    record = first.diagnostics()
    assert record["inverse_temperatures"].tolist() == [0.2, 0.6, 1.0]
    assert record["ess"].shape == (3, 3) and record["acceptance_rate"].shape == (3,)
    assert first.get_samples(group_by_chain=True)["x"].shape == (3, 100, 2)
    exported = first.to_arviz()
    assert dict(exported.posterior.sizes)["draw"] == 100 and dict(exported.posterior.sizes)["chain"] == 3


def test_single_precision():
    x, y = cases.X.float(), cases.Y.float()
    smc = run(cases.regression, x, y, num_particles=500, num_runs=2)
    assert smc.get_samples()["w"].dtype == torch.float32
    assert abs(smc.log_evidence.value - cases.truth("closed-form")) < 3.5 * smc.log_evidence.standard_error


def test_on_an_accelerator():
    with fake_accelerator() as device:
        rows = torch.empty(2, 5, dtype=F64, device=device)
        results = (
            next_temperature(rows, rows[0, 0], 0.5),
            systematic(rows, rows[:, :1]),
            genealogical_variance(rows, rows[:, 0]),
        )
        assert {v.device.type for v in results} == {device.type}


def test_few_ancestors_are_reported():
    target, _, _ = cases.gaussian_target(6)
    with pytest.warns(SamplerWarning, match="descend from about"):
        run(target, num_particles=40)


def test_refusals():
    target, _, _ = cases.gaussian_target()
    for options, error, message in (
        ({"num_particles": 1}, ValueError, "num_particles must be at least 2"),
        ({"num_particles": 10.0}, TypeError, "num_particles must be an integer"),
        ({"num_runs": 0}, ValueError, "num_runs"),
        ({"target_ess": 1.0}, ValueError, "target_ess"),
        ({"jitter": 1.0}, ValueError, "jitter"),
        ({"inverse_temperatures": [0.5, 0.5, 1.0]}, ValueError, "increase strictly"),
        ({"inverse_temperatures": [0.5]}, ValueError, "increase strictly"),
        ({"seed": 1.5}, TypeError, "seed"),
        ({"compile": "never"}, ValueError, "compile"),
    ):
        with pytest.raises(error, match=message):
            SMC(target, **options)
    with pytest.raises(RuntimeError, match="call run"):
        SMC(target).get_samples()
    with pytest.raises(ValueError, match="path that has none"):
        run(target, 3)
    with pytest.raises(TypeError, match="the target must be a Pyro model"):
        run(3)
    impossible = TemperedFunction(lambda z: -math.inf + z[:, 0], target.base)
    with pytest.raises(NonFiniteError, match="no draw from the prior"):
        run(impossible, num_particles=10)
    infinite = TemperedFunction(lambda z: torch.where(z[:, 0] > 0, math.inf, 0.0), target.base)
    with pytest.raises(NonFiniteError, match="infinite at a draw"):
        run(infinite, num_particles=10)
