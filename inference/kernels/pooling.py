"""What the kernels for many chains share: statistics that add up over chains and processes, and the warm-up's windows.

A process adds up its own chains' statistics in the kernel's state, inside the recorded step.  At the end of each short
window ``pool`` adds them over processes, so that a run split over ranks adapts as the single process does, to
rounding, and no recorded step has to wait for another rank.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from inference.kernels.adaptation import DualAverage
from inference.runtime.distributed import sum_over_ranks

__all__ = [
    "WINDOW",
    "PooledMoments",
    "crossing",
    "direction",
    "first_window",
    "halton",
    "mass_ends",
    "pool",
    "restarted",
    "windows",
]

WINDOW = 4  # steps a window: short, since 64 chains say much in one step, and long enough to draw noise in blocks
_MASS_SHARES = (0.1, 0.2, 0.35, 0.5, 0.7)  # of the warm-up; many chains need few steps, and the start is forgotten
_SHRINKAGE = 1e-3
_SHRINKAGE_WEIGHT = 5.0
_MAX_DOUBLINGS = 60


def pool(*sums: Tensor) -> tuple[Tensor, ...]:
    """Each tensor summed over all processes, in one exchange."""
    total = sum_over_ranks(torch.cat([s.reshape(-1) for s in sums]))
    parts = total.split([s.numel() for s in sums])
    return tuple(part.reshape(s.shape) for part, s in zip(parts, sums, strict=True))


class PooledMoments(NamedTuple):
    """Sums of positions and of their squares about a fixed origin, which add up over processes.

    Attributes:
        size: number of positions, 0-dim.
        origin: ``(dim,)``, the same on every process; near the mean, so that nothing cancels.
        total: sum of positions minus origin, ``(dim,)``.
        square: sum of the squares of these differences, ``(dim,)``.
    """

    size: Tensor
    origin: Tensor
    total: Tensor
    square: Tensor

    @classmethod
    def start(cls, origin: Tensor) -> "PooledMoments":
        """Empty sums about ``origin``."""
        zero = torch.zeros_like(origin)
        return cls(origin.new_zeros(()), origin.clone(), zero, zero.clone())

    def update(self, position: Tensor, weight: Tensor) -> "PooledMoments":
        """Add positions ``(chain, dim)`` where ``weight`` (0-dim) is 1, and nothing where it is 0."""
        difference = position - self.origin
        return PooledMoments(
            self.size + weight * len(position),
            self.origin,
            self.total + weight * difference.sum(0),
            self.square + weight * difference.square().sum(0),
        )

    def pooled(self) -> tuple[Tensor, Tensor, Tensor]:
        """Size, mean and variance over all chains of all processes."""
        size, total, square = pool(self.size, self.total, self.square)
        shift = total / size.clamp(min=1)
        variance = (square - size * shift.square()) / (size - 1).clamp(min=1)
        return size, self.origin + shift, variance.clamp(min=0)

    def scale(self, before: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled mean and standard deviation, shrunk a little towards a small multiple of the scale ``before``."""
        size, mean, variance = self.pooled()
        share = size / (size + _SHRINKAGE_WEIGHT)
        return mean, (share * variance + (1 - share) * _SHRINKAGE * before.square()).sqrt()


def windows(warmup_steps: int) -> list[int]:
    """Steps of the warm-up after which pooled statistics are used."""
    return sorted({*range(WINDOW, warmup_steps, WINDOW), *mass_ends(warmup_steps)})


def first_window(warmup_steps: int) -> int:
    """The step after which chains that start far out are brought in; 0 in a warm-up of one window."""
    return WINDOW if warmup_steps > WINDOW else 0


def mass_ends(warmup_steps: int) -> list[int]:
    """Steps of the warm-up after which the scales are renewed from the positions since the last renewal."""
    if warmup_steps < 20:
        return []
    return sorted({WINDOW * max(2, round(share * warmup_steps / WINDOW)) for share in _MASS_SHARES})


def halton(index: int) -> float:
    """Element ``index`` (from 0) of the Halton sequence in base 2, in (0, 1)."""
    index, value, digit = index + 1, 0.0, 0.5
    while index:
        value += digit * (index & 1)
        index, digit = index >> 1, digit / 2
    return value


def restarted(step_size: Tensor) -> DualAverage:
    """Dual averaging that begins at ``step_size`` and shrinks towards it.

    It is updated once a window and not once a step; shrinking towards ten times the start, as is usual, would make the
    first windows far too bold.
    """
    return DualAverage.start(step_size)._replace(center=step_size.log())


def direction(position: Tensor) -> Tensor:
    """Standard normals like ``position``, ``(chain, dim)``, the same in every row.

    They depend on the dimension alone, so that a search for a step size needs no chain's index and gives the same for
    any split of chains over processes, and on any device.
    """
    row = torch.randn(position.shape[1], generator=torch.Generator().manual_seed(0), dtype=position.dtype)
    return row.to(position.device).expand_as(position)


def crossing(score: Callable[[Tensor], Tensor], start: Tensor, level: float) -> Tensor:
    """Double or halve ``start`` (0-dim) until ``score``, which falls with it, crosses ``level``."""
    value, direction = start, 0
    for _ in range(_MAX_DOUBLINGS):
        new_direction = 1 if bool(score(value) > level) else -1
        if direction and new_direction != direction:
            break
        direction = new_direction
        value = value * 2.0**direction
    return value
