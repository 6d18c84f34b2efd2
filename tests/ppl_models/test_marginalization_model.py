"""Marginalization models: identities of the queries, learned mixtures and energies against exact sums, Pyro."""

import copy
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO

from inference.fit import fit
from inference.objectives.masked_completion import MaskedCompletion
from inference.runtime.generators import scoped_seed
from ppl_models import MarginalizationModel
from ppl_models.marginalization_model import LatticeIsing, MarginalizationResult
from ppl_models.marginalization_model.distribution import all_values
from tests.accelerator import fake_accelerator
from tests.ppl_models.marginalization_cases import BernoulliMixture, hide_some

MIXTURE = BernoulliMixture(8)
ROWS, HELD_OUT = MIXTURE.sample(4000), MIXTURE.sample(500)
LATTICE = LatticeIsing(width=3, coupling=0.15, field=0.2)
STATES = all_values(torch.full((9,), 2))
PARTIAL = STATES[100:140].index_fill(1, torch.arange(3), -1)
MIXED = [2, 3, 1, 4]
QUICK: dict[str, Any] = {"num_steps": 3, "num_rows": 20, "progress": False}


@pytest.fixture(scope="module")
def learned() -> tuple[MarginalizationModel, MarginalizationResult]:
    mam = MarginalizationModel(cardinalities=[2] * 8, hidden=64, depth=2)
    return mam, mam.fit(
        ROWS, HELD_OUT, num_steps=350, marginal_steps=120, lr=4e-3, batch_size=256, num_rows=2000, progress=False
    )


@pytest.fixture(scope="module")
def ising() -> tuple[MarginalizationModel, MarginalizationResult]:
    mam = MarginalizationModel(cardinalities=[2] * 9, hidden=48, depth=2)
    return mam, mam.fit_energy(LATTICE.log_density, num_steps=200, batch_size=96, lr=4e-3, progress=False)


# ---------------------------------------------------------------- learned from data
def test_any_marginal_of_a_mixture(learned: tuple[MarginalizationModel, MarginalizationResult]) -> None:
    """S1 and S4, small: an untrained head, or a wrong convention of orders, is off by more than a nat."""
    mam, result = learned
    rows = hide_some(MIXTURE.sample(2000))
    error = mam.log_prob(rows) - MIXTURE.log_prob(rows)
    assert error.abs().mean() < 0.08 and error.square().mean().sqrt() < 0.15
    states = all_values(torch.full((8,), 2))
    exact = MIXTURE.log_prob(states)
    ensemble = mam.log_prob_autoregressive(states, orders=5)
    assert float((exact.exp() * (exact - ensemble.ensemble)).sum()) < 0.03
    assert bool((ensemble.ensemble >= ensemble.mean - 1e-6).all())
    assert abs(float(mam.log_prob(states).exp().sum()) - 1) < 0.05
    for order in (None, torch.arange(8).flip(0)):  # the chain rule is normalised, along one order as in an average
        law = mam.distribution(order=range(8) if order is None else order).log_prob(states)
        assert abs(float(law.detach().exp().sum()) - 1) < 1e-4
    report = mam.consistency_report(rows[:200])
    violation = report.sum_rule[~report.sum_rule.isnan()]
    assert violation.abs().median() < 0.05 and torch.equal(report.sum_rule.isnan(), rows[:200] >= 0)
    assert result.check is not None and result.check.mae < 0.12 and abs(result.check.bias) < 0.05
    assert result.check.pearson > 0.98 and "not a likelihood" in result.summary()
    assert result.losses.shape == (470,) and result.seconds > 0


def test_error_bars_and_refinement(learned: tuple[MarginalizationModel, MarginalizationResult]) -> None:
    mam, _ = learned
    rows = hide_some(MIXTURE.sample(150), seed=1)
    found = mam.log_prob_with_error(rows, num_steps=32)
    gap = (mam.log_prob_autoregressive(rows, orders=20).mean - found.value).abs()
    assert torch.equal(found.value, mam.log_prob(rows)) and not bool(found.refined.any())
    assert float((gap <= 3 * found.error + 1e-6).double().mean()) > 0.95, "the bars cover"
    assert float(found.error.median()) < 10 * float(gap.median()) + 0.02, "and are not idle"
    report = mam.consistency_report(rows, num_steps=100)
    exact = mam.log_prob_autoregressive(rows, orders=100).mean - mam.log_prob(rows)
    z = (report.gap - exact) / report.gap_error.clamp(min=1e-4)
    assert float(z.abs().median()) < 1.5, "the gap is estimated without bias"
    refined = mam.log_prob_with_error(rows, num_steps=8, refine=20, refine_above=0.05)
    assert 0 < int(refined.refined.sum()) < 150
    assert torch.equal(refined.value[~refined.refined], found.value[~refined.refined])
    assert torch.equal(refined.value[refined.refined], mam.log_prob(rows[refined.refined], refine=20))
    spoilt = copy.deepcopy(mam)
    spoilt.marginals.base.reset()
    mended = spoilt.log_prob_with_error(rows, num_steps=8, refine=20, refine_above=0.05)
    exact = MIXTURE.log_prob(rows)
    assert (mended.value - exact).abs().mean() < 0.1 < 0.5 < (spoilt.log_prob(rows) - exact).abs().mean()


