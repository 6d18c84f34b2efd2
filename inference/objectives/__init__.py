"""Objectives: modules whose call returns a scalar loss and whose parameters ``inference.fit`` learns."""
