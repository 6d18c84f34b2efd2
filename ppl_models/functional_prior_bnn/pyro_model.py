"""The network as a Pyro model in standardised space, and the units of its data."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import pyro
import pyro.distributions as dist
from torch import Tensor

from inference._checks import positive
from inference.citation import Paper
from ppl_models.base import Model, Standardiser, check_inputs
from ppl_models.functional_prior_bnn.likelihoods import Likelihood, build_likelihood
from ppl_models.functional_prior_bnn.networks import MLP, Network, build_network, evaluate
from ppl_models.functional_prior_bnn.priors import FlowPrior, GaussianPrior, HierarchicalPrior, WeightPrior

if TYPE_CHECKING:
    from ppl_models.functional_prior_bnn.posterior import Posterior

__all__ = ["BayesianNetwork"]

# Of the learned noise variance, log-normal: its median is the paper's fixed value.
_NOISE_LOCATION, _NOISE_SCALE = math.log(0.1), 1.0
_MOST_RELEVANCE = 10.0  # beyond, exp(relevance z) leaves float32's range within the normal's


class BayesianNetwork(Model):
    """A neural network with a prior on its weights; for arguments and sites see ``FunctionalPriorBNN``."""

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "article",
            "tran2022functional",
            author="Tran, Ba-Hien and Rossi, Simone and Milios, Dimitrios and Filippone, Maurizio",
            title="All You Need is a Good Functional Prior for {B}ayesian Deep Learning",
            journal="Journal of Machine Learning Research",
            volume=23,
            number=74,
            pages="1--56",
            year=2022,
        ),
    )

    def __init__(
        self,
        in_features: int | None = None,
        out_features: int = 1,
        hidden: Sequence[int] = (100,),
        activation: str | None = None,
        prior: str = "gaussian",
        likelihood: str = "gaussian",
        noise_variance: float | str | None = None,
        *,
        prior_scope: str = "layer",
        parametrisation: str | None = None,
        relevance: float | None = None,
        network: str = "mlp",
        image_shape: Sequence[int] | None = None,
        standardise: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        built = build_network(
            network,
            in_features=in_features,
            out_features=out_features,
            hidden=hidden,
            activation=activation,
            image_shape=image_shape,
        )
        self.likelihood: Likelihood
        self.noise_variance: Any  # a number, "learned", or None in classification
        self.likelihood, self.noise_variance = build_likelihood(likelihood, out_features, noise_variance)
        self._config = {
            "in_features": built.in_features,
            "out_features": out_features,
            "hidden": list(hidden),
            "activation": activation,
            "prior": prior,
            "likelihood": likelihood,
            "noise_variance": noise_variance,
            "prior_scope": prior_scope,
            "parametrisation": parametrisation,
            "relevance": relevance,
            "network": network,
            "image_shape": None if image_shape is None else list(image_shape),
            "standardise": standardise,
            "seed": seed,
        }
        self.image_shape = None if image_shape is None else tuple(image_shape)
        self.standardised = standardise
        pixels = math.prod(self.image_shape[1:]) if self.image_shape else 1
        # Under other names than the properties below: Pyro enters a plain submodule that is read inside a model call
        # into its global parameter store.
        self.add_module("_network", built)
        self.add_module("_prior", _build_prior(built, prior, prior_scope, parametrisation, relevance, seed))
        self.add_module("_input_units", Standardiser(built.in_features, pixels))
        self.add_module("_target_units", Standardiser(out_features))
        self.result: Posterior | None = None

    # ------------------------------------------------------------------ parts
    @property
    def network(self) -> Network:
        """The network as a function of its weights."""
        return self._modules["_network"]  # type: ignore[return-value]

    @property
    def prior(self) -> WeightPrior:
        """The weight prior."""
        return self._modules["_prior"]  # type: ignore[return-value]

    @property
    def input_units(self) -> Standardiser:
        """Standardisation of x."""
        return self._modules["_input_units"]  # type: ignore[return-value]

    @property
    def target_units(self) -> Standardiser:
        """Standardisation of y."""
        return self._modules["_target_units"]  # type: ignore[return-value]

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return dict(self._config)

    # ------------------------------------------------------------------ the Pyro model
    def forward(self, x: Tensor, y: Tensor | None = None, batch_size: int | None = None) -> Tensor:
        """The Pyro model, in standardised space.

        Args:
            x: standardised inputs ``(N, D)``.
            y: standardised targets ``(N, K)``, or labels ``(N,)`` if categorical; None leaves ``obs`` free.
            batch_size: rows in the subsampled plate ``data``, whose indices Pyro (or the engine) draws; all rows by
                default.

        Returns:
            Function values at the rows of the plate, ``(batch, K)``.
        """
        weights = self.prior()
        noise_variance = self._noise()
        with pyro.plate("data", x.shape[0], subsample_size=batch_size, dim=-1, device=x.device) as rows:  # type: ignore[arg-type]
            subsampled = batch_size is not None
            f = evaluate(self.network, weights, x[rows] if subsampled else x)
            # Under an outer plate, such as a vectorised ELBO's particles, the batch shape ends with this plate's empty
            # dimension.
            if f.ndim > 2:
                f = f.squeeze(-3)
            target = y[rows] if y is not None and subsampled else y
            pyro.sample("obs", self.likelihood.distribution(f, noise_variance), obs=target)
        return f

    def _noise(self) -> Tensor | None:
        """The noise variance, with a last dimension for the outputs."""
        shift = self.target_units.shift
        if self.noise_variance is None:
            return None
        if self.noise_variance == "learned":
            law = dist.LogNormal(shift.new_full((), _NOISE_LOCATION), shift.new_full((), _NOISE_SCALE))
            return pyro.sample("noise_variance", law).unsqueeze(-1)
        return shift.new_full((1,), self.noise_variance)

    def _noise_of(self, samples: Mapping[str, Tensor]) -> Tensor | None:
        """Noise variance of each draw, broadcasting against ``(chain, draw, N, K)``."""
        if self.noise_variance == "learned":
            return samples["noise_variance"][..., None, None]
        return (
            None if self.noise_variance is None else self.target_units.shift.new_full((1, 1, 1, 1), self.noise_variance)
        )

    def standardise(self, x: Any, y: Any = None) -> tuple[Tensor, Tensor | None]:
        """The user's x, and y, as the Pyro model takes them.

        Raises:
            TypeError, ValueError: as in ``fit``.
        """
        x = self._check_x("x", x)
        if y is not None:
            y = self.likelihood.check(y, len(x), self.network.out_features, x)
            y = self.target_units(y) if self.likelihood.has_noise else y
        return self.input_units(x), y

    def _check_x(self, name: str, x: Any) -> Tensor:
        return check_inputs(name, x, self.network.in_features, self.image_shape).to(self.target_units.shift)

    def _follow(self, x: Any, name: str = "x_train") -> None:
        """Take on dtype and device of the data."""
        x = check_inputs(name, x, self.network.in_features, self.image_shape)
        self.to(dtype=x.dtype, device=x.device)

    def prior_functions(self, x: Tensor, n: int) -> Tensor:
        """``n`` independent functions at standardised ``x`` ``(N, D)``, ``(n, N, K)``, differentiable in the prior's
        hyperparameters; from the global generator.
        """
        return evaluate(self.network, self.prior.draw(n), x)

    def training_data(self, x_train: Any, y_train: Any) -> tuple[Tensor, Tensor]:
        """Check training data, learn their units, and give them standardised, as ``fit`` does before it samples.

        Raises:
            TypeError, ValueError: as in ``fit``.
        """
        self._follow(x_train)
        x = self._check_x("x_train", x_train)
        return self._learn_units(x, self.likelihood.check(y_train, len(x), self.network.out_features, x))

    def _learn_units(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Standardised training data."""
        if self.standardised:
            self.input_units.learn(x)
            if self.likelihood.has_noise:
                self.target_units.learn(y)
        return self.input_units(x), self.target_units(y) if self.likelihood.has_noise else y


