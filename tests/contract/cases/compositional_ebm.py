"""Energy models: densities, classifiers, conditional laws."""

import torch

from ppl_models import ConditionalEnergyModel, EnergyClassifier, EnergyModel
from tests.contract.case import Bad, Data, ModelCase


def points(dtype: torch.dtype) -> Data:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(80, 2, generator=g, dtype=torch.float64)
    return {"x": (x + 2 * torch.sign(x[:, :1])).to(dtype)}


def labelled(dtype: torch.dtype) -> Data:
    x = points(dtype)["x"]
    return {"x": x, "y": (x[:, 0] > 0).long()}


def pairs(dtype: torch.dtype) -> Data:
    x = points(dtype)["x"]
    return {"x": x[:, :1], "y": x[:, 1:]}


ENERGY = ModelCase(
    name="energy_model",
    build=lambda: EnergyModel(event_shape=(2,), hidden=(16,)),
    data=points,
    fit={"num_steps": 20, "batch_size": 20, "noise_samples": 20},
    queries={
        "log_prob": lambda m: m.log_prob(points(torch.float32)["x"][:9]),  # type: ignore[operator]
        "sample": lambda m: m.sample(16, method="sir", seed=3),  # type: ignore[operator]
    },
    rowwise={"log_prob": lambda m, x: m.log_prob(x)},  # type: ignore[operator]
    rows=lambda dtype: points(dtype)["x"][:7],
    call=lambda m, data: (data["x"],),
    not_finite=("x",),
    bad=[Bad("columns", lambda m: m.fit(torch.ones(5, 3)), "x")],  # type: ignore[operator]
)
CLASSIFIER = ModelCase(
    name="energy_classifier",
    build=lambda: EnergyClassifier(num_classes=2, num_components=3, hidden=(16,), input_shape=(2,)),
    data=labelled,
    fit={"num_steps": 15, "batch_size": 20, "noise_samples": 20},
    queries={
        "proba": lambda m: m.predict_proba(points(torch.float32)["x"][:9]),  # type: ignore[operator]
        "ood": lambda m: m.ood_score(points(torch.float32)["x"][:9]),  # type: ignore[operator]
    },
    rowwise={"proba": lambda m, x: m.predict_proba(x), "ood": lambda m, x: m.ood_score(x)},  # type: ignore[operator]
    rows=lambda dtype: points(dtype)["x"][:7],
    call=lambda m, data: (data["x"],),
    not_finite=("x",),
)
CONDITIONAL = ModelCase(
    name="conditional_energy_model",
    build=lambda: ConditionalEnergyModel(hidden=(16,)),
    data=pairs,
    fit={"num_steps": 15, "batch_size": 20, "noise_samples": 16},
    queries={
        "log_prob": lambda m: m.log_prob(*(pairs(torch.float32)[n][:9] for n in ("y", "x"))),  # type: ignore[operator]
        "sample": lambda m: m.sample(pairs(torch.float32)["x"][:3], 4, seed=3),  # type: ignore[operator]
    },
    call=lambda m, data: (data["y"], data["x"]),
    not_finite=("x", "y"),
)

CASES = [ENERGY, CLASSIFIER, CONDITIONAL]
