"""Generative marginalization models: log p of any subset of discrete variables in one network pass.

Liu, Ramadge and Adams, "Generative Marginalization Models", ICML 2024, PMLR 235:31773-31807, arXiv 2310.12920.  Start
at ``model.py``; ``docs/models/marginalization_model.md`` says which equation is in which file.
"""

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
