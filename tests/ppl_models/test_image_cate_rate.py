"""Rank-weighted effects against closed forms, a plain loop, and the spread of repeated trials."""

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppl_models.image_cate import rate
from ppl_models.image_cate.evaluation import policy_value
from ppl_models.image_cate.rate import permutation_test

RANK_EFFECT = {"autoc": -0.3 * math.log(0.3), "qini": 0.3 * 0.7 / 2}


def by_loop(scores: np.ndarray, priority: np.ndarray, weights: np.ndarray, kind: str) -> float:
    """The definition, one unit at a time: tied units carry their weighted mean score."""
    tied = scores.astype(float).copy()
    for value in np.unique(priority):
        rows = priority == value
        tied[rows] = np.average(scores[rows], weights=weights[rows])
    order = np.argsort(-priority, kind="stable")
    mean, total = np.average(scores, weights=weights), weights.sum()
    mass = top = result = 0.0
    for i in order:
        mass += weights[i]
        top += weights[i] * tied[i]
        share = mass / total if kind == "qini" else 1.0
        result += weights[i] / total * share * (top / mass - mean)
    return result


def harmonic_form(scores: np.ndarray) -> tuple[float, float]:
    """AUTOC and QINI of scores already in order, by the sums over single scores."""
    n = len(scores)
    h = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, n + 1))])
    autoc = np.mean(scores * (h[n] - h[:n] - 1))
    qini = (scores * (n - np.arange(n))).sum() / n**2 - scores.mean() * (n + 1) / (2 * n)
    return float(autoc), float(qini)


def test_five_units_by_hand() -> None:
    scores, priority = [3, 1, 4, 1, 5], [5, 4, 3, 2, 1]
    found = rate(scores, priority)
    assert found.estimate == pytest.approx(-0.2566666667, abs=1e-9)
    assert rate(scores, priority, kind="qini").estimate == pytest.approx(-0.16, abs=1e-12)
    assert found.toc.tolist() == pytest.approx([0.2, -0.8, 8 / 3 - 2.8, -0.55, 0.0], abs=1e-12)


@pytest.mark.parametrize("rows", [[0, 1, 2], [1, 0, 2], [2, 1, 0], [1, 2, 0]])
def test_ties_share_their_mean_in_any_order(rows: list[int]) -> None:
    found = rate(np.array([6.0, 0, 0])[rows], np.array([2.0, 2, 1])[rows])
    assert found.estimate == pytest.approx(2 / 3, abs=1e-12)
    assert found.toc.tolist() == pytest.approx([1.0, 1.0, 0.0], abs=1e-12)


@pytest.mark.parametrize("kind", ["autoc", "qini"])
def test_two_effect_types_ranked_by_an_oracle(kind: Any) -> None:
    n = 100_000
    effect = (np.arange(n) < 0.3 * n).astype(float)
    found = rate(effect, effect, kind=kind, num_bootstrap=2)
    # The sum replaces an integral; its error is of order log(n) / n.
    assert found.estimate == pytest.approx(RANK_EFFECT[kind], abs=2e-4)


def test_normal_effects_ranked_by_an_oracle() -> None:
    n = 100_000
    effect = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    assert rate(3 * effect, effect, num_bootstrap=2).estimate == pytest.approx(3 * 0.90320, abs=2e-3)
    assert rate(effect, effect, kind="qini", num_bootstrap=2).estimate == pytest.approx(
        1 / (2 * math.sqrt(math.pi)), abs=1e-4
    )


def test_agrees_with_the_harmonic_sums() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(2.0, 3.0, 501)
    priority = -np.arange(501.0)
    autoc, qini = harmonic_form(scores)
    assert rate(scores, priority).estimate == pytest.approx(autoc, abs=1e-12)
    assert rate(scores, priority, "qini").estimate == pytest.approx(qini, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 30), st.integers(1, 6), st.integers(0, 10_000), st.sampled_from(["autoc", "qini"]))
