"""Where a model with a nonlinear drift starts: drift, noise and Hurst index from increments, before a path is solved.

What a network has not learned of the drift goes into the noise, and since a drift is smooth, H rises and stays there.
So the drift comes first, from the observations themselves:

1. X at their times is drawn from the posterior of a random walk: the observations where their error is small beside
   their increments, smoother values where it is not.
2. The drift is regressed on the state: least squares of increments (D. Florens-Zmirou, *Approximate discrete-time
   schemes for statistics of diffusion processes*, Statistics 20, 1989), with its mean over a step by Heun's rule.
3. Observations less the drift's integral are fractional motion with error.  Its exact evidence, which for exact
   observations is the likelihood of the stepped SDE, is maximised over H and the scale, then over the drift as well:
   a regression alone gives the drift what is memory of the noise, and pulls H to 1/2.

Where the drift is learned a fifth of the data is held out and says when to stop: few data leave it where it was.
"""

import torch
from torch import Tensor, nn

from inference.fit import fit as run_fit
from inference.runtime.generators import derive_seed, generator
from ppl_models.fractional_sde.bound import PathLikelihood
from ppl_models.fractional_sde.data import Scales, SeriesData
from ppl_models.fractional_sde.exact import ExactEvidence
from ppl_models.fractional_sde.networks import ConstantDiffusion, DiagonalNeuralDiffusion, NeuralDrift
from ppl_models.fractional_sde.system import FractionalSystem

__all__ = ["start_from_increments"]

_SERIES, _TIMES = 128, 200  # whose evidence is maximised: enough for a start
_ENOUGH = 100  # increments, from which on they say something of a drift
_FIFTH = 5  # of the data are held out
_LOOKS = 20  # at the held-out data during a search
_NOTHING = 1.5  # times the increments' mean square: a drift that leaves more is not meant for steps of this length


class _DriftRegression(nn.Module):
    """Mean square of what the drift leaves of increments, in units of theirs."""

    unit: Tensor

    def __init__(self, drift: nn.Module, unit: Tensor) -> None:
        super().__init__()
        self.drift = drift
        self.register_buffer("unit", unit)

    def forward(self, before: Tensor, after: Tensor, time: Tensor, size: Tensor) -> Tensor:
        """A scalar, from rows ``(R, D)``, ``(R, D)``, ``(R, 1)`` and ``(R, 1)``."""
        return ((after - before - _moved(self.drift, time, before, size)) / self.unit).square().mean()


class _DiffusionRegression(nn.Module):
    """Negative log-likelihood of what a drift leaves of increments, as normal with the diffusion's deviation and that
    of errors.
    """

    def __init__(self, diffusion: nn.Module) -> None:
        super().__init__()
        self.diffusion = diffusion

    def forward(self, x: Tensor, rest: Tensor, errors: Tensor, time: Tensor) -> Tensor:
        """A scalar, from rows ``(R, D)``, ``(R, D)`` over the root of a tick, their errors' variances, ``(R, 1)``."""
        variance = self.diffusion(time, x).square() + errors
        return 0.5 * (rest.square() / variance + variance.log()).mean()


class _PathEvidence(nn.Module):
    """Negative log evidence of series as a drift, taken at ``before``, and motion with error."""

    size: Tensor

    def __init__(self, drift: nn.Module, motion: ExactEvidence, size: Tensor) -> None:
        super().__init__()
        self.drift, self.motion = drift, motion
        self.register_buffer("size", size)

    def forward(self, values: Tensor, mask: Tensor, before: Tensor) -> Tensor:
        """A scalar, from ``(B, T, D)``, its mask and ``(B, T - 1, D)``."""
        path = _along(self.drift, self.motion.times.to(values), before, self.size).cumsum(1)
        rest = values - torch.nn.functional.pad(path, (0, 0, 1, 0))
        loss: Tensor = self.motion(torch.where(mask, rest, 0.0), mask)
        return loss


def _moved(drift: nn.Module, time: Tensor, x: Tensor, size: Tensor) -> Tensor:
    """What the drift moves ``x`` by over a step, by Heun's rule; the shape of ``x``."""
    b: Tensor = drift(time, x)
    out: Tensor = 0.5 * (b + drift(time + size, x + b * size)) * size
    return out


def _along(drift: nn.Module, times: Tensor, before: Tensor, size: Tensor) -> Tensor:
    """The same for each step of ``(B, T - 1, D)``."""
    if isinstance(drift, NeuralDrift):  # which does not look at the time
        return _moved(drift, times[0], before, size.unsqueeze(-1))
    return torch.stack([_moved(drift, times[i], x, size[i]) for i, x in enumerate(before.unbind(1))], 1)


@torch.no_grad()
def _smoothed_draw(data: SeriesData, found: Scales, noise_std: Tensor, seed: int) -> Tensor:
    """X at the observation times, drawn as a random walk's: forward filter, backward draw, ``(N, T, D)``."""
    y, here, error = data.values.double(), data.mask.double(), noise_std.double().square()
    gap = data.times.diff().to(y.device)
    jump = found.jump.double().square()
    # The differences' mean square holds the errors of both ends.
    rate = (jump - 2 * error / gap.mean()).clamp_min(0.1 * jump)
    mean, variance = found.mean.double().expand_as(y[:, 0]), found.std.double().square().expand_as(y[:, 0])
    means, variances = [], []
    for i in range(len(data.times)):
        variance = variance + rate * gap[i - 1] if i else variance
        weight = variance / (variance + error) * here[:, i]
        mean, variance = mean + weight * (y[:, i] - mean), variance * (1 - weight)
        means.append(mean)
        variances.append(variance)
    source = generator(seed, "start", device=y.device)
    normals = torch.randn(y.shape, generator=source, dtype=y.dtype, device=y.device)
    x = means[-1] + variances[-1].sqrt() * normals[:, -1]
    out = [x]
    for i in range(len(data.times) - 2, -1, -1):
        weight = variances[i] / (variances[i] + rate * gap[i])
        x = means[i] + weight * (x - means[i]) + (variances[i] * (1 - weight)).sqrt() * normals[:, i]
        out.append(x)
    return torch.stack(out[::-1], 1).to(data.values.dtype)


