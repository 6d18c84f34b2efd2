"""How far probabilities can be taken at their word, and a factor on logits that brings them there."""

from typing import Any

import torch
from torch import Tensor, nn

from ppl_models.base import check_count, to_tensor

__all__ = ["TemperatureScaling", "expected_calibration_error"]


class TemperatureScaling(nn.Module):
    """One factor on logits, as an objective for ``inference.fit`` (Guo, Pleiss, Sun and Weinberger, "On calibration of
    modern neural networks", ICML 2017).
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.log_factor = nn.Parameter(torch.zeros((), dtype=dtype, device=device))

    @staticmethod
    def finite(logits: Tensor) -> Tensor:
        """Logits with a number far below all others for minus infinity, which a factor could not multiply."""
        return logits.log_softmax(-1).clamp(min=-1e4)

    def forward(self, logits: Tensor, states: Tensor) -> Tensor:
        """Mean negative log-likelihood of ``states`` ``(n,)`` under scaled logits ``(n, K)``."""
        return nn.functional.cross_entropy(logits * self.log_factor.exp(), states)


def expected_calibration_error(probabilities: Any, labels: Any, num_bins: int = 15) -> float:
    """Mean distance between confidence and accuracy over equal bins of confidence.

    Args:
        probabilities: ``(n, K)``, a tensor or array.
        labels: ``(n,)``.
        num_bins: bins of [0, 1].

    Raises:
        TypeError, ValueError: not numeric, or other shapes.
    """
    check_count("num_bins", num_bins)
    probabilities = to_tensor("probabilities", probabilities)
    labels = to_tensor("labels", labels).to(probabilities.device)
    if probabilities.dim() != 2 or labels.shape != probabilities.shape[:1]:
        raise ValueError(
            f"probabilities must be (n, K) and labels (n,), got {tuple(probabilities.shape)} and {tuple(labels.shape)}"
        )
    confidence, guess = probabilities.max(1)
    gap = (guess == labels).to(confidence) - confidence
    place = (confidence * num_bins).long().clamp(max=num_bins - 1)
    sums = torch.zeros(num_bins, dtype=gap.dtype, device=gap.device).index_add(0, place, gap)
    return float(sums.abs().sum() / len(labels))
