"""Training by masked conditionals: hide some of the variables of each row, and score what the model says of them.

The loss is the mean negative log-likelihood of the hidden variables under the model's predictive conditionals, head by
head (Domke, "Learning graphical model parameters with approximate marginal inference", TPAMI 35, 2013; Feng, Winston
and Kolter, "Monotone deep Boltzmann machines", TMLR 2023, arXiv 2307.04990, for images with labels).  Heads may be
class-balanced by the effective number of examples, weight ``(1 - beta) / (1 - beta^n)`` (Cui et al., CVPR 2019), and
focal, factor ``(1 - p)^gamma`` (Lin et al., ICCV 2017).
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from inference._checks import nonnegative

__all__ = ["Head", "MaskedConditionals"]


class Head(NamedTuple):
    """Variables that are scored together.

    Attributes:
        variables: their columns ``(n,)``.
        weight: of the head's mean loss.
        shown: share of the rows in which training shows them, drawn for each variable; as all other variables if None.
        focal: gamma; 0 for the plain loss.
        balance: beta of the class weights; 0 for none.
    """

    variables: Tensor
    weight: float = 1.0
    shown: float | None = None
    focal: float = 0.0
    balance: float = 0.0


class MaskedConditionals(nn.Module):
    """The loss of hidden variables given shown ones, for :func:`inference.fit`.

    Args:
        model: the module whose parameters are learned.
        conditional: ``(states, shown, progress) -> logits``: state numbers ``(B, V)``, which of them may be looked at
            ``(B, V)`` and the share of the fit that is done, in; logits ``(B, V, K)`` out, minus infinity beyond a
            variable's own states.
        heads: what is scored.
        unit_of: variables of one unit are shown or hidden together ``(V,)``: the channels of a pixel.
        observed_fraction: probability that a unit is shown; a pair draws it anew for each row between the two.
        num_steps: length of the fit, for ``progress``.

    The data are the states ``(N, V)`` and, where rows miss some, which are present ``(N, V)``: the others are neither
    shown nor scored.
    """

    calls: Tensor
    unit_of: Tensor

    def __init__(
        self,
        model: nn.Module,
        conditional: Callable[[Tensor, Tensor, Tensor], Tensor],
        heads: Sequence[Head],
        unit_of: Tensor,
        observed_fraction: float | tuple[float, float],
        num_steps: int,
    ) -> None:
        super().__init__()
        given = observed_fraction
        low, high = given if isinstance(given, tuple) else (given, given)
        if not 0 <= low <= high <= 1:
            raise ValueError(f"observed_fraction must lie in [0, 1], a pair in increasing order, got {given!r}")
        for head in heads:
            if head.shown is not None and not 0 <= head.shown <= 1:
                raise ValueError(f"the share of rows that show a head must lie in [0, 1], got {head.shown!r}")
            nonnegative("focal", head.focal)
            if nonnegative("balance", head.balance) >= 1:
                raise ValueError(f"balance must lie in [0, 1), got {head.balance!r}")
        if all((low if head.shown is None else head.shown) == 1 for head in heads):
            raise ValueError(
                f"observed_fraction = {given!r} hides nothing, so that there is nothing to learn: give less than 1"
            )
        self.model, self.conditional, self.heads = model, conditional, list(heads)
        self.low, self.high, self.num_steps = float(low), float(high), num_steps
        self.units = int(unit_of.max()) + 1
        self.register_buffer("unit_of", unit_of)
        # Counted here, and saved with the fit, so that a resumed run sees the same progress.
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, states: Tensor, present: Tensor | None = None) -> Tensor:
        """The mean loss of a batch."""
        progress = (self.calls / self.num_steps).clamp(max=1.0)
        if self.training:
            self.calls += 1
        rows, device = len(states), states.device
        rate = self.low + (self.high - self.low) * torch.rand(rows, 1, device=device)
        shown = (torch.rand(rows, self.units, device=device) < rate)[:, self.unit_of]
        for head in self.heads:
            if head.shown is not None:
                columns = head.variables.to(device)
                own = torch.rand(rows, len(columns), device=device) < head.shown
                shown = shown.index_copy(1, columns, own)
        scored = ~shown
        if present is not None:
            shown, scored = shown & present, scored & present
        logits = self.conditional(states, shown, progress)
        total = logits.new_zeros(())
        for head in self.heads:
            columns = head.variables.to(device)
            total = total + head.weight * _head_loss(
                logits[:, columns], states[:, columns], scored[:, columns].to(logits.dtype), head
            )
        return total


def _head_loss(logits: Tensor, states: Tensor, scored: Tensor, head: Head) -> Tensor:
    own = logits.log_softmax(-1).gather(-1, states[..., None])[..., 0]
    weight = scored
    if head.balance:
        size = logits.shape[-1]
        counts = logits.new_zeros(size).scatter_add(0, states.flatten(), scored.flatten())
        # A state that no row has weighs nothing; all others by the effective number of examples.
        share = (1 - head.balance) / -torch.expm1(counts.clamp(min=1.0) * math.log(head.balance))
        share = torch.where(counts > 0, share, torch.zeros_like(share))
        share = share * counts.sum() / (share * counts).sum().clamp_min(torch.finfo(share.dtype).tiny)
        weight = weight * share[states]
    loss = -own
    if head.focal:
        # A sure and right one has no loss; the power's own slope there is infinite below 1, and 0 times that is NaN.
        loss = loss * (-torch.expm1(own)).clamp(min=torch.finfo(own.dtype).tiny) ** head.focal
    return (loss * weight).sum() / scored.sum().clamp(min=1.0)