def test_draws_and_imputations_have_the_law(learned: tuple[MarginalizationModel, MarginalizationResult]) -> None:
    mam, _ = learned
    truth = all_values(torch.full((8,), 2)).float().T @ MIXTURE.log_prob(all_values(torch.full((8,), 2))).exp()
    for options in ({}, {"order": list(range(8))}, {"block": 2, "candidates": 8}, {"source": "marginal"}):
        draws = mam.sample(2000, **options)
        assert (draws.double().mean(0) - truth).abs().max() < 0.06, options  # 4 standard errors are 0.045
    x = HELD_OUT[:1].clone()
    x[0, :3] = -1
    filled = mam.impute(x, num_samples=2000)
    assert filled.shape == (2000, 1, 8) and bool((filled[:, 0, 3:] == x[0, 3:]).all())
    completions = torch.cat([all_values(torch.full((3,), 2)), x[:, 3:].expand(8, -1)], 1)
    posterior = MIXTURE.log_prob(completions).softmax(0)
    expected = completions[:, :3].float().T @ posterior
    assert (filled[:, 0, :3].float().mean(0) - expected).abs().max() < 0.1  # of one row, as the network has learned it
    chains = mam.gibbs(ROWS[:2000], steps=3, block=4, seed=1)
    assert (chains.float().mean(0) - truth).abs().max() < 0.06 and not torch.equal(chains, ROWS[:2000])
    logits = mam.conditional_logits(x)
    assert logits.shape == (1, 8, 2)
    assert abs(float(logits[0, 0].exp()[1]) - float(expected[0])) < 0.1
    assert logits[0, 3].exp().tolist() == [float(x[0, 3] == 0), float(x[0, 3] == 1)]


def test_the_rows_of_the_second_stage_have_orders_of_their_own() -> None:
    """A row is likely along the order that it was drawn in: f would learn sum q^2 / sum q there, not the mean of q."""
    mam = MarginalizationModel([2] * 3, hidden=32, depth=2)
    with torch.no_grad():
        mam.conditionals.head[1].weight.normal_(std=0.4, generator=torch.Generator().manual_seed(0))  # type: ignore[index]
    states = all_values(torch.full((3,), 2))
    orders = itertools.permutations(range(3))
    along = torch.stack([mam.distribution(order=order).log_prob(states).exp() for order in orders]).detach()
    law = along.mean(0)
    assert ((along.square().mean(0) / law - law) / law).abs().max() > 0.3, "orders must disagree"
    for rows in ("model", "mixture"):
        pool, _, (ranks, path) = mam._pool(states.repeat(5000, 1), None, rows, 40_000, 0, True)
        for i, state in enumerate(states):
            q = path[(pool == state).all(1), -1].exp()
            assert abs(float(q.mean() - law[i])) < 5 * float(q.std()) / math.sqrt(len(q)) + 1e-6, (rows, i)
        assert torch.equal(ranks.sort(1).values, torch.arange(3).expand(40_000, -1))
    pool = mam._pool(states[:1].repeat(9, 1), None, "model", 40_000, 0, False)[0]
    drawn = torch.stack([(pool == state).all(1).float().mean() for state in states])
    assert (drawn - law).abs().max() < 0.012


