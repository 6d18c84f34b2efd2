"""From outcomes and treatments to effects that need no model of the image: propensity, weighting, doubly robust scores.

Robins, Rotnitzky, Zhao (1994) for the scores; Hajek (1971) for weights that sum to one in each arm; Crump, Hotz,
Imbens, Mitnik (2009) for trimming; Chernozhukov et al. (2018) for cross-fitting.  Units of a group (an image, a site)
share a fold.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from inference.runtime.generators import generator
from ppl_models.base import check_count
from ppl_models.image_cate.checks import as_matrix, as_treatment, as_vector, group_sums, index_groups
from ppl_models.image_cate.least_squares import Estimate, clustered_mean, least_squares
from ppl_models.image_cate.ridge import LogisticRidge, Ridge

__all__ = [
    "Outcomes",
    "Propensity",
    "Trimming",
    "aipw_scores",
    "check_scores",
    "clustered_mean",
    "cross_fit_outcomes",
    "estimate",
    "grouped_folds",
    "hajek",
    "trim",
]


@dataclass(frozen=True)
class Propensity:
    """Probability of treatment of each unit.

    Attributes:
        scores: ``(N,)``, float64, inside (0, 1).
        kind: ``"constant"``, ``"given"`` or ``"logistic"``.
    """

    scores: Tensor
    kind: Literal["constant", "given", "logistic"]


class Trimming(NamedTuple):
    """Units that stay in an analysis where treated and control units overlap.

    Attributes:
        keep: ``(N,)``, bool.
        bounds: scores from the first to the second stay.
        num_dropped: number of units that do not.
    """

    keep: Tensor
    bounds: tuple[float, float]
    num_dropped: int


class Outcomes(NamedTuple):
    """Predicted outcomes of each unit under control and under treatment, from folds that the unit is not in.

    Attributes:
        mu0: ``(N,)``.
        mu1: ``(N,)``.
    """

    mu0: Tensor
    mu1: Tensor


def estimate(
    treatment: Any,
    propensity: Any = None,
    features: Any = None,
    groups: Any = None,
    num_folds: int = 5,
    seed: int = 0,
) -> Propensity:
    """The propensity of each unit.

    Args:
        treatment: zeros and ones ``(N,)``.
        propensity: None takes the share of treated units (a trial with one probability); a number or ``(N,)`` numbers
            are the design's own; ``"logistic"`` fits a ridge logistic regression on ``features``, cross-fitted by
            group.
        features: ``(N, P)``, for ``"logistic"``.
        groups: group of each unit, for the folds.
        num_folds: folds of the cross-fitting.
        seed: of the folds.

    Raises:
        ValueError: a propensity outside (0, 1), one arm only, ``"logistic"`` without features, or another word.
    """
    t = as_treatment(treatment)
    if propensity is None:
        return Propensity(t.mean().expand(len(t)).clone(), "constant")
    if not isinstance(propensity, str):
        constant = np.ndim(propensity.detach() if isinstance(propensity, Tensor) else propensity) == 0
        scores = check_scores([propensity] * len(t) if constant else propensity, len(t), t.device)
        return Propensity(scores, "constant" if constant else "given")
    if propensity != "logistic":
        raise ValueError(
            f'propensity must be None, a number, an array or "logistic" (in ImageCATE also "image"), got {propensity!r}'
        )
    if features is None:
        raise ValueError('propensity = "logistic" needs features, such as covariates, to predict the treatment from')
    x = as_matrix("features", features, len(t), t.device)
    folds = grouped_folds(groups, num_folds, seed, t)
    scores = torch.empty_like(t)
    for fold in range(num_folds):
        out = folds == fold
        _check_arms(t[~out], fold)
        scores[out] = LogisticRidge(x[~out], t[~out]).predict(x[out])
    return Propensity(check_scores(scores, len(t)), "logistic")


def check_scores(scores: Any, num_rows: int | None = None, device: torch.device | None = None) -> Tensor:
    """Propensity scores strictly inside (0, 1), float64 ``(N,)``.

    Raises:
        ValueError: one is not.
    """
    result = as_vector("propensity", scores, num_rows, device)
    outside = (result <= 0) | (result >= 1)
    if bool(outside.any()):
        where = int(outside.nonzero()[0])
        raise ValueError(
            f"propensity must lie strictly between 0 and 1; {int(outside.sum())} of {len(result)} values do not, the "
            f"first is {float(result[where])} at index {where}; leave out units whose treatment was certain"
        )
    return result


def trim(scores: Any, bounds: tuple[float, float] | Literal["crump"] = (0.05, 0.95)) -> Trimming:
    """Units whose propensity leaves both arms a chance.  Nothing is trimmed unless this is called.

    Args:
        scores: propensity ``(N,)``.
        bounds: least and largest score that stays; ``"crump"`` takes the symmetric bounds of least variance (Crump et
            al., 2009).

    Raises:
        ValueError: bounds out of order or outside [0, 1], or no unit would stay.
    """
    e = check_scores(scores)
    if isinstance(bounds, str):
        if bounds != "crump":
            raise ValueError(f'bounds must be two numbers or "crump", got {bounds!r}')
        low, high = _crump_bounds(e)
    else:
        low, high = map(float, bounds)
    if not 0 <= low < high <= 1:
        raise ValueError(f"bounds must be two numbers in order between 0 and 1, got {(low, high)}")
    keep = (e >= low) & (e <= high)
    if not bool(keep.any()):
        raise ValueError(f"no unit has a propensity between {low} and {high}")
    return Trimming(keep, (low, high), int((~keep).sum()))


def aipw_scores(outcome: Any, treatment: Any, scores: Any, mu0: Any, mu1: Any) -> Tensor:
    """Doubly robust scores ``mu1 - mu0 + T (Y - mu1) / e - (1 - T) (Y - mu0) / (1 - e)``, float64 ``(N,)``.

    Their mean estimates the average effect, and their mean over any set of units the effect there, if either the
    propensity or the predicted outcomes are right.  The predictions must come from data without the unit's group.

    Args:
        outcome: ``(N,)``.
        treatment: zeros and ones ``(N,)``.
        scores: propensity, a number or ``(N,)``.
        mu0: predicted outcome under control, ``(N,)``.
        mu1: predicted outcome under treatment, ``(N,)``.

    Raises:
        ValueError: NaN, shapes that differ, a treatment or a propensity out of range.
    """
    y = as_vector("outcome", outcome)
    n, device = len(y), y.device
    t = as_treatment(treatment, n, device)
    e = estimate(t, scores).scores
    f0, f1 = as_vector("mu0", mu0, n, device), as_vector("mu1", mu1, n, device)
    return f1 - f0 + t * (y - f1) / e - (1 - t) * (y - f0) / (1 - e)


def hajek(outcome: Any, treatment: Any, scores: Any, groups: Any = None) -> Estimate:
    """Difference of the arms' means, weighted by ``T / e`` and ``(1 - T) / (1 - e)`` normalised in each arm.

    With a constant propensity it is the difference in means.  The error is CR1 by group and takes the propensity as
    known.

    Raises:
        ValueError: as ``aipw_scores``.
    """
    y = as_vector("outcome", outcome)
    t = as_treatment(treatment, len(y), y.device)
    e = estimate(t, scores).scores
    weights = t / e + (1 - t) / (1 - e)
    design = torch.stack([torch.ones_like(t), t], 1)
    return least_squares(design, y, groups, weights).contrast(torch.tensor([0.0, 1.0]))


def cross_fit_outcomes(
    outcome: Any, treatment: Any, features: Any = None, groups: Any = None, num_folds: int = 5, seed: int = 0
) -> Outcomes:
    """Outcomes under both arms by ridge regression within each arm, cross-fitted by group.

    Args:
        outcome: ``(N,)``.
        treatment: zeros and ones ``(N,)``.
        features: ``(N, P)``; None predicts the arms' means.
        groups: group of each unit; a group is never split over folds.
        num_folds: folds.
        seed: of the folds.

    Raises:
        ValueError: as ``aipw_scores``, or a fold without one of the arms outside it.
    """
    y = as_vector("outcome", outcome)
    n, device = len(y), y.device
    t = as_treatment(treatment, n, device)
    x = y.new_zeros(n, 1) if features is None else as_matrix("features", features, n, device)
    folds = grouped_folds(groups, num_folds, seed, t)
    means = y.new_empty(2, n)
    for fold in range(num_folds):
        out = folds == fold
        _check_arms(t[~out], fold)
        for arm in (0, 1):
            rows = ~out & (t == arm)
            # The outer folds but this one also choose the penalty: groups stay whole there too.
            means[arm, out] = Ridge(x[rows], y[rows], folds[rows]).predict(x[out])
    return Outcomes(means[0], means[1])


def grouped_folds(groups: Any, num_folds: int, seed: int, treatment: Any) -> Tensor:
    """Fold of each unit, int64 ``(N,)``: whole groups, with treated shares and sizes alike over folds.

    Groups are sorted by treated share and size, equal ones in random order, and dealt to the folds in blocks, in random
    order within a block.

    Args:
        groups: group of each unit ``(N,)``; None: each unit alone.
        num_folds: at least 2, at most the number of groups.
        seed: of the random orders.
        treatment: zeros and ones ``(N,)``.

    Raises:
        ValueError: fewer groups than folds.
    """
    num_folds = check_count("num_folds", num_folds, 2)
    t = as_treatment(treatment)
    index = index_groups(groups, len(t), t.device)
    if index.count < num_folds:
        raise ValueError(f"num_folds = {num_folds} needs as many groups, there are {index.count}")
    size = group_sums(torch.ones_like(t), index)
    share = group_sums(t, index) / size
    stream = generator(seed, "grouped_folds", device=t.device)
    order = torch.randperm(index.count, generator=stream, device=t.device)
    order = order[size[order].argsort(stable=True)]
    order = order[share[order].argsort(stable=True)]
    blocks = -(-index.count // num_folds)
    deal = torch.rand(blocks, num_folds, generator=stream, device=t.device).argsort(1).flatten()[: index.count]
    fold = torch.empty_like(order)
    fold[order] = deal
    return fold[index.index]


def _check_arms(treatment: Tensor, fold: int) -> None:
    treated = int(treatment.sum())
    if min(treated, len(treatment) - treated) < 2:
        raise ValueError(
            f"without fold {fold} there are {treated} treated and {len(treatment) - treated} control units; "
            "each arm needs at least 2: use fewer folds or coarser groups"
        )


def _crump_bounds(scores: Tensor) -> tuple[float, float]:
    """Scores between ``a`` and ``1 - a`` stay, where ``g = 1 / (a (1 - a))`` solves ``g = 2 E[v | v <= g]`` for
    ``v = 1 / (e (1 - e))``.
    """
    inverse = 1 / (scores * (1 - scores))
    ordered = inverse.sort().values
    means = ordered.cumsum(0) / torch.arange(1, len(ordered) + 1, dtype=ordered.dtype, device=ordered.device)
    if bool(ordered[-1] <= 2 * means[-1]):
        return 0.0, 1.0
    # The conditional mean is constant between two order statistics; past the last that is at most twice it, g is above.
    threshold = float(2 * means[ordered <= 2 * means][-1])
    a = 0.5 - (0.25 - 1 / threshold) ** 0.5
    return a, 1 - a
