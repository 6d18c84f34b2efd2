"""What one would use today for effects that vary with images: forests and regressions on summaries of the images.

Each learner fits a trial and predicts the effect of other images.  All get the same rows; those on summaries get 42
numbers an image.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

__all__ = ["Learner", "Prediction", "Trial", "accuracy", "image_summaries", "pehe", "two_means"]


@dataclass(frozen=True)
class Trial:
    """N units, M images.

    Attributes:
        outcome: ``(N,)``.
        treatment: ``(N,)``.
        images: ``(M, C, H, W)``.
        image_index: ``(N,)``.
        summaries: ``(M, 42)``, standardised.
        propensity: share of treated units by design.
    """

    outcome: Tensor
    treatment: Tensor
    images: Tensor
    image_index: Tensor
    summaries: Tensor
    propensity: float

    def rows(self, keep: Tensor) -> "Trial":
        """The units ``keep``, with all images."""
        return Trial(
            self.outcome[keep],
            self.treatment[keep],
            self.images,
            self.image_index[keep],
            self.summaries,
            self.propensity,
        )

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Outcome, treatment and summaries of the units, float64."""
        x = self.summaries[self.image_index]
        return self.outcome.double().numpy(), self.treatment.double().numpy(), x.double().numpy()


class Prediction(NamedTuple):
    """Predicted effects of images.

    Attributes:
        effect: ``(J,)``.
        types: 0 or 1 by effect ``(J,)``, where the learner has types of its own; None: its effects are cut by
            ``two_means``.
        interval: 90 % interval of each effect ``(J, 2)``, or None.
        type_effects: mean and standard error of each type, ``(K, 2)``, or None.
    """

    effect: Tensor
    types: Tensor | None = None
    interval: Tensor | None = None
    type_effects: Tensor | None = None


Learner = Callable[[Trial, Tensor, int], Prediction]


def image_summaries(images: Tensor) -> Tensor:
    """42 numbers an image, standardised over images: 14 of each of three channels, or of three scales of a grey image.

    Mean, standard deviation, five quantiles, mean absolute steps along rows and columns, mean and standard deviation of
    the absolute Laplacian, correlation of neighbours along rows, along columns and two apart.

    Args:
        images: ``(M, C, H, W)`` with C 1 or 3.
    """
    planes = images.double()
    if planes.shape[1] == 1:
        size = planes.shape[2:]
        scales = [planes] + [
            torch.nn.functional.interpolate(avg_pool2d(planes, k, ceil_mode=True), size=size) for k in (2, 4)
        ]
        planes = torch.cat(scales, 1)
    flat = planes.flatten(2)
    levels = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=planes.dtype)
    across, down = planes.diff(dim=3).abs(), planes.diff(dim=2).abs()
    inner = planes[..., 1:-1, 1:-1]
    around = planes[..., :-2, 1:-1] + planes[..., 2:, 1:-1] + planes[..., 1:-1, :-2] + planes[..., 1:-1, 2:]
    laplacian = (around - 4 * inner).abs()
    centred = planes - planes.mean((2, 3), keepdim=True)
    power = centred.square().mean((2, 3)) + 1e-12

    def lag(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).mean((2, 3)) / power

    parts = [
        flat.mean(2),
        flat.std(2),
        *flat.quantile(levels, dim=2),
        across.mean((2, 3)),
        down.mean((2, 3)),
        laplacian.mean((2, 3)),
        laplacian.std((2, 3)),
        lag(centred[..., :, 1:], centred[..., :, :-1]),
        lag(centred[..., 1:, :], centred[..., :-1, :]),
        lag(centred[..., :, 2:], centred[..., :, :-2]) - lag(centred[..., 2:, :], centred[..., :-2, :]),
    ]
    summary = torch.stack(parts, 2).flatten(1)
    return (summary - summary.mean(0)) / summary.std(0).clamp_min(1e-9)


