"""Models for the tests of what is replayed on posterior draws, and prior draws of them."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import PyroModule, PyroSample
from pyro.poutine.subsample_messenger import SubsampleMessenger
from torch import Tensor


def global_state() -> tuple[Any, ...]:
    """What a call must leave as it was."""
    return (
        torch.get_rng_state().tolist(),
        torch.distributions.Distribution._validate_args,
        pyro.settings.get(),
        sorted(pyro.get_param_store().keys()),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        SubsampleMessenger._subsample,
    )


X = torch.randn(30, 3, generator=torch.Generator().manual_seed(4))
EYE = torch.eye(30)


def eight_schools(y: Tensor | None = None) -> None:
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", 8):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * eta)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def logistic(y: Tensor | None = None) -> Tensor:
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 30):
        return pyro.sample("y", dist.Bernoulli(logits=X @ w + b), obs=y)


def gaussian_process(y: Tensor | None = None) -> None:
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    covariance = torch.exp(-0.5 * torch.cdist(X, X) ** 2 / scale**2) + 0.1 * EYE
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(30), covariance), obs=y)


def mixture(y: Tensor | None = None) -> None:
    p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
    m = pyro.sample("m", dist.Normal(torch.zeros(3), 3.0).to_event(1))
    with pyro.plate("data", 30):
        pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(p), dist.Normal(m, 1.0)), obs=y)


def enumerable(y: Tensor | None = None) -> None:
    p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
    m = pyro.sample("m", dist.Normal(torch.zeros(3), 3.0).to_event(1))
    with pyro.plate("data", 30):
        z = pyro.sample("z", dist.Categorical(p), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(m[z], 1.0), obs=y)


def lkj(y: Tensor | None = None) -> None:
    chol = pyro.sample("chol", dist.LKJCholesky(3, 1.5))
    s = pyro.sample("s", dist.HalfNormal(torch.ones(3)).to_event(1))
    with pyro.plate("data", 30):
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(3), scale_tril=s.unsqueeze(-1) * chol), obs=y)


def nested(y: Tensor | None = None) -> None:
    rows, columns = pyro.plate("rows", 5, dim=-2), pyro.plate("columns", 4, dim=-1)
    top = pyro.sample("top", dist.Normal(0.0, 1.0))
    pyro.deterministic("twice", 2 * top)
    with rows:
        r = pyro.sample("r", dist.Normal(top, 1.0))
    with columns:
        c = pyro.sample("c", dist.Gamma(2.0, 1.0))
    with rows, columns:
        pyro.sample("y", dist.Normal(r, c), obs=y)


def masked(y: Tensor | None = None) -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 30), poutine.mask(mask=X[:, 0] > 0), poutine.scale(scale=3.0):
        pyro.sample("y", dist.Normal(a, 1.0), obs=y)


def factored(y: Tensor | None = None) -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.factor("f", -a.abs())
    with pyro.plate("data", 30):
        pyro.sample("y", dist.StudentT(4.0, a, 1.0), obs=y)


class Regression(PyroModule):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.linear = PyroModule[torch.nn.Linear](3, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))

    def forward(self, y: Tensor | None = None) -> Tensor:
        mean = self.linear(X).squeeze(-1)
        with pyro.plate("data", 30):
            pyro.sample("y", dist.Normal(mean, 0.5), obs=y)
        return mean


MODELS: dict[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (eight_schools, logistic, gaussian_process, mixture, enumerable, lkj, nested, masked, factored)
} | {"Regression": Regression()}
DRAWN = {"enumerable": {"z"}}  # left out of the samples


def prior_draws(name: str, n: int) -> dict[str, Tensor]:
    """Prior draws of a model's latent sites in the shapes that MCMC gives them."""
    draws: dict[str, list[Tensor]] = {}
    with torch.random.fork_rng():
        latents = [n for n, node in poutine.trace(MODELS[name]).get_trace().nodes.items() if node["type"] == "sample"]
        torch.manual_seed(5)
        for _ in range(n):
            for site, node in poutine.trace(MODELS[name]).get_trace().iter_stochastic_nodes():
                if site not in {"y", "data", "rows", "columns", "school"} | DRAWN.get(name, set()):
                    draws.setdefault(site, []).append(node["value"])
    assert set(draws) <= set(latents)
    return {site: torch.stack(values).detach() for site, values in draws.items()}


def minibatch(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x), subsample_size=5) as index:
        pyro.deterministic("index", index)
        pyro.sample("y", dist.Normal(x[index] @ w, 1.0), obs=None if y is None else y[index])
