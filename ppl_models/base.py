"""What every model shares: checks at the door, standardisation, and files that hold a model.

A model is a ``PyroModule``: calling it runs its Pyro model.  Its file is one checkpoint of
``inference.runtime.checkpoint``: tensors and plain data, of which nothing is executed when it is read.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from inference._checks import count, counts
from inference._errors import CheckpointError
from inference.citation import Citable
from inference.model_check import ModelCheck, check_model
from inference.runtime.checkpoint import load_checkpoint, save_checkpoint
from inference.runtime.generators import derive_seed

__all__ = [
    "Model",
    "Standardiser",
    "check_batch_size",
    "check_count",
    "check_counts",
    "check_inputs",
    "from_array",
    "to_precision",
    "to_tensor",
    "unchanged_on_error",
]


def from_array(value: Any, dtype: Any = None) -> Tensor:
    """An array, data frame or list as a tensor of its own memory.

    Of the array's memory some must not be written to (columns of a data frame, by pandas 3), and where it begins
    decides the last bits of products.

    Raises:
        TypeError, ValueError, RuntimeError: not numeric.
    """
    return torch.tensor(np.asarray(value, dtype=dtype))


_EXACT = (torch.float64, torch.int64, torch.int32)  # what single precision may round
_MOST_LOST = 0.01  # of a column's standard deviation
_ROWS = 4096  # that are looked at


def to_precision(name: str, value: Tensor, like: Tensor | torch.dtype) -> Tensor:
    """``value`` ``(..., columns)`` or ``(N,)`` in the dtype (and on the device) of ``like``.

    Raises:
        ValueError: what varies in a column would be lost by rounding: large numbers that differ little.
    """
    made = value.to(like)
    if not value.numel() or value.dtype not in _EXACT or value.dtype == made.dtype:
        return made
    rows = value.detach().reshape(-1, value.shape[-1] if value.ndim > 1 else 1)
    exact = rows[:: -(-len(rows) // _ROWS)].double()
    spread = exact.std(0, correction=0)
    least, most = exact.aminmax(dim=0)
    size = torch.maximum(least.abs(), most.abs())
    doubtful = (torch.finfo(made.dtype).eps * size > _MOST_LOST * spread) & (spread > 1e-14 * size)
    for column in doubtful.nonzero()[:, 0].tolist():
        own = exact[:, column]
        if float((own.to(made.dtype).double() - own).abs().max()) > _MOST_LOST * float(spread[column]):
            place = f" in column {column}" if value.ndim > 1 else ""
            kind = str(made.dtype).removeprefix("torch.")
            raise ValueError(
                f"{name} varies by {float(spread[column]):.3g} around {float(own.mean()):.6g}{place}, which {kind} "
                "cannot tell apart: subtract a constant, or give all data as float64 tensors"
            )
    return made


def to_tensor(name: str, value: Any) -> Tensor:
    """``value`` as a finite tensor.

    Tensors keep dtype and device.  Of arrays, data frames and lists, numbers with a decimal point get torch's default
    dtype.

    Raises:
        TypeError: not numeric.
        ValueError: empty, NaN or infinite values, or numbers that torch's default dtype cannot tell apart.
    """
    if not isinstance(value, Tensor):
        try:
            value = from_array(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"{name} must be a tensor or a numeric array, got {type(value).__name__} ({error})"
            ) from error
        if value.is_floating_point():
            value = to_precision(name, value, torch.get_default_dtype())
    if value.is_complex():
        raise TypeError(f"{name} must hold real numbers, got {value.dtype}")
    if value.numel() == 0:
        raise ValueError(f"{name} is empty, its shape is {tuple(value.shape)}")
    value = value.detach().contiguous()  # strides decide the last bits of sums
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        bad = ~torch.isfinite(value)
        where = tuple(bad.nonzero()[0].tolist())
        raise ValueError(
            f"{name} must be finite, it holds {int(bad.sum())} NaN or infinite values, the first at index {where}; "
            "drop or impute these rows"
        )
    return value


def check_inputs(name: str, value: Any, columns: int, event_shape: tuple[int, ...] | None = None) -> Tensor:
    """``value`` as a finite floating-point matrix ``(N, columns)``; images ``(N, *event_shape)`` are flattened.

    Raises:
        TypeError: not numeric.
        ValueError: not finite, or another shape.
    """
    value = to_tensor(name, value)
    if not value.is_floating_point():
        value = to_precision(name, value, torch.get_default_dtype())
    if event_shape is not None and tuple(value.shape[1:]) == event_shape:
        value = value.flatten(1)
    if value.ndim != 2 or value.shape[1] != columns:
        images = f" or (N, {', '.join(map(str, event_shape))})" if event_shape else ""
        raise ValueError(f"{name} must have shape (N, {columns}){images}, got {tuple(value.shape)}")
    return value


def check_count(name: str, value: object, least: int = 1) -> int:
    """``value`` if it is an integer of at least ``least``; raises ``TypeError`` or ``ValueError`` naming the
    argument.
    """
    return count(name, value, least)


def check_counts(name: str, values: object, least: int = 1) -> tuple[int, ...]:
    """``values`` if it is a sequence of integers of at least ``least``, such as the widths of layers; raises
    ``TypeError`` or ``ValueError`` naming the argument.
    """
    return counts(name, values, least)


def check_batch_size(batch_size: object, num_rows: int, default: int | None = None) -> int | None:
    """``batch_size``, or None if it is the whole data; ``default``, which nobody asked for, shrinks to the data.

    Raises:
        TypeError, ValueError: no count, or larger than the data.
    """
    if batch_size is None:
        return None
    batch_size = check_count("batch_size", batch_size)
    if batch_size > num_rows:
        if batch_size == default:
            return None
        raise ValueError(
            f"batch_size = {batch_size} is larger than the data, which have {num_rows} rows; "
            f"use at most {num_rows}, or None for full batches"
        )
    return None if batch_size == num_rows else batch_size


def _checked(fit: Callable[..., Any]) -> Callable[..., Any]:
    """``fit`` that refuses a seed or a progress of the wrong kind before anything else, and keeps what it returns."""
    signature = inspect.signature(fit)

    @functools.wraps(fit)
    def checked(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        derive_seed(given.get("seed", 0))
        progress = given.get("progress", False)
        if not isinstance(progress, bool) and not callable(progress):
            raise TypeError(f"progress must be True, False or a function of one dictionary, got {progress!r}")
        found = fit(*args, **kwargs)
        if not isinstance(getattr(type(args[0]), "result", None), property):
            args[0].result = found
        return found

    return checked


@contextmanager
def unchanged_on_error(module: nn.Module) -> Iterator[None]:
    """If the block raises (an interrupt counts), the module's parameters and buffers are put back first."""
    before = copy.deepcopy(module.state_dict())
    try:
        yield
    except BaseException:
        module.load_state_dict(before)
        raise


