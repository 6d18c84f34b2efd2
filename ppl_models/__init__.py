"""Research probabilistic models on Pyro: each a Pyro model, a fit, and the queries its users ask."""

from ppl_models.functional_prior_bnn import FunctionalPriorBNN
from ppl_models.image_cate import ImageCATE

__all__ = ["FunctionalPriorBNN", "ImageCATE"]
