"""Draws from torch and Pyro distributions that ``torch.func.vmap`` accepts.

Many samplers of ``torch.distributions`` fill a fresh tensor in place or call an old-style autograd function, which
``vmap`` refuses.  The rules below draw from the same laws out of ``randn``, ``rand`` and ``_standard_gamma`` only,
each an exact construction:

- location and scale: :math:`x = \\mu + \\sigma z`; Student's t divides ``z`` by :math:`\\sqrt{\\chi^2_\\nu / \\nu}`;
- inverse transforms for Cauchy, Laplace, Exponential and Geometric;
- Beta and Dirichlet as normalised gammas, in logarithms: :math:`\\log G_a = \\log G_{a+1} + a^{-1} \\log U` (Stuart
  1962), so that small concentrations do not underflow to 0/0;
- LKJ by the onion method of Lewandowski, Kurowicka and Joe, "Generating random correlation matrices based on vines
  and extended onion method", 2009, section 3.2;
- von Mises by the rejection sampler of Best and Fisher, "Efficient simulation of the von Mises distribution", 1979,
  with a fixed number of rounds.

Wrappers (``Independent``, ``ExpandedDistribution``, ``MaskedDistribution``, ``TransformedDistribution``, mixtures,
compounds) recurse into what they wrap.  A distribution without a rule draws by its own ``sample``; where ``vmap``
refuses that, the error names the distribution.
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import pyro.distributions as dist
import torch
import torch.distributions as td
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

__all__ = ["VmapSafeDraws", "draw"]

_D = TypeVar("_D")
_Shape = tuple[int, ...]
_RULES: dict[type, Callable[[Any, _Shape], Tensor]] = {}

# Best and Fisher accept at least 0.658 of the proposals at any concentration: 40 rounds leave a draw unaccepted with
# probability below 3e-19.
_VON_MISES_ROUNDS = 40


def draw(distribution: td.Distribution, sample_shape: _Shape = ()) -> Tensor:
    """One draw, ``(*sample_shape, *batch_shape, *event_shape)``, also inside ``vmap(randomness="different")``."""
    kind = type(distribution)
    for base in kind.__mro__:
        rule = _RULES.get(base)
        # a subclass that overrides how it samples follows another law than its base
        if rule is not None and _samplers(kind) == _samplers(base):
            return rule(distribution, tuple(sample_shape))
    return distribution.sample(torch.Size(sample_shape))


class VmapSafeDraws(Messenger):
    """The outermost handler of a model under ``vmap``: it draws whatever no inner handler has set a value for."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["done"] or msg["is_observed"] or msg["value"] is not None or msg["args"] or msg["kwargs"]:
            return
        fn = msg["fn"]
        if isinstance(fn, _Subsample):
            msg["value"] = _subsample(fn)
        elif isinstance(fn, td.Distribution):
            try:
                msg["value"] = draw(fn)
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


# ---------------------------------------------------------------- noise
def _normal(shape: _Shape, like: Tensor) -> Tensor:
    return torch.randn(shape, dtype=like.dtype, device=like.device)


def _uniform(shape: _Shape, like: Tensor) -> Tensor:
    """Uniform on (0, 1): zero, which ``rand`` returns once in 2**24 floats, becomes the smallest normal number."""
    return torch.rand(shape, dtype=like.dtype, device=like.device).clamp(min=torch.finfo(like.dtype).tiny)


def _log_gamma(concentration: Tensor, shape: _Shape) -> Tensor:
    concentration = concentration.expand(shape)
    boosted = torch._standard_gamma(concentration + 1)
    return boosted.log() + _uniform(shape, concentration).log() / concentration


def _chi2_factor(df: Tensor, shape: _Shape) -> Tensor:
    """``sqrt(df / chi2)``, what turns a normal into a Student's t."""
    half = 0.5 * df.expand(shape)
    return (half / torch._standard_gamma(half)).sqrt()


