"""Noise models: laws that can be drawn from and evaluated, fitted to data, and used as the guide of an objective.

Each is a ``PyroModule`` whose call draws one row at the site ``"x"``.  Its tensors are buffers, so that it moves, saves
and loads with what holds it; a flow's are parameters, which learn with the objective (``adapt``) or from data before.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import constraints

from inference.kernels.base import count, positive
from inference.runtime.generators import scoped_seed

__all__ = [
    "BernoulliNoise",
    "DefensiveMixture",
    "DistributionNoise",
    "FlowNoise",
    "GaussianNoise",
    "KernelNoise",
    "NegativeBinomialNoise",
    "Noise",
    "NoiseDistribution",
    "PoissonNoise",
    "cholesky_of",
    "unchecked",
]

_LOG_2PI = math.log(2 * math.pi)


class NoiseDistribution(TorchDistribution):
    """A noise model as a distribution."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = False

    def __init__(self, noise: "Noise", batch_shape: torch.Size = torch.Size()) -> None:  # noqa: B008
        self.noise = noise
        super().__init__(batch_shape, torch.Size(noise.event_shape), validate_args=False)

    @constraints.dependent_property  # type: ignore[untyped-decorator, unused-ignore]
    def support(self) -> Any:
        """The noise's."""
        return self.noise.support

    def expand(self, batch_shape: Any, _instance: Any = None) -> "NoiseDistribution":
        """Independent rows of the same law."""
        return NoiseDistribution(self.noise, torch.Size(batch_shape))

    @torch.no_grad()
    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draws ``(*sample_shape, *batch_shape, *event)``."""
        shape = torch.Size(sample_shape) + self.batch_shape
        return self.noise.draw(math.prod(shape)).reshape(shape + self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density ``(*batch,)``."""
        shape = value.shape[: value.dim() - len(self.event_shape)]
        found = self.noise.log_prob(value.reshape(-1, *self.event_shape)).reshape(shape)
        return found.expand(torch.broadcast_shapes(shape, self.batch_shape))


