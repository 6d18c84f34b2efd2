"""One particle of a variational bound, ready for ``vmap``: traces, draws that carry gradients, parameters of its own.

A particle is a draw ``z`` of the guide with

    log w = log p(x, z) - log q(z),

and the sum of ``log q``, without scales, over those sites whose draws carry no gradient, which a score-function
estimator needs.
"""

import functools
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.traceenum_elbo import _compute_model_factors
from pyro.nn import PyroModule
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree, shared_intermediates
from pyro.ops.rings import SampleRing
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor, nn
from torch.distributions import constraints, transform_to

from inference.potential.log_density import _without_validation
from inference.results._draw import VmapSafeDraws
from inference.runtime.isolation import make_local

__all__ = ["OwnParameters", "Pair", "Particle", "localise", "modules_of", "own_scope"]


class Particle(NamedTuple):
    """``log_weight`` is log p - log q, ``score`` the log q of sites that a gradient does not flow through; scalars."""

    log_weight: Tensor
    score: Tensor


@contextmanager
def own_scope(validate: bool) -> Iterator[None]:
    """An empty parameter store, module-local parameters, and validation as asked; all are put back."""
    flags = dict.fromkeys(("validate_distributions_pyro", "validate_distributions_torch", "validate_infer"), validate)
    with ExitStack() as stack:
        stack.enter_context(pyro.get_param_store().scope())
        # Pyro's check of local parameters would refuse the pyro.param of a function, which OwnParameters keeps.
        stack.enter_context(pyro.settings.context(module_local_params=True, validate_poutine=False, **flags))
        yield


def modules_of(function: Any) -> list[nn.Module]:
    """The modules that a model or guide is, is a method of, or wraps (``partial`` and Pyro's handlers)."""
    if isinstance(function, nn.Module):
        return [function]
    inner = [
        part for name in ("__self__", "func", "__wrapped__") if (part := getattr(function, name, None)) is not None
    ]
    if isinstance(function, functools.partial):
        inner += [part for part in function.args if callable(part)]
    return list(dict.fromkeys(module for part in inner for module in modules_of(part)))


class OwnParameters(nn.Module):
    """The parameters that model and guide name by ``pyro.param`` and ``pyro.module`` and that no module of theirs owns.

    A ``pyro.param`` is kept unconstrained under its own name; an ``nn.Parameter`` that comes by ``pyro.module`` or from
    a module that a function closes over is kept as it is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.constraints: dict[str, constraints.Constraint] = {}

    def handler(self, owned: set[int]) -> Messenger:
        """Answers ``pyro.param``; ``owned`` are the ids of parameters that are another module's."""
        return _ParameterHandler(self, owned)

    def value(self, name: str, init: Any, constraint: constraints.Constraint) -> Tensor:
        """The constrained value of a parameter, made at its first use."""
        key = _key(name)
        if key not in self._parameters:
            if init is None:
                raise ValueError(f"pyro.param({name!r}) is read before it has an initial value")
            start = init() if callable(init) else init
            if isinstance(start, nn.Parameter) and constraint is constraints.real:
                self.register_parameter(key, start)
            else:
                with torch.no_grad():
                    start = transform_to(constraint).inv(start.detach()).clone()
                self.register_parameter(key, nn.Parameter(start))
            self.constraints[name] = constraint
        unconstrained = self._parameters[key]
        kept = self.constraints[name]
        value: Any = unconstrained if kept is constraints.real else transform_to(kept)(unconstrained)
        value.unconstrained = weakref.ref(unconstrained)
        return value

    def adopt(self, name: str, value: nn.Parameter) -> None:
        """Own a parameter of a module that a function closes over."""
        if all(value is not p for p in self._parameters.values()):
            self.register_parameter(_key(name), value)


def _key(name: str) -> str:
    return name.replace(".", "/")


