"""Image-based treatment effects: who gains from an intervention, read off images."""

from ppl_models.image_cate.covariates import check_covariates
from ppl_models.image_cate.evaluation import evaluate
from ppl_models.image_cate.model import ImageCATE
from ppl_models.image_cate.propensity import aipw_scores
from ppl_models.image_cate.rate import rate

__all__ = ["ImageCATE", "aipw_scores", "check_covariates", "evaluate", "rate"]
