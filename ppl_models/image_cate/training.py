"""Training of the networks: what is prepared once for a trial, the objective, starts and restarts.

The optimisation itself is ``inference.fit``.
"""

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from inference import ELBO, FitResult, fit
from inference.runtime.generators import derive_seed, generator, scoped_seed
from ppl_models.base import Standardiser
from ppl_models.image_cate.backbones import build_backbone
from ppl_models.image_cate.bayesian import BayesianObjective, kernel_names
from ppl_models.image_cate.data import Trial, Units
from ppl_models.image_cate.likelihoods import Likelihood, make_likelihood
from ppl_models.image_cate.mixture import EffectMixture, TypeGuide, type_log_likelihood
from ppl_models.image_cate.towers import ImageEffectModel, PixelScale, Tower

__all__ = [
    "Prepared",
    "Settings",
    "Trained",
    "build_mixture",
    "build_networks",
    "make_backbone",
    "one_cycle",
    "prepare",
    "train",
]

_GUIDE_RATE = 10.0  # rate of the guide's parameters relative to the networks': effects move by standard deviations
_SPREAD = 0.5  # of the starting effects around the average, in standard deviations of the outcome
_HELD_OUT = 0.2  # share of images that compares restarts
_WARM_SHARE = 0.5  # steps of the warm start, relative to those of the fit
Progress = bool | Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Settings:
    """What a fit depends on besides the data; see ``ImageCATE`` for the meaning of each."""

    num_clusters: int = 2
    objective: str = "gated"
    outcome: str = "normal"
    backbone: str | nn.Module = "cnn"
    fixed_features: bool = True
    effects: str = "cluster"
    baseline: str = "crossfit"
    width: int = 16
    depth: int = 2
    scales: tuple[int, ...] | None = None
    augment: bool = True
    aggregation: str = "transformer"
    site_effect: bool = False
    bayesian_layers: bool = False
    num_steps: int = 300
    baseline_steps: int = 200
    batch_size: int = 100
    lr: float = 3e-3
    weight_decay: float = 1e-2
    num_restarts: int = 1
    warm_start: bool = False
    effect_scale: float = 1.0
    noise_pooling: float = 0.3


class Columns(NamedTuple):
    """Standardisation of what the networks see."""

    pixels: PixelScale
    modifiers: Standardiser
    controls: Standardiser


@dataclass(frozen=True, eq=False)
class Prepared:
    """A trial as the networks see it.

    Attributes:
        images: standardised, ``(S, ...)``.
        units: of all S images.
        likelihood: with the outcome's standardisation learned.
        columns: standardisation of images and columns.
        num_units: N.
        num_sites: distinct sites.
        average_effect: difference of the arms' means on the predictors' scale, ``(L,)``.
        noise_start: raw noise of each arm at that, ``(2, P)``.
        baseline_start: predictors' mean in the control arm, ``(L,)``.
    """

    images: Tensor
    units: Units
    likelihood: Likelihood
    columns: Columns
    num_units: int
    num_sites: int
    average_effect: Tensor
    noise_start: Tensor
    baseline_start: Tensor

    def images_of(self, rows: Tensor) -> "Prepared":
        """Some of the images, with their units."""
        units = Units(*(x[rows] for x in self.units))
        return replace(self, images=self.images[rows], units=units, num_units=int(units.mask.sum()))


class Trained(NamedTuple):
    """Trained networks in eval mode, the fitted guide, and the history of the optimisation."""

    model: ImageEffectModel
    guide: TypeGuide
    history: FitResult


