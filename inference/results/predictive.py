"""Posterior predictive draws and pointwise log-likelihoods of any Pyro model, vectorised over draws.

``Predictive`` has the names and meaning of ``pyro.infer.Predictive``: run the model once per posterior draw with the
latent sites set to that draw, and collect what the model then draws.  Pyro runs the model's Python once per draw and
keeps every trace; here ``torch.func.vmap`` runs it once per *chunk* of draws and only the values asked for are kept.
``log_likelihood`` evaluates :math:`\\log p(y_i \\mid \\theta_s)` for every data point ``i`` and draw ``s`` in the
same way, as ``arviz.loo`` wants it (Vehtari, Gelman and Gabry, "Practical Bayesian model evaluation using
leave-one-out cross-validation and WAIC", 2017, arXiv:1507.04544).
"""

import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor

from inference._errors import DependentDataError, SamplerWarning
from inference.potential.enumeration import plate_nesting
from inference.results._marginal import MarginalLikelihood
from inference.results._over_draws import CountBytes, Draws, noting, over_draws, scope

__all__ = ["Predictive", "exported_log_likelihood", "log_likelihood"]


class Predictive(torch.nn.Module):
    """Draws from a model's prior or posterior predictive; called with the model's arguments it returns a ``dict``.

    Each site of the ``dict`` is ``(num_samples, ...)``, or ``(chain, draw, ...)`` with ``batch_ndims=2``. The
    arguments that ``pyro.infer.Predictive`` has mean the same here, and shapes of the results are Pyro's: a site
    outside of ``k`` of the model's nested plates has ``k`` singleton dimensions after the draws.  As in Pyro, a site
    of ``posterior_samples`` is set to its draw, every other latent site is drawn from the model (discrete sites that
    an engine summed out as well), an observed site returns its data, and pass ``None`` for the data to have them
    predicted.

    What differs: all draws go through the model in a few vectorised passes, without any plate annotation; a guide's
    draws keep their own shapes when the model sees them; ``return_sites`` must exist. A model that cannot run under
    ``vmap`` (it branches on a drawn value, calls ``.item()``, or draws from a distribution that no rule covers) runs
    draw by draw, with one ``CaptureWarning`` that says why. The first draw runs the model eagerly with the validation
    that is switched on, so its errors are the model's own; validation is off in the vectorised pass, where an invalid
    parameter becomes NaN in its own draw where torch allows it.

    Args:
        model: a callable with Pyro primitives.
        posterior_samples: site -> ``(draw, ...)``, or ``(chain, draw, ...)`` with ``batch_ndims=2``. ``None``: draws
            from the prior.
        guide: draws the latent sites in place of ``posterior_samples``.
        num_samples: number of draws where ``posterior_samples`` does not say it.
        return_sites: sites to return, ``"_RETURN"`` for the model's return value. ``()``: all sites not in
            ``posterior_samples``, with a guide all sites of the model. ``None``: all sites.
        parallel: kept from Pyro's signature, without effect: draws are always vectorised.
        chunk_size: draws a vectorised pass. ``None``: as many as write 32 MiB (1 GiB on an accelerator), measured on
            the first draw, or a third of the result, so that the peak of memory stays under twice the result.
        seed: the seed of all draws; the global random state is left as it was. The same seed gives the same draws
            on one machine whatever the ``chunk_size`` (random numbers that the model draws past its ``sample``
            statements, and distributions without a rule of ours, excepted). ``None``: a seed from the global random
            state.
        batch_ndims: number of leading dimensions of ``posterior_samples`` that count draws, 1 or 2; results have the
            same.
        full_plates: visit every element of subsampling plates. ``False``: a fresh random subsample for each draw, as
            Pyro's.

    Raises:
        ValueError: nothing says how many draws, the samples are empty, disagree in their leading sizes, fit no site
            or not the site's shape, or a site of ``return_sites`` does not exist.
        TypeError: an argument, or the value of a site to return, is of the wrong type.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        posterior_samples: Mapping[str, Tensor] | None = None,
        guide: Callable[..., Any] | None = None,
        num_samples: int | None = None,
        return_sites: Collection[str] | None = (),
        parallel: bool = False,
        *,
        chunk_size: int | None = None,
        seed: int | None = 0,
        batch_ndims: int = 1,
        full_plates: bool = False,
    ) -> None:
        super().__init__()
        if return_sites is not None and not isinstance(return_sites, (list, tuple, set)):
            raise TypeError(f"return_sites must be a list, tuple or set of site names, or None, got {return_sites!r}")
        _check_count("num_samples", num_samples)
        _check_count("chunk_size", chunk_size)
        if guide is not None and posterior_samples:
            raise ValueError(
                "guide and posterior_samples are both given: the latent sites can come from only one of them"
            )
        leading = _leading_shape(posterior_samples or {}, batch_ndims)
        if leading is None:
            if num_samples is None:
                raise ValueError(
                    "nothing says how many draws to make: give posterior_samples that are not empty, or num_samples"
                )
            if batch_ndims != 1:
                raise ValueError(
                    f"batch_ndims={batch_ndims} needs posterior_samples; draws of the prior have one dimension"
                )
            leading = torch.Size((num_samples,))
        elif num_samples is not None and num_samples != leading.numel():
            warnings.warn(
                f"num_samples={num_samples} is not the {leading.numel()} draws of posterior_samples, which are used",
                stacklevel=2,
            )
        self.model = model
        self.posterior_samples = dict(posterior_samples or {})
        self.guide = guide
        self.num_samples = leading.numel()
        self.return_sites = return_sites
        self.parallel = parallel
        self.chunk_size = chunk_size
        self.seed = seed
        self.batch_ndims = batch_ndims
        self.full_plates = full_plates
        self._leading = leading

    def forward(self, *args: Any, **kwargs: Any) -> Draws:
        """Run the model with these arguments on each draw: site -> ``(num_samples, ...)`` or ``(chain, draw, ...)``."""
        samples = _flatten_draws(self.posterior_samples, self.batch_ndims)

        def run(draws: Draws) -> poutine.Trace:
            data: dict[str, Any] = draws
            with poutine.mask(mask=False):
                if self.guide is not None:
                    guide_trace = poutine.trace(self.guide).get_trace(*args, **kwargs)
                    nodes = prune_subsample_sites(guide_trace).nodes
                    data = {name: site["value"] for name, site in nodes.items() if site["type"] == "sample"}
                return poutine.trace(poutine.condition(self.model, data)).get_trace(*args, **kwargs)

        seed = int(torch.randint(2**62, (), device="cpu")) if self.seed is None else self.seed
        with scope(seed, self.full_plates, (samples, args, kwargs), (self.model, self.guide)):
            first = {name: value.select(0, 0) for name, value in samples.items()}
            with (
                noting("in the run of the model on the first draw"),
                CountBytes() as counted,
                _Fitting(first, self.batch_ndims),
            ):
                trace = run(first)
            padding = self._sites(trace)

            def one(draws: Draws) -> Draws:
                nodes = run(draws).nodes
                return {name: _site_value(nodes, name) for name in padding}

            kept = _bytes([_site_value(trace.nodes, name) for name in padding])
            del trace
            size = self.chunk_size
            found = over_draws(one, samples, self.num_samples, size, counted, seed=seed, kept=kept, stacklevel=5)
        return {
            name: value.reshape(*self._leading, *(1,) * padding[name], *value.shape[1:])
            for name, value in found.items()
        }

    def call(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """The values of :meth:`forward` in the order of the sites' names, as in ``pyro.infer.Predictive``."""
        return tuple(value for _, value in sorted(self.forward(*args, **kwargs).items()))

    def _sites(self, trace: poutine.Trace) -> dict[str, int]:
        """The sites to return, each with the number of singleton dimensions that Pyro puts after the draws."""
        available = {
            name: site for name, site in trace.nodes.items() if site["type"] == "sample" and not site_is_subsample(site)
        }
        plates = [
            frame
            for site in trace.nodes.values()
            for frame in site.get("cond_indep_stack", ())
            if site["type"] == "sample"
        ]
        nesting = max((-frame.dim for frame in plates if frame.dim is not None), default=0)
        if self.return_sites:
            unknown = sorted(set(self.return_sites) - set(available) - {"_RETURN"})
            if unknown:
                raise ValueError(
                    f"return_sites: the model has no site {unknown}; it has {sorted(available)} and '_RETURN'"
                )
            names = [name for name in available if name in self.return_sites]
        elif self.return_sites is None or self.guide is not None:
            names = list(available)
        else:
            names = [name for name in available if name not in self.posterior_samples]
        padding = {name: max(0, nesting - len(getattr(available[name]["fn"], "batch_shape", ()))) for name in names}
        if self.return_sites and "_RETURN" in self.return_sites:
            padding["_RETURN"] = 0
        for name in padding:
            _site_value(trace.nodes, name)
        return padding


