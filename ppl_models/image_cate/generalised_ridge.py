"""Baseline and effect on fixed features by penalised likelihood, each with a penalty that held-out images choose.

The model is ``eta = b(x) + (T - e) tau(x)``, with ``b`` and ``tau`` linear in the features of the image and in the
columns of the unit.  Newton's steps on the log-likelihood are weighted ridge regressions of a working response (Green,
Iteratively reweighted least squares, J. R. Stat. Soc. B 46, 1984): with ``g`` and ``h`` the slope and the curvature of
a unit's negative log-likelihood in ``eta``,

    b   <- ridge of  b - g / h                  weighted by  h,
    tau <- ridge of  tau - g / (h (T - e))      weighted by  h (T - e)^2,

in turn; for the normal law these are the residual regressions of the R-learner (Nie and Wager, arXiv:1712.04912).

Few columns stand beside hundreds of features.  They are scaled to the same total variance, so that the prior that a
penalty amounts to gives the two sources the same spread, and a confounder among the columns is not shrunk away (van de
Wiel, van Nee and Rauschenberger, Fast cross-validation for multi-penalty ridge regression, arXiv:2005.09301).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ppl_models.image_cate.ridge import RidgePath
from ppl_models.image_cate.training import Prepared

__all__ = ["DesignRows", "LinearPredictors", "design_rows", "generalised_ridge"]

_TINY = 1e-9
_ROUNDS = 12  # of b and tau in turn, at most
_SETTLED = 0.002  # largest move of a predictor, below which they are left
_LEAST_CURVATURE = 1e-3  # of its mean: laws that are not log-concave have units of none


class DesignRows(NamedTuple):
    """Rows of a regression: of images where units have no columns, of units where they do.

    Attributes:
        rows: ``(R, F + M)``, double precision.
        image: of each row ``(R,)``.
        mask: which entries of the units' table are units ``(S, U)``.
        by_unit: whether rows are units.
    """

    rows: Tensor
    image: Tensor
    mask: Tensor
    by_unit: bool

    def collect(self, value: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Values and weights of the rows ``(R,)`` from those of the units ``(S, U)``: weighted means over images."""
        if self.by_unit:
            return value[self.mask], weight[self.mask]
        zero = torch.zeros_like(value)
        weight = torch.where(self.mask, weight, zero)
        total = weight.sum(1)
        return (weight * torch.where(self.mask, value, zero)).sum(1) / total.clamp_min(_TINY), total

    def table(self, predicted: Tensor) -> Tensor:
        """What is predicted for the rows ``(R, L)``, for the units ``(S, U, L)``."""
        if not self.by_unit:
            return predicted.unsqueeze(1).expand(-1, self.mask.shape[1], -1)
        table = predicted.new_zeros(*self.mask.shape, predicted.shape[-1])
        table[self.mask] = predicted
        return table


class LinearPredictors(NamedTuple):
    """Slopes ``(L, F + M)`` and intercepts ``(L,)`` of b and of tau, for features and columns as they were given."""

    slope: Tensor
    intercept: Tensor
    effect_slope: Tensor
    effect_intercept: Tensor


def design_rows(features: Tensor, columns: Tensor, mask: Tensor) -> DesignRows:
    """Rows from features ``(S, F)`` and columns ``(S, U, M)``."""
    images = torch.arange(len(features), device=features.device)
    if not columns.shape[-1]:
        return DesignRows(features.double(), images, mask, False)
    image = images.unsqueeze(1).expand_as(mask)[mask]
    return DesignRows(torch.cat([features.double()[image], columns.double()[mask]], 1), image, mask, True)


def generalised_ridge(prepared: Prepared, folds: Tensor) -> LinearPredictors:
    """The predictors of a trial whose images are standardised features ``(S, F)``.

    Args:
        prepared: the trial, with the units' propensities; where they equal the treatment, tau stays at the average.
        folds: of the images ``(S,)``, for the penalties.
    """
    units = prepared.units
    columns = torch.cat([units.modifiers, units.controls], -1)
    wide = prepared.images.shape[-1]
    balance = (wide / max(columns.shape[-1], 1)) ** 0.5
    design = design_rows(prepared.images, balance * columns, units.mask)
    share, average = units.treatment[units.mask].mean(), prepared.average_effect
    own = folds[design.image]
    b, tau = (_Predictor(design, own, start) for start in (prepared.baseline_start + share * average, average))
    centred = torch.where(units.mask, units.treatment - units.propensity, torch.ones_like(units.treatment)).double()
    weight = units.weight.double()
    turns = [(b, torch.ones_like(centred))]
    if bool((centred[units.mask] != 0).all()):
        turns.append((tau, centred))
    for _ in range(_ROUNDS):
        moves = []
        for part, factor in turns:
            eta = b.values + centred.unsqueeze(-1) * tau.values
            slope, curvature = _derivatives(prepared, eta)
            moves.append(part.update(slope / factor.unsqueeze(-1), curvature, weight * factor.square()))
        if max(moves) < _SETTLED:
            break
    scale = design.rows.new_ones(design.rows.shape[1])
    scale[wide:] = balance
    return LinearPredictors(b.slope * scale, b.intercept, tau.slope * scale, tau.intercept)


class _Predictor:
    """One of b and tau: its coefficients, its values ``(S, U, L)``, and the decompositions of its last weights."""

    def __init__(self, design: DesignRows, folds: Tensor, start: Tensor) -> None:
        self._design, self._folds = design, folds
        self._paths: dict[int, tuple[Tensor, RidgePath]] = {}
        self.intercept = start.double().clone()
        self.slope = self.intercept.new_zeros(len(start), design.rows.shape[1])
        self.values = self._table()

    def _table(self) -> Tensor:
        return self._design.table(self._design.rows @ self.slope.mT + self.intercept)

    def update(self, slope: Tensor, curvature: Tensor, weight: Tensor) -> float:
        """A Newton step by the slopes and curvatures ``(S, U, L)``; the largest move of a value."""
        for j in range(len(self.intercept)):
            target = self.values[..., j] - slope[..., j] / curvature[..., j]
            y, w = self._design.collect(target, weight * curvature[..., j])
            if j not in self._paths or not torch.equal(self._paths[j][0], w):
                self._paths[j] = w, RidgePath(self._design.rows, self._folds, w)
            found, at = self._paths[j][1].fit(y.unsqueeze(1))
            self.slope[j], self.intercept[j] = found[:, 0], at[0]
        before, self.values = self.values, self._table()
        return float((self.values - before)[self._design.mask].abs().max())


def _derivatives(prepared: Prepared, eta: Tensor) -> tuple[Tensor, Tensor]:
    """First and second derivatives of the negative log-likelihood in the predictors, ``(S, U, L)``; the second kept
    positive.  Noise is one for both arms, so that ``b`` is the mean over arms whatever tau is."""
    units, law = prepared.units, prepared.likelihood
    noise = prepared.noise_start.mean(0)
    with torch.enable_grad():
        leaf = eta.to(units.outcome).requires_grad_()
        each = -law.law(leaf, noise).log_prob(units.outcome)
        total = torch.where(units.mask, each, torch.zeros_like(each)).sum()
        slope = torch.autograd.grad(total, leaf, create_graph=True)[0]
        columns = [
            torch.autograd.grad(slope[..., j].sum(), leaf, retain_graph=True)[0][..., j] for j in range(slope.shape[-1])
        ]
    curvature = torch.stack(columns, -1).double().clamp_min(0)
    least = _LEAST_CURVATURE * curvature[units.mask].mean(0)
    return slope.detach().double(), torch.maximum(curvature, least)
