"""Maximum a posteriori estimates with the model's own prior as the regulariser, several at once."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from inference.potential import LogDensity, Potential
from ppl_models.functional_prior_bnn.sampling import starting_points

if TYPE_CHECKING:
    from ppl_models.functional_prior_bnn.model import FunctionalPriorBNN

__all__ = ["NegativeLogPosterior"]


class NegativeLogPosterior(nn.Module):
    """Minibatch estimate of ``-log p(w, y | x) / N``, averaged over members that start from independent draws of the
    prior.

    The mode is that of the latent sites in unconstrained space: of the weights whatever the parametrisation where they
        are Gaussian given fixed scales, of ``z``
    with a flow, and jointly of the weights and the logarithms of the variances with a hierarchical prior.

    Args:
        bnn: the model; its hyperparameters are not learned.
        x: standardised inputs ``(N, D)``.
        y: standardised targets.
        num_members: restarts, each a member.
        batch_size: rows a step, shared by the members; None for all.
        seed: of the starts.
    """

    def __init__(
        self, bnn: "FunctionalPriorBNN", x: Tensor, y: Tensor, num_members: int, batch_size: int | None, seed: int
    ) -> None:
        super().__init__()
        self._potential = (
            Potential(LogDensity(bnn, (x, y), {"batch_size": batch_size})),
        )  # in a tuple: no part of this module's state
        self._num_rows = len(x)
        starts = starting_points(bnn, x[:1], num_members, seed)
        self.position = nn.Parameter(self._potential[0].density.flatten(starts).detach().clone())

    def forward(self) -> Tensor:
        """Scalar loss; its rows come from the global generator."""
        potential = self._potential[0]
        device = self.position.device
        batch = {p.name: torch.randperm(p.size, device=device)[: p.batch_size] for p in potential.plates.values()}
        energy, gradient = potential.value_and_grad(self.position.detach(), batch)
        # The captured graph gives the gradient itself: a linear function with that slope hands it to autograd.
        slope = ((self.position - self.position.detach()) * gradient).sum()
        return (energy.sum() + slope) / (len(energy) * self._num_rows)

    @torch.no_grad()
    def samples(self) -> dict[str, Tensor]:
        """The latent sites at the present positions, ``(member, 1, *event)``: chains of one draw."""
        return {n: v.unsqueeze(1) for n, v in self._potential[0].constrain(self.position).items()}