class _ParameterHandler(Messenger):
    def __init__(self, store: OwnParameters, owned: set[int]) -> None:
        super().__init__()
        self.store, self.owned = store, owned

    def _pyro_param(self, msg: Any) -> None:
        args = msg["args"]
        init = args[1] if len(args) > 1 else None
        if msg["done"] or msg["fn"] != pyro.get_param_store().get_param or id(init) in self.owned:
            return
        msg["value"] = self.store.value(msg["name"], init, msg["kwargs"].get("constraint", constraints.real))
        msg["done"] = True

    def _pyro_post_param(self, msg: Any) -> None:
        # PyroModules announce their parameters by statements of their own, which this hears.
        value = msg["value"]
        leaf = value.unconstrained() if hasattr(value, "unconstrained") else value
        if isinstance(leaf, nn.Parameter) and leaf.requires_grad and id(leaf) not in self.owned:
            self.store.adopt(msg["name"], leaf)


class _GradientDraws(VmapSafeDraws):
    """Draws under ``vmap``, with gradients exactly where the distribution says that its draws have them."""

    def _pyro_sample(self, msg: Any) -> None:
        msg["fn"] = _without_validation(msg["fn"])
        super()._pyro_sample(msg)
        if isinstance(msg["value"], Tensor) and not (msg["is_observed"] or getattr(msg["fn"], "has_rsample", False)):
            msg["value"] = msg["value"].detach()


