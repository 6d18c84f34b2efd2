"""The steps of a fit: propensity, cross-fitted baseline and scores, networks, posterior of the last layers."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inference.runtime.generators import derive_seed
from ppl_models.image_cate.data import Trial, Units
from ppl_models.image_cate.fitted import Fitted, design_of, feature_scale_of
from ppl_models.image_cate.likelihoods import make_likelihood
from ppl_models.image_cate.nuisance import Baseline, CrossFit, cross_fit_baseline, folds_of_images
from ppl_models.image_cate.posterior import sample_heads
from ppl_models.image_cate.propensity import aipw_scores, clustered_mean, estimate
from ppl_models.image_cate.training import Prepared, Settings, Trained, point_values, prepare, train

__all__ = ["cross_fit_effects", "estimate_trial", "find_propensity"]

_PROPENSITY_FLOOR = 1e-3
_COLLAPSED = 0.02  # share of the units, below which a type is said to be lost
_FEW = 20  # units of an arm in a type, below which a warning is given
Progress = bool | Callable[[dict[str, Any]], None]


def image_groups(trial: Trial) -> Tensor:
    """Group of each image ``(S,)``: that of its units where they share one; else each image is its own."""
    first = trial.groups.new_zeros(trial.num_images)
    first[trial.image_index] = trial.groups
    if bool((first[trial.image_index] == trial.groups).all()):
        return first
    return torch.arange(trial.num_images, device=first.device)


def find_propensity(trial: Trial, propensity: Any, settings: Settings, folds: Tensor, seed: int) -> Tensor:
    """Propensity of each unit ``(N,)``: constant, given, ``"logistic"`` on the columns, or ``"image"``, a network on
    images and columns; the last two are cross-fitted.

    Raises:
        ValueError: outside (0, 1), another word, or ``"logistic"`` without columns.
    """
    if not isinstance(propensity, str) or propensity != "image":
        columns = torch.cat([trial.modifiers, trial.controls], 1)
        if isinstance(propensity, str) and propensity == "logistic" and not columns.shape[1]:
            raise ValueError("propensity='logistic' needs covariates or controls; 'image' uses the images")
        if propensity is not None and not isinstance(propensity, str):
            given = torch.as_tensor(propensity).to(trial.outcome)
            if given.ndim and len(given) != trial.num_units:
                if len(given) < int(trial.rows.max()) + 1:
                    raise ValueError(
                        f"propensity has {len(given)} rows and there are {trial.num_units} units: they must match"
                    )
                given = given[trial.rows]
            propensity = given if given.ndim else float(given)
        features = columns if columns.shape[1] else None
        found = estimate(trial.treatment, propensity, features, folds[trial.image_index], len(folds.unique()), seed)
        scores = found.scores
    else:
        shown = prepare(trial, settings, trial.sample_weight)
        likelihood = make_likelihood("bernoulli").to(trial.outcome)
        rate = trial.treatment.mean()
        target = shown.units._replace(outcome=shown.units.treatment, treatment=torch.zeros_like(shown.units.treatment))
        shown = replace(
            shown,
            units=target,
            likelihood=likelihood,
            average_effect=torch.zeros_like(rate).unsqueeze(0),
            baseline_start=torch.logit(rate).unsqueeze(0),
            noise_start=rate.new_zeros(2, 0),
        )
        offset = cross_fit_baseline(shown, settings, folds, derive_seed(seed, "propensity")).offset
        scores = torch.sigmoid(_per_unit(offset, trial))[:, 0]
    return scores.to(trial.outcome).clamp(_PROPENSITY_FLOOR, 1 - _PROPENSITY_FLOOR)


def _per_unit(table: Tensor, trial: Trial) -> Tensor:
    """Entries of a padded table ``(S, U, ...)`` as rows of units ``(N, ...)``."""
    rows, mask = trial.table()
    found = table.new_empty(trial.num_units, *table.shape[2:])
    found[rows[mask]] = table[mask]
    return found


def with_baseline(trial: Trial, prepared: Prepared, propensity: Tensor, offset: Tensor | None) -> Prepared:
    """The units with propensity and offset, as a cross-fitted baseline needs them."""
    rows = trial.table()[0]
    units = prepared.units._replace(propensity=propensity[rows])
    if offset is not None:
        units = units._replace(offset=offset[rows])
    return replace(prepared, units=units)


def doubly_robust(
    trial: Trial, prepared: Prepared, fitted: CrossFit, propensity: Tensor, folds: Tensor
) -> tuple[Tensor, Tensor]:
    """AIPW scores ``(N,)`` from the cross-fitted baseline and its effects; and mean outcomes given the
    image."""
    models = [m for m in fitted.models if isinstance(m, Baseline)]
    fold = folds[trial.image_index]
    effect = _per_unit(fitted.effect, trial)
    noise = torch.stack([m.noise.detach() for m in models])[fold]
    b, e, law = _per_unit(fitted.offset, trial), propensity.unsqueeze(-1), prepared.likelihood
    with torch.no_grad():
        mu0, mu1 = law.mean(b - e * effect, noise[:, 0]), law.mean(b + (1 - e) * effect, noise[:, 1])
    scores = aipw_scores(trial.outcome, trial.treatment, propensity, mu0, mu1)
    return scores, mu0 + propensity * (mu1 - mu0)


def likelihood_weights(trial: Trial, propensity: Tensor, settings: Settings) -> Tensor:
    """Sample weights, times inverse propensities normalised by arm where they vary and the baseline is fitted jointly;
    a centred likelihood needs no inverse weights.
    """
    weight = trial.sample_weight
    if settings.baseline == "joint" and bool((propensity != propensity[0]).any()):
        inverse = torch.where(trial.treatment == 1, 1 / propensity, 1 / (1 - propensity))
        for arm in (0, 1):
            own = trial.treatment == arm
            inverse = torch.where(own, inverse / inverse[own].mean(), inverse)
        weight = weight * inverse
    return weight


def estimate_trial(
    trial: Trial,
    settings: Settings,
    propensity: Any,
    *,
    posterior: str,
    num_samples: int,
    num_folds: int,
    calibrate: bool,
    seed: int,
    progress: Progress = False,
    checkpoint: str | Path | None = None,
) -> Fitted:
    """All steps in order."""
    folds = folds_of_images(image_groups(trial), num_folds, seed)
    e = find_propensity(trial, propensity, settings, folds, seed)
    weight = likelihood_weights(trial, e, settings)
    prepared = with_baseline(trial, prepare(trial, settings, weight), e, None)
    crossed = cross_fit_baseline(prepared, settings, folds, derive_seed(seed, "baselines"))
    scores, mean_outcome = doubly_robust(trial, prepared, crossed, e, folds)
    offset = _per_unit(crossed.offset, trial)
    prepared = with_baseline(trial, prepared, e, offset)
    if settings.baseline == "joint":
        prepared = replace(
            prepared, units=prepared.units._replace(propensity=torch.zeros_like(prepared.units.propensity))
        )
    trained = train(prepared, settings, derive_seed(seed, "networks"), progress=progress, checkpoint=checkpoint)
    scale = feature_scale_of(trained.model, prepared.images)
    model, design, start = design_of(trained, prepared, scale, gate=settings.objective != "relaxed")
    samples, stats = sample_heads(model, design, start, posterior, num_samples, derive_seed(seed, "heads"), progress)
    trained.model.requires_grad_(False)
    crossed.models.requires_grad_(False)
    fitted = Fitted(
        network=trained.model,
        baselines=crossed.models,
        columns=prepared.columns,
        samples=samples,
        sample_stats=stats,
        order=torch.arange(settings.num_clusters, device=trial.outcome.device),
        shift=0.0,
        trial=trial,
        propensity=e,
        weight=weight,
        offset=offset,
        scores=scores,
        mean_outcome=mean_outcome,
        folds=folds,
        feature_scale=scale,
        settings=settings,
        seed=seed,
        messages=trial.messages,
        history=trained.history,
    )
    use_posterior_mean(fitted)
    found = fitted.on_units()
    fitted.order = type_effects(found, trial.sample_weight).mean(0).argsort()
    if calibrate:
        average = clustered_mean(scores, trial.groups, trial.sample_weight).estimate
        mean = found.effect.mean(0)
        fitted.shift = average - float((trial.sample_weight * mean).sum() / trial.sample_weight.sum())
    fitted.messages = (*fitted.messages, *warnings_of_types(found.probs.mean(0)[:, fitted.order], trial))
    return fitted


def use_posterior_mean(fitted: Fitted) -> None:
    """Put the posterior mean of the gate into the network, so that it and the draws say the same."""
    network = fitted.network
    if network.gate is None or "gate" not in fitted.samples:
        return
    mean = fitted.samples["gate"].mean((0, 1)).to(network.gate.head.weight)
    count = fitted.feature_scale.shape[1]
    with torch.no_grad():
        network.gate.head.weight.copy_(mean[:, :-1])
        network.gate.head.weight[:, :count] /= fitted.feature_scale[1]
        network.gate.head.bias.copy_(mean[:, -1] - network.gate.head.weight[:, :count] @ fitted.feature_scale[0])


def type_effects(found: Any, weight: Tensor) -> Tensor:
    """Effect of each type, averaged over the units that have it, ``(D, K)``."""
    if found.effects.shape[1] == 1:
        effects: Tensor = found.effects[:, 0]
        return effects
    w = found.probs * weight.to(found.probs).unsqueeze(-1)
    return (w * found.effects).sum(1) / w.sum(1).clamp(min=1e-12)


def warnings_of_types(probs: Tensor, trial: Trial) -> tuple[str, ...]:
    """What to say of types that were lost, or have few units in an arm, by the units' probabilities ``(N, K)``.

    By the posterior: where training had given up a type, the mode of the last layer may have found it again.
    """
    messages = []
    for k, share in enumerate(probs.mean(0).tolist()):
        if share < _COLLAPSED:
            messages.append(f"type {k} has collapsed: its share of the units is {share:.3f}")
            continue
        for arm, name in ((1, "treated"), (0, "control")):
            count = float(probs[trial.treatment == arm, k].sum())
            if count < _FEW and probs.shape[1] > 1:
                messages.append(f"type {k} has {count:.1f} {name} units, fewer than {_FEW}: its effect rests on little")
    return tuple(messages)


def cross_fit_effects(fitted: Fitted) -> tuple[Tensor, Tensor]:
    """Effect ``(N,)`` and type probabilities ``(N, K)`` of each unit, from networks that did not see its fold."""
    trial, settings = fitted.trial, fitted.settings
    prepared = with_baseline(trial, prepare(trial, settings, fitted.weight), fitted.propensity, fitted.offset)
    if settings.baseline == "joint":
        prepared = replace(
            prepared, units=prepared.units._replace(propensity=torch.zeros_like(prepared.units.propensity))
        )
    shape = prepared.units.mask.shape
    effects = prepared.images.new_zeros(shape)
    probs = prepared.images.new_zeros(*shape, settings.num_clusters)
    law = prepared.likelihood
    for fold in range(int(fitted.folds.max()) + 1):
        rest = (fitted.folds == fold).nonzero()[:, 0]
        own = derive_seed(fitted.seed, "cross-fit", fold)
        trained = train(prepared.images_of((fitted.folds != fold).nonzero()[:, 0]), settings, own)
        part = prepared.images_of(rest)
        pi, effect = _point_effects(trained, part, law)
        order = effect.mean((0, 1)).argsort()
        probs[rest] = pi[..., order].expand(-1, shape[1], -1)
        effects[rest] = (pi * effect).sum(-1).expand(-1, shape[1])
    return _per_unit(effects, trial), _per_unit(probs, trial)


@torch.no_grad()
def _point_effects(trained: Trained, part: Prepared, law: Any) -> tuple[Tensor, Tensor]:
    """Probabilities ``(B, U or 1, K)`` and effects of the types in outcome units, at the guide's medians."""
    found = trained.model.predictions(part.images, part.units)
    drawn = point_values(trained.guide, *found, part.units)
    eta0, noise0 = trained.model.mixture.laws(drawn, *found, _all(part.units, 0.0))
    eta1, noise1 = trained.model.mixture.laws(drawn, *found, _all(part.units, 1.0))
    return found.logits.softmax(-1), law.mean(eta1, noise1) - law.mean(eta0, noise0)


def _all(units: Units, treatment: float) -> Units:
    return units._replace(treatment=torch.full_like(units.treatment, treatment), site=torch.zeros_like(units.site))
