"""Discrete laws small enough to be written down: networks that are tables of exact marginals and conditionals."""

import itertools

import torch
from torch import Tensor, nn

__all__ = ["Table", "TableConditionals", "TableMarginals", "random_law", "states"]


def states(cardinalities: list[int], missing: bool = False) -> Tensor:
    """All rows, with -1 as a further value of each variable if ``missing``."""
    first = -1 if missing else 0
    return torch.tensor(list(itertools.product(*(range(first, k) for k in cardinalities))))


def random_law(cardinalities: list[int], seed: int = 0) -> Tensor:
    """Log-probabilities of all complete rows, in the order of ``states``."""
    g = torch.Generator().manual_seed(seed)
    return (1.5 * torch.randn(len(states(cardinalities)), generator=g, dtype=torch.float64)).log_softmax(0)


class Table(nn.Module):
    """A row's place among all partly observed rows."""

    def __init__(self, cardinalities: list[int]) -> None:
        super().__init__()
        sizes = torch.tensor([k + 1 for k in cardinalities])
        self.strides = torch.cat([sizes.flip(0).cumprod(0).flip(0)[1:], torch.ones(1, dtype=torch.long)])

    def place(self, values: Tensor) -> Tensor:
        return ((values + 1) * self.strides).sum(1)


class TableMarginals(Table):
    """Exact ``log p(x_S)``, one number for each partly observed row, as a parameter."""

    def __init__(self, cardinalities: list[int], log_p: Tensor) -> None:
        super().__init__(cardinalities)
        complete, partial = states(cardinalities), states(cardinalities, missing=True)
        fits = ((partial[:, None, :] == complete) | (partial[:, None, :] < 0)).all(2)
        table = log_p.expand(len(partial), -1).masked_fill(~fits, -torch.inf).logsumexp(1)
        self.table = nn.Parameter(table)

    def forward(self, values: Tensor, context: Tensor | None = None) -> Tensor:
        return self.table[self.place(values)]


class TableConditionals(Table):
    """``log p(x_j = k | x_S)`` of the same law, or of arbitrary ones (``random``)."""

    def __init__(self, cardinalities: list[int], log_p: Tensor, random: bool = False) -> None:
        super().__init__(cardinalities)
        partial, largest = states(cardinalities, missing=True), max(cardinalities)
        f = TableMarginals(cardinalities, log_p)
        found = torch.full((len(partial), len(cardinalities), largest), -torch.inf, dtype=torch.float64)
        g = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for j, k in enumerate(cardinalities):
                for level in range(k):
                    grown = partial.clone()
                    grown[:, j] = level
                    noise = torch.randn(len(partial), generator=g, dtype=torch.float64) if random else 0
                    found[:, j, level] = f(grown) + noise
        self.table = nn.Parameter(found.log_softmax(2))

    def forward(self, values: Tensor, context: Tensor | None = None) -> Tensor:
        return self.table[self.place(values)].log_softmax(2)
