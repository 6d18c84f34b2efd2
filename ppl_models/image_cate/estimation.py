"""The steps of a fit: propensity, cross-fitted baseline and scores, members, posterior of effects and of the gate."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inference.runtime.generators import derive_seed
from ppl_models.image_cate.data import Trial
from ppl_models.image_cate.fitted import Fitted
from ppl_models.image_cate.fixed_features import StandardisedFeatures
from ppl_models.image_cate.fixed_gate import sees_difference
from ppl_models.image_cate.likelihoods import make_likelihood
from ppl_models.image_cate.members import HeldOut, Members, fit_members, make_fixed
from ppl_models.image_cate.nuisance import (
    Baseline,
    CrossFit,
    as_outcome,
    cross_fit_baseline,
    fit_baseline,
    folds_of_images,
    what_baselines_see,
)
from ppl_models.image_cate.posterior import HeadDesign, HeadsModel, log_odds, mode_of_heads, sample_heads
from ppl_models.image_cate.propensity import aipw_scores, clustered_mean, estimate
from ppl_models.image_cate.towers import ImageEffectModel
from ppl_models.image_cate.training import Prepared, Settings, build_mixture, point_effects, prepare

__all__ = ["cross_fit_effects", "estimate_trial", "find_propensity"]

_PROPENSITY_FLOOR = 1e-3
_COLLAPSED = 0.02  # share of the units, below which a type is said to be lost
_PENALTY_FOLDS = 5
_START_WEIGHT = 2.0  # of all rules together, where the effects of the types are read off for a start
_TINY = 1e-12
_FEW = 20  # units of an arm in a type, below which a warning is given
Progress = bool | Callable[[dict[str, Any]], None]


def image_groups(trial: Trial) -> Tensor:
    """Group of each image ``(S,)``; groups that share an image, or are linked by others that do, are one."""
    count = int(trial.groups.max()) + 1
    group = torch.arange(count, device=trial.groups.device)
    while True:
        image = group.new_full((trial.num_images,), count).scatter_reduce(
            0, trial.image_index, group[trial.groups], "amin"
        )
        joined = group.scatter_reduce(0, trial.groups, image[trial.image_index], "amin")
        if torch.equal(joined, group):
            return image
        group = joined


def warnings_of_groups(trial: Trial) -> tuple[str, ...]:
    """What to say where groups share images."""
    given, kept = len(trial.groups.unique()), len(image_groups(trial).unique())
    if kept == given:
        return ()
    return (f"{given} groups share images, so that {kept} of them are left to make folds of: those that do are one",)


def folds_of_penalties(trial: Trial, seed: int) -> Tensor:
    """Folds of the images ``(S,)`` by which penalties of closed forms are chosen."""
    return folds_of_images(image_groups(trial), _PENALTY_FOLDS, derive_seed(seed, "penalties"))


def find_propensity(
    trial: Trial,
    propensity: Any,
    settings: Settings,
    folds: Tensor,
    seed: int,
    fixed: StandardisedFeatures | None = None,
) -> Tensor:
    """Propensity of each unit ``(N,)``: constant, given, ``"logistic"`` on the columns, or ``"image"``, on images
    and columns, as a baseline is fitted; the last two are cross-fitted.

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
        rare = (scores < _PROPENSITY_FLOOR) | (scores > 1 - _PROPENSITY_FLOOR)
        if bool(rare.any()):
            warnings.warn(
                f"{int(rare.sum())} units have a propensity nearer to 0 or 1 than {_PROPENSITY_FLOOR}, which is taken "
                "instead: hardly any unit like them is in the other arm; consider leaving them out",
                UserWarning,
                stacklevel=4,
            )
    else:
        shown = prepare(trial, settings, trial.sample_weight)
        likelihood = make_likelihood("bernoulli").to(trial.outcome)
        shown = as_outcome(shown, shown.units.treatment, likelihood, torch.logit(trial.treatment.mean()))
        seen, penalties = what_baselines_see(shown, fixed), folds_of_penalties(trial, seed)
        offset = cross_fit_baseline(seen, settings, folds, penalties, derive_seed(seed, "propensity")).offset
        scores = torch.sigmoid(_per_unit(offset, trial))[:, 0]
    return scores.to(trial.outcome).clamp(_PROPENSITY_FLOOR, 1 - _PROPENSITY_FLOOR)


