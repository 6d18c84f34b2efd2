"""Bayesian neural networks whose prior is matched to a process over functions.

Tran, Rossi, Milios and Filippone, "All You Need is a Good Functional Prior for Bayesian Deep Learning", JMLR 23(74),
2022, arXiv 2011.12829.  Start at ``model.py``; ``docs/models/functional_prior_bnn.md`` says which equation is in which
file.
"""

from ppl_models.functional_prior_bnn.model import FunctionalPriorBNN
from ppl_models.functional_prior_bnn.posterior import Posterior
from ppl_models.functional_prior_bnn.predictions import Prediction
from ppl_models.functional_prior_bnn.targets import HierarchicalRBF

__all__ = ["FunctionalPriorBNN", "HierarchicalRBF", "Posterior", "Prediction"]
