"""SDEs driven by fractional noise: of series observed with error, and latent ones below an encoder and a decoder.

Daems, Opper, Crevecoeur and Birdal, "Variational Inference for SDEs Driven by Fractional Noise", ICLR 2024, arXiv
2310.12975.  Start at ``model.py``; the noise itself, the solvers and filters are in ``sde``;
``docs/models/fractional_sde.md`` says which equation is in which file.
"""

from ppl_models.fractional_sde.latent import LatentFractionalSDE
from ppl_models.fractional_sde.model import FractionalSDE
from ppl_models.fractional_sde.results import FractionalSDEResult, LatentResult, PathPrediction
from ppl_models.fractional_sde.sprites import SpriteDecoder

__all__ = [
    "FractionalSDE",
    "FractionalSDEResult",
    "LatentFractionalSDE",
    "LatentResult",
    "PathPrediction",
    "SpriteDecoder",
]