def prepare(trial: Trial, settings: Settings, weight: Tensor) -> Prepared:
    """Standardise a trial and lay its units out by image; ``weight`` ``(N,)`` weights the log-likelihood."""
    pixels = PixelScale(tuple(trial.images.shape[1:])).to(trial.images)
    pixels.learn(trial.images)
    columns = Columns(pixels, _learned(trial.modifiers), _learned(trial.controls))
    likelihood = make_likelihood(settings.outcome).to(trial.outcome)
    likelihood.learn(trial.outcome)
    y, t = likelihood.standardise(trial.outcome), trial.treatment
    sites = torch.unique(trial.groups, return_inverse=True)[1]
    rows, mask = trial.table()
    units = Units(
        treatment=t[rows],
        outcome=torch.where(mask, y[rows], torch.zeros_like(y[rows])),
        weight=weight[rows],
        mask=mask,
        modifiers=columns.modifiers(trial.modifiers)[rows],
        controls=columns.controls(trial.controls)[rows],
        site=sites[rows],
        propensity=torch.zeros_like(mask, dtype=y.dtype),
        offset=y.new_zeros(*mask.shape, likelihood.num_predictors),
    )
    eta = likelihood.link(y)
    arms = [eta[t == a].mean(0) for a in (0, 1)]
    spread = torch.stack([eta[t == a, -1].std(correction=0) for a in (0, 1)]).clamp(min=0.05)
    raw = torch.log(torch.expm1(spread)).unsqueeze(-1).expand(2, likelihood.num_noise)
    return Prepared(
        images=pixels(trial.images),
        units=units,
        likelihood=likelihood,
        columns=columns,
        num_units=trial.num_units,
        num_sites=int(sites.max()) + 1,
        average_effect=arms[1] - arms[0],
        noise_start=raw,
        baseline_start=arms[0],
    )


def _learned(columns: Tensor) -> Standardiser:
    scale = Standardiser(columns.shape[1]).to(columns)
    if columns.shape[1]:
        scale.learn(columns)
    return scale


def make_backbone(settings: Settings, shape: tuple[int, ...]) -> nn.Module:
    """A fresh backbone; of a user's module a copy."""
    return build_backbone(
        copy.deepcopy(settings.backbone),
        shape,
        width=settings.width,
        depth=settings.depth,
        scales=settings.scales,
        aggregation=settings.aggregation,
    )


def build_networks(prepared: Prepared, settings: Settings, seed: int) -> ImageEffectModel:
    """Networks with fresh parameters."""
    k, predictors = settings.num_clusters, prepared.likelihood.num_predictors
    shape = tuple(prepared.images.shape[1:])
    modifiers, controls = prepared.units.modifiers.shape[-1], prepared.units.controls.shape[-1]

    def tower(name: str, columns: int, outputs: int) -> Tower:
        with scoped_seed(derive_seed(seed, name)):
            return Tower(make_backbone(settings, shape), columns, outputs).to(prepared.images)

    gate = tower("gate", modifiers, k - 1) if k > 1 else None
    joint = settings.baseline == "joint"
    baseline = tower("baseline", modifiers + controls, predictors) if joint else None
    effects = tower("effects", modifiers, k * predictors) if settings.effects == "network" else None
    mixture = build_mixture(prepared, settings, calibrated=not joint)
    with torch.no_grad():
        if baseline is not None:
            baseline.head.bias.copy_(prepared.baseline_start)
        if effects is not None:
            effects.head.weight.zero_()
            effects.head.bias.zero_()
    model = ImageEffectModel(gate, baseline, effects, mixture)
    if settings.bayesian_layers and gate is not None and (names := kernel_names(gate)):
        own = dict(gate.backbone.named_parameters())
        model.kernel_scale = prepared.images.new_zeros(sum(own[n].numel() for n in names))
    return model


def build_mixture(prepared: Prepared, settings: Settings, calibrated: bool) -> EffectMixture:
    """The mixture; ``calibrated`` if the baseline comes from other folds."""
    return EffectMixture(
        prepared.likelihood,
        settings.num_clusters,
        settings.objective,
        prepared.average_effect,
        prepared.noise_start,
        effect_scale=settings.effect_scale,
        noise_pooling=settings.noise_pooling,
        calibrated=calibrated,
        num_sites=prepared.num_sites if settings.site_effect else 0,
        num_images=len(prepared.images),
    )


class EffectObjective(nn.Module):
    """Negative ELBO of a batch of images for each unit of the trial, as an objective for ``inference.fit``.

    Args:
        model: networks and mixture.
        guide: of the mixture's latent sites.
        prepared: the trial.
    """

    def __init__(self, model: ImageEffectModel, guide: TypeGuide, prepared: Prepared, augment: bool) -> None:
        super().__init__()
        self.model, self.guide, self.num_units, self.augment = model, guide, prepared.num_units, augment
        self._data = (prepared.images, prepared.units)
        # The networks' outputs are arguments of the mixture, so that model and guide share one pass through them.
        self.elbo = ELBO(model.mixture, guide, record=False)

    def forward(self, rows: Tensor) -> Tensor:
        """Loss of the images ``rows``."""
        images, units = self._data[0][rows], Units(*(x[rows] for x in self._data[1]))
        images = flipped(images) if self.augment and self.training else images
        found = self.model.predictions(images, units)
        loss: Tensor = self.elbo(*found, units)
        return loss / self.num_units


