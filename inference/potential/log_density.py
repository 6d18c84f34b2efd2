"""A Pyro model as a log-density over unconstrained space, one chain at a time.

For latent sites ``x = T(z)``, with ``T`` the bijection from the real line to each site's support,

    log p(z) = log p(x, data) + sum_sites log |det dT/dz|.

``z`` is one flat vector; each site owns a slice.  Supports are read while the model runs, so a support that depends
on another latent variable
(``Uniform(0, theta)``) is right as well.  Discrete latent sites are summed out where Pyro can enumerate them.  The
indices of subsampled plates
are inputs, so that the density of a minibatch is a pure function and Pyro's own scale ``N / B`` applies.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions import ImproperUniform, MaskedDistribution
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.distributions.util import scale_and_mask
from pyro.infer.autoguide.initialization import InitMessenger, init_to_uniform
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import Distribution, Transform, biject_to, identity_transform

from inference.potential.chain_arguments import ChainArguments, InDims
from inference.potential.enumeration import enumerated_trace, log_joint, plate_nesting, refuse_split_sums
from inference.runtime.generators import generator, scoped_seed

__all__ = ["LogDensity", "MinibatchPlate", "Site", "scoped_model"]

_DRY_RUNS = 20  # before a model is taken for faulty


class Site(NamedTuple):
    """A continuous latent site and its place in the flat vector.

    Attributes:
        name: the site's name in the model.
        shape: shape of its value, in constrained space.
        unconstrained_shape: shape of its unconstrained value (a simplex of K has K - 1).
        start, stop: its slice of the flat vector.
        dtype: dtype of its value.
    """

    name: str
    shape: torch.Size
    unconstrained_shape: torch.Size
    start: int
    stop: int
    dtype: torch.dtype


class MinibatchPlate(NamedTuple):
    """A plate that draws ``batch_size`` of ``size`` indices on every evaluation."""

    name: str
    size: int
    batch_size: int


@contextmanager
def scoped_model(validate: bool) -> Iterator[None]:
    """Run a model without leaving a trace: handlers outside it see nothing, and the parameter store and validation
    flags are put back.
    """
    store = pyro.get_param_store()
    with poutine.block(), store.scope(store.get_state()), pyro.validation_enabled(validate):
        yield


def _without_validation(fn: Any) -> Any:
    """A copy of a distribution, and of those it is built from, that does not branch on values; the user's own object
    is left alone.
    """
    if not isinstance(fn, Distribution):
        return fn
    clone = copy.copy(fn)
    for key, value in vars(fn).items():
        if isinstance(value, Distribution):
            setattr(clone, key, _without_validation(value))
    clone._validate_args = False
    return clone


class _Unconstrained(Messenger):
    """Give every latent site the value that its unconstrained input maps to, and collect the log-Jacobians."""

    def __init__(
        self, values: Mapping[str, Tensor], batch: Mapping[str, Tensor], transforms: Mapping[str, Transform]
    ) -> None:
        super().__init__()
        self.values, self.batch, self.transforms = values, batch, transforms
        self.log_det: Tensor | float = 0.0
        self._observed: dict[str, Any] = {}

    def _pyro_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        if isinstance(fn, _Subsample):
            if name in self.batch:
                msg["value"] = self.batch[name]
            return
        fn = msg["fn"] = _without_validation(fn)
        if name.endswith("_observed"):
            self._observed[name.removesuffix("_observed")] = msg["mask"]
        elif name in self.values and name.endswith("_unobserved"):
            # ``obs_mask`` makes such a pair.  Elements of the latent one that are observed are used nowhere and would
            # be flat; under their own law they integrate to one.
            mask = self._observed.get(name.removesuffix("_unobserved"))
            if isinstance(mask, Tensor) and isinstance(msg["mask"], Tensor):
                msg["mask"] = msg["mask"] | mask
        if name in self.values:
            transform = _bijection(name, fn, self.transforms)
            z = self.values[name]
            x = transform(z)
            if transform is not identity_transform:
                self.log_det = self.log_det + transform.log_abs_det_jacobian(z, x).sum()
            msg["value"] = x
            msg["is_observed"] = True
            msg["infer"] = {**msg["infer"], "_given": True}


class LogDensity:
    """The log-joint of ``model(*args, **kwargs)`` as a function of one chain's flat unconstrained vector.

    Construction runs the model once, eagerly and with validation on, so that a faulty model fails here with Pyro's
    own message.

    Args:
        model: any Pyro model (function or ``PyroModule``).
        args, kwargs: what the model is called with.
        transforms: site name to a transform *from* its support *to* unconstrained space, as in ``pyro.infer.HMC``;
            the rest use ``biject_to``.
        max_plate_nesting: needed only for enumerated models whose nesting cannot be guessed.
        init_strategy: how the dry run chooses latent values; flat priors cannot be drawn from, so the default is
            uniform on (-2, 2).
        in_dims: which arguments hold a row a chain, as in ``torch.func.vmap``: see ``ChainArguments``.  The layout
            of the flat vector is that of the first chain, and all chains must share it.

    Attributes:
        data: the arguments that differ between chains, each ``(chain, ...)``; empty if all chains share everything.

    Raises:
        ValueError: no continuous latent site; a discrete latent site that cannot be enumerated; a continuous one
            inside a subsampled plate, or a discrete one of which the plate holds a part of what depends on it.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        transforms: Mapping[str, Transform] | None = None,
        max_plate_nesting: int | None = None,
        init_strategy: Callable[[Any], Any] = init_to_uniform,
        in_dims: InDims = None,
    ) -> None:
        self._arguments = ChainArguments(args, kwargs or {}, in_dims)
        self.data = self._arguments.tensors
        self.model = model
        self.args, self.kwargs = self._arguments.filled(self._arguments.row(0))
        self.transforms = dict(transforms or {})
        self._init_strategy = init_strategy
        # One eager run outside any seed scope of the caller's: the first use of a parameter or module happens here.
        # Validation reads values, which fake tensors do not have.
        validate = torch._guards.detect_fake_mode([*self.args, *self.kwargs.values()]) is None
        trace = self._dry_run(validate)
        self.sites: dict[str, Site] = {}
        self.observed: dict[str, Tensor] = {}
        self.priors: dict[str, Any] = {}
        self.plates: dict[str, MinibatchPlate] = {}
        enumerated: list[str] = []
        start = 0
        for name, node in trace.nodes.items():
            if node["type"] != "sample":
                continue
            fn, value = node["fn"], node["value"]
            if isinstance(fn, _Subsample):
                if fn.subsample_size is not None and fn.subsample_size < fn.size and not node["is_observed"]:
                    self.plates[name] = MinibatchPlate(name, fn.size, fn.subsample_size)
                continue
            if node["is_observed"]:
                if not node["infer"].get("_deterministic") and type(fn).__name__ != "Unit":
                    self.observed[name] = value
                continue
            if node["infer"].get("is_auxiliary"):
                raise ValueError(
                    f"site {name!r} is auxiliary: its draw would make the "
                    "log-density random; observe it or sample it as a latent site"
                )
            if fn.support.is_discrete:
                if not fn.has_enumerate_support:
                    raise ValueError(
                        f"latent site {name!r} is discrete ({type(fn).__name__}) "
                        "and cannot be enumerated: marginalise it by hand, "
                        "observe it, or use a kernel for discrete sites"
                    )
                enumerated.append(name)
                continue
            z = self._to_unconstrained(name, fn, value)
            self.sites[name] = Site(name, value.shape, z.shape, start, start + z.numel(), value.dtype)
            self.priors[name] = fn
            start += z.numel()
        self.dim = start
        if not self.sites:
            raise ValueError(
                "the model has no continuous latent site to sample; every site is observed, discrete or deterministic"
            )
        self._refuse_wrong_minibatches(trace)
        first = trace.nodes[next(iter(self.sites))]["value"]
        self.device = first.device
        self.dtype = torch.float32
        for site in self.sites.values():
            self.dtype = torch.promote_types(self.dtype, site.dtype)
        self._enumerated = bool(enumerated)
        self._max_plate_nesting = plate_nesting(trace) if max_plate_nesting is None else max_plate_nesting
        if enumerated:
            z = torch.zeros(self.dim, dtype=self.dtype, device=self.device)
            with scoped_model(validate=False):
                messenger = _Unconstrained(self.unflatten(z), self.minibatch(), self.transforms)
                refuse_split_sums(self._enumerated_trace(messenger, self.args, self.kwargs))

    def __call__(self, z: Tensor, batch: Mapping[str, Tensor] | None = None) -> Tensor:
        """log p(z) of one chain, a scalar; ``z`` is ``(dim,)``, ``batch`` gives each minibatch plate its
        ``(batch_size,)`` indices.
        """
        return self.run(self.unflatten(z), batch)[0]

    def run(
        self,
        values: Mapping[str, Tensor],
        batch: Mapping[str, Tensor] | None = None,
        row: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """log p(z), the constrained value of every latent site, and every deterministic site, at one chain's
        unconstrained ``values``, with its ``row`` of ``data`` (the first chain's if not given).
        """
        nodes, log_prob, log_det = self._evaluate(values, batch, row)
        constrained = {name: nodes[name]["value"] for name in self.sites}
        deterministic = {
            n: s["value"] for n, s in nodes.items() if s["type"] == "sample" and s["infer"].get("_deterministic")
        }
        return log_prob + log_det, constrained, deterministic

    def split(self, values: Mapping[str, Tensor], batch: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """log p(z) as two terms at one chain's unconstrained ``values``: the prior of the continuous latent sites
        with their log-Jacobians, and all the rest.

        The prior is the law that the model draws the sites from, so it is normalised: scales and masks on latent sites
        count as likelihood, as do observed sites, factors and discrete sites that are summed out.

        Raises:
            ValueError: a site's prior is flat, or depends on a discrete site that is summed out, so that the
                continuous sites have no prior of their own.
        """
        self._refuse_flat_priors()
        nodes, log_prob, log_det = self._evaluate(values, batch)
        prior = torch.as_tensor(log_det, dtype=self.dtype, device=self.device)
        for name in self.sites:
            prior = prior + self._plain_prior(name, nodes[name]).sum()
        if self._enumerated:
            return prior, log_prob + log_det - prior
        rest = prior.new_zeros(())
        for name, node in nodes.items():
            if node["type"] != "sample" or not _has_density(node):
                continue
            if name not in self.sites:
                rest = rest + _log_prob(node)
            elif node["mask"] is not None or not (isinstance(node["scale"], float) and node["scale"] == 1.0):
                rest = rest + _log_prob(node) - node["fn"].log_prob(node["value"]).sum()
        return prior, rest

    def unflatten(self, z: Tensor) -> dict[str, Tensor]:
        """Split flat vectors ``(..., dim)`` into the sites' unconstrained values ``(..., *unconstrained_shape)``."""
        return {
            s.name: z[..., s.start : s.stop].reshape((*z.shape[:-1], *s.unconstrained_shape)).to(s.dtype)
            for s in self.sites.values()
        }

    def flatten(self, values: Mapping[str, Tensor]) -> Tensor:
        """Join the sites' unconstrained values ``(chain, *unconstrained_shape)`` into flat vectors ``(chain, dim)``.

        Raises:
            ValueError: a site is missing, unknown, or of the wrong shape.
        """
        unknown = sorted(set(values) - set(self.sites))
        missing = sorted(set(self.sites) - set(values))
        if unknown or missing:
            raise ValueError(
                "initial values must name the model's latent sites "
                f"{sorted(self.sites)}; missing {missing}, unknown {unknown}"
            )
        rows = []
        for site in self.sites.values():
            value = torch.as_tensor(values[site.name], dtype=self.dtype, device=self.device)
            if value.shape[1:] != site.unconstrained_shape:
                raise ValueError(
                    f"initial value of {site.name!r} has shape {tuple(value.shape)}; "
                    f"it needs (num_chains, *{tuple(site.unconstrained_shape)}) in "
                    "unconstrained space"
                )
            rows.append(value.reshape(len(value), -1))
        if len({len(r) for r in rows}) > 1:
            raise ValueError(
                "initial values differ in their number of chains: "
                f"{ {n: len(r) for n, r in zip(self.sites, rows, strict=True)} }"
            )
        return torch.cat(rows, dim=1)

    def initial_position(
        self, seed: int, strategy: Callable[[Any], Any] | None = None, row: Sequence[Tensor] | None = None
    ) -> Tensor:
        """One chain's flat starting point ``(dim,)`` chosen by a Pyro init strategy under ``seed``, with the chain's
        ``row`` of ``data``.
        """
        with scoped_seed(seed, self.device), scoped_model(validate=False):
            trace = self._initial_trace(strategy, row)
        parts = [
            self._to_unconstrained(name, trace.nodes[name]["fn"], trace.nodes[name]["value"]).reshape(-1).to(self.dtype)
            for name in self.sites
        ]
        return torch.cat(parts).detach()

    def initial_positions(
        self, seeds: Sequence[int], strategy: Callable[[Any], Any], rows: Sequence[Sequence[Tensor]]
    ) -> Tensor:
        """The chains' starting points ``(chain, dim)`` under their seeds, with their rows of ``data``."""
        if strategy is init_to_uniform and not self.transforms:
            # Uniform on (-2, 2) in unconstrained space whatever the model, which need not run once a chain.
            drawn = [torch.rand(self.dim, generator=generator(s, "start"), dtype=self.dtype) for s in seeds]
            return (4 * torch.stack(drawn) - 2).to(self.device)
        return torch.stack([self.initial_position(s, strategy, row) for s, row in zip(seeds, rows, strict=True)])

    def minibatch(self, seed: int = 0) -> dict[str, Tensor]:
        """Indices for every minibatch plate, for a dry evaluation."""
        with scoped_seed(seed):
            return {p.name: torch.randperm(p.size)[: p.batch_size].to(self.device) for p in self.plates.values()}

    # ------------------------------------------------------------------ internals
    def _evaluate(
        self,
        values: Mapping[str, Tensor],
        batch: Mapping[str, Tensor] | None,
        row: Sequence[Tensor] | None = None,
    ) -> tuple[dict[str, Any], Tensor, Tensor | float]:
        """The trace's nodes, the log-joint in constrained space and the log-Jacobians."""
        messenger = _Unconstrained(values, batch or {}, self.transforms)
        args, kwargs = (self.args, self.kwargs) if row is None else self._arguments.filled(row)
        with scoped_model(validate=False):
            if not self._enumerated:
                with poutine.trace() as recorder, messenger:
                    self.model(*args, **kwargs)
                trace = recorder.trace
                log_prob = _log_prob_sum(trace)
            else:
                trace = self._enumerated_trace(messenger, args, kwargs)
                log_prob = log_joint(trace)
        return dict(trace.nodes), log_prob, messenger.log_det

    def _plain_prior(self, name: str, node: Any) -> Tensor:
        log_prob: Tensor = node["fn"].log_prob(node["value"])
        if self._enumerated and log_prob.dim() > self._max_plate_nesting:
            extra = log_prob.shape[: log_prob.dim() - self._max_plate_nesting]
            if extra.numel() > 1:
                raise ValueError(
                    f"the prior of site {name!r} depends on a discrete site that is summed out, so it cannot be told "
                    "apart from the likelihood: temper against a reference distribution of your own (reference=...)"
                )
        return log_prob

    def _refuse_flat_priors(self) -> None:
        for name, fn in self.priors.items():
            base = fn
            while isinstance(base, torch.distributions.Independent):
                base = base.base_dist
            if isinstance(base, ImproperUniform | MaskedDistribution):
                raise ValueError(
                    f"the prior of site {name!r} is flat ({type(base).__name__}): it has no draws and the evidence is "
                    "not defined. Give it a proper prior, or temper against a reference distribution (reference=...)"
                )

    def _argument_device(self) -> torch.device:
        tensors = [a for a in (*self.args, *self.kwargs.values()) if isinstance(a, Tensor)]
        return tensors[0].device if tensors else torch.device("cpu")

    def _dry_run(self, validate: bool) -> Any:
        """A run at latent values where the model can be evaluated: one that solves an equation of motion, say, may have
        no finite values at many a draw.
        """
        first: Exception | None = None
        for seed in range(_DRY_RUNS):
            try:
                with scoped_seed(seed, self._argument_device()), scoped_model(validate=validate):
                    trace = self._initial_trace()
                    trace.compute_log_prob(site_filter=lambda _, site: not isinstance(site["fn"], _Subsample))
                return trace
            except (ValueError, torch.linalg.LinAlgError) as error:
                first = first or error
        assert first is not None
        raise first

    def _initial_trace(self, strategy: Callable[[Any], Any] | None = None, row: Sequence[Tensor] | None = None) -> Any:
        chosen = strategy or self._init_strategy
        args, kwargs = (self.args, self.kwargs) if row is None else self._arguments.filled(row)

        def initial_value(site: Any) -> Tensor | None:
            fn = site["fn"]
            if fn.support.is_discrete:
                return None
            try:
                return chosen(site)
            except NotImplementedError:  # a law without draws: an improper one, or an energy
                transform = _bijection(site["name"], fn, self.transforms)
                return transform(4 * torch.rand(transform.inverse_shape(fn.shape())) - 2)

        with poutine.trace() as recorder, InitMessenger(initial_value):
            self.model(*args, **kwargs)
        return recorder.trace

    def _to_unconstrained(self, name: str, fn: Any, value: Tensor) -> Tensor:
        return _bijection(name, fn, self.transforms).inv(value)

    def _refuse_wrong_minibatches(self, trace: Any) -> None:
        for name in self.sites:
            inside = [f.name for f in trace.nodes[name]["cond_indep_stack"] if f.name in self.plates]
            if inside:
                raise ValueError(
                    f"latent site {name!r} lies inside the subsampled plate "
                    f"{inside[0]!r}: each minibatch would hold other variables. "
                    "Use the full plate, or marginalise the site in the likelihood"
                )

    def _enumerated_trace(self, messenger: _Unconstrained, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return enumerated_trace(self.model, args, kwargs, self._max_plate_nesting, messenger)


def _bijection(name: str, fn: Any, transforms: Mapping[str, Transform]) -> Transform:
    """The map from unconstrained space to the support of site ``name``.

    Raises:
        ValueError: there is none, and ``transforms`` has none either.
    """
    if name in transforms:
        return transforms[name].inv
    try:
        return biject_to(fn.support)
    except NotImplementedError as error:
        raise ValueError(
            f"no bijection maps unconstrained space to the support of latent site {name!r} ({fn.support}): write the "
            "site in terms of others (a covariance by LKJCholesky and scales, say), reparametrise it, or give the "
            "kernel transforms={site: transform}"
        ) from error


def _log_prob_sum(trace: Any) -> Tensor:
    """Sum of the scaled and masked log-probabilities of all sample sites; deterministic ones have none."""
    total: Tensor | float = 0.0
    for site in trace.nodes.values():
        if site["type"] == "sample" and _has_density(site):
            total = total + _log_prob(site)
    if not isinstance(total, Tensor):
        raise ValueError("the model has no sample site with a density")
    return total


def _has_density(site: Any) -> bool:
    fn = site["fn"]
    if isinstance(fn, _Subsample) or site["infer"].get("_deterministic"):
        return False
    if not isinstance(fn, TorchDistributionMixin | Distribution):
        raise ValueError(f"site {site['name']!r} holds a {type(fn).__name__}, which has no log-density")
    return True


def _log_prob(site: Any) -> Tensor:
    log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    return scale_and_mask(log_prob, site["scale"], site["mask"]).sum()
