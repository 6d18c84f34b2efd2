"""Predictive and log_likelihood against Pyro's Predictive, loops of traces and closed forms.

Distributions are compared by the two-sample Kolmogorov-Smirnov distance at fixed seeds.  With n draws a side it
exceeds ``2.3 * sqrt(2 / n)`` with probability ``2 * exp(-2 * 2.3**2)``, 5e-5, so some hundred comparisons are quiet,
while a wrong scale by a third is seen at n = 1000.
"""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive as PyroPredictive
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from scipy.stats import ks_2samp
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from inference._errors import CaptureWarning
from inference.results.predictive import Predictive, log_likelihood
from tests.inference.predictive_cases import MODELS, X, eight_schools, global_state, logistic, minibatch, prior_draws


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


@pytest.mark.parametrize("name", MODELS)
def test_model_agrees_with_pyro(name: str) -> None:
    samples, model = prior_draws(name, 600), MODELS[name]
    before = global_state()
    ours = Predictive(model, samples, chunk_size=250)()
    assert global_state() == before
    with torch.random.fork_rng():
        torch.manual_seed(6)
        theirs = PyroPredictive(model, samples)()
    assert ours.keys() == theirs.keys()
    for site in ours:
        assert ours[site].shape == theirs[site].shape and ours[site].dtype == theirs[site].dtype, site
        if theirs[site].numel():
            _same_law(ours[site], theirs[site])
    everything = Predictive(model, samples, return_sites=None)()
    assert set(everything) == set(samples) | set(theirs)
    for site, value in samples.items():
        assert torch.equal(everything[site].reshape(value.shape), value)


@pytest.mark.parametrize("name", MODELS)
def test_prior_predictive_agrees_with_pyro(name: str) -> None:
    ours = Predictive(MODELS[name], num_samples=600)()
    with torch.random.fork_rng():
        torch.manual_seed(7)
        theirs = PyroPredictive(MODELS[name], num_samples=600)()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    for site in ours:
        if theirs[site].numel():
            _same_law(ours[site], theirs[site])


@pytest.mark.changes_globals("rng")  # by Pyro, which it is compared with
def test_deterministic_sites_are_exact_in_every_chunking() -> None:
    samples = prior_draws("eight_schools", 50)
    theirs = PyroPredictive(eight_schools, samples, return_sites=["theta"])()["theta"]
    for chunk_size in (None, 1, 7, 50, 999):
        assert torch.equal(
            Predictive(eight_schools, samples, return_sites=["theta"], chunk_size=chunk_size)()["theta"], theirs
        )
    assert torch.equal(theirs.squeeze(1), samples["mu"][:, None] + samples["tau"][:, None] * samples["eta"])


@pytest.mark.changes_globals("rng")  # by Pyro, which it is compared with
def test_observed_sites_return_their_data_and_the_return_value_is_a_site() -> None:
    samples, y = prior_draws("logistic", 20), torch.ones(30)
    found = Predictive(logistic, samples, return_sites=["y", "_RETURN"])(y)
    assert list(found) == ["y", "_RETURN"]
    assert torch.equal(found["y"], y.expand(20, 30)) and torch.equal(found["_RETURN"], found["y"])
    found["y"][0] = 5.0  # the result is the caller's own memory
    assert y.eq(1).all() and found["y"][1].eq(1).all()
    regression = Predictive(MODELS["Regression"], prior_draws("Regression", 20), return_sites=["_RETURN"])()["_RETURN"]
    theirs = PyroPredictive(MODELS["Regression"], prior_draws("Regression", 20), return_sites=["_RETURN"])()["_RETURN"]
    torch.testing.assert_close(regression, theirs, rtol=1e-5, atol=1e-5)  # float32 products in another order


def test_grouped_samples_give_grouped_results() -> None:
    flat = prior_draws("eight_schools", 24)
    grouped = {site: value.reshape(4, 6, *value.shape[1:]) for site, value in flat.items()}
    ours, same = Predictive(eight_schools, grouped, batch_ndims=2)(), Predictive(eight_schools, flat)()
    assert ours["y"].shape == (4, 6, 8) and ours["theta"].shape == (4, 6, 8)
    assert all(torch.equal(ours[site].flatten(0, 1), same[site]) for site in same)


