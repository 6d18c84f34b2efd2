"""Energy models against closed forms and quadrature; queries, files, bad input."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from inference import CheckpointError, CollapseError, NonFiniteError
from inference.runtime.generators import generator, scoped_seed
from ppl_models import ConditionalEnergyModel, EnergyClassifier, EnergyModel
from ppl_models.compositional_ebm import (
    Boltzmann,
    ConwayMaxwellPoisson,
    EnergyDistribution,
    LatentEnergyPrior,
    TruncatedNormal,
    VonMises,
    sample_posterior,
)
from ppl_models.compositional_ebm.noise import (
    BernoulliNoise,
    BoxNoise,
    DefensiveMixture,
    FlowNoise,
    GaussianNoise,
    HalfLineNoise,
    KernelNoise,
    MixtureNoise,
    NegativeBinomialNoise,
    PoissonNoise,
)
from tests.accelerator import fake_accelerator


@pytest.fixture(autouse=True)
def _own_random_numbers() -> Iterator[None]:
    with scoped_seed(0):
        yield


def eight_gaussians(n: int, seed: int) -> Tensor:
    """Centres at radius 2 sqrt 2, standard deviation 0.5 / sqrt 2."""
    draw = generator(seed, "toy")
    angle = torch.randint(8, (n,), generator=draw) * math.pi / 4
    centre = 2 * math.sqrt(2) * torch.stack([angle.cos(), angle.sin()], 1)
    return centre + 0.5 / math.sqrt(2) * torch.randn(n, 2, generator=draw)


def true_log_prob(x: Tensor) -> Tensor:
    angle = torch.arange(8) * math.pi / 4
    centre = 2 * math.sqrt(2) * torch.stack([angle.cos(), angle.sin()], 1)
    return dist.Normal(centre, 0.5 / math.sqrt(2)).to_event(1).log_prob(x[:, None]).logsumexp(1) - math.log(8)


class Well(nn.Module):
    """``E = a (x^2 - 1)^2`` summed over coordinates."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.a * (x.square() - 1).square().reshape(len(x), -1).sum(1)


@pytest.fixture(scope="module")
def fitted() -> EnergyModel:
    """A short fit of the default network, shared by the tests of the queries."""
    ebm = EnergyModel(event_shape=(2,))
    ebm.fit(eight_gaussians(3000, 0), num_steps=500, valid=eight_gaussians(500, 1), progress=False)
    return ebm


# ---------------------------------------------------------------- the density
def test_a_fitted_density_is_near_the_truth_and_never_above(fitted: EnergyModel) -> None:
    """8 Gaussians: the normal that is tilted scores -4.6; the truth is never passed by a right normaliser."""
    x = eight_gaussians(2000, 2)
    found, truth = float(fitted.log_prob(x).mean()), float(true_log_prob(x).mean())
    assert truth - 0.25 < found < truth + 0.01
    result = fitted.result
    assert result is not None and result.log_partition is not None
    assert len(result.history["log_partition"]) == len(result.history["ess"]) == 500
    assert float(result.history["validation_loss"][-1]) < float(result.history["validation_loss"][0])
    assert "log Z" in result.summary()
    assert result.to_arviz() is not None


def test_log_z_five_ways(fitted: EnergyModel) -> None:
    exact = fitted.log_partition("quadrature", 90_000)
    assert exact.standard_error < 1e-3
    found = fitted.log_partition("importance", 20_000, seed=1)
    assert abs(found.value - exact.value) < 4 * found.standard_error
    assert 0 < found.standard_error < 0.05 and found.ess > 500 and found.khat < 0.7
    # apart from two standard errors on either side the bounds are close
    assert found.lower <= found.value <= found.upper < found.lower + 4 * found.standard_error + 0.05
    sandwich = fitted.log_partition("ais", num_chains=128, num_temperatures=16)
    assert abs(sandwich.value - exact.value) < 0.15
    bridge = fitted.log_partition("bridge", num_draws=16, num_chains=32)
    assert abs(bridge.value - exact.value) < 0.3
    grid = torch.cartesian_prod(*[torch.linspace(-7, 7, 200)] * 2)
    assert float(fitted.log_prob(grid).exp().sum()) * (14 / 199) ** 2 == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("method", ["sir", "hmc", "sgld", "annealed"])
