"""Boston housing as the benchmarks use it: the data, the published splits, and the scores of a predictive."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Split", "boston", "load"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Split:
    """Inputs ``(N, D)`` and targets ``(N,)`` in the data's own units."""

    name: str
    x_train: Array
    y_train: Array
    x_test: Array
    y_test: Array

    def standardised(self) -> "Split":
        """Both sides shifted and scaled by the mean and the standard deviation of the training part."""
        xm, xs = self.x_train.mean(0), self.x_train.std(0)
        ym, ys = self.y_train.mean(), self.y_train.std()
        xs = np.where(xs > 0, xs, 1.0)
        x = [(part - xm) / xs for part in (self.x_train, self.x_test)]
        y = [(part - ym) / ys for part in (self.y_train, self.y_test)]
        return Split(self.name, x[0], y[0], x[1], y[1])


def load() -> tuple[str, Array, Array]:
    """Boston housing (506 x 13) where mlxtend brings it, otherwise scikit-learn's diabetes data (442 x 10)."""
    try:
        from mlxtend.data import boston_housing_data
    except ImportError:
        from sklearn.datasets import load_diabetes

        x, y = load_diabetes(return_X_y=True)
        return "diabetes", np.asarray(x, float), np.asarray(y, float)
    x, y = boston_housing_data()
    return "Boston housing", np.asarray(x, float), np.asarray(y, float)


def boston(split: int) -> Split:
    """Split ``split`` (0-9) of Tran et al. (JMLR 2022): 90 % for training, by the recipe of their index files."""
    if not 0 <= split < 10:
        raise ValueError(f"split must be 0 to 9, got {split}")
    name, x, y = load()
    rng = np.random.RandomState(1)  # the published splits were drawn from this legacy generator
    for _ in range(split + 1):
        order = rng.choice(len(x), len(x), replace=False)
    cut = math.floor(0.9 * len(x))
    train, test = order[:cut], order[cut:]
    return Split(name, x[train], y[train], x[test], y[test])
