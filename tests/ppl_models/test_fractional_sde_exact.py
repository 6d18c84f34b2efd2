"""Linear models: an exact fit ends at a maximum, and the posterior of their parameters."""

from pathlib import Path
from typing import Any

import pyro.distributions as dist
import pytest
import torch

from inference import SamplerWarning
from ppl_models import FractionalSDE
from ppl_models.fractional_sde.exact import ExactEvidence, gaussian_log_likelihood
from ppl_models.fractional_sde.results import FractionalSDEResult
from sde import FractionalOrnsteinUhlenbeck

TIMES = torch.tensor([0.1, 0.2, 0.35, 0.6, 1.0])


def test_an_exact_fit_ends_at_a_maximum() -> None:
    """H, theta and the error lie on a ridge: 400 steps of Adam ended 0.85 nats below the top, 100 here at a slope of
    2 nats a unit, without a word.
    """
    times = torch.arange(1, 41) / 8
    clean = FractionalOrnsteinUhlenbeck(0.7, 8.0).sample(times, 3, seed=0).T.unsqueeze(-1)
    y = 3 * clean + 0.1 * torch.randn(3, 40, 1, generator=torch.Generator().manual_seed(0)).double()
    model = FractionalSDE(1, "linear", initial=(0.0, 0.0), num_processes=4)
    result = model.fit(times, y, noise_std="learn", num_steps=100, progress=False)
    loss = ExactEvidence(model.system, model.likelihood, model.data.times, True)(y, model.data.mask)
    free = [p for p in (*model.system.parameters(), *model.likelihood.parameters()) if p.requires_grad]
    slopes = torch.autograd.grad(3 * loss, free)
    assert max(float(slope.abs().max()) for slope in slopes) < 1e-2
    assert result.converged


