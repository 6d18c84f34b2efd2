"""The coordinate Z in which the linear part of a posterior sees a state that is not linear.

The linear part knows dZ = (c - theta Z) dt + dB up to a scale, the model is dX = b(X) dt + s(X) o dB.  From one
observation y' to the next, y, both are made to need the same noise n:

    z = (z' + c r) / (1 + theta r) + n,   y = y' + B + n (s(y') + s(y)) / 2,

B what the drift moves X by, by the solver's own rule from its values at y' and y, and r what makes the stand-in lead
as far as X is followed.  Where s does not depend on the state, the stand-in's part of b, c - theta x, is taken at y' in
both places: r knows how it changes on the way, and a drift that is the stand-in's leaves Z = X.  Between observations a
state x is shown as the Z that needs the noise that leads from x to y.  Where noise alone moves X this is the Lamperti
transform by Heun's scheme.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ppl_models.fractional_sde.networks import DiagonalNeuralDiffusion, LinearDrift, NeuralDrift
from ppl_models.fractional_sde.system import FractionalSystem

if TYPE_CHECKING:
    from ppl_models.fractional_sde.posterior import Evidence, SolverGrid

__all__ = ["Frame", "StandIn", "frame_of"]

_LEAST = 1e-3  # of its mean: a diffusion at values with errors may be 0 or less


class StandIn(NamedTuple):
    """The linear part's own drift, c - theta Z from the centre, and for how long the model's is followed.

    Attributes:
        theta, constant, centre: ``(D,)``.
        memory: time in which the model's drift changes, ``()``; 0 where it is not followed at all.
    """

    theta: Tensor
    constant: Tensor
    centre: Tensor
    memory: Tensor


class Frame(NamedTuple):
    """Of each observation ``(M, B, D)``, and of each step towards the one that is coming ``(N, B, D)``.

    Attributes:
        z, noise_std: observations and their errors as the linear part sees them.
        scale: s at them, None where it is one.
        span, rest, keep: the model's drift b(x) moves X by span b(x) + rest + (1 - keep) (y - x) until the coming
            observation y.
        reach: r.
        coming_x, coming_z, coming_scale: of the coming observation, x from the centre.
    """

    z: Tensor
    noise_std: Tensor
    scale: Tensor | None
    span: Tensor
    rest: Tensor
    keep: Tensor
    reach: Tensor
    coming_x: Tensor
    coming_z: Tensor
    coming_scale: Tensor | None


def shown(own: StandIn, x: Tensor, drift: Tensor, scale: Tensor | None, towards: tuple[Tensor | None, ...]) -> Tensor:
    """Z of states ``(B, D)`` with the model's drift and scale there; ``towards`` are one step's ``span`` and so on."""
    span, rest, keep, reach, coming_x, coming_z, coming_scale = towards
    assert span is not None and rest is not None and keep is not None
    assert reach is not None and coming_x is not None and coming_z is not None
    left = keep * (coming_x - (x - own.centre)) - rest - span * drift
    if scale is not None and coming_scale is not None:
        left = left * 2 / torch.maximum(scale + coming_scale, coming_scale)
    z = coming_z - left
    return z + reach * (own.theta * z - own.constant)


def _follow(own: StandIn, due: Tensor, h: Tensor, additive: bool) -> tuple[Tensor, Tensor, Tensor]:
    """How much of the drift now and of that at an observation ``due`` later moves X until it is followed no more, and
    r; over steps of ``h``.

    The drift goes from one to the other in a straight line, summed as the solver does: at the starts of steps by
    Euler's, at both ends by Heun's.  The stand-in's own moves by h sum_j (1 - theta h)^j over m steps, and Z now counts
    (1 - theta h)^m there.
    """
    ahead = torch.minimum(due, torch.maximum(h, own.memory) * (own.memory > 0))
    growth = -torch.log1p(-(own.theta * h).clamp(-0.9, 0.9)) * ahead / h
    safe = torch.where(own.theta == 0, 1.0, own.theta)
    reach = torch.where(own.theta.abs() * ahead < 1e-6, ahead, torch.expm1(growth) / safe)
    span = reach / (1 + own.theta * reach)
    late = ((ahead - h).clamp_min(0) if additive else ahead) / (2 * due).clamp_min(1e-12)
    return span * (1 - late), span * late, reach


def _filled(values: Tensor, mask: Tensor) -> Tensor:
    """``(M, B, D)`` values, those that are missing replaced by the last before them, or by the first of all."""
    here = mask.bool().expand_as(values)
    order = torch.arange(len(values), device=values.device)[:, None, None]
    last = torch.where(here, order, -1).cummax(0).values
    first = here.to(torch.uint8).argmax(0, keepdim=True)
    return values.gather(0, torch.where(last < 0, first, last))


def _at(field: nn.Module, times: Tensor, values: Tensor) -> Tensor:
    """A drift or diffusion at ``(M, B, D)``."""
    if isinstance(field, NeuralDrift | DiagonalNeuralDiffusion | LinearDrift):  # which do not look at the time
        out: Tensor = field(times[0], values.flatten(0, 1)).unflatten(0, values.shape[:2])
        return out
    return torch.stack([field(time, x) for time, x in zip(times, values, strict=True)])


def frame_of(
    system: FractionalSystem, own: StandIn, grid: "SolverGrid", evidence: "Evidence", share: Tensor, coming: Tensor
) -> Frame:
    """The frame of observations.

    Args:
        system: the model.
        own: the stand-in's drift.
        grid, evidence: as of the posterior.
        share: of the span until each step's coming observation, ``(N, B, D)``.
        coming: its number, ``(N, B, D)``.
    """
    clock, place = grid.steps.times.to(share.device), grid.positions.to(share.device)
    # Differences are taken before they lose digits: two times may lie closer than single precision tells apart.
    times, due, steps = clock[place].to(share), clock[place].diff().to(share), clock.diff().to(share)[:, None, None]
    y = _filled(evidence.values.to(share), evidence.mask)
    x, b = y - own.centre, _at(system.drift, times, y)
    noise_std, scale, mean_scale = evidence.noise_std.to(share).expand_as(x[:, :1]), None, None
    if not system.additive:
        scale = torch.nan_to_num(_at(system.diffusion, times, y) * system.factor)
        scale = torch.maximum(scale, _LEAST * scale.detach().abs().mean((0, 1)))
        mean_scale = (scale[1:] + scale[:-1]) / 2
        # An error weighs against the noise of the last solver step before its observation.
        count = place.diff()[:, None, None]
        near = torch.cat([scale[:1], scale[1:] - scale.diff(dim=0) / (2 * count)])
        noise_std = noise_std / near
    early, late, reach = _follow(own, due[:, None, None], steps[place[1:] - 1], system.additive)
    followed = own.theta if system.additive else 0 * own.theta
    noise = (1 - late * followed) * x.diff(dim=0) - early * b[:-1] - late * b[1:]
    noise = noise if mean_scale is None else noise / mean_scale
    z = [x[0] if scale is None else x[0] / scale[0]]
    for n, r in zip(noise, reach.expand_as(noise), strict=True):
        z.append((z[-1] + own.constant * r) / (1 + own.theta * r) + n)

    def at_steps(part: Tensor) -> Tensor:
        return torch.gather(part.expand(len(coming), -1, -1, -1), 1, coming.unsqueeze(1)).squeeze(1)

    early, late, reach = _follow(own, share * clock[-1].to(share), steps, system.additive)
    every = torch.stack(z)
    return Frame(
        every, noise_std, scale, early, late * at_steps(b), 1 - late * followed, reach, at_steps(x), at_steps(every),
        None if scale is None else at_steps(scale),
    )  # fmt: skip