@pytest.mark.changes_globals("rng")  # by the call that sets the guide up
@pytest.mark.parametrize("guide_type", [AutoNormal, AutoMultivariateNormal])
def test_guide_draws_the_latent_sites(guide_type: type) -> None:
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    guide = guide_type(eight_schools)
    guide(y)
    for _, value in guide.named_parameters():  # a guide that is not the prior
        value.data.add_(0.3)
    before = global_state()
    ours = Predictive(eight_schools, guide=guide, num_samples=800)(None)
    assert global_state() == before
    with torch.random.fork_rng():
        torch.manual_seed(8)
        theirs = PyroPredictive(eight_schools, guide=guide, num_samples=800)(None)
    assert ours.keys() == theirs.keys() and set(ours) >= {"mu", "tau", "eta", "theta", "y"}
    for site in ours:
        assert ours[site].shape == theirs[site].shape
        _same_law(ours[site], theirs[site])
    assert torch.equal(ours["theta"].squeeze(1), (ours["mu"] + ours["tau"] * ours["eta"].squeeze(1)).reshape(800, 8))


def test_double_precision_stays_double() -> None:
    def model() -> None:
        a = pyro.sample("a", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        pyro.sample("x", dist.Dirichlet(torch.exp(a) * torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)))
        pyro.sample("b", dist.Bernoulli(logits=a))

    found = Predictive(model, {"a": torch.linspace(-1, 1, 50, dtype=torch.float64)})()
    assert {value.dtype for value in found.values()} == {torch.float64}
    assert (found["x"].sum(-1) - 1).abs().max() < 1e-12


def test_an_invalid_draw_is_nan_alone() -> None:
    samples = prior_draws("eight_schools", 6)
    samples["tau"][2] = float("nan")
    y = Predictive(eight_schools, samples, return_sites=["y"])()["y"]
    assert y[2].isnan().all() and y.isfinite().all(-1).sum() == 5


# ---------------------------------------------------------------- plates with subsampling
def test_a_subsampling_plate_draws_a_subsample_for_each_draw() -> None:
    index = Predictive(minibatch, {"w": torch.zeros(3000, 3)}, return_sites=["index"])(X)["index"].reshape(3000, 5)
    assert all(len(set(row)) == 5 for row in index.tolist())
    counts = torch.bincount(index.flatten(), minlength=30)  # 500 expected of each, standard deviation 20
    assert (counts - 500).abs().max() < 5 * 20.5
    assert len({tuple(row) for row in index.tolist()}) > 2900


def test_full_plates_visit_every_element() -> None:
    found = Predictive(minibatch, {"w": torch.zeros(7, 3)}, return_sites=["index", "y"], full_plates=True)(X)
    assert torch.equal(found["index"].reshape(7, 30), torch.arange(30).expand(7, 30)) and found["y"].shape == (7, 30)


# ---------------------------------------------------------------- what vmap refuses
def test_a_model_that_branches_runs_draw_by_draw_with_one_warning() -> None:
    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.deterministic("b", a if a > 0 else -2 * a)
        pyro.sample("y", dist.Normal(b, 0.1), obs=None)

    a = torch.linspace(-1, 1, 40)
    before = global_state()
    with pytest.warns(CaptureWarning, match=r"runs 40 times, slower but correct: .*data-dependent") as caught:
        found = Predictive(model, {"a": a})()
    assert global_state() == before and len(caught) == 1 and caught[0].filename == __file__
    assert torch.equal(found["b"], torch.where(a > 0, a, -2 * a))
    assert ((found["y"] - found["b"]) / 0.1).abs().max() < 5


def test_a_distribution_without_a_rule_is_named_in_the_warning() -> None:
    with pytest.warns(CaptureWarning, match=r"site 'x' \(Strange\) cannot be drawn under vmap"):
        x = Predictive(lambda: pyro.sample("x", Strange()), num_samples=500)()["x"]
    assert len(set(x.tolist())) > 400


class Strange(dist.TorchDistribution):  # type: ignore[misc]
    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    support = dist.constraints.real

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        return torch.empty(sample_shape).normal_()


def test_sites_that_come_and_go_are_an_error() -> None:
    def model() -> None:
        if pyro.sample("a", dist.Normal(0.0, 1.0)) > 0:
            pyro.sample("b", dist.Normal(0.0, 1.0))

    with pytest.warns(CaptureWarning), pytest.raises(ValueError, match="site 'b' is in the first draw's run"):
        Predictive(model, {"a": torch.tensor([1.0, -1.0])})()


def test_validation_of_a_later_draw_in_the_loop_names_the_draw() -> None:
    def model() -> None:
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        pyro.sample("y", dist.Normal(float(s), s))

    with pytest.warns(CaptureWarning), pytest.raises(ValueError, match=r"positive|GreaterThan") as caught:
        Predictive(model, {"s": torch.tensor([1.0, 2.0, -1.0])})()
    assert "draw 2" in caught.value.__notes__[0]


