"""The training methods by name, what each of them takes, and what a fit returns."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from inference._errors import NonFiniteError
from inference.fit import FitResult, fit
from inference.objectives.unnormalised import (
    CompositionalLikelihood,
    ContrastiveDivergence,
    DenoisingScoreMatching,
    ExponentialNoiseContrastive,
    NoiseContrastive,
    SelfNormalisedLikelihood,
    SlicedScoreMatching,
)
from inference.objectives.unnormalised.noise import Noise
from inference.objectives.unnormalised.objective import UnnormalisedObjective
from inference.results.brief import brief
from inference.results.evidence import LogPartition
from inference.results.export import to_arviz
from inference.runtime.generators import generator
from ppl_models.base import Standardiser
from ppl_models.compositional_ebm.distribution import EnergyDistribution

__all__ = [
    "METHODS",
    "EnergyFit",
    "NoiseMeasure",
    "RelativeEnergy",
    "RelativeTo",
    "Split",
    "StandardisedEnergy",
    "StandardisedNoise",
    "build_objective",
    "default_rate",
    "judged_by_loss",
    "moves_in_space",
    "optimise",
    "relative",
    "split_of_few",
]

METHODS: dict[str, tuple[type[UnnormalisedObjective], dict[str, Any]]] = {
    "compositional": (CompositionalLikelihood, {}),
    "mle": (CompositionalLikelihood, {"beta": 1.0, "correction": "none"}),
    "snl": (SelfNormalisedLikelihood, {}),
    "nce": (NoiseContrastive, {}),
    "ence": (ExponentialNoiseContrastive, {}),
    "cd": (ContrastiveDivergence, {"start": "data"}),
    "pcd": (ContrastiveDivergence, {"start": "buffer", "penalty": 0.1}),  # without it they run away
    "short_run": (ContrastiveDivergence, {"start": "noise", "penalty": 0.1}),
    "dsm": (DenoisingScoreMatching, {}),
    "ssm": (SlicedScoreMatching, {}),
}
_LIKELIHOODS = (CompositionalLikelihood, SelfNormalisedLikelihood)
_RATE, _RATE_IN_SPACE = 5e-3, 1e-3  # the latter of chains and scores, which run away at more
_VALIDATIONS, _VALIDATIONS_EARLY = 20, 80  # in a fit, and in one that they may end
_FEWEST_ASIDE, _MOST_ASIDE, _DECAY, _PATIENCE = 30, 1000, 1000.0, 200  # of fits to few rows; steps
# Rows a parameter below which they are learned by heart: p parameters fit n rows p / 2n nats better than new ones.
_BY_HEART, _SOON = 4.0, 0.1
_WITHOUT_NOISE = (ContrastiveDivergence, DenoisingScoreMatching, SlicedScoreMatching)


def _known(method: str) -> str:
    if method not in METHODS:
        raise ValueError(f"method must be one of {sorted(METHODS)}, got {method!r}")
    return method


def build_objective(
    method: str,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    noise_samples: int,
    beta: Any,
    options: Mapping[str, Any],
) -> UnnormalisedObjective:
    """The objective of a method; ``options`` are further arguments of its class.

    Raises:
        TypeError, ValueError: no such method, or an option that it does not have.
    """
    kind, defaults = METHODS[_known(method)]
    arguments = {**defaults, **options}
    if kind is CompositionalLikelihood:
        arguments.setdefault("beta", beta)
    if not issubclass(kind, _WITHOUT_NOISE):
        arguments["noise_samples"] = noise_samples
    return kind(model, guide, **arguments)


class NoiseMeasure(nn.Module):
    """A noise guide whose density counts as one: densities are then relative to the noise.

    Where an energy tilts its own noise, log p~ - log q is -E, and the noise's density, which for a mixture of normals
    costs as much as the network, need not be evaluated in a step.
    """

    def __init__(self, noise: Noise) -> None:
        super().__init__()
        self.noise = noise

    def forward(self, *batch: Any) -> None:
        """Draws a row."""
        pyro.sample("x", self.noise.distribution().mask(False))


class RelativeEnergy(nn.Module):
    """The Pyro model of ``exp(-E)`` relative to a noise."""

    def __init__(self, energy: nn.Module, event_shape: tuple[int, ...], support: Any) -> None:
        super().__init__()
        self.energy, self.event_shape, self.support = energy, event_shape, support

    def forward(self, x: Tensor) -> None:
        """The rows."""
        with pyro.plate("data", len(x)):
            pyro.sample("x", EnergyDistribution(self.energy, self.event_shape, support=self.support), obs=x)


class RelativeTo(nn.Module):
    """An objective of densities relative to a noise; a likelihood's loss is that of the densities themselves.

    Args:
        model: of densities relative to the noise.
        noise: what they are relative to.
        method, noise_samples, beta, options: as in ``build_objective``.
    """

    def __init__(
        self,
        method: str,
        model: RelativeEnergy,
        noise: Noise,
        noise_samples: int,
        beta: Any,
        options: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.density = build_objective(method, model, NoiseMeasure(noise), noise_samples, beta, options)

    def forward(self, x: Tensor, log_noise: Tensor) -> Tensor:
        """``log_noise`` is the noise's log-density at ``x``."""
        loss: Tensor = self.density(x)
        return loss - log_noise.mean() if isinstance(self.density, _LIKELIHOODS) else loss

    @property
    def record_buffers(self) -> set[str]:
        """As the loop asks of an objective that keeps a record of the run."""
        return {f"density.{name}" for name in self.density.record_buffers}

    def refresh_after_average(self, x: Tensor, log_noise: Tensor) -> None:
        """As the loop asks of an objective whose estimates follow the parameters."""
        if isinstance(self.density, CompositionalLikelihood):
            self.density.refresh_after_average(x)


