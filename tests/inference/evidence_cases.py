"""Models whose evidence is known, by closed form or by quadrature, for tests of tempering and of log Z."""

import functools
import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution, MultivariateNormal

from inference.potential import LogDensity, Potential, TemperedFunction, TemperedPotential

F64 = torch.float64
_g = torch.Generator().manual_seed(7)

# ---------------------------------------------------------------- linear regression: everything is Gaussian
X = torch.randn(20, 2, generator=_g, dtype=F64)
Y = X @ torch.tensor([1.0, -0.5], dtype=F64) + torch.randn(20, generator=_g, dtype=F64)


def regression(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
    with pyro.plate("n", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


def regression_evidence() -> float:
    return float(MultivariateNormal(torch.zeros(20, dtype=F64), torch.eye(20, dtype=F64) + X @ X.T).log_prob(Y))


def regression_posterior() -> MultivariateNormal:
    covariance = torch.linalg.inv(X.T @ X + torch.eye(2, dtype=F64))
    return MultivariateNormal(covariance @ X.T @ Y, covariance)


# ---------------------------------------------------------------- the same under wide priors, with its noise unknown
WIDE_X = torch.randn(100, 5, generator=torch.Generator().manual_seed(1), dtype=F64)
WIDE_Y = WIDE_X @ torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0], dtype=F64) + 0.8 * torch.randn(
    100, generator=torch.Generator().manual_seed(2), dtype=F64
)


def wide_regression(x: Tensor, y: Tensor) -> None:
    b = pyro.sample("b", dist.Normal(x.new_zeros(5), 10.0).to_event(1))
    s = pyro.sample("s", dist.HalfNormal(10.0 + 0 * y[0]))
    with pyro.plate("n", len(x)):
        pyro.sample("y", dist.Normal(x @ b, s), obs=y)


def wide_regression_evidence() -> float:
    """Over b in closed form, over log s by the trapezoidal rule."""
    log_s = torch.linspace(-4, 4, 2001, dtype=F64)
    values, vectors = torch.linalg.eigh(WIDE_X @ WIDE_X.T)
    variance = 100 * values.clamp_min(0) + log_s.exp().square()[:, None]
    data = dist.Normal(0.0, variance.sqrt()).log_prob(vectors.T @ WIDE_Y).sum(1)
    prior = dist.HalfNormal(torch.tensor(10.0, dtype=F64)).log_prob(log_s.exp()) + log_s
    return float(torch.logsumexp(data + prior, 0) + math.log(8 / 2000))


# ---------------------------------------------------------------- location and scale: constrained, not Gaussian
SCALE_Y = torch.tensor([1.2, 0.1, -0.4, 2.5, 0.9], dtype=F64)


def location_scale(y: Tensor) -> None:
    s = pyro.sample("s", dist.Gamma(2.0 + 0 * y[0], 1.0))
    m = pyro.sample("m", dist.Normal(0 * y[0], 2.0))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.StudentT(4.0, m, s), obs=y)


def location_scale_grid() -> tuple[Tensor, Tensor, Tensor]:
    """Midpoints of a grid in constrained space, s and m, and the log-joint on it, ``(s, m)``.

    The integrand is smooth, so the midpoint rule is exact to 1e-6 here; beyond the ends lies less than 1e-8 of it.
    """
    s = (torch.arange(1500, dtype=F64) + 0.5) * (24 / 1500)
    m = -12 + (torch.arange(1000, dtype=F64) + 0.5) * (24 / 1000)
    data = sum(dist.StudentT(4.0, m, s[:, None]).log_prob(y) for y in SCALE_Y)
    prior = dist.Gamma(2.0 + 0 * s, 1.0).log_prob(s)[:, None] + dist.Normal(0 * m, 2.0).log_prob(m)
    return s, m, prior + data


def location_scale_evidence() -> float:
    s, m, log_joint = location_scale_grid()
    return float(torch.logsumexp(log_joint.flatten(), 0) + torch.log((s[1] - s[0]) * (m[1] - m[0])))


# ---------------------------------------------------------------- discrete sites, summed out
MIXTURE_Y = torch.tensor([-2.1, 1.4, 2.3, 1.9, -1.5, 2.2], dtype=F64)
_CENTERS = torch.tensor([-2.0, 2.0], dtype=F64)


def enumerated(y: Tensor) -> None:
    p = pyro.sample("p", dist.Beta(1.5 + 0 * y[0], 2.0))
    with pyro.plate("n", len(y)):
        c = pyro.sample("c", dist.Bernoulli(p), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(_CENTERS.to(y.device)[c.long()], 1.0), obs=y)


def enumerated_evidence() -> float:
    p = (torch.arange(20_000, dtype=F64) + 0.5) / 20_000
    likelihood = dist.Normal(_CENTERS, 1.0).log_prob(MIXTURE_Y[:, None]).exp()
    each = (1 - p[:, None]) * likelihood[:, 0] + p[:, None] * likelihood[:, 1]
    prior = dist.Beta(1.5 + 0 * p, 2.0).log_prob(p)
    return float((prior.exp() * each.prod(1)).mean().log())


# ---------------------------------------------------------------- two modes, far apart, of unequal weight
WEIGHTS = (0.3, 0.7)


def two_modes_density(z: Tensor) -> Tensor:
    """log of 0.3 N(-4, 0.5^2 I) + 0.7 N(4, 0.5^2 I) over vectors ``(..., 2)``; between them no chain passes."""
    normal = math.log(0.5 * math.sqrt(2 * math.pi))
    below, above = (
        math.log(w) - 2 * (z - c).square().sum(-1) - 2 * normal for w, c in zip(WEIGHTS, (-4.0, 4.0), strict=True)
    )
    return torch.logaddexp(below, above)


def two_modes() -> None:
    """Prior N(0, 5^2 I), and a factor that makes the posterior the mixture; its evidence is 1."""
    z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=F64), 5.0).to_event(1))
    pyro.factor("likelihood", two_modes_density(z) - dist.Normal(0.0, 5.0).log_prob(z).sum())


# ---------------------------------------------------------------- a function with a base distribution
def gaussian_target(dim: int = 2) -> tuple[TemperedFunction, float, Distribution]:
    """exp(-|z - 1|^2 / (2 0.6^2)), reached from N(0, I); its log Z, and the law itself."""
    base = dist.Normal(torch.zeros(dim, dtype=F64), 1.0).to_event(1)
    target = TemperedFunction(lambda z: -0.5 * ((z - 1) / 0.6).square().sum(-1), base)
    log_z = dim * (math.log(0.6) + 0.5 * math.log(2 * math.pi))
    return target, log_z, dist.Normal(torch.ones(dim, dtype=F64), 0.6).to_event(1)


# ---------------------------------------------------------------- by name
MODELS = {
    "closed-form": (regression, (X, Y), regression_evidence),
    "quadrature-2d": (location_scale, (SCALE_Y,), location_scale_evidence),
    "enumerated": (enumerated, (MIXTURE_Y,), enumerated_evidence),
}


@functools.cache
def path(name: str) -> TemperedPotential:
    """The path of a model, recorded once a process."""
    model, args, _ = MODELS[name]
    return TemperedPotential(Potential(LogDensity(model, args)))


@functools.cache
def truth(name: str) -> float:
    return MODELS[name][2]()
