"""What a result looks like: numbers as they are, tensors by their shape, nothing a page long."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from inference.results.brief import brief


@brief
@dataclass(frozen=True)
class _Record:
    scalar: Tensor
    few: Tensor
    many: Tensor
    number: float
    text: str
    draws: dict[str, Tensor]
    net: nn.Module
    inside: Any


@brief
class _Pair(NamedTuple):
    mean: Tensor
    steps: int


@brief
class _Plain:
    def __init__(self) -> None:
        self.mean, self._hidden = torch.zeros(2, 3), 1


def test_one_line_whatever_is_inside() -> None:
    record = _Record(
        torch.tensor(0.12345678), torch.tensor([1.0, 2.5]), torch.zeros(4, 5), float("nan"), "nuts",
        {"w": torch.zeros(1000)}, nn.Sequential(nn.Tanh()), _Pair(torch.zeros(3, 3), 7),
    )  # fmt: skip
    assert repr(record) == (
        "_Record(scalar=0.1235, few=[1, 2.5], many=float32(4, 5), number=nan, text='nuts', draws={w}, net=Sequential, "
        "inside=_Pair(mean=float32(3, 3), steps=7))"
    )
    assert repr(_Plain()) == "_Plain(mean=float32(2, 3))"
