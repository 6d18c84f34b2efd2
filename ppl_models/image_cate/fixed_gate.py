"""Image types read off fixed features, in closed form.

Three steps.  A ridge regression of the effect's working residual (R-learner: Nie and Wager, arXiv:1712.04912), whose
predictions ``tau(m)`` are cut into K groups by k-means on the line.  A linear discriminant of these groups, which has
only images to tell apart and no outcome's noise: its own groups replace those it was fitted to, as long as that moves
them apart (self-training; types that lie apart in the features are found exactly, from a ``tau`` that is right for most
images, and the discriminant is as sure as they are far).

With many features for its images a discriminant repeats the groups that it was given, wrong ones too, and self-training
then ends where it began: of a ``tau`` that is right for three images in four.  So it is done a second time with what
discriminants of the other folds' images say of each, from several penalties of the regression.  Groups that such
discriminants tell nearly without doubt lie apart in the features (a cut through one normal cloud is not told so), and
are taken in place of the former, unless one is a few odd images.
Both rules are linear in the features.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ppl_models.image_cate.generalised_ridge import DesignRows, design_rows
from ppl_models.image_cate.ridge import RidgePath
from ppl_models.image_cate.training import Prepared, kmeans_1d

__all__ = ["FixedRules", "fixed_rules", "sees_difference", "working_effect"]

_ROUNDS = 10  # of self-training, at most
_HELD_OUT_ROUNDS = 25  # of that by other folds, at most
_STARTS = (10.0, 1.0, 100.0)  # penalties of the regression that it also sets out from
_APART = 0.995  # of the groups' entropy, told of images not seen; of a normal cloud cut in halves it is 0.8
_GROWTH = 1.1  # of the groups' distance, without which a further round would only drift
_SUREST = 20.0  # root mean square of a discriminant's log odds
_LEAST_SHARE = 0.02  # of a group, below which self-training keeps what it had
_LEAST_APART = 0.15  # of a group that lies apart: a few odd images do too, and are what noise drifts to
_TINY = 1e-9


class FixedRules(NamedTuple):
    """Linear rules for K types.

    Attributes:
        heads: weights and, last, the intercept of the log odds against the first type on features and columns, ``(2, K
            - 1, F + M + 1)``: by ``tau``, of unit mean square over the rows, and the discriminant's own.
        groups: of each image ``(S,)``, 0 to K - 1, ascending in the effect; of its first unit where columns differ.
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
    features: Tensor, prepared: Prepared, propensity: Tensor, num_clusters: int, folds: Tensor
) -> FixedRules:
    """Rules from the images of ``prepared`` and their standardised features ``(S, F)``; penalties by ``folds``
    ``(S,)``.
    """
    value, design, path = _regression(features, prepared, propensity, folds)
    rows, image = design.rows, design.image
    own = folds[image]
    slope, intercept = path.fit(value)
    images = RidgePath(rows, own)
    rules, groups = _trained(images, rows, slope, intercept, num_clusters)
    starts = [(slope, intercept), *(path.fit(value, penalty) for penalty in _STARTS)]
    apart = _groups_apart(images, rows, [rows @ a + b for a, b in starts], num_clusters)
    if apart is not None:
        rules, groups = (rules[0], apart.rule[1:] - apart.rule[:1]), apart.groups
    sizes = [_size(odds, rows).clamp_min(_TINY) for odds in rules]
    heads = [rules[0] / sizes[0], rules[1] * (_SUREST / sizes[1]).clamp_max(1.0)]
    of_image = groups.new_zeros(len(features))
    of_image[image.flip(0)] = groups.flip(0)
    return FixedRules(torch.stack(heads).to(features), of_image)


def sees_difference(features: Tensor, prepared: Prepared, propensity: Tensor, folds: Tensor) -> bool:
    """Whether the regression that the rules start from foretells effects: with less squared error, over the folds of
    its own images, than one effect for all.  Arguments as of ``fixed_rules``.
    """
    value, _, path = _regression(features, prepared, propensity, folds)
    return path.foretells(value)


def _regression(
    features: Tensor, prepared: Prepared, propensity: Tensor, folds: Tensor
) -> tuple[Tensor, DesignRows, RidgePath]:
    """The working effect ``(R, 1)`` of each row, the rows, and their ridge regressions."""
    value, weight = (x.double() for x in working_effect(prepared, propensity))
    design = design_rows(features, prepared.units.modifiers, prepared.units.mask)
    value, weight = design.collect(value, weight)
    return value.unsqueeze(1), design, RidgePath(design.rows, folds[design.image], weight)


