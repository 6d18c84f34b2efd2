"""Least squares with errors that hold when units of a group are alike (cluster-robust).

CR1 is Liang and Zeger's (1986) sandwich with the factor ``G / (G - 1) (N - 1) / (N - P)`` that Stata and statsmodels
use; CR3 is the jackknife over groups (Bell and McCaffrey, 2002), safer with few or uneven groups.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from inference.results.brief import brief
from ppl_models.image_cate.checks import as_matrix, as_vector, group_sums, index_groups

__all__ = ["Estimate", "Regression", "clustered_mean", "least_squares"]


@brief
@dataclass(frozen=True)
class Estimate:
    """A number and its standard error, which follows the normal law.

    Attributes:
        estimate: in units of the outcome.
        standard_error: cluster-robust.
    """

    estimate: float
    standard_error: float

    @property
    def ratio(self) -> float:
        """Estimate over standard error."""
        return self.estimate / self.standard_error if self.standard_error > 0 else math.nan

    @property
    def p_value(self) -> float:
        """Two-sided, of the estimate against 0."""
        return math.erfc(abs(self.ratio) / math.sqrt(2))

    def interval(self, alpha: float = 0.1) -> tuple[float, float]:
        """The ``1 - alpha`` interval.

        Raises:
            ValueError: alpha outside (0, 1).
        """
        if not 0 < alpha < 1:
            raise ValueError(f"alpha must lie between 0 and 1, got {alpha}")
        half = float(torch.special.ndtri(torch.tensor(1 - alpha / 2, dtype=torch.float64))) * self.standard_error
        return self.estimate - half, self.estimate + half


@dataclass(frozen=True)
class Regression:
    """A linear regression.

    Attributes:
        coefficients: ``(P,)``.
        covariance: cluster-robust, ``(P, P)``.
        num_groups: G.
    """

    coefficients: Tensor
    covariance: Tensor
    num_groups: int

    @property
    def standard_errors(self) -> Tensor:
        """``(P,)``."""
        return self.covariance.diagonal().clamp_min(0).sqrt()

    def contrast(self, weights: Tensor) -> Estimate:
        """A linear combination ``weights`` ``(P,)`` of the coefficients."""
        weights = weights.to(self.coefficients)
        variance = float(weights @ self.covariance @ weights)
        return Estimate(float(weights @ self.coefficients), math.sqrt(max(variance, 0.0)))


def least_squares(
    design: Any, outcome: Any, groups: Any = None, weights: Any = None, correction: Literal["CR1", "CR3"] = "CR1"
) -> Regression:
    """Weighted least squares; the design holds its own column of ones, if one is wanted.

    Args:
        design: ``(N, P)``.
        outcome: ``(N,)``.
        groups: group of each unit; None makes the error robust to unequal variances only (HC1, or the jackknife).
        weights: ``(N,)``, not negative.
        correction: ``"CR1"`` or ``"CR3"``.

    Raises:
        ValueError: columns that depend on each other, fewer than two groups, no more units than columns.
    """
    outcome = as_vector("outcome", outcome)
    n, device = len(outcome), outcome.device
    x = as_matrix("design", design, n, device)
    p = x.shape[1]
    weight = torch.ones_like(outcome) if weights is None else as_vector("weights", weights, n, device)
    if bool((weight < 0).any()):
        raise ValueError("weights must not be negative")
    if correction not in ("CR1", "CR3"):
        raise ValueError(f'correction must be "CR1" or "CR3", got {correction!r}')
    if n <= p:
        raise ValueError(f"design has {p} columns and {n} rows; a regression needs more rows than columns")
    clusters = index_groups(groups, n, device, least=2)
    scale = (weight.unsqueeze(1) * x * x).sum(0).sqrt()
    if bool((scale == 0).any()):
        raise ValueError(f"design column {int((scale == 0).nonzero()[0])} is zero wherever the weight is positive")
    x = x / scale
    gram = x.mT @ (weight.unsqueeze(1) * x)
    if float(torch.linalg.eigvalsh(gram)[0]) < 1e-10:
        raise ValueError("design has columns that depend on each other; drop the redundant ones")
    inverse = torch.linalg.inv(gram)
    coefficients = inverse @ (x.mT @ (weight * outcome))
    residual = outcome - x @ coefficients
    group_score = group_sums((weight * residual).unsqueeze(1) * x, clusters)
    g = clusters.count
    if correction == "CR1":
        shift = group_score @ inverse
        factor = g / (g - 1) * (n - 1) / (n - p)
    else:
        group_gram = group_sums(weight[:, None, None] * x.unsqueeze(2) * x.unsqueeze(1), clusters)
        shift = (torch.linalg.pinv(gram - group_gram, hermitian=True) @ group_score.unsqueeze(2)).squeeze(2)
        factor = (g - 1) / g
    covariance = factor * (shift.mT @ shift)
    return Regression(coefficients / scale, covariance / (scale.unsqueeze(0) * scale.unsqueeze(1)), g)


def clustered_mean(values: Any, groups: Any = None, weights: Any = None) -> Estimate:
    """The (weighted) mean of ``values`` ``(N,)`` with a CR1 error by group.

    Without groups and weights the error is the usual standard error of a mean.

    Raises:
        ValueError: as ``least_squares``.
    """
    values = as_vector("values", values)
    return least_squares(values.new_ones(len(values), 1), values, groups, weights).contrast(torch.ones(1))
