"""Paths: noise processes, exact samplers, solvers and path measures. Knows torch, torchsde and numpy, and no Pyro."""

from sde._checks import NoiseWarning, PathError
from sde.control import (
    GaussianStepGuide,
    LinearControl,
    LinearPlusResidual,
    frozen_control,
    information_control,
    step_guide,
)
from sde.fbm import (
    FractionalBrownianMotion,
    FractionalOrnsteinUhlenbeck,
    fractional_gaussian_noise,
    increment_autocovariance,
    motion_covariance,
    ornstein_uhlenbeck_covariance,
)
from sde.grids import (
    TimeGrid,
    geometric_speeds,
    graded_grid,
    horizon_speeds,
    observation_grid,
    snap_times,
    uniform_grid,
)
from sde.hurst import HurstEstimate, hurst_estimate
from sde.kalman import (
    Filtered,
    Information,
    Smoothed,
    backward_information,
    check_observations,
    kalman_filter,
    kalman_smoother,
)
from sde.linear import LinearSDE, Transitions
from sde.markov_fbm import ErrorReport, MarkovFractionalBrownianMotion, MultifractionalMotion
from sde.noise import BrownianMotion, MarkovNoise, MixedNoise
from sde.ornstein_uhlenbeck import Discretisation, discretise, stationary_covariance, transition_covariance
from sde.path_measure import effective_sample_size, evidence_bound, importance_bound, path_kl, path_log_ratio
from sde.solvers import Path, Step, coarsen, solve
from sde.step_network import StepNetwork
from sde.torchsde_backend import AugmentedSDE, solve_torchsde

__all__ = [
    "AugmentedSDE",
    "BrownianMotion",
    "Discretisation",
    "ErrorReport",
    "Filtered",
    "FractionalBrownianMotion",
    "FractionalOrnsteinUhlenbeck",
    "GaussianStepGuide",
    "HurstEstimate",
    "Information",
    "LinearControl",
    "LinearPlusResidual",
    "LinearSDE",
    "MarkovFractionalBrownianMotion",
    "MarkovNoise",
    "MixedNoise",
    "MultifractionalMotion",
    "NoiseWarning",
    "Path",
    "PathError",
    "Smoothed",
    "Step",
    "StepNetwork",
    "TimeGrid",
    "Transitions",
    "backward_information",
    "check_observations",
    "coarsen",
    "discretise",
    "effective_sample_size",
    "evidence_bound",
    "fractional_gaussian_noise",
    "frozen_control",
    "geometric_speeds",
    "graded_grid",
    "horizon_speeds",
    "hurst_estimate",
    "importance_bound",
    "increment_autocovariance",
    "information_control",
    "kalman_filter",
    "kalman_smoother",
    "motion_covariance",
    "observation_grid",
    "ornstein_uhlenbeck_covariance",
    "path_kl",
    "path_log_ratio",
    "snap_times",
    "solve",
    "solve_torchsde",
    "stationary_covariance",
    "step_guide",
    "transition_covariance",
    "uniform_grid",
]
