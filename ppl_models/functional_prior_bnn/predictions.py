"""Posterior predictions of a network, in the user's units, with the scores that belong to them.

With draws ``f_s`` of the function, ``mean = 1/S sum_s f_s`` and, in regression, ``variance = Var_s(f_s) + noise``.  The
negative log-likelihood is that of one Gaussian with these moments, as in the figures of Tran et al. (JMLR 23(74),
2022), not of the mixture over draws.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inference.results.brief import brief
from inference.results.diagnostics import rhat
from inference.runtime.generators import scoped_seed
from ppl_models.base import Standardiser
from ppl_models.functional_prior_bnn.likelihoods import Categorical, Likelihood

__all__ = ["Prediction"]


@brief
@dataclass(frozen=True)
class Prediction:
    """The posterior predictive law at N inputs.

    Attributes:
        functions: f of every draw, ``(chain, draw, N, K)``: standardised targets in regression, logits in
            classification.
        noise_variance: of the standardised targets, broadcasting against ``functions``; None in classification.
        likelihood: the law of y given f.
        target_units: from standardised targets to the user's.
    """

    functions: Tensor
    noise_variance: Tensor | None
    likelihood: Likelihood
    target_units: Standardiser

    @property
    def samples(self) -> Tensor:
        """Mean of y under each draw, ``(chain, draw, N, K)``: function values in the user's units, or probabilities."""
        return self.target_units.inverse(self.likelihood.mean(self.functions))

    @property
    def mean(self) -> Tensor:
        """Predictive mean of y, ``(N, K)``; probabilities in classification."""
        return self.samples.mean((0, 1))

    @property
    def function_variance(self) -> Tensor:
        """Variance over draws of the mean of y, ``(N, K)``, in squared units: what is not known of the function."""
        return self.samples.var((0, 1), correction=0)

    @property
    def variance(self) -> Tensor:
        """Predictive variance of y, ``(N, K)``, in squared units: that of the function and the noise; in
        classification ``p (1 - p)``.
        """
        if self.noise_variance is None:
            mean = self.mean
            return mean * (1 - mean)
        noise = self.noise_variance.expand_as(self.functions).mean((0, 1))
        return self.function_variance + noise * self.target_units.scale.square()

    @property
    def rhat(self) -> Tensor:
        """Rank-normalised split R-hat of ``functions``, ``(N, K)``; weights have symmetries and do not mix, functions
        have none.
        """
        return rhat(self.functions)

    @property
    def entropy(self) -> Tensor:
        """Entropy of the predictive class probabilities in nats, ``(N,)``; large where the input is unlike the
        training data.
        """
        return self._entropy(self._probabilities().mean((0, 1)))

    @property
    def mutual_information(self) -> Tensor:
        """``H[mean p] - mean H[p]`` in nats, ``(N,)``: how much the draws disagree on the class."""
        p = self._probabilities()
        return (self._entropy(p.mean((0, 1))) - self._entropy(p).mean((0, 1))).clamp(min=0)

    def log_prob(self, y: Any, mixture: bool = False) -> Tensor:
        """Log predictive density of ``y``, in the user's units, ``(N,)``; summed over outputs.

        Args:
            y: targets as ``fit`` takes them.
            mixture: in regression, average the density over draws; by default the law is the single Gaussian (or
                Laplace) of the predictive mean and variance, as in the figures of Tran et al. (2022).  In
                classification the probabilities are averaged over draws either way.

        Raises:
            TypeError, ValueError: y is of the wrong kind or shape.
        """
        chains, draws = self.functions.shape[:2]
        y = self._check(y)
        log_jacobian = torch.zeros_like(self.target_units.scale[0])
        if self.noise_variance is not None:
            y = self.target_units(y)
            log_jacobian = self.target_units.scale.log().sum()
            if not mixture:
                f = self.functions.mean((0, 1))
                noise = self.noise_variance.expand_as(self.functions).mean((0, 1))
                spread = self.functions.var((0, 1), correction=0)
                return self.likelihood.distribution(f, noise + spread).log_prob(y) - log_jacobian
        each = self.likelihood.distribution(self.functions, self.noise_variance).log_prob(y)
        return each.logsumexp((0, 1)) - math.log(chains * draws) - log_jacobian

    def pointwise_log_likelihood(self, y: Any) -> Tensor:
        """Log-density of ``y`` under each draw, in the user's units, ``(chain, draw, N)``: what ``az.loo`` takes."""
        y = self._check(y)
        if self.noise_variance is None:
            return self.likelihood.distribution(self.functions, None).log_prob(y)
        each = self.likelihood.distribution(self.functions, self.noise_variance).log_prob(self.target_units(y))
        return each - self.target_units.scale.log().sum()

    def sample(self, seed: int = 0) -> Tensor:
        """One y for each draw, in the user's units: ``(chain, draw, N, K)``, or labels ``(chain, draw, N)`` if
        categorical.
        """
        with scoped_seed(seed, self.functions.device):
            y = self.likelihood.distribution(self.functions, self.noise_variance).sample()
        return y if self.noise_variance is None else self.target_units.inverse(y)

    def rmse(self, y: Any) -> Tensor:
        """Root mean squared error of the predictive mean against ``y``; scalar, in the user's units.

        Raises:
            TypeError, ValueError: y is of the wrong kind or shape, or holds labels of more than two classes.
        """
        if isinstance(self.likelihood, Categorical):
            raise ValueError("rmse is not for a categorical likelihood: use accuracy or nll")
        y = self._check(y)
        return (self.mean - y).square().mean().sqrt()

    def nll(self, y: Any, mixture: bool = False) -> Tensor:
        """Mean negative log predictive density of ``y``; scalar."""
        return -self.log_prob(y, mixture).mean()

    def accuracy(self, y: Any) -> Tensor:
        """Share of points (and outputs) whose most probable label is right; scalar.

        Raises:
            TypeError, ValueError: y is of the wrong kind or shape, or the targets are real numbers.
        """
        self._need_classes("accuracy", "rmse")
        y = self._check(y)
        mean = self.mean
        labels = mean.argmax(-1) if isinstance(self.likelihood, Categorical) else (mean > 0.5).to(y.dtype)
        return (labels == y).to(mean.dtype).mean()

    def _check(self, y: Any) -> Tensor:
        return self.likelihood.check(y, self.functions.shape[2], self.functions.shape[3], self.functions)

    def _need_classes(self, query: str, instead: str) -> None:
        if self.noise_variance is not None:
            raise ValueError(
                f"{query} is for classification; this is a {self.likelihood.name} likelihood: use {instead}"
            )

    def _probabilities(self) -> Tensor:
        """Class probabilities of each draw with the classes in the last dimension, ``(chain, draw, N, classes)`` or
        ``(chain, draw, N, K, 2)``.
        """
        self._need_classes("entropy", "variance")
        p = self.likelihood.mean(self.functions)
        return p if isinstance(self.likelihood, Categorical) else torch.stack([1 - p, p], -1)

    def _entropy(self, p: Tensor) -> Tensor:
        """Entropy over classes, summed over independent outputs: ``(..., N)``."""
        h = torch.special.entr(p).sum(-1)
        return h if isinstance(self.likelihood, Categorical) else h.sum(-1)
