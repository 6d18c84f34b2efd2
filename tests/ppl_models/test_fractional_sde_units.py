"""Units and origin of x and time: what is found does not depend on what data are counted in, or from where."""

import math
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from torch import Tensor

from ppl_models import FractionalSDE, LatentFractionalSDE
from ppl_models.fractional_sde.data import SeriesData, scales
from sde import FractionalBrownianMotion, FractionalOrnsteinUhlenbeck

TIMES = torch.arange(1, 13).double() / 10
UNITS = [(1e6, 0.0), (1e-6, 0.0), (1.0, 1e4)]  # y becomes unit * y + offset


def rough(count: int = 4) -> Tensor:
    y = FractionalOrnsteinUhlenbeck(0.3, 1.0).sample(TIMES, count, seed=0).T.unsqueeze(-1)
    return y + 0.1 * torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)


def standard(value: Tensor, unit: float) -> float:
    """A log-density of all observations in units of 1."""
    return float(value) + rough().numel() * math.log(unit)


@pytest.mark.parametrize(("unit", "offset"), UNITS)
def test_the_unit_and_the_origin_of_the_data_do_not_matter(unit: float, offset: float) -> None:
    """With the start learned in absolute units, data times 10^-6 had a log evidence of -751 instead of -109 after
    400 steps; with the drift learned as that at x = 0, an offset of 10,000 made H 0.90 instead of 0.36.
    """
    fits = []
    for u, o in ((1.0, 0.0), (unit, offset)):
        model = FractionalSDE(1, "linear", num_processes=5)
        model.fit(TIMES, rough() * u + o, noise_std=0.1 * u, num_steps=30, progress=False)
        found = model.predict([0.05, 2.0], 2)
        fits.append((float(model.hurst), standard(model.elbo(), u), (found.mean - o) / u, found.std / u))
    assert fits[1][:2] == pytest.approx(fits[0][:2], rel=1e-6)
    torch.testing.assert_close(fits[1][2], fits[0][2], rtol=0, atol=1e-6)
    torch.testing.assert_close(fits[1][3], fits[0][3], rtol=1e-6, atol=0)


@pytest.mark.parametrize("settings", [{}, {"diffusion": "neural"}, {"posterior": "control"}])
def test_nor_do_they_of_a_nonlinear_model(settings: dict[str, Any]) -> None:
    """Nor does the unit of time: a neural diffusion did not follow H by it, networks saw controls in absolute units,
    and a posterior held fixed read the noise's state in them, so that 60 steps of two fits ended 0.9 and 1.6 apart.
    """
    bounds = []
    # Powers of 2, so that the eigenvectors which make noise of normals stay.
    clocks = [(1.0, 0.0, 2.0**17), (1.0, 0.0, 2.0**-17)]
    for unit, offset, tick in ((1.0, 0.0, 1.0), *((u, o, 1.0) for u, o in UNITS), *clocks):
        model = FractionalSDE(1, "neural", hidden=(8,), num_processes=4, **settings)
        model.fit(
            TIMES[:8] * tick, rough()[:, :8] * unit + offset, noise_std=0.1 * unit, num_steps=6, lr=0.02,
            num_particles=2, max_step=0.1 * tick, progress=False,
        )  # fmt: skip
        bounds.append(float(model.elbo(8)) + 32 * math.log(unit))
    assert bounds == pytest.approx([bounds[0]] * len(bounds), abs=1e-3)


