"""Markov kernels: one file each, one contract (``base.Kernel``), all chains in one program."""

from inference.kernels.adaptive_sghmc import AdaptiveSGHMC
from inference.kernels.adjusted_mclmc import AdjustedMCLMC
from inference.kernels.base import Kernel, Noise, StepInputs
from inference.kernels.chees import ChEES
from inference.kernels.discrete_gibbs import DiscreteGibbs
from inference.kernels.gibbs import ScaleGibbs
from inference.kernels.hmc import HMC
from inference.kernels.mclmc import MCLMC
from inference.kernels.meads import MEADS
from inference.kernels.nuts import NUTS
from inference.kernels.parallel_tempering import ParallelTempering
from inference.kernels.schedules import CyclicalSchedule, PolynomialSchedule
from inference.kernels.sghmc import SGHMC
from inference.kernels.sgld import SGLD

__all__ = [
    "HMC",
    "MCLMC",
    "MEADS",
    "NUTS",
    "SGHMC",
    "SGLD",
    "AdaptiveSGHMC",
    "AdjustedMCLMC",
    "ChEES",
    "CyclicalSchedule",
    "DiscreteGibbs",
    "Kernel",
    "Noise",
    "ParallelTempering",
    "PolynomialSchedule",
    "ScaleGibbs",
    "StepInputs",
]
