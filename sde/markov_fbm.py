"""Markov approximation of fractional Brownian motion by Ornstein-Uhlenbeck processes (MA-fBM).

B_t is replaced by Bhat_t = sum_k w_k (Y_k(t) - Y_k(0)) with the weights that minimise int_0^T E (B_t - Bhat_t)^2 dt,
which solve A w = b in closed form.

R. Daems, M. Opper, G. Crevecoeur, T. Birdal, *Variational Inference for SDEs Driven by Fractional Noise*, ICLR 2024,
arXiv 2310.12975.  Where this differs from the authors' code: everything is solved in float64 (A has condition numbers
up to 1e12), the error is c - b'w with the right constant c for type I, and type I has the better ``hybrid`` start.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sde._checks import (
    NoiseWarning,
    Normalisation,
    as_count,
    as_hurst,
    as_kind,
    as_normalisation,
    as_number,
    as_positive,
)
from sde.grids import geometric_speeds, horizon_speeds
from sde.noise import MarkovNoise, covariance_factor
from sde.ornstein_uhlenbeck import stationary_covariance
from sde.past import PastProjection
from sde.special import mvn_projection, mvn_variance, phi2, rl_variance

__all__ = ["ErrorReport", "MarkovFractionalBrownianMotion", "MultifractionalMotion"]

Start = Literal["stationary", "hybrid", "zero"]

_ERROR_WORTH_A_WARNING = 0.02  # relative, in the mean square over [0, T]
_EIGENVALUE_FLOOR = 1e-15  # below it an eigenvalue of the scaled A is rounding, and its direction is left out
_SINGULAR_FLOOR = 1e-13  # the same for singular values, of which the eigenvalues are squares
# On grids other than the paper's: what lies between the floors would lower the error by 1 % at weights of 1e9, whose
# cancellation leaves covariances and paths without a digit.
_USEFUL_FLOOR = 1e-8
_LARGEST_WEIGHT = 1e6  # its square times rounding is the error of a covariance: 1e-4
_REACH, _SPACING = 6.0, 0.04  # of the quadrature of the Riemann-Liouville kernel
# Default speeds times horizon: with seven processes an error below 2 % for every H above 0.2, and weights of order 1.
_BOTTOM, _TOP = 0.3, 500.0


class ErrorReport(NamedTuple):
    """How far the approximation is from the noise it stands for.

    Attributes:
        relative_error: int_0^T E (B - Bhat)^2 dt / int_0^T E B^2 dt, of H's shape.
        variance_ratio: Var Bhat(T) / Var B(T), of H's shape.
        max_weight: the largest absolute weight: large ones cancel and cost digits in float32.
        condition: condition number of A as the paper has it.
        speeds: ``(K,)``.
        advice: what to change, empty where nothing needs to.
    """

    relative_error: Tensor
    variance_ratio: Tensor
    max_weight: Tensor
    condition: float
    speeds: Tensor
    advice: str


class _RiemannLiouvilleWeights:
    """Optimal weights for horizon 1 without a past: least squares of kernels, set up once for all H.

    A_ij = int_0^1 (1 - r) e^(-(z_i + z_j) r) dr has condition numbers up to 1e16 and more, so A w = b is not formed:
    with a quadrature of r, A = E'E and b = E'y for E = exponentials and y = the kernel r^(a-1) / Gamma(a), both times
    the roots of the weights, and w is the least-squares solution of E w = y, which has the root of A's condition
    number.
    """

    def __init__(self, z: Tensor, floor: float) -> None:
        # Tanh-sinh nodes: r^(2H-1), singular at 0, to 1e-11 for H >= 0.02.
        y = torch.arange(-_REACH, _REACH + _SPACING / 2, _SPACING, dtype=z.dtype)
        x = math.pi * torch.sinh(y)
        self._log_r = -torch.nn.functional.softplus(-x)
        r = torch.exp(self._log_r)
        self._root = (_SPACING * math.pi * torch.cosh(y) * r).sqrt() * torch.sigmoid(-x)  # (1 - r) from 1 - r and dr
        basis = torch.exp(-r.unsqueeze(-1) * z) * self._root.unsqueeze(-1)
        self._left, values, right = torch.linalg.svd(basis, full_matrices=False)
        kept = values > floor * values[0]
        self.dropped = int((~kept).sum())
        self.condition = float((values[0] / values[-1]) ** 2)
        self._left = self._left[:, kept]
        self._right = right[kept].mT / values[kept]

    def to(self, device: torch.device) -> "_RiemannLiouvilleWeights":
        return _moved(self, device)

    def solve(self, hurst: Tensor) -> tuple[Tensor, Tensor]:
        """Weights, ``(*H, K)``, and int_0^1 E (B - Bhat)^2 dt, ``(*H,)``, gamma normalisation."""
        h = hurst.unsqueeze(-1)
        kernel = torch.exp((h - 0.5) * self._log_r - torch.lgamma(h + 0.5)) * self._root
        inside = kernel @ self._left
        return inside @ self._right.mT, (kernel - inside @ self._left.mT).square().sum(-1)


class _MandelbrotVanNessWeights:
    """Optimal weights for horizon 1 of stationary processes: A w = b in closed form, A decomposed once for all H."""

    def __init__(self, z: Tensor) -> None:
        pair = z.unsqueeze(-1) + z
        both = z * phi2(z)
        still = pair == 0  # two Brownian motions: t integrates to 1/2, the limit of the quotient
        gram = torch.where(still, 0.5, (both.unsqueeze(-1) + both) / torch.where(still, 1.0, pair))
        self._z = z
        self._root = gram.diagonal().rsqrt()  # equal diagonals halve the digits that the solve loses
        values, self._vectors = torch.linalg.eigh(gram * self._root * self._root.unsqueeze(-1))
        kept = values > _EIGENVALUE_FLOOR * values[-1]
        self._inverse = torch.where(kept, 1 / torch.where(kept, values, 1.0), 0.0)
        self.dropped = int((~kept).sum())
        self.condition = float(torch.linalg.cond(gram))

    def to(self, device: torch.device) -> "_MandelbrotVanNessWeights":
        return _moved(self, device)

    def solve(self, hurst: Tensor) -> tuple[Tensor, Tensor]:
        """Weights, ``(*H, K)``, and int_0^1 E (B - Bhat)^2 dt, ``(*H,)``, gamma normalisation."""
        b = mvn_projection(hurst.unsqueeze(-1) + 0.5, self._z)
        # The products are kept apart: a formed inverse of A would lose the directions of its small eigenvalues.
        weights = ((b * self._root) @ self._vectors * self._inverse) @ self._vectors.mT * self._root
        return weights, mvn_variance(hurst) / (2 * hurst + 1) - (b * weights).sum(-1)


_Weights = _RiemannLiouvilleWeights | _MandelbrotVanNessWeights


def _moved(weights: Any, device: torch.device) -> Any:
    """A copy whose tensors are on ``device``."""
    other = copy(weights)
    other.__dict__.update({k: v.to(device) for k, v in weights.__dict__.items() if isinstance(v, Tensor)})
    return other


class MarkovFractionalBrownianMotion(MarkovNoise):
    """Fractional Brownian motion as a weighted sum of Ornstein-Uhlenbeck processes driven by one Brownian motion.

    Args:
        hurst: H in (0, 1): a number, or a tensor ``()`` (shared by all dimensions) or ``(D,)`` (one each), which may
            require grad: weights, covariances and samples are differentiable in it.
        num_processes: K.
        max_speed: the fastest speed, in 1 / time; by default 20 on the geometric grid, and 500 / horizon otherwise.
        horizon: T, up to which the weights are optimal and the noise may be used.
        kind: ``"mvn"`` or 1 (Mandelbrot-Van Ness: stationary increments), ``"rl"`` or 2 (Riemann-Liouville: no past).
        normalisation: ``"unit"`` (variance t^(2H), so that H doesn't change the scale) or ``"gamma"`` (the literature's
            integral over dW with 1 / Gamma(H + 1/2); variance 1 / (Gamma(2H+1) sin(pi H)) or 1 / (2H Gamma(H+1/2)^2)
            at 1).
        grid: ``"horizon"`` (geometric between 0.3 / T and the fastest speed), ``"geometric"`` (the paper's, from
            1 / max_speed to max_speed), or the speeds themselves, ``(K,)``.
        start: how the past of ``"mvn"`` is made. ``"stationary"``, the paper's: Y(0) has the processes' stationary law,
            and the weights fit future and past at once. ``"hybrid"``: the weights are those of ``"rl"``, and the
            independent smooth process of the past is projected on the same exponentials; its mean-square error is
            below the paper's on every grid that was measured. ``"auto"``: stationary on the geometric grid, which is
            the paper's construction, and hybrid elsewhere.

    Raises:
        ValueError: H outside (0, 1), fewer than one process, speeds not positive, unknown names.

    Warns:
        NoiseWarning: the weights are so large that covariances and paths lose their digits (many processes on the
            geometric grid).

    Example:
        >>> noise = MarkovFractionalBrownianMotion(0.7, horizon=2.0)
        >>> noise.sample([0.5, 1.0, 2.0], num_paths=4, seed=0).shape
        torch.Size([3, 4])
    """

    def __init__(
        self,
        hurst: float | Tensor | Sequence[float],
        num_processes: int = 7,
        max_speed: float | None = None,
        horizon: float = 1.0,
        kind: str | int = "mvn",
        normalisation: str = "unit",
        grid: str | Tensor | Sequence[float] = "horizon",
        start: str = "auto",
    ) -> None:
        value = as_hurst(hurst)
        self.kind = as_kind(kind)
        self.normalisation: Normalisation = as_normalisation(normalisation)
        self.horizon = as_number(horizon, "horizon")
        count = as_count(num_processes, "num_processes")
        if not isinstance(grid, str):
            self.grid = "custom"
            self.speeds = as_positive(grid, "grid", zero=True).detach().cpu()
            if self.speeds.ndim != 1 or bool((self.speeds.diff() <= 0).any()):
                raise ValueError("grid must be a vector of strictly increasing speeds")
        elif grid == "geometric":
            self.grid = grid
            self.speeds = geometric_speeds(count, 20.0 if max_speed is None else max_speed)
        elif grid == "horizon":
            self.grid = grid
            top = _TOP if max_speed is None else as_number(max_speed, "max_speed") * self.horizon
            if top <= _BOTTOM:
                raise ValueError(
                    f"max_speed must exceed {_BOTTOM:g} / horizon = {_BOTTOM / self.horizon:g}, where the speeds "
                    f"begin, got {max_speed:g}"
                )
            self.speeds = horizon_speeds(count, self.horizon, _BOTTOM, top)
        else:
            raise ValueError(f"grid must be 'horizon', 'geometric' or a vector of speeds, got {grid!r}")
        self.start = self._start(start)
        z, floor = self.speeds * self.horizon, _SINGULAR_FLOOR if self.grid == "geometric" else _USEFUL_FLOOR
        rule = _MandelbrotVanNessWeights(z) if self.start == "stationary" else _RiemannLiouvilleWeights(z, floor)
        self._projection: _Weights = rule.to(value.device)
        self._past = None if self.start != "hybrid" else PastProjection.build(self.speeds, self.horizon)
        self._update(value)
        self.warn_of_cancelling()

    def warn_of_cancelling(self) -> None:
        """Warn where the weights at this H cancel beyond rounding."""
        if self._cancelling():
            warnings.warn(self._cancelling(), NoiseWarning, stacklevel=3)

    def _cancelling(self) -> str:
        """What to say of weights that cancel beyond rounding; nothing where they don't."""
        largest = float(self.weights.detach().abs().max())
        if largest <= _LARGEST_WEIGHT:
            return ""
        return (
            f"weights up to {largest:.1g} cancel, and with them the digits of covariances and paths: take fewer than "
            f"{self.num_processes} processes, a larger max_speed, or grid='horizon'"
        )

    def _start(self, start: str) -> Start:
        if start not in ("auto", "stationary", "hybrid"):
            raise ValueError(f"start must be 'auto', 'stationary' or 'hybrid', got {start!r}")
        if self.kind == "rl":
            if start != "auto":
                raise ValueError(f"start={start!r} is for kind='mvn': Riemann-Liouville motion has no past")
            return "zero"
        if start == "auto":
            return "stationary" if self.grid == "geometric" else "hybrid"
        return "hybrid" if start == "hybrid" else "stationary"

    def _update(self, hurst: Tensor) -> None:
        self.hurst = hurst
        weights = self.weights_at(hurst)
        if self._past is not None:
            # State k is w_k Y_k here, so that a weight that passes through 0 divides nothing.
            length = self._scale(hurst) * self.horizon**0.5  # a path scales by T^H, a weight by T^(H - 1/2)
            factor = self._past.to(hurst.device).factor(hurst) * length[..., None, None]
            self._set(torch.ones_like(weights), weights, factor, self.horizon)
        elif self.start == "stationary":
            factor = covariance_factor(stationary_covariance(self.speeds)).to(hurst.device)
            self._set(weights, None, factor.expand(*hurst.shape, -1, -1), self.horizon)
        else:
            self._set(weights, None, None, self.horizon)

    def _scale(self, hurst: Tensor) -> Tensor:
        """From horizon 1 and gamma normalisation to this noise: w(H, g/s, sT) = s^(H - 1/2) w(H, g, T)."""
        scale = self.horizon ** (hurst - 0.5)
        if self.normalisation == "unit":
            scale = scale * (mvn_variance if self.kind == "mvn" else rl_variance)(hurst).rsqrt()
        return scale

    def with_hurst(self, hurst: Tensor) -> "MarkovFractionalBrownianMotion":
        """The same noise at another H, for a training loop: nothing but the weights is computed, nothing is checked.

        Args:
            hurst: ``()`` or ``(D,)``, inside (0, 1), for example a sigmoid's output; its device is the noise's.
        """
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._projection = self._projection.to(hurst.device)
        other._update(hurst.to(torch.float64))
        return other

    def weights_at(self, hurst: Tensor) -> Tensor:
        """Optimal weights for every entry of ``hurst``, ``(*H, K)``, float64, differentiable; nothing is checked."""
        return self._projection.solve(hurst)[0] * self._scale(hurst).unsqueeze(-1)

    @property
    def relative_error(self) -> Tensor:
        """int_0^T E (B - Bhat)^2 dt / int_0^T E B^2 dt, of H's shape, float64; does not depend on the normalisation."""
        variance = mvn_variance if self.kind == "mvn" else rl_variance
        error = self._projection.solve(self.hurst)[1]
        if self._past is not None:
            error = error + self._past.to(self.hurst.device).error(self.hurst)
        return error * (2 * self.hurst + 1) / variance(self.hurst)

    @property
    def error(self) -> Tensor:
        """int_0^T E (B - Bhat)^2 dt in this noise's normalisation, of H's shape, float64."""
        power = self.horizon ** (2 * self.hurst + 1) / (2 * self.hurst + 1)
        if self.normalisation == "gamma":
            power = power * (mvn_variance if self.kind == "mvn" else rl_variance)(self.hurst)
        return self.relative_error * power

    def report(self) -> ErrorReport:
        """Error, conditioning and advice; warns above a relative error of 2 %.

        Warns:
            NoiseWarning: where the approximation is poor, or more processes than the range of speeds carries were
            asked.
        """
        with torch.no_grad():
            error = self.relative_error
            full = self.horizon ** (2 * self.hurst)
            if self.normalisation == "gamma":
                full = full * (mvn_variance if self.kind == "mvn" else rl_variance)(self.hurst)
            ratio = self.covariance([self.horizon])[..., 0, 0] / full
            largest = self.weights.abs().max()
        advice = []
        if float(error.max()) > _ERROR_WORTH_A_WARNING:
            wider = "a larger max_speed with more processes"
            what = f"start='hybrid' or {wider}" if self.start == "stationary" else wider
            advice.append(f"relative error {float(error.max()):.3g} at H={float(self.hurst.max()):.2g}: try {what}")
        if self._projection.dropped:
            advice.append(
                f"{self._projection.dropped} of {self.num_processes} directions of the weights are below rounding "
                f"(condition number {self._projection.condition:.1g}): fewer processes do the same"
            )
        if self._cancelling():
            advice.append(self._cancelling())
        if advice:
            warnings.warn("; ".join(advice), NoiseWarning, stacklevel=2)
        return ErrorReport(error, ratio, largest, self._projection.condition, self.speeds, "; ".join(advice))


