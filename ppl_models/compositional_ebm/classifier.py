"""A classifier that is a density too: ``log p(x, y) = f(x)[y] + log b(x) - log Z`` (JEM).

Grathwohl et al., "Your Classifier is Secretly an Energy Based Model and You Should Treat it Like One", ICLR 2020,
arXiv:1912.03263: the logits' logsumexp is the log-density of x.  Here that density
is fitted by compositional maximum likelihood as the tilt of a mixture of normals, without chains, so that it is
normalised and its log p(x) can be compared between models.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn import functional

from inference.citation import Paper
from inference.objectives.unnormalised import CompositionalLikelihood
from inference.objectives.unnormalised.noise import Noise
from inference.results.evidence import LogPartition
from ppl_models.base import Model, check_batch_size, check_count, check_counts, to_precision, to_tensor
from ppl_models.compositional_ebm.distribution import EnergyDistribution
from ppl_models.compositional_ebm.methods import (
    EnergyFit,
    RelativeEnergy,
    RelativeTo,
    build_objective,
    check_schedule,
    optimise,
    relative,
)
from ppl_models.compositional_ebm.networks import EnergyNetwork
from ppl_models.compositional_ebm.noise import (
    as_noise,
    covering_mixture,
    noise_for_file,
    noise_for_load,
    noise_of_file,
    without_noise,
)
from ppl_models.compositional_ebm.normaliser import importance

__all__ = ["EnergyClassifier"]

_CHECK_SAMPLES = 100_000


class PrincipalComponents(nn.Module):
    """The data's first principal components, each scaled to unit standard deviation."""

    mean: Tensor
    projection: Tensor

    def __init__(self, columns: int, num_components: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(columns))
        self.register_buffer("projection", torch.eye(columns, num_components))

    def learn(self, x: Tensor) -> None:
        """Components of the rows of ``x`` ``(N, columns)``."""
        num = self.projection.shape[1]
        self.mean = x.mean(0)
        _, values, directions = torch.linalg.svd(x - self.mean, full_matrices=False)
        spread = values[:num] / len(x) ** 0.5
        if not float(spread[0]) > 10 * torch.finfo(x.dtype).eps * float(self.mean.abs().max()):
            raise ValueError("x is the same in every row: there is nothing to tell classes or densities by")
        if bool((spread < 1e-6 * spread[0]).any()):
            rank = int((spread >= 1e-6 * spread[0]).sum())
            raise ValueError(f"x has only {rank} independent columns: give num_components={rank} or fewer")
        self.projection = directions[:num].T / spread

    def forward(self, x: Tensor) -> Tensor:
        """``(N, columns)`` to ``(N, num_components)``."""
        return (x - self.mean) @ self.projection


class _Hybrid(nn.Module):
    """Density of the components and cross-entropy of the labels, on inputs with a little noise."""

    def __init__(self, classifier: "EnergyClassifier", density: nn.Module, weight: float, jitter: float):
        super().__init__()
        self.density, self.weight, self.jitter = density, weight, jitter
        self._classifier = (classifier,)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            z = z + self.jitter * torch.randn_like(z)
        cross_entropy = functional.cross_entropy(self._classifier[0].network(z), y)
        if not self.weight:
            return cross_entropy
        density = self.density
        if isinstance(density, RelativeTo):
            with torch.no_grad():
                log_noise = self._classifier[0].log_noise(z)
            return self.weight * density(z, log_noise) + cross_entropy
        loss: Tensor = self.weight * density(z) + cross_entropy
        return loss


