"""What a fit leaves behind, and what it says at images."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from inference import FitResult
from inference.runtime.generators import generator
from ppl_models.image_cate.bayesian import kernel_names, with_kernels
from ppl_models.image_cate.data import Trial, Units
from ppl_models.image_cate.nuisance import Baseline
from ppl_models.image_cate.posterior import HeadDesign, HeadsModel
from ppl_models.image_cate.towers import ImageEffectModel
from ppl_models.image_cate.training import Columns, Prepared, Settings, Trained, point_values

__all__ = ["AtImages", "Fitted", "design_of"]

_KERNEL_DRAWS = 20
_CHUNK = 2048  # images at once in the networks


class AtImages(NamedTuple):
    """Posterior draws at N images, types in the model's own order.

    Attributes:
        probs: of the types, ``(D or 1, N, K)``.
        effects: of the types in outcome units, ``(D, N or 1, K)``.
    """

    probs: Tensor
    effects: Tensor

    @property
    def effect(self) -> Tensor:
        """Effect of each image, ``(D, N)``."""
        return (self.probs * self.effects).sum(-1)


@dataclass(eq=False)
class Fitted:
    """Networks, draws and data of a fit.

    Attributes:
        network: the Pyro model, in eval mode.
        baselines: of each fold.
        columns: standardisation of images and columns.
        samples: draws of the sites ``(chain, draw, ...)``, double precision.
        sample_stats: of the sampler.
        order: the model's types by effect, ascending, ``(K,)``.
        shift: what calibration adds to all effects, outcome units.
        trial: the data.
        propensity: ``(N,)``.
        weight: of the log-likelihood, ``(N,)``.
        offset: cross-fitted predictors, ``(N, L)``.
        scores: doubly robust scores from the cross-fitted baseline, ``(N,)``.
        mean_outcome: expected outcome given the image, cross-fitted, ``(N,)``.
        folds: fold of each image, ``(S,)``.
        feature_scale: mean and standard deviation of the gate's features, ``(2, F)``.
        settings: of the fit.
        seed: of the fit.
        messages: warnings.
        history: of the optimisation; None in a model that was loaded.
        cross_fitted: effects and probabilities of each unit from networks that did not see its fold.
    """

    network: ImageEffectModel
    baselines: nn.ModuleList
    columns: Columns
    samples: dict[str, Tensor]
    sample_stats: dict[str, Tensor]
    order: Tensor
    shift: float
    trial: Trial
    propensity: Tensor
    weight: Tensor
    offset: Tensor
    scores: Tensor
    mean_outcome: Tensor
    folds: Tensor
    feature_scale: Tensor
    settings: Settings
    seed: int
    messages: tuple[str, ...] = ()
    history: FitResult | None = None
    cross_fitted: tuple[Tensor, Tensor] | None = None

    def apply(self, fn: Any) -> None:
        """Move or convert the networks and what they read; draws and the trial are moved and keep their precision."""
        for module in (self.network, self.baselines, *self.columns):
            module._apply(fn)
        self.feature_scale = fn(self.feature_scale)
        self.samples = {n: fn(v).to(v.dtype) for n, v in self.samples.items()}
        for holder in (self, self.trial):
            for field in fields(holder):
                value = getattr(holder, field.name)
                if isinstance(value, Tensor) and value is not self.feature_scale:
                    object.__setattr__(holder, field.name, fn(value).to(value.dtype))

    @torch.no_grad()
    def at(self, images: Tensor, modifiers: Tensor, controls: Tensor) -> AtImages:
        """Draws at images ``(N, ...)`` and columns ``(N, M)``, all in their own units."""
        parts = [
            self._at(images[i : i + _CHUNK], modifiers[i : i + _CHUNK], controls[i : i + _CHUNK])
            for i in range(0, len(images), _CHUNK)
        ]
        if len(parts) == 1:
            return parts[0]
        wide = parts[0].effects.shape[1] == 1 < len(parts[0].probs[0])
        effects = parts[0].effects if wide else torch.cat([p.effects for p in parts], 1)
        return AtImages(torch.cat([p.probs for p in parts], 1), effects)

    def _at(self, images: Tensor, modifiers: Tensor, controls: Tensor) -> AtImages:
        x = self.columns.pixels(images)
        m, c = self.columns.modifiers(modifiers).unsqueeze(1), self.columns.controls(controls).unsqueeze(1)
        draws = {n: v.flatten(0, 1) for n, v in self.samples.items()}
        dtype = draws["mu"].dtype
        if "gate" in draws and self.network.kernel_scale is not None:
            draws, logits = self._over_kernels(x, m, draws)
        elif "gate" in draws:
            design = gate_design(self.network, x, m, self.feature_scale).to(dtype)[:, 0]
            logits = nn.functional.pad(torch.einsum("nf,dkf->dnk", design, draws["gate"]), (1, 0))
        else:
            logits = self.network.types(x, m)[:, 0].to(dtype).unsqueeze(0)
        probs = logits.softmax(-1)
        effect = draws["mu"].unsqueeze(1)  # (D, 1, K, L)
        deviation = self.network.deviations(x, m)
        if deviation is not None:
            effect = effect + deviation[:, 0].to(dtype)
        law = self.network.mixture.likelihood
        if law.linear:
            return AtImages(probs, law.scale.to(dtype) * effect[..., 0] + self.shift)
        base = self._baseline(x, m, c, draws).to(dtype)
        share = 0.0 if self.settings.baseline == "joint" else float(self.propensity.mean())
        base = base - share * (probs.unsqueeze(-1) * effect).sum(-2)  # (D, N, L)
        noise = draws["rho"].mT if "rho" in draws else effect.new_zeros(len(effect), 2, effect.shape[-2], 0)
        low = _mean(law, base.unsqueeze(-2).expand(*base.shape[:2], *effect.shape[-2:]), noise[:, 0].unsqueeze(1))
        high = _mean(law, base.unsqueeze(-2) + effect, noise[:, 1].unsqueeze(1))
        return AtImages(probs, high - low + self.shift)

    def _over_kernels(self, x: Tensor, m: Tensor, draws: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Draws in another order, and logits ``(D, N, K)``, with as many draws of the kernels as are affordable."""
        gate, scale = self.network.gate, self.network.kernel_scale
        assert gate is not None and scale is not None
        own = dict(gate.backbone.named_parameters())
        mean = torch.cat([own[n].flatten() for n in kernel_names(gate)])
        noise = torch.randn(_KERNEL_DRAWS, len(mean), generator=generator(self.seed, "kernels"), dtype=mean.dtype)
        count, order, parts = len(draws["mu"]), [], []
        for j, shift in enumerate(noise.to(mean.device)):
            features = with_kernels(gate, mean + scale * shift, x)
            design = gate_design(self.network, x, m, self.feature_scale, features).to(draws["gate"].dtype)[:, 0]
            rows = torch.arange(j, count, _KERNEL_DRAWS, device=design.device)
            order.append(rows)
            parts.append(torch.einsum("nf,dkf->dnk", design, draws["gate"][rows]))
        index = torch.cat(order)
        return {n: v[index] for n, v in draws.items()}, nn.functional.pad(torch.cat(parts), (1, 0))

    def _baseline(self, x: Tensor, m: Tensor, c: Tensor, draws: Mapping[str, Tensor]) -> Tensor:
        """Predictors ``b`` of each draw, ``(D, N, L)``."""
        if self.network.baseline is not None:
            return self.network.baseline(x, torch.cat([m, c], -1))[:, 0].unsqueeze(0)
        found = torch.stack([model.predict(x, m, c)[0][:, 0] for model in self._models()]).mean(0).to(draws["mu"].dtype)
        return draws["intercept"].unsqueeze(1) + draws["slope"].unsqueeze(1) * found

    def _models(self) -> list[Baseline]:
        return [model for model in self.baselines if isinstance(model, Baseline)]

    def on_units(self) -> AtImages:
        """Draws at the units of the trial, ``(D, N)``."""
        trial = self.trial
        if trial.modifiers.shape[1] + trial.controls.shape[1] == 0:
            found, index = self.at(trial.images, *self.average_columns(trial.num_images)), trial.image_index
            effects = found.effects if found.effects.shape[1] == 1 else found.effects[:, index]
            return AtImages(found.probs[:, index], effects)
        return self.at(trial.images[trial.image_index], trial.modifiers, trial.controls)

    def average_columns(self, count: int) -> tuple[Tensor, Tensor]:
        """The training means of modifiers and controls, for each of ``count`` images."""
        trial = self.trial
        return trial.modifiers.mean(0).expand(count, -1), trial.controls.mean(0).expand(count, -1)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Standardised features that support is judged by, ``(N, F)``: the gate's, and each channel's mean and
        spread."""
        x = self.columns.pixels(images)
        parts = []
        if self.network.gate is not None:
            raw = torch.cat([self.network.gate.backbone(x[i : i + _CHUNK]) for i in range(0, len(x), _CHUNK)])
            parts.append((raw - self.feature_scale[0]) / self.feature_scale[1])
        if x.ndim > 2:
            flat = x.flatten(3 if x.ndim == 5 else 2).flatten(1, -2)
            parts += [flat.mean(-1), flat.std(-1, correction=0)]
        elif not parts:
            parts.append(x)
        return torch.cat(parts, 1)


def _mean(law: Any, eta: Tensor, noise: Tensor) -> Tensor:
    """Mean outcomes in double precision, with the standardisation in the draws' dtype."""
    found: Tensor = copy.deepcopy(law).to(eta.dtype).mean(eta, noise.expand(*eta.shape[:-1], noise.shape[-1]))
    return found