class MultifractionalMotion(MarkovNoise):
    """Riemann-Liouville motion whose Hurst index changes with time: X_t = sum_k w_k(H(t)) Y_k(t).

    Locally X is as rough as fractional Brownian motion of index H(t).  Its increments, sum_k w_k dY_k plus
    sum_k (d/dt w_k(H(t))) Y_k dt, come out of the solvers exactly: they difference X itself.

    Args:
        hurst: a function from times ``(T,)`` to indices ``(T,)`` or ``(T, D)`` in (0, 1), differentiable in its own
            parameters; its output is not checked.
        base: a Riemann-Liouville approximation that gives speeds, horizon and normalisation.
        dims: ``()`` or ``(D,)``, as in the output of ``hurst``.
    """

    constant_loadings = False

    def __init__(
        self,
        hurst: Callable[[Tensor], Tensor],
        base: MarkovFractionalBrownianMotion,
        dims: tuple[int, ...] = (),
    ) -> None:
        if base.kind != "rl":
            raise ValueError(f"base must have kind='rl', which has no past to correlate with, got {base.kind!r}")
        self.hurst_at, self._base = hurst, base
        ones = base.weights.new_ones(*dims, base.num_processes)
        super().__init__(base.speeds, ones, horizon=base.horizon)

    def loadings_on(self, times: Tensor) -> Tensor:
        """w(H(t)), ``(T, *D, K)``, float64."""
        return self._base.weights_at(self.hurst_at(times).to(torch.float64))
