"""Unnormalised models by compositional maximum likelihood: densities, classifiers, conditional laws, families."""

from ppl_models.compositional_ebm.classifier import EnergyClassifier
from ppl_models.compositional_ebm.conditional import ConditionalEnergyModel
from ppl_models.compositional_ebm.distribution import EnergyDistribution
from ppl_models.compositional_ebm.families import (
    Boltzmann,
    ConwayMaxwellPoisson,
    ExponentialFamily,
    TruncatedNormal,
    VonMises,
)
from ppl_models.compositional_ebm.latent import LatentEnergyPrior
from ppl_models.compositional_ebm.model import EnergyModel
from ppl_models.compositional_ebm.posterior import EnergyPosterior, sample_posterior

__all__ = [
    "Boltzmann",
    "ConditionalEnergyModel",
    "ConwayMaxwellPoisson",
    "EnergyClassifier",
    "EnergyDistribution",
    "EnergyModel",
    "EnergyPosterior",
    "ExponentialFamily",
    "LatentEnergyPrior",
    "TruncatedNormal",
    "VonMises",
    "sample_posterior",
]
