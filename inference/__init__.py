"""Engines for any Pyro model: log-densities captured as graphs, samplers, one optimisation loop, predictive, diagnostics."""

from inference._errors import CaptureWarning, CheckpointError, NonFiniteError, SamplerWarning
from inference.kernels import HMC, SGHMC, SGLD, AdaptiveSGHMC, CyclicalSchedule, PolynomialSchedule, ScaleGibbs

__all__ = [
    "HMC",
    "SGHMC",
    "SGLD",
    "AdaptiveSGHMC",
    "CaptureWarning",
    "CheckpointError",
    "CyclicalSchedule",
    "NonFiniteError",
    "PolynomialSchedule",
    "SamplerWarning",
    "ScaleGibbs",
]
