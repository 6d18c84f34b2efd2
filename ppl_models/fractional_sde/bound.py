"""The evidence bound of observed series: Gaussian likelihood at the observation times, KL of path and start.

    log p(y) >= E_q[ sum_i log N(y_i; X(t_i), s^2) - 1/2 int_0^T |u|^2 dt ] - KL(q(X(0), V(0)) || p)

with the control u that turns the prior's paths into the posterior's (Daems, Opper, Crevecoeur and Birdal, ICLR 2024,
arXiv 2310.12975; the integral is a sum over dimensions), or its importance-weighted form (Burda et al. 2015, arXiv
1509.00519).
"""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from inference.runtime.generators import derive_seed
from ppl_models.fractional_sde.posterior import Draws, SolverGrid

if TYPE_CHECKING:
    from ppl_models.fractional_sde.paths import PathModel

__all__ = ["PathBound", "PathLikelihood", "combine", "particles_of"]

_PATHS_AT_ONCE = 4096
_BOUNDS = ("elbo", "iwae")


def particles_of(series: int) -> int:
    """Particles that are simulated at once outside training."""
    return max(1, _PATHS_AT_ONCE // series)


class PathLikelihood(nn.Module):
    """Standard deviation of the observations' errors, fixed or learned; calling it returns ``(D,)``."""

    given: Tensor
    log_std: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.learned = size, False
        self.register_buffer("log_std", torch.zeros(size))
        self.register_buffer("given", torch.full((size,), 0.1))

    def check(self, noise_std: Any, positive: bool) -> None:
        """Raise unless ``noise_std`` is "learn", a number or ``(D,)``, finite, and positive where it has to be."""
        if isinstance(noise_std, str):
            if noise_std != "learn":
                raise ValueError(f"noise_std must be a number, a ({self.size},) vector or 'learn', got {noise_std!r}")
            return
        if isinstance(noise_std, Tensor) and noise_std.is_complex():
            raise TypeError(f"noise_std must hold real numbers, got {noise_std.dtype}")
        try:
            value = torch.as_tensor(noise_std, dtype=torch.float64)
        except (TypeError, ValueError) as error:
            raise TypeError(f"noise_std must be a number or a vector, got {type(noise_std).__name__}") from error
        if value.shape not in ((), (self.size,)):
            raise ValueError(f"noise_std must be a number or ({self.size},), got shape {tuple(value.shape)}")
        if not bool((torch.isfinite(value) & ((value > 0) if positive else (value >= 0))).all()):
            what = "positive: only method='exact' and 'nuts' take exact observations" if positive else "0 or more"
            raise ValueError(f"noise_std must be finite and {what}, got {value.tolist()}")

    def set(self, noise_std: Any, spread: Tensor) -> None:
        """Fix it, or let it be learned from a tenth of the data's spread."""
        if isinstance(noise_std, str):
            fresh = not self.learned
            self.learn(True)
            if fresh:
                with torch.no_grad():
                    self.log_std.copy_((0.1 * spread).log())
        else:
            self.learn(False)
            self.given.copy_(torch.as_tensor(noise_std, dtype=self.given.dtype).expand(self.size))

    def learn(self, learned: bool) -> None:
        """Make the deviation a parameter, or a constant."""
        if learned != self.learned:
            value = self.log_std.detach().clone()
            del self.log_std
            if learned:
                self.log_std = nn.Parameter(value)
            else:
                self.register_buffer("log_std", value)
        self.learned = learned

    def forward(self) -> Tensor:
        """``(D,)``."""
        return self.log_std.exp() if self.learned else self.given

    def log_prob(self, x: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """log p(values | x), summed over times and dimensions: ``(P B,)`` from ``(T, P B, D)`` and ``(T, B, D)``."""
        std = self()
        error = (x.unflatten(1, (-1, values.shape[1])) - values.unsqueeze(1)) / std
        each = -0.5 * (error.square() + math.log(2 * math.pi)) - std.log()
        return (each * mask.unsqueeze(1)).sum((0, -1)).flatten()


def combine(draws: Draws, log_likelihood: Tensor, particles: int, bound: str, weight: Tensor | float) -> Tensor:
    """The bound of each series, ``(B,)``."""
    if bound == "elbo":
        return (log_likelihood - weight * draws.kl).unflatten(0, (particles, -1)).mean(0)
    weights = (log_likelihood + weight * draws.log_ratio).unflatten(0, (particles, -1))
    return torch.logsumexp(weights, 0) - math.log(particles)


class PathBound(nn.Module):
    """Negative evidence bound per series, an objective for ``inference.fit`` on rows ``(B, T, *shape)`` and their mask.

    Args:
        model: whose system, posterior and likelihood are learned.
        grid: of the solver.
        num_particles: paths a series.
        bound: ``"elbo"`` or ``"iwae"``.
        kl_warmup: steps over which the KL's weight rises to 1.
        hurst_wait: steps before which H is held where it is.
    """

    calls: Tensor

    def __init__(
        self, model: "PathModel", grid: SolverGrid, num_particles: int, bound: str, kl_warmup: int, hurst_wait: int = 0
    ) -> None:
        super().__init__()
        if bound not in _BOUNDS:
            raise ValueError(f"bound must be one of {_BOUNDS}, got {bound!r}")
        if isinstance(kl_warmup, bool) or not isinstance(kl_warmup, int) or kl_warmup < 0:
            raise ValueError(f"kl_warmup must be a number of steps, 0 or more, got {kl_warmup!r}")
        self.model = model
        self.grid, self.num_particles, self.bound, self.kl_warmup = grid, num_particles, bound, kl_warmup
        self.hurst_wait = hurst_wait
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, observations: Tensor, mask: Tensor) -> Tensor:
        """A scalar."""
        weight: Tensor | float = 1.0
        noise = self.model.system.noise
        if (self.kl_warmup or self.hurst_wait) and self.training:
            self.calls += 1
            noise.held = self.calls <= self.hurst_wait
        if self.kl_warmup and self.training:
            weight = (self.calls / self.kl_warmup).clamp(max=1.0).to(observations.dtype)
        try:
            return -self._per_series(observations, mask, self.num_particles, weight, None)[0].mean()
        finally:
            noise.held = None

    def _per_series(
        self, observations: Tensor, mask: Tensor, particles: int, weight: Tensor | float, seed: int | None
    ) -> tuple[Tensor, Draws, Tensor]:
        fits, draws = self.model._weigh(self.grid, observations, mask, particles, seed)
        return combine(draws, fits, particles, self.bound, weight), draws, fits

    def evaluate(self, observations: Tensor, mask: Tensor, num_particles: int, seed: int) -> tuple[Tensor, Tensor]:
        """ELBO and importance-weighted bound of ``num_particles`` draws, each summed over series."""
        at_once = min(num_particles, particles_of(len(observations)))
        weights = []
        for i in range(0, num_particles, at_once):
            count = min(at_once, num_particles - i)
            _, draws, fits = self._per_series(observations, mask, count, 1.0, derive_seed(seed, i))
            weights.append((fits + draws.log_ratio).unflatten(0, (count, -1)))
        # The mean log weight has the bound as its mean, and no variance at all where the posterior is exact.
        weight = torch.cat(weights)
        return weight.mean(0).sum(), (torch.logsumexp(weight, 0) - math.log(num_particles)).sum()
