"""What a fit leaves behind, and what it says at images."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from inference import FitResult
from inference.runtime.generators import generator
from ppl_models.image_cate.bayesian import kernel_names
from ppl_models.image_cate.data import Trial
from ppl_models.image_cate.fixed_features import StandardisedFeatures
from ppl_models.image_cate.members import HeldOut
from ppl_models.image_cate.nuisance import Baseline
from ppl_models.image_cate.towers import ImageEffectModel
from ppl_models.image_cate.training import Columns, Settings

__all__ = ["AtImages", "Fitted"]

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
        fixed: fixed features, shared by gate and baselines; None without them.
        baselines: of each fold.
        share: foretells the log odds of the treatment at any image; None where no query needs them.
        columns: standardisation of images and columns.
        samples: draws of the sites ``(chain, draw, ...)``, double precision.
        sample_stats: of the sampler.
        order: the model's types by effect, ascending, ``(K,)``.
        shift: what calibration adds to all effects, outcome units.
        trial: the data.
        propensity: ``(N,)``.
        weight: of the log-likelihood, ``(N,)``.
        offset: cross-fitted predictors, ``(N, L)``.
        held_out: rules, joint baseline and deviations of each image by members that did not see it.
        scores: doubly robust scores from the cross-fitted baseline, ``(N,)``.
        mean_outcome: expected outcome given the image, cross-fitted, ``(N,)``.
        folds: fold of each image, ``(S,)``.
        settings: of the fit.
        seed: of the fit.
        messages: warnings.
        histories: of the members' optimisation; empty in a model that was loaded, and where nothing was trained.
        cross_fitted: effects and probabilities of each unit from networks that did not see its fold.
    """

    network: ImageEffectModel
    fixed: StandardisedFeatures | None
    baselines: nn.ModuleList
    share: Baseline | None
    columns: Columns
    samples: dict[str, Tensor]
    sample_stats: dict[str, Tensor]
    order: Tensor
    shift: float
    trial: Trial
    propensity: Tensor
    weight: Tensor
    offset: Tensor
    held_out: HeldOut
    scores: Tensor
    mean_outcome: Tensor
    folds: Tensor
    settings: Settings
    seed: int
    messages: tuple[str, ...] = ()
    histories: tuple[FitResult, ...] = ()
    cross_fitted: tuple[Tensor, Tensor] | None = None

    def apply(self, fn: Any) -> None:
        """Move or convert the networks and what they read; draws and the trial are moved and keep their precision."""
        for module in (self.network, self.baselines, self.share, self.fixed, *self.columns):
            if module is not None:
                module._apply(fn)
        self.samples = {n: fn(v).to(v.dtype) for n, v in self.samples.items()}
        self.held_out = HeldOut(*(None if x is None else fn(x) for x in self.held_out))
        for holder in (self, self.trial):
            for field in fields(holder):
                value = getattr(holder, field.name)
                if isinstance(value, Tensor):
                    object.__setattr__(holder, field.name, fn(value).to(value.dtype))

    @torch.no_grad()
    def at(self, images: Tensor, modifiers: Tensor, controls: Tensor, share: Tensor | None = None) -> AtImages:
        """Draws at images ``(N, ...)`` and columns ``(N, M)``, all in their own units.

        ``share`` is the propensity there ``(N,)``, where it is known; else it is foretold.
        """
        parts = []
        for start in range(0, len(images), _CHUNK):
            rows = slice(start, start + _CHUNK)
            own = None if share is None else share[rows]
            parts.append(self.differentiable_at(images[rows], modifiers[rows], controls[rows], own))
        if len(parts) == 1:
            return parts[0]
        wide = parts[0].effects.shape[1] == 1 < len(parts[0].probs[0])
        effects = parts[0].effects if wide else torch.cat([p.effects for p in parts], 1)
        return AtImages(torch.cat([p.probs for p in parts], 1), effects)

    def differentiable_at(
        self, images: Tensor, modifiers: Tensor, controls: Tensor, share: Tensor | None = None
    ) -> AtImages:
        """``at`` of all images at once, with gradients."""
        x = self.columns.pixels(images)
        m, c = self.columns.modifiers(modifiers).unsqueeze(1), self.columns.controls(controls).unsqueeze(1)
        draws = {n: v.flatten(0, 1) for n, v in self.samples.items()}
        dtype = draws["mu"].dtype
        probs = self.probs(x, m)
        effect = draws["mu"].unsqueeze(1)  # (D, 1, K, L)
        deviation = self.network.deviations(x, m)
        if deviation is not None:
            effect = effect + deviation[:, 0].to(dtype)
        law = self.network.mixture.likelihood
        if law.linear:
            return AtImages(probs, law.scale.to(dtype) * effect[..., 0] + self.shift)
        base = self._baseline(x, m, c, draws, probs).to(dtype)
        share = self._shares(x, m, c) if share is None else share
        base = base - share.to(base).unsqueeze(-1) * (probs.unsqueeze(-1) * effect).sum(-2)  # (D, N, L)
        noise = draws["rho"].mT if "rho" in draws else effect.new_zeros(len(effect), 2, effect.shape[-2], 0)
        low = _mean(law, base.unsqueeze(-2).expand(*base.shape[:2], *effect.shape[-2:]), noise[:, 0].unsqueeze(1))
        high = _mean(law, base.unsqueeze(-2) + effect, noise[:, 1].unsqueeze(1))
        return AtImages(probs, high - low + self.shift)

    def probs(self, x: Tensor, m: Tensor) -> Tensor:
        """Probabilities of the types ``(D, N, K)`` at standardised images and modifiers ``(N, 1, M)``, differentiable;
        each draw of the weights goes with one member of the gate, in turn.
        """
        draws = {n: v.flatten(0, 1) for n, v in self.samples.items()}
        gate, count = self.network.gate, len(draws["mu"])
        if gate is None:
            return draws["mu"].new_ones(1, len(x), 1)
        order, parts = [], []
        every = self._rules(x, m)
        for j, rules in enumerate(every):
            rows = torch.arange(j, count, len(every), device=x.device)
            odds = torch.einsum("nkc,dc->dnk", rules[:, 0].to(draws["mu"]), draws["gate_weight"][rows])
            parts.append(odds + draws["gate_bias"][rows].unsqueeze(1))
            order.append(rows)
        logits = torch.cat(parts)[torch.cat(order).argsort()]
        return nn.functional.pad(logits, (1, 0)).softmax(-1)

    def _rules(self, x: Tensor, m: Tensor) -> list[Tensor]:
        """Log odds by the rules ``(N, 1, K - 1, C)`` of each member, for each of as many draws of its kernels as are
        affordable where they are random.
        """
        gate = self.network.gate
        if gate.kernel_scale is None:
            return list(gate.rules(x, m))
        count, found = -(-_KERNEL_DRAWS // gate.num_members), []
        for f in range(gate.num_members):
            own = dict(gate.towers[f].backbone.named_parameters())
            mean = torch.cat([own[n].flatten() for n in kernel_names(gate.towers[f])])
            noise = torch.randn(count, len(mean), generator=generator(self.seed, "kernels", f), dtype=mean.dtype)
            kernels = mean + gate.kernel_scale[f] * noise.to(mean.device)
            found += [gate.rules(x, m, [f], kernel)[0] for kernel in kernels]
        return found

    def _baseline(self, x: Tensor, m: Tensor, c: Tensor, draws: Mapping[str, Tensor], probs: Tensor) -> Tensor:
        """Predictors ``b`` of each draw, ``(D, N, L)``."""
        if self.network.baseline is not None:
            found = self.network.baseline(x, torch.cat([m, c], -1))[:, 0]
        else:
            seen = self._seen(x)
            found = torch.stack([model.predict(seen, m, c)[0][:, 0] for model in self._models()]).mean(0)
        found = found.to(draws["mu"].dtype)
        return probs.to(found) @ draws["intercept"] + draws["slope"].unsqueeze(1) * found

    def _shares(self, x: Tensor, m: Tensor, c: Tensor) -> Tensor:
        """Share of the effect that is part of the baseline, ``(N,)``."""
        if self.settings.baseline == "joint":
            return self.propensity.new_zeros(len(x))
        if self.share is None:
            return self.propensity.mean().expand(len(x))
        return torch.sigmoid(self.share.predict(self._seen(x), m, c)[0][:, 0, 0])

    def _seen(self, x: Tensor) -> Tensor:
        return x if self.fixed is None else self.fixed(x)

    def _models(self) -> list[Baseline]:
        return [model for model in self.baselines if isinstance(model, Baseline)]

    def on_units(self) -> AtImages:
        """Draws at the units of the trial, ``(D, N)``."""
        trial = self.trial
        if self.share is not None:
            return self.at(trial.images[trial.image_index], trial.modifiers, trial.controls, self.propensity)
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
        """Standardised features that support is judged by, ``(N, F)``: the fixed ones; or each channel's mean and
        spread, and the first trained gate's features in units of their spread over the trial.
        """
        x = self.columns.pixels(images)
        if self.fixed is not None:
            return torch.cat([self.fixed(x[i : i + _CHUNK]) for i in range(0, len(x), _CHUNK)])
        gate = self.network.gate
        parts = []
        if gate is not None:
            backbone = gate.towers[0].backbone
            own = backbone(self.columns.pixels(self.trial.images))
            raw = torch.cat([backbone(x[i : i + _CHUNK]) for i in range(0, len(x), _CHUNK)])
            parts.append((raw - own.mean(0)) / own.std(0, correction=0).clamp_min(1e-6))
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
