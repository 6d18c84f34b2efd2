"""Small Pyro models that between them use what real models use, for tests of the engines. Each entry: model, args."""

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import PyroModule, PyroSample
from torch import Tensor

F64 = torch.float64
_g = torch.Generator().manual_seed(2)
X = torch.randn(50, 3, generator=_g, dtype=F64)
Y = torch.randn(50, generator=_g, dtype=F64)
LABELS = torch.randint(0, 3, (50,), generator=_g)
BINARY = (torch.rand(50, generator=_g, dtype=F64) < 0.5).to(F64)
SCHOOLS_Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=F64)
SCHOOLS_SE = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=F64)


def zero(like: Tensor, *shape: int) -> Tensor:
    return like.new_zeros(shape)


def eight_schools(y: Tensor, se: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(zero(y), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0 + zero(y)))
    with pyro.plate("school", len(y)):
        eta = pyro.sample("eta", dist.Normal(zero(y), 1.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, se), obs=y)


def logistic(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(zero(x, x.shape[-1]), 2.5).to_event(1))
    b = pyro.sample("b", dist.Normal(zero(x), 5.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=x @ w + b), obs=y)


def dirichlet(y: Tensor) -> None:
    p = pyro.sample("p", dist.Dirichlet(torch.ones(3, dtype=F64, device=y.device)))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Categorical(p), obs=y)


def lkj(x: Tensor) -> None:
    chol = pyro.sample("l", dist.LKJCholesky(3, torch.tensor(1.5, dtype=x.dtype)))
    s = pyro.sample("s", dist.HalfNormal(1 + zero(x, 3)).to_event(1))
    with pyro.plate("n", len(x)):
        pyro.sample("y", dist.MultivariateNormal(zero(x, 3), scale_tril=s.unsqueeze(-1) * chol), obs=x)


def factor_mask_scale(x: Tensor, y: Tensor) -> None:
    b = pyro.sample("w", dist.Normal(zero(x, 3), 1.0).to_event(1))
    pyro.factor("f", -(x @ b - y).abs().sum())
    with pyro.plate("n", len(x)), poutine.mask(mask=(x @ b) > 0), poutine.scale(scale=2.0):
        pyro.sample("y", dist.Normal(x @ b, 1.0), obs=y)


class Regression(PyroModule):
    """PyroSample's priors are built outside any scope, with validation on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = PyroSample(dist.Normal(torch.zeros(3, dtype=F64), torch.ones(3, dtype=F64)).to_event(1))
        self.sigma = PyroSample(dist.HalfNormal(torch.tensor(1.0, dtype=F64)))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        mean = pyro.deterministic("mean", x @ self.weight)
        with pyro.plate("n", len(x)):
            pyro.sample("y", dist.Normal(mean, self.sigma), obs=y)
        return mean


def markov(y: Tensor) -> None:
    z, s = zero(y), pyro.sample("s", dist.HalfNormal(1.0 + zero(y)))
    for t in pyro.markov(range(8)):
        z = pyro.sample(f"z{t}", dist.Normal(z, s))
        pyro.sample(f"y{t}", dist.Normal(z, 1.0), obs=y[t])


def gaussian_process(x: Tensor, y: Tensor) -> None:
    length = pyro.sample("ls", dist.LogNormal(zero(x), 1.0))
    k = torch.exp(-(torch.cdist(x, x) ** 2) / length**2) + 0.1 * torch.eye(len(x), dtype=x.dtype, device=x.device)
    pyro.sample("y", dist.MultivariateNormal(zero(x, len(x)), k), obs=y)


def mixture_family(y: Tensor) -> None:
    p = pyro.sample("p", dist.Dirichlet(1 + zero(y, 3)))
    m = pyro.sample("m", dist.Normal(zero(y, 3), 3.0).to_event(1))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(p), dist.Normal(m, 1.0)), obs=y)


def parameter_and_module(x: Tensor, y: Tensor) -> None:
    k = pyro.param("k", torch.tensor(1.3, dtype=F64), constraint=dist.constraints.positive)
    b = pyro.sample("w", dist.Normal(zero(x, 3), 1.0).to_event(1))
    with pyro.plate("n", len(x)):
        pyro.sample("y", dist.Normal(x @ b, k), obs=y)


def enumerated_mixture(y: Tensor) -> None:
    p = pyro.sample("p", dist.Dirichlet(1 + zero(y, 2)))
    m = pyro.sample("m", dist.Normal(zero(y, 2), 3.0).to_event(1))
    with pyro.plate("n", len(y)):
        c = pyro.sample("c", dist.Categorical(p))
        pyro.sample("y", dist.Normal(m[c], 1.0), obs=y)


def enumerated_hmm(y: Tensor) -> None:
    stay = pyro.sample("stay", dist.Beta(8 + zero(y), 2 + zero(y)))
    m = pyro.sample("m", dist.Normal(zero(y, 2), 3.0).to_event(1))
    c: Tensor | int = 0
    for t in pyro.markov(range(8)):
        p1 = torch.where(torch.as_tensor(c) == 0, 1 - stay, stay)
        c = pyro.sample(f"c{t}", dist.Bernoulli(p1), infer={"enumerate": "parallel"}).long()
        pyro.sample(f"y{t}", dist.Normal(m[c], 1.0), obs=y[t])


CONTINUOUS: dict[str, tuple[Callable[..., object], tuple[Tensor, ...]]] = {
    "eight_schools": (eight_schools, (SCHOOLS_Y, SCHOOLS_SE)),
    "logistic": (logistic, (X, BINARY)),
    "dirichlet": (dirichlet, (LABELS,)),
    "lkj": (lkj, (X,)),
    "factor_mask_scale": (factor_mask_scale, (X, Y)),
    "pyro_module": (Regression(), (X, Y)),
    "markov": (markov, (Y,)),
    "gaussian_process": (gaussian_process, (X, Y)),
    "mixture_family": (mixture_family, (Y,)),
    "parameter": (parameter_and_module, (X, Y)),
}
ENUMERATED: dict[str, tuple[Callable[..., object], tuple[Tensor, ...]]] = {
    "mixture": (enumerated_mixture, (Y,)),
    "hmm": (enumerated_hmm, (Y,)),
}
