"""Effects by image."""

import torch
from torch import Tensor

from ppl_models import ImageCATE
from ppl_models.base import Model
from ppl_models.image_cate.data import Units
from ppl_models.image_cate.rate import rate
from tests.contract.case import Bad, Call, Data, ModelCase


def trial(dtype: torch.dtype) -> Data:
    g = torch.Generator().manual_seed(0)
    bright = torch.rand(240, generator=g, dtype=torch.float64) < 0.5
    images = 0.3 * torch.randn(240, 1, 8, 8, generator=g, dtype=torch.float64) + bright[:, None, None, None].double()
    treatment = (torch.rand(240, generator=g) < 0.5).long()
    outcome = bright * 2.0 * treatment + torch.randn(240, generator=g, dtype=torch.float64)
    return {"outcome": outcome.to(dtype), "treatment": treatment, "images": images.to(dtype)}


def pyro_arguments(model: Model, data: Data) -> tuple[Tensor, Units]:
    """One unit an image, at even odds of treatment, with no baseline of other folds."""
    column = data["outcome"].unsqueeze(1)
    none, zero = column.new_zeros(len(column), 1, 0), torch.zeros_like(column)
    here, site = torch.ones_like(column, dtype=torch.bool), torch.arange(len(column)).unsqueeze(1)
    treatment = data["treatment"].unsqueeze(1).to(column)
    units = Units(treatment, column, zero + 1, here, none, none, site, zero + 0.5, zero.unsqueeze(-1))
    return data["images"], units


SCORES = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
RANKING = {"scores": SCORES, "priority": -SCORES, "groups": torch.arange(20) // 2, "weights": torch.ones(20)}
CATE = ModelCase(
    name="image_cate",
    build=lambda: ImageCATE(num_steps=6, num_folds=2, num_restarts=1, num_samples=20, width=4, depth=1, batch_size=20),
    data=trial,
    fit={},
    queries={
        "effect": lambda m: m.effect(trial(torch.float32)["images"][:9]),  # type: ignore[operator]
        "interval": lambda m: m.effect_interval(trial(torch.float32)["images"][:9]),  # type: ignore[operator]
        "types": lambda m: m.cluster_probs(trial(torch.float32)["images"][:9]),  # type: ignore[operator]
    },
    rowwise={"effect": lambda m, x: m.effect(x), "types": lambda m, x: m.cluster_probs(x)},  # type: ignore[operator]
    rows=lambda dtype: trial(dtype)["images"][:5],
    call=pyro_arguments,
    pyro_model=lambda m: m._state.network,
    not_finite=("outcome", "images"),
    calls=[Call("rate", rate, {**RANKING, "kind": "qini", "num_bootstrap": 4, "seed": 0})],
    bad=[
        Bad("one arm", lambda m: m.fit(torch.arange(9.0), torch.ones(9), torch.ones(9, 1, 8, 8)), "treatment|arm"),  # type: ignore[operator]
        Bad("not 0/1", lambda m: m.fit(torch.arange(9.0), torch.arange(9), torch.ones(9, 1, 8, 8)), "treatment"),  # type: ignore[operator]
    ],
)

CASES = [CATE]
