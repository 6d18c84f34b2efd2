"""Noise that is a weighted sum of Ornstein-Uhlenbeck processes: what solvers, controls and filters work on.

    dV_k = -g_k V_k dt + beta_k dW,   B_t = sum_k l_k (V_k(t) - V_k(0)),   V(0) ~ N(0, L0 L0'),

one Brownian motion W per dimension, all K processes of a dimension sharing it.  g are the speeds, beta the gains, l the
loadings; the weights l_k beta_k are what a unit of dW does to B.
"""

import torch
from torch import Tensor

from sde._checks import Times, as_count, as_positive, as_times, base_seed, stream
from sde.ornstein_uhlenbeck import Discretisation, discretise, exponential_scan, stationary_covariance
from sde.ornstein_uhlenbeck import transition_covariance as _future

__all__ = ["BrownianMotion", "MarkovNoise", "MixedNoise"]


class MarkovNoise:
    """A Gaussian noise with a Markov state.

    ``*D`` below is empty for one shared law, or ``(D,)`` for one law per dimension.

    Attributes:
        speeds: ``(K,)``, float64, non-negative; constants of the noise, without gradient.
        loadings: ``(*D, K)``, float64.
        gains: ``(*D, K)``, float64.
        initial_factor: L0, ``(*D, K, K)``, float64; zeros where the processes start at 0.
        horizon: the time up to which the noise may be used.
    """

    def __init__(
        self,
        speeds: Tensor,
        loadings: Tensor,
        *,
        gains: Tensor | None = None,
        initial_factor: Tensor | None = None,
        horizon: float = float("inf"),
    ) -> None:
        self.speeds = as_positive(speeds, "speeds", zero=True).detach()
        if self.speeds.ndim != 1:
            raise ValueError(f"speeds must be a vector, got shape {tuple(self.speeds.shape)}")
        self._set(loadings, gains, initial_factor, horizon)

    def _set(self, loadings: Tensor, gains: Tensor | None, initial_factor: Tensor | None, horizon: float) -> None:
        count = len(self.speeds)
        if loadings.shape[-1:] != (count,):
            raise ValueError(f"loadings must end in the {count} processes, got shape {tuple(loadings.shape)}")
        self.loadings = loadings.to(torch.float64)
        self.gains = torch.ones_like(self.loadings) if gains is None else gains.to(torch.float64)
        zeros = self.loadings.new_zeros(*self.loadings.shape, count)
        self.initial_factor = zeros if initial_factor is None else initial_factor.to(torch.float64)
        self.starts_at_zero = initial_factor is None
        self.horizon = float(horizon)

    constant_loadings = True
    """Whether ``loadings_on`` returns the same at all times."""

    @property
    def num_processes(self) -> int:
        """K."""
        return len(self.speeds)

    @property
    def dims(self) -> tuple[int, ...]:
        """``()`` for a law shared by all dimensions, ``(D,)`` for one each."""
        return tuple(self.loadings.shape[:-1])

    @property
    def weights(self) -> Tensor:
        """What a unit of dW through each process does to the noise, ``(*D, K)``, float64."""
        return self.loadings * self.gains

    @property
    def initial_covariance(self) -> Tensor:
        """Covariance of V(0), ``(*D, K, K)``, float64."""
        return self.initial_factor @ self.initial_factor.mT

    def loadings_on(self, times: Tensor) -> Tensor:
        """Loadings at each time, ``(T or 1, *D, K)``: one row where they don't change."""
        return self.loadings.unsqueeze(0)

    def discretise(self, times: Times) -> Discretisation:
        """Exact transitions on a grid of times; valid for every Hurst index on the same speeds."""
        return discretise(self.speeds, as_times(times, minimum=2, horizon=self.horizon))

    def covariance(self, times: Times) -> Tensor:
        """Covariance of B over ``times``, ``(*D, T, T)``, float64, differentiable in the loadings and gains."""
        return self.covariance_at(as_times(times, horizon=self.horizon).to(self.loadings.device))

    def covariance_at(self, t: Tensor) -> Tensor:
        """``covariance`` of times that are known to be good: nothing is looked at, so it may be recorded as a graph."""
        speeds = self.speeds.to(t.device)
        loadings = self.loadings_on(t).movedim(0, -2)  # (*D, T or 1, K)
        weights = (loadings * self.gains.unsqueeze(-2)).expand(*self.dims, len(t), -1)
        collected = torch.einsum("...ti,tij->...tj", weights, _future(speeds, t))
        # For s <= t the processes of time s decay until t.
        if self.constant_loadings and is_uniform(t):
            decay = torch.exp(-(t - t[0]).unsqueeze(-1) * speeds)
            upper = by_lag((collected * weights) @ decay.mT)
        else:
            lag = torch.exp(-(t - t.unsqueeze(-1)).abs().unsqueeze(-1) * speeds)
            upper = torch.einsum("...sj,...tj,stj->...st", collected, weights, lag).triu()
        future = upper + upper.triu(1).mT
        if self.starts_at_zero:
            return future
        past = (loadings * torch.expm1(-t.unsqueeze(-1) * speeds)) @ self.initial_factor
        return future + past @ past.mT

    def sample(
        self,
        times: Times,
        num_paths: int,
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> Tensor:
        """Draw paths of B, exactly on the given times, without a loop over time.

        Args:
            times: strictly increasing, ``(T,)``, from 0 or later; B is 0 at time 0.
            num_paths: paths to draw.
            seed: integer seed; the same seed gives the same paths.
            generator: instead of a seed.

        Returns:
            ``(T, num_paths, *D)``.

        Raises:
            ValueError: for times that are unsorted, repeated, negative or beyond the horizon.
        """
        t = as_times(times, horizon=self.horizon)
        paths = as_count(num_paths, "num_paths")
        device = self.loadings.device
        root = base_seed(seed, generator)
        starts = float(t[0]) == 0
        grid = t if starts else torch.cat([t.new_zeros(1), t])
        out = torch.zeros(1, paths, *self.dims, dtype=dtype, device=device)
        if len(grid) > 1:
            disc = discretise(self.speeds, grid).to(device, dtype)
            shape = (len(disc.steps), paths, *self.dims, disc.rank)
            normals = torch.randn(shape, generator=stream(root, "steps", device=device), dtype=dtype, device=device)
            inputs = disc.increments(normals)[..., :-1]
            state = exponential_scan(self.speeds.to(device), disc.times[1:], inputs)
            loadings = self.loadings_on(disc.times[1:]).to(dtype).unsqueeze(1)
            b = (state * (loadings * self.gains.to(dtype))).sum(-1)
            if not self.starts_at_zero:
                start = self.sample_initial(paths, generator=stream(root, "start", device=device), dtype=dtype)
                forget = torch.expm1(-disc.times[1:].unsqueeze(-1) * self.speeds.to(device)).to(dtype)
                b = b + torch.einsum("p...k,tk->tp...", start * self.loadings.to(dtype), forget)
            out = torch.cat([out, b])
        return out if starts else out[1:]

    def sample_initial(
        self, num_paths: int, *, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float64
    ) -> Tensor:
        """Draw V(0), ``(num_paths, *D, K)``."""
        device = self.loadings.device
        normals = torch.randn(
            num_paths, *self.dims, self.num_processes, generator=generator, dtype=dtype, device=device
        )
        return (self.initial_factor.to(dtype) @ normals.unsqueeze(-1)).squeeze(-1)


class BrownianMotion(MarkovNoise):
    """Brownian motion as the one-process case: speed 0, weight 1."""

    def __init__(self, *, horizon: float = float("inf")) -> None:
        super().__init__(torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64), horizon=horizon)


