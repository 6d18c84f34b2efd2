"""Simulation-based calibration: right kernels pass, kernels with one deliberate bug fail.

The failing kernels are the test of the test: each has one bug of a kind that the eye overlooks.
"""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide.initialization import init_to_sample
from scipy import stats
from torch.distributions.transforms import ExpTransform

from inference import HMC, NUTS, SGHMC, SGLD, AdaptiveSGHMC
from inference.calibration import Calibration, simulation_based_calibration

# Pooled step sizes are too long for a chain in an unlikely data set now and then, and the driver says so.
pytestmark = pytest.mark.filterwarnings("ignore:.*transitions diverged:inference.SamplerWarning")

F64 = torch.float64
ZERO = torch.zeros((), dtype=F64)


def model(n=4):
    """Few data, so that the prior counts; a positive site, so that the Jacobian counts."""
    mu = pyro.sample("mu", dist.Normal(ZERO, 1.0))
    rate = pyro.sample("rate", dist.Gamma(ZERO + 3.0, ZERO + 1.0))
    with pyro.plate("n", n):
        pyro.sample("y", dist.Normal(mu, rate.rsqrt()))


# An engine is a line: how to build it, and the options of the run.  Those without acceptance step have a bias of the
# order of their step size, which is small enough here for 500 replications not to see it.
KERNELS = {
    "HMC": (partial(HMC, num_steps=6), {"warmup_steps": 150, "thin": 3}),
    # Seeds 0, 1, 2: p = 0.008, 0.20, 1.0.
    "NUTS": (NUTS, {"warmup_steps": 100, "thin": 2, "seed": 1}),
    "SGLD": (partial(SGLD, step_size=0.005), {"warmup_steps": 800, "thin": 250}),
    "SGHMC": (partial(SGHMC, step_size=0.08, friction=0.1), {"warmup_steps": 200, "thin": 30}),
    "AdaptiveSGHMC": (
        partial(AdaptiveSGHMC, step_size=0.1, friction=0.1, noise_correction=False),
        {"warmup_steps": 300, "thin": 30},
    ),
}


def calibrate(kernel, program=model, **options):
    settings = {"observed": ["y"], "num_samples": 15, "compile": False, **options}
    return simulation_based_calibration(program, partial(kernel, init_strategy=init_to_sample), **settings)


@pytest.mark.parametrize("name", KERNELS)
def test_engines_are_calibrated(name):
    kernel, options = KERNELS[name]
    result = calibrate(kernel, **options)
    assert set(result.ranks) == {"mu", "rate", "log_likelihood"}
    assert result.p_value() > 0.01, result.chi_square()


# ---------------------------------------------------------------------- bugs
class ExpWithoutJacobian(ExpTransform):
    def log_abs_det_jacobian(self, x, y):
        return torch.zeros_like(x)


class AcceptsTheWrongSign(HMC):
    """min(1, exp(H' - H)) for min(1, exp(H - H'))."""

    def _finish(self, state, inputs, before, *proposal):
        accepted = super()._finish(state, inputs, torch.full_like(before, torch.inf), *proposal)[1]
        return super()._finish(state, inputs, 2 * accepted["energy"] - before, *proposal)


class AcceptsEverything(HMC):
    """Leapfrog alone, whose error nothing corrects."""

    def _finish(self, state, inputs, before, *proposal):
        return super()._finish(state, inputs, torch.full_like(before, torch.inf), *proposal)


class WithoutFriction(SGHMC):
    """The momentum is kicked and never damped."""

    def move(self, state, gradient, noise, control):
        undamped = state._replace(momentum=state.momentum / (1 - self.friction))
        return super().move(undamped, gradient, noise, control)


class TooMuchNoise(SGLD):
    """N(0, 2 epsilon) for N(0, epsilon): the law of another convention for the step size."""

    def move(self, state, gradient, noise, control):
        return super().move(state, gradient, noise * 2**0.5, control)


COARSE = {"step_size": 0.35, "num_steps": 4, "adapt_step_size": False, "adapt_mass_matrix": False}
CHAINS_RUN = {"warmup_steps": 100, "thin": 3}
BUGS = {
    "no Jacobian": (partial(HMC, num_steps=6, transforms={"rate": ExpWithoutJacobian().inv}), KERNELS["HMC"][1]),
    "no Jacobian, SGHMC": (
        partial(SGHMC, step_size=0.08, friction=0.1, transforms={"rate": ExpWithoutJacobian().inv}),
        KERNELS["SGHMC"][1],
    ),
    "wrong accept sign": (partial(AcceptsTheWrongSign, **COARSE), CHAINS_RUN),
    "no accept step": (partial(AcceptsEverything, **{**COARSE, "step_size": 0.55}), CHAINS_RUN),
    "missing friction": (partial(WithoutFriction, step_size=0.08, friction=0.1), KERNELS["SGHMC"][1]),
    "too much noise": (partial(TooMuchNoise, step_size=0.02), {"warmup_steps": 200, "thin": 30}),
}


