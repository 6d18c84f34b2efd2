"""SDEs driven by fractional noise, of series and of vectors behind a decoder."""

import torch

from ppl_models import FractionalSDE, LatentFractionalSDE
from tests.contract.case import Bad, Data, ModelCase


def series(dtype: torch.dtype) -> Data:
    g = torch.Generator().manual_seed(0)
    times = torch.linspace(0.2, 1.0, 5, dtype=torch.float64)
    steps = torch.randn(2, 5, 1, generator=g, dtype=torch.float64)
    return {"times": times, "observations": (0.3 * steps.cumsum(1)).to(dtype)}


def vectors(dtype: torch.dtype) -> Data:
    data = series(dtype)
    return {"times": data["times"], "observations": data["observations"].expand(-1, -1, 3).contiguous()}


NEW = torch.linspace(0.1, 1.2, 4, dtype=torch.float64)
SDE = ModelCase(
    name="fractional_sde",
    build=lambda: FractionalSDE(hidden=(8,), num_processes=3),
    data=series,
    fit={"num_steps": 6, "num_particles": 2},
    queries={
        "predict": lambda m: m.predict(NEW, num_samples=5, seed=1).samples,  # type: ignore[operator]
        "elbo": lambda m: m.elbo(num_particles=4, seed=1),  # type: ignore[operator]
        "prior": lambda m: m.sample_prior(NEW, 3, seed=2),  # type: ignore[operator]
    },
    call=lambda m, data: (data["times"], data["observations"]),
    simulated=("path",),
    in_law=("raw_hurst",),
    accelerator=False,
    not_finite=("times", "observations"),
    bad=[
        Bad("hurst", lambda m: FractionalSDE(hurst=1.2), "hurst"),
        Bad("times", lambda m: m.fit(torch.ones(5), torch.zeros(2, 5, 1)), "times"),  # type: ignore[operator]
    ],
)
LATENT = ModelCase(
    name="latent_fractional_sde",
    build=lambda: LatentFractionalSDE(
        (3,), state_size=1, content_size=2, features=8, context_size=2, hidden=(8,), num_processes=2
    ),
    data=vectors,
    fit={"num_steps": 3, "batch_size": 2},
    queries={"reconstruct": lambda m: m.reconstruct(num_samples=2, seed=1).samples},  # type: ignore[operator]
    call=lambda m, data: (data["times"], data["observations"]),
    simulated=("path",),
    in_law=("raw_hurst",),
    accelerator=False,
    not_finite=("times", "observations"),
)

CASES = [SDE, LATENT]
