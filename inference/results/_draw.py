"""Draws from torch and Pyro distributions that ``torch.func.vmap`` accepts.

Many samplers of ``torch.distributions`` fill a fresh tensor in place, call an old-style autograd function or loop
until all are accepted, and ``vmap`` refuses them, or runs them one by one with a warning.  Two ways round:

- the normal family is drawn as :math:`x = \\mu + L z` with ``z`` from ``torch.randn``, which ``vmap`` batches;
- the other families leave ``vmap`` for the draw: an ``autograd.Function`` with a ``vmap`` rule gets the parameters of
  the whole batch and gives them to the family's own sampler, so that the draws are torch's or Pyro's, only more of
  them at a time.

The numbers of a posterior draw depend on the seed, on which draw it is and on which random call of the model asks, and
not on the draws beside it: ``RowNoise`` gives the normal and uniform numbers of fixed groups of draws, and runs a
family's own sampler draw by draw.  So results do not depend on how draws are put into chunks.

Wrappers (``Independent``, ``ExpandedDistribution``, ``MaskedDistribution``, ``TransformedDistribution``, mixtures,
compounds) recurse into what they wrap.  A distribution without a rule draws by its own ``sample``; where ``vmap``
refuses that, the error names the site.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import pyro.distributions as dist
import torch
import torch.distributions as td
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from inference.runtime.generators import derive_seed, reseed

__all__ = ["RowNoise", "VmapSafeDraws", "draw"]

_D = TypeVar("_D")
_Shape = tuple[int, ...]
_RULES: dict[type, Callable[[Any, _Shape], Tensor]] = {}


def draw(distribution: td.Distribution, sample_shape: _Shape = ()) -> Tensor:
    """One draw, ``(*sample_shape, *batch_shape, *event_shape)``, also inside ``vmap(randomness="different")``."""
    kind = type(distribution)
    for base in kind.__mro__:
        rule = _RULES.get(base)
        # a subclass that overrides how it samples follows another law than its base
        if rule is not None and _samplers(kind) == _samplers(base):
            return rule(distribution, tuple(sample_shape))
    # as Pyro's sample statement does, where the two differ
    plain = distribution.rsample if distribution.has_rsample else distribution.sample
    return plain(torch.Size(sample_shape))


class RowNoise:
    """Random numbers of some rows of a batch, each row's its own.

    Args:
        seed: of all rows.
        first: number of the first row.
    """

    def __init__(self, seed: int, first: int) -> None:
        self.seed, self.first = seed, first
        self._calls = 0
        self._generators: dict[torch.device, torch.Generator | None] = {}

    def numbers(self, kind: str, like: Tensor) -> Tensor:
        """Standard normal or uniform numbers like ``like`` ``(row, ...)``.

        They are drawn for groups of rows whose size depends on the size of a row alone, and a group that the rows hold
        a part of is drawn whole.
        """
        self._calls += 1
        generator = self._generator(like.device)
        if generator is None:
            return _Numbers(kind)(like)
        result = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        size = max(1, min(_GROUP, _GROUP_NUMBERS // max(1, like.shape[1:].numel())))
        start, stop = self.first, self.first + len(like)
        for group in range(start // size, (stop - 1) // size + 1):
            low, high = max(start, group * size), min(stop, (group + 1) * size)
            part = result.narrow(0, low - start, high - low)
            whole = part if high - low == size else result.new_empty((size, *result.shape[1:]))
            generator.manual_seed(derive_seed(self.seed, self._calls, group))
            whole.normal_(generator=generator) if kind == "normal" else whole.uniform_(generator=generator)
            if whole is not part:
                part.copy_(whole.narrow(0, low - group * size, high - low))
        return result

    def each(self, sampler: Callable[..., Tensor], parameters: list[Tensor], dim: int) -> Tensor:
        """``sampler`` on every row of the parameters, stacked along ``dim``; it draws from the global generators."""
        self._calls += 1
        found = []
        for row, values in enumerate(zip(*parameters, strict=True)):
            reseed(derive_seed(self.seed, self._calls, self.first + row), values[0].device.type)
            found.append(sampler(*values))
        return torch.stack(found, dim)

    def _generator(self, device: torch.device) -> torch.Generator | None:
        if device not in self._generators:
            try:
                self._generators[device] = torch.Generator(device)
            except RuntimeError:  # a fake tensor names a device that is not there
                self._generators[device] = None
        return self._generators[device]


_GROUP, _GROUP_NUMBERS = 256, 1 << 13
_rows: list[RowNoise] = []  # of the handlers at work


class VmapSafeDraws(Messenger):
    """The outermost handler of a model under ``vmap``: it draws whatever no inner handler has set a value for.

    Args:
        rows: random numbers of the rows that ``vmap`` runs over; torch's own, of the whole batch, if not given.
    """

    def __init__(self, rows: RowNoise | None = None) -> None:
        super().__init__()
        self._drawn: list[Any] = []
        self._noise = rows

    def __enter__(self) -> "VmapSafeDraws":
        if self._noise is not None:
            _rows.append(self._noise)
        super().__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        # Not before: a density of the draw may need what a transform keeps of it.
        for fn in self._drawn:
            _forget_draws(fn)
        self._drawn.clear()
        if self._noise is not None:
            _rows.remove(self._noise)
        super().__exit__(*args)

    def _pyro_sample(self, msg: Any) -> None:
        if msg["done"] or msg["is_observed"] or msg["value"] is not None or msg["args"] or msg["kwargs"]:
            return
        fn = msg["fn"]
        if isinstance(fn, _Subsample):
            msg["value"] = _subsample(fn)
        elif isinstance(fn, td.Distribution):
            try:
                msg["value"] = draw(fn)
                self._drawn.append(fn)
            except Exception as error:
                raise RuntimeError(
                    f"site {msg['name']!r} ({type(fn).__name__}) cannot be drawn under vmap: {error}"
                ) from error


def _samplers(kind: type) -> tuple[Any, Any]:
    return getattr(kind, "rsample", None), getattr(kind, "sample", None)


def _rule(*kinds: type) -> Callable[[Callable[[_D, _Shape], Tensor]], Callable[[_D, _Shape], Tensor]]:
    def register(function: Callable[[_D, _Shape], Tensor]) -> Callable[[_D, _Shape], Tensor]:
        for kind in kinds:
            _RULES[kind] = function
        return function

    return register


def _subsample(fn: Any) -> Tensor:
    if fn.subsample_size is None or fn.subsample_size >= fn.size:
        return torch.arange(fn.size, device=fn.device)
    return _random("uniform", (fn.size,), torch.float64, fn.device).argsort().narrow(0, 0, fn.subsample_size)


# ---------------------------------------------------------------- drawn outside of vmap by the family's own sampler
class _Outside(torch.autograd.Function):
    """``sampler(*parameters)`` on the tensors that ``vmap`` has batched, the batch in front.

    ``marker`` is a number drawn under ``vmap`` and so batched by it: it brings ``vmap``'s rule into play for constant
    parameters as well, which would otherwise share one draw.  Below the last ``vmap`` the sampler runs as it is, so
    that its own (reparametrised) gradient reaches the parameters.
    """

    @classmethod
    def call(cls, marker: Tensor, sampler: Callable[..., Tensor], out_dim: int, *parameters: Tensor) -> Tensor:
        if torch._C._functorch.is_batchedtensor(marker):
            return cls.apply(marker, sampler, out_dim, *parameters)
        return sampler(*parameters)

    @staticmethod
    def forward(marker: Tensor, sampler: Callable[..., Tensor], out_dim: int, *parameters: Tensor) -> Tensor:
        return sampler(*parameters)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, marker: Tensor, sampler: Any, out_dim: int, *parameters: Tensor
    ) -> tuple[Tensor, int]:
        batched = [
            value.expand(info.batch_size, *value.shape) if dim is None else value.movedim(dim, 0)
            for value, dim in zip(parameters, in_dims[3:], strict=True)
        ]
        if _rows and not torch._C._functorch.is_batchedtensor(marker):
            if isinstance(sampler, _Numbers):
                return _rows[-1].numbers(sampler.kind, batched[0]), 0
            return _rows[-1].each(sampler, batched, out_dim), out_dim
        return _Outside.call(marker, sampler, out_dim, *batched), out_dim


class _Numbers:
    """A sampler of standard normal or uniform numbers like its argument."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, like: Tensor) -> Tensor:
        make = torch.randn if self.kind == "normal" else torch.rand
        return make(like.shape, dtype=like.dtype, device=like.device)


