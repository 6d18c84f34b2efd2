"""The network as a Pyro model: closed-form posterior, plates, engines that know nothing of it, units, files, bad
input.
"""

import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
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

from inference import HMC, CheckpointError, ScaleGibbs
from inference.fit import fit
from inference.potential import LogDensity, Potential
from inference.results.diagnostics import ess_bulk
from inference.results.predictive import Predictive
from inference.runtime.checkpoint import save_checkpoint
from inference.runtime.generators import scoped_seed
from ppl_models.functional_prior_bnn import FunctionalPriorBNN
from ppl_models.functional_prior_bnn.sampling import build_kernel, starting_points

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
    assert prediction.rhat.max() < 1.05


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
    assert torch.isfinite(gradient).all() and bool((gradient != 0).any(0).all())


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
    groups = {"posterior", "sample_stats", "log_likelihood", "posterior_predictive", "observed_data"}
    assert groups <= set(idata.groups())
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


# ---------------------------------------------------------------- seeds and files
def test_equal_seeds_give_equal_bits_and_fits_do_not_see_each_other(fitted: FunctionalPriorBNN) -> None:
    first, second, other = (FunctionalPriorBNN(3, hidden=(4,)) for _ in range(3))
    a = first.fit(X, Y, **QUICK, seed=3)
    b = second.fit(X, Y, **QUICK, seed=3)
    c = other.fit(X, Y, **QUICK, seed=4)
    assert all(torch.equal(a.samples[n], b.samples[n]) for n in a.samples)
    assert not any(torch.equal(a.samples[n], c.samples[n]) for n in a.samples)
    before = a.predict(X).mean
    first.fit(3 * X + 1, -Y, **QUICK, seed=5)
    assert torch.equal(a.predict(X).mean, before), "a result keeps the model and the units it was made with"
    assert torch.equal(first.sample_prior(X, 5, seed=1), first.sample_prior(X, 5, seed=1))


def test_saved_models_predict_the_same_bits_in_a_new_process(tmp_path: Path) -> None:
    here, names = {}, ["hierarchical", "flow", "categorical"]
    for name in names:
        bnn = FunctionalPriorBNN(3, hidden=(4,), **{"out_features": 1, **MODELS[name]})
        bnn.match_prior(gpytorch.kernels.RBFKernel(), X, num_steps=2, num_functions=4, num_points=8, progress=False)
        result = bnn.fit(X, targets(bnn), **QUICK)
        result.save(tmp_path / name)
        here[name] = [
            bnn.predict(X).samples,
            bnn.predict(X).sample(seed=1),
            bnn.sample_prior(X, 4, seed=2),
            result.rhat,
        ]
    script = f"""
import torch
from ppl_models.functional_prior_bnn import FunctionalPriorBNN
x, out = torch.load({str(tmp_path / "x")!r}, weights_only=True), dict()
for name in {names!r}:
    bnn = FunctionalPriorBNN.load({str(tmp_path)!r} + "/" + name)
    out[name] = [bnn.predict(x).samples, bnn.predict(x).sample(seed=1), bnn.sample_prior(x, 4, seed=2), bnn.result.rhat]
    bnn.result.to_arviz()
torch.save(out, {str(tmp_path / "out")!r})
"""
    torch.save(X, tmp_path / "x")
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
    there = torch.load(tmp_path / "out", weights_only=True)
    for name in names:
        for a, b in zip(there[name], here[name], strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num()), name


def test_an_unfitted_model_can_be_saved_and_a_refitted_one_too(tmp_path: Path, fitted: FunctionalPriorBNN) -> None:
    bnn = FunctionalPriorBNN(3, hidden=(5,), prior="flow", seed=7)
    bnn.save(tmp_path / "a")
    loaded = FunctionalPriorBNN.load(tmp_path / "a")
    assert torch.equal(loaded.sample_prior(X, 3), bnn.sample_prior(X, 3)) and loaded.result is None
    fitted.save(tmp_path / "b")
    FunctionalPriorBNN.load(tmp_path / "b").save(tmp_path / "c")
    assert torch.equal(FunctionalPriorBNN.load(tmp_path / "c").predict(X).samples, fitted.predict(X).samples)


def test_hostile_and_damaged_files_are_refused(tmp_path: Path, fitted: FunctionalPriorBNN) -> None:
    path = tmp_path / "model"
    with pytest.raises(FileNotFoundError):
        FunctionalPriorBNN.load(path)
    fitted.save(path)
    whole = path.read_bytes()
    for cut in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError):
            FunctionalPriorBNN.load(path)
    marker = tmp_path / "executed"

    class Bomb:
        def __reduce__(self) -> tuple[Callable, tuple]:
            return Path.touch, (marker,)

    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError):
        FunctionalPriorBNN.load(path)
    torch.save(Bomb(), path)
    with pytest.raises(CheckpointError):
        FunctionalPriorBNN.load(path)
    assert not marker.exists()
    save_checkpoint(
        tmp_path / "odd", {}, {"config": {"in_features": 3, "command": "rm"}, "extra": {}}, kind="FunctionalPriorBNN"
    )
    with pytest.raises(CheckpointError, match="command"):
        FunctionalPriorBNN.load(tmp_path / "odd")
    save_checkpoint(tmp_path / "other", {}, {}, kind="AnotherModel")
    with pytest.raises(CheckpointError, match="AnotherModel"):
        FunctionalPriorBNN.load(tmp_path / "other")


