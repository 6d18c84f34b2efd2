"""Deep ensembles, the baseline of Lakshminarayanan, Pritzel and Blundell (NeurIPS 2017, arXiv 1612.01474).

Networks of the same kind, trained from different starts by maximum likelihood.  In regression each has a head for the
logarithm of the noise variance as well, and the prediction is the mean and variance of the mixture; in classification
it is the mean of the softmax outputs.  All members are trained in one program.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inference._checks import nonnegative
from inference.fit import FitResult, fit
from inference.runtime.generators import scoped_seed
from ppl_models.base import Standardiser, check_batch_size, check_count, check_inputs
from ppl_models.functional_prior_bnn.likelihoods import Likelihood, build_likelihood
from ppl_models.functional_prior_bnn.networks import Network, build_network, evaluate
from ppl_models.functional_prior_bnn.predictions import Prediction

__all__ = ["DeepEnsemble"]

_LEAST_VARIANCE = 1e-6  # of standardised targets, as in the paper


class DeepEnsemble:
    """Ensemble of networks trained by maximum likelihood.

    Args:
        in_features, out_features, hidden, activation, network, image_shape: as in ``FunctionalPriorBNN``.
        likelihood: ``"gaussian"``, ``"laplace"``, ``"bernoulli"`` or ``"categorical"``.
        num_members: number of networks.

    Raises:
        TypeError, ValueError: an argument that is unknown or out of range.
    """

    def __init__(
        self,
        in_features: int | None = None,
        out_features: int = 1,
        hidden: Sequence[int] = (100,),
        activation: str | None = None,
        likelihood: str = "gaussian",
        num_members: int = 5,
        *,
        network: str = "mlp",
        image_shape: Sequence[int] | None = None,
    ) -> None:
        self.num_members = check_count("num_members", num_members)
        self.likelihood, _ = build_likelihood(likelihood, out_features, None)
        self.out_features = out_features
        heads = 2 * out_features if self.likelihood.has_noise else out_features
        self.network = build_network(
            network,
            in_features=in_features,
            out_features=heads,
            hidden=hidden,
            activation=activation,
            image_shape=image_shape,
        )
        self.image_shape = None if image_shape is None else tuple(image_shape)
        pixels = math.prod(self.image_shape[1:]) if self.image_shape else 1
        self.input_units = Standardiser(self.network.in_features, pixels)
        self.target_units = Standardiser(out_features)
        self._members: _Members | None = None

    def fit(
        self,
        x_train: Any,
        y_train: Any,
        num_steps: int = 2000,
        batch_size: int | str | None = "auto",
        lr: float = 0.01,
        seed: int = 0,
        *,
        weight_decay: float = 0.0,
        progress: bool | Callable[[dict[str, Any]], None] = True,
    ) -> FitResult:
        """Train all members with Adam.

        Args:
            x_train, y_train: as in ``FunctionalPriorBNN.fit``, in the user's units.
            num_steps: optimisation steps.
            batch_size: rows a step, shared by the members, which differ in their starts; None for all,
                ``"auto"`` for 32 or, where there are fewer, all.
            lr: learning rate.
            seed: same seed, same result to the bit.
            weight_decay: Adam's L2 penalty on each member, as if it were trained alone.
            progress: progress bar, or a function that receives its fields.

        Raises:
            TypeError, ValueError: bad data or settings.
            NonFiniteError: the loss became non-finite.
        """
        x = check_inputs("x_train", x_train, self.network.in_features, self.image_shape)
        y = self.likelihood.check(y_train, len(x), self.out_features, x)
        size = check_batch_size(min(32, len(x)) if batch_size == "auto" else batch_size, len(x))
        # The loss is a mean over members: it divides the gradient of each by their number, so the penalty's is too.
        decay = nonnegative("weight_decay", weight_decay) / self.num_members
        for units in (self.input_units, self.target_units):
            units.to(dtype=x.dtype, device=x.device)
        self.input_units.learn(x)
        if self.likelihood.has_noise:
            self.target_units.learn(y)
            y = self.target_units(y)
        members = _Members(self.network, self.likelihood, self.num_members, seed, like=x)
        history = fit(
            members,
            (self.input_units(x), y),
            num_steps=num_steps,
            batch_size=size,
            optimizer=lambda parameters: torch.optim.Adam(parameters, lr=lr, weight_decay=decay),
            seed=seed,
            progress=progress,
        )
        self._members = members
        return history

    @torch.no_grad()
    def predict(self, x: Any) -> Prediction:
        """Predictive law at ``x``, the members standing for chains of one draw.

        Raises:
            RuntimeError: before ``fit``.
            TypeError, ValueError: bad x.
        """
        if self._members is None:
            raise RuntimeError("predict needs trained members: call fit(x_train, y_train) first")
        x = check_inputs("x", x, self.network.in_features, self.image_shape).to(self.input_units.shift)
        f, noise = self._members.heads(self.input_units(x))
        return Prediction(
            f.unsqueeze(1), None if noise is None else noise.unsqueeze(1), self.likelihood, self.target_units
        )


class _Members(nn.Module):
    """Weights of all members and their mean loss, the members' negative log-likelihood a row."""

    def __init__(self, network: Network, likelihood: Likelihood, num_members: int, seed: int, like: Tensor) -> None:
        super().__init__()
        self.network, self.likelihood = network, likelihood
        with scoped_seed(seed, like.device):
            # NTK scaling is in the network, so unit variances are the usual 1 / fan-in.
            start = {
                name: torch.randn(num_members, *shape, dtype=like.dtype, device=like.device)
                * float(name.startswith("W"))
                for name, shape in network.shapes.items()
            }
        self.weights = nn.ParameterDict({name: nn.Parameter(value) for name, value in start.items()})

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Function values ``(member, N, K)`` and noise variances of the same shape, None in classification."""
        f = evaluate(self.network, self.weights, x)  # type: ignore[arg-type]
        if not self.likelihood.has_noise:
            return f, None
        mean, raw = f.chunk(2, -1)
        return mean, F.softplus(raw) + _LEAST_VARIANCE

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Scalar loss."""
        f, noise = self.heads(x)
        return -self.likelihood.distribution(f, noise).log_prob(y).mean()