def _random(kind: str, shape: _Shape, dtype: torch.dtype, device: torch.device | None) -> Tensor:
    """Standard normal or uniform numbers, for each row its own."""
    if not _rows:
        return (torch.randn if kind == "normal" else torch.rand)(shape, dtype=dtype, device=device)
    marker = torch.rand((), device=device)
    return _Outside.call(marker, _Numbers(kind), 0, torch.empty((), dtype=dtype, device=device).expand(shape))


def _outside(family: Callable[..., td.Distribution], parameters: tuple[Tensor, ...], shape: _Shape) -> Tensor:
    """A draw of ``family(*parameters)``, whose parameters all have the batch shape in front, so that it can grow."""
    marker = torch.rand((), device=parameters[0].device)

    def sampler(*p: Tensor) -> Tensor:
        d = family(*p, validate_args=False)
        return d.rsample(shape) if d.has_rsample else d.sample(shape)

    return _Outside.call(marker, sampler, len(shape), *parameters)


def _own(family: Callable[..., td.Distribution], *names: str) -> None:
    """Draw ``family`` by its own sampler from these attributes, which are the constructor's arguments in order."""

    def rule(d: Any, shape: _Shape) -> Tensor:
        return _outside(family, tuple(getattr(d, name) for name in names), shape)

    _RULES[family] = rule  # type: ignore[index]


