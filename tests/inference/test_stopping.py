"""Runs that end before their last draw, and runs that keep no draws."""

import copy
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.ops.stats import gelman_rubin
from pyro.ops.streaming import CountMeanStats, StatsOfDict

from inference import HMC, MCMC, DiscreteGibbs, Stop, StreamingMCMC
from inference.results.diagnostics import ess_bulk, ess_tail, rhat
from inference.runtime.stopping import _GROWTH, StopWatch


def model() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x, 1.0).expand([2]).to_event(1))


def run(stop: Stop | None, **options: Any) -> MCMC:
    settings: dict[str, Any] = {"num_chains": 4, "progress": False, "seed": 2, **options}
    return MCMC(HMC(model, num_steps=4), 2000, 100, stop=stop, **settings).run()


def test_it_stops_at_the_first_look_that_satisfies_all_criteria() -> None:
    whole = run(None).get_samples(group_by_chain=True)
    stopped = run(Stop(rhat=1.02, ess=500))
    draws = stopped.get_samples(group_by_chain=True)
    count = draws["x"].shape[1]
    assert 100 <= count < 2000
    assert all(torch.equal(draws[n], whole[n][:, :count]) for n in whole)
    for value in draws.values():
        assert float(rhat(value).max()) <= 1.02
        assert float(torch.minimum(ess_bulk(value), ess_tail(value)).min()) >= 500
    assert stopped.stopped is not None and "R-hat" in stopped.stopped
    # At each earlier look, which are further and further apart, one criterion failed.
    wanted = 100
    for drawn in range(count % 128, count, 128):
        if drawn < wanted:
            continue
        wanted = int(_GROWTH * drawn)
        assert any(
            float(rhat(v).max()) > 1.02 or float(torch.minimum(ess_bulk(v), ess_tail(v)).min()) < 500
            for v in (v[:, :drawn] for v in whole.values())
        )


def test_the_clock() -> None:
    stopped = run(Stop(seconds=1e-3))
    assert stopped.stopped is not None and "seconds" in stopped.stopped
    assert stopped.get_samples(group_by_chain=True)["x"].shape[1] < 2000


def test_an_impossible_criterion_runs_to_the_end() -> None:
    stopped = MCMC(HMC(model, num_steps=4), 150, 100, num_chains=2, progress=False, stop=Stop(ess=1e9)).run()
    assert stopped.stopped is None
    assert stopped.get_samples(group_by_chain=True)["x"].shape == (2, 150)


def test_a_stopped_run_resumes_and_stops_again(tmp_path: Any) -> None:
    first = run(Stop(ess=300), checkpoint=tmp_path).get_samples()["x"]
    again = run(Stop(ess=300), checkpoint=tmp_path)
    assert torch.equal(again.get_samples()["x"], first) and again.stopped
    further = run(Stop(ess=1000), checkpoint=tmp_path).get_samples(group_by_chain=True)["x"]
    assert torch.equal(further, run(Stop(ess=1000)).get_samples(group_by_chain=True)["x"])


@pytest.mark.parametrize("order", [("a", "L"), ("L", "a")])
def test_entries_that_never_change_are_left_out(order: tuple[str, str]) -> None:
    laws = {"a": lambda: dist.Normal(0.0, 1.0).expand([3]).to_event(1), "L": lambda: dist.LKJCholesky(3, 1.0)}

    def with_corner() -> None:
        for name in order:
            pyro.sample(name, laws[name]())

    kernel = HMC(with_corner, num_steps=8)
    mcmc = MCMC(kernel, 4000, 300, num_chains=8, progress=False, stop=Stop(rhat=1.05, ess=100)).run()
    assert mcmc.stopped and mcmc.get_samples(group_by_chain=True)["a"].shape[1] < 1000


def test_a_lost_chain_or_nothing_to_look_at_goes_on() -> None:
    fine = torch.randn(4, 200, 2, generator=torch.Generator().manual_seed(0))
    lost = fine.clone()
    lost[1] = torch.nan
    for samples in ({"a": fine, "b": lost}, {"b": lost, "a": fine}, {"a": torch.zeros(4, 200)}):
        assert StopWatch(Stop(rhat=1.5, ess=10)).reason(200, samples) is None
    assert StopWatch(Stop(rhat=1.5, ess=10)).reason(200, {"a": fine, "c": torch.zeros(4, 200)})


def test_draws_of_integers_count() -> None:
    def die() -> None:
        pyro.sample("z", dist.Categorical(torch.ones(3) / 3))

    run = MCMC(DiscreteGibbs(die), 2000, 50, num_chains=4, progress=False, stop=Stop(rhat=1.05, ess=200)).run()
    assert run.stopped and len(run.get_samples()["z"]) < 8000


@pytest.mark.parametrize(
    "criteria", [{}, {"rhat": 1.0}, {"ess": 0}, {"seconds": -1.0}, {"rhat": 1.01, "least": 2}, {"ess": float("nan")}]
)
def test_criteria_without_meaning(criteria: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"Stop needs|must be|must lie in"):
        Stop(**criteria)


def test_stop_must_be_a_stop() -> None:
    with pytest.raises(TypeError, match=r"inference\.Stop"):
        MCMC(HMC(model), 10, stop=1.01)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- statistics instead of draws
@pytest.mark.filterwarnings("ignore:the chains have not mixed:inference.SamplerWarning")
def test_statistics_are_those_of_the_draws() -> None:
    options: dict[str, Any] = {"num_chains": 3, "progress": False, "seed": 4}
    draws = (
        MCMC(HMC(model, step_size=0.3, num_steps=4, adapt_step_size=False), 60, 30, **options)
        .run()
        .get_samples(group_by_chain=True)
    )
    streaming = StreamingMCMC(HMC(model, step_size=0.3, num_steps=4, adapt_step_size=False), 60, 30, **options)
    streaming.run()
    by_chain = streaming.get_statistics()
    merged = streaming.get_statistics(group_by_chain=False)
    for name, value in draws.items():
        for chain in range(3):
            torch.testing.assert_close(by_chain[chain, name]["mean"], value[chain].mean(0))
            torch.testing.assert_close(by_chain[chain, name]["variance"], value[chain].var(0))
        torch.testing.assert_close(merged[name]["mean"], value.flatten(0, 1).mean(0))
        torch.testing.assert_close(merged[name]["variance"], value.flatten(0, 1).var(0))
        assert merged[name]["count"] == 180
        expected = gelman_rubin(value, chain_dim=0, sample_dim=1)
        torch.testing.assert_close(streaming.diagnostics()[name]["r_hat"], expected)
    with pytest.raises(RuntimeError, match="get_statistics"):
        streaming.get_samples()


def test_a_users_statistics_and_a_second_run() -> None:
    statistics = StatsOfDict(default=CountMeanStats)
    streaming = StreamingMCMC(HMC(model, num_steps=4), 20, 10, statistics=copy.deepcopy(statistics), progress=False)
    for _ in range(2):
        streaming.run()
        assert streaming.get_statistics()[0, "x"]["count"] == 20
    with pytest.raises(RuntimeError, match="variance"):
        streaming.diagnostics()


@pytest.mark.parametrize("option", [{"checkpoint": "folder"}, {"stop": Stop(ess=10)}])
def test_what_needs_draws_is_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no draws"):
        StreamingMCMC(HMC(model), 10, **option)
