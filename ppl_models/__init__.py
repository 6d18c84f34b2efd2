"""Research probabilistic models on Pyro: each a Pyro model, a fit, and the queries its users ask."""