def test_orders_agree_after_a_refit_to_draws() -> None:
    """60 rows leave the conditionals at odds with each other; their draws come from one law, which is no worse."""
    spread, log_p, last = [], [], None
    for count in (0, 4000):
        mam = MarginalizationModel([2] * 8, hidden=64, depth=2, dropout=0.0)
        options = QUICK | {"num_steps": 200, "marginal_steps": 1}
        last = mam.fit(ROWS[:60], HELD_OUT, refit_rows=count, lr=4e-3, **options)
        found = mam.log_prob_autoregressive(HELD_OUT)
        spread.append(float(found.spread.mean()))
        log_p.append((float(found.mean.mean()), float(found.ensemble.mean())))
    assert spread[1] < 0.75 * spread[0]
    assert log_p[1][0] > log_p[0][0] + 0.05 and log_p[1][1] > log_p[0][1]
    assert last is not None and last.refit is not None and "refit" in last.summary()


@pytest.mark.parametrize("network", ["mlp", "transformer"])
def test_what_needs_no_dropout_is_learned_without(network: str) -> None:
    """Energies have no rows to learn by heart, and f is a regression on as many rows as are drawn."""
    learned = []
    for dropout in (0.0, 0.4):
        mam = MarginalizationModel([2] * 9, network, hidden=8, depth=1, num_heads=2, dropout=dropout)
        mam.fit_energy(LATTICE.log_density, num_steps=3, batch_size=8, progress=False)
        learned.append(torch.cat([p.flatten() for p in mam.parameters()]))
        mam.train()
        with torch.no_grad(), scoped_seed(0):
            mam.marginals.head[1].weight.copy_(torch.linspace(-1, 1, 8))  # type: ignore[index]
            twice = [mam.conditionals(PARTIAL) for _ in range(2)]
            assert torch.equal(*twice) == (dropout == 0)
            mam.conditionals.eval()
            assert torch.equal(*[mam.marginals(PARTIAL) for _ in range(2)])
    assert torch.equal(*learned)


def test_few_rows_are_not_learned_by_heart() -> None:
    """60 rows of a mixture that is nearly independent: KL 0.14 for independent variables; the networks, which started
    at uniform variables and kept their last parameters, came to 0.32.
    """
    dice = torch.Generator().manual_seed(0)
    odds, shares = torch.rand(3, 8, generator=dice), torch.tensor([0.5, 0.3, 0.2])
    picked = torch.multinomial(shares, 60, True, generator=dice)
    rows = (torch.rand(60, 8, generator=dice) < odds[picked]).long()
    every = all_values(torch.full((8,), 2))
    truth = (dist.Bernoulli(odds).log_prob(every.unsqueeze(1).float()).sum(-1) + shares.log()).logsumexp(1)
    mam = MarginalizationModel([2] * 8, hidden=128, depth=2)
    mam.fit(rows, num_steps=600, marginal_steps=1, num_rows=10, progress=False)
    divergence = (truth.exp() * (truth - mam.log_prob_autoregressive(every).ensemble)).sum()
    assert float(divergence) < 0.2


def test_a_fit_starts_at_independent_variables() -> None:
    """With the frequencies of what is there, in Jeffreys' estimate; a second fit goes on where the first one ended."""
    x = torch.tensor([[0, 2], [1, -1], [1, 0], [1, 0]])
    mam = MarginalizationModel([2, 3], hidden=16, depth=1)
    mam.fit(x, num_steps=1, lr=1e-9, **{k: v for k, v in QUICK.items() if k != "num_steps"})
    expected = [[1.5 / 5, 3.5 / 5, 0.0], [2.5 / 4.5, 0.5 / 4.5, 1.5 / 4.5]]
    torch.testing.assert_close(mam.conditional_logits([[-1, -1]])[0].exp(), torch.tensor(expected), atol=1e-6, rtol=0)
    mam.fit(1 - x.clamp(0, 1), num_steps=1, lr=1e-9, **{k: v for k, v in QUICK.items() if k != "num_steps"})
    torch.testing.assert_close(mam.conditional_logits([[-1, -1]])[0].exp(), torch.tensor(expected), atol=1e-6, rtol=0)


def test_few_held_out_rows_do_not_undo_the_second_stage() -> None:
    """Of one row f is best where it starts (then 0.10 off); what f has learned since counts all the same."""
    mam = MarginalizationModel([2] * 8, hidden=64, depth=2, classes=2)
    settings: dict[str, Any] = {"lr": 4e-3, "batch_size": 256, "num_rows": 2000, "progress": False}
    result = mam.fit(ROWS, HELD_OUT[5:6], num_steps=300, marginal_steps=400, **settings)
    assert result.marginals is not None and result.marginals.best_step == 0
    rows = hide_some(MIXTURE.sample(2000))
    assert (mam.log_prob(rows) - mam.log_prob_autoregressive(rows).ensemble).abs().mean() < 0.07