class Noise(PyroModule):
    """A law over events of one shape.

    Attributes:
        event_shape: shape of a draw.
        support: constraint with the event's dimensions.
    """

    def __init__(self, event_shape: Sequence[int], support: Any = constraints.real) -> None:
        super().__init__()
        self.event_shape = tuple(int(n) for n in event_shape)
        self._support = support

    @property
    def support(self) -> Any:
        """Constraint on a draw."""
        return constraints.independent(self._support, len(self.event_shape)) if self.event_shape else self._support

    def draw(self, num: int) -> Tensor:
        """Independent draws ``(num, *event)`` from torch's global generator, without gradient."""
        raise NotImplementedError

    @property
    def uniforms(self) -> int:
        """How many uniform numbers ``transport`` makes a draw of; 0 where it cannot."""
        return 0

    def transport(self, u: Tensor) -> Tensor:
        """Draws ``(num, *event)`` from uniform numbers ``(num, uniforms)`` in float64, smoothly where it can be.

        Raises:
            NotImplementedError: ``uniforms`` is 0.
        """
        raise NotImplementedError(f"{type(self).__name__} is not drawn from uniform numbers")

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of ``x`` ``(row, *event)``: ``(row,)``."""
        raise NotImplementedError

    def distribution(self) -> NoiseDistribution:
        """The law as a Pyro distribution."""
        return NoiseDistribution(self)

    def forward(self, *batch: Any) -> Tensor:
        """The guide: one row at the site ``"x"``, whatever the arguments."""
        value: Tensor = pyro.sample("x", self.distribution())
        return value

    def config(self) -> dict[str, Any]:
        """What ``from_config`` rebuilds the module from, besides its ``state_dict``."""
        return {"event_shape": list(self.event_shape)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Self:
        """The module that was saved."""
        made = cls.__new__(cls)
        Noise.__init__(made, config["event_shape"], _support_of(cls, config))
        made._restore(config)
        for name, value in state.items():
            made.register_buffer(name, value.clone())
        return made

    def _restore(self, config: Mapping[str, Any]) -> None:
        return


def _support_of(cls: type, config: Mapping[str, Any]) -> Any:
    counts = constraints.nonnegative_integer
    discrete = {"PoissonNoise": counts, "NegativeBinomialNoise": counts, "BernoulliNoise": constraints.boolean}
    return discrete.get(cls.__name__, constraints.real)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(len(x), -1)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    flat = _rows(x)
    mean = flat.mean(0)
    covariance = torch.cov(flat.T).reshape(flat.shape[1], flat.shape[1])
    return mean, covariance


def cholesky_of(covariance: Tensor, mean: Tensor) -> Tensor:
    """Cholesky factor ``(dim, dim)``, after a ridge where the data lie in a plane.

    The ridge is a share of each column's own spread, whatever the units of the others; a constant column counts as
    spread as the largest, or by one where all are constant.
    """
    spread = covariance.diagonal().sqrt()
    floor = 10 * torch.finfo(spread.dtype).eps * mean.abs()  # what rounding leaves of a constant
    varies = spread > floor
    largest = spread[varies].max() if bool(varies.any()) else torch.ones_like(spread[0])
    spread = torch.where(varies, spread, largest)
    correlation = covariance / spread / spread[:, None]
    eye = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    for ridge in (0.0, 1e-6, 1e-4, 1e-2, 1.0):
        factor, failed = torch.linalg.cholesky_ex(correlation + ridge * eye)
        if not bool(failed) and bool((factor.diagonal() > 1e-4).all()):
            return spread[:, None] * factor
    return spread.diag()


class GaussianNoise(Noise):
    """A normal law; ``fit`` gives it the data's mean and ``inflation`` times their standard deviations.

    Args:
        mean: ``(*event,)``.
        factor: Cholesky factor of the covariance of the flattened event, ``(dim, dim)``.
    """

    mean: Tensor
    factor: Tensor
    inverse: Tensor

    def __init__(self, mean: Tensor, factor: Tensor) -> None:
        super().__init__(mean.shape)
        self.register_buffer("mean", mean.detach().clone().reshape(-1))
        self.register_buffer("factor", factor.detach().clone(memory_format=torch.contiguous_format))
        eye = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
        inverse = torch.linalg.solve_triangular(self.factor, eye, upper=False)
        self.register_buffer("inverse", inverse.contiguous())  # as a file gives it back, to the bit

    @classmethod
    def fit(cls, x: Tensor, inflation: float = 1.3) -> Self:
        """The law for data ``(row, *event)``."""
        mean, covariance = _moments(x)
        return cls(mean.reshape(x.shape[1:]), positive("inflation", inflation) * cholesky_of(covariance, mean))

    def draw(self, num: int) -> Tensor:
        """As in ``Noise``."""
        z = torch.randn(num, len(self.mean), dtype=self.mean.dtype, device=self.mean.device)
        return (self.mean + z @ self.factor.T).reshape(num, *self.event_shape)

    @property
    def uniforms(self) -> int:
        """One a coordinate."""
        return len(self.mean)

    def transport(self, u: Tensor) -> Tensor:
        """Normal quantiles."""
        z = torch.special.ndtri(u).to(self.mean)
        return (self.mean + z @ self.factor.T).reshape(len(u), *self.event_shape)

    def log_prob(self, x: Tensor) -> Tensor:
        """As in ``Noise``."""
        z = (_rows(x) - self.mean) @ self.inverse.T
        return -0.5 * z.square().sum(1) - 0.5 * z.shape[1] * _LOG_2PI + self.inverse.diagonal().log().sum()


class KernelNoise(Noise):
    """Kernel density of data: a normal of standard deviation ``bandwidth`` times theirs, around each row.

    Args:
        x: centres ``(row, *event)``.
        bandwidth: in units of each column's standard deviation; Silverman's rule if None.
        most: rows kept, the first so many.
    """

    centres: Tensor
    scale: Tensor

    def __init__(self, x: Tensor, bandwidth: float | None = None, most: int = 2000) -> None:
        super().__init__(x.shape[1:])
        flat = _rows(x.detach())[: count("most", most, 2)].clone()
        n, d = flat.shape
        h = (4 / ((d + 2) * n)) ** (1 / (d + 4)) if bandwidth is None else positive("bandwidth", bandwidth)
        scale = h * flat.std(0)
        self.register_buffer("centres", flat)
        self.register_buffer("scale", torch.where(scale > 0, scale, torch.full_like(scale, h)))

    def draw(self, num: int) -> Tensor:
        """As in ``Noise``."""
        index = torch.randint(len(self.centres), (num,), device=self.centres.device)
        centre = self.centres[index]
        return (centre + self.scale * torch.randn_like(centre)).reshape(num, *self.event_shape)

    def log_prob(self, x: Tensor) -> Tensor:
        """As in ``Noise``."""
        z, c = _rows(x) / self.scale, self.centres / self.scale
        square = (z.square().sum(1, keepdim=True) - 2 * z @ c.T + c.square().sum(1)).clamp(min=0)
        constant = -0.5 * z.shape[1] * _LOG_2PI - self.scale.log().sum() - math.log(len(c))
        return torch.logsumexp(-0.5 * square, 1) + constant


class PoissonNoise(Noise):
    """Independent Poisson counts; ``fit`` takes ``inflation`` times the data's means."""

    rate: Tensor

    def __init__(self, rate: Tensor) -> None:
        super().__init__(rate.shape, constraints.nonnegative_integer)
        self.register_buffer("rate", rate.detach().clone().reshape(-1))

    @classmethod
    def fit(cls, x: Tensor, inflation: float = 1.3) -> Self:
        """The law for counts ``(row, *event)``."""
        rate = positive("inflation", inflation) * x.to(torch.promote_types(x.dtype, torch.float32)).mean(0)
        return cls(rate.clamp(min=1e-3))

    def draw(self, num: int) -> Tensor:
        """As in ``Noise``."""
        return torch.poisson(self.rate.expand(num, -1)).reshape(num, *self.event_shape)

    def log_prob(self, x: Tensor) -> Tensor:
        """As in ``Noise``."""
        k, rate = _rows(x).double(), self.rate.double()  # large terms that nearly cancel
        return (k * rate.log() - rate - torch.lgamma(k + 1)).sum(1).to(self.rate.dtype)


