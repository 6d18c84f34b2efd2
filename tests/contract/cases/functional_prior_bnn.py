"""The network with a functional prior."""

import torch

from ppl_models import FunctionalPriorBNN
from tests.contract.case import Bad, Data, ModelCase


def regression(dtype: torch.dtype) -> Data:
    g = torch.Generator().manual_seed(0)
    x = 3 + 2 * torch.randn(60, 3, generator=g, dtype=torch.float64)
    y = 100 + 20 * torch.sin(x[:, 0]) + 5 * torch.randn(60, generator=g, dtype=torch.float64)
    return {"x_train": x.to(dtype), "y_train": y.to(dtype)}


BNN = ModelCase(
    name="functional_prior_bnn",
    build=lambda: FunctionalPriorBNN(3, hidden=(8,)),
    data=regression,
    fit={"num_chains": 2, "warmup_steps": 20, "num_samples": 4, "thin": 15, "batch_size": 20},
    queries={
        "predict": lambda m: m.predict(regression(torch.float32)["x_train"]).samples,  # type: ignore[operator]
        "sample": lambda m: m.predict(regression(torch.float32)["x_train"]).sample(seed=1),  # type: ignore[operator]
        "prior": lambda m: m.sample_prior(regression(torch.float32)["x_train"], 4, seed=2),  # type: ignore[operator]
    },
    rowwise={"mean": lambda m, x: m.predict(x).mean, "variance": lambda m, x: m.predict(x).variance},  # type: ignore[operator]
    rows=lambda dtype: regression(dtype)["x_train"][:7],
    call=lambda m, data: m.standardise(data["x_train"], data["y_train"]),  # type: ignore[operator]
    not_finite=("x_train", "y_train"),
    groups=frozenset({"posterior", "sample_stats", "log_likelihood", "posterior_predictive", "observed_data"}),
    bad=[
        Bad("columns", lambda m: m.fit(torch.zeros(5, 2), torch.zeros(5)), r"\(N, 3\)"),  # type: ignore[operator]
        Bad("batch too large", lambda m: m.fit(torch.ones(5, 3), torch.ones(5), batch_size=6), "batch_size.*5"),  # type: ignore[operator]
        Bad("early query", lambda m: m.predict(torch.zeros(5, 3)), "call fit", RuntimeError),  # type: ignore[operator]
    ],
)

CASES = [BNN]