def test_joint_training_and_the_other_losses_learn() -> None:
    rows = hide_some(MIXTURE.sample(300), seed=2)
    for options in (
        {"method": "joint", "rows": "mixture", "penalty": 0.5},
        {"loss": "sum_rule", "rows": "model"},
    ):
        kind = "shared" if "method" in options else "separate"
        mam = MarginalizationModel([2] * 8, hidden=40, depth=2, marginal=kind, classes=1, dropout=0.0)
        mam.marginals.base.learn(ROWS)
        independent = (mam.log_prob(rows) - MIXTURE.log_prob(rows)).abs().mean()
        mam.fit(ROWS, num_steps=90, lr=8e-3, batch_size=96, num_rows=500, progress=False, **options)
        error = (mam.log_prob(rows) - MIXTURE.log_prob(rows)).abs().mean()
        assert error < 0.6 * independent, options
        assert mam.log_prob_autoregressive(HELD_OUT, orders=1).mean.mean() > MIXTURE.log_prob(HELD_OUT).mean() - 0.3


# ---------------------------------------------------------------- identities
def test_identities_of_the_queries(learned: Any, ising: Any) -> None:
    """E7."""
    for mam, size in ((learned[0], 8), (ising[0], 9)):
        x = hide_some(torch.randint(2, (50, size), generator=torch.Generator().manual_seed(0)))
        nothing = torch.full((3, size), -1)
        assert torch.equal(mam.log_prob(nothing), torch.zeros(3))
        complete = x.clamp(min=0)
        assert torch.equal(mam.log_prob(complete), mam.distribution().log_prob(complete).detach())
        query, given = torch.zeros(size, dtype=torch.bool), torch.zeros(size, dtype=torch.bool)
        query[:2], given[4:] = True, True
        both = mam.log_prob(complete.masked_fill(~(query | given), -1)) - mam.log_prob(complete.masked_fill(~given, -1))
        assert torch.equal(mam.log_conditional(complete, query, given), both)
        alone = mam.log_conditional(complete, query, torch.zeros_like(query))
        assert torch.allclose(alone, mam.log_prob(complete.masked_fill(~query, -1)))
        # a nat is 1e-7 of float32 times the magnitude of f, here about 20
        shuffled = torch.randperm(50, generator=torch.Generator().manual_seed(1))
        assert torch.allclose(mam.log_prob(x)[shuffled], mam.log_prob(x[shuffled]), atol=2e-5)
        assert torch.allclose(torch.cat([mam.log_prob(row[None]) for row in x[:5]]), mam.log_prob(x)[:5], atol=2e-5)
        with mock.patch.object(mam.marginals, "forward", wraps=mam.marginals.forward) as forward:
            mam.log_prob(x)
        assert forward.call_count == 1


@pytest.mark.parametrize("network", ["mlp", "transformer", "unet", "lattice"])
@pytest.mark.parametrize("marginal", ["causal", "trunk", "separate", "shared"])
def test_each_network_keeps_to_the_contract(network: str, marginal: str) -> None:
    sizes = [2, 3, 1, 2, 3, 1, 2, 3, 1]
    with scoped_seed(0):
        rows = (torch.rand(30, 9) * torch.tensor(sizes)).long()
        x = rows.masked_fill(torch.rand(30, 9) < 0.3, -1)
        x[:, 0] = rows[:, 0]
        context = torch.randn(30, 2)
    mam = MarginalizationModel(sizes, network, context_features=2, marginal=marginal, hidden=16, depth=1)
    mam.fit(x, x[:5], context=context, valid_context=context[:5], **QUICK)
    mam.fit(x, context=context, **QUICK)
    log_p = mam.conditional_logits(x, context)
    assert log_p.shape == (30, 9, 3) and torch.allclose(log_p.exp().sum(2), torch.ones(30, 9), atol=1e-5)
    assert bool((log_p[:, 2, 1:] == -math.inf).all()) and bool((log_p[:, 0, 2] == -math.inf).all())
    assert bool((mam.sample(50, context=context[:1].expand(50, 2)) < torch.tensor(sizes)).all())
    other = mam.log_prob(x, context + 1)
    assert not torch.equal(other, mam.log_prob(x, context)) and bool(torch.isfinite(other).all())
    # what is missing has no influence, whatever stands behind the -1
    with torch.no_grad():  # attention rounds otherwise where gradients are wanted
        behind = mam.distribution(context, observed=x >= 0).log_prob(rows)
    assert torch.equal(mam.log_prob(x, context), behind)


