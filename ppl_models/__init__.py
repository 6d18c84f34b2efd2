"""Research probabilistic models on Pyro: each a Pyro model, a fit, and the queries its users ask."""

from ppl_models.fractional_sde import FractionalSDE, LatentFractionalSDE
from ppl_models.functional_prior_bnn import FunctionalPriorBNN
from ppl_models.marginalization_model import MarginalizationModel
from ppl_models.monotone_dbm import ConvMonotoneDBM, MonotoneDBM

__all__ = [
    "ConvMonotoneDBM",
    "FractionalSDE",
    "FunctionalPriorBNN",
    "LatentFractionalSDE",
    "MarginalizationModel",
    "MonotoneDBM",
]
