"""Measurements: the demo against baselines, and the engines against their peers.

``run`` runs the comparisons, ``report`` writes ``RESULTS.md``.
"""
