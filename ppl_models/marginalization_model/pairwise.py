"""Recognise a density of unary and pairwise terms from its values, and evaluate the terms inside a subset.

Every function of K-valued variables is a sum of interaction terms; those of at most two variables are found from
values at rows that differ from a reference in at most two places (the anchored expansion), and brought to the
form in which each term sums to zero over each of its variables.  Whether they are all that there is, is tested at
random rows.  A further term that matters at a few states alone is seldom seen there: ``agrees`` asks at other rows.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["PairwiseEnergy", "agrees", "energy_of", "find_pairwise"]

_MOST_EVALUATIONS = 1 << 21
_ROWS = 1 << 14
_TEST_ROWS = 64


class PairwiseEnergy(nn.Module):
    """``constant + sum_j unary_j(x_j) + sum_(i, j) table_ij(x_i, x_j)``; terms with a missing variable are left out.

    Args:
        size: variables D.
        levels: largest number of values K.
    """

    constant: Tensor
    unary: Tensor
    pairs: Tensor
    tables: Tensor

    def __init__(self, size: int, levels: int) -> None:
        super().__init__()
        self.levels = levels
        # The number of pairs is only known once a density was seen: the model's file carries them beside its state.
        self.register_buffer("constant", torch.zeros(()), persistent=False)
        self.register_buffer("unary", torch.zeros(size, levels + 1), persistent=False)
        self.register_buffer("pairs", torch.zeros(0, 2, dtype=torch.long), persistent=False)
        self.register_buffer("tables", torch.zeros(0, (levels + 1) ** 2), persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        """``(B, D)`` to ``(B,)``."""
        place = values + 1  # 0 where missing, where the tables hold zeros
        rows = torch.arange(values.shape[1], device=values.device)
        total = self.constant + self.unary[rows, place].sum(1)
        both = place[:, self.pairs[:, 0]] * (self.levels + 1) + place[:, self.pairs[:, 1]]
        return total + self.tables.gather(1, both.T).sum(0)

    def set_terms(self, constant: Tensor, unary: Tensor, pairs: Tensor, tables: Tensor) -> None:
        """Put the terms in place, on the device and in the dtype of the module."""
        for name, value in (("constant", constant), ("unary", unary), ("tables", tables)):
            setattr(self, name, value.to(getattr(self, name)))
        self.pairs = pairs.to(self.pairs)

    def terms(self) -> dict[str, Tensor]:
        """The terms, for a file."""
        return {"constant": self.constant, "unary": self.unary, "pairs": self.pairs, "tables": self.tables}


def energy_of(terms: dict[str, Tensor]) -> PairwiseEnergy:
    """The terms as a module, in their own dtype."""
    size, places = terms["unary"].shape
    energy = PairwiseEnergy(size, places - 1).to(terms["unary"])
    energy.set_terms(**terms)
    return energy


@torch.no_grad()
def agrees(terms: dict[str, Tensor], log_density: Callable[[Tensor], Tensor], rows: Tensor) -> bool:
    """Whether the terms are all that the density has at these rows ``(B, D)``, but for its rounding."""
    found = log_density(rows)
    if not bool(torch.isfinite(found).all()):
        return False
    return bool((energy_of(terms)(rows) - found.double()).abs().max() <= 1024 * _rounding(found))


def _rounding(values: Tensor) -> float:
    """Of numbers of this size in this dtype; those of integers have none but float64's."""
    eps = torch.finfo(values.dtype).eps if values.dtype.is_floating_point else 0.0
    return max(float(values.double().abs().max()), 1.0) * max(eps, torch.finfo(torch.float64).eps)


