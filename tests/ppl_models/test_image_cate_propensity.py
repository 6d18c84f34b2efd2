"""Weighting, doubly robust scores and cluster-robust errors against explicit sums, other libraries and published
figures.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppl_models.image_cate.least_squares import clustered_mean, least_squares
from ppl_models.image_cate.propensity import (
    aipw_scores,
    cross_fit_outcomes,
    estimate,
    grouped_folds,
    hajek,
    trim,
)
from ppl_models.image_cate.ridge import LogisticRidge, Ridge


def clustered_data(seed: int = 0, n: int = 120, sites: int = 15) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    site = rng.integers(0, sites, n)
    x = np.column_stack([np.ones(n), rng.normal(size=n), rng.normal(size=sites)[site]])
    y = x @ [1.0, 2.0, -1.0] + rng.normal(size=sites)[site] + rng.normal(size=n)
    return x, y, site


@pytest.mark.parametrize("weighted", [False, True])
def test_cr1_is_the_sandwich_summed_group_by_group(weighted: bool) -> None:
    x, y, site = clustered_data()
    w = np.random.default_rng(1).uniform(0.2, 3, len(y)) if weighted else np.ones(len(y))
    found = least_squares(x, y, site, w)
    bread = np.linalg.inv(x.T @ (w[:, None] * x))
    beta = bread @ x.T @ (w * y)
    meat = np.zeros((3, 3))
    for g in np.unique(site):
        s = x[site == g].T @ (w * (y - x @ beta))[site == g]
        meat += np.outer(s, s)
    groups, n = len(np.unique(site)), len(y)
    expected = groups / (groups - 1) * (n - 1) / (n - 3) * bread @ meat @ bread
    np.testing.assert_allclose(found.coefficients, beta, rtol=1e-10)
    np.testing.assert_allclose(found.covariance, expected, rtol=1e-9)
    assert found.num_groups == groups


def test_cr1_is_that_of_statsmodels() -> None:
    api = pytest.importorskip("statsmodels.api", reason="statsmodels is not installed")
    x, y, site = clustered_data(2)
    expected = api.OLS(y, x).fit(cov_type="cluster", cov_kwds={"groups": site})
    np.testing.assert_allclose(least_squares(x, y, site).standard_errors, expected.bse, rtol=1e-8)


def test_cr3_is_the_jackknife_over_groups() -> None:
    x, y, site = clustered_data(3)
    found = least_squares(x, y, site, correction="CR3")
    labels = np.unique(site)
    left_out = np.stack([np.linalg.lstsq(x[site != g], y[site != g], rcond=None)[0] for g in labels])
    moves = left_out - np.linalg.lstsq(x, y, rcond=None)[0]
    expected = (len(labels) - 1) / len(labels) * moves.T @ moves
    np.testing.assert_allclose(found.covariance, expected, rtol=1e-8)


def test_the_error_of_a_plain_mean() -> None:
    values = np.random.default_rng(0).normal(size=50)
    found = clustered_mean(values)
    assert found.estimate == pytest.approx(values.mean())
    assert found.standard_error == pytest.approx(values.std(ddof=1) / math.sqrt(50))
    low, high = found.interval(0.05)
    assert high - low == pytest.approx(2 * 1.959964 * found.standard_error, rel=1e-6)
    twice = clustered_mean(np.repeat(values, 2), np.repeat(np.arange(50), 2))
    assert twice.standard_error == pytest.approx(found.standard_error)  # copies within a group tell nothing new


def trial(seed: int, n: int = 400) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 2))
    e = 1 / (1 + np.exp(-x[:, 0]))
    t = (rng.uniform(size=n) < e).astype(float)
    return x[:, 1] + 2 * x[:, 0] + t * (1 + x[:, 1]) + 0.5 * rng.normal(size=n), t, e, x


def test_constant_propensity_gives_the_difference_in_means() -> None:
    y, t, _, _ = trial(0)
    difference = y[t == 1].mean() - y[t == 0].mean()
    assert hajek(y, t, 0.3).estimate == pytest.approx(difference)
    e = estimate(t)
    assert e.kind == "constant" and float(e.scores[0]) == pytest.approx(t.mean())
    means = np.full_like(y, y[t == 0].mean()), np.full_like(y, y[t == 1].mean())
    assert float(aipw_scores(y, t, e.scores, *means).mean()) == pytest.approx(difference)


def test_hajek_is_the_difference_of_weighted_means() -> None:
    y, t, e, _ = trial(1)
    w1, w0 = t / e, (1 - t) / (1 - e)
    assert hajek(y, t, e).estimate == pytest.approx(w1 @ y / w1.sum() - w0 @ y / w0.sum())


def test_invariances() -> None:
    y, t, e, x = trial(1)
    base = hajek(y, t, e)
    assert hajek(3 * y + 7, t, e).estimate == pytest.approx(3 * base.estimate)
    assert hajek(y, 1 - t, 1 - e).estimate == pytest.approx(-base.estimate)
    assert hajek(y, 1 - t, 1 - e).standard_error == pytest.approx(base.standard_error)
    inverse = np.mean(t * y / e - (1 - t) * y / (1 - e))
    assert abs(np.mean(t * (y + 7) / e - (1 - t) * (y + 7) / (1 - e)) - inverse) > 0.01  # which raw weighting fails
    mu = cross_fit_outcomes(y, t, x)
    moved = cross_fit_outcomes(3 * y + 7, t, x)
    scores = aipw_scores(y, t, e, *mu)
    np.testing.assert_allclose(aipw_scores(3 * y + 7, t, e, *moved), 3 * scores, rtol=1e-7)
    np.testing.assert_allclose(aipw_scores(y, 1 - t, 1 - e, mu.mu1, mu.mu0), -scores, rtol=1e-10)


def test_scores_are_right_if_either_part_is() -> None:
    y, t, e, x = trial(2, 40_000)
    mu0 = x[:, 1] + 2 * x[:, 0]
    wrong = np.zeros_like(y)
    # Truth is 1; the errors of these means are about 0.02 to 0.05.
    assert float(aipw_scores(y, t, e, wrong, wrong).mean()) == pytest.approx(1, abs=0.15)
    assert float(aipw_scores(y, t, 0.5, mu0, mu0 + 1 + x[:, 1]).mean()) == pytest.approx(1, abs=0.03)
    assert abs(float(aipw_scores(y, t, 0.5, wrong, wrong).mean()) - 1) > 0.5


def test_confounding_is_removed_by_the_confounder_and_not_by_other_columns() -> None:
    """The design of sheet and tutorial: ``logit e = C + X1 + X2``, effect 2; naive comparison errs by 1.97."""
    rng = np.random.default_rng(4)
    n = 4000
    c, x = rng.normal(size=n), rng.normal(size=(n, 2))
    t = (rng.uniform(size=n) < 1 / (1 + np.exp(-(c + x.sum(1))))).astype(float)
    y = 2 * t + c + x.sum(1) + rng.normal(size=n)
    naive = y[t == 1].mean() - y[t == 0].mean() - 2
    both = np.column_stack([c, x])
    bias = {}
    for name, features in {"all": both, "x": x}.items():
        e = estimate(t, "logistic", features)
        scores = aipw_scores(y, t, e.scores, *cross_fit_outcomes(y, t, features))
        bias[name] = float(scores.mean()) - 2
    assert naive > 1.8
    assert abs(bias["all"]) < 0.15
    assert 0.7 < bias["x"] < 1.0


@pytest.mark.changes_globals("rng_python")  # the first import of scikit-learn draws from it
def test_logistic_agrees_with_scikit_learn() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    _, t, _, x = trial(3)
    x = (x - x.mean(0)) / x.std(0)
    site = np.arange(len(t)) % 40
    found = estimate(t, "logistic", x, site, num_folds=4, seed=1)
    assert found.kind == "logistic"
    folds = grouped_folds(site, 4, 1, t).numpy()
    for fold in range(4):
        train, out = folds != fold, folds == fold
        z = (x - x[train].mean(0)) / x[train].std(0)
        model = linear_model.LogisticRegression(C=1.0, tol=1e-10, max_iter=1000).fit(z[train], t[train])
        np.testing.assert_allclose(found.scores[out], model.predict_proba(z[out])[:, 1], atol=1e-5)


def test_regressions_take_columns_in_any_units() -> None:
    """A column of small numbers was taken for a constant one."""
    stream = torch.Generator().manual_seed(0)
    x = torch.randn(60, 2, generator=stream, dtype=torch.float64)
    t = (torch.rand(60, generator=stream) < torch.sigmoid(2 * x[:, 0])).double()
    folds = torch.arange(60) % 3
    for scale in (1e-12, 1e12):
        logistic, plain = LogisticRidge(scale * x, t), LogisticRidge(x, t)
        torch.testing.assert_close(logistic.predict(scale * x), plain.predict(x))
        torch.testing.assert_close(Ridge(scale * x, t, folds).predict(scale * x), Ridge(x, t, folds).predict(x))
    constant = torch.cat([x, torch.full((60, 1), 0.1, dtype=torch.float64)], 1)
    torch.testing.assert_close(LogisticRidge(constant, t).predict(constant), LogisticRidge(x, t).predict(x))


def test_logistic_stays_inside_zero_and_one_when_a_column_separates_the_arms() -> None:
    x = np.linspace(-1, 1, 100)
    scores = estimate((x > 0).astype(float), "logistic", x).scores
    assert 0 < float(scores.min()) < float(scores.max()) < 1


def test_outcome_predictions_come_from_other_groups() -> None:
    y, t, _, x = trial(5)
    site = np.arange(len(y)) // 10
    before = cross_fit_outcomes(y, t, x, site)
    changed = y.copy()
    changed[site == 3] += 1000
    after = cross_fit_outcomes(changed, t, x, site)
    folds = grouped_folds(site, 5, 0, t).numpy()
    same = folds == folds[site == 3][0]
    assert torch.equal(before.mu0[same], after.mu0[same]) and torch.equal(before.mu1[same], after.mu1[same])
    assert not torch.equal(before.mu0[~same], after.mu0[~same])


def test_outcome_predictions_reach_a_linear_truth_and_shrink_without_one() -> None:
    rng = np.random.default_rng(6)
    n = 600
    x, t = rng.normal(size=(n, 30)), (rng.uniform(size=n) < 0.5).astype(float)
    y = 3 * x[:, 0] + t * (1 - 2 * x[:, 1]) + 0.1 * rng.normal(size=n)
    mu = cross_fit_outcomes(y, t, x)
    np.testing.assert_allclose(mu.mu1 - mu.mu0, 1 - 2 * x[:, 1], atol=0.15)
    noise = rng.normal(size=n)
    void = cross_fit_outcomes(noise, t, x)
    assert float(void.mu0.std()) < 0.15  # least squares would give about sqrt(30 / 240) = 0.35


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(6, 40), st.integers(0, 1000))
def test_folds_keep_groups_whole_and_are_balanced(num_folds: int, num_groups: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    site = np.repeat(np.arange(num_groups), rng.integers(1, 5, num_groups))
    t = (np.arange(len(site)) % 2).astype(float)
    folds = grouped_folds(site, num_folds, seed, t).numpy()
    for g in range(num_groups):
        assert len(set(folds[site == g])) == 1
    sites_per_fold = np.bincount([folds[site == g][0] for g in range(num_groups)], minlength=num_folds)
    assert sites_per_fold.max() - sites_per_fold.min() <= 1
    assert np.array_equal(folds, grouped_folds(site, num_folds, seed, t).numpy())


def test_folds_share_the_treated_sites() -> None:
    t = (np.arange(50) < 10).astype(float)
    folds = grouped_folds(None, 5, 0, t).numpy()
    assert [int(t[folds == k].sum()) for k in range(5)] == [2] * 5


def test_trimming() -> None:
    e = np.array([0.01, 0.05, 0.3, 0.5, 0.96])
    found = trim(e)
    assert found.keep.tolist() == [False, True, True, True, False] and found.num_dropped == 2
    rng = np.random.default_rng(0)
    e = rng.beta(0.4, 0.4, 3000).clip(1e-4, 1 - 1e-4)
    low, high = trim(e, "crump").bounds
    v = 1 / (e * (1 - e))
    g = 1 / (low * (1 - low))
    # The condition that defines the bounds, and the variance bound that they minimise over all symmetric ones.
    assert g == pytest.approx(2 * v[v <= g].mean(), rel=1e-9) and high == pytest.approx(1 - low)
    risk = [v[(e >= a) & (e <= 1 - a)].mean() / ((e >= a) & (e <= 1 - a)).mean() for a in np.linspace(0.001, 0.3, 300)]
    kept = (e >= low) & (e <= high)
    assert v[kept].mean() / kept.mean() <= min(risk) * 1.001
    assert trim(np.full(10, 0.4), "crump").num_dropped == 0


def test_the_figures_of_the_uganda_trial(data_dir: Path) -> None:
    path = data_dir / "uganda_yop" / "uganda_yop.npz"
    if not path.is_file():
        pytest.skip(f"no {path.name} in the data folder")
    with np.load(path, allow_pickle=False) as held:
        y, t, x, image = (held[k] for k in ("outcome", "treatment", "covariates", "image_index"))
    assert hajek(y, t, 0.396).estimate == pytest.approx(0.7415, abs=5e-5)
    assert hajek(y, t, 0.396).standard_error == pytest.approx(0.0615, abs=5e-5)
    assert hajek(y, t, 0.396, image).standard_error == pytest.approx(0.0755, abs=5e-5)
    whole = ~np.isnan(x).any(1)
    y, t, x, image = y[whole], t[whole], x[whole][:, [1, 3, 5]], image[whole]
    scores = aipw_scores(y, t, estimate(t).scores, *cross_fit_outcomes(y, t, x, image))
    found = clustered_mean(scores, image)
    assert 0.716 < found.estimate < 0.752
    assert found.standard_error == pytest.approx(0.0755, abs=0.002)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"treatment": [1, 1, 1, 1]}, "one arm only: 4 of 4"),
        ({"treatment": [0, 0, 0, 0]}, "one arm only: 0 of 4"),
        ({"treatment": [1, 2, 1, 2]}, r"must be 0 \(control\) or 1 \(treated\), got 2.0 at index 1"),
        ({"treatment": [0, 1, math.nan, 1]}, "treatment must be finite"),
        ({"treatment": [0, 1, 1]}, "treatment must have one row a unit, 4, got 3"),
        ({"outcome": [1.0, math.nan, 2.0, 3.0]}, "outcome must be finite.*index \\(1,\\)"),
        ({"scores": [0.5, 0.0, 0.5, 0.5]}, "propensity must lie strictly between 0 and 1; 1 of 4 values"),
        ({"scores": 1.0}, "propensity must lie strictly between 0 and 1"),
        ({"scores": [0.5, 0.5]}, "propensity must have one row a unit, 4, got 2"),
        ({"mu0": [0.0, 0.0]}, "mu0 must have one row a unit"),
    ],
)
def test_bad_input_of_scores(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "outcome": [1.0, 2.0, 3.0, 4.0],
        "treatment": [0, 1, 0, 1],
        "scores": 0.5,
        "mu0": [0.0] * 4,
        "mu1": [0.0] * 4,
    } | change
    with pytest.raises(ValueError, match=message):
        aipw_scores(**arguments)


def test_treatments_of_any_kind() -> None:
    y = [1.0, 2.0, 3.0, 5.0]
    expected = hajek(y, [0, 1, 0, 1], 0.5)
    kinds = (
        [False, True, False, True],
        np.array([0, 1, 0, 1], np.int8),
        torch.tensor([0, 1, 0, 1]).bool(),
        [[0], [1]] * 2,
    )
    for t in kinds:
        assert hajek(y, t, 0.5) == expected


def test_bad_input_of_the_rest() -> None:
    t = [0, 1, 0, 1]
    with pytest.raises(ValueError, match='must be None, a number, an array or "logistic"'):
        estimate(t, "forest")
    with pytest.raises(ValueError, match='"logistic" needs features'):
        estimate(t, "logistic")
    with pytest.raises(ValueError, match="num_folds = 5 needs as many groups, there are 4"):
        grouped_folds(None, 5, 0, t)
    with pytest.raises(ValueError, match="each arm needs at least 2"):
        cross_fit_outcomes([1.0, 2, 3, 4], t, num_folds=2)
    with pytest.raises(ValueError, match="no unit has a propensity between"):
        trim([0.5, 0.5], (0.6, 0.9))
    with pytest.raises(ValueError, match="two numbers in order"):
        trim([0.5, 0.5], (0.9, 0.1))
    with pytest.raises(ValueError, match="depend on each other"):
        least_squares(np.ones((5, 2)), np.arange(5.0))
    with pytest.raises(ValueError, match="needs more rows than columns"):
        least_squares(np.eye(2), [1.0, 2.0])
    with pytest.raises(ValueError, match='correction must be "CR1" or "CR3"'):
        least_squares(np.ones((5, 1)), np.arange(5.0), correction="CR2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="alpha must lie between 0 and 1"):
        clustered_mean([1.0, 2.0]).interval(1.5)
