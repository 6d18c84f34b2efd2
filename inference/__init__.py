"""Engines for any Pyro model: log-densities captured as graphs, samplers, one optimisation loop, predictive,
diagnostics.
"""

from inference._errors import CaptureWarning, CheckpointError, NonFiniteError, SamplerWarning
from inference.fit import FitResult, fit
from inference.kernels import HMC, NUTS, SGHMC, SGLD, AdaptiveSGHMC, CyclicalSchedule, PolynomialSchedule, ScaleGibbs
from inference.mcmc import MCMC
from inference.results.diagnostics import summary
from inference.results.export import to_arviz
from inference.results.predictive import Predictive, log_likelihood
from inference.runtime.stopping import Stop
from inference.streaming import StreamingMCMC

__all__ = [
    "HMC",
    "MCMC",
    "NUTS",
    "SGHMC",
    "SGLD",
    "AdaptiveSGHMC",
    "CaptureWarning",
    "CheckpointError",
    "CyclicalSchedule",
    "FitResult",
    "NonFiniteError",
    "PolynomialSchedule",
    "Predictive",
    "SamplerWarning",
    "ScaleGibbs",
    "Stop",
    "StreamingMCMC",
    "fit",
    "log_likelihood",
    "summary",
    "to_arviz",
]
