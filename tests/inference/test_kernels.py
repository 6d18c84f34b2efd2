"""The kernels against golden traces, exact stationary laws and conjugate posteriors.

Steps are pure, so most of these need no driver: a quadratic potential and explicit noise will do.
"""

import math
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from inference import (
    HMC,
    MCMC,
    SGHMC,
    SGLD,
    AdaptiveSGHMC,
    CyclicalSchedule,
    PolynomialSchedule,
    SamplerWarning,
    ScaleGibbs,
)
from inference.kernels.adaptation import DualAverage, Moments, mass_windows
from inference.kernels.adaptive_sghmc import AdaptiveSGHMCState
from inference.kernels.sghmc import SGHMCState
from tests.inference import zoo

F64 = torch.float64


def control(
    step_size: float, warmup: float = 0.0, inject: float = 1.0, restart: float = 0.0
) -> dict[str, torch.Tensor]:
    values = {"step_size": step_size, "inject": inject, "restart": restart, "warmup": warmup}
    return {k: torch.tensor(v, dtype=F64) for k, v in values.items()}


def quadratic(z):
    return 2.0 * (z["w"] ** 2).sum()  # k = 4


def test_golden_trace_of_adaptive_sghmc():
    """E1: three hand-computed steps without noise; any re-ordering of the updates changes them."""
    kernel = AdaptiveSGHMC(potential_fn=quadratic, step_size=0.1, friction=0.05)
    state = kernel.init(torch.zeros(1, 1, dtype=F64), SimpleNamespace())
    expected = {
        "tau": (1.0, 1.1, 2.060714),
        "mean": (1.5, 0.25, 0.369048),
        "second_moment": (2.5, 1.75, 1.035714),
        "momentum": (-0.0126491, -0.0044574, -0.0091475),
    }
    for step, gradient in enumerate((2.0, -1.0, 0.5)):
        state, _ = kernel.move(
            state, torch.tensor([[gradient]], dtype=F64), torch.zeros(1, 1, dtype=F64), control(0.1, warmup=1.0)
        )
        for field, values in expected.items():
            assert getattr(state, field).item() == pytest.approx(values[step], abs=1e-6), (field, step)
    assert state.position.item() == pytest.approx(-0.0262540, abs=1e-6)


def stationary_variance(
    kernel, state, k: float, epsilon: float, steps: int, burn: int, gradient_sd: float = 0.0
) -> float:
    """Variance over 1,024 chains and ``steps`` steps of U = k w^2 / 2."""
    noise = torch.Generator().manual_seed(0)
    scalars = control(epsilon)
    total, count = 0.0, 0
    for t in range(burn + steps):
        gradient = (
            k * state.position + gradient_sd * torch.randn(state.position.shape, generator=noise, dtype=F64)
        ) / kernel.temperature
        state, _ = kernel.move(state, gradient, torch.randn(state.position.shape, generator=noise, dtype=F64), scalars)
        if t >= burn:
            total += float(state.position.square().sum())
            count += state.position.numel()
    return total / count


def frozen(v: float) -> AdaptiveSGHMCState:
    zero = torch.zeros(1024, 1, dtype=F64)
    return AdaptiveSGHMCState(zero, zero, zero + 1, zero + 1, zero + v)


# E2 and E3. The truths are the AR(2) law of the sheet; 1,024 chains over 2,000+ correlated steps put the standard
# error near 0.5%, the bound is 2%.
@pytest.mark.parametrize(
    ("kernel", "state", "epsilon", "gradient_sd", "steps", "truth"),
    [
        (SGHMC(potential_fn=quadratic, step_size=0.1, friction=0.05), None, 0.1, 0.0, 4000, 0.25259),
        (SGHMC(potential_fn=quadratic, step_size=0.5, friction=0.2), None, 0.5, 0.0, 2000, 0.34615),
        (SGHMC(potential_fn=quadratic, step_size=0.1, friction=0.05, temperature=0.25), None, 0.1, 0.0, 4000, 0.06517),
        (AdaptiveSGHMC(potential_fn=quadratic, friction=0.05), frozen(16.0), 0.1, 0.0, 6000, 0.15039),
        (AdaptiveSGHMC(potential_fn=quadratic, friction=0.05), frozen(400.0), 0.05, 20.0, 12000, 0.2500),
        (
            AdaptiveSGHMC(potential_fn=quadratic, friction=0.05, noise_correction=False),
            frozen(400.0),
            0.05,
            20.0,
            12000,
            0.3750,
        ),
    ],
    ids=["sghmc", "sghmc-large-step", "tempered", "scale-adapted", "minibatch-corrected", "minibatch-uncorrected"],
)
def test_stationary_variance_is_the_ar2_law(kernel, state, epsilon, gradient_sd, steps, truth):
    if state is None:
        zero = torch.zeros(1024, 1, dtype=F64)
        state = SGHMCState(zero, zero)
    measured = stationary_variance(kernel, state, 4.0, epsilon, steps, 1500, gradient_sd)
    assert measured == pytest.approx(truth, rel=0.02)


