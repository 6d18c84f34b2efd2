"""Energies on supports with edges and noise of light tails, against closed forms; densities relative to their noise."""

import math
from collections.abc import Iterator
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from inference import SamplerWarning
from inference.runtime.generators import generator, scoped_seed
from ppl_models import EnergyClassifier, EnergyModel
from ppl_models.compositional_ebm import TruncatedNormal, VonMises, classifier, model
from ppl_models.compositional_ebm.noise import GaussianNoise, QuasiRandomNoise, auto_noise


@pytest.fixture(autouse=True)
def _own_random_numbers() -> Iterator[None]:
    with scoped_seed(0):
        yield


def half_normal() -> tuple[EnergyModel, float]:
    """exp(-x^2 / 2) on x >= 0: Z = sqrt(pi / 2)."""
    family = TruncatedNormal(0.0)
    family.fit(torch.randn(300).abs(), num_steps=1, lr=1e-9, average_last=0.0, progress=False)
    return family, 0.5 * math.log(math.pi / 2)


def von_mises() -> tuple[EnergyModel, float]:
    """exp(2 cos x) from -pi to pi: Z = 2 pi I_0(2)."""
    family = VonMises()
    family.fit(torch.rand(300) * 6 - 3, num_steps=1, lr=1e-9, average_last=0.0, progress=False)
    with torch.no_grad():
        family.energy.theta.copy_(torch.tensor([2.0, 0.0]))
    return family, math.log(2 * math.pi * float(torch.special.i0(torch.tensor(2.0))))


@pytest.mark.parametrize("make", [half_normal, von_mises])
def test_annealing_and_bridge_know_the_edges(make: Any) -> None:
    """In raw space the moves would leave the support, and Z would count what lies outside: twice as much here."""
    family, exact = make()
    sandwich = family.log_partition("ais", num_chains=1024, num_temperatures=16)
    assert abs(sandwich.value - exact) < 0.05
    assert sandwich.lower < exact + 0.05 and sandwich.upper > exact - 0.05
    bridge = family.log_partition("bridge", num_draws=20, num_chains=32)
    assert abs(bridge.value - exact) < 0.1
    drawn = family.sample(400, method="annealed", seed=1)
    assert drawn.shape == (400,) and bool(family._law(None).support.check(drawn).all())
    mean = math.sqrt(2 / math.pi) if make is half_normal else 0.0
    assert abs(float(drawn.mean()) - mean) < 0.15


def test_a_box_in_two_dimensions() -> None:
    x = dist.Beta(2.0, 3.0).sample((500, 2))
    ebm = EnergyModel(event_shape=(2,), hidden=(16,), support=constraints.interval(0.0, 1.0))
    ebm.fit(x, num_steps=40, progress=False)
    exact = ebm.log_partition("quadrature", 40_000).value
    assert abs(ebm.log_partition("ais", num_chains=128, num_temperatures=8).value - exact) < 0.05
    drawn = ebm.sample(300, method="annealed")
    assert drawn.shape == (300, 2) and bool(((drawn >= 0) & (drawn <= 1)).all())


def test_noise_that_reaches_beyond_the_support() -> None:
    """Normal noise on both sides of the cut: what falls outside has no mass, in the fit and in log Z."""
    draw = torch.randn(20_000, generator=generator(1, "cut")) + 0.5
    x = draw[draw > 0][:2000]
    family = TruncatedNormal(0.0)
    family.fit(x, noise=dist.Normal(0.5, 1.5), num_steps=350, progress=False)
    grid = torch.linspace(0, 12, 20_001, dtype=torch.float64)
    theta = family.theta.double()
    values = theta[0] * grid + theta[1] * grid**2
    assert family.log_z == pytest.approx(float(values.logsumexp(0) + (grid[1] - grid[0]).log()), abs=0.03)
    assert float((values.softmax(0) * grid).sum()) == pytest.approx(float(x.mean()), abs=0.03)
    assert float(family.log_prob(torch.tensor([0.5]))) > -3
    with pytest.raises(ValueError, match="annealing needs noise on the support"):
        family.log_partition("ais")


