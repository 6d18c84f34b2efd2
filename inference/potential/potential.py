"""The potential energy U(z) = -log p(z) and its gradient, for all chains in one batch of tensor operations.

The gradient of *one* chain is recorded through ordinary autograd as a graph of tensor operations, in which no Pyro is
left, and the graph is mapped
over chains.  Recording through autograd rather than ``torch.func`` lets models with old-style ``autograd.Function``s
(Pyro's enumeration, gpytorch) be
captured like any other.  A model that cannot be recorded runs one chain at a time, with one warning that says why.
"""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, fx
from torch.distributions import Transform
from torch.func import vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from inference._errors import CaptureWarning
from inference.potential.graph import CaptureError, trace
from inference.potential.log_density import LogDensity, MinibatchPlate, Site, scoped_model
from inference.runtime.generators import derive_seed, scoped_seed

__all__ = ["Density", "Potential", "PotentialFunction"]

Batch = Mapping[str, Tensor]

# Of the largest intermediate tensor of the chains that are evaluated at once.  1,024 chains of a logistic regression
# on 1,000 rows took 13.6 us a chain uncompiled, and 9.5 in passes of 256; compiled there was no difference.  A pass is
# a copy of the density in the graph, so there are few.
_CACHE_BYTES = 1 << 20
_MOST_PASSES = 4
_SCALES = (2.0, 1.0, 0.5, 0.1, 0.001)  # of points at which the graph is compared with the model: the first that works


