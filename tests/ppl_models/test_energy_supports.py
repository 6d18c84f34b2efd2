"""Energies on supports with edges and noise of light tails, against closed forms; densities relative to their noise."""

import math
from collections.abc import Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from inference import MCMC, CheckpointError, SamplerWarning
from inference.kernels import HMC
from inference.objectives.unnormalised import ContrastiveDivergence, DenoisingScoreMatching, SlicedScoreMatching
from inference.runtime.generators import generator, scoped_seed
from ppl_models import ConditionalEnergyModel, EnergyClassifier, EnergyModel
from ppl_models.compositional_ebm import (
    ConwayMaxwellPoisson,
    EnergyDistribution,
    TruncatedNormal,
    VonMises,
    classifier,
    model,
)
from ppl_models.compositional_ebm.noise import BoxNoise, DefensiveMixture, GaussianNoise, QuasiRandomNoise, auto_noise


@pytest.fixture(autouse=True)
def _own_random_numbers() -> Iterator[None]:
    with scoped_seed(0):
        yield


def half_normal() -> tuple[EnergyModel, float]:
    """exp(-x^2 / 2) on x >= 0: Z = sqrt(pi / 2)."""
    family = TruncatedNormal(0.0)
    family.fit(torch.randn(300).abs(), num_steps=1, lr=1e-9, average_last=0.0, progress=False)
    with torch.no_grad():
        family.energy.theta.copy_(torch.tensor([0.0, -0.5]))
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


@pytest.mark.parametrize(
    "noise",
    [dist.Uniform(torch.zeros(1), torch.ones(1)).to_event(1), BoxNoise(torch.zeros(1), torch.ones(1))],
    ids=["distribution", "box"],
)
def test_chains_and_annealing_of_a_tilt_of_bounded_noise(noise: Any) -> None:
    """Chains move on the support, and so does annealing.

    A distribution drew its point inside anew at each density, so that no kernel could record it; a box was not the
    support, and chains that ran into its edge stayed in the narrow parts.
    """
    x = torch.rand(400, 1, generator=generator(5, "bounded")).square() * 0.9 + 0.05
    ebm = EnergyModel(event_shape=(1,), hidden=(8,))
    ebm.fit(x, noise=noise, num_steps=60, progress=False)
    assert ebm.distribution().support.check(torch.tensor([[0.5], [1.5]])).tolist() == [True, False]
    grid = torch.linspace(0, 1, 2001)[1:-1, None]
    with torch.no_grad():
        mean = float((ebm.log_prob(grid).softmax(0) * grid[:, 0]).sum())
    drawn = ebm.sample(256, method="hmc", warmup_steps=20, thin=2)
    assert bool(((drawn > 0) & (drawn < 1)).all())
    assert float(drawn.mean()) == pytest.approx(mean, abs=0.06)  # four standard errors
    assert ebm.log_partition("ais", num_chains=64, num_temperatures=8).value == pytest.approx(ebm.log_z or 0, abs=0.05)


def test_a_mixture_reaches_as_far_as_its_wide_part() -> None:
    box, normal = BoxNoise(torch.zeros(1), torch.ones(1)), GaussianNoise(torch.zeros(1), torch.eye(1))
    for both in (DefensiveMixture(box, normal, 0.1), DefensiveMixture(normal, box, 0.1)):
        assert bool(both.support.check(torch.tensor([[-3.0]])).all())


def test_a_base_says_the_support() -> None:
    """Automatic noise stays on it; other noise may leave it, and has no mass there."""
    x = dist.Gamma(2.0, 1.0).sample((500,))
    ebm = EnergyModel(Line(), (), base=dist.Exponential(1.0))
    ebm.fit(x, num_steps=150, lr=0.02, progress=False)
    assert type(ebm.noise).__name__ == "HalfLineNoise"
    exact = -math.log(1 + float(ebm.energy.a.detach()))  # of exp(-a x) under Exponential(1)
    assert ebm.log_z == pytest.approx(exact, abs=0.02)
    with pytest.raises(ValueError, match="lie outside the model's support"):
        ebm.log_prob(-x)
    ebm.fit(x, noise=dist.Normal(2.0, 4.0), num_steps=20, progress=False)
    assert ebm.log_z == pytest.approx(-math.log(1 + float(ebm.energy.a.detach())), abs=0.03)
    inside = ebm.distribution().log_prob(torch.tensor([-1.0, 1.0])).detach()
    assert float(inside[0]) == -math.inf and math.isfinite(float(inside[1]))


