"""The mixture against sums written by hand, conjugate formulas and expectation maximisation."""

import math
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn

from benchmarks.calibrations.image_cate import DrawnTypes, two_types
from inference import ELBO, Laplace, fit
from inference.runtime.generators import scoped_seed
from ppl_models.image_cate.data import Units, make_trial
from ppl_models.image_cate.likelihoods import make_likelihood
from ppl_models.image_cate.mixture import OBJECTIVES, EffectMixture, TypeGuide, type_log_likelihood
from ppl_models.image_cate.nuisance import Baseline
from ppl_models.image_cate.simulation import stripes
from ppl_models.image_cate.training import Settings, build_networks, flipped, prepare
from tests.accelerator import fake_accelerator, place

K = 3


def units_of(treatment: Tensor, outcome: Tensor, weight: Tensor | None = None) -> Units:
    shape = treatment.shape
    zero = treatment.new_zeros(shape)
    return Units(
        treatment=treatment,
        outcome=outcome,
        weight=torch.ones_like(treatment) if weight is None else weight,
        mask=torch.ones(shape, dtype=torch.bool),
        modifiers=treatment.new_zeros(*shape, 0),
        controls=treatment.new_zeros(*shape, 0),
        site=torch.zeros(shape, dtype=torch.long),
        propensity=zero,
        offset=treatment.new_zeros(*shape, 0),
    )


def mixture_of(objective: str, k: int = K, images: int = 6, **options: float) -> EffectMixture:
    zero = torch.zeros(1, dtype=torch.float64)
    return EffectMixture(
        make_likelihood("normal").double(), k, objective, zero, zero.expand(2, 1).clone(), num_images=images, **options
    )


class _Given(TypeGuide):
    """The guide of z alone, at given effects and scales."""

    def __init__(self, mixture: EffectMixture, values: dict[str, Tensor]) -> None:
        super().__init__(mixture, values)
        self.values = values

    def forward(self, logits: Tensor, baseline: Tensor, deviation: Tensor | None, units: Units) -> None:
        mixture = self._mixture[0]
        if mixture.objective == "marginal":
            eta, noise = mixture.laws(self.values, logits, baseline, deviation, units)
            logits = logits.log_softmax(-1) + type_log_likelihood(mixture.likelihood, eta, noise, units)
        with mixture.plates(units):
            mixture.draw_types(logits, units, guide=True)


