"""Orders, the chain rule, ancestral draws and block Gibbs, against laws that are written down."""

import itertools
import math

import pytest
import torch
from scipy.stats import chisquare

from inference.any_order import (
    ancestral,
    as_proposal,
    block_gibbs,
    chain_rule,
    from_marginals,
    hide,
    random_ranks,
    value_counts,
)
from inference.objectives.masked_completion import MaskedCompletion, completion_loss, uniform_depth
from inference.objectives.persistent_chains import PersistentChains, uniform_values
from inference.objectives.self_consistency import draw_depth
from inference.runtime.generators import scoped_seed
from tests.inference.tabular import TableConditionals, TableMarginals, random_law, states

MIXED = [2, 3, 2, 4]
LAW = random_law(MIXED)


def test_pairs_reveal_each_size_and_each_subset_equally_often() -> None:
    draws, size = 60_000, 6
    values = torch.zeros(draws, size, dtype=torch.long)
    with scoped_seed(0):
        ranks, depth = random_ranks(values), uniform_depth(torch.full((draws,), size))
    prev, cur = hide(values, ranks < depth[:, None]), hide(values, ranks <= depth[:, None])
    observed, grown = prev >= 0, cur >= 0
    assert torch.equal(observed.sum(1), depth) and bool((grown.sum(1) == depth + 1).all())
    assert bool((grown | ~observed).all()), "the second state holds the first"
    assert chisquare(torch.bincount(depth, minlength=size)).pvalue > 1e-3
    code = (observed.long() * 2 ** torch.arange(size)).sum(1)
    for d in range(1, size):
        counts = torch.bincount(code[depth == d], minlength=2**size)
        subsets = [sum(2**j for j in chosen) for chosen in itertools.combinations(range(size), d)]
        assert counts.sum() == counts[subsets].sum()
        assert chisquare(counts[subsets]).pvalue > 1e-3


def test_missing_variables_come_last_or_first() -> None:
    values = torch.tensor([[0, -1, 1, -1, 0]]).repeat(500, 1)
    with scoped_seed(0):
        last, first = random_ranks(values), random_ranks(values, missing_first=True)
    assert bool((last[:, [1, 3]] >= 3).all()) and bool((first[:, [1, 3]] < 2).all())
    assert last.sort(1).values.equal(torch.arange(5).expand(500, -1))
    with scoped_seed(0):
        removed = 6 - draw_depth(torch.full((20_000,), 6), "poisson")
    poisson = torch.distributions.Poisson(math.log(6))
    # 1 + Poisson(log 6): 4 standard errors of a share of 20,000
    assert abs(float((removed == 1).float().mean()) - math.exp(-math.log(6))) < 4 * (1 / 6 * 5 / 6 / 20_000) ** 0.5
    assert abs(float((removed == 3).float().mean()) - float(poisson.log_prob(torch.tensor(2.0)).exp())) < 0.013
    assert int(removed.max()) <= 6 and int(removed.min()) == 1


def test_the_one_pass_likelihood_is_the_mean_over_all_orders() -> None:
    """E3: any conditionals, consistent or not; d uniform, S uniform of its size."""
    sizes = [2, 2, 2, 2]
    conditionals = TableConditionals(sizes, random_law(sizes), random=True)
    rows = states(sizes)
    along = torch.zeros(len(rows), dtype=torch.float64)
    for order in itertools.permutations(range(4)):
        ranks = torch.tensor(order).argsort().expand(len(rows), -1)
        along += chain_rule(conditionals, rows, ranks)[:, -1].detach() / math.factorial(4)
    one_pass = torch.zeros_like(along)
    for d in range(4):
        for chosen in itertools.combinations(range(4), d):
            revealed = torch.zeros(len(rows), 4, dtype=torch.bool)
            revealed[:, list(chosen)] = True
            loss = completion_loss(conditionals(hide(rows, revealed)), rows, revealed).detach()
            one_pass -= loss / 4 / math.comb(4, d)
    assert (along - one_pass).abs().max() < 1e-10
    with scoped_seed(0):
        drawn = torch.stack([MaskedCompletion(conditionals)(rows).detach() for _ in range(1000)])
    error = float((drawn.mean() + along.mean()).abs())
    assert error < 5 * float(drawn.std()) / 1000**0.5


def test_missing_entries_are_neither_targets_nor_conditions() -> None:
    sizes = [2, 3, 2]
    conditionals = TableConditionals(sizes, random_law(sizes))
    row = torch.tensor([[1, -1, 0]])
    expected = [
        -(conditionals(torch.tensor([[-1, -1, -1]]))[0, 0, 1] + conditionals(torch.tensor([[1, -1, -1]]))[0, 2, 0]),
        -(conditionals(torch.tensor([[-1, -1, -1]]))[0, 2, 0] + conditionals(torch.tensor([[-1, -1, 0]]))[0, 0, 1]),
    ]
    for ranks, value in zip(([[0, 2, 1]], [[1, 2, 0]]), expected, strict=True):
        path = chain_rule(conditionals, row, torch.tensor(ranks))[0].detach()
        assert abs(float(path[-1] + value.detach())) < 1e-12 and path[2] == path[3]


