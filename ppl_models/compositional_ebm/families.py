"""Exponential families without a closed-form constant, or with a cut support: ``p(x) = h(x) exp(theta' T(x)) / Z``.

Maximum likelihood in them is convex, and matches E_p[T] with the data's mean of T.  Each is an ``EnergyModel`` without
a base, so that ``fit``, ``log_prob``, ``log_partition`` and ``sample`` are the same.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from inference._errors import SamplerWarning
from inference.objectives.unnormalised.noise import BernoulliNoise, PoissonNoise
from ppl_models.base import check_count, to_tensor
from ppl_models.compositional_ebm.methods import EnergyFit
from ppl_models.compositional_ebm.model import EnergyModel

__all__ = ["Boltzmann", "ConwayMaxwellPoisson", "ExponentialFamily", "TruncatedNormal", "VonMises"]


class LinearEnergy(nn.Module):
    """``E(x) = -theta' T(x) - log h(x)``."""

    def __init__(
        self,
        statistics: Callable[[Tensor], Tensor],
        start: Tensor,
        log_measure: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.theta = nn.Parameter(start.clone())
        self.statistics, self.log_measure = statistics, log_measure

    def forward(self, x: Tensor) -> Tensor:
        """``(row, *event)`` to ``(row,)``."""
        energy = -self.statistics(x) @ self.theta
        return energy if self.log_measure is None else energy - self.log_measure(x)


class ExponentialFamily(EnergyModel):
    """Any exponential family.

    Args:
        statistics: T, from events ``(row, *event)`` to ``(row, k)``.
        start: initial theta ``(k,)``, where the law exists.
        event_shape: of one datum; ``()`` for numbers.
        support: constraint on data; real numbers if None.
        log_measure: log h, ``(row, *event)`` to ``(row,)``.
    """

    kind: ClassVar[str] = "ExponentialFamily"
    energy: LinearEnergy

    def __init__(
        self,
        statistics: Callable[[Tensor], Tensor],
        start: Sequence[float] | Tensor,
        event_shape: tuple[int, ...] = (),
        support: Any = None,
        log_measure: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        energy = LinearEnergy(statistics, to_tensor("start", start), log_measure)
        super().__init__(energy, event_shape, None, support=support)
        self._given = {}

    @property
    def theta(self) -> Tensor:
        """Natural parameters ``(k,)``."""
        found: Tensor = self.energy.theta.detach()
        return found

    def fit(self, x: Any, *args: Any, **options: Any) -> EnergyFit:
        """As ``EnergyModel.fit``; by default Adam from 0.05, 512 noise draws and the average of the last half."""
        defaults = {"lr": 0.05, "average_last": 0.5}
        if len(args) < 3:
            defaults["noise_samples"] = 512
        return super().fit(x, *args, **{**defaults, **options})

    def config(self) -> dict[str, Any]:
        """Refused: a file cannot hold the statistics."""
        raise ValueError("a family of your own statistics cannot be saved: keep theta, or use a named family")


class _Standardised:
    """``((x - m) / s, ((x - m)^2 / s^2 - 1) / sqrt 2)``."""

    def __init__(self, mean: Tensor, variance: Tensor) -> None:
        self.mean, self.scale = mean, variance.sqrt()

    def __call__(self, x: Tensor) -> Tensor:
        z = (x - self.mean) / self.scale
        return torch.stack([z, (z.square() - 1) / math.sqrt(2)], -1)


class TruncatedNormal(ExponentialFamily):
    """``p(x) ~ exp(t1 x + t2 x^2)`` on ``low <= x <= high``, the law of ``N(mu, sigma^2)`` where it was cut.

    Args:
        low, high: the cuts; infinite where there is none.
    """

    kind: ClassVar[str] = "TruncatedNormal"

    def __init__(self, low: float = 0.0, high: float = math.inf) -> None:
        if not low < high:
            raise ValueError(f"low must be below high, got {low} and {high}")
        if math.isinf(high):
            support: Any = None if math.isinf(low) else constraints.greater_than_eq(low)
        else:
            support = constraints.less_than(high) if math.isinf(low) else constraints.interval(low, high)
        super().__init__(lambda x: torch.stack([x, x.square()], -1), [0.0, -0.5], (), support)
        self._cuts = float(low), float(high)

    @property
    def location(self) -> float:
        """mu, the uncut law's mean."""
        t1, t2 = self.theta.tolist()
        return float(-t1 / (2 * t2))

    @property
    def scale(self) -> float:
        """sigma, the uncut law's standard deviation; NaN where the density curves upwards between the cuts."""
        return float((-1 / (2 * self.theta[1])).sqrt())

    def fit(self, x: Any, *args: Any, **options: Any) -> EnergyFit:
        """As ``ExponentialFamily.fit``, from the normal law of the data's mean and variance."""
        data = self._check(x, "x")
        mean, variance = data.mean(), data.var(correction=0)
        if not float(variance) > (10 * torch.finfo(data.dtype).eps * float(mean)) ** 2:
            raise ValueError("x is the same in every row: no normal law is the most likely")
        if float(mean.square() / variance) * torch.finfo(data.dtype).eps > 1e-3:
            warnings.warn(
                "x lies so far from 0 that theta' T(x) loses its digits: give float64", SamplerWarning, stacklevel=2
            )
        # Statistics of mean 0 and covariance 1 under that normal law: one rate serves data of any unit, and log Z moves
        # little with the parameters (a constant in the energy is multiplied by each batch's error of Z).
        energy, root = self.energy.to(device=data.device, dtype=data.dtype), math.sqrt(2)
        t = energy.theta
        with torch.no_grad():
            t.copy_(torch.stack([torch.zeros_like(mean), torch.full_like(mean, -1 / root)]))
        statistics, energy.statistics = energy.statistics, _Standardised(mean, variance)
        try:
            result = super().fit(data, *args, **options)
        finally:
            energy.statistics = statistics
            with torch.no_grad():
                constant = float(-t[0] * mean * variance.rsqrt() + t[1] / root * (mean.square() / variance - 1))
                first = t[0] * variance.rsqrt() - root * t[1] * mean / variance
                t.copy_(torch.stack([first, t[1] / (root * variance)]))
        # log Z goes with theta' T, which is less than what was learned by a constant
        found = result.log_partition
        assert found is not None and self.log_z is not None
        self.log_z -= constant
        moved = {n: getattr(found, n) - constant for n in ("value", "lower", "upper", "log_weights")}
        history = {n: h - constant if n.startswith("log_partition") else h for n, h in result.history.items()}
        self.result = replace(result, log_partition=found._replace(**moved), history=history)
        return self.result

    def config(self) -> dict[str, Any]:
        """The cuts."""
        return {"low": self._cuts[0], "high": self._cuts[1]}


class VonMises(ExponentialFamily):
    """``p(x) ~ exp(k1 cos x + k2 sin x)`` on angles from -pi to pi."""

    kind: ClassVar[str] = "VonMises"

    def __init__(self) -> None:
        support = constraints.interval(-math.pi, math.pi)
        super().__init__(lambda x: torch.stack([x.cos(), x.sin()], -1), [0.0, 0.0], (), support)

    @property
    def concentration(self) -> float:
        """kappa."""
        return float(self.theta.norm())

    @property
    def location(self) -> float:
        """The mean direction."""
        return float(torch.atan2(self.theta[1], self.theta[0]))

    def config(self) -> dict[str, Any]:
        """There is nothing to set."""
        return {}


class ConwayMaxwellPoisson(ExponentialFamily):
    """``p(k) ~ lambda^k / (k!)^nu``: counts that are less (nu > 1) or more (nu < 1) spread than Poisson's."""

    kind: ClassVar[str] = "ConwayMaxwellPoisson"

    def __init__(self) -> None:
        super().__init__(
            lambda k: torch.stack([k, -torch.lgamma(k + 1)], -1), [0.0, 1.0], (), constraints.nonnegative_integer
        )

    @property
    def rate(self) -> float:
        """lambda."""
        return float(self.theta[0].exp())

    @property
    def dispersion(self) -> float:
        """nu."""
        return float(self.theta[1])

    def fit(self, x: Any, noise: Any = "auto", *args: Any, **options: Any) -> EnergyFit:
        """As ``ExponentialFamily.fit``, from the Poisson law of the data's mean."""
        if isinstance(noise, str) and noise == "auto":
            counts = self._check(x, "x")
            noise = PoissonNoise.fit(counts)
            with torch.no_grad():
                self.energy.theta.copy_(torch.stack([counts.mean().clamp(min=1e-3).log(), torch.ones(())]))
        return super().fit(x, noise, *args, **options)

    def config(self) -> dict[str, Any]:
        """There is nothing to set."""
        return {}


class Boltzmann(ExponentialFamily):
    """A fully visible Boltzmann machine: ``p(x) ~ exp(b' x + sum_{i<j} W_ij x_i x_j)`` on zeros and ones.

    Args:
        num_units: D; theta holds b, then W row by row above the diagonal.
    """

    kind: ClassVar[str] = "Boltzmann"

    def __init__(self, num_units: int) -> None:
        check_count("num_units", num_units, 2)
        upper = torch.triu_indices(num_units, num_units, 1)

        def statistics(x: Tensor) -> Tensor:
            return torch.cat([x, x[:, upper[0]] * x[:, upper[1]]], 1)

        start = torch.zeros(num_units + upper.shape[1])
        super().__init__(statistics, start, (num_units,), constraints.independent(constraints.boolean, 1))
        self.num_units = num_units

    def fit(self, x: Any, noise: Any = "auto", *args: Any, **options: Any) -> EnergyFit:
        """As ``ExponentialFamily.fit``, from independent units of the data's means."""
        if isinstance(noise, str) and noise == "auto":
            units = self._check(x, "x")
            noise = BernoulliNoise.fit(units)
            with torch.no_grad():
                self.energy.theta[: self.num_units].copy_(torch.logit(noise.probs))
        return super().fit(x, noise, *args, **options)

    def config(self) -> dict[str, Any]:
        """The number of units."""
        return {"num_units": self.num_units}
