"""Step-size schedules: a number, a decay, or cycles of exploration and sampling."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from inference._checks import nonnegative, positive

__all__ = ["ConstantSchedule", "CyclicalSchedule", "PolynomialSchedule", "Schedule", "StepControl", "as_schedule"]


class StepControl(NamedTuple):
    """What the schedule says of one step.

    Attributes:
        step_size: epsilon of this step.
        noise: 1 while sampling, 0 while exploring without injected noise.
        restart: 1 where the momentum is set back to zero.
    """

    step_size: float
    noise: float = 1.0
    restart: float = 0.0


class Schedule:
    """Base of all schedules: what happens at each step after the warm-up, and which steps give draws."""

    def warmup(self, step: int) -> StepControl:
        """The control of warm-up step ``step``."""
        return self.sampling(0)

    def sampling(self, step: int) -> StepControl:
        """The control of step ``step`` after the warm-up."""
        raise NotImplementedError

    def kept_steps(self, num_samples: int, thin: int) -> Sequence[int]:
        """Steps after the warm-up whose positions are draws."""
        return range(thin - 1, num_samples * thin, thin)


class ConstantSchedule(Schedule):
    """The same step size throughout."""

    def __init__(self, step_size: float) -> None:
        self.step_size = positive("step_size", step_size)

    def sampling(self, step: int) -> StepControl:
        """A constant."""
        return StepControl(self.step_size)

    def __repr__(self) -> str:
        return f"{self.step_size!r}"


class PolynomialSchedule(Schedule):
    """epsilon_t = step_size (1 + t / offset)^(-decay), which makes SGLD's draws exact in the limit (Welling and Teh
    2011).

    Args:
        step_size: the first step size.
        decay: exponent, in (0.5, 1] for the theory to hold.
        offset: steps over which it stays near the first.
    """

    def __init__(self, step_size: float, decay: float = 0.55, offset: float = 1000.0) -> None:
        self.step_size, self.decay, self.offset = (
            positive("step_size", step_size),
            positive("decay", decay, upper=1.0),
            positive("offset", offset),
        )

    def sampling(self, step: int) -> StepControl:
        """The decayed step size."""
        return StepControl(self.step_size * (1 + step / self.offset) ** -self.decay)

    def __repr__(self) -> str:
        return f"PolynomialSchedule({self.step_size!r}, {self.decay!r}, {self.offset!r})"


class CyclicalSchedule(Schedule):
    """Cyclical stochastic-gradient MCMC (Zhang, Li, Zhang, Chen and Wilson, ICLR 2020, arXiv 1902.03932, equation 1).

    Each cycle starts at ``step_size`` and falls as ``step_size / 2 (cos(pi phase) + 1)``.  While the phase is below
    ``exploration`` no noise is injected and no draw
    is kept; the rest of the cycle samples.  Momentum restarts with each cycle.  The step size that is scheduled is
    epsilon^2 where the kernel's rate is
    epsilon^2 (the paper schedules the rate).

    Args:
        step_size: the largest step size.
        num_cycles: number of cycles over the run; draws are shared equally among them.
        exploration: share of each cycle without noise, in [0, 1).
    """

    def __init__(self, step_size: float, num_cycles: int = 4, exploration: float = 0.5) -> None:
        self.step_size = positive("step_size", step_size)
        if not isinstance(num_cycles, int) or isinstance(num_cycles, bool) or num_cycles < 1:
            raise ValueError(f"num_cycles must be a positive integer, got {num_cycles!r}")
        self.num_cycles, self.exploration = num_cycles, nonnegative("exploration", exploration, upper=1.0)
        if self.exploration == 1.0:
            raise ValueError(f"exploration must lie in [0, 1), got {exploration!r}")
        self._length = 1

    def kept_steps(self, num_samples: int, thin: int) -> Sequence[int]:
        """The last steps of each cycle, ``thin`` apart, in its sampling phase; the cycle is as long as they need."""
        least, left = divmod(num_samples, self.num_cycles)
        draws = [least + (cycle >= self.num_cycles - left) for cycle in range(self.num_cycles)]
        self._length = math.ceil(draws[-1] * thin / (1 - self.exploration) - 1e-9)
        return [
            (cycle + 1) * self._length - later * thin - 1
            for cycle, count in enumerate(draws)
            for later in reversed(range(count))
        ]

    def warmup(self, step: int) -> StepControl:
        """The warm-up explores at the largest step size."""
        return StepControl(self.step_size, noise=1.0)

    def sampling(self, step: int) -> StepControl:
        """The cosine of this step's phase."""
        position = step % self._length
        phase = position / self._length
        rate = 0.5 * (math.cos(math.pi * phase) + 1)
        # The rate is proportional to step_size^2, so its square root is taken here.
        return StepControl(
            self.step_size * math.sqrt(rate), noise=float(phase >= self.exploration), restart=float(position == 0)
        )

    def __repr__(self) -> str:
        return f"CyclicalSchedule({self.step_size!r}, {self.num_cycles!r}, {self.exploration!r})"


class _CallableSchedule(Schedule):
    def __init__(self, function: Callable[[int], float]) -> None:
        self.function = function

    def sampling(self, step: int) -> StepControl:
        return StepControl(positive("step_size", self.function(step)))

    def __repr__(self) -> str:
        return getattr(self.function, "__qualname__", type(self.function).__name__)


def as_schedule(step_size: float | Schedule | Callable[[int], float]) -> Schedule:
    """A schedule from a number, a schedule, or a function of the step after the warm-up."""
    if isinstance(step_size, Schedule):
        return step_size
    if callable(step_size):
        return _CallableSchedule(step_size)
    return ConstantSchedule(step_size)
