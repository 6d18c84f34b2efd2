"""Baselines and propensities on fixed features: the fixed point is a penalised maximum of the likelihood, columns are
not shrunk away among features, and a confounder that only images show is adjusted for."""

import pytest
import torch
from torch import Tensor

from ppl_models.image_cate.data import make_trial
from ppl_models.image_cate.estimation import find_propensity, image_groups
from ppl_models.image_cate.generalised_ridge import generalised_ridge
from ppl_models.image_cate.likelihoods import OUTCOMES
from ppl_models.image_cate.members import make_fixed
from ppl_models.image_cate.nuisance import cross_fit_baseline, folds_of_images
from ppl_models.image_cate.training import Prepared, Settings, prepare


def laid_out(law: str, columns: bool, shared: bool = False) -> tuple[Prepared, Tensor]:
    """Features, a column or none, and outcomes of a law that depend on both; two units an image, or one."""
    g = torch.Generator().manual_seed(0)
    images = 150
    x = torch.randn(images, 6, generator=g, dtype=torch.float64)
    index = torch.arange(images).repeat(2) if shared else torch.arange(images)
    n = len(index)
    c = torch.randn(n, 1, generator=g, dtype=torch.float64)
    t = (torch.rand(n, generator=g) < 0.4).double()
    eta = 0.6 * x[index, 0] - 0.4 * x[index, 1] + 0.5 * c[:, 0] * columns + t * (0.5 + 0.4 * x[index, 2])
    noise = torch.randn(n, generator=g, dtype=torch.float64)
    coin = torch.rand(n, generator=g, dtype=torch.float64)
    counts = torch.poisson((0.5 + eta).exp(), generator=g)
    outcome = {
        "lognormal": (eta + noise).exp(),
        "bernoulli": (coin < torch.sigmoid(eta)).double(),
        "hurdle": torch.where(coin < torch.sigmoid(eta), (0.5 * eta + noise).exp(), torch.zeros_like(eta)),
        "poisson": counts,
        "negative_binomial": counts,
    }.get(law, eta + noise)
    trial = make_trial(outcome, t, x, index, controls=c if columns else None)
    prepared = prepare(trial, Settings(outcome=law), trial.sample_weight)
    share = torch.full_like(prepared.units.treatment, 0.4)
    folds = torch.arange(images) % 5
    prepared.units.propensity.copy_(share)
    return prepared, folds


@pytest.mark.parametrize("law", OUTCOMES)
@pytest.mark.parametrize("columns", [False, True])
def test_the_fixed_point_is_a_penalised_maximum(law: str, columns: bool) -> None:
    """At the maximum of the log-likelihood less half a penalty times the squared slopes, its gradient is the penalty
    times the slopes, and nothing for intercepts.  A wrong slope moves the point where steps end."""
    prepared, folds = laid_out(law, columns, shared=True)
    found = generalised_ridge(prepared, folds)
    units, noise = prepared.units, prepared.noise_start.mean(0)
    parts = [x.clone().requires_grad_() for x in found]
    design = torch.cat([prepared.images.unsqueeze(1).expand(-1, 2, -1), units.controls], -1)
    b, tau = (design @ parts[i].mT + parts[i + 1] for i in (0, 2))
    eta = b + (units.treatment - 0.4).unsqueeze(-1) * tau
    prepared.likelihood.law(eta, noise).log_prob(units.outcome).sum().backward()
    balance = torch.ones(design.shape[-1], dtype=torch.float64)
    balance[prepared.images.shape[-1] :] = prepared.images.shape[-1]  # the squared scale of one column beside features
    for slope, intercept in (parts[:2], parts[2:]):
        assert slope.grad is not None and intercept.grad is not None
        size = slope.grad.abs().max()
        assert float(intercept.grad.abs().max()) < 0.02 * len(folds) ** 0.5
        for row, gradient in zip(slope.detach(), slope.grad, strict=True):
            scaled = row / balance
            cosine = torch.nn.functional.cosine_similarity(scaled, gradient, 0)
            assert float(cosine) > 0.99 or float(size) < 0.02 * len(folds) ** 0.5, (cosine, size)


