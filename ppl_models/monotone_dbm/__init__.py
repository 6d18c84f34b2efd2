"""Monotone deep Boltzmann machines: pairwise models with one mean-field answer to any query."""

from ppl_models.monotone_dbm.calibration import expected_calibration_error
from ppl_models.monotone_dbm.images import ConvMonotoneDBM
from ppl_models.monotone_dbm.model import DeepBoltzmannMachine, MonotoneDBM
from ppl_models.monotone_dbm.prox import prox_softmax

__all__ = ["ConvMonotoneDBM", "DeepBoltzmannMachine", "MonotoneDBM", "expected_calibration_error", "prox_softmax"]
