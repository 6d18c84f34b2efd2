"""Engines for any Pyro model: captured log-densities, samplers, one optimisation loop, predictive, diagnostics."""
