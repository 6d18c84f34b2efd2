"""Small subsets: exact frequencies and products, and losses that are least where these are met."""

import pytest
import torch

from inference.any_order import Marginals
from inference.objectives.masked_completion import MaskedCompletion
from inference.objectives.small_sets import PairMarginals, SingleConditions, pair_frequencies, pair_products
from inference.runtime.generators import scoped_seed
from tests.inference.tabular import TableConditionals, TableMarginals, random_law, states

MIXED = [2, 3, 1, 4]
SIZES = torch.tensor(MIXED)
LAW = random_law(MIXED)


def test_frequencies_of_pairs_by_counting() -> None:
    with scoped_seed(0):
        x = states(MIXED)[torch.multinomial(LAW.exp(), 300, replacement=True)]
        x = x.masked_fill(torch.rand(x.shape) < 0.2, -1)
    found = pair_frequencies(x, SIZES)
    assert found is not None and found.shape == (10, 4, 4)
    # value 2 of variable 1 is the fifth of the single rows; its neighbour is variable 3
    both = (x[:, 1] == 2) & (x[:, 3] >= 0)
    counts = torch.bincount(x[both][:, 3], minlength=4)
    alone = torch.bincount(x[x[:, 3] >= 0][:, 3], minlength=4) + 0.5
    expected = (counts + alone / alone.sum()) / (counts.sum() + 1)
    assert torch.allclose(found[4, 3], expected.float(), atol=1e-6)
    assert torch.allclose(found.sum(2), torch.ones(10, 4), atol=1e-5) and bool((found[:, 2, 1:] == 0).all())
    assert pair_frequencies(torch.zeros(3, 5, dtype=torch.long), torch.full((5,), 500)) is None


def test_products_of_exact_conditionals_are_exact_marginals() -> None:
    f, g = TableMarginals(MIXED, LAW), TableConditionals(MIXED, LAW)
    products = pair_products(g, SIZES)
    assert products is not None
    loss = PairMarginals(products, SIZES, few=1000)
    assert len(loss.first) == 10 + (100 - 4 - 9 - 1 - 16) // 2, "values of two variables, and single ones"
    rows = torch.maximum(loss.rows[loss.first], loss.rows[loss.second])
    assert torch.allclose(products[loss.first, loss.second], f(rows), atol=1e-12)
    assert float(loss(f).detach()) < 1e-24
    # where orders disagree, the mean of both
    odd = TableConditionals(MIXED, LAW, random=True)
    with torch.no_grad():
        nothing, a, b = (torch.tensor([row]) for row in ([-1] * 4, [1, -1, -1, -1], [-1, 2, -1, -1]))
        one_way = odd(nothing)[0, 0, 1] + odd(a)[0, 1, 2]
        other = odd(nothing)[0, 1, 2] + odd(b)[0, 0, 1]
    mixed = pair_products(odd, SIZES)
    assert mixed is not None and abs(float(mixed[1, 4].exp() - (one_way.exp() + other.exp()) / 2)) < 1e-12


def test_an_error_counts_by_its_probability() -> None:
    f, g = TableMarginals(MIXED, LAW), TableConditionals(MIXED, LAW)
    products = pair_products(g, SIZES)
    assert products is not None
    row = torch.tensor([[1, 2, -1, -1]])
    with torch.no_grad():
        p = f(row).exp()
        f.table[f.place(row)] += 0.5
    assert abs(float(PairMarginals(products, SIZES, few=1000)(f).detach()) - float(4 * p * 0.25 / 45)) < 1e-12
    sampled = PairMarginals(products, SIZES, few=5)
    with torch.no_grad(), scoped_seed(0):
        mean = torch.stack([sampled(f) for _ in range(4000)])
    assert abs(float(mean.mean()) - float(4 * p * 0.25 / 45)) < 5 * float(mean.std()) / 4000**0.5


@pytest.mark.parametrize("few", [64, 4])  # of 4 rows are drawn
def test_the_loss_of_single_conditions_is_least_at_the_frequencies(few: int) -> None:
    with scoped_seed(0):
        x = states(MIXED)[torch.multinomial(LAW.exp(), 400, replacement=True)]
    frequencies = pair_frequencies(x, SIZES)
    assert frequencies is not None
    loss = SingleConditions(frequencies.double(), x, SIZES).double()
    g = TableConditionals(MIXED, LAW)
    place = g.place(loss.rows)
    with torch.no_grad():
        g.table[place] = loss.targets.log().clamp(min=-80)
    with scoped_seed(0):
        at_best = loss(g, few)
        gradient = torch.autograd.grad(at_best, g.table)[0]
    assert gradient.abs().max() < 1e-9
    with torch.no_grad(), scoped_seed(0):
        g.table[place] += torch.randn(g.table[place].shape).double()
        assert loss(g, few) > at_best + 0.01


def test_single_conditions_count_in_training_alone() -> None:
    x = states(MIXED)
    frequencies = pair_frequencies(x, SIZES)
    assert frequencies is not None
    g = TableConditionals(MIXED, LAW)
    objective = MaskedCompletion(g, SingleConditions(frequencies, x, SIZES))

    def value(module: MaskedCompletion) -> float:
        with torch.no_grad(), scoped_seed(0):
            return float(module(x))

    in_training = value(objective)
    assert value(objective.eval()) == value(MaskedCompletion(g)) < in_training - 0.5


def test_few_single_conditions_beside_few_rows() -> None:
    """So that a small batch does not cost twice: an eighth as many, at least 8, and the empty one."""
    sizes = torch.tensor([20] * 4)
    x = torch.randint(20, (100, 4), generator=torch.Generator().manual_seed(0))
    frequencies = pair_frequencies(x, sizes)
    assert frequencies is not None
    seen = []

    class Flat(torch.nn.Module):
        def forward(self, values: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
            seen.append(len(values))
            return torch.zeros(len(values), 4, 20).log_softmax(2)

    objective = MaskedCompletion(Flat(), SingleConditions(frequencies, x, sizes))
    with scoped_seed(0):
        for rows in (96, 8):
            objective(x[:rows])
    assert seen == [96, 13, 8, 9]


def test_missing_tables_need_no_context() -> None:
    def flat(values: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        return torch.zeros(len(values), 2, 2).log_softmax(2)

    products = pair_products(flat, torch.tensor([2, 2]))
    assert products is not None and torch.allclose(products[0, 2:].exp(), torch.full((2,), 0.25))
    marginals: Marginals = lambda values, context: (values >= 0).sum(1) * -torch.tensor(2.0).log()  # noqa: E731
    assert float(PairMarginals(products, torch.tensor([2, 2]))(marginals)) < 1e-12
