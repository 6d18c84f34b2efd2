"""Observed series: checks at the door, and what the data say about scales."""

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppl_models.base import from_array, to_precision
from sde import NoiseWarning
from sde._checks import as_times

__all__ = ["SeriesData", "check_series"]

_FAR = 10.0  # spans of the data that may lie between time 0, where a path starts, and the first observation


class SeriesData(NamedTuple):
    """Attributes:
    times: strictly increasing, ``(T,)``, float64, on the CPU.
    values: ``(N, T, *shape)``, 0 where masked.
    mask: bool, of the shape of ``values``.
    """

    times: Tensor
    values: Tensor
    mask: Tensor

    @property
    def shared(self) -> bool:
        """Whether all series miss the same."""
        return bool((self.mask == self.mask[:1]).all())


def check_series(times: Any, observations: Any, mask: Any, shape: tuple[int, ...]) -> SeriesData:
    """The data as tensors.

    Args:
        times: ``(T,)``, from 0 on.
        observations: ``(N, T, *shape)``, finite where the mask is True.
        mask: ``(N, T)`` or ``(N, T, *shape)``; True where there is an observation. None where there are all.
        shape: of one observation.

    Raises:
        TypeError, ValueError: wrong shapes, unsorted times, NaN or infinite values, nothing observed, values that
            torch's default dtype cannot tell apart.

    Warns:
        NoiseWarning: the series are short beside the time before them (calendar years).
    """
    if not isinstance(times, Tensor):
        try:
            times = from_array(times, float)
        except (TypeError, ValueError) as error:
            raise TypeError(f"times must be a vector of numbers, got {type(times).__name__}") from error
    clock = as_times(times).cpu()
    what = ", ".join(map(str, ("N", len(clock), *shape)))
    if not isinstance(observations, Tensor):
        try:
            values = from_array(observations)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"observations must be a tensor or a numeric array, got {type(observations).__name__}"
            ) from error
        values = values if values.is_complex() else to_precision("observations", values, torch.get_default_dtype())
    else:
        values = observations.detach()
    if values.is_complex():
        raise TypeError(f"observations must hold real numbers, got {values.dtype}")
    if not values.is_floating_point():
        values = to_precision("observations", values, torch.get_default_dtype())
    if values.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"observations must be float32 or float64, got {values.dtype}: give observations.float()")
    if values.ndim != 2 + len(shape) or tuple(values.shape[1:]) != (len(clock), *shape) or len(values) == 0:
        advice = ""
        if shape == (1,) and tuple(values.shape[1:]) == (len(clock),):
            advice = "; give observations[..., None]"
        elif values.numel() == len(clock) * math.prod(shape):
            advice = f"; for one series give observations.reshape({', '.join(map(str, (1, len(clock), *shape)))})"
        raise ValueError(
            f"observations must have shape ({what}) for {len(clock)} times, got {tuple(values.shape)}{advice}"
        )
    if len(clock) > 1 and clock[0] > _FAR * (clock[-1] - clock[0]):
        span, first = float(clock[-1] - clock[0]), float(clock[0])
        warnings.warn(
            f"times start at {first:g} and span {span:g}, but a path starts at time 0, long before: count times from "
            f"the start of what you observe, as in times - {first:g}",
            NoiseWarning,
            stacklevel=3,
        )
    if mask is None:
        bad = ~torch.isfinite(values)
        if bool(bad.any()):
            raise ValueError(
                f"observations must be finite where there is no mask, they hold {int(bad.sum())} NaN or infinite "
                f"values, the first at index {tuple(bad.nonzero()[0].tolist())}; for missing ones give "
                "mask=torch.isfinite(observations)"
            )
        return SeriesData(clock, values, torch.ones_like(values, dtype=torch.bool))
    here = (mask if isinstance(mask, Tensor) else from_array(mask)).to(values.device)
    if here.dtype != torch.bool and not bool(((here == 0) | (here == 1)).all()):
        raise ValueError("mask must be boolean, True where there is an observation")
    here = here.bool()
    if tuple(here.shape) == tuple(values.shape[:2]):
        here = here.reshape(*here.shape, *[1] * len(shape))
    if here.ndim != values.ndim or any(m not in (1, n) for m, n in zip(here.shape, values.shape, strict=True)):
        raise ValueError(f"mask must have shape (N, T) or ({what}), got {tuple(here.shape)}")
    here = here.expand_as(values)
    if not bool(here.any()):
        raise ValueError("mask leaves no observation at all: nothing can be learned")
    values = torch.where(here, values, 0.0)
    if not bool(torch.isfinite(values).all()):
        raise ValueError("observations must be finite where the mask is True")
    return SeriesData(clock, values, here.contiguous())


class Scales(NamedTuple):
    """Attributes:
    mean, std: of the observed values of each dimension, ``(D,)``.
    jump: root mean square of the differences of observed neighbours over sqrt(time between them), ``(D,)``.
    slope: mean change per unit of time, ``(D,)``.
    """

    mean: Tensor
    std: Tensor
    jump: Tensor
    slope: Tensor


def scales(data: SeriesData) -> Scales:
    """What ``(N, T, D)`` data say about scales, for starting values."""
    x, here = data.values.double(), data.mask.double()
    times = data.times.to(x.device)
    count = here.sum((0, 1)).clamp_min(1)
    mean = (x * here).sum((0, 1)) / count
    std = (((x - mean) ** 2 * here).sum((0, 1)) / count).sqrt()
    std = torch.where(std > 1e-12 * mean.abs(), std, 1.0)
    # Of series with times of their own, on a grid that holds those of all, neighbours on the grid are no pair.
    place = torch.arange(x.shape[1], device=x.device)[:, None]
    before = torch.where(data.mask, place, -1).cummax(1).values[:, :-1]
    both = data.mask[:, 1:] & (before >= 0)
    before = before.clamp_min(0)
    gap = times[1:, None] - times[before]
    move = (x[:, 1:] - x.gather(1, before)) * both
    total = (both * gap).sum((0, 1))
    jump = ((move**2 / gap).sum((0, 1)) / both.sum((0, 1)).clamp_min(1)).sqrt()
    slope = torch.where(total > 0, move.sum((0, 1)) / total, 0.0)
    jump = torch.where(jump > 0, jump, std / times[-1] ** 0.5)
    return Scales(*(part.to(data.values.dtype) for part in (mean, std, jump, slope)))
