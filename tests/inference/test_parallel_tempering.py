"""Parallel tempering: every temperature's law stays what it is, modes get their weights, the ladder evens out."""

import math

import pyro.distributions as dist
import pytest
import torch

from inference import MCMC
from inference.kernels import ParallelTempering
from inference.kernels.base import StepInputs
from inference.kernels.parallel_tempering import equal_rejection, swap_neighbours
from inference.potential import LogDensity, Potential, PotentialFunction
from tests.accelerator import fake_accelerator
from tests.inference import evidence_cases as cases

F64 = torch.float64
BASE = dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1)


def gaussian_energy(values):
    """exp(-|z - 1|^2 / (2 0.6^2)), as ``cases.gaussian_target``."""
    return 0.5 * ((values["z"] - 1) / 0.6).square().sum()


def inputs(kernel: ParallelTempering, chains: int, dim: int, g: torch.Generator) -> StepInputs:
    t = kernel.num_temperatures
    noise = {
        "normal": torch.randn(chains, t * dim, generator=g, dtype=F64),
        "uniform": torch.rand(chains, 3 * t - 1, generator=g, dtype=F64),
    }
    return StepInputs(noise, {"collect": torch.zeros((), dtype=F64)}, {})


def test_every_temperature_keeps_its_law():
    """From exact draws at each of 4 temperatures, 15 steps: means and variances within 4.5 errors of 2,000 chains.

    With the wrong sign in the swap, cold replicas take the hot ones' positions and the means are off by 20 errors.
    """
    chains = 2000
    kernel = ParallelTempering(potential_fn=gaussian_energy, num_temperatures=4, reference=BASE, num_steps=2)
    potential = Potential(PotentialFunction(gaussian_energy, {"z": torch.zeros(2, dtype=F64)}))
    g = torch.Generator().manual_seed(1)
    state = kernel.init(torch.zeros(chains, 2, dtype=F64), potential)
    beta = torch.tensor([1.0, 0.5, 0.2, 0.0], dtype=F64)
    precision = (1 - beta + beta / 0.36)[:, None]
    mean = beta[:, None] / 0.36 / precision
    exact = mean + torch.randn(chains, 4, 2, generator=g, dtype=F64) / precision.sqrt()
    state = state._replace(replicas=exact, position=exact[:, 0], inverse_temperature=beta)
    step = kernel.build(potential, lambda function, calls: function)
    swaps = 0.0
    for _ in range(15):
        state, info = step(state, inputs(kernel, chains, 2, g), None)
        swaps += float(info["swap_rate"].mean()) / 15
    assert 0.3 < swaps < 0.95
    standard = (state.replicas - mean) * precision.sqrt()
    assert standard.mean(0).abs().max() < 4.5 / math.sqrt(chains)
    assert (standard.var(0) - 1).abs().max() < 4.5 * math.sqrt(2 / chains)
    assert torch.equal(state.position, state.replicas[:, 0])
    torch.testing.assert_close(info["potential_energy"], potential(state.position))
    assert (info["round_trips"] > 0).any()


def test_swaps_are_even_odd_and_follow_the_ratio():
    beta = torch.tensor([1.0, 0.6, 0.3, 0.1], dtype=F64)
    log_l = torch.tensor([[-5.0, -1.0, -7.0, -8.0], [-1.0, -5.0, -3.0, -math.inf]], dtype=F64)
    never, always = torch.full((2, 3), 0.999999, dtype=F64), torch.zeros(2, 3, dtype=F64)
    even, odd = torch.zeros((), dtype=F64), torch.ones((), dtype=F64)
    order, probability, proposed = swap_neighbours(log_l, beta, even, never)
    # upwards for certain: the hot replica has the higher likelihood
    assert order.tolist() == [[1, 0, 2, 3], [0, 1, 2, 3]]
    assert proposed.tolist() == [[1.0, 0.0, 1.0]] * 2
    expected = torch.tensor([[1.0, math.exp(0.3 * -6), math.exp(0.2 * -1)], [math.exp(0.4 * -4), 1.0, 0.0]], dtype=F64)
    torch.testing.assert_close(probability, expected)
    assert swap_neighbours(log_l, beta, even, always)[0].tolist() == [[1, 0, 3, 2], [1, 0, 2, 3]]
    assert swap_neighbours(log_l, beta, odd, always)[0].tolist() == [[0, 2, 1, 3], [0, 2, 1, 3]]


