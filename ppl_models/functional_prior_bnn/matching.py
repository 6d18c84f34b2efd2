"""The objective that tunes a network's prior: which target, where functions are compared, and by what."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from inference.objectives.functional_prior import (
    BoxAndData,
    CovarianceMatching,
    DataBatches,
    EnergyDistance,
    FunctionalPriorMatching,
    GaussianWasserstein,
    SlicedWasserstein,
    WassersteinDual,
)
from ppl_models.base import check_inputs
from ppl_models.functional_prior_bnn.covariance import one_hidden_layer_covariance
from ppl_models.functional_prior_bnn.networks import MLP
from ppl_models.functional_prior_bnn.priors import GaussianPrior
from ppl_models.functional_prior_bnn.targets import as_target

if TYPE_CHECKING:
    from ppl_models.functional_prior_bnn.model import FunctionalPriorBNN

__all__ = ["prior_objective"]

_DATA_SHARE = 0.7  # of the measurement points, as in the paper's UCI runs
_DISCREPANCIES: dict[str, Callable[[], Any]] = {
    "energy": EnergyDistance,
    "wasserstein": WassersteinDual,
    "sliced": SlicedWasserstein,
    "gaussian": GaussianWasserstein,
}


def prior_objective(
    bnn: "FunctionalPriorBNN",
    kernel: Any,
    x: Tensor,
    discrepancy: str | Callable[[Tensor, Tensor], Tensor],
    *,
    num_functions: int,
    num_points: int,
    measurement: Any,
) -> nn.Module:
    """The loss of ``bnn.prior``'s hyperparameters.

    Args:
        bnn: the model.
        kernel: gpytorch kernel or ``(x, n) -> (n, M, K)``, on standardised space.
        x: standardised training inputs ``(N, D)``.
        discrepancy: a name, or a callable of two bags ``(n, M, K)``.
        num_functions: functions in a bag.
        num_points: measurement points; a given tensor of points brings its own number.
        measurement: points or sampler of points in the user's units, or None for the default.

    Raises:
        TypeError, ValueError: see ``FunctionalPriorBNN.match_prior``.
    """
    target = as_target(kernel, bnn.network.out_features)
    sampler: Any
    if measurement is None:
        if bnn.image_shape is not None or not bnn.likelihood.has_noise:
            num_points = min(num_points, len(x))
            sampler = DataBatches(x)
        else:
            sampler = (
                BoxAndData(x, data_share=min(_DATA_SHARE, len(x) / num_points))
                if len(x) > 1
                else x.expand(num_points, -1)
            )
    elif callable(measurement):

        def sampler(count: int) -> Tensor:
            return bnn.input_units(bnn._check_x("measurement", measurement(count)))

    else:
        sampler = bnn.input_units(
            check_inputs("measurement", measurement, bnn.network.in_features, bnn.image_shape).to(x)
        )
        num_points = len(sampler)
    if discrepancy == "covariance":
        return CovarianceMatching(
            bnn.prior, _exact_covariance(bnn), _target_covariance(kernel, target), sampler, num_points=num_points
        )
    if isinstance(discrepancy, str):
        if discrepancy not in _DISCREPANCIES:
            raise ValueError(
                f"discrepancy must be one of {[*_DISCREPANCIES, 'covariance']} or a callable, got {discrepancy!r}"
            )
        measure: Any = _DISCREPANCIES[discrepancy]()
    else:
        measure = discrepancy
    return FunctionalPriorMatching(
        bnn.prior,
        target,
        sampler,
        measure,
        num_functions=num_functions,
        num_points=num_points,
        prior_functions=bnn.prior_functions,
    )


def _exact_covariance(bnn: "FunctionalPriorBNN") -> Callable[[Tensor], Tensor]:
    network, prior = bnn.network, bnn.prior
    if (
        not isinstance(network, MLP)
        or len(network.layers) != 2
        or not isinstance(prior, GaussianPrior)
        or prior.log_scale["W1"].ndim
    ):
        raise ValueError(
            "discrepancy = 'covariance' is for an MLP with one hidden layer and a Gaussian prior with prior_scope = "
            "'layer', whose covariance is known in closed form; use 'energy' for any other"
        )

    def covariance(x: Tensor) -> Tensor:
        w1, b1, w2, b2 = (prior.scale(name) for name in ("W1", "b1", "W2", "b2"))
        return one_hidden_layer_covariance(
            x, weight_scale1=w1, bias_scale1=b1, weight_scale2=w2, bias_scale2=b2, activation=network.activation
        )

    return covariance


def _target_covariance(kernel: Any, target: Any) -> Callable[[Tensor], Tensor]:
    covariance = getattr(target, "covariance", getattr(kernel, "covariance", None))
    if covariance is None:
        raise ValueError(
            "discrepancy = 'covariance' needs a target with a covariance function, such as a gpytorch kernel; "
            "use 'energy' for a sampler of functions"
        )

    def mean_over_outputs(x: Tensor) -> Tensor:
        matrix = covariance(x)
        return matrix if matrix.ndim == 2 else matrix.mean(0)

    return mean_over_outputs
