"""Gates of fixed features: what the features see, closed forms against their definitions, and that what is said of an
image comes from those who did not see it."""

import math
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ppl_models import ImageCATE
from ppl_models.image_cate.data import make_trial
from ppl_models.image_cate.estimation import pooled
from ppl_models.image_cate.evaluation import evaluate
from ppl_models.image_cate.fixed_features import FixedFeatures, StandardisedFeatures, TextureStatistics
from ppl_models.image_cate.fixed_gate import _discriminant, _groups_apart, fixed_rules, working_effect
from ppl_models.image_cate.likelihoods import positive
from ppl_models.image_cate.members import fit_members, make_fixed
from ppl_models.image_cate.rate import ranks_in_folds
from ppl_models.image_cate.ridge import RidgePath
from ppl_models.image_cate.selection import choose_num_clusters
from ppl_models.image_cate.simulation import stripes
from ppl_models.image_cate.training import Prepared, Settings, prepare


def blobs(n: int, noise: float, seed: int, width: int = 20) -> dict[str, Tensor]:
    """Features of which the first two lie in two clusters, whose effects are 0 and 2."""
    g = torch.Generator().manual_seed(seed)
    types = torch.randint(2, (n,), generator=g)
    x = torch.randn(n, width, generator=g)
    x[:, :2] = 0.4 * x[:, :2] + torch.tensor([[-1.0, 1.0], [1.0, -1.0]])[types]
    treatment = (torch.rand(n, generator=g) < 0.5).float()
    outcome = 2.0 * treatment * types + noise * torch.randn(n, generator=g)
    return {"outcome": outcome, "treatment": treatment, "images": x, "types": types}


def laid_out(data: dict[str, Tensor], settings: Settings) -> tuple[Prepared, Tensor]:
    """The trial as members see it, with the mean outcome for a baseline, and propensities of a half."""
    trial = make_trial(data["outcome"], data["treatment"], data["images"])
    prepared = prepare(trial, settings, trial.sample_weight)
    half = torch.full_like(prepared.units.treatment, 0.5)
    return replace(prepared, units=prepared.units._replace(propensity=half)), half


