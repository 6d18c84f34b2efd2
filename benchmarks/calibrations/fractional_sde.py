"""The parameters of a linear fractional SDE with the paths integrated out, through NUTS."""

from collections.abc import Callable
from functools import partial

import pyro
import torch
from pyro.distributions import LogNormal, MultivariateNormal, Normal, Uniform
from pyro.infer.autoguide.initialization import init_to_sample
from torch import Tensor

from inference import NUTS
from inference.calibration import Calibration, simulation_based_calibration
from inference.kernels.base import Kernel
from ppl_models import FractionalSDE
from ppl_models.fractional_sde.exact import ParameterModel

__all__ = ["DrawnPaths", "calibrate", "linear_paths"]


class DrawnPaths(ParameterModel):
    """The linear SDE as a law that one path's observations are drawn from, where a fit has the evidence as a factor."""

    def __call__(self) -> None:
        draws = {name: pyro.sample(name, prior.to_event()) for name, prior in self.priors.items()}
        values = self.parameters(draws)
        mean, covariance = self.system.linear_sde(values).moments(self.times)
        noise = torch.diag_embed(values["noise_std"].square().expand(mean.shape[-1:]))
        pyro.sample("y", MultivariateNormal(mean.reshape(-1), covariance.reshape(noise.shape) + noise))


def linear_paths(form: type[ParameterModel], observations: Tensor | None = None) -> ParameterModel:
    """All five parameters of a linear fractional SDE, observed with an error at ten times."""
    times = torch.arange(1, 11, dtype=torch.float64) / 5
    y = torch.zeros(10, 1, 1, dtype=torch.float64) if observations is None else observations.reshape(10, 1, 1)
    model = FractionalSDE(1, "linear", "constant", initial=(0.0, 0.0), num_processes=6)
    model.fit(times, torch.zeros(1, 10, 1).double(), noise_std=0.1, method="exact", num_steps=1, progress=False)
    one = torch.ones(1, dtype=torch.float64)
    priors = {
        "hurst": Uniform(0.1 * one[0], 0.9 * one[0]),
        "scale": LogNormal(0 * one, 0.5),
        "theta": Normal(one, 0.5),
        "constant": Normal(0 * one, 1.0),
        "noise_std": LogNormal(torch.log(0.1 * one), 0.5),
    }
    return form(model.system, times, y, torch.ones_like(y), 0.1 * one, priors, one[0], 0 * one)


def calibrate(num_replications: int = 500, seed: int = 0) -> Calibration:
    """The posterior of H, scale, reversion, level and the error of observation by NUTS, a path of ten times each."""
    kernel: Callable[..., Kernel] = partial(
        NUTS, full_mass=True, target_accept_prob=0.9, max_tree_depth=6, init_strategy=init_to_sample
    )
    return simulation_based_calibration(
        linear_paths(DrawnPaths), kernel, observed=["y"], num_replications=num_replications, num_samples=39,
        warmup_steps=150, thin=2, seed=seed,
    )  # fmt: skip
