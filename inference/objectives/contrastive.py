"""Maximum likelihood of an unnormalised law by persistent chains (Tieleman, "Training restricted Boltzmann machines
using approximations to the likelihood gradient", ICML 2008).

The gradient of ``log p(x)`` is that of ``log p~`` at the data minus its mean under the law, which the states of Gibbs
chains that go on from update to update stand for.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from inference.potential.discrete import DiscreteEnergy, gibbs_sweep

__all__ = ["PersistentContrastiveDivergence"]


class PersistentContrastiveDivergence(nn.Module):
    """The loss whose gradient is PCD's.

    Args:
        model: the module whose parameters are learned.
        positive: ``(*batch) -> (B,)``: log p~ of the data, or its lower bound where variables are hidden.
        log_density: ``(chain, dim) -> (chain,)``: log p~ of configurations.
        energy: makes the law of the current parameters, for the sweeps.
        initial: first states of the chains, ``(chain, dim)``.
        num_sweeps: Gibbs sweeps before each update.
    """

    states: Tensor

    def __init__(
        self,
        model: nn.Module,
        positive: Callable[..., Tensor],
        log_density: Callable[[Tensor], Tensor],
        energy: Callable[[], DiscreteEnergy],
        initial: Tensor,
        num_sweeps: int = 1,
    ) -> None:
        super().__init__()
        self.model, self.positive, self.log_density, self.energy = model, positive, log_density, energy
        self.num_sweeps = num_sweeps
        self.register_buffer("states", initial.clone())

    def forward(self, *batch: Tensor) -> Tensor:
        """``mean log p~(chains) - mean log p~(data)``."""
        states = self.states
        if self.training:
            with torch.no_grad():
                law = self.energy()
                for _ in range(self.num_sweeps):
                    uniform = torch.rand(states.shape, dtype=law.dtype, device=states.device)
                    states = gibbs_sweep(law, states, uniform)
                self.states.copy_(states)
        return self.log_density(states).mean() - self.positive(*batch).mean()