class Pair:
    """A model and a guide, and what is known of them after one run.

    Args:
        model, guide: Pyro callables of the same arguments.
        own: parameters that no module of theirs owns.
        sticking: drop the part of the gradient that comes from the guide's parameters inside ``log q`` (Roeder, Wu and
            Duvenaud, "Sticking the Landing", 2017, arXiv:1703.09194).

    Attributes:
        enumerated: whether discrete sites are summed out, after ``inspect``.
        guide_enumerated: whether the guide has such sites; their estimator is Pyro's, and has no vectorised form.
        scored: names of the guide's sites whose draws carry no gradient, after ``inspect``.
    """

    def __init__(
        self, model: Callable[..., Any], guide: Callable[..., Any], own: "OwnParameters", sticking: bool
    ) -> None:
        self.model, self.guide = model, guide
        self._fixed = _FixedGuide(guide, own) if sticking else None
        self.enumerated = self.guide_enumerated = False
        self.scored: frozenset[str] = frozenset()
        self._enum: TraceEnum_ELBO | None = None

    def inspect(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run guide and model once, eagerly, and refuse pairs whose bound would be wrong."""
        guide_trace = poutine.trace(self.guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(self.model, trace=guide_trace)).get_trace(*args, **kwargs)
        latent: dict[str, Any] = {n: s for n, s in guide_trace.nodes.items() if _is_latent(s)}
        wanted: dict[str, Any] = {n: s for n, s in model_trace.nodes.items() if _is_latent(s)}
        extra = sorted(n for n in set(latent) - set(wanted) if not latent[n]["infer"].get("is_auxiliary"))
        if extra:
            raise ValueError(
                f"the guide draws {extra}, which are no latent sites of the model; mark sites that only the guide "
                "needs with infer={'is_auxiliary': True}"
            )
        for name in sorted(set(latent) & set(wanted)):
            ours, theirs = latent[name]["value"].shape, wanted[name]["fn"].shape()
            if ours != theirs:
                raise ValueError(f"site {name!r} is {tuple(ours)} in the guide and {tuple(theirs)} in the model")
        missing = sorted(set(wanted) - set(latent))
        for name in missing:
            if not wanted[name]["fn"].has_enumerate_support:
                raise ValueError(
                    f"the guide does not draw the model's latent site {name!r} ({type(wanted[name]['fn']).__name__}), "
                    "which cannot be summed out either"
                )
        self.guide_enumerated = any(s["infer"].get("enumerate") for s in latent.values())
        self.enumerated = bool(missing) or self.guide_enumerated
        self.scored = frozenset(n for n, s in latent.items() if not getattr(s["fn"], "has_rsample", False))
        if self.enumerated:
            frames = [
                f for s in (*wanted.values(), *_observed(model_trace), *latent.values()) for f in s["cond_indep_stack"]
            ]
            nesting = max((-f.dim for f in frames if f.vectorized), default=0)
            self._enum = TraceEnum_ELBO(max_plate_nesting=nesting, strict_enumeration_warning=False)

    def draw(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Particle:
        """One particle, differentiable in the parameters."""
        with _GradientDraws():
            if self._enum is not None:
                return self._draw_enumerated(self._enum, args, kwargs)
            guide_trace = poutine.trace(self.guide).get_trace(*args, **kwargs)
            model_trace = poutine.trace(poutine.replay(self.model, trace=guide_trace)).get_trace(*args, **kwargs)
            log_p = _log_prob_sum(model_trace)
            log_q = _log_prob_sum(guide_trace)
            score = sum((_score(guide_trace.nodes[n]) for n in sorted(self.scored)), log_p.new_zeros(()))
            if self._fixed is not None:
                log_q = self._fixed.log_prob(guide_trace, args, kwargs)
        return Particle(log_p - log_q, score)

    def _draw_enumerated(self, enum: TraceEnum_ELBO, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Particle:
        model = config_enumerate(self.model, default="parallel")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found vars in model but not guide")
            if self.guide_enumerated:
                # Pyro's own estimator: its gradient has the score terms in it.
                with torch.enable_grad():
                    log_weight = -enum.differentiable_loss(model, self.guide, *args, **kwargs)
                return Particle(log_weight, log_weight.new_zeros(()))
            [(model_trace, guide_trace)] = enum._get_traces(model, self.guide, args, kwargs)
        log_p = _log_marginal(model_trace, guide_trace)
        log_q = {n: s["packed"]["log_prob"].sum() for n, s in guide_trace.nodes.items() if s["type"] == "sample"}
        score = sum((_score(guide_trace.nodes[n]) for n in sorted(self.scored)), log_p.new_zeros(()))
        return Particle(log_p - sum(log_q.values()), score)


def _log_marginal(model_trace: Any, guide_trace: Any) -> Tensor:
    """log p(x, z) with the enumerated sites summed out, plate by plate; scales apply outside of the sums."""
    terms, factors, _, dims, scale = _compute_model_factors(model_trace, guide_trace)
    found = [term for group in terms.values() for term in group]
    if factors:
        sizes = {d: n for group in factors.values() for f in group for d, n in zip(f._pyro_dims, f.shape, strict=True)}
        with shared_intermediates() as cache:
            summed = contract_tensor_tree(factors, dims, ring=SampleRing(cache=cache, dim_to_size=sizes))
        found += [packed.scale_and_mask(term, scale=scale) for group in summed.values() for term in group]
    return torch.stack([term.sum() for term in found]).sum()


class _FixedGuide(nn.Module):
    """The guide with its parameters as constants: ``log q`` then depends on them through the draw alone.

    Parameters of owned modules are exchanged for constants, those of statements are detached as they pass.
    """

    def __init__(self, guide: Callable[..., Any], own: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList([*modules_of(guide), own])
        self._guide = (guide,)

    def forward(self, trace: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        with _DetachedStatements():
            again = poutine.trace(poutine.replay(self._guide[0], trace=trace)).get_trace(*args, **kwargs)
        return _log_prob_sum(again)

    def log_prob(self, trace: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """log q of the traced draw."""
        constants = {name: p.detach() for name, p in self.named_parameters()}
        value: Tensor = torch.func.functional_call(self, constants, (trace, args, kwargs))
        return value


class _DetachedStatements(Messenger):
    def _pyro_post_param(self, msg: Any) -> None:
        msg["value"] = msg["value"].detach()


def _is_latent(site: Any) -> bool:
    return (
        site["type"] == "sample"
        and not site["is_observed"]
        and not isinstance(site["fn"], _Subsample)
        and not site["infer"].get("_deterministic")
    )


def _observed(trace: Any) -> list[Any]:
    return [s for s in trace.nodes.values() if s["type"] == "sample" and s["is_observed"]]


def _score(site: Any) -> Tensor:
    """log q of a draw without scales: they are of what the draw earns, and its law knows nothing of them."""
    return scale_and_mask(site["fn"].log_prob(site["value"]), mask=site["mask"]).sum()


def _log_prob_sum(trace: Any) -> Tensor:
    total = trace.log_prob_sum(lambda _, site: not isinstance(site["fn"], _Subsample))
    return total if isinstance(total, Tensor) else torch.zeros(())


def localise(modules: Iterable[nn.Module]) -> None:
    """Give PyroModules that were made while parameters were global their own store, as module-local ones have."""
    for module in modules:
        if isinstance(module, PyroModule):
            make_local(module._pyro_context)