class NegativeBinomialNoise(Noise):
    """Independent counts that vary more than Poisson ones: Poisson with a gamma-distributed rate.

    Args:
        mean: ``event``.
        concentration: of the rates, ``event``; the variance is ``mean + mean^2 / concentration``.
    """

    mean: Tensor
    concentration: Tensor

    def __init__(self, mean: Tensor, concentration: Tensor) -> None:
        super().__init__(mean.shape, constraints.nonnegative_integer)
        self.register_buffer("mean", mean.detach().clone().reshape(-1))
        self.register_buffer("concentration", concentration.detach().clone().reshape(-1))

    @classmethod
    def fit(cls, x: Tensor, inflation: float = 1.3) -> Self:
        """The law for counts ``(row, *event)``, of their means and ``inflation`` times their standard deviations."""
        counts = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = counts.mean(0).clamp(min=1e-3)
        variance = positive("inflation", inflation) ** 2 * counts.var(0, correction=0)
        return cls(mean, mean.square() / (variance - mean).clamp(min=1e-3 * mean))

    def draw(self, num: int) -> Tensor:
        """As in ``Noise``."""
        gamma = torch._standard_gamma(self.concentration.expand(num, -1))
        return torch.poisson(gamma * (self.mean / self.concentration)).reshape(num, *self.event_shape)

    def log_prob(self, x: Tensor) -> Tensor:
        """As in ``Noise``."""
        k, mean, r = _rows(x).double(), self.mean.double(), self.concentration.double()
        # Large terms that nearly cancel: whole nats would be lost in single precision.
        binomial = torch.lgamma(k + r) - torch.lgamma(k + 1) - torch.lgamma(r)
        each = binomial - r * torch.log1p(mean / r) - k * torch.log1p(r / mean)
        return each.sum(1).to(self.mean.dtype)


class BernoulliNoise(Noise):
    """Independent zeros and ones; ``fit`` draws the data's means halfway to one half."""

    probs: Tensor

    def __init__(self, probs: Tensor) -> None:
        super().__init__(probs.shape, constraints.boolean)
        self.register_buffer("probs", probs.detach().clone().reshape(-1))

    @classmethod
    def fit(cls, x: Tensor, shrink: float = 0.3) -> Self:
        """The law for zeros and ones ``(row, *event)``."""
        mean = x.to(torch.promote_types(x.dtype, torch.float32)).mean(0)
        return cls((1 - shrink) * mean + shrink * 0.5)

    def draw(self, num: int) -> Tensor:
        """As in ``Noise``."""
        return torch.bernoulli(self.probs.expand(num, -1)).reshape(num, *self.event_shape)

    def log_prob(self, x: Tensor) -> Tensor:
        """As in ``Noise``."""
        k = _rows(x).to(self.probs.dtype)
        return (k * self.probs.log() + (1 - k) * torch.log1p(-self.probs)).sum(1)


