"""Residuals and gradients of marginalization objectives, against enumeration."""

import itertools
import math

import pytest
import torch
from torch import nn

from inference.any_order import ancestral, as_proposal, chain_rule, hide, random_ranks
from inference.objectives.energy_consistency import EnergyConsistency
from inference.objectives.masked_completion import MaskedCompletion
from inference.objectives.persistent_chains import PersistentChains
from inference.objectives.reverse_kl import AutoregressiveKL, MarginalKL, MarginalRegression, leave_one_out
from inference.objectives.self_consistency import (
    PathConsistency,
    Penalised,
    SelfConsistency,
    pair_residuals,
    segment_residuals,
    sum_rule_residuals,
)
from inference.runtime.generators import scoped_seed
from tests.inference.tabular import TableConditionals, TableMarginals, random_law, states

BINARY, MIXED = [2] * 6, [2, 3, 2, 4]


@pytest.mark.parametrize("sizes", [BINARY, MIXED])
def test_every_residual_of_an_exact_law_is_zero(sizes: list[int]) -> None:
    """E1: pairs with one and several children, segments, sum rule, paths."""
    law = random_law(sizes)
    f, g, rows = TableMarginals(sizes, law), TableConditionals(sizes, law), states(sizes)
    with torch.no_grad(), scoped_seed(0):
        for _ in range(5):
            ranks = random_ranks(rows)
            depth = torch.randint(len(sizes), (len(rows),))
            r, valid = pair_residuals(f, g, rows, ranks, depth, children=3)
            assert r.abs().max() < 1e-12 and torch.equal(valid.sum(1), (len(sizes) - depth).clamp(max=3))
            assert segment_residuals(f, g, rows, ranks, depth, 3).abs().max() < 1e-12
            prefix = hide(rows, ranks < depth[:, None])
            positions = ranks.argsort(1).gather(1, depth[:, None])[:, 0]
            assert sum_rule_residuals(f, torch.tensor(sizes), prefix, positions).abs().max() < 1e-12
            path = chain_rule(g, rows, ranks)
            assert PathConsistency(f)(rows, ranks, path) < 1e-24
        for loss in ("pair", "segment", "sum_rule", "kl"):  # the last is not a square
            assert SelfConsistency(f, g, torch.tensor(sizes), loss=loss)(rows) < (1e-13 if loss == "kl" else 1e-22)


def test_a_perturbed_entry_has_the_loss_that_enumeration_gives() -> None:
    """E1: masks, the range of d, and the factor D."""
    sizes = [2, 3, 2]
    law = random_law(sizes)
    f, g, rows = TableMarginals(sizes, law), TableConditionals(sizes, law), states(sizes)
    with torch.no_grad():
        f.table[17] += 0.3
    total, pairs = 0.0, 0
    with torch.no_grad():
        for order in itertools.permutations(range(3)):
            ranks = torch.tensor(order).argsort().expand(len(rows), -1)
            for d in range(3):
                before, after = hide(rows, ranks < d), hide(rows, ranks <= d)
                log_p = g(before)[torch.arange(len(rows)), order[d], rows[:, order[d]]]
                total += float((f(before) + log_p - f(after)).square().sum())
                pairs += len(rows)
    expected = 3 * total / pairs
    enumerated = 0.0
    with torch.no_grad():
        for order in itertools.permutations(range(3)):
            ranks = torch.tensor(order).argsort().expand(len(rows), -1)
            for d in range(3):
                r, _ = pair_residuals(f, g, rows, ranks, torch.full((len(rows),), d))
                enumerated += 3 * float(r.square().mean()) / 18
        assert abs(enumerated - expected) < 1e-10
        for children in (1, 2):
            objective = SelfConsistency(f, g, torch.tensor(sizes), children=children)
            with scoped_seed(0):
                drawn = torch.stack([objective(rows) for _ in range(300)])
            assert abs(float(drawn.mean()) - expected) < 5 * float(drawn.std()) / 300**0.5


def test_the_divergence_of_conditionals_is_that_of_the_two_laws() -> None:
    sizes = [3]
    law, other = random_law(sizes), random_law(sizes, seed=1)
    objective = SelfConsistency(
        TableMarginals(sizes, other), TableConditionals(sizes, law), torch.tensor(sizes), loss="kl"
    )
    expected = float((law.exp() * (law - other)).sum())
    with torch.no_grad(), scoped_seed(0):
        assert abs(float(objective(states(sizes)[:1])) - expected) < 1e-12


