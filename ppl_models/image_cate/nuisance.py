"""The baseline, cross-fitted: for each image from networks that saw neither it nor others of its site.

A baseline that is trained with the effects memorises the outcomes of its own units, treated ones among them, and draws
the effects towards each other.  Here ``b(m)`` is the predictor at average treatment, fitted beside a free effect,

    Y_i ~ law(b(m_i) + (T_i - e_i) tau(m_i)),

on all folds but that of i.  Its error is orthogonal to that of the effects (Nie and Wager, arXiv:1712.04912).

With fixed features both are linear in these and in the units' columns, by ``generalised_ridge``; a propensity from
images is the same with the treatment for an outcome.  Without, they are a trained network's.

Where the law is not linear, the effect at an image that is not of the trial needs f0 = b - e tau, and so the propensity
e there: the same again with the log odds of the units' e for an outcome (``as_outcome``).
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from inference import fit
from inference.runtime.generators import derive_seed, generator, scoped_seed
from ppl_models.image_cate.backbones import AsTheyAre
from ppl_models.image_cate.data import Units
from ppl_models.image_cate.fixed_features import StandardisedFeatures
from ppl_models.image_cate.generalised_ridge import generalised_ridge
from ppl_models.image_cate.likelihoods import Likelihood
from ppl_models.image_cate.towers import Tower
from ppl_models.image_cate.training import Prepared, Settings, flipped, images_of_batch, make_backbone, one_cycle

__all__ = ["Baseline", "as_outcome", "cross_fit_baseline", "fit_baseline", "folds_of_images", "what_baselines_see"]

_VALIDATION_SHARE = 0.2
_CHECKS = 12  # looks at the held-out loss
_PATIENCE = 4
_NOISE_STEPS, _NOISE_RATE = 100, 0.05  # of the noise beside heads in closed form


def what_baselines_see(prepared: Prepared, fixed: StandardisedFeatures | None) -> Prepared:
    """The trial with fixed features in place of its images, where there are any."""
    if fixed is None:
        return prepared
    with torch.no_grad():
        return replace(prepared, images=fixed(prepared.images))


def as_outcome(prepared: Prepared, outcome: Tensor, likelihood: Likelihood, start: Tensor) -> Prepared:
    """The trial with another outcome ``(S, U)`` and no treatment, so that b alone foretells it; ``start`` is b's mean,
    a scalar.
    """
    none = torch.zeros_like(outcome)
    return replace(
        prepared,
        units=prepared.units._replace(outcome=outcome, treatment=none, propensity=none),
        likelihood=likelihood,
        average_effect=torch.zeros_like(start).unsqueeze(0),
        baseline_start=start.unsqueeze(0),
        noise_start=outcome.new_zeros(2, likelihood.num_noise),
    )


class Baseline(nn.Module):
    """``b(m)`` and ``tau(m)``, two heads of one network or of fixed features, with noise for each arm; its call is the
    loss, for ``inference.fit``.

    Args:
        prepared: the trial as ``what_baselines_see``.
        settings: of the fit.
        seed: of the network's start.
    """

    def __init__(self, prepared: Prepared, settings: Settings, seed: int) -> None:
        super().__init__()
        units = prepared.units
        columns = units.modifiers.shape[-1] + units.controls.shape[-1]
        self.likelihood, self.augment = prepared.likelihood, settings.augment
        with scoped_seed(derive_seed(seed, "baseline")):
            shape = tuple(prepared.images.shape[1:])
            backbone = AsTheyAre(shape[0]) if settings.fixed_features else make_backbone(settings, shape)
            self.tower = Tower(backbone, columns, 2 * prepared.likelihood.num_predictors).to(prepared.images)
        share = units.treatment[units.mask].mean()
        with torch.no_grad():
            self.tower.head.weight.mul_(0.1)
            start = prepared.baseline_start + share * prepared.average_effect
            self.tower.head.bias.copy_(torch.cat([start, prepared.average_effect]))
        self.noise = nn.Parameter(prepared.noise_start.clone())
        self._data = (prepared.images, units)

    def predict(self, images: Tensor, modifiers: Tensor, controls: Tensor) -> tuple[Tensor, Tensor]:
        """``b`` and ``tau`` of the units of ``images``, ``(B, U or 1, L)`` each."""
        b, tau = self.tower(images, torch.cat([modifiers, controls], -1)).chunk(2, -1)
        return b, tau

    def forward(self, rows: Tensor) -> Tensor:
        """Mean negative log-likelihood of the units of the images ``rows``."""
        images, units = self._data[0][rows], Units(*(x[rows] for x in self._data[1]))
        treated = units.treatment.unsqueeze(-1)
        images = flipped(images) if self.augment and self.training else images
        b, tau = self.predict(images, units.modifiers, units.controls)
        eta = b + (treated - units.propensity.unsqueeze(-1)) * tau
        noise = (1 - treated) * self.noise[0] + treated * self.noise[1]
        each = self.likelihood.law(eta, noise).log_prob(units.outcome)
        weight = units.weight * units.mask
        return -(weight * torch.where(units.mask, each, torch.zeros_like(each))).sum() / weight.sum().clamp(min=1)


class CrossFit(NamedTuple):
    """Baselines of each fold's complement, and ``b`` and ``tau`` of each unit from those that did not see it, ``(S, U,
    L)``.
    """

    models: nn.ModuleList
    offset: Tensor
    effect: Tensor


def folds_of_images(image_groups: Tensor, num_folds: int, seed: int) -> Tensor:
    """Fold of each image ``(S,)``; images of a group are in one."""
    labels, index = torch.unique(image_groups, return_inverse=True)
    count = min(num_folds, len(labels))
    order = torch.randperm(len(labels), generator=generator(seed, "folds")).to(image_groups.device)
    return (order % count)[index]


def cross_fit_baseline(
    prepared: Prepared, settings: Settings, folds: Tensor, penalty_folds: Tensor, seed: int
) -> CrossFit:
    """One baseline for each fold from the others.

    Args:
        prepared: the trial as ``what_baselines_see``.
        settings: of the fit.
        folds: of the images ``(S,)``.
        penalty_folds: of the images, for the penalties of those on fixed features.
        seed: of all.
    """
    models = []
    units = prepared.units
    offset = prepared.images.new_zeros(*units.mask.shape, prepared.likelihood.num_predictors)
    effect = torch.zeros_like(offset)
    for fold in range(int(folds.max()) + 1):
        own = derive_seed(seed, "baseline fold", fold)
        rows = (folds != fold).nonzero()[:, 0]
        model = fit_baseline(prepared, settings, rows, penalty_folds, own)
        rest = folds == fold
        with torch.no_grad():
            found = model.predict(prepared.images[rest], units.modifiers[rest], units.controls[rest])
            for table, part in zip((offset, effect), found, strict=True):
                table[rest] = part.expand(-1, units.mask.shape[1], -1)
        models.append(model)
    return CrossFit(nn.ModuleList(models), offset, effect)


def fit_baseline(prepared: Prepared, settings: Settings, rows: Tensor, penalty_folds: Tensor, seed: int) -> Baseline:
    """A baseline, in eval mode, from the images ``rows``."""
    model = Baseline(prepared, settings, seed)
    if settings.fixed_features:
        _solve(model, prepared.images_of(rows), penalty_folds[rows], rows, seed)
    else:
        _train(model, prepared, settings, rows, seed)
    model._data = ()  # type: ignore[assignment]
    return model.eval()


def _solve(model: Baseline, part: Prepared, penalty_folds: Tensor, rows: Tensor, seed: int) -> None:
    """Heads of fixed features in closed form; then the noise, where means depend on it."""
    found = generalised_ridge(part, penalty_folds)
    with torch.no_grad():
        model.tower.head.weight.copy_(torch.cat([found.slope, found.effect_slope]))
        model.tower.head.bias.copy_(torch.cat([found.intercept, found.effect_intercept]))
    if model.noise.numel() and not model.likelihood.linear:
        model.tower.requires_grad_(False)
        fit(model, rows, num_steps=_NOISE_STEPS, lr=_NOISE_RATE, seed=seed, progress=False)


def _train(model: Baseline, prepared: Prepared, settings: Settings, rows: Tensor, seed: int) -> None:
    """A network, until images held out from it tell it to stop."""
    rows = rows[torch.randperm(len(rows), generator=generator(seed, "split")).to(rows.device)]
    held = max(1, round(_VALIDATION_SHARE * len(rows)))
    optimizer, scheduler = one_cycle(model, settings, settings.baseline_steps)
    fit(
        model,
        rows[held:],
        num_steps=settings.baseline_steps,
        batch_size=images_of_batch(prepared, settings, len(rows) - held),
        optimizer=optimizer,
        scheduler=scheduler,
        clip_norm=5.0,
        validation=rows[:held],
        validate_every=max(1, settings.baseline_steps // _CHECKS),
        patience=_PATIENCE,
        seed=seed,
        progress=False,
    )