def test_one_variable_one_value_and_long_one_hot_inputs() -> None:
    one = MarginalizationModel([3], hidden=8, depth=1)
    one.fit(torch.tensor([[0], [1], [1], [2]]), num_steps=80, num_rows=50, lr=0.02, progress=False)
    assert torch.allclose(one.log_prob([[0], [1], [2]]).exp(), torch.tensor([0.25, 0.5, 0.25]), atol=0.06)
    single = MarginalizationModel([1, 1], hidden=8, depth=1)
    single.fit(torch.zeros(5, 2), **QUICK)
    assert torch.equal(single.log_prob([[0, 0], [0, -1]]), torch.zeros(2)), "there is one state"
    constant = MarginalizationModel([2, 3], hidden=8, depth=1)
    constant.fit(torch.ones(50, 2), num_steps=40, num_rows=50, lr=0.02, progress=False)
    assert float(constant.log_prob([[1, 1]])) > -0.3
    long = MarginalizationModel([40] * 30, hidden=8, depth=1)  # gathers rows instead of multiplying
    wide = long.conditionals.body.first  # type: ignore[union-attr]
    x = torch.randint(-1, 40, (7, 30), generator=torch.Generator().manual_seed(0))
    hot = (x.unsqueeze(2) == torch.arange(40)).float().flatten(1)
    assert torch.allclose(wide(x), hot @ wide.weight[:-1], atol=1e-5)


# ---------------------------------------------------------------- learned from an energy
def test_the_level_of_f_after_a_fit_by_divergence(tmp_path: Path) -> None:
    """The divergence leaves it free: log 2^9, at which f is held, was given as the network's log Z of any density."""
    found = []
    for shift in (0.0, 5.0):
        mam = MarginalizationModel([2] * 9, hidden=16, depth=1)
        mam.fit_energy(
            lambda x, shift=shift: LATTICE.log_density(x) + shift, "kl", num_steps=30, batch_size=32, progress=False
        )
        found.append(mam.log_partition("network").value)
        mam.save(tmp_path / "model")
        assert MarginalizationModel.load(tmp_path / "model").log_partition("network").value == found[-1]
    assert found[1] - found[0] == pytest.approx(5, abs=1e-2)


@pytest.mark.parametrize("objective", ["consistency", "fm"])
def test_a_constant_in_the_density_moves_log_z_alone(objective: str, tmp_path: Path) -> None:
    """A network has no level of hundreds within a fit: with one, draws and marginals were wrong by whole nats."""
    states = all_values(torch.full((4,), 2))
    parity = 2.0 - 4.0 * (states.sum(1) % 2)  # of no unary or pairwise terms
    place = torch.tensor([8, 4, 2, 1])
    found = []
    for shift in (0.0, -3e3):
        mam = MarginalizationModel([2] * 4, hidden=16, depth=1)
        settings: dict[str, Any] = {"num_steps": 40, "batch_size": 32, "lr": 1e-2, "progress": False}
        mam.fit_energy(lambda x, shift=shift: parity[(x * place).sum(1)].double() + shift, objective, **settings)
        importance, network = (mam.log_partition(method).value - shift for method in ("importance", "network"))
        assert importance == pytest.approx(float(parity.logsumexp(0)), abs=0.2)
        mam.save(tmp_path / "model")
        assert MarginalizationModel.load(tmp_path / "model").log_partition("network").value - shift == network
        found.append(torch.cat([mam.log_prob(states), torch.tensor([importance, network])]))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=2e-3)


def test_an_energy_and_its_log_z(ising: tuple[MarginalizationModel, MarginalizationResult]) -> None:
    """S2, small."""
    mam, result = ising
    log_z = LATTICE.log_partition()
    log_p = LATTICE.log_density(STATES).double() - log_z
    assert mam.marginals.kind == "pairwise"
    q = mam.log_prob(STATES).double()
    assert float((q - log_p).std()) < 1e-5, "complete states are exact but for the constant"
    assert abs(mam.log_partition("network").value - log_z) < 0.05
    along = mam.distribution(order=range(9)).log_prob(STATES).detach().double()
    assert float((along.exp() * (along - log_p)).sum()) < 0.08
    marginals = mam.log_prob(torch.where(torch.eye(9, dtype=torch.bool), 1, -1)).exp()
    assert (marginals - (1 + LATTICE.mean_spin()) / 2).abs().max() < 0.05
    for method in ("importance", "bridge"):
        found = mam.log_partition(method, num_samples=2000)
        assert abs(found.value - log_z) < 0.03 and found.ess > 1000 and not found.exact
        assert abs(found.lower - log_z) < 0.03 and abs(found.upper - log_z) < 0.03
    assert torch.equal(mam.log_partition().log_weights, mam.log_partition().log_weights)
    # summing out what is missing: exactly where it has few states, by importance elsewhere
    rows = hide_some(STATES[::9], seed=3)
    exact = torch.stack([log_p[((row == STATES) | (row < 0)).all(1)].logsumexp(0) for row in rows])
    assert (mam.log_prob(rows, refine=10).double() - exact).abs().max() < 1e-4
    assert (mam.log_prob(rows) - exact).abs().mean() < 0.15
    assert result.check is not None and result.losses.shape == (200,) and result.marginals is None


