"""A mixture whose marginals are known, and the exact sums that queries are held against."""

import torch
from torch import Tensor

__all__ = ["BernoulliMixture", "hide_some"]


class BernoulliMixture:
    """Six products of Bernoullis over ``size`` variables."""

    def __init__(self, size: int, seed: int = 0, components: int = 6) -> None:
        g = torch.Generator().manual_seed(seed)
        self.weights = torch.randn(components, generator=g).softmax(0)
        self.probs = torch.sigmoid(2 * torch.randn(components, size, generator=g))
        self.generator = g

    def sample(self, n: int) -> Tensor:
        """``(n, D)``."""
        which = torch.multinomial(self.weights, n, replacement=True, generator=self.generator)
        u = torch.rand(n, self.probs.shape[1], generator=self.generator)
        return (u < self.probs[which]).long()

    def log_prob(self, x: Tensor) -> Tensor:
        """Of the observed part, ``(B,)``."""
        p = torch.where(x.unsqueeze(1) == 1, self.probs, 1 - self.probs)
        p = torch.where(x.unsqueeze(1) < 0, torch.ones_like(p), p)
        return (self.weights.log() + p.log().sum(2)).logsumexp(1)


def hide_some(x: Tensor, seed: int = 0) -> Tensor:
    """Each row with a uniform number of variables observed."""
    g = torch.Generator().manual_seed(seed)
    count = torch.randint(x.shape[1] + 1, (len(x), 1), generator=g)
    return x.masked_fill(torch.rand(x.shape, generator=g).argsort(1).argsort(1) >= count, -1)