def test_a_fit_that_is_not_at_a_maximum_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where more steps than by default are asked for, as well; who asks for fewer knows."""
    y = torch.randn(2, 5, 1, generator=torch.Generator().manual_seed(0))
    few = FractionalSDE(1, "linear").fit(TIMES, y, num_steps=4, progress=False)
    assert not few.converged and "not at a maximum" in few.summary()
    monkeypatch.setattr("ppl_models.fractional_sde.model._EXACT_STEPS", 4)
    with pytest.warns(SamplerWarning, match="num_steps"):
        FractionalSDE(1, "linear").fit(TIMES, y, progress=False)


def test_an_exact_fit_resumes_to_the_bit(tmp_path: Path) -> None:
    y = torch.randn(2, 5, 1, generator=torch.Generator().manual_seed(0))

    def interrupt(fields: dict[str, Any]) -> None:
        if fields["step"] >= 4:
            raise KeyboardInterrupt

    ends = []
    for name, progress in (("a", False), ("b", interrupt), ("b", False)):
        model = FractionalSDE(1, "linear")
        result = model.fit(TIMES, y, num_steps=12, checkpoint=tmp_path / name, progress=progress)
        ends.append((result.converged, float(model.hurst), float(model.elbo())))
    assert ends[1][0] is None
    assert ends[0] == ends[2] != ends[1]


def test_a_maximum_that_single_precision_cannot_hold_is_not_taken() -> None:
    """H of an exact smooth curve goes to 1, where it rounds to 1 and the evidence is lost."""
    times = torch.arange(1, 41) / 8
    model = FractionalSDE(1, "none", initial=(0.0, 0.0))
    y = (torch.sin(times) + times / 2).reshape(1, 40, 1)
    model.fit(times, y, noise_std=0.0, num_steps=60, progress=False)
    assert 0.9 < float(model.hurst) < 1
    assert float(model.log_evidence()) > 80


# ---------------------------------------------------------------- priors of the user's
@pytest.mark.filterwarnings("ignore::inference.SamplerWarning")  # short chains
def test_a_prior_of_one_number_is_that_of_each_dimension() -> None:
    """It ended in an error after the optimisation; draws from the same prior given a dimension are the same."""
    y = torch.randn(2, 5, 2, generator=torch.Generator().manual_seed(0)).double()
    drawn = []
    for shape in ((), (2,)):
        zero = torch.zeros(shape)
        priors = {"scale": dist.LogNormal(zero, 1.0), "constant": dist.Normal(zero, 2.0), "hurst": dist.Beta(2.0, 2.0)}
        model = FractionalSDE(2, "constant", num_processes=2)
        result = model.fit(
            TIMES, y, method="nuts", priors={**priors, "noise_std": dist.LogNormal(zero, 1.0)}, noise_std="learn",
            num_steps=2, num_samples=3, warmup_steps=2, num_chains=2, progress=False,
        )  # fmt: skip
        assert result.samples["scale"].shape == result.samples["constant"].shape == (2, 3, 2)
        assert result.samples["hurst"].shape == (2, 3)
        drawn.append(result.samples)
    assert all(torch.equal(drawn[0][name], value) for name, value in drawn[1].items())


ONE = dist.LogNormal(0.0, 1.0)


@pytest.mark.parametrize(
    ("settings", "priors", "match"),
    [
        ({}, {"noise_std": ONE}, "noise_std='learn'"),
        ({"diffusion": 1.0}, {"scale": ONE}, "diffusion='constant'"),
        ({"noise": "brownian"}, {"hurst": dist.Beta(2.0, 2.0)}, "hurst='learn'"),
        ({"hurst": 0.3}, {"hurst": dist.Beta(2.0, 2.0)}, "hurst='learn'"),
        ({"drift": "constant"}, {"theta": ONE}, "drift='linear'"),
        ({"drift": "none"}, {"constant": ONE}, "drift='linear' or 'constant'"),
        ({}, {"start": ONE}, "parameters are"),
        ({}, {"scale": dist.LogNormal(torch.zeros(3), 1.0)}, r"shape \(2,\), got \(3,\)"),
        ({}, {"hurst": dist.Beta(torch.ones(2), 1.0)}, r"shape \(\), got \(2,\)"),
    ],
)
def test_priors_that_would_not_be_used_are_refused(
    settings: dict[str, Any], priors: dict[str, Any], match: str
) -> None:
    """Before any work.  One of a fixed error or scale was of the predictions alone, that of H beside Brownian noise
    came back as its own posterior, and one of a drift that is not there was a KeyError at the end.
    """
    model = FractionalSDE(2, **{"drift": "linear", **settings})
    with pytest.raises(ValueError, match=match):
        model.fit(TIMES, torch.zeros(1, 5, 2), method="nuts", priors=priors, progress=False)
    assert model.result is None


def test_a_prior_is_a_distribution() -> None:
    with pytest.raises(TypeError, match="one of pyro"):
        FractionalSDE(1, "none").fit(TIMES, torch.zeros(1, 5, 1), method="nuts", priors={"hurst": 0.3})


# ---------------------------------------------------------------- draws of the parameters
def test_arviz_of_parameters() -> None:
    """Each draw's densities of one observation given those before it sum to its evidence; of 100 draws of an
    observation the mean lies within 4 standard errors of the prediction.
    """
    g = torch.Generator().manual_seed(0)
    y, mask = torch.randn(3, 5, 2, generator=g).double(), torch.rand(3, 5, 2, generator=g) > 0.25
    model = FractionalSDE(2, "linear", num_processes=3)
    model.fit(TIMES, y, mask, noise_std="learn", num_steps=1, progress=False)
    now = {**model.system.parameters_now(), "noise_std": model.noise_std}
    draws = {name: now[name].detach().double() for name in ("hurst", "scale", "theta", "noise_std")}
    spread = torch.linspace(0.8, 1.2, 100).double().reshape(2, 50)
    samples = {name: spread.reshape(2, 50, *[1] * v.ndim) * v for name, v in draws.items()}
    model.result = FractionalSDEResult(model, "nuts", None, samples)
    exported = model.result.to_arviz()
    found = torch.as_tensor(exported["log_likelihood"]["y"].values)
    assert found.shape == exported["posterior_predictive"]["y"].shape == (2, 50, 3, 5, 2)
    assert bool((found[:, :, ~mask] == 0).all())
    data = (model.data.times, model.data.values.movedim(0, 1), mask.double().movedim(0, 1))
    one = {**model.system.parameters_now(), **{name: v[1, 7] for name, v in samples.items()}}
    evidence = gaussian_log_likelihood(model.system.linear_sde(one), *data, one["noise_std"])
    torch.testing.assert_close(found[1, 7].sum((0, 1)), evidence.sum(0))
    predicted = torch.as_tensor(exported["posterior_predictive"]["y"].values).flatten(0, 1)
    error = (predicted.mean(0) - model.predict(TIMES, 100).mean) / predicted.std(0)
    assert float(error.abs().max()) < 4 / 100**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_series_from_time_zero_does_not_run_away(dtype: torch.dtype) -> None:
    """The evidence of a start that is seen once has no maximum in its spread, and L-BFGS went to 1e-170."""
    noise = torch.Generator().manual_seed(0)
    times = (torch.arange(40) * 0.1).to(dtype)
    y = (0.3 * torch.randn(1, 40, 1, generator=noise)).cumsum(1).to(dtype)
    model = FractionalSDE(1, drift="linear")
    for _ in range(2):
        model.fit(times, y, noise_std="learn", num_steps=150, progress=False)
        assert float(model.system.start_std.detach()) > 1e-5 and 0.1 < float(model.hurst) < 0.95
