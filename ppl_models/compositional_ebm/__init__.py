"""Unnormalised models by compositional maximum likelihood: densities, classifiers, conditional laws, families.

Jiang, Qin, Wu, Chen, Yang and Zhang, "Learning Unnormalized Statistical Models via Compositional Optimization", ICML
2023, arXiv 2306.07485.  Start at ``model.py``; ``docs/models/compositional_ebm.md`` says which equation is in which
file.
"""

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
