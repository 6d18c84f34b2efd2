"""A small functional-prior network, through scale-adapted SGHMC."""

from collections.abc import Callable
from functools import partial

import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import init_to_sample
from torch import Tensor

from inference import AdaptiveSGHMC
from inference.calibration import Calibration, simulation_based_calibration
from inference.kernels.base import Kernel
from ppl_models import FunctionalPriorBNN

__all__ = ["calibrate"]


def calibrate(num_replications: int = 500, seed: int = 0) -> Calibration:
    """A small network on twelve points, by scale-adapted SGHMC; quantities are its function values, since weights have
    no order that the data could tell.
    """
    bnn = FunctionalPriorBNN(1, hidden=(6,), noise_variance=0.1)
    bnn.double()
    x, at = (torch.linspace(-1.5, 1.5, n, dtype=torch.float64).unsqueeze(-1) for n in (12, 4))

    def function(draw: dict[str, Tensor], data: dict[str, Tensor]) -> Tensor:
        with poutine.block():
            weights = poutine.condition(bnn.prior, data=draw)()
        return bnn.network(weights, at)[..., 0]

    kernel: Callable[..., Kernel] = partial(
        AdaptiveSGHMC, step_size=0.03, friction=0.05, noise_correction=False, init_strategy=init_to_sample
    )
    return simulation_based_calibration(
        bnn, kernel, (x,), observed=["obs"], num_replications=num_replications, num_samples=39, warmup_steps=2000,
        thin=500, quantities={"f(x)": function}, seed=seed,
    )  # fmt: skip