def exported_log_likelihood(
    wanted: bool | None,
    has_data: bool,
    model: Callable[..., Any],
    posterior: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> dict[str, Tensor]:
    """The group of an export, of draws by chain: as :func:`log_likelihood` where it is ``wanted``, nothing where it is
    not; where it is None, nothing if the model has no data, and a warning if they have no likelihoods of their own.
    """
    if not (has_data if wanted is None else wanted):
        return {}
    try:
        return log_likelihood(model, posterior, *args, batch_ndims=2, **kwargs)
    except DependentDataError as error:
        if wanted:
            raise
        warnings.warn(f"the export has no log_likelihood: {error}", SamplerWarning, stacklevel=3)
        return {}


def log_likelihood(
    model: Callable[..., Any],
    posterior_samples: Mapping[str, Tensor],
    *args: Any,
    chunk_size: int | None = None,
    batch_ndims: int = 1,
    **kwargs: Any,
) -> Draws:
    """The log-likelihood of every data point under every posterior draw.

    Every observed site gets :math:`\\log p(y_i \\mid \\theta_s)`, without sum, with masks applied (a masked point has
    0) and without scales: a subsampling plate is set to all its elements, so the ``N/B`` of minibatches does not
    occur, and neither does a ``poutine.scale``. ``pyro.deterministic`` and ``pyro.factor`` sites are not data and are
    left out.

    Discrete latent sites of which there are no draws are summed out: :math:`p(y_i \\mid \\theta_s) = \\sum_k
    p(k \\mid \\theta_s) p(y_i \\mid k, \\theta_s)`.  A data point is then all that shares a discrete variable: the
    measurements of one row, in a plate of their own within the variable's plate, have one likelihood together.

    Args:
        model: a callable with Pyro primitives.
        posterior_samples: site -> ``(draw, ...)``, or ``(chain, draw, ...)`` with ``batch_ndims=2``, for all latent
            sites.
        args: the model's arguments, data included; ``kwargs`` likewise.
        chunk_size: draws a vectorised pass; ``None`` as in :class:`Predictive`.
        batch_ndims: number of leading dimensions that count draws, 1 or 2.

    Returns:
        Observed site -> ``(draw, *batch_shape)`` or ``(chain, draw, *batch_shape)``.

    Raises:
        ValueError: a continuous latent site has no samples, or a discrete one that cannot be enumerated; several
            observed sites, or all rows of one, share a discrete variable that is summed out, so that they are not
            independent given the rest; nothing is observed, or the samples are bad as in :class:`Predictive`.
    """
    _check_count("chunk_size", chunk_size)
    leading = _leading_shape(posterior_samples, batch_ndims)
    if leading is None:
        raise ValueError("posterior_samples is empty: log_likelihood needs draws of every latent site")
    samples = _flatten_draws(posterior_samples, batch_ndims)
    missing: list[str] = []

    def run(draws: Draws) -> poutine.Trace:
        with _Given(draws, missing):
            return poutine.trace(model).get_trace(*args, **kwargs)

    with scope(0, True, (samples, args, kwargs), (model,)):
        with (
            CountBytes() as counted,
            noting("in the run of the model on the first draw, on all elements of its plates"),
        ):
            first = {name: value.select(0, 0) for name, value in samples.items()}
            trace = run(first)
            unknown = sorted({name for name in missing if not _enumerable(trace.nodes[name])})
            if unknown:
                raise ValueError(
                    f"the sites {unknown} are neither observed nor in posterior_samples, and cannot be summed out: "
                    "pass the data and draws of every latent site"
                )
            observed = [name for name, site in trace.nodes.items() if _is_data(site)]
            kept = _bytes([_site_log_prob(trace.nodes[name]) for name in observed])
        if not observed:
            raise ValueError("the model has no observed site: pass the data that it was fitted to")

        def plain(draws: Draws) -> Draws:
            nodes = run(draws).nodes
            return {name: _site_log_prob(nodes[name]) for name in observed}

        one: Callable[[Draws], Draws] = plain
        if missing:
            nesting = plate_nesting(trace)
            one = MarginalLikelihood(model, args, kwargs, nesting, observed, _site_log_prob, first)
        del trace
        found = over_draws(one, samples, leading.numel(), chunk_size, counted, seed=0, kept=kept, stacklevel=3)
    return {name: value.reshape(*leading, *value.shape[1:]) for name, value in found.items()}


# ---------------------------------------------------------------- sites
class _Fitting(Messenger):
    """The outermost handler of the eager run: each sample fits its site.

    Checked at the site, before the model computes with the value; a sample grouped by chain could broadcast into
    nonsense.
    """

    def __init__(self, samples: Draws, batch_ndims: int) -> None:
        super().__init__()
        self.samples = samples
        self.batch_ndims = batch_ndims
        self.seen: set[str] = set()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if error == (None, None, None) and self.samples and not self.samples.keys() & self.seen:
            raise ValueError(
                f"posterior_samples name {sorted(self.samples)}, none of which is a site of the model, "
                f"which has {sorted(self.seen)}"
            )

    def _pyro_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        self.seen.add(name)
        if name not in self.samples or msg["infer"].get("_deterministic"):
            return
        if not isinstance(fn, torch.distributions.Distribution) or not isinstance(msg["value"], Tensor):
            return
        given, needed = msg["value"].shape, fn.batch_shape + fn.event_shape
        try:
            fits = torch.broadcast_shapes(given, needed).numel() == needed.numel()
        except RuntimeError:
            fits = False
        if fits and given[len(given) - len(fn.event_shape) :] == fn.event_shape:
            return
        if self.batch_ndims == 1 and given[1:] == needed:
            remedy = "the samples look grouped by chain: pass batch_ndims=2"
        elif any(frame.size != frame.full_size for frame in msg["cond_indep_stack"]):
            remedy = "the site is in a plate that is subsampled: pass full_plates=True for draws of all its elements"
        else:
            remedy = "give draws of this model with these arguments, or leave the site out to have it drawn"
        raise ValueError(
            f"posterior_samples[{name!r}]: each draw has shape {tuple(given)}, the site {tuple(needed)}; {remedy}"
        )


class _Given(Messenger):
    """Sets latent sites to given values, and not observed ones, whose data ``poutine.condition`` would replace."""

    def __init__(self, values: Mapping[str, Tensor], missing: list[str]) -> None:
        super().__init__()
        self.values = values
        self.missing = missing

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["value"] is not None or isinstance(msg["fn"], _Subsample):
            return
        if msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]
        else:
            self.missing.append(msg["name"])


