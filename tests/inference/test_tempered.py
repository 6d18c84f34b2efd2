"""The path from prior to posterior: both terms against closed forms, draws of the prior against its law."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy import stats

from inference.kernels.tempered_hmc import TemperedHMC, likelihood
from inference.potential import LogDensity, Potential, PotentialFunction, TemperedFunction, TemperedPotential
from inference.potential.prior import prior_positions
from tests.accelerator import fake_accelerator
from tests.inference import evidence_cases as cases
from tests.inference import zoo

F64 = torch.float64


def path(model, *args, **options) -> TemperedPotential:
    return TemperedPotential(Potential(LogDensity(model, args)), **options)


def betas(rows: int) -> torch.Tensor:
    return torch.rand(rows, dtype=F64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", ["eight_schools", "dirichlet", "factor_mask_scale"])
def test_both_terms_make_up_the_whole(name):
    """At beta = 1 the path is the potential, and U_beta is linear in beta with slope -log L."""
    model, args = zoo.CONTINUOUS[name]
    whole = Potential(LogDensity(model, args))
    tempered = TemperedPotential(whole)
    assert tempered.captured
    z = tempered.sample(6, [1])
    one, beta = torch.ones(6, dtype=F64), betas(6)
    energy, log_l, gradient = tempered.energy_and_grad(z, one)
    for got, expected in zip((energy, gradient), whole.value_and_grad(z), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    colder, same, slope = tempered.energy_and_grad(z, beta)
    torch.testing.assert_close(same, log_l, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(colder, energy + (1 - beta) * log_l, rtol=1e-9, atol=1e-9)
    none = tempered.energy_and_grad(z, 0 * one)[2]
    torch.testing.assert_close(slope, (1 - beta)[:, None] * none + beta[:, None] * gradient, rtol=1e-8, atol=1e-8)


def test_prior_term_has_the_log_jacobian_and_the_likelihood_has_not():
    """s ~ Gamma(2, 1) through s = exp(z): log pi_0(z) = log Gamma(s) + z."""
    tempered = cases.path("quadrature-2d")
    z = torch.tensor([[-0.3, 0.5], [0.8, -1.0]], dtype=F64)
    s, m = z[:, 0].exp(), z[:, 1]
    expected = dist.StudentT(4.0, m[:, None], s[:, None]).log_prob(cases.SCALE_Y).sum(1)
    prior = dist.Gamma(2.0 + 0 * s, 1.0).log_prob(s) + z[:, 0] + dist.Normal(0 * m, 2.0).log_prob(m)
    energy, log_l, _ = tempered.energy_and_grad(z, torch.zeros(2, dtype=F64))
    torch.testing.assert_close(energy, -prior, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(log_l, expected, rtol=1e-10, atol=1e-10)


def test_enumerated_likelihood_is_the_sum_over_classes():
    tempered = cases.path("enumerated")
    z = torch.tensor([[-0.3], [0.8]], dtype=F64)
    p = torch.sigmoid(z)
    each = dist.Normal(torch.tensor([-2.0, 2.0], dtype=F64), 1.0).log_prob(cases.MIXTURE_Y[:, None]).exp()
    expected = ((1 - p) * each[:, 0] + p * each[:, 1]).log().sum(1)
    torch.testing.assert_close(tempered.energy_and_grad(z, z[:, 0])[1], expected, rtol=1e-10, atol=1e-10)


def test_scales_and_masks_of_latent_sites_are_likelihood():
    """The model draws w from N(0, 1) whatever its scale, so that is the normalised prior."""

    def model():
        with poutine.scale(scale=3.0):
            w = pyro.sample("w", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        with poutine.mask(mask=w < 0):
            pyro.sample("v", dist.Normal(w, 1.0))

    z = torch.tensor([[0.7, 0.2], [-0.4, 0.3]], dtype=F64)
    energy, log_l, _ = path(model).energy_and_grad(z, torch.zeros(2, dtype=F64))
    w, v = (dist.Normal(a, 1.0).log_prob(b) for a, b in ((0 * z[:, 0], z[:, 0]), (z[:, 0], z[:, 1])))
    torch.testing.assert_close(energy, -(w + v))
    torch.testing.assert_close(log_l, 2 * w + torch.where(z[:, 0] < 0, 0.0, -v))


def test_prior_draws_follow_the_prior_in_unconstrained_space():
    """Supports that depend on another site included; Kolmogorov-Smirnov at 1e-3, seeds fixed."""

    def model():
        t = pyro.sample("t", dist.Gamma(torch.tensor(2.0, dtype=F64), 1.0))
        x = pyro.sample("x", dist.Uniform(torch.zeros((), dtype=F64), t))
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(3.0, dtype=F64))

    tempered = path(model)
    z = tempered.sample(2000, [5, 6])
    assert z.shape == (4000, 2)
    assert stats.kstest(z[:, 0].exp().numpy(), stats.gamma(2.0).cdf).pvalue > 1e-3
    assert stats.kstest(z[:, 1].sigmoid().numpy(), stats.uniform.cdf).pvalue > 1e-3
    # a block of draws depends on its seed alone, not on the blocks beside it
    assert torch.equal(tempered.sample(2000, [6]), z[2000:])
    assert not torch.equal(z[:2000], z[2000:])
    torch.testing.assert_close(tempered.unconstrain(tempered.constrain(z[:50])), z[:50])


def test_paths_from_a_reference_of_the_users():
    """A Pyro model, a potential_fn and a plain function of the same density agree on the path from one base."""
    base = dist.Normal(torch.tensor([1.0, 0.5], dtype=F64), 2.0).to_event(1)
    model = Potential(LogDensity(cases.two_modes))
    function = PotentialFunction(lambda v: -cases.two_modes_density(v["z"]), {"z": torch.zeros(2, dtype=F64)})
    paths = [
        TemperedPotential(model, base),
        TemperedPotential(Potential(function), base),
        TemperedFunction(cases.two_modes_density, base),
    ]
    z = 3 * torch.randn(5, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    results = [p.energy_and_grad(z, betas(5)) for p in paths]
    expected = -(base.log_prob(z) + betas(5) * (cases.two_modes_density(z) - base.log_prob(z)))
    for result in results:
        torch.testing.assert_close(result[0], expected)
        for got, first in zip(result, results[0], strict=True):
            torch.testing.assert_close(got, first)
    assert torch.equal(paths[0].sample(4, [1]), paths[2].sample(4, [1]))
    energy, log_l, _ = TemperedPotential(Potential(function), "flat").energy_and_grad(z, betas(5))
    torch.testing.assert_close(energy, -betas(5) * log_l)
    torch.testing.assert_close(log_l, cases.two_modes_density(z))


def test_a_move_leaves_each_temperature_invariant():
    """From exact draws of N(m, v) at each beta, 20 moves: means and variances stay within 4 standard errors.

    Without the jump in the step's scale, or with the gradient at beta = 1 everywhere, the acceptance would still hold
    the law; with the energy at beta = 1 in it the hot rows would contract.
    """
    target, _, _ = cases.gaussian_target(1)
    beta = torch.tensor([0.0, 0.3, 1.0], dtype=F64).repeat_interleave(4000)
    precision = 1 - beta + beta / 0.36
    mean = beta / 0.36 / precision
    g = torch.Generator().manual_seed(1)
    z = (mean + torch.randn(12_000, generator=g, dtype=F64) / precision.sqrt())[:, None]
    move = TemperedHMC(target, 3, 0.5)
    step = torch.full((12_000,), 0.9, dtype=F64)
    for _ in range(20):
        normal = torch.randn(12_000, 1, generator=g, dtype=F64)
        uniform = torch.rand(12_000, 2, generator=g, dtype=F64)
        done = move(z, beta, step, torch.ones_like(z), normal, uniform)
        z = done.position
    energy, log_l, _ = target.energy_and_grad(z, beta)
    torch.testing.assert_close(done.energy, energy)
    torch.testing.assert_close(done.log_likelihood, log_l)
    standard = ((z[:, 0] - mean) * precision.sqrt()).reshape(3, -1)
    assert standard.mean(1).abs().max() < 4 / math.sqrt(4000)
    assert (standard.var(1) - 1).abs().max() < 4 * math.sqrt(2 / 4000)


def test_undefined_likelihood_weighs_nothing():
    assert likelihood(torch.tensor([math.nan, 1.0, -math.inf])).tolist() == [-math.inf, 1.0, -math.inf]


def test_refusals():
    def flat(y):
        m = pyro.sample("m", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.sample("y", dist.Normal(m, 1.0), obs=y)

    def masked(y):
        m = pyro.sample("m", dist.Normal(0 * y, 1.0).mask(False))
        pyro.sample("y", dist.Normal(m, 1.0), obs=y)

    def dependent(y):
        c = pyro.sample("c", dist.Bernoulli(0.5 + 0 * y), infer={"enumerate": "parallel"})
        m = pyro.sample("m", dist.Normal(3 * c, 1.0))
        pyro.sample("y", dist.Normal(m, 1.0), obs=y)

    def minibatch(y):
        m = pyro.sample("m", dist.Normal(0 * y[0], 1.0))
        with pyro.plate("n", len(y), subsample_size=2) as index:
            pyro.sample("y", dist.Normal(m, 1.0), obs=y[index])

    y = torch.tensor(1.0, dtype=F64)
    for model, arg, message in (
        (flat, y, "'m' is flat"),
        (masked, y, "'m' is flat"),
        (dependent, y, "'m' depends on a discrete site"),
        (minibatch, cases.SCALE_Y, "plate 'n' is subsampled"),
    ):
        with pytest.raises(ValueError, match=message):
            path(model, arg)
    # the remedy that the message names
    base = dist.Normal(torch.zeros(1, dtype=F64), 3.0).to_event(1)
    assert path(dependent, y, reference=base).sample(3, [0]).shape == (3, 1)

    function = PotentialFunction(lambda v: v["z"].square().sum(), {"z": torch.zeros(2, dtype=F64)})
    with pytest.raises(ValueError, match="has no prior"):
        TemperedPotential(Potential(function))
    with pytest.raises(ValueError, match="no prior to draw from"):
        prior_positions(function, 3, [0])
    with pytest.raises(ValueError, match="'flat' has no draws"):
        TemperedPotential(Potential(function), "flat").sample(3, [0])
    with pytest.raises(ValueError, match="reference must be"):
        TemperedPotential(Potential(function), "posterior")
    with pytest.raises(ValueError, match=r"vectors \(2,\)"):
        TemperedPotential(Potential(function), base)
    with pytest.raises(ValueError, match=r"\(row, 1\) to \(row,\)"):
        TemperedFunction(lambda z: z, base)
    with pytest.raises(TypeError, match="base must be a torch or Pyro distribution"):
        TemperedFunction(lambda z: z[:, 0], None)
    with pytest.raises(ValueError, match="event shape"):
        TemperedFunction(lambda z: z[:, 0], dist.Normal(torch.zeros(2), 1.0))
    with pytest.raises(ValueError, match=r"'w'.*missing"):
        cases.path("closed-form").unconstrain({})
    with pytest.raises(ValueError, match=r"'w' have shape \(4, 3\)"):
        cases.path("closed-form").unconstrain({"w": torch.zeros(4, 3)})


def test_on_an_accelerator():
    with fake_accelerator() as device:
        x, y = (torch.empty(a.shape, dtype=F64, device=device) for a in (cases.X, cases.Y))
        density = LogDensity(cases.regression, (x, y))
        z = {"w": torch.empty(2, dtype=F64, device=device, requires_grad=True)}
        prior, rest = density.split(z)
        (prior + 0.5 * rest).backward()
        assert {prior.device.type, rest.device.type, z["w"].grad.device.type} == {device.type}
        base = dist.Normal(torch.zeros(2, dtype=F64, device=device), 1.0, validate_args=False).to_event(1)
        target = TemperedFunction(lambda v: -v.square().sum(-1), base)
        rows = torch.empty(6, 2, dtype=F64, device=device)
        move = TemperedHMC(target, 2, 0.5)
        done = move(rows, rows[:, 0], rows[:, 0], rows, rows, rows)
        assert {v.device.type for v in done} == {device.type}