def _trained(
    path: RidgePath, rows: Tensor, slope: Tensor, intercept: Tensor, k: int
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Log odds ``(K - 1, P + 1)`` by a regression of the effect and by the discriminant that follows from it, and the
    latter's groups.
    """
    tau = (rows @ slope + intercept)[:, 0]
    centres, groups = kmeans_1d(tau, k)
    first = _nearest(slope, intercept, centres.unsqueeze(1), torch.eye(1, dtype=rows.dtype, device=rows.device))
    second, apart = first, 0.0
    for _ in range(_ROUNDS):
        found = _discriminant(path, rows, groups, k, held_out=False)
        if found is None:
            break
        share = torch.bincount(found.groups, minlength=k) / len(groups)
        distance = float(_size(found.rule[1:] - found.rule[:1], rows))
        if distance < _GROWTH * apart or bool((share < _LEAST_SHARE).any()):
            break
        second, groups, apart = found.rule, found.groups, distance
    return (first[1:] - first[:1], second[1:] - second[:1]), groups


class _Discriminant(NamedTuple):
    """A linear discriminant.

    Attributes:
        rule: ``(K, P + 1)``.
        groups: that it makes of the rows, ``(R,)``.
        told: share of the entropy of the groups that it was fitted to, which is gone once it is known what it says.
    """

    rule: Tensor
    groups: Tensor
    told: float


def _groups_apart(path: RidgePath, rows: Tensor, predictions: list[Tensor], k: int) -> _Discriminant | None:
    """By self-training from effects ``(R, 1)``, the first groups that discriminants of other folds tell nearly without
    doubt; None if there are none.
    """
    for tau in predictions:
        groups, found = kmeans_1d(tau[:, 0], k)[1], None
        for _ in range(_HELD_OUT_ROUNDS):
            share = torch.bincount(groups, minlength=k) / len(groups)
            found = None if bool((share < _LEAST_APART).any()) else _discriminant(path, rows, groups, k, held_out=True)
            if found is None or torch.equal(found.groups, groups):
                break
            groups = found.groups
        if found is not None and found.told > _APART:
            return found
    return None


def _discriminant(path: RidgePath, rows: Tensor, groups: Tensor, k: int, held_out: bool) -> _Discriminant | None:
    """The discriminant of the groups by optimal scoring (Hastie, Buja and Tibshirani 1995), or None if a group is
    empty; ``held_out``: what it says of a row, and how sure it is, by regressions without the row's fold.
    """
    member = nn.functional.one_hot(groups, k).to(rows.dtype)
    count = member.sum(0)
    if bool((count < 1).any()):
        return None
    penalty = path.best_penalty(member[:, 1:])
    slope, intercept = path.fit(member[:, 1:], penalty)
    scores = path.held_out(member[:, 1:], penalty) if held_out else rows @ slope + intercept
    means = (member.mT @ scores) / count.unsqueeze(1)
    within = scores - member @ means
    spread = within.mT @ within / len(rows)
    jitter = 1e-6 * scores.var(0, correction=0).mean() + _TINY
    precision = torch.linalg.inv(spread + jitter * torch.eye(k - 1, dtype=rows.dtype, device=rows.device))
    odds = scores @ precision @ means.mT - 0.5 * ((means @ precision) * means).sum(1)
    share = count / len(rows)
    left = -(odds + share.log()).log_softmax(1).gather(1, groups.unsqueeze(1)).mean()
    told = 1 - float(left / -(share @ share.log()).clamp_max(-_TINY))
    return _Discriminant(_nearest(slope, intercept, means, precision), odds.argmax(1), told)


def _nearest(slope: Tensor, intercept: Tensor, means: Tensor, precision: Tensor) -> Tensor:
    """Weights and intercepts ``(K, P + 1)`` of ``z' A m_k - m_k' A m_k / 2`` with ``z = slope' x + intercept``."""
    turned = means @ precision  # (K, Q)
    bias = turned @ intercept - 0.5 * (turned * means).sum(1)
    return torch.cat([turned @ slope.mT, bias.unsqueeze(1)], 1)


def _size(odds: Tensor, rows: Tensor) -> Tensor:
    """Root mean square of log odds over the rows."""
    return (rows @ odds[:, :-1].mT + odds[:, -1]).square().mean().sqrt()
