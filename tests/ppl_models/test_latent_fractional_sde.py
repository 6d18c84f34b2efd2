"""Latent fractional SDEs: bound against Pyro's, learning on vectors and images, masks, files, bad input."""

import math
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from inference._errors import CheckpointError
from inference.runtime.generators import scoped_seed
from ppl_models import LatentFractionalSDE
from ppl_models.fractional_sde.bound import PathBound
from ppl_models.fractional_sde.data import check_series
from ppl_models.fractional_sde.video import interpolate
from tests.accelerator import fake_accelerator, place

TIMES = torch.tensor([0.1, 0.2, 0.4, 0.7, 1.0])
SMALL: dict[str, Any] = {"hidden": (8,), "width": 4, "features": 8, "context_size": 4, "num_processes": 3}


def vectors(count: int = 4, seed: int = 0) -> Tensor:
    """Three sines of one phase a series."""
    g = torch.Generator().manual_seed(seed)
    phase = 6 * torch.rand(count, 1, 1, generator=g)
    return torch.sin(5 * TIMES[:, None] + phase + torch.arange(3.0))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"posterior": "gaussian", "content_size": 0},
        {"posterior": "neural", "likelihood": "bernoulli", "diffusion": "neural", "kind": "rl"},
    ],
)
def test_pyros_own_elbo_agrees(settings: dict[str, Any]) -> None:
    y = vectors().clamp(0, 1) if "likelihood" in settings else vectors()
    mask = torch.rand(4, 5, generator=torch.Generator().manual_seed(1)) > 0.2
    model = LatentFractionalSDE((3,), 2, **{"content_size": 2, **SMALL, **settings})
    model.fit(TIMES, y, mask, noise_std=0.8, num_steps=2, max_step=0.1, progress=False)
    model.eval()
    pyro.clear_param_store()
    with torch.no_grad(), scoped_seed(0):
        theirs = torch.tensor([-Trace_ELBO().loss(model, model.guide, TIMES, y, mask) for _ in range(16)])
    pyro.clear_param_store()
    assert abs(float(theirs.mean()) - float(model.elbo(200))) < 5 * float(theirs.std()) / math.sqrt(16) + 0.05


def test_it_learns_vectors_and_forecasts() -> None:
    y = vectors(16)
    model = LatentFractionalSDE((3,), 2, 2, **{**SMALL, "hidden": (16,)})
    result = model.fit(TIMES, y, noise_std=0.3, num_steps=60, lr=0.02, max_step=0.1, progress=False)
    assert result.history is not None
    assert float(result.history.losses[-5:].mean()) < 0.6 * float(result.history.losses[0])
    found = model.reconstruct(8)
    mean_frame = y.mean(1, keepdim=True)
    assert float((found.mean - y).square().mean()) < 0.7 * float((mean_frame - y).square().mean())
    ahead = model.predict([0.15, 1.0, 1.5], 8, observations=vectors(3, 1))
    assert ahead.samples.shape == (8, 3, 3, 3)
    assert float(ahead.variance[:, 2].mean()) > float(ahead.variance[:, 1].mean())
    assert model.sample_prior([0.0, 0.5], 6).shape == (6, 2, 3)
    assert float(model.elbo(8)) <= float(model.log_evidence(32))


def test_images_masks_and_containers() -> None:
    y = torch.rand(3, 5, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True, False, True, True, True]] * 3)
    spoiled = torch.where(mask[..., None, None, None], y, torch.nan)
    found = []
    for data in (y, spoiled.numpy()):
        model = LatentFractionalSDE((1, 16, 16), 2, 3, **SMALL)
        model.fit(TIMES, data, mask, num_steps=2, batch_size=2, progress=False)
        found.append(model.reconstruct(2).mean)
    assert found[0].shape == y.shape
    assert torch.equal(found[0], found[1])
    assert bool(((found[0] > 0) & (found[0] < 1)).all())


def test_files_seeds_and_arviz(tmp_path: Path) -> None:
    y = vectors()
    runs = []
    for _ in range(2):
        model = LatentFractionalSDE((3,), 2, 2, **SMALL)
        result = model.fit(TIMES, y, noise_std="learn", num_steps=3, max_step=0.1, progress=False, valid=y)
        assert result.history is not None
        runs.append(result.history.losses)
    assert torch.equal(runs[0], runs[1])
    model.save(tmp_path / "model")
    again = LatentFractionalSDE.load(tmp_path / "model")
    assert torch.equal(model.predict([0.3, 1.2], 3).samples, again.predict([0.3, 1.2], 3).samples)
    assert float(model.elbo(4)) == float(again.elbo(4))
    (tmp_path / "bad").write_bytes(b"no model")
    with pytest.raises(CheckpointError):
        LatentFractionalSDE.load(tmp_path / "bad")
    assert result.to_arviz(2)["posterior"]["frame"].shape == (1, 2, 4, 5, 3)
    assert "H 0." in result.summary()