def two_means(values: Tensor) -> Tensor:
    """The best cut of numbers ``(J,)`` into two groups by squared error: 0 for the lower, 1 for the upper."""
    ordered, order = values.double().sort()
    n = len(ordered)
    low = ordered.cumsum(0)[:-1]
    count = torch.arange(1, n, dtype=torch.float64)
    between = low.square() / count + (ordered.sum() - low).square() / (n - count)
    cut = int(between.argmax()) + 1
    types = torch.ones(n, dtype=torch.int64)
    types[order[:cut]] = 0
    return types


def forest_t(trial: Trial, where: Tensor, seed: int) -> Prediction:
    """scikit-learn's random forest within each arm."""
    from sklearn.ensemble import RandomForestRegressor

    y, t, x = trial.arrays()
    target = trial.summaries[where].double().numpy()
    arms = [
        RandomForestRegressor(300, min_samples_leaf=5, max_features=0.33, random_state=seed, n_jobs=1)
        .fit(x[t == arm], y[t == arm])
        .predict(target)
        for arm in (0, 1)
    ]
    return Prediction(torch.from_numpy(arms[1] - arms[0]))


def ridge_r(trial: Trial, where: Tensor, seed: int) -> Prediction:
    """R-learner: the outcome's residual on the treatment's times a linear effect, both ridge by cross-validation."""
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import GroupKFold, cross_val_predict

    y, t, x = trial.arrays()
    groups, folds = trial.image_index.numpy(), GroupKFold(5)
    penalties = np.logspace(-1, 5, 19)
    mean = cross_val_predict(RidgeCV(penalties), x, y, cv=folds.split(x, y, groups))
    treatment = t - trial.propensity
    pseudo = (y - mean) / treatment
    model = RidgeCV(penalties, cv=list(folds.split(x, y, groups))).fit(x, pseudo, sample_weight=treatment**2)
    return Prediction(torch.from_numpy(model.predict(trial.summaries[where].double().numpy())))


def causal_forest(trial: Trial, where: Tensor, seed: int) -> Prediction:
    """econml's CausalForestDML: 1,000 trees, forests for the outcome, the design's propensity."""
    from econml.dml import CausalForestDML
    from sklearn.dummy import DummyClassifier
    from sklearn.ensemble import RandomForestRegressor

    y, t, x = trial.arrays()
    model = CausalForestDML(
        model_y=RandomForestRegressor(200, min_samples_leaf=10, random_state=seed, n_jobs=1),
        model_t=DummyClassifier(),
        discrete_treatment=True,
        n_estimators=1000,
        min_samples_leaf=10,
        random_state=seed,
        n_jobs=1,
    )
    model.fit(y, t.astype(int), X=x, groups=trial.image_index.numpy())
    target = trial.summaries[where].double().numpy()
    low, high = model.effect_interval(target, alpha=0.1)
    return Prediction(torch.from_numpy(model.effect(target)), interval=torch.from_numpy(np.column_stack([low, high])))


def x_learner(trial: Trial, where: Tensor, seed: int) -> Prediction:
    """causalml's X-learner on scikit-learn's forests."""
    from causalml.inference.meta import BaseXRegressor
    from sklearn.ensemble import RandomForestRegressor

    y, t, x = trial.arrays()
    forest = RandomForestRegressor(300, min_samples_leaf=5, max_features=0.33, random_state=seed, n_jobs=1)
    model = BaseXRegressor(learner=forest)
    model.fit(X=x, treatment=t.astype(int), y=y, p=np.full(len(y), trial.propensity))
    target = trial.summaries[where].double().numpy()
    effect = model.predict(target, p=np.full(len(target), trial.propensity))
    return Prediction(torch.from_numpy(np.asarray(effect).reshape(-1)))


def accuracy(types: Tensor, truth: Tensor) -> float:
    """Share of images whose type is right; types are sorted by effect, so there is nothing to match."""
    return float((types == truth).double().mean())


def pehe(effect: Tensor, truth: Tensor) -> float:
    """Root mean squared error of effects."""
    return math.sqrt(float((effect - truth).square().mean()))