class Line(nn.Module):
    """``E = a x``."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.a * x


@pytest.mark.parametrize("method", ["dsm", "ssm", "cd"])
def test_methods_without_log_z_refuse_edges_and_counts(method: str) -> None:
    """Sliced matching of a truncated normal gave theta = (2.1, -1.0) for (0.5, -0.5), without a word."""
    with pytest.raises(ValueError, match="without bounds"):
        TruncatedNormal(0.0).fit(torch.rand(50), method=method, num_steps=2, progress=False)
    with pytest.raises(ValueError, match="without bounds"):
        EnergyModel(event_shape=()).fit(torch.arange(50) % 5, method=method, num_steps=2, progress=False)
    half = EnergyDistribution(lambda x: x, (), support=constraints.positive)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", half, obs=x)

    objective = {"dsm": DenoisingScoreMatching, "ssm": SlicedScoreMatching, "cd": ContrastiveDivergence}[method]
    with pytest.raises(ValueError, match="without bounds"):
        objective(model)(torch.rand(8))


@pytest.mark.parametrize("method", ["dsm", "cd", "pcd"])
def test_methods_that_move_in_space_do_not_depend_on_units(method: str) -> None:
    """Steps are in standard deviations: in millionths or millions of a unit the fit is the same, and no other one."""
    draw = torch.randn(300, 2, generator=generator(7, "units")) * torch.tensor([1.0, 0.1])
    options = {} if method == "dsm" else {"langevin_steps": 3, "langevin_step_size": 0.02}
    found = []
    for scale, shift in ((1.0, 0.0), (1e-6, 0.0), (1e6, 1e7)):
        x = draw.double() * scale + shift
        ebm = EnergyModel(event_shape=(2,), hidden=(8,))
        ebm.fit(x, method=method, num_steps=40, progress=False, **options)
        found.append(float(ebm.log_prob(x).mean()) + 2 * math.log(scale))
    assert found[1] == pytest.approx(found[0], abs=1e-4) and found[2] == pytest.approx(found[0], abs=1e-4)


def test_a_peer_that_ran_away_is_named() -> None:
    x = torch.randn(200, 2, generator=generator(8, "away"))
    ebm = EnergyModel(event_shape=(2,), hidden=(16,))
    with pytest.warns(SamplerWarning, match="the noise does not cover the model"):
        ebm.fit(x, method="cd", lr=0.05, num_steps=150, langevin_step_size=0.5, progress=False)


def test_an_energy_without_a_sampler_is_a_latent_site_of_any_model() -> None:
    """N((0, 1), diag(1, 1/4)) as energy, and a sum that was seen as 3 +- 1; exact by conjugacy."""
    prior = EnergyDistribution(lambda z: (z[:, 0].square() + 4 * (z[:, 1] - 1).square()) / 2, (2,))

    def sums(y: Tensor) -> None:
        z = pyro.sample("z", prior)
        pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=y)

    run = MCMC(HMC(sums, step_size=0.5, num_steps=4), 150, 60, num_chains=16, seed=0, progress=False)
    drawn = run.run(torch.tensor(3.0)).get_samples()["z"]
    variance = torch.tensor([1.0, 0.25])
    gain = variance / (variance.sum() + 1)
    assert torch.allclose(drawn.mean(0), torch.tensor([0.0, 1.0]) + 2 * gain, atol=0.08)
    assert torch.allclose(drawn.var(0), variance - gain * variance, atol=0.08)


def test_a_support_is_given_again_to_load(tmp_path: Any) -> None:
    """Without it the loaded density had mass everywhere."""
    unit = constraints.interval(0.0, 1.0)
    ebm = EnergyModel(event_shape=(), base=None, support=unit, hidden=(4,))
    ebm.fit(torch.rand(100), num_steps=3, progress=False)
    ebm.save(tmp_path / "unit")
    with pytest.raises(CheckpointError, match=r"support=\.\.\."):
        EnergyModel.load(tmp_path / "unit")
    again = EnergyModel.load(tmp_path / "unit", support=unit)
    with pytest.raises(ValueError, match="outside the model's support"):
        again.log_prob(torch.tensor([2.0]))
    family = TruncatedNormal(0.0)
    family.fit(torch.rand(50), num_steps=3, progress=False)
    family.save(tmp_path / "family")  # whose name says the support
    assert TruncatedNormal.load(tmp_path / "family").log_z == family.log_z


def test_a_truncated_normal_in_any_unit() -> None:
    """From theta = (0, -0.5) in the data's own unit the fit ended elsewhere in tens, far off in thousandths, and in the
    collapse error in thousands."""
    draw = 0.5 + torch.randn(3000, generator=generator(14, "unit"), dtype=torch.float64)
    found = []
    for scale in (1.0, 1e-3, 1e3):
        family = TruncatedNormal(0.0)
        family.fit(draw[draw > 0] * scale, num_steps=200, progress=False)
        found.append((family.location / scale, family.scale / scale, family.log_z - math.log(scale)))
    assert found[1] == pytest.approx(found[0], abs=1e-6) and found[2] == pytest.approx(found[0], abs=1e-6)
    assert found[0][0] == pytest.approx(0.5, abs=0.25) and found[0][1] == pytest.approx(1.0, abs=0.1)
    assert family.log_partition("quadrature", 4000).value == pytest.approx(family.log_z, abs=0.01)
    far, family = 300 + 3 * draw[:1000], TruncatedNormal(-math.inf)
    result = family.fit(far, num_steps=200, progress=False)
    assert family.location == pytest.approx(float(far.mean()), abs=0.05)
    assert family.scale == pytest.approx(float(far.std()), rel=0.01)
    t1, t2 = family.theta.tolist()
    exact = -(t1**2) / (4 * t2) + 0.5 * math.log(math.pi / -t2)
    assert family.log_z == pytest.approx(exact, abs=0.01) and result.log_partition is not None
    assert (
        result.log_partition.value == family.log_z and result.log_partition.lower < exact < result.log_partition.upper
    )
    assert float(result.history["log_partition"][-1]) == pytest.approx(exact, abs=0.05)
    with pytest.raises(ValueError, match="the same in every row"):
        family.fit(torch.full((20,), 0.7), progress=False)


def test_families_of_statistics_of_unlike_size() -> None:
    """Large counts and narrow angles: 4.3 and 0.4 nats off before, without a word, or the collapse error."""
    counts = torch.poisson(torch.full((800,), 60.0))
    k = torch.arange(400.0)
    for x in (counts, (counts / 2).round()):
        family = ConwayMaxwellPoisson()
        family.fit(x, num_steps=150, progress=False)
        p = family.log_prob(k).double().exp()
        assert float(p.sum()) == pytest.approx(1.0, abs=0.01)
        p, mean = p / p.sum(), float(x.mean())
        # the likelihood's equations, to a good approximation: the data's mean and variance come back
        assert float((p * k).sum()) == pytest.approx(mean, abs=0.1 * float(x.std()))
        assert float((p * (k - mean).square()).sum()) == pytest.approx(float(x.var()), rel=0.15)
    angles = dist.VonMises(torch.tensor(1.0), torch.tensor(30.0)).sample((800,))
    family = VonMises()
    family.fit(angles, num_steps=150, progress=False)
    best = float(dist.VonMises(family.location, family.concentration).log_prob(angles).mean())
    assert float(family.log_prob(angles).mean()) == pytest.approx(best, abs=0.02)
    assert family.concentration == pytest.approx(30.0, rel=0.15)


def test_large_counts_are_covered() -> None:
    """1.3 times a mean of 500 lies seven standard deviations above it."""
    x = torch.poisson(torch.full((400,), 500.0))
    noise = auto_noise(x)
    weights = noise.log_prob(x) - dist.Poisson(500.0).log_prob(x)
    assert float(weights.min()) > -1.5


def test_queries_in_another_precision() -> None:
    ebm, x = EnergyModel(event_shape=(2,), hidden=(4,)), torch.randn(50, 2, generator=generator(13, "precision"))
    ebm.fit(x, num_steps=2, progress=False)
    assert torch.equal(ebm.log_prob(x.double()), ebm.log_prob(x))
    assert torch.equal(ebm.log_prob(x.double().numpy()), ebm.log_prob(x))


def test_a_callable_noise_has_no_other_latents() -> None:
    """Its density of x was that given a fresh draw of them, so that log Z was wrong."""

    def two() -> None:
        side = pyro.sample("side", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(4 * side - 2, 1.0))

    with pytest.raises(ValueError, match=r"alone, it has \['side'\] too"):
        EnergyModel(event_shape=()).fit(torch.randn(50), noise=two, progress=False)


def test_noise_for_columns_of_unlike_units() -> None:
    """A ridge of a millionth of the mean variance made the small column's noise a thousand times too wide."""
    scale = torch.tensor([1e6, 1e-6, 1.0])
    x = torch.randn(400, 3, generator=generator(12, "unlike"))
    found = GaussianNoise.fit(x * scale, inflation=1.0)
    assert torch.allclose(found.factor / scale[:, None], GaussianNoise.fit(x, 1.0).factor, rtol=1e-3, atol=1e-4)
    constant = torch.cat([x, torch.full((400, 1), 3.3)], 1)
    assert float(GaussianNoise.fit(constant).factor[3, 3]) == pytest.approx(1.3e-3, rel=0.2)
    same = GaussianNoise.fit(torch.full((50, 2), 0.5))
    assert bool(torch.isfinite(same.log_prob(same.draw(5))).all())


