"""Draws from a network's posterior and what can be asked of them."""

import math
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inference.citation import Citable
from inference.results.brief import brief
from inference.results.export import to_arviz
from ppl_models.functional_prior_bnn.networks import evaluate
from ppl_models.functional_prior_bnn.predictions import Prediction
from ppl_models.functional_prior_bnn.sampling import sampler_class

if TYPE_CHECKING:
    from ppl_models.functional_prior_bnn.model import FunctionalPriorBNN

__all__ = ["Posterior"]

_VALUES_AT_ONCE = 1 << 25  # hidden values held at once: 128 MiB in float32
_RHAT_POINTS = 512
_RHAT_DRAWS = 4  # two in each half of a chain


@brief
class Posterior(Citable):
    """What ``FunctionalPriorBNN.fit`` returns: draws, and the model as it was when they were made.

    Attributes:
        model: a copy of the model, which a later fit or tuning does not touch.
        samples: latent site to ``(chain, draw, *event)``, in the constrained, standardised space of the Pyro model.
        sample_stats: statistic of the sampler to ``(chain, draw)``.
        x_train: training inputs ``(N, D)``, in the user's units.
        y_train: training targets, in the user's units.
        info: how the draws were made: ``method``, ``seconds``, ``num_gradients`` and such, as plain data.
    """

    def __init__(
        self,
        model: "FunctionalPriorBNN",
        samples: Mapping[str, Tensor],
        sample_stats: Mapping[str, Tensor],
        x_train: Tensor,
        y_train: Tensor,
        info: Mapping[str, Any],
    ) -> None:
        self.model = model
        self.samples, self.sample_stats = dict(samples), dict(sample_stats)
        self.x_train, self.y_train = x_train, y_train
        self.info = dict(info)

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply to its tensors what the model applies to its parameters: another device or dtype."""
        self.samples = {n: fn(v) for n, v in self.samples.items()}
        self.sample_stats = {n: fn(v) for n, v in self.sample_stats.items()}
        self.x_train, self.y_train = fn(self.x_train), fn(self.y_train)
        for cached in ("weights", "rhat"):
            vars(self).pop(cached, None)

    @property
    def num_chains(self) -> int:
        """Number of chains (members, of an ensemble)."""
        return next(iter(self.samples.values())).shape[0]

    @property
    def num_samples(self) -> int:
        """Number of draws of each chain."""
        return next(iter(self.samples.values())).shape[1]

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """``W{l}``, ``b{l}`` to ``(chain, draw, *shape)``, whatever the parametrisation that was sampled."""
        grid = (self.num_chains, self.num_samples)
        with torch.no_grad():
            flat = self.model.prior.draw(
                math.prod(grid), {name: value.flatten(0, 1) for name, value in self.samples.items()}
            )
        return {name: value.unflatten(0, grid) for name, value in flat.items()}

    def predict(self, x: Any) -> Prediction:
        """Posterior predictive law at ``x`` ``(N, D)`` (or images), in the user's units.

        Raises:
            TypeError, ValueError: x is not numeric, not finite, or has another number of columns than the training
                inputs.
        """
        return self._predict(self.model._check_x("x", x))

    @torch.no_grad()
    def _predict(self, x: Tensor) -> Prediction:
        network = self.model.network
        x = self.model.input_units(x)
        chunk = max(1, _VALUES_AT_ONCE // (len(x) * network.widest))
        return Prediction(
            functions=evaluate(network, self.weights, x, chunk),
            noise_variance=self.model._noise_of(self.samples),
            likelihood=self.model.likelihood,
            target_units=self.model.target_units,
        )

    @cached_property
    def rhat(self) -> Tensor:
        """Rank-normalised split R-hat of the function at training inputs, ``(M, K)``, M at most 512, spread over the
        data.
        """
        step = math.ceil(len(self.x_train) / _RHAT_POINTS)
        return self._predict(self.x_train[::step]).rhat

    def summary(self) -> str:
        """One line: how the draws were made and whether the chains agree."""
        text = f"{self.info['method']}: {self.num_chains} chains x {self.num_samples} draws"
        if "seconds" in self.info:
            text += f" in {self.info['seconds']:.3g} s"
        if self.num_samples >= _RHAT_DRAWS and bool(torch.isfinite(rhat := self.rhat).all()):
            text += f"; R-hat of f at training inputs: mean {rhat.mean().item():.3f}, largest {rhat.max().item():.3f}"
            if rhat.mean() > 1.05:
                text += " (above 1.05: the chains have not mixed; raise thin or warmup_steps)"
        return text

    def to_arviz(self, pointwise: bool = True, seed: int = 0) -> Any:
        """ArviZ object with the groups posterior, sample_stats and, at the training data, posterior_predictive,
        log_likelihood and observed_data.

        The posterior holds the weights, the variances if they are sampled, and the functions ``f``; y and f are in the
        user's units (f in logits in classification). Look at ``f`` for convergence: weights have symmetries.

        Args:
            pointwise: whether to evaluate functions and densities at the training data, which takes memory in
                proportion to ``chain x draw x N x K``.
            seed: of the posterior predictive draws.
        """
        posterior = {
            **self.weights,
            **{n: v for n, v in self.samples.items() if n not in self.weights and not n.startswith(("eps_", "z"))},
        }
        dims: dict[str, list[str]] = {}
        for number, layer in enumerate(self.model.network.layers, 1):
            dense = [f"in{number}", f"out{number}"]
            names = {
                f"W{number}": dense
                if len(layer.weight) == 2
                else [f"out{number}", f"in{number}", f"row{number}", f"column{number}"]
            }
            names[f"b{number}"] = [f"out{number}"]
            for name, axes in names.items():
                for variable in (name, f"var_{name}"):
                    if variable in posterior and posterior[variable].ndim > 2:
                        dims[variable] = axes
        stats = dict(self.sample_stats)
        if "potential_energy" in stats:
            stats["lp"] = -stats.pop("potential_energy")
        groups: dict[str, Any] = {}
        if pointwise:
            prediction = self._predict(self.x_train)
            posterior["f"] = prediction.functions if prediction.noise_variance is None else prediction.samples
            dims |= {"f": ["point", "output"], "y": ["point"] if self.y_train.ndim == 1 else ["point", "output"]}
            groups["posterior_predictive"] = {"y": prediction.sample(seed)}
            groups["log_likelihood"] = {"y": prediction.pointwise_log_likelihood(self.y_train)}
            groups["observed_data"] = {"y": self.y_train}
        return to_arviz(posterior, sample_stats=stats or None, dims=dims, attrs=self.info, **groups)

    def _used(self) -> tuple[object, ...]:
        kernel = sampler_class(self.info["method"])
        return (self.model,) if kernel is None else (self.model, kernel)

    def save(self, path: str | Path) -> None:
        """Write model, draws and training data to one file; ``FunctionalPriorBNN.load`` reads it.

        Raises:
            CheckpointError: the file cannot be written. What stood there before is untouched.
        """
        self.model.save(path)
