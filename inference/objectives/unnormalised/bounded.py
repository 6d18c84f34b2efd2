"""Noise on boxes and half-lines."""

import math
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributions import constraints

from inference.objectives.unnormalised.noise import Noise, _rows

__all__ = ["BoxNoise", "HalfLineNoise"]


class BoxNoise(Noise):
    """Uniform on a box; ``fit`` takes the data's range, wider by ``margin`` of it on each side."""

    low: Tensor
    high: Tensor

    def __init__(self, low: Tensor, high: Tensor) -> None:
        if low.shape != high.shape or not bool((low < high).all()):
            raise ValueError("low must be below high, in the same shape")
        super().__init__(low.shape)
        self.register_buffer("low", low.detach().clone().reshape(-1))
        self.register_buffer("high", high.detach().clone().reshape(-1))

    @property
    def support(self) -> Any:
        """The box."""
        edges = constraints.interval(self.low.reshape(self.event_shape), self.high.reshape(self.event_shape))
        return constraints.independent(edges, len(self.event_shape)) if self.event_shape else edges

    @classmethod
    def fit(cls, x: Tensor, margin: float = 0.1) -> Self:
        """The box around data ``(row, *event)``."""
        low, high = x.amin(0), x.amax(0)
        width = torch.where(high > low, high - low, torch.ones_like(low))
        return cls(low - margin * width, high + margin * width)

    def draw(self, num: int) -> Tensor:
        """As in ``Noise``."""
        u = torch.rand(num, len(self.low), dtype=self.low.dtype, device=self.low.device)
        return self.transport(u)

    @property
    def uniforms(self) -> int:
        """One a coordinate."""
        return len(self.low)

    def transport(self, u: Tensor) -> Tensor:
        """From the unit cube to the box."""
        return (self.low + u.to(self.low) * (self.high - self.low)).reshape(len(u), *self.event_shape)

    def log_prob(self, x: Tensor) -> Tensor:
        """As in ``Noise``; minus infinity outside."""
        flat = _rows(x)
        inside = ((flat >= self.low) & (flat <= self.high)).all(1)
        value = -(self.high - self.low).log().sum()
        return torch.where(inside, value, torch.full_like(value, -math.inf))


class HalfLineNoise(Noise):
    """Independent exponential laws above ``low``; ``fit`` takes ``inflation`` times the data's mean excess.

    Args:
        mean: mean excess over ``low``, ``(*event,)``.
        low: where the half-line starts.
    """

    mean: Tensor

    def __init__(self, mean: Tensor, low: float = 0.0) -> None:
        super().__init__(mean.shape, constraints.greater_than_eq(low))
        self.low = float(low)
        self.register_buffer("mean", mean.detach().clone().reshape(-1))

    @classmethod
    def fit(cls, x: Tensor, low: float = 0.0, inflation: float = 1.5) -> Self:
        """The law for data ``(row, *event)`` above ``low``."""
        return cls((inflation * (x - low).mean(0)).clamp(min=torch.finfo(x.dtype).tiny), low)

    def draw(self, num: int) -> Tensor:
        """As in ``Noise``."""
        u = torch.rand(num, len(self.mean), dtype=self.mean.dtype, device=self.mean.device)
        return self.transport(u)

    @property
    def uniforms(self) -> int:
        """One a coordinate."""
        return len(self.mean)

    def transport(self, u: Tensor) -> Tensor:
        """Exponential quantiles."""
        return (self.low - self.mean * torch.log1p(-u).to(self.mean)).reshape(len(u), *self.event_shape)

    def log_prob(self, x: Tensor) -> Tensor:
        """As in ``Noise``; minus infinity below ``low``."""
        excess = _rows(x) - self.low
        value = (-excess / self.mean - self.mean.log()).sum(1)
        return torch.where((excess >= 0).all(1), value, torch.full_like(value, -math.inf))

    def config(self) -> dict[str, Any]:
        """With ``low``."""
        return {**super().config(), "low": self.low}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Self:
        """The noise that was saved."""
        return cls(state["mean"].reshape(tuple(config["event_shape"])), config["low"])