def gate_design(
    network: ImageEffectModel, x: Tensor, modifiers: Tensor, feature_scale: Tensor, raw: Tensor | None = None
) -> Tensor:
    """Standardised features, columns and a one: ``(N, U or 1, F + M + 1)``; ``raw`` features of x if they are known."""
    assert network.gate is not None
    raw = network.gate.backbone(x) if raw is None else raw
    features = ((raw - feature_scale[0]) / feature_scale[1]).unsqueeze(1)
    if modifiers.shape[-1]:
        features = torch.cat([features.expand(-1, modifiers.shape[1], -1), modifiers], -1)
    return torch.cat([features, torch.ones_like(features[..., :1])], -1)


@torch.no_grad()
def feature_scale_of(network: ImageEffectModel, images: Tensor) -> Tensor:
    """Mean and standard deviation of the gate's features, ``(2, F)``; ``(2, 0)`` without a gate."""
    if network.gate is None:
        return images.new_zeros(2, 0)
    features = network.gate.backbone(images)
    spread = features.std(0, correction=0)
    return torch.stack([features.mean(0), torch.where(spread > 1e-6, spread, torch.ones_like(spread))])


@torch.no_grad()
def design_of(
    trained: Trained, prepared: Prepared, feature_scale: Tensor, gate: bool
) -> tuple[HeadsModel, HeadDesign, dict[str, Tensor]]:
    """The last layers' model in double precision, its data, and where the networks' training left them."""
    network, found = trained.model, trained.model.predictions(prepared.images, prepared.units)
    start = {n: v for n, v in point_values(trained.guide, *found, prepared.units).items() if n != "site"}
    mixture = network.mixture
    if mixture.num_sites:
        assert trained.guide.site is not None
        start["site"] = trained.guide.site.median(*found, prepared.units)["site"]
    if not mixture.likelihood.num_noise:
        start.pop("rho")
    start = {n: v.double() for n, v in start.items()}
    design = baseline = None
    if gate and network.gate is not None:
        design = gate_design(network, prepared.images, prepared.units.modifiers, feature_scale).double()
        start["gate"] = _on_standardised(network.gate.head, feature_scale)
    if network.baseline is not None:
        columns = torch.cat([prepared.units.modifiers, prepared.units.controls], -1)
        features = network.baseline.backbone(prepared.images)
        spread = features.std(0, correction=0)
        scale = torch.stack([features.mean(0), torch.where(spread > 1e-6, spread, torch.ones_like(spread))])
        wide = ((features - scale[0]) / scale[1]).unsqueeze(1)
        if columns.shape[-1]:
            wide = torch.cat([wide.expand(-1, columns.shape[1], -1), columns], -1)
        baseline = torch.cat([wide, torch.ones_like(wide[..., :1])], -1).double()
        start["baseline"] = _on_standardised(network.baseline.head, scale)
    units = Units(*(x.double() if x.is_floating_point() else x for x in prepared.units))
    deviation = None if found.deviation is None else found.deviation.double()
    logits = found.logits.double() if design is None else None
    model = HeadsModel(copy.deepcopy(mixture).double())
    return model, HeadDesign(design, logits, baseline, deviation, units), start


def _on_standardised(head: nn.Linear, scale: Tensor) -> Tensor:
    """Weights and bias of a head, on standardised features, as one matrix."""
    count = scale.shape[1]
    weight = head.weight[:, :count] * scale[1]
    bias = head.bias + head.weight[:, :count] @ scale[0]
    return torch.cat([weight, head.weight[:, count:], bias.unsqueeze(1)], 1).double()
