"""Marginalization models of binary vectors."""

import torch
from torch import Tensor

from ppl_models import MarginalizationModel
from tests.contract.case import Bad, Data, ModelCase


def bits(dtype: torch.dtype) -> Data:
    g = torch.Generator().manual_seed(0)
    first = torch.randint(2, (64, 3), generator=g)
    return {"x": torch.cat([first, first ^ (torch.rand(64, 3, generator=g) < 0.1).long()], 1)}


def partly(dtype: torch.dtype = torch.float32) -> Tensor:
    x = bits(dtype)["x"][:8].clone()
    x[:, 1::2] = -1
    return x


MAM = ModelCase(
    name="marginalization_model",
    build=lambda: MarginalizationModel([2] * 6, hidden=16, depth=1),
    data=bits,
    fit={"num_steps": 12, "marginal_steps": 8, "batch_size": 16, "num_rows": 64},
    queries={
        "log_prob": lambda m: m.log_prob(partly()),  # type: ignore[operator]
        "impute": lambda m: m.impute(partly(), num_samples=3, seed=1),  # type: ignore[operator]
        "sample": lambda m: m.sample(5, seed=2),  # type: ignore[operator]
    },
    rowwise={"log_prob": lambda m, x: m.log_prob(x), "logits": lambda m, x: m.conditional_logits(x)},  # type: ignore[operator]
    rows=partly,
    call=lambda m, data: (data["x"],),
    bad=[
        Bad("out of range", lambda m: m.fit(torch.full((4, 6), 2)), "x"),  # type: ignore[operator]
        Bad("columns", lambda m: m.fit(torch.zeros(4, 5, dtype=torch.long)), "x"),  # type: ignore[operator]
    ],
)

CASES = [MAM]
