"""Calibrations of the models with a proper prior, a file each; see ``benchmarks.calibration``."""
