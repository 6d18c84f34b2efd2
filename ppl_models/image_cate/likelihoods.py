"""Laws of an outcome given linear predictors ``eta`` and noise parameters, and their means in outcome units.

A likelihood has ``num_predictors`` L (one, but two where a zero is a matter of its own) and ``num_noise`` P noise
parameters for each arm and cluster, positive and learned.  The treatment of type k moves the predictors from ``f0(m)``
to ``f0(m) + mu_k``; its effect is the difference of the two means.
"""

import math
from typing import Any, ClassVar

import torch
from pyro.distributions import (
    Bernoulli,
    GammaPoisson,
    Normal,
    Poisson,
    StudentT,
    TorchDistribution,
)
from torch import Tensor, nn
from torch.distributions import constraints

__all__ = ["OUTCOMES", "Hurdle", "Likelihood", "make_likelihood"]

_NOISE_FLOOR = 1e-3  # of a standardised outcome; keeps a cluster from shrinking to one unit


class Likelihood(nn.Module):
    """The normal law; the others change what differs.

    Attributes:
        shift, scale: what standardises the outcome, learned from the training data.
    """

    num_predictors: ClassVar[int] = 1
    num_noise: ClassVar[int] = 1
    linear: ClassVar[bool] = True  # whether effects are predictors times ``scale``, whatever the baseline
    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    def check(self, outcome: Tensor) -> None:
        """Raise ``ValueError`` if the outcome is outside of the law's support."""

    def learn(self, outcome: Tensor) -> None:
        """The standardisation from training outcomes ``(N,)`` in their own units."""
        self.shift = outcome.mean()
        spread = outcome.std(correction=0)
        self.scale = torch.where(spread > 0, spread, torch.ones_like(spread))

    def standardise(self, outcome: Tensor) -> Tensor:
        """Outcome on the model's scale."""
        return (outcome - self.shift) / self.scale

    def link(self, standardised: Tensor) -> Tensor:
        """Linear predictors ``(N, L)`` that a standardised outcome corresponds to, for starts and priors."""
        return standardised.unsqueeze(-1)

    def law(self, eta: Tensor, noise: Tensor) -> TorchDistribution:
        """The law of the standardised outcome, of predictors ``(..., L)`` and raw noise ``(..., P)``, by softplus."""
        return Normal(eta[..., 0], positive(noise[..., 0]))

    def mean(self, eta: Tensor, noise: Tensor) -> Tensor:
        """Mean outcome in its own units, of the same shapes."""
        return self.shift + self.scale * eta[..., 0]


class StudentTLikelihood(Likelihood):
    """Student-t with four degrees of freedom: outcomes with outliers."""

    def law(self, eta: Tensor, noise: Tensor) -> TorchDistribution:
        return StudentT(eta.new_full((), 4.0), eta[..., 0], positive(noise[..., 0]))


class LogNormalLikelihood(Likelihood):
    """The logarithm is normal; effects are multiplicative, and reported as differences of means."""

    linear = False

    def check(self, outcome: Tensor) -> None:
        if bool((outcome <= 0).any()):
            raise ValueError(
                f"outcome='lognormal' needs positive values, the smallest is {outcome.min().item():g}; 'hurdle' takes "
                "zeros"
            )

    def learn(self, outcome: Tensor) -> None:
        super().learn(outcome.log())

    def standardise(self, outcome: Tensor) -> Tensor:
        return super().standardise(outcome.log())

    def mean(self, eta: Tensor, noise: Tensor) -> Tensor:
        return (self.shift + self.scale * eta[..., 0] + 0.5 * (self.scale * positive(noise[..., 0])).square()).exp()


class BernoulliLikelihood(Likelihood):
    """Yes or no; effects are differences of probabilities."""

    num_noise = 0
    linear = False

    def check(self, outcome: Tensor) -> None:
        if not bool(((outcome == 0) | (outcome == 1)).all()):
            raise ValueError("outcome='bernoulli' needs zeros and ones")

    def learn(self, outcome: Tensor) -> None:
        return

    def link(self, standardised: Tensor) -> Tensor:
        return (4 * (standardised - 0.5)).unsqueeze(-1)  # the logistic curve's slope at 1/2

    def law(self, eta: Tensor, noise: Tensor) -> TorchDistribution:
        return Bernoulli(logits=eta[..., 0])

    def mean(self, eta: Tensor, noise: Tensor) -> Tensor:
        return torch.sigmoid(eta[..., 0])


