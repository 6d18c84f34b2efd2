"""Generative marginalization models (Liu, Ramadge and Adams, ICML 2024)."""

from ppl_models.marginalization_model.distribution import MarginalizationDistribution
from ppl_models.marginalization_model.lattice import LatticeIsing
from ppl_models.marginalization_model.model import MarginalizationModel
from ppl_models.marginalization_model.results import (
    AutoregressiveLogProb,
    ConsistencyReport,
    Evaluation,
    MarginalEstimate,
    MarginalizationResult,
)

__all__ = [
    "AutoregressiveLogProb",
    "ConsistencyReport",
    "Evaluation",
    "LatticeIsing",
    "MarginalEstimate",
    "MarginalizationDistribution",
    "MarginalizationModel",
    "MarginalizationResult",
]