def _is_data(site: Any) -> bool:
    return (
        site["type"] == "sample"
        and site["is_observed"]
        and not site["infer"].get("_deterministic")
        and not isinstance(site["fn"], dist.Unit)
    )


def _bytes(values: Collection[Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in values)


def _enumerable(site: Any) -> bool:
    return site["fn"].support.is_discrete and site["fn"].has_enumerate_support


def _site_value(nodes: Mapping[str, Any], name: str) -> Tensor:
    if name not in nodes:
        raise ValueError(
            f"site {name!r} is in the first draw's run and not in a later one: name sites of every run in return_sites"
        )
    value = nodes[name]["value"]
    if not isinstance(value, Tensor):
        what = "the model's return value" if name == "_RETURN" else f"the value of site {name!r}"
        raise TypeError(f"{what} must be a tensor to be stacked over draws, got {type(value).__name__}")
    return value


def _site_log_prob(site: Any) -> Tensor:
    log_prob: Tensor = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    mask = site["mask"]
    if mask is None or mask is True:
        return log_prob
    return torch.zeros_like(log_prob) if mask is False else torch.where(mask, log_prob, 0)


# ---------------------------------------------------------------- checks
def _check_count(name: str, value: int | None) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _leading_shape(samples: Mapping[str, Tensor], batch_ndims: int) -> torch.Size | None:
    """The leading sizes that all samples share; ``None`` for no samples."""
    if batch_ndims not in (1, 2):
        raise ValueError(f"batch_ndims must be 1 for (draw, ...) or 2 for (chain, draw, ...), got {batch_ndims!r}")
    found: dict[str, torch.Size] = {}
    for name, value in samples.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"posterior_samples[{name!r}] must be a tensor, got {type(value).__name__}")
        if value.dim() < batch_ndims:
            raise ValueError(
                f"posterior_samples[{name!r}] has shape {tuple(value.shape)}: fewer than batch_ndims={batch_ndims}"
            )
        found[name] = value.shape[:batch_ndims]
    if len(set(found.values())) > 1:
        sizes = {name: tuple(shape) for name, shape in found.items()}
        raise ValueError(
            f"posterior_samples disagree in their leading sizes, {sizes}: give the same draws of every site"
        )
    leading = next(iter(found.values()), None)
    if leading is not None and leading.numel() == 0:
        raise ValueError(f"posterior_samples hold no draws: leading sizes {tuple(leading)}")
    return leading


def _flatten_draws(samples: Mapping[str, Tensor], batch_ndims: int) -> Draws:
    return {name: value.detach().flatten(0, batch_ndims - 1) for name, value in samples.items()}
