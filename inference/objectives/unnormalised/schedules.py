"""Schedules of beta, the weight of a new batch in the running estimate of Z.

A schedule is called with tensors that live where the objective's state does: the step (from 0), log u before the step,
and the noise batch's effective share of M (between 0 and 1); it returns beta as a tensor.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from inference.kernels.base import count, positive

__all__ = ["BetaSchedule", "Constant", "Cosine", "InverseTime", "Proximal", "TargetVariance", "as_beta"]

BetaSchedule = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""``(step, log_u, ess, noise_samples) -> beta``."""


class Constant:
    """The same beta at every step."""

    def __init__(self, beta: float) -> None:
        self.beta = positive("beta", beta, upper=1.0)

    def __call__(self, step: Tensor, log_u: Tensor, ess: Tensor, noise_samples: int) -> Tensor:
        """beta."""
        return torch.full_like(log_u, self.beta)


class InverseTime:
    """``beta_t = max(least, 1 / (1 + t / delay))``."""

    def __init__(self, delay: float = 1.0, least: float = 0.0) -> None:
        self.delay, self.least = positive("delay", delay), float(least)

    def __call__(self, step: Tensor, log_u: Tensor, ess: Tensor, noise_samples: int) -> Tensor:
        """beta at the step."""
        return (1 / (1 + step.to(log_u.dtype) / self.delay)).clamp(min=self.least)


class Cosine:
    """From ``start`` to ``end`` along half a cosine of ``num_steps`` steps, and ``end`` after."""

    def __init__(self, start: float, end: float, num_steps: int) -> None:
        self.start, self.end = positive("start", start, upper=1.0), positive("end", end, upper=1.0)
        self.num_steps = count("num_steps", num_steps, 1)

    def __call__(self, step: Tensor, log_u: Tensor, ess: Tensor, noise_samples: int) -> Tensor:
        """beta at the step."""
        share = (step.to(log_u.dtype) / self.num_steps).clamp(max=1.0)
        return self.end + 0.5 * (self.start - self.end) * (1 + torch.cos(math.pi * share))


class Proximal:
    """The proximal step in nu = log u with the Bregman divergence of exp(-nu): ``beta = alpha u / (1 + alpha u)``.

    Wei et al., "SCENT" (2026, arXiv:2602.02877), equation for the inner variable.  It is not free of the gauge: adding
    a constant to the log-density changes what ``alpha`` means.
    """

    def __init__(self, alpha: float) -> None:
        self.log_alpha = math.log(positive("alpha", alpha))

    def __call__(self, step: Tensor, log_u: Tensor, ess: Tensor, noise_samples: int) -> Tensor:
        """beta, formed in the log domain."""
        return torch.sigmoid(self.log_alpha + log_u)


class TargetVariance:
    """beta whose stationary relative variance of u is ``variance``.

    At fixed parameters Var(u) / Z^2 = beta / (2 - beta) (1 / ess - 1) / M, so ``beta = 2 v / (1 + v)`` with
    ``v = variance M / (1 / ess - 1)``, kept between ``least`` and 1.
    """

    def __init__(self, variance: float = 1e-3, least: float = 0.005) -> None:
        self.variance, self.least = positive("variance", variance), positive("least", least, upper=1.0)

    def __call__(self, step: Tensor, log_u: Tensor, ess: Tensor, noise_samples: int) -> Tensor:
        """beta for the share of effective weights so far."""
        excess = (1 / ess - 1).clamp(min=1e-12)
        v = self.variance * noise_samples / excess
        return (2 * v / (1 + v)).clamp(self.least, 1.0)


def as_beta(beta: Any) -> BetaSchedule:
    """A schedule from a number or a schedule."""
    if callable(beta):
        found: BetaSchedule = beta
        return found
    return Constant(beta)
