"""From a Pyro model to a log-density and gradient over unconstrained space, recorded as a graph and batched over
chains.
"""

from inference.potential.chain_arguments import ChainArguments, InDims
from inference.potential.graph import CaptureError, Program, trace
from inference.potential.log_density import LogDensity, MinibatchPlate, Site
from inference.potential.potential import Potential, PotentialFunction
from inference.potential.tempered import TemperedFunction, TemperedPath, TemperedPotential, tempered_path

__all__ = [
    "CaptureError",
    "ChainArguments",
    "InDims",
    "LogDensity",
    "MinibatchPlate",
    "Potential",
    "PotentialFunction",
    "Program",
    "Site",
    "TemperedFunction",
    "TemperedPath",
    "TemperedPotential",
    "tempered_path",
    "trace",
]