def test_sgld_stationary_variance():
    """z <- (1 - eps k / 2) z + N(0, eps) is AR(1) with variance 1 / (k (1 - eps k / 4))."""
    kernel = SGLD(potential_fn=quadratic, step_size=0.2)
    state = kernel.init(torch.zeros(1024, 1, dtype=F64), SimpleNamespace())
    assert stationary_variance(kernel, state, 4.0, 0.2, 2000, 100) == pytest.approx(1 / (4 * 0.8), rel=0.02)


def linear_model(x, y, batch_size=None):
    w = pyro.sample("w", dist.Normal(x.new_zeros(x.shape[1]), 1.0).to_event(1))
    b = pyro.sample("b", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("data", len(x), subsample_size=batch_size) as i:
        pyro.sample("y", dist.Normal(x[i] @ w / math.sqrt(x.shape[1]) + b, math.sqrt(0.1)), obs=y[i])


@pytest.fixture(scope="module")
def linear_data():
    noise = torch.Generator().manual_seed(3)
    x = torch.randn(200, 13, generator=noise)
    y = x @ torch.randn(13, generator=noise) / math.sqrt(13) + 0.3 + math.sqrt(0.1) * torch.randn(200, generator=noise)
    design = torch.cat([x / math.sqrt(13), torch.ones(200, 1)], 1).double()
    covariance = torch.linalg.inv(torch.eye(14, dtype=F64) + design.T @ design / 0.1)
    mean = covariance @ (design.T @ y.double()) / 0.1
    return x, y, mean, covariance.diagonal().sqrt()


def errors(mcmc, mean, sd):
    samples = mcmc.get_samples(group_by_chain=True)
    draws = torch.cat([samples["w"], samples["b"].unsqueeze(-1)], -1).flatten(0, 1).double()
    return (
        ((draws.mean(0) - mean) / sd).abs().max().item(),
        (draws.std(0) / sd).min().item(),
        (draws.std(0) / sd).max().item(),
    )


def test_adaptive_sghmc_samples_linear_regression(linear_data):
    """E4: minibatches of 32 with the epsilon^4 term; every mean within 0.15 posterior sd and every sd within 6%."""
    x, y, mean, sd = linear_data
    kernel = AdaptiveSGHMC(linear_model, step_size=0.01, friction=0.05)
    mcmc = MCMC(
        kernel,
        num_samples=500,
        warmup_steps=3000,
        thin=10,
        num_chains=64,
        progress=False,
        compile=True,
        minibatch="per_chain",
    )
    mcmc.run(x, y, 32)
    shift, low, high = errors(mcmc, mean, sd)
    assert shift < 0.15 and low > 0.94 and high < 1.06


def test_full_batch_noise_correction_warns_and_narrows(linear_data):
    """E4: with full batches the correction must warn, and without it the sds are within 8%."""
    x, y, mean, sd = linear_data
    with pytest.warns(SamplerWarning, match="under-dispersed"):
        MCMC(AdaptiveSGHMC(linear_model), num_samples=2, warmup_steps=2, progress=False).run(x, y)
    kernel = AdaptiveSGHMC(linear_model, step_size=0.01, friction=0.05, noise_correction=False)
    mcmc = MCMC(kernel, num_samples=500, warmup_steps=2000, thin=10, num_chains=64, progress=False, compile=True).run(
        x, y
    )
    shift, low, high = errors(mcmc, mean, sd)
    assert shift < 0.15 and low > 0.92 and high < 1.08


@pytest.mark.parametrize("full_mass", [False, True])
def test_hmc_samples_linear_regression(linear_data, full_mass):
    """16 x 800 draws: means within 0.1 sd, sds within 6%; of 250 the least sd errs by 3.5%, give or take 1.4."""
    x, y, mean, sd = linear_data
    mcmc = MCMC(
        HMC(linear_model, num_steps=8, full_mass=full_mass),
        num_samples=800,
        warmup_steps=150,
        num_chains=16,
        progress=False,
    ).run(x, y)
    shift, low, high = errors(mcmc, mean, sd)
    assert shift < 0.1 and low > 0.94 and high < 1.06
    assert 0.6 < mcmc.sample_stats["acceptance_rate"].mean() < 0.97
    assert max(float(mcmc.diagnostics()[s]["r_hat"].max()) for s in ("w", "b")) < 1.03


def test_hmc_without_its_correction_would_be_caught():
    """A leapfrog step this large has energy errors of order one; the accept step alone makes the variance right (1 /
    4).
    """
    kernel = HMC(potential_fn=quadratic, step_size=0.8, num_steps=3, adapt_step_size=False, adapt_mass_matrix=False)
    mcmc = MCMC(
        kernel,
        num_samples=500,
        warmup_steps=50,
        num_chains=64,
        initial_params={"w": torch.zeros(64, 1, dtype=F64)},
        progress=False,
    ).run()
    draws = mcmc.get_samples()["w"]
    assert 0.3 < mcmc.sample_stats["acceptance_rate"].mean() < 0.97
    assert draws.var().item() == pytest.approx(0.25, rel=0.04)


def test_gibbs_leaves_the_hierarchy_invariant():
    """E8: alternating w | s and s | w must leave InvGamma(a, r); 20,000 thinned draws against it by Kolmogorov-
    Smirnov.
    """

    def model():
        variance = pyro.sample(
            "variance", dist.InverseGamma(torch.tensor(3.0, dtype=F64), torch.tensor(3.0, dtype=F64))
        )
        pyro.sample("w", dist.Normal(torch.zeros(4, dtype=F64), variance.sqrt()).to_event(1))

    from inference.potential import LogDensity, Potential

    bound = ScaleGibbs("variance", "w").bind(Potential(LogDensity(model)))
    noise = torch.Generator().manual_seed(0)
    position = torch.zeros(20000, 5, dtype=F64)
    for _ in range(30):
        s = (0.5 * position[:, :1]).exp()
        position = torch.cat([position[:, :1], s * torch.randn(20000, 4, generator=noise, dtype=F64)], 1)
        gamma = torch._standard_gamma(bound.concentration.expand(20000, 1), generator=noise)
        position = torch.cat([bound.draw(position, gamma), position[:, 1:]], 1)
    assert stats.kstest(position[:, 0].exp().numpy(), stats.invgamma(3.0, scale=3.0).cdf).pvalue > 0.001


def test_gibbs_draws_of_a_tempered_law():
    """p(v, w)^(1/T) with log v in place of v: without data v ~ InvGamma((a + n/2)/T - n/2, r/T)."""

    def model():
        variance = pyro.sample("v", dist.InverseGamma(torch.tensor(3.0, dtype=F64), torch.tensor(2.0, dtype=F64)))
        with pyro.plate("weight", 3):
            pyro.sample("w", dist.Normal(0.0, variance.sqrt()))

    kernel = SGLD(model, step_size=0.02, temperature=0.5, gibbs=[ScaleGibbs("v", "w")], gibbs_every=5)
    drawn = MCMC(kernel, 400, 500, num_chains=200, thin=5, progress=False, seed=1).run().get_samples()["v"].log()
    exact = stats.invgamma((3.0 + 1.5) / 0.5 - 1.5, scale=2.0 / 0.5).rvs(400_000, random_state=0)
    exact = torch.as_tensor(exact).log()
    assert drawn.mean().item() == pytest.approx(exact.mean().item(), abs=0.02)
    assert drawn.std().item() == pytest.approx(exact.std().item(), rel=0.04)


def test_gibbs_refuses_another_pairing_and_what_many_data_would_hide():
    noise = torch.Generator().manual_seed(0)
    many = torch.randn(200_000, generator=noise, dtype=F64)

    def standard_deviation():
        v = pyro.sample("v", dist.InverseGamma(torch.tensor(3.0, dtype=F64), 2.0))
        with pyro.plate("k", 2):
            w = pyro.sample("w", dist.Normal(0.0, v))
        with pyro.plate("data", len(many)):
            pyro.sample("y", dist.Normal(w.sum(), 1.0), obs=many)

    def permuted():
        v = pyro.sample("v", dist.InverseGamma(torch.full((2,), 3.0, dtype=F64), 2.0).to_event(1))
        pyro.sample("w", dist.Normal(0.0, v.flip(0).sqrt()).to_event(1))

    for model in (standard_deviation, permuted):
        with pytest.raises(ValueError, match="another posterior"):
            MCMC(SGLD(model, step_size=1e-7, gibbs=[ScaleGibbs("v", "w")]), 1, 0, progress=False).run()


def test_the_recorded_energy_is_that_of_the_gradient():
    """A stochastic-gradient step knows U before it moves, and its draws have no lp."""

    def model():
        pyro.sample("a", dist.Normal(torch.zeros(3, dtype=F64), 1.0).to_event(1))

    mcmc = MCMC(SGLD(model, step_size=0.1), 6, 5, progress=False).run()
    energy = mcmc.potential(mcmc.get_samples()["a"])
    torch.testing.assert_close(mcmc.sample_stats["gradient_energy"][0, 1:], energy[:-1])
    assert "lp" not in mcmc.to_arviz()["sample_stats"]


def test_gibbs_inside_sghmc_and_its_refusals():
    """The variances follow InvGamma(a + n / 2, r + sum w^2 / 2), since w is observed to the kernel as a latent held
    near data.
    """

    def model(y):
        variance = pyro.sample(
            "variance", dist.InverseGamma(torch.tensor(3.0, dtype=F64), torch.tensor(2.0, dtype=F64))
        )
        w = pyro.sample("w", dist.Normal(y.new_zeros(y.shape), variance.sqrt()).to_event(1))
        pyro.sample("y", dist.Normal(w, 0.5).to_event(1), obs=y)

    y = torch.tensor([1.0, -0.5, 2.0, 0.3, -1.2, 0.8], dtype=F64)
    gibbs = SGHMC(model, step_size=0.1, friction=0.1, gibbs=[ScaleGibbs("variance", "w")], gibbs_every=5)
    with_gibbs = MCMC(gibbs, 250, 200, num_chains=256, thin=8, progress=False).run(y).get_samples()["variance"]
    reference = MCMC(HMC(model, num_steps=8), 100, 150, num_chains=256, progress=False).run(y).get_samples()["variance"]
    for q in (0.25, 0.5, 0.75):
        assert with_gibbs.quantile(q).item() == pytest.approx(reference.quantile(q).item(), rel=0.05)

    def not_conjugate(y):
        variance = pyro.sample(
            "variance", dist.InverseGamma(torch.tensor(3.0, dtype=F64), torch.tensor(2.0, dtype=F64))
        )
        pyro.sample("w", dist.Normal(y.new_zeros(y.shape), variance).to_event(1))  # variance used as a scale

    def lognormal(y):
        variance = pyro.sample("variance", dist.LogNormal(y.new_zeros(()), 1.0))
        pyro.sample("w", dist.Normal(y.new_zeros(y.shape), variance.sqrt()).to_event(1))

    for bad, message in ((not_conjugate, "another posterior"), (lognormal, "needs an InverseGamma")):
        with pytest.raises(ValueError, match=message):
            MCMC(SGHMC(bad, step_size=0.1, gibbs=[ScaleGibbs("variance", "w")]), 2, 2, progress=False).run(y)
    with pytest.raises(ValueError, match="does not have"):
        MCMC(SGHMC(model, step_size=0.1, gibbs=[ScaleGibbs("tau", "w")]), 2, 2, progress=False).run(y)


def test_cyclical_schedule():
    schedule = CyclicalSchedule(0.1, num_cycles=3, exploration=0.5)
    kept = list(schedule.kept_steps(12, thin=5))
    assert len(kept) == 12 and kept[-1] == 3 * 40 - 1
    steps = [schedule.sampling(t) for t in range(120)]
    assert [t for t, s in enumerate(steps) if s.restart] == [0, 40, 80]
    assert all(steps[t].noise == 1.0 for t in kept) and steps[5].noise == 0.0
    # the rate, epsilon squared, is cosine-shaped: half of its top a quarter turn in
    assert steps[0].step_size == pytest.approx(0.1) and steps[20].step_size ** 2 == pytest.approx(0.1**2 / 2)
    assert steps[39].step_size < 0.01


@pytest.mark.parametrize(("draws", "cycles"), [(9, 8), (12, 8), (100, 30), (3, 5)])
def test_draws_are_shared_among_all_cycles(draws: int, cycles: int):
    schedule = CyclicalSchedule(0.1, num_cycles=cycles, exploration=0.5)
    kept = list(schedule.kept_steps(draws, thin=3))
    starts = [t for t in range(kept[-1] + 1) if schedule.sampling(t).restart]
    assert len(kept) == len(set(kept)) == draws and kept == sorted(kept) and len(starts) == cycles
    share = [sum(start <= t < start + starts[1] for t in kept) for start in starts]
    assert max(share) - min(share) <= 1 and all(schedule.sampling(t).noise for t in kept)


def test_cyclical_sghmc_finds_both_modes():
    """Two well separated modes: a cycle that restarts hot visits both from every start."""

    def model():
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0, dtype=F64), 10.0))
        pyro.factor("modes", torch.logaddexp(-0.5 * (z - 4) ** 2 / 0.25, -0.5 * (z + 4) ** 2 / 0.25) + 0.5 * z**2 / 100)

    kernel = SGHMC(model, step_size=CyclicalSchedule(0.3, num_cycles=20, exploration=0.25), friction=0.3)
    mcmc = MCMC(kernel, num_samples=200, warmup_steps=10, thin=2, num_chains=64, progress=False).run()
    assert 0.2 < (mcmc.get_samples()["z"] > 0).double().mean() < 0.8
    assert len(mcmc.get_samples()["z"]) == 64 * 200