class EffectRegression(nn.Module):
    """Squared error of ``f0(m) + (T - e) tau(m)``: the warm start's regression, with the gate's backbone under tau."""

    def __init__(self, model: ImageEffectModel, prepared: Prepared, settings: Settings, seed: int) -> None:
        super().__init__()
        assert model.gate is not None
        self.baseline, self.augment = model.baseline, settings.augment
        columns = prepared.units.modifiers.shape[-1]
        with scoped_seed(derive_seed(seed, "effect")):
            self.effect = Tower(model.gate.backbone, columns, 1).to(prepared.images)
        with torch.no_grad():
            self.effect.head.bias.copy_(prepared.average_effect[:1])
        self._data = (prepared.images, prepared.units)

    def forward(self, rows: Tensor) -> Tensor:
        """Mean squared error of the units of the images ``rows``."""
        images, units = self._data[0][rows], Units(*(x[rows] for x in self._data[1]))
        images = flipped(images) if self.augment and self.training else images
        tau = self.effect(images, units.modifiers)[..., 0]
        if self.baseline is None:
            f0 = units.offset[..., 0] - units.propensity * tau
        else:
            f0 = self.baseline(images, torch.cat([units.modifiers, units.controls], -1))[..., 0]
        error = (units.outcome - f0 - units.treatment * tau).square()
        weight = units.weight * units.mask
        return (weight * error).sum() / weight.sum().clamp(min=1)


class GateLabels(nn.Module):
    """Cross-entropy of the gate for given types ``(S,)``."""

    def __init__(self, model: ImageEffectModel, prepared: Prepared, labels: Tensor) -> None:
        super().__init__()
        assert model.gate is not None
        self.gate = model.gate
        self._data = (prepared.images, prepared.units, labels)

    def forward(self, rows: Tensor) -> Tensor:
        """Mean cross-entropy over the units of the images ``rows``."""
        images, units, labels = self._data[0][rows], Units(*(x[rows] for x in self._data[1])), self._data[2][rows]
        logits = nn.functional.pad(self.gate(images, units.modifiers), (1, 0))
        chosen = logits.log_softmax(-1).gather(-1, labels[:, None, None].expand(*logits.shape[:2], 1))
        return -chosen.mean()


def flipped(images: Tensor) -> Tensor:
    """Each image mirrored in either direction or both or not, at random; embeddings as they are."""
    if images.ndim < 4:
        return images
    for axis in (-1, -2):
        coin = torch.rand(len(images), *[1] * (images.ndim - 1), dtype=images.dtype, device=images.device) < 0.5
        images = torch.where(coin, images.flip(axis), images)
    return images


def train(
    prepared: Prepared,
    settings: Settings,
    seed: int,
    *,
    labels: Tensor | None = None,
    progress: Progress = False,
    checkpoint: str | Path | None = None,
) -> Trained:
    """Train networks and guide; the best of several starts by the held-out objective, if there are several.

    Args:
        prepared: the trial.
        settings: of the fit.
        seed: of starts and batches.
        labels: types ``(S,)`` that a warm start sets out from; None: those of a regression of the effect.
        progress: as in ``inference.fit``.
        checkpoint: file to resume from.

    Raises:
        NonFiniteError: the loss became NaN or infinite.
        CheckpointError: the checkpoint is of another run.
    """
    if settings.num_restarts > 1:
        count = len(prepared.images)
        order = torch.randperm(count, generator=generator(seed, "held out")).to(prepared.images.device)
        held = max(1, round(_HELD_OUT * count))
        part, rest = prepared.images_of(order[held:]), prepared.images_of(order[:held])
        scores = []
        for start in range(settings.num_restarts):
            chosen = replace(settings, warm_start=settings.warm_start if start % 2 == 0 else not settings.warm_start)
            own = None if labels is None else labels[order[held:]]
            found = _once(part, chosen, derive_seed(seed, "restart", start), own, False, None)
            scores.append(held_out_loss(found, rest, seed))
        best = min(range(len(scores)), key=lambda i: scores[i])
        settings = replace(settings, warm_start=settings.warm_start if best % 2 == 0 else not settings.warm_start)
        seed = derive_seed(seed, "restart", best)
    return _once(prepared, settings, seed, labels, progress, checkpoint)


