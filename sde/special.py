"""Special functions of fractional noise, differentiable in every argument.

``torch.special.gammainc`` has no derivative in its first argument, where the Hurst index stands, so what is needed is
summed here: series of positive terms for small arguments, Legendre's continued fraction or the asymptotic series for
large ones.  All of them are meant for float64.  Letters as in the literature: a = H + 1/2, z = speed times time, P and
Q the regularised lower and upper incomplete gamma functions.
"""

import math

import torch
from torch import Tensor

__all__ = [
    "backward_mean",
    "forward_mean",
    "mvn_projection",
    "mvn_variance",
    "phi2",
    "rl_hypergeometric",
    "rl_variance",
    "scaled_upper_gamma",
]

_FRACTION_FROM = 8.0  # at z = 8 both sides of the switch hold 13 digits
_FRACTION_LEVELS = 24
_GAMMA_TERMS = 72  # z + 8 sqrt(z) + 40 at z = 8
_ASYMPTOTIC_FROM = 36.0  # where the smallest term of the asymptotic series, about exp(-z), is below rounding
_MEAN_TERMS = 126  # z + 8 sqrt(z) + 42 at z = 36


def phi2(z: Tensor) -> Tensor:
    """(z + expm1(-z)) / z^2 for z >= 0, exact at 0, where the naive form loses every digit."""
    small = z < 0.1
    zs = torch.where(small, z, 0.0)
    series = torch.zeros_like(zs)
    for n in range(11, 1, -1):
        series = 1 / math.factorial(n) - zs * series
    zl = torch.where(small, 1.0, z)
    return torch.where(small, series, (zl + torch.expm1(-zl)) / zl**2)


def mvn_variance(hurst: Tensor) -> Tensor:
    """V_H = 1 / (Gamma(2H + 1) sin(pi H)): the variance at time 1 of Mandelbrot-Van Ness motion, gamma
    normalisation.
    """
    return torch.exp(-torch.lgamma(2 * hurst + 1)) / torch.sin(math.pi * hurst)


def rl_variance(hurst: Tensor) -> Tensor:
    """1 / (2H Gamma(H + 1/2)^2): the variance at time 1 of Riemann-Liouville motion, gamma normalisation."""
    return torch.exp(-2 * torch.lgamma(hurst + 0.5)) / (2 * hurst)


def _entire_gamma(a: Tensor, z: Tensor) -> Tensor:
    """sum_n z^n / Gamma(a + 1 + n) = z^(-a) e^z P(a, z), for 0 <= z <= 8."""
    n = torch.arange(_GAMMA_TERMS, dtype=z.dtype, device=z.device)
    return (z.unsqueeze(-1) ** n * torch.exp(-torch.lgamma(a.unsqueeze(-1) + 1 + n))).sum(-1)


def scaled_upper_gamma(a: Tensor, z: Tensor) -> Tensor:
    """e^z Q(a, z) for 0 < a < 2 and z > 0, without the overflow of e^z."""
    a, z = torch.broadcast_tensors(a, z)
    # The series is e^z minus nearly e^z: the switch lies earlier than elsewhere, at the price of more levels.
    large = z > 2
    zs, zl = torch.where(large, 1.0, z), torch.where(large, z, 4.0)
    series = torch.exp(zs) - zs**a * _entire_gamma(a, zs)
    return torch.where(large, _fraction(a, zl, levels=3 * _FRACTION_LEVELS), series)


def _fraction(a: Tensor, z: Tensor, levels: int = _FRACTION_LEVELS) -> Tensor:
    """Legendre's continued fraction of e^z Q(a, z), from its innermost level outwards (error about e^(-4 sqrt(nz)))."""
    tail = z
    for n in range(levels, 0, -1):
        tail = z + (n - a) / (1 + n / tail)
    return torch.exp(a * torch.log(z) - torch.lgamma(a)) / tail


