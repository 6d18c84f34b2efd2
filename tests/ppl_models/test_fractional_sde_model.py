"""Fractional SDEs of the general kind: Pyro form, masks, seeds, resume, files, accelerator, bad input."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from inference._errors import CheckpointError
from inference.runtime.generators import scoped_seed
from ppl_models import FractionalSDE
from ppl_models.fractional_sde.bound import PathBound
from sde import BrownianMotion, FractionalOrnsteinUhlenbeck, MarkovFractionalBrownianMotion, MixedNoise, NoiseWarning
from tests.accelerator import fake_accelerator, place

QUICK: dict[str, Any] = {"progress": False, "num_particles": 4}


class Well(nn.Module):
    def forward(self, time: Tensor, x: Tensor) -> Tensor:
        return 4 * x * (1 - x * x)


TIMES = torch.tensor([0.0, 0.1, 0.35, 0.6, 1.0])


def series(size: int = 2, count: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, 5, size, generator=g), torch.rand(count, 5, size, generator=g) > 0.25


SETTINGS: list[dict[str, Any]] = [
    {},
    {"posterior": "control", "diffusion": "neural", "hurst": "learn_per_dimension"},
    {"posterior": "neural", "kind": "rl", "hurst": "learn_in_time"},
    {"noise": "brownian", "drift": "linear"},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_pyros_own_elbo_agrees(settings: dict[str, Any]) -> None:
    """The Pyro model and guide under Pyro's Trace_ELBO estimate the same bound as the model's own objective."""
    values, mask = series()
    model = FractionalSDE(2, hidden=(8,), **settings)
    model.fit(TIMES, values, mask, noise_std=0.7, num_steps=2, method="variational", max_step=0.1, **QUICK)
    model.eval()
    pyro.clear_param_store()
    with torch.no_grad(), scoped_seed(0):
        theirs = torch.tensor([-Trace_ELBO().loss(model, model.guide, TIMES, values, mask) for _ in range(16)])
    pyro.clear_param_store()
    error = float(theirs.std()) / math.sqrt(16)
    assert abs(float(theirs.mean()) - float(model.elbo(400))) < 4 * error + 0.05


def test_the_model_draws_from_its_prior() -> None:
    model = FractionalSDE(1, "none", 1.0, hurst=0.3, initial=(2.0, 0.0))
    with scoped_seed(0):
        drawn = model(torch.tensor([0.5, 1.0]), num_series=2000).detach()
    assert drawn.shape == (2000, 2, 1)
    paths = model.sample_prior([0.5, 1.0], 2000)
    for found in (drawn, paths):
        assert abs(float(found.mean()) - 2) < 0.08
        assert abs(float(found[:, 1].std()) - 1) < 0.07  # unit normalisation, weights' error below 2 %
        assert abs(float(found[:, 0].std()) / 0.5**0.3 - 1) < 0.08


def test_masked_values_do_not_matter_and_neither_does_the_container() -> None:
    values, mask = series()
    spoiled = torch.where(mask, values, torch.nan)
    results = []
    for data, here in ((values, mask), (spoiled, mask), (spoiled.numpy(), mask.numpy()), (spoiled.tolist(), mask)):
        model = FractionalSDE(2, hidden=(8,))
        model.fit(TIMES.tolist(), data, here, num_steps=2, max_step=0.2, **QUICK)
        results.append(model.predict([0.5], 3).samples)
    for other in results[1:]:
        assert torch.equal(results[0], other)


def test_a_series_without_observations_keeps_the_prior() -> None:
    """The posterior of a series that is wholly masked is the prior, while another series is observed."""
    model = FractionalSDE(1, "none", 1.0, hurst=0.7, kind="rl", initial=(0.0, 0.0), hidden=(8,))
    values = torch.full((2, 1, 1), 3.0)
    mask = torch.tensor([[True], [False]])
    model.fit([1.0], values, mask, noise_std=0.1, method="variational", num_steps=1, lr=1e-9, max_step=0.1, **QUICK)
    found = model.predict([1.0], num_samples=3000)
    assert abs(float(found.mean[0, 0, 0]) - 3) < 0.1
    assert abs(float(found.mean[1, 0, 0])) < 0.08
    assert abs(float(found.std[1, 0, 0]) - 1) < 0.06


class Pull(nn.Module):
    """A drift that the posterior does not know, with a rate in the unit of time."""

    def __init__(self, unit: float) -> None:
        super().__init__()
        self.unit = unit

    def forward(self, time: Tensor, x: Tensor) -> Tensor:
        return -x / self.unit


def test_the_unit_of_time_does_not_matter() -> None:
    """Seconds or days: the same H, theta, scale and evidence.

    With theta and scale learned in absolute units, 100 in place of 1 left H at 0.58 instead of 0.33, and 1e6 ended in
    NaN; a control in absolute units put the bound at -1e88.
    """
    times = torch.arange(1, 31).double() / 10
    y = FractionalOrnsteinUhlenbeck(0.3, 1.0).sample(times, 4, seed=0).T.unsqueeze(-1)
    exact, bounds = [], []
    for unit in (1.0, 1e5):
        model = FractionalSDE(1, "linear", initial=(0.0, 0.0))
        model.fit(times * unit, y, noise_std=0.1, num_steps=60, progress=False)
        found = model.system.parameters_now()
        hurst = model.hurst.reshape(1)
        exact.append(torch.cat([
            hurst, found["theta"].detach() * unit, found["scale"].detach() * unit**hurst, model.elbo().reshape(1)
        ]))  # fmt: skip
        free = FractionalSDE(1, Pull(unit), "constant", initial=(0.0, 0.0))
        free.fit(times[:8] * unit, y[:, :8], noise_std=0.1, num_steps=20, num_particles=2, progress=False)
        bounds.append(float(free.elbo(16)))
    torch.testing.assert_close(exact[1], exact[0], rtol=1e-6, atol=0)
    assert bounds[1] == pytest.approx(bounds[0], abs=0.5)


@pytest.mark.parametrize("hurst", ["learn", 0.3])
def test_processes_that_the_grid_cannot_carry_are_said_so(hurst: Any) -> None:
    """At H = 1/2, where a learned H starts, their weights are small still."""
    model = FractionalSDE(1, "linear", hurst=hurst, num_processes=20, grid="geometric", max_speed=20.0, kind="rl")
    with pytest.warns(NoiseWarning, match="cancel.*fewer than 20 processes"):
        model.fit(torch.arange(1, 6) / 5, torch.zeros(1, 5, 1), num_steps=1, lr=1e-9, progress=False)


def test_seeds_and_global_state() -> None:
    values, mask = series()
    bits = []
    for seed in (0, 0, 1):
        model = FractionalSDE(2, hidden=(8,))
        result = model.fit(TIMES, values, mask, seed=seed, num_steps=2, max_step=0.2, **QUICK)
        assert result.history is not None
        bits.append((result.history.losses, model.predict([0.5, 1.2], 4, seed=seed).samples, float(model.elbo(8))))
    assert torch.equal(bits[0][0], bits[1][0]) and torch.equal(bits[0][1], bits[1][1]) and bits[0][2] == bits[1][2]
    assert not torch.equal(bits[0][0], bits[2][0])


def test_a_fit_resumes_to_the_bit(tmp_path: Path) -> None:
    values, mask = series()

    def interrupt(fields: dict[str, Any]) -> None:
        if fields["step"] >= 2:
            raise KeyboardInterrupt

    losses = []
    for name, progress in (("a", False), ("b", interrupt), ("b", False)):
        model = FractionalSDE(2, hidden=(8,))
        result = model.fit(
            TIMES, values, mask, num_steps=4, max_step=0.2, num_particles=4, checkpoint=tmp_path / name,
            progress=progress,
        )  # fmt: skip
        assert result.history is not None
        losses.append(result.history.losses)
    assert torch.equal(losses[0], losses[2])


@pytest.mark.parametrize("method", ["exact", "variational"])
def test_files(tmp_path: Path, method: str) -> None:
    values, mask = series()
    drift = "linear" if method == "exact" else "neural"
    model = FractionalSDE(2, drift, hurst="learn_per_dimension", hidden=(8,), initial=(0.0, 1.0))
    with pytest.raises(RuntimeError, match="fit"):
        model.predict([0.5])
    model.fit(TIMES, values, mask, noise_std="learn", num_steps=2, max_step=0.2, **QUICK)
    model.save(tmp_path / "model")
    again = FractionalSDE.load(tmp_path / "model")
    assert torch.equal(model.predict([0.5, 1.3], 5).samples, again.predict([0.5, 1.3], 5).samples)
    assert float(model.elbo(8)) == float(again.elbo(8))
    raw = (tmp_path / "model").read_bytes()
    (tmp_path / "cut").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(CheckpointError):
        FractionalSDE.load(tmp_path / "cut")
    with pytest.raises(FileNotFoundError):
        FractionalSDE.load(tmp_path / "absent")


@pytest.mark.parametrize(
    "settings",
    [
        {"hurst": np.float32(0.3), "diffusion": np.float32(0.5)},
        {"hurst": [0.3], "grid": [0.1, 1, 10.0]},  # three speeds, whatever num_processes is
        {"grid": np.array([0.1, 1.0, 10.0]), "drift": "neural", "hidden": (8,)},
    ],
)
def test_numbers_of_any_kind_fit_and_have_a_file_form(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = FractionalSDE(1, **{"drift": "linear", **settings})
    model.fit(TIMES, torch.ones(1, 5, 1), num_steps=2, **QUICK)
    model.save(tmp_path / "model")
    again = FractionalSDE.load(tmp_path / "model")
    assert torch.equal(again.elbo(), model.elbo())
    assert torch.equal(again.noise.weights, model.noise.weights)


def test_own_modules_have_no_file_form(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="state_dict"):
        FractionalSDE(1, Well()).save(tmp_path / "model")


def test_h_of_a_noise_of_the_users_is_its_own() -> None:
    """It was said to be 1/2; a mixture has none."""
    values = series(1)[0]
    for noise, hurst in (
        (MarkovFractionalBrownianMotion(0.8, horizon=2.0), 0.8),
        (BrownianMotion(horizon=2.0), 0.5),
        (MixedNoise([(1.0, BrownianMotion(horizon=2.0))]), math.nan),
    ):
        model = FractionalSDE(1, "none", noise=noise, horizon=2.0)
        result = model.fit(TIMES, values, num_steps=1, progress=False)
        torch.testing.assert_close(model.hurst.double(), torch.tensor(hurst).double(), equal_nan=True)
        assert f"H {hurst:.3f}" in result.summary()
        assert math.isfinite(model.log_evidence())


def test_arviz_of_paths() -> None:
    values, mask = series()
    model = FractionalSDE(2, hidden=(8,))
    result = model.fit(TIMES, values, mask, num_steps=2, max_step=0.2, **QUICK)
    exported = result.to_arviz(num_samples=6)
    assert exported["posterior"]["x"].shape == (1, 6, 3, 5, 2)
    assert exported["log_likelihood"]["y"].shape == (1, 6, 3, 5, 2)
    assert np.isnan(exported["observed_data"]["y"].values[~mask.numpy()]).all()
    assert "variational" in result.summary()


def test_iwae_and_a_warmed_up_kl_train() -> None:
    values, mask = series()
    model = FractionalSDE(2, hidden=(8,))
    result = model.fit(TIMES, values, mask, bound="iwae", kl_warmup=2, num_steps=3, max_step=0.2, **QUICK)
    assert result.history is not None and len(result.history.losses) == 3


def test_long_solves_can_be_checkpointed() -> None:
    """The same draws and gradients with and without; in training a checkpointed solve draws step by step instead."""
    values, mask = series()
    model = FractionalSDE(2, hidden=(8,))
    model.fit(TIMES, values, mask, num_steps=1, max_step=0.1, checkpoint_segments="sqrt", **QUICK)
    model, values = model.double(), values.double()
    found = []
    for segments in (None, "sqrt"):
        grid = model._grid(TIMES.double(), checkpoint=segments)
        fits, draws = model._weigh(grid, values, mask, 4, seed=1)
        bound = (fits - draws.kl).mean()
        gradients = torch.autograd.grad(bound, list(model.parameters()), allow_unused=True)
        found.append([bound, *(g for g in gradients if g is not None)])
    assert len(found[0]) > 10
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("settings", [{}, {"posterior": "control", "diffusion": "neural"}])
def test_forward_and_backward_on_an_accelerator(settings: dict[str, Any]) -> None:
    model = FractionalSDE(2, hidden=(8,), **settings)
    model.system.noise.set_horizon(2.0)
    model._max_step = 0.5  # few steps: fake tensors are slow
    grid = model._grid(TIMES.double())
    with fake_accelerator() as device:
        place(model, device)
        values, mask = torch.zeros(3, 5, 2, device=device), torch.ones(3, 5, 2, dtype=torch.bool, device=device)
        loss = PathBound(model, grid, 2, "elbo", 0)(values, mask)
        assert loss.device.type == device.type
        loss.backward()


# ---------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"state_size": 0}, ValueError, "state_size"),
        ({"drift": "cubic"}, ValueError, "drift"),
        ({"drift": nn.Linear(2, 2)}, ValueError, "drift"),
        ({"diffusion": 0.0}, ValueError, "diffusion"),
        ({"diffusion": "wild"}, ValueError, "diffusion"),
        ({"noise": "pink"}, ValueError, "noise"),
        ({"hurst": 1.0}, ValueError, "hurst"),
        ({"hurst": float("nan")}, ValueError, "hurst"),
        ({"hurst": "guess"}, ValueError, "hurst"),
        ({"hurst": torch.tensor([0.3, 0.4, 0.5])}, ValueError, "hurst"),
        ({"hurst": "learn_in_time"}, ValueError, "rl"),
        ({"hurst": "learn_in_time", "kind": "rl"}, ValueError, "neural"),
        ({"kind": "third"}, ValueError, "kind"),
        ({"initial": (0.0, -1.0)}, ValueError, "initial"),
        ({"initial": "known"}, ValueError, "initial"),
        ({"posterior": "normal"}, ValueError, "posterior"),
        ({"initial_posterior": "normal"}, ValueError, "initial_posterior"),
        ({"horizon": -1.0}, ValueError, "horizon"),
        ({"num_processes": 0}, ValueError, "num_processes"),
    ],
)
def test_bad_settings(settings: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        FractionalSDE(**settings)


GOOD = torch.zeros(1, 2, 1)


@pytest.mark.parametrize(
    ("arguments", "settings", "match"),
    [
        (([1.0, 0.5], GOOD), {}, "increasing"),
        (([1.0, 1.0], GOOD), {}, "increasing"),
        (([-1.0, 1.0], GOOD), {}, "negative"),
        (([1.0, 2.0], GOOD[0]), {}, "shape"),
        (([1.0, 2.0], GOOD[..., 0]), {}, r"observations\[..., None\]"),
        (([1.0, 2.0], GOOD * torch.nan), {}, "finite.*mask=torch.isfinite"),
        (([1.0, 2.0], GOOD, torch.zeros(1, 2, 1, dtype=torch.bool)), {}, "no observation"),
        (([1.0, 2.0], GOOD, torch.full((1, 2), 0.5)), {}, "boolean"),
        (([1.0, 2.0], GOOD, torch.ones(2, 2, dtype=torch.bool)), {}, "mask"),
        (([1.0, 2.0], GOOD), {"noise_std": -1.0}, "noise_std"),
        (([1.0, 2.0], GOOD), {"noise_std": 0.0}, "noise_std"),
        (([1.0, 2.0], GOOD), {"noise_std": "some"}, "noise_std"),
        (([1.0, 2.0], GOOD), {"method": "exact"}, "linear"),
        (([1.0, 2.0], GOOD), {"method": "magic"}, "method"),
        (([1.0, 2.0], GOOD), {"batch_size": 2}, "batch_size"),
        (([1.0, 2.0], GOOD), {"num_particles": 0}, "num_particles"),
        (([1.0, 2.0], GOOD), {"bound": "cubo"}, "bound"),
        (([1.0, 2.0], GOOD), {"max_step": 0.0}, "max_step"),
        (([1.0, 2.0], GOOD), {"priors": {}}, "priors"),
        (([1.0, 20.0], GOOD), {}, "horizon=20"),
        (([0.0], GOOD[:, :1]), {}, "beyond 0"),
    ],
)
def test_bad_data(arguments: tuple[Any, ...], settings: dict[str, Any], match: str) -> None:
    model = FractionalSDE(1, horizon=10.0)
    with pytest.raises(ValueError, match=match):
        model.fit(*arguments, progress=False, num_steps=1, **settings)


def test_calendar_years_and_single_series_say_how_to_give_them() -> None:
    model = FractionalSDE(1, "linear")
    with pytest.warns(NoiseWarning, match="times - 1871"):
        model.fit([1871.0, 1872.0], GOOD[:, :2] + 1, num_steps=1, progress=False)
    with pytest.raises(ValueError, match=r"reshape\(1, 2, 1\)"):
        model.fit([1.0, 2.0], [0.5, 0.7], num_steps=1, progress=False)
    with pytest.raises(ValueError, match=r"reshape\(1, 2, 3\)"):
        FractionalSDE(3, "linear").fit([1.0, 2.0], torch.zeros(2, 3), num_steps=1, progress=False)


def test_predictions_beyond_the_horizon_say_how_to_fix_it() -> None:
    model = FractionalSDE(1, "linear")
    model.fit([1.0, 2.0], GOOD + 1, num_steps=1, progress=False)
    with pytest.raises(ValueError, match="horizon=9"):
        model.predict([9.0])
    with pytest.raises(ValueError, match="increasing"):
        model.predict([1.0, 1.0])
    with pytest.raises(ValueError, match="horizon=9"):
        model.sample_prior([9.0])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"hurst": 0.1},
        {"posterior": "control"},
        {"diffusion": "neural"},
        {"drift": "linear"},
        {"drift": "linear", "posterior": "control"},
    ],
)
@pytest.mark.parametrize("last", [2.4, 1.8])
def test_times_that_differ_by_rounding_are_one_time(settings: dict[str, Any], last: float) -> None:
    times = torch.arange(9) * 0.25
    model = FractionalSDE(1, **settings)
    model.fit(times, torch.randn(3, 9, 1, generator=torch.Generator().manual_seed(0)), num_steps=2, **QUICK)
    exact = torch.arange(round(last / 0.2) + 1, dtype=torch.float64) / 5
    count, draws = len(exact), 300
    expected = model.predict(exact, num_samples=draws)
    for same in (torch.arange(count) * 0.2, torch.linspace(0, last, count), (exact * (1 + 1e-15)).tolist()):
        found = model.predict(same, num_samples=draws)
        error = ((expected.variance + found.variance) / draws).sqrt()
        assert bool(((found.mean - expected.mean).abs() <= 5 * error + 1e-4).all())


@pytest.mark.parametrize("method", ["exact", "variational"])
def test_times_that_round_to_one_are_predicted_alike(method: str) -> None:
    """Two new times that are one of the data's but for rounding were an error of positions, where no exact fit was."""
    model = FractionalSDE(1, "linear", hidden=(8,))
    model.fit([0.5, 1.0], torch.ones(2, 2, 1), method=method, num_steps=1, num_particles=2, progress=False)
    found = model.predict([0.5, 0.9999999, 1.0], num_samples=4)
    assert found.samples.shape == (4, 2, 3, 1)
    torch.testing.assert_close(found.samples[:, :, 1], found.samples[:, :, 2], rtol=0, atol=1e-5)


def test_observations_closer_than_single_precision_tells_apart() -> None:
    times = torch.tensor([0.25, 0.5, 0.5 + 1e-9, 1.0], dtype=torch.float64)
    y = torch.tensor([0.1, 0.2, 0.2, -0.1]).view(1, 4, 1)
    for posterior in ("gaussian", "control"):
        model = FractionalSDE(1, "neural", posterior=posterior, hurst="learn")
        model.fit(times, y, noise_std=0.1, num_steps=20, **QUICK)
        found = model.predict(times, num_samples=64).mean[0, :, 0]
        assert abs(float(found[1] - found[2])) < 0.05 and math.isfinite(float(model.elbo(16)))


def test_a_diffusion_that_goes_wrong_names_time_and_path() -> None:
    class Sinking(nn.Module):
        additive = False

        def forward(self, time: Tensor, x: Tensor) -> Tensor:
            return (0.5 - time).expand_as(x)

    model = FractionalSDE(1, "none", Sinking(), hurst=0.5, initial=(0.0, 0.0), hidden=(8,))
    with pytest.raises(ArithmeticError, match=r"time 0\.[45].*path 0"):
        model.fit([1.0], GOOD[:, :1], num_steps=1, max_step=0.1, **QUICK)
