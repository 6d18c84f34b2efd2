"""A law of every subset that is normalised by structure: the chain rule along one order, all steps in one pass.

With the variables in their given order, ``x_{S, <i}`` the observed ones before i, and a mixture m of latent classes,

    log p(x_S) = sum_{i in S} log p(x_i | x_{S, <i}),    p(x_i = k | x_{S, <i}) = m(x_i = k | x_{S, <i}) exp h_ik / sum

where ``h_ik`` reads ``x_{S, <i}`` alone.  Each factor sums to one, hence so does the law of ``x_S``, for any S; with
``h = 0`` the factors' product is ``m(x_S)``.  A network whose step i sees what is before i and nothing else gives all
factors at once (Larochelle and Murray, "The neural autoregressive distribution estimator", AISTATS 2011: one sum that
grows along the order; here with deep, shared layers behind it, and values that may be missing).
"""

import math

import torch
from torch import Tensor, nn

from inference.latent_classes import LatentClasses, before

__all__ = ["CausalMarginals"]


class CausalMarginals(nn.Module):
    """``log p(x_S)`` of any subset S, normalised over ``x_S``; at first the mixture's.

    At step i the network reads the sum of the embedded values before i, the probabilities of the latent classes given
    those, and the context.  The steps share its layers, and have biases and heads of their own.

    Args:
        base: the mixture m, whose tensors stay its own.
        width, depth: of the residual layers.
        context: features C of a vector that the law is conditional on.

    Attributes:
        small: log-probabilities of single values and of pairs ``(M, M)``, M the values of all variables in turn
            (``inference.objectives.small_sets.pair_products``), which take the chain rule's place; None while it
            learns.
    """

    small: Tensor | None
    first: Tensor

    def __init__(self, base: LatentClasses, width: int, depth: int, context: int = 0) -> None:
        super().__init__()
        size, levels = base.possible.shape
        self._base = (base,)  # in a tuple: not a part of this module
        self.values = nn.Parameter(torch.randn(size, levels + 1, width) / math.sqrt(size))  # 0 is for a missing value
        self.places = nn.Parameter(0.1 * torch.randn(size, width))
        self.given = nn.Linear(len(base.log_weights) + context, width, bias=False)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU()) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.heads = nn.Parameter(torch.zeros(size, levels, width))
        self.biases = nn.Parameter(torch.zeros(size, levels))
        counts = base.possible.sum(1)
        self.register_buffer("first", counts.cumsum(0) - counts, persistent=False)
        self.register_buffer("small", None, persistent=False)  # the model's file carries it, if there is one

    def forward(self, values: Tensor, context: Tensor | None = None) -> Tensor:
        """``log p(x_S)`` of values ``(B, D)``, -1 where missing, given context ``(B, C)``; ``(B,)``."""
        log_p = self.steps(values, context).gather(2, values.clamp(min=0).unsqueeze(2)).squeeze(2)
        seen = values >= 0
        log_p = torch.where(seen, log_p, torch.zeros_like(log_p)).sum(1)
        if self.small is None:
            return log_p
        place, most = self.first + values, len(self.small) - 1
        one = place.masked_fill(~seen, most).amin(1)
        other = place.masked_fill(~seen, 0).amax(1)
        count = seen.sum(1)
        return torch.where((count == 1) | (count == 2), self.small[one, other], log_p)

    def steps(self, values: Tensor, context: Tensor | None = None) -> Tensor:
        """``log p(x_i = k | x_{S, <i})`` of every variable ``(B, D, K)``."""
        law, classes = self._base[0].steps(values)
        places = torch.arange(values.shape[1], device=values.device)
        embedded = self.values[places, values + 1] * (values >= 0).unsqueeze(2)
        h = before(embedded) + self.places
        given = [classes] if context is None else [classes, context.unsqueeze(1).expand(-1, values.shape[1], -1)]
        h = h + self.given(torch.cat(given, 2))
        for block in self.blocks:
            h = h + block(h)
        h = torch.einsum("bdh,dkh->bdk", self.norm(h), self.heads) + self.biases
        return (law + h).masked_fill(~self._base[0].possible, -math.inf).log_softmax(2)
