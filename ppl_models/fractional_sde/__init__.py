"""SDEs driven by fractional noise: of series observed with error, and latent ones below an encoder and a decoder."""

from ppl_models.fractional_sde.latent import LatentFractionalSDE
from ppl_models.fractional_sde.model import FractionalSDE
from ppl_models.fractional_sde.results import FractionalSDEResult, LatentResult, PathPrediction

__all__ = ["FractionalSDE", "FractionalSDEResult", "LatentFractionalSDE", "LatentResult", "PathPrediction"]