def test_units_of_an_image_count_as_one_row_of_their_mean() -> None:
    """Rows of images and rows of units are the same regression: a column of zeros makes the latter."""
    prepared, folds = laid_out("normal", columns=False, shared=True)
    by_image = generalised_ridge(prepared, folds)
    zeros = torch.zeros(*prepared.units.mask.shape, 1, dtype=torch.float64)
    prepared.units.controls.data = zeros
    by_unit = generalised_ridge(prepared, folds)
    for one, other in zip(by_image, by_unit, strict=True):
        torch.testing.assert_close(other[..., : one.shape[-1]] if other.ndim == 2 else other, one, atol=1e-4, rtol=1e-4)


def test_a_column_keeps_its_slope_beside_many_features() -> None:
    """One column that carries the outcome beside 300 features of noise: least squares on it alone gives 1."""
    g = torch.Generator().manual_seed(1)
    x, c = torch.randn(400, 300, generator=g), torch.randn(400, 1, generator=g)
    t = (torch.rand(400, generator=g) < 0.5).float()
    trial = make_trial(c[:, 0] + 0.5 * torch.randn(400, generator=g), t, x, controls=c)
    prepared = prepare(trial, Settings(), trial.sample_weight)
    prepared.units.propensity.fill_(0.5)
    found = generalised_ridge(prepared, torch.arange(400) % 5)
    slope = float(found.slope[0, -1] * prepared.likelihood.scale / c.std(correction=0))
    assert slope == pytest.approx(1.0, abs=0.06)  # its standard error is 0.025; unbalanced it is 0.86


def test_a_fold_is_told_by_the_others() -> None:
    """Outcomes of a fold do not move its own baseline and effect, and move those of the other folds."""
    prepared, _ = laid_out("normal", columns=True)
    folds, penalties = torch.arange(150) % 3, torch.arange(150) % 5
    settings = Settings(num_clusters=1, backbone="fixed")
    first = cross_fit_baseline(prepared, settings, folds, penalties, 0)
    prepared.units.outcome[folds == 0] += torch.arange(50).double().unsqueeze(1)
    second = cross_fit_baseline(prepared, settings, folds, penalties, 0)
    for one, other in ((first.offset, second.offset), (first.effect, second.effect)):
        assert torch.equal(one[folds == 0], other[folds == 0])
        assert not torch.isclose(one[folds == 1], other[folds == 1]).any()


def test_propensity_of_images_tells_the_confounder() -> None:
    """Log odds are the mean intensity plus a column: cross-fitted, they correlate with what was drawn."""
    g = torch.Generator().manual_seed(0)
    c, x = torch.randn(500, generator=g), torch.randn(500, 1, generator=g)
    images = c[:, None, None, None] + 0.5 * torch.randn(500, 1, 12, 12, generator=g)
    t = (torch.rand(500, generator=g) < torch.sigmoid(c + x[:, 0])).float()
    trial = make_trial(c + x[:, 0] + t, t, images, controls=x)
    settings = Settings(num_clusters=1, backbone="fixed")
    folds = folds_of_images(image_groups(trial), 5, 0)
    fixed = make_fixed(prepare(trial, settings, trial.sample_weight), settings, 0)
    scores = find_propensity(trial, "image", settings, folds, 0, fixed)
    odds = torch.logit(scores)
    truth = c + x[:, 0]
    assert float(torch.corrcoef(torch.stack([odds, truth]))[0, 1]) > 0.95  # a trained network's: 0.6
    slope = float((odds - odds.mean()) @ (truth - truth.mean()) / (truth - truth.mean()).square().sum())
    assert 0.7 < slope < 1.3
