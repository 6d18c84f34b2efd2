"""The proximal operator of the negative entropy minus a square, on the simplex (the generalised softmax).

    prox(x) = argmin_{z in simplex}  1/2 |z - x|^2 + alpha sum(z log z - z^2 / 2)

With ``y = x + nu`` and ``l = log z`` its stationarity is ``alpha l + (1 - alpha) exp(l) = y - alpha``, with ``nu`` such
that z sums to one; ``alpha = 1`` is the softmax.  Feng, Winston and Kolter, "Monotone deep Boltzmann machines", TMLR
2023, arXiv 2307.04990.
"""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["prox_softmax"]

_SWEEPS = 12  # Newton on nu takes 4 to 6; a fixed number never waits for the device
_HALLEY_FIRST, _HALLEY = 8, 2


def prox_softmax(x: Tensor | np.ndarray | Sequence[float], alpha: float) -> Tensor:
    """The prox over the last dimension, twice differentiable in ``x``.

    Args:
        x: ``(..., k)``, a tensor, array or list; of its precision.
        alpha: the step, positive; it is the softmax at 1, sharper above and flatter below.

    Returns:
        Points of the simplex ``(..., k)``.

    Raises:
        TypeError, ValueError: x holds no floats, or alpha is no positive finite number.
    """
    if isinstance(x, np.ndarray | list | tuple):
        x = torch.as_tensor(x)
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor or array, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.dim() == 0 or x.shape[-1] < 1:
        raise ValueError(f"x must be (..., k) with k of at least 1, got shape {tuple(x.shape)}")
    if isinstance(alpha, Tensor) and alpha.numel() == 1 and not alpha.requires_grad:
        alpha = alpha.item()
    if isinstance(alpha, bool) or not isinstance(alpha, Real):
        raise TypeError(f"alpha must be a number without gradient, got {alpha!r}")
    alpha = float(alpha)
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be positive and finite, got {alpha!r}")
    if alpha == 1:
        return x.softmax(-1)
    return _Prox.apply(x, alpha)


class _Prox(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: float) -> Tensor:
        z = _solve(x, alpha)
        ctx.save_for_backward(z)
        ctx.alpha = alpha
        return z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """``diag(g) - g g' / sum(g)`` times ``grad``, in operations that differentiate once more."""
        (z,) = ctx.saved_tensors
        g = z / (ctx.alpha + (1 - ctx.alpha) * z)
        weighted = g * grad
        return weighted - g * (weighted.sum(-1, keepdim=True) / g.sum(-1, keepdim=True)), None


def _solve(x: Tensor, alpha: float) -> Tensor:
    """From ``nu = 1`` at the largest entry, where z sums to at least one; the sum is convex and increasing in nu, so
    Newton falls to the root without a line search.
    """
    x = x - x.amax(-1, keepdim=True)
    nu = torch.ones_like(x[..., :1])
    log_z = torch.full_like(x, math.inf)
    for sweep in range(_SWEEPS):
        y = x + nu
        # The root lies below: e^l > 0, and e^l >= 1 + l; for alpha > 1 below zero alone.
        above = torch.minimum(y / alpha - 1, y - 1) if alpha < 1 else torch.zeros_like(y)
        log_z = torch.minimum(log_z, above)
        for _ in range(_HALLEY_FIRST if sweep == 0 else _HALLEY):
            z = log_z.exp()
            h = alpha * log_z + (1 - alpha) * z - (y - alpha)
            slope = alpha + (1 - alpha) * z
            curved = (slope * slope - 0.5 * h * (1 - alpha) * z).maximum(0.5 * slope * slope)
            log_z = torch.minimum(log_z - h * slope / curved, above)
        z = log_z.exp()
        slope = alpha + (1 - alpha) * z
        change = (z.sum(-1, keepdim=True) - 1) / (z / slope).sum(-1, keepdim=True)
        nu = nu - change
        log_z = log_z - change / slope  # along the tangent
    return z / z.sum(-1, keepdim=True)