def test_draws_have_the_models_moments(fitted: EnergyModel, method: str) -> None:
    options: dict[str, Any] = {"warmup_steps": 60, "thin": 2} if method in ("hmc", "sgld") else {}
    drawn = fitted.sample(600, method=method, seed=3, **options)
    assert drawn.shape == (600, 2)
    # the radius is 2.83 in all eight modes; a chain of the wrong sign or temperature leaves it
    assert abs(float(drawn.norm(dim=1).mean()) - 2.86) < 0.2
    assert float(drawn.norm(dim=1).std()) < 0.65
    own = fitted.sample(20_000, method="sir", seed=4).mean(0)
    assert float((drawn.mean(0) - own).abs().max()) < 0.35
    if method == "sir":
        assert torch.equal(drawn, fitted.sample(600, method=method, seed=3))


def test_langevin_draws_of_columns_in_other_units() -> None:
    """One step size for all numbers: chosen by the column of large unit, it widened the other (1.7 for 1)."""
    scale = torch.tensor([1.0, 100.0])
    x = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0)) * scale
    ebm = EnergyModel(event_shape=(2,))
    ebm.fit(x, num_steps=100, progress=False)
    found, exact = (ebm.sample(2000, method=method).std(0) for method in ("sgld", "hmc"))
    assert ((found / exact - 1).abs() < 0.12).all()


def test_the_distribution_serves_in_any_pyro_model(fitted: EnergyModel) -> None:
    law = fitted.distribution()
    assert law.normalized and law.event_shape == (2,)
    x = eight_gaussians(5, 3)
    assert torch.allclose(law.log_prob(x), fitted.log_prob(x))

    def model() -> Tensor:
        with pyro.plate("rows", 7):
            z = pyro.sample("z", law)
        return pyro.sample("y", dist.Normal(z.sum(), 1.0))

    trace = pyro.poutine.trace(model).get_trace()
    assert trace.nodes["z"]["value"].shape == (7, 2)
    assert bool(torch.isfinite(trace.log_prob_sum()))
    assert law.expand((3,)).sample((4,)).shape == (4, 3, 2)


def test_energies_of_ones_own_without_a_base() -> None:
    """p ~ exp(-(x^2 - 1)^2) in each of two coordinates: log Z is twice the one-dimensional integral's 0.679926."""
    exact = 2 * 0.6799263
    truth = Well()
    ebm = EnergyModel(truth, (2,), base=None)
    x = torch.randn(400, 2, generator=generator(4, "well")) * 0.9
    ebm.fit(x, noise=dist.Normal(torch.zeros(2), 1.5).to_event(1), num_steps=2, lr=1e-8, progress=False)
    assert ebm.log_partition("quadrature", 40_000).value == pytest.approx(exact, abs=1e-3)
    assert ebm.log_z == pytest.approx(exact, abs=0.02)
    found = ebm.log_partition("ais", num_chains=200, num_temperatures=32)
    assert abs(found.value - exact) < 0.12


@pytest.mark.parametrize("method", ["nce", "snl", "mle", "ssm", "pcd", "short_run"])
def test_all_methods_run(method: str) -> None:
    ebm = EnergyModel(event_shape=(2,), hidden=(16,))
    ebm.fit(eight_gaussians(200, 5), method=method, num_steps=3, batch_size=50, progress=False)
    assert bool(torch.isfinite(ebm.log_prob(eight_gaussians(5, 6))).all())


