"""What a sampler's run says of itself when it ends."""

import math
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from inference._errors import SamplerWarning
from inference.potential import Potential
from inference.results.diagnostics import rhat

__all__ = ["rounding_of_energy", "warn_of_poor_mixing", "warn_of_rounding", "warn_of_run"]

_BOUND = 1.1  # of R-hat
# With n independent draws of each of M chains R-hat**2 - 1 is about (F - 1) / (n / 2), F of 2 M - 1 degrees of freedom:
# for thousands of scalars below the bound with 100 draws of few chains, or with 10 draws of many.
_LEAST_DRAWS = 100
_MANY_CHAINS, _LEAST_DRAWS_OF_MANY = 64, 10
_NEIGHBOURS = 8  # of each chain's last point
# Nats. A step's energy error is compared with the logarithm of a uniform number: errors of this size cost a few percent
# of the acceptance, and errors above 1 leave no step size that is accepted.
_ROUNDING = 0.2
_CHAINS, _NUMBERS = 128, 2**19  # looked at, so that the look takes a tenth of a second


def warn_of_run(
    *, interrupted: bool, lost: Sequence[int], divergences: float, draws: int, asked: int, chains: int, stacklevel: int
) -> None:
    """Warn of an interrupt, of chains that became non-finite, and of divergent transitions."""
    words = []
    if interrupted:
        words.append(f"the run was interrupted; {draws} of {asked} draws a chain are kept")
    if lost:
        words.append(
            f"chains {sorted(lost)} became non-finite and their draws "
            "are not usable: use a smaller step size or more friction"
        )
    if divergences:
        words.append(
            f"{divergences:.0f} of {draws * chains} transitions "
            "diverged: raise target_accept_prob or reparametrise the model"
        )
    for text in words:
        warnings.warn(text, SamplerWarning, stacklevel=stacklevel + 1)


def warn_of_poor_mixing(samples: Mapping[str, Tensor], *, stacklevel: int) -> None:
    """Warn if R-hat of a scalar is above 1.1.

    Evenly spaced draws of at most 128 chains are looked at, as many as take no noticeable time; nothing is said of one
    chain, of fewer than 100 draws a chain, or of a posterior so large that too few of them can be looked at.

    Args:
        samples: site name to draws ``(chain, draw, *event)``.
        stacklevel: as in ``warnings.warn``, from the caller.
    """
    values = {n: v for n, v in samples.items() if v.numel() and v.dtype.is_floating_point}
    if not values:
        return
    chains, draws = next(iter(values.values())).shape[:2]
    scalars = sum(v[0, 0].numel() for v in values.values())
    looked_at = min(draws, _NUMBERS // (min(chains, _CHAINS) * scalars))
    least = _LEAST_DRAWS if chains < _MANY_CHAINS else _LEAST_DRAWS_OF_MANY
    if chains < 2 or draws < _LEAST_DRAWS or looked_at < least:
        return
    which = slice(None, None, -(-chains // _CHAINS)), slice(None, None, -(-draws // looked_at))
    worst, where, beyond = 0.0, "", 0
    for name, draw in values.items():
        statistic = rhat(draw[which]).flatten()
        above = statistic > _BOUND  # false of NaN, which constants have
        beyond += int(above.sum())
        if above.any():
            largest, index = (float(v) for v in statistic.nan_to_num(nan=0.0, posinf=math.inf).max(0))
            if largest > worst:
                worst, where = largest, f"{name}" + (f", scalar {index:.0f}" if len(statistic) > 1 else "")
    if beyond:
        warnings.warn(
            f"the chains have not mixed: R-hat is above {_BOUND} for {beyond} of {scalars} scalars and {worst:.3g} at "
            f"{where}. Take more warm-up steps and more draws, or thin; look at the chains one by one for separate "
            "modes; or reparametrise the model",
            SamplerWarning,
            stacklevel=stacklevel + 1,
        )


def rounding_of_energy(potential: Potential, position: Tensor) -> float:
    """How far apart rounding puts the energies of neighbouring points, in nats: the median over chains of the root mean
    square of U(z') - U(z) - (z' - z) . dU/dz over points z' a few last bits from z.

    Args:
        potential: U, of one density for all chains.
        position: z, ``(chain, dim)``; chains that are not finite are left out.

    Returns:
        float: nats; infinite where U is finite at a chain's point and not at one of its neighbours.
    """
    energy, gradient = potential.value_and_grad(position)
    fine = torch.isfinite(energy) & torch.isfinite(gradient).all(1)
    if not bool(fine.any()):
        return 0.0
    generator = torch.Generator().manual_seed(0)
    squares = torch.zeros_like(energy)
    for _ in range(_NEIGHBOURS):
        bits = torch.randint(-4, 5, position.shape, generator=generator).to(position)
        near = position * (1 + bits * torch.finfo(position.dtype).eps)
        expected = ((near - position) * gradient).sum(1)
        squares += (potential.value_and_grad(near)[0] - energy - expected).square()
    found = (squares / _NEIGHBOURS).sqrt()[fine]
    return float(found.median()) if bool(torch.isfinite(found).all()) else math.inf


def warn_of_rounding(potential: Potential, position: Tensor, *, stacklevel: int) -> None:
    """Warn if single precision is too coarse for a sampler that compares energies; arguments as in
    ``rounding_of_energy``.
    """
    if position.dtype == torch.float64 or not potential.continuous:
        return
    error = rounding_of_energy(potential, position)
    if error > _ROUNDING:
        size = f"{error:.2g} nats" if math.isfinite(error) else "no finite number"
        warnings.warn(
            f"{str(position.dtype).removeprefix('torch.')} is too coarse for this density: rounding sets the energies "
            f"of neighbouring points apart by {size}, so that steps become short or chains stand still. Use double "
            "precision: float64 data, and torch.set_default_dtype(torch.float64) for the constants of the model",
            SamplerWarning,
            stacklevel=stacklevel + 1,
        )