def test_round_trips_are_counted_from_end_to_end():
    """With swaps that always happen, a replica drifts up one rung a step and down again: 2 T steps a round trip."""
    kernel = ParallelTempering(potential_fn=lambda v: 0 * v["z"].sum(), num_temperatures=4, reference=BASE)
    flat = Potential(
        PotentialFunction(lambda v: -BASE.log_prob(v["z"]), {"z": torch.zeros(2, dtype=F64)}), capture=False
    )
    state = kernel.init(torch.zeros(1, 2, dtype=F64), flat)
    step = kernel.build(flat, lambda function, calls: function)
    g = torch.Generator().manual_seed(0)
    trips = []
    for _ in range(24):
        state, info = step(state, inputs(kernel, 1, 2, g), None)
        trips.append(int(info["round_trips"]))
    # four replicas, each back every eight steps once it has been at the hot end
    assert trips[-1] - trips[7] == 4 * 16 / 8
    assert trips[0] == 0 and trips == sorted(trips)


def test_ladder_of_equal_rejection():
    """Where rejection per unit of log beta is constant, the ladder is geometric; ends stay."""
    beta = torch.tensor([1.0, 0.9, 0.5, 0.1], dtype=F64)
    new = equal_rejection(beta, torch.tensor([0.1, 0.4, 0.1], dtype=F64))
    assert new[0] == 1.0 and new[-1] == 0.1
    # barriers 0, 0.1, 0.5, 0.6 cut at 0.2 and 0.4: a quarter and three quarters of the way from 0.9 to 0.5
    torch.testing.assert_close(new[1:3], torch.tensor([0.8, 0.6], dtype=F64))
    even = equal_rejection(new, torch.full((3,), 0.2, dtype=F64))
    torch.testing.assert_close(even, new)
    assert (equal_rejection(beta, torch.zeros(3, dtype=F64)).diff() < 0).all()


def test_two_modes_through_the_driver():
    """All chains start in the lighter mode, where HMC alone would stay; the weights come out within 2%.

    Their own error is 0.008, from the spread of 256 chains.
    """
    kernel = ParallelTempering(cases.two_modes, num_temperatures=6, num_steps=5)
    start = {"z": torch.full((256, 2), -4.0, dtype=F64)}
    mcmc = MCMC(kernel, 250, 150, num_chains=256, initial_params=start, progress=False, seed=3).run()
    z = mcmc.get_samples(group_by_chain=True)["z"]
    upper = (z[..., 0] > 0).double()
    assert float(upper.mean(1).std()) / 16 < 0.01
    assert float(upper.mean()) == pytest.approx(cases.WEIGHTS[1], abs=0.02)
    assert float((z.abs() - 4).square().mean()) == pytest.approx(0.25, rel=0.06)
    assert float(mcmc.sample_stats["round_trips"][:, -1].min()) > 5
    assert 0.4 < float(mcmc.sample_stats["swap_rate"].mean()) < 0.95
    assert 0.6 < float(mcmc.sample_stats["acceptance_rate"].mean()) < 0.95


def test_warm_up_evens_out_rejection_and_acceptance():
    """One rung far too hot at the start: after the warm-up all pairs and all moves are accepted about alike."""
    kernel = ParallelTempering(cases.regression, num_temperatures=4)
    mcmc = MCMC(kernel, 10, 400, num_chains=64, progress=False)
    states = []
    original = kernel.end_window

    def watch(state, *rest):
        states.append((state, original(state, *rest)))
        return states[-1][1]

    kernel.end_window = watch
    mcmc.run(cases.X, cases.Y)
    windows = [(a, b) for a, b in states if not torch.equal(a.inverse_temperature, b.inverse_temperature)]
    assert len(windows) >= 3
    rates = [(a.rejection.sum(0) / a.proposals.sum(0)) for a, _ in windows]
    assert rates[-1].std() < 0.05 and rates[-1].std() < 0.5 * rates[0].std()
    final = states[-1][0]
    acceptance = (final.acceptance.sum(0) / final.since.sum()).tolist()
    assert min(acceptance) > 0.65 and max(acceptance) < 0.93
    # nothing adapts any more, and the count starts again
    assert states[-1][1].round_trips.sum() == 0
    torch.testing.assert_close(states[-1][1].inverse_temperature, windows[-1][1].inverse_temperature)


