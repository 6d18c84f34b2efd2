"""Scale-adapted SGHMC (Springenberg, Klein, Falkner and Hutter, NIPS 2016; the sampler of Tran et al. 2022).

Per coordinate, with tau = g = v = 1 at the start, G = grad U~ / T and r = 1 / (tau + 1) from the old tau, the warm-up
updates in this order

    tau <- tau + 1 - tau g^2 / (v + e)
    g   <- g + r (G - g)
    v   <- v + r (G^2 - v)

and every step, with M^-1 = 1 / (sqrt(v) + e),

    m <- (1 - alpha) m - epsilon^2 M^-1 G + N(0, max(2 epsilon^2 alpha M^-1 - epsilon^4, floor))
    z <- z + m

The -epsilon^4 takes off the variance that the minibatch gradient brings, (epsilon^2 M^-1)^2 Var(G) = epsilon^4 if v =
Var(G).  After the warm-up v is frozen.
"""

import warnings
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from inference._errors import SamplerWarning
from inference.citation import Paper
from inference.kernels.base import Info, Noise, positive
from inference.kernels.stochastic_gradient import StochasticGradientKernel
from inference.potential import Potential

__all__ = ["AdaptiveSGHMC", "AdaptiveSGHMCState"]

_DAMPING = 1e-10  # e: keeps M^-1 finite for a coordinate whose gradient is exactly zero
_NOISE_FLOOR = 1e-16  # smallest injected variance, as published


class AdaptiveSGHMCState(NamedTuple):
    """Attributes:
    position: z, ``(chain, dim)``.
    momentum: m, in units of position per step.
    tau: length of the averaging window, in steps.
    mean: g, the averaged gradient.
    second_moment: v, the averaged squared gradient.
    """

    position: Tensor
    momentum: Tensor
    tau: Tensor
    mean: Tensor
    second_moment: Tensor


class AdaptiveSGHMC(StochasticGradientKernel):
    """Stochastic-gradient HMC whose mass is adapted to the gradients' scale during the warm-up.

    Args:
        model: a Pyro model with a subsampled data plate.
        step_size: epsilon.
        friction: alpha in (0, 1] ("mdecay" in the authors' code).
        noise_correction: take the minibatch gradient's own variance (the epsilon^4 term) off the injected noise.
            Right when v is that variance; with
            full-batch gradients v is the squared mean gradient and the term makes the draws too narrow, so the run
            warns.
        **options: those of ``StochasticGradientKernel``.

    ``sample_stats`` hold the kinetic temperature (near 1 in equilibrium) and the share of coordinates whose injected
    noise is at its floor: these rely wholly
    on minibatch noise, which happens above sqrt(v) = 2 alpha / epsilon^2.
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "inproceedings",
            "springenberg2016bayesian",
            author="Springenberg, Jost Tobias and Klein, Aaron and Falkner, Stefan and Hutter, Frank",
            title="{B}ayesian Optimization with Robust {B}ayesian Neural Networks",
            booktitle="Advances in Neural Information Processing Systems",
            volume=29,
            year=2016,
        ),
    )

    def __init__(
        self,
        model: Any = None,
        potential_fn: Any = None,
        *,
        step_size: Any = 0.01,
        friction: float = 0.01,
        noise_correction: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(model, potential_fn, step_size=step_size, **options)
        self.friction = positive("friction", friction, upper=1.0)
        self.noise_correction = bool(noise_correction)

    def noise(self, potential: Potential) -> Noise:
        """As for every stochastic-gradient kernel; warns of a noise correction without minibatch noise."""
        if self.noise_correction and not potential.plates:
            warnings.warn(
                "noise_correction=True with full-batch gradients makes the draws "
                "under-dispersed: there is no minibatch noise to correct for. "
                "Set noise_correction=False, or subsample the data plate",
                SamplerWarning,
                stacklevel=2,
            )
        return super().noise(potential)

    def init(self, position: Tensor, potential: Potential) -> AdaptiveSGHMCState:
        """At rest, tau = g = v = 1."""
        one = torch.ones_like(position)
        return AdaptiveSGHMCState(position, torch.zeros_like(position), one, one.clone(), one.clone())

    def move(
        self, state: AdaptiveSGHMCState, gradient: Tensor, noise: Tensor, control: dict[str, Tensor]
    ) -> tuple[AdaptiveSGHMCState, Info]:
        """The five equations above, in their order."""
        adapting = control["warmup"] > 0
        r = 1 / (state.tau + 1)
        tau = state.tau + 1 - state.tau * state.mean.square() / (state.second_moment + _DAMPING)
        mean = state.mean + r * (gradient - state.mean)
        second_moment = state.second_moment + r * (gradient.square() - state.second_moment)
        tau = torch.where(adapting, tau, state.tau)
        mean = torch.where(adapting, mean, state.mean)
        second_moment = torch.where(adapting, second_moment, state.second_moment)

        rate = control["step_size"].square()
        inverse_mass = 1 / (second_moment.sqrt() + _DAMPING)
        variance = 2 * rate * self.friction * inverse_mass
        if self.noise_correction:
            variance = variance - rate.square()
        clamped = variance <= _NOISE_FLOOR
        scale = control["inject"] * variance.clamp(min=_NOISE_FLOOR).sqrt()
        momentum = (
            (1 - self.friction) * state.momentum * (1 - control["restart"])
            - rate * inverse_mass * gradient
            + scale * noise
        )
        info = {
            "kinetic_temperature": (momentum.square() / (rate * inverse_mass)).mean(1),
            "clamped_fraction": clamped.to(momentum.dtype).mean(1),
        }
        return AdaptiveSGHMCState(state.position + momentum, momentum, tau, mean, second_moment), info
