"""What all objectives for unnormalised models share: the pair of model and noise, a record of each step, log Z."""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from inference.kernels.base import count
from inference.objectives.unnormalised.guards import Guard
from inference.objectives.unnormalised.pair import Draws, NoisePair
from inference.results.evidence import LogPartition, from_weights, with_upper_bound
from inference.runtime.generators import derive_seed, scoped_seed

__all__ = ["UnnormalisedObjective", "positive_weights", "refuse_edges"]

_LOOK_EVERY = 256  # steps between two looks at the counters; each is one transfer from the device
_CHUNK = 16_384  # noise draws at once in ``log_partition``; fixed, as the random stream depends on it


class UnnormalisedObjective(nn.Module):
    """A loss for ``inference.fit`` of a model that is known up to its normalising constant.

    Its state (running estimates, the record of the steps) is in buffers, which the loop saves and puts back.

    Args:
        model: a Pyro model whose density need not integrate to one.
        guide: the noise, a Pyro callable that draws the site that the model observes.
        noise_samples: noise draws M a step; by default what the guide's own plate draws, or else 256.
        on_collapse: ``"raise"``, ``"warn"`` or ``"ignore"``: what to do when the noise weights collapse.
        sites: the sites that noise replaces, where there is no guide to tell.
    """

    columns: ClassVar[tuple[str, ...]] = ()
    _takes_priors: ClassVar[bool] = False
    step: Tensor
    record: Tensor

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any] | None,
        noise_samples: int | None = None,
        *,
        on_collapse: str = "raise",
        sites: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.pair = NoisePair(model, guide, sites)
        self._asked = None if noise_samples is None else count("noise_samples", noise_samples, 1)
        self.noise_samples = self._asked or 256
        self.guard = Guard(on_collapse)
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.register_buffer("record", torch.zeros(0, len(self.columns), dtype=torch.float64))
        self._calls = 0
        self._last: tuple[Tensor, int] | None = None

    @property
    def history(self) -> dict[str, Tensor]:
        """What was recorded at each step so far, ``(step,)`` each, on the CPU."""
        rows = self.record[: int(self.step)].cpu()
        return {name: rows[:, i] for i, name in enumerate(self.columns)}

    @property
    def nonfinite_share(self) -> float:
        """Share of the rows of the last call whose log-density was NaN or infinite."""
        if self._last is None:
            return 0.0
        found, rows = self._last
        bad = ~(torch.isfinite(found) | (found == -math.inf))
        bad[:rows] |= found[:rows] == -math.inf  # noise may fall where the model has no mass, data may not
        return float(bad.double().mean())

    # ------------------------------------------------------------------ densities of data and noise
    def log_density(self, *batch: Tensor) -> Tensor:
        """log p~ of each row of data, ``(row,)``."""
        self._prepare(batch)
        return self.pair.log_density(self.pair.data(batch), batch)

    def log_weights(self, num_samples: int, seed: int = 0, batch: tuple[Tensor, ...] | None = None) -> Tensor:
        """log p~(z) - log q(z) at fresh noise, ``(num_samples,)`` in float64.

        Args:
            num_samples: draws; rounded up to whole calls of a guide that has a plate of its own.
            seed: of the draws.
            batch: a batch of data, needed if the objective has seen none, or where model or guide have covariates.
        """
        batch = self._example() if batch is None else batch
        self._prepare(batch)
        if self.pair.covariates(batch):
            raise ValueError("log Z of a conditional model is another for each row: use log_partitions(batch)")
        return self._fresh_log_weights(num_samples, seed, batch)

    def _fresh_log_weights(self, num_samples: int, seed: int, batch: tuple[Tensor, ...]) -> Tensor:
        """As ``log_weights``; the noise's rows take the covariates of the batch's rows in turn."""
        count("num_samples", num_samples, 2)
        size = self.pair.rows(min(_CHUNK, num_samples))
        covariates, blocks = self.pair.covariates(batch), []
        with torch.no_grad(), scoped_seed(derive_seed(seed, "log weights"), batch[0].device):
            for start in range(0, num_samples, size):
                rows = self.pair.rows(min(size, num_samples - start))
                index = torch.arange(start, start + rows, device=batch[0].device) % len(batch[0])
                part = tuple(t[index] for t in batch) if covariates else batch
                draws = self.pair.draw(rows, part)
                blocks.append((self.pair.log_density(draws.values, part) - draws.log_q).double())
        return torch.cat(blocks)

    def log_partition(
        self, num_samples: int = 100_000, seed: int = 0, batch: tuple[Tensor, ...] | None = None
    ) -> LogPartition:
        """log Z by importance sampling from the noise, with error, bounds and the tail of the weights."""
        return with_upper_bound(from_weights(self.log_weights(num_samples, seed, batch), "importance"))

    # ------------------------------------------------------------------ for subclasses
    def _prepare(self, batch: tuple[Tensor, ...]) -> None:
        if self.pair.inspected:
            return
        self.pair.inspect(batch)
        self._batch = tuple(t.detach()[:2].clone() for t in batch)
        own = self.pair.rows(self.noise_samples)
        if self._asked is not None and own != self._asked:
            raise ValueError(f"noise_samples={self._asked}, but the guide's own plate draws {own}")
        self.noise_samples = own
        if self.pair.latent_values() and not self._takes_priors:
            raise ValueError(
                f"the model has latent sites {list(self.pair.latent_values())}, and {type(self).__name__} learns "
                "parameters alone: use CompositionalLikelihood, or PyroParam"
            )
        device = batch[0].device
        for name, buffer in list(self.named_buffers()):
            if buffer.device != device and name in self._state_names():
                path, _, last = name.rpartition(".")
                self.get_submodule(path).register_buffer(last, buffer.to(device))
        self._check_data(batch)

    @property
    def record_buffers(self) -> set[str]:
        """Buffers that record the run, which ``inference.fit`` leaves as they are when it puts back a best fit."""
        return {"step", "record"}

    def _state_names(self) -> set[str]:
        return set(self.record_buffers)

    def _example(self) -> tuple[Tensor, ...]:
        if not self.pair.inspected:
            raise ValueError("the objective has not seen data yet: give batch=(x,)")
        return self._batch

    def _check_data(self, batch: tuple[Tensor, ...]) -> None:
        """Refuse data that the noise cannot reach: there the model would get no weight."""
        if self.pair._functions[1] is None or torch._guards.detect_fake_mode(list(batch)) is not None:
            return
        with torch.no_grad():
            outside = ~torch.isfinite(self.pair.log_q(self.pair.data(batch), batch))
        if bool(outside.any()):
            raise ValueError(
                f"{int(outside.sum())} of {len(outside)} rows of data lie outside the noise's support (the first is "
                f"row {int(outside.nonzero()[0])}): the noise must be able to draw whatever the data may be"
            )

    def _joined(self, batch: tuple[Tensor, ...], draws: Draws) -> tuple[Tensor, Tensor]:
        """log p~ of the data rows ``(B,)`` and of the noise ``(M,)`` in one call of the model.

        Covariates of the noise are those of the data rows in turn, as the guide saw them.
        """
        data = self.pair.data(batch)
        rows, noise = len(batch[0]), len(draws.log_q)
        joined = list(batch)
        for k in self.pair.covariates(batch):
            index = torch.arange(noise, device=batch[k].device) % rows
            joined[k] = torch.cat([batch[k], batch[k][index]])
        values = {n: torch.cat([data[n], z.to(data[n].dtype)]) for n, z in draws.values.items()}
        log_p = self.pair.log_density(values, tuple(joined), record=self._advances())
        self._note(log_p, rows)
        return log_p[:rows], log_p[rows:]

    def _note(self, log_p: Tensor, rows: int) -> None:
        self._last = log_p.detach(), rows

    def _advances(self) -> bool:
        """Whether this call is a training step, which changes the state; validation leaves it alone."""
        return self.training and torch.is_grad_enabled()

    def look(self) -> int:
        """Let the guard judge the latest steps, and return the number of steps made.

        Raises:
            CollapseError: see ``on_collapse``.
        """
        done = int(self.step)
        if "log_partition_batch" in self.columns:
            first = max(0, done - _LOOK_EVERY - self.guard.context(self.noise_samples))
            rows = dict(zip(self.columns, self.record[first:done].cpu().unbind(1), strict=True))
            relative = rows["log_partition_batch"] - rows["log_partition"]
            self.guard.look(relative, rows["ess"], self.noise_samples, first)
        return done

    def _write(self, *values: Tensor) -> None:
        """Record a step. The counters are read back every few hundred calls, when room is made and the guard looks."""
        if self._calls % _LOOK_EVERY == 0:
            done = self.look() if torch._guards.detect_fake_mode([self.step]) is None else 0
            if len(self.record) < done + 2 * _LOOK_EVERY:
                extra = max(2 * _LOOK_EVERY, len(self.record))
                self.record = torch.cat([self.record, self.record.new_zeros(extra, self.record.shape[1])])
        self._calls += 1
        row = torch.stack([v.detach().to(self.record) for v in values])
        self.record.index_copy_(0, self.step.reshape(1), row[None])
        self.step.add_(1)


def refuse_edges(support: Any, what: str) -> None:
    """Refuse a law on a part of the real numbers: there a score says nothing of the mass at the edge.

    Args:
        support: the law's; None where it is not known.
        what: the method, for the message.

    Raises:
        ValueError: the support is discrete or bounded.
    """
    inner = support
    while isinstance(inner, constraints.independent):
        inner = inner.base_constraint
    if inner not in (None, constraints.real, constraints.real_vector):
        raise ValueError(
            f"{what} needs continuous data without bounds, the support is {support}: use method 'compositional', "
            "'nce' or 'snl'"
        )


def positive_weights(weights: Tensor, log_p: Tensor) -> Tensor:
    """``sum_j w_j log p_j`` in which draws of zero weight do not count, even where the model has no mass at them."""
    return torch.where(weights > 0, weights * log_p, torch.zeros_like(log_p)).sum()
