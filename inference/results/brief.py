"""What a result looks like when a user types its name: one line, numbers as they are, tensors by their shape."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

__all__ = ["brief"]

_Class = TypeVar("_Class", bound=type)
_FEW = 6  # entries of a vector that are shown


def brief(kind: _Class) -> _Class:
    """Class decorator: the ``repr`` of a class of results, above the decorator of a dataclass."""

    def shown(self: Any) -> str:
        if hasattr(self, "_fields"):
            fields = self._fields
        elif dataclasses.is_dataclass(self):
            fields = [f.name for f in dataclasses.fields(self)]
        else:
            fields = [name for name in vars(self) if not name.startswith("_")]
        return f"{kind.__name__}({', '.join(f'{name}={_value(getattr(self, name))}' for name in fields)})"

    vars_of: Any = kind
    vars_of.__repr__ = shown
    return kind


def _value(value: Any) -> str:
    if isinstance(value, Tensor):
        if value.ndim == 0:
            return _value(value.item())
        if value.ndim == 1 and len(value) <= _FEW:
            return f"[{', '.join(map(_value, value.tolist()))}]"
        return f"{str(value.dtype).removeprefix('torch.')}{tuple(value.shape)}"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else str(value)
    if value is None or isinstance(value, bool | int | str):
        return repr(value)
    if isinstance(value, Mapping):
        return f"{{{', '.join(map(str, value))}}}"
    if isinstance(value, nn.Module):
        return type(value).__name__
    if isinstance(value, tuple | list) and not hasattr(value, "_fields"):
        inside = [_value(v) for v in value[:_FEW]] + ["..."] * (len(value) > _FEW)
        return f"({', '.join(inside)})" if isinstance(value, tuple) else f"[{', '.join(inside)}]"
    plain = type(value).__repr__ is object.__repr__
    text = type(value).__name__ if plain else repr(value)
    return text if len(text) <= 120 and "\n" not in text else type(value).__name__