# ---------------------------------------------------------------- families
def test_a_truncated_normal_is_found_where_moments_are_wrong() -> None:
    """N(0.5, 1) cut at 0: the likelihood by quadrature; the naive mean and variance are about (1.0, 0.48)."""
    draw = torch.randn(40_000, generator=generator(6, "cut"), dtype=torch.float64) + 0.5
    x = draw[draw > 0][:3000].float()
    family = TruncatedNormal(0.0)
    family.fit(x, num_steps=500, progress=False)
    grid = torch.linspace(0, 15, 20_001, dtype=torch.float64)
    theta = family.theta.double()
    weights = (theta[0] * grid + theta[1] * grid**2).softmax(0)
    # the maximum of the likelihood is where the model's moments are the data's
    assert float((weights * grid).sum()) == pytest.approx(float(x.mean()), abs=0.02)
    assert float((weights * grid**2).sum()) == pytest.approx(float(x.square().mean()), abs=0.05)
    assert abs(family.location - 0.5) < 0.25 and abs(family.location - float(x.mean())) > 0.2
    log_z = float(torch.logsumexp(theta[0] * grid + theta[1] * grid**2, 0) + (grid[1] - grid[0]).log())
    assert family.log_z == pytest.approx(log_z, abs=0.03)


def test_von_mises() -> None:
    x = dist.VonMises(torch.tensor(1.0), torch.tensor(2.0)).sample((2000,))
    family = VonMises()
    family.fit(x, num_steps=300, progress=False)
    assert abs(family.concentration - 2.0) < 0.2 and abs(family.location - 1.0) < 0.1
    exact = math.log(2 * math.pi * float(torch.special.i0(torch.tensor(family.concentration))))
    assert family.log_z == pytest.approx(exact, abs=0.02)


def test_conway_maxwell_poisson_counts() -> None:
    """lambda = 6, nu = 1.5: moments of the fit by the series are the data's."""
    k = torch.arange(200.0, dtype=torch.float64)
    p = (k * math.log(6.0) - 1.5 * torch.lgamma(k + 1)).softmax(0)
    x = torch.multinomial(p, 3000, replacement=True).float()
    family = ConwayMaxwellPoisson()
    family.fit(x, num_steps=450, progress=False)
    theta = family.theta.double()
    q = (k * theta[0] - torch.lgamma(k + 1) * theta[1]).softmax(0)
    assert float((q * k).sum()) == pytest.approx(float(x.mean()), abs=0.03)
    assert abs(family.dispersion - 1.5) < 0.25
    assert family.sample(50, method="sir").shape == (50,)
    with pytest.raises(ValueError, match="discrete"):
        family.sample(5, method="hmc")


def test_boltzmann_machine_by_enumeration() -> None:
    states = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4)
    truth = Boltzmann(4)
    weights = 0.8 * torch.randn(10, generator=generator(7, "boltzmann"))
    p = (truth.energy.statistics(states) @ weights).softmax(0)
    x = states[torch.multinomial(p, 4000, replacement=True)]
    machine = Boltzmann(4)
    machine.fit(x, num_steps=300, progress=False)
    scores = machine.energy.statistics(states) @ machine.theta
    assert machine.log_z == pytest.approx(float(torch.logsumexp(scores, 0)), abs=0.02)
    data_means = machine.energy.statistics(x).mean(0)
    model_means = (scores.softmax(0)[:, None] * machine.energy.statistics(states)).sum(0)
    assert float((data_means - model_means).abs().max()) < 0.03


# ---------------------------------------------------------------- noise


