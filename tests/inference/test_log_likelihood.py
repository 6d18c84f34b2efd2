"""``inference.log_likelihood`` against traces, closed forms, and the same model written without discrete sites."""

import warnings
from collections.abc import Iterator

import arviz as az
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive as PyroPredictive
from pyro.infer import config_enumerate

from inference import MCMC, NUTS, DependentDataError, SamplerWarning
from inference.results.export import to_arviz
from inference.results.predictive import log_likelihood
from tests.arviz_versions import elpd
from tests.inference.predictive_cases import (
    MODELS,
    X,
    enumerable,
    global_state,
    logistic,
    minibatch,
    mixture,
    prior_draws,
)


@pytest.fixture(autouse=True)
def own_parameter_store() -> Iterator[None]:
    with pyro.get_param_store().scope():
        yield


def test_log_likelihood_of_a_minibatch_model_is_that_of_all_data() -> None:
    w, y = torch.randn(9, 3, generator=torch.Generator().manual_seed(9)), torch.ones(30)
    ours = log_likelihood(minibatch, {"w": w}, X, y)
    assert list(ours) == ["y"]
    torch.testing.assert_close(ours["y"], dist.Normal(w @ X.T, 1.0).log_prob(y), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"enumerable"}))
@pytest.mark.changes_globals("rng")  # by the traces that it is compared with
def test_log_likelihood_equals_a_loop_of_traces(name: str) -> None:
    samples = prior_draws(name, 12)
    y = PyroPredictive(MODELS[name], samples, return_sites=["y"])()["y"][0]
    before = global_state()
    ours = log_likelihood(
        MODELS[name], {k: v.reshape(3, 4, *v.shape[1:]) for k, v in samples.items()}, y, batch_ndims=2, chunk_size=5
    )
    assert global_state() == before
    assert list(ours) == ["y"]
    for i in range(12):
        trace = poutine.trace(poutine.condition(MODELS[name], {k: v[i] for k, v in samples.items()})).get_trace(y)
        site = trace.nodes["y"]
        expected = site["fn"].log_prob(site["value"])
        if name == "masked":
            expected = torch.where(X[:, 0] > 0, expected, 0)  # and no scale
        # vmap changes the order of sums only; the log-density of the 30-dimensional Gaussian has a condition number
        # near 1e2
        torch.testing.assert_close(ours["y"][i // 4, i % 4], expected, rtol=1e-4, atol=1e-4)


def test_log_likelihood_in_double_precision_is_exact() -> None:
    mu, tau, y = (torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(10)) for n in (9, 9, 4))

    def model() -> None:
        m = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        t = pyro.sample("tau", dist.LogNormal(torch.zeros((), dtype=torch.float64), 1.0))
        with pyro.plate("n", 4):
            pyro.sample("y", dist.Normal(m, t), obs=y)

    found = log_likelihood(model, {"mu": mu, "tau": tau.exp()})["y"]
    expected = (
        -0.5 * ((y - mu[:, None]) / tau.exp()[:, None]) ** 2
        - tau[:, None]
        - 0.5 * torch.log(2 * torch.tensor(torch.pi))
    )
    assert (found - expected).abs().max() < 1e-6 and found.dtype == torch.float64
    assert (found - dist.Normal(mu[:, None], tau.exp()[:, None]).log_prob(y)).abs().max() < 1e-13


def test_data_win_over_samples_of_the_same_name_and_loo_accepts_the_result() -> None:
    samples = {site: value.reshape(4, 50, *value.shape[1:]) for site, value in prior_draws("logistic", 200).items()}
    y = torch.ones(30)
    ours = log_likelihood(logistic, samples | {"y": torch.zeros(4, 50, 30)}, y, batch_ndims=2)
    assert torch.equal(ours["y"], log_likelihood(logistic, samples, y, batch_ndims=2)["y"])
    data = to_arviz(samples, log_likelihood=ours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # prior draws are no posterior: Pareto k is large
        assert elpd(az.loo(data)) < 0


def test_log_likelihood_sums_discrete_sites_out_row_by_row() -> None:
    """As the mixture that is written as one distribution, in one pass; drawn states are used where there are some."""
    samples, y = prior_draws("enumerable", 40), torch.randn(30, generator=torch.Generator().manual_seed(12))
    torch.testing.assert_close(
        log_likelihood(enumerable, samples, y, chunk_size=7)["y"], log_likelihood(mixture, samples, y)["y"]
    )
    states = {"z": torch.zeros(40, 30, dtype=torch.long)}
    given = log_likelihood(enumerable, samples | states, y)["y"]
    torch.testing.assert_close(given, dist.Normal(samples["m"][:, :1], 1.0).log_prob(y))


def test_a_data_point_is_what_shares_a_summed_out_site() -> None:
    """Three measurements a row with one state; a continuous site of the row that tells of the state; a plain site."""
    y = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(13), dtype=torch.float64)
    loc = torch.tensor([-1.0, 2.0], dtype=torch.float64)
    weight = torch.tensor([0.3, 0.7], dtype=torch.float64)

    def model() -> None:
        scale = pyro.sample("scale", dist.LogNormal(torch.zeros((), dtype=torch.float64), 1.0))
        with pyro.plate("rows", 5, subsample_size=2, dim=-1) as index:
            k = pyro.sample("k", dist.Categorical(weight))
            pyro.sample("plain", dist.Normal(scale, 1.0), obs=y[1, 0, index])
            with pyro.plate("times", 3, dim=-2):
                pyro.sample("y", dist.Normal(loc[k], scale), obs=y[0][:, index])

    scale = torch.tensor([0.5, 1.3], dtype=torch.float64)
    found = log_likelihood(model, {"scale": scale})
    normal = dist.Normal(loc[:, None, None], scale[:, None, None, None]).log_prob(y[0])  # draw, state, time, row
    torch.testing.assert_close(found["y"], (normal.sum(2) + weight.log()[:, None]).logsumexp(1))
    torch.testing.assert_close(found["plain"], dist.Normal(scale[:, None], 1.0).log_prob(y[1, 0]))

    def told() -> None:  # p(y | x) and not p(y): x says which state it is
        k = pyro.sample("k", dist.Categorical(weight))
        x = pyro.sample("x", dist.Normal(loc[k], 1.0))
        pyro.sample("y", dist.Normal(loc[k] + x, 1.0), obs=y[0, 0, 0])

    x = torch.tensor([0.4, 3.0], dtype=torch.float64)
    state = (dist.Normal(loc, 1.0).log_prob(x[:, None]) + weight.log()).log_softmax(-1)
    expected = (state + dist.Normal(loc + x[:, None], 1.0).log_prob(y[0, 0, 0])).logsumexp(-1)
    torch.testing.assert_close(log_likelihood(told, {"x": x})["y"], expected)


def test_rows_that_share_a_summed_out_site_have_no_likelihoods_of_their_own() -> None:
    def shared() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Bernoulli(0.5))
        with pyro.plate("n", 4):
            pyro.sample("y", dist.Normal(a * k, 1.0), obs=torch.zeros(4))

    def chain() -> None:
        a, k = pyro.sample("a", dist.Normal(0.0, 1.0)), torch.tensor(0.0)
        for t in pyro.markov(range(2)):
            k = pyro.sample(f"k{t}", dist.Bernoulli(0.2 + 0.6 * k))
            pyro.sample(f"y{t}", dist.Normal(a * k, 1.0), obs=torch.tensor(0.0))

    for model, words in ((shared, "all rows of 'y'"), (chain, r"observed sites \['y0', 'y1'\]")):
        with pytest.raises(ValueError, match=f"{words} share the discrete sites.*log_likelihood=False"):
            log_likelihood(model, {"a": torch.zeros(3)})