def unchecked(law: Any) -> Any:
    """A copy of a distribution that does not look at its arguments, which a recording could not.

    Laws that were expanded keep checks of their own, whatever the library's scopes say.
    """
    found = copy.copy(law)
    found._validate_args = False
    for name in ("base_dist", "_mixture_distribution", "_component_distribution"):
        if name in vars(found):
            setattr(found, name, unchecked(getattr(found, name)))
    return found


class DistributionNoise(Noise):
    """Any torch or Pyro distribution without batch shape."""

    def __init__(self, law: Any) -> None:
        if not isinstance(law, torch.distributions.Distribution):
            raise TypeError(f"noise must be a distribution, got {type(law).__name__}")
        if law.batch_shape:
            raise ValueError(
                f"noise must be one distribution, it has batch shape {tuple(law.batch_shape)}: "
                f".to_event({len(law.batch_shape)}) joins independent ones"
            )
        super().__init__(law.event_shape)
        self.law, self._unchecked = law, unchecked(law)
        with scoped_seed(0), torch.no_grad():
            self._inside: Tensor = law.sample()

    @property
    def support(self) -> Any:
        """The distribution's."""
        return self.law.support

    def draw(self, num: int) -> Tensor:
        """As in ``Noise``."""
        drawn: Tensor = self.law.sample(torch.Size((num,)))
        return drawn

    def log_prob(self, x: Tensor) -> Tensor:
        """As in ``Noise``; minus infinity outside the support."""
        support: Any = self.law.support
        inside = support.check(x)
        shape = inside.shape + (1,) * (x.dim() - inside.dim())
        # a point inside, so that no infinite slope comes from outside
        value: Tensor = self._unchecked.log_prob(torch.where(inside.reshape(shape), x, self._inside.to(x)))
        return torch.where(inside, value, torch.full_like(value, -math.inf))

    def config(self) -> dict[str, Any]:
        """Refused: a file cannot hold a distribution of any kind."""
        raise ValueError("this noise is a distribution of yours, which a file cannot hold: give it to load(noise=...)")


class FlowNoise(Noise):
    """A normalising flow of Pyro over vectors, from a normal law; its parameters learn with ``adapt``.

    Args:
        dim: of the vectors.
        num_layers: transforms.
        kind: ``"spline"`` (autoregressive rational splines) or ``"affine"`` (coupling).
        hidden: width of the conditioners.
        shift, scale: of the data, ``(dim,)`` each.
        seed: of the initial parameters.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        dim: int,
        num_layers: int = 2,
        kind: str = "spline",
        hidden: int = 32,
        shift: Tensor | None = None,
        scale: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__((dim,))
        if kind not in ("spline", "affine"):
            raise ValueError(f"kind must be 'spline' or 'affine', got {kind!r}")
        count("dim", dim, 2)
        self._config = {"dim": dim, "num_layers": num_layers, "kind": kind, "hidden": hidden}
        with scoped_seed(seed):
            parts = []
            for _ in range(count("num_layers", num_layers, 1)):
                if kind == "spline":
                    parts.append(dist.transforms.spline_autoregressive(dim, [hidden], count_bins=8, bound=4.0))
                else:
                    parts.append(dist.transforms.affine_coupling(dim, [hidden]))
        self.parts = nn.ModuleList(parts)
        self.register_buffer("shift", torch.zeros(dim) if shift is None else shift.detach().clone())
        self.register_buffer("scale", torch.ones(dim) if scale is None else scale.detach().clone())

    def _law(self) -> Any:
        base = dist.Normal(torch.zeros_like(self.shift), torch.ones_like(self.shift)).to_event(1)
        flips = [dist.transforms.Permute(torch.arange(len(self.shift) - 1, -1, -1)) for _ in self.parts]
        # data -> noise is what is learned from, so that density is the cheap direction
        inverse = [t.inv for pair in zip(self.parts, flips, strict=True) for t in pair]
        outer = dist.transforms.AffineTransform(self.shift, self.scale, event_dim=1)
        return dist.TransformedDistribution(base, [*reversed(inverse), outer])

    def _forget(self) -> None:
        """Pyro's transforms keep the last pair of values that they mapped."""
        transform: Any
        for transform in self.parts:
            transform.clear_cache()

    def draw(self, num: int) -> Tensor:
        """As in ``Noise``."""
        with torch.no_grad():
            drawn: Tensor = self._law().sample(torch.Size((num,)))
        self._forget()
        return drawn

    def log_prob(self, x: Tensor) -> Tensor:
        """As in ``Noise``; differentiable in the parameters."""
        self._forget()
        value: Tensor = self._law().log_prob(x)
        return value

    def config(self) -> dict[str, Any]:
        """The constructor's numbers."""
        return dict(self._config)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Self:
        """The flow that was saved."""
        made = cls(**config)
        made.to(state["shift"].dtype)
        made.load_state_dict(dict(state))
        return made


