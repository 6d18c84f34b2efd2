"""The network as a Pyro model: closed-form posterior, plates, engines that know nothing of it, units, files, bad
input.
"""

import math
from typing import Any

import gpytorch
import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC as PyroMCMC
from pyro.infer import NUTS as PyroNUTS
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from torch import Tensor

from inference import HMC, ScaleGibbs
from inference.fit import fit
from inference.potential import LogDensity, Potential
from inference.results.diagnostics import ess_bulk, rhat
from inference.results.predictive import Predictive
from inference.runtime.generators import scoped_seed
from ppl_models.functional_prior_bnn import FunctionalPriorBNN
from ppl_models.functional_prior_bnn.sampling import build_kernel, starting_points
from tests.arviz_versions import groups

G = torch.Generator().manual_seed(0)
X = 3 + 2 * torch.randn(60, 3, generator=G)
Y = 100 + 20 * torch.sin(X[:, 0]) + 5 * torch.randn(60, generator=G)
LABELS = (X[:, 0] > 3).long()
QUICK: dict[str, Any] = {
    "num_chains": 2,
    "warmup_steps": 30,
    "num_samples": 4,
    "thin": 2,
    "batch_size": 20,
    "progress": False,
}


@pytest.fixture(scope="module")
def fitted() -> FunctionalPriorBNN:
    bnn = FunctionalPriorBNN(3, hidden=(8,))
    with scoped_seed(0):
        bnn.fit(X, Y, **{**QUICK, "warmup_steps": 300, "num_samples": 10, "thin": 20})
    return bnn


@pytest.mark.filterwarnings("ignore:.*transitions diverged:inference.SamplerWarning")
def test_weights_with_symmetries_are_no_cause_to_warn() -> None:
    """Chains at mirror images of one network disagree in the weights; the posterior reports R-hat of the function."""
    bnn = FunctionalPriorBNN(3, hidden=(1,))
    settings = {**QUICK, "num_chains": 4, "num_samples": 100, "warmup_steps": 0, "thin": 1, "batch_size": None}
    posterior = bnn.fit(X, Y, sampler=lambda m: HMC(m, step_size=0.02, num_steps=2, adapt_step_size=False), **settings)
    assert max(float(rhat(w).max()) for w in posterior.samples.values()) > 1.3


# ---------------------------------------------------------------- against a closed form
def linear_data() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(4)
    x = torch.randn(200, 13, generator=g) @ (torch.eye(13) + 0.2 * torch.randn(13, 13, generator=g))
    y = x @ torch.randn(13, 1, generator=g) + 0.3 * torch.randn(200, 1, generator=g)
    return x, y


def bayesian_linear_regression(x: Tensor, y: Tensor, noise_variance: float) -> tuple[Tensor, Tensor]:
    """Posterior mean and covariance of W1 (unscaled) and b1 in standardised space, by the normal equations in
    float64.
    """
    x, y = ((t.double() - t.double().mean(0)) / t.double().std(0, correction=0) for t in (x, y))
    design = torch.cat([x / math.sqrt(x.shape[1]), torch.ones(len(x), 1, dtype=torch.float64)], 1)
    covariance = torch.linalg.inv(design.T @ design / noise_variance + torch.eye(design.shape[1], dtype=torch.float64))
    return (covariance @ design.T @ y / noise_variance)[:, 0], covariance