class MixedNoise(MarkovNoise):
    """sum_j c_j B_j of noises that share their Brownian motion (and so their past), as one noise.

    Args:
        parts: pairs ``(c_j, noise_j)``; c_j a number or a tensor of the noises' dims.

    Raises:
        ValueError: for no parts, or for a part whose past is not that of the shared Brownian motion (the hybrid start),
            so that its correlation with the others is unknown.
    """

    def __init__(self, parts: list[tuple[float | Tensor, MarkovNoise]]) -> None:
        if not parts:
            raise ValueError("parts must hold at least one (coefficient, noise) pair")
        if any(getattr(noise, "start", None) == "hybrid" for _, noise in parts):
            raise ValueError("a noise with the hybrid start can't be mixed: build it with start='stationary'")
        speeds = torch.cat([noise.speeds for _, noise in parts])
        weights = [torch.as_tensor(c).unsqueeze(-1) * noise.weights for c, noise in parts]
        dims = torch.broadcast_shapes(*[w.shape[:-1] for w in weights])
        loadings = torch.cat([w.expand(*dims, -1) for w in weights], -1)
        past = torch.cat([torch.full_like(noise.speeds, not noise.starts_at_zero) for _, noise in parts])
        factor = None
        if bool(past.any()):
            factor = covariance_factor(stationary_covariance(speeds) * past * past.unsqueeze(-1))
            factor = factor.to(loadings.device).expand(*dims, -1, -1)
        super().__init__(speeds, loadings, initial_factor=factor, horizon=min(noise.horizon for _, noise in parts))


def is_uniform(times: Tensor) -> bool:
    """Whether times stand at equal distances, so that a lag is a number of steps: to twelve digits."""
    clock = times.tolist()
    if len(clock) < 3:
        return False
    step, rounding = (clock[-1] - clock[0]) / (len(clock) - 1), 1e-12 * abs(clock[-1])
    return all(abs(time - clock[0] - n * step) <= rounding for n, time in enumerate(clock))


def by_lag(table: Tensor) -> Tensor:
    """Upper triangle ``(..., T, T)`` whose entry (s, t) is the table's at (s, lag t - s); ``(..., T, T)``."""
    order = torch.arange(table.shape[-1], device=table.device)
    lag = (order - order.unsqueeze(-1)).clamp_min(0)
    return table.gather(-1, lag.expand(table.shape)).triu()


def covariance_factor(covariance: Tensor) -> Tensor:
    """A square factor of a covariance that may be singular, through its eigenvalues; not for differentiation."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp_min(0).sqrt().unsqueeze(-2)