def test_polynomial_schedule_and_callables():
    assert PolynomialSchedule(0.1, decay=1.0, offset=10.0).sampling(10).step_size == pytest.approx(0.05)
    kernel = SGLD(potential_fn=quadratic, step_size=lambda t: 0.1 / (1 + t))
    assert list(kernel.controls(2, 5, warmup_steps=3)["step_size"]) == pytest.approx([0.1, 0.1, 0.05])


def test_moments_are_those_of_the_pool():
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(40, 8, 3, generator=noise, dtype=F64) * torch.tensor([1.0, 2.0, 3.0], dtype=F64) + 5
    for dense in (False, True):
        moments = Moments.start(x[0], dense=dense)
        for step in x:
            moments = moments.update(step)
        flat = x.flatten(0, 1)
        expected = torch.cov(flat.T) if dense else flat.var(0)
        torch.testing.assert_close(moments.scatter / (moments.size - 1), expected)
        torch.testing.assert_close(moments.mean, flat.mean(0))


def test_dual_averaging_reaches_its_target():
    """Acceptance exp(-epsilon) hits 0.8 at epsilon = -log 0.8."""
    average = DualAverage.start(torch.tensor(0.01, dtype=F64))
    for _ in range(2000):
        average = average.update((-average.log_step.exp()).exp(), 0.8)
    assert average.log_average.exp().item() == pytest.approx(-math.log(0.8), rel=0.02)


