"""Engines for any Pyro model: log-densities captured as graphs, samplers, one optimisation loop, evidence, predictive,
diagnostics.
"""

from inference._errors import (
    CaptureWarning,
    CheckpointError,
    CollapseError,
    CurvatureError,
    DependentDataError,
    NonFiniteError,
    RankError,
    SamplerWarning,
)
from inference.citation import cite
from inference.discrete_ais import discrete_ais
from inference.fit import FitResult, fit
from inference.fixed_point import FixedPoint, fixed_point, implicit_gradient
from inference.kernels import (
    HMC,
    MCLMC,
    MEADS,
    NUTS,
    SGHMC,
    SGLD,
    AdaptiveSGHMC,
    AdjustedMCLMC,
    ChEES,
    CyclicalSchedule,
    DiscreteGibbs,
    ParallelTempering,
    PolynomialSchedule,
    ScaleGibbs,
)
from inference.laplace import ImportanceEstimate, Laplace, LaplaceResult
from inference.log_partition import ais, ais_sandwich, annealed_log_weights, bridge_sampling, importance
from inference.mcmc import MCMC
from inference.model_check import ModelCheck, check_model
from inference.objectives.elbo import ELBO, BoundEstimate
from inference.objectives.unnormalised import CompositionalLikelihood
from inference.potential import TemperedFunction, TemperedPotential
from inference.results.diagnostics import rhat_nested, summary
from inference.results.evidence import LogPartition
from inference.results.export import to_arviz
from inference.results.predictive import Predictive, log_likelihood
from inference.runtime.stopping import Stop
from inference.smc import SMC
from inference.streaming import StreamingMCMC
from inference.sweep import sweep

__all__ = [
    "ELBO",
    "HMC",
    "MCLMC",
    "MCMC",
    "MEADS",
    "NUTS",
    "SGHMC",
    "SGLD",
    "SMC",
    "AdaptiveSGHMC",
    "AdjustedMCLMC",
    "BoundEstimate",
    "CaptureWarning",
    "ChEES",
    "CheckpointError",
    "CollapseError",
    "CompositionalLikelihood",
    "CurvatureError",
    "CyclicalSchedule",
    "DependentDataError",
    "DiscreteGibbs",
    "FitResult",
    "FixedPoint",
    "ImportanceEstimate",
    "Laplace",
    "LaplaceResult",
    "LogPartition",
    "ModelCheck",
    "NonFiniteError",
    "ParallelTempering",
    "PolynomialSchedule",
    "Predictive",
    "RankError",
    "SamplerWarning",
    "ScaleGibbs",
    "Stop",
    "StreamingMCMC",
    "TemperedFunction",
    "TemperedPotential",
    "ais",
    "ais_sandwich",
    "annealed_log_weights",
    "bridge_sampling",
    "check_model",
    "cite",
    "discrete_ais",
    "fit",
    "fixed_point",
    "implicit_gradient",
    "importance",
    "log_likelihood",
    "rhat_nested",
    "summary",
    "sweep",
    "to_arviz",
]
