"""When a run has drawn enough: by R-hat, effective sample size, or the clock."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from inference._checks import positive
from inference.results.diagnostics import ess_bulk, ess_tail, rhat
from inference.runtime import distributed

__all__ = ["Stop"]

_GROWTH = (
    1.25  # diagnostics are computed anew when the draws have grown by this; their cost stays a fraction of a run's
)


@dataclass
class Stop:
    """End a run before its ``num_samples`` once every criterion that is given holds for every scalar, or time is up.

    Args:
        rhat: largest rank-normalised split R-hat, as 1.01.
        ess: least bulk and tail effective sample size of all chains together, as 400.
        seconds: wall time of ``run``; the block in hand is completed.
        least: draws a chain before the first look.

    Raises:
        ValueError: no criterion is given, or one has no meaning.
    """

    rhat: float | None = None
    ess: float | None = None
    seconds: float | None = None
    least: int = 100

    def __post_init__(self) -> None:
        """Check the criteria."""
        if self.rhat is None and self.ess is None and self.seconds is None:
            raise ValueError("Stop needs at least one of rhat, ess and seconds")
        if self.rhat is not None and not positive("rhat", self.rhat) > 1:
            raise ValueError(f"rhat must be more than 1, got {self.rhat!r}")
        for name in ("ess", "seconds"):
            value = getattr(self, name)
            if value is not None:
                positive(name, value)
        if isinstance(self.least, bool) or not isinstance(self.least, int) or self.least < 4:
            raise ValueError(f"least must be an integer of at least 4, got {self.least!r}")


class StopWatch:
    """A ``Stop`` in a run.

    Args:
        rule: the criteria; ``None`` never stops.

    Attributes:
        next_look: draws a chain at which the diagnostics are computed again.
    """

    def __init__(self, rule: Stop | None) -> None:
        self._rule, self._started = rule, time.perf_counter()
        self.next_look = 0 if rule is None else rule.least

    def agreed(self, drawn: int, own: Mapping[str, Tensor]) -> str | None:
        """``reason`` for the chains of all ranks, each of which gives its ``own``: rank 0 looks, the others follow."""
        if self._rule is None or not drawn:
            return None
        samples = None
        if distributed.broadcast_plain(self.due(drawn)):
            gathered = {n: distributed.gather_rows(v) for n, v in own.items()}
            samples = {n: v for n, v in gathered.items() if v is not None}
        found: str | None = distributed.broadcast_plain(self.reason(drawn, samples) if distributed.is_main() else None)
        return found

    def due(self, drawn: int) -> bool:
        """Whether ``reason`` wants to see the ``drawn`` draws a chain; the clock alone needs none."""
        rule = self._rule
        return (
            rule is not None
            and (rule.rhat is not None or rule.ess is not None)
            and drawn >= max(self.next_look, rule.least)
        )

    def reason(self, drawn: int, samples: Mapping[str, Tensor] | None) -> str | None:
        """Why the run should end now, or ``None``; ``samples`` are ``(chain, draw, ...)`` if they are due."""
        rule = self._rule
        if rule is None:
            return None
        seconds = time.perf_counter() - self._started
        if rule.seconds is not None and seconds >= rule.seconds:
            return f"{seconds:.0f} seconds have gone by"
        if samples is None:
            return None
        self.next_look = max(drawn + 1, int(_GROWTH * drawn))
        # Entries that never change (a corner of a Cholesky factor) have no diagnostics; all others must have them.
        scalars = [v.reshape(*v.shape[:2], -1).double() for v in samples.values()]
        values = [v[..., (v != v[:1, :1]).any(1).any(0)] for v in scalars]
        values = [v for v in values if v.shape[-1]]
        if not values:
            return None
        found = []
        if rule.rhat is not None:
            worst = float(torch.stack([rhat(v).max() for v in values]).max())
            if not worst <= rule.rhat:
                return None
            found.append(f"R-hat is {worst:.4g}")
        if rule.ess is not None:
            least = float(torch.stack([torch.minimum(ess_bulk(v), ess_tail(v)).min() for v in values]).min())
            if not least >= rule.ess:
                return None
            found.append(f"the effective sample size is {least:.0f}")
        return " and ".join(found)