@pytest.mark.filterwarnings("ignore:.*became non-finite:inference.SamplerWarning")
@pytest.mark.parametrize("bug", BUGS)
def test_a_kernel_with_a_bug_is_not(bug):
    kernel, options = BUGS[bug]
    assert calibrate(kernel, **options).p_value() < 1e-4


def test_the_coarse_steps_of_the_buggy_kernels_are_right_with_the_right_decision():
    """What fails above is the decision and not the integrator."""
    assert calibrate(partial(HMC, **COARSE), **CHAINS_RUN).p_value() > 0.01


def test_a_sampler_that_ignores_the_data_passes_by_its_parameters_and_fails_by_the_likelihood():
    """Modrák et al. 2023: the prior is calibrated for every parameter, and only data-dependent quantities see it."""

    def ignoring(conditioned, **options):
        return HMC(lambda *data: model(), **options)

    # Ranks among correlated draws are not uniform: at thin=3 the rate's draws still correlate by 0.10, at 10 by 0.04.
    p = {name: float(value) for name, value in calibrate(ignoring, warmup_steps=200, thin=10).chi_square().items()}
    assert p["mu"] > 0.01 and p["rate"] > 0.01 and p["log_likelihood"] < 1e-6


# ---------------------------------------------------------------------- ranks and their tests
def uniform_ranks(shape, draws, seed=0):
    return torch.randint(0, draws + 1, shape, generator=torch.Generator().manual_seed(seed))


def result_of(ranks, draws):
    return Calibration({"a": ranks}, draws, {"a": torch.zeros(ranks.shape[1:])})