@pytest.mark.parametrize("parametrisation", ["centred", "noncentred"])
def test_without_hidden_layers_the_posterior_is_bayesian_linear_regression(parametrisation: str) -> None:
    """Sheet E4: every mean within 0.15 posterior standard deviations and every standard deviation within 6%, by
    minibatches of 32 of 200 rows.

    A missing N / B, a missing 1/sqrt(D), noise on the user's scale or a doubled prior are far outside.
    """
    x, y = linear_data()
    bnn = FunctionalPriorBNN(13, hidden=(), noise_variance=0.1, parametrisation=parametrisation)
    result = bnn.fit(
        x,
        7 + 5 * y,
        num_chains=32,
        warmup_steps=3000,
        num_samples=300,
        thin=20,
        batch_size=32,
        step_size=0.01,
        friction=0.05,
        progress=False,
    )
    w = torch.cat([result.weights["W1"][..., 0], result.weights["b1"]], -1).double().flatten(0, 1)
    mean, covariance = bayesian_linear_regression(x, y, 0.1)
    sd = covariance.diagonal().sqrt()
    assert ((w.mean(0) - mean) / sd).abs().max() < 0.15
    assert (w.std(0) / sd - 1).abs().max() < 0.06


@pytest.mark.parametrize(
    ("rows", "width", "batch_size"),
    [(60, 3, None), (257, 3, None), (256, 2000, None), (257, 2000, 32), (400, 1000, None), (401, 1000, 32)],
)
def test_few_rows_are_taken_whole(rows: int, width: int, batch_size: int | None) -> None:
    """The noise of minibatches widens a posterior, and few rows cost little more than a minibatch of them."""
    x, y = torch.randn(2, rows, 1, generator=torch.Generator().manual_seed(0))
    draws = []
    for options in ({}, {"batch_size": batch_size}):
        bnn = FunctionalPriorBNN(1, hidden=(width,))
        options = {"num_chains": 2, "warmup_steps": 5, "num_samples": 2, "thin": 1, "progress": False, **options}
        draws.append(bnn.fit(x, y, **options).weights["W1"])  # type: ignore[arg-type]
    assert torch.equal(*draws)


