"""Calls across the public API that are good as they stand; tests spoil them one argument at a time.

A call must be cheap: a constructor, or a function whose answer takes milliseconds.  Constructors and ``fit`` of the
models come from their cases.
"""

from typing import Any

import torch
from torch import Tensor

import inference
import sde
from inference import kernels
from inference.kernels import Kernel
from tests.contract.case import Call, model_cases
from tests.contract.test_kernels import KERNELS, NEEDS
from tests.inference import zoo

F64 = torch.float64
LOGISTIC, (X, Y) = zoo.CONTINUOUS["logistic"]


class _LeastSquares(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3, dtype=F64))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (y - x @ self.weight).square().mean()


def _mcmc(kernel: Kernel | None = None, **options: Any) -> Any:
    return inference.MCMC(kernel or kernels.SGLD(LOGISTIC, step_size=0.01), **options)


def _fit(**options: Any) -> Any:
    return inference.fit(_LeastSquares(), **{"num_steps": 2, "progress": False, **options})


def _paths() -> list[Call]:
    times = torch.linspace(0, 1, 6, dtype=F64)
    noise = sde.MarkovFractionalBrownianMotion(0.7, num_processes=4)
    linear = {"theta": 1.0, "scale": 0.5, "constant": 0.1, "start_mean": 0.0, "start_std": 0.1}
    values = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=F64)
    motion = {"hurst": 0.7, "kind": "mvn", "normalisation": "unit"}
    return [
        Call("FractionalBrownianMotion", sde.FractionalBrownianMotion, motion),
        Call(
            "FractionalBrownianMotion.sample",
            sde.FractionalBrownianMotion(0.7).sample,
            {"times": times[1:], "num_paths": 2, "seed": 0},
        ),
        Call("FractionalOrnsteinUhlenbeck", sde.FractionalOrnsteinUhlenbeck, {**motion, "theta": 1.0}),
        Call(
            "MarkovFractionalBrownianMotion",
            sde.MarkovFractionalBrownianMotion,
            {**motion, "num_processes": 4, "max_speed": 20.0, "horizon": 1.0, "grid": "geometric"},
        ),
        Call("MarkovFractionalBrownianMotion.sample", noise.sample, {"times": times[1:], "num_paths": 2, "seed": 0}),
        Call(
            "fractional_gaussian_noise",
            sde.fractional_gaussian_noise,
            {"hurst": 0.7, "num_steps": 8, "num_paths": 2, "step": 1.0, "normalisation": "unit", "seed": 0},
        ),
        Call("hurst_estimate", sde.hurst_estimate, {"values": values, "of": "increments", "method": "ml"}),
        Call("geometric_speeds", sde.geometric_speeds, {"num_processes": 4, "max_speed": 10.0}),
        Call(
            "horizon_speeds",
            sde.horizon_speeds,
            {"num_processes": 4, "horizon": 1.0, "min_speed": 0.1, "max_speed": 10.0},
        ),
        Call("uniform_grid", sde.uniform_grid, {"end": 1.0, "num_steps": 4, "start": 0.0}),
        Call("graded_grid", sde.graded_grid, {"end": 1.0, "num_steps": 4, "start": 0.0, "power": 2.0, "toward": "end"}),
        Call("observation_grid", sde.observation_grid, {"observation_times": times[1:], "max_step": 0.1}),
        Call("LinearSDE", sde.LinearSDE, {"noise": noise, **linear}, frozenset({"noise"})),
        Call(
            "kalman_filter",
            lambda **k: sde.kalman_filter(sde.LinearSDE(noise, **linear), **k),
            {"times": times[1:], "observations": values[:5].reshape(5, 1, 1), "noise_std": 0.1},
        ),
        Call(
            "solve",
            lambda **k: sde.solve(lambda t, x: -x, 0.5, noise, **k),
            {"times": times, "x0": torch.zeros(2, 1, dtype=F64), "seed": 0},
        ),
    ]


def _engines() -> list[Call]:
    driver = {"num_samples": 4, "warmup_steps": 4, "num_chains": 2, "thin": 1, "seed": 0, "minibatch": "shared"}
    found = [
        Call(kind.__name__, lambda kind=kind, **k: kind(LOGISTIC, **k), {"step_size": 0.1, **NEEDS.get(kind, {})})
        for kind in KERNELS
    ]
    posterior = {"a": torch.zeros(2, 5), "b": torch.zeros(2, 5, 3)}
    return [
        *found,
        Call("MCMC", _mcmc, driver),
        Call(
            "MCMC.kernel", lambda kernel: inference.MCMC(kernel, 3), {"kernel": kernels.SGLD(LOGISTIC, step_size=0.1)}
        ),
        Call(
            "fit",
            _fit,
            {
                "data": (X, Y),
                "batch_size": 5,
                "lr": 0.01,
                "clip_norm": 1.0,
                "validation": (X, Y),
                "validate_every": 1,
                "patience": 2,
                "seed": 0,
                "checkpoint_every": 5,
                "optimizer": torch.optim.Adam,
            },
        ),
        Call("fit.average", _fit, {"data": (X, Y), "average_last": 0.5}, frozenset({"data"})),
        Call(
            "SMC",
            lambda **k: inference.SMC(LOGISTIC, **k),
            {
                "num_particles": 16,
                "num_runs": 1,
                "target_ess": 0.5,
                "num_moves": 1,
                "num_steps": 2,
                "target_accept_prob": 0.8,
                "jitter": 0.5,
            },
        ),
        Call(
            "ELBO",
            lambda **k: inference.ELBO(LOGISTIC, LOGISTIC, **k),
            {"num_particles": 2, "bound": "elbo", "gradient": "total"},
        ),
        Call(
            "Laplace",
            lambda **k: inference.Laplace(LOGISTIC, **k),
            {"curvature": "hessian", "structure": "full", "num_starts": 2},
        ),
        Call("Stop", inference.Stop, {"rhat": 1.01, "ess": 100.0}),
        Call("CyclicalSchedule", kernels.CyclicalSchedule, {"step_size": 0.1, "num_cycles": 2, "exploration": 0.5}),
        Call("PolynomialSchedule", kernels.PolynomialSchedule, {"step_size": 0.1, "decay": 0.5, "offset": 1.0}),
        Call(
            "to_arviz",
            inference.to_arviz,
            {"posterior": posterior, "dims": {"b": ["row"]}, "coords": {"row": [1, 2, 3]}},
        ),
        Call("summary", lambda **k: inference.summary(**k), {"samples": posterior, "prob": 0.9}),
    ]


def _models() -> list[Call]:
    found: list[Call] = []
    for case in model_cases():
        found += case.calls
        model = case.build()
        found.append(Call(type(model).__name__, type(model), dict(model.config())))
        options = {"seed": 0, **case.fit}
        data = case.data(torch.float32)
        found.append(
            Call(f"{case.name}.fit", lambda case=case, **k: case.build().fit(**k, progress=False), {**data, **options})  # type: ignore[operator]
        )
    return found


def all_calls() -> list[Call]:
    """Every call of the table."""
    return [*_paths(), *_engines(), *_models()]