def test_nor_do_they_of_a_posterior_of_the_parameters() -> None:
    """Prior and evidence, and where a sampler starts.

    Sampled as the drift at 0, the constant was as good as one parameter with theta, under a prior around 0, which was
    ten times the scale over one unit of time, whatever it was; and the prior of a scale over one unit of time ties H.
    """
    found = []
    for unit, offset, tick in ((1.0, 0.0, 1.0), (1e-6, 0.0, 1.0), (1.0, 1e4, 1.0), (1.0, 0.0, 1e5)):
        model = FractionalSDE(1, "linear", num_processes=3)
        model.fit(TIMES * tick, rough() * unit + offset, noise_std=0.1 * unit, num_steps=20, progress=False)
        density, terms = model.parameter_model, []
        for hurst, theta, scale, constant in ((0.3, 1.0, 1.0, 0.2), (0.6, -0.4, 2.0, 5.0)):
            draw = {"hurst": hurst, "theta": theta / tick, "scale": scale * unit, "constant": constant * unit / tick}
            sites = {n: torch.full(density.priors[n].batch_shape, v).double() for n, v in draw.items()}
            trace = pyro.poutine.trace(pyro.poutine.condition(density, sites)).get_trace()
            terms.append(float(trace.log_prob_sum()))
        start = [float(t(density._now(n))) for n, t in density.units().items()]
        sizes = [float(t.inv.scale) for t in density.units().values()]
        found.append((terms[1] - terms[0], *start, sizes[0] / unit * tick, sizes[1] * tick))
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-6, abs=1e-6)


def test_a_prior_of_the_users_is_of_the_parameter_itself() -> None:
    model = FractionalSDE(2, "linear", initial=(0.0, 1.0), num_processes=3)
    model.fit(TIMES, (rough() + 3).expand(-1, -1, 2), noise_std=0.1, num_steps=2, progress=False)
    prior, theirs = torch.distributions.LogNormal(torch.zeros(2), 1.0), model.parameter_model
    own = model._parameter_model({"constant": prior, "scale": prior})
    draws = {"hurst": torch.full((4, 7), 0.3).double(), "theta": torch.full((4, 7, 2), 1.5).double()}
    draws |= {"constant": torch.full((4, 7, 2), 0.2).double(), "scale": torch.full((4, 7, 2), 0.7).double()}
    assert all(torch.equal(v, draws[n]) for n, v in own.in_full(draws).items())
    full = theirs.in_full(draws)
    torch.testing.assert_close(
        full["constant"], torch.full((4, 7, 2), 0.2 + 1.5 * float((rough() + 3).mean())).double()
    )
    torch.testing.assert_close(full["scale"], torch.full((4, 7, 2), 0.7 / 0.1**0.3).double())
    one = {n: v[0, 0] for n, v in draws.items()}
    same = own.log_evidence({n: v[0, 0] for n, v in full.items()})
    torch.testing.assert_close(theirs.log_evidence(one), same)
    torch.testing.assert_close(theirs._now("scale"), own._now("scale") * 0.1 ** model.hurst.double())


@pytest.mark.parametrize("unit", [86400.0, 1 / 36525])
def test_nor_does_the_unit_of_time_of_series_with_times_of_their_own(unit: float) -> None:
    """On a grid that holds the times of all there are no neighbours: moves were the data's deviation, in any unit of
    time, so that H of the same data was 0.79 in days, 0.005 in seconds and 0.87 in centuries.
    """
    times = torch.arange(1.0, 25.0).double()
    y = FractionalBrownianMotion(0.7).sample(times, 4, seed=3).T.unsqueeze(-1)
    mask = torch.zeros(4, 24, dtype=torch.bool)
    mask[::2, ::2], mask[1::2, 1::2] = True, True
    found = []
    for tick in (1.0, unit):
        model = FractionalSDE(1, "constant", num_processes=4)
        model.fit(times * tick, y, mask, noise_std="learn", num_steps=20, progress=False)
        found.append((float(model.hurst), float(model.log_evidence())))
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def test_moves_are_those_between_observed_neighbours() -> None:
    """Each dimension with its own gaps; a single observation leaves the data's deviation over their span."""
    mask = torch.tensor([[[1, 0], [0, 1], [1, 0], [1, 0]]]).bool()
    y = torch.tensor([[[1.0, 0.0], [0.0, 5.0], [4.0, 0.0], [5.0, 0.0]]]).double()
    found = scales(SeriesData(torch.tensor([1.0, 2.0, 3.0, 4.0]).double(), y, mask))
    assert found.jump.tolist() == pytest.approx([math.sqrt((9 / 2 + 1) / 2), 1 / 2])
    assert found.slope.tolist() == pytest.approx([4 / 3, 0])


