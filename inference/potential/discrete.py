"""Models whose latent sites are all discrete, as energies over state numbers.

A configuration is a row of integers ``(rows, dim)``: variable j is in state ``x_j`` of ``sizes[j]``.  Samplers ask for
its log-density and for the conditional of some variables given the rest; a model that knows its local energies answers
the second question cheaply, and :class:`DiscretePotential` answers it for any Pyro model by evaluating the joint in
every state.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from pyro import poutine
from pyro.distributions import MaskedDistribution
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import Independent, identity_transform
from torch.func import vmap

from inference._errors import CaptureWarning
from inference.potential.graph import CaptureError, trace
from inference.potential.log_density import LogDensity, Site, _has_density, _log_prob, _Unconstrained, scoped_model
from inference.potential.potential import Batch, Potential
from inference.runtime.generators import generator, scoped_seed

__all__ = ["DiscreteEnergy", "DiscretePotential", "EnergyPotential", "draw_states", "gibbs_sweep"]

_TRIALS = 7  # configurations at which the graph is compared with the model


@runtime_checkable
class DiscreteEnergy(Protocol):
    """A law over ``dim`` discrete variables, known up to its normaliser.

    Attributes:
        sizes: number of states of each variable.
        dtype, device: of log-densities.
    """

    sizes: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def blocks(self) -> Sequence[Tensor]:
        """Variables ``(n,)`` that are independent given all others, block by block."""

    def log_density(self, states: Tensor) -> Tensor:
        """log p~ of each row, ``(rows,)``, at state numbers ``(rows, dim)``."""

    def conditional_logits(self, states: Tensor, block: int) -> Tensor:
        """Logits of the variables of a block given the others, ``(rows, n, largest size)``; minus infinity beyond a
        variable's own states.
        """


def draw_states(logits: Tensor, uniform: Tensor) -> Tensor:
    """States ``(...)`` with these logits ``(..., K)`` by inversion of uniforms ``(...)``."""
    cumulative = logits.softmax(-1).cumsum(-1)
    below = (uniform.unsqueeze(-1) * cumulative[..., -1:] >= cumulative).sum(-1)
    # The last positive probability may sum to a little less than one, and no state of probability zero may be drawn.
    places = torch.arange(logits.shape[-1], device=logits.device)
    last = torch.where(logits > -math.inf, places, 0).amax(-1)
    return torch.minimum(below, last)


def gibbs_sweep(
    energy: DiscreteEnergy,
    states: Tensor,
    uniform: Tensor,
    *,
    temper: Callable[[Tensor, Tensor], Tensor] | None = None,
    backwards: bool = False,
) -> Tensor:
    """One draw of every variable from its conditional, block after block.

    Args:
        energy: the law.
        states: ``(rows, dim)``.
        uniform: in [0, 1), ``(rows, dim)``.
        temper: ``(logits, variables) -> logits`` of another law with the same blocks.
        backwards: blocks from the last to the first: the sweep's reversal.
    """
    order = range(len(energy.blocks))
    for index in reversed(order) if backwards else order:
        variables = energy.blocks[index]
        logits = energy.conditional_logits(states, index)
        if temper is not None:
            logits = temper(logits, variables)
        states = states.index_copy(1, variables, draw_states(logits, uniform[:, variables]))
    return states


class _DiscreteSite(NamedTuple):
    """A discrete site: ``values[i]`` is its i-th state, of its event shape."""

    batch_shape: torch.Size
    values: Tensor


class _StateDensity(LogDensity):
    """A density over state numbers: its starting points are states."""

    def initial_positions(self, seeds: Sequence[int], strategy: Any, rows: Any) -> Tensor:
        """The chains' states ``(chain, dim)`` under their seeds."""
        return torch.stack([self.initial_position(seed) for seed in seeds])