class PoissonLikelihood(Likelihood):
    """Counts with variance equal to the mean; the predictor is a log rate, relative to the mean count."""

    num_noise = 0
    linear = False

    def check(self, outcome: Tensor) -> None:
        if bool((outcome < 0).any()) or not bool((outcome == outcome.round()).all()):
            raise ValueError("outcome must be counts 0, 1, 2, ... for 'poisson' and 'negative_binomial'")
        if not bool((outcome > 0).any()):
            raise ValueError("outcome holds zeros only: there is no rate to learn")

    def learn(self, outcome: Tensor) -> None:
        self.shift = outcome.mean().log()

    def standardise(self, outcome: Tensor) -> Tensor:
        return outcome

    def link(self, standardised: Tensor) -> Tensor:
        return ((standardised + 0.5).log() - self.shift).unsqueeze(-1)

    def law(self, eta: Tensor, noise: Tensor) -> TorchDistribution:
        return Poisson((self.shift + eta[..., 0]).exp(), validate_args=False)

    def mean(self, eta: Tensor, noise: Tensor) -> Tensor:
        return (self.shift + eta[..., 0]).exp()


class NegativeBinomialLikelihood(PoissonLikelihood):
    """Counts with variance mean + dispersion mean^2."""

    num_noise = 1

    def law(self, eta: Tensor, noise: Tensor) -> TorchDistribution:
        concentration = 1 / positive(noise[..., 0])
        return GammaPoisson(concentration, concentration * (-self.shift - eta[..., 0]).exp(), validate_args=False)


class Hurdle(Likelihood):
    """A mass at the smallest value, and above it a lognormal excess (``two-part model``).

    Predictors: logit of being above the floor, and the standardised log excess.
    """

    num_predictors = 2
    linear = False
    floor: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("floor", torch.zeros(()))

    def check(self, outcome: Tensor) -> None:
        above = int((outcome > outcome.min()).sum())
        if above < 2 or above > len(outcome) - 2:
            raise ValueError(
                f"outcome='hurdle' needs several values at the smallest and several above it; {above} of "
                f"{len(outcome)} are above"
            )

    def learn(self, outcome: Tensor) -> None:
        self.floor = outcome.min()
        super().learn((outcome[outcome > self.floor] - self.floor).log())

    def standardise(self, outcome: Tensor) -> Tensor:
        above = outcome > self.floor
        logs = (torch.where(above, outcome - self.floor, torch.ones_like(outcome)).log() - self.shift) / self.scale
        return torch.where(above, logs, torch.full_like(logs, -math.inf))

    def link(self, standardised: Tensor) -> Tensor:
        above = standardised > -math.inf
        return torch.stack(
            [
                4 * (above.to(standardised.dtype) - 0.5),
                torch.where(above, standardised, torch.zeros_like(standardised)),
            ],
            -1,
        )

    def law(self, eta: Tensor, noise: Tensor) -> TorchDistribution:
        return _TwoPart(eta[..., 0], eta[..., 1], positive(noise[..., 0]))

    def mean(self, eta: Tensor, noise: Tensor) -> Tensor:
        excess = (self.shift + self.scale * eta[..., 1] + 0.5 * (self.scale * positive(noise[..., 0])).square()).exp()
        return self.floor + torch.sigmoid(eta[..., 0]) * excess


class _TwoPart(TorchDistribution):
    """Minus infinity with one probability, normal with the other; a floor's place on the log scale."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real  # and minus infinity, which no validation is to refuse

    def __init__(self, logit: Tensor, loc: Tensor, scale: Tensor) -> None:
        self.logit, self.loc, self.scale = torch.broadcast_tensors(logit, loc, scale)
        super().__init__(self.logit.shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "_TwoPart":
        return _TwoPart(self.logit.expand(batch_shape), self.loc.expand(batch_shape), self.scale.expand(batch_shape))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            above = torch.bernoulli(torch.sigmoid(self.logit).expand(shape)) > 0
            values = torch.normal(self.loc.expand(shape), self.scale.expand(shape))
            return torch.where(above, values, torch.full_like(values, -math.inf))

    def log_prob(self, value: Tensor) -> Tensor:
        above = value > -math.inf
        safe = torch.where(above, value, torch.zeros_like(value))
        inside = nn.functional.logsigmoid(self.logit) + Normal(self.loc, self.scale).log_prob(safe)
        return torch.where(above, inside, nn.functional.logsigmoid(-self.logit))


def positive(raw: Tensor) -> Tensor:
    """Softplus with a floor, from noise on the whole line."""
    return _NOISE_FLOOR + nn.functional.softplus(raw)


_KINDS: dict[str, type[Likelihood]] = {
    "normal": Likelihood,
    "student_t": StudentTLikelihood,
    "lognormal": LogNormalLikelihood,
    "bernoulli": BernoulliLikelihood,
    "hurdle": Hurdle,
    "poisson": PoissonLikelihood,
    "negative_binomial": NegativeBinomialLikelihood,
}
OUTCOMES = tuple(_KINDS)


def make_likelihood(name: str) -> Likelihood:
    """The likelihood of that name; raises ``ValueError`` naming those there are."""
    if name not in _KINDS:
        raise ValueError(f"outcome must be one of {', '.join(OUTCOMES)}; got {name!r}")
    return _KINDS[name]()