class DefensiveMixture(Noise):
    """``(1 - share) q + share wide``: where ``wide`` covers the model, weights are at most ``1 / share`` of its.

    Args:
        narrow: the noise q.
        wide: a wider one over the same events.
        share: of the wide one's draws.
    """

    def __init__(self, narrow: Noise, wide: Noise, share: float = 0.1) -> None:
        if narrow.event_shape != wide.event_shape:
            raise ValueError(f"both parts must have one event shape, got {narrow.event_shape} and {wide.event_shape}")
        super().__init__(narrow.event_shape)
        self.narrow, self.wide, self.share = narrow, wide, positive("share", share, upper=1.0)

    @property
    def support(self) -> Any:
        """The wide part's, or that of a narrow one without bounds."""
        inner = self.narrow.support
        while isinstance(inner, constraints.independent):
            inner = inner.base_constraint
        return self.narrow.support if inner is constraints.real else self.wide.support

    def draw(self, num: int) -> Tensor:
        """As in ``Noise``."""
        narrow = self.narrow.draw(num)
        chosen = torch.rand(num, device=narrow.device) < self.share
        return torch.where(chosen.reshape(num, *(1,) * (narrow.dim() - 1)), self.wide.draw(num).to(narrow), narrow)

    @property
    def uniforms(self) -> int:
        """One to choose the part, and the parts' own."""
        least, most = sorted((self.narrow.uniforms, self.wide.uniforms))
        return 1 + most if least else 0

    def transport(self, u: Tensor) -> Tensor:
        """The part by the last number, so that each part gets its share of a batch."""
        narrow = self.narrow.transport(u[:, : self.narrow.uniforms])
        chosen = (u[:, -1] < self.share).reshape(len(u), *(1,) * (narrow.dim() - 1))
        return torch.where(chosen, self.wide.transport(u[:, : self.wide.uniforms]).to(narrow), narrow)

    def log_prob(self, x: Tensor) -> Tensor:
        """As in ``Noise``."""
        narrow = self.narrow.log_prob(x) + math.log1p(-min(self.share, 1 - 1e-12))
        return torch.logaddexp(narrow, self.wide.log_prob(x) + math.log(self.share))

    def config(self) -> dict[str, Any]:
        """Both parts'."""
        parts = {n: {"kind": type(p).__name__, "config": p.config()} for n, p in self._both().items()}
        return {**super().config(), "share": self.share, **parts}

    def _both(self) -> dict[str, Noise]:
        return {"narrow": self.narrow, "wide": self.wide}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Self:
        """The mixture that was saved."""
        made = {}
        for name in ("narrow", "wide"):
            inner = {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
            made[name] = noise_from_config(config[name]["kind"], config[name]["config"], inner)
        return cls(made["narrow"], made["wide"], config["share"])


def noise_from_config(kind: str, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Noise:
    """The noise that ``kind``, ``config`` and ``state_dict`` describe.

    Raises:
        ValueError: there is no noise of this name.
    """
    from inference.objectives.unnormalised.bounded import BoxNoise, HalfLineNoise
    from inference.objectives.unnormalised.heavy_tails import StudentTNoise
    from inference.objectives.unnormalised.mixture import MixtureNoise
    from inference.objectives.unnormalised.quasi_random import QuasiRandomNoise

    known: dict[str, type[Noise]] = {
        c.__name__: c
        for c in (
            GaussianNoise,
            BoxNoise,
            HalfLineNoise,
            KernelNoise,
            PoissonNoise,
            NegativeBinomialNoise,
            BernoulliNoise,
            FlowNoise,
            DefensiveMixture,
            MixtureNoise,
            QuasiRandomNoise,
            StudentTNoise,
        )
    }
    if kind not in known:
        raise ValueError(f"there is no noise {kind!r}")
    return known[kind].from_config(config, state)