class EnergyClassifier(Model):
    """A joint energy of inputs and labels.

    Grathwohl et al., ICLR 2020, arXiv 1912.03263, by the compositional likelihood of Jiang et al., ICML 2023.

    The inputs are flattened and reduced to their first principal components, of unit variance, whose joint density
    with the label is what is modelled.  ``classifier(z, y)`` is the Pyro model of components z with the sites ``x`` and
    ``y`` in the plate ``data``.

    Args:
        num_classes: labels are 0 to ``num_classes - 1``.
        num_components: principal components; fewer where the inputs have fewer columns.
        hidden: widths of the network's hidden layers.
        seed: of the network's initial weights.

    Attributes:
        noise: the law that the density tilts.
        log_z: log Z; None before a fit.
        result: what the last fit returned; None before.

    Raises:
        TypeError, ValueError: an argument does not fit.
        RuntimeError: a query of a classifier that has not been fitted.
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        *CompositionalLikelihood.papers,
        Paper(
            "inproceedings",
            "grathwohl2020classifier",
            author="Grathwohl, Will and Wang, Kuan-Chieh and Jacobsen, Joern-Henrik and Duvenaud, David "
            "and Norouzi, Mohammad and Swersky, Kevin",
            title="Your Classifier is Secretly an Energy Based Model and You Should Treat it Like One",
            booktitle="International Conference on Learning Representations",
            year=2020,
        ),
    )

    kind: ClassVar[str] = "EnergyClassifier"

    def __init__(
        self,
        num_classes: int = 10,
        num_components: int = 16,
        hidden: tuple[int, ...] = (128, 128),
        *,
        seed: int = 0,
        input_shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = check_count("num_classes", num_classes, 2)
        self.num_components = check_count("num_components", num_components)
        self.hidden, self.seed = check_counts("hidden", hidden), seed
        self.input_shape: tuple[int, ...] | None = None
        self.noise: Noise | None = None
        self.log_z: float | None = None
        self.result: EnergyFit | None = None
        if input_shape is not None:
            self._build(check_counts("input_shape", input_shape))

    def _build(self, input_shape: tuple[int, ...]) -> None:
        columns = torch.Size(input_shape).numel()
        size = min(columns, self.num_components)
        self.input_shape = input_shape
        self.components = PrincipalComponents(columns, size)
        # without Fourier features, by which a classifier of few rows learns them by heart
        self.network = EnergyNetwork(size, self.hidden, outputs=self.num_classes, bandwidth=0.0, seed=self.seed)

    # ------------------------------------------------------------------ the Pyro model
    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """The Pyro model of components ``(row, num_components)`` and labels ``(row,)``."""
        with pyro.plate("data", len(z)):
            pyro.sample("x", self._law(None), obs=z)
            label: Tensor = pyro.sample("y", dist.Categorical(logits=self.network(z)), obs=y)
        return label

    def log_noise(self, z: Tensor) -> Tensor:
        """Log-density of components under the noise that the density tilts, ``(row,)``."""
        assert self.noise is not None
        return self.noise.log_prob(z)

    def _law(self, log_z: float | None) -> EnergyDistribution:
        assert self.noise is not None
        return EnergyDistribution(
            lambda z: -torch.logsumexp(self.network(z), 1), base=self.noise.distribution(), log_z=log_z
        )

    def _marginal(self, z: Tensor) -> None:
        with pyro.plate("data", len(z)):
            pyro.sample("x", self._law(None), obs=z)

    # ------------------------------------------------------------------ fitting
    def fit(
        self,
        x: Any,
        y: Any,
        noise: Any = "auto",
        method: str = "compositional",
        noise_samples: int = 256,
        batch_size: int | None = 128,
        beta: Any = 0.1,
        num_steps: int = 1500,
        seed: int = 0,
        *,
        density_weight: float = 1.0,
        input_noise: float = 0.1,
        lr: float = 2e-3,
        weight_decay: float = 1e-2,
        checkpoint: str | Path | None = None,
        progress: bool | Callable[[dict[str, Any]], None] = True,
        **options: Any,
    ) -> EnergyFit:
        """Fit density and labels together.

        Args:
            x: inputs ``(N, *shape)``.
            y: labels ``(N,)``, integers from 0.
            noise: ``"auto"``: a mixture of normals fitted to the components, with a tenth of a wide normal; or as in
                ``EnergyModel.fit``, over components.
            method, noise_samples, batch_size, beta, num_steps, seed, lr, weight_decay, checkpoint, progress, options:
                as in ``EnergyModel.fit``.
            density_weight: weight of the negative log p(x) beside the cross-entropy.
            input_noise: standard deviation that is added to the components in training.

        Raises:
            TypeError, ValueError, NonFiniteError, CollapseError: as in ``EnergyModel.fit``.
        """
        x = to_tensor("x", x)
        x = x if x.is_floating_point() else to_precision("x", x, torch.get_default_dtype())
        if x.dim() < 2 or len(x) < 2:
            raise ValueError(f"x must have shape (N, ...) with at least two rows, got {tuple(x.shape)}")
        y = self._labels(y, len(x)).to(x.device)
        check_count("num_steps", num_steps)
        check_count("noise_samples", noise_samples)
        check_schedule(lr, weight_decay, 0.0)
        for name, value in (("density_weight", density_weight), ("input_noise", input_noise)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
        size = check_batch_size(batch_size, len(x), 128)
        self._build(tuple(x.shape[1:]))
        self.to(device=x.device, dtype=x.dtype)
        self.components.learn(x.flatten(1))
        z = self.components(x.flatten(1))
        self.log_z, self.result = None, None
        if isinstance(noise, str) and noise == "auto" and z.shape[1] > 1:
            components = max(1, min(30, len(z) // 40))
            self.noise = covering_mixture(z, components, ridge=0.05, seed=seed)
        else:
            self.noise = as_noise(noise, z, None, seed)
        if relative(method, options):
            model = RelativeEnergy(_MarginalEnergy(self.network), (z.shape[1],), None)
            relative_to = RelativeTo(method, model, self.noise, noise_samples, beta, options)
            trained: nn.Module = relative_to
            density = relative_to.density
        else:
            density = trained = build_objective(method, _Marginal(self), self.noise, noise_samples, beta, options)
        loop, history = optimise(
            _Hybrid(self, trained, density_weight, input_noise),
            (z, y),
            density=density,
            num_steps=num_steps,
            batch_size=size,
            lr=lr,
            weight_decay=weight_decay,
            average_last=0.0,
            seed=seed,
            checkpoint=checkpoint,
            progress=progress,
        )
        found: LogPartition = importance(self._law(None), self.noise, _CHECK_SAMPLES, seed)
        self.log_z = found.value
        self.result = EnergyFit(history, found, method, loop)
        return self.result

    def _labels(self, y: Any, rows: int) -> Tensor:
        y = to_tensor("y", y)
        if y.shape != (rows,):
            raise ValueError(f"y must have shape ({rows},), one label a row of x; got {tuple(y.shape)}")
        if y.is_floating_point() and bool((y != y.round()).any()):
            raise ValueError("y must be integer labels, it holds fractions")
        if bool(((y < 0) | (y >= self.num_classes)).any()):
            low, high = int(y.min()), int(y.max())
            raise ValueError(f"y must hold labels from 0 to {self.num_classes - 1}, it holds {low} to {high}")
        return y.long()

    # ------------------------------------------------------------------ queries
    @torch.no_grad()
    def predict_proba(self, x: Any) -> Tensor:
        """p(y | x), ``(N, num_classes)``."""
        z = self._components(x)
        probabilities: Tensor = self.network(z).softmax(1)
        return probabilities

    def predict(self, x: Any) -> Tensor:
        """The most probable labels ``(N,)``."""
        return self.predict_proba(x).argmax(1)

    @torch.no_grad()
    def log_prob(self, x: Any, y: Any = None) -> Tensor:
        """Normalised log-density of the inputs' components in nats, ``(N,)``; jointly with labels where given."""
        z = self._components(x)
        found: Tensor = self._law(self.log_z).log_prob(z)
        if y is None:
            return found
        labels = self._labels(y, len(z)).to(z.device)
        log_p: Tensor = self.network(z).log_softmax(1)
        return found + log_p.gather(1, labels[:, None]).squeeze(1)

    def ood_score(self, x: Any) -> Tensor:
        """``-log p(x)`` ``(N,)``: high where the training data were not."""
        return -self.log_prob(x)

    def _components(self, x: Any) -> Tensor:
        if self.log_z is None or self.input_shape is None:
            raise RuntimeError("this query needs a fitted classifier: call fit(x, y) first")
        x = to_tensor("x", x)
        if tuple(x.shape[1:]) != self.input_shape:
            raise ValueError(f"x must have shape (N, {', '.join(map(str, self.input_shape))}), got {tuple(x.shape)}")
        z: Tensor = self.components(x.to(self.components.mean).flatten(1))
        return z

    # ------------------------------------------------------------------ files
    def config(self) -> dict[str, Any]:
        """The constructor's arguments and the shape that the fit saw."""
        return {
            "num_classes": self.num_classes,
            "num_components": self.num_components,
            "hidden": list(self.hidden),
            "seed": self.seed,
            "input_shape": None if self.input_shape is None else list(self.input_shape),
        }

    @classmethod
    def load(cls, path: str | Path, **objects: Any) -> Self:
        """The classifier that ``save`` wrote; ``noise`` over components is given again where it was yours."""
        noise = objects.pop("noise", None)
        model = super().load(path, **objects)
        if noise is not None or (model.log_z is not None and model.noise is None):
            like = model.components.projection
            model.noise = noise_for_load(noise, (like.shape[1],), like, path)
        return model

    def _extra_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if self.noise is None:
            return {}, {}
        tensors, description = noise_for_file(self.noise)
        return tensors, {"log_z": self.log_z, "noise": description}

    def _restore_extra(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        if "noise" in meta:
            self.noise = noise_of_file(meta["noise"], tensors)
            self.log_z = meta["log_z"]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The networks' tensors; the noise has a place of its own in the file."""
        return without_noise(super().state_dict(*args, **kwargs), kwargs.get("prefix", ""))


class _MarginalEnergy(nn.Module):
    """``-logsumexp_y f(z)[y]``."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, z: Tensor) -> Tensor:
        """``(row, column)`` to ``(row,)``."""
        return -torch.logsumexp(self.network(z), 1)


class _Marginal(nn.Module):
    """The Pyro model of the components alone."""

    def __init__(self, classifier: EnergyClassifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, z: Tensor) -> None:
        self.classifier._marginal(z)