# ---------------------------------------------------------------- seeds, state, cost
def test_seeds() -> None:
    samples = prior_draws("logistic", 100)
    first, again, other = (Predictive(logistic, samples, seed=seed)()["y"] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    with torch.random.fork_rng():
        torch.manual_seed(11)
        first = Predictive(logistic, samples, seed=None)()["y"]
        other = Predictive(logistic, samples, seed=None)()["y"]
        torch.manual_seed(11)
        assert torch.equal(Predictive(logistic, samples, seed=None)()["y"], first) and not torch.equal(first, other)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_draws_do_not_depend_on_chunks(name: str) -> None:
    """One pass, passes of 7 that cut groups of draws anywhere, and one draw a pass: the same random numbers, so that
    discrete sites are equal and continuous ones to rounding.
    """
    whole, parts, single = (
        Predictive(MODELS[name], num_samples=20, return_sites=None, chunk_size=size)() for size in (None, 7, 1)
    )
    for site, value in whole.items():
        torch.testing.assert_close(parts[site], value, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(single[site], value, rtol=1e-4, atol=1e-4)
        assert site == "y" or not value.numel() or len(value.unique(dim=0)) > 1  # and draws differ


def test_families_drawn_by_their_own_samplers_do_not_depend_on_chunks() -> None:
    def model() -> None:
        a = pyro.sample("gamma", dist.Gamma(torch.tensor(0.7), 1.0))
        b = pyro.sample("beta", dist.Beta(a + 0.1, torch.ones(2)).to_event(1))
        pyro.sample("student", dist.StudentT(3.0, b.sum()))
        pyro.sample("poisson", dist.Poisson(5 * a))
        pyro.sample("overdispersed", dist.GammaPoisson(a + 0.1, 1.0))
        pyro.sample("simplex", dist.Dirichlet(torch.full((4,), 0.5)))
        pyro.sample("hot", dist.OneHotCategorical(torch.tensor([0.2, 0.3, 0.5])))
        pyro.sample("sparse", dist.ZeroInflatedPoisson(rate=3 * a, gate=torch.tensor(0.3)))
        pyro.sample("flat", dist.Uniform(-a, a))

    whole = Predictive(model, num_samples=40)()
    for size in (1, 9):
        for site, value in Predictive(model, num_samples=40, chunk_size=size)().items():
            torch.testing.assert_close(value, whole[site])
    assert all(len(value.unique(dim=0)) > 2 for value in whole.values())


def test_state_is_as_found_after_an_error_and_with_any_flags() -> None:
    def model() -> None:
        pyro.param("made_here", torch.tensor(1.0))
        pyro.sample("y", dist.Normal(0.0, -1.0))

    before = global_state()
    with pytest.raises(ValueError, match="constraint") as caught:
        Predictive(model, num_samples=3, full_plates=True)()
    assert "first draw" in caught.value.__notes__[0]
    assert global_state() == before
    torch.distributions.Distribution.set_default_validate_args(False)  # Pyro's own flag stays on
    try:
        before = global_state()
        Predictive(logistic, num_samples=3)()
        assert global_state() == before
    finally:
        torch.distributions.Distribution.set_default_validate_args(True)


def test_parameters_of_the_store_are_used_and_new_ones_not_kept() -> None:
    def model() -> None:
        pyro.sample(
            "y", dist.Normal(pyro.param("known", torch.tensor(0.0)) + pyro.param("new", torch.tensor(1.0)), 1e-6)
        )

    pyro.param("known", torch.tensor(7.0))
    assert (Predictive(model, num_samples=4)()["y"] - 8).abs().max() < 1e-4
    assert list(pyro.get_param_store().keys()) == ["known"] and pyro.param("known").item() == 7


def test_the_model_runs_once_a_chunk() -> None:
    calls = 0

    def model() -> None:
        nonlocal calls
        calls += 1
        pyro.sample("y", dist.Normal(pyro.sample("a", dist.Normal(0.0, 1.0)), 1.0))

    Predictive(model, {"a": torch.zeros(1000)})()
    assert calls == 2  # the eager run and one chunk
    Predictive(model, {"a": torch.zeros(1000)}, chunk_size=300)()
    assert calls == 2 + 5


MEMORY = """
import pyro, torch, pyro.distributions as dist
from inference.results.predictive import Predictive, log_likelihood
torch.set_num_threads(1)
def peak():  # not ru_maxrss, which a child inherits from the process that starts it
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
x = torch.randn(20000, 3)
def model(x):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0))
w = torch.randn(500, 3)
Predictive(model, {"w": w[:3]})(x[:10])
before = peak()
y = Predictive(model, {"w": w})(x)["y"]
assert y.shape == (500, 20000)
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
def test_peak_memory_is_under_twice_the_result() -> None:
    """40 MB of result, measured 58 to 66; in chunks of 32 MiB 77 to 92, in one chunk 120, with Pyro's traces 255."""
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    peak, result = int(run.stdout), 500 * 20000 * 4
    assert peak < 2 * result, f"{peak / 2**20:.0f} MiB"


@pytest.mark.skipif(torch.__version__.startswith("2.8."), reason="torch 2.8 has no fake form of the gamma law")
def test_fake_cuda_tensors_meet_no_tensor_of_another_device() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3, device=x.device), 1.0).to_event(1))
        s = pyro.sample("s", dist.Gamma(torch.ones((), device=x.device), 1.0))
        with pyro.plate("data", 30, subsample_size=None if y is None else 5, device=x.device) as index:
            mean = x.index_select(0, index) @ w
            if y is None:
                pyro.sample("b", dist.Bernoulli(logits=mean))
                pyro.sample("t", dist.StudentT(s, mean, torch.ones((), device=x.device)))
            pyro.sample("y", dist.Normal(mean, s), obs=None if y is None else y.index_select(0, index))

    with FakeTensorMode(), pyro.validation_enabled(False):
        x, y = torch.empty(30, 3, device="cuda"), torch.empty(30, device="cuda")
        samples = {"w": torch.empty(10, 3, device="cuda"), "s": torch.empty(10, device="cuda")}
        found = Predictive(model, samples)(x)
        found["log_likelihood"] = log_likelihood(model, samples, x, y)["y"]
        assert {value.device.type for value in found.values()} == {"cuda"}
        assert {value.shape for value in found.values()} == {(10, 30)}