@pytest.mark.parametrize(
    ("warmup", "expected"), [(1000, [100, 150, 250, 450, 950]), (300, [100, 150, 250]), (100, [90]), (10, [])]
)
def test_windows_are_stans(warmup, expected):
    assert mass_windows(warmup)[1] == expected


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: SGHMC(zoo.logistic, step_size=-1.0), ValueError, "step_size must lie in"),
        (lambda: SGHMC(zoo.logistic, step_size="fast"), TypeError, "step_size must be a number"),
        (lambda: SGHMC(zoo.logistic, step_size=0.1, friction=1.5), ValueError, "friction must lie in"),
        (lambda: SGLD(zoo.logistic, step_size=0.1, temperature=0.0), ValueError, "temperature must lie in"),
        (lambda: SGLD(zoo.logistic, step_size=0.1, gibbs_every=0), ValueError, "gibbs_every"),
        (lambda: HMC(), ValueError, "exactly one of model and potential_fn"),
        (lambda: HMC(zoo.logistic, num_steps=0), ValueError, "num_steps"),
        (lambda: HMC(zoo.logistic, num_steps=4, trajectory_length=1.0), ValueError, "not both"),
        (lambda: HMC(zoo.logistic, jitter=1.0), ValueError, "jitter"),
        (lambda: HMC(3), TypeError, "callable"),
        (lambda: CyclicalSchedule(0.1, exploration=1.0), ValueError, "exploration"),
        (lambda: CyclicalSchedule(0.1, num_cycles=0), ValueError, "num_cycles"),
    ],
)
def test_bad_settings_are_named(build, error, message):
    with pytest.raises(error, match=message):
        build()