def test_noise_models_are_normalised_and_draw_what_they_say() -> None:
    x = eight_gaussians(1000, 8)
    grid = torch.cartesian_prod(*[torch.linspace(-12, 12, 121)] * 2)
    for noise in (
        GaussianNoise.fit(x),
        BoxNoise.fit(x),
        KernelNoise(x),
        MixtureNoise.fit(x, 8),
        FlowNoise(2, shift=x.mean(0), scale=x.std(0)),
        FlowNoise(2, kind="affine"),
        DefensiveMixture(MixtureNoise.fit(x, 8), GaussianNoise.fit(x), 0.2),
    ):
        # as a file gives them back: products over another layout in memory differ in the last bit
        assert all(b.is_contiguous() for b in noise.buffers()), type(noise)
        with torch.no_grad():
            assert float(noise.log_prob(grid).exp().sum()) * 0.04 == pytest.approx(1.0, abs=0.05), type(noise)
            drawn = noise.draw(4000)
            # E_q[-log q] by draws and by the grid
            log_q = noise.log_prob(grid)
            entropy = float(-(log_q.exp() * log_q.clamp(min=-100)).sum()) * 0.04
            assert float(-noise.log_prob(drawn).mean()) == pytest.approx(entropy, abs=0.12), type(noise)
    assert float(MixtureNoise.fit(x, 8).log_prob(x).mean()) > -2.95
    half = HalfLineNoise.fit(torch.rand(50, 1) + 2.0, low=2.0)
    edges = torch.linspace(2.0, 30.0, 200_001)[:, None]
    assert float(half.log_prob(edges).exp().sum()) * (28 / 200_000) == pytest.approx(1.0, abs=1e-3)
    assert float(half.log_prob(torch.tensor([[1.9]]))) == -math.inf
    counts, bits = PoissonNoise(torch.tensor([2.0])), BernoulliNoise(torch.tensor([0.3]))
    assert float(counts.log_prob(torch.arange(60.0)[:, None]).exp().sum()) == pytest.approx(1.0, abs=1e-5)
    assert float(bits.log_prob(torch.arange(2.0)[:, None]).exp().sum()) == pytest.approx(1.0, abs=1e-6)
    spread = NegativeBinomialNoise.fit(torch.tensor([[0.0, 4.0], [40.0, 4.0]]), inflation=1.5)  # mean 20, deviation 20
    law = dist.GammaPoisson(20.0**2 / (900 - 20), 20.0 / (900 - 20))
    many = torch.arange(2000.0)
    found = spread.log_prob(torch.stack([many, torch.zeros_like(many)], 1)) - spread.log_prob(torch.zeros(1, 2))
    torch.testing.assert_close(found, law.log_prob(many) - law.log_prob(torch.tensor(0.0)), rtol=1e-4, atol=1e-3)
    drawn = spread.draw(40_000)
    assert drawn.mean(0).tolist() == pytest.approx([20, 4], rel=0.04)  # four standard errors are 0.6 and 0.04
    assert drawn.var(0).tolist() == pytest.approx([900, 4], rel=0.1)


def test_flow_noise_learns_while_the_tilt_stays() -> None:
    ebm = EnergyModel(event_shape=(2,), hidden=(16,))
    x = eight_gaussians(300, 9)
    flow = FlowNoise(2, 1, "affine", shift=x.mean(0), scale=x.std(0))
    before = float(flow.log_prob(x).detach().mean())
    ebm.fit(x, noise=flow, num_steps=40, adapt="data", lr=0.01, progress=False)
    assert ebm.tilt is not ebm.noise
    assert float(flow.log_prob(x).detach().mean()) > before
    assert ebm.tilt is not None and float(ebm.tilt.log_prob(x).detach().mean()) == pytest.approx(before, abs=1e-4)


# ---------------------------------------------------------------- classifier, conditional, latent, posterior
@pytest.fixture(scope="module")
def classifier() -> tuple[EnergyClassifier, Tensor, Tensor]:
    """Three normal clusters in six dimensions."""
    draw = generator(10, "clusters")
    y = torch.randint(3, (600,), generator=draw)
    x = torch.randn(600, 6, generator=draw) * 0.5 + 2 * torch.eye(3, 6)[y]
    clf = EnergyClassifier(num_classes=3, num_components=4, hidden=(32,))
    clf.fit(x[:450], y[:450], num_steps=250, progress=False)
    return clf, x[450:], y[450:]


def test_classifier(classifier: tuple[EnergyClassifier, Tensor, Tensor]) -> None:
    clf, x, y = classifier
    probabilities = clf.predict_proba(x)
    assert probabilities.shape == (150, 3) and torch.allclose(probabilities.sum(1), torch.ones(150))
    assert float((clf.predict(x) == y).float().mean()) > 0.95
    assert float(clf.ood_score(x + 6.0).min()) > float(clf.ood_score(x).median())
    joint = torch.stack([clf.log_prob(x, torch.full((150,), k)) for k in range(3)])
    assert torch.allclose(joint.logsumexp(0), clf.log_prob(x), atol=1e-4)
    # the density is normalised: importance sampling from another law than the one it was fitted with
    wide = GaussianNoise(torch.zeros(4), 1.5 * torch.eye(4))
    z = wide.draw(60_000)
    with torch.no_grad():
        ratio = clf._law(clf.log_z).log_prob(z) - wide.log_prob(z)
    assert float(ratio.exp().mean()) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("normaliser", ["table", "network", "minibatch", "joint"])