def test_an_export_without_likelihoods_of_its_own_says_why() -> None:
    def chain() -> None:
        a, k = pyro.sample("a", dist.Normal(0.0, 1.0)), torch.tensor(0.0)
        for t in pyro.markov(range(2)):
            k = pyro.sample(f"k{t}", dist.Bernoulli(0.2 + 0.6 * k))
            pyro.sample(f"y{t}", dist.Normal(a * k, 1.0), obs=torch.tensor(0.0))

    mcmc = MCMC(NUTS(config_enumerate(chain)), 4, 4, progress=False, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SamplerWarning)
        mcmc.run()
    with pytest.warns(SamplerWarning, match="no log_likelihood: the observed sites"):
        exported = mcmc.to_arviz()
    assert "posterior" in exported and "log_likelihood" not in exported
    with pytest.raises(DependentDataError, match="share the discrete sites"):
        mcmc.to_arviz(log_likelihood=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "log_likelihood" not in mcmc.to_arviz(log_likelihood=False)


def test_an_export_of_a_model_without_data_has_the_draws() -> None:
    def energy() -> None:
        pyro.factor("energy", -pyro.sample("a", dist.Normal(0.0, 1.0)).square())

    mcmc = MCMC(NUTS(energy), 4, 4, progress=False, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SamplerWarning)
        mcmc.run()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exported = mcmc.to_arviz()
    assert exported["posterior"]["a"].shape == (1, 4) and "log_likelihood" not in exported
    with pytest.raises(ValueError, match="no observed site"):
        mcmc.to_arviz(log_likelihood=True)


def test_log_likelihood_says_what_is_missing() -> None:
    counted = {"p": torch.ones(2), "y": torch.zeros(2)}
    with pytest.raises(
        ValueError, match=r"\['n'\] are neither observed nor in posterior_samples, and cannot be summed"
    ):
        log_likelihood(lambda: pyro.sample("y", dist.Normal(pyro.sample("n", dist.Poisson(1.0)), 1.0)), counted)
    with pytest.raises(ValueError, match="no observed site: pass the data"):
        log_likelihood(logistic, prior_draws("logistic", 5))
    with pytest.raises(ValueError, match="no observed site"):
        log_likelihood(lambda: pyro.sample("a", dist.Normal(0.0, 1.0)), {"a": torch.zeros(3)})
    with pytest.raises(ValueError, match="posterior_samples is empty"):
        log_likelihood(logistic, {}, torch.ones(30))
