"""Image effects: the paper's simulation in replication, and the Uganda youth trial.

Bounds are requirements set before anything was measured here; where a run misses one, the test fails.
"""

import statistics
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ppl_models import ImageCATE
from ppl_models.image_cate.selection import choose_num_clusters
from ppl_models.image_cate.simulation import stripes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200), pytest.mark.filterwarnings("ignore::UserWarning")]


@cache
def _stripes(noise: float, seed: int) -> dict[str, float]:
    train, test = stripes(1000, noise=noise, seed=seed), stripes(1000, noise=noise, seed=seed + 1000)
    model = ImageCATE()
    model.fit(train.outcome, train.treatment, train.images, seed=seed, progress=False)
    types = model.cluster_effects()
    miss = (types.effect - torch.tensor([0.0, 2.0])).abs().max().item()
    return {
        "pehe": (model.effect(test.images) - test.effect).square().mean().sqrt().item(),
        "accuracy": (model.cluster_probs(test.images).argmax(1) == test.types).float().mean().item(),
        "miss": miss,
    }


@pytest.mark.parametrize("seed", range(5))
def test_noise_of_one(seed: int) -> None:
    """S1: effects within 0.2, accuracy 0.97, PEHE 0.20."""
    found = _stripes(1.0, seed)
    print(seed, found)
    assert found["miss"] < 0.2 and found["accuracy"] >= 0.97 and found["pehe"] <= 0.20


@pytest.mark.parametrize("seed", range(5))
def test_noise_of_two(seed: int) -> None:
    """S1: accuracy 0.95, PEHE 0.30; known types and a regression within them give 0.16 on average at n = 1000."""
    found = _stripes(2.0, seed)
    print(seed, found)
    assert found["accuracy"] >= 0.95 and found["pehe"] <= 0.30


def test_pehe_at_noise_two_on_average() -> None:
    """The goal of 0.15, as the mean of five seeds."""
    assert statistics.mean(_stripes(2.0, seed)["pehe"] for seed in range(5)) <= 0.15


@pytest.mark.parametrize("noise", [3.0, 4.0])
def test_low_signal(noise: float) -> None:
    """Where effects are half and a third of the noise, the error of effects is within 1.5 of what knowing the types
    would give on average: effects of two types by 250 units an arm, each with the noise and a baseline of variance 1/4.
    """
    floor = (2 * (noise**2 + 0.25) / 250) ** 0.5
    found = [_stripes(noise, seed)["pehe"] for seed in range(3)]
    print(noise, found, floor)
    assert statistics.median(found) <= 1.5 * floor


@cache
def _types_of_trials(noise: float) -> list[dict[str, torch.Tensor]]:
    """Of 300 trials of 600 images with effects 0 and 2: what is said of the two types by gates of fixed features, and
    what least squares on arms within types and on brightness say where the types are known."""
    found = []
    for seed in range(300):
        trial = stripes(600, noise=noise, seed=1000 + seed)
        model = ImageCATE(backbone="fixed", num_folds=3, calibrate=False)
        model.fit(trial.outcome, trial.treatment, trial.images, seed=seed, progress=False)
        types = model.cluster_effects()
        member = torch.nn.functional.one_hot(trial.types, 2)
        columns = [member, (trial.treatment - 0.5).unsqueeze(1) * member, trial.images.mean((1, 2, 3)).unsqueeze(1)]
        design = torch.cat(columns, 1).double()
        known = torch.linalg.lstsq(design, trial.outcome.double().unsqueeze(1)).solution[2:4, 0]
        error = noise * torch.linalg.inv(design.mT @ design).diagonal()[2:4].sqrt()
        found.append(
            {"effect": types.effect, "sd": types.sd, "interval": types.interval, "known": known, "error": error}
        )
    return found