@torch.no_grad()
def find_pairwise(
    log_density: Callable[[Tensor], Tensor], cardinalities: Tensor, generator: torch.Generator
) -> dict[str, Tensor] | None:
    """The terms of ``log_density``, or None where it has terms of more than two variables, or is too large to tell.

    Args:
        log_density: ``(B, D) -> (B,)``.
        cardinalities: ``(D,)``, on the device where the density is asked.
        generator: of the rows that test it.
    """
    size, device = len(cardinalities), cardinalities.device
    extra = (cardinalities - 1).tolist()
    singles = sum(extra)
    if 1 + singles + (singles**2 - sum(k * k for k in extra)) // 2 > _MOST_EVALUATIONS:
        return None
    u = torch.rand(_TEST_ROWS, size, generator=generator, device=device)
    test = torch.minimum((u * cardinalities).long(), cardinalities - 1)
    raw = log_density(test)
    truth = raw.double()
    # The places that differ from a reference: (variable, value), one and two at a time.  At a random row the density is
    # of usual size, and the rounding errors of its differences have any sign; at a row of zeros they may be alike.
    reference = test[truth.abs().argmin()]
    where = torch.repeat_interleave(torch.arange(size, device=device), cardinalities - 1)
    step = torch.cat([torch.arange(1, k + 1, device=device) for k in extra]) if singles else where
    value = (reference[where] + step) % cardinalities[where]
    first, second = torch.triu_indices(singles, singles, 1, device=device)
    distinct = where[first] != where[second]
    first, second = first[distinct], second[distinct]
    zero = log_density(reference.unsqueeze(0)).double()

    def ask(places: list[Tensor]) -> Tensor:
        """The density at the reference, but for the given (variable, value) places."""
        found = []
        for chunk in zip(*(p.split(_ROWS) for p in places), strict=True):
            rows = reference.repeat(len(chunk[0]), 1)
            for p in chunk:
                rows.scatter_(1, where[p].unsqueeze(1), value[p].unsqueeze(1))
            found.append(log_density(rows).double())
        return torch.cat(found) if found else zero[:0]

    one = ask([torch.arange(singles, device=device)]) - zero
    two = ask([first, second]) - one[first] - one[second] - zero
    if not all(bool(torch.isfinite(part).all()) for part in (zero, one, two, truth)):
        return None
    levels = int(cardinalities.max())
    possible = (torch.arange(levels, device=device) < cardinalities.unsqueeze(1)).double()
    unary = torch.zeros(size, levels, dtype=torch.float64, device=device)
    unary[where, value] = one
    keep = two.abs() > 64 * _rounding(raw)
    edges = where[first[keep]] * size + where[second[keep]]
    names, index = edges.unique(return_inverse=True)
    pairs = torch.stack([names // size, names % size], 1)
    tables = torch.zeros(len(pairs), levels, levels, dtype=torch.float64, device=device)
    tables[index, value[first[keep]], value[second[keep]]] = two[keep]
    constant = zero[0]
    # Each table to zero mean over either variable; what is taken out goes to the unary terms, theirs to the constant.
    left, right = possible[pairs[:, 0]], possible[pairs[:, 1]]
    over_left = (tables * left.unsqueeze(2)).sum(1) / left.sum(1, keepdim=True)
    tables = (tables - over_left.unsqueeze(1)) * left.unsqueeze(2) * right.unsqueeze(1)
    unary.index_add_(0, pairs[:, 1], over_left * right)
    over_right = (tables * right.unsqueeze(1)).sum(2) / right.sum(1, keepdim=True)
    tables = (tables - over_right.unsqueeze(2)) * left.unsqueeze(2) * right.unsqueeze(1)
    unary.index_add_(0, pairs[:, 0], over_right * left)
    level = (unary * possible).sum(1) / possible.sum(1)
    unary = (unary - level.unsqueeze(1)) * possible
    constant = constant + level.sum()
    padded = torch.zeros(len(pairs), levels + 1, levels + 1, dtype=torch.float64, device=device)
    padded[:, 1:, 1:] = tables
    terms = {
        "constant": constant,
        "unary": torch.cat([torch.zeros_like(unary[:, :1]), unary], 1),
        "pairs": pairs,
        "tables": padded.flatten(1),
    }
    return terms if agrees(terms, log_density, test) else None
