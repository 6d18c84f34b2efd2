"""Bayesian neural networks whose prior is matched to a process over functions (Tran et al., JMLR 23(74), 2022)."""

from ppl_models.functional_prior_bnn.model import FunctionalPriorBNN
from ppl_models.functional_prior_bnn.posterior import Posterior
from ppl_models.functional_prior_bnn.predictions import Prediction
from ppl_models.functional_prior_bnn.targets import HierarchicalRBF

__all__ = ["FunctionalPriorBNN", "HierarchicalRBF", "Posterior", "Prediction"]