# ---------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "nothing says how many draws"),
        ({"posterior_samples": {}}, ValueError, "nothing says how many draws"),
        ({"posterior_samples": {"w": torch.zeros(0, 3)}}, ValueError, r"hold no draws: leading sizes \(0,\)"),
        (
            {"posterior_samples": {"w": torch.zeros(4, 3), "b": torch.zeros(5)}},
            ValueError,
            r"disagree.*'w': \(4,\), 'b': \(5,\)",
        ),
        ({"posterior_samples": {"w": [1.0]}}, TypeError, r"posterior_samples\['w'\] must be a tensor"),
        ({"posterior_samples": {"b": torch.tensor(1.0)}}, ValueError, r"posterior_samples\['b'\] has shape \(\)"),
        ({"posterior_samples": {"b": torch.zeros(3)}, "batch_ndims": 2}, ValueError, "fewer than batch_ndims=2"),
        ({"posterior_samples": {"b": torch.zeros(3)}, "batch_ndims": 0}, ValueError, "batch_ndims must be 1"),
        ({"num_samples": 3, "batch_ndims": 2}, ValueError, "batch_ndims=2 needs posterior_samples"),
        ({"num_samples": 0}, ValueError, "num_samples must be at least 1"),
        ({"num_samples": 2.5}, TypeError, "num_samples must be an integer"),
        ({"num_samples": 2, "chunk_size": -1}, ValueError, "chunk_size must be at least 1"),
        ({"num_samples": 2, "return_sites": "y"}, TypeError, "return_sites must be a list, tuple or set"),
        ({"num_samples": 2, "return_sites": ["y", "why"]}, ValueError, r"no site \['why'\]; it has \['b', 'w', 'y'\]"),
        ({"posterior_samples": {"other": torch.zeros(3)}}, ValueError, r"name \['other'\], none of which is a site"),
        (
            {"posterior_samples": {"w": torch.zeros(9, 4)}},
            ValueError,
            r"'w'\]: each draw has shape \(4,\), the site \(3,\)",
        ),
        ({"posterior_samples": {"b": torch.zeros(4, 9), "w": torch.zeros(4, 9, 3)}}, ValueError, "pass batch_ndims=2"),
        ({"posterior_samples": {"w": torch.zeros(2, 3)}, "guide": logistic}, ValueError, "guide and posterior_samples"),
    ],
)
def test_bad_input(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Predictive(logistic, **arguments)()


def test_more_bad_input() -> None:
    with pytest.warns(UserWarning, match="num_samples=7 is not the 4 draws"):
        assert Predictive(logistic, {"b": torch.zeros(4)}, num_samples=7)()["y"].shape == (4, 30)
    with pytest.raises(TypeError, match="return value must be a tensor"):
        Predictive(eight_schools, num_samples=2, return_sites=["_RETURN"])()
    with pytest.raises(ValueError, match=r"'local'\]: each draw has shape \(30,\), the site \(5,\).*full_plates=True"):
        Predictive(local, {"local": torch.zeros(4, 30)})()
    assert Predictive(local, {"local": torch.zeros(4, 30)}, full_plates=True, return_sites=["y"])()["y"].shape == (
        4,
        30,
    )


def local() -> None:
    with pyro.plate("data", 30, subsample_size=5):
        pyro.sample("y", dist.Normal(pyro.sample("local", dist.Normal(0.0, 1.0)), 1.0))