@pytest.mark.parametrize("noise", [1.0, 3.0])
def test_type_intervals_cover(noise: float) -> None:
    """S4: n = 600: 90 % intervals of each type's effect cover in 85 to 95 %; widths are the sampling error's.

    Over 300 trials, where a right method passes with probability 0.99.  Over 100 it passes these four counts with 0.75
    only; on the first 100 seeds one that knows the types covers in 84 and 90.
    """
    trials, truth = _types_of_trials(noise), torch.tensor([0.0, 2.0])
    inside = [(one["interval"][:, 0] <= truth) & (truth <= one["interval"][:, 1]) for one in trials]
    covered = torch.stack(inside).double()
    ratio = torch.stack([one["sd"] / one["error"] for one in trials]).mean()
    print("covered by hundreds:", covered.unflatten(0, (-1, 100)).sum(1).tolist(), "mean ratio of sd:", float(ratio))
    assert 0.8 <= float(ratio) <= 1.3
    assert bool(((covered.mean(0) >= 0.85) & (covered.mean(0) <= 0.95)).all())


@pytest.mark.parametrize("noise", [1.0, 3.0])
def test_types_have_the_effects_that_they_would_have_if_they_were_known(noise: float) -> None:
    """Over the same trials, effects lie within 0.15 of a standard error of those by known types on average: what wrong
    memberships draw together.  An interval that is off by d errors covers 0.17 d^2 less than 0.9, here 0.004.
    """
    trials = _types_of_trials(noise)
    off = torch.stack([(one["effect"] - one["known"]) / one["error"] for one in trials]).mean(0)
    print("off by, in standard errors:", off.tolist())
    assert float(off.abs().max()) < 0.15


def test_soft_types() -> None:
    """S2: an effect of 4 with probability 0.25 or 0.75 by the image: types of units, and types of images."""
    marginal, gated, shares = [], [], []
    for seed in range(5):
        trial = stripes(2000, noise=0.5, effects=(0.0, 0.0), seed=seed)
        g = torch.Generator().manual_seed(seed)
        gains = torch.rand(2000, generator=g) < torch.tensor([0.25, 0.75])[trial.types]
        outcome = trial.outcome + 4.0 * gains * trial.treatment
        units = ImageCATE(objective="marginal", calibrate=False)
        units.fit(outcome, trial.treatment, trial.images, seed=seed, progress=False)
        marginal.append(units.cluster_effects().effect.tolist())
        probs = units.cluster_probs(trial.images)[:, 1]
        shares.append([float(probs[trial.types == k].mean()) for k in (0, 1)])
        images = ImageCATE(backbone="fixed", calibrate=False)
        images.fit(outcome, trial.treatment, trial.images, seed=seed, progress=False)
        gated.append(images.cluster_effects().effect.tolist())
    print("marginal:", marginal, "shares:", shares, "gated:", gated)
    assert (torch.tensor(marginal) - torch.tensor([0.0, 4.0])).abs().max() < 0.25
    assert (torch.tensor(shares) - torch.tensor([0.25, 0.75])).abs().max() < 0.07
    assert (torch.tensor(gated) - torch.tensor([1.0, 3.0])).abs().max() < 0.25


def test_confounded_images() -> None:
    """S5: a confounder that only images show: the doubly robust average is right to 0.2, the naive one is 1.97 off."""
    naive: list[float] = []
    tabular: list[float] = []
    both: list[float] = []
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        c, x = torch.randn(1000, generator=g), torch.randn(1000, 2, generator=g)
        images = c[:, None, None, None] + 0.5 * torch.randn(1000, 1, 12, 12, generator=g)
        t = (torch.rand(1000, generator=g) < torch.sigmoid(c + x.sum(1))).float()
        y = 2 * t + c + x.sum(1) + torch.randn(1000, generator=g)
        naive.append(float(y[t == 1].mean() - y[t == 0].mean()) - 2)
        for propensity, found in (("logistic", tabular), ("image", both)):
            seen = images if propensity == "image" else torch.randn(1000, 1, 12, 12, generator=g)
            model = ImageCATE(num_clusters=1, backbone="fixed")
            model.fit(y, t, seen, controls=x, propensity=propensity, seed=seed, progress=False)
            found.append(model.ate() - 2)
    print("naive:", naive, "columns alone:", tabular, "images and columns:", both)
    assert abs(statistics.mean(both)) < 0.2
    assert statistics.mean(tabular) > 0.6 and statistics.mean(naive) > 1.7