def _subsample(fn: Any) -> Tensor:
    if fn.subsample_size is None or fn.subsample_size >= fn.size:
        return torch.arange(fn.size, device=fn.device)
    return torch.rand(fn.size, dtype=torch.float64, device=fn.device).argsort()[: fn.subsample_size]


def _extended(d: Any, shape: _Shape) -> _Shape:
    return tuple(shape) + tuple(d.batch_shape) + tuple(d.event_shape)


# ---------------------------------------------------------------- location and scale
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


@_rule(td.StudentT)
def _draw_student(d: td.StudentT, shape: _Shape) -> Tensor:
    full = _extended(d, shape)
    return d.loc + d.scale * _normal(full, d.loc) * _chi2_factor(d.df, full)


@_rule(dist.MultivariateStudentT)
def _draw_multivariate_student(d: Any, shape: _Shape) -> Tensor:
    full = _extended(d, shape)
    z = _normal(full, d.loc) * _chi2_factor(d.df, full[:-1]).unsqueeze(-1)
    return d.loc + (d.scale_tril @ z.unsqueeze(-1)).squeeze(-1)


@_rule(td.Cauchy)
def _draw_cauchy(d: td.Cauchy, shape: _Shape) -> Tensor:
    return d.loc + d.scale * (math.pi * (_uniform(_extended(d, shape), d.loc) - 0.5)).tan()


@_rule(td.Laplace)
def _draw_laplace(d: td.Laplace, shape: _Shape) -> Tensor:
    full = _extended(d, shape)
    return d.loc + d.scale * (_uniform(full, d.loc).log() - _uniform(full, d.loc).log())


# ---------------------------------------------------------------- positive and counting
@_rule(td.Exponential)
def _draw_exponential(d: td.Exponential, shape: _Shape) -> Tensor:
    return -_uniform(_extended(d, shape), d.rate).log() / d.rate


@_rule(td.Geometric)
def _draw_geometric(d: td.Geometric, shape: _Shape) -> Tensor:
    return (_uniform(_extended(d, shape), d.probs).log() / (-d.probs).log1p()).floor()


@_rule(td.Bernoulli)
def _draw_bernoulli(d: td.Bernoulli, shape: _Shape) -> Tensor:
    full = _extended(d, shape)
    if d.probs.device.type != "cpu":
        return torch.bernoulli(d.probs.expand(full))
    # On CPU a comparison takes two thirds of the time of torch.bernoulli; 53 bits as there, for small probabilities.
    # NaN stays NaN.
    return (torch.rand(full, dtype=torch.float64, device=d.probs.device) < d.probs) + 0 * d.probs


@_rule(td.Multinomial)
def _draw_multinomial(d: td.Multinomial, shape: _Shape) -> Tensor:
    categories = d._categorical.sample(torch.Size((d.total_count, *shape))).movedim(0, -1)
    counts = torch.zeros(_extended(d, shape), dtype=categories.dtype, device=categories.device)
    return counts.scatter_add(-1, categories, torch.ones_like(categories)).type_as(d.probs)


@_rule(dist.GammaPoisson)
def _draw_gamma_poisson(d: Any, shape: _Shape) -> Tensor:
    return torch.poisson(draw(d._gamma, shape))


@_rule(dist.BetaBinomial)
def _draw_beta_binomial(d: Any, shape: _Shape) -> Tensor:
    return torch.binomial(d.total_count.expand(_extended(d, shape)), draw(d._beta, shape))


@_rule(dist.DirichletMultinomial)
def _draw_dirichlet_multinomial(d: Any, shape: _Shape) -> Tensor:
    total_count = int(d.total_count.max()) if isinstance(d.total_count, Tensor) else int(d.total_count)
    return draw(dist.Multinomial(total_count=total_count, probs=draw(d._dirichlet, shape)))


@_rule(dist.ZeroInflatedDistribution)
def _draw_zero_inflated(d: Any, shape: _Shape) -> Tensor:
    zero = torch.bernoulli(d.gate.expand(_extended(d, shape))).bool()
    return torch.where(zero, 0, draw(d.base_dist.expand(d.batch_shape), shape))