class Standardiser(nn.Module):
    """Shift and scale of each column, ``z = (x - shift) / scale``; the identity until it has seen data.

    Args:
        columns: number of columns.
        group_size: neighbouring columns that share a shift and a scale, such as the pixels of an image channel.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, columns: int, group_size: int = 1) -> None:
        super().__init__()
        self.group_size = group_size
        self.register_buffer("shift", torch.zeros(columns))
        self.register_buffer("scale", torch.ones(columns))

    def learn(self, x: Tensor) -> None:
        """Mean and standard deviation of ``x`` ``(N, columns)``; a constant column is only shifted."""
        grouped = x.reshape(x.shape[0], -1, self.group_size)
        shift = grouped.mean((0, 2))
        scale = (grouped - shift.unsqueeze(-1)).square().mean((0, 2)).sqrt()
        # A constant column leaves a residue of rounding, of which nothing should be made.
        floor = 10 * torch.finfo(x.dtype).eps * shift.abs()
        scale = torch.where(scale > floor, scale, torch.ones_like(scale))
        self.shift = shift.repeat_interleave(self.group_size)
        self.scale = scale.repeat_interleave(self.group_size)

    def forward(self, x: Tensor) -> Tensor:
        """Standardised values."""
        return (x - self.shift) / self.scale

    def inverse(self, z: Tensor) -> Tensor:
        """Back to the user's units."""
        return z * self.scale + self.shift


class Model(Citable, PyroModule):
    """A Pyro model with a file form.

    A subclass sets ``kind`` and ``papers``, returns its constructor's arguments from ``config`` and, where it keeps
    more than its ``state_dict``, overrides ``_extra_state`` and ``_restore_extra``.  What its last fit returned is
    ``result``.
    """

    kind: ClassVar[str]
    result: Any = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Every model refuses a bad seed or progress at the door, whatever it does next, and keeps its last result."""
        super().__init_subclass__(**kwargs)
        for name in ("fit", "fit_energy"):
            if name in vars(cls):
                setattr(cls, name, _checked(vars(cls)[name]))

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as plain data."""
        raise NotImplementedError

    def check(self, *args: Any, **kwargs: Any) -> ModelCheck:
        """Dry run of the Pyro model ``self(*args, **kwargs)``: print and return its sites, plates and what engines make
        of it; see ``inference.check_model``.
        """
        return check_model(self, *args, **kwargs)

    def _used(self) -> tuple[object, ...]:
        try:
            result = self.result
        except RuntimeError:  # a model that has not been fitted may say so
            result = None
        return (result,) if isinstance(result, Citable) else ()

    def _extra_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {}

    def _restore_extra(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        return

    def save(self, path: str | Path) -> None:
        """Write the model, and what it was fitted to, to one file; whole or not at all.

        Raises:
            CheckpointError: the file cannot be written. What stood there before is untouched.
        """
        extra, meta = self._extra_state()
        tensors = {f"state/{k}": v for k, v in self.state_dict().items()} | {f"extra/{k}": v for k, v in extra.items()}
        save_checkpoint(path, tensors, {"config": self.config(), "extra": meta}, kind=self.kind)

    @classmethod
    def load(cls, path: str | Path, **objects: Any) -> Self:
        """The model that ``save`` wrote, on the CPU. Nothing that the file holds is executed.

        Args:
            path: the file.
            objects: constructor arguments that a file cannot hold, such as a module of the user's.

        Raises:
            FileNotFoundError: there is no such file.
            CheckpointError: the file is truncated, damaged, of another model, or no file of this library.
        """
        found = load_checkpoint(path, kind=cls.kind)
        if found is None:
            raise FileNotFoundError(f"{path} does not exist")
        tensors, meta = found
        state = {k.removeprefix("state/"): v for k, v in tensors.items() if k.startswith("state/")}
        extra = {k.removeprefix("extra/"): v for k, v in tensors.items() if k.startswith("extra/")}
        try:
            model = cls(**{**meta["config"], **objects})
            dtypes = {v.dtype for v in state.values() if v.is_floating_point()}
            if len(dtypes) == 1:
                model.to(dtypes.pop())
            model.load_state_dict(state)
            model._restore_extra(extra, meta["extra"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path} does not describe a {cls.__name__} of this version ({error})") from error
        return model