def test_agrees_with_the_loop_and_ignores_the_order_of_rows(n: int, levels: int, seed: int, kind: Any) -> None:
    rng = np.random.default_rng(seed)
    scores, priority = rng.normal(5.0, 1.0, n), rng.integers(0, levels, n).astype(float)
    weights = rng.integers(0, 4, n).astype(float)
    weights[:2] = 1.0  # fewer than two groups with weight are refused
    seen = weights > 0
    expected = by_loop(scores[seen], priority[seen], weights[seen], kind)
    assert rate(scores, priority, kind, num_bootstrap=2, weights=weights).estimate == pytest.approx(expected, abs=1e-10)
    rows = rng.permutation(n)
    groups = np.arange(n)
    one = rate(scores, priority, kind, groups, num_bootstrap=20)
    other = rate(scores[rows], priority[rows], kind, groups[rows], num_bootstrap=20)
    assert other.estimate == pytest.approx(one.estimate, abs=1e-12)
    if levels == 1:
        assert (one.estimate, one.standard_error) == (0.0, 0.0) and math.isnan(one.ratio)
    if len(np.unique(priority)) == n:  # ties of one run may be summed in another order
        assert other.standard_error == pytest.approx(one.standard_error, abs=1e-12)


def test_shift_scale_and_direction() -> None:
    rng = np.random.default_rng(1)
    scores, priority = rng.normal(size=200), rng.normal(size=200)
    found = rate(scores, priority)
    moved = rate(-2 * scores + 1e4, np.exp(priority))
    assert moved.estimate == pytest.approx(-2 * found.estimate, abs=1e-9)
    assert moved.standard_error == pytest.approx(2 * found.standard_error, abs=1e-9)
    assert rate(scores, -priority, "qini").estimate == pytest.approx(-rate(scores, priority, "qini").estimate, abs=0.02)


def site_trials(seed: int, num_trials: int = 150) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """100 sites of 10 units, treatment and effect 1 + x by site, site shock 0.5, noise 1; scores, good and void
    priorities.
    """
    rng = np.random.default_rng(seed)
    site = np.repeat(np.arange(100), 10)
    trials = []
    for _ in range(num_trials):
        x, shock = rng.normal(size=100), 0.5 * rng.normal(size=100)
        treated = rng.permutation(100) < 50
        outcome = (treated * (1 + x) + shock)[site] + rng.normal(size=1000)
        scores = np.where(treated[site], outcome, -outcome) / 0.5
        trials.append((scores, (x + 0.7 * rng.normal(size=100))[site], rng.normal(size=100)[site]))
    return trials


def test_half_samples_by_site_give_the_spread_of_repeated_trials() -> None:
    site = np.repeat(np.arange(100), 10)
    estimates, errors, rejected = [], [], 0
    for t, (scores, priority, void) in enumerate(site_trials(3)):
        found = rate(scores, priority, groups=site, num_bootstrap=100, seed=t)
        estimates.append(found.estimate)
        errors.append(found.standard_error)
        rejected += abs(rate(scores, void, "qini", site, 100, t).ratio) > 1.96
    # Priority explains 1 / (1 + 0.49) of the effect's variance, so AUTOC is 0.9032 / sqrt(1.49) = 0.74, less for few
    # sites.  Units taken as independent would give a third of this error, rescaled half-samples 0.7 or 1.4 of it.
    assert np.mean(estimates) == pytest.approx(0.71, abs=0.05)
    assert np.mean(errors) == pytest.approx(np.std(estimates), rel=0.15)
    # 150 trials without any heterogeneity along the priority: 7.5 rejections at 5 %, and 17 or more with chance 0.001.
    assert 1 <= rejected <= 16


def test_uplift_is_the_value_of_treating_the_first() -> None:
    rng = np.random.default_rng(4)
    scores, priority = rng.normal(1.0, 1.0, 60), rng.permutation(60)
    found = rate(scores, priority)
    for first in (1, 17, 60):
        value = policy_value(scores, priority >= 60 - first).value.estimate
        assert float(found.uplift[first - 1]) == pytest.approx(value)


def test_errors_of_the_curve() -> None:
    rng = np.random.default_rng(5)
    scores, priority = rng.normal(size=4000), rng.normal(size=4000)
    found = rate(scores, priority, seed=2)
    # Mean of the top share q less the mean of all, of independent scores: variance (1 - q) / (q n).
    share = np.arange(1, 10) / 10
    expected = np.sqrt((1 - share) / share / 4000)
    np.testing.assert_allclose(found.grid_standard_error[:9].numpy(), expected, rtol=0.2)
    np.testing.assert_allclose(found.grid_toc.numpy(), found.toc[399::400].numpy(), atol=1e-12)
    assert float(found.grid_standard_error[9]) == pytest.approx(0, abs=1e-12)