# ---------------------------------------------------------------- bad input
NAN, INF = float("nan"), float("inf")


def spoiled(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x.view(-1)[7] = value
    return x


@pytest.mark.parametrize(
    ("x", "y", "options", "error", "message"),
    [
        (spoiled(X, NAN), Y, {}, ValueError, r"x_train.*\(2, 1\)"),
        (spoiled(X, INF), Y, {}, ValueError, "x_train"),
        (X, spoiled(Y, NAN), {}, ValueError, "y"),
        (X[:, :2], Y, {}, ValueError, r"\(N, 3\)"),
        (X[:0], Y[:0], {}, ValueError, "empty"),
        (X, Y[:-1], {}, ValueError, "60"),
        (X, torch.stack([Y, Y], 1), {}, ValueError, r"\(60, 1\)"),
        ("abc", Y, {}, TypeError, "x_train"),
        (X, Y, {"batch_size": 61}, ValueError, "batch_size.*60"),
        (X, Y, {"batch_size": 0}, ValueError, "batch_size"),
        (X, Y, {"batch_size": 2.5}, TypeError, "batch_size"),
        (X, Y, {"batch_size": "half"}, ValueError, "batch_size"),
        (X, Y, {"num_chains": 0}, ValueError, "num_chains"),
        (X, Y, {"num_samples": 2.5}, TypeError, "num_samples"),
        (X, Y, {"warmup_steps": -1}, ValueError, "warmup_steps"),
        (X, Y, {"step_size": -0.1}, ValueError, "step_size"),
        (X, Y, {"friction": 2.0}, ValueError, "friction"),
        (X, Y, {"temperature": 0.0}, ValueError, "temperature"),
        (X, Y, {"sampler": "nuts2"}, ValueError, "sampler"),
        (X, Y, {"sampler": "hmc", "batch_size": 20}, ValueError, "HMC"),
        (X, Y, {"sampler": "hmc", "batch_size": None, "temperature": 0.5}, ValueError, "temperature"),
        (X, Y, {"seed": 0.5}, TypeError, "seed"),
    ],
)
def test_bad_data_and_settings_are_refused_before_any_work(
    x: Any, y: Any, options: dict, error: type[Exception], message: str
) -> None:
    bnn = FunctionalPriorBNN(3, hidden=(4,))
    with pytest.raises(error, match=message):
        bnn.fit(x, y, **{**QUICK, **options})
    assert bnn.result is None


@pytest.mark.parametrize(
    ("likelihood", "y", "error", "message"),
    [
        ("categorical", LABELS.float(), TypeError, "integer"),
        ("categorical", LABELS + 2, ValueError, "0 to 2"),
        ("categorical", LABELS - 1, ValueError, "0 to 2"),
        ("categorical", LABELS.bool(), TypeError, "integer"),
        ("bernoulli", LABELS.float() * 2, ValueError, "0 or 1"),
        ("bernoulli", Y, ValueError, "0 or 1"),
        ("gaussian", Y.to(torch.complex64), TypeError, "real"),
        ("gaussian", ["a"] * 60, TypeError, "y must be"),
    ],
)
def test_targets_of_the_wrong_kind_are_refused(likelihood: str, y: Any, error: type[Exception], message: str) -> None:
    bnn = FunctionalPriorBNN(3, 3 if likelihood == "categorical" else 1, hidden=(4,), likelihood=likelihood)
    with pytest.raises(error, match=message):
        bnn.fit(X, y, **QUICK)


def test_queries_out_of_turn_and_out_of_shape(fitted: FunctionalPriorBNN) -> None:
    fresh = FunctionalPriorBNN(3)
    with pytest.raises(RuntimeError, match="call fit"):
        fresh.predict(X)
    assert fresh.sample_prior(X, num_samples=2).shape == (2, 60, 1)
    with pytest.raises(ValueError, match=r"\(N, 3\).*\(60, 2\)"):
        fitted.predict(X[:, :2])
    with pytest.raises(ValueError, match="finite"):
        fitted.predict(spoiled(X, NAN))
    with pytest.raises(ValueError, match="num_samples"):
        fresh.sample_prior(X, num_samples=0)
    with pytest.raises(ValueError, match="classification"):
        _ = fitted.predict(X).entropy
    again = FunctionalPriorBNN(3, hidden=(4,))
    again.fit(X, Y, **QUICK)
    again.match_prior(gpytorch.kernels.RBFKernel(), X, num_steps=1, num_functions=4, num_points=8, progress=False)
    with pytest.raises(RuntimeError, match="match_prior drops"):
        again.predict(X)


def test_numpy_arrays_and_lists_are_welcome() -> None:
    bnn = FunctionalPriorBNN(3, hidden=(4,))
    bnn.fit(X.double().numpy(), Y.tolist(), **QUICK)
    assert bnn.predict(X.numpy()).mean.dtype == torch.float32
    assert bnn.predict(X.double().numpy()).rmse(Y.numpy()).isfinite()


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