def test_chi_square_is_scipys_per_scalar():
    ranks = uniform_ranks((400, 3), 63)
    found = result_of(ranks, 63).chi_square(8)["a"]
    for i in range(3):
        counts = torch.bincount(ranks[:, i] // 8, minlength=8)
        assert found[i].item() == pytest.approx(stats.chisquare(counts.numpy()).pvalue, rel=1e-10)
    assert result_of(ranks, 63).p_value(8) == pytest.approx(min(1.0, 3 * found.min().item()))


def test_p_values_of_uniform_ranks_are_uniform():
    found = result_of(uniform_ranks((500, 2000), 99), 99).chi_square()["a"]
    assert stats.kstest(found.numpy(), "uniform").pvalue > 0.001  # 2,000 p-values of a discrete statistic


def test_vectors_and_ties():
    """A quantity with ties has uniform ranks as well, and a vector of quantities one rank each."""

    def two(n=3):
        w = pyro.sample("w", dist.Normal(ZERO.expand(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(w.sum(), 1.0).expand([n]).to_event(1))

    quantities = {"which": lambda draw, data: (draw["w"] > data["y"].mean()).double()}
    result = calibrate(
        partial(HMC, num_steps=6), two, quantities=quantities, warmup_steps=150, thin=3, num_replications=300
    )
    assert result.ranks["w"].shape == (300, 2) and result.ranks["which"].shape == (300, 2)
    assert result.ranks["log_likelihood"].shape == (300,)
    assert result.p_value() > 0.01
    assert all(int(r.min()) >= 0 and int(r.max()) <= 15 for r in result.ranks.values())


def test_draws_that_depend_on_each_other_are_reported():
    options = {"warmup_steps": 5, "num_replications": 20, "num_samples": 39}
    close = calibrate(partial(SGLD, step_size=1e-4), thin=1, **options)
    assert close.autocorrelation["mu"] > 0.7
    far = calibrate(partial(SGLD, step_size=0.02), thin=100, **options)
    assert abs(far.autocorrelation["mu"]) < 0.2


def test_the_same_seed_gives_the_same_ranks():
    def ranks(seed):
        options = {"warmup_steps": 5, "num_replications": 20, "seed": seed}
        return calibrate(partial(SGLD, step_size=0.01), **options).ranks["mu"]

    assert torch.equal(ranks(3), ranks(3)) and not torch.equal(ranks(3), ranks(4))


def test_discrete_latent_sites_are_summed_out_and_have_no_rank():
    def mixture(n=6):
        m = pyro.sample("m", dist.Normal(ZERO, 2.0))
        with pyro.plate("n", n):
            c = pyro.sample("c", dist.Bernoulli(ZERO + 0.3))
            pyro.sample("y", dist.Normal(m + 2 * c, 1.0))

    result = calibrate(partial(HMC, num_steps=6), mixture, warmup_steps=150, thin=3)
    assert set(result.ranks) == {"m"} and result.p_value() > 0.01


# ---------------------------------------------------------------------- plots
def test_the_envelope_of_the_plot_holds_uniform_ranks_and_not_others():
    """5% of uniform sets of ranks leave it somewhere: 5 of 100, with a standard error of 2.2."""
    outside = sum(escapes(result_of(uniform_ranks((200,), 15, seed), 15).plot().axes[0]) for seed in range(100))
    assert 1 <= outside <= 12
    narrow = (uniform_ranks((200,), 15) + uniform_ranks((200,), 15, 1)) // 2
    assert escapes(result_of(narrow, 15).plot().axes[0])


def escapes(axes):
    (band,), (_, curve) = axes.collections, axes.lines
    edges = band.get_paths()[0].vertices
    upper = {round(x, 9): y for x, y in edges.tolist() if y > 0}
    return any(abs(y) > upper[round(x, 9)] for x, y in zip(*curve.get_data(), strict=True))


def test_a_panel_a_scalar():
    ranks = {"a": uniform_ranks((100, 2), 15), "b": uniform_ranks((100,), 15)}
    result = Calibration(ranks, 15, {})
    assert [a.get_title() for a in result.plot(kind="histogram").axes] == ["a[0]", "a[1]", "b"]
    bars = result.plot(["b"], kind="histogram", num_bins=4).axes[0].containers[0]
    assert [bar.get_height() for bar in bars] == torch.bincount(ranks["b"] // 4, minlength=4).tolist()
    with pytest.raises(ValueError, match="kind must be"):
        result.plot(kind="pie")
    with pytest.raises(ValueError, match=r"no quantities \['c'\]"):
        result.plot(["c"])


# ---------------------------------------------------------------------- bad input
def subsampled(n=20):
    mu = pyro.sample("mu", dist.Normal(ZERO, 1.0))
    with pyro.plate("n", n, subsample_size=5):
        pyro.sample("y", dist.Normal(mu, 1.0))


def already_observed():
    mu = pyro.sample("mu", dist.Normal(ZERO, 1.0))
    pyro.sample("y", dist.Normal(mu, 1.0), obs=ZERO)


def weighted():
    mu = pyro.sample("mu", dist.Normal(ZERO, 1.0))
    pyro.factor("weight", -mu.abs())
    pyro.sample("y", dist.Normal(mu, 1.0))


def flat():
    mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
    pyro.sample("y", dist.Normal(mu, 1.0))


@pytest.mark.parametrize(
    ("program", "options", "error", "message"),
    [
        (model, {"observed": []}, ValueError, "observed is empty"),
        (model, {"observed": "y"}, TypeError, "list of site names"),
        (model, {"observed": ["z"]}, ValueError, "'z', which is no site"),
        (already_observed, {}, ValueError, "observes .'y'. already"),
        (weighted, {}, ValueError, "observes .'weight'. already"),
        (flat, {}, ValueError, "needs a proper prior"),
        (subsampled, {}, ValueError, "plate 'n' is subsampled"),
        (model, {"num_replications": 5}, ValueError, "at least 10"),
        (model, {"num_replications": 50.0}, TypeError, "num_replications must be an integer"),
        (model, {"quantities": {"log_likelihood": min}}, ValueError, "another name"),
        (model, {"quantities": {"mu": min}}, ValueError, "'mu' is a site"),
        (model, {"quantities": {"q": 3}}, TypeError, r"quantities\['q'\]"),
        (model, {"num_samples": 0}, ValueError, "num_samples must be at least 1"),
    ],
)
def test_bad_input_is_named(program, options, error, message):
    with pytest.raises(error, match=message):
        calibrate(partial(HMC, num_steps=2), program, **options)


@pytest.mark.parametrize(("draws", "bins"), [(15, 3), (15, 1), (15, 32), (22, None)])
def test_bins_that_cannot_be_are_named(draws, bins):
    with pytest.raises(ValueError, match="bins"):
        result_of(uniform_ranks((100,), draws), draws).chi_square(bins)
