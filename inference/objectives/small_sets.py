"""Subsets of at most two variables, all of them: few, asked often, and seldom met by a random subset.

A uniformly random subset of D variables holds one of them with probability 1 / D, so that stochastic gradients leave
the conditionals of one variable given another, and the marginals of pairs, as noisy as nothing else.  Their exact
targets fit into one ``(D K, D K)`` matrix: what data say of every pair, or what conditionals say.
"""

import torch
from torch import Tensor, nn

from inference.any_order import Conditionals, Marginals, value_counts

__all__ = ["PairMarginals", "SingleConditions", "pair_frequencies", "pair_products"]

_MOST = 2048  # D K: the matrix stays under 16 MiB
_AT_ONCE = 1 << 14  # rows of a product
_MOST_PRODUCTS = 1 << 37  # in counting pairs: some seconds on a core
_PRIOR = 0.5  # observations of each pair of values beforehand


def _one_hot(values: Tensor, levels: int) -> Tensor:
    return (values.unsqueeze(-1) == torch.arange(levels, device=values.device)).flatten(1)


def _single_rows(cardinalities: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Variable and value of every row that shows one variable, and the rows ``(M, D)``."""
    variable = torch.repeat_interleave(cardinalities)
    first = cardinalities.cumsum(0) - cardinalities
    value = torch.arange(len(variable), device=variable.device) - first[variable]
    rows = torch.full((len(variable), len(cardinalities)), -1, device=variable.device)
    rows.scatter_(1, variable.unsqueeze(1), value.unsqueeze(1))
    return variable, value, rows


@torch.no_grad()
def pair_frequencies(values: Tensor, cardinalities: Tensor) -> Tensor | None:
    """``p(x_j = b | x_i = a)`` in rows that have both, ``(M, D, K)`` for the M pairs (i, a), shrunk to ``p(x_j = b)``.

    None where D K is above 2048.  Of very many rows, they are counted at a stride.

    Args:
        values: ``(N, D)``, -1 where missing.
        cardinalities: ``(D,)``.
    """
    levels = int(cardinalities.max())
    if len(cardinalities) * levels > _MOST:
        return None
    variable, value, _ = _single_rows(cardinalities)
    chosen = variable * levels + value
    size = len(cardinalities) * levels
    counts = torch.zeros(size, size, device=values.device)
    values = values[:: -(-len(values) * size**2 // _MOST_PRODUCTS)]
    for part in values.split(_AT_ONCE):
        hot = _one_hot(part, levels).float()
        counts += hot.mT @ hot
    alone = counts.diagonal().unflatten(0, (-1, levels)) + _PRIOR
    alone = alone * (torch.arange(levels, device=values.device) < cardinalities.unsqueeze(1))
    alone = alone / alone.sum(1, keepdim=True)
    both = counts[chosen].unflatten(1, (-1, levels)) + 2 * _PRIOR * alone
    return both / both.sum(2, keepdim=True)


class SingleConditions(nn.Module):
    """Cross-entropy of ``p(x_j | nothing)`` and of all ``p(x_j | x_i)`` from data's own frequencies, per variable j.

    Of many rows that show one variable, some are drawn for an update.

    Args:
        frequencies: ``pair_frequencies`` of the data.
        values: the data, for the frequencies of single values.
        cardinalities: ``(D,)``.
    """

    rows: Tensor
    weights: Tensor
    targets: Tensor

    def __init__(self, frequencies: Tensor, values: Tensor, cardinalities: Tensor) -> None:
        super().__init__()
        variable, value, rows = _single_rows(cardinalities)
        levels = frequencies.shape[2]
        alone = value_counts(values, levels) + _PRIOR
        alone = alone * (torch.arange(levels, device=values.device) < cardinalities.unsqueeze(1))
        alone = alone / alone.sum(1, keepdim=True)
        empty = torch.full_like(rows[:1], -1)
        self.register_buffer("rows", torch.cat([rows, empty]), persistent=False)
        self.register_buffer("weights", alone[variable, value], persistent=False)
        self.register_buffer("targets", torch.cat([frequencies, alone.unsqueeze(0)]), persistent=False)

    def forward(self, conditionals: Conditionals, few: int = 64) -> Tensor:
        """Nats a variable, from ``few`` of the rows if there are more than twice as many."""
        rows, targets, weights = self.rows, self.targets, self.weights
        if len(weights) > 2 * few:
            chosen = torch.multinomial(weights, few)
            keep = torch.cat([chosen, chosen.new_tensor([len(rows) - 1])])
            rows, targets, weights = rows[keep], targets[keep], torch.ones_like(weights[chosen])
        weights = torch.cat([weights / weights.sum(), weights.new_ones(1)])  # all single rows count as the empty one
        log_p = conditionals(rows, None)
        entropy = -(targets * log_p.masked_fill(targets == 0, 0.0)).sum(2)
        free = rows < 0
        return (weights * (entropy * free).sum(1) / free.sum(1).clamp(min=1)).sum() / 2


@torch.no_grad()
def pair_products(conditionals: Conditionals, cardinalities: Tensor) -> Tensor | None:
    """``log p(x_i = a, x_j = b)`` by the chain rule, the mean of both orders, ``(M, M)``; None where D K is above 2048.

    The diagonal holds ``log p(x_i = a)``; two values of one variable get minus infinity.
    """
    levels = int(cardinalities.max())
    if len(cardinalities) * levels > _MOST:
        return None
    variable, value, rows = _single_rows(cardinalities)
    chosen = variable * levels + value
    alone = conditionals(torch.full_like(rows[:1], -1), None).flatten(1)[0, chosen]
    given = torch.cat([conditionals(part, None).flatten(1)[:, chosen] for part in rows.split(256)])
    one_way = alone.unsqueeze(1) + given
    both = torch.logaddexp(one_way, one_way.mT) - torch.log(one_way.new_tensor(2.0))
    both = both.masked_fill(variable.unsqueeze(1) == variable, -torch.inf)
    return both.diagonal_scatter(alone)


class PairMarginals(nn.Module):
    """Squared error of ``f`` at sets of one and two variables, weighted by their probability.

    Args:
        log_targets: ``pair_products``.
        cardinalities: ``(D,)``.
        few: sets in an update; all of them if there are no more.
    """

    rows: Tensor
    first: Tensor
    second: Tensor
    log_targets: Tensor

    def __init__(self, log_targets: Tensor, cardinalities: Tensor, few: int = 512) -> None:
        super().__init__()
        _, _, rows = _single_rows(cardinalities)
        first, second = (torch.isfinite(log_targets).triu()).nonzero(as_tuple=True)
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("first", first, persistent=False)
        self.register_buffer("second", second, persistent=False)
        self.register_buffer("log_targets", log_targets, persistent=False)
        self.few = few

    def forward(self, marginals: Marginals) -> Tensor:
        """Mean of ``K^2 p (log p - f)^2``, so that a set of average probability counts one."""
        first, second = self.first, self.second
        if len(first) > self.few:
            chosen = torch.randint(len(first), (self.few,), device=first.device)
            first, second = first[chosen], second[chosen]
        log_p = self.log_targets[first, second]
        error = log_p - marginals(torch.maximum(self.rows[first], self.rows[second]), None)
        return (log_p.exp() * error.square()).mean() * 4
