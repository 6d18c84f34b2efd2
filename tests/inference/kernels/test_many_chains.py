"""What the kernels for many chains have in common: the law, exact resume, seeds, ranks, devices, bad arguments."""

import threading

import pyro
import pyro.distributions as dist
import pytest
import torch

from inference import MCMC
from inference.kernels import MCLMC, MEADS, AdjustedMCLMC, ChEES, pooling
from inference.kernels import meads as meads_module
from inference.kernels.base import StepInputs
from inference.results.diagnostics import mcse_mean
from tests.inference import posteriordb, zoo

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*transitions diverged:inference.SamplerWarning",
    "ignore:the chains have not mixed:inference.SamplerWarning",
)

F64 = torch.float64
KERNELS = [ChEES, MEADS, MCLMC, AdjustedMCLMC]
EXACT = [ChEES, MEADS, AdjustedMCLMC]
# Kernels whose step is short make more of them, for a draw and in the warm-up.
THIN = {ChEES: 1, AdjustedMCLMC: 1, MEADS: 5, MCLMC: 3}
WARMUP = {ChEES: 160, AdjustedMCLMC: 120, MEADS: 600, MCLMC: 400}


def run(kernel, *args, num_samples=200, warmup_steps=None, num_chains=64, **options):
    settings = {"progress": False, "thin": THIN[type(kernel)], "compile": False, **options}
    warmup_steps = WARMUP[type(kernel)] if warmup_steps is None else warmup_steps
    return MCMC(kernel, num_samples, warmup_steps, num_chains=num_chains, **settings).run(*args)


def z_scores(draws, truth):
    """Errors of the means of ``(chain, draw, *event)`` in Monte Carlo standard errors."""
    return ((draws.mean((0, 1)) - truth) / mcse_mean(draws)).abs()


# ---------------------------------------------------------------------- the law
def correlated(dim=6, correlation=0.8, seed=0):
    """Scales from 0.1 to 10, every pair correlated: diagonal scales cannot undo it."""
    scale = torch.logspace(-1, 1, dim, dtype=F64)
    covariance = (correlation + (1 - correlation) * torch.eye(dim, dtype=F64)) * torch.outer(scale, scale)
    precision = torch.linalg.inv(covariance)
    mean = torch.arange(dim, dtype=F64)
    start = mean + scale * torch.randn(64, dim, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return mean, covariance, lambda z: 0.5 * (z["w"] - mean) @ precision @ (z["w"] - mean), {"w": start}


@pytest.mark.parametrize("kernel", EXACT)
def test_correlated_gaussian(kernel):
    """Means and all 21 covariances within 4 Monte Carlo standard errors, which are below 5% of the variances. The
    acceptance rates say that the leapfrog alone would be far off.
    """
    mean, covariance, energy, start = correlated()
    mcmc = run(kernel(potential_fn=energy), initial_params=start)
    w = mcmc.get_samples(group_by_chain=True)["w"]
    assert z_scores(w, mean).max() < 4
    products = (w - mean).unsqueeze(-1) * (w - mean).unsqueeze(-2)
    assert z_scores(products, covariance).max() < 4
    size = torch.outer(covariance.diagonal().sqrt(), covariance.diagonal().sqrt())
    assert (mcse_mean(products) / size).max() < 0.05


@pytest.mark.parametrize("kernel", KERNELS)
def test_banana_gamma_and_beta(kernel):
    """Two bent and two bounded sites with moments in closed form: within 4 standard errors for exact kernels. MCLMC may
    add its bias: 2% of a standard deviation, or of a variance.
    """

    def model():
        one = torch.ones((), dtype=F64)
        x = pyro.sample("x", dist.Normal(0 * one, one))
        pyro.sample("y", dist.Normal(0.5 * x**2, one))
        pyro.sample("g", dist.Gamma(3 * one, 2 * one))
        pyro.sample("p", dist.Beta(2 * one, 5 * one))

    samples = run(kernel(model)).get_samples(group_by_chain=True)
    truth = {"x": (0.0, 1.0), "y": (0.5, 1.5), "g": (1.5, 0.75), "p": (2 / 7, 10 / 392)}
    slack = 0.0 if kernel in EXACT else 0.02
    for name, (mean, variance) in truth.items():
        squares = (samples[name] - mean) ** 2
        for draws, value, unit in ((samples[name], mean, variance**0.5), (squares, variance, variance)):
            error = float(draws.mean() - value)
            assert abs(error) < 4 * float(mcse_mean(draws)) + slack * unit, (name, value)
        assert mcse_mean(squares) < 0.1 * variance


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["eight_schools_noncentered", "arK", "blr", "kidscore_momiq"])
def test_reference_posteriors(kernel, name):
    """Means and standard deviations of posteriordb's reference draws within 4 standard errors of the difference, and
    for MCLMC 3% of a standard deviation besides.
    """
    model, args, reference = posteriordb.load(name)
    samples = run(kernel(model), *args, num_samples=100).get_samples(group_by_chain=True)
    slack = 0.0 if kernel in EXACT else 0.03
    for scalar, draws in posteriordb.flatten(samples).items():
        truth = reference[scalar]
        center, unit = truth.mean(), truth.std()
        for power, scale in ((1, unit), (2, unit**2)):
            mine, theirs = (draws - center) ** power, (truth - center) ** power
            error = (mine.mean() - theirs.mean()).abs()
            bound = 4 * (mcse_mean(mine).square() + mcse_mean(theirs).square()).sqrt()
            assert error < bound + slack * scale, (scalar, power)