for _family, *_names in (
    (td.Beta, "concentration1", "concentration0"),
    (td.Binomial, "total_count", "probs"),
    (dist.Binomial, "total_count", "probs"),
    (td.Cauchy, "loc", "scale"),
    (td.Dirichlet, "concentration"),
    (td.Exponential, "rate"),
    (td.FisherSnedecor, "df1", "df2"),
    (td.Gamma, "concentration", "rate"),
    (td.Geometric, "probs"),
    (td.Laplace, "loc", "scale"),
    (td.NegativeBinomial, "total_count", "probs"),
    (td.Poisson, "rate"),
    (td.StudentT, "df", "loc", "scale"),
    (td.VonMises, "loc", "concentration"),
    (dist.AsymmetricLaplace, "loc", "scale", "asymmetry"),
    (dist.Logistic, "loc", "scale"),
    (dist.ProjectedNormal, "concentration"),
    (dist.SoftLaplace, "loc", "scale"),
    (dist.Stable, "stability", "skew", "scale", "loc"),
):
    _own(_family, *_names)


@_rule(td.LKJCholesky)
def _draw_lkj(d: td.LKJCholesky, shape: _Shape) -> Tensor:
    return _outside(partial(td.LKJCholesky, d.dim), (d.concentration,), shape)


@_rule(td.Multinomial)
def _draw_multinomial(d: td.Multinomial, shape: _Shape) -> Tensor:
    return _outside(partial(td.Multinomial, d.total_count), (d.probs,), shape)


@_rule(dist.MultivariateStudentT)
def _draw_multivariate_student(d: Any, shape: _Shape) -> Tensor:
    return _outside(dist.MultivariateStudentT, (d.df, d.loc, d.scale_tril), shape)


@_rule(td.Bernoulli)
def _draw_bernoulli(d: td.Bernoulli, shape: _Shape) -> Tensor:
    full = _extended(d, shape)
    if d.probs.device.type != "cpu":
        return (_random("uniform", full, d.probs.dtype, d.probs.device) < d.probs) + 0 * d.probs
    # On a CPU a comparison takes two thirds of the time of torch.bernoulli. Doubles as there, for small
    # probabilities; NaN stays NaN.
    return (_random("uniform", full, torch.float64, d.probs.device) < d.probs) + 0 * d.probs


@_rule(td.Uniform)
def _draw_uniform(d: td.Uniform, shape: _Shape) -> Tensor:
    return d.low + (d.high - d.low) * _random("uniform", _extended(d, shape), d.low.dtype, d.low.device)


@_rule(td.Categorical)
def _draw_categorical(d: td.Categorical, shape: _Shape) -> Tensor:
    """By inversion, in doubles; never a category of probability zero."""
    cumulative = d.probs.double().cumsum(-1)
    uniform = _random("uniform", _extended(d, shape), torch.float64, d.probs.device)[..., None]
    index = (uniform * cumulative[..., -1:] >= cumulative).sum(-1)
    last = torch.where(d.probs > 0, torch.arange(d.probs.shape[-1], device=d.probs.device), 0).amax(-1)
    return torch.minimum(index, last)


@_rule(td.OneHotCategorical)
def _draw_one_hot(d: td.OneHotCategorical, shape: _Shape) -> Tensor:
    index = _draw_categorical(d._categorical, shape)
    return (index[..., None] == torch.arange(d.probs.shape[-1], device=d.probs.device)).to(d.probs.dtype)


# ---------------------------------------------------------------- the normal family
def _normal(shape: _Shape, like: Tensor) -> Tensor:
    return _random("normal", shape, like.dtype, like.device)