@pytest.mark.parametrize("objective", ["gated", "marginal"])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.changes_globals("rng")  # Pyro draws a value of each conditioned site
def test_objectives_equal_sums_by_hand(objective: str, centred: bool) -> None:
    """E1: n = 6, K = 3, float64. The engine enumerates z in the guide; the model's own sum gives the same."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    treatment = torch.tensor([0, 1, 1, 0, 1, 0], dtype=torch.float64)[:, None]
    weight = 0.5 + torch.rand(6, 1, generator=g, dtype=torch.float64)
    units = units_of(treatment, normal(6, 1), weight)
    if centred:
        units = units._replace(propensity=torch.full_like(treatment, 0.3))
    logits, baseline = normal(6, 1, K).requires_grad_(), normal(6, 1, 1)
    values = {"mu": normal(K, 1), "rho": normal(2, 1, K)}
    mixture = mixture_of(objective)
    given = poutine.condition(mixture, values)
    arguments = (logits, baseline, None, units)
    prior = poutine.trace(poutine.block(given, expose=["mu", "rho"])).get_trace(*arguments).log_prob_sum().item()
    engine = -ELBO(given, _Given(mixture, values), record=False)(*arguments).item() - prior
    summed = poutine.trace(given).get_trace(*arguments, summed=True).log_prob_sum().item() - prior

    by_hand = 0.0
    for i in range(6):
        t, y, f0 = int(treatment[i]), units.outcome[i].item(), baseline[i].item()
        pi = [math.exp(v) for v in logits[i, 0].log_softmax(-1).tolist()]
        if centred:
            f0 -= 0.3 * sum(p * m for p, m in zip(pi, values["mu"][:, 0].tolist(), strict=True))
        terms = []
        for k in range(K):
            sd = 1e-3 + math.log1p(math.exp(values["rho"][t, 0, k].item()))
            z = (y - f0 - t * values["mu"][k].item()) / sd
            terms.append(-0.5 * z * z - math.log(sd) - 0.5 * math.log(2 * math.pi))
        if objective == "gated":
            by_hand += weight[i].item() * sum(p * v for p, v in zip(pi, terms, strict=True))
        else:
            by_hand += weight[i].item() * math.log(sum(p * math.exp(v) for p, v in zip(pi, terms, strict=True)))
    assert engine == pytest.approx(by_hand, abs=1e-10)
    assert summed == pytest.approx(by_hand, abs=1e-10)


@pytest.mark.changes_globals("rng")
def test_enumeration_in_the_model_is_the_marginal() -> None:
    """Without z in the guide the engine sums it out in the model: the same objective by another road."""
    g = torch.Generator().manual_seed(1)
    units = units_of(torch.ones(4, 1, dtype=torch.float64), torch.randn(4, 1, generator=g, dtype=torch.float64))
    units = units._replace(weight=torch.ones(()).double())  # tensor weights do not go with model-side enumeration
    logits = torch.randn(4, 1, K, generator=g, dtype=torch.float64).requires_grad_()
    baseline = torch.zeros(4, 1, 1, dtype=torch.float64)
    values = {"mu": torch.randn(K, 1, generator=g, dtype=torch.float64), "rho": torch.zeros(2, 1, K).double()}
    mixture = mixture_of("marginal", images=4)
    given = poutine.condition(mixture, values)

    class Nothing(pyro.nn.PyroModule):
        def forward(self, *arguments: object) -> None:
            pass

    model_side = ELBO(given, Nothing(), record=False)(logits, baseline, None, units)
    guide_side = ELBO(given, _Given(mixture, values), record=False)(logits, baseline, None, units)
    assert model_side.item() == pytest.approx(guide_side.item(), abs=1e-10)


def test_one_type_is_conjugate() -> None:
    """E2: K = 1 and fixed noise: the posterior of mu is the precision-weighted formula; Laplace is exact for it."""
    g = torch.Generator().manual_seed(2)
    treatment = (torch.rand(200, 1, generator=g) < 0.5).double()
    outcome = 0.7 * treatment + torch.randn(200, 1, generator=g, dtype=torch.float64)
    units = units_of(treatment, outcome)
    raw = torch.full((2, 1, 1), 0.4, dtype=torch.float64)
    variance = (1e-3 + math.log1p(math.exp(0.4))) ** 2
    mixture = mixture_of("gated", k=1, images=200, effect_scale=0.5)
    given = poutine.condition(mixture, {"rho": raw})

    def model() -> None:
        zero = torch.zeros(200, 1, 1, dtype=torch.float64)
        given(zero, zero, None, units, summed=True)

    found = Laplace(model).run()
    precision = 1 / 0.25 + treatment.sum() / variance
    mean = (treatment * outcome).sum() / variance / precision
    assert found.mode["mu"].item() == pytest.approx(mean.item(), abs=1e-6)
    assert found.covariance.item() == pytest.approx(1 / precision.item(), rel=1e-6)


class _TwoImages(nn.Module):
    def __init__(self, mixture: EffectMixture, units: Units) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([[[0.0, 0.1]], [[0.0, -0.1]]], dtype=torch.float64))
        zero = torch.zeros(2, 1, dtype=torch.float64)
        raw = torch.full((2, 1, 2), 0.5, dtype=torch.float64)
        start = {"mu": torch.tensor([[0.5], [1.5]], dtype=torch.float64) + zero, "rho": raw}
        self.guide = TypeGuide(mixture, start, scale=0.02)
        self.elbo = ELBO(mixture, self.guide, record=False)
        self._units = (units,)

    def forward(self) -> Tensor:
        baseline = torch.zeros(2, 1, 1, dtype=torch.float64)
        loss: Tensor = self.elbo(self.logits, baseline, None, self._units[0])
        return loss / self._units[0].mask.sum()


def two_images(objective: str) -> tuple[_TwoImages, Units]:
    """Two images of 300 treated units each, whose effect is 4 for a quarter or three quarters of them."""
    g = torch.Generator().manual_seed(3)
    share = torch.tensor([[0.25], [0.75]])
    effect = 4.0 * (torch.rand(2, 300, generator=g) < share).double()
    outcome = effect + 0.5 * torch.randn(2, 300, generator=g, dtype=torch.float64)
    units = units_of(torch.ones(2, 300, dtype=torch.float64), outcome)
    wide = {"effect_scale": 10.0, "noise_spread": 3.0, "noise_pooling": 3.0}
    objective_module = _TwoImages(mixture_of(objective, k=2, images=2, **wide), units)
    fit(objective_module, num_steps=300, lr=0.05, seed=0, progress=False, average_last=0.2)
    return objective_module, units


def test_gated_types_are_the_images() -> None:
    """E3, gated: effects are the images' mean outcomes, memberships 0 or 1, although units differ within an image."""
    found, units = two_images("gated")
    mu = found.guide.joint.median()["mu"][:, 0].sort().values
    torch.testing.assert_close(mu, units.outcome.mean(1), atol=0.05, rtol=0)
    assert bool((found.logits.softmax(-1).amax(-1) > 0.99).all())


