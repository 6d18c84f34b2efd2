"""The data of the demo and of the benchmarks: one published split of Boston housing, in the data's own units."""

from typing import NamedTuple

import torch
from torch import Tensor

from ppl_models.datasets import load_boston, uci_splits

__all__ = ["Split", "split"]


class Split(NamedTuple):
    """A data set cut in two.

    Attributes:
        name: of the data set.
        target: of the column that is predicted, with its unit.
        x_train: ``(N, D)``, float32.
        y_train: ``(N,)``.
        x_test: ``(N', D)``.
        y_test: ``(N',)``.
    """

    name: str
    target: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor

    def standardised(self) -> "Split":
        """Both sides shifted and scaled by mean and standard deviation of the training side."""
        shift, scale = self.x_train.mean(0), self.x_train.std(0, correction=0)
        mean, sd = self.y_train.mean(), self.y_train.std(correction=0)
        return self._replace(
            x_train=(self.x_train - shift) / scale,
            y_train=(self.y_train - mean) / sd,
            x_test=(self.x_test - shift) / scale,
            y_test=(self.y_test - mean) / sd,
        )


def split(number: int) -> Split:
    """Split ``number`` (0 to 9) of Tran et al. (JMLR 2022): 90 % to train on.

    Boston housing where it is found, otherwise the diabetes data that scikit-learn always has.
    """
    try:
        table = load_boston()
        name, target, x, y = "Boston housing", "median value of homes, 1000 dollars", table.x, table.y
    except FileNotFoundError:
        from sklearn.datasets import load_diabetes

        raw_x, raw_y = load_diabetes(return_X_y=True)
        name, target = "diabetes", "disease progression after one year"
        x, y = torch.tensor(raw_x, dtype=torch.float32), torch.tensor(raw_y, dtype=torch.float32)
    train, test = uci_splits(len(x))[number]
    return Split(name, target, x[train], y[train], x[test], y[test])
