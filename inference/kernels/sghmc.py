"""Stochastic-gradient Hamiltonian Monte Carlo (Chen, Fox and Guestrin, ICML 2014, equation 15).

With rate eta = epsilon^2 and friction alpha,

    m <- (1 - alpha) m - epsilon^2 G + N(0, 2 epsilon^2 alpha),      z <- z + m,      G = grad U~ / T

On a quadratic U = k z^2 / 2 the chain is an AR(2) process with stationary variance (1/k) / (1 - epsilon^2 k / (2 (2 -
alpha))).
"""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from inference.citation import Paper
from inference.kernels.base import Info, positive
from inference.kernels.stochastic_gradient import StochasticGradientKernel
from inference.potential import Potential

__all__ = ["SGHMC", "SGHMCState"]


class SGHMCState(NamedTuple):
    """Attributes:
    position: z, ``(chain, dim)``.
    momentum: m, in units of position per step.
    """

    position: Tensor
    momentum: Tensor


class SGHMC(StochasticGradientKernel):
    """Stochastic-gradient HMC with unit mass.

    Args:
        model: a Pyro model.
        step_size: epsilon; the rate of the paper is epsilon squared.
        friction: alpha in (0, 1]; the share of momentum lost in a step.
        **options: those of ``StochasticGradientKernel``.
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "inproceedings",
            "chen2014stochastic",
            author="Chen, Tianqi and Fox, Emily B. and Guestrin, Carlos",
            title="Stochastic Gradient {H}amiltonian {M}onte {C}arlo",
            booktitle="International Conference on Machine Learning",
            year=2014,
        ),
    )

    def __init__(
        self, model: Any = None, potential_fn: Any = None, *, step_size: Any, friction: float = 0.05, **options: Any
    ) -> None:
        super().__init__(model, potential_fn, step_size=step_size, **options)
        self.friction = positive("friction", friction, upper=1.0)

    def init(self, position: Tensor, potential: Potential) -> SGHMCState:
        """At rest."""
        return SGHMCState(position, torch.zeros_like(position))

    def move(
        self, state: SGHMCState, gradient: Tensor, noise: Tensor, control: dict[str, Tensor]
    ) -> tuple[SGHMCState, Info]:
        """The two equations above."""
        rate = control["step_size"].square()
        momentum = state.momentum * (1 - control["restart"])
        scale = control["inject"] * (2 * rate * self.friction).sqrt()
        momentum = (1 - self.friction) * momentum - rate * gradient + scale * noise
        info = {"kinetic_temperature": momentum.square().mean(1) / rate}
        return SGHMCState(state.position + momentum, momentum), info