def test_a_fit_below_its_own_noise_is_named() -> None:
    """As fits of log-normal data were, hundreds of nats below the truth with a sound Pareto k, without a word.

    Here E = 20 x^2 / 2 as it starts: ten nats, less log E_q exp(-10 x^2).
    """
    x, energy = torch.randn(300, 1, generator=generator(15, "below")), Square()
    with torch.no_grad():
        energy.a.fill_(20.0)
    with pytest.warns(SamplerWarning, match=r"(8|9)\.\d+ nats a row below the noise that it started from"):
        EnergyModel(energy, (1,)).fit(x, num_steps=1, lr=1e-9, progress=False)


def test_one_row_is_no_density() -> None:
    with pytest.raises(ValueError, match="one row has no spread"):
        EnergyModel(event_shape=(2,)).fit(torch.randn(1, 2), progress=False)
    with pytest.raises(ValueError, match="one row has no spread"):
        ConditionalEnergyModel().fit(torch.randn(1), torch.randn(1), progress=False)
    with pytest.raises(ValueError, match="the same in every row"):
        EnergyClassifier(num_classes=2).fit(torch.ones(20, 3), torch.arange(20) % 2, progress=False)


def test_noise_of_a_users_own_is_given_again_to_all_models(tmp_path: Any) -> None:
    """``save`` refused what ``load`` was said to take."""
    x = torch.randn(60, 2, generator=generator(10, "files"))
    law = dist.Normal(torch.zeros(2), 2.0).to_event(1)
    clf, reg = EnergyClassifier(num_classes=2, hidden=(4,)), ConditionalEnergyModel(hidden=(4,))
    clf.fit(x, (x[:, 0] > 0).long(), noise=law, num_steps=3, progress=False)
    reg.fit(x[:, 0], x[:, 1], noise=dist.Normal(0.0, 2.0), num_steps=3, progress=False)  # over numbers, as y is
    for ebm, noise in ((clf, law), (reg, dist.Normal(torch.zeros(1), 2.0).to_event(1))):
        ebm.save(tmp_path / "model")
        with pytest.raises(ValueError, match="noise that a file cannot hold"):
            type(ebm).load(tmp_path / "model")
        again = type(ebm).load(tmp_path / "model", noise=noise)
        at = (x,) if ebm is clf else (x[:, 1], x[:, 0])
        assert torch.equal(again.log_prob(*at), ebm.log_prob(*at))


