"""Stochastic-gradient Langevin dynamics (Welling and Teh, ICML 2011, equation 4).

z <- z - epsilon / 2 * G + N(0, epsilon),      G = grad U~ / T
"""

from typing import ClassVar, NamedTuple

from torch import Tensor

from inference.citation import Paper
from inference.kernels.base import Info
from inference.kernels.stochastic_gradient import StochasticGradientKernel
from inference.potential import Potential

__all__ = ["SGLD", "SGLDState"]


class SGLDState(NamedTuple):
    """Attributes:
    position: z, ``(chain, dim)``.
    """

    position: Tensor


class SGLD(StochasticGradientKernel):
    """Stochastic-gradient Langevin dynamics; ``step_size`` is epsilon in the equation above.

    Arguments are those of ``StochasticGradientKernel``.
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "inproceedings",
            "welling2011bayesian",
            author="Welling, Max and Teh, Yee Whye",
            title="Bayesian Learning via Stochastic Gradient {L}angevin Dynamics",
            booktitle="International Conference on Machine Learning",
            year=2011,
        ),
    )

    def init(self, position: Tensor, potential: Potential) -> SGLDState:
        """Only a position."""
        return SGLDState(position)

    def move(
        self, state: SGLDState, gradient: Tensor, noise: Tensor, control: dict[str, Tensor]
    ) -> tuple[SGLDState, Info]:
        """The equation above; without injected noise while a cyclical schedule explores."""
        epsilon = control["step_size"]
        return SGLDState(state.position - 0.5 * epsilon * gradient + control["inject"] * epsilon.sqrt() * noise), {}
