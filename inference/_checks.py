"""Checks of numbers that every door shares."""

import math
from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any

from torch import Tensor

__all__ = ["count", "counts", "fraction", "nonnegative", "positive"]


def count(name: str, value: Any, least: int = 1) -> int:
    """``value`` as an integer of at least ``least``; raises naming the argument."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def counts(name: str, values: Any, least: int = 1) -> tuple[int, ...]:
    """``values`` as integers of at least ``least``, there may be none; raises naming the argument."""
    if isinstance(values, str | bytes | Mapping | Tensor) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a sequence of integers, got {values!r}")
    return tuple(count(f"{name}[{i}]", value, least) for i, value in enumerate(values))


def positive(name: str, value: Any, *, upper: float = math.inf) -> float:
    """``value`` as a float in ``(0, upper]``; raises ``TypeError`` or ``ValueError`` naming the argument."""
    return _real(name, value, 0.0, upper, open_below=True)


def nonnegative(name: str, value: Any, *, upper: float = math.inf) -> float:
    """``value`` as a float in ``[0, upper]``; raises ``TypeError`` or ``ValueError`` naming the argument."""
    return _real(name, value, 0.0, upper, open_below=False)


def fraction(name: str, value: Any) -> float:
    """``value`` as a float strictly between 0 and 1; raises ``TypeError`` or ``ValueError`` naming the argument."""
    value = _number(name, value)
    if not 0 < value < 1:
        raise ValueError(f"{name} must lie strictly between 0 and 1, got {value!r}")
    return value


def _real(name: str, value: Any, lower: float, upper: float, *, open_below: bool) -> float:
    value = _number(name, value)
    inside = (value > lower if open_below else value >= lower) and value <= upper and math.isfinite(value)
    if not inside:
        raise ValueError(f"{name} must lie in {'(' if open_below else '['}{lower:g}, {upper:g}], got {value!r}")
    return float(value)


def _number(name: str, value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return float(value)