def mvn_projection(a: Tensor, z: Tensor) -> Tensor:
    """T^(-a-1) int_0^T E[B_t (Y_t - Y_0)] dt for Mandelbrot-Van Ness motion B and Y of speed z / T, stationary.

    For small z it is sum_n z^n / Gamma(a + 2 + n) - 2 z^(-a-1) (sinh z - z), for large z
    2 z^(-a) - 1 / (z Gamma(a + 1)) + (e^(-z) - e^z Q(a, z)) z^(-a-1).
    """
    a, z = torch.broadcast_tensors(a, z)
    large = z > _FRACTION_FROM
    zs, zl = torch.where(large, 1.0, z), torch.where(large, z, 2 * _FRACTION_FROM)
    odd = torch.arange(3, _GAMMA_TERMS, 2, dtype=z.dtype, device=z.device)
    # z^(-a-1) (sinh z - z) starts with z^(2-a) / 6: the power is split off so that z = 0 is exact.
    sinh = (zs.unsqueeze(-1) ** (odd - 3) * torch.exp(-torch.lgamma(odd + 1))).sum(-1)
    series = _entire_gamma(a + 1, zs) - 2 * sinh * zs ** (2 - a)
    tail = (torch.exp(-zl) - _fraction(a, zl)) * zl ** (-a - 1)
    return torch.where(large, 2 * zl ** (-a) - torch.exp(-torch.lgamma(a + 1)) / zl + tail, series)


def rl_hypergeometric(hurst: Tensor, x: Tensor) -> Tensor:
    """2F1(1/2 - H, 1; H + 3/2; x) for 0 <= x <= 1: the shape of the Riemann-Liouville covariance.

    Above x = 1/2 the connection formula to 1 - x is used; its poles at H = 1/2 cancel after the duplication formula of
    the Gamma function, which leaves
    (a / 2H) [1 + 1/2 sum_n (p+1)_n / (2p+1)_n y^(n+1)] - y^(2H) x^(-a) Gamma(1+a) 2^(-2H-1) Gamma(1-H) / (H sqrt(pi))
    with a = H + 1/2, p = 1/2 - H, y = 1 - x.
    """
    hurst, x = torch.broadcast_tensors(hurst, x)
    a, p = hurst + 0.5, 0.5 - hurst
    near = x > 0.5
    xf, xn = torch.where(near, 0.0, x), torch.where(near, x, 1.0)
    terms = 56  # 2^-56: both series have ratios below 1/2
    far = torch.ones_like(xf)
    for n in range(terms, -1, -1):
        far = 1 + (p + n) / (1 + a + n) * xf * far
    y = 1 - xn
    inner = torch.ones_like(y)
    for n in range(terms, -1, -1):
        inner = 1 + (p + 1 + n) / (2 * p + 1 + n) * y * inner
    y_positive = torch.where(y > 0, y, 1.0)
    power = torch.where(y > 0, y_positive ** (2 * hurst), 0.0)
    log_factor = torch.lgamma(1 + a) + torch.lgamma(1 - hurst) - (2 * hurst + 1) * math.log(2) - 0.5 * math.log(math.pi)
    close = a / (2 * hurst) * (1 + 0.5 * y * inner) - power * xn ** (-a) * torch.exp(log_factor) / hurst
    return torch.where(near, close, far)


def backward_mean(b: Tensor, z: Tensor) -> Tensor:
    """int_0^1 w^(b-1) e^(-z (1-w)) dw for b > 0 and z >= 0."""
    b, z = torch.broadcast_tensors(b, z)
    large = z > _ASYMPTOTIC_FROM
    zs, zl = torch.where(large, 0.0, z), torch.where(large, z, 2 * _ASYMPTOTIC_FROM)
    # sum_n z^n / ((b + n) n!), nested
    series = 1 / (b + _MEAN_TERMS)
    for n in range(_MEAN_TERMS - 1, -1, -1):
        series = 1 / (b + n) + zs / (n + 1) * series
    asymptotic = torch.ones_like(zl)
    for n in range(int(_ASYMPTOTIC_FROM), 0, -1):
        asymptotic = 1 + (n - b) / zl * asymptotic
    return torch.where(large, asymptotic / zl, torch.exp(-zs) * series)


def forward_mean(b: Tensor, z: Tensor) -> Tensor:
    """int_0^1 w^(b-1) e^(-z w) dw for b > 0 and z >= 0."""
    b, z = torch.broadcast_tensors(b, z)
    large = z > _ASYMPTOTIC_FROM
    zs, zl = torch.where(large, 0.0, z), torch.where(large, z, 2 * _ASYMPTOTIC_FROM)
    # sum_n z^n Gamma(b) / Gamma(b + n + 1), nested
    series = torch.ones_like(zs)
    for n in range(_MEAN_TERMS, 0, -1):
        series = 1 + zs / (b + n) * series
    gamma = torch.exp(torch.lgamma(b) - b * torch.log(zl))
    upper = torch.exp(-zl) * scaled_upper_gamma(b, zl)
    return torch.where(large, gamma * (1 - upper), torch.exp(-zs) * series / b)