@torch.no_grad()
def held_out_loss(trained: Trained, prepared: Prepared, seed: int) -> float:
    """Negative ELBO without its prior terms, for each unit of images that were not trained on."""
    model, units = trained.model, prepared.units
    found = model.predictions(prepared.images, units)
    drawn = point_values(trained.guide, found, units)
    eta, noise = model.mixture.laws(drawn, found.logits, found.baseline, found.deviation, units)
    each = type_log_likelihood(model.mixture.likelihood, eta, noise, units)
    log_pi = found.logits.log_softmax(-1)
    total = (log_pi.exp() * each).sum(-1) if model.mixture.objective != "marginal" else (log_pi + each).logsumexp(-1)
    weight = units.weight * units.mask
    return -float((weight * torch.where(units.mask, total, torch.zeros_like(total))).sum() / weight.sum())


@torch.no_grad()
def point_values(guide: TypeGuide, *args: Any) -> dict[str, Tensor]:
    """Medians of the guide's sites; site effects at zero."""
    mixture = guide._mixture[0]
    drawn = dict(guide.joint.median(*args))
    drawn.setdefault("rho", mixture.effect_loc.new_zeros(2, 0, mixture.num_clusters))
    drawn["site"] = mixture.effect_loc.new_zeros(max(mixture.num_sites, 1))
    return drawn


@torch.no_grad()
def point_effects(mixture: EffectMixture, drawn: dict[str, Tensor], found: Any, units: Units) -> Tensor:
    """Effects of the types in outcome units ``(B, U or 1, K)`` at values of the sites, without site effects.

    Where they do not depend on the baseline they are not made as a difference from it either, whose rounding would rank
    units of one effect.

    Args:
        mixture: the model.
        drawn: values of its sites.
        found: logits, baseline and deviations of the units.
        units: the units.
    """
    drawn = {**drawn, "site": mixture.effect_loc.new_zeros(max(mixture.num_sites, 1))}
    drawn.setdefault("rho", mixture.effect_loc.new_zeros(2, 0, mixture.num_clusters))
    means = []
    logits, baseline, deviation = found
    if mixture.likelihood.linear:
        effect = drawn["mu"] if deviation is None else drawn["mu"] + deviation
        shape = torch.broadcast_shapes((len(units.treatment), 1, 1), effect.shape[:-1])
        return (mixture.likelihood.scale * effect[..., 0]).expand(shape)
    for arm in (0.0, 1.0):
        treated = torch.full_like(units.treatment, arm)
        everyone = units._replace(treatment=treated, site=torch.zeros_like(units.site))
        eta, noise = mixture.laws(drawn, logits, baseline, deviation, everyone)
        means.append(mixture.likelihood.mean(eta, noise))
    return means[1] - means[0]


def _once(
    prepared: Prepared,
    settings: Settings,
    seed: int,
    labels: Tensor | None,
    progress: Progress,
    checkpoint: str | Path | None,
) -> Trained:
    model = build_networks(prepared, settings, seed)
    k = settings.num_clusters
    steps = torch.linspace(-1, 1, k, dtype=prepared.images.dtype, device=prepared.images.device) if k > 1 else None
    centres = prepared.average_effect.expand(k, -1).clone()
    if steps is not None:
        centres += _SPREAD * steps.unsqueeze(-1)
    if settings.warm_start and k > 1:
        centres = _warm(model, prepared, settings, seed, centres, labels)
    values = {"mu": centres}
    if prepared.likelihood.num_noise:
        values["rho"] = prepared.noise_start.unsqueeze(-1).expand(-1, -1, k).clone()
    if model.mixture.calibrated:
        values["intercept"] = torch.zeros_like(centres)
        values["slope"] = torch.ones_like(prepared.baseline_start)
    if settings.site_effect:
        values["site_scale"] = centres.new_full((), 0.2)
        values["site"] = centres.new_zeros(prepared.num_sites)
    guide = TypeGuide(model.mixture, values)
    objective = EffectObjective(model, guide, prepared, settings.augment)
    history = _fit(objective, prepared, settings, settings.num_steps, seed, progress, checkpoint)
    if settings.bayesian_layers and model.gate is not None and kernel_names(model.gate):
        second = BayesianObjective(model, guide, prepared.images, prepared.units, prepared.num_units)
        _fit(second, prepared, settings, settings.num_steps, derive_seed(seed, "kernels"), False, None)
        second.settle()
    model.eval()
    return Trained(model, guide, history)