@pytest.mark.parametrize(("unit", "offset"), UNITS)
def test_nor_do_they_of_latent_series(unit: float, offset: float) -> None:
    """Networks that saw and made frames in absolute units."""
    y, ends = rough(6) * torch.tensor([1.0, -0.5, 0.3]).double(), []
    for u, o in ((1.0, 0.0), (unit, offset)):
        model = LatentFractionalSDE((3,), 1, 2, hidden=(8,), width=4, features=8, context_size=4, num_processes=3)
        model.fit(TIMES, y * u + o, noise_std=0.1 * u, num_steps=5, lr=0.01, progress=False)
        ends.append((float(model.elbo(2)) + y.numel() * math.log(u), (model.reconstruct(2).mean - o) / u))
    assert ends[1][0] == pytest.approx(ends[0][0], rel=1e-5)
    torch.testing.assert_close(ends[1][1], ends[0][1], rtol=0, atol=1e-5)
    assert ends[0][1].std() > 0


def test_a_fastest_speed_in_any_unit_of_time() -> None:
    """0.01 a second is fast for days, and was refused as slow for a horizon of one second."""
    model = FractionalSDE(1, "none", max_speed=0.01)
    model.fit(TIMES * 1e5, rough(), num_steps=1, progress=False)
    assert float(model.noise.speeds[-1]) == pytest.approx(0.01)
    slow = FractionalSDE(1, "none", max_speed=0.01)
    with pytest.raises(ValueError, match=r"max_speed must exceed 0.3 / horizon = 0\.125"):
        slow.fit(TIMES, rough(), num_steps=1, progress=False)


def test_prior_draws_reach_as_far_as_each_call_asks() -> None:
    """Of a model that saw no data: the first call's times set the horizon of all, and time 0 alone was refused."""
    model = FractionalSDE(1)
    assert model.sample_prior([0.0], 2).shape == (2, 1, 1)
    assert model.sample_prior([0.5, 1.0], 2).shape == (2, 2, 1)
    assert model.sample_prior([5.0, 9.0], 2).shape == (2, 2, 1)


def test_an_exact_observation_of_a_known_start_is_refused() -> None:
    """It ended in NaN after one step."""
    times = torch.cat([torch.zeros(1).double(), TIMES])
    y = torch.cat([torch.zeros(4, 1, 1).double(), rough()], 1)
    model = FractionalSDE(1, "none", initial=(0.0, 0.0))
    with pytest.raises(ValueError, match="leave time 0 out"):
        model.fit(times, y, noise_std=0.0, num_steps=1, progress=False)
    model.fit(times, y, torch.arange(13).expand(4, -1) > 0, noise_std=0.0, num_steps=1, progress=False)
    free = FractionalSDE(1, "none", initial=(0.0, 1.0))
    free.fit(times, y, noise_std=0.0, num_steps=1, progress=False)
    assert math.isfinite(free.elbo()) and math.isfinite(model.elbo())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused(dtype: torch.dtype) -> None:
    """It ended in NaN after one step."""
    with pytest.raises(TypeError, match="float32 or float64"):
        FractionalSDE(1).fit(TIMES, rough().to(dtype), progress=False)


@pytest.mark.parametrize("dtype", [np.float64, np.int64])
def test_a_level_that_single_precision_cannot_hold_is_refused(dtype: Any) -> None:
    steps = np.cumsum(np.random.default_rng(0).integers(-3, 4, (1, 50, 1)), 1)
    with pytest.raises(ValueError, match=r"observations varies by .* subtract a constant"):
        FractionalSDE(1).fit(np.arange(50.0), (10**10 + steps).astype(dtype), progress=False)