# ---------------------------------------------------------------------- seeds and resume


# ---------------------------------------------------------------------- many processes
class Quadratic:
    """U = z' diag(k) z / 2 on any device."""

    def __init__(self, stiffness):
        self.stiffness = stiffness
        self.dim = len(stiffness)

    def value_and_grad(self, z):
        gradient = self.stiffness * z
        return 0.5 * (z * gradient).sum(1), gradient


def advance(kernel, potential, position, noise, warmup):
    """The warm-up on given noise, without the driver; windows as the driver has them."""
    state = kernel.init(position, potential)
    edges = {*kernel.boundaries(warmup), warmup}
    for t in range(warmup):
        control = {n: torch.tensor(v[0], dtype=F64) for n, v in kernel.controls(t, t + 1, warmup).items()}
        state, _ = kernel.step(state, StepInputs({n: v[t] for n, v in noise.items()}, control, {}), potential)
        if t + 1 in edges:
            state = kernel.end_window(state, t + 1, warmup, potential)
    return state


class Ranks:
    """Two threads that stand for two processes: sums are exchanged at a barrier."""

    def __init__(self):
        self.barrier, self.parts, self.local = threading.Barrier(2, timeout=60), [None, None], threading.local()

    def sum(self, tensor):
        self.parts[self.local.rank] = tensor
        self.barrier.wait()
        total = self.parts[0] + self.parts[1]
        self.barrier.wait()
        return total

    def run(self, functions):
        results, errors = [None, None], []

        def work(rank):
            self.local.rank = rank
            try:
                results[rank] = functions[rank]()
            except Exception as error:
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return results


def tuned(state):
    return [state.step_size, state.scale, getattr(state, "trajectory_length", None), getattr(state, "damping", None)]


@pytest.mark.parametrize("kernel", KERNELS)
def test_adaptation_over_two_ranks_is_that_of_one_process(kernel, monkeypatch):
    """16 chains at once, or 8 in each of two ranks that exchange sums: the same adaptation and the same positions."""
    warmup, chains = 60, 16
    potential = Quadratic(torch.logspace(-1, 1, 5, dtype=F64))
    generator = torch.Generator().manual_seed(0)
    position = torch.randn(chains, 5, generator=generator, dtype=F64)
    noise = {
        "normal": torch.randn(warmup, chains, 5, generator=generator, dtype=F64),
        "uniform": torch.rand(warmup, chains, 1, generator=generator, dtype=F64),
    }
    build = lambda: kernel(potential_fn=lambda z: z)  # noqa: E731
    whole = advance(build(), potential, position, noise, warmup)
    ranks = Ranks()
    monkeypatch.setattr(pooling, "sum_over_ranks", ranks.sum)
    monkeypatch.setattr(meads_module, "sum_over_ranks", ranks.sum)
    halves = [slice(0, 8), slice(8, 16)]
    states = ranks.run(
        [
            lambda h=h: advance(build(), potential, position[h], {n: v[:, h] for n, v in noise.items()}, warmup)
            for h in halves
        ]
    )
    for half, state in zip(halves, states, strict=True):
        torch.testing.assert_close(state.position, whole.position[half], rtol=1e-6, atol=1e-6)
        for mine, theirs in zip(tuned(state), tuned(whole), strict=True):
            if mine is not None:
                torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------- devices


