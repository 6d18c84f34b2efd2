"""An unnormalised Pyro model and its noise guide, row by row.

The model is any Pyro callable whose density need not integrate to one: ``pyro.sample("x", ImproperUniform(...),
obs=x)`` and a ``pyro.factor`` inside the data plate, an ``EnergyDistribution``, a truncated law without its constant.
The guide is a Pyro callable that draws the same site, here called noise.  What the objectives need of them is

    log p~(x_i)   of each row, the sum of the model's site densities in that row, and
    z_j, log q(z_j)   draws of the noise and their densities.

Scales of plates (Pyro's N / B) do not enter: all objectives here are means over rows, so that one learning rate
serves data of any size.
"""

import inspect
import warnings
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.autoguide.initialization import init_to_median
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor, nn
from torch.distributions import biject_to
from torch.func import functional_call

from inference._errors import CaptureWarning
from inference.objectives._particles import OwnParameters, localise, modules_of, own_scope
from inference.potential.graph import CaptureError, trace
from inference.potential.log_density import _has_density
from inference.runtime.generators import scoped_seed

__all__ = ["Draws", "NoisePair"]

_PLATE = "_noise_rows"
_MOST_RECORDINGS = 32  # of one pair; shapes or settings that keep changing are not worth recording each time
Values = Mapping[str, Tensor]


class Draws(NamedTuple):
    """Attributes:
    values: site -> noise ``(row, *event)``, detached.
    log_q: their log-density ``(row,)``, detached too.
    """

    values: dict[str, Tensor]
    log_q: Tensor


