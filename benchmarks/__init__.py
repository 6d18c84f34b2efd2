"""Measurements: the demo against baselines, and the engines against their peers. Results stand in ``RESULTS.md``."""
