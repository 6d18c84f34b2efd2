"""Can treated and control units be compared at all: overlap of propensities, balance of covariates.

Austin (2009) for standardised differences after weighting; an absolute difference above 0.1 is the usual mark of
imbalance.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inference.results.brief import brief
from ppl_models.image_cate.checks import as_matrix, as_treatment
from ppl_models.image_cate.propensity import check_scores

__all__ = ["Balance", "Overlap", "balance", "overlap"]


@brief
@dataclass(frozen=True)
class Overlap:
    """How the propensity lies in each arm; index 0 is control, 1 treated.

    Attributes:
        num_units: ``(2,)``.
        quantiles: least, 5 %, 25 %, 50 %, 75 %, 95 % and largest propensity, ``(2, 7)``.
        effective_sizes: number of equally weighted units that know as much, ``(sum w)^2 / sum w^2`` of the inverse
            probability weights, ``(2,)``.
        largest_weight_shares: share of an arm's weight that its heaviest unit has, ``(2,)``.
        common_range: the largest of the arms' least scores and the least of their largest.
        share_outside: share of units whose score is not in the common range.
    """

    num_units: Tensor
    quantiles: Tensor
    effective_sizes: Tensor
    largest_weight_shares: Tensor
    common_range: tuple[float, float]
    share_outside: float


@brief
@dataclass(frozen=True)
class Balance:
    """Means of covariates by arm, before and after weighting by the inverse propensity.

    Attributes:
        names: of the P covariates.
        means: control and treated, ``(P, 2)``.
        weighted_means: the same, weighted, ``(P, 2)``.
        differences: standardised mean differences, ``(P,)``: over the root of the arms' mean variance.
        weighted_differences: the same of weighted means, over the same root.
        variance_ratios: treated over control, ``(P,)``; NaN where control units do not vary.
    """

    names: tuple[str, ...]
    means: Tensor
    weighted_means: Tensor
    differences: Tensor
    weighted_differences: Tensor
    variance_ratios: Tensor

    @property
    def largest(self) -> float:
        """Largest absolute weighted standardised difference."""
        return float(self.weighted_differences.abs().max())


def overlap(treatment: Any, scores: Any) -> Overlap:
    """Overlap of the arms' propensities.

    Args:
        treatment: zeros and ones ``(N,)``.
        scores: propensity ``(N,)``.

    Raises:
        ValueError: one arm only, or a propensity outside (0, 1).
    """
    t = as_treatment(treatment)
    e = check_scores(scores, len(t), t.device)
    levels = torch.tensor([0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0], dtype=e.dtype, device=e.device)
    arms = [e[t == 0], e[t == 1]]
    weights = [1 / (1 - arms[0]), 1 / arms[1]]
    quantiles = torch.stack([arm.quantile(levels) for arm in arms])
    low, high = float(quantiles[:, 0].max()), float(quantiles[:, -1].min())
    return Overlap(
        num_units=torch.tensor([len(arm) for arm in arms]),
        quantiles=quantiles,
        effective_sizes=torch.stack([w.sum().square() / w.square().sum() for w in weights]),
        largest_weight_shares=torch.stack([w.max() / w.sum() for w in weights]),
        common_range=(low, high),
        share_outside=float(((e < low) | (e > high)).double().mean()),
    )


def balance(treatment: Any, covariates: Any, scores: Any = None, names: Sequence[str] | None = None) -> Balance:
    """Balance of covariates, or of any summary of the images.

    Args:
        treatment: zeros and ones ``(N,)``.
        covariates: ``(N, P)``, without missing values.
        scores: propensity ``(N,)``; None: constant, so that weighting changes nothing.
        names: of the columns; of a data frame, its columns.

    Raises:
        ValueError: NaN, shapes that differ, an arm of fewer than two units.
    """
    if names is None:
        names = [str(c) for c in getattr(covariates, "columns", ())]
    t = as_treatment(treatment)
    x = as_matrix("covariates", covariates, len(t), t.device)
    labels = tuple(names) if len(names) else tuple(f"x{j + 1}" for j in range(x.shape[1]))
    if len(labels) != x.shape[1]:
        raise ValueError(f"names must hold one name a column, {x.shape[1]}, got {len(labels)}")
    e = torch.full_like(t, 0.5) if scores is None else check_scores(scores, len(t), t.device)
    rows = [t == 0, t == 1]
    if min(int(r.sum()) for r in rows) < 2:
        raise ValueError("treatment must leave at least two units in each arm to compare their covariates")
    weights = [1 / (1 - e[rows[0]]), 1 / e[rows[1]]]
    means = torch.stack([x[r].mean(0) for r in rows], 1)
    weighted = torch.stack([w @ x[r] / w.sum() for w, r in zip(weights, rows, strict=True)], 1)
    variances = torch.stack([x[r].var(0) for r in rows], 1)
    scale = variances.mean(1).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    return Balance(
        labels,
        means,
        weighted,
        (means[:, 1] - means[:, 0]) / scale,
        (weighted[:, 1] - weighted[:, 0]) / scale,
        torch.where(variances[:, 0] > 0, variances[:, 1] / variances[:, 0], torch.nan),
    )
