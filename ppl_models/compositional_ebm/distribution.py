"""A density known up to its constant, as a Pyro distribution: ``p(x) = b(x) exp(-E(x)) / Z``.

b is the noise that the fit started from (the tilt), another base, or 1 (Jiang et al., ICML 2023, arXiv 2306.07485).
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from inference.objectives.unnormalised.noise import NoiseDistribution, unchecked

__all__ = ["EnergyDistribution"]


class EnergyDistribution(TorchDistribution):
    """An energy as a distribution that any Pyro model may hold.

    Args:
        energy: a module or function from events ``(row, *event)`` to energies E ``(row,)``.
        event_shape: shape of an event; that of ``base`` if None.
        base: b, a distribution without batch shape that the energy tilts; None: b = 1.
        log_z: log Z, a number or a tensor ``()``; None while it is not known, and then densities are unnormalised.
        support: constraint on events; by default that of ``base``, or real numbers.
        sampler: ``num -> (num, *event)`` for ``sample``.

    Attributes:
        normalized: whether ``log_prob`` is of a density that integrates to one, as far as ``log_z`` is right.

    Raises:
        TypeError, ValueError: an argument does not fit.

    Example:
        >>> quartic = EnergyDistribution(lambda x: x**4, event_shape=(), log_z=math.log(1.8128049541109541))
        >>> round(quartic.log_prob(torch.tensor(1.0)).item(), 4)  # Z = 2 Gamma(5 / 4)
        -1.5949
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = False

    def __init__(
        self,
        energy: Callable[[Tensor], Tensor],
        event_shape: tuple[int, ...] | None = None,
        base: Distribution | None = None,
        log_z: float | Tensor | None = None,
        support: Any = None,
        sampler: Callable[[int], Tensor] | None = None,
        *,
        batch_shape: tuple[int, ...] = (),
    ) -> None:
        if not callable(energy):
            raise TypeError(f"energy must be a module or a function, got {type(energy).__name__}")
        if base is not None and not isinstance(base, Distribution):
            raise TypeError(f"base must be a distribution or None, got {type(base).__name__}")
        if base is not None and base.batch_shape:
            raise ValueError(
                f"base must have no batch shape, it has {tuple(base.batch_shape)}: .to_event joins independent ones"
            )
        if event_shape is None:
            if base is None:
                raise ValueError("event_shape is needed where there is no base to take it from")
            event_shape = tuple(base.event_shape)
        if base is not None and tuple(base.event_shape) != tuple(event_shape):
            raise ValueError(f"base has event shape {tuple(base.event_shape)}, event_shape is {tuple(event_shape)}")
        self.energy, self.base, self.log_z, self.sampler = energy, base, log_z, sampler
        if support is None:
            reals = constraints.independent(constraints.real, len(event_shape)) if event_shape else constraints.real
            support = reals if base is None else base.support
        self._support = support
        inner = support
        while isinstance(inner, constraints.independent):
            inner = inner.base_constraint
        self._bounded = inner is not constraints.real
        self._base_law = base if base is None or isinstance(base, NoiseDistribution) else unchecked(base)
        super().__init__(torch.Size(batch_shape), torch.Size(event_shape), validate_args=False)

    @constraints.dependent_property  # type: ignore[untyped-decorator, unused-ignore]
    def support(self) -> Any:
        """Constraint on events."""
        return self._support

    @property
    def normalized(self) -> bool:
        """Whether log Z is known."""
        return self.log_z is not None

    def expand(self, batch_shape: Any, _instance: Any = None) -> "EnergyDistribution":
        """Independent rows of the same law."""
        return EnergyDistribution(
            self.energy,
            tuple(self.event_shape),
            self.base,
            self.log_z,
            self._support,
            self.sampler,
            batch_shape=tuple(batch_shape),
        )

    def log_prob(self, value: Tensor) -> Tensor:
        """``-E(x) + log b(x) - log Z``, ``(*batch,)``; minus infinity outside the support.

        Raises:
            ValueError: the energy returned another shape than one value a row.
        """
        if self._validate_args:
            self._validate_sample(value)
        batch = value.shape[: value.dim() - len(self.event_shape)]
        rows = value.reshape(-1, *self.event_shape)
        energy = self.energy(rows)
        if not isinstance(energy, Tensor) or energy.shape != (len(rows),):
            found = tuple(energy.shape) if isinstance(energy, Tensor) else type(energy).__name__
            raise ValueError(
                f"the energy must map {(len(rows), *self.event_shape)} to one value a row, ({len(rows)},); "
                f"it returned {found} (end it with .squeeze(-1) or .sum(-1))"
            )
        log_p = -energy
        if self._base_law is not None:
            log_p = log_p + self._base_law.log_prob(rows)
        if self._bounded:
            inside = self._support.check(rows).reshape(len(rows), -1).all(1)
            log_p = torch.where(inside, log_p, torch.full_like(log_p, -math.inf))
        log_p = log_p.reshape(batch)
        if self.log_z is not None:
            log_p = log_p - self.log_z
        return log_p.expand(torch.broadcast_shapes(batch, self.batch_shape))

    @torch.no_grad()
    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draws by the sampler that was attached.

        Raises:
            NotImplementedError: there is none.
        """
        if self.sampler is None:
            raise NotImplementedError(
                "an energy has no draws of its own: give sampler=, or use EnergyModel.sample, or MCMC on the model"
            )
        shape = torch.Size(sample_shape) + self.batch_shape
        return self.sampler(math.prod(shape)).reshape(shape + self.event_shape)


def check_energy(energy: Any) -> None:
    """Refuse what is neither None nor a module, and a module with an output bias.

    An added constant cancels in the likelihood, so that an output bias would wander.
    """
    if energy is None:
        return
    if not isinstance(energy, nn.Module):
        raise TypeError(f"energy must be a torch module or None, got {type(energy).__name__}")
    layers = [m for m in energy.modules() if isinstance(m, nn.Linear | nn.Bilinear | nn.Conv1d | nn.Conv2d)]
    last = layers[-1] if layers else None
    size = getattr(last, "out_features", getattr(last, "out_channels", None))
    if last is not None and last.bias is not None and size == 1:
        raise ValueError(
            "the energy's last layer has an output bias: a constant added to E changes log Z by as much and the "
            "likelihood not at all, so that the bias would wander and drag log Z along; give it bias=False"
        )