def test_number_of_types() -> None:
    """S3: one type is found to be one in at least 4 of 5, three textures to be three in at least 4 of 5."""
    ones = threes = 0
    for seed in range(5):
        same = stripes(1000, noise=1.0, effects=(1.0, 1.0), seed=seed)
        model = ImageCATE(backbone="fixed")
        ones += choose_num_clusters(model, same.outcome, same.treatment, same.images, seed=seed).num_clusters == 1
        three = stripes(2000, noise=0.5, effects=(0.0, 1.5, 3.0), seed=seed)
        found = choose_num_clusters(
            model, three.outcome, three.treatment, three.images, candidates=(1, 2, 3, 4), seed=seed
        )
        threes += found.num_clusters == 3
    print("one:", ones, "three:", threes)
    assert ones >= 4 and threes >= 4


def test_three_textures() -> None:
    """S3: with three types, effects within 0.3 and accuracy 0.9, by the default gate."""
    train = stripes(2000, noise=0.5, effects=(0.0, 1.5, 3.0), seed=0)
    test = stripes(1000, noise=0.5, effects=(0.0, 1.5, 3.0), seed=1000)
    model = ImageCATE(num_clusters=3)
    model.fit(train.outcome, train.treatment, train.images, seed=0, progress=False)
    effects = model.cluster_effects().effect
    accuracy = (model.cluster_probs(test.images).argmax(1) == test.types).float().mean()
    print(effects.tolist(), float(accuracy))
    assert (effects - torch.tensor([0.0, 1.5, 3.0])).abs().max() < 0.3 and accuracy >= 0.9


def _uganda(data_dir: Path) -> dict[str, Any]:
    path = data_dir / "uganda_yop" / "uganda_yop.npz"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    with np.load(path, allow_pickle=False) as held:
        data = {name: held[name] for name in held.files}
    data["images"] = np.ascontiguousarray(data["images"].transpose(0, 3, 1, 2))
    return data


def test_uganda(data_dir: Path) -> None:
    """R3: calibrated average effect, and a cross-fitted QINI ratio of at least 4 on at least 3 of 5 splits."""
    data = _uganda(data_dir)
    ratios = []
    for seed in range(5):
        model = ImageCATE()
        model.fit(data["outcome"], data["treatment"], data["images"], data["image_index"], seed=seed, progress=False)
        assert 0.59 <= model.ate() <= 0.89
        ratios.append(model.evaluate().qini.ratio)
    print("QINI ratios:", ratios)
    assert sum(ratio >= 4 for ratio in ratios) >= 3


def test_uganda_with_images_exchanged_between_sites(data_dir: Path) -> None:
    """R3: nothing may be found: an absolute ratio above 1.96 in at most 3 of 20, by gates of fixed features."""
    data = _uganda(data_dir)
    ratios = []
    for seed in range(20):
        order = np.random.default_rng(seed).permutation(len(data["images"]))
        model = ImageCATE(backbone="fixed", num_samples=50)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.fit(
                data["outcome"],
                data["treatment"],
                data["images"][order],
                data["image_index"],
                seed=seed,
                progress=False,
            )
        ratios.append(model.evaluate().qini.ratio)  # NaN: nobody ranks before another
    print("QINI ratios:", ratios)
    assert sum(abs(ratio) > 1.96 for ratio in ratios) <= 3


def test_uganda_refuses_the_design_matrix(data_dir: Path) -> None:
    """Column 0 of the released covariates is the treatment, every second one a product with it."""
    data = _uganda(data_dir)
    with pytest.raises(ValueError, match="covariates cannot be used"):
        ImageCATE().fit(
            data["outcome"], data["treatment"], data["images"], data["image_index"], np.nan_to_num(data["covariates"])
        )
