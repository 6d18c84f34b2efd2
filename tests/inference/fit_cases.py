"""Small objectives that between them use what real ones use, for the tests of the optimisation loop."""

import os
import signal
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import Tensor, nn

from inference.fit import FitResult, fit
from inference.runtime.generators import generator

F64 = torch.float64
QUIET: dict[str, Any] = {"progress": False}


class LeastSquares(nn.Module):
    def __init__(self, size: int = 3, dtype: torch.dtype = F64):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, dtype=dtype))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (y - x @ self.weight).square().mean()


def regression(rows: int = 60, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    draw = generator(0, "data")
    x = torch.randn(rows, 3, generator=draw, dtype=dtype)
    return x, x @ x.new_tensor([1.0, -2.0, 0.5]) + 0.3 * torch.randn(rows, generator=draw, dtype=dtype)


class Noisy(nn.Module):
    """Draws from the global generator, has batch statistics, dropout and two layers."""

    def __init__(self):
        super().__init__()
        draw = generator(1, "weights")
        self.norm, self.drop = nn.BatchNorm1d(3), nn.Dropout(0.2)
        self.first = nn.Parameter(0.5 * torch.randn(3, 4, generator=draw))
        self.second = nn.Parameter(0.5 * torch.randn(4, generator=draw))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(x) @ self.first)
        return (y - self.drop(hidden) @ self.second + 0.01 * torch.randn(len(y))).square().mean()


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Overshoot(nn.Module):
    """Training pushes the weight up by one a step; the held-out loss is lowest at 12."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=F64))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, target: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            return -self.weight
        assert not torch.is_grad_enabled()
        return (self.weight - target).square().mean()


def overshoot(objective: nn.Module, **arguments: Any) -> FitResult:
    target = torch.full((7,), 12.0, dtype=F64)
    keywords = dict(num_steps=100, optimizer=torch.optim.SGD, lr=1.0, validation=target, validate_every=5, **QUIET)
    return fit(objective, target, **{**keywords, **arguments})


class Gaussian(PyroModule):
    """Conjugate: w ~ N(0, 1), y ~ N(x w, 0.5^2); particles go on the left of everything."""

    def forward(self, x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal((w * x).sum(-1), 0.5), obs=y)


# -- runs that are killed and resumed, in processes of their own

Case = tuple[nn.Module, tuple[Tensor, ...], dict[str, Any]]


def _elbo() -> Case:
    model = Gaussian()
    return Trace_ELBO()(model, AutoNormal(model)), regression(), {}


def _everything() -> Case:
    x, y = regression(dtype=torch.float32)
    return Noisy(), (x, y), dict(
        validation=(x[:20], y[:20]), validate_every=10, patience=100, clip_norm=0.5, lr=0.05,
        scheduler=lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.7),
    )  # fmt: skip


def _one_cycle() -> Case:
    return Noisy(), regression(dtype=torch.float32), dict(
        average_last=0.6, optimizer=lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
        scheduler=lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.05, total_steps=100),
    )  # fmt: skip


def _quasi_newton() -> Case:
    return LeastSquares(), regression(), dict(optimizer=lambda p: torch.optim.LBFGS(p, lr=0.05, max_iter=2))


RESUMES = {"elbo": _elbo, "everything": _everything, "one cycle": _one_cycle, "quasi-newton": _quasi_newton}
KILLS = (2, 18, 61, 99, "save 4")  # in the so-manieth backward pass, or between the two renames of a save


def run(name: str, path: str | None) -> tuple[nn.Module, FitResult]:
    objective, data, keywords = RESUMES[name]()
    keywords = dict(num_steps=100, batch_size=7, checkpoint=path, checkpoint_every=9, **QUIET) | keywords
    return objective, fit(objective, data, **keywords)


def _count_backward() -> list[Tensor]:
    calls: list[Tensor] = []
    backward = Tensor.backward

    def run(loss: Tensor, *arguments: Any, **keywords: Any) -> None:
        calls.append(loss)
        backward(loss, *arguments, **keywords)

    Tensor.backward = run  # type: ignore[method-assign,assignment]
    return calls


def run_and_save(name: str, target: str, path: str | None) -> None:
    calls = _count_backward()
    objective, result = run(name, path)
    histories = [
        result.losses,
        result.learning_rates,
        result.validation_losses,
        result.validation_steps,
        result.best_step,
    ]
    torch.save([state(objective), histories, len(calls)], target)


def run_killed(name: str, path: str, kill: int | str) -> None:
    calls = 0

    def strike(function, at):
        def run(*arguments, **keywords):
            nonlocal calls
            calls += 1
            result = function(*arguments, **keywords)
            if calls == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return run

    if isinstance(kill, int):
        Tensor.backward = strike(Tensor.backward, kill)
    else:
        os.replace = strike(os.replace, 2 * int(kill[5:]))
    run(name, path)
