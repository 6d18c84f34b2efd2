"""Pareto-smoothed importance sampling: the tail of importance weights, its shape, and weights that are smoothed there.

Vehtari, Simpson, Gelman, Yao and Gabry, "Pareto smoothed importance sampling" (2024, arXiv:1507.02646).  The largest
``M = min(S / 5, 3 sqrt(S))`` of ``S`` weights are replaced by the quantiles of a generalised Pareto distribution
fitted to them (Zhang and Stephens, "A new and efficient estimation method for the generalized Pareto distribution",
2009), whose shape k says how many moments the weights have: with k < 0.5 the variance is finite, with k > 0.7 an
estimate needs more draws than one has.
"""

import math

import torch
from torch import Tensor

__all__ = ["pareto_k", "smooth_weights"]


def pareto_k(log_weights: Tensor) -> float:
    """Shape k of the tail of the weights, infinite where a weight is not finite; arguments as ``smooth_weights``."""
    return smooth_weights(log_weights)[1]


def smooth_weights(log_weights: Tensor) -> tuple[Tensor, float]:
    """Log-weights with a smoothed tail, and the tail's shape.

    Args:
        log_weights: unnormalised, ``(draw,)``; minus infinity is a weight of zero.

    Returns:
        The log-weights in the same order and scale, none above the largest raw one; and k, ``inf`` if a weight is
        ``nan`` or ``inf`` or all are zero (the weights come back as they are), ``-inf`` for a tail of equal weights.

    Raises:
        ValueError: not one dimension, or fewer than 25 draws.
    """
    if log_weights.dim() != 1 or len(log_weights) < 25:
        raise ValueError(f"log_weights must be (draw,) with at least 25 draws, got shape {tuple(log_weights.shape)}")
    largest = log_weights.max()
    if not torch.isfinite(largest):
        return log_weights, math.inf
    shifted = (log_weights - largest).double()
    count = len(shifted)
    length = math.ceil(min(0.2 * count, 3 * math.sqrt(count)))
    ordered, order = shifted.sort()
    # The threshold is the largest weight below the tail; one of zero is lifted to the smallest that a float can hold.
    floor = math.log(torch.finfo(torch.float64).tiny)
    if (ordered[-1] - ordered[-length]).item() <= 1e-12:
        return log_weights, -math.inf
    spread = _without_ties(ordered.clamp(min=floor))
    threshold, tail = spread[-length - 1], spread[-length:]
    excess = tail.exp() - threshold.exp()
    shape, scale = _fit_pareto(excess.clamp(min=0))
    levels = (torch.arange(length, dtype=torch.float64, device=tail.device) + 0.5) / length
    stretched = -torch.log1p(-levels) if abs(shape) < 1e-12 else torch.expm1(-shape * torch.log1p(-levels)) / shape
    smoothed = ordered.clone()
    smoothed[-length:] = (threshold.exp() + scale * stretched).log().clamp(max=0.0)
    result = torch.empty_like(smoothed)
    result[order] = smoothed
    return (result + largest).to(log_weights.dtype), shape


def _without_ties(ordered: Tensor) -> Tensor:
    """Ascending log-weights with equal ones spread evenly over the step from the next smaller one.

    Draws of discrete variables share a few weights.  As they are, the estimator takes the many excesses of 0 for a law
    of infinite density there, and the shape for a huge one.
    """
    values, counts = torch.unique_consecutive(ordered, return_counts=True)
    if len(values) == len(ordered):
        return ordered
    below = torch.cat([values[:1], values[:-1]]).repeat_interleave(counts)
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    share = (torch.arange(1, len(ordered) + 1, device=ordered.device) - starts) / counts.repeat_interleave(counts)
    return below + (ordered - below) * share


def _fit_pareto(x: Tensor) -> tuple[float, float]:
    """Shape and scale of a generalised Pareto distribution by an average over the profile likelihood; ``x`` ascends.

    The shape is drawn to 0.5 by the weight of ten observations, as the paper has it for small tails.
    """
    count = len(x)
    grid = 30 + int(math.sqrt(count))
    steps = torch.arange(1, grid + 1, dtype=x.dtype, device=x.device) - 0.5
    quartile = x[int(count / 4 + 0.5) - 1].clamp(min=torch.finfo(x.dtype).tiny)
    theta = 1 / x[-1] + (1 - (grid / steps).sqrt()) / (3 * quartile)
    shapes = torch.log1p(-theta.unsqueeze(1) * x).mean(1)
    profile = count * ((-theta / shapes).log() - shapes - 1)
    weights = torch.softmax(profile, 0)
    best = (theta * weights).sum()
    shape = torch.log1p(-best * x).mean()
    scale = (-shape / best).item()
    return (shape.item() * count + 5) / (count + 10), scale
