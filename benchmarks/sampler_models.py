"""Four posteriors for the comparison of samplers, each written once for Pyro and once for numpyro."""

from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["MODELS", "for_numpyro", "for_pyro"]

Model = Callable[..., None]
EFFECT = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=np.float32)
ERROR = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=np.float32)
HIDDEN = 10
MODELS = ("eight schools", "logistic 1000x10", "radon", "small network")


def data(name: str) -> tuple[np.ndarray, ...]:
    """The arguments of the model: simulated, but for the eight schools (Rubin 1981)."""
    rng = np.random.default_rng(1)
    if name == "eight schools":
        return EFFECT, ERROR
    if name == "logistic 1000x10":
        x = rng.standard_normal((1000, 10)).astype(np.float32)
        y = rng.random(1000) < 1 / (1 + np.exp(-x @ rng.standard_normal(10)))
        return x, y.astype(np.float32)
    if name == "radon":  # 85 counties of unequal size, as in Gelman and Hill (2007), chapter 12
        county = np.sort(np.concatenate([np.arange(85), rng.choice(85, 834, p=rng.dirichlet(np.ones(85)))]))
        floor = (rng.random(919) < 0.2).astype(np.float32)
        level = 1.5 + 0.4 * rng.standard_normal(85)
        y = level[county] - 0.7 * floor + 0.75 * rng.standard_normal(919)
        return county, floor, y.astype(np.float32)
    x = np.linspace(-2, 2, 100, dtype=np.float32)[:, None]
    return x, (np.sin(2 * x[:, 0]) + 0.1 * rng.standard_normal(100)).astype(np.float32)


def for_pyro(name: str) -> tuple[Model, tuple[Any, ...]]:
    """The Pyro model and its arguments."""
    import pyro
    import pyro.distributions as dist
    import torch

    model = _write(name, pyro.sample, pyro.plate, pyro.deterministic, dist, torch)
    return model, tuple(torch.from_numpy(a) for a in data(name))


def for_numpyro(name: str) -> tuple[Model, tuple[Any, ...]]:
    """The numpyro model and its arguments."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    model = _write(name, numpyro.sample, numpyro.plate, numpyro.deterministic, dist, jnp)
    return model, tuple(jnp.asarray(a) for a in data(name))


def _write(name: str, sample: Any, plate: Any, deterministic: Any, dist: Any, xp: Any) -> Model:
    """One text for both languages, whose statements have the same names."""

    def eight_schools(effect: Any, error: Any) -> None:
        mu = sample("mu", dist.Normal(0.0, 5.0))
        tau = sample("tau", dist.HalfCauchy(5.0))
        with plate("school", 8):
            eta = sample("eta", dist.Normal(0.0, 1.0))
            sample("effect", dist.Normal(mu + tau * eta, error), obs=effect)

    def logistic(x: Any, y: Any) -> None:
        w = sample("w", dist.Normal(xp.zeros(10), 2.5).to_event(1))
        b = sample("b", dist.Normal(0.0, 5.0))
        with plate("data", 1000):
            sample("y", dist.Bernoulli(logits=x @ w + b), obs=y)

    def radon(county: Any, floor: Any, y: Any) -> None:
        mu = sample("mu", dist.Normal(0.0, 10.0))
        tau = sample("tau", dist.HalfNormal(1.0))
        slope = sample("slope", dist.Normal(0.0, 10.0))
        sigma = sample("sigma", dist.HalfNormal(1.0))
        with plate("counties", 85):
            offset = sample("offset", dist.Normal(0.0, 1.0))
        level = mu + tau * offset
        with plate("houses", 919):
            sample("y", dist.Normal(level[county] + slope * floor, sigma), obs=y)

    def network(x: Any, y: Any) -> None:
        first = sample("first", dist.Normal(xp.zeros((1, HIDDEN)), 1.0).to_event(2))
        bias = sample("bias", dist.Normal(xp.zeros(HIDDEN), 1.0).to_event(1))
        second = sample("second", dist.Normal(xp.zeros(HIDDEN), 1.0).to_event(1))
        sigma = sample("sigma", dist.HalfNormal(1.0))
        f = deterministic("f", xp.tanh(x @ first + bias) @ second)
        with plate("data", 100):
            sample("y", dist.Normal(f, sigma), obs=y)

    texts: dict[str, Model] = {
        "eight schools": eight_schools,
        "logistic 1000x10": logistic,
        "radon": radon,
        "small network": network,
    }
    return texts[name]