def _extended(d: Any, shape: _Shape) -> _Shape:
    return (*shape, *d.batch_shape, *d.event_shape)


@_rule(td.Normal)
def _draw_normal(d: td.Normal, shape: _Shape) -> Tensor:
    return d.loc + d.scale * _normal(_extended(d, shape), d.loc)


@_rule(td.MultivariateNormal)
def _draw_mvn(d: td.MultivariateNormal, shape: _Shape) -> Tensor:
    z = _normal(_extended(d, shape), d.loc)
    return d.loc + (d._unbroadcasted_scale_tril @ z.unsqueeze(-1)).squeeze(-1)


@_rule(td.LowRankMultivariateNormal)
def _draw_low_rank_mvn(d: td.LowRankMultivariateNormal, shape: _Shape) -> Tensor:
    full = _extended(d, shape)
    factor = d._unbroadcasted_cov_factor
    low = _normal((*full[:-1], factor.shape[-1], 1), d.loc)
    return d.loc + (factor @ low).squeeze(-1) + d._unbroadcasted_cov_diag.sqrt() * _normal(full, d.loc)


# ---------------------------------------------------------------- wrappers
@_rule(td.Independent)
def _draw_independent(d: Any, shape: _Shape) -> Tensor:
    return draw(d.base_dist, shape)


@_rule(dist.MaskedDistribution)
def _draw_masked(d: Any, shape: _Shape) -> Tensor:
    return draw(d.base_dist, shape)


@_rule(ExpandedDistribution)
def _draw_expanded(d: Any, shape: _Shape) -> Tensor:
    return d._sample(lambda sizes: draw(d.base_dist, sizes), tuple(shape))


@_rule(td.TransformedDistribution)
def _draw_transformed(d: td.TransformedDistribution, shape: _Shape) -> Tensor:
    x = draw(d.base_dist, shape)
    for transform in d.transforms:
        x = transform(x)
    return x


def _forget_draws(fn: Any) -> None:
    for transform in getattr(fn, "transforms", ()):
        _forget(transform)
    if (base := getattr(fn, "base_dist", None)) is not None:
        _forget_draws(base)


def _forget(transform: Any) -> None:
    """Empty the cache of a user's transform: a tensor of a finished ``vmap`` must not stay in it."""
    for inner in getattr(transform, "parts", None) or filter(None, [getattr(transform, "base_transform", None)]):
        _forget(inner)
    owner: Any
    for owner in (transform, getattr(transform, "_inv", None)):
        if getattr(owner, "_cache_size", 0):
            owner._cached_x_y = None, None


@_rule(td.MixtureSameFamily)
def _draw_mixture(d: Any, shape: _Shape) -> Tensor:
    components = draw(d.component_distribution, shape)
    axis = components.dim() - 1 - len(d.event_shape)
    index = draw(d.mixture_distribution, shape)
    index = index.reshape(*index.shape, *(1,) * (len(d.event_shape) + 1))
    return components.take_along_dim(index.expand(*index.shape[: axis + 1], *d.event_shape), dim=axis).squeeze(axis)


@_rule(dist.MaskedMixture)
def _draw_masked_mixture(d: Any, shape: _Shape) -> Tensor:
    mask = d.mask.reshape(d.mask.shape + (1,) * len(d.event_shape))
    parts = [draw(part.expand(d.batch_shape), shape) for part in (d.component0, d.component1)]
    return torch.where(mask, parts[1], parts[0])


# ---------------------------------------------------------------- compounds
@_rule(dist.GammaPoisson)
def _draw_gamma_poisson(d: Any, shape: _Shape) -> Tensor:
    return draw(td.Poisson(draw(d._gamma, shape), validate_args=False))


@_rule(dist.BetaBinomial)
def _draw_beta_binomial(d: Any, shape: _Shape) -> Tensor:
    return draw(dist.Binomial(d.total_count, draw(d._beta, shape), validate_args=False))


@_rule(dist.DirichletMultinomial)
def _draw_dirichlet_multinomial(d: Any, shape: _Shape) -> Tensor:
    total_count = int(d.total_count.max()) if isinstance(d.total_count, Tensor) else int(d.total_count)
    return draw(dist.Multinomial(total_count, draw(d._dirichlet, shape), validate_args=False))


@_rule(dist.ZeroInflatedDistribution)
def _draw_zero_inflated(d: Any, shape: _Shape) -> Tensor:
    zero = _random("uniform", _extended(d, shape), torch.float64, d.gate.device) < d.gate
    return torch.where(zero, 0, draw(d.base_dist.expand(d.batch_shape), shape))
