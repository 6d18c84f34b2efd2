"""How far probabilities can be taken at their word, and a factor on logits that brings them there."""

from typing import Any

import torch
from torch import Tensor, nn

from inference.fit import FitResult, fit
from ppl_models.base import check_count, to_tensor
from ppl_models.monotone_dbm.pairwise import PairwiseModel, Query

__all__ = ["TemperatureScaling", "expected_calibration_error", "scale_temperatures"]

_AT_ONCE = 1 << 13  # mean fields
_NEVER = -1e4  # far below all other logits, for minus infinity, which a factor could not multiply


class TemperatureScaling(nn.Module):
    """One factor on logits, as an objective for ``inference.fit`` (Guo, Pleiss, Sun and Weinberger, "On calibration of
    modern neural networks", ICML 2017), or on those of a mixture's weights.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.log_factor = nn.Parameter(torch.zeros((), dtype=dtype, device=device))

    @staticmethod
    def finite(logits: Tensor) -> Tensor:
        """Normalised logits without minus infinity."""
        return logits.log_softmax(-1).clamp(min=_NEVER)

    def forward(self, logits: Tensor, inside: Tensor) -> Tensor:
        """Mean of ``-log sum_c softmax(f logits)_c exp(inside_c)``, both ``(n, K)``: what state c says of the truth."""
        weights = (logits * self.log_factor.exp()).log_softmax(-1)
        return -(weights + inside).logsumexp(-1).mean()


def scale_temperatures(model: PairwiseModel, query: Query, truth: Tensor, chosen: Tensor, num_steps: int) -> FitResult:
    """Fit one factor and multiply the model's temperatures by it.

    Args:
        model: its temperatures of the chosen groups change; if it sums over a group, that group's instead.
        query: ``(B, G)``.
        truth: states ``(B, G)``.
        chosen: groups that are scored where they are hidden.
        num_steps: of the fit.

    Raises:
        ValueError: nothing of it is hidden.
    """
    hidden = ~query.mask[:, chosen]
    scaled = chosen if model.summed is None else chosen.new_tensor([model.summed])
    if not bool(hidden.any()) or not bool((~query.mask[:, scaled]).any()):
        raise ValueError("the mask shows every group that is to be calibrated: there is nothing to predict")
    if model.summed is None:
        logits = model.groups.padded(model.predictive_logits(query), fill=-torch.inf)[:, chosen][hidden]
        inside = _certain(truth[:, chosen][hidden], logits)
    else:
        at_once = max(1, _AT_ONCE // model.groups.sizes[model.summed])
        parts = []
        for states, mask, true in zip(*(x.split(at_once) for x in (*query, truth)), strict=True):
            tried, shares, log_p = model.predictive_cases(Query(states, mask))
            told = model.groups.totals(log_p * model.groups.one_hot(true, log_p.dtype)[:, None]).transpose(1, 2)
            own = torch.where(tried == true[:, model.summed, None], 0.0, _NEVER)[:, None].to(shares)
            told = torch.where((chosen == model.summed)[:, None], own, told[:, chosen])
            parts.append((shares[:, None].expand_as(told), told))
        logits, inside = (torch.cat(part)[hidden] for part in zip(*parts, strict=True))
    scaling = TemperatureScaling(logits.dtype, logits.device)
    history = fit(scaling, (scaling.finite(logits), inside), num_steps=num_steps, lr=0.05, progress=False)
    with torch.no_grad():
        model.log_temperature[scaled] += scaling.log_factor.detach()
    return history


def _certain(states: Tensor, logits: Tensor) -> Tensor:
    """Logarithms of one-hot ``states`` ``(n,)``, as ``logits`` ``(n, K)``."""
    return torch.where(torch.arange(logits.shape[1], device=logits.device) == states[:, None], 0.0, _NEVER).to(logits)


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