class NoisePair(nn.Module):
    """A model and a noise guide, and what is known of them after one run on a batch.

    Args:
        model: Pyro callable of the batch's tensors.
        guide: Pyro callable of the same tensors or of none, which draws the sites that the model observes; None where
            an objective needs no noise.
        sites: names of the noise sites where there is no guide to tell.
    """

    def __init__(
        self, model: Callable[..., Any], guide: Callable[..., Any] | None, sites: tuple[str, ...] = ()
    ) -> None:
        super().__init__()
        for name, value in (("model", model), ("guide", guide)):
            if not callable(value) and not (name == "guide" and value is None):
                raise TypeError(f"{name} must be a Pyro callable, got {type(value).__name__}")
        self.own = OwnParameters()
        self.points = nn.ParameterList()  # of the model's latent sites, in unconstrained space
        self._priors: dict[str, Any] = {}  # their names, and the bijections to their supports
        self.model_parts = nn.ModuleList(modules_of(model))
        self.guide_parts = nn.ModuleList([] if guide is None else modules_of(guide))
        self._functions = (model, guide)
        self.sites = sites
        self.position: dict[str, int] = {}  # site -> which tensor of the batch is its data
        self._conditioned = False
        self._mode = "plate"
        self._own_rows = 0
        self._takes_batch = False
        self._frame: str | None = None
        self.plate_size: int | None = None  # rows of the whole data, where the model's plate says it
        self.inspected = False
        self.discrete = False
        self.support: Any = None  # of the first noise site, as the model has it
        self._graphs: dict[Any, Callable[..., list[Tensor]]] = {}
        self._held: tuple[dict[str, nn.Parameter], list[Tensor]] = ({}, [])
        self._in_python = False
        self._fake = False
        self._setting: tuple[Any, ...] | None = None

    @property
    def model(self) -> Callable[..., Any]:
        """The model."""
        return self._functions[0]

    @property
    def guide(self) -> Callable[..., Any]:
        """The guide."""
        found = self._functions[1]
        if found is None:
            raise ValueError("this objective was given no noise guide")
        return found

    # ------------------------------------------------------------------ one look at both
    def inspect(self, batch: tuple[Tensor, ...]) -> None:
        """Run guide and model once, with validation, and refuse pairs that these objectives cannot serve."""
        if not batch:
            raise ValueError("the objective is called on a batch of data: give fit(objective, data, ...)")
        rows = len(batch[0])
        self._fake = torch._guards.detect_fake_mode(list(batch)) is not None  # validation would read values
        if self._functions[1] is not None:
            self._inspect_guide(batch, rows)
        with self._scope(validate=not self._fake):
            values = self._observed_values(batch)
            trace = poutine.trace(self._conditioned_model(values)).get_trace(*self._arguments(values, batch))
            self._check_model(trace, rows)
        self.inspected = True

    def _inspect_guide(self, batch: tuple[Tensor, ...], rows: int) -> None:
        self._takes_batch = _accepts(self.guide, len(batch))
        with self._scope(validate=not self._fake), torch.no_grad():
            trace = poutine.trace(self.guide).get_trace(*(batch if self._takes_batch else ()))
            drawn: dict[str, Any] = {n: s for n, s in trace.nodes.items() if _is_drawn(s)}
            if not drawn:
                raise ValueError("the noise guide draws no site: it must draw the site that the model observes")
            self.sites = tuple(drawn)
            shapes = {tuple(s["fn"].batch_shape) for s in drawn.values()}
            if len(shapes) > 1:
                raise ValueError(f"the noise sites {sorted(drawn)} differ in their batch shapes {sorted(shapes)}")
            shape = shapes.pop()
            if shape == ():
                self._mode = "plate"
            elif len(shape) > 1:
                raise ValueError(
                    f"the noise site {self.sites[0]!r} has batch shape {shape}: it may have one batch dimension, that "
                    "of the rows (make the others event dimensions with .to_event)"
                )
            elif self._takes_batch and rows > 1:
                with poutine.block():
                    again: Any = poutine.trace(self.guide).get_trace(*(t[: rows - 1] for t in batch))
                follows = again.nodes[self.sites[0]]["fn"].batch_shape == (rows - 1,)
                self._mode = "rows" if follows else "own"
            else:
                self._mode = "rows" if self._takes_batch and shape == (rows,) else "own"
            self._own_rows = shape[0] if self._mode == "own" else 0
            self.discrete = any(bool(s["fn"].support.is_discrete) for s in drawn.values())

    def _observed_values(self, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Which tensor of the batch each noise site observes."""
        try:
            trace = poutine.trace(self.model).get_trace(*batch)
            nodes: Any = trace.nodes
        except (NotImplementedError, TypeError):  # an improper site cannot be drawn, a model may take no data at all
            nodes = {}
        if not self.sites:
            found = [n for n, s in nodes.items() if s["type"] == "sample" and s["is_observed"] and _is_data(s, batch)]
            if len(found) != 1:
                raise ValueError(
                    f"the model must observe one site with an argument (obs=x), it observes {sorted(found)}"
                )
            self.sites = tuple(found)
        missing = [n for n in self.sites if nodes and n not in nodes]
        if missing:
            known = sorted(n for n, s in nodes.items() if s["type"] == "sample")
            raise ValueError(f"the noise draws {missing}, which are no sites of the model (it has {known})")
        self._conditioned = not all(n in nodes and nodes[n]["is_observed"] for n in self.sites)
        self.position = {}
        for place, name in enumerate(self.sites):
            if self._conditioned:
                self.position[name] = place
                continue
            value = nodes[name]["value"]
            places = [k for k, t in enumerate(batch) if t is value]
            if not places:
                places = [k for k, t in enumerate(batch) if t.shape == value.shape and bool(torch.equal(t, value))]
            if not places:
                raise ValueError(
                    f"site {name!r} must be observed with one of the model's arguments as it is (obs=x): the objective "
                    "puts noise in its place"
                )
            self.position[name] = places[0]
        if max(self.position.values()) >= len(batch):
            raise ValueError(f"the noise sites {self.sites} need as many data tensors, got {len(batch)}")
        return {n: batch[k] for n, k in self.position.items()}

    def _check_model(self, trace: Any, rows: int) -> None:
        site = trace.nodes[self.sites[0]]
        frames = [f for f in site["cond_indep_stack"] if f.vectorized]
        fitting = [f for f in frames if site["fn"].batch_shape[f.dim] == rows]
        if frames and not fitting:
            raise ValueError(
                f"site {self.sites[0]!r} has batch shape {tuple(site['fn'].batch_shape)} for {rows} rows of data: its "
                "plate must have a place for each row, pyro.plate('data', len(x))"
            )
        self._frame = fitting[0].name if fitting else None
        whole = fitting[0].full_size if fitting else None
        self.plate_size = whole if whole is not None and whole != rows else None
        self._take_priors(trace)
        for name, node in trace.nodes.items():
            if node["type"] != "sample" or not _has_density(node) or name in self._priors:
                continue
            shape = node["fn"].log_prob(node["value"]).shape
            inside = self._frame is None or any(f.name == self._frame for f in node["cond_indep_stack"])
            if (not inside and rows > 1) or (self._frame is None and shape[:1] != (rows,)):
                raise ValueError(
                    f"site {name!r} gives log-densities of shape {tuple(shape)} for {rows} rows: every site and factor "
                    "must sit inside the data plate with one value a row, not be summed over the rows"
                )
        support = getattr(site["fn"], "support", None)
        self.support = support
        if self._functions[1] is not None and support is not None and bool(support.is_discrete) != self.discrete:
            kinds = ("discrete", "continuous") if support.is_discrete else ("continuous", "discrete")
            raise ValueError(f"the model's site {self.sites[0]!r} is {kinds[0]} and the noise is {kinds[1]}")

    def _take_priors(self, trace: Any) -> None:
        """Latent sites outside the data plate get a point each, which is learned."""
        latent = {n: s for n, s in trace.nodes.items() if _is_drawn(s) and n not in self.sites}
        inside = [n for n, s in latent.items() if any(f.name == self._frame for f in s["cond_indep_stack"])]
        if inside or (latent and self._frame is None):
            raise ValueError(
                f"the model has latent sites {inside or sorted(latent)} in the rows: the noise guide must draw them "
                "too, or they must be parameters (PyroParam)"
            )
        for name, node in latent.items():
            support: Any = node["fn"].support
            if bool(support.is_discrete):
                raise ValueError(f"latent site {name!r} is discrete: it has no point that descent could find")
            with torch.no_grad():
                start = init_to_median(node, num_samples=15)
                self._priors[name] = biject_to(support)
                self.points.append(nn.Parameter(self._priors[name].inv(start).detach().clone()))

    def latent_values(self) -> dict[str, Tensor]:
        """The values of the model's latent sites outside the data plate, by name."""
        pairs = zip(self._priors.items(), self.points, strict=True)
        return {name: transform(point) for (name, transform), point in pairs}

    # ------------------------------------------------------------------ densities
    def draw(self, count: int, batch: tuple[Tensor, ...], record: bool = False) -> Draws:
        """``count`` noise rows, without gradient; a guide of the batch sees its rows in turn.

        With ``record`` the guide runs as a graph of tensor operations, of which there is one for each shape.
        """

        @torch.no_grad()
        def run(*tensors: Tensor) -> list[Tensor]:
            with self._scope():
                with poutine.trace() as recorder:
                    self._run_guide(count, tensors)
                nodes: Any = recorder.trace.nodes
                return [self._sum(nodes, count, None), *(nodes[n]["value"] for n in self.sites)]

        with torch.no_grad():
            log_q, *values = self._run((f"draw {count}", False), run, batch, record)
        return Draws(dict(zip(self.sites, values, strict=True)), log_q)

    def log_q(self, values: Values, batch: tuple[Tensor, ...], record: bool = False) -> Tensor:
        """log q of given values, ``(row,)``; a guide of the batch sees its rows in turn."""
        count = len(next(iter(values.values())))
        if self._mode == "own" and count != self._own_rows:
            index = torch.arange(-(-count // self._own_rows) * self._own_rows, device=batch[0].device) % count
            blocks = [self.log_q({n: v[i] for n, v in values.items()}, batch) for i in index.split(self._own_rows)]
            return torch.cat(blocks)[:count]

        def run(*tensors: Tensor) -> list[Tensor]:
            given = dict(zip(self.sites, tensors, strict=False))
            with self._scope():
                with poutine.trace() as recorder, poutine.condition(data=given):
                    self._run_guide(count, tensors[len(self.sites) :])
                return [self._sum(recorder.trace.nodes, count, None)]

        return self._run(("log q", torch.is_grad_enabled()), run, (*(values[n] for n in self.sites), *batch), record)[0]

    def log_density(
        self,
        values: Values,
        batch: tuple[Tensor, ...],
        record: bool = False,
        parameters: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """log p~ of each row of ``values``, ``(row,)``; covariates in the batch must have as many rows.

        ``parameters`` stand in for this module's own, by name.
        """

        def run(*tensors: Tensor) -> list[Tensor]:
            return [self(dict(zip(self.sites, tensors, strict=False)), tensors[len(self.sites) :])]

        covariates, first = self.covariates(batch), next(iter(values.values()))
        # What the values take the place of is not looked at, so that one graph serves whatever the batch is.
        rest = tuple(t if k in covariates else first for k, t in enumerate(batch))
        inputs = (*(values[n] for n in self.sites), *rest)
        return self._run(("log p", torch.is_grad_enabled()), run, inputs, record, parameters)[0]

    def forward(self, values: Values, batch: tuple[Tensor, ...]) -> Tensor:
        """``log_density`` by Pyro itself."""
        with self._scope():
            nodes = self._traced(values, batch)
            rows = {n: s for n, s in nodes.items() if n not in self._priors}
            return self._sum(rows, len(next(iter(values.values()))), self._frame)

    def log_prior(self, batch: tuple[Tensor, ...], record: bool = False) -> Tensor:
        """log prior density of the latent sites' values, ``()``; there must be some.

        As in Pyro's ``AutoDelta`` it is that of the constrained values, without a Jacobian.
        """

        def run(*tensors: Tensor) -> list[Tensor]:
            with self._scope():
                nodes = self._traced(self.data(tensors), tensors)
                found = [nodes[n]["fn"].log_prob(nodes[n]["value"]) * nodes[n]["scale"] for n in self._priors]
                return [torch.stack([p.sum() for p in found]).sum().reshape(1)]

        few = tuple(t[:2] for t in batch)
        return self._run(("log prior", torch.is_grad_enabled()), run, few, record)[0].squeeze(0)

    def _traced(self, values: Values, batch: tuple[Tensor, ...]) -> Any:
        with poutine.trace() as recorder:
            self._conditioned_model({**values, **self.latent_values()})(*self._arguments(values, batch))
        return recorder.trace.nodes

    def _run(
        self,
        tag: tuple[Any, ...],
        function: Callable[..., list[Tensor]],
        inputs: tuple[Tensor, ...],
        record: bool,
        parameters: Mapping[str, Tensor] | None = None,
    ) -> list[Tensor]:
        """The function itself, or a graph recorded of it, in which there is no Pyro."""
        graph = self._recorded(tag, function, inputs, parameters is None) if record and not self._in_python else None
        if graph is not None:
            held = {**self._held[0], **(parameters or {})}
            return graph(*inputs, *held.values(), *self._held[1])
        if parameters is None:
            return function(*inputs)
        values = dict(zip(self.sites, inputs, strict=False))
        return [functional_call(self, dict(parameters), (values, inputs[len(self.sites) :]))]

    def _recorded(
        self, tag: tuple[Any, ...], function: Callable[..., list[Tensor]], inputs: tuple[Tensor, ...], anew: bool
    ) -> Callable[..., list[Tensor]] | None:
        if anew:  # with other parameters the model is the one that ran just before
            if torch._guards.detect_fake_mode(list(inputs)) is not None:
                return None
            self._setting = self._settings()
        elif self._setting is None:
            return None
        key = (tag, tuple((t.shape, t.dtype, t.device) for t in inputs), self._setting)
        if key not in self._graphs:
            if len(self._graphs) >= _MOST_RECORDINGS:
                return None
            self._held = dict(self.named_parameters()), list(self.buffers())
            held = [*self._held[0].values(), *self._held[1]]
            try:
                with scoped_seed(0, inputs[0].device):
                    plain = [t.detach() for t in inputs]
                    graph = trace(function, *plain, closed_over=held, random=True)
                if torch.is_grad_enabled():
                    self._refuse_lost_gradients(function, graph, plain, held)
                self._graphs[key] = graph
            except CaptureError as error:
                self._in_python = True
                text = (str(error).strip().splitlines() or ["it cannot be recorded"])[0][:200]
                warnings.warn(
                    f"model and noise run in Python at each step, slower but correct: {text}",
                    CaptureWarning,
                    stacklevel=2,
                )
                return None
        return self._graphs[key]

    @staticmethod
    def _refuse_lost_gradients(
        function: Callable[..., list[Tensor]],
        graph: Callable[..., list[Tensor]],
        inputs: list[Tensor],
        held: list[Tensor],
    ) -> None:
        """A graph does not know of ``detach`` and ``no_grad`` inside the model: compare the gradients once."""
        learned = [t for t in held if t.requires_grad]
        found = []
        for run in (lambda: function(*inputs), lambda: graph(*inputs, *held)):
            with scoped_seed(1, inputs[0].device):
                value = run()[0]
            loss = (value * torch.linspace(0.5, 1.5, len(value), dtype=value.dtype, device=value.device)).sum()
            if not learned or not loss.requires_grad:
                return
            found.append(torch.autograd.grad(loss, learned, allow_unused=True, materialize_grads=True))
        for eager, recorded in zip(*found, strict=True):
            if not bool(torch.isfinite(eager).all()):
                continue  # says nothing of the recording; the fit names what was not finite
            if not torch.allclose(eager, recorded, rtol=1e-2, atol=1e-3 * float(eager.abs().max())):
                raise CaptureError("the model stops gradients inside (detach or no_grad), which a recording loses")

    def _settings(self) -> tuple[Any, ...]:
        """Python numbers and flags of the modules: a recording is of their values."""
        plain = (bool, int, float, str)
        return tuple(v for m in self._parts for v in vars(m).values() if isinstance(v, plain))

    @cached_property
    def _parts(self) -> list[nn.Module]:
        return [m for part in (*self.model_parts, *self.guide_parts) for m in part.modules()]

    @cached_property
    def learned(self) -> dict[str, nn.Parameter]:
        """The model's parameters by name in this module, without the guide's; known once it was inspected."""
        guides = {id(p) for p in self.guide_parts.parameters()}
        return {n: p for n, p in self.named_parameters() if p.requires_grad and id(p) not in guides}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_graphs": {}}  # graphs hold the parameters of this very object

    def data(self, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """The observed values in a batch, by site."""
        return {n: batch[k] for n, k in self.position.items()}

    def covariates(self, batch: tuple[Tensor, ...]) -> list[int]:
        """Places of the batch that no noise site observes."""
        return [k for k in range(len(batch)) if k not in self.position.values()]

    def rows(self, count: int) -> int:
        """The number of noise rows that a guide with a plate of its own draws, else ``count``."""
        return self._own_rows or count

    def _run_guide(self, count: int, batch: tuple[Tensor, ...]) -> None:
        arguments = batch if self._takes_batch else ()
        if self._mode == "rows" and len(batch[0]) != count:
            index = torch.arange(count, device=batch[0].device) % len(batch[0])
            arguments = tuple(t[index] for t in batch)
        if self._mode == "plate":
            with pyro.plate(_PLATE, count):
                self.guide(*arguments)
        else:
            self.guide(*arguments)

    def _arguments(self, values: Values, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        by_place = {k: values[n] for n, k in self.position.items()}
        arguments = tuple(by_place.get(k, t) for k, t in enumerate(batch))
        return arguments if not self._conditioned or _accepts(self.model, len(batch)) else ()

    def _conditioned_model(self, values: Values) -> Callable[..., Any]:
        given = dict(values) if self._conditioned else {n: v for n, v in values.items() if n in self._priors}
        return poutine.condition(self.model, data=given) if given else self.model

    def _sum(self, nodes: Any, count: int, frame: str | None) -> Tensor:
        total: Tensor | None = None
        device = nodes[self.sites[0]]["value"].device
        for node in nodes.values():
            if node["type"] != "sample" or not _has_density(node):
                continue
            log_prob = node["fn"].log_prob(node["value"], *node["args"], **node["kwargs"])
            log_prob = log_prob.to(device)  # Pyro's ImproperUniform makes its zeros on the CPU
            log_prob = scale_and_mask(log_prob, 1.0, node["mask"])
            log_prob = _per_row(log_prob, node, frame)
            total = log_prob if total is None else total + log_prob
        assert total is not None
        if total.shape != (count,):
            raise ValueError(
                f"the log-density of {count} rows has shape {tuple(total.shape)}: it must be one value a row, "
                f"({count},). An energy maps (B, *event) to (B,)"
            )
        return total

    def _scope(self, validate: bool = False) -> Any:
        return _Scope(self, validate)


class _Scope:
    """Own Pyro parameters and no validation, entered around each run."""

    def __init__(self, pair: NoisePair, validate: bool) -> None:
        self.pair, self.inner = pair, own_scope(validate)

    def __enter__(self) -> None:
        self.inner.__enter__()
        parts = [*self.pair.model_parts, *self.pair.guide_parts]
        if not self.pair.inspected:
            localise(m for part in parts for m in part.modules())
        owned = {id(p) for part in parts for p in part.parameters()}
        self.handler = self.pair.own.handler(owned)
        self.block = poutine.block()
        self.block.__enter__()
        self.handler.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.handler.__exit__(*error)
        self.block.__exit__(*error)
        self.inner.__exit__(*error)


def _per_row(log_prob: Tensor, node: Any, frame: str | None) -> Tensor:
    """Sum all but the rows' dimension."""
    if log_prob.dim() <= 1:
        return log_prob
    dim = next((f.dim for f in node["cond_indep_stack"] if f.name == frame), -log_prob.dim())
    others = [d for d in range(-log_prob.dim(), 0) if d != dim]
    return log_prob.sum(others)


def _is_drawn(site: Any) -> bool:
    return (
        site["type"] == "sample"
        and not site["is_observed"]
        and not isinstance(site["fn"], _Subsample)
        and not site["infer"].get("_deterministic")
    )


def _is_data(site: Any, batch: tuple[Tensor, ...]) -> bool:
    value = site["value"]
    return any(t is value for t in batch)


def _accepts(function: Any, count: int) -> bool:
    """Whether a callable takes this many positional arguments.

    An argument with a value of its own, as in ``lambda law=law: ...``, is bound already and takes none of the batch.
    """
    target = function.forward if isinstance(function, nn.Module) else function
    try:
        given = inspect.signature(target).bind(*range(count))
    except (TypeError, ValueError):
        return False
    free = (inspect.Parameter.empty, None)
    return all(any(given.signature.parameters[n].default is f for f in free) for n in given.arguments)