def _warm(
    model: ImageEffectModel, prepared: Prepared, settings: Settings, seed: int, centres: Tensor, labels: Tensor | None
) -> Tensor:
    """Start the gate at given types, or its backbone at a regression of the effect and the types at one-dimensional
    k-means of that; the effects at the types' own.
    """
    steps = math.ceil(_WARM_SHARE * settings.num_steps)
    shifted = centres.clone()
    if labels is None:
        regression = EffectRegression(model, prepared, settings, seed)
        _fit(regression, prepared, settings, steps, derive_seed(seed, "warm"), False, None)
        regression.eval()
        with torch.no_grad():
            tau = regression.effect(prepared.images, prepared.units.modifiers)[..., 0]
            tau = tau.expand(prepared.units.mask.shape)
            each = (tau * prepared.units.mask).sum(1) / prepared.units.mask.sum(1)
            shifted[:, 0], labels = kmeans_1d(each, settings.num_clusters)
        regression.train()
    objective = GateLabels(model, prepared, labels)
    _fit(objective, prepared, settings, max(1, steps // 2), derive_seed(seed, "gate"), False, None)
    return shifted


def kmeans_1d(values: Tensor, k: int, num_iterations: int = 50) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm on a line from quantiles: centres ``(k,)`` ascending, and labels."""
    at = (torch.arange(k, dtype=values.dtype, device=values.device) + 0.5) / k
    centres = torch.quantile(values, at)
    for _ in range(num_iterations):
        labels = (values.unsqueeze(-1) - centres).abs().argmin(-1)
        member = nn.functional.one_hot(labels, k).to(values.dtype)
        count = member.sum(0)
        centres = torch.where(count > 0, (member * values.unsqueeze(-1)).sum(0) / count.clamp(min=1), centres)
    return centres, (values.unsqueeze(-1) - centres).abs().argmin(-1)


def one_cycle(
    objective: nn.Module, settings: Settings, num_steps: int
) -> tuple[Callable[[Iterable[Parameter]], Optimizer], Callable[[Optimizer], LRScheduler]]:
    """AdamW with weight decay on networks, at a rate that rises and falls once; what is frozen is left out."""
    fast = {id(p) for m in objective.modules() if isinstance(m, TypeGuide) for p in m.parameters()}
    rates = [settings.lr, _GUIDE_RATE * settings.lr]

    def optimizer(parameters: Iterable[Parameter]) -> Optimizer:
        listed = [p for p in parameters if p.requires_grad]
        slow = {"params": [p for p in listed if id(p) not in fast], "weight_decay": settings.weight_decay}
        quick = {"params": [p for p in listed if id(p) in fast], "weight_decay": 0.0}
        groups = [group for group in (slow, quick) if group["params"]]
        return AdamW(groups, lr=settings.lr)

    def scheduler(made: Optimizer) -> LRScheduler:
        highest = rates if len(made.param_groups) == 2 else [rates[bool(fast)]]
        return OneCycleLR(made, highest, total_steps=num_steps + 1)

    return optimizer, scheduler


def images_of_batch(prepared: Prepared, settings: Settings, num_images: int) -> int:
    """Images in an update of about ``batch_size`` units; at least two, for batch normalisation, where there are two."""
    share = settings.batch_size * len(prepared.images) / prepared.num_units
    return min(num_images, max(2, round(share)))


def _fit(
    objective: nn.Module,
    prepared: Prepared,
    settings: Settings,
    num_steps: int,
    seed: int,
    progress: Progress,
    checkpoint: str | Path | None,
) -> FitResult:
    optimizer, scheduler = one_cycle(objective, settings, num_steps)
    rows = torch.arange(len(prepared.images), device=prepared.images.device)
    return fit(
        objective,
        rows,
        num_steps=num_steps,
        batch_size=images_of_batch(prepared, settings, len(rows)),
        optimizer=optimizer,
        scheduler=scheduler,
        clip_norm=5.0,
        seed=seed,
        checkpoint=checkpoint,
        progress=progress,
    )
