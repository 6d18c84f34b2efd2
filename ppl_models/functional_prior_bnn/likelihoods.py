"""Likelihoods: what a function value says about an observation, in the model's standardised space.

Each likelihood checks its targets, gives the observation's Pyro distribution with one batch dimension a data point, and
the mean of y given f.
"""

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor

from ppl_models.base import to_precision, to_tensor

__all__ = ["Bernoulli", "Categorical", "Gaussian", "Laplace", "Likelihood", "build_likelihood"]


class Likelihood(ABC):
    """The law of ``y`` given function values ``f`` ``(*batch, N, K)``.

    Attributes:
        has_noise: whether there is a noise variance, and y is standardised.
    """

    name: ClassVar[str]
    has_noise: ClassVar[bool] = False

    @abstractmethod
    def check(self, y: Any, num_rows: int, num_outputs: int, like: Tensor) -> Tensor:
        """y as a tensor in the likelihood's own shape and dtype, on the device of ``like``.

        Raises:
            TypeError, ValueError: y is of the wrong kind, shape or range, or not finite.
        """

    @abstractmethod
    def distribution(self, f: Tensor, noise_variance: Tensor | None) -> Any:
        """Distribution of y, batch shape ``(*batch, N)``; ``noise_variance`` broadcasts against f."""

    @abstractmethod
    def mean(self, f: Tensor) -> Tensor:
        """Mean of y (of its one-hot code if categorical) given f, ``(*batch, N, K)``."""


class Gaussian(Likelihood):
    """``y ~ N(f, noise_variance)``."""

    name = "gaussian"
    has_noise = True

    def check(self, y: Any, num_rows: int, num_outputs: int, like: Tensor) -> Tensor:
        """Finite numbers ``(N, K)``, or ``(N,)`` with one output."""
        y = to_tensor("y", y)
        if y.is_complex():
            raise TypeError(f"y must be real for a {self.name} likelihood, got {y.dtype}")
        return to_precision("y", _columns(y, num_rows, num_outputs), like)

    def distribution(self, f: Tensor, noise_variance: Tensor | None) -> Any:
        """Normal, independent over outputs."""
        assert noise_variance is not None
        return dist.Normal(f, noise_variance.sqrt().expand_as(f)).to_event(1)

    def mean(self, f: Tensor) -> Tensor:
        """f itself."""
        return f


class Laplace(Gaussian):
    """``y ~ Laplace(f, b)`` with variance ``2 b^2 = noise_variance``: heavier tails, so outliers pull less."""

    name = "laplace"

    def distribution(self, f: Tensor, noise_variance: Tensor | None) -> Any:
        """Laplace, independent over outputs."""
        assert noise_variance is not None
        return dist.Laplace(f, (noise_variance / 2).sqrt().expand_as(f)).to_event(1)


class Bernoulli(Likelihood):
    """``P(y = 1) = sigmoid(f)``, independent over outputs."""

    name = "bernoulli"

    def check(self, y: Any, num_rows: int, num_outputs: int, like: Tensor) -> Tensor:
        """Zeros and ones ``(N, K)``, or ``(N,)`` with one output."""
        y = _columns(to_tensor("y", y), num_rows, num_outputs)
        wrong = (y != 0) & (y != 1)
        if bool(wrong.any()):
            raise ValueError(
                f"y must be 0 or 1 for a Bernoulli likelihood, got {_examples(y, wrong)}; "
                "for real targets use likelihood='gaussian'"
            )
        return y.to(like)

    def distribution(self, f: Tensor, noise_variance: Tensor | None) -> Any:
        """Bernoulli with logits f."""
        return dist.Bernoulli(logits=f).to_event(1)

    def mean(self, f: Tensor) -> Tensor:
        """Probability of 1."""
        return torch.sigmoid(f)


class Categorical(Likelihood):
    """``P(y = k) = softmax(f)_k``."""

    name = "categorical"

    def check(self, y: Any, num_rows: int, num_outputs: int, like: Tensor) -> Tensor:
        """Integer labels ``(N,)`` in ``0 ... K - 1``."""
        y = to_tensor("y", y)
        if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            raise TypeError(
                f"y must hold integer class labels for a categorical likelihood, got {y.dtype}; "
                "convert them with y.long()"
            )
        y = _columns(y, num_rows, 1)[:, 0].long()
        wrong = (y < 0) | (y >= num_outputs)
        if bool(wrong.any()):
            raise ValueError(
                f"y must hold labels 0 to {num_outputs - 1} (out_features = {num_outputs} classes), "
                f"got {_examples(y, wrong)}"
            )
        return y.to(like.device)

    def distribution(self, f: Tensor, noise_variance: Tensor | None) -> Any:
        """Categorical with logits f."""
        return dist.Categorical(logits=f)

    def mean(self, f: Tensor) -> Tensor:
        """Class probabilities."""
        return torch.softmax(f, -1)


def build_likelihood(
    name: str, out_features: int, noise_variance: float | str | None
) -> tuple[Likelihood, float | str | None]:
    """The likelihood of that name, and its noise variance with the default filled in.

    Raises:
        ValueError: an unknown name, a noise variance that is not positive or not asked for, or a categorical one with
            a single output.
    """
    kinds: dict[str, type[Likelihood]] = {c.name: c for c in (Gaussian, Laplace, Bernoulli, Categorical)}
    if name not in kinds:
        raise ValueError(f"likelihood must be one of {sorted(kinds)}, got {name!r}")
    kind = kinds[name]
    if kind is Categorical and out_features < 2:
        raise ValueError(
            f"a categorical likelihood needs out_features >= 2 (one for each class), got {out_features}; "
            "for two classes 'bernoulli' will do"
        )
    if not kind.has_noise:
        if noise_variance is not None:
            raise ValueError(
                f"noise_variance = {noise_variance!r} has no meaning for a {name} likelihood: leave it out"
            )
        return kind(), None
    if noise_variance is None:
        return kind(), 0.1
    if noise_variance == "learned":
        return kind(), "learned"
    if isinstance(noise_variance, bool) or not isinstance(noise_variance, int | float):
        raise TypeError(f"noise_variance must be a number or 'learned', got {noise_variance!r}")
    if not (noise_variance > 0 and math.isfinite(noise_variance)):
        raise ValueError(f"noise_variance must be positive and finite, got {noise_variance!r}")
    return kind(), float(noise_variance)


def _columns(y: Tensor, num_rows: int, num_columns: int) -> Tensor:
    if y.ndim == 1 and num_columns == 1:
        y = y.unsqueeze(1)
    if y.ndim != 2 or tuple(y.shape) != (num_rows, num_columns):
        raise ValueError(
            f"y must have shape ({num_rows}, {num_columns}), one row for each row of x, got {tuple(y.shape)}"
        )
    return y


def _examples(y: Tensor, wrong: Tensor) -> str:
    return ", ".join(str(v) for v in y[wrong][:3].tolist())
