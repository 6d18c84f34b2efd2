"""Image types read off fixed features, in closed form.

Three steps.  A ridge regression of the effect's working residual (R-learner: Nie and Wager, arXiv:1712.04912), whose
predictions ``tau(m)`` are cut into K groups by k-means on the line.  A linear discriminant of these groups, which has
only images to tell apart and no outcome's noise: its own groups replace those it was fitted to, until they stay
(self-training; types that lie apart in the features are found exactly, from a ``tau`` that is right for most images).
Both rules are linear in the features.

All of it is done several times with random weights on the images (the Bayesian bootstrap, Rubin 1981), and the rules
are averaged: bagging, which steadies where k-means cuts and where self-training ends.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from inference.runtime.generators import generator
from ppl_models.image_cate.ridge import RidgePath
from ppl_models.image_cate.training import Prepared, kmeans_1d

__all__ = ["FixedRules", "fixed_rules", "working_effect"]

_REPLICATES = 8
_ROUNDS = 10  # of self-training
_LEAST_SHARE = 0.02  # of a group, below which self-training keeps what it had
_TINY = 1e-9


class FixedRules(NamedTuple):
    """Linear rules for K types.

    Attributes:
        heads: weights and, last, the intercept of the log odds against the first type on features and columns, of unit
            mean square over the rows: by ``tau`` and by the discriminant, ``(2, K - 1, F + M + 1)``.
        groups: of each image ``(S,)``, 0 to K - 1, ascending in the effect; of its first unit where columns differ.
            Without random weights.
    """

    heads: Tensor
    groups: Tensor


def working_effect(prepared: Prepared, propensity: Tensor) -> tuple[Tensor, Tensor]:
    """Working effect and weight of each unit ``(S, U)``: what a ridge regression on features is to predict.

    With the normal law the R-learner's ``(Y - b - (T - e) tau) / (T - e)`` and ``(T - e)^2`` at the average effect tau;
    with others the slope of the log-likelihood stands for the residual, as in a first step of boosting.
    """
    units, law = prepared.units, prepared.likelihood
    centred = units.treatment - propensity
    eta = units.offset + centred.unsqueeze(-1) * prepared.average_effect
    treated = units.treatment.unsqueeze(-1)
    noise = (1 - treated) * prepared.noise_start[0] + treated * prepared.noise_start[1]
    with torch.enable_grad():
        leaf = eta.detach().requires_grad_()
        each = law.law(leaf, noise).log_prob(units.outcome)
        slope = torch.autograd.grad(torch.where(units.mask, each, torch.zeros_like(each)).sum(), leaf)[0]
    weight = units.weight * units.mask
    total = weight.sum()
    scale = ((weight.unsqueeze(-1) * slope.square()).sum((0, 1)) / total).sqrt().clamp_min(_TINY)
    residual = (slope / scale).sum(-1)
    safe = torch.where(units.mask, centred, torch.ones_like(centred))
    return residual / safe, weight * safe.square()


def fixed_rules(
    features: Tensor, prepared: Prepared, propensity: Tensor, num_clusters: int, folds: Tensor, seed: int
) -> FixedRules:
    """Rules from the images of ``prepared`` and their standardised features ``(S, F)``; penalties by ``folds``
    ``(S,)``, random weights by ``seed``.
    """
    value, weight = (x.double() for x in working_effect(prepared, propensity))
    modifiers = prepared.units.modifiers.double()
    mask = prepared.units.mask
    if modifiers.shape[-1]:  # a row for each unit
        image = torch.arange(len(features), device=features.device).unsqueeze(1).expand_as(mask)[mask]
        rows = torch.cat([features.double()[image], modifiers[mask]], 1)
        value, weight = value[mask], weight[mask]
    else:  # a row for each image
        image = torch.arange(len(features), device=features.device)
        rows, total = features.double(), weight.sum(1)
        value = (weight * torch.where(mask, value, torch.zeros_like(value))).sum(1) / total.clamp_min(_TINY)
        weight = total
    own = folds[image]
    regression, path = RidgePath(rows, own, weight), RidgePath(rows, own)
    outcome = value.unsqueeze(1)
    draws = torch.empty(_REPLICATES, len(features), dtype=rows.dtype)
    draws = draws.exponential_(generator=generator(seed, "replicates")).to(rows)
    pairs = [_trained(path, rows, *regression.fit(outcome, draw[image]), num_clusters)[0] for draw in draws]
    bags = zip(*pairs, strict=True)
    heads = [_unit(torch.stack([_unit(odds, rows) for odds in bag]).mean(0), rows) for bag in bags]
    groups = _trained(path, rows, *regression.fit(outcome), num_clusters)[1]
    of_image = groups.new_zeros(len(features))
    of_image[image.flip(0)] = groups.flip(0)
    return FixedRules(torch.stack(heads).to(features), of_image)


def _trained(
    path: RidgePath, rows: Tensor, slope: Tensor, intercept: Tensor, k: int
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Log odds ``(K - 1, P + 1)`` by a regression of the effect and by the discriminant that follows from it, and the
    latter's groups.
    """
    tau = (rows @ slope + intercept)[:, 0]
    centres, groups = kmeans_1d(tau, k)
    first = _nearest(slope, intercept, centres.unsqueeze(1), torch.eye(1, dtype=rows.dtype, device=rows.device))
    second = first
    for _ in range(_ROUNDS):
        found = _discriminant(path, rows, groups, k)
        if found is None:
            break
        second, again = found
        share = torch.bincount(again, minlength=k) / len(again)
        if bool((share < _LEAST_SHARE).any()) or torch.equal(again, groups):
            break
        groups = again
    return (first[1:] - first[:1], second[1:] - second[:1]), groups


def _discriminant(path: RidgePath, rows: Tensor, groups: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """The linear discriminant rule ``(K, P + 1)`` of the groups by optimal scoring (Hastie, Buja and Tibshirani 1995),
    and the groups that it makes; None if a group is empty.
    """
    member = nn.functional.one_hot(groups, k).to(rows.dtype)
    count = member.sum(0)
    if bool((count < 1).any()):
        return None
    slope, intercept = path.fit(member[:, 1:])
    fitted = rows @ slope + intercept
    means = (member.mT @ fitted) / count.unsqueeze(1)
    within = fitted - member @ means
    spread = within.mT @ within / len(rows)
    jitter = 1e-6 * fitted.var(0, correction=0).mean() + _TINY
    precision = torch.linalg.inv(spread + jitter * torch.eye(k - 1, dtype=rows.dtype, device=rows.device))
    rule = _nearest(slope, intercept, means, precision)
    return rule, (rows @ rule[:, :-1].mT + rule[:, -1]).argmax(1)


def _nearest(slope: Tensor, intercept: Tensor, means: Tensor, precision: Tensor) -> Tensor:
    """Weights and intercepts ``(K, P + 1)`` of ``z' A m_k - m_k' A m_k / 2`` with ``z = slope' x + intercept``."""
    turned = means @ precision  # (K, Q)
    bias = turned @ intercept - 0.5 * (turned * means).sum(1)
    return torch.cat([turned @ slope.mT, bias.unsqueeze(1)], 1)


def _unit(odds: Tensor, rows: Tensor) -> Tensor:
    """The log odds with unit mean square over the rows."""
    values = rows @ odds[:, :-1].mT + odds[:, -1]
    scale = values.square().mean().sqrt()
    found: Tensor = odds / torch.where(scale > _TINY, scale, torch.ones_like(scale))
    return found
