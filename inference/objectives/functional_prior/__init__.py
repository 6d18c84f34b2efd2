"""Functional priors: discrepancies between bags of functions, measurement sets, matching objectives."""

from inference.objectives.functional_prior.discrepancy import (
    EnergyDistance,
    GaussianWasserstein,
    SlicedWasserstein,
    gaussian_wasserstein,
)
from inference.objectives.functional_prior.matching import CovarianceMatching, FunctionalPriorMatching
from inference.objectives.functional_prior.measurement import BoxAndData, DataBatches, FixedPoints, Grid
from inference.objectives.functional_prior.wasserstein_dual import Critic, DualEstimate, WassersteinDual

__all__ = [
    "BoxAndData",
    "CovarianceMatching",
    "Critic",
    "DataBatches",
    "DualEstimate",
    "EnergyDistance",
    "FixedPoints",
    "FunctionalPriorMatching",
    "GaussianWasserstein",
    "Grid",
    "SlicedWasserstein",
    "WassersteinDual",
    "gaussian_wasserstein",
]