def test_marginal_types_are_the_units() -> None:
    """E3, marginal: the optimum of 60 iterations of expectation maximisation."""
    found, units = two_images("marginal")
    mu, sd = torch.tensor([0.5, 1.5]).double(), torch.ones(2).double()
    pi = torch.full((2, 2), 0.5).double()
    for _ in range(60):
        log = -0.5 * ((units.outcome[..., None] - mu) / sd).square() - sd.log() + pi.log()[:, None]
        r = log.softmax(-1)
        weight = r.sum((0, 1))
        mu = (r * units.outcome[..., None]).sum((0, 1)) / weight
        sd = ((r * (units.outcome[..., None] - mu).square()).sum((0, 1)) / weight).sqrt()
        pi = r.mean(1)
    # the tolerance is that of the guide's spread and of a finite number of steps
    torch.testing.assert_close(found.guide.joint.median()["mu"][:, 0].sort().values, mu, atol=0.04, rtol=0)
    torch.testing.assert_close(found.logits[:, 0].softmax(-1).sort(-1).values, pi.sort(-1).values, atol=0.02, rtol=0)


@pytest.mark.parametrize(
    "name", ["normal", "student_t", "lognormal", "bernoulli", "hurdle", "poisson", "negative_binomial"]
)
def test_means_are_those_of_the_laws(name: str) -> None:
    """The mean in outcome units against draws of the law, 200,000 of them."""
    law = make_likelihood(name).double()
    y = torch.tensor([0.0, 0.0, 0.0, 1.0, 2.0, 5.0, 3.0, 1.0]).double()
    if name == "lognormal":
        y = y + 0.5
    if name == "bernoulli":
        y = (y > 0).double()
    law.check(y)
    law.learn(y)
    eta = torch.tensor([0.3] * law.num_predictors).double()
    noise = torch.tensor([-1.0] * law.num_noise).double()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = law.law(eta, noise).sample(torch.Size([200_000]))
    if name in ("normal", "student_t"):
        draws = law.shift + law.scale * draws
    elif name == "lognormal":
        draws = (law.shift + law.scale * draws).exp()
    elif name == "hurdle":
        excess = (law.shift + law.scale * draws).exp()
        draws = law.floor + torch.where(torch.isfinite(draws), excess, torch.zeros_like(excess))
    error = draws.std() / math.sqrt(len(draws))
    assert abs(draws.mean() - law.mean(eta, noise)) < 4 * error
    restored = law.standardise(y)
    assert torch.isfinite(law.law(eta.expand(len(y), -1), noise.expand(len(y), -1)).log_prob(restored)).all()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    "options",
    [{"effects": "network", "baseline": "joint"}, {"site_effect": True, "outcome": "hurdle", "scales": (8, 16)}],
    ids=["networks", "hurdle"],
)
def test_on_an_accelerator(objective: str, options: dict[str, Any]) -> None:
    """Forward and backward of the networks, the Pyro model in both forms and its guide: nothing is left on the CPU.

    Traces by hand, as Pyro's sum over enumerated sites reads a mask back, which fake tensors have not.
    """
    with pyro.settings.context(module_local_params=True), pyro.get_param_store().scope():
        run_on_an_accelerator(Settings(objective=objective, width=4, fixed_features=False, **options))