def fit_of(data: dict[str, Tensor], seed: int = 0, **options: Any) -> ImageCATE:
    model = ImageCATE(**{"backbone": "fixed", "num_folds": 2, "num_steps": 40, "num_samples": 100, **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model.fit(data["outcome"], data["treatment"], data["images"], seed=seed, progress=False)
    return model


def test_statistics_are_those_of_their_definitions() -> None:
    images = torch.randn(3, 2, 7, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = TextureStatistics((2, 7, 9))(images)
    assert found.shape == (3, TextureStatistics((2, 7, 9)).out_features)
    plane = images[1, 1]
    centred, power = plane - plane.mean(), plane.var(correction=0)
    by_hand = [
        plane.flatten().quantile(0.25),
        plane.mean(),
        power.sqrt(),
        (centred[:, 1:] * centred[:, :-1]).mean() / power,
        (centred[1:] * centred[:-1]).mean() / power,
        (centred[1:, 1:] * centred[:-1, :-1]).mean() / power,
        (centred[1:, :-1] * centred[:-1, 1:]).mean() / power,
    ]
    for value in by_hand:
        assert (found[1] - value).abs().min() < 1e-9


@pytest.mark.parametrize("side", [2, 3, 5, 12, 24])
def test_small_images_have_features_and_slopes(side: int) -> None:
    with torch.random.fork_rng():
        features = StandardisedFeatures(FixedFeatures((1, side, side)))
    images = torch.randn(6, 1, side, side, generator=torch.Generator().manual_seed(0))
    images[0] = 1.0  # blank
    features.learn(images)
    leaf = images.requires_grad_()
    found = features(leaf)
    assert found.shape == (6, features.out_features) and bool(torch.isfinite(found).all())
    found.square().sum().backward()
    assert leaf.grad is not None and bool(torch.isfinite(leaf.grad).all())


def test_stripes_lie_apart_in_the_statistics() -> None:
    trial = stripes(200, seed=0)
    found = TextureStatistics((1, 24, 24))(trial.images)
    ratio = [(found[trial.types == 0, j].mean() - found[trial.types == 1, j].mean()).abs() / found[:, j].std(0)
             for j in range(found.shape[1])]  # fmt: skip
    assert max(ratio) > 1.5


def test_ridge_is_the_weighted_least_squares_with_the_penalty_of_the_folds() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, generator=g, dtype=torch.float64)
    y = x[:, :2] @ torch.tensor([[1.0, 0.0], [0.5, 2.0]], dtype=torch.float64)
    y = y + 0.8 * torch.randn(60, 2, generator=g, dtype=torch.float64)
    weight = torch.rand(60, generator=g, dtype=torch.float64) + 0.1
    folds = torch.arange(60) % 3

    def solve(y: Tensor, rows: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
        share = weight[rows] / weight[rows].sum()
        mean_x, mean_y = share @ x[rows], share @ y[rows]
        a, b = x[rows] - mean_x, y[rows] - mean_y
        moments = a.mT @ (share[:, None] * a) + penalty * torch.eye(5, dtype=torch.float64)
        slope = torch.linalg.solve(moments, a.mT @ (share[:, None] * b))
        return slope, mean_y - mean_x @ slope

    def loss(y: Tensor, penalty: float) -> float:
        total = 0.0
        for fold in range(3):
            slope, level = solve(y, folds != fold, penalty)
            out = folds == fold
            total += float((weight[out, None] * (y[out] - level - x[out] @ slope).square()).sum())
        return total

    penalties = [10.0 ** (k / 2) for k in range(-6, 11)]
    best = min(penalties, key=lambda p: loss(y, p))
    path, everyone = RidgePath(x, folds, weight), torch.ones(60, dtype=torch.bool)
    for found, truth in zip(path.fit(y), solve(y, everyone, best), strict=True):
        torch.testing.assert_close(found, truth)
    assert path.best_penalty(y) == best
    told, level = path.held_out(y, best), weight @ y / weight.sum()
    for fold in range(3):
        slope, _ = solve(y, folds != fold, best)
        torch.testing.assert_close(told[folds == fold], level + (x[folds == fold] - weight @ x / weight.sum()) @ slope)
    for found, truth in zip(path.fit(y, 10.0), solve(y, everyone, 10.0), strict=True):
        torch.testing.assert_close(found, truth)

    answers = set()
    for share in (1.0, 0.3, 0.1, 0.0, 0.0, 0.0):
        mixed = share * y[:, :1] + torch.randn(60, 1, generator=g, dtype=torch.float64)
        answers.add(path.foretells(mixed))
        assert path.foretells(mixed) == (min(loss(mixed, p) for p in penalties) < loss(mixed, 1e12))
    assert answers == {True, False}


def test_working_effect_of_the_normal_law_is_the_r_learners() -> None:
    data = blobs(50, 1.0, seed=0)
    prepared, half = laid_out(data, Settings(backbone="fixed"))
    value, weight = working_effect(prepared, half)
    units, tau = prepared.units, prepared.average_effect
    centred = units.treatment - 0.5
    sd = positive(prepared.noise_start[:, 0])
    residual = (units.outcome - centred * tau) / sd[units.treatment.long()] ** 2
    expected = residual / residual.square().mean().sqrt() / centred
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(weight, centred.square())


def test_self_training_finds_clusters_that_the_regression_blurs() -> None:
    """At noise 4 the regression of the effect puts a tenth of the images on the wrong side; the discriminant none."""
    data = blobs(600, 4.0, seed=1)
    prepared, half = laid_out(data, Settings(backbone="fixed"))
    features = prepared.images
    rules = fixed_rules(features, prepared, half, 2, torch.arange(600) % 5)
    design = torch.cat([features, torch.ones(600, 1)], 1)
    right = [float(((design @ head[0] > 0).long() == data["types"]).float().mean()) for head in rules.heads]
    assert right[0] < 0.99 <= right[1]
    assert float((rules.groups == data["types"]).float().mean()) >= 0.99
    sizes = (rules.heads[:, 0] @ design.mT).square().mean(1).sqrt()
    assert float(sizes[0]) == pytest.approx(1.0, abs=1e-4) and float(sizes[1]) > 5.0  # clusters are told apart surely


@pytest.mark.parametrize("seed", [1, 2])
def test_self_training_on_held_out_words_leaves_wrong_groups(seed: int) -> None:
    """Stripes at noise 2.5 with 300 images: the regression is right for three in four, a discriminant that sees its own
    groups repeats them (0.68 and 0.83), and by other folds all images come right.
    """
    trial = stripes(300, noise=2.5, seed=seed)
    settings = Settings(backbone="fixed")
    prepared, half = laid_out(
        {"outcome": trial.outcome, "treatment": trial.treatment, "images": trial.images}, settings
    )
    fixed = make_fixed(prepared, settings, 0)
    assert fixed is not None
    rules = fixed_rules(fixed(prepared.images), prepared, half, 2, torch.arange(300) % 5)
    assert float((rules.groups == trial.types).float().mean()) >= 0.99


def test_a_cloud_that_was_cut_does_not_lie_apart() -> None:
    """Of a normal variable cut at 0, whose halves have means 0.798 and variance 0.363, the discriminant's log odds
    ``2 * 0.798 / 0.363 x`` leave 0.21 of the entropy; and groups that are the folds themselves are not told at all.
    """
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 1, generator=g, dtype=torch.float64)
    fold = torch.arange(4000) % 5
    path = RidgePath(x, fold)
    found = _discriminant(path, x, (x[:, 0] > 0).long(), 2, held_out=True)
    line = torch.linspace(-8, 8, 100_001, dtype=torch.float64)
    density = torch.exp(-0.5 * line.square()) / math.sqrt(2 * math.pi)
    mean = math.sqrt(2 / math.pi)
    left = torch.trapezoid(density * torch.log1p(torch.exp(-2 * mean / (1 - mean**2) * line.abs())), line)
    assert found is not None and found.told == pytest.approx(1 - float(left) / math.log(2), abs=0.02)
    assert _groups_apart(path, x, [x], 2) is None
    of_folds = _discriminant(path, x, (fold < 2).long(), 2, held_out=True)
    assert of_folds is not None and abs(of_folds.told) < 0.05


@pytest.mark.parametrize("count", [30, 100])
def test_a_few_odd_images_are_no_type(count: int) -> None:
    """Of 500 images, 100 that lie far out are taken for a type of their own and 30 are not, though told as surely."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(500, 3, generator=g, dtype=torch.float64)
    x[:count, 0] += 10.0
    path = RidgePath(x, torch.arange(500) % 5)
    odd = (torch.arange(500) < count).long()
    alone = _discriminant(path, x, odd, 2, held_out=True)
    assert alone is not None and alone.told > 0.995
    found = _groups_apart(path, x, [x[:, :1]], 2)
    assert found is None if count == 30 else found is not None and torch.equal(found.groups, odd)


def test_rules_of_an_image_do_not_know_its_outcome() -> None:
    data = blobs(80, 1.0, seed=2)
    settings = Settings(backbone="fixed")
    folds = torch.arange(80) % 2
    penalties = torch.arange(80) % 5

    def rules(shift: float) -> Tensor:
        prepared, half = laid_out(data, settings)
        moved = prepared.units.outcome + shift * (folds == 0).unsqueeze(1) * prepared.units.treatment
        prepared = replace(prepared, units=prepared.units._replace(outcome=moved))
        fixed = make_fixed(prepared, settings, 0)
        found = fit_members(prepared, settings, half, fixed, folds, penalties, 0).held_out.rules
        assert found is not None
        return found

    first, second = rules(0.0), rules(3.0)
    assert torch.equal(first[folds == 0], second[folds == 0])
    assert not torch.equal(first[folds == 1], second[folds == 1])


def test_types_without_effects_get_none() -> None:
    """Where effects are all alike, they differ by held-out type no more than their errors say: search is not rewarded,
    as it is with rules that saw the outcomes.
    """
    settings = Settings(backbone="fixed")
    folds, penalties = torch.arange(200) % 2, torch.arange(200) % 5
    honest: list[float] = []
    seen: list[float] = []
    for seed in range(20):
        data = blobs(200, 1.0, seed=seed)
        g = torch.Generator().manual_seed(100 + seed)
        prepared, half = laid_out({**data, "outcome": torch.randn(200, generator=g)}, settings)
        scores = 4 * ((prepared.units.treatment - 0.5) * prepared.units.outcome)[:, 0]
        fixed = make_fixed(prepared, settings, 0)
        rules = fit_members(prepared, settings, half, fixed, folds, penalties, seed).held_out.rules
        assert rules is not None and fixed is not None
        own = fixed_rules(fixed(prepared.images), prepared, half, 2, penalties).groups
        for found, high in ((honest, rules[:, 0, 0, 0] > 0), (seen, own == 1)):
            error = (scores[high].var() / high.sum() + scores[~high].var() / (~high).sum()).sqrt()
            found.append(float((scores[high].mean() - scores[~high].mean()) / error))
    # The mean of twenty standard normals is within 0.6 with probability 0.99.
    assert abs(sum(honest) / 20) < 0.6 < sum(seen) / 20


def test_ranking_is_within_folds() -> None:
    """Levels and spreads of folds that oppose effects leave the ranking alone, with folds; without, they spoil it."""
    g = torch.Generator().manual_seed(0)
    effect = torch.randn(300, generator=g, dtype=torch.float64)
    scores = effect + torch.randn(300, generator=g, dtype=torch.float64)
    fold, probs = torch.arange(300) % 3, torch.ones(300, 1, dtype=torch.float64)
    moved = effect * torch.tensor([4.0, 1.0, 0.25])[fold] + 50.0 * fold
    options: dict[str, Any] = {"num_bootstrap": 20, "num_permutations": 19}
    apart = evaluate(scores, moved, probs, folds=fold, **options)
    ranks = torch.empty_like(effect)
    for f in range(3):
        own = effect[fold == f]
        ranks[fold == f] = (own.unsqueeze(1) > own).double().mean(1)
    assert apart.qini.estimate == pytest.approx(evaluate(scores, ranks, probs, **options).qini.estimate)
    assert apart.qini.estimate > 3 * abs(evaluate(scores, moved, probs, **options).qini.estimate)
    centred = moved - torch.stack([moved[fold == f].mean() for f in range(3)])[fold] + moved.mean()
    slope = evaluate(scores, centred, probs, **options).calibration.heterogeneity.estimate
    assert apart.calibration.heterogeneity.estimate == pytest.approx(slope)


def test_ranks_in_folds_share_ties() -> None:
    """By hand: two folds, of which the second has two equal priorities and another scale."""
    found = ranks_in_folds([3.0, 1.0, 2.0, 700.0, 700.0, -5.0, 900.0], [0, 0, 0, 4, 4, 4, 4])
    assert torch.allclose(found, torch.tensor([5 / 6, 1 / 6, 0.5, 0.5, 0.5, 1 / 8, 7 / 8], dtype=torch.float64))


def test_a_fold_s_own_outcomes_do_not_turn_its_ranking() -> None:
    """Effects of one of two folds are reversed.  The member that ranks it knows the other fold alone, and must be
    wrong, or silent: right is only who has looked."""
    data = blobs(600, 2.0, seed=5)
    folds = fit_of(data)._fitted("the folds").folds
    effect = 2.0 * torch.where(folds == 0, 1 - data["types"], data["types"])
    noise = data["outcome"] - 2.0 * data["treatment"] * data["types"]
    found = fit_of({**data, "outcome": effect * data["treatment"] + noise}).cross_fitted()[0]
    for fold in (0, 1):
        own = folds == fold
        assert float(((found - found[own].mean()) * (effect - effect[own].mean()))[own].sum()) <= 1e-3


def test_types_in_another_order_are_pooled() -> None:
    """By hand: the nearest ascending values."""
    for values, weight, truth in (
        ([0.0, 1.0, 3.0], [1.0, 1.0, 1.0], [0.0, 1.0, 3.0]),
        ([1.0, 3.0, 2.0], [1.0, 1.0, 3.0], [1.0, 2.25, 2.25]),
        ([3.0, 1.0, 2.0], [1.0, 1.0, 2.0], [2.0, 2.0, 2.0]),
        ([2.0, 1.0], [3.0, 1.0], [1.75, 1.75]),
    ):
        torch.testing.assert_close(pooled(torch.tensor(values), torch.tensor(weight)), torch.tensor(truth))


def test_nobody_ranks_where_nothing_is_seen() -> None:
    """With one effect for all most folds are left in ties, with two none; what is said of images is not touched."""
    tied = []
    for seed in range(2):
        data = blobs(300, 1.0, seed=seed)
        model = fit_of(data, num_folds=3)
        folds, effect = model._fitted("the folds").folds, model.cross_fitted()[0]
        assert all(float(effect[folds == fold].std()) > 0.5 for fold in range(3))
        same = {**data, "outcome": data["outcome"] - 2.0 * data["treatment"] * data["types"]}
        model = fit_of(same, num_folds=3)
        effect = model.cross_fitted()[0]
        tied += [len(effect[folds == fold].unique()) == 1 for fold in range(3)]
        assert float(model.effect(data["images"]).std()) > 0.01
    assert all(tied[-3:]) and math.isnan(model.evaluate().qini.ratio)
    assert sum(tied) >= 4


def test_number_of_types() -> None:
    """S3 in small: two clusters with different effects are two types, and with the same effect one."""
    model = ImageCATE(backbone="fixed", num_folds=2, num_steps=40)
    data = blobs(200, 0.5, seed=3)
    two = choose_num_clusters(model, data["outcome"], data["treatment"], data["images"], candidates=(2, 3))
    assert two.num_clusters == 2 and two.candidates == (1, 2, 3)
    g = torch.Generator().manual_seed(0)
    same = data["treatment"] + 0.5 * torch.randn(200, generator=g)
    assert choose_num_clusters(model, same, data["treatment"], data["images"], candidates=(2,)).num_clusters == 1


@pytest.mark.parametrize(
    "options", [{"effects": "network"}, {"baseline": "joint"}, {"bayesian_layers": True}, {"fixed_features": False}]
)
def test_nothing_is_trained_on_fixed_features(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="backbone='fixed' trains no network"):
        ImageCATE(backbone="fixed", **options).settings()