def share_design(
    trial: Trial, settings: Settings, propensity: Tensor, fixed: StandardisedFeatures | None
) -> Prepared | None:
    """What foretells the log odds of the treatment at any image; None where no query needs them."""
    law = make_likelihood(settings.outcome)
    if law.linear or settings.baseline == "joint" or bool((propensity == propensity[0]).all()):
        return None
    seen = what_baselines_see(prepare(trial, settings, trial.sample_weight), fixed)
    odds = torch.logit(propensity)
    return as_outcome(seen, odds[trial.table()[0]], make_likelihood("normal").to(odds), odds.mean())


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
    plain = prepare(trial, settings, trial.sample_weight)
    fixed = make_fixed(plain, settings, seed)
    e = find_propensity(trial, propensity, settings, folds, seed, fixed)
    weight = likelihood_weights(trial, e, settings)
    prepared = with_baseline(trial, prepare(trial, settings, weight), e, None)
    seen, penalties = what_baselines_see(prepared, fixed), folds_of_penalties(trial, seed)
    crossed = cross_fit_baseline(seen, settings, folds, penalties, derive_seed(seed, "baselines"))
    scores, mean_outcome = doubly_robust(trial, prepared, crossed, e, folds)
    offset = _per_unit(crossed.offset, trial)
    prepared, shares = for_members(trial, prepared, settings, e, offset)
    members = members_of(
        trial, prepared, settings, shares, fixed, folds, seed, progress=progress, checkpoint=checkpoint
    )
    model, design, start = heads_of(prepared, settings, members.held_out)
    samples, stats = sample_heads(model, design, start, posterior, num_samples, derive_seed(seed, "heads"), progress)
    crossed.models.requires_grad_(False)
    share, shown = None, share_design(trial, settings, e, fixed)
    if shown is not None:
        every = torch.arange(trial.num_images, device=e.device)
        share = fit_baseline(shown, settings, every, penalties, derive_seed(seed, "share")).requires_grad_(False)
    fitted = Fitted(
        network=network_of(members, prepared, settings),
        fixed=fixed,
        baselines=crossed.models,
        share=share,
        columns=prepared.columns,
        samples=samples,
        sample_stats=stats,
        order=torch.arange(settings.num_clusters, device=trial.outcome.device),
        shift=0.0,
        trial=trial,
        propensity=e,
        weight=weight,
        offset=offset,
        held_out=members.held_out,
        scores=scores,
        mean_outcome=mean_outcome,
        folds=folds,
        settings=settings,
        seed=seed,
        messages=trial.messages,
        histories=members.histories,
    )
    use_posterior_mean(fitted)
    found = fitted.on_units()
    fitted.order = type_effects(found, trial.sample_weight).mean(0).argsort()
    if calibrate:
        average = clustered_mean(scores, trial.groups, trial.sample_weight).estimate
        mean = found.effect.mean(0)
        fitted.shift = average - float((trial.sample_weight * mean).sum() / trial.sample_weight.sum())
    of_types = warnings_of_types(held_out_probs(fitted), trial)
    fitted.messages = (*fitted.messages, *warnings_of_groups(trial), *of_types)
    return fitted


def for_members(
    trial: Trial, prepared: Prepared, settings: Settings, propensity: Tensor, offset: Tensor
) -> tuple[Prepared, Tensor]:
    """The trial as members are fitted to it, and the propensities ``(S, U)``: a joint baseline is the outcome without
    treatment, so that no share of the effect is in it.
    """
    prepared = with_baseline(trial, prepared, propensity, offset)
    shares = prepared.units.propensity
    if settings.baseline == "joint":
        prepared = replace(prepared, units=prepared.units._replace(propensity=torch.zeros_like(shares)))
    return prepared, shares