def test_importance_refines_where_enumeration_is_too_long() -> None:
    lattice = LatticeIsing(width=4, coupling=0.05, field=0.2)
    mam = MarginalizationModel([2] * 16, hidden=32, depth=1)
    mam.fit_energy(lattice.log_density, num_steps=60, batch_size=48, lr=3e-3, progress=False)
    row = torch.full((1, 16), -1)
    row[0, 5] = 1
    exact = math.log((1 + lattice.mean_spin()) / 2)
    assert abs(float(mam.log_prob(row, refine=4096)) - exact) < 0.03
    # Two estimates of log Z from other draws do not cancel; the probability of nothing is one by definition.
    assert float(mam.log_prob(torch.full_like(row, -1), refine=8)) == 0.0


@pytest.mark.parametrize("objective", ["kl", pytest.param("fm", marks=pytest.mark.slow)])
def test_other_objectives_learn_an_energy(objective: str) -> None:
    """A dead gradient stays at the uniform law, where the network starts."""
    mam = MarginalizationModel([2] * 9, hidden=32, depth=1)
    mam.fit_energy(LATTICE.log_density, objective, num_steps=300, batch_size=64, lr=5e-3, progress=False)
    log_p = LATTICE.log_density(STATES).double() - LATTICE.log_partition()
    q = mam.log_prob(STATES).double().log_softmax(0)
    uniform = -9 * math.log(2) - float(log_p.mean())
    assert float((q.exp() * (q - log_p)).sum()) < 0.5 * uniform


def test_autoregressive_baselines_have_no_marginals() -> None:
    mam = MarginalizationModel([2] * 9, hidden=48, depth=1)
    result = mam.fit_energy(LATTICE.log_density, "arm", num_steps=60, batch_size=64, lr=1e-2, progress=False)
    assert result.check is None and "nats" not in result.summary()
    log_p = LATTICE.log_density(STATES).double() - LATTICE.log_partition()
    along = mam.distribution(order=range(9)).log_prob(STATES).detach().double()
    assert float((along.exp() * (along - log_p)).sum()) < 0.15
    assert abs(mam.log_partition(order=range(9)).value - LATTICE.log_partition()) < 0.1
    asked: list[Callable[[], Any]] = [
        lambda: mam.log_prob(STATES[:2]),
        lambda: mam.log_partition("network"),
        lambda: mam.sample(2, source="marginal"),
        lambda: mam.impute(STATES[:2].masked_fill(STATES[:2] == 0, -1), block=2, candidates=2),
        lambda: mam.consistency_report(STATES[:2]),
    ]
    for ask in asked:  # f was not learned, and answered as the uniform law
        with pytest.raises(RuntimeError, match="baseline"):
            ask()


def test_a_density_that_is_not_pairwise() -> None:
    def log_density(x: torch.Tensor) -> torch.Tensor:
        return 1.5 * (x[:, 0] * x[:, 1] * x[:, 2]).float() - 0.5 * x.sum(1)

    mam = MarginalizationModel([2] * 4, hidden=32, depth=2)
    mam.fit_energy(log_density, num_steps=110, batch_size=48, lr=1e-2, progress=False)
    assert mam.marginals.kind == "energy"
    states = all_values(torch.full((4,), 2))
    truth = log_density(states)
    assert (mam.log_prob(states) - truth.log_softmax(0)).abs().max() < 0.15
    assert abs(mam.log_partition("network").value - float(truth.logsumexp(0))) < 0.1


