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
from inference.objectives.unnormalised.noise import BernoulliNoise, NegativeBinomialNoise, cholesky_of
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


class _Whitened:
    """Statistics of mean 0 and covariance 1 over data: ``L^-1 (T(x) - mean)``, ``L L'`` the covariance of T.

    Attributes:
        mean, factor: the mean of T and L, in float64.
    """

    def __init__(self, statistics: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self.statistics = statistics
        t = statistics(x).double()
        self.mean = t.mean(0)
        centred = t - self.mean
        self.factor = cholesky_of(centred.T @ centred / len(t), self.mean)

    def __call__(self, x: Tensor) -> Tensor:
        centred = self.statistics(x).double() - self.mean
        return torch.linalg.solve_triangular(self.factor, centred.T, upper=False).T.to(x)


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
        """As ``EnergyModel.fit``; by default Adam from 0.05, 512 noise draws and the average of the last half.

        The fit starts at the theta that the family has. What it learns are the parameters of the statistics at mean 0
        and covariance 1 over the data, so that one rate serves data of any unit, and log Z moves little with them (a
        constant in the energy is multiplied by each batch's error of Z).
        """
        defaults = {"lr": 0.05, "average_last": 0.5}
        if len(args) < 3:
            defaults["noise_samples"] = 512
        data = self._check(x, "x")
        energy = self.energy.to(device=data.device, dtype=data.dtype)
        with torch.no_grad():
            whitened = _Whitened(energy.statistics, data)
            energy.theta.copy_(whitened.factor.T @ energy.theta.double())
        statistics, energy.statistics = energy.statistics, whitened
        try:
            result = super().fit(data, *args, **{**defaults, **options})
        finally:
            energy.statistics = statistics
            with torch.no_grad():
                theta = torch.linalg.solve_triangular(whitened.factor.T, energy.theta.double()[:, None], upper=True)
                constant = float(theta.squeeze(1) @ whitened.mean)
                energy.theta.copy_(theta.squeeze(1))
        # log Z goes with theta' T, which is more than what was learned by a constant
        found = result.log_partition
        assert found is not None and self.log_z is not None
        self.log_z += constant
        moved = {n: getattr(found, n) + constant for n in ("value", "lower", "upper", "log_weights")}
        history = {n: h + constant if n.startswith("log_partition") else h for n, h in result.history.items()}
        self.result = replace(result, log_partition=found._replace(**moved), history=history)
        return self.result

    def config(self) -> dict[str, Any]:
        """Refused: a file cannot hold the statistics."""
        raise ValueError("a family of your own statistics cannot be saved: keep theta, or use a named family")


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
            problem = "x lies so far from 0 that theta' T(x) loses its digits: give float64"
            warnings.warn(problem, SamplerWarning, stacklevel=2)
        with torch.no_grad():
            self.energy.to(data).theta.copy_(torch.stack([mean / variance, -0.5 / variance]))
        return super().fit(data, *args, **options)

    def config(self) -> dict[str, Any]:
        """The cuts."""
        return {"low": self._cuts[0], "high": self._cuts[1]}


class VonMises(ExponentialFamily):
    """``p(x) ~ exp(k1 cos x + k2 sin x)`` on angles from -pi to pi."""

    kind: ClassVar[str] = "VonMises"

    def __init__(self) -> None:
        support = constraints.interval(-math.pi, math.pi)
        super().__init__(lambda x: torch.stack([x.cos(), x.sin()], -1), [0.0, 0.0], (), support)

    def fit(self, x: Any, *args: Any, **options: Any) -> EnergyFit:
        """As ``ExponentialFamily.fit``, from the law that the mean resultant approximately has.

        Banerjee, Dhillon, Ghosh and Sra, "Clustering on the unit hypersphere using von Mises-Fisher distributions",
        JMLR 6, 2005, equation 4.4.
        """
        angle = self._check(x, "x")
        mean = torch.stack([angle.cos().mean(), angle.sin().mean()])
        length = mean.norm().clamp(max=0.9999)
        with torch.no_grad():
            self.energy.to(angle).theta.copy_(mean * (2 - length.square()) / (1 - length.square()))
        return super().fit(angle, *args, **options)

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
            noise = NegativeBinomialNoise.fit(counts)
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