def members_of(
    trial: Trial,
    prepared: Prepared,
    settings: Settings,
    shares: Tensor,
    fixed: StandardisedFeatures | None,
    folds: Tensor,
    seed: int,
    **options: Any,
) -> Members:
    """The members of a trial laid out ``for_members``."""
    penalties = folds_of_penalties(trial, seed)
    own = derive_seed(seed, "networks")
    return fit_members(prepared, settings, shares, fixed, folds, penalties, own, **options)


def with_settings(fitted: Fitted, settings: Settings) -> Fitted:
    """Members under other settings, with the baselines and scores as they are, for ``cross_fit_effects`` alone."""
    trial = fitted.trial
    prepared = prepare(trial, settings, fitted.weight)
    prepared, shares = for_members(trial, prepared, settings, fitted.propensity, fitted.offset)
    members = members_of(trial, prepared, settings, shares, fitted.fixed, fitted.folds, fitted.seed)
    return replace(fitted, settings=settings, held_out=members.held_out, cross_fitted=None)


def network_of(members: Members, prepared: Prepared, settings: Settings) -> ImageEffectModel:
    """The members as one Pyro model."""
    mixture = build_mixture(prepared, settings, calibrated=True)
    network = ImageEffectModel(members.gate, members.baseline, members.effects, mixture)
    network.requires_grad_(False)
    return network.eval()


def heads_of(
    prepared: Prepared, settings: Settings, held_out: HeldOut
) -> tuple[HeadsModel, HeadDesign, dict[str, Tensor]]:
    """The model of effects and of the gate's weights in double precision, its data, and where to start."""
    mixture = build_mixture(prepared, settings, calibrated=True)
    rules, baseline, deviation = (None if x is None else x.double() for x in held_out)
    units = prepared.units._replace(
        **{n: x.double() for n, x in prepared.units._asdict().items() if x.is_floating_point()}
    )
    model = HeadsModel(mixture.double())
    design = HeadDesign(rules, units.offset if baseline is None else baseline, deviation, units)
    start: dict[str, Tensor] = {}
    if rules is not None:
        count = rules.shape[-1]
        start["gate_weight"] = rules.new_full((count,), _START_WEIGHT / count)
        start["gate_bias"] = rules.new_zeros(settings.num_clusters - 1)
    start["mu"] = _starting_effects(model, design, start)
    if mixture.likelihood.num_noise:
        start["rho"] = mixture.noise_loc.unsqueeze(-1).expand(-1, -1, settings.num_clusters).clone()
    zero = torch.zeros_like(mixture.effect_loc)
    start |= {"intercept": torch.zeros_like(start["mu"]), "slope": zero + 1}
    if mixture.num_sites:
        start |= {"site_scale": zero.new_full((), 0.2), "site": zero.new_zeros(mixture.num_sites)}
    return model, design, start


def _starting_effects(model: HeadsModel, design: HeadDesign, start: dict[str, Tensor]) -> Tensor:
    """Regression of the outcome's residual on the centred treatment within types, ``(K, L)``."""
    mixture, units = model.mixture, design.units
    probs = log_odds(design, start.get("gate_weight"), start.get("gate_bias")).softmax(-1)
    centred = units.treatment - units.propensity
    residual = mixture.likelihood.link(units.outcome.flatten()).unflatten(0, units.outcome.shape) - design.baseline
    residual = residual - centred.unsqueeze(-1) * mixture.effect_loc
    weight = (units.weight * units.mask).unsqueeze(-1) * probs
    top = torch.einsum("suk,su,sul->kl", weight.expand(*units.mask.shape, -1), centred, residual)
    low = torch.einsum("suk,su->k", weight.expand(*units.mask.shape, -1), centred.square())
    move = top / (low.unsqueeze(1) + 1.0)  # one unit's worth of the average effect, should a type be empty
    return mixture.effect_loc + move.clamp(-2 * mixture.effect_scale, 2 * mixture.effect_scale)


