"""Conditional unnormalised models p(y | x) = exp(f(x, y)) / Z(x): one normaliser for each row of data.

``F = -mean_i f(x_i, y_i) + mean_i log Z(x_i)`` is a sum of as many inner expectations as there are rows (finite-sum
coupled compositional optimisation; Wang and Yang, ICML 2022).  Three ways to follow them:

* ``"table"``: a running log u_i for each row, updated when the row is in the batch; a row that was not seen yet starts
  at its own first estimate.  A row's u lags by an epoch, so beta must be small where few noise draws are made.
* ``"network"``: log u(x) is a network, learned by the self-normalised bound ``exp(-b(x)) g_i + b(x) - 1``.
* ``"minibatch"``: each row's own K draws alone, biased by O(1 / K).

(The joint tilt, with one constant for all x, is ``CompositionalLikelihood`` on the same batch.)

f(x, y) + c(x) is the same model.  A small penalty on ``(log Z(x_i))^2`` keeps c(x) from wandering.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from inference.kernels.base import count, nonnegative, positive
from inference.objectives.unnormalised.compositional import mix
from inference.objectives.unnormalised.objective import UnnormalisedObjective, positive_weights
from inference.runtime.generators import derive_seed, scoped_seed

__all__ = ["ConditionalCompositionalLikelihood"]

_NORMALISERS = ("table", "network", "minibatch")
_ROWS_AT_ONCE = 256
_VALIDATION_DRAWS = 1024  # for each row


class ConditionalCompositionalLikelihood(UnnormalisedObjective):
    """Negative mean conditional log-likelihood of an unnormalised model, as an objective for ``inference.fit``.

    Its data are ``(index, *batch)``: the number of each row, 0 to ``num_rows - 1``, before the model's tensors.

    Args:
        model: Pyro model ``model(*batch)`` that observes the noise's site with one tensor of the batch; the others are
            covariates.
        guide: the noise; a callable of the batch's tensors may draw y given x.
        num_rows: rows of the data.
        noise_samples: K, noise draws for each row of a batch.
        normaliser: ``"table"``, ``"network"`` or ``"minibatch"``.
        network: for ``"network"``: a module from the covariates to log u, ``(row, ...) -> (row,)``.
        beta: weight of a new estimate in a row's u.
        penalty: weight of the mean of ``(log Z(x_i))^2``.
        on_collapse: as in ``CompositionalLikelihood``.

    Attributes:
        log_u: the table ``(num_rows,)`` in float64.
        seen: which of its rows have been in a batch.
    """

    columns: ClassVar[tuple[str, ...]] = ("log_partition", "log_partition_batch", "ess")
    log_u: Tensor
    seen: Tensor

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        num_rows: int,
        noise_samples: int = 64,
        *,
        normaliser: str = "table",
        network: nn.Module | None = None,
        beta: float = 0.2,
        penalty: float = 1e-3,
        on_collapse: str = "raise",
    ) -> None:
        super().__init__(model, guide, noise_samples, on_collapse=on_collapse)
        if normaliser not in _NORMALISERS:
            raise ValueError(f"normaliser must be one of {_NORMALISERS}, got {normaliser!r}")
        if (network is not None) != (normaliser == "network"):
            raise ValueError("network is what normaliser='network' learns: give both or neither")
        self.normaliser, self.network = normaliser, network
        self.beta, self.penalty = positive("beta", beta, upper=1.0), nonnegative("penalty", penalty)
        if noise_samples == 1 and (normaliser == "minibatch" or self.beta == 1.0):
            raise ValueError("noise_samples=1 without an average has the weight 1 everywhere: draw more, or lower beta")
        size = count("num_rows", num_rows, 1) if normaliser == "table" else 0
        self.register_buffer("log_u", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(size, dtype=torch.bool))

    def forward(self, index: Tensor, *batch: Tensor) -> Tensor:
        """The loss on a batch, a scalar; in training it advances the table, and held-out rows, of which the table and
        ``index`` say nothing, are judged by fresh noise.
        """
        self._prepare(batch)
        if not self._advances():
            log_z = self.log_partitions(batch, max(_VALIDATION_DRAWS, self.noise_samples))
            return (log_z - self.log_density(*batch)).mean()
        rows = len(index)
        at_data, a, at_noise = self._weights(batch, self.noise_samples)
        log_g = torch.logsumexp(a, 0) - math.log(len(a))
        found = log_g.detach().double()
        covariates = [batch[k] for k in self.pair.covariates(batch)]
        bound: Tensor | float = 0.0
        if self.network is not None:
            b = self.network(*covariates)
            log_u = b.detach().double()
            # the value's own gradient in b: d/db (exp(-b) g + b) at fixed g
            bound = ((found - log_u).exp().to(b.dtype) * -b + b).mean()
        elif self.normaliser == "table":
            before = torch.where(self.seen[index], self.log_u[index], found)
            log_u = mix(before, found, torch.full_like(found, self.beta))
        else:
            log_u = found
        if self.normaliser == "table":
            self.log_u[index] = log_u
            self.seen[index] = True
        weights = (a.detach().double() - log_u).exp().to(a.dtype) / len(a)
        surrogate = positive_weights(weights, at_noise) / rows - at_data.mean() + bound
        surrogate = surrogate + self.penalty * log_g.square().mean()
        value = log_u.mean().to(a.dtype) - at_data.detach().mean()
        wide = a.detach().double()
        second = torch.logsumexp(2 * wide, 0) - math.log(len(a))
        share = (2 * found - second).exp().mean()
        # each row has a normaliser of its own, so that its batch is judged by itself
        self._write(log_u.mean(), log_u.mean(), share)
        return value + surrogate - surrogate.detach()

    def log_partitions(self, batch: tuple[Tensor, ...], num_samples: int = 1000, seed: int = 0) -> Tensor:
        """Fresh estimates of log Z(x) for each row ``(row,)`` in float64, from ``num_samples`` noise draws each."""
        self._prepare(batch)
        with torch.no_grad(), scoped_seed(derive_seed(seed, "log partitions"), batch[0].device):
            a = self._weights(batch, num_samples)[1].double()
        return torch.logsumexp(a, 0) - math.log(num_samples)

    def refresh_after_average(self, index: Tensor, *batch: Tensor) -> None:
        """Set the table to fresh estimates under the averaged parameters, from ten times a step's noise draws a row."""
        if self.normaliser == "table":
            for rows in torch.arange(len(index), device=index.device).split(_ROWS_AT_ONCE):
                part = tuple(t[rows] for t in batch)
                self.log_u[index[rows]] = self.log_partitions(part, 10 * self.noise_samples, int(rows[0]))
            self.seen[index] = True

    def _weights(self, batch: tuple[Tensor, ...], draws_each: int) -> tuple[Tensor, Tensor, Tensor]:
        """log p~ at the data ``(row,)``; log p~ - log q ``(draw, row)`` and log p~ ``(draw, row)`` at the noise."""
        rows = len(batch[0])
        draws = self.pair.draw(draws_each * rows, batch, record=self._advances())
        at_data, at_noise = self._joined(batch, draws)
        at_noise, log_q = at_noise.reshape(draws_each, rows), draws.log_q.reshape(draws_each, rows)
        return at_data, at_noise - log_q, at_noise

    def _prepare(self, batch: tuple[Tensor, ...]) -> None:
        first = not self.pair.inspected
        super()._prepare(batch)
        if first and self.pair._own_rows:
            raise ValueError("a conditional model needs noise for each row: let the guide draw one row, without plate")

    def _state_names(self) -> set[str]:
        return super()._state_names() | {"log_u", "seen"}