def start_from_increments(
    system: FractionalSystem, data: SeriesData, found: Scales, noise_std: Tensor, seed: int
) -> Tensor | None:
    """Learn a neural drift, and H where it is learned, in place.

    Args:
        system: of a nonlinear drift and one H.
        data: ``(N, T, D)``.
        found: what they say about scales.
        noise_std: of the observations, ``(D,)``.
        seed: of the searches.

    Returns:
        What noise moves X by in a ``tick``, over the tick's root, ``(D,)``: as a system's scale is learned.  None where
        there are too few increments, or the drift has parameters of the user's, or makes nothing of the increments.
    """
    drift, learns = system.drift, isinstance(system.drift, NeuralDrift)
    whole = data.mask.all(-1)
    seen = whole[:, 1:] & whole[:, :-1]
    if int(seen.sum()) < _ENOUGH or (not learns and any(p.requires_grad for p in drift.parameters())):
        return None
    x, size = _smoothed_draw(data, found, noise_std, seed), data.times.diff().to(data.values)
    time = data.times[:-1].to(data.values)
    rows = [x[:, :-1][seen], x[:, 1:][seen], *(part.expand_as(seen)[seen].unsqueeze(-1) for part in (time, size))]
    unit = (rows[1] - rows[0]).square().mean(0).sqrt()
    if learns:
        regression = _DriftRegression(drift, unit)
        _search(regression, rows, num_steps=1000, batch_size=512, lr=0.01, seed=seed, hold_out=True)
    x, seen, size = x[:_SERIES, :_TIMES], seen[:_SERIES, : _TIMES - 1], size[: _TIMES - 1]
    data = SeriesData(data.times[:_TIMES], data.values[:_SERIES, :_TIMES], data.mask[:_SERIES, :_TIMES])
    with torch.no_grad():
        left = (x.diff(dim=1) - _along(drift, data.times.to(x), x[:, :-1], size))[seen] / unit
        if not bool(left.square().mean() < _NOTHING):
            return None
    motion = FractionalSystem(system.state_size, "none", "constant", system.noise, (found.mean, found.std), ())
    motion.to(data.values)
    motion.set_units(data.times, found.jump, found.mean)
    motion.put_scale(found.jump * left.square().mean(0).sqrt())
    errors = PathLikelihood(system.state_size).to(data.values)
    errors.set(noise_std, found.std)
    series = [data.values, data.mask, x[:, :-1]]
    objective = _PathEvidence(drift, ExactEvidence(motion, errors, data.times, data.shared), size)
    learned = [p for p in drift.parameters() if p.requires_grad]
    for p in learned:
        p.requires_grad_(False)
    _search(objective, series, num_steps=80, batch_size=32, lr=0.05, seed=seed)
    for p in learned:
        p.requires_grad_()
    if learns and len(x) >= _FIFTH:
        _search(objective, series, num_steps=300, batch_size=32, lr=0.02, seed=seed, hold_out=True)
    assert isinstance(motion.diffusion, ConstantDiffusion)
    jump = motion.diffusion.scale.detach()
    if isinstance(system.diffusion, DiagonalNeuralDiffusion):
        _learn_diffusion(system, rows, jump, noise_std, seed)
    return jump


def _learn_diffusion(system: FractionalSystem, rows: list[Tensor], jump: Tensor, noise_std: Tensor, seed: int) -> None:
    """How the diffusion depends on the state, from what the drift leaves of the increments ``rows``."""
    diffusion = system.diffusion
    assert isinstance(diffusion, DiagonalNeuralDiffusion)
    before, after, time, size = rows
    with torch.no_grad():
        diffusion.unit.copy_(jump)
        unit = size**system.noise.hurst * system.tick_factor
        rest = (after - before - _moved(system.drift, time, before, size)) / unit
        # Both ends of an increment have an error, if a start for a learned one may be far too large.
        errors = torch.minimum(2 * (noise_std / unit).square(), rest.square().mean(0) / 2)
    _search(
        _DiffusionRegression(diffusion), [before, rest, errors, time], num_steps=1000, batch_size=512, lr=0.01,
        seed=seed, hold_out=True,
    )  # fmt: skip


def _search(
    objective: nn.Module,
    rows: list[Tensor],
    *,
    num_steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    hold_out: bool = False,
) -> None:
    """Adam with a cosine schedule; with ``hold_out`` the last fifth of the rows says which parameters are kept."""
    held = len(rows[0]) // _FIFTH if hold_out else 0
    kept = len(rows[0]) - held
    run_fit(
        objective,
        [part[:kept] for part in rows],
        validation=[part[kept:] for part in rows] if held else None,
        num_steps=num_steps,
        batch_size=min(batch_size, kept),
        lr=lr,
        scheduler=lambda made: torch.optim.lr_scheduler.CosineAnnealingLR(made, num_steps, 1e-5),
        clip_norm=100.0,
        validate_every=num_steps // _LOOKS,
        patience=_LOOKS if held else None,
        seed=derive_seed(seed, "start"),
        progress=False,
    )
