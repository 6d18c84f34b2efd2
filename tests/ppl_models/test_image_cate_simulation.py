"""Simulated trials hold the truth that they state."""

import math
from typing import Any

import pytest
import torch

from ppl_models.image_cate.simulation import SimulatedTrial, laplacian_texture, stripes, trial_on_images, village_trial


def arms_difference(trial: SimulatedTrial, kind: int) -> float:
    rows = trial.types[trial.image_index] == kind
    treated = trial.treatment == 1
    return float(trial.outcome[rows & treated].mean() - trial.outcome[rows & ~treated].mean())


@pytest.mark.parametrize("effects", [(0.0, 2.0), (0.0, 1.5, 3.0)])
def test_stripes(effects: tuple[float, ...]) -> None:
    trial = stripes(4000, noise=0.5, effects=effects, seed=1)
    assert trial.images.shape == (4000, 1, 24, 24)
    for k, tau in enumerate(effects):
        assert arms_difference(trial, k) == pytest.approx(tau, abs=0.12)  # error of about 0.04
    # The direction of the stripes is in the spectrum: along rows for vertical stripes, down for horizontal ones.
    power = torch.fft.fft2(trial.images[:, 0] - trial.images[:, 0].mean((1, 2), keepdim=True)).abs().square()
    across, down = power[:, 0, 1:6].sum(1), power[:, 1:6, 0].sum(1)
    clear = trial.types < 2
    assert float(((down > across) == (trial.types == 1))[clear].double().mean()) > 0.99
    # Brightness drives the outcome without treatment, with slope 1.
    control = trial.treatment == 0
    b = trial.images.mean((1, 2, 3))[control]
    slope = float(torch.cov(torch.stack([b, trial.outcome[control]]))[0, 1] / b.var())
    assert slope == pytest.approx(1, abs=0.1)


def test_noise_of_the_outcome() -> None:
    for noise in (0.5, 4.0):
        trial = stripes(4000, noise=noise, seed=2)
        residual = trial.outcome - trial.treatment * trial.effect
        assert float(residual.std()) == pytest.approx(math.hypot(noise, 0.5), rel=0.05)


def test_trials_on_given_images() -> None:
    images = stripes(120, seed=3).images
    trial = trial_on_images(images, effects=(0.0, 1.0, 2.0), noise=0.1, units_per_image=10, seed=4)
    assert torch.equal(trial.images, images) and trial.outcome.shape == (1200,)
    assert torch.bincount(trial.types).tolist() == [40, 40, 40]
    texture = laplacian_texture(images)
    assert float(texture[trial.types == 0].max()) <= float(texture[trial.types == 1].min())
    for k in range(3):
        assert arms_difference(trial, k) == pytest.approx(k, abs=0.2)


def test_villages() -> None:
    trial = village_trial(300, 8, seed=5)
    assert trial.images.shape == (300, 3, 32, 32) and trial.lon_lat is not None and trial.lon_lat.shape == (300, 2)
    assert bool(torch.isfinite(trial.images).all())
    assert arms_difference(trial, 0) == pytest.approx(0.1, abs=0.2)
    assert arms_difference(trial, 1) == pytest.approx(1.0, abs=0.2)
    texture = laplacian_texture(trial.images)
    assert float(((texture < 0) == (trial.types == 1)).double().mean()) > 0.9  # fields are smooth inside
    missing = torch.isnan(trial.covariates)
    assert 0 < int(missing[:, 1].sum()) < 60 and not bool(missing[:, 0].any())
    east_west = torch.corrcoef(torch.stack([trial.lon_lat[:, 0], trial.types.float()]))[0, 1]
    assert abs(float(east_west)) > 0.1  # types have a place
    # Villages share a shock: means of villages spread more than those of independent people would.
    residual = (trial.outcome - trial.treatment * trial.effect).reshape(300, 8)
    assert float(residual.mean(1).var()) > 1.5 * float(residual.var(1).mean()) / 8


@pytest.mark.parametrize("make", [lambda s: stripes(50, seed=s), lambda s: village_trial(20, 2, size=8, seed=s)])
def test_seeds(make: Any) -> None:
    one, same, other = make(0), make(0), make(1)
    assert torch.equal(one.images, same.images) and torch.equal(one.outcome, same.outcome)
    assert not torch.equal(one.images, other.images)


def test_tiny_trials_have_two_arms() -> None:
    for seed in range(30):
        assert len(stripes(2, seed=seed).treatment.unique()) == 2


TILES = stripes(10, size=8).images


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stripes(1), "num_units must be at least 2"),
        (lambda: stripes(10, noise=-1.0), "noise must be a standard deviation"),
        (lambda: stripes(10, effects=(1.0, 0.0)), "ascending order"),
        (lambda: stripes(10, effects=(0.0, 1.0, 2.0, 3.0)), "two or three types, got 4"),
        (lambda: trial_on_images(torch.ones(10, 1, 8, 8)), "all alike"),
        (lambda: trial_on_images(TILES[:, 0]), r"shape \(M, C, H, W\)"),
        (lambda: trial_on_images(TILES[:3]), "two images a type"),
        (lambda: trial_on_images(TILES, propensity=1.0), "propensity must lie strictly"),
        (lambda: village_trial(4), "num_sites must be at least 8"),
        (lambda: village_trial(effects=(1.0,)), "two types, got 1"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