class _DiscreteDensity(_StateDensity):
    """The log-joint of a Pyro model over state numbers."""

    def __init__(self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.model, self.args, self.kwargs = model, args, dict(kwargs)
        self.sites, self.plates, self.observed, self.priors, self.data = {}, {}, {}, {}, ()
        self.tables: dict[str, _DiscreteSite] = {}
        nodes = self._nodes(0, validate=True)
        start = 0
        for name, node in nodes.items():
            fn, value = node["fn"], node["value"]
            if isinstance(fn, _Subsample):
                if fn.subsample_size is not None and fn.subsample_size < fn.size:
                    raise ValueError(f"plate {name!r} is subsampled: Gibbs conditionals need the exact density")
                continue
            if node["is_observed"]:
                continue
            while isinstance(fn, Independent | MaskedDistribution):  # each element of a vector is a variable of its own
                fn = fn.base_dist
            if not getattr(fn, "has_enumerate_support", False):
                raise ValueError(
                    f"latent site {name!r} ({type(fn).__name__}) has no finite list of states, and all latent sites "
                    "must be discrete here; observe it or use another engine"
                )
            listed = fn.enumerate_support(expand=False)
            base = listed.reshape(len(listed), *value.shape[value.dim() - len(fn.event_shape) :])
            batch = value.shape[: value.dim() - len(fn.event_shape)]
            self.tables[name] = _DiscreteSite(batch, base)
            self.sites[name] = Site(name, value.shape, batch, start, start + batch.numel(), torch.get_default_dtype())
            start += batch.numel()
        if not self.sites:
            raise ValueError("the model has no discrete latent site to sample")
        self.dim, self._as_they_are = start, dict.fromkeys(self.sites, identity_transform)
        self.dtype = torch.get_default_dtype()
        self.device = next(iter(self.tables.values())).values.device

    def _nodes(self, seed: int, validate: bool) -> dict[str, Any]:
        devices = (v.device for v in [*self.args, *self.kwargs.values()] if isinstance(v, Tensor))
        scopes = scoped_seed(seed, next(devices, None)), scoped_model(validate=validate)
        with scopes[0], scopes[1], poutine.trace() as recorder, torch.no_grad():
            self.model(*self.args, **self.kwargs)
        return {n: node for n, node in recorder.trace.nodes.items() if node["type"] == "sample"}

    def values(self, states: Tensor) -> dict[str, Tensor]:
        """Sites' values at state numbers ``(..., dim)``."""
        return {
            n: self.tables[n].values[states[..., s.start : s.stop].long()].reshape((*states.shape[:-1], *s.shape))
            for n, s in self.sites.items()
        }

    def joint(self, states: Tensor) -> Tensor:
        """log p of one configuration ``(dim,)``."""
        given = _Unconstrained(self.values(states), {}, self._as_they_are)
        with scoped_model(validate=False), torch.no_grad(), poutine.trace() as recorder, given:
            self.model(*self.args, **self.kwargs)
        nodes = [node for node in recorder.trace.nodes.values() if node["type"] == "sample" and _has_density(node)]
        return torch.stack([_log_prob(node) for node in nodes]).sum()

    def initial_position(self, seed: int, strategy: Any = None, row: Any = None) -> Tensor:
        """State numbers ``(dim,)`` of a draw from the model's own sites."""
        nodes = self._nodes(seed, validate=False)
        parts = []
        for name, table in self.tables.items():
            value = nodes[name]["value"].reshape(table.batch_shape.numel(), 1, -1)
            parts.append((value == table.values.reshape(1, len(table.values), -1)).all(-1).int().argmax(1))
        return torch.cat(parts).to(self.dtype)


class _States(Potential):
    """What the MCMC driver sees of a discrete law: positions are state numbers, and there is no gradient."""

    continuous: ClassVar[bool] = False
    energy: DiscreteEnergy

    def __init__(self, density: LogDensity) -> None:
        self.density, self.chunk_size = density, None
        self.dim, self.dtype, self.device = density.dim, density.dtype, density.device
        self.sites, self.plates, self.data = density.sites, density.plates, density.data
        self.captured = False

    def value_and_grad(self, z: Tensor, batch: Batch | None = None) -> tuple[Tensor, Tensor]:
        """Minus the log-density of state numbers ``(chain, dim)``, and zeros.

        Raises:
            ValueError: they are no state numbers.
        """
        sizes = torch.tensor(self.energy.sizes, dtype=z.dtype, device=z.device)
        if not bool(((z >= 0) & (z < sizes) & (z == z.floor())).all()):
            raise ValueError("initial states must be integers from 0 to the number of states less one")
        return -self.energy.log_density(z.long()).to(z.dtype), torch.zeros_like(z)

    def probe(self) -> float:
        """The energy of one configuration."""
        last = torch.tensor([[k - 1 for k in self.energy.sizes]], device=self.device)
        return float(self.energy.log_density(last).sum())


class DiscretePotential(_States):
    """A Pyro model whose latent sites are all discrete, as a ``DiscreteEnergy``.

    Every element of a site is a variable, in the order of the sites.  The joint is recorded as a graph and mapped over
    configurations.  A conditional evaluates it in every state of the variable.

    Args:
        model: the Pyro model; its sites may not change from run to run.
        args, kwargs: what it is called with.

    Raises:
        ValueError: a latent site without a finite support, none at all, or a subsampled plate.
    """

    def __init__(
        self, model: Callable[..., Any], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> None:
        self._model_density = _DiscreteDensity(model, args, kwargs or {})
        super().__init__(self._model_density)
        self.energy = self
        tables = self._model_density.tables.values()
        self.sizes = tuple(len(t.values) for t in tables for _ in range(t.batch_shape.numel()))
        self.blocks: Sequence[Tensor] = [torch.tensor([j], device=self.device) for j in range(self.dim)]
        example = torch.zeros(self.dim, dtype=torch.long, device=self.device)
        try:
            graph = trace(lambda x: self._model_density.joint(x), example)
            self._joint: Callable[[Tensor], Tensor] = vmap(graph)
            sizes = torch.tensor(self.sizes, device=self.device)
            noise = generator(0, "trial", device=self.device)
            uniform = torch.rand(_TRIALS, self.dim, generator=noise, device=self.device)
            others = torch.cat([(uniform * sizes).long(), (sizes - 1)[None]])
            direct = torch.stack([self._model_density.joint(other) for other in others])
            if not torch.isclose(self._joint(others), direct, rtol=1e-4, atol=1e-4, equal_nan=True).all():
                raise CaptureError("the model takes another path at other states")
        except (CaptureError, RuntimeError) as error:
            warnings.warn(
                "this model runs one configuration at a time, which is slow, because it cannot be recorded as a "
                f"graph: {str(error).strip().splitlines()[0][:200]}",
                CaptureWarning,
                stacklevel=2,
            )
            self._joint = lambda x: torch.stack([self._model_density.joint(row) for row in x])

    def constrain(self, z: Tensor, *, deterministic: bool = False) -> dict[str, Tensor]:
        """The sites' values, ``(n, *shape)``."""
        return self._model_density.values(z)

    def log_density(self, states: Tensor) -> Tensor:
        """See ``DiscreteEnergy``."""
        return self._joint(states.long())

    def conditional_logits(self, states: Tensor, block: int) -> Tensor:
        """See ``DiscreteEnergy``."""
        (variable,) = self.blocks[block].tolist()
        size, rows = self.sizes[variable], len(states)
        tried = states.repeat_interleave(size, 0)
        tried[:, variable] = torch.arange(size, device=states.device).repeat(rows)
        made = self._joint(tried).reshape(rows, 1, size)
        return torch.nn.functional.pad(made, (0, max(self.sizes) - size), value=-math.inf)


class EnergyPotential(_States):
    """A ``DiscreteEnergy`` as the one site ``states`` ``(dim,)`` of a run.

    Args:
        energy: the law.
        initial: state numbers ``(dim,)`` that variables outside all blocks keep; zeros if not given.
    """

    def __init__(self, energy: DiscreteEnergy, initial: Tensor | None = None) -> None:
        self.energy = energy
        super().__init__(_EnergyDensity(energy, initial))

    def constrain(self, z: Tensor, *, deterministic: bool = False) -> dict[str, Tensor]:
        """The states, integers ``(n, dim)``."""
        return {"states": z.long()}


class _EnergyDensity(_StateDensity):
    def __init__(self, energy: DiscreteEnergy, initial: Tensor | None) -> None:
        dim = len(energy.sizes)
        self.dim, self.dtype, self.device = dim, energy.dtype, energy.device
        shape = torch.Size([dim])
        self.sites = {"states": Site("states", shape, shape, 0, dim, energy.dtype)}
        self.plates, self.observed, self.priors, self.data = {}, {}, {}, ()
        self._sizes = torch.tensor(energy.sizes, device=self.device)
        self._blocks, self._initial = energy.blocks, initial

    def initial_position(self, seed: int, strategy: Any = None, row: Any = None) -> Tensor:
        """Uniform states of the variables that move."""
        noise = generator(seed, "start", device=self.device)
        uniform = torch.rand(self.dim, generator=noise, device=self.device, dtype=self.dtype)
        start = torch.zeros_like(uniform) if self._initial is None else self._initial.to(uniform)
        for block in self._blocks:
            start[block] = (uniform[block] * self._sizes[block]).floor()
        return start
