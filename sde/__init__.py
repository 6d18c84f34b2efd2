"""Paths: noise processes, exact samplers, solvers and path measures. Knows torch, torchsde and numpy, and no Pyro."""
