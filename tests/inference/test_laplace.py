"""The Laplace approximation against closed forms, quadrature and derivatives taken by hand."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import Tensor

from inference._errors import CurvatureError, NonFiniteError, SamplerWarning
from inference.laplace import Laplace
from inference.lbfgs import minimize
from inference.potential import LogDensity, Potential
from inference.runtime.generators import generator
from tests.inference import zoo
from tests.inference.zoo import F64

KINDS = ("hessian", "ggn")


def data(rows: int = 30, dim: int = 3) -> tuple[Tensor, Tensor]:
    draw = generator(0, "laplace data")
    x = torch.randn(rows, dim, generator=draw, dtype=F64)
    return x, x @ torch.linspace(-1, 1, dim, dtype=F64) + 0.3 * torch.randn(rows, generator=draw, dtype=F64)


def linear(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(x.new_zeros(x.shape[1]), 2.0).to_event(1))
    b = pyro.sample("b", dist.Normal(x.new_zeros(()), 1.5))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ w + b, 0.3), obs=y)


# ---------------------------------------------------------------- exact
@pytest.mark.parametrize("kind", KINDS)
def test_a_linear_gaussian_model_is_exact(kind):
    x, y = data()
    result = Laplace(linear, kind).run(x, y)
    design = torch.cat([x, torch.ones(len(x), 1, dtype=F64)], 1)
    prior = torch.diag(torch.tensor([0.25, 0.25, 0.25, 1 / 2.25], dtype=F64))
    precision = prior + design.T @ design / 0.09
    covariance = torch.linalg.inv(precision)
    marginal = dist.MultivariateNormal(
        torch.zeros(30, dtype=F64), 0.09 * torch.eye(30, dtype=F64) + design @ prior.inverse() @ design.T
    )
    torch.testing.assert_close(result.precision, precision, rtol=1e-10, atol=1e-8)
    torch.testing.assert_close(result.covariance, covariance, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(result.log_evidence, marginal.log_prob(y), rtol=0, atol=1e-8)
    torch.testing.assert_close(result.position, covariance @ design.T @ y / 0.09, rtol=0, atol=1e-10)
    torch.testing.assert_close(result.mode["w"], result.position[:3])
    assert result.site_slices == {"w": slice(0, 3), "b": slice(3, 4)} and result.converged
    check = result.importance(200)
    # the weights are all equal: nothing is left to correct
    assert check.log_evidence == pytest.approx(marginal.log_prob(y).item(), abs=1e-8) and check.standard_error < 1e-8
    assert check.pareto_k < 0


def test_draws_have_the_covariance():
    x, y = data()
    result = Laplace(linear).run(x, y)
    draws = result.get_samples(20_000, seed=1)
    assert draws["w"].shape == (20_000, 3) and draws["b"].shape == (20_000,)
    flat = torch.cat([draws["w"], draws["b"].unsqueeze(1)], 1)
    root = torch.linalg.cholesky(result.covariance)
    white = torch.linalg.solve_triangular(root, (flat - result.position).T, upper=False)
    # entries of a sample covariance of white noise have standard error 1/sqrt(n), sqrt(2/n) on the diagonal
    torch.testing.assert_close(torch.cov(white), torch.eye(4, dtype=F64), rtol=0, atol=5 * math.sqrt(2 / 20_000))
    assert torch.equal(result.get_samples(7, seed=3)["w"], result.get_samples(7, seed=3)["w"])
    assert not torch.equal(result.get_samples(7, seed=3)["w"], result.get_samples(7, seed=4)["w"])


def logistic_energy(z: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """By hand, for ``zoo.logistic``: w ~ N(0, 2.5^2), b ~ N(0, 5^2)."""
    f = x @ z[:-1] + z[-1]
    likelihood = (y * f - torch.nn.functional.softplus(f)).sum()
    scale = torch.tensor([2.5] * x.shape[1] + [5.0], dtype=F64)
    return -likelihood + 0.5 * (z / scale).square().sum() + scale.log().sum() + 0.5 * len(z) * math.log(2 * math.pi)


@pytest.mark.parametrize("kind", KINDS)
def test_logistic_regression_against_a_density_by_hand(kind):
    """The link is canonical, so that the Gauss-Newton matrix is the Hessian."""
    model, (x, y) = zoo.CONTINUOUS["logistic"]
    result = Laplace(model, kind).run(x, y)
    by_hand = torch.autograd.functional.hessian(lambda z: logistic_energy(z, x, y), result.position)
    torch.testing.assert_close(result.precision, by_hand, rtol=1e-10, atol=1e-10)
    slope = torch.autograd.functional.jacobian(lambda z: logistic_energy(z, x, y), result.position)
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-9)
    expected = (
        -logistic_energy(result.position, x, y)
        + 0.5 * len(by_hand) * math.log(2 * math.pi)
        - 0.5 * torch.logdet(by_hand)
    )
    torch.testing.assert_close(result.log_evidence, expected, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("name", ["eight_schools", "lkj", "gaussian_process", "mixture_family", "mixture"])
def test_the_hessian_is_autograds(name):
    """Through bijections, factorisations and summed-out sites: the recorded graph against Pyro run by autograd."""
    model, args = {**zoo.CONTINUOUS, **zoo.ENUMERATED}[name]
    result = Laplace(model).run(*args)
    density = LogDensity(model, args)
    expected = torch.autograd.functional.hessian(lambda z: -density(z), result.position)
    torch.testing.assert_close(result.precision, expected, rtol=1e-8, atol=1e-9)


# ---------------------------------------------------------------- Gauss-Newton and Fisher
def likelihoods() -> dict[str, tuple[object, Tensor]]:
    draw = generator(1, "likelihoods")
    counts = torch.poisson(torch.full((30,), 2.0, dtype=F64), generator=draw)
    labels = torch.randint(0, 3, (30,), generator=draw)
    plane = torch.randn(30, 2, generator=draw, dtype=F64)
    return {
        "poisson": (lambda f: dist.Poisson(f[..., 0].exp()), counts),
        "categorical": (lambda f: dist.Categorical(logits=torch.cat([f, 0 * f[..., :1]], -1)), labels),
        "normal": (lambda f: dist.Normal(f[..., 0], 0.7), plane[:, 0]),
        "independent": (lambda f: dist.Normal(f, 0.7).to_event(1), plane),
        "multivariate": (
            lambda f: dist.MultivariateNormal(f, torch.tensor([[1.0, 0.4], [0.4, 0.5]], dtype=F64)),
            plane,
        ),
    }  # fmt: skip


def generalised(family, masked: bool = False, scaled: float = 1.0, bend=lambda f: f):
    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(x.shape[1], 2), 1.0).to_event(2))
        mask = torch.arange(len(y)) % 3 != 0 if masked else True
        with pyro.plate("data", len(y)), pyro.poutine.mask(mask=mask), pyro.poutine.scale(scale=scaled):
            pyro.sample("y", family(bend(x @ w)), obs=y)

    return model


@pytest.mark.parametrize("name", likelihoods())
def test_gauss_newton_is_the_hessian_for_canonical_parameters(name):
    family, y = likelihoods()[name]
    x, _ = data()
    for arguments in ({}, {"masked": True, "scaled": 1.7}):
        model = generalised(family, **arguments)
        exact, gauss_newton = (Laplace(model, kind).run(x, y) for kind in KINDS)
        torch.testing.assert_close(gauss_newton.precision, exact.precision, rtol=1e-9, atol=1e-9)


def test_gauss_newton_differs_where_the_mean_bends_and_is_the_jacobians_square():
    family, y = likelihoods()["independent"]
    x, _ = data()
    exact, result = (Laplace(generalised(family, bend=torch.tanh), kind).run(x, y) for kind in KINDS)
    assert (result.precision - exact.precision).abs().max() > 0.1
    jacobian = torch.autograd.functional.jacobian(
        lambda z: torch.tanh(x @ z.reshape(3, 2)).reshape(-1), result.position
    )
    torch.testing.assert_close(
        result.precision, torch.eye(6, dtype=F64) + jacobian.T @ jacobian / 0.49, rtol=1e-10, atol=1e-10
    )


def test_an_unknown_noise_scale_enters_by_its_fisher_information():
    """For a mean m and log s the information of n observations is diag(n / s^2, 2 n)."""

    def model(y: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(y.new_zeros(()), 1.0))
        s = pyro.sample("s", dist.LogNormal(y.new_zeros(()), 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(m, s), obs=y)

    y = data()[1]
    result = Laplace(model, "ggn").run(y)
    s = result.mode["s"]
    # the prior of log s is normal, which a change of variables leaves alone
    expected = torch.diag(torch.stack([1 + 30 / s**2, 1 + 60 * torch.ones_like(s)]))
    torch.testing.assert_close(result.precision, expected, rtol=1e-10, atol=1e-10)


def test_the_empirical_fisher_is_the_sum_of_squared_scores():
    model, (x, y) = zoo.CONTINUOUS["logistic"]
    result = Laplace(model, "empirical_fisher").run(x, y)
    design = torch.cat([x, torch.ones(len(x), 1, dtype=F64)], 1)
    scores = (y - torch.sigmoid(design @ result.position)).unsqueeze(1) * design
    prior = torch.tensor([2.5**-2] * x.shape[1] + [5.0**-2], dtype=F64).diag()
    torch.testing.assert_close(result.precision, prior + scores.T @ scores, rtol=1e-10, atol=1e-10)


# ---------------------------------------------------------------- subsets and structure
@pytest.mark.parametrize("kind", (*KINDS, "empirical_fisher"))
def test_a_subset_is_a_block_of_the_whole(kind):
    """The last layer of a network, the first being held."""

    def network(x: Tensor, y: Tensor) -> None:
        hidden = pyro.sample("hidden", dist.Normal(x.new_zeros(3, 4), 0.5).to_event(2))
        last = pyro.sample("last", dist.Normal(x.new_zeros(4), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(torch.tanh(x @ hidden) @ last, 0.3), obs=y)

    x, y = data()
    whole = Laplace(network, kind).run(x, y)
    part = Laplace(network, kind, subset=["last"]).run(x, y)
    block = whole.precision[whole.site_slices["last"], whole.site_slices["last"]]
    torch.testing.assert_close(part.precision, block, rtol=1e-5, atol=1e-6)
    if kind != "empirical_fisher":
        hidden = torch.tanh(x @ part.mode["hidden"])
        by_hand = torch.eye(4, dtype=F64) + hidden.T @ hidden / 0.09
        torch.testing.assert_close(part.precision, by_hand, rtol=1e-10, atol=1e-9)
    draws = part.get_samples(5)
    assert torch.equal(draws["hidden"], part.mode["hidden"].expand(5, 3, 4)) and draws["last"].std(0).min() > 0
    diagonal = Laplace(network, kind, "diagonal").run(x, y)
    torch.testing.assert_close(diagonal.precision, whole.precision.diagonal(), rtol=1e-4, atol=1e-4)
    expected = diagonal.log_prob + 8 * math.log(2 * math.pi) - 0.5 * diagonal.precision.log().sum()
    torch.testing.assert_close(diagonal.log_evidence, expected)
    assert diagonal.get_samples(3)["last"].shape == (3, 4) and diagonal.covariance.shape == (16,)


# ---------------------------------------------------------------- change of variables
def test_a_positive_site_against_quadrature():
    """y_i ~ Exponential(r), r ~ Gamma: over log r the error of Laplace is 1 / (12 a) to first order, a the shape."""
    y = torch.rand(60, generator=generator(2, "exponential"), dtype=F64) + 0.2

    def model() -> None:
        r = pyro.sample("r", dist.Gamma(torch.tensor(2.0, dtype=F64), torch.tensor(1.0, dtype=F64)))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Exponential(r), obs=y)

    result = Laplace(model).run()
    shape, rate = 2.0 + len(y), 1.0 + y.sum()
    evidence = math.lgamma(shape) - math.lgamma(2.0) - shape * rate.log()
    # Stirling: log Gamma(a) = (a - 1/2) log a - a + log(2 pi) / 2 + 1 / (12 a) + O(a^-3); the rest is what Laplace has
    torch.testing.assert_close(result.log_evidence + 1 / (12 * shape), evidence, rtol=0, atol=1e-7)
    torch.testing.assert_close(result.mode["r"], shape / rate)  # of r's density times dr / dlog r
    torch.testing.assert_close(result.precision.squeeze(), torch.tensor(shape, dtype=F64))
    check = result.importance(4000)
    assert abs(check.log_evidence - evidence.item()) < 4 * check.standard_error and check.standard_error < 0.005
    assert check.pareto_k < 0.7
    assert (result.get_samples(100)["r"] > 0).all()


# ---------------------------------------------------------------- what cannot be
def test_flat_and_saddle_directions_are_named():
    flat = constraints.real

    def sum_only(y: Tensor) -> None:
        a = pyro.sample("a", dist.ImproperUniform(flat, (), ()))
        b = pyro.sample("b", dist.ImproperUniform(flat, (), ()))
        pyro.sample("c", dist.Normal(y.new_zeros(()), 1.0))
        pyro.sample("y", dist.Normal(a + b, 1.0), obs=y)

    y = torch.tensor(1.0, dtype=F64)
    with pytest.raises(CurvatureError, match="flat along 'a', 'b'"):
        Laplace(sum_only).run(y)

    def unused(y: Tensor) -> None:
        pyro.sample("nothing", dist.ImproperUniform(flat, (2,), ()))
        pyro.sample("y", dist.Normal(pyro.sample("a", dist.Normal(y.new_zeros(()), 1.0)), 1.0), obs=y)

    for structure in ("full", "diagonal"):
        with pytest.raises(CurvatureError, match=r"flat along 'nothing'\[0, 1\]"):
            Laplace(unused, structure=structure).run(y)

    def saddle() -> None:
        u = pyro.sample("u", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        v = pyro.sample("v", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        pyro.factor("wells", -0.1 * v**4 + v**2 + 0.0 * u)

    at_top = {"u": torch.zeros(1, dtype=F64), "v": torch.zeros(1, dtype=F64)}
    with pytest.raises(CurvatureError, match="negative along 'v'"):
        Laplace(saddle, initial_params=at_top).run()
    # from elsewhere it ends in one of the two wells: 0.1 v^4 - v^2 / 2 is lowest at v^2 = 2.5
    assert Laplace(saddle).run().mode["v"].square().item() == pytest.approx(2.5)


def test_the_best_of_the_starts_is_kept():
    def wells() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 10.0))
        pyro.factor("wells", torch.logaddexp(-2 * (z - 3) ** 2, 1.0 - 2 * (z + 3) ** 2))

    starts = {"z": torch.tensor([3.0, 2.5, -2.0], dtype=F64)}
    result = Laplace(wells, initial_params=starts).run()
    assert result.mode["z"].item() == pytest.approx(-3, abs=0.02)
    assert (result.start_log_probs[2] - result.start_log_probs[0]).item() == pytest.approx(1.0, abs=1e-4)
    assert "1 of 3 starts" in result.summary()


def test_an_unfinished_search_says_so():
    with pytest.warns(SamplerWarning, match="mode was not reached"):
        result = Laplace(zoo.eight_schools, max_evaluations=2, curvature="ggn").run(zoo.SCHOOLS_Y, zoo.SCHOOLS_SE)
    assert not result.converged


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, "model must be", {"model": 3}),
        (ValueError, "curvature must be", {"curvature": "fisher"}),
        (ValueError, "structure must be", {"structure": "kron"}),
        (TypeError, "sequence of site names", {"subset": "w"}),
        (ValueError, "names no site", {"subset": []}),
        (ValueError, "no latent site \\['q'\\]", {"subset": ["q"]}),
        (ValueError, "num_starts", {"num_starts": 0}),
        (TypeError, "num_starts", {"num_starts": 1.5}),
        (TypeError, "seed", {"seed": 0.5}),
        (ValueError, "missing \\['b'\\]", {"initial_params": {"w": torch.zeros(1, 3)}}),
    ],
)
def test_bad_arguments(error, match, arguments):
    with pytest.raises(error, match=match):
        Laplace(**{"model": linear, **arguments}).run(*data())


def test_bad_models():
    x, y = data()

    def minibatch(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(y), subsample_size=5) as rows:
            pyro.sample("y", dist.Normal(x[rows] @ w, 1.0), obs=y[rows])

    with pytest.raises(ValueError, match="subsamples the plates \\['data'\\]"):
        Laplace(minibatch).run(x, y)
    with pytest.raises(ValueError, match="observed site 'y' is StudentT"):
        Laplace(generalised(lambda f: dist.StudentT(3.0, f[..., 0], 1.0)), "ggn").run(x, y)
    with pytest.raises(ValueError, match="sites are summed out"):
        Laplace(zoo.enumerated_mixture, "ggn").run(zoo.Y)

    def impossible() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        pyro.factor("f", torch.where(z.abs() < 3, -math.inf, 0.0 * z))

    with pytest.raises(NonFiniteError, match="all 4 starts"):
        Laplace(impossible).run()
    result = Laplace(linear).run(x, y)
    for name in ("get_samples", "importance"):
        with pytest.raises(ValueError, match="num_samples"):
            getattr(result, name)(0)


def test_a_model_that_cannot_be_recorded_gives_the_same():
    x, y = data()

    def branching(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(3), 2.0).to_event(1))
        shift = 0.0 if float(w.detach().sum()) < 1e6 else 1.0
        b = pyro.sample("b", dist.Normal(x.new_zeros(()), 1.5))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(x @ w + b + shift, 0.3), obs=y)

    with pytest.warns(match="one chain at a time"):
        slow = Laplace(branching).run(x, y)
    fast = Laplace(linear).run(x, y)
    torch.testing.assert_close(slow.precision, fast.precision)
    torch.testing.assert_close(slow.log_evidence, fast.log_evidence)


def test_export():
    x, y = data()
    found = Laplace(linear).run(x, y).to_arviz(50)
    assert found.posterior["w"].shape == (1, 50, 3) and found.observed_data["y"].shape == (30,)
    assert found.attrs["curvature"] == "hessian"


# ---------------------------------------------------------------- the search
def rosenbrock(z: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = z.detach().requires_grad_(True)
        value = (100 * (leaf[:, 1:] - leaf[:, :-1] ** 2) ** 2 + (1 - leaf[:, :-1]) ** 2).sum(1)
        return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


def test_the_search_solves_rosenbrocks_valley_and_rows_keep_to_themselves():
    start = 1.5 * torch.randn(8, 2, generator=generator(3, "starts"), dtype=F64)
    found = minimize(rosenbrock, start)
    assert found.converged.all()
    torch.testing.assert_close(found.position, torch.ones(8, 2, dtype=F64), rtol=0, atol=1e-6)
    alone = minimize(rosenbrock, start[3:4])
    assert torch.equal(alone.position[0], found.position[3])
    # the first derivatives alone would need tens of thousands of evaluations here
    assert minimize(rosenbrock, start, max_evaluations=200).converged.all()


def test_a_constant_or_many_data_do_not_end_the_search():
    """With a limit that grows with |U| any slope was small enough beside a factor of a million, and held sites stayed
    where they had started.
    """

    def line(y, constant):
        b = pyro.sample("b", dist.Normal(0.0, 100.0))
        w = pyro.sample("w", dist.Normal(0.0, 100.0))
        pyro.factor("constant", torch.tensor(constant))
        pyro.sample("y", dist.Normal(b + torch.arange(3.0) * w, 1.0).to_event(1), obs=y)

    y = torch.tensor([50.0, 51.0, 49.0])
    for constant in (0.0, -1e6):
        found = Laplace(line, subset=["w"], num_starts=1).run(y, constant)
        assert found.converged
        assert float(found.mode["b"]) == pytest.approx(50.4963, abs=0.01)
        assert float(found.mode["w"]) == pytest.approx(-0.4977, abs=0.01)


@pytest.mark.parametrize("subset", [None, ["s"]])
def test_sites_in_large_units(subset):
    """In unconstrained space a mean in millions has no slope that a search would see beside a log-scale's."""

    def model(y):
        b = pyro.sample("b", dist.Normal(torch.tensor(0.0, dtype=F64), 1e7))
        s = pyro.sample("s", dist.LogNormal(torch.tensor(14.0, dtype=F64), 1.0))
        pyro.sample("y", dist.Normal(b, s).expand([3]).to_event(1), obs=y)

    found = Laplace(model, subset=subset, num_starts=2).run(torch.tensor([5.0e6, 5.1e6, 4.9e6], dtype=F64))
    assert found.converged
    assert float(found.mode["b"]) == pytest.approx(4_999_632, rel=1e-5)  # by scipy's Nelder-Mead
    assert float(found.mode["s"]) == pytest.approx(148_427, rel=1e-4)


