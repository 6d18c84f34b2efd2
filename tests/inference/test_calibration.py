"""Simulation-based calibration: right kernels pass, kernels with one deliberate bug fail.

The failing kernels are the test of the test: each has one bug of a kind that the eye overlooks.
"""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide.initialization import init_to_sample
from scipy import stats
from torch.distributions.transforms import ExpTransform

from inference import HMC, SGHMC, SGLD, AdaptiveSGHMC
from inference.calibration import Calibration, simulation_based_calibration

# Pooled step sizes are too long for a chain in an unlikely data set now and then, and the driver says so.
pytestmark = pytest.mark.filterwarnings("ignore:.*transitions diverged:inference.SamplerWarning")

F64 = torch.float64
ZERO = torch.zeros((), dtype=F64)


def model(n=4):
    """Few data, so that the prior counts; a positive site, so that the Jacobian counts."""
    mu = pyro.sample("mu", dist.Normal(ZERO, 1.0))
    rate = pyro.sample("rate", dist.Gamma(ZERO + 3.0, ZERO + 1.0))
    with pyro.plate("n", n):
        pyro.sample("y", dist.Normal(mu, rate.rsqrt()))


# An engine is a line: how to build it, and the options of the run.  Those without acceptance step have a bias of the
# order of their step size, which is small enough here for 500 replications not to see it.
KERNELS = {
    "HMC": (partial(HMC, num_steps=6), {"warmup_steps": 150, "thin": 3}),
    "SGLD": (partial(SGLD, step_size=0.005), {"warmup_steps": 800, "thin": 150}),
    "SGHMC": (partial(SGHMC, step_size=0.08, friction=0.1), {"warmup_steps": 200, "thin": 30}),
    "AdaptiveSGHMC": (
        partial(AdaptiveSGHMC, step_size=0.1, friction=0.1, noise_correction=False),
        {"warmup_steps": 300, "thin": 30},
    ),
}


def calibrate(kernel, program=model, **options):
    settings = {"observed": ["y"], "num_samples": 15, "compile": False, **options}
    return simulation_based_calibration(program, partial(kernel, init_strategy=init_to_sample), **settings)


@pytest.mark.parametrize("name", KERNELS)
def test_engines_are_calibrated(name):
    kernel, options = KERNELS[name]
    result = calibrate(kernel, **options)
    assert set(result.ranks) == {"mu", "rate", "log_likelihood"}
    assert result.p_value() > 0.01, result.chi_square()


# ---------------------------------------------------------------------- bugs
class ExpWithoutJacobian(ExpTransform):
    def log_abs_det_jacobian(self, x, y):
        return torch.zeros_like(x)


class AcceptsTheWrongSign(HMC):
    """min(1, exp(H' - H)) for min(1, exp(H - H'))."""

    def _finish(self, state, inputs, before, *proposal):
        accepted = super()._finish(state, inputs, torch.full_like(before, torch.inf), *proposal)[1]
        return super()._finish(state, inputs, 2 * accepted["energy"] - before, *proposal)


class HalfAGradient(HMC):
    """Accepts everything: leapfrog alone, whose error nothing corrects."""

    def _finish(self, state, inputs, before, *proposal):
        return super()._finish(state, inputs, torch.full_like(before, torch.inf), *proposal)


class WithoutFriction(SGHMC):
    """The momentum is kicked and never damped."""

    def move(self, state, gradient, noise, control):
        undamped = state._replace(momentum=state.momentum / (1 - self.friction))
        return super().move(undamped, gradient, noise, control)


class TooMuchNoise(SGLD):
    """N(0, 2 epsilon) for N(0, epsilon): the law of another convention for the step size."""

    def move(self, state, gradient, noise, control):
        return super().move(state, gradient, noise * 2**0.5, control)


COARSE = {"step_size": 0.55, "num_steps": 3, "adapt_step_size": False, "adapt_mass_matrix": False}
CHAINS_RUN = {"warmup_steps": 100, "thin": 3}
BUGS = {
    "no Jacobian": (partial(HMC, num_steps=6, transforms={"rate": ExpWithoutJacobian().inv}), KERNELS["HMC"][1]),
    "no Jacobian, SGHMC": (
        partial(SGHMC, step_size=0.08, friction=0.1, transforms={"rate": ExpWithoutJacobian().inv}),
        KERNELS["SGHMC"][1],
    ),
    "wrong accept sign": (partial(AcceptsTheWrongSign, **COARSE), CHAINS_RUN),
    "no accept step": (partial(HalfAGradient, **COARSE), CHAINS_RUN),
    "missing friction": (partial(WithoutFriction, step_size=0.08, friction=0.1), KERNELS["SGHMC"][1]),
    "too much noise": (partial(TooMuchNoise, step_size=0.02), {"warmup_steps": 200, "thin": 30}),
}


@pytest.mark.filterwarnings("ignore:.*became non-finite:inference.SamplerWarning")
@pytest.mark.parametrize("bug", BUGS)
def test_a_kernel_with_a_bug_is_not(bug):
    kernel, options = BUGS[bug]
    assert calibrate(kernel, **options).p_value() < 1e-4


def test_the_coarse_steps_of_the_buggy_kernels_are_right_with_the_right_decision():
    """What fails above is the decision and not the integrator."""
    assert calibrate(partial(HMC, **COARSE), **CHAINS_RUN).p_value() > 0.01
