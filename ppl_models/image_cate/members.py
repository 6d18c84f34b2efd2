"""The members of a fit: for each fold of the images, rules and networks that were fitted on the others.

What effects are estimated from is said of every image by the member that did not see it.  Types that had to be searched
for are then not favoured, and the effects' posterior is an honest one.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inference import FitResult
from inference.runtime.generators import derive_seed, scoped_seed
from ppl_models.image_cate.backbones import build_backbone
from ppl_models.image_cate.data import Units
from ppl_models.image_cate.ensemble import GateEnsemble, MeanTower
from ppl_models.image_cate.fixed_features import StandardisedFeatures
from ppl_models.image_cate.fixed_gate import fixed_rules
from ppl_models.image_cate.towers import Tower
from ppl_models.image_cate.training import Prepared, Settings, Trained, point_effects, point_values, train

__all__ = ["HeldOut", "Members", "fit_members", "make_fixed"]

_TINY = 1e-6
Progress = bool | Callable[[dict[str, Any]], None]


class HeldOut(NamedTuple):
    """Of the S images and their units, by the member that did not see them.

    Attributes:
        rules: log odds of the types by each rule, ``(S, U or 1, K - 1, C)``; None with one type.
        baseline: predictors of a joint baseline, ``(S, U or 1, L)``, or None.
        deviation: of effect networks ``(S, U or 1, K, L)``, or None.
    """

    rules: Tensor | None
    baseline: Tensor | None
    deviation: Tensor | None

    def of(self, rows: Tensor) -> "HeldOut":
        """Of some images."""
        return HeldOut(*(None if x is None else x[rows] for x in self))


class Members(NamedTuple):
    """What was fitted.

    Attributes:
        gate: of all members; None with one type.
        baseline: mean of joint baselines, or None.
        effects: mean of effect networks, or None.
        held_out: of every image.
        histories: of the members' training; empty if nothing was trained.
    """

    gate: GateEnsemble | None
    baseline: MeanTower | None
    effects: MeanTower | None
    held_out: HeldOut
    histories: tuple[FitResult, ...]


def make_fixed(prepared: Prepared, settings: Settings, seed: int) -> StandardisedFeatures | None:
    """Fixed features of the trial's images, or None without them."""
    if not settings.fixed_features:
        return None
    shape = tuple(prepared.images.shape[1:])
    with scoped_seed(derive_seed(seed, "fixed features")):
        backbone = build_backbone("fixed", shape, scales=settings.scales, aggregation=settings.aggregation)
    fixed = StandardisedFeatures(backbone).to(prepared.images)
    fixed.learn(prepared.images)
    return fixed


def fit_members(
    prepared: Prepared,
    settings: Settings,
    propensity: Tensor,
    fixed: StandardisedFeatures | None,
    folds: Tensor,
    penalty_folds: Tensor,
    seed: int,
    *,
    progress: Progress = False,
    checkpoint: str | Path | None = None,
) -> Members:
    """Fit a member without each fold.

    Args:
        prepared: the trial, with a cross-fitted baseline if there is one.
        settings: of the fit.
        propensity: of the units ``(S, U)``.
        fixed: fixed features, or None.
        folds: of the images ``(S,)``.
        penalty_folds: of the images, for penalties of the closed forms.
        seed: of all.
        progress, checkpoint: as in ``inference.fit``; a checkpoint's path gets the number of the member.
    """
    k = settings.num_clusters
    gated = k > 1
    networks = settings.effects == "network" or settings.baseline == "joint"
    trains = networks or (gated and settings.backbone != "fixed")
    features = None
    if fixed is not None and gated:
        with torch.no_grad():
            features = fixed(prepared.images)
    heads, trained = [], []
    for fold in range(int(folds.max()) + 1):
        rows = (folds != fold).nonzero()[:, 0]
        part, labels = prepared.images_of(rows), None
        if features is not None:
            found = fixed_rules(features[rows], part, propensity[rows], k, penalty_folds[rows])
            heads.append(found.heads)
            labels = found.groups
        if trains:
            path = None if checkpoint is None else f"{checkpoint}.{fold}"
            own = derive_seed(seed, "member", fold)
            one = train(part, settings, own, labels=labels, progress=progress, checkpoint=path)
            settle(one, part)
            trained.append(one)
    models = [one.model.requires_grad_(False) for one in trained]
    gates = [m.gate for m in models if m.gate is not None]
    gate = None
    if gated:
        empty = prepared.images.new_zeros(int(folds.max()) + 1, 0, k - 1, 0)
        scales = [m.kernel_scale for m in models if m.kernel_scale is not None]
        gate = GateEnsemble(
            fixed if heads else None,
            torch.stack(heads) if heads else empty,
            gates,
            torch.stack(scales) if scales else None,
        )
    baselines = [m.baseline for m in models if isinstance(m.baseline, Tower)]
    effects = [m.effects for m in models if isinstance(m.effects, Tower)]
    held = [_held_out(gate, models, fold, prepared, folds) for fold in range(int(folds.max()) + 1)]
    return Members(
        gate,
        MeanTower(baselines) if baselines else None,
        MeanTower(effects) if effects else None,
        HeldOut(*(_gathered([getattr(h, name) for h in held], folds) for name in HeldOut._fields)),
        tuple(one.history for one in trained),
    )


@torch.no_grad()
def settle(trained: Trained, part: Prepared) -> None:
    """Number the types of a member by their effects, ascending, and give its gate's log odds unit mean square over its
    own images, so that members can be averaged.
    """
    model, units = trained.model, part.units
    found = model.predictions(part.images, units)
    drawn = point_values(trained.guide, *found, units)
    order = point_effects(model.mixture, drawn, found, units).mean((0, 1)).argsort()
    if model.gate is not None:
        for parameter in (model.gate.head.weight, model.gate.head.bias):
            full = torch.cat([torch.zeros_like(parameter[:1]), parameter])[order]
            parameter.copy_(full[1:] - full[:1])
        odds = model.gate(part.images, units.modifiers)
        size = odds.square().mean().sqrt().clamp_min(_TINY)
        model.gate.head.weight.div_(size)
        model.gate.head.bias.div_(size)
    if model.effects is not None:
        shape = (len(order), -1)
        for parameter in (model.effects.head.weight, model.effects.head.bias):
            parameter.copy_(parameter.reshape(*shape, *parameter.shape[1:])[order].reshape_as(parameter))


@torch.no_grad()
def _held_out(gate: GateEnsemble | None, models: list[Any], fold: int, prepared: Prepared, folds: Tensor) -> HeldOut:
    rows = (folds == fold).nonzero()[:, 0]
    images, units = prepared.images[rows], Units(*(x[rows] for x in prepared.units))
    rules = None if gate is None else gate.rules(images, units.modifiers, [fold])[0]
    if not models:
        return HeldOut(rules, None, None)
    baseline, deviation = models[fold].beside_types(images, units)
    return HeldOut(rules, baseline if models[fold].baseline is not None else None, deviation)


def _gathered(parts: list[Tensor | None], folds: Tensor) -> Tensor | None:
    """Parts of each fold as one table of all images."""
    known = [part for part in parts if part is not None]
    if not known:
        return None
    whole = known[0].new_zeros(len(folds), *known[0].shape[1:])
    for fold, part in enumerate(known):
        whole[folds == fold] = part
    return whole
