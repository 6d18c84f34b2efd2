"""Research probabilistic models on Pyro: each a Pyro model, a fit, and the queries its users ask."""

from ppl_models.compositional_ebm import ConditionalEnergyModel, EnergyClassifier, EnergyModel
from ppl_models.functional_prior_bnn import FunctionalPriorBNN

__all__ = ["ConditionalEnergyModel", "EnergyClassifier", "EnergyModel", "FunctionalPriorBNN"]
