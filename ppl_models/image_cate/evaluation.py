"""Is the heterogeneity that a model claims there?  Checks on doubly robust scores, which need no true effects.

Calibration: Chernozhukov, Demirer, Duflo, Fernandez-Val, Generic Machine Learning Inference on Heterogeneous Treatment
Effects, Econometrica 93 (2025) (best linear predictor, grouped average effects).  Ranking: ``rate``.
Policy: Athey and Wager, Econometrica 89 (2021).  In all of them the predicted effects must come from data without the
unit's group.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inference.results.brief import brief
from ppl_models.base import check_count
from ppl_models.image_cate.checks import as_matrix, as_treatment, as_vector, as_weights, group_sums, index_groups
from ppl_models.image_cate.least_squares import Estimate, clustered_mean, least_squares
from ppl_models.image_cate.propensity import check_scores
from ppl_models.image_cate.rate import Rate, permutation_test, ranks_in_folds, rate

__all__ = [
    "Calibration",
    "Evaluation",
    "GroupEffects",
    "PolicyValue",
    "blp_calibration",
    "blp_scores",
    "check_probs",
    "evaluate",
    "gate",
    "policy_value",
]


@brief
@dataclass(frozen=True)
class Calibration:
    """Best linear predictor of the effect by the predicted effect.

    Attributes:
        mean: coefficient of the mean predicted effect; 1 if the average effect is right.
        heterogeneity: coefficient of the deviation from it; 1 if calibrated, 0 if the prediction says nothing, below 1
            if it exaggerates.  NaN, with an error of NaN, if the prediction is constant.
    """

    mean: Estimate
    heterogeneity: Estimate

    @property
    def p_value(self) -> float:
        """One-sided, of no heterogeneity along the prediction against a positive coefficient."""
        return 0.5 * math.erfc(self.heterogeneity.ratio / math.sqrt(2))


@brief
@dataclass(frozen=True)
class GroupEffects:
    """Average effect in each of K types, by doubly robust scores.

    Attributes:
        estimates: ``(K,)``.
        covariance: cluster-robust, ``(K, K)``.
        shares: mean membership ``(K,)``.
        num_units: summed membership ``(K,)``.
    """

    estimates: Tensor
    covariance: Tensor
    shares: Tensor
    num_units: Tensor

    @property
    def standard_errors(self) -> Tensor:
        """``(K,)``."""
        return self.covariance.diagonal().clamp_min(0).sqrt()

    def difference(self, high: int = -1, low: int = 0) -> Estimate:
        """Effect in type ``high`` less that in type ``low``."""
        contrast = torch.zeros_like(self.estimates)
        contrast[high] += 1
        contrast[low] -= 1
        variance = float(contrast @ self.covariance @ contrast)
        return Estimate(float(contrast @ self.estimates), math.sqrt(max(variance, 0.0)))


@brief
@dataclass(frozen=True)
class PolicyValue:
    """What a rule that says whom to treat is worth, per unit of the population.

    Attributes:
        value: gain over treating nobody, net of cost.
        over_all: gain over treating everybody, net of cost.
        share_treated: share that the rule treats.
    """

    value: Estimate
    over_all: Estimate
    share_treated: float


@brief
@dataclass(frozen=True)
class Evaluation:
    """All checks of one cross-fitted prediction.

    Attributes:
        ate: mean of the scores, cluster-robust.
        autoc: does the ranking tell who gains?
        qini: the same, less weight on the very top.
        permutation_p_value: of the AUTOC, by permuting priorities over groups; too small too often where they are
            cross-fitted (``permutation_test``).
        calibration: best linear predictor.
        gate: effect by type.
        policy: of treating where the predicted effect is positive.
        num_units: N.
        num_groups: G.
    """

    ate: Estimate
    autoc: Rate
    qini: Rate
    permutation_p_value: float
    calibration: Calibration
    gate: GroupEffects
    policy: PolicyValue
    num_units: int
    num_groups: int

    def to_dict(self) -> dict[str, float]:
        """The numbers by name, flat, such as ``"autoc"``, ``"autoc_standard_error"``, ``"gate_0"``."""
        named: dict[str, Estimate | Rate] = {
            "ate": self.ate,
            "autoc": self.autoc,
            "qini": self.qini,
            "blp_mean": self.calibration.mean,
            "blp_heterogeneity": self.calibration.heterogeneity,
            "policy_value": self.policy.value,
            "policy_over_all": self.policy.over_all,
        }
        flat: dict[str, float] = {"num_units": self.num_units, "num_groups": self.num_groups}
        for name, item in named.items():
            flat |= {name: item.estimate, f"{name}_standard_error": item.standard_error, f"{name}_ratio": item.ratio}
        flat |= {"permutation_p_value": self.permutation_p_value, "share_treated": self.policy.share_treated}
        for k, (effect, error, share) in enumerate(
            zip(
                self.gate.estimates.tolist(), self.gate.standard_errors.tolist(), self.gate.shares.tolist(), strict=True
            )
        ):
            flat |= {f"gate_{k}": effect, f"gate_{k}_standard_error": error, f"gate_{k}_share": share}
        return flat


def evaluate(
    scores: Any,
    effect: Any,
    cluster_probs: Any,
    groups: Any = None,
    seed: int = 0,
    num_bootstrap: int = 200,
    num_permutations: int = 999,
    folds: Any = None,
    weights: Any = None,
) -> Evaluation:
    """Every check of this module on one set of scores and cross-fitted predictions.

    Args:
        scores: doubly robust scores ``(N,)``.
        effect: predicted effect of each unit from a model that did not see its group ``(N,)``.
        cluster_probs: membership of each unit in each type ``(N, K)``, rows sum to 1.
        groups: group (image, site) of each unit.
        seed: of half-samples and permutations.
        num_bootstrap: half-samples.
        num_permutations: permutations.
        folds: fold of each unit whose predictions one model made ``(N,)``.  A fold with small effects leaves large ones
            to the model of the others, so that levels and spreads of predictions oppose those of effects between folds:
            with ``folds``, units are ranked by ``ranks_in_folds``, and for the best linear predictor each fold's
            predictions are moved to a common mean.
        weights: sample weights ``(N,)``, not negative.  None: equal.

    Raises:
        ValueError: NaN, shapes that differ, memberships that do not sum to 1, a negative weight.
    """
    scores = as_vector("scores", scores)
    n, device = len(scores), scores.device
    effect = as_vector("effect", effect, n, device)
    priority = moved = effect
    if folds is not None:
        fold = index_groups(folds, n, device)
        priority = ranks_in_folds(effect, folds)
        means = group_sums(effect, fold) / group_sums(torch.ones_like(effect), fold)
        moved = effect + effect.mean() - means[fold.index]
    check_count("num_permutations", num_permutations)
    return Evaluation(
        ate=clustered_mean(scores, groups, weights),
        autoc=rate(scores, priority, "autoc", groups, num_bootstrap, seed, weights),
        qini=rate(scores, priority, "qini", groups, num_bootstrap, seed, weights),
        permutation_p_value=permutation_test(scores, priority, "autoc", groups, num_permutations, seed, weights),
        calibration=blp_scores(scores, moved, groups, weights),
        gate=gate(scores, cluster_probs, groups, weights),
        policy=policy_value(scores, effect > 0, groups=groups, weights=weights),
        num_units=n,
        num_groups=index_groups(groups, n).count,
    )


def blp_calibration(
    outcome: Any, treatment: Any, propensity: Any, mean_outcome: Any, effect: Any, groups: Any = None
) -> Calibration:
    """Regress ``Y - m`` on ``(T - e) mean(tau)`` and ``(T - e) (tau - mean(tau))`` without intercept; jackknife (CR3)
    errors.

    Args:
        outcome: ``(N,)``.
        treatment: zeros and ones ``(N,)``.
        propensity: ``(N,)``.
        mean_outcome: predicted outcome given images and covariates but not treatment, ``m = mu0 + e (mu1 - mu0)``,
            ``(N,)``.
        effect: predicted effect ``(N,)``.
        groups: group of each unit.

    Raises:
        ValueError: NaN, shapes that differ, a treatment or a propensity out of range.
    """
    y = as_vector("outcome", outcome)
    n, device = len(y), y.device
    residual = as_treatment(treatment, n, device) - check_scores(propensity, n, device)
    return _blp(
        y - as_vector("mean_outcome", mean_outcome, n, device),
        residual,
        as_vector("effect", effect, n, device),
        groups,
    )


def blp_scores(scores: Any, effect: Any, groups: Any = None, weights: Any = None) -> Calibration:
    """The same predictor from doubly robust scores: regress them on ``mean(tau)`` and ``tau - mean(tau)``; CR3 errors.

    Args:
        scores: doubly robust scores ``(N,)``.
        effect: predicted effect ``(N,)``.
        groups: group of each unit.
        weights: sample weights ``(N,)``, not negative.  None: equal.

    Raises:
        ValueError: NaN, shapes that differ, or a negative weight.
    """
    scores = as_vector("scores", scores)
    effect = as_vector("effect", effect, len(scores), scores.device)
    return _blp(scores, torch.ones_like(scores), effect, groups, weights)


def _blp(target: Tensor, factor: Tensor, effect: Tensor, groups: Any, weights: Any = None) -> Calibration:
    mean = effect @ _weights(weights, effect) / len(effect)
    deviation = effect - mean
    size = float(effect.abs().max())
    flat = float(deviation.abs().max()) <= 1e-6 * size  # rounding in single precision is no heterogeneity
    nothing = Estimate(math.nan, math.nan)
    if abs(float(mean)) <= 1e-6 * size:  # a mean prediction of 0 has no multiple; the level is left free
        result = (
            None
            if flat
            else least_squares(torch.stack([factor, factor * deviation], 1), target, groups, weights, "CR3")
        )
        slope = nothing if result is None else result.contrast(torch.tensor([0.0, 1.0]))
        return Calibration(nothing, slope)
    columns = [factor * mean] if flat else [factor * mean, factor * deviation]
    result = least_squares(torch.stack(columns, 1), target, groups, weights, "CR3")
    if flat:
        return Calibration(result.contrast(torch.ones(1)), nothing)
    return Calibration(result.contrast(torch.tensor([1.0, 0.0])), result.contrast(torch.tensor([0.0, 1.0])))


def _weights(weights: Any, like: Tensor) -> Tensor:
    """Sample weights of mean 1, ``(N,)``."""
    weight = as_weights(weights, like)
    return weight / weight.mean()


def check_probs(cluster_probs: Any, num_rows: int, device: torch.device | None = None) -> Tensor:
    """Memberships ``(N, K)``, float64.

    Raises:
        ValueError: a negative one, a row that does not sum to 1, or a type without members.
    """
    probs = as_matrix("cluster_probs", cluster_probs, num_rows, device)
    if bool((probs < 0).any()) or bool(((probs.sum(1) - 1).abs() > 1e-3).any()):
        raise ValueError("cluster_probs must hold probabilities: no negative value, and rows that sum to 1")
    empty = (probs.sum(0) <= 1e-6).nonzero()[:, 0].tolist()
    if empty:
        raise ValueError(f"cluster_probs gives types {empty} no members; drop their columns, or fit with fewer types")
    return probs


def gate(scores: Any, cluster_probs: Any, groups: Any = None, weights: Any = None) -> GroupEffects:
    """Average effect by type, ``sum pi_k Gamma / sum pi_k``, with a joint cluster-robust covariance.

    With memberships of 0 and 1 these are the coefficients and the CR1 covariance of regressing the scores on the types'
    indicators.

    Args:
        scores: doubly robust scores ``(N,)``.
        cluster_probs: ``(N, K)``.
        groups: group of each unit.
        weights: sample weights ``(N,)``, not negative, that memberships are multiplied by.  None: equal.

    Raises:
        ValueError: NaN, shapes that differ, a type without members, a negative weight.
    """
    scores = as_vector("scores", scores)
    n, device = len(scores), scores.device
    probs = check_probs(cluster_probs, n, device) * _weights(weights, scores).unsqueeze(1)
    clusters = index_groups(groups, n, device, least=2)
    size = probs.sum(0)
    if n <= probs.shape[1]:
        raise ValueError(f"scores has {n} units for {probs.shape[1]} types; there must be more units than types")
    estimates = probs.mT @ scores / size
    influence = group_sums(probs * (scores.unsqueeze(1) - estimates) / size, clusters)
    factor = clusters.count / (clusters.count - 1) * (n - 1) / (n - probs.shape[1])
    return GroupEffects(estimates, factor * (influence.mT @ influence), size / n, size)


def policy_value(scores: Any, policy: Any, cost: float = 0.0, groups: Any = None, weights: Any = None) -> PolicyValue:
    """Value of treating unit i with probability ``policy_i``, at a cost per treated unit.

    Args:
        scores: doubly robust scores ``(N,)``.
        policy: who is treated, ``(N,)``, bool or in [0, 1]; it must not be made from these units' scores.
        cost: of treating one unit, in units of the outcome.
        groups: group of each unit.
        weights: sample weights ``(N,)``, not negative.  None: equal.

    Raises:
        ValueError: NaN, shapes that differ, a policy outside [0, 1], a negative weight.
    """
    scores = as_vector("scores", scores)
    treated = as_vector("policy", policy, len(scores), scores.device)
    if bool(((treated < 0) | (treated > 1)).any()):
        raise ValueError("policy must hold probabilities of treatment, between 0 and 1")
    if not math.isfinite(cost):
        raise ValueError(f"cost must be finite, got {cost}")
    net = scores - cost
    return PolicyValue(
        clustered_mean(treated * net, groups, weights),
        clustered_mean((treated - 1) * net, groups, weights),
        float((_weights(weights, treated) * treated).mean()),
    )
