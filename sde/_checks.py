"""What every door of this package checks, and the errors and warnings it raises."""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

__all__ = ["Kind", "NoiseWarning", "Normalisation", "PathError"]

Kind = Literal["mvn", "rl"]
Normalisation = Literal["unit", "gamma"]
Times = Tensor | Sequence[float]

_KINDS: dict[object, Kind] = {"mvn": "mvn", 1: "mvn", "rl": "rl", 2: "rl"}


class NoiseWarning(UserWarning):
    """A Markov approximation runs, but is far from the fractional noise that it stands for."""


class PathError(ArithmeticError):
    """A path became NaN or infinite, or its diffusion left (0, inf); the message names the time and the path."""


def as_numbers(value: Any, name: str) -> Tensor:
    """A number, tensor, array, data frame or list of numbers as a float64 tensor of its own shape."""
    found = value if isinstance(value, Tensor | Real) else None
    listed = hasattr(value, "__array__") or (isinstance(value, Sequence) and not isinstance(value, str | bytes))
    if found is None and listed:
        with suppress(ValueError):  # of ragged lists
            array = np.asarray(value)
            found = torch.tensor(array) if array.dtype.kind in "iuf" else None
    if found is None or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, or a tensor, array or list of them, got {type(value).__name__}")
    _refuse_complex(found, name)
    return torch.as_tensor(found, dtype=torch.float64)


def as_hurst(hurst: float | Tensor | np.ndarray | Sequence[float]) -> Tensor:
    """``hurst`` as a float64 tensor of its own shape, every entry in (0, 1)."""
    value = as_numbers(hurst, "hurst")
    # "not all inside" rather than "any outside": NaN is outside as well.
    if value.numel() == 0 or not bool(((value > 0) & (value < 1)).all()):
        raise ValueError(f"hurst must lie strictly between 0 and 1, got {_short(value)}")
    return value


def as_kind(kind: str | int) -> Kind:
    """``"mvn"`` (Mandelbrot-Van Ness, type I) or ``"rl"`` (Riemann-Liouville, type II)."""
    if isinstance(kind, bool) or kind not in _KINDS:
        raise ValueError(
            f"kind must be 'mvn' (or 1, Mandelbrot-Van Ness) or 'rl' (or 2, Riemann-Liouville), got {kind!r}"
        )
    return _KINDS[kind]


def as_normalisation(normalisation: str) -> Normalisation:
    """``"unit"`` (variance t^(2H)) or ``"gamma"`` (the integral with 1 / Gamma(H + 1/2) before it)."""
    if normalisation == "unit":
        return "unit"
    if normalisation == "gamma":
        return "gamma"
    raise ValueError(f"normalisation must be 'unit' or 'gamma', got {normalisation!r}")


def as_times(times: Times, name: str = "times", *, minimum: int = 1, horizon: float = float("inf")) -> Tensor:
    """``times`` as a strictly increasing, finite, non-negative float64 vector of at least ``minimum`` entries.

    What stands at equal distances to the rounding of single precision, in which it was given, does so exactly in what
    is returned: even grids have methods of their own.
    """
    _refuse_complex(times, name)
    try:
        value = torch.as_tensor(times, dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a vector of numbers, got {type(times).__name__}") from error
    if value.ndim != 1:
        raise ValueError(f"{name} must be a vector, got shape {tuple(value.shape)}")
    if len(value) < minimum:
        raise ValueError(f"{name} needs at least {minimum} entries, got {len(value)}")
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name} must be finite, got {_short(value)}")
    if bool((value[1:] <= value[:-1]).any()):
        raise ValueError(f"{name} must be strictly increasing (sorted, no repeats), got {_short(value)}")
    if bool((value < 0).any()):
        raise ValueError(f"{name} must not be negative: a path starts at time 0, got {_short(value)}")
    if bool((value > horizon * (1 + 1e-9)).any()):
        raise ValueError(
            f"{name} reach {float(value[-1]):g}, beyond horizon={horizon:g}, up to which the weights are optimal; "
            f"build the noise with horizon={float(value[-1]):g} or more"
        )
    single = getattr(times, "dtype", None) in (torch.float32, np.float32)
    if single and len(value) > 2:
        even = torch.linspace(float(value[0]), float(value[-1]), len(value), dtype=torch.float64, device=value.device)
        if bool((value - even).abs().max() <= torch.finfo(torch.float32).eps * value[-1]):
            return even
    return value


def as_positive(value: float | Tensor | np.ndarray | Sequence[float], name: str, *, zero: bool = False) -> Tensor:
    """``value`` as a float64 tensor, every entry finite and positive (or zero, where ``zero`` allows it)."""
    tensor = as_numbers(value, name)
    inside = torch.isfinite(tensor) & ((tensor >= 0) if zero else (tensor > 0))
    if tensor.numel() == 0 or not bool(inside.all()):
        raise ValueError(f"{name} must be {'non-negative' if zero else 'positive'} and finite, got {_short(tensor)}")
    return tensor


def as_number(value: float | Tensor, name: str, *, zero: bool = False) -> float:
    """``value`` as one finite positive number (or zero, where ``zero`` allows it)."""
    tensor = as_positive(value, name, zero=zero)
    if tensor.numel() != 1:
        raise ValueError(f"{name} must be one number, got shape {tuple(tensor.shape)}")
    return float(tensor)


def as_count(value: int, name: str, minimum: int = 1) -> int:
    """``value`` as an integer of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return int(value)


def base_seed(seed: int | None, generator: torch.Generator | None) -> int:
    """One integer that all streams of a call are derived from.

    With neither a seed nor a generator it comes from torch's global generator, as everywhere in torch.
    """
    if seed is not None and generator is not None:
        raise ValueError("give seed or generator, not both")
    if seed is not None:
        if isinstance(seed, bool) or not isinstance(seed, Integral):
            raise TypeError(f"seed must be an integer, got {seed!r}")
        return int(seed)
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**62, (), generator=generator, device=device, dtype=torch.int64))


def stream(seed: int, *name: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for the named stream of ``seed``; different names give independent streams."""
    digest = hashlib.sha256(repr((seed, *name)).encode()).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class NormalSource:
    """Standard normals of the named stream of ``seed``, one draw after another.

    In double precision on the CPU by numpy's ziggurat (G. Marsaglia, W. W. Tsang, *The Ziggurat Method for Generating
    Random Variables*, Journal of Statistical Software 2000), which takes half of the time of torch's.
    """

    def __init__(
        self, seed: int, *name: int | str, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
    ) -> None:
        self._dtype, self._device = dtype, torch.device(device)
        self._torch = stream(seed, *name, device=device)
        native = dtype == torch.float64 and self._device.type == "cpu"
        self._numpy = np.random.Generator(np.random.SFC64(self._torch.initial_seed())) if native else None

    def __call__(self, *shape: int) -> Tensor:
        """``shape``."""
        if self._numpy is not None:
            return torch.from_numpy(self._numpy.standard_normal(shape))
        return torch.randn(shape, generator=self._torch, dtype=self._dtype, device=self._device)


def _refuse_complex(value: object, name: str) -> None:
    if isinstance(value, Tensor) and value.is_complex():
        raise TypeError(f"{name} must hold real numbers, got {value.dtype}")


def _short(value: Tensor) -> str:
    entries = value.detach().flatten()
    text = ", ".join(f"{float(entry):g}" for entry in entries[:6])
    return text if value.ndim == 0 else f"[{text}{', ...' if len(entries) > 6 else ''}]"
