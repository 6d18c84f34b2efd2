"""Unnormalised models by compositional maximum likelihood: densities, classifiers, conditional laws, families."""

from ppl_models.compositional_ebm.distribution import EnergyDistribution
from ppl_models.compositional_ebm.model import EnergyModel

__all__ = ["EnergyDistribution", "EnergyModel"]