class StandardisedEnergy(nn.Module):
    """The Pyro model of events in units of the data's standard deviations, for methods that move in their space.

    Langevin steps and denoising noise are as long in each coordinate, whatever its unit.

    Args:
        model: has the energy; its density is looked at by ``law``.
        law: the unnormalised density of events in their own units.
        x: data ``(row, *event)``.
    """

    def __init__(self, model: nn.Module, law: Callable[[], EnergyDistribution], x: Tensor) -> None:
        super().__init__()
        self.model, self._law = model, law
        self.units = Standardiser(x[0].numel()).to(x)
        self.units.learn(x.reshape(len(x), -1))

    def standardise(self, x: Tensor) -> Tensor:
        """Events ``(row, *event)`` in standard deviations."""
        z: Tensor = self.units(x.reshape(len(x), -1))
        return z.reshape(x.shape)

    def forward(self, z: Tensor) -> None:
        """Rows that are standardised."""
        law = self._law()
        jacobian = 0.0 if law.base is None else self.units.scale.log().sum()

        def energy(rows: Tensor) -> Tensor:
            return -law.log_prob(self.units.inverse(rows.reshape(len(rows), -1)).reshape(rows.shape)) - jacobian

        with pyro.plate("data", len(z)):
            pyro.sample("x", EnergyDistribution(energy, tuple(law.event_shape)), obs=z)


class StandardisedNoise(nn.Module):
    """A noise guide in the units of a ``StandardisedEnergy``."""

    def __init__(self, noise: Noise, model: StandardisedEnergy) -> None:
        super().__init__()
        self.noise, self.units = noise, model.units

    def forward(self, *batch: Any) -> None:
        """Draws a row."""
        shape = self.noise.event_shape
        shift, scale = self.units.shift.reshape(shape), self.units.scale.reshape(shape)
        to_units = dist.transforms.AffineTransform(-shift / scale, 1 / scale, event_dim=len(shape))
        pyro.sample("x", dist.TransformedDistribution(self.noise.distribution(), [to_units]))


def judged_by_loss(method: str) -> bool:
    """Whether a method's loss tells how good a fit is, as a contrastive divergence does not."""
    return not issubclass(METHODS[_known(method)][0], ContrastiveDivergence)


def moves_in_space(method: str) -> bool:
    """Whether a method takes steps or derivatives in the events' own space."""
    return issubclass(METHODS[_known(method)][0], _WITHOUT_NOISE)


def default_rate(method: str) -> float:
    """Adam's first rate where none is given."""
    return _RATE_IN_SPACE if moves_in_space(method) else _RATE


def relative(method: str, options: Mapping[str, Any]) -> bool:
    """Whether a method needs densities at data and noise alone, from noise that stays as it is."""
    return not moves_in_space(method) and options.get("adapt", "none") == "none"


@brief
@dataclass(frozen=True, eq=False)
class EnergyFit:
    """What a fit did.

    Attributes:
        history: of each step ``loss`` and, by method, ``log_partition``, ``log_partition_batch``, ``ess`` (effective
            share of the noise draws) and ``beta``, each ``(num_steps,)``; ``validation_loss`` where there was held-out
            data.
        log_partition: log Z of the fitted model by importance sampling, with its error; None where a model has another
            for each row.
        method: the method's name.
        optimisation: the loop's own result.
    """

    history: dict[str, Tensor]
    log_partition: LogPartition | None
    method: str
    optimisation: FitResult = field(repr=False)

    @property
    def seconds(self) -> float:
        """Wall time of the optimisation."""
        return self.optimisation.seconds

    def summary(self) -> str:
        """One line: how it went, and how far log Z can be trusted."""
        text = f"{self.method}: {self.optimisation.summary()}"
        found = self.log_partition
        if found is not None:
            text += f"; log Z = {found.value:.4g} (s.e. {found.standard_error:.2g}, Pareto k {found.khat:.2f})"
        if "ess" in self.history and len(self.history["ess"]):
            text += f"; {float(self.history['ess'][-100:].mean()):.1%} of the noise effective at the end"
        return text

    def to_arviz(self) -> Any:
        """ArviZ object: the histories as ``sample_stats`` ``(chain, draw)``, a draw a step."""
        stats = {n: v[None] for n, v in self.history.items() if n != "validation_loss"}
        attrs: dict[str, Any] = {"method": self.method}
        if self.log_partition is not None:
            attrs |= {"log_partition": self.log_partition.value, "log_partition_se": self.log_partition.standard_error}
        return to_arviz(sample_stats=stats, attrs=attrs)


