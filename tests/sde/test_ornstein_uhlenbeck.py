"""Exact transitions of Ornstein-Uhlenbeck processes that share their Brownian motion."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sde import (
    coarsen,
    discretise,
    geometric_speeds,
    graded_grid,
    horizon_speeds,
    observation_grid,
    stationary_covariance,
    transition_covariance,
    uniform_grid,
)
from sde.ornstein_uhlenbeck import exponential_scan


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_published_transition_covariance() -> None:
    published = torch.tensor(
        [
            [0.0497508313, 0.0486498655, 0.0392568737],
            [0.0486498655, 0.047581291, 0.0384591081],
            [0.0392568737, 0.0384591081, 0.0316060279],
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(transition_covariance(f64(0.1, 1, 10), 0.05), published, atol=5e-11, rtol=0)


def test_two_steps_make_one() -> None:
    g, h = geometric_speeds(7, 100.0), 0.03
    decay = torch.exp(-g * h)
    twice = torch.outer(decay, decay) * transition_covariance(g, h) + transition_covariance(g, h)
    torch.testing.assert_close(twice, transition_covariance(g, 2 * h), atol=1e-12, rtol=1e-12)


def test_stationary_law_is_the_limit_and_is_kept() -> None:
    g = f64(0.0, 0.5, 2.0)
    stationary = stationary_covariance(g)
    torch.testing.assert_close(stationary[1:, 1:], transition_covariance(g[1:], 100.0))
    assert stationary[0].abs().max() == 0
    decay = torch.exp(-g[1:] * 0.3)
    kept = torch.outer(decay, decay) * stationary[1:, 1:] + transition_covariance(g[1:], 0.3)
    torch.testing.assert_close(kept, stationary[1:, 1:])


def test_the_noise_of_a_step_is_rank_deficient_and_loses_nothing() -> None:
    g = geometric_speeds(5, 20.0)
    grid = discretise(g, uniform_grid(1.0, 20))
    assert grid.factor.shape[:2] == (1, 6)  # one step size, five processes and W
    assert grid.rank <= 5
    joint = transition_covariance(torch.cat([g, f64(0.0)]), 0.05)
    torch.testing.assert_close(grid.factor[0] @ grid.factor[0].mT, joint, atol=1e-14, rtol=1e-12)
    assert float(joint[-1, -1]) == pytest.approx(0.05)


def test_uneven_steps() -> None:
    g = geometric_speeds(4, 30.0)
    times = f64(0.0, 0.1, 0.2, 0.5, 0.6)
    grid = discretise(g, times)
    assert len(grid.factor) == 2
    increments = grid.increments(torch.eye(grid.rank).double().expand(4, -1, -1))
    for n, h in enumerate((0.1, 0.1, 0.3, 0.1)):
        torch.testing.assert_close(increments[n].mT @ increments[n], transition_covariance(torch.cat([g, f64(0)]), h))
        torch.testing.assert_close(grid.decay[n], torch.exp(-g * h))
        torch.testing.assert_close(grid.shift[n], -torch.expm1(-g * h) / g)


def test_coarser_increments_are_those_of_the_coarser_grid() -> None:
    g = geometric_speeds(4, 30.0)
    fine, coarse = discretise(g, uniform_grid(1.0, 8)), discretise(g, uniform_grid(1.0, 4))
    linear = torch.eye(8 * fine.rank).double().reshape(8 * fine.rank, 8, fine.rank).movedim(1, 0)
    merged = coarsen(fine.increments(linear), fine)
    for n in range(4):
        torch.testing.assert_close(
            merged[n].mT @ merged[n], coarse.factor[0] @ coarse.factor[0].mT, atol=1e-13, rtol=1e-11
        )
    with pytest.raises(ValueError, match="even"):
        coarsen(fine.increments(linear)[:7], fine)


@given(count=st.integers(1, 40), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_scan_equals_the_loop(count: int, seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    times = torch.rand(count, generator=source, dtype=torch.float64).cumsum(0)
    inputs = torch.randn(count, 2, 3, generator=source, dtype=torch.float64)
    g = f64(0.0, 1.0, 2000.0)  # the fastest forgets in one step: e^(+g t) would overflow
    state, expected = torch.zeros(2, 3).double(), []
    for n in range(count):
        state = torch.exp(-g * (times[n] - times[max(n - 1, 0)])) * state + inputs[n]
        expected.append(state)
    torch.testing.assert_close(exponential_scan(g, times, inputs), torch.stack(expected))


def test_time_grids() -> None:
    torch.testing.assert_close(uniform_grid(2.0, 4), f64(0, 0.5, 1, 1.5, 2))
    end, start = graded_grid(1.0, 10, power=3), graded_grid(1.0, 10, power=3, toward="start")
    assert bool((end.diff().diff() < 0).all())
    torch.testing.assert_close(1 - end.flip(0), start)
    grid = observation_grid([0.3, 0.7, 1.0], 0.1)
    torch.testing.assert_close(grid.times, torch.linspace(0, 1, 11).double())
    torch.testing.assert_close(grid.times[grid.positions], f64(0.3, 0.7, 1.0))
    forecast = observation_grid(f64(0.0, 0.25), 0.1, end=0.5, power=2.0)
    assert float(forecast.times[-1]) == 0.5
    assert torch.equal(forecast.times[forecast.positions], f64(0.0, 0.25))


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: uniform_grid(1.0, 0), "num_steps"),
        (lambda: uniform_grid(0.0, 3), "end must be positive"),
        (lambda: graded_grid(1.0, 3, power=0.5), "power"),
        (lambda: graded_grid(1.0, 3, toward="middle"), "toward"),
        (lambda: observation_grid([0.5], 0.0), "max_step"),
        (lambda: observation_grid([], 0.1), "observation_times"),
        (lambda: observation_grid([0.5], 0.1, start=0.6), "start"),
        (lambda: observation_grid([0.5], 0.1, end=0.2), "end"),
        (lambda: discretise(f64(1.0), [0.0]), "at least 2"),
        (lambda: discretise(f64(-1.0), [0.0, 1.0]), "speeds"),
        (lambda: geometric_speeds(3, 20.0, offset=2.0), "offset"),
        (lambda: horizon_speeds(3, 1.0, 2.0, 1.0), "min_speed"),
    ],
)
def test_bad_grids(build: Callable[[], object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        build()
