"""Adaptation that kernels share, made of tensors alone: dual averaging, pooled moments, warm-up windows.

Between the ends of windows a chain's adaptation depends on that chain alone; there, and nowhere else, it is pooled over
chains, and over the processes that chains are split over.  So a run's draws are the same, to rounding, however its
chains are split.

Hoffman and Gelman, JMLR 15 (2014), section 3.2, for dual averaging; the Stan reference manual, "HMC algorithm
parameters", for the windows and the
regularised variance.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from inference.runtime.distributed import sum_over_ranks

__all__ = ["DualAverage", "Moments", "mass_windows"]


class DualAverage(NamedTuple):
    """Nesterov's dual averaging of the log step size, one a chain; all of shape ``(chain,)``.

    Attributes:
        log_step: log of the step size to use while adapting.
        log_average: log of the averaged step size, to use afterwards.
        error: running mean of target minus acceptance.
        center: mu, the point towards which log_step is shrunk.
        updates: number of updates.
    """

    log_step: Tensor
    log_average: Tensor
    error: Tensor
    center: Tensor
    updates: Tensor

    @classmethod
    def start(cls, step_size: Tensor) -> "DualAverage":
        """Begin at ``step_size`` ``(chain,)``, shrinking towards ten times it."""
        log_step = step_size.log()
        zero = torch.zeros_like(log_step)
        return cls(log_step, log_step.clone(), zero, log_step + math.log(10.0), zero.clone())

    def update(
        self, acceptance: Tensor, target: float, *, gamma: float = 0.05, t0: float = 10.0, kappa: float = 0.75
    ) -> "DualAverage":
        """One update from each chain's acceptance probability, ``(chain,)``."""
        count = self.updates + 1
        weight = 1 / (count + t0)
        error = (1 - weight) * self.error + weight * (target - acceptance)
        log_step = self.center - count.sqrt() / gamma * error
        decay = count**-kappa
        return DualAverage(log_step, decay * log_step + (1 - decay) * self.log_average, error, self.center, count)

    def pooled(self) -> "DualAverage":
        """Every chain with the mean over all chains."""
        chains = sum_over_ranks(torch.ones_like(self.log_step).sum())
        return DualAverage(*((sum_over_ranks(x.sum()) / chains).expand_as(x).contiguous() for x in self))


class Moments(NamedTuple):
    """Welford's running mean and (co)variance of positions, over the chains of this process and steps.

    Attributes:
        size: number of positions.
        mean: ``(dim,)``.
        scatter: sum of squared deviations, ``(dim,)``, or of their outer products, ``(dim, dim)``.
    """

    size: Tensor
    mean: Tensor
    scatter: Tensor

    @classmethod
    def start(cls, position: Tensor, *, dense: bool) -> "Moments":
        """Empty moments for chains ``(chain, dim)``."""
        dim = position.shape[1]
        return cls(position.new_zeros(()), position.new_zeros(dim), position.new_zeros((dim, dim) if dense else (dim,)))

    def update(self, position: Tensor) -> "Moments":
        """Add the positions of all chains."""
        batch = position.shape[0]
        count = self.size + batch
        mean = position.mean(0)
        shift = mean - self.mean
        weight = self.size * batch / count
        deviation = position - mean
        if self.scatter.dim() == 2:
            scatter = self.scatter + deviation.T @ deviation + weight * torch.outer(shift, shift)
        else:
            scatter = self.scatter + deviation.square().sum(0) + weight * shift.square()
        return Moments(count, self.mean + shift * batch / count, scatter)

    def pooled(self) -> "Moments":
        """The moments over the chains of all processes."""
        size = sum_over_ranks(self.size)
        mean = sum_over_ranks(self.size * self.mean) / size.clamp(min=1)
        shift = self.mean - mean
        spread = torch.outer(shift, shift) if self.scatter.dim() == 2 else shift.square()
        return Moments(size, mean, sum_over_ranks(self.scatter + self.size * spread))

    def regularised(self) -> Tensor:
        """The (co)variance, shrunk towards a small multiple of the identity as in Stan; a matrix towards its diagonal
        too, since of fewer positions than dimensions it is of low rank in any units.
        """
        n = self.size
        variance = self.scatter / (n - 1).clamp(min=1)
        floor = 1e-3 * 5 / (n + 5)
        if variance.dim() < 2:
            return n / (n + 5) * variance + floor
        return n / (n + 5) * variance + floor * (1 + variance.diagonal()).diag()


def mass_windows(warmup_steps: int) -> tuple[int, list[int]]:
    """First adapted step, and the steps after which the mass matrix is renewed: Stan's 75, 25 doubling, 50, shrunk to
    short warm-ups.
    """
    if warmup_steps < 20:
        return warmup_steps, []
    first, base, last = (
        (75, 25, 50)
        if warmup_steps >= 150
        else (
            int(0.15 * warmup_steps),
            warmup_steps - int(0.15 * warmup_steps) - int(0.1 * warmup_steps),
            int(0.1 * warmup_steps),
        )
    )
    ends, end, size = [], first, base
    while end + size <= warmup_steps - last:
        # A window that the next, doubled one could not follow takes all that is left.
        end = end + size if end + 3 * size <= warmup_steps - last else warmup_steps - last
        ends.append(end)
        size *= 2
    return first, ends