def test_own_networks() -> None:
    with scoped_seed(0):
        encoder = nn.Sequential(nn.Flatten(), nn.Linear(6, 8))
        flat = nn.Linear(3, 6)
        decoder = nn.Sequential(flat, nn.Unflatten(1, (2, 3)))
    model = LatentFractionalSDE((2, 3), 1, 2, encoder=encoder, decoder=decoder, **SMALL)
    y = torch.zeros(2, 5, 2, 3)
    model.fit(TIMES, y, num_steps=1, progress=False)
    assert model.reconstruct(2).mean.shape == y.shape
    with pytest.raises(TypeError, match="state_dict"):
        model.config()
    with pytest.raises(ValueError, match="decoder"):
        LatentFractionalSDE((2, 3), 1, 2, encoder=encoder, decoder=flat, **SMALL)


def test_interpolation_in_time() -> None:
    g = torch.tensor([[[0.0], [1.0], [3.0]]])
    times = torch.tensor([1.0, 2.0, 4.0]).double()
    found = interpolate(g, times, torch.tensor([0.0, 1.5, 3.0, 5.0]).double())
    torch.testing.assert_close(found[:, 0, 0], torch.tensor([0.0, 0.5, 2.0, 3.0]))


def test_forward_and_backward_on_an_accelerator() -> None:
    model = LatentFractionalSDE((3,), 2, 2, **SMALL)
    model.system.noise.set_horizon(2.0)
    model._data = check_series(TIMES, torch.zeros(4, 5, 3), None, (3,))
    model._max_step = 0.5  # few steps: fake tensors are slow
    grid = model._grid(TIMES.double())
    with fake_accelerator() as device:
        place(model, device)
        y, mask = torch.zeros(4, 5, 3, device=device), torch.ones(4, 5, 3, dtype=torch.bool, device=device)
        loss = PathBound(model, grid, 2, "elbo", 0)(y, mask)
        assert loss.device.type == device.type
        loss.backward()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"data_shape": ()}, "data_shape"),
        ({"data_shape": (1, 3, 3)}, "data_shape"),
        ({"data_shape": (3,), "state_size": 0}, "state_size"),
        ({"data_shape": (3,), "content_size": -1}, "content_size"),
        ({"data_shape": (3,), "likelihood": "poisson"}, "likelihood"),
        ({"data_shape": (3,), "hurst": 1.5}, "hurst"),
        ({"data_shape": (3,), "features": 0}, "features"),
        ({"data_shape": (3,), "context_size": 0}, "context_size"),
        ({"data_shape": (1, 8, 8), "width": 6}, "width"),
        ({"data_shape": (3,), "horizon": -1.0, "noise": "brownian"}, "horizon"),
    ],
)
def test_bad_settings(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        LatentFractionalSDE(**settings)


@pytest.mark.parametrize(
    ("times", "y", "settings", "match"),
    [
        (TIMES.flip(0), torch.zeros(2, 5, 3), {}, "increasing"),
        (TIMES, torch.zeros(2, 5, 4), {}, "shape"),
        (TIMES, torch.full((2, 5, 3), torch.nan), {}, "finite"),
        (TIMES, torch.zeros(2, 5, 3), {"mask": torch.zeros(2, 5, dtype=torch.bool)}, "no observation"),
        (TIMES, torch.zeros(2, 5, 3), {"noise_std": 0.0}, "noise_std"),
        (TIMES, torch.zeros(2, 5, 3), {"num_steps": 0}, "num_steps"),
    ],
)
def test_bad_data(times: Tensor, y: Tensor, settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        LatentFractionalSDE((3,), 2, **SMALL).fit(times, y, progress=False, **settings)


def test_bytes_are_no_means_of_a_sigmoid() -> None:
    frames = torch.full((2, 5, 1, 6, 6), 255, dtype=torch.uint8)
    with pytest.raises(ValueError, match="divide bytes by 255"):
        LatentFractionalSDE((1, 6, 6), 2, **SMALL).fit(TIMES, frames, num_steps=1, progress=False)


def test_bernoulli_frames_are_probabilities() -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        LatentFractionalSDE((3,), 2, likelihood="bernoulli", **SMALL).fit(TIMES, torch.full((2, 5, 3), 2.0))


def test_observations_of_bernoulli_frames_are_zeros_and_ones() -> None:
    """They were probabilities with Gaussian noise."""
    y = (torch.rand(4, 5, 3, generator=torch.Generator().manual_seed(0)) > 0.3).float()
    model = LatentFractionalSDE((3,), 1, 2, likelihood="bernoulli", **SMALL)
    model.fit(TIMES, y, num_steps=1, progress=False)
    prediction = model.predict(TIMES, num_samples=400)
    drawn = prediction.observations(seed=1)
    assert prediction.noise_std is None and drawn.dtype == prediction.samples.dtype
    assert bool(((drawn == 0) | (drawn == 1)).all())
    # 4 standard errors of 400 draws are at most 0.1
    assert float((drawn.mean(0) - prediction.mean).abs().max()) < 0.1
    assert torch.equal(drawn, prediction.observations(seed=1))
