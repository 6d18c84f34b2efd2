"""Ornstein-Uhlenbeck processes driven by one Brownian motion, exactly.

dV_k = (-g_k V_k + u) dt + dW for k = 1..K.  Over a step h with u frozen,

    V_k' = e^(-g_k h) V_k + u (1 - e^(-g_k h)) / g_k + xi_k,   Cov(xi_i, xi_j) = (1 - e^(-(g_i + g_j) h)) / (g_i + g_j).

That K x K matrix has fast decaying eigenvalues (2e-1, 1e-3, 1e-6, 2e-11, 3e-17 for five speeds): those below rounding
are dropped, and a step needs M <= K normals.  The Brownian increment over the step, which Girsanov's theorem needs
jointly with xi, is a process of speed 0 and rides along as the last row.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sde._checks import Times, as_positive, as_times

__all__ = ["Discretisation", "discretise", "exponential_scan", "stationary_covariance", "transition_covariance"]

_RANK_TOLERANCE = 1e-14  # eigenvalues below this fraction of the largest are rounding of the eigensolver in float64


def mean_decay(z: Tensor) -> Tensor:
    """(1 - e^(-z)) / z, 1 at z = 0."""
    return torch.where(z.abs() > 1e-8, -torch.expm1(-z) / torch.where(z.abs() > 1e-8, z, 1.0), 1 - z / 2)


def transition_covariance(speeds: Tensor, step: Tensor | float) -> Tensor:
    """Covariance of the noise that the processes collect over ``step``; for two speeds 0 it is the step itself.

    Args:
        speeds: ``(K,)``, non-negative.
        step: scalar or ``(...,)``.

    Returns:
        ``(..., K, K)``.
    """
    pair = speeds.unsqueeze(-1) + speeds
    h = torch.as_tensor(step, dtype=speeds.dtype, device=speeds.device)[..., None, None]
    return h * mean_decay(pair * h)


def stationary_covariance(speeds: Tensor) -> Tensor:
    """1 / (g_i + g_j), the law of processes that share an infinite past; a speed 0 has none and gets zeros."""
    pair = speeds.unsqueeze(-1) + speeds
    live = (speeds > 0).unsqueeze(-1) & (speeds > 0)
    return torch.where(live, 1 / torch.where(live, pair, 1.0), 0.0)


@dataclass(frozen=True)
class Discretisation:
    """Exact transitions over a time grid; depends on speeds and times alone, so it outlives changes of H.

    Attributes:
        times: ``(N + 1,)``.
        steps: ``(N,)``.
        decay: e^(-g h), ``(N, K)``.
        shift: (1 - e^(-g h)) / g, what a unit control adds, ``(N, K)``.
        factor: U factors of the joint noise of the K processes and W, ``(U, K + 1, M)``, one per distinct step size.
        which: factor of each step, ``(N,)``, int64.
    """

    times: Tensor
    steps: Tensor
    decay: Tensor
    shift: Tensor
    factor: Tensor
    which: Tensor

    @property
    def rank(self) -> int:
        """M, the normals that a step needs per dimension."""
        return self.factor.shape[-1]

    def to(self, device: torch.device, dtype: torch.dtype) -> "Discretisation":
        """The same on another device, in another precision (times stay float64)."""
        steps, decay, shift, factor = (
            part.to(device, dtype) for part in (self.steps, self.decay, self.shift, self.factor)
        )
        return Discretisation(self.times.to(device), steps, decay, shift, factor, self.which.to(device))

    def increments(self, normals: Tensor, first: int = 0) -> Tensor:
        """Correlated noise of successive steps from standard normals.

        Args:
            normals: ``(n, ..., M)``.
            first: index of the first of the n steps.

        Returns:
            ``(n, ..., K + 1)``: the noise of the K processes, and last the Brownian increment.
        """
        if len(self.factor) == 1:
            return normals @ self.factor[0].mT
        factor = self.factor[self.which[first : first + len(normals)]]
        flat = normals.reshape(len(normals), -1, self.rank)
        return (flat @ factor.mT).reshape(*normals.shape[:-1], -1)


def discretise(speeds: Tensor, times: Times) -> Discretisation:
    """Exact transitions of processes of the given speeds over a grid of times.

    Args:
        speeds: ``(K,)``.
        times: strictly increasing, ``(N + 1,)``, N >= 1.
    """
    grid = as_times(times, minimum=2)
    speeds = as_positive(speeds, "speeds", zero=True).to(grid.device)
    steps = grid.diff()
    # Steps of a uniform grid differ in their last bits; to twelve digits they are one step.
    scale = steps.max() * 1e-12
    distinct, which = torch.unique(torch.round(steps / scale), return_inverse=True)
    representative = distinct * scale
    joint = transition_covariance(torch.cat([speeds, speeds.new_zeros(1)]), representative)
    values, vectors = torch.linalg.eigh(joint)
    rank = int((values > _RANK_TOLERANCE * values[:, -1:]).sum(-1).max())
    kept = values[:, -rank:].clamp_min(0)
    factor = vectors[:, :, -rank:] * kept.sqrt().unsqueeze(-2)
    z = steps.unsqueeze(-1) * speeds
    return Discretisation(grid, steps, torch.exp(-z), steps.unsqueeze(-1) * mean_decay(z), factor, which)


def exponential_scan(speeds: Tensor, times: Tensor, inputs: Tensor) -> Tensor:
    """V at each time from what is added at each time: V_n = e^(-g (t_n - t_{n-1})) V_{n-1} + inputs_n.

    In sqrt(N) blocks: all blocks are stepped side by side from 0, their ends are chained, and what a block inherits is
    added with its decay; 2 sqrt(N) small operations, and no power of e^(+g t) that could overflow.

    Args:
        speeds: ``(K,)``.
        times: ``(N,)``, on the device of ``inputs``.
        inputs: ``(N, ..., K)``; put the initial state into the first.

    Returns:
        ``(N, ..., K)``.
    """
    count = len(times)
    length = math.isqrt(count - 1) + 1
    blocks = -(-count // length)
    spare = blocks * length - count
    if spare:
        times = torch.cat([times, times[-1:].expand(spare)])
        inputs = torch.cat([inputs, inputs.new_zeros(spare, *inputs.shape[1:])])
    clock = times.reshape(blocks, length)
    middle = [1] * (inputs.ndim - 2)

    def decay(lag: Tensor) -> Tensor:
        return torch.exp(-lag.unsqueeze(-1) * speeds).to(inputs.dtype).reshape(*lag.shape, *middle, len(speeds))

    added = inputs.reshape(blocks, length, *inputs.shape[1:])
    within = decay(clock.diff(dim=1))
    inner = [added[:, 0]]
    for i in range(1, length):
        inner.append(torch.addcmul(added[:, i], within[:, i - 1], inner[-1]))
    carry = [torch.zeros_like(inner[0][0])]
    across = decay(clock[1:, -1] - clock[:-1, -1])
    for m in range(blocks - 1):
        carry.append(inner[-1][m] + (across[m - 1] * carry[-1] if m else 0))
    # A block inherits the state at the end of the block before it.
    since = decay(clock - torch.cat([clock[:1, :1], clock[:-1, -1:]]))
    state = torch.addcmul(torch.stack(inner, 1), since, torch.stack(carry).unsqueeze(1))
    return state.flatten(0, 1)[:count]
