"""Path measures: importance weights and bounds from what a solve accumulates (Girsanov).

A control u turns the prior P into Q with log dP/dQ = -int u dW_q - 1/2 int u^2 dt and KL(Q || P) = E_Q 1/2 int u^2 dt,
a SUM over dimensions: D independent copies cost D times as much.  (The authors' code averages over them, which weighs
the path's KL by 1/D.)
"""

import math

import torch
from torch import Tensor

from sde.solvers import Path

__all__ = ["effective_sample_size", "evidence_bound", "importance_bound", "path_kl", "path_log_ratio"]


def path_kl(path: Path) -> Tensor:
    """KL contribution of each path, summed over dimensions, ``(B,)``; its mean over paths estimates KL(Q || P)."""
    return path.kl.sum(-1)


def path_log_ratio(path: Path) -> Tensor:
    """log dP/dQ of each path, summed over dimensions, ``(B,)``: the weight exp of it has mean 1 under Q."""
    return path.log_ratio.sum(-1)


def evidence_bound(path: Path, log_likelihood: Tensor) -> Tensor:
    """E_Q[log p(data | path)] - KL, one term a path, ``(B,)``; the path's KL alone, without those of q(x0) and
    q(Y0).
    """
    return _matching(path, log_likelihood) - path_kl(path)


def importance_bound(log_weights: Tensor, num_particles: int) -> Tensor:
    """log of the mean weight over groups of particles (IWAE; Burda et al. 2015, arXiv 1509.00519).

    Args:
        log_weights: log p(data | path) + log dP/dQ (plus log ratios of the start), ``(num_particles * B,)`` with the
            particle first: entry p * B + b.
        num_particles: in a group.

    Returns:
        ``(B,)``, in expectation between the evidence bound and the log evidence.
    """
    if log_weights.ndim != 1 or len(log_weights) == 0 or len(log_weights) % num_particles:
        raise ValueError(
            f"log_weights must be a vector of a multiple of {num_particles}, got {tuple(log_weights.shape)}"
        )
    grouped = log_weights.reshape(num_particles, -1)
    return torch.logsumexp(grouped, 0) - math.log(num_particles)


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """(sum w)^2 / sum w^2 over the first dimension: between 1 and its length; near 1, Q is far from the posterior."""
    return torch.exp(2 * torch.logsumexp(log_weights, 0) - torch.logsumexp(2 * log_weights, 0))


def _matching(path: Path, log_likelihood: Tensor) -> Tensor:
    if log_likelihood.shape != path.kl.shape[:1]:
        raise ValueError(f"log_likelihood must be ({path.kl.shape[0]},), one a path, got {tuple(log_likelihood.shape)}")
    return log_likelihood
