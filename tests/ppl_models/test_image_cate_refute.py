"""Refuters let a true finding stand and refute planted false ones."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ppl_models import ImageCATE
from ppl_models.image_cate.propensity import aipw_scores, cross_fit_outcomes
from ppl_models.image_cate.rate import ranks_in_folds, rate
from ppl_models.image_cate.refute import _ONE_SIDED, METHODS, Fitted, Study, refute, regions_of
from ppl_models.image_cate.simulation import laplacian_texture, village_trial

TRIAL = village_trial(120, 6, noise=0.6, size=16, seed=1)
TEXTURE = laplacian_texture(TRIAL.images)
STUDY = Study(TRIAL.outcome, TRIAL.treatment, TRIAL.images, TRIAL.image_index, None, None, TRIAL.propensity)


def honest(study: Study, seed: int) -> Fitted:
    """A ridge regression on the tile's texture within each arm, cross-fitted by site."""
    features = TEXTURE[study.image_index].unsqueeze(1)
    if study.covariates is not None:
        features = torch.cat([features, study.covariates], 1)
    mu0, mu1 = cross_fit_outcomes(study.outcome, study.treatment, features, study.groups, seed=seed)
    share = float(study.treatment.double().mean())
    scores = aipw_scores(
        study.outcome, study.treatment, share if study.propensity is None else study.propensity, mu0, mu1
    )
    return Fitted(scores, mu1 - mu0)


def test_a_true_finding_stands() -> None:
    found = refute(STUDY, honest, num_repeats=3)
    assert [r.method for r in found] == list(METHODS)
    assert all(r.passed for r in found), [(r.method, r.criterion) for r in found if not r.passed]
    by_name = {r.method: r for r in found}
    reference = by_name["subset"]
    assert reference.reference_rate.ratio > 3 and reference.reference_ate.estimate == pytest.approx(0.55, abs=0.15)
    assert all(a.estimate == pytest.approx(0, abs=0.25) for a in by_name["placebo_treatment"].ates)
    assert all(abs(r.ratio) < 3 for r in by_name["permuted_images"].rates)
    assert min(by_name["random_common_cause"].correlations) > 0.8
    assert min(by_name["subset"].correlations) > 0.8


def test_an_effect_read_off_the_units_own_outcomes_is_refuted() -> None:
    """Without cross-fitting the ranking is "found" under a placebo and with shuffled images too."""

    def overfitted(study: Study, seed: int) -> Fitted:
        fitted = honest(study, seed)
        sites = torch.as_tensor(study.groups)
        mean = torch.zeros(int(sites.max()) + 1, dtype=torch.float64).index_add_(0, sites, fitted.scores)
        return Fitted(fitted.scores, mean[sites])

    found = refute(STUDY, overfitted, methods=("placebo_treatment", "permuted_images"))
    assert not any(r.passed for r in found)


def test_an_average_effect_that_is_there_whatever_the_treatment_is_refuted() -> None:
    def shifted(study: Study, seed: int) -> Fitted:
        fitted = honest(study, seed)
        return Fitted(fitted.scores + 1, fitted.effect)

    (found,) = refute(STUDY, shifted, methods=("placebo_treatment",))
    assert not found.passed


def test_an_estimate_that_a_random_column_or_a_few_sites_move_is_refuted() -> None:
    def fragile(study: Study, seed: int) -> Fitted:
        fitted = honest(replace(study, covariates=None), seed)
        move = 0.2 * (study.covariates is not None) + 5 * (len(study.outcome) < len(STUDY.outcome))
        return Fitted(fitted.scores + move, fitted.effect)

    assert not any(r.passed for r in refute(STUDY, fragile, methods=("random_common_cause", "subset")))


def test_what_each_method_breaks() -> None:
    seen: list[Study] = []

    def record(study: Study, seed: int) -> Fitted:
        seen.append(study)
        return Fitted(torch.arange(len(study.outcome)).double(), torch.arange(len(study.outcome)).double())

    covariates = torch.randn(len(STUDY.outcome), 2, generator=torch.Generator().manual_seed(0))
    refute(replace(STUDY, covariates=covariates), record)
    original, placebo, permuted, random_cause, subset = seen
    assert sorted(placebo.treatment.tolist()) == sorted(original.treatment.tolist())
    assert not torch.equal(placebo.treatment, original.treatment) and placebo.propensity is None
    assert torch.equal(placebo.outcome, original.outcome) and torch.equal(placebo.image_index, original.image_index)
    assert torch.equal(permuted.treatment, original.treatment)
    pairs = {(a, b) for a, b in zip(original.image_index.tolist(), permuted.image_index.tolist(), strict=True)}
    assert len(pairs) == 120 and len({b for _, b in pairs}) == 120  # units of an image keep one image
    assert sum(a == b for a, b in pairs) < 10
    assert random_cause.covariates is not None and random_cause.covariates.shape == (720, 3)
    assert torch.equal(random_cause.covariates[:, :2], covariates)
    assert len(subset.outcome) == 96 * 6 and len(torch.as_tensor(subset.groups).unique()) == 96
    assert subset.covariates is not None and subset.propensity is not None
    assert len(subset.covariates) == len(subset.propensity) == 576