def optimise(
    objective: nn.Module,
    data: tuple[Tensor, ...],
    *,
    density: UnnormalisedObjective | None = None,
    valid: tuple[Tensor, ...] | None = None,
    early: bool = False,
    num_steps: int,
    batch_size: int | None,
    lr: float,
    weight_decay: float,
    average_last: float,
    seed: int,
    optimizer: Callable[..., Any] | None = None,
    checkpoint: str | Path | None,
    progress: bool | Callable[[dict[str, Any]], None],
) -> tuple[FitResult, dict[str, Tensor]]:
    """Run the loop with Adam and a cosine from ``lr`` to zero, and name what went wrong in terms of the energy.

    Args:
        density: the part of the objective that has the record; the objective itself if None.
        valid: held-out tensors, as those of ``data``. The parameters with the lowest loss on them are kept, unless
            parameters are averaged or the loss is a contrastive divergence, which tells nothing of the fit.
        early: whether a tenth of the steps (of few steps 200) without a lower loss on them ends the run.

    Raises:
        NonFiniteError: with the step and the share of the batch whose energy was not finite.
        CollapseError: the noise weights collapsed.
    """
    inner = objective if density is None else density
    assert isinstance(inner, UnnormalisedObjective)
    every = max(5, num_steps // (_VALIDATIONS_EARLY if early else _VALIDATIONS))
    best = valid is not None and not average_last and not isinstance(inner, ContrastiveDivergence)

    def make(parameters: Any) -> Any:
        if optimizer is not None:
            return optimizer(parameters)
        if weight_decay:
            return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
        return torch.optim.Adam(parameters, lr=lr)

    try:
        found = fit(
            objective,
            data,
            num_steps=num_steps,
            batch_size=batch_size,
            optimizer=make,
            scheduler=lambda o: CosineAnnealingLR(o, num_steps),
            validation=valid,
            validate_every=every,
            patience=None if not best else num_steps + 2 if not early else -(-max(_PATIENCE, num_steps // 10) // every),
            average_last=average_last,
            seed=seed,
            checkpoint=checkpoint,
            progress=progress,
        )
    except NonFiniteError as error:
        share = inner.nonfinite_share
        if share:
            raise NonFiniteError(
                f"the energy was NaN or infinite on {share:.1%} of the rows of the batch and noise: {error}"
            ) from error
        raise
    inner.look()
    history = {"loss": found.losses.double(), **inner.history}
    if len(found.validation_losses):
        history["validation_loss"] = found.validation_losses
    return found, history


class Split(NamedTuple):
    """How few rows are fitted.

    Attributes:
        kept, aside: indices of the rows that are learned from, and of those that choose the parameters, on the CPU.
        weight_decay: of AdamW.
        early: whether the run ends when they do no better.  With more rows its rate must first fall: what it reaches
            at the first one is not its best.
    """

    kept: Tensor
    aside: Tensor
    weight_decay: float
    early: bool


def split_of_few(
    count: int, energy: nn.Module, seed: int, most: int = _MOST_ASIDE, by_heart: float = _BY_HEART
) -> Split | None:
    """How to fit ``count`` rows that the energy could learn by heart; None where there are more than ``by_heart`` for
    each of its parameters.

    A tenth is set aside, from 30 to ``most`` rows and never more than a third; of fewer than 30 rows none.
    """
    parameters = sum(p.numel() for p in energy.parameters())
    if not _FEWEST_ASIDE <= count < by_heart * parameters:
        return None
    order = torch.randperm(count, generator=generator(seed, "held-out rows"))
    aside = min(max(count // 10, _FEWEST_ASIDE), count // 3, most)
    return Split(order[aside:], order[:aside], _DECAY / count, count < _SOON * parameters)


def check_schedule(lr: Any, weight_decay: Any, average_last: Any) -> None:
    """Refuse rates out of range, before any work."""
    for name, value, least in (("lr", lr, 0.0), ("weight_decay", weight_decay, 0.0), ("average_last", average_last, 0)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < least:
            raise ValueError(f"{name} must be a finite number of at least {least:g}, got {value!r}")
    if lr == 0:
        raise ValueError("lr must be positive, got 0")
