"""Grids: of the speeds of the Ornstein-Uhlenbeck processes, and of the times at which a path is solved."""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from sde._checks import Times, as_count, as_number, as_times

__all__ = [
    "TimeGrid", "geometric_speeds", "graded_grid", "horizon_speeds", "observation_grid", "snap_times", "uniform_grid",
]  # fmt: skip


def geometric_speeds(num_processes: int, max_speed: float, offset: float = 0.0) -> Tensor:
    """The paper's grid: g_k = r^(k - n), n = (K + 1) / 2 + offset, r = max_speed^(2 / (K - 1 - 2 offset)).

    The slowest speed is 1 / max_speed where ``offset`` is 0, whatever the horizon.  One process alone, for which the
    formula divides by zero, gets sqrt(max_speed).

    Returns:
        Speeds in ascending order, ``(K,)``, float64, in 1 / time.

    Raises:
        ValueError: where max_speed is not above 1 (the grid would collapse or run backwards), or the offset leaves no
            room below the fastest speed.
    """
    count = as_count(num_processes, "num_processes")
    top = as_number(max_speed, "max_speed")
    if top <= 1:
        raise ValueError(f"max_speed must exceed 1 on the geometric grid, which runs from 1 / max_speed, got {top:g}")
    if count == 1:
        return torch.tensor([math.sqrt(top)], dtype=torch.float64)
    if count - 1 - 2 * offset <= 0:
        raise ValueError(f"offset must be below (num_processes - 1) / 2 = {(count - 1) / 2:g}, got {offset:g}")
    k = torch.arange(1, count + 1, dtype=torch.float64)
    return torch.exp((k - (count + 1) / 2 - offset) * (2 * math.log(top) / (count - 1 - 2 * offset)))


def horizon_speeds(num_processes: int, horizon: float, min_speed: float, max_speed: float) -> Tensor:
    """Geometric speeds from ``min_speed / horizon`` to ``max_speed / horizon``: the same shape for every unit of time.

    Returns:
        Speeds in ascending order, ``(K,)``, float64, in 1 / time; one process alone gets the geometric mean.
    """
    count = as_count(num_processes, "num_processes")
    low, high = as_number(min_speed, "min_speed"), as_number(max_speed, "max_speed")
    horizon = as_number(horizon, "horizon")
    if low >= high:
        raise ValueError(f"min_speed must be below max_speed, got {low:g} and {high:g}")
    if count == 1:
        return torch.tensor([math.sqrt(low * high)], dtype=torch.float64) / horizon
    return torch.logspace(math.log10(low), math.log10(high), count, dtype=torch.float64) / horizon


class TimeGrid(NamedTuple):
    """Solver times and where the observations stand among them.

    Attributes:
        times: strictly increasing, ``(N + 1,)``, float64.
        positions: of the requested times in ``times``, ``(M,)``, int64.
    """

    times: Tensor
    positions: Tensor


def uniform_grid(end: float, num_steps: int, start: float = 0.0) -> Tensor:
    """``num_steps`` equal steps from ``start`` to ``end``, ``(num_steps + 1,)``, float64."""
    steps = as_count(num_steps, "num_steps")
    first, last = as_number(start, "start", zero=True), as_number(end, "end")
    return as_times(torch.linspace(first, last, steps + 1, dtype=torch.float64), "start and end", minimum=2)


def graded_grid(end: float, num_steps: int, start: float = 0.0, *, power: float = 2.0, toward: str = "end") -> Tensor:
    """Steps that shrink like a power towards one end, where a control steepens or a singular kernel sits.

    t = end - (end - start) (1 - n / N)^power towards the end, mirrored towards the start.

    Raises:
        ValueError: for a power below 1 or another ``toward`` than ``"start"`` and ``"end"``.
    """
    if not as_number(power, "power") >= 1:
        raise ValueError(f"power must be at least 1, got {power}")
    first, last = as_number(start, "start", zero=True), as_number(end, "end")
    if toward not in ("start", "end"):
        raise ValueError(f"toward must be 'start' or 'end', got {toward!r}")
    u = torch.linspace(0, 1, as_count(num_steps, "num_steps") + 1, dtype=torch.float64)
    u = u**power if toward == "start" else 1 - (1 - u) ** power
    return as_times(first + (last - first) * u, "start and end", minimum=2)


def observation_grid(
    observation_times: Times, max_step: float, *, start: float = 0.0, end: float | None = None, power: float = 1.0
) -> TimeGrid:
    """The coarsest grid that meets every observation time and has no step above ``max_step``.

    Between two neighbours the steps are equal, or shrink towards the later one where ``power`` exceeds 1: a posterior
    control grows before a precise observation.

    Args:
        observation_times: strictly increasing, ``(M,)``, not before ``start``.
        max_step: the longest step allowed for ``power=1``; the number of steps between two observations follows from
            it.
        end: solve on to this time after the last observation (forecast).
    """
    wanted = as_times(observation_times, "observation_times")
    step = as_number(max_step, "max_step")
    if float(wanted[0]) < start:
        raise ValueError(f"observation_times must not lie before start={start:g}, got {float(wanted[0]):g}")
    stops = [start] + [float(t) for t in wanted if float(t) > start]
    if end is not None:
        if end < stops[-1]:
            raise ValueError(f"end={end:g} lies before the last observation at {stops[-1]:g}")
        if end > stops[-1]:
            stops.append(end)
    pieces, index, count = [torch.tensor([start], dtype=torch.float64)], [0], 0
    for left, right in pairwise(stops):
        # The small margin keeps a gap of exactly n steps from becoming n + 1 by rounding.
        steps = max(1, math.ceil((right - left) / step * (1 - 1e-12)))
        u = 1 - (1 - torch.linspace(0, 1, steps + 1, dtype=torch.float64)[1:]) ** power
        piece = left + (right - left) * u
        piece[-1] = right
        pieces.append(piece)
        count += steps
        index.append(count)
    first = 0 if float(wanted[0]) == start else 1
    return TimeGrid(torch.cat(pieces), torch.tensor(index[first : first + len(wanted)]))


def snap_times(wanted: Times, times: Times) -> Tensor:
    """``wanted`` with each time that is one of ``times`` but for the rounding of single precision put exactly there.

    0.2 * 5 and 0.25 * 4 are one time, also where one of them is 1.0000001: as two they would be a solver step of
    1e-7, over which rough noise moves a path by a good part of its scale.

    Returns:
        ``wanted``, ``(M,)``, float64; no more strictly increasing where two of them are the same one of ``times``.
    """
    asked, known = as_times(wanted, "wanted"), as_times(times, "times")
    tolerance = 2 * torch.finfo(torch.float32).eps * torch.maximum(asked[-1], known[-1])
    after = torch.searchsorted(known, asked).clamp(max=len(known) - 1)
    before = (after - 1).clamp_min(0)
    near = torch.where(asked - known[before] < known[after] - asked, known[before], known[after])
    return torch.where((near - asked).abs() <= tolerance, near, asked)
