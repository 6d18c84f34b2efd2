"""Guards against estimates of Z that collapsed: noise that no longer meets the model.

The gradient of log Z is an average over noise weighted by exp(log p~ - log q).  Where the noise does not visit the
model's mass, one weight carries all, the estimate of Z is of no worth and the parameters run away without a
non-finite number to tell.  A guard reads the record of the last few hundred steps and stops the fit, or warns.
"""

import math
import warnings

import torch
from torch import Tensor
from torch.nn import functional

from inference._errors import CollapseError, SamplerWarning

__all__ = ["LEAST_ESS", "PATIENCE", "Guard", "unreliable"]

LEAST_ESS = 0.01  # effective share of the noise below which its weights have collapsed
PATIENCE = 50  # steps in a row
LARGEST_K = 0.7
FEWEST = 25  # effective draws of a fresh estimate
LARGEST_LAG = 0.5  # nats between the running log u and a fresh estimate
_WINDOW = 512  # noise draws that are judged together

ADVICE = (
    "the noise does not cover the model. Standardise the data, start the noise at the data (noise='auto'), tilt it "
    "(base='tilt'), let it adapt, draw more noise_samples, or lower the learning rate"
)


class Guard:
    """Looks for ``PATIENCE`` steps in a row in which too few noise draws carried the estimate of Z.

    Noise batches of fewer than 512 draws are judged together with those before them.

    Args:
        action: ``"raise"``, ``"warn"`` (once) or ``"ignore"``.
    """

    def __init__(self, action: str = "raise") -> None:
        if action not in ("raise", "warn", "ignore"):
            raise ValueError(f"on_collapse must be 'raise', 'warn' or 'ignore', got {action!r}")
        self.action, self._warned = action, False

    def context(self, noise_samples: int) -> int:
        """How many steps before the ones in question must be shown as well."""
        return math.ceil(_WINDOW / noise_samples) + PATIENCE

    def look(self, mean: Tensor, share: Tensor, noise_samples: int, first: int = 0) -> None:
        """Judge a stretch of steps.

        Args:
            mean: log of the noise batches' mean weight, relative to the running estimate, ``(step,)``.
            share: effective share of each batch ``(step,)``.
            noise_samples: M.
            first: number of the first step shown.

        Raises:
            CollapseError: the effective share was below its least for 50 steps in a row, and the action is to raise.
        """
        if self.action == "ignore" or (self._warned and self.action == "warn") or len(mean) < PATIENCE:
            return
        mean = mean.double().nan_to_num(nan=-300.0).clamp(-300, 300)
        width = min(len(mean), math.ceil(_WINDOW / noise_samples))
        weights = torch.stack([mean.exp(), (2 * mean).exp() / share.double().clamp(min=1e-12)])
        padded = functional.pad(weights, (width - 1, 0))
        sums = padded.unfold(1, width, 1).sum(2)
        counts = torch.arange(1, len(mean) + 1, device=mean.device).clamp(max=width)
        running = sums[0].square() / sums[1] / counts
        low = (running < LEAST_ESS).double()
        runs = low.unfold(0, PATIENCE, 1).sum(1) == PATIENCE
        if not bool(runs.any()) or bool(running[-1] >= LEAST_ESS):  # what has come back is no collapse
            return
        step = first + int(runs.nonzero()[0]) + PATIENCE
        message = (
            f"the noise weights collapsed: for {PATIENCE} steps up to step {step} fewer than {LEAST_ESS:.0%} of "
            f"the noise draws carried the estimate of log Z (at the end {float(running[-1]):.2%}); {ADVICE}"
        )
        if self.action == "raise":
            raise CollapseError(message)
        self._warned = True
        warnings.warn(message, SamplerWarning, stacklevel=2)


def unreliable(running: float, fresh: float, error: float, pareto_k: float, ess: float = math.inf) -> str | None:
    """Why a learned log Z should not be trusted beside a fresh large estimate; None where it may."""
    if ess < FEWEST:  # of which no tail can be told
        return f"{ess:.3g} of the noise draws carry the estimate of log Z: {ADVICE}"
    if pareto_k > LARGEST_K:  # first, as then the fresh estimate is none that u could be held against
        return f"the noise weights have Pareto k = {pareto_k:.2f} > {LARGEST_K}: {ADVICE}"
    if not abs(running - fresh) <= LARGEST_LAG + 4 * error:
        return (
            f"the running log u = {running:.4g} and a fresh estimate log Z = {fresh:.4g} differ by more than "
            f"{LARGEST_LAG}: u lags behind the parameters; lower the learning rate, or use correction='ratio'"
        )
    return None