def test_a_regression_takes_few_evaluations():
    """In single precision, beside a vague prior of the intercept: 2,000 by a limit that rounding did not let be."""
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(5000, 10, generator=noise)
    y = 50 + x.sum(1) + torch.randn(5000, generator=noise)
    counted = []

    def model(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([10]).to_event(1))
        b = pyro.sample("b", dist.Normal(0.0, 100.0))
        s = pyro.sample("s", dist.HalfNormal(10.0))
        pyro.sample("y", dist.Normal(x @ w + b, s).to_event(1), obs=y)

    class Counted(Potential):
        def value_and_grad(self, z, batch=None):
            counted.append(1)
            return super().value_and_grad(z, batch)

    settings = Laplace(model, num_starts=1)
    found = settings._search(Counted(LogDensity(model, (x, y))))
    assert found.converged.all() and len(counted) < 150


def test_a_row_that_starts_where_the_value_is_infinite_has_not_converged():
    found = minimize(lambda z: (torch.full_like(z[:, 0], math.inf), torch.full_like(z, 5.0)), torch.zeros(1, 1))
    assert not found.converged.any()


def test_the_search_never_climbs():
    start = 1.5 * torch.randn(64, 2, generator=generator(4, "starts"), dtype=F64)
    values = torch.stack([minimize(rosenbrock, start, max_evaluations=n).value for n in range(1, 40)])
    assert (values.diff(dim=0) <= 1e-12 * values[:-1]).all()


def test_the_search_backs_off_from_where_the_value_is_not_finite():
    def barrier(z: Tensor) -> tuple[Tensor, Tensor]:
        return (z - z.log()).sum(1), 1 - 1 / z.where(z > 0, math.nan)

    start = torch.tensor([[5.0], [0.01], [-1.0]], dtype=F64)
    found = minimize(barrier, start)
    torch.testing.assert_close(found.position[:2], torch.ones(2, 1, dtype=F64))
    assert found.converged.tolist() == [True, True, False] and found.position[2] == -1