def test_conditional_energies_find_two_branches(normaliser: str) -> None:
    """y = +-x with noise 0.2: the best normal law scores about -1.1 where |x| is 1."""
    draw = generator(11, "branches")
    x = torch.rand(300, generator=draw) * 2 - 1
    sign = torch.randint(0, 2, (300,), generator=draw) * 2 - 1
    y = sign * x + 0.2 * torch.randn(300, generator=draw)
    model = ConditionalEnergyModel(normaliser=normaliser, hidden=(32,))
    model.fit(x, y, noise_samples=32, batch_size=32, num_steps=150, lr=1e-2, progress=False)
    fresh = torch.rand(300, generator=draw) * 2 - 1  # on data that it has not seen no law beats the truth
    answer = (torch.randint(0, 2, (300,), generator=draw) * 2 - 1) * fresh + 0.2 * torch.randn(300, generator=draw)
    scores = model.log_prob(answer, fresh)
    assert scores.shape == (300,)
    branch = torch.stack([dist.Normal(s * fresh, 0.2).log_prob(answer) for s in (1.0, -1.0)])
    truth = float(branch.logsumexp(0).mean()) - math.log(2)
    assert truth - 0.5 < float(scores.mean()) < truth + 0.05
    at = torch.tensor([-0.9, 0.9])
    drawn = model.sample(at, 400, seed=1)
    assert drawn.shape == (400, 2)
    assert float((drawn.abs() - 0.9).abs().median()) < 0.25
    grid = torch.linspace(-4, 4, 2001)
    density = model.log_prob(grid, torch.full((2001,), 0.5)).exp()
    assert float(density.sum()) * (8 / 2000) == pytest.approx(1.0, abs=0.03)
    predicted = model.predict(at, num_samples=500)
    assert predicted.mean.shape == (2,) and predicted.quantiles.shape == (3, 2)


def test_latent_prior_closes_the_gap() -> None:
    """Codes from N(1, 0.5^2) per coordinate under an N(0, 1) prior: the gain is the KL between them."""
    mean = torch.ones(800, 2)
    prior = LatentEnergyPrior(2, hidden=(32,))
    prior.fit(mean, 0.5 * torch.ones(800, 2), num_steps=300, lr=5e-3, weight_decay=0.0, progress=False)
    z = mean + 0.5 * torch.randn(800, 2)
    exact = 2 * float(torch.distributions.kl_divergence(dist.Normal(1.0, 0.5), dist.Normal(0.0, 1.0)))
    assert exact - 0.15 < prior.bound_gain(z) < exact + 0.06


def test_posterior_of_the_parameters() -> None:
    """exp(t1 x + t2 x^2) with 400 data: the posterior's spread of the mean is 1 / sqrt(400)."""
    x = 0.5 + torch.randn(400, generator=generator(12, "posterior"))
    family = TruncatedNormal(-math.inf)
    family.fit(x, num_steps=300, progress=False)
    found = sample_posterior(
        family, x, 200, 200, num_chains=2, step_size=0.02, batch_size=None, pool_size=3000, thin=4, progress=False
    )
    theta = found.parameters["theta"]
    assert theta.shape == (2, 200, 2)
    mean = -theta[..., 0] / (2 * theta[..., 1])
    assert abs(float(mean.mean()) - float(x.mean())) < 0.05
    assert 0.03 < float(mean.std()) < 0.09
    assert found.log_partition.shape == (2, 200)
    assert found.to_arviz() is not None


