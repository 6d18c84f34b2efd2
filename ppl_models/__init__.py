"""Research probabilistic models on Pyro: each a Pyro model, a fit, and the queries its users ask."""

from ppl_models.compositional_ebm import ConditionalEnergyModel, EnergyClassifier, EnergyModel
from ppl_models.fractional_sde import FractionalSDE, LatentFractionalSDE
from ppl_models.functional_prior_bnn import FunctionalPriorBNN
from ppl_models.image_cate import ImageCATE
from ppl_models.marginalization_model import MarginalizationModel
from ppl_models.monotone_dbm import ConvMonotoneDBM, MonotoneDBM

__all__ = [
    "ConditionalEnergyModel",
    "ConvMonotoneDBM",
    "EnergyClassifier",
    "EnergyModel",
    "FractionalSDE",
    "FunctionalPriorBNN",
    "ImageCATE",
    "LatentFractionalSDE",
    "MarginalizationModel",
    "MonotoneDBM",
]

__version__ = "0.1.0"
