"""Checks of heterogeneity against regressions, hand-made cases and symmetries."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.effect_learners import image_summaries
from ppl_models.image_cate.balance import balance, overlap
from ppl_models.image_cate.evaluation import blp_calibration, blp_scores, evaluate, gate, policy_value
from ppl_models.image_cate.least_squares import clustered_mean, least_squares
from ppl_models.image_cate.propensity import aipw_scores, cross_fit_outcomes
from ppl_models.image_cate.rate import rate


def study(seed: int = 0, sites: int = 60, units: int = 5) -> dict[str, np.ndarray]:
    """Effects by site, doubly robust scores whose noise is larger than they are."""
    rng = np.random.default_rng(seed)
    site = np.repeat(np.arange(sites), units)
    effect = rng.normal(1.0, 1.0, sites)[site]
    scores = effect + 0.5 * rng.normal(size=sites)[site] + 2 * rng.normal(size=len(site))
    high = 1 / (1 + np.exp(-3 * (effect - 1)))
    return {"site": site, "effect": effect, "scores": scores, "probs": np.column_stack([1 - high, high])}


def test_gate_of_hard_types_is_the_regression_on_their_indicators() -> None:
    s = study()
    types = np.random.default_rng(1).integers(0, 3, len(s["scores"]))  # types that cut across sites
    indicators = np.eye(3)[types]
    found, expected = gate(s["scores"], indicators, s["site"]), least_squares(indicators, s["scores"], s["site"])
    np.testing.assert_allclose(found.estimates, expected.coefficients, rtol=1e-12)
    np.testing.assert_allclose(found.covariance, expected.covariance, rtol=1e-10, atol=1e-14)
    assert found.estimates.tolist() == pytest.approx([s["scores"][types == k].mean() for k in range(3)])
    assert found.num_units.tolist() == np.bincount(types).tolist()
    contrast = expected.contrast(torch.tensor([-1.0, 0.0, 1.0]))
    difference = found.difference()
    assert difference.estimate == pytest.approx(contrast.estimate)
    assert difference.standard_error == pytest.approx(contrast.standard_error)


def test_gate_of_soft_types() -> None:
    s = study(2)
    found = gate(s["scores"], s["probs"], s["site"])
    expected = (s["probs"] * s["scores"][:, None]).sum(0) / s["probs"].sum(0)
    np.testing.assert_allclose(found.estimates, expected, rtol=1e-12)
    # Shares weight the types' effects to the average one.
    assert float(found.shares @ found.estimates) == pytest.approx(s["scores"].mean())
    assert float(found.shares.sum()) == pytest.approx(1)
    relabelled = gate(s["scores"], s["probs"][:, ::-1].copy(), s["site"])
    np.testing.assert_allclose(relabelled.covariance.flip(0, 1), found.covariance, rtol=1e-12)
    one = gate(s["scores"], np.ones((len(s["scores"]), 1)), s["site"])
    mean = clustered_mean(s["scores"], s["site"])
    assert float(one.standard_errors[0]) == pytest.approx(mean.standard_error)


def test_gate_errors_are_the_spread_of_repeated_studies() -> None:
    rng = np.random.default_rng(3)
    site = np.repeat(np.arange(40), 6)
    probs = np.random.default_rng(4).dirichlet([1, 1], 40)[site]
    estimates, errors = [], []
    for _ in range(400):
        found = gate(rng.normal(size=40)[site] + rng.normal(size=240), probs, site)
        estimates.append(found.estimates)
        errors.append(found.standard_errors)
    # The spread of 400 values is known to 3.5 %; sandwiches of 40 groups are a few per cent small.
    np.testing.assert_allclose(torch.stack(errors).mean(0), torch.stack(estimates).std(0), rtol=0.12)


def test_calibration_recovers_exact_multiples() -> None:
    effect = np.random.default_rng(0).normal(1.5, 1.0, 200)
    mean = effect.mean()
    found = blp_scores(0.7 * mean + 0.25 * (effect - mean), effect)
    assert found.mean.estimate == pytest.approx(0.7) and found.heterogeneity.estimate == pytest.approx(0.25)
    rng = np.random.default_rng(1)
    t, e = (rng.uniform(size=200) < 0.4).astype(float), rng.uniform(0.2, 0.8, 200)
    m = rng.normal(size=200)
    found = blp_calibration(m + (t - e) * effect, t, e, m, effect)
    assert found.mean.estimate == pytest.approx(1) and found.heterogeneity.estimate == pytest.approx(1)


def test_calibration_tells_true_exaggerated_and_void_predictions() -> None:
    s = study(5, sites=200)
    true = blp_scores(s["scores"], s["effect"], s["site"])
    assert true.mean.estimate == pytest.approx(1, abs=3 * true.mean.standard_error)
    assert true.heterogeneity.estimate == pytest.approx(1, abs=3 * true.heterogeneity.standard_error)
    assert true.p_value < 1e-6
    stretched = blp_scores(s["scores"], 1 + 4 * (s["effect"] - s["effect"].mean()), s["site"])
    assert stretched.heterogeneity.estimate == pytest.approx(true.heterogeneity.estimate / 4)
    assert stretched.heterogeneity.ratio == pytest.approx(true.heterogeneity.ratio)
    void = np.random.default_rng(0).normal(1, 1, 200)[s["site"]]
    assert blp_scores(s["scores"], void, s["site"]).p_value > 0.01


def test_calibration_of_constant_and_of_centred_predictions() -> None:
    s = study(6)
    constant = blp_scores(s["scores"], np.full(len(s["scores"]), 2.0), s["site"])
    assert constant.mean.estimate == pytest.approx(s["scores"].mean() / 2)
    assert math.isnan(constant.heterogeneity.estimate)
    zero = blp_scores(s["scores"], np.zeros(len(s["scores"])), s["site"])
    assert math.isnan(zero.mean.estimate) and math.isnan(zero.heterogeneity.estimate)
    centred = s["effect"] - s["effect"].mean()
    found = blp_scores(s["scores"], centred - centred.mean(), s["site"])
    slope = np.polyfit(centred, s["scores"], 1)[0]
    assert found.heterogeneity.estimate == pytest.approx(slope)


def test_policy_value_by_hand() -> None:
    found = policy_value([1.0, -2.0, 3.0, 0.0], [1, 0, 1, 0], cost=0.5)
    assert found.value.estimate == pytest.approx((0.5 + 2.5) / 4)
    assert found.over_all.estimate == pytest.approx((2.5 + 0.5) / 4)
    assert found.share_treated == 0.5
    assert policy_value([1.0, -2.0, 3.0], [True, True, True]).over_all.estimate == 0.0
    assert policy_value([1.0, -2.0, 3.0], [0, 0, 0]).value.estimate == 0.0


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_evaluation_ignores_the_order_of_rows(seed: int) -> None:
    s = study(seed, sites=12, units=3)
    rows = np.random.default_rng(seed).permutation(len(s["site"]))

    def numbers(order: np.ndarray) -> dict[str, float]:
        kept = {k: v[order] for k, v in s.items()}
        return evaluate(kept["scores"], kept["effect"], kept["probs"], kept["site"], seed=3, num_bootstrap=20).to_dict()

    one, other = numbers(np.arange(len(rows))), numbers(rows)
    assert one.keys() == other.keys()
    for name in one:
        assert other[name] == pytest.approx(one[name], rel=1e-8, abs=1e-10, nan_ok=True), name


def test_evaluation_holds_what_its_parts_say() -> None:
    s = study(7)
    found = evaluate(s["scores"], s["effect"], s["probs"], s["site"], seed=1)
    flat = found.to_dict()
    assert flat["ate"] == pytest.approx(s["scores"].mean()) and flat["num_groups"] == 60
    assert found.autoc.kind == "autoc" and found.qini.kind == "qini"
    assert flat["autoc_ratio"] > 2 and flat["permutation_p_value"] < 0.05
    assert flat["gate_0"] < flat["gate_1"] and flat["gate_0_share"] + flat["gate_1_share"] == pytest.approx(1)
    assert flat["policy_value"] == pytest.approx(np.where(s["effect"] > 0, s["scores"], 0).mean())
    again = evaluate(s["scores"], s["effect"], s["probs"], s["site"], seed=1).to_dict()
    assert again == flat


def test_evaluation_of_one_type_with_a_constant_effect() -> None:
    s = study(8)
    n = len(s["scores"])
    flat = evaluate(s["scores"], np.full(n, 1.0), np.ones((n, 1)), s["site"]).to_dict()
    assert flat["autoc"] == 0 and flat["permutation_p_value"] == 1.0
    assert math.isnan(flat["autoc_ratio"]) and math.isnan(flat["blp_heterogeneity"])
    assert flat["gate_0"] == pytest.approx(flat["ate"])


def test_overlap_by_hand() -> None:
    found = overlap([0, 0, 1, 1], [0.2, 0.5, 0.5, 0.8])
    assert found.num_units.tolist() == [2, 2]
    w0 = np.array([1 / 0.8, 2.0])
    assert float(found.effective_sizes[0]) == pytest.approx(w0.sum() ** 2 / (w0**2).sum())
    assert float(found.largest_weight_shares[0]) == pytest.approx(2 / w0.sum())
    assert found.common_range == (0.5, 0.5) and found.share_outside == 0.5
    assert found.quantiles[1, [0, 3, 6]].tolist() == pytest.approx([0.5, 0.65, 0.8])


def test_balance_is_restored_by_the_true_propensity() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 2))
    e = 1 / (1 + np.exp(-x[:, 0]))
    t = (rng.uniform(size=4000) < e).astype(float)
    found = balance(t, x, e, names=["z", "other"])
    arms = x[t == 0], x[t == 1]
    expected = (arms[1].mean(0) - arms[0].mean(0)) / np.sqrt((arms[0].var(0, ddof=1) + arms[1].var(0, ddof=1)) / 2)
    np.testing.assert_allclose(found.differences, expected)
    assert float(found.differences[0]) > 0.7 and found.largest < 0.1
    unweighted = balance(t, x)
    np.testing.assert_allclose(unweighted.weighted_differences, unweighted.differences)
    assert unweighted.names == ("x1", "x2")
    np.testing.assert_allclose(found.variance_ratios, arms[1].var(0, ddof=1) / arms[0].var(0, ddof=1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gate([1.0, 2, 3], [[0.5, 0.6]] * 3), "rows that sum to 1"),
        (lambda: gate([1.0, 2, 3], [[1.5, -0.5]] * 3), "no negative value"),
        (lambda: gate([1.0, 2, 3], [[1.0, 0.0]] * 3), r"gives types \[1\] no members"),
        (lambda: gate([1.0, 2, 3], [[1.0, 0.0]] * 2), "cluster_probs must have one row a unit, 3, got 2"),
        (lambda: gate([1.0, 2], [[0.5, 0.5]] * 2), "more units than types"),
        (lambda: blp_scores([1.0, 2, 3], [1.0, math.nan, 2]), "effect must be finite"),
        (lambda: blp_calibration([1.0, 2, 3], [0, 1, 0], [0.5, 0.5, 1.0], [0.0] * 3, [1.0, 2, 3]), "strictly between"),
        (lambda: policy_value([1.0, 2], [0.5, 1.5]), "between 0 and 1"),
        (lambda: policy_value([1.0, 2], [0, 1], cost=math.inf), "cost must be finite"),
        (lambda: overlap([0, 0], [0.5, 0.5]), "one arm only"),
        (lambda: balance([0, 1, 1], np.ones((3, 1))), "at least two units in each arm"),
        (lambda: balance([0, 1, 1, 0], np.ones((4, 1)), names=["a", "b"]), "one name a column, 1, got 2"),
        (lambda: evaluate([1.0, 2, 3], [1.0, 2], np.ones((3, 1))), "effect must have one row a unit, 3, got 2"),
        (
            lambda: evaluate([1.0, 2, 3], [1.0, 2, 3], np.ones((3, 1)), groups=[0, 1]),
            "groups must hold one label a unit",
        ),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_texture_ranks_the_effects_of_the_uganda_trial(data_dir: Path) -> None:
    """Ridge regressions on 42 summaries of the images, cross-fitted by image; shuffled images tell nothing."""
    path = data_dir / "uganda_yop" / "uganda_yop.npz"
    if not path.is_file():
        pytest.skip(f"no {path.name} in the data folder")
    with np.load(path, allow_pickle=False) as held:
        y, t, index = held["outcome"], held["treatment"], held["image_index"]
        summaries = image_summaries(torch.from_numpy(held["images"]).permute(0, 3, 1, 2))
    scores = aipw_scores(y, t, t.mean(), *cross_fit_outcomes(y, t, None, index, seed=2))
    mu = cross_fit_outcomes(y, t, summaries[index], index, seed=2)
    found = rate(scores, mu.mu1 - mu.mu0, "qini", index)
    assert found.ratio > 2.5  # published simple learners: 2.8 to 4.3
    assert found.standard_error == pytest.approx(0.021, abs=0.003)
    assert rate(scores, mu.mu0, "qini", index).estimate < 0.01  # who is well off without treatment does not gain more
    shuffled = np.random.default_rng(0).permutation(len(summaries))
    void = cross_fit_outcomes(y, t, summaries[shuffled[index]], index, seed=2)
    assert abs(rate(scores, void.mu1 - void.mu0, "qini", index).ratio) < 2.5


def test_a_weight_of_two_is_a_unit_twice() -> None:
    """Every check, with the twin in its unit's group: the same estimates, and errors up to factors of counts."""
    g = torch.Generator().manual_seed(0)
    effect = torch.randn(120, generator=g, dtype=torch.float64)
    scores = 1 + effect + torch.randn(120, generator=g, dtype=torch.float64)
    probs = torch.stack([torch.sigmoid(effect), torch.sigmoid(-effect)], 1)
    site, weights = torch.arange(120) // 3, 1.0 + (torch.arange(120) % 5 == 0)
    twice = torch.repeat_interleave(torch.arange(120), weights.long())
    options: dict[str, Any] = {"num_bootstrap": 20, "num_permutations": 99}
    found = evaluate(scores, effect, probs, site, weights=weights, **options).to_dict()
    truth = evaluate(scores[twice], effect[twice], probs[twice], site[twice], **options).to_dict()
    plain = evaluate(scores, effect, probs, site, **options).to_dict()
    for name, value in found.items():
        if name != "num_units":
            assert value == pytest.approx(truth[name], rel=0.01), name
    assert all(abs(found[name] - plain[name]) > 1e-4 for name in ("ate", "qini", "gate_0", "policy_value", "blp_mean"))