def _build_prior(
    network: Network, prior: str, scope: str, parametrisation: str | None, relevance: float | None, seed: int
) -> WeightPrior:
    if prior not in ("gaussian", "hierarchical", "flow"):
        raise ValueError(f"prior must be 'gaussian', 'hierarchical' or 'flow', got {prior!r}")
    if scope not in ("layer", "parameter"):
        raise ValueError(f"prior_scope must be 'layer' or 'parameter', got {scope!r}")
    if parametrisation not in (None, "centred", "noncentred"):
        raise ValueError(f"parametrisation must be 'centred' or 'noncentred', got {parametrisation!r}")
    if relevance is not None:
        relevance = positive("relevance", relevance, upper=_MOST_RELEVANCE)
        if not isinstance(network, MLP):
            raise ValueError("relevance is for the columns of an MLP's x, not for pixels")
    noncentred = parametrisation == "noncentred" or (parametrisation is None and prior != "hierarchical")
    if prior == "flow":
        if scope == "parameter":
            raise ValueError(
                "prior_scope = 'parameter' has no meaning for a flow, which has psi for every weight already"
            )
        return FlowPrior(network, noncentred, seed=seed, relevance=relevance)
    return {"gaussian": GaussianPrior, "hierarchical": HierarchicalPrior}[prior](
        network, scope == "parameter", noncentred, relevance
    )