class Density(Protocol):
    """What a potential is made of: the log-density of one chain and the layout of its flat vector."""

    dim: int
    dtype: torch.dtype
    device: torch.device
    sites: dict[str, Site]
    plates: dict[str, MinibatchPlate]
    data: tuple[Tensor, ...]

    def run(
        self, values: Mapping[str, Tensor], batch: Batch | None = None, row: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Log-density, constrained latent values and deterministic values at one chain's unconstrained values, with
        its row of ``data``.
        """

    def unflatten(self, z: Tensor) -> dict[str, Tensor]:
        """Sites' unconstrained values."""

    def flatten(self, values: Mapping[str, Tensor]) -> Tensor:
        """Flat vectors ``(chain, dim)``."""

    def minibatch(self, seed: int = 0) -> dict[str, Tensor]:
        """Indices for a dry evaluation."""


class PotentialFunction(LogDensity):
    """A user's own ``potential_fn``: unconstrained values by site name in, a scalar energy out, as
    ``pyro.infer.HMC(potential_fn=...)``.

    Args:
        potential_fn: maps a dict of one chain's unconstrained values to the scalar energy.
        example: one chain's values, for shapes, dtypes and device.
        transforms: site name to the transform from its support to unconstrained space, to report constrained draws.
    """

    def __init__(
        self,
        potential_fn: Callable[[dict[str, Tensor]], Tensor],
        example: Mapping[str, Tensor],
        transforms: Mapping[str, Transform] | None = None,
    ) -> None:
        if not example:
            raise ValueError("potential_fn needs initial_params: a dict of unconstrained tensors, one entry a site")
        self.potential_fn = _recordable(potential_fn)
        self.transforms = dict(transforms or {})
        self.sites, self.plates, self.observed, self.priors, self.data = {}, {}, {}, {}, ()
        start = 0
        for name, value in example.items():
            constrained = self.transforms[name].inv(value) if name in self.transforms else value
            self.sites[name] = Site(name, constrained.shape, value.shape, start, start + value.numel(), value.dtype)
            start += value.numel()
        self.dim, self.device = start, next(iter(example.values())).device
        self.dtype = functools.reduce(torch.promote_types, (v.dtype for v in example.values()))

    def run(
        self, values: Mapping[str, Tensor], batch: Batch | None = None, row: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Minus the energy, and the values in constrained space."""
        constrained = {n: self.transforms[n].inv(v) if n in self.transforms else v for n, v in values.items()}
        with scoped_model(validate=False):
            energy = self.potential_fn(dict(values))
        return -energy, constrained, {}

    def initial_position(
        self, seed: int, strategy: Callable[[Any], Any] | None = None, row: Sequence[Tensor] | None = None
    ) -> Tensor:
        """There is no model to start from."""
        raise ValueError("a kernel with potential_fn needs initial_params in MCMC(...)")


def _recordable(potential_fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function itself, where it is what ``pyro.infer.mcmc.util.initialize_model(jit_compile=True)`` returns: what
    TorchScript runs cannot be recorded.
    """
    compiled = getattr(potential_fn, "func", None)  # of a functools.partial
    if getattr(compiled, "__name__", "") == "_potential_fn_jit":
        plain: Callable[..., Any] = compiled.__self__._potential_fn  # type: ignore[union-attr]
        return plain
    return potential_fn


class _Widest(TorchDispatchMode):
    """The size of the largest tensor that an operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            made = [v for v in tree_leaves(out) if isinstance(v, Tensor)]
            self.bytes = max([self.bytes, *(v.numel() * v.element_size() for v in made)])
        return out


class Potential:
    """U(z) and its gradient for chains ``(chain, dim)``.

    Args:
        density: a ``LogDensity`` (a Pyro model) or ``PotentialFunction``.
        chunk_size: most chains evaluated at once; bounds memory, changes nothing else. By default, on a CPU, as many
            as keep the largest intermediate tensor in a core's cache, in four passes at most; else all.
        capture: ``False`` runs the model itself, one chain at a time (for debugging and for tests).

    Attributes:
        captured: whether the model runs as a graph.
        data: what differs between chains besides their positions, each tensor ``(chain, ...)``: the rows of the
            model's arguments that ``in_dims`` names.  They are inputs of the one graph, mapped over chains.  Empty if
            all chains have the same density.
        continuous: whether there are points between points: not among states.
    """

    continuous: ClassVar[bool] = True

    def __init__(self, density: Density, *, chunk_size: int | None = None, capture: bool = True) -> None:
        if chunk_size is not None and (
            not isinstance(chunk_size, int) or isinstance(chunk_size, bool) or chunk_size < 1
        ):
            raise ValueError(f"chunk_size must be a positive integer or None, got {chunk_size!r}")
        self.density, self.chunk_size = density, chunk_size
        self.dim, self.dtype, self.device = density.dim, density.dtype, density.device
        self.sites, self.plates, self.data = density.sites, density.plates, density.data
        self._plate_names = list(density.plates)
        self.captured = False
        self._widest = 0  # bytes of one chain's largest intermediate tensor, once captured
        self._dry_batch = density.minibatch()
        self._names: list[str] = []
        self._graph: fx.GraphModule | None = None
        self._constrain_graph: fx.GraphModule | None = None
        if capture:
            with scoped_seed(0, self.device):
                self._capture()

    # ------------------------------------------------------------------ evaluation
    def __call__(self, z: Tensor, batch: Batch | None = None) -> Tensor:
        """U of each chain, ``(chain,)``; ``batch`` gives each minibatch plate indices ``(batch_size,)`` shared by all
        chains or ``(chain, batch_size)``.
        """
        return self.value_and_grad(z, batch)[0]

    def value_and_grad(self, z: Tensor, batch: Batch | None = None) -> tuple[Tensor, Tensor]:
        """U ``(chain,)`` and dU/dz ``(chain, dim)`` at ``z`` ``(chain, dim)``. Not finite where the density is not,
        for that chain alone.

        Raises:
            ValueError: chains have their own data, and ``z`` has not one row a chain.
        """
        indices = self._indices(batch)
        if self.data and len(z) != len(self.data[0]):
            raise ValueError(
                f"{len(self.data[0])} chains have their own data, and positions of {len(z)} were given: "
                "there must be one row a chain, in their order"
            )
        parts, size = [], self._pass_size(len(z))
        for start in range(0, len(z), size):
            stop = start + size
            rows = [i if i.dim() == 1 else i[start:stop] for i in indices]
            parts.append(self._evaluate(z[start:stop], rows, [d[start:stop] for d in self.data]))
        if len(parts) == 1:
            return parts[0]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def _pass_size(self, chains: int) -> int:
        if self.chunk_size is not None:
            return self.chunk_size
        if self.device.type != "cpu" or not self._widest:
            return max(1, chains)
        return max(1, _CACHE_BYTES // self._widest, -(-chains // _MOST_PASSES))

    def constrain(self, z: Tensor, *, deterministic: bool = False) -> dict[str, Tensor]:
        """Values of the latent sites in constrained space, ``(n, *shape)`` for ``z`` of shape ``(n, dim)``; with
        ``deterministic``, those sites too.

        Where chains have their own data, n must be a multiple of their number, and all rows of a chain stand
        together: ``(chain, draw, dim)`` flattened.
        """
        data = self._repeated_data(len(z))
        if self._constrain_graph is not None:
            with torch.no_grad():
                values = vmap(self._constrain_graph)(z, *data)
        else:
            rows = [self._constrain_one(*row) for row in zip(z, *data, strict=True)]
            values = [torch.stack([r[i] for r in rows]) for i in range(len(rows[0]))]
        named = dict(zip(self._names, values, strict=True))
        return named if deterministic else {n: named[n] for n in self.sites}

    def probe(self) -> float:
        """U at a fixed point and minibatch (summed over chains that have their own data): two models that differ, in a
        hyperparameter say, differ here.
        """
        chains = len(self.data[0]) if self.data else 1
        return float(self(self._trial(7).expand(chains, -1), self.density.minibatch(7)).sum())

    def _repeated_data(self, rows: int) -> list[Tensor]:
        if not self.data:
            return []
        draws, left = divmod(rows, len(self.data[0]))
        if left:
            raise ValueError(f"{len(self.data[0])} chains have their own data, and {rows} rows are no multiple of that")
        return [d if draws == 1 else d.repeat_interleave(draws, 0) for d in self.data]

    def _indices(self, batch: Batch | None) -> list[Tensor]:
        if set(batch or {}) != set(self._plate_names):
            raise ValueError(
                f"the model's minibatch plates are {self._plate_names}; indices were given for {sorted(batch or {})}"
            )
        return [batch[name] for name in self._plate_names] if batch else []

    def _evaluate(self, z: Tensor, indices: list[Tensor], data: list[Tensor]) -> tuple[Tensor, Tensor]:
        if self._graph is not None:
            in_dims = (0, *(None if i.dim() == 1 else 0 for i in indices), *(0 for _ in data))
            return vmap(self._graph, in_dims=in_dims)(z, *indices, *data)
        rows = [
            self._one(z[c], *(i if i.dim() == 1 else i[c] for i in indices), *(d[c] for d in data))
            for c in range(len(z))
        ]
        return torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows])

    # ------------------------------------------------------------------ one chain
    def _one(self, z: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """U and its gradient from a position, the plates' indices and the chain's data."""
        indices, row = inputs[: len(self._plate_names)], inputs[len(self._plate_names) :]
        # Leaves per site rather than one flat leaf: the gradient is then one concatenation instead of a padded sum of
        # slices.
        values = {n: v.detach().requires_grad_(True) for n, v in self.density.unflatten(z).items()}
        with torch.enable_grad():
            energy = -self.density.run(values, dict(zip(self._plate_names, indices, strict=True)), row)[0]
            gradients = torch.autograd.grad(energy, list(values.values()), allow_unused=True, materialize_grads=True)
        return energy.detach().to(self.dtype), torch.cat([g.reshape(-1).to(self.dtype) for g in gradients])

    def _constrain_one(self, z: Tensor, *row: Tensor) -> list[Tensor]:
        with torch.no_grad():
            _, sites, deterministic = self.density.run(self.density.unflatten(z), self._dry_batch, row)
        self._names = [*sites, *deterministic]
        return [*sites.values(), *deterministic.values()]

    # ------------------------------------------------------------------ capture
    def _capture(self) -> None:
        row = [d[0] for d in self.data]
        for attempt in range(20):
            z = self._trial(attempt)
            batch = self.density.minibatch(attempt)
            indices = [batch[n] for n in self._plate_names]
            try:
                with _Widest() as widest:
                    expected = self._one(z, *indices, *row)
            except (ValueError, RuntimeError):
                if attempt == 19:
                    raise
                continue
            if bool(torch.isfinite(expected[0])):
                break
        self._dry_batch = batch
        try:
            self._graph = trace(self._one, z, *indices, *row)
            self._constrain_graph = trace(self._constrain_one, z, *row)
            self._check_against_model()
        except CaptureError as error:
            self._graph = self._constrain_graph = None
            if "random numbers" in str(error):
                raise ValueError(
                    "the model is not a deterministic function of its latent "
                    f"values: {error}. Put dropout layers in eval mode"
                ) from error
            warnings.warn(
                "this model runs one chain at a time, which is slow, because it "
                f"cannot be recorded as a graph: {error}. Branches on latent "
                "values, float() and .item() in the model are the usual reason",
                CaptureWarning,
                stacklevel=5,
            )
            return
        self.captured, self._widest = True, widest.bytes

    def _trial(self, attempt: int, scale: float | None = None) -> Tensor:
        noise = torch.Generator().manual_seed(derive_seed(attempt, "trial"))
        if scale is None:
            scale = 0.5 * 0.8**attempt
        return (scale * torch.randn(self.dim, generator=noise)).to(device=self.device, dtype=self.dtype)

    def _far_point(
        self, attempt: int, indices: list[Tensor], row: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """A point as far from zero as the model has a density at, with its energy and slope; None if it has none."""
        for scale in _SCALES:
            z = self._trial(attempt, scale)
            try:
                energy, slope = self._one(z, *indices, *row)
            except (ValueError, RuntimeError):
                continue
            if bool(torch.isfinite(energy)):
                return z, energy, slope
        return None

    def _check_against_model(self) -> None:
        """The graph at other points, another minibatch and another chain must be the model there: a branch that was
        frozen while recording would show.
        """
        batch = self.density.minibatch(101)
        indices = [batch[n] for n in self._plate_names]
        data = [d[[0, -1]] for d in self.data]
        first, second = (self._far_point(101 + c, indices, [d[c] for d in data]) for c in range(2))
        if first is None or second is None:
            return
        z, direct = torch.stack([first[0], second[0]]), [first[1:], second[1:]]
        assert self._graph is not None and self._constrain_graph is not None
        try:
            with torch.no_grad():
                value, gradient = self._evaluate(z, indices, data)
                vmap(self._constrain_graph)(z, *data)
        except RuntimeError as error:
            raise CaptureError(
                f"its graph cannot be mapped over chains: {str(error).strip().splitlines()[0][:200]}"
            ) from error
        tolerance = 1e-3 if self.dtype in (torch.float32, torch.bfloat16, torch.float16) else 1e-8
        for row, (energy, slope) in enumerate(direct):
            same = (
                torch.isclose(value[row], energy, rtol=tolerance, atol=tolerance, equal_nan=True)
                & torch.isclose(
                    gradient[row],
                    slope,
                    rtol=tolerance,
                    atol=tolerance * (1 + float(slope.detach().abs().max().nan_to_num())),
                    equal_nan=True,
                ).all()
            )
            if not same:
                raise CaptureError("it takes another path at other latent values than at those it was recorded with")
