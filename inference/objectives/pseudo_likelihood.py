"""Pseudo-likelihood: each variable's conditional given all others (Besag, "Statistical analysis of non-lattice data",
The Statistician 24, 1975). It needs no normaliser and no sampling, and every variable observed.
"""

from collections.abc import Callable

from torch import Tensor, nn

__all__ = ["PseudoLikelihood"]


class PseudoLikelihood(nn.Module):
    """Minus the mean log conditional.

    Args:
        model: the module whose parameters are learned.
        log_conditionals: ``(*batch) -> (B, dim)``: log p(x_j | all others).
    """

    def __init__(self, model: nn.Module, log_conditionals: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.log_conditionals = model, log_conditionals

    def forward(self, *batch: Tensor) -> Tensor:
        """The loss of a batch."""
        return -self.log_conditionals(*batch).mean()