def test_chain_rule_and_draws_of_exact_conditionals_have_the_law() -> None:
    conditionals, rows = TableConditionals(MIXED, LAW), states(MIXED)
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        path = chain_rule(conditionals, rows, torch.tensor(order).argsort().expand(len(rows), -1))
        assert (path[:, -1] - LAW).abs().max() < 1e-12
    empty = torch.full((40_000, 4), -1)
    with torch.no_grad(), scoped_seed(0):
        draws = ancestral(as_proposal(conditionals), empty, random_ranks(empty, missing_first=True))
        implied = ancestral(
            from_marginals(TableMarginals(MIXED, LAW), torch.tensor(MIXED)), empty[:5000], random_ranks(empty[:5000])
        )
    place = {tuple(row): i for i, row in enumerate(rows.tolist())}
    counts = torch.bincount(torch.tensor([place[tuple(row)] for row in draws.values.tolist()]), minlength=len(rows))
    assert chisquare(counts, LAW.exp() * len(empty)).pvalue > 1e-3
    exact = LAW[torch.tensor([place[tuple(row)] for row in draws.values.tolist()])]
    assert (draws.log_prob - exact).abs().max() < 1e-10 and torch.equal(draws.path[:, -1], draws.log_prob)
    exact = LAW[torch.tensor([place[tuple(row)] for row in implied.values.tolist()])]
    assert (implied.log_prob - exact).abs().max() < 1e-10, "conditionals read off exact marginals are exact"


def test_evidence_is_never_touched() -> None:
    conditionals = TableConditionals(MIXED, LAW)
    with torch.no_grad(), scoped_seed(0):
        values = hide(states(MIXED).repeat(20, 1), torch.rand(20 * 48, 4) < 0.5)
        for block in (1, 3):
            ranks = random_ranks(values, missing_first=True)
            drawn = ancestral(as_proposal(conditionals), values, ranks, block=block).values
            assert bool(((drawn == values) | (values < 0)).all()) and bool((drawn >= 0).all())
        free = torch.rand(drawn.shape) < 0.5
        moved, _ = block_gibbs(conditionals, drawn, 5, 3, free=free)
    assert bool(((moved == drawn) | free).all()) and not torch.equal(moved, drawn)


def test_candidates_mend_what_a_block_breaks() -> None:
    sizes = [2, 2, 2]
    law = torch.full((8,), 0.01, dtype=torch.float64)
    law[[0, 7]] = 0.47  # all equal, nearly always
    law = law.log()
    conditionals, marginals = TableConditionals(sizes, law), TableMarginals(sizes, law)
    empty = torch.full((4000, 3), -1)
    equal = []
    with torch.no_grad(), scoped_seed(0):
        for candidates in (1, 30):
            found = ancestral(
                as_proposal(conditionals),
                empty,
                random_ranks(empty),
                block=3,
                candidates=candidates,
                marginals=marginals,
            )
            equal.append(float((found.values == found.values[:, :1]).all(1).double().mean()))
    assert abs(equal[0] - 0.25) < 0.03 and abs(equal[1] - 0.94) < 0.03


@pytest.mark.parametrize("block", [1, 2, 4])
@pytest.mark.parametrize("target", [False, True])
def test_block_gibbs_leaves_the_law_as_it_is(block: int, target: bool) -> None:
    """E4: exact conditionals; or any conditionals, and Metropolis-Hastings against the law."""
    rows = states(MIXED)
    place = {tuple(row): i for i, row in enumerate(rows.tolist())}
    conditionals = TableConditionals(MIXED, LAW, random=target)

    def log_density(values: torch.Tensor) -> torch.Tensor:
        return LAW[torch.tensor([place[tuple(row)] for row in values.tolist()])] + 3.0

    with scoped_seed(block):
        start = rows[torch.multinomial(LAW.exp(), 10_000, replacement=True)]
        for parallel in (False, True) if target else (False,):
            end, log_f = block_gibbs(
                conditionals, start, 2, block, parallel=parallel, log_density=log_density if target else None
            )
            counts = torch.bincount(torch.tensor([place[tuple(row)] for row in end.tolist()]), minlength=len(rows))
            assert chisquare(counts, LAW.exp() * len(start)).pvalue > 1e-3
            assert not torch.equal(start, end)
            assert log_f is None or torch.equal(log_f, log_density(end))


def test_chains_restart_when_they_disagree_and_not_otherwise() -> None:
    sizes = [2, 2, 2]
    conditionals = TableConditionals(sizes, random_law(sizes))
    stuck = TableConditionals(sizes, random_law(sizes))
    with torch.no_grad():  # x_j = 1 as soon as another is 1, and 0 as soon as another is 0
        seen = states(sizes, missing=True)
        for level in (0, 1):
            stuck.table[(seen == level).any(1)] = torch.tensor([0.0, -80.0]).roll(level).double()
    for network, expected in ((conditionals, 0), (stuck, 1)):
        chains = PersistentChains(torch.tensor(sizes), 8, 2, window=256)
        chains.start(torch.tensor([[0, 0, 0], [1, 1, 1]]).repeat(4, 1))
        with scoped_seed(0):
            for _ in range(256):
                chains.advance(network)
        assert int(chains.restarts) == expected
    with scoped_seed(0):
        drawn = uniform_values(torch.tensor(MIXED), 4000)
    assert chisquare(torch.bincount(drawn[:, 3])).pvalue > 1e-3 and drawn.max(0).values.tolist() == [1, 2, 1, 3]


def test_value_counts_of_what_is_there() -> None:
    rows = torch.tensor([[0, 2], [-1, 2], [1, 0], [1, -1]])
    assert value_counts(rows, 3).tolist() == [[1, 2, 0], [1, 0, 2]]


def test_candidates_need_marginals() -> None:
    values = torch.full((3, 2), -1)
    with pytest.raises(ValueError, match="chosen among by marginals="):
        ancestral(lambda v, p, c: v.new_zeros(*p.shape, 2).float(), values, torch.zeros(3, 2), block=2, candidates=4)