# ---------------------------------------------------------------- simplex, correlations, circle
@_rule(td.Beta)
def _draw_beta(d: td.Beta, shape: _Shape) -> Tensor:
    full = _extended(d, shape)
    return (_log_gamma(d.concentration1, full) - _log_gamma(d.concentration0, full)).sigmoid()


@_rule(td.Dirichlet)
def _draw_dirichlet(d: td.Dirichlet, shape: _Shape) -> Tensor:
    return _log_gamma(d.concentration, _extended(d, shape)).softmax(-1)


@_rule(td.LKJCholesky)
def _draw_lkj(d: td.LKJCholesky, shape: _Shape) -> Tensor:
    radius2 = draw(d._beta, shape).unsqueeze(-1)
    directions = _normal(_extended(d, shape), radius2).tril(-1)
    tiny = torch.finfo(directions.dtype).tiny
    # the first row is the zero vector, whose norm may not divide it
    directions = directions / directions.norm(dim=-1, keepdim=True).clamp(min=tiny)
    below = radius2.sqrt() * directions
    diagonal = (1 - below.square().sum(-1)).clamp(min=tiny).sqrt()
    return below + torch.diag_embed(diagonal)


@_rule(td.VonMises)
def _draw_von_mises(d: td.VonMises, shape: _Shape) -> Tensor:
    full = _extended(d, shape)
    kappa = (
        d.concentration.double()
    )  # as torch does: in single precision the proposal degenerates at small concentrations
    tau = 1 + (1 + 4 * kappa**2).sqrt()
    rho = (tau - (2 * tau).sqrt()) / (2 * kappa)
    r = torch.where(kappa < 1e-5, 1 / kappa + kappa, (1 + rho**2) / (2 * rho))
    angle = torch.zeros(full, dtype=kappa.dtype, device=kappa.device)
    done = torch.zeros(full, dtype=torch.bool, device=kappa.device)
    for _ in range(_VON_MISES_ROUNDS):
        z = (math.pi * _uniform(full, kappa)).cos()
        f = (1 + r * z) / (r + z)
        c = kappa * (r - f)
        u = _uniform(full, kappa)
        accept = ((c * (2 - c) - u > 0) | ((c / u).log() + 1 - c >= 0)) & ~done
        sign = (_uniform(full, kappa) - 0.5).sign()
        angle = torch.where(accept, sign * f.clamp(-1, 1).acos(), angle)
        done = done | accept
    return ((angle + math.pi + d.loc) % (2 * math.pi) - math.pi).to(d.loc.dtype)


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
        _forget(transform)
    return x


def _forget(transform: Any) -> None:
    """Empty the cache of a user's transform: a tensor of a finished ``vmap`` must not stay in it."""
    if isinstance(transform, td.Transform):
        for inner in (
            *getattr(transform, "parts", ()),
            getattr(transform, "base_transform", None),
            getattr(transform, "_inv", None),
        ):
            _forget(inner)
        if getattr(transform, "_cache_size", 0):
            transform._cached_x_y = None, None


@_rule(td.MixtureSameFamily)
def _draw_mixture(d: Any, shape: _Shape) -> Tensor:
    components = draw(d.component_distribution, shape)
    axis = components.dim() - 1 - len(d.event_shape)
    index = draw(d.mixture_distribution, shape)
    index = index.reshape(*index.shape, *(1,) * (len(d.event_shape) + 1))
    return components.take_along_dim(index.expand(*index.shape[: axis + 1], *d.event_shape), dim=axis).squeeze(axis)


@_rule(dist.MaskedMixture)
def _draw_masked_mixture(d: Any, shape: _Shape) -> Tensor:
    mask = d.mask.reshape(*d.mask.shape, *(1,) * len(d.event_shape))
    parts = [draw(part.expand(d.batch_shape), shape) for part in (d.component0, d.component1)]
    return torch.where(mask, parts[1], parts[0])