def test_missing_entries_stay_out_of_the_residuals() -> None:
    law = random_law(MIXED)
    f, g = TableMarginals(MIXED, law), TableConditionals(MIXED, law)
    rows = states(MIXED, missing=True)
    rows = rows[(rows >= 0).any(1)]
    with torch.no_grad(), scoped_seed(0):
        for loss in ("pair", "segment"):
            assert SelfConsistency(f, g, torch.tensor(MIXED), loss=loss, children=2)(rows) < 1e-22
        ranks = random_ranks(rows)
        assert PathConsistency(f)(rows, ranks, chain_rule(g, rows, ranks)) < 1e-22
    moved = TableMarginals(MIXED, law)
    with torch.no_grad(), scoped_seed(0):
        moved.table[1:] += 0.5  # all but the empty row
        shifted = float(PathConsistency(moved)(rows, ranks, chain_rule(g, rows, ranks)))
        assert abs(shifted - (math.exp(-0.5) + 0.5 - 1)) < 1e-12
        assert PathConsistency(f)(rows, ranks, chain_rule(g, rows, ranks)) < 1e-22


def test_a_share_of_the_places_is_all_that_is_observed() -> None:
    """f is moved by half a nat at complete rows, and nowhere else."""
    law = random_law(MIXED)
    f, g, rows = TableMarginals(MIXED, law), TableConditionals(MIXED, law), states(MIXED).repeat(200, 1)
    ends = f.place(states(MIXED))
    f.table.data[ends] += 0.5
    with torch.no_grad(), scoped_seed(0):
        ranks = random_ranks(rows)
        found = [float(PathConsistency(f, whole=w)(rows, ranks, chain_rule(g, rows, ranks))) for w in (1.0, 0.5)]
    moved = math.exp(-0.5) + 0.5 - 1
    assert abs(found[0] - moved) < 1e-12
    # by chance: a quarter of uniform depths, 1 - sqrt(3)/2 of those whose root is uniform
    share = 0.5 + 0.5 * (0.25 + 1 - math.sqrt(0.75)) / 2
    assert abs(found[1] / moved - share) < 0.03  # 5 standard errors of 4,800 rows


def test_where_orders_disagree_the_marginal_is_the_log_of_the_mean() -> None:
    """Then ``exp f`` adds up to one for each set of variables; the mean of the logs would add up to less."""
    sizes = [2, 3]
    g = TableConditionals(sizes, random_law(sizes), random=True)
    rows = states(sizes).repeat(2, 1)
    ranks = torch.tensor([[0, 1], [1, 0]]).repeat_interleave(6, 0)
    path = chain_rule(g, rows, ranks).detach()
    both = path[:, 2].view(2, 6)
    assert (both[0] - both[1]).abs().max() > 0.3
    f = TableMarginals(sizes, both.logsumexp(0) - math.log(2))
    assert abs(float(both.logsumexp(0).exp().sum()) / 2 - 1) < 1e-12
    assert float(both.mean(0).exp().sum()) < 0.99
    complete = f.place(states(sizes))
    # a thousand copies, so that each row's both orders are met at full depth equally often
    copies = [part.repeat(1000, *[1] * (part.ndim - 1)) for part in (rows, ranks, path)]
    with scoped_seed(0):
        gradient = torch.autograd.grad(PathConsistency(f)(*copies), f.table)[0][complete]
    f.table.data[complete] = both.mean(0)
    with scoped_seed(0):
        of_mean = torch.autograd.grad(PathConsistency(f)(*copies), f.table)[0][complete]
    assert gradient.abs().max() < 0.1 * of_mean.abs().max()


def test_a_row_that_f_misses_by_far_pulls_no_harder() -> None:
    f = TableMarginals([2], random_law([2]))
    ranks, rows = torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long)
    pulls = []
    for gap in (1.0, 2.0, 50.0):
        path = torch.stack([f.table[0] * 0, f.table[1] - f.table[0] + gap]).unsqueeze(0).detach()
        with scoped_seed(0):
            loss = PathConsistency(f)(rows, ranks, path)
        pulls.append(-float(torch.autograd.grad(loss, f.table)[0][1]))
    assert abs(pulls[0] - math.expm1(1.0)) < 1e-9
    assert abs(pulls[1] - math.expm1(1.5)) < 1e-9 and abs(pulls[2] - pulls[1]) < 1e-9


