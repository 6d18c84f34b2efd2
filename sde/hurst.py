"""Hurst index of a series by likelihood: exact, Whittle's in the frequency domain, or of the Markov approximation.

All three profile out mean and scale, tabulate the remaining function of H at Chebyshev nodes of logit H (one
factorisation a node serves every series) and maximise its interpolating polynomial.

J. Beran, *Statistics for Long-Memory Processes*, 1994, ch. 5 and 6; P. Whittle 1953.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sde._checks import as_count, as_numbers
from sde.fbm import increment_autocovariance
from sde.kalman import kalman_filter
from sde.linear import LinearSDE
from sde.markov_fbm import MarkovFractionalBrownianMotion

__all__ = ["HurstEstimate", "hurst_estimate"]

_NODES = 40  # in logit H the profile is analytic in a strip of half-width pi: the interpolation error is about 1e-10
_LOWEST, _HIGHEST = 0.01, 0.99
_SEARCH = 4001
_MAX_EXACT = 5000  # n x n factorisations of float64: 200 MB each


class HurstEstimate(NamedTuple):
    """A maximum-likelihood estimate; ``float(estimate)`` is H of a single series.

    Attributes:
        hurst: ``()`` or ``(N,)``, float64.
        scale: standard deviation of one increment, of the same shape.
        mean: of the increments, of the same shape; 0 where it was given as known.
        log_likelihood: at the maximum (Whittle's approximation of it for ``"whittle"``), of the same shape.
    """

    hurst: Tensor
    scale: Tensor
    mean: Tensor
    log_likelihood: Tensor

    def __float__(self) -> float:
        return float(self.hurst)


class _Profile(NamedTuple):
    """Functions of H at the nodes, ``(nodes, N)`` each."""

    log_likelihood: Tensor
    log_scale: Tensor
    mean: Tensor


def hurst_estimate(
    values: Tensor | np.ndarray,
    *,
    of: str = "increments",
    method: str = "ml",
    known_mean: bool = False,
    num_processes: int = 9,
) -> HurstEstimate:
    """Estimate H, mean and scale of equally spaced fractional Gaussian noise, or of the motion that it sums to.

    Args:
        values: ``(T,)``, or ``(T, N)`` for N series at once, T >= 8, finite, not constant.
        of: ``"increments"``, or ``"path"`` where ``values`` are the motion: they are differenced.
        method: ``"ml"`` (exact, O(T^3) a node up to T = 5000), ``"whittle"`` (O(T log T)), or ``"markov"`` (Kalman
            filter on the Markov approximation, O(T)).
        known_mean: take the increments' mean to be 0 instead of estimating it.
        num_processes: of the Markov approximation.

    Returns:
        The estimate for every series.  H is searched in [0.01, 0.99].

    Raises:
        TypeError: for values that are no real numbers.
        ValueError: for series that are too short, constant or not finite, or unknown names.

    Example:
        >>> from sde import fractional_gaussian_noise
        >>> 0.6 < float(hurst_estimate(fractional_gaussian_noise(0.7, 1000, 1, seed=0)[:, 0])) < 0.8
        True
    """
    x = as_numbers(values, "values").detach()
    if x.ndim not in (1, 2) or x.shape[-1] == 0:
        raise ValueError(f"values must be (T,) or (T, N), got shape {tuple(x.shape)}")
    if not bool(torch.isfinite(x).all()):
        raise ValueError("values must be finite")
    if of == "path":
        x = x.diff(dim=0)
    elif of != "increments":
        raise ValueError(f"of must be 'increments' or 'path', got {of!r}")
    if len(x) < 8:
        raise ValueError(f"values must hold at least 8 increments, got {len(x)}")
    single = x.ndim == 1
    x = x.reshape(len(x), -1)
    centre = torch.zeros_like(x[0]) if known_mean else x.mean(0)
    spread = (x - centre).square().mean(0).sqrt()
    if bool((spread <= 1e-12 * x.abs().amax(0)).any()):
        raise ValueError("values must not be constant: a constant series has no Hurst index")
    standard = (x - centre) / spread  # so that the likelihood's quadratic forms are of order T

    u = torch.cos(math.pi * (torch.arange(_NODES, dtype=x.dtype, device=x.device) + 0.5) / _NODES)
    reach = math.log(_HIGHEST / _LOWEST)
    nodes = torch.sigmoid(reach * u)
    if method == "ml":
        if len(x) > _MAX_EXACT:
            raise ValueError(f"method='ml' factorises T x T matrices, T={len(x)}: take method='whittle' or 'markov'")
        profile = _exact(standard, nodes, known_mean)
    elif method == "whittle":
        profile = _whittle(standard, nodes)
    elif method == "markov":
        profile = _markov(standard, nodes, known_mean, as_count(num_processes, "num_processes"))
    else:
        raise ValueError(f"method must be 'ml', 'whittle' or 'markov', got {method!r}")
    best = _maximise(u, profile.log_likelihood)
    at = _interpolation(u, best)  # (N, nodes)
    log_likelihood, log_scale, mean = ((at * part.mT).sum(-1) for part in profile)
    out = (
        torch.sigmoid(reach * best),
        log_scale.exp() * spread,
        centre + spread * mean,
        log_likelihood - len(x) * spread.log(),
    )
    return HurstEstimate(*(part[0] if single else part for part in out))


def _profiled(ones: Tensor | None, cross: Tensor, square: Tensor, logdet: Tensor, count: int) -> _Profile:
    """Mean by generalised least squares, scale by its closed form; inputs are 1'G^-1 1, 1'G^-1 x, x'G^-1 x, log|G|."""
    mean = torch.zeros_like(square) if ones is None else cross / ones
    rest = square if ones is None else square - cross**2 / ones
    variance = rest / count
    log_likelihood = -0.5 * (count * (torch.log(2 * math.pi * variance) + 1) + logdet)
    return _Profile(log_likelihood, 0.5 * variance.log(), mean)


def _exact(x: Tensor, nodes: Tensor, known_mean: bool) -> _Profile:
    count = len(x)
    lag = (torch.arange(count, device=x.device).unsqueeze(-1) - torch.arange(count, device=x.device)).abs()
    both = torch.cat([torch.ones_like(x[:, :1]), x], -1)
    parts = []
    for h in nodes:  # one n x n factor at a time
        factor = torch.linalg.cholesky(increment_autocovariance(h, count)[lag])
        white = torch.linalg.solve_triangular(factor, both, upper=False)
        one, rest = white[:, :1], white[:, 1:]
        ones = None if known_mean else one.square().sum(0)
        logdet = 2 * factor.diagonal().log().sum()
        parts.append(_profiled(ones, (one * rest).sum(0), rest.square().sum(0), logdet, count))
    return _Profile(*(torch.stack(part) for part in zip(*parts, strict=True)))


def _whittle(x: Tensor, nodes: Tensor) -> _Profile:
    count = len(x)
    transform = torch.fft.rfft(x, dim=0)[1 : (count - 1) // 2 + 1]
    periodogram = transform.abs().square() / (2 * math.pi * count)
    wave = 2 * math.pi * torch.arange(1, len(periodogram) + 1, dtype=x.dtype, device=x.device) / count
    h = nodes.unsqueeze(-1)
    # f = 2 c (1 - cos w) sum_j |2 pi j + w|^(-2H-1), the sum as two Hurwitz zeta functions
    s, q = 2 * h + 1, wave / (2 * math.pi)
    sums = (2 * math.pi) ** (-s) * (torch.special.zeta(s, q) + torch.special.zeta(s, 1 - q))
    constant = torch.sin(math.pi * h) * torch.exp(torch.lgamma(2 * h + 1)) / math.pi
    density = constant * 2 * torch.sin(wave / 2) ** 2 * sums  # (nodes, frequencies)
    variance = (periodogram / density.unsqueeze(-1)).mean(1)
    # -(n / 2) (log 2 pi sigma^2 + mean of log 2 pi f + 1): the Gaussian log-likelihood's limit
    log_density = torch.log(2 * math.pi * density).mean(1, keepdim=True)
    log_likelihood = -0.5 * count * (torch.log(2 * math.pi * variance) + log_density + 1)
    return _Profile(log_likelihood, 0.5 * variance.log(), torch.zeros_like(variance))


def _markov(x: Tensor, nodes: Tensor, known_mean: bool, num_processes: int) -> _Profile:
    count = len(x)
    noise = MarkovFractionalBrownianMotion(nodes, num_processes, max_speed=_FASTEST, horizon=float(count))
    both = torch.cat([torch.ones_like(x[:, :1]), x], -1).unsqueeze(-1).expand(-1, -1, len(nodes))
    times = torch.arange(1, count + 1, dtype=x.dtype)
    filtered = kalman_filter(LinearSDE(noise), times, both, 0.0, increments=True)
    white = filtered.innovation / filtered.innovation_variance.sqrt()  # (T, 1 + N, nodes)
    one, rest = white[:, :1], white[:, 1:]
    ones = None if known_mean else one.square().sum(0)
    logdet = filtered.innovation_variance.log().sum(0)
    profile = _profiled(ones, (one * rest).sum(0), rest.square().sum(0), logdet, count)
    return _Profile(*(part.mT for part in profile))


_FASTEST = 20.0  # per step: what is faster moves the covariance of increments by less than the weights' error


def _interpolation(u: Tensor, at: Tensor) -> Tensor:
    """Weights of the node values in the interpolating polynomial at points ``at``, ``(*at, nodes)`` (barycentric
    form).
    """
    k = torch.arange(len(u), dtype=u.dtype, device=u.device)
    barycentric = (-1) ** k * torch.sin(math.pi * (k + 0.5) / len(u))
    gap = at.unsqueeze(-1) - u
    gap = torch.where(gap.abs() < 1e-15, 1e-15, gap)
    weights = barycentric / gap
    return weights / weights.sum(-1, keepdim=True)


def _maximise(u: Tensor, table: Tensor) -> Tensor:
    """Where the polynomial through ``table`` ``(nodes, N)`` is largest on [-1, 1], ``(N,)``."""
    grid = torch.linspace(-1, 1, _SEARCH, dtype=u.dtype, device=u.device)
    place = (_interpolation(u, grid) @ table).argmax(0)
    step = grid[1] - grid[0]
    best = grid[place]
    inside = (place > 0) & (place < _SEARCH - 1)
    for _ in range(2):  # parabola through three points; twice, with a finer one
        low, mid, high = ((_interpolation(u, best + k * step) * table.mT).sum(-1) for k in (-1, 0, 1))
        bend = low - 2 * mid + high
        move = torch.where(inside & (bend < 0), 0.5 * step * (low - high) / torch.where(bend < 0, bend, -1.0), 0.0)
        best = (best + move.clamp(-step, step)).clamp(-1, 1)
        step = step / 4
    return best
