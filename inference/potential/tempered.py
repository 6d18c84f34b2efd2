"""A path of densities from a reference that can be drawn from to the target, with its gradient.

With ``log p(z) = log pi_0(z) + log L(z)``, where ``pi_0`` is the normalised reference (the prior of a Pyro model in
unconstrained space, say) and ``L`` the rest (the likelihood), the density at inverse temperature ``beta`` is

    p_beta(z) ~ pi_0(z) L(z)^beta,        U_beta(z) = -log pi_0(z) - beta log L(z),        0 <= beta <= 1.

Every row of a batch has its own ``beta``, so that a ladder of temperatures is one more batch dimension.  One backward
pass gives all that the engines need, since ``dU/dbeta = -log L``: the graph of a Pyro model is recorded as a function
of ``(z, beta)``, whose gradient holds dU/dz and -log L.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributions import Distribution

from inference.potential.log_density import LogDensity, MinibatchPlate, Site, _without_validation
from inference.potential.potential import Potential
from inference.potential.prior import prior_positions, unconstrained
from inference.runtime.generators import scoped_seed

__all__ = ["Reference", "TemperedFunction", "TemperedPath", "TemperedPotential", "tempered_path"]

Reference = str | Distribution
_BETA = "__inverse_temperature__"


class TemperedPath(Protocol):
    """What tempering engines see of a density.

    Attributes:
        dim, dtype, device: of the positions.
        captured: whether it can be recorded in a graph.
    """

    dim: int
    dtype: torch.dtype
    device: torch.device
    captured: bool

    def energy_and_grad(self, z: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """U_beta ``(row,)``, log L ``(row,)`` and dU_beta/dz ``(row, dim)`` at ``z`` ``(row, dim)`` and ``beta``
        ``(row,)``.
        """

    def sample(self, num: int, seeds: Sequence[int]) -> Tensor:
        """Draws from the reference, ``(len(seeds) * num, dim)``: a block of ``num`` a seed."""

    def constrain(self, z: Tensor) -> dict[str, Tensor]:
        """The sites' values in constrained space, ``(row, *shape)``."""

    def unconstrain(self, samples: Mapping[str, Tensor]) -> Tensor:
        """Positions ``(row, dim)`` of the sites' values."""


class TemperedPotential:
    """The path from a reference to the density of a :class:`Potential`.

    Args:
        potential: of a Pyro model or a ``potential_fn``.
        reference: ``"prior"``: the prior of the model's continuous latent sites; observed sites, factors and discrete
            sites that are summed out are tempered.  ``"flat"``: the whole density in unconstrained space is tempered;
            there is nothing to draw from at ``beta = 0``.  A ``torch`` distribution over flat unconstrained vectors
            ``(dim,)``: the path starts there.

    Raises:
        ValueError: the model has minibatch plates; it has no proper prior of its own (``LogDensity.split``); the
            reference is no distribution over vectors of this size.
    """

    def __init__(self, potential: Potential, reference: Reference = "prior") -> None:
        if potential.plates:
            raise ValueError(
                f"tempering needs the exact density, but plate {next(iter(potential.plates))!r} is subsampled: remove "
                "subsample_size"
            )
        if potential.data:
            raise ValueError("tempering takes one data set for all chains, but in_dims gives each its own")
        density = potential.density
        if isinstance(reference, str):
            if reference not in ("prior", "flat"):
                raise ValueError(f"reference must be 'prior', 'flat' or a distribution, got {reference!r}")
            if reference == "prior" and not (isinstance(density, LogDensity) and hasattr(density, "model")):
                raise ValueError("potential_fn has no prior: give reference='flat' or a distribution over z")
        else:
            _check_base("reference", reference, potential.dim)
            reference = _without_validation(reference)
        self._potential, self._reference = potential, reference
        self.dim, self.dtype, self.device = potential.dim, potential.dtype, potential.device
        self._extended = Potential(
            _WithTemperature(density, reference), chunk_size=potential.chunk_size, capture=potential.captured
        )
        self.captured = self._extended.captured

    def energy_and_grad(self, z: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As in :class:`TemperedPath`."""
        energy, gradient = self._extended.value_and_grad(torch.cat([z, beta[:, None]], 1))
        return energy, -gradient[:, -1], gradient[:, :-1]

    def sample(self, num: int, seeds: Sequence[int]) -> Tensor:
        """As in :class:`TemperedPath`."""
        if self._reference == "flat":
            raise ValueError("reference='flat' has no draws to start from: use 'prior' or a distribution")
        if isinstance(self._reference, Distribution):
            return _draws(self._reference, num, seeds, self.device, self.dtype)
        return prior_positions(self._potential.density, num, seeds)  # type: ignore[arg-type]

    def constrain(self, z: Tensor) -> dict[str, Tensor]:
        """As in :class:`TemperedPath`."""
        return self._potential.constrain(z)

    def unconstrain(self, samples: Mapping[str, Tensor]) -> Tensor:
        """As in :class:`TemperedPath`."""
        return unconstrained(self._potential.density, samples)  # type: ignore[arg-type]


class TemperedFunction:
    """The path from a base distribution to an unnormalised density that is given as a batched function.

    Args:
        log_density: ``(row, dim) -> (row,)``, differentiable by autograd.
        base: a distribution over vectors ``(dim,)`` whose support holds the target's.

    Raises:
        TypeError, ValueError: ``base`` is no distribution over vectors; ``log_density`` does not return one value a
            row.
    """

    captured = False  # batched as it is, and free to do what a graph could not record

    def __init__(self, log_density: Callable[[Tensor], Tensor], base: Distribution) -> None:
        if not callable(log_density):
            raise TypeError(f"log_density must be callable, got {type(log_density).__name__}")
        _check_base("base", base)
        self.log_density, self.base = log_density, _without_validation(base)
        self.dim = int(base.event_shape[0])
        with scoped_seed(0):
            trial = base.sample(torch.Size((3,)))
        self.dtype, self.device = trial.dtype, trial.device
        value = log_density(trial)
        if not isinstance(value, Tensor) or value.shape != (3,):
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"log_density must map (row, {self.dim}) to (row,); for 3 rows it returned {found}")

    def energy_and_grad(self, z: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As in :class:`TemperedPath`."""
        with torch.enable_grad():
            leaf = z.detach().requires_grad_(True)
            reference = self.base.log_prob(leaf)
            rest = self.log_density(leaf) - reference
            energy = -(reference + beta * rest)
            (gradient,) = torch.autograd.grad(energy.sum(), leaf, allow_unused=True, materialize_grads=True)
        return energy.detach().to(self.dtype), rest.detach().to(self.dtype), gradient

    def sample(self, num: int, seeds: Sequence[int]) -> Tensor:
        """As in :class:`TemperedPath`."""
        return _draws(self.base, num, seeds, self.device, self.dtype)

    def constrain(self, z: Tensor) -> dict[str, Tensor]:
        """The vectors themselves, as site ``"x"``."""
        return {"x": z}

    def unconstrain(self, samples: Mapping[str, Tensor]) -> Tensor:
        """The vectors themselves, from site ``"x"``."""
        if set(samples) != {"x"} or samples["x"].dim() != 2 or samples["x"].shape[1] != self.dim:
            raise ValueError(f"draws of a function's density are {{'x': (draw, {self.dim})}}")
        return samples["x"].to(device=self.device, dtype=self.dtype)


def tempered_path(
    target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], reference: Reference = "prior"
) -> TemperedPath:
    """The path of a Pyro model called with these arguments; a path is returned as it is."""
    if hasattr(target, "energy_and_grad"):
        if args or kwargs:
            raise ValueError("arguments were given for a model, but the target is a path that has none")
        path: TemperedPath = target
        return path
    if not callable(target):
        raise TypeError(f"the target must be a Pyro model, TemperedFunction or TemperedPotential, got {target!r}")
    return TemperedPotential(Potential(LogDensity(target, tuple(args), kwargs)), reference)