def use_posterior_mean(fitted: Fitted) -> None:
    """Put the posterior mean of the gate's weights into the network, so that it and the draws say the same."""
    gate = fitted.network.gate
    if gate is not None:
        gate.weight = fitted.samples["gate_weight"].mean((0, 1)).to(gate.weight)
        gate.bias = fitted.samples["gate_bias"].mean((0, 1)).to(gate.bias)


@torch.no_grad()
def held_out_probs(fitted: Fitted) -> Tensor:
    """Probabilities of the types ``(N, K)``, effects ascending, of each unit by the member that did not see it."""
    trial, rules = fitted.trial, fitted.held_out.rules
    if rules is None:
        return fitted.scores.new_ones(trial.num_units, 1)
    probs = fitted.network.gate.probs_of_rules(rules)
    return _per_unit(probs.expand(-1, fitted.trial.table()[1].shape[1], -1), trial)[:, fitted.order]


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
    """Effect ``(N,)`` and type probabilities ``(N, K)`` of each unit, from members that did not see its fold and
    effects and weights that were estimated without it.

    Which type gains more is the members' word.  Effects that images held out from them give in another order are pooled
    (``pooled``) rather than reversed: these images were told by members that saw the fold, so that a reversal would
    come of the fold's own outcomes, and of noise it makes a ranking that seems right.  And where the regression on
    fixed features foretells no effects of the images that it is fitted to (``sees_difference``), the fold's units have
    their mean effect, and nobody ranks before another.
    """
    trial, settings = fitted.trial, fitted.settings
    prepared = prepare(trial, settings, fitted.weight)
    prepared, shares = for_members(trial, prepared, settings, fitted.propensity, fitted.offset)
    model, design, start = heads_of(prepared, settings, fitted.held_out)
    features = None if fitted.fixed is None or settings.num_clusters == 1 else fitted.fixed(prepared.images)
    penalties = folds_of_penalties(trial, fitted.seed)
    shape = design.units.mask.shape
    effects = design.units.outcome.new_zeros(shape)
    probs = effects.new_zeros(*shape, settings.num_clusters)

    def told(part: HeadDesign, mode: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        logits = log_odds(part, mode.get("gate_weight"), mode.get("gate_bias"))
        found = logits, part.baseline, part.deviation
        return logits.softmax(-1).expand(*part.units.mask.shape, -1), point_effects(
            model.mixture, mode, found, part.units
        )

    for fold in range(int(fitted.folds.max()) + 1):
        out = (fitted.folds == fold).nonzero()[:, 0]
        rest = (fitted.folds != fold).nonzero()[:, 0]
        mode = mode_of_heads(model, design.of(rest), start, derive_seed(fitted.seed, "mode", fold))
        pi, effect = told(design.of(rest), mode)
        weight = pi * design.units.mask[rest].unsqueeze(-1)
        size = weight.sum((0, 1)).clamp_min(_TINY)
        of_types = (weight * effect).sum((0, 1)) / size
        probs[out], effect = told(design.of(out), mode)
        effects[out] = (probs[out] * (effect + pooled(of_types, size) - of_types)).sum(-1)
        own = prepared.images_of(rest)
        if features is not None and not sees_difference(features[rest], own, shares[rest], penalties[rest]):
            effects[out] = effects[out][design.units.mask[out]].mean()
    return _per_unit(effects, trial).to(trial.outcome), _per_unit(probs, trial).to(trial.outcome)


def pooled(values: Tensor, weight: Tensor) -> Tensor:
    """The ascending values ``(K,)`` nearest to ``values`` in weighted squares: neighbours that descend share their
    mean.

    By the max-min formula: of each k the largest, over i up to k, of the least mean of i to j, over j from k.
    """
    total, mass = (nn.functional.pad(x.cumsum(0), (1, 0)) for x in (weight * values, weight))
    count = len(values)
    means = torch.stack([(total[1:] - total[i]) / (mass[1:] - mass[i]) for i in range(count)])  # of i to j
    return torch.stack([means[: k + 1, k:].amin(1).amax() for k in range(count)])