def test_laws_that_were_expanded_can_be_recorded() -> None:
    """Their own checks of arguments read values back: Python in each step of fits and chains, and a warning."""
    x = torch.rand(100, 2, generator=generator(11, "expanded"))
    law = dist.Normal(0.0, 2.0).expand([2]).to_event(1)
    ebm = EnergyModel(event_shape=(2,), base=law, hidden=(4,))
    ebm.fit(x, noise=law, num_steps=3, progress=False)  # a CaptureWarning is an error here
    assert ebm.sample(8, method="hmc", warmup_steps=4, thin=1).shape == (8, 2)


class LinearRegression(nn.Module):
    """``y ~ N(2 x, 1 / precision)``."""

    def __init__(self) -> None:
        super().__init__()
        self.precision = nn.Parameter(torch.tensor(4.0))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.precision / 2 * (y - 2 * x).square().sum(1)


def test_a_conditional_law_that_the_grid_does_not_hold_is_named() -> None:
    """Far from the fit's y, and narrower than the grid is fine, log p came out at 101 and 43 for -0.23 and 5.30."""
    x = torch.rand(200, generator=generator(9, "line")) * 4 - 2
    energy = LinearRegression()
    model = ConditionalEnergyModel(energy, base=None)
    model.fit(x, 2 * x + 0.5 * torch.randn(200), lr=1e-7, num_steps=1, progress=False)
    exact = -math.log(0.5 * math.sqrt(2 * math.pi))
    assert float(model.log_prob(torch.tensor([4.0]), torch.tensor([2.0])).detach()) == pytest.approx(exact, abs=1e-3)
    with pytest.warns(SamplerWarning, match=r"beyond the noise's range at 1 of 2 x \(the first is row 1\)"):
        model.log_prob(torch.tensor([4.0, 20.0]), torch.tensor([2.0, 10.0]))
    with torch.no_grad():
        energy.precision.fill_(0.002**-2)
    with pytest.warns(SamplerWarning, match="narrower than the points are apart"):
        model.sample(torch.tensor([1.0]), 3)


@pytest.mark.parametrize("column", [0, 1])
def test_whole_numbers_that_single_precision_cannot_tell_apart_are_refused(column: int) -> None:
    x = torch.arange(200).reshape(100, 2)
    x[:, column] += 10**10
    for fit in (EnergyModel(event_shape=(2,)).fit, lambda rows: ConditionalEnergyModel().fit(rows, rows)):
        with pytest.raises(ValueError, match=f"x varies by .* column {column}, which float32 cannot tell apart"):
            fit(x)
    with pytest.raises(ValueError, match=f"column {column}, which float32 cannot tell apart"):
        EnergyClassifier(2).fit(x, torch.arange(100) % 2)
