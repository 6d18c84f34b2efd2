"""Drawing under vmap: every family follows its own sampler."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.poutine.subsample_messenger import SubsampleMessenger
from scipy.stats import ks_2samp
from torch import Tensor

from inference.results.predictive import Predictive


def _global_state() -> tuple[Any, ...]:
    return (
        torch.get_rng_state().tolist(),
        torch.distributions.Distribution._validate_args,
        pyro.settings.get(),
        sorted(pyro.get_param_store().keys()),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        SubsampleMessenger._subsample,
    )


@pytest.fixture(autouse=True)
def global_state_is_unchanged() -> Iterator[None]:
    """Every test runs with a parameter store of its own, and validation is on after it."""
    with pyro.get_param_store().scope():
        yield
        assert not any("predictive" in str(frame).lower() for frame in poutine.runtime._PYRO_STACK)
    assert torch.distributions.Distribution._validate_args
    assert pyro.settings.get("validate_poutine")


def _same_law(ours: Tensor, theirs: Tensor) -> None:
    """Two samples with the draws in front agree in the first and the last element and in the mean over elements."""
    ours, theirs = ours.reshape(len(ours), -1).double(), theirs.reshape(len(theirs), -1).double()
    bound = 2.3 * (1 / len(ours) + 1 / len(theirs)) ** 0.5
    for a, b in ((ours[:, 0], theirs[:, 0]), (ours[:, -1], theirs[:, -1]), (ours.mean(1), theirs.mean(1))):
        assert ks_2samp(a.numpy(), b.numpy(), method="asymp").statistic < bound


# ---------------------------------------------------------------- every family that is drawn under vmap
def _simplex(a: Tensor) -> Tensor:
    return torch.stack([0.2 * a, 0.3 + 0 * a, 0.5 / a], -1)


def _matrix(a: Tensor) -> Tensor:
    return torch.tensor([[1.0, 0.0], [0.5, 0.8]], dtype=a.dtype) * a[..., None, None]


def _pair(a: Tensor) -> Tensor:
    return torch.stack([a, -2 * a], -1)


FAMILIES: dict[str, Callable[[Tensor], Any]] = {
    "Normal": lambda a: dist.Normal(a, 0.5 * a),
    "Normal, constant": lambda a: dist.Normal(torch.zeros_like(a[..., :1]), 1.0).expand(a.shape),
    "LogNormal": lambda a: dist.LogNormal(a, 0.5),
    "HalfNormal": lambda a: dist.HalfNormal(a),
    "HalfCauchy": lambda a: dist.HalfCauchy(a),
    "MultivariateNormal": lambda a: dist.MultivariateNormal(_pair(a), scale_tril=_matrix(a)),
    "MultivariateNormal, covariance": lambda a: dist.MultivariateNormal(_pair(a), _matrix(a) @ _matrix(a).mT),
    "LowRankMultivariateNormal": lambda a: dist.LowRankMultivariateNormal(
        _pair(a), _pair(a)[..., None], _pair(a).abs()
    ),
    "StudentT": lambda a: dist.StudentT(2 + a, a, 2.0),
    "MultivariateStudentT": lambda a: dist.MultivariateStudentT(2 + a, _pair(a), _matrix(a)),
    "Cauchy": lambda a: dist.Cauchy(a, a),
    "Laplace": lambda a: dist.Laplace(a, a),
    "AsymmetricLaplace": lambda a: dist.AsymmetricLaplace(a, a, 2.0),
    "SoftLaplace": lambda a: dist.SoftLaplace(a, a),
    "Logistic": lambda a: dist.Logistic(a, a),
    "LogisticNormal": lambda a: dist.LogisticNormal(_pair(a), 1.0 + 0 * _pair(a)),
    "Gumbel": lambda a: dist.Gumbel(a, a),
    "Stable": lambda a: dist.Stable(1.5, 0.2 * a, a, a),
    "Uniform": lambda a: dist.Uniform(-a, 2 * a),
    "Exponential": lambda a: dist.Exponential(a),
    "Weibull": lambda a: dist.Weibull(a, 2.0),
    "Pareto": lambda a: dist.Pareto(a, 2.0),
    "Gamma": lambda a: dist.Gamma(a, 2.0),
    "InverseGamma": lambda a: dist.InverseGamma(a, 2.0),
    "Chi2": lambda a: dist.Chi2(a),
    "FisherSnedecor": lambda a: dist.FisherSnedecor(a, 5.0),
    "Kumaraswamy": lambda a: dist.Kumaraswamy(a, 2.0),
    "Beta": lambda a: dist.Beta(a, 0.3),
    "Dirichlet": lambda a: dist.Dirichlet(_simplex(a)),
    "LKJCholesky": lambda a: dist.LKJCholesky(4, a),
    "LKJ": lambda a: dist.LKJ(3, a),
    "VonMises": lambda a: dist.VonMises(a, 2 * a),
    "ProjectedNormal": lambda a: dist.ProjectedNormal(_pair(a)),
    "Bernoulli": lambda a: dist.Bernoulli(logits=a - 1),
    "ContinuousBernoulli": lambda a: dist.ContinuousBernoulli(0.3 * a),
    "RelaxedBernoulli": lambda a: dist.RelaxedBernoulli(torch.tensor(0.5), 0.3 * a),
    "RelaxedOneHotCategorical": lambda a: dist.RelaxedOneHotCategorical(torch.tensor(0.5), _simplex(a)),
    "Geometric": lambda a: dist.Geometric(0.3 * a),
    "Categorical": lambda a: dist.Categorical(_simplex(a)),
    "OneHotCategorical": lambda a: dist.OneHotCategorical(_simplex(a)),
    "Multinomial": lambda a: dist.Multinomial(7, _simplex(a)),
    "Binomial": lambda a: dist.Binomial(10, 0.3 * a),
    "NegativeBinomial": lambda a: dist.NegativeBinomial(10, 0.3 * a),
    "Poisson": lambda a: dist.Poisson(2 * a),
    "BetaBinomial": lambda a: dist.BetaBinomial(a, 2.0, torch.full_like(a, 9.0)),
    "DirichletMultinomial": lambda a: dist.DirichletMultinomial(_simplex(a), torch.tensor(9.0)),
    "GammaPoisson": lambda a: dist.GammaPoisson(a, 2.0),
    "ZeroInflatedPoisson": lambda a: dist.ZeroInflatedPoisson(2 * a, gate=0.2 * a),
    "ZeroInflatedNegativeBinomial": lambda a: dist.ZeroInflatedNegativeBinomial(
        5.0 + 0 * a, probs=0.3 * a, gate=0.2 * a
    ),
    "MixtureSameFamily": lambda a: dist.MixtureSameFamily(
        dist.Categorical(_simplex(a)), dist.Normal(_simplex(a) * 5, a[..., None])
    ),
    "MixtureSameFamily of vectors": lambda a: dist.MixtureSameFamily(
        dist.Categorical(_simplex(a)), dist.Normal(_simplex(a)[..., None] * torch.tensor([1.0, 5.0]), 0.5).to_event(1)
    ),
    "MaskedMixture": lambda a: dist.MaskedMixture(
        torch.tensor([True, False, True]), dist.Normal(a, 1.0), dist.Laplace(5 * a, 1.0)
    ),
    "TransformedDistribution": lambda a: dist.TransformedDistribution(
        dist.Laplace(a, 1.0), [dist.transforms.AffineTransform(1.0, 2.0), dist.transforms.SigmoidTransform()]
    ),
    "TransformedDistribution, cached": lambda a: dist.TransformedDistribution(
        dist.Laplace(a, 1.0), [CACHED, INVERSE_CACHED]
    ),
    "masked": lambda a: dist.StudentT(3.0, a, 1.0).mask(a > 1),
    "Delta": lambda a: dist.Delta(a),
}
CACHED = dist.transforms.ExpTransform(cache_size=1)
INVERSE_CACHED = dist.transforms.SoftplusTransform(cache_size=1).inv


@pytest.mark.parametrize("name", FAMILIES)
def test_family_under_vmap_follows_its_own_sampler(name: str) -> None:
    family, n = FAMILIES[name], 6000
    offset = torch.tensor([0.0, 0.4, 1.4])
    a = 0.6 + torch.rand(n, generator=torch.Generator().manual_seed(1))

    def model() -> None:
        pyro.sample("x", family(pyro.sample("a", dist.Exponential(1.0)) + offset).to_event(1))

    ours = Predictive(model, {"a": a}, chunk_size=4000)()["x"]
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.binomial resizes its own output with a warning
        torch.manual_seed(2)
        theirs = family(a[:, None] + offset).sample()
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    _same_law(ours, theirs)
    # elements and draws are independent: a draw shared by the batch, or by the elements, is none
    if ours.reshape(n, 3, -1)[..., 0].unique().numel() > 2 * n:  # ranks without ties
        centred = (ours.reshape(n, 3, -1)[..., 0].argsort(0).argsort(0).double() - n / 2) / n
        neighbours = (
            centred[1:] * centred[:-1]
        ).mean().abs() * 12  # a rank correlation over 18000 pairs: 5 standard errors
        assert neighbours < 5 / (3 * n) ** 0.5


@pytest.mark.parametrize("name", ["Cauchy", "Dirichlet", "Binomial", "VonMises", "Normal", "LKJCholesky", "Bernoulli"])
def test_constant_parameters_still_give_every_draw_its_own_value(name: str) -> None:
    fn = FAMILIES[name](torch.tensor([1.2]))
    n = 3000
    ours = Predictive(lambda: pyro.sample("x", fn), num_samples=n)()["x"]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        theirs = fn.expand((n, 1)).sample()
    _same_law(ours, theirs)


def test_expanded_distribution_draws_expanded_dimensions_independently() -> None:
    fn = dist.Stable(1.5, 0.1, torch.tensor([[1.0], [3.0]]), 0.0)
    expanded = dist.torch_distribution.ExpandedDistribution(fn, torch.Size((4, 2, 3)))
    x = Predictive(lambda: pyro.sample("x", expanded), num_samples=2000)()["x"]
    assert x.shape == (2000, 4, 2, 3)
    _same_law(x[:, 0, 1, 2], 3 * x[:, 3, 0, 1])  # the scales of the two rows
    ranks = x.reshape(2000, -1).argsort(0).argsort(0).double()
    correlation = torch.corrcoef(ranks.T) - torch.eye(24)
    assert correlation.abs().max() < 5 / 2000**0.5


def test_caches_of_the_users_transforms_hold_nothing_afterwards() -> None:
    Predictive(
        lambda: pyro.sample("x", FAMILIES["TransformedDistribution, cached"](torch.ones(2)).to_event(1)), num_samples=3
    )()
    assert CACHED._cached_x_y == (None, None)
    assert INVERSE_CACHED._inv._cached_x_y == (None, None)


def test_a_subclass_with_its_own_sampler_is_not_drawn_as_its_base() -> None:
    class Shifted(dist.Normal):  # type: ignore[misc]
        def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
            return torch.randn(self.shape(sample_shape)) + 100

    assert (
        Predictive(lambda: pyro.sample("x", Shifted(torch.zeros(2), 1.0).to_event(1)), num_samples=9)()["x"].min() > 50
    )
