"""Engines for any Pyro model: log-densities captured as graphs, samplers, one optimisation loop, predictive, diagnostics."""