class Square(nn.Module):
    """``E = a x^2 / 2``."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.a * x.square().sum(1) / 2


def test_noise_with_too_light_a_tail_is_named_to_the_user() -> None:
    """N(0, 1) from N(0, 0.3^2): the weights' tail has k = 1 - 0.3^2 = 0.91; 100,000 draws show 0.76 to 0.88."""
    ebm, x = EnergyModel(Square(), (1,), base=None), torch.randn(200, 1) * 0.3
    noise = GaussianNoise(torch.zeros(1), 0.3 * torch.eye(1))
    with pytest.warns(SamplerWarning, match=r"Pareto k = 0\.[78]\d > 0.7: the noise does not cover the model"):
        ebm.fit(x, noise=noise, noise_samples=4096, num_steps=2, lr=1e-6, on_collapse="ignore", progress=False)
    with pytest.warns(SamplerWarning, match=r"Pareto k = 0\.[78]\d > 0.7: neither log Z nor its error"):
        found = ebm.log_partition("importance", 100_000)
    assert found.khat == pytest.approx(0.85, abs=0.1)


@pytest.mark.parametrize("method", ["compositional", "nce", "snl"])
def test_densities_relative_to_the_noise_give_the_same_fit(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise's density is left out of the steps; losses and fit are as with it, to rounding."""
    x = torch.randn(300, 5, generator=generator(2, "relative"))

    def run() -> tuple[dict[str, Tensor], Tensor]:
        ebm = EnergyModel(event_shape=(5,), hidden=(16,))
        result = ebm.fit(x, method=method, num_steps=25, batch_size=64, valid=x[:50], progress=False)
        return result.history, ebm.log_prob(x)

    history, log_p = run()
    monkeypatch.setattr(model, "relative", lambda *a: False)
    other, other_p = run()
    assert set(history) == set(other)
    for name, values in history.items():
        assert torch.allclose(values, other[name], atol=2e-4), name
    assert torch.allclose(log_p, other_p, atol=1e-3)


def test_a_classifier_relative_to_its_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(200, 5, generator=generator(3, "relative")), torch.arange(200) % 2

    def run() -> tuple[Tensor, Tensor]:
        clf = EnergyClassifier(num_classes=2, num_components=3, hidden=(8,))
        result = clf.fit(x, y, num_steps=20, progress=False)
        return result.history["loss"], clf.log_prob(x, y)

    found = run()
    monkeypatch.setattr(classifier, "relative", lambda *a: False)
    for mine, other in zip(found, run(), strict=True):
        assert torch.allclose(mine, other, atol=1e-3)


def test_even_noise_in_a_fit_and_a_file(tmp_path: Any) -> None:
    x = torch.randn(300, 2) * torch.tensor([1.0, 2.0])
    ebm = EnergyModel(event_shape=(2,), hidden=(16,))
    ebm.fit(x, noise=QuasiRandomNoise(auto_noise(x)), num_steps=20, batch_size=100, progress=False)
    ebm.save(tmp_path / "even")
    again = EnergyModel.load(tmp_path / "even")
    assert torch.equal(again.log_prob(x), ebm.log_prob(x))
    assert torch.equal(again.sample(5, method="sir"), ebm.sample(5, method="sir"))
    found = ebm.log_partition("importance", 4000)
    # the error is that of independent draws, which the formula is for
    assert abs(found.value - ebm.log_partition("quadrature", 40_000).value) < 4 * found.standard_error + 1e-3


def test_discrete_noise_of_a_users_own_is_given_to_load(tmp_path) -> None:
    """Such noise cannot be in a file; counts are whole numbers, which half a one is not."""
    torch.manual_seed(0)
    counts = torch.poisson(torch.full((200, 2), 3.0))
    noise = dist.NegativeBinomial(torch.tensor([4.0, 4.0]), logits=torch.zeros(2)).to_event(1)
    model = EnergyModel(event_shape=(2,))
    model.fit(counts, noise=noise, num_steps=10, progress=False)
    model.save(tmp_path / "counts")
    loaded = EnergyModel.load(tmp_path / "counts", noise=noise)
    torch.testing.assert_close(loaded.log_prob(counts[:5]), model.log_prob(counts[:5]))
    with pytest.raises(ValueError, match="event shape"):
        EnergyModel.load(tmp_path / "counts", noise=dist.Poisson(torch.ones(3)).to_event(1))