def test_by_default_the_posterior_is_as_wide_as_it_should_be() -> None:
    """Hundreds of rows with little noise: minibatches of 32 made the posterior 2.4 times too wide."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(500, 3, generator=g)
    y = x.sum(1, keepdim=True) + 0.05 * torch.randn(500, 1, generator=g)
    _, covariance = bayesian_linear_regression(x, y, 0.001)
    run: dict[str, Any] = {"num_chains": 16, "warmup_steps": 800, "num_samples": 40, "thin": 20, "progress": False}
    bnn = FunctionalPriorBNN(3, hidden=(), noise_variance=0.001)
    weights = bnn.fit(x, y, **run).weights
    w = torch.cat([weights["W1"][..., 0], weights["b1"]], -1).double().flatten(0, 1)
    assert (w.std(0) / covariance.diagonal().sqrt()).mean() == pytest.approx(1, abs=0.1)


def test_hmc_gives_the_closed_form_prediction_in_the_users_units() -> None:
    x, y = linear_data()
    y = 7 + 5 * y
    bnn = FunctionalPriorBNN(13, hidden=(), noise_variance=0.1)
    with scoped_seed(0):
        bnn.fit(
            x[:150],
            y[:150],
            sampler="hmc",
            step_size=0.1,
            num_chains=8,
            warmup_steps=100,
            num_samples=120,
            thin=1,
            progress=False,
        )
    prediction = bnn.predict(x[150:])
    mean, covariance = bayesian_linear_regression(x[:150], y[:150], 0.1)
    mu, scale = y[:150].double().mean(), y[:150].double().std(correction=0)
    standard = (x[150:].double() - x[:150].double().mean(0)) / x[:150].double().std(0, correction=0)
    design = torch.cat([standard / math.sqrt(13), torch.ones(50, 1, dtype=torch.float64)], 1)
    expected = mu + scale * design @ mean
    variance = scale**2 * (((design @ covariance) * design).sum(1) + 0.1)
    # 4 of the draws' own standard errors. Ignoring the targets' mean, or a scale on the wrong side, is hundreds away.
    deviation = (prediction.mean[:, 0] - expected) / prediction.function_variance[:, 0].sqrt()
    assert (deviation * ess_bulk(prediction.functions)[:, 0].sqrt()).abs().max() < 4
    assert (prediction.variance[:, 0] / variance - 1).abs().max() < 0.05
    law = torch.distributions.Normal(expected, variance.sqrt())
    assert torch.allclose(prediction.log_prob(y[150:]).double(), law.log_prob(y[150:, 0].double()), atol=0.1)
    assert torch.allclose(
        prediction.log_prob(y[150:], mixture=True).double(), law.log_prob(y[150:, 0].double()), atol=0.1
    )
    assert prediction.rhat.mean() < 1.03


def test_temperature_scales_the_posterior_variance() -> None:
    """The tempered law of a linear Gaussian model has T times the covariance and the same mean."""
    x, y = linear_data()
    _, covariance = bayesian_linear_regression(x, y, 0.1)
    bnn = FunctionalPriorBNN(13, hidden=(), noise_variance=0.1)
    with scoped_seed(0):
        result = bnn.fit(
            x,
            y,
            num_chains=16,
            warmup_steps=3000,
            num_samples=150,
            thin=20,
            batch_size=32,
            friction=0.05,
            temperature=0.25,
            progress=False,
        )
    w = result.weights["W1"][..., 0].double().flatten(0, 1)
    ratio = w.std(0) / covariance.diagonal()[:-1].sqrt()
    assert abs(ratio.mean().item() - 0.5) < 0.05


# ---------------------------------------------------------------- a Pyro model like any other
MODELS = {
    "gaussian": {},
    "centred": {"parametrisation": "centred"},
    "hierarchical": {"prior": "hierarchical"},
    "flow": {"prior": "flow"},
    "learned": {"noise_variance": "learned"},
    "laplace": {"likelihood": "laplace"},
    "bernoulli": {"likelihood": "bernoulli"},
    "categorical": {"likelihood": "categorical", "out_features": 3},
}


def targets(bnn: FunctionalPriorBNN) -> Tensor:
    return (
        LABELS if bnn.likelihood.name == "categorical" else LABELS.float() if bnn.likelihood.name == "bernoulli" else Y
    )


@pytest.mark.parametrize("name", MODELS)
def test_minibatch_log_densities_average_to_the_full_one(name: str) -> None:
    """Sheet E9, exactly: over disjoint batches the mean of the minibatch log-density is the full one, likelihood times
    N/B and prior once.
    """
    bnn = FunctionalPriorBNN(3, hidden=(4,), **{"out_features": 1, **MODELS[name]}).double()
    x, y = bnn.standardise(X, targets(bnn))
    z = LogDensity(bnn, (x, y)).flatten(starting_points(bnn, x[:1], 3, seed=0))
    full = Potential(LogDensity(bnn, (x, y)))(z)
    minibatch = Potential(LogDensity(bnn, (x, y), {"batch_size": 20}))
    each = torch.stack(
        [
            minibatch(z, {"data": rows})
            for rows in torch.randperm(60, generator=torch.Generator().manual_seed(0)).split(20)
        ]
    )
    assert not torch.isclose(each[0], full).any()
    assert torch.allclose(each.mean(0), full, rtol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_captured_and_batched_potential_equals_pyros(name: str) -> None:
    bnn = FunctionalPriorBNN(3, hidden=(4,), **{"out_features": 1, **MODELS[name]}).double()
    x, y = bnn.standardise(X, targets(bnn))
    potential = Potential(LogDensity(bnn, (x, y), {"batch_size": 20}))
    assert potential.captured and set(potential.plates) == {"data"}
    starts = starting_points(bnn, x[:1], 3, seed=0)
    z = potential.density.flatten(starts)
    batch = potential.density.minibatch(5)
    value, gradient = potential.value_and_grad(z, batch)
    looped = Potential(LogDensity(bnn, (x, y), {"batch_size": 20}), capture=False)
    expected, slope = looped.value_and_grad(z, batch)
    assert torch.allclose(value, expected, rtol=1e-10) and torch.allclose(gradient, slope, rtol=1e-8, atol=1e-10)
    # Against central differences: an activation under `no_grad` leaves the value right and the slope wrong.
    direction = torch.randn(z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(1))
    difference = (potential(z + 1e-5 * direction, batch) - potential(z - 1e-5 * direction, batch)) / 2e-5
    assert torch.allclose((gradient * direction).sum(1), difference, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_guides_and_predictives_take_the_model_unchanged(name: str) -> None:
    """Pyro's AutoNormal with vectorised particles, this library's fit with AutoDelta, and Predictive."""
    bnn = FunctionalPriorBNN(3, hidden=(4,), **{"out_features": 1, **MODELS[name]})
    x, y = bnn.standardise(X, targets(bnn))
    psi = [p.clone() for p in bnn.parameters()]
    with scoped_seed(0):
        svi = SVI(
            bnn, AutoNormal(bnn), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(num_particles=3, vectorize_particles=True)
        )
        losses = [svi.step(x, y, 20) for _ in range(3)]
    assert all(math.isfinite(loss) for loss in losses)
    assert not any("prior" in key or "network" in key for key in pyro.get_param_store())
    pyro.clear_param_store()
    guide = AutoDelta(bnn)
    history = fit(Trace_ELBO()(bnn, guide), (x, y), num_steps=60, lr=0.03, progress=False)
    assert history.losses[-5:].mean() < history.losses[:5].mean()
    assert all(torch.equal(a, b) for a, b in zip(psi, bnn.parameters(), strict=True))
    with scoped_seed(0):
        draws = Predictive(bnn, guide=guide, num_samples=2, seed=0)(x[:5])
    assert draws["obs"].shape[:2] == (2, 5)


def test_pyros_own_nuts_and_condition_run_on_the_model() -> None:
    bnn = FunctionalPriorBNN(3, hidden=(2,))
    x, y = bnn.standardise(X[:20], Y[:20])
    with scoped_seed(0):
        mcmc = PyroMCMC(PyroNUTS(bnn, max_tree_depth=3), num_samples=3, warmup_steps=3, disable_progbar=True)
        mcmc.run(x, y)
    draws = {n: v for n, v in mcmc.get_samples().items() if n.startswith("eps_")}
    assert {n: tuple(v.shape[1:]) for n, v in draws.items()} == {f"eps_{n}": s for n, s in bnn.network.shapes.items()}
    zero = poutine.condition(bnn, data={f"eps_{n}": torch.zeros(s) for n, s in bnn.network.shapes.items()})
    with scoped_seed(0):
        assert torch.equal(zero(x), torch.zeros(20, 1))


def test_hierarchical_prior_is_sampled_with_its_gibbs_steps() -> None:
    bnn = FunctionalPriorBNN(3, hidden=(4,), prior="hierarchical")
    kernel = build_kernel(
        bnn,
        "adaptive_sghmc",
        step_size=0.01,
        friction=0.01,
        temperature=1.0,
        max_grad_norm=None,
        gibbs_every=5,
        full_batch=False,
    )
    assert [repr(g) for g in kernel.gibbs] == [repr(ScaleGibbs(f"var_{n}", n)) for n in bnn.network.shapes]  # type: ignore[attr-defined]
    for scope, parametrisation in (("layer", "noncentred"), ("parameter", "centred")):
        bnn = FunctionalPriorBNN(
            3, hidden=(4,), prior="hierarchical", prior_scope=scope, parametrisation=parametrisation
        )
        variance = bnn.fit(X, Y, **QUICK, gibbs_every=1).samples["var_W1"]
        assert variance.shape == ((2, 4) if scope == "layer" else (2, 4, 3, 4)) and bool((variance > 0).all())
        assert bool((variance[:, 1:] != variance[:, :-1]).any())


# ---------------------------------------------------------------- every likelihood, in the user's units
@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        *((name, "adaptive_sghmc") for name in MODELS),
        ("hierarchical", "sghmc"),
        ("gaussian", "sgld"),
        ("gaussian", "hmc"),
    ],
)
def test_every_likelihood_prior_and_sampler_runs_to_arviz(name: str, sampler: str) -> None:
    bnn = FunctionalPriorBNN(3, hidden=(4,), **{"out_features": 1, **MODELS[name]})
    options = {**QUICK, "sampler": sampler, "step_size": 0.01 if sampler == "adaptive_sghmc" else 1e-4}
    if sampler == "hmc":  # a kernel of the caller's own making
        options |= {
            "batch_size": None,
            "sampler": lambda model: HMC(model, step_size=0.01, num_steps=3, adapt_step_size=False),
        }
    with scoped_seed(0):
        result = bnn.fit(X, targets(bnn), **options)
    k = bnn.network.out_features
    prediction = bnn.predict(X[:7])
    assert prediction.samples.shape == (
        2,
        4,
        7,
        k,
    ) and prediction.mean.shape == prediction.variance.shape == prediction.rhat.shape == (7, k)
    assert prediction.log_prob(targets(bnn)[:7]).shape == (7,) and bool((prediction.variance > 0).all())
    assert result.rhat.shape == (60, k) and sampler in result.summary().lower()
    idata = result.to_arviz()
    expected = {"posterior", "sample_stats", "log_likelihood", "posterior_predictive", "observed_data"}
    assert expected <= groups(idata)
    assert idata.posterior["W1"].dims == ("chain", "draw", "in1", "out1") and idata.posterior["f"].dims == (
        "chain",
        "draw",
        "point",
        "output",
    )
    assert idata.log_likelihood["y"].shape == (2, 4, 60)
    expected = result.predict(X).log_prob(targets(bnn), mixture=True)
    pointwise = torch.from_numpy(np.asarray(idata.log_likelihood["y"])).flatten(0, 1).logsumexp(0) - math.log(8)
    assert torch.allclose(pointwise, expected, atol=1e-4)


def test_log_prob_is_a_density_in_the_users_units(fitted: FunctionalPriorBNN) -> None:
    """It integrates to one over y in the user's units; without the log-Jacobian it would integrate to the targets'
    standard deviation.
    """
    grid = torch.linspace(-300, 500, 8001)
    for mixture in (False, True):
        prediction = fitted.predict(X[:1].expand(len(grid), 3))
        total = prediction.log_prob(grid, mixture=mixture).double().exp().sum() * 0.1
        assert abs(total.item() - 1) < 1e-3
    variance = prediction.variance[0, 0].item()
    noise = 0.1 * Y.var(correction=0).item()
    assert variance == pytest.approx(prediction.function_variance[0, 0].item() + noise, rel=1e-4)


def test_users_units_do_not_change_the_predictions() -> None:
    """x in other units per column and y shifted and scaled: the same run, its predictions mapped along."""
    factor, shift = torch.tensor([2.0, 0.25, 8.0]), torch.tensor([1.0, -2.0, 0.5])
    plain = FunctionalPriorBNN(3, hidden=(4,)).double()
    moved = FunctionalPriorBNN(3, hidden=(4,)).double()
    plain.fit(X.double(), Y.double(), **QUICK)
    moved.fit((X * factor + shift).double(), (4 * Y - 10).double(), **QUICK)
    a, b = plain.predict(X.double()), moved.predict((X * factor + shift).double())
    assert torch.allclose(4 * a.mean - 10, b.mean, rtol=1e-4) and torch.allclose(16 * a.variance, b.variance, rtol=1e-4)
    assert torch.allclose(a.log_prob(Y.double()) - math.log(4), b.log_prob((4 * Y - 10).double()), atol=1e-4)
    assert b.samples.dtype == torch.float64


def test_constant_columns_and_constant_targets_do_no_harm() -> None:
    x = torch.cat([X, torch.full((60, 1), 0.1)], 1)
    bnn = FunctionalPriorBNN(4, hidden=(4,))
    bnn.fit(x, torch.full((60,), 3.3), **QUICK)
    assert torch.isfinite(bnn.predict(x).mean).all() and bnn.input_units.scale[3] == 1


def test_images_come_flat_or_with_their_channels() -> None:
    bnn = FunctionalPriorBNN(network="lenet5", image_shape=(2, 12, 12), out_features=2, likelihood="categorical")
    images = (
        torch.rand(12, 2, 12, 12, generator=torch.Generator().manual_seed(0)) + torch.tensor([0.0, 5.0])[:, None, None]
    )
    bnn.fit(
        images, torch.arange(12) % 2, num_chains=2, warmup_steps=2, num_samples=2, thin=1, batch_size=4, progress=False
    )
    prediction = bnn.predict(images)
    assert torch.allclose(prediction.mean, bnn.predict(images.flatten(1)).mean)
    assert torch.allclose(prediction.mean.sum(-1), torch.ones(12))
    # One shift and scale a channel, not a pixel.
    assert torch.equal(bnn.input_units.shift.unique(), bnn.input_units.shift[[0, 144]])
    assert bnn.sample_prior(images, num_samples=3).shape == (3, 12, 2)


def test_entropy_and_mutual_information() -> None:
    bnn = FunctionalPriorBNN(3, 3, hidden=(4,), likelihood="categorical")
    bnn.fit(X, LABELS, **QUICK)
    prediction = bnn.predict(X)
    p = prediction.samples.flatten(0, 1)
    mean = p.mean(0)
    entropy = -(mean * mean.log()).sum(-1)
    assert torch.allclose(prediction.entropy, entropy, atol=1e-5)
    assert torch.allclose(prediction.mutual_information, entropy + (p * p.log()).sum(-1).mean(0), atol=1e-5)
    assert torch.allclose(prediction.accuracy(LABELS), (mean.argmax(-1) == LABELS).float().mean())
    binary = FunctionalPriorBNN(3, likelihood="bernoulli")
    binary.fit(X, LABELS, **QUICK)
    q = binary.predict(X).mean[:, 0]
    assert torch.allclose(binary.predict(X).entropy, -(q * q.log() + (1 - q) * (1 - q).log()), atol=1e-5)
    assert torch.allclose(binary.predict(X).log_prob(LABELS), torch.where(LABELS == 1, q, 1 - q).log(), atol=1e-5)


def test_scores_of_another_kind_of_target_are_refused(fitted: FunctionalPriorBNN) -> None:
    """Three probabilities of three rows less three labels broadcast to a number that means nothing."""
    bnn = FunctionalPriorBNN(3, 3, hidden=(4,), likelihood="categorical")
    bnn.fit(X, LABELS, **QUICK)
    with pytest.raises(ValueError, match="rmse is not for a categorical likelihood"):
        bnn.predict(X[:3]).rmse(LABELS[:3])
    with pytest.raises(ValueError, match="accuracy is for classification; this is a gaussian likelihood: use rmse"):
        fitted.predict(X).accuracy(Y)


# ---------------------------------------------------------------- convergence
def test_chains_agree_on_the_function_in_one_dimension() -> None:
    """Sheet S3: rank-normalised split R-hat of predictions below 1.05 with four chains, prior matched first."""
    g = torch.Generator().manual_seed(1)
    x = torch.linspace(-2, 2, 64)[:, None]
    y = torch.sin(3 * x[:, 0]) + 0.1 * torch.randn(64, generator=g)
    bnn = FunctionalPriorBNN(1, hidden=(20,), noise_variance=0.05)
    bnn.match_prior(gpytorch.kernels.RBFKernel(), x, num_steps=40, num_points=30, progress=False)
    result = bnn.fit(x, y, num_chains=4, warmup_steps=2000, num_samples=40, thin=80, batch_size=32, progress=False)
    assert result.rhat.mean() < 1.05
    assert bnn.predict(x).rmse(y) < 0.2
