"""Masked completion: learn every conditional ``p(x_j | x_S)`` of a discrete vector by maximum likelihood.

The order-agnostic likelihood of a row with n observed variables is

    E_order sum_d log p(x_{o(d)} | x_{o(<d)}) = E_{d, S} [ n / (n - d)  sum_{j not in S} log p(x_j | x_S) ],

d uniform on {0, ..., n - 1} and S a uniform subset of d of the observed variables (Uria, Murray and Larochelle,
"A deep and tractable density estimator", ICML 2014; stage 1 of Liu, Ramadge and Adams, "Generative marginalization
models", ICML 2024).  The right side is one network pass.  Missing variables are never a target nor a condition, which
is the likelihood of what was observed if the values are missing at random.
"""

import torch
from torch import Tensor, nn

from inference.any_order import hide, random_ranks
from inference.objectives.small_sets import SingleConditions

__all__ = ["MaskedCompletion", "completion_loss", "uniform_depth"]

_SINGLES = 8  # at least; and for so many rows of an update one: they are not to cost as much as the rows


def uniform_depth(count: Tensor) -> Tensor:
    """For each row a uniform number of variables to reveal, from 0 to ``count - 1``; ``(B,)``."""
    u = torch.rand(count.shape, device=count.device)
    return torch.minimum((u * count).long(), count - 1)


def completion_loss(log_probs: Tensor, values: Tensor, revealed: Tensor) -> Tensor:
    """``n / (n - d) * sum_{observed j not revealed} -log p(x_j | x_S)`` of each row, ``(B,)``.

    Args:
        log_probs: ``(B, D, K)`` given the revealed variables.
        values: ``(B, D)``, -1 where missing.
        revealed: ``(B, D)``, which of the observed variables are in S.
    """
    observed = values >= 0
    target = observed & ~revealed
    log_p = log_probs.gather(2, values.clamp(min=0).unsqueeze(2)).squeeze(2)
    total = torch.where(target, log_p, torch.zeros_like(log_p)).sum(1)
    return -total * observed.sum(1) / target.sum(1).clamp(min=1)


class MaskedCompletion(nn.Module):
    """Order-agnostic negative log-likelihood in nats a row, as an objective for ``inference.fit``.

    Args:
        conditionals: module ``(values, context) -> log p(x_j = k | x_S)`` ``(B, D, K)``; its parameters are learned.
        singles: what data say of every variable given nothing, and given one other.  Its loss is added in training as
            often as it is met on average, without the noise: random subsets are seldom so small.

    Example:
        >>> objective = MaskedCompletion(conditionals)  # doctest: +SKIP
        >>> fit(objective, rows, num_steps=1000, batch_size=512)  # doctest: +SKIP
    """

    def __init__(self, conditionals: nn.Module, singles: SingleConditions | None = None) -> None:
        super().__init__()
        self.conditionals, self.singles = conditionals, singles

    def forward(self, values: Tensor, context: Tensor | None = None) -> Tensor:
        """Scalar loss of the rows ``(B, D)``, of which each has an observed variable; fresh orders at each call."""
        depth = uniform_depth((values >= 0).sum(1))
        revealed = random_ranks(values) < depth.unsqueeze(1)
        loss = completion_loss(self.conditionals(hide(values, revealed), context), values, revealed).mean()
        if self.singles is not None and self.training:
            loss = loss + 2.0 * self.singles(self.conditionals, max(_SINGLES, len(values) // _SINGLES))
        return loss
