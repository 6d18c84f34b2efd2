"""Monotone deep Boltzmann machines: groups, and images."""

from dataclasses import replace

import torch
from torch import Tensor

from ppl_models import ConvMonotoneDBM, MonotoneDBM
from tests.contract.case import Bad, Data, ModelCase


def states(dtype: torch.dtype) -> Data:
    g = torch.Generator().manual_seed(0)
    first = torch.randint(3, (40, 1), generator=g)
    return {"observed": (first + torch.randint(2, (40, 4), generator=g)) % 3}


def half(observed: Tensor) -> Tensor:
    return torch.arange(observed.shape[1]).expand_as(observed) < 2


def pictures(dtype: torch.dtype) -> Data:
    g = torch.Generator().manual_seed(0)
    return {
        "images": torch.rand(12, 1, 8, 8, generator=g, dtype=torch.float64).to(dtype),
        "labels": torch.arange(12) % 3,
    }


DBM = ModelCase(
    name="monotone_dbm",
    build=lambda: MonotoneDBM([3] * 4, rank=4),
    data=states,
    fit={"num_steps": 8, "batch_size": 16},
    queries={
        "marginals": lambda m: (
            m.marginals(*(f(states(torch.float32)["observed"][:6]) for f in (lambda x: x, half))).probabilities
        ),  # type: ignore[operator]
        "sample": lambda m: m.sample(4, 3, seed=2),  # type: ignore[operator]
    },
    rowwise={"predictive": lambda m, x: m.predictive(x, half(x)), "complete": lambda m, x: m.complete(x, half(x))},  # type: ignore[operator]
    rows=lambda dtype: states(dtype)["observed"][:6],
    call=lambda m, data: (),
    bad=[
        Bad("out of range", lambda m: m.fit(torch.full((4, 4), 3)), "observed"),  # type: ignore[operator]
        Bad("mask", lambda m: m.marginals(torch.zeros(2, 4, dtype=torch.long), torch.ones(2, 3)), "mask"),  # type: ignore[operator]
    ],
)
STYLED = replace(
    DBM,
    name="monotone_dbm_styles",
    build=lambda: MonotoneDBM([3] * 4, rank=4, styles=2),
    data=lambda dtype: {"observed": states(dtype)["observed"].repeat(2, 1)},  # a style needs 32 rows
)
CONVOLUTION = ModelCase(
    name="conv_monotone_dbm",
    build=lambda: ConvMonotoneDBM((1, 8, 8), num_bins=2, num_classes=3),
    data=pictures,
    fit={"num_steps": 3, "batch_size": 6},
    queries={
        "classify": lambda m: m.classify(pictures(torch.float32)["images"][:3]),  # type: ignore[operator]
        "complete": lambda m: m.complete(
            pictures(torch.float32)["images"][:3], torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(1)) < 0.5
        ),  # type: ignore[operator]
    },
    rowwise={"classify": lambda m, x: m.classify(x)},  # type: ignore[operator]
    rows=lambda dtype: pictures(dtype)["images"][:3],
    call=lambda m, data: (),
    not_finite=("images",),
)

CASES = [DBM, STYLED, CONVOLUTION]