def test_same_seed_same_bits_and_labels_of_any_kind() -> None:
    rng = np.random.default_rng(6)
    scores, priority, site = rng.normal(size=300), rng.normal(size=300), rng.integers(0, 30, 300)
    one = rate(scores, priority, groups=site, seed=7)
    for labels in (torch.tensor(site), [f"{s:03d}" for s in site], site.astype(float)):
        again = rate(torch.tensor(scores), torch.tensor(priority), groups=labels, seed=7)
        assert (again.estimate, again.standard_error) == (one.estimate, one.standard_error)
        assert torch.equal(again.grid_standard_error, one.grid_standard_error)
    assert rate(scores, priority, groups=site, seed=8).standard_error != one.standard_error


def test_half_samples_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(6)
    scores, priority = rng.normal(size=101), rng.normal(size=101)
    whole = rate(scores, priority)
    # The package's attribute of this name is the function.
    monkeypatch.setattr(sys.modules["ppl_models.image_cate.rate"], "_CELLS", 700)
    blocks = rate(scores, priority)
    assert blocks.estimate == whole.estimate
    assert blocks.standard_error == pytest.approx(whole.standard_error, rel=0.25)
    assert permutation_test(scores, scores) == 0.001


def test_permutation_p_values_are_uniform_without_heterogeneity_and_small_with_it() -> None:
    rng = np.random.default_rng(8)
    site = np.repeat(np.arange(40), rng.integers(1, 6, 40))
    below = 0
    for t in range(200):
        scores = rng.exponential(size=40)[site] + rng.normal(size=len(site))
        below += permutation_test(scores, rng.normal(size=40)[site], groups=site, num_permutations=39, seed=t) <= 0.1
    assert 8 <= below <= 34  # 20 expected, standard deviation 4.2
    x = rng.normal(size=40)
    assert permutation_test(x[site], x[site], groups=site, num_permutations=99) == 0.01
    assert permutation_test(-x[site], x[site], groups=site, num_permutations=99) == 1.0
    assert permutation_test(x[site], np.ones(len(site)), groups=site, num_permutations=99) == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": [1.0, math.nan, 2.0, 3.0]}, "scores must be finite"),
        ({"scores": []}, "scores is empty"),
        ({"scores": [[1.0, 2.0], [3.0, 4.0]]}, r"scores must have shape \(N,\)"),
        ({"priority": [1.0, 2.0]}, "priority must have one row a unit, 4, got 2"),
        ({"priority": [1.0, 2.0, 3.0, math.inf]}, "priority must be finite"),
        ({"kind": "gini"}, 'kind must be "autoc" or "qini"'),
        ({"groups": [0, 1]}, r"groups must hold one label a unit, shape \(4,\)"),
        ({"groups": [0, 0, 0, 0]}, "groups must hold at least 2 different groups, got 1"),
        ({"groups": [0.0, 1.0, math.nan, 2.0]}, "missing labels"),
        ({"groups": ["a", None, "b", "c"]}, "missing labels"),
        ({"num_bootstrap": 1}, "num_bootstrap must be at least 2"),
        ({"weights": [1.0, -1.0, 1.0, 1.0]}, "weights must not be negative"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"scores": [1.0, 2.0, 3.0, 4.0], "priority": [1.0, 2.0, 3.0, 4.0]} | change
    with pytest.raises(ValueError, match=message):
        rate(**arguments)


def test_bad_types() -> None:
    with pytest.raises(TypeError, match="scores must be a tensor or a numeric array"):
        rate(["a", "b"], [1, 2])
    with pytest.raises(TypeError, match="seed must be an integer"):
        rate([1, 2], [1, 2], seed=0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["autoc", "qini"])
def test_groups_without_weight_are_not_in_the_sample(kind: Any) -> None:
    stream = torch.Generator().manual_seed(0)
    scores, priority = torch.randn(2, 40, generator=stream, dtype=torch.float64)
    groups = torch.arange(40) // 4
    weights = (groups < 6).double()
    whole, part = (
        rate(scores, priority, kind, groups, weights=weights),
        rate(scores[:24], priority[:24], kind, groups[:24]),
    )
    assert whole.num_groups == 6
    assert whole.estimate == pytest.approx(part.estimate, rel=1e-12)
    assert 0.5 * part.standard_error < whole.standard_error < 2 * part.standard_error
    few = rate(scores, priority, kind, groups, weights=(groups < 2).double())
    assert math.isfinite(few.standard_error) and few.num_groups == 2
    with pytest.raises(ValueError, match="at least 2 groups"):
        rate(scores, priority, kind, groups, weights=(groups < 1).double())
