"""Linear SDEs driven by a Markov noise: exact transitions in square-root form.

    dX = (c - theta X) dt + s dB,   B_t = sum_k l_k (V_k(t) - V_k(0)),   dV_k = -g_k V_k dt + beta_k dW,

each dimension on its own.  The state is z = (X, V_1..V_K); over a step h it becomes F z + o + G eps with eps standard
normal, G G' = Q.  A unit of dW at lag tau before the end of the step arrives as the vector

    k(tau) = (s sum_k w_k (g_k e^(-g_k tau) - theta e^(-theta tau)) / (g_k - theta), beta e^(-g tau)),

so Q = int_0^h k k' d tau.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sde._checks import Times, as_times
from sde.noise import MarkovNoise, by_lag, is_uniform
from sde.ornstein_uhlenbeck import Discretisation, mean_decay

__all__ = ["LinearSDE", "Transitions", "lower_factor"]

_NODES = 16  # Gauss-Legendre over one cell: exp(-2 z) to rounding for z up to 6
# theta may be a parameter and is not looked at: room for it up to about 200 / step in transitions, and up to 10^4 times
# the fastest decay over all times in moments.
_MIN_DOUBLINGS, _MORE_HALVES = 6, 12


def lower_factor(columns: Tensor) -> Tensor:
    """A lower triangular L with L L' = C C' for C = ``columns``, ``(..., S, M)``, by QR of C'.

    The derivative treats the rotation as a constant: L = C Q, so dL = dC Q, which gives d(L L') = d(C C') exactly
    because C Q Q' = C.  Whatever depends on L through L L' alone (a likelihood, an expectation over L times a normal)
    has its exact first derivative, and no inverse of a singular triangle appears.  Second derivatives would be wrong.

    Returns:
        ``(..., S, S)``; narrower input is padded with zeros.
    """
    rows, count = columns.shape[-2:]
    if count < rows:
        columns = torch.cat([columns, columns.new_zeros(*columns.shape[:-1], rows - count)], -1)
    rotation = torch.linalg.qr(columns.detach().mT)[0]
    return columns @ rotation


def _halves(decays: float) -> int:
    """How often a length over which an exponential decays by e^-decays is halved until it decays by 1 / e at most."""
    return math.ceil(math.log2(max(decays, 1.0)))


class Transitions(NamedTuple):
    """z' = F z + o + Gamma u + G eps over each step, u frozen.

    Attributes:
        steps: h, ``(N,)``.
        matrix: F, ``(N, *D, S, S)``, S = K + 1.
        offset: o, ``(N, *D, S)``.
        response: Gamma, what a unit control does, ``(N, *D, S)``.
        factor: G, ``(N, *D, S, M)``.
    """

    steps: Tensor
    matrix: Tensor
    offset: Tensor
    response: Tensor
    factor: Tensor


@dataclass(frozen=True)
class LinearSDE:
    """dX = (constant - theta X) dt + scale dB; every parameter a number or ``(D,)``, differentiable, not checked.

    Attributes:
        noise: B, with constant loadings.
        theta: mean reversion, 1 / time.
        scale: s.
        constant: c.
        start_mean: of X(0).
        start_std: of X(0), 0 for a known start.
    """

    noise: MarkovNoise
    theta: float | Tensor = 0.0
    scale: float | Tensor = 1.0
    constant: float | Tensor = 0.0
    start_mean: float | Tensor = 0.0
    start_std: float | Tensor = 0.0

    def _parameter(self, value: float | Tensor) -> Tensor:
        return torch.as_tensor(value, dtype=torch.float64, device=self.noise.loadings.device)

    @property
    def dims(self) -> tuple[int, ...]:
        """``()`` or ``(D,)``, from noise and parameters together."""
        parts = (self.theta, self.scale, self.constant, self.start_mean, self.start_std)
        return tuple(torch.broadcast_shapes(self.noise.dims, *[self._parameter(part).shape for part in parts]))

    def start(self) -> tuple[Tensor, Tensor]:
        """Mean ``(*D, S)`` and factor ``(*D, S, S)`` of the state at time 0."""
        dims, count = self.dims, self.noise.num_processes
        mean = self._parameter(self.start_mean).expand(dims)
        mean = torch.nn.functional.pad(mean.unsqueeze(-1), (0, count))
        past = torch.nn.functional.pad(self.noise.initial_factor.expand(*dims, -1, -1), (1, 0, 1, 0))
        own = torch.nn.functional.pad(
            self._parameter(self.start_std).expand(dims)[..., None, None], (0, count, 0, count)
        )
        return mean, past + own

    def transitions(self, times: Times) -> Transitions:
        """Exact transitions over a grid ``(N + 1,)``; differentiable in H, theta, scale and constant."""
        grid = as_times(times, minimum=2, horizon=self.noise.horizon)
        if not self.noise.constant_loadings:
            raise ValueError("the noise's loadings change with time: it has no exact linear transitions here")
        steps = grid.diff()
        scale = steps.max() * 1e-12
        distinct, which = torch.unique(torch.round(steps / scale), return_inverse=True)
        doublings = max(_MIN_DOUBLINGS, _halves(float(self.noise.speeds.max() * steps.max())))
        device = self.noise.loadings.device
        h = (distinct * scale).to(device)
        cell = h / 2**doublings

        nodes, weights = (torch.from_numpy(part).to(device) for part in np.polynomial.legendre.leggauss(_NODES))
        tau = cell.unsqueeze(-1) * (nodes + 1) / 2
        kernel = self._kernel(tau) * (cell.unsqueeze(-1) * weights / 2).sqrt().reshape(
            len(h), -1, *[1] * len(self.dims), 1
        )
        columns = kernel.movedim(1, -1)  # (U, *D, S, nodes)
        response = self._kernel(tau).movedim(1, -1) @ (weights / 2) * cell.reshape(-1, *[1] * len(self.dims), 1)
        factor = lower_factor(columns)
        for j in range(doublings):  # Q(2x) = Q(x) + F(x) Q(x) F(x)': sums only, nothing cancels
            matrix = self._matrix(cell * 2**j)
            factor = lower_factor(torch.cat([factor, matrix @ factor], -1))
            response = response + (matrix @ response.unsqueeze(-1)).squeeze(-1)
        which = which.to(device)
        rate = self._parameter(self.theta) * h.reshape(-1, *[1] * len(self.dims))
        mean = h.reshape(-1, *[1] * len(self.dims)) * mean_decay(rate) * self._parameter(self.constant)
        offset = torch.nn.functional.pad(mean.expand(len(h), *self.dims).unsqueeze(-1), (0, self.noise.num_processes))
        return Transitions(steps.to(device), self._matrix(h)[which], offset[which], response[which], factor[which])

    def moments(self, times: Times) -> tuple[Tensor, Tensor]:
        """Mean ``(*D, T)`` and covariance ``(*D, T, T)`` of X at the given times, without a loop over them.

        Cov(X_s, X_t) = F(t - s)_x Cov(z_s, X_s) for s <= t, and Cov(z_s, X_s) = (F(s) P_0 F(s)' + int_0^s k k')_x, the
        integral by quadrature.  For some hundred times and one Cholesky factor this is many times faster than a
        filter's steps; looks at no parameter's value, so that it may be recorded as a graph.  Differentiable in H,
        theta, scale and constant.
        """
        clock = np.asarray(times.tolist() if isinstance(times, Tensor) else times)
        last = float(clock.max())
        if last > self.noise.horizon * (1 + 1e-9):
            as_times(times, horizon=self.noise.horizon)  # says how to fix it
        device, dims = self.noise.loadings.device, self.dims
        t = torch.as_tensor(times, dtype=torch.float64, device=device)
        shape = (-1, *[1] * len(dims))
        if isinstance(self.theta, int | float) and self.theta == 0 and self.noise.constant_loadings:
            variance, spread = self._parameter(self.scale) ** 2, self._parameter(self.start_std) ** 2
            covariance = variance[..., None, None] * self.noise.covariance_at(t) + spread[..., None, None]
            mean = self._parameter(self.start_mean).unsqueeze(-1) + self._parameter(self.constant).unsqueeze(-1) * t
            return mean.expand(*dims, -1), covariance.expand(*dims, -1, -1)
        halves = _halves(max(self.noise.speeds.tolist()) * last) + _MORE_HALVES
        # One integral over lags, up to each time.  Its panels end at the times and at halves of the last one, so that
        # each exponential is smooth on those where it is not over.
        nodes, weights = np.polynomial.legendre.leggauss(_NODES)
        edges = np.unique(np.concatenate([[0.0], clock, last * 0.5 ** np.arange(halves + 1)]))
        width = np.diff(edges)[:, None]
        lag, weight = edges[:-1, None] + width * (nodes + 1) / 2, width * weights / 2
        kernel = self._kernel(torch.from_numpy(lag).to(device))  # (panel, node, *D, S)
        arrives = kernel[..., :1] * torch.from_numpy(weight).to(device).reshape(*weight.shape, *[1] * len(dims), 1)
        pieces = torch.nn.functional.pad((arrives * kernel).sum(1), [0, 0] * (1 + len(dims)) + [1, 0])
        collected = pieces.cumsum(0)[torch.from_numpy(np.searchsorted(edges, clock)).to(device)]  # (T, *D, S)
        start_mean, start_factor = self.start()
        matrix = self._matrix(t)
        began = matrix @ start_factor
        own = collected + (began @ began[..., :1, :].mT).squeeze(-1)  # Cov(z_s, X_s), (T, *D, S)
        if is_uniform(t):
            later = self._first_row(t - t[0])  # (lag, *D, S)
            lower = by_lag(own.movedim(0, -2) @ later.movedim(0, -1)).mT
        else:
            row, column = torch.tril_indices(len(t), len(t), device=device)
            later = self._first_row(t[row] - t[column])  # (pair, *D, S)
            pairs = (later * own[column]).sum(-1).movedim(0, -1)
            order = torch.arange(len(t), device=device)
            place = (order.unsqueeze(-1) * (order.unsqueeze(-1) + 1) // 2 + order).clamp_max(len(row) - 1)
            lower = pairs[..., place].tril()
        rate = self._parameter(self.theta) * t.reshape(shape)
        mean = (matrix[..., 0, :] * start_mean).sum(-1) + t.reshape(shape) * mean_decay(rate) * self._parameter(
            self.constant
        )
        return mean.movedim(0, -1), lower + lower.tril(-1).mT

    def euler_transitions(self, grid: Discretisation) -> Transitions:
        """Transitions of the chain that ``solve(..., scheme="euler")`` runs: V exact, X by Euler steps.

        Controls and guides that are built on these are optimal for that chain, so that its ELBO has no discretisation
        gap.
        """
        dims, noise = self.dims, self.noise
        lead = (len(grid.steps), *dims)
        shape = (-1, *[1] * len(dims))
        h = grid.steps.reshape(shape)
        loadings, gains = noise.loadings, noise.gains
        scale = self._parameter(self.scale).unsqueeze(-1)
        decay = grid.decay.reshape(*shape, noise.num_processes)
        first = torch.cat([(1 - self._parameter(self.theta) * h).unsqueeze(-1).expand(*lead, 1),
                           (scale * loadings * (decay - 1)).expand(*lead, -1)], -1)  # fmt: skip
        rest = torch.nn.functional.pad(torch.diag_embed(decay.expand(*lead, -1)), (1, 0))
        shift = gains * grid.shift.reshape(*shape, noise.num_processes)
        response = torch.cat(
            [(scale * loadings * shift).sum(-1, keepdim=True).expand(*lead, 1), shift.expand(*lead, -1)], -1
        )
        columns = grid.factor[grid.which][:, :-1].reshape(*shape, noise.num_processes, grid.rank) * gains.unsqueeze(-1)
        own = (scale * loadings).unsqueeze(-2) @ columns
        factor = torch.cat([own.expand(*lead, 1, -1), columns.expand(*lead, -1, -1)], -2)
        offset = (self._parameter(self.constant) * h).expand(lead).unsqueeze(-1)
        offset = torch.nn.functional.pad(offset, (0, noise.num_processes))
        return Transitions(grid.steps, torch.cat([first.unsqueeze(-2), rest], -2), offset, response, factor)

    def _divided(self, tau: Tensor) -> tuple[Tensor, Tensor]:
        """(e^(-theta tau) - e^(-g tau)) / (g - theta), finite where a speed equals theta, ``(*tau, *D, K)``; tau
        itself.
        """
        tau = tau.reshape(*tau.shape, *[1] * len(self.dims), 1)
        theta, g = self._parameter(self.theta).unsqueeze(-1), self.noise.speeds.to(tau.device)
        return tau * torch.exp(-torch.minimum(theta, g) * tau) * mean_decay((g - theta).abs() * tau), tau

    def _kernel(self, tau: Tensor) -> Tensor:
        """k(tau), ``(*tau, *D, S)``."""
        divided, t = self._divided(tau)
        theta, g = self._parameter(self.theta).unsqueeze(-1), self.noise.speeds.to(tau.device)
        own = (self.noise.weights * (torch.exp(-theta * t) - g * divided)).sum(-1, keepdim=True)
        own = self._parameter(self.scale).unsqueeze(-1) * own
        rest = self.noise.gains * torch.exp(-g * t)
        lead = (*tau.shape, *self.dims)
        return torch.cat([own.expand(*lead, 1), rest.expand(*lead, -1)], -1)

    def _matrix(self, h: Tensor) -> Tensor:
        """F(h), ``(*h, *D, S, S)``."""
        lead = (*h.shape, *self.dims)
        decay = torch.exp(-self.noise.speeds.to(h.device) * h.reshape(*h.shape, *[1] * len(self.dims), 1))
        rest = torch.nn.functional.pad(torch.diag_embed(decay.expand(*lead, -1)), (1, 0))
        return torch.cat([self._first_row(h).unsqueeze(-2), rest], -2)

    def _first_row(self, h: Tensor) -> Tensor:
        """What X(t + h) is made of: the first row of F(h), ``(*h, *D, S)``."""
        divided, t = self._divided(h)
        g, lead = self.noise.speeds.to(h.device), (*h.shape, *self.dims)
        own = torch.exp(-self._parameter(self.theta).unsqueeze(-1) * t).expand(*lead, 1)
        cross = -self._parameter(self.scale).unsqueeze(-1) * self.noise.loadings * g * divided
        return torch.cat([own, cross.expand(*lead, -1)], -1)
