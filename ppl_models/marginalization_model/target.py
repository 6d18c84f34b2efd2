"""A user's unnormalised density, checked once and made finite."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from inference._errors import SamplerWarning
from inference.objectives.persistent_chains import uniform_values
from inference.potential.discrete import DiscretePotential

__all__ = ["EnergyTarget", "make_target"]

_TRIALS = 1024
_BELOW = 10.0  # nats under the lowest finite value seen, for states of zero density


class EnergyTarget:
    """``log_density - offset`` in the model's dtype, and finite: a state of zero density gets ``floor``.

    The offset is 0 until ``centre``.

    Args:
        log_density: ``(B, D) -> (B,)``.
        cardinalities: ``(D,)``.
        like: a tensor of the wanted dtype and device.
        generator: of the trial rows.

    Raises:
        TypeError, ValueError: it returns no tensor, another shape, NaN, plus infinity, or minus infinity everywhere.

    Warns:
        SamplerWarning: some states have zero density.
    """

    def __init__(
        self, log_density: Callable[[Tensor], Tensor], cardinalities: Tensor, like: Tensor, generator: torch.Generator
    ) -> None:
        if not callable(log_density):
            raise TypeError(f"log_density must be a callable (B, D) -> (B,), got {type(log_density).__name__}")
        self.log_density, self.dtype, self.floor, self.offset = log_density, like.dtype, -math.inf, 0.0
        trials = uniform_values(cardinalities, _TRIALS, generator)
        for rows in (trials, trials[:3]):
            with torch.no_grad():
                found = log_density(rows)
            if not isinstance(found, Tensor):
                raise TypeError(f"log_density must return a tensor, it returned {type(found).__name__}")
            if found.shape != (len(rows),):
                raise ValueError(
                    f"log_density must map rows {tuple(rows.shape)} to shape ({len(rows)},), it returned "
                    f"{tuple(found.shape)}"
                )
        with torch.no_grad():
            found = log_density(trials).to(like)
        bad = torch.isnan(found) | (found == math.inf)
        if bool(bad.any()):
            row = trials[bad][0].tolist()
            raise ValueError(f"log_density is {float(found[bad][0])} at {row}: it must be finite, or minus infinity")
        possible = found[found > -math.inf]
        if not len(possible):
            raise ValueError(
                f"log_density is minus infinity at all of {_TRIALS} random rows: there is nothing to learn from; "
                "encode the states so that possible ones are common"
            )
        self.floor = float(possible.min()) - _BELOW
        if len(possible) < len(found):
            warnings.warn(
                f"log_density is minus infinity at {len(found) - len(possible)} of {len(found)} random rows; such "
                f"states are given {self.floor:.4g}, {_BELOW:g} nats below the lowest finite value there",
                SamplerWarning,
                stacklevel=5,
            )

    def centre(self, level: float) -> None:
        """Take ``level`` from the density: a network learns its level only from near by."""
        self.offset, self.floor = self.offset + level, self.floor - level

    def exact(self, values: Tensor) -> Tensor:
        """``(B, D)`` to ``(B,)``, minus infinity where the density is zero."""
        return (self.log_density(values) - self.offset).to(self.dtype)

    def __call__(self, values: Tensor) -> Tensor:
        """``(B, D)`` to ``(B,)``."""
        found = self.exact(values)
        return torch.where(found == -math.inf, self.floor, found)


def make_target(
    density: Callable[..., Any],
    site: str | None,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    cardinalities: Tensor,
    like: Tensor,
    generator: torch.Generator,
) -> EnergyTarget:
    """The target from a density, or from a Pyro model if ``site`` names its discrete site."""
    if site is None:
        if args or kwargs:
            raise ValueError("args and kwargs are those of a Pyro model: name its discrete site by site=")
        return EnergyTarget(density, cardinalities, like, generator)
    if not callable(density):
        raise TypeError(f"log_density must be a Pyro model, got {type(density).__name__}")
    found = DiscretePotential(density, tuple(args), kwargs)
    if site not in found.sites:
        raise ValueError(f"site {site!r} is no latent site of the model; its latent sites are {list(found.sites)}")
    if len(found.sites) > 1:
        others = [name for name in found.sites if name != site]
        raise ValueError(f"the model has the latent sites {others} beside {site!r}: condition on them, or sum them out")
    if list(found.sizes) != cardinalities.tolist():
        raise ValueError(
            f"site {site!r} has variables of {list(found.sizes)} values, and the model's cardinalities are "
            f"{cardinalities.tolist()}"
        )
    return EnergyTarget(found.log_density, cardinalities, like, generator)
