"""The difference of two variational free energies: with the data clamped, and free.

``-F(data) + F(free)`` is the evidence bound of the joint with hidden variables, less the mean-field estimate of log Z;
the second enters with the wrong sign for a bound, so this is an approximation of the likelihood (mean-field theory
learning, Peterson and Anderson, Complex Systems 1, 1987), and a deterministic one.
"""

from collections.abc import Callable

from torch import Tensor, nn

__all__ = ["FreeEnergyContrast"]


class FreeEnergyContrast(nn.Module):
    """The mean of ``F(clamped)`` less ``F(free)``.

    Args:
        model: the module whose parameters are learned.
        clamped: ``(*batch) -> (B,)``: free energies given the data; their explicit gradient is the whole one.
        free: ``() -> (1,)``: the free energy without data.
    """

    def __init__(self, model: nn.Module, clamped: Callable[..., Tensor], free: Callable[[], Tensor]) -> None:
        super().__init__()
        self.model, self.clamped, self.free = model, clamped, free

    def forward(self, *batch: Tensor) -> Tensor:
        """The loss of a batch."""
        return self.clamped(*batch).mean() - self.free().mean()
