"""Paths as Pyro sites: a path has a density relative to the prior's path measure, so the prior's is 1 everywhere.

The guide's paths have log density log dQ/dP, in the form whose mean is the closed-form KL (low variance) or in the
unbiased one that importance weights need.
"""

from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from sde import Path

__all__ = ["ControlledPath", "PriorPath"]


class _PathLaw(TorchDistribution):
    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 - torch.distributions reads it from the class
    support = constraints.independent(constraints.real, 2)
    has_rsample = True

    def __init__(self, simulate: Callable[[], Path], batch_shape: torch.Size, event_shape: torch.Size) -> None:
        self._simulate = simulate
        self._last: Path | None = None
        super().__init__(batch_shape, event_shape, validate_args=False)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Paths ``(B, T, D)``."""
        if tuple(sample_shape):
            raise NotImplementedError("paths are drawn one a series; enlarge the batch instead")
        self._last = self._simulate()
        self._value = self._last.x.movedim(0, 1)
        return self._value

    def expand(self, batch_shape: Any, _instance: Any = None) -> "_PathLaw":
        """Itself: the law knows its batch."""
        if torch.Size(batch_shape) != self.batch_shape:
            raise NotImplementedError(f"a law of {tuple(self.batch_shape)} paths can't become {tuple(batch_shape)}")
        return self


class PriorPath(_PathLaw):
    """Paths of the prior SDE; log density 0 relative to its own measure."""

    def log_prob(self, value: Tensor) -> Tensor:
        """``(B,)``, zeros."""
        return value.new_zeros(value.shape[: value.ndim - 2])


class ControlledPath(_PathLaw):
    """Paths of the posterior SDE; log dQ/dP of the path drawn last, which is the only one whose density is known."""

    def __init__(
        self, simulate: Callable[[], Path], batch_shape: torch.Size, event_shape: torch.Size, closed_form: bool = True
    ) -> None:
        super().__init__(simulate, batch_shape, event_shape)
        self.closed_form = closed_form

    def log_prob(self, value: Tensor) -> Tensor:
        """``(B,)``."""
        if self._last is None or value is not self._value:
            raise ValueError("the density of a path is known for the one that this law drew last")
        return self._last.kl.sum(-1) if self.closed_form else -self._last.log_ratio.sum(-1)