def test_same_seed_resume_and_chain_independence(tmp_path):
    """Bit-equal for one seed, and after an interruption; without adaptation a chain is the same alone."""
    start = torch.randn(3, 2, dtype=F64, generator=torch.Generator().manual_seed(0))

    def sample(chains: int, adapt: bool, **options) -> torch.Tensor:
        on = {"adapt_step_size": adapt, "adapt_mass_matrix": adapt, "adapt_temperatures": adapt}
        kernel = ParallelTempering(potential_fn=gaussian_energy, reference=BASE, num_temperatures=3, num_steps=2, **on)
        options = {"progress": False, "compile": False, "checkpoint_every": 0.0, **options}
        mcmc = MCMC(kernel, 20, 30, {"z": start[:chains]}, chains, **options).run()
        return mcmc.get_samples(group_by_chain=True)["z"]

    def stop(event):
        if event["step"] >= 20:
            raise KeyboardInterrupt

    whole = sample(3, True)
    with pytest.warns(UserWarning, match="interrupted"), pytest.raises(RuntimeError, match="no draws yet"):
        sample(3, True, progress=stop, checkpoint=tmp_path)
    assert torch.equal(sample(3, True, checkpoint=tmp_path), whole)
    torch.testing.assert_close(sample(3, False)[:1], sample(1, False), rtol=1e-9, atol=1e-9)


def test_refusals():
    for options, error, message in (
        ({"num_temperatures": 1}, ValueError, "num_temperatures"),
        ({"num_steps": 0}, ValueError, "num_steps"),
        ({"min_inverse_temperature": 1.0}, ValueError, "min_inverse_temperature"),
        ({"reference": "flat", "min_inverse_temperature": 0.0}, ValueError, "above 0 if reference='flat'"),
        ({"jitter": -0.1}, ValueError, "jitter"),
        ({"step_size": 0.0}, ValueError, "step_size"),
    ):
        with pytest.raises(error, match=message):
            ParallelTempering(cases.regression, **options)
    with pytest.raises(ValueError, match="has no prior"):
        ParallelTempering(potential_fn=gaussian_energy)
    with pytest.raises(ValueError, match="exactly one of model and potential_fn"):
        ParallelTempering()


def test_on_an_accelerator():
    with fake_accelerator() as device:
        kernel = ParallelTempering(cases.regression, num_temperatures=3, num_steps=1)
        rows = torch.empty(2, 2, dtype=F64, device=device)
        state = kernel.init(rows, None)
        noise = {
            "normal": torch.empty(2, 6, dtype=F64, device=device),
            "uniform": torch.empty(2, 8, dtype=F64, device=device),
        }
        step = StepInputs(noise, {"collect": torch.empty((), dtype=F64, device=device)}, {})
        prepared = kernel._rows(state, step)
        assert {v.device.type for v in prepared} == {device.type}
        flat = torch.empty(6, dtype=F64, device=device)
        new, info = kernel._finish(state, step, torch.empty(6, 2, dtype=F64, device=device), flat, flat, flat, flat)
        assert {v.device.type for v in (*new, *info.values())} == {device.type}
        ladder = equal_rejection(new.inverse_temperature, new.inverse_temperature[:-1])
        assert ladder.device.type == device.type


def test_density_of_a_model_may_be_tempered_as_a_whole():
    """``reference="flat"``: beta U.  The regression's posterior, within 4 errors of draws that count a fifth."""
    kernel = ParallelTempering(cases.regression, num_temperatures=3, reference="flat", num_steps=4)
    mcmc = MCMC(kernel, 100, 100, num_chains=32, progress=False).run(cases.X, cases.Y)
    w, exact = mcmc.get_samples()["w"], cases.regression_posterior()
    assert ((w.mean(0) - exact.mean).abs() < 4 * exact.variance.sqrt() / math.sqrt(640)).all()
    assert isinstance(mcmc.potential.density, LogDensity)