# ---------------------------------------------------------------------- bad arguments


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: ChEES(zoo.logistic, trajectory_length=-1.0), ValueError, "trajectory_length must lie in"),
        (lambda: ChEES(zoo.logistic, target_accept_prob=1.5), ValueError, "target_accept_prob must lie in"),
        (lambda: ChEES(zoo.logistic, learning_rate=0.0), ValueError, "learning_rate must lie in"),
        (lambda: AdjustedMCLMC(zoo.logistic, max_steps=0), ValueError, "max_steps"),
        (lambda: MCLMC(zoo.logistic, desired_energy_variance=0.0), ValueError, "desired_energy_variance"),
        (lambda: MCLMC(zoo.logistic, trajectory_length=0.0), ValueError, "trajectory_length"),
        (lambda: MEADS(zoo.logistic, num_folds=1), ValueError, "num_folds"),
        (lambda: MEADS(zoo.logistic, damping=-1.0), ValueError, "damping"),
        (lambda: MEADS(zoo.logistic, step_size_multiplier=3.0), ValueError, "step_size_multiplier"),
    ],
)
def test_bad_settings_of_one_kernel_are_named(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_too_few_chains_or_dimensions_are_refused():
    def one():
        pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))

    for kernel in (MCLMC, AdjustedMCLMC):
        with pytest.raises(ValueError, match="needs at least 2 latent dimensions; the model has 1"):
            run(kernel(one), num_samples=2, warmup_steps=2, num_chains=8)
    with pytest.raises(ValueError, match="two chains a fold: 8 for num_folds=4, got 4"):
        run(MEADS(one), num_samples=2, warmup_steps=2, num_chains=4)
    z = run(ChEES(one), num_samples=100, warmup_steps=100, num_chains=16).get_samples(group_by_chain=True)["z"]
    assert z_scores(z, 0.0) < 4 and z_scores(z**2, 1.0) < 4


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_wall_is_not_crossed(kernel):
    """Beyond the wall the density is zero: chains stay where it is positive, and the others are not disturbed."""

    def energy(z):
        return torch.where((z["w"] > -2).all(), 0.5 * z["w"].square().sum(), torch.inf)

    start = {"w": torch.rand(16, 2, generator=torch.Generator().manual_seed(0), dtype=F64)}
    w = run(kernel(potential_fn=energy), num_samples=50, warmup_steps=50, num_chains=16, initial_params=start)
    assert (w.get_samples()["w"] > -2).all() and torch.isfinite(w.get_samples()["w"]).all()


def test_halton_is_the_base_two_sequence():
    assert [pooling.halton(i) for i in range(7)] == [1 / 2, 1 / 4, 3 / 4, 1 / 8, 5 / 8, 3 / 8, 7 / 8]


def test_pooled_moments_are_those_of_the_pool():
    x = 5 + torch.randn(10, 8, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    moments = pooling.PooledMoments.start(x[0].mean(0))
    for step in x:
        moments = moments.update(step, torch.tensor(1.0, dtype=F64)).update(step, torch.tensor(0.0, dtype=F64))
    size, mean, variance = moments.pooled()
    flat = x.flatten(0, 1)
    assert size == 80
    torch.testing.assert_close(mean, flat.mean(0))
    torch.testing.assert_close(variance, flat.var(0))


def test_windows_end_before_the_warmup_does():
    for warmup in (0, 7, 19, 20, 33, 200, 1000):
        ends = pooling.mass_ends(warmup)
        assert all(0 < e < warmup for e in ends) and set(ends) <= set(pooling.windows(warmup))
    assert pooling.mass_ends(200) == [20, 40, 72, 100, 140]