# ---------------------------------------------------------------- files
def test_saved_models_give_the_same(
    fitted: EnergyModel, classifier: tuple[EnergyClassifier, Tensor, Tensor], tmp_path: Path
) -> None:
    x = eight_gaussians(20, 13)
    conditional = ConditionalEnergyModel(hidden=(8,))
    conditional.fit(x[:, 0], x[:, 1], num_steps=3, batch_size=10, noise_samples=8, progress=False)
    family = TruncatedNormal(0.0)
    family.fit(x.abs()[:, 0], num_steps=3, progress=False)
    models = (fitted, classifier[0], conditional, family)

    def answers(e: EnergyModel, c: EnergyClassifier, r: ConditionalEnergyModel, t: TruncatedNormal) -> list[Tensor]:
        return [
            e.log_prob(x),
            e.sample(10, method="sir", seed=5),
            c.log_prob(classifier[1]),
            r.log_prob(x[:, 1], x[:, 0]),
            r.sample(x[:, 0], 5, seed=2),
            t.log_prob(x.abs()[:, 0]),
        ]

    loaded: list[Any] = []
    for name, model in zip(("ebm", "clf", "reg", "family"), models, strict=True):
        model.save(tmp_path / name)
        loaded.append(type(model).load(tmp_path / name))
    assert all(torch.equal(a, b) for a, b in zip(answers(*loaded), answers(*models), strict=True))
    with pytest.raises(CheckpointError, match="of the kind"):
        EnergyClassifier.load(tmp_path / "ebm")
    (tmp_path / "ebm").write_bytes((tmp_path / "ebm").read_bytes()[:-200])
    with pytest.raises(CheckpointError, match=r"damaged|truncated"):
        EnergyModel.load(tmp_path / "ebm")


def test_an_energy_of_ones_own_is_given_again(tmp_path: Path) -> None:
    x = torch.randn(100, 2)
    ebm = EnergyModel(Well(), (2,), base=None)
    ebm.fit(x, num_steps=3, batch_size=50, progress=False)
    ebm.save(tmp_path / "well")
    with pytest.raises(CheckpointError, match=r"give load\(path,\s+energy"):
        EnergyModel.load(tmp_path / "well")
    again = EnergyModel.load(tmp_path / "well", energy=Well())
    assert torch.equal(again.log_prob(x), ebm.log_prob(x))


def test_the_same_seed_gives_the_same_bits() -> None:
    x = eight_gaussians(200, 14)
    found = []
    for _ in range(2):
        ebm = EnergyModel(event_shape=(2,), hidden=(16,))
        ebm.fit(x, num_steps=10, batch_size=50, seed=7, progress=False)
        found.append(ebm.log_prob(x))
    assert torch.equal(*found)


def test_on_an_accelerator() -> None:
    with fake_accelerator() as device:
        x = torch.randn(16, 2, device=device)
        noise = GaussianNoise(torch.zeros(2, device=device), torch.eye(2, device=device))
        box = HalfLineNoise(torch.ones(2, device=device))
        energy = nn.Linear(2, 1, bias=False, device=device)
        law = EnergyDistribution(lambda x: energy(x).squeeze(1), base=noise.distribution())
        law.log_prob(x).sum().backward()
        assert energy.weight.grad.device.type == device.type
        for part in (noise, box, DefensiveMixture(noise, noise)):
            assert part.draw(3).device.type == part.log_prob(x.abs()).device.type == device.type