class _WithTemperature:
    """A density with beta as its last coordinate: log pi_0(z) + beta log L(z)."""

    def __init__(self, density: Any, reference: Reference) -> None:
        self._density, self._reference = density, reference
        self.dim, self.dtype, self.device = density.dim + 1, density.dtype, density.device
        last = Site(_BETA, torch.Size(()), torch.Size(()), density.dim, density.dim + 1, density.dtype)
        self.sites: dict[str, Site] = {_BETA: last}
        self.plates: dict[str, MinibatchPlate] = {}
        self.data: tuple[Tensor, ...] = ()

    def run(
        self,
        values: Mapping[str, Tensor],
        batch: Mapping[str, Tensor] | None = None,
        row: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """The log-density at beta; there is nothing to report in constrained space but beta itself."""
        inner = {n: v for n, v in values.items() if n != _BETA}
        beta = values[_BETA]
        if self._reference == "prior":
            prior, rest = self._density.split(inner)
        else:
            total = self._density.run(inner)[0]
            prior = torch.zeros_like(total)
            if isinstance(self._reference, Distribution):
                flat = torch.cat([inner[n].reshape(-1).to(self.dtype) for n in self._density.sites])
                prior = self._reference.log_prob(flat)
            rest = total - prior
        return prior + beta * rest, {_BETA: beta}, {}

    def unflatten(self, z: Tensor) -> dict[str, Tensor]:
        """The sites' values and beta."""
        return {**self._density.unflatten(z[..., :-1]), _BETA: z[..., -1]}

    def flatten(self, values: Mapping[str, Tensor]) -> Tensor:
        """Flat vectors ``(chain, dim)``, beta last."""
        inner = self._density.flatten({n: v for n, v in values.items() if n != _BETA})
        return torch.cat([inner, values[_BETA][:, None]], 1)

    def minibatch(self, seed: int = 0) -> dict[str, Tensor]:
        """There are no minibatches here."""
        return {}


def _check_base(name: str, base: Any, dim: int | None = None) -> None:
    if not isinstance(base, Distribution):
        raise TypeError(f"{name} must be a torch or Pyro distribution, got {type(base).__name__}")
    if base.batch_shape != () or len(base.event_shape) != 1 or (dim is not None and base.event_shape[0] != dim):
        needed = "(dim,)" if dim is None else f"({dim},)"
        raise ValueError(
            f"{name} must be one distribution over vectors {needed}, with no batch shape; it has batch shape "
            f"{tuple(base.batch_shape)} and event shape {tuple(base.event_shape)}: to_event(1) joins independent ones"
        )


def _draws(base: Distribution, num: int, seeds: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    blocks = []
    with torch.no_grad():
        for seed in seeds:
            with scoped_seed(seed, device):
                blocks.append(base.sample(torch.Size((num,))))
    return torch.cat(blocks).to(device=device, dtype=dtype)
