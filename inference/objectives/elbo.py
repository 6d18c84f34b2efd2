"""Variational bounds with all particles in one program: the evidence lower bound and the importance-weighted bound.

With draws ``z_k`` of the guide ``q`` and ``log w_k = log p(x, z_k) - log q(z_k)``, the negatives of

    ELBO  = E[ 1/K sum_k log w_k ],           IWAE_K = E[ log( 1/K sum_k w_k ) ]

are what ``ELBO`` returns an estimate of.  Gradients flow through reparametrised draws.  Sites whose draws carry none
enter by the score function with a baseline that leaves the particle itself out, so that the estimate stays unbiased
(Mnih and Rezende, "Variational inference for Monte Carlo objectives", 2016, arXiv:1602.06725):

    grad = sum_k [ dL/dlog w_k  grad log w_k + (L - L_{-k}) grad log q(z_k) ],

where ``L`` is the estimate and ``L_{-k}`` the same from the other particles (0 if there is none).

The first call runs Pyro eagerly and checks the pair.  Then loss and gradient are recorded as one graph of tensor
operations, in which there is neither Pyro nor autograd; the random operators in it draw anew each time.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from pyro.nn.module import _Context
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from inference._errors import CaptureWarning
from inference.citation import Citable, Paper
from inference.objectives._particles import OwnParameters, Pair, Particle, localise, modules_of, own_scope
from inference.potential.graph import CaptureError, trace
from inference.results.brief import brief
from inference.results.pareto import smooth_weights
from inference.runtime.generators import scoped_seed
from inference.runtime.isolation import make_local

__all__ = ["ELBO", "BoundEstimate"]

_BOUNDS = ("elbo", "iwae")
_GRADIENTS = ("total", "path")
_MOST_RECORDINGS = 16  # of one objective; a shape or a setting that keeps changing is not worth recording each time
_CHUNK = 256  # draws at once in ``evaluate``; fixed, as the random stream depends on it
_Graph = Callable[..., list[Tensor]]


@brief
@dataclass(frozen=True)
class BoundEstimate:
    """A bound and its quality, from many draws of the guide.

    Attributes:
        elbo: estimate of the evidence lower bound.
        elbo_se: its Monte-Carlo standard error.
        log_evidence: importance-sampling estimate of log p(x), by Pareto-smoothed weights.
        log_evidence_se: its standard error by the delta method; of no worth where ``pareto_k`` exceeds 0.7.
        pareto_k: shape of the tail of the importance weights. Below 0.5 the guide is good, up to 0.7 usable as a
            proposal, above it is not (Yao et al., "Yes, but Did It Work?", 2018, arXiv:1802.02538).
        log_weights: log p(x, z) - log q(z) of each draw, ``(num_samples,)``.
    """

    elbo: float
    elbo_se: float
    log_evidence: float
    log_evidence_se: float
    pareto_k: float
    log_weights: Tensor = field(repr=False)


class ELBO(Citable, nn.Module):
    """Negative evidence lower bound of ``guide`` for ``model``, as an objective for ``inference.fit``.

    Particles are batched by ``vmap``; the model need not broadcast. Discrete latent sites that the guide leaves out are
    summed out (as in ``pyro.infer.TraceEnum_ELBO``). Minibatches are the model's own: a plate of size N with
    ``subsample_size=B`` scales the likelihood of B rows by N / B. Parameters are this module's, also those of
    ``pyro.param`` and ``pyro.module`` in functions; Pyro's global store is neither read nor written. Random numbers
    come from torch's global generators, as in Pyro.

    A model that can be recorded costs no Python per step. Recorded are Python branches as they were taken and Python
    numbers as they were; a number or flag that is an attribute of a module of the pair may change (the loss is then
    recorded anew), a global variable may not: give ``record=False`` then.

    Args:
        model: Pyro model.
        guide: Pyro guide of the same arguments, an autoguide for example.
        num_particles: draws of the guide in each loss.
        bound: ``"elbo"`` or ``"iwae"``.
        gradient: ``"total"``, or ``"path"`` for the ELBO's gradient without the score of the guide (sticking the
            landing: no variance where the guide is exact).
        record: run a recorded graph; ``False`` runs Pyro in every call.

    Raises:
        TypeError, ValueError: an argument does not fit.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
        >>> y = torch.ones(3)
        >>> objective = ELBO(model, AutoNormal(model), num_particles=16, gradient="path")
        >>> from inference.fit import fit
        >>> _ = fit(objective, y, num_steps=800, lr=0.05, progress=False)
        >>> round(objective.guide.median()["mean"].item(), 2)  # 3 / (3 + 1)
        0.75
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "inproceedings",
            "mnih2016variational",
            author="Mnih, Andriy and Rezende, Danilo J.",
            title="Variational Inference for {M}onte {C}arlo Objectives",
            booktitle="International Conference on Machine Learning",
            year=2016,
        ),
        Paper(
            "inproceedings",
            "burda2016importance",
            author="Burda, Yuri and Grosse, Roger and Salakhutdinov, Ruslan",
            title="Importance Weighted Autoencoders",
            booktitle="International Conference on Learning Representations",
            year=2016,
        ),
    )

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        num_particles: int = 1,
        *,
        bound: str = "elbo",
        gradient: str = "total",
        record: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (("model", model), ("guide", guide)):
            if not callable(value):
                raise TypeError(f"{name} must be a Pyro callable, got {type(value).__name__}")
        if isinstance(num_particles, bool) or not isinstance(num_particles, int):
            raise TypeError(f"num_particles must be an integer, got {num_particles!r}")
        if num_particles < 1:
            raise ValueError(f"num_particles must be at least 1, got {num_particles}")
        if bound not in _BOUNDS:
            raise ValueError(f"bound must be one of {_BOUNDS}, got {bound!r}")
        if gradient not in _GRADIENTS:
            raise ValueError(f"gradient must be one of {_GRADIENTS}, got {gradient!r}")
        if gradient == "path" and bound == "iwae":
            raise ValueError("gradient='path' is biased for bound='iwae': give gradient='total'")
        self.num_particles, self.bound, self.gradient, self.record = num_particles, bound, gradient, record
        self.own = OwnParameters()
        self._owned = nn.ModuleList(dict.fromkeys([*modules_of(model), *modules_of(guide)]))
        self._functions = (model, guide)
        self._pair = Pair(model, guide, self.own, gradient == "path")
        self._inspected = False
        self._recordings: dict[Any, _Graph | None] = {}
        self._warned = False

    @property
    def model(self) -> Callable[..., Any]:
        """The model."""
        return self._functions[0]

    @property
    def guide(self) -> Callable[..., Any]:
        """The guide."""
        return self._functions[1]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Estimate of the negative bound on the model's arguments, a scalar."""
        if not self._inspected:
            self._inspect(args, kwargs)
        differentiable = torch.is_grad_enabled()
        parameters = [p for p in self.parameters() if p.requires_grad] if differentiable else []
        graph, inputs = self._recorded(args, kwargs, parameters) if self.record else (None, [])
        if graph is None:
            with self._scope():
                return self._eager(args, kwargs)
        if not parameters:
            with torch.no_grad():
                return graph(*inputs)[0]
        loss: Tensor = _Replay.apply(graph, inputs, *parameters)
        return loss

    @torch.no_grad()
    def evaluate(self, *args: Any, num_samples: int = 1000, seed: int = 0, **kwargs: Any) -> BoundEstimate:
        """The bound on the model's arguments from many draws, with its error and the tail of the weights.

        Args:
            args, kwargs: as in the loss; all the data, not a minibatch.
            num_samples: draws of the guide, at least 25.
            seed: of the draws.

        Raises:
            ValueError: too few samples.
        """
        if isinstance(num_samples, bool) or not isinstance(num_samples, int):
            raise TypeError(f"num_samples must be an integer, got {num_samples!r}")
        if num_samples < 25:
            raise ValueError(f"num_samples must be at least 25 for the tail of the weights, got {num_samples}")
        if not self._inspected:
            self._inspect(args, kwargs)
        with scoped_seed(seed, self._device(args, kwargs)):
            log_weights = self._many_log_weights(args, kwargs, num_samples)
        smoothed, pareto_k = smooth_weights(log_weights)
        log_evidence = (smoothed.logsumexp(0) - math.log(num_samples)).item()
        relative = (smoothed - log_evidence).exp()
        return BoundEstimate(
            elbo=log_weights.mean().item(),
            elbo_se=(log_weights.std() / num_samples**0.5).item(),
            log_evidence=log_evidence,
            log_evidence_se=(relative.std() / num_samples**0.5).item(),
            pareto_k=pareto_k,
            log_weights=log_weights,
        )

    # ------------------------------------------------------------------ the estimate
    def _combine(self, particles: Particle) -> Tensor:
        """Negative bound from ``(particle,)`` log-weights and scores; its gradient is the estimator's."""
        log_weight, score = particles
        count = len(log_weight)
        bound = log_weight.mean() if self.bound == "elbo" else log_weight.logsumexp(0) - math.log(count)
        if self._pair.scored and not self._pair.guide_enumerated:
            reward = self._rewards(log_weight.detach())
            bound = bound + (reward * (score - score.detach())).sum()
        return -bound

    def _rewards(self, log_weight: Tensor) -> Tensor:
        count = len(log_weight)
        if count == 1:
            return log_weight
        if self.bound == "elbo":
            return (log_weight - log_weight.mean()) / (count - 1)
        others = log_weight.expand(count, count).masked_fill(
            torch.eye(count, dtype=torch.bool, device=log_weight.device), -math.inf
        )
        return (log_weight.logsumexp(0) - math.log(count)) - (others.logsumexp(1) - math.log(count - 1))

    def _one(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Particle:
        with self.own.handler(self._others):
            return self._pair.draw(args, kwargs)

    def _vectorised(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        marker = torch.empty(self.num_particles, device="cpu")
        return self._combine(Particle(*vmap(lambda _: tuple(self._one(args, kwargs)), randomness="different")(marker)))

    def _looped(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        drawn = [self._one(args, kwargs) for _ in range(self.num_particles)]
        return self._combine(Particle(*(torch.stack(values) for values in zip(*drawn, strict=True))))

    def _eager(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if self.num_particles == 1 or self._pair.enumerated or self._warned:
            return self._looped(args, kwargs)
        try:
            return self._vectorised(args, kwargs)
        except RuntimeError as error:
            self._warn(error)
        return self._looped(args, kwargs)

    # ------------------------------------------------------------------ recorded graphs
    def _recorded(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], parameters: list[nn.Parameter]
    ) -> tuple[_Graph | None, list[Tensor]]:
        leaves, structure = tree_flatten((args, kwargs))
        inputs = [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]
        constants = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        held = [*self.parameters(), *self.buffers()]
        shapes = tuple((x.shape, x.dtype, x.device) for x in (*inputs, *held))
        names = tuple(map(id, held)), tuple(map(id, parameters))
        key = (shapes, names, constants, str(structure), self._settings())
        try:
            known = key in self._recordings
        except TypeError as error:
            raise TypeError(f"arguments that are no tensors must be hashable, or give record=False: {error}") from error
        if not known:
            if len(self._recordings) >= _MOST_RECORDINGS:
                self._warn(f"its shapes, constants or settings have changed {_MOST_RECORDINGS} times")
                return None, inputs

            def arguments(tensors: tuple[Tensor, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
                rest = iter(tensors)
                filled = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
                return tree_unflatten(filled, structure)

            with scoped_seed(0, self._device(args, kwargs)), self._scope():
                self._recordings[key] = self._record(arguments, inputs, parameters, held)
        return self._recordings[key], [*inputs, *(x.detach() for x in held)]

    def _record(
        self, arguments: Callable[..., Any], inputs: list[Tensor], parameters: list[Any], held: list[Tensor]
    ) -> _Graph | None:
        def whole(*tensors: Tensor) -> list[Tensor]:
            loss = self._vectorised(*arguments(tensors))
            return [loss.detach(), *_gradients(loss, parameters)]

        def single(*tensors: Tensor) -> list[Tensor]:
            log_weight, score = self._one(*arguments(tensors))
            slopes = _gradients(log_weight, parameters)
            if self._pair.scored:
                slopes += _gradients(score, parameters)
            return [log_weight.detach(), score.detach(), *slopes]

        if self._pair.guide_enumerated:
            self._warn("the guide enumerates sites")
            return None
        with torch.enable_grad() if parameters else torch.no_grad():
            if not self._pair.enumerated:
                try:
                    return trace(whole, *inputs, closed_over=held, random=True)
                except CaptureError as error:
                    reason = error
            try:
                # The gradient of one particle by plain autograd, which knows functions that vmap does not.
                one = trace(single, *inputs, closed_over=held, random=True)
                graph = self._over_particles(one, len(parameters))
                with torch.no_grad():
                    graph(*inputs, *(x.detach() for x in held))
            except (CaptureError, RuntimeError) as error:
                self._warn(error if self._pair.enumerated else reason)
                return None
        return graph

    def _over_particles(self, graph: Callable[..., Any], count: int) -> _Graph:
        def run(*inputs: Tensor) -> list[Tensor]:
            marker = torch.empty(self.num_particles, device="cpu")
            log_weight, score, *slopes = vmap(lambda _: tuple(graph(*inputs)), randomness="different")(marker)
            leaves = Particle(log_weight.requires_grad_(), score.requires_grad_())
            with torch.enable_grad():
                loss = self._combine(leaves)
                weights = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
            gradients = [torch.tensordot(weights[0], slope, 1) for slope in slopes[:count]]
            for total, slope in zip(gradients, slopes[count:], strict=False):
                total += torch.tensordot(weights[1], slope, 1)
            return [loss.detach(), *gradients]

        return run

    def _many_log_weights(self, args: tuple[Any, ...], kwargs: dict[str, Any], count: int) -> Tensor:
        leaves, structure = tree_flatten((args, kwargs))
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]

        def single(*tensors: Tensor) -> list[Tensor]:
            rest = iter(tensors)
            filled = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            return [self._one(*tree_unflatten(filled, structure)).log_weight.detach()]

        with self._scope():
            try:
                held = [*self.parameters(), *self.buffers()]
                graph = trace(single, *inputs, closed_over=held, random=True)
                batched = vmap(lambda _: graph(*inputs, *held)[0], randomness="different", chunk_size=_CHUNK)
                return batched(torch.empty(count, device="cpu"))
            except (CaptureError, RuntimeError) as error:
                self._warn(error)
            return torch.stack([self._one(args, kwargs).log_weight.detach() for _ in range(count)])

    # ------------------------------------------------------------------ housekeeping
    def _scope(self) -> Any:
        return own_scope(validate=False)

    @property
    def _others(self) -> set[int]:
        return {id(p) for p in self._owned.parameters()}

    def _inspect(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """One eager run with validation on, in which lazy parameters come to be."""
        localise(self._owned.modules())
        fake = torch._guards.detect_fake_mode([*args, *kwargs.values()]) is not None
        with own_scope(validate=not fake), torch.no_grad(), self.own.handler(self._others):
            while True:
                try:
                    self._pair.inspect(args, kwargs)
                    break
                except AttributeError as error:
                    # a PyroModule that a function closes over, made while parameters were global
                    if not isinstance(error.obj, _Context) or error.name != "param_state":
                        raise
                    make_local(error.obj)
        if self._pair.enumerated and self.gradient == "path":
            raise ValueError("gradient='path' does not go with sites that are summed out: give gradient='total'")
        if self._pair.guide_enumerated and self.bound == "iwae":
            raise ValueError("bound='iwae' does not go with sites that the guide enumerates: give bound='elbo'")
        self._inspected = True

    def _settings(self) -> tuple[Any, ...]:
        """Python numbers and flags of the modules: a recording is of their values."""
        plain = (bool, int, float, str)
        return tuple(
            (name, value)
            for module in self._owned.modules()
            for name, value in vars(module).items()
            if isinstance(value, plain)
        )

    def _device(self, args: Any, kwargs: Any) -> torch.device | None:
        tensors = [x for x in (*tree_flatten((args, kwargs))[0], *self.parameters()) if isinstance(x, Tensor)]
        return next((x.device for x in tensors if x.device.type != "cpu"), None)

    def _warn(self, reason: object) -> None:
        if not self._warned:
            text = (str(reason).strip().splitlines() or [type(reason).__name__])[0][:200]
            warnings.warn(
                f"model and guide run particle by particle and in Python, slower but correct: {text}",
                CaptureWarning,
                stacklevel=3,
            )
        self._warned = True

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_recordings": {}}  # graphs hold the parameters of this very object


def _gradients(value: Tensor, parameters: list[Any]) -> list[Tensor]:
    if not parameters:
        return []
    if not value.requires_grad:
        return [torch.zeros_like(p) for p in parameters]
    return list(torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True, materialize_grads=True))


class _Replay(torch.autograd.Function):
    """A graph that returns the loss and its gradient, as a function of the parameters that autograd can follow."""

    @staticmethod
    def forward(ctx: Any, graph: _Graph, inputs: list[Tensor], *parameters: Tensor) -> Tensor:
        loss, *ctx.gradients = graph(*inputs)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Any, ...]:
        return None, None, *(slope * g for g in ctx.gradients)