# ---------------------------------------------------------------- bad input
def test_bad_input_of_the_density() -> None:
    x = eight_gaussians(60, 15)
    ebm = EnergyModel(event_shape=(2,), hidden=(8,))
    for query in (lambda: ebm.log_prob(x), lambda: ebm.sample(3), ebm.log_partition, ebm.distribution):
        with pytest.raises(RuntimeError, match="call fit"):
            query()
    with pytest.raises(ValueError, match="must have shape"):
        ebm.fit(x[:, :1])
    with pytest.raises(ValueError, match="NaN or infinite"):
        ebm.fit(torch.full((5, 2), math.nan))
    with pytest.raises(ValueError, match="method must be one of"):
        ebm.fit(x, method="magic")
    with pytest.raises(ValueError, match="batch_size = 100 is larger"):
        ebm.fit(x, batch_size=100)
    with pytest.raises(TypeError, match="num_steps must be an integer"):
        ebm.fit(x, num_steps=1.5)
    with pytest.raises(ValueError, match="noise must be 'auto'"):
        ebm.fit(x, noise="gaussian")
    with pytest.raises(ValueError, match="outside the noise's support"):
        ebm.fit(x, noise=dist.Uniform(-torch.ones(2), torch.ones(2)).to_event(1))
    with pytest.raises(ValueError, match="of 60 rows of valid lie outside the noise's support"):
        ebm.fit(x / 10, valid=x, noise=dist.Uniform(-torch.ones(2), torch.ones(2)).to_event(1))
    with pytest.raises(ValueError, match="batch shape"):
        ebm.fit(x, noise=dist.Normal(torch.zeros(2), 5.0))
    with pytest.raises(ValueError, match="whole numbers and the noise is continuous"):
        ebm.fit(x.round(), noise=dist.Normal(torch.zeros(2), 5.0).to_event(1))
    with pytest.raises(ValueError, match="noise_samples=1 with beta=1"):
        ebm.fit(x, noise_samples=1, beta=1.0)
    with pytest.raises(ValueError, match="no law to draw noise from"):
        EnergyModel(event_shape=(2,), base=None).fit(x, noise=None)
    with pytest.raises(ValueError, match="lr must be"):
        ebm.fit(x, lr=-1.0)
    assert ebm.log_z is None


def test_energies_that_do_not_fit() -> None:
    x = eight_gaussians(60, 16)
    with pytest.raises(ValueError, match="output bias"):
        EnergyModel(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0)))

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    with pytest.raises(ValueError, match=r"one value a row.*squeeze"):
        EnergyModel(Wide(), (2,)).fit(x, progress=False)

    class Breaks(Wide):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x[:, 0] > 2.5, math.nan, self.linear(x).squeeze(1))

    with pytest.raises(NonFiniteError, match=r"NaN or infinite on \d+\.\d% of the rows.*step 1 of"):
        EnergyModel(Breaks(), (2,)).fit(x, num_steps=5, batch_size=30, progress=False)

    class Lost(Wide):
        def forward(self, x: Tensor) -> Tensor:
            return math.nan * self.linear(x).squeeze(1)

    with pytest.raises(NonFiniteError, match=r"NaN or infinite on 100\.0% of the rows.*step 1 of"):
        EnergyModel(Lost(), (2,)).fit(x, num_steps=5, batch_size=30, progress=False)
    with pytest.raises(TypeError, match="torch module"):
        EnergyModel(lambda x: x.sum(1))  # type: ignore[arg-type]


def test_collapse_reaches_the_user() -> None:
    x = 16.0 + torch.randn(400)
    family = TruncatedNormal(-math.inf)
    with pytest.raises(CollapseError, match="the noise does not cover the model"):
        family.fit(x, noise=dist.Normal(0.0, 1.0), num_steps=1500, progress=False)
    assert family.log_z is None


def test_bad_input_of_the_others() -> None:
    x, y = torch.randn(40, 3), torch.arange(40) % 3
    clf = EnergyClassifier(num_classes=3)
    with pytest.raises(ValueError, match="labels from 0 to 2"):
        clf.fit(x, y + 1)
    with pytest.raises(ValueError, match="one label a row"):
        clf.fit(x, y[:-1])
    with pytest.raises(RuntimeError, match="fit"):
        clf.predict_proba(x)
    reg = ConditionalEnergyModel()
    with pytest.raises(ValueError, match="they must match"):
        reg.fit(x, torch.randn(39))
    with pytest.raises(ValueError, match="normaliser must be one of"):
        ConditionalEnergyModel(normaliser="exact")
    with pytest.raises(RuntimeError, match="fit"):
        reg.log_prob(torch.randn(4), torch.randn(4))
    with pytest.raises(ValueError, match="outside the model's support"):
        TruncatedNormal(0.0).fit(torch.randn(50))
    with pytest.raises(ValueError, match="event_shape is needed"):
        EnergyDistribution(lambda x: x)
    with pytest.raises(NotImplementedError, match="sampler"):
        EnergyDistribution(lambda x: x, ()).sample()
    assert np.isfinite(float(EnergyDistribution(lambda x: x.square(), ()).log_prob(torch.tensor(1.0))))
