"""Monotone deep Boltzmann machines: pairwise models with one mean-field answer to any query.

Feng, Winston and Kolter, "Monotone Deep Boltzmann Machines", TMLR 2023, arXiv 2307.04990.  Start at ``pairwise.py`` and
``model.py``; ``docs/models/monotone_dbm.md`` says which equation is in which file.
"""

from ppl_models.monotone_dbm.calibration import expected_calibration_error
from ppl_models.monotone_dbm.images import ConvMonotoneDBM
from ppl_models.monotone_dbm.model import DeepBoltzmannMachine, MonotoneDBM
from ppl_models.monotone_dbm.prox import prox_softmax

__all__ = ["ConvMonotoneDBM", "DeepBoltzmannMachine", "MonotoneDBM", "expected_calibration_error", "prox_softmax"]