def test_each_region_is_left_out_once() -> None:
    seen: list[Study] = []

    def record(study: Study, seed: int) -> Fitted:
        seen.append(study)
        return honest(study, seed)

    places = torch.randn(120, 2, generator=torch.Generator().manual_seed(0))
    regions = regions_of(places)
    assert torch.bincount(regions).tolist() == [30, 30, 30, 30]
    assert places[regions < 2, 0].max() < places[regions >= 2, 0].min()
    assert all(places[regions == 2 * h, 1].max() < places[regions == 2 * h + 1, 1].min() for h in (0, 1))
    by_unit = regions[TRIAL.image_index]
    study = replace(STUDY, regions=by_unit, controls=STUDY.outcome[:, None], sample_weight=STUDY.outcome.exp())
    (found,) = refute(study, record, methods=("leave_one_region_out",), num_repeats=7)
    assert found.passed and len(found.ates) == 4
    for region, part in enumerate(seen[1:]):
        kept = study.outcome[by_unit != region]
        assert part.controls is not None and part.sample_weight is not None
        assert torch.equal(part.outcome, kept) and torch.equal(part.controls[:, 0], kept)
        assert torch.equal(part.sample_weight, kept.exp())

    def uneven(study: Study, seed: int) -> Fitted:
        fitted = honest(study, seed)
        whole = len(study.outcome) == len(by_unit)
        return Fitted(fitted.scores + 20.0 * (by_unit == 1) if whole else fitted.scores, fitted.effect)

    assert not refute(study, uneven, methods=("leave_one_region_out",))[0].passed
    with pytest.raises(ValueError, match="needs the region of each unit"):
        refute(STUDY, honest, methods=("leave_one_region_out",))


def test_refits_of_a_model_have_its_controls_weights_and_places() -> None:
    """A confounder among the controls, with the propensity for 1/2: without it the average effect would be 2.4 off."""
    g = torch.Generator().manual_seed(0)
    c, images = torch.randn(300, generator=g), torch.randn(300, 5, generator=g)
    t = (torch.rand(300, generator=g) < torch.sigmoid(c)).float()
    y = t + 3 * c + 0.5 * torch.randn(300, generator=g)
    model = ImageCATE(backbone="fixed", num_clusters=1, num_samples=20)
    model.fit(y, t, images, controls=c, propensity=0.5, lon_lat=torch.randn(300, 2, generator=g), progress=False)
    found = model.refute(("random_common_cause", "leave_one_region_out"))
    assert all(abs(ate.estimate - model.ate()) < 0.2 for refutation in found for ate in refutation.ates)
    assert len(found[1].ates) == 4


def test_treatments_by_site_are_shuffled_by_site() -> None:
    seen: list[Study] = []

    def record(study: Study, seed: int) -> Fitted:
        seen.append(study)
        return Fitted(study.outcome.double(), study.outcome.double())

    by_site = (TRIAL.image_index % 3 == 0).float()
    refute(replace(STUDY, treatment=by_site), record, methods=("placebo_treatment",))
    placebo = seen[-1].treatment.reshape(120, 6)
    assert bool((placebo == placebo[:, :1]).all()) and int(placebo[:, 0].sum()) == 40


def test_same_seed_same_result_and_a_given_reference_is_not_refitted() -> None:
    calls = 0

    def counted(study: Study, seed: int) -> Fitted:
        nonlocal calls
        calls += 1
        return honest(study, seed)

    reference = honest(replace(STUDY, groups=STUDY.image_index), 5)
    one = refute(STUDY, counted, methods=("subset",), reference=reference, seed=5)
    assert calls == 1
    other = refute(STUDY, honest, methods=("subset",), seed=5)
    assert one[0].ates == other[0].ates and one[0].correlations == other[0].correlations
    assert refute(STUDY, honest, methods=("subset",), seed=6)[0].ates != one[0].ates


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ("bootstrap",)}, "methods must be some of placebo_treatment"),
        ({"methods": ()}, "got none"),
        ({"num_repeats": 0}, "num_repeats must be at least 1"),
        ({"subset_share": 1.0}, "subset_share must lie strictly between 0 and 1"),
        ({"study": replace(STUDY, image_index=STUDY.image_index[:5])}, "image_index must have one row a unit"),
        ({"fit_predict": lambda s, seed: Fitted(s.outcome[:3], s.outcome)}, "scores of fit_predict must have one row"),
        (
            {"fit_predict": lambda s, seed: Fitted(s.outcome, s.outcome * np.nan)},
            "effect of fit_predict must be finite",
        ),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refute(**({"study": STUDY, "fit_predict": honest} | change))


def test_the_bound_of_a_ranking_is_that_of_cross_fitted_noise() -> None:
    """Priorities of each half from the other half's noise: ratios spread by the square root of 2, as a product of the
    same pairs of sites in either direction must, and 5 of 100 lie above the bound."""
    g = torch.Generator().manual_seed(0)
    ratios = []
    for seed in range(300):
        features = torch.randn(200, 30, generator=g, dtype=torch.float64)
        scores = torch.randn(200, generator=g, dtype=torch.float64)
        fold = torch.arange(200) % 2
        told = torch.stack([features @ (features[fold != f].mT @ scores[fold != f]) for f in (0, 1)])
        priority = told[fold, torch.arange(200)]
        ratios.append(rate(scores, ranks_in_folds(priority, fold), "qini", num_bootstrap=50, seed=seed).ratio)
    spread = torch.tensor(ratios).std()
    assert 1.25 < float(spread) < 1.55  # 300 draws: 1.41 within 0.06 a standard error; a valid error would give 1
    assert 5 <= sum(r > _ONE_SIDED for r in ratios) <= 26