def test_only_what_should_learn_learns() -> None:
    law = random_law(MIXED)
    f, g = TableMarginals(MIXED, law), TableConditionals(MIXED, random_law(MIXED, 2))
    frozen = SelfConsistency(f, g, torch.tensor(MIXED))
    assert [p.shape for p in frozen.parameters()] == [f.table.shape]
    with scoped_seed(0):
        frozen(states(MIXED)).backward()
    assert f.table.grad is not None and g.table.grad is None
    both = Penalised(
        MaskedCompletion(g),
        SelfConsistency(f, g, torch.tensor(MIXED), learn_conditionals=True),
        chains=PersistentChains(torch.tensor(MIXED), 10, 2),
        pool=states(MIXED)[:7],
    )
    assert len(list(both.parameters())) == 2
    with scoped_seed(0):
        both(states(MIXED)).backward()
    assert g.table.grad is not None


class Level(nn.Module):
    """A table of f over complete rows and nothing observed."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.linspace(-1, 1, size, dtype=torch.float64))

    def forward(self, values: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        complete = (values >= 0).all(1)
        place = (values.clamp(min=0) * 2 ** torch.arange(values.shape[1])).sum(1)
        return torch.where(complete, self.table[place], 0.0)


def test_score_function_gradient_is_that_of_the_divergence() -> None:
    """E5: the mean over x ~ exp f / Z, and what a baseline does to the level of an unnormalised f."""
    f, rows = Level(16), states([2] * 4).flip(1)
    log_f = torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    log_z = f.table.logsumexp(0)
    q = (f.table - log_z).exp()
    divergence = (q * (f.table - log_z - log_f)).sum()
    exact = torch.autograd.grad(divergence, f.table)[0]
    # E_q[grad log q (log q - log f)]: with log q normalised the baseline's term vanishes
    reward = (f.table - log_f).detach()
    weight = q.detach()
    normalised = torch.autograd.grad((weight * reward * (f.table - f.table.logsumexp(0))).sum(), f.table)[0]
    assert (normalised - exact).abs().max() < 1e-12
    # with f in its place the gradient differs by mean(reward) * grad log sum exp f: the centred reward removes it
    raw = torch.autograd.grad((weight * reward * f(rows)).sum(), f.table)[0]
    mean = (weight * reward).sum()
    centred = torch.autograd.grad((weight * (reward - mean) * f(rows)).sum(), f.table)[0]
    assert (raw - exact - mean * weight).abs().max() < 1e-12 and (centred - exact).abs().max() < 1e-12
    x = torch.randn(9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.allclose(leave_one_out(x), torch.stack([x[i] - (x.sum() - x[i]) / 8 for i in range(9)]))


def test_gradients_of_the_objectives_are_unbiased_at_a_consistent_model() -> None:
    sizes = [2, 2, 2]
    model_law, target = random_law(sizes, 3), 2 * random_law(sizes, 4)
    f, g, rows = TableMarginals(sizes, model_law), TableConditionals(sizes, model_law), states(sizes)

    def log_density(values: torch.Tensor) -> torch.Tensor:
        return target[(values * torch.tensor([4, 2, 1])).sum(1)]

    # KL in the marginals: at complete rows the gradient of sum_x q(x) (log q(x) - log f(x)), q = softmax of the table.
    logits = model_law.clone().requires_grad_()
    exact = torch.autograd.grad((logits.softmax(0) * (logits.log_softmax(0) - target)).sum(), logits)[0]
    place = f.place(rows)
    objective = MarginalKL(f, g, log_density, torch.tensor(sizes), num_chains=4000, block=3, penalty=0.0, window=0)
    with scoped_seed(0):
        objective.chains.start(rows[torch.multinomial(model_law.exp(), 4000, replacement=True)])
        grads = torch.stack([torch.autograd.grad(objective(), f.table)[0][place] for _ in range(50)])
    error = (grads.mean(0) - exact).abs() / (grads.std(0) / 50**0.5)
    assert error.max() < 4.5
    # ARM: the same divergence, in the parameters of the conditionals; ARM-MC has its mean and a far larger variance.
    ranks = torch.arange(3).expand(8, -1)
    log_q = chain_rule(g, rows, ranks)[:, -1]
    exact = torch.autograd.grad((log_q.exp() * (log_q - target)).sum(), g.table)[0]
    spread = []
    for monte_carlo in (False, True):
        arm = AutoregressiveKL(g, log_density, torch.tensor(sizes), batch_size=2000, monte_carlo=monte_carlo)
        with scoped_seed(0):
            grads = torch.stack([torch.autograd.grad(arm(), g.table)[0] for _ in range(60)])
        deviation = grads.std(0)
        error = (grads.mean(0) - exact).abs()[deviation > 1e-9] / (deviation[deviation > 1e-9] / 60**0.5)
        assert error.max() < 4.5
        spread.append(float(grads.var(0).mean()))
    assert spread[1] > 2 * spread[0]


def test_energy_objectives_vanish_at_the_target_and_only_there() -> None:
    law = random_law(MIXED)
    stride = torch.tensor([24, 8, 4, 1])

    def log_density(values: torch.Tensor) -> torch.Tensor:
        return law[(values * stride).sum(1)] + 2.0

    f, g = TableMarginals(MIXED, law + 2.0), TableConditionals(MIXED, law)
    sizes = torch.tensor(MIXED)
    for options in ({}, {"children": 2}, {"length": 2}, {"metropolis": False}, {"depth": "poisson"}):
        objective = EnergyConsistency(f, g, log_density, sizes, num_chains=64, likelihood=0.0, window=0, **options)
        regression = MarginalRegression(f, g, log_density, sizes, num_chains=64, window=0)
        with torch.no_grad(), scoped_seed(0):
            assert objective(), regression() < 1e-20
            assert objective() < 1e-20
    wrong = TableMarginals(MIXED, law + 2.0)
    with torch.no_grad(), scoped_seed(0):
        wrong.table[0] += 1.0  # log Z alone is wrong
        r = [
            float(EnergyConsistency(wrong, g, log_density, sizes, num_chains=64, likelihood=0.0, window=0)())
            for _ in "ab"
        ]
    level = TableMarginals(MIXED, law + 3.0)  # consistent, and a nat too high
    objective = EnergyConsistency(level, g, log_density, sizes, num_chains=64, likelihood=0.0, window=0)
    with torch.no_grad(), scoped_seed(0):
        # one each from the complete rows, from the last pair, and from the quarter of D = 4 times the pairs that end
        # at a complete row, where the target stands in for f; without that it is two
        assert 2.7 < sum(float(objective()) for _ in range(20)) / 20 < 3.3
    # D = 4 times the squared residual of those pairs that start at nothing, a quarter of all
    assert 0.5 < sum(r) / 2 < 1.6


def test_autoregressive_noise_grows_out_of_hand() -> None:
    """S3, small: the spread of ARM-MC's gradient against ARM's on 16 spins at a random start."""
    size = 16
    with scoped_seed(0):
        net = nn.Sequential(
            nn.Linear(size, 32), nn.Tanh(), nn.Linear(32, 2 * size), nn.Unflatten(1, (size, 2))
        ).double()

    def conditionals(values: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        return net(values.double()).log_softmax(2)

    module = nn.Module()
    module.net = net
    module.forward = conditionals  # type: ignore[method-assign]
    spreads = []
    for monte_carlo in (False, True):
        arm = AutoregressiveKL(
            module,
            lambda x: 0.2 * (2.0 * x - 1).sum(1).double(),
            torch.full((size,), 2),
            batch_size=128,
            monte_carlo=monte_carlo,
        )
        with scoped_seed(0):
            grads = [torch.autograd.grad(arm(), list(net.parameters())) for _ in range(20)]
        flat = torch.stack([torch.cat([g.flatten() for g in grad]) for grad in grads])
        spreads.append(float(flat.var(0).mean()))
    assert spreads[1] > 30 * spreads[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "l2"}, "loss"),
        ({"depth": "deep"}, "depth"),
        ({"children": 0}, "children"),
        ({"length": 1.5}, "length"),
    ],
)
def test_bad_settings(options: dict, message: str) -> None:
    law = random_law(MIXED)
    with pytest.raises(ValueError, match=message):
        SelfConsistency(TableMarginals(MIXED, law), TableConditionals(MIXED, law), torch.tensor(MIXED), **options)


def test_bad_shares() -> None:
    law = random_law(MIXED)
    f, g = TableMarginals(MIXED, law), TableConditionals(MIXED, law)
    with pytest.raises(ValueError, match="whole"):
        PathConsistency(f, whole=-0.1)
    with pytest.raises(ValueError, match="uniform"):
        EnergyConsistency(f, g, lambda x: x.sum(1), torch.tensor(MIXED), uniform=1.0)
    with scoped_seed(0):
        ranks = random_ranks(states(MIXED))
    assert torch.equal(ancestral(as_proposal(g), states(MIXED), ranks).values, states(MIXED)), "nothing is missing"
