"""Image-based treatment effects: who gains from an intervention, read off images.

Jerzak, Johansson and Daoud, "Image-based Treatment Effect Heterogeneity", CLeaR 2023, PMLR 213:531-552, arXiv
2206.06417.  Start at ``model.py`` and ``mixture.py``; ``docs/models/image_cate.md`` says which equation is in which
file.
"""

from ppl_models.image_cate.covariates import check_covariates
from ppl_models.image_cate.evaluation import evaluate
from ppl_models.image_cate.model import ImageCATE
from ppl_models.image_cate.propensity import aipw_scores
from ppl_models.image_cate.rate import rate

__all__ = ["ImageCATE", "aipw_scores", "check_covariates", "evaluate", "rate"]
