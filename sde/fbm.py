"""Fractional Brownian motion, fractional Gaussian noise and fractional Ornstein-Uhlenbeck processes, exactly.

Two motions, in two normalisations (see ``MarkovFractionalBrownianMotion`` for the approximation that solvers use):

* ``"mvn"``, type I, Mandelbrot-Van Ness: covariance (V/2) (s^2H + t^2H - |t - s|^2H), V = 1 (unit) or V_H (gamma);
* ``"rl"``, type II, Riemann-Liouville: int_0^t (t - s)^(H - 1/2) dW_s / Gamma(H + 1/2), times Gamma(H + 1/2) sqrt(2H)
  for unit variance at time 1.

B. B. Mandelbrot, J. W. Van Ness, *Fractional Brownian Motions, Fractional Noises and Applications*, SIAM Review 1968;
R. B. Davies, D. S. Harte, *Tests for Hurst effect*, Biometrika 1987 (circulant sampling).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sde._checks import (
    NormalSource,
    Times,
    as_count,
    as_hurst,
    as_kind,
    as_normalisation,
    as_number,
    as_numbers,
    as_positive,
    as_times,
    base_seed,
    stream,
)
from sde.noise import covariance_factor
from sde.special import backward_mean, forward_mean, mvn_variance, rl_hypergeometric, rl_variance, scaled_upper_gamma

__all__ = [
    "FractionalBrownianMotion",
    "FractionalOrnsteinUhlenbeck",
    "fractional_gaussian_noise",
    "increment_autocovariance",
    "motion_covariance",
    "ornstein_uhlenbeck_covariance",
]

_SERIES_UNTIL = 8.0  # speed times time: below, a difference of series; above, of scaled incomplete gamma functions
_CACHED = 2**16  # normals that are transformed at once: half a megabyte stays in a core's cache
_LAG_NODES = 160  # trapezoid nodes of the double-exponential rule for Riemann-Liouville noise


def motion_covariance(times: Tensor, hurst: Tensor, kind: str = "mvn", normalisation: str = "unit") -> Tensor:
    """Covariance of fractional Brownian motion over ``times``; differentiable in ``hurst``, nothing is checked.

    Args:
        times: non-negative, ``(T,)``.
        hurst: ``(*D,)``.

    Returns:
        ``(*D, T, T)``, of the precision of ``hurst``.
    """
    h = hurst[..., None, None]
    t, s = torch.maximum(times.unsqueeze(-1), times), torch.minimum(times.unsqueeze(-1), times)
    if as_kind(kind) == "mvn":
        covariance = (_power(t, 2 * h) + _power(s, 2 * h) - _power(t - s, 2 * h)) / 2
        return covariance if normalisation == "unit" else covariance * mvn_variance(h)
    # s^a t^(a-1) / (a Gamma(a)^2) 2F1(1 - a, 1; 1 + a; s / t); unit variance divides by 1 / (2H Gamma(a)^2).
    a = h + 0.5
    positive = torch.where(t > 0, t, 1.0)
    shape = _power(s, a) * positive ** (a - 1) * rl_hypergeometric(h, s / positive) / a
    return shape * (2 * h if normalisation == "unit" else torch.exp(-2 * torch.lgamma(a)))


def increment_autocovariance(
    hurst: Tensor, num_lags: int, step: float | Tensor = 1.0, normalisation: str = "unit"
) -> Tensor:
    """Autocovariance of fractional Gaussian noise, lags 0 to ``num_lags - 1``, ``(*D, num_lags)``; nothing is checked.

    At long lags |k+1|^2H - 2 |k|^2H + |k-1|^2H loses its digits; there the binomial series in 1 / k^2 is summed.
    """
    h = hurst.unsqueeze(-1)
    k = torch.arange(num_lags, dtype=hurst.dtype, device=hurst.device)
    direct = (_power(k + 1, 2 * h) - 2 * _power(k, 2 * h) + _power((k - 1).abs(), 2 * h)) / 2
    far = torch.where(k > 20, k, 21.0)
    # sum over even n of binomial(2H, n) k^(2H - n): eight terms leave 1e-17 beyond lag 20
    term, series = torch.ones_like(far * h), torch.zeros_like(far * h)
    for n in range(1, 17):
        term = term * (2 * h - n + 1) / n / far
        if n % 2 == 0:
            series = series + term
    covariance = torch.where(k > 20, series * far ** (2 * h), direct) * step ** (2 * h)
    return covariance if normalisation == "unit" else covariance * mvn_variance(h)


def fractional_gaussian_noise(
    hurst: float | Tensor | Sequence[float],
    num_steps: int,
    num_paths: int = 1,
    *,
    step: float = 1.0,
    normalisation: str = "unit",
    seed: int | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Draw stationary increments of fractional Brownian motion, exactly, by circulant embedding.

    Args:
        hurst: H in (0, 1), a number or ``(D,)``.
        num_steps: increments in a path, T.
        num_paths: paths.
        step: time between them; the variance of an increment is step^(2H) in unit normalisation.
        seed: integer seed; the same seed gives the same paths.
        generator: instead of a seed.

    Returns:
        ``(T, num_paths)``, or ``(T, num_paths, D)``; O(T log T) a path, differentiable in H.

    Raises:
        ValueError: H outside (0, 1), a count below 1, a step that is not positive.

    Example:
        >>> fractional_gaussian_noise(0.8, 100, 3, seed=0).shape
        torch.Size([100, 3])
    """
    value = as_hurst(hurst)
    steps, paths = as_count(num_steps, "num_steps"), as_count(num_paths, "num_paths")
    length = as_number(step, "step")
    size = _fast_length(steps)
    gamma = increment_autocovariance(value, size + 1, length, as_normalisation(normalisation))
    # The circulant's first row is the autocovariance there and back; it is positive semidefinite for every H in (0,
    # 1), so that negative eigenvalues are rounding.
    row = torch.cat([gamma, gamma[..., 1:-1].flip(-1)], -1)
    eigenvalues = torch.fft.rfft(row).real.clamp_min(0)  # (*D, size + 1)
    device = value.device
    source = NormalSource(base_seed(seed, generator), "circulant", dtype=dtype, device=device)
    safe = torch.where(eigenvalues > 0, eigenvalues, 1.0)
    scale = torch.where(eigenvalues > 0, (safe * size).sqrt(), 0.0)
    # Of a real path's spectrum the first and the last entry are real and carry twice the variance.
    scale = torch.stack([scale, scale], -1)
    ends = torch.ones_like(scale)
    ends[..., [0, -1], 0], ends[..., [0, -1], 1] = math.sqrt(2), 0.0
    scale, made = (scale * ends).to(dtype), []
    block = max(1, _CACHED // scale.numel())
    for first in range(0, paths, block):
        spectrum = torch.view_as_complex(source(min(block, paths - first), *scale.shape) * scale)
        made.append(torch.fft.irfft(spectrum, n=2 * size)[..., :steps])
    return torch.cat(made).movedim(-1, 0)


def _fast_length(size: int) -> int:
    """The smallest 2^i 3^j 5^k that is at least ``size``, for the FFT."""
    best = 1 << max(size - 1, 1).bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            rest = -(-size // three)
            best = min(best, three * (1 << max(rest - 1, 0).bit_length()))
            three *= 3
        five *= 5
    return best


class _ExactGaussian:
    """Sampling and density of a centred Gaussian process given by its covariance."""

    hurst: Tensor

    def covariance(self, times: Times) -> Tensor:
        raise NotImplementedError

    def sample(
        self,
        times: Times,
        num_paths: int,
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> Tensor:
        """Draw paths at any increasing times, exactly.

        Args:
            times: strictly increasing, ``(T,)``, from 0 or later.
            num_paths: paths.
            seed: integer seed; the same seed gives the same paths.
            generator: instead of a seed.

        Returns:
            ``(T, num_paths, *D)``; O(T^3) once and O(T^2) a path.
        """
        t = as_times(times).to(self.hurst.device)
        paths = as_count(num_paths, "num_paths")
        source = stream(base_seed(seed, generator), "cholesky", device=t.device)
        normals = torch.randn(*self.hurst.shape, len(t), paths, generator=source, dtype=dtype, device=t.device)
        values = _cholesky(self.covariance(t), t).to(dtype) @ normals
        return values.movedim(-2, 0).movedim(-1, 1)

    def log_prob(self, times: Times, values: Tensor | Sequence[Any], noise_std: float | Tensor = 0.0) -> Tensor:
        """Log-density of observed paths, with independent Gaussian errors; differentiable in H.

        Args:
            times: strictly increasing, ``(T,)``, and positive where there are no errors.
            values: ``(T, N)``, or ``(T, N, D)`` for ``(D,)`` indices.
            noise_std: standard deviation of the errors, not negative.

        Returns:
            ``(N,)``, summed over dimensions.
        """
        t = as_times(times).to(self.hurst.device)
        values = as_numbers(values, "values")
        if values.shape[:1] != t.shape or values.ndim != 2 + self.hurst.ndim:
            raise ValueError(
                f"values must be (T, N{', D' * self.hurst.ndim}) with T={len(t)}, got {tuple(values.shape)}"
            )
        noise = as_positive(noise_std, "noise_std", zero=True) if not isinstance(noise_std, Tensor) else noise_std
        if float(t[0]) == 0 and not isinstance(noise_std, Tensor) and float(noise) == 0:
            raise ValueError("times must be positive where values have no error: at time 0 every path is 0")
        covariance = self.covariance(t) + noise**2 * torch.eye(len(t), dtype=torch.float64, device=t.device)
        residual = values.movedim(0, -1).movedim(0, -1)  # (*D, T, N)
        factor = torch.linalg.cholesky(covariance)
        white = torch.linalg.solve_triangular(factor, residual, upper=False)
        logdet = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        density = -0.5 * white.square().sum(-2) - logdet.unsqueeze(-1) - 0.5 * len(t) * math.log(2 * math.pi)
        return density if density.ndim == 1 else density.sum(0)


class FractionalBrownianMotion(_ExactGaussian):
    """Exact fractional Brownian motion.

    Args:
        hurst: H in (0, 1), a number or ``(D,)`` for independent dimensions; differentiable.
        kind: ``"mvn"`` or 1 (Mandelbrot-Van Ness), ``"rl"`` or 2 (Riemann-Liouville).
        normalisation: ``"unit"`` or ``"gamma"``.

    Example:
        >>> FractionalBrownianMotion(0.3).sample([0.5, 1.0], num_paths=2, seed=0).shape
        torch.Size([2, 2])
    """

    def __init__(
        self, hurst: float | Tensor | Sequence[float], kind: str | int = "mvn", normalisation: str = "unit"
    ) -> None:
        self.hurst = as_hurst(hurst)
        self.kind = as_kind(kind)
        self.normalisation = as_normalisation(normalisation)

    def covariance(self, times: Times) -> Tensor:
        """``(*D, T, T)``, float64."""
        return motion_covariance(as_times(times).to(self.hurst.device), self.hurst, self.kind, self.normalisation)

    def sample(
        self,
        times: Times,
        num_paths: int,
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> Tensor:
        """Draw paths, ``(T, num_paths, *D)``: by circulant embedding where type I meets a uniform grid from 0 (O(T log
        T) a path), by Cholesky elsewhere.

        Raises:
            ValueError: for times that are unsorted, repeated or negative.
        """
        t = as_times(times)
        steps = t.diff(prepend=t.new_zeros(1))
        inner = steps[1:] if float(t[0]) == 0 else steps
        uniform = len(inner) > 0 and bool(((inner - inner[0]).abs() <= 1e-9 * inner[0]).all())
        if self.kind != "mvn" or not uniform:
            return super().sample(t, num_paths, seed=seed, generator=generator, dtype=dtype)
        step = float(t[-1]) / len(inner)
        noise = fractional_gaussian_noise(
            self.hurst, len(inner), num_paths, step=step, normalisation=self.normalisation,
            seed=seed, generator=generator, dtype=dtype,
        )  # fmt: skip
        path = noise.cumsum(0)
        return path if float(t[0]) > 0 else torch.cat([torch.zeros_like(path[:1]), path])


class FractionalOrnsteinUhlenbeck(_ExactGaussian):
    """Exact fractional Ornstein-Uhlenbeck process dX = -theta X dt + dB, X_0 = 0 (add x0 e^(-theta t) for another
    start).

    Started at 0: neither the stationary process nor that conditioned on X_0 = 0, whose laws differ for H other than
    1/2.

    Args:
        hurst: H in (0, 1), a number or ``(D,)``.
        theta: mean reversion, not negative, in 1 / time, a number or ``(D,)``.
        kind: of B, as in ``FractionalBrownianMotion``.
        normalisation: of B.
    """

    def __init__(
        self,
        hurst: float | Tensor | Sequence[float],
        theta: float | Tensor | Sequence[float],
        kind: str | int = "mvn",
        normalisation: str = "unit",
    ) -> None:
        value, rate = as_hurst(hurst), as_positive(theta, "theta", zero=True)
        self.hurst, self.theta = torch.broadcast_tensors(value, rate.to(value.device))
        self.kind = as_kind(kind)
        self.normalisation = as_normalisation(normalisation)

    def covariance(self, times: Times) -> Tensor:
        """``(*D, T, T)``, float64."""
        t = as_times(times).to(self.hurst.device)
        return ornstein_uhlenbeck_covariance(t, self.hurst, self.theta, self.kind, self.normalisation)


def ornstein_uhlenbeck_covariance(
    times: Tensor, hurst: Tensor, theta: Tensor, kind: str = "mvn", normalisation: str = "unit"
) -> Tensor:
    """Covariance of the fractional Ornstein-Uhlenbeck process from 0; differentiable, nothing is checked.

    Type I, s <= t: integrating the double stochastic integral by parts in the lag leaves, with b = 2H,
    L(x) = int_0^x w^(b-1) e^(-theta w) dw and U the same with e^(+theta w),

        Cov = H/2 { e^(-theta(t-s)) [L(s) - U(t-s)] + e^(-theta(s+t)) [U(s) + U(t)] + e^(theta(t-s)) [L(t) - L(t-s)] },

    valid for every H in (0, 1).  Type II: int_0^s k(x) k(x + t - s) dx by quadrature, k the response of X to the noise.

    Args:
        times: non-negative, ``(T,)``.
        hurst: ``(*D,)``.
        theta: ``(*D,)``.

    Returns:
        ``(*D, T, T)``.
    """
    if as_kind(kind) == "rl":
        return _rl_ornstein_uhlenbeck(times, hurst, theta, normalisation)
    b, th = 2 * hurst[..., None], theta[..., None]
    grid = times.expand(*hurst.shape, -1)
    lower, upper = _lower(grid, b, th), _power(grid, b) * backward_mean(b, th * grid)  # L(t) and e^(-theta t) U(t)
    b2, th2 = b[..., None], th[..., None]
    t, s = torch.maximum(times.unsqueeze(-1), times), torch.minimum(times.unsqueeze(-1), times)
    lag = t - s
    first = times.unsqueeze(-1) <= times  # is the row's time the earlier one?

    def earlier(f: Tensor) -> Tensor:
        return torch.where(first, f.unsqueeze(-1), f.unsqueeze(-2))

    def later(f: Tensor) -> Tensor:
        return torch.where(first, f.unsqueeze(-2), f.unsqueeze(-1))

    scaled_lag = _power(lag, b2) * backward_mean(b2, th2 * lag)  # e^(-theta lag) U(lag)
    rest = torch.exp(-th2 * lag) * earlier(lower) - scaled_lag
    ends = torch.exp(-th2 * t) * earlier(upper) + torch.exp(-th2 * s) * later(upper)
    # e^(theta lag) [L(t) - L(lag)]: a difference of lower integrals overflows for large theta, one of upper integrals
    # cancels for small theta.
    small = th2 * t <= _SERIES_UNTIL
    lag_small = torch.where(small, lag, 0.0)
    below = torch.exp(th2 * lag_small) * (later(lower) - _lower(lag_small, b2, th2))
    th_safe = torch.where(small, 1.0, th2)
    t_safe, lag_safe = torch.where(small, 1.0, t), torch.where(small, 1.0, lag)
    above = _upper(lag_safe, b2, th_safe) - torch.exp(-th_safe * s) * _upper(t_safe, b2, th_safe)
    covariance = b2 / 4 * (rest + ends + torch.where(small, below, above))
    return covariance if normalisation == "unit" else covariance * mvn_variance(hurst)[..., None, None]


def _power(x: Tensor, exponent: Tensor) -> Tensor:
    """x^exponent for x >= 0, with the derivative 0 in the exponent at x = 0."""
    return torch.where(x > 0, torch.where(x > 0, x, 1.0) ** exponent, 0.0)


def _lower(x: Tensor, b: Tensor, theta: Tensor) -> Tensor:
    return _power(x, b) * forward_mean(b, theta * x)


def _upper(x: Tensor, b: Tensor, theta: Tensor) -> Tensor:
    """e^(theta x) int_x^inf w^(b-1) e^(-theta w) dw."""
    z = theta * x
    positive = torch.where(z > 0, z, 1.0)
    value = torch.where(z > 0, scaled_upper_gamma(b, positive), 1.0)
    return torch.exp(torch.lgamma(b) - b * torch.log(theta)) * value


def _rl_ornstein_uhlenbeck(times: Tensor, hurst: Tensor, theta: Tensor, normalisation: str) -> Tensor:
    """int_0^s k(x) k(x + lag) dx with x = s e^(-v): a small lag, which is a near-singularity at x = -lag, is harmless
    in log x, and v = exp(y - e^(-y)) makes the rule double-exponential at both ends.
    """
    a, th = (hurst + 0.5)[..., None, None, None], theta[..., None, None, None]
    y = torch.linspace(-4.2, 6.6, _LAG_NODES, dtype=times.dtype, device=times.device)
    v = torch.exp(y - torch.exp(-y))
    weight = v * (1 + torch.exp(-y)) * (y[1] - y[0])
    t, s = torch.maximum(times.unsqueeze(-1), times), torch.minimum(times.unsqueeze(-1), times)
    shrink = torch.exp(-v)

    def response(x: Tensor) -> Tensor:
        z = th * x
        return _power(x, a - 1) * (1 - z * backward_mean(a, z))

    early = times.unsqueeze(-1) * shrink  # (T, q)
    left = response(early)  # (*D, 1, T, q)
    rows = []
    for i in range(len(times)):  # one row of the matrix at a time: (T, T, q) at once is gigabytes for long grids
        x = s[i].unsqueeze(-1) * shrink
        index = torch.minimum(torch.arange(len(times), device=times.device), torch.tensor(i, device=times.device))
        shifted = response((x + (t[i] - s[i]).unsqueeze(-1)).unsqueeze(0))
        rows.append((left[..., index, :] * shifted * x * weight).sum(-1))
    covariance = torch.cat(rows, -2)
    gamma = torch.exp(-2 * torch.lgamma(hurst + 0.5))[..., None, None]
    covariance = covariance * gamma
    return covariance if normalisation == "gamma" else covariance / rl_variance(hurst)[..., None, None]


def _cholesky(covariance: Tensor, times: Tensor) -> Tensor:
    """A factor of a covariance whose first row may be the zero of time 0; by eigenvalues where Cholesky fails."""
    zero = float(times[0]) == 0
    body = covariance[..., 1:, 1:] if zero else covariance
    if body.shape[-1]:
        factor, info = torch.linalg.cholesky_ex(body)
        body = covariance_factor(body) if bool((info > 0).any()) else factor
    return torch.nn.functional.pad(body, (1, 0, 1, 0)) if zero else body