@pytest.mark.parametrize("bonus", [8.0, -8.0])
def test_a_term_that_matters_at_one_state_is_not_overlooked(bonus: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few uniform rows show it: f was the pairwise part's, and log Z two nats off.  A reward is where the density's own
    chains go, a penalty where those of the pairwise part do.
    """
    w = 0.3 * torch.randn(10, generator=torch.Generator().manual_seed(0)) + 2.0 * (bonus < 0)

    def log_density(x: torch.Tensor) -> torch.Tensor:
        return x.float() @ w + bonus * (x == 1).all(1)

    mam = MarginalizationModel([2] * 10, hidden=16, depth=1)
    mam.fit_energy(log_density, num_steps=5, batch_size=128, progress=False)
    assert mam.marginals.kind == "energy"
    # Where the first look finds nothing, the last one does: at the chains' rows, and at the model's own draws.
    monkeypatch.setattr("ppl_models.marginalization_model.training.agrees", lambda *_: True)
    with pytest.raises(RuntimeError, match="structure=False"):
        mam.fit_energy(log_density, num_steps=60, batch_size=128, lr=1e-2, progress=False)
    with pytest.raises(RuntimeError, match="no marginals"):
        mam.log_prob(torch.zeros(1, 10).long())


def test_the_evidence_of_a_pyro_model() -> None:
    y = torch.tensor([0.5, -1.0, 1.5, 0.1])

    def model(y: torch.Tensor) -> None:
        with pyro.plate("i", 4):
            z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(z.cumsum(-1), 1.0).to_event(1), obs=y)

    mam = MarginalizationModel([2] * 4, hidden=32, depth=1)
    mam.fit_energy(model, site="z", args=(y,), num_steps=40, batch_size=16, lr=1e-2, progress=False)
    states = all_values(torch.full((4,), 2)).float()
    joint = dist.Bernoulli(0.3).log_prob(states).sum(1) + dist.Normal(states.cumsum(1), 1.0).log_prob(y).sum(1)
    assert abs(mam.log_partition(num_samples=2000).value - float(joint.logsumexp(0))) < 0.05


# ---------------------------------------------------------------- inside Pyro
def test_the_model_is_a_pyro_model(learned: tuple[MarginalizationModel, MarginalizationResult]) -> None:
    mam, _ = learned
    x = hide_some(MIXTURE.sample(10))
    with pyro.get_param_store().scope(), scoped_seed(0):
        trace = poutine.trace(mam).get_trace(x)
        assert mam(num_rows=7).shape == (7, 8)
    assert torch.allclose(torch.as_tensor(trace.log_prob_sum()).detach(), mam.log_prob(x).sum())
    law = mam.distribution()
    assert law.event_shape == (8,) and law.expand([3, 4]).batch_shape == (3, 4)
    assert law.enumerate_support().shape == (256, 8) and law.expand([2]).enumerate_support().shape == (256, 2, 8)
    with scoped_seed(0):
        assert law.expand([2]).sample((5,)).shape == (5, 2, 8)
    with pytest.raises(ValueError, match="support"):
        law.log_prob(torch.full((8,), 2))
    with pytest.raises(NotImplementedError, match="2\\^20"):
        MarginalizationModel([2] * 30, hidden=8).distribution().enumerate_support()


def test_a_frozen_prior_over_a_latent_vector(learned: tuple[MarginalizationModel, MarginalizationResult]) -> None:
    """The sum over all 256 states by Pyro's enumeration, against the same sum by hand."""
    mam, _ = learned

    def model(y: torch.Tensor) -> None:
        x = pyro.sample("x", mam.distribution(order=range(8)), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(x.float().sum(-1), 1.0), obs=y)

    with torch.no_grad(), poutine.block():
        loss = TraceEnum_ELBO(max_plate_nesting=0).loss(model, lambda y: None, torch.tensor(3.0))
        states = all_values(torch.full((8,), 2))
        joint = mam.distribution(order=range(8)).log_prob(states)
        joint = joint + dist.Normal(states.float().sum(1), 1.0).log_prob(torch.tensor(3.0))
    assert abs(float(loss) + float(joint.logsumexp(0))) < 1e-4


def test_partly_missing_rows_as_a_likelihood_with_context() -> None:
    mam = MarginalizationModel([2, 3], context_features=2, hidden=16, depth=1)
    x = torch.tensor([[0, -1], [1, 2], [-1, 1]])

    def model() -> None:
        with pyro.plate("rows", 3):
            z = pyro.sample("z", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
            pyro.sample("x", mam.distribution(torch.eye(2)[z]), obs=x)

    with torch.no_grad(), poutine.block():
        loss = torch.tensor(TraceEnum_ELBO(max_plate_nesting=1).loss(model, lambda: None))
    each = torch.stack([mam.log_prob(x, torch.eye(2)[[k] * 3]) for k in range(2)])
    assert torch.allclose(-loss, (each.logsumexp(0) - math.log(2)).sum(), atol=1e-5)


def test_stage_one_through_pyro_is_stage_one() -> None:
    a, b = (MarginalizationModel([2] * 8, hidden=16, depth=1) for _ in range(2))
    rows = ROWS[:64]
    direct = MaskedCompletion(a.conditionals)

    class Factor(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = b.conditionals
            self.loss = (MaskedCompletion(b.conditionals),)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            def model(x: torch.Tensor) -> None:
                pyro.factor("stage1", -self.loss[0](x))

            return Trace_ELBO().differentiable_loss(model, lambda x: None, x)

    for objective in (direct, Factor()):
        fit(objective, rows, num_steps=5, batch_size=32, progress=False)
    pairs = zip(a.conditionals.parameters(), b.conditionals.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)


def test_a_guide_along_an_order_gives_the_evidence() -> None:
    """Its density is that of its draws, so that importance weights are unbiased; and its parameters have gradients."""
    y = torch.tensor(1.2)
    mam = MarginalizationModel([2] * 3, hidden=16, depth=1)

    def model() -> None:
        z = pyro.sample("z", dist.Bernoulli(torch.full((3,), 0.5)).to_event(1))
        pyro.sample("y", dist.Normal(z.sum(-1), 0.5), obs=y)

    def guide() -> None:
        pyro.sample("z", mam.distribution(order=[2, 0, 1], dtype=torch.float))

    states = all_values(torch.full((3,), 2)).float()
    evidence = (dist.Normal(states.sum(1), 0.5).log_prob(y) - 3 * math.log(2)).logsumexp(0)
    law = mam.distribution(order=[2, 0, 1]).expand([6000])
    with scoped_seed(0), torch.no_grad():
        z = law.sample()
        log_w = dist.Normal(z.float().sum(-1), 0.5).log_prob(y) - 3 * math.log(2) - law.log_prob(z)
    estimate = log_w.logsumexp(0) - math.log(6000)
    error = float(log_w.sub(estimate).exp().std()) / 6000**0.5
    assert abs(float(estimate - evidence)) < 4.5 * error < 0.2
    with scoped_seed(0), poutine.block(), pyro.get_param_store().scope():
        Trace_ELBO(num_particles=3).differentiable_loss(model, guide).backward()
    gradient = mam.conditionals.body.first.weight.grad  # type: ignore[union-attr]
    assert gradient is not None and bool(torch.isfinite(gradient).all()) and bool((gradient != 0).any())


# ---------------------------------------------------------------- devices
@pytest.mark.parametrize("network", ["mlp", "transformer", "unet", "lattice"])
def test_nothing_stays_on_the_cpu(network: str) -> None:
    mam = MarginalizationModel([2, 3, 2] * 3, network, hidden=8, depth=1)
    with fake_accelerator() as device:
        for module in mam.modules():
            for name, value in module._parameters.items():
                if value is not None:
                    module._parameters[name] = torch.nn.Parameter(torch.empty(value.shape, device=device))
            for name, value in module._buffers.items():
                if value is not None:
                    module._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device=device)
        x = torch.zeros(6, 9, dtype=torch.long, device=device)
        values = x.masked_fill(torch.zeros(6, 9, device=device) > 1, -1)
        for kind in ("data", "energy", "pairwise"):
            mam.marginals.kind = kind
            (mam._log_marginal(values, None).sum() + mam.conditionals(values)[..., 0].sum()).backward()
        loss = MaskedCompletion(mam.conditionals)(values)
        loss.backward()
        assert loss.device.type == device.type


def test_a_pairwise_penalty_in_single_precision_is_no_further_term() -> None:
    """Its terms have the rounding of values of 27,000, and rows of the law have ones of 4."""
    field = torch.tensor([0.5, -0.3, 0.2, 0.1, -0.4, 0.3])
    model = MarginalizationModel([2] * 6, hidden=16, depth=1)
    model.fit_energy(
        lambda x: x.float() @ field - 3000 * (x.float().sum(1) - 3) ** 2,
        num_steps=800,
        lr=1e-2,
        progress=False,
    )
    assert model.marginals.kind == "pairwise"
