"""The dry run reports what a model is: against models whose sites, plates and scales are known."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

from inference import check_model
from tests.inference import zoo


def minibatch(x: Tensor, y: Tensor, batch_size: int | None = None) -> None:
    w = pyro.sample("w", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
    noise = pyro.param("noise", torch.tensor(1.0, dtype=x.dtype), constraint=dist.constraints.positive)
    with pyro.plate("rows", len(x), subsample_size=batch_size) as i:
        mean = pyro.deterministic("mean", x[i] @ w)
        pyro.sample("y", dist.Normal(mean, noise), obs=y[i])
    pyro.factor("tilt", -w.square().sum())


def test_sites_plates_and_the_scale_of_a_minibatch(capsys: pytest.CaptureFixture[str]) -> None:
    check = check_model(minibatch, zoo.X, zoo.Y, batch_size=10)
    kinds = {site.name: site.kind for site in check.sites}
    assert kinds == {"w": "latent", "noise": "param", "mean": "deterministic", "y": "observed", "tilt": "factor"}
    sites = {site.name: site for site in check.sites}
    assert (sites["w"].batch_shape, sites["w"].event_shape, sites["w"].support) == ((), (3,), "Real")
    assert (sites["y"].batch_shape, sites["y"].plates, sites["y"].scale) == ((10,), ("rows",), 5.0)
    assert sites["noise"].support == "GreaterThan(lower_bound=0.0)"
    (plate,) = check.plates
    assert (plate.name, plate.size, plate.subsample_size, plate.dim, plate.scale) == ("rows", 50, 10, -1, 5.0)
    assert check.captured and check.dim == 3 and not check.reason
    assert capsys.readouterr().out == f"{check}\n"
    assert len(pyro.get_param_store()) == 0


def test_rows_with_weights_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    def model(weights: Tensor) -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(weights)), poutine.scale(scale=weights):
            pyro.sample("y", dist.Normal(x, 1.0), obs=weights)

    for weights, scale, shown in ((torch.tensor([1.0, 2.0]), math.nan, "by row"), (torch.tensor([2.0, 2.0]), 2.0, "2")):
        site = {s.name: s for s in check_model(model, weights).sites}["y"]
        assert site.scale == pytest.approx(scale, nan_ok=True)
        line = next(x for x in capsys.readouterr().out.splitlines() if x.split()[:1] == ["y"])
        assert line.rstrip().endswith(shown)


def test_a_discrete_site_that_is_summed_out_and_nested_plates() -> None:
    check = check_model(zoo.enumerated_mixture, zoo.Y)
    assert {s.name: s.kind for s in check.sites}["c"] == "discrete latent" and check.captured and check.dim == 3

    def nested() -> None:
        with pyro.plate("outer", 3, dim=-2), pyro.plate("inner", 4, dim=-1):
            pyro.sample("z", dist.Normal(0.0, 1.0))
        for i in pyro.plate("steps", 2):
            pyro.sample(f"x{i}", dist.Normal(0.0, 1.0))

    check = check_model(nested)
    assert check.sites[0].plates == ("outer", "inner") and check.sites[0].batch_shape == (3, 4)
    assert {p.name: (p.size, p.dim) for p in check.plates} == {"outer": (3, -2), "inner": (4, -1), "steps": (2, None)}


def test_it_says_why_a_model_is_not_recorded() -> None:
    def branches(y: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        scale = 1.0 if float(m) > 0 else 2.0
        pyro.sample("y", dist.Normal(m, scale).expand([3]).to_event(1), obs=y)

    check = check_model(branches, torch.zeros(3))
    assert not check.captured and check.dim == 1 and ".item()" in check.reason

    def discrete() -> None:
        pyro.sample("n", dist.Poisson(3.0))

    check = check_model(discrete)
    assert not check.captured and check.dim == 0 and "'n' is discrete" in check.reason and "not recorded" in str(check)
    check = check_model(lambda: pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0)))
    assert "no continuous latent site" in check.reason


def test_a_faulty_model_names_the_site_and_a_thing_that_is_no_model_is_refused() -> None:
    def faulty(y: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(m, 1.0).expand([3]).to_event(1), obs=y)

    with pytest.raises(ValueError, match="site 'y'") as caught:
        check_model(faulty, torch.zeros(4))
    assert "last site" in caught.value.__notes__[0]
    with pytest.raises(TypeError, match="model must be a Pyro model"):
        check_model(torch.zeros(3))  # type: ignore[arg-type]


def test_plates_are_named_from_the_outermost() -> None:
    def model() -> None:
        with pyro.plate("outer", 3, dim=-1), pyro.plate("inner", 4, dim=-2):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    assert check_model(model).sites[0].plates == ("outer", "inner")