def run_on_an_accelerator(settings: Settings) -> None:
    trial = stripes(12, noise=0.5, seed=0, size=16)
    held = make_trial(trial.outcome.clamp(min=0), trial.treatment, trial.images, groups=torch.arange(12) // 3)
    prepared = prepare(held, settings, held.sample_weight)
    model, baseline = build_networks(prepared, settings, 0), Baseline(prepared, settings, 0)
    values = {"mu": prepared.average_effect.expand(2, -1), "rho": prepared.noise_start.unsqueeze(-1).expand(-1, -1, 2)}
    if model.mixture.calibrated:
        values |= {"intercept": torch.zeros_like(values["mu"]), "slope": torch.ones_like(prepared.baseline_start)}
    if settings.site_effect:
        values |= {"site_scale": torch.tensor(0.2), "site": torch.zeros(prepared.num_sites)}
    guide = TypeGuide(model.mixture, values)
    with torch.random.fork_rng():  # a guide lays itself out at its first call
        guide(*model.predictions(prepared.images, prepared.units), prepared.units)
    with fake_accelerator() as device, pyro.validation_enabled(False):
        parts = nn.ModuleList([model, guide, baseline])
        place(parts, device)
        images, *columns = (
            torch.empty(x.shape, dtype=x.dtype, device=device) for x in (prepared.images, *prepared.units)
        )
        units = Units(*columns)
        found = model.predictions(flipped(images), units)
        drawn = poutine.trace(guide).get_trace(*found, units)
        loss = drawn.log_prob_sum()
        for summed in (False, True):
            replayed = poutine.replay(model.mixture, trace=drawn)
            loss = loss - poutine.trace(replayed).get_trace(*found, units, summed).log_prob_sum()
        baseline._data = (images, units)
        loss = loss + baseline(torch.arange(6, device=device))
        loss.backward()
        assert loss.device.type == device.type
        for name, parameter in parts.named_parameters():
            assert parameter.grad is not None and parameter.grad.device.type == device.type, name


def test_the_law_that_calibration_draws_from_is_the_density_of_a_fit() -> None:
    """Outcomes of ``benchmarks.calibrations`` come from a mixture of laws; a fit has their log density as a factor."""
    drawing, design = two_types(DrawnTypes, 5)
    with scoped_seed(0):
        drawn = poutine.trace(drawing).get_trace(design)
    values = {n: node["value"] for n, node in drawn.nodes.items() if node["type"] == "sample" and n != "y"}
    seen = design._replace(units=design.units._replace(outcome=drawn.nodes["y"]["value"]))
    factor = poutine.trace(poutine.condition(two_types(EffectMixture, 5)[0], values)).get_trace(seen)
    assert float(factor.log_prob_sum()) == pytest.approx(float(drawn.log_prob_sum()), rel=1e-12)
