"""The variational posterior over starts and paths: a linear optimum in closed form, and networks that correct it.

A linear SDE with the model's noise stands in for the model.  Given the observations (or what an encoder puts in their
place) its posterior is Gaussian and known: the law of the start z0 = (X(0), V(0)), and for each solver step either the
law of its normals (``"gaussian"``, no discretisation gap) or the best frozen control (``"control"``).  Networks that
start at zero add to both.  Where the model's drift is not the stand-in's, or its diffusion depends on the state, the
linear part sees states and observations in a coordinate of its own (``frame.py``), so that learning either does not
take the paths off the data.  For a linear model the posterior is exact before training; ``"neural"`` leaves the linear
part out, as in Daems et al., ICLR 2024, arXiv 2310.12975.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ppl_models.fractional_sde.frame import Frame, StandIn, frame_of, shown
from ppl_models.fractional_sde.networks import (
    ConstantDiffusion,
    LinearDrift,
    jacobian,
)
from ppl_models.fractional_sde.system import FractionalSystem
from sde import (
    GaussianStepGuide,
    Information,
    LinearControl,
    LinearSDE,
    MarkovNoise,
    Path,
    StepNetwork,
    backward_information,
    frozen_control,
    solve,
    step_guide,
)
from sde.ornstein_uhlenbeck import Discretisation
from sde.solvers import Step

__all__ = ["Draws", "Evidence", "PathPosterior", "SolverGrid"]

_POSTERIORS = ("gaussian", "control", "neural")


class SolverGrid(NamedTuple):
    """Where paths are solved.

    Attributes:
        steps: exact transitions of the noise on the grid.
        positions: of the observations, ``(M,)``.
        keep: positions whose states are kept.
        checkpoint: segments for the backward pass, as in ``sde.solve``.
    """

    steps: Discretisation
    positions: Tensor
    keep: list[int]
    checkpoint: int | str | None = None


class Evidence(NamedTuple):
    """What the path is conditioned on: observations of X, or an encoder's stand-ins for them.

    Attributes:
        values: ``(M, B, D)``, 0 where masked.
        mask: 1 where there is one, ``(M, B, D)``, or ``(M, 1, 1)`` where all series have all.
        noise_std: ``(D,)``.
        context: features of each solver step, ``(N, B, C)``, or None.
    """

    values: Tensor
    mask: Tensor
    noise_std: Tensor
    context: Tensor | None = None


class Draws(NamedTuple):
    """Paths of the posterior, particle first: row p * B + b.

    Attributes:
        x: kept states, ``(T, P B, D)``.
        kl: what KL(q || p) of path and start is the mean of, ``(P B,)``.
        log_ratio: log p / q of path and start, ``(P B,)``.
    """

    x: Tensor
    kl: Tensor
    log_ratio: Tensor


class StartLaw(NamedTuple):
    """q(xi) = N(mean, factor factor') of the standardised start: ``(B, D, S)`` and ``(B or 1, D, S, S)``."""

    mean: Tensor
    factor: Tensor


class Plan(NamedTuple):
    """What the draws of one call share."""

    noise: MarkovNoise
    start: tuple[Tensor, Tensor] | None  # the linear part's law of z0: mean (B or 1, D, S), factor (B or 1, D, S, S)
    information: tuple[Tensor, Tensor] | None  # on z0: root (B or 1, D, S, S+) and vector (B, D, S)
    guide: GaussianStepGuide | None
    control: LinearControl | None
    ahead: Tensor  # features of each step, (N, B, 3 D + C)
    own: StandIn | None  # the linear part's drift, where its coordinate is not x itself
    frame: Frame | None  # and that coordinate


def start_state(system: FractionalSystem, noise: MarkovNoise, xi: Tensor) -> tuple[Tensor, Tensor]:
    """(X(0), V(0)) = m + L xi: ``(B, D)`` and ``(B, D, K)`` from ``(B, D, K + 1)``."""
    past = noise.initial_factor.to(xi).expand(xi.shape[-2], xi.shape[-1] - 1, -1)
    return system.start_mean + system.start_std * xi[..., 0], (past @ xi[..., 1:].unsqueeze(-1)).squeeze(-1)


def tiled(value: Tensor, particles: int, dim: int = 1) -> Tensor:
    """``value`` repeated for each particle along the batch, unless the batch shares it."""
    if value.shape[dim] == 1 or particles == 1:
        return value
    repeats = [1] * value.ndim
    repeats[dim] = particles
    return value.repeat(repeats)


def _once(field: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """A drift or diffusion that is not asked twice in turn for the same state: a guide and the solver both need it."""
    last: list[Tensor] = []

    def asked(time: Tensor, x: Tensor) -> Tensor:
        if not last or last[0] is not x:
            last[:] = [x, field(time, x)]
        return last[1]

    return asked


class _Residual(nn.Module):
    """u(t, x, v, what the linear part does, the next observation, context), 0 before training."""

    def __init__(self, state_size: int, num_processes: int, context_size: int, hidden: Sequence[int]) -> None:
        super().__init__()
        inputs = 3 + state_size * (5 + num_processes) + context_size
        self.net = StepNetwork([inputs, *hidden, state_size], zero_last=True)

    def forward(self, clock: Tensor, x: Tensor, v: Tensor, linear: Tensor, ahead: Tensor) -> Tensor:
        """``(B, D)``."""
        features = [clock.expand(len(x), -1), x, v.flatten(1), torch.asinh(linear), ahead.expand(len(x), -1)]
        out: Tensor = self.net(torch.cat(features, -1))
        return out


class PathPosterior(nn.Module):
    """q(x0, V0, path | observations).

    Args:
        system: the prior.
        mode: ``"gaussian"``, ``"control"`` or ``"neural"``.
        initial: ``"gaussian"`` (full covariance, amortised) or ``"prior"``, which leaves V(0) at its prior as the
            authors do and so keeps a gap for Mandelbrot-Van Ness noise.
        context_size: C, features that an encoder gives each step.
        hidden: widths of the residual network.
    """

    centre: Tensor
    spread: Tensor
    memory: Tensor

    def __init__(
        self, system: FractionalSystem, mode: str, initial: str, context_size: int, hidden: Sequence[int]
    ) -> None:
        super().__init__()
        if mode not in _POSTERIORS:
            raise ValueError(f"posterior must be one of {', '.join(_POSTERIORS)}, got {mode!r}")
        if initial not in ("gaussian", "prior"):
            raise ValueError(f"initial_posterior must be 'gaussian' or 'prior', got {initial!r}")
        if mode != "neural" and not system.noise.constant_loadings:
            raise ValueError("hurst='learn_in_time' needs posterior='neural': the linear part takes one H")
        size, count = system.state_size, system.noise.num_processes
        self.mode, self.initial, self.size, self.count = mode, initial, size, count
        # The stand-in's drift, where the model's own is not linear, and what its scale is over the model's, where
        # that is not constant.
        self.drift = LinearDrift(size)
        self.log_scale = nn.Parameter(torch.zeros(size))
        self.residual = _Residual(size, count, context_size, hidden)
        # q(z0) in coordinates in which p(z0) is standard normal
        self.start_net = StepNetwork([size * (count + 3), *hidden, size * (count + 1)], zero_last=True)
        self.start_tril = nn.Parameter(torch.zeros(size, count + 1, count + 1))
        self.register_buffer("centre", torch.zeros(size))
        self.register_buffer("spread", torch.ones(size))
        self.register_buffer("memory", torch.zeros(()))

    def stand_in(self, system: FractionalSystem, noise: MarkovNoise, own: StandIn | None) -> LinearSDE:
        """The linear SDE of the closed form: the model itself where it is linear.

        Where its coordinate is not x, that begins at the centre, and counts in units of a noise that depends on x.
        """
        drift = system.drift if isinstance(system.drift, LinearDrift) else self.drift
        zero = torch.zeros_like(self.log_scale)
        theta, constant = (zero if part is None else part for part in (drift.theta, drift.constant))
        mean, scale = system.start_mean, self.log_scale.exp()
        if isinstance(system.diffusion, ConstantDiffusion):
            scale = system.scale
        elif system.additive:
            scale = scale * system.diffusion(torch.zeros_like(mean[0]), self.centre.unsqueeze(0))[0]
        if own is not None:
            constant, mean = own.constant, mean - own.centre
        return LinearSDE(noise, *(part.double() for part in (theta, scale, constant, mean, system.start_std)))

    def _own(self, system: FractionalSystem) -> StandIn | None:
        """The stand-in's drift where it is not the model's, or where its coordinate is not."""
        linear = isinstance(system.drift, LinearDrift)
        if linear and system.additive:
            return None
        zero = torch.zeros_like(self.log_scale)
        drift = system.drift if isinstance(system.drift, LinearDrift) else self.drift
        at_centre = drift(zero[0], self.centre.unsqueeze(0))[0] if system.additive else zero
        theta = zero if drift.theta is None else drift.theta
        return StandIn(theta, at_centre, self.centre, 0 * self.memory if linear else self.memory)

    def linearise(self, drift: nn.Module, centre: Tensor, points: Tensor) -> None:
        """Take the tangent of the model's drift at ``centre`` ``(D,)``, each dimension on its own, for the stand-in's,
        and note how fast the drift changes along ``points`` ``(M, D)`` of the state.
        """
        b, slopes = jacobian(drift, centre.unsqueeze(0))
        theta = (-slopes[0].diagonal()).clamp_min(0)
        self.drift.set(theta, b[0] + theta * centre)
        self.memory.copy_(1 / jacobian(drift, points)[1].square().sum((-2, -1)).mean().sqrt())

    def draw(
        self, system: FractionalSystem, grid: SolverGrid, evidence: Evidence, particles: int, seed: int | None = None
    ) -> Draws:
        """Simulate ``particles`` starts and paths for every series; differentiable in all parameters.

        Random numbers come from ``seed``, or from torch's global generator.
        """
        plan = self.plan(system, grid, evidence)
        law = self.start_law(system, evidence, plan)
        source = None
        if seed is not None:
            source = torch.Generator(device=law.mean.device).manual_seed(seed)
        like = law.mean.expand(particles, *law.mean.shape)
        eps = torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=source)
        xi = law.mean + (law.factor @ eps.unsqueeze(-1)).squeeze(-1)
        logdet = torch.linalg.slogdet(law.factor)[1]
        kl = 0.5 * (law.mean.square().sum(-1) + law.factor.square().sum((-2, -1)) - self.count - 1) - logdet
        ratio = 0.5 * (eps.square() - xi.square()).sum(-1) + logdet
        path = self.path(system, grid, plan, *start_state(system, plan.noise, xi.flatten(0, 1)), seed=seed)
        kl = kl.sum(-1).expand(particles, -1).reshape(-1)
        return Draws(path.x, path.kl.sum(-1) + kl, path.log_ratio.sum(-1) + ratio.sum(-1).flatten())

    def plan(self, system: FractionalSystem, grid: SolverGrid, evidence: Evidence) -> "Plan":
        """What the draws of one call share: the noise, the linear part, and the features of each step."""
        dtype = system.start_mean.dtype
        ahead, coming = self._ahead(grid, evidence, dtype)
        noise = system.noise.current()
        if self.mode == "neural":
            return Plan(noise, None, None, None, None, ahead, None, None)
        own, frame = self._own(system), None
        linear = self.stand_in(system, noise, own)
        mean, factor = (part.unsqueeze(0) for part in linear.start())
        values, std = evidence.values.double(), evidence.noise_std.double()
        if own is not None:
            frame = frame_of(system, own, grid, evidence, ahead[..., 2 * self.size : 3 * self.size], coming)
            values, std = frame.z.double(), frame.noise_std.double()
            if frame.scale is not None:
                rate = 1 / frame.scale[0].double().unsqueeze(-1)
                row = torch.cat([rate, torch.ones_like(mean[..., 1:]).expand(len(rate), -1, -1)], -1)
                mean, factor = mean * row, factor * row.unsqueeze(-1)
        transitions = linear.euler_transitions(grid.steps.to(system.start_mean.device, torch.float64))
        data = (grid.positions, values, std, evidence.mask)
        info = backward_information(transitions, *data)
        at_zero = grid.positions.tolist()[0] == 0
        control = guide = None
        if self.mode == "gaussian":
            guide = step_guide(transitions, *data, information=info)
        else:
            control, _ = frozen_control(transitions, linear.start(), *data)
        known = self._at_zero(info, values, std, evidence.mask) if at_zero else (info.factor[0], info.vector[0])
        return Plan(noise, (mean, factor), known, guide, control, ahead, own, frame)

    def start_law(self, system: FractionalSystem, evidence: Evidence, plan: "Plan") -> "StartLaw":
        """q of xi, ``(B, D, K + 1)``, for which (X(0), V(0)) = m + L xi and the prior is standard normal."""
        dtype, device, size = system.start_mean.dtype, system.start_mean.device, self.count + 1
        batch = evidence.values.shape[1]
        eye = torch.eye(size, dtype=torch.float64, device=device)
        first = eye[0]
        mean = torch.zeros(batch, self.size, size, dtype=dtype, device=device)
        lower = eye.to(dtype).expand(1, self.size, -1, -1)
        if plan.start is not None and plan.information is not None:
            start_mean, factor = plan.start
            factor = factor * first if self.initial == "prior" else factor
            root, vector = plan.information
            t = root.mT @ factor
            inner = torch.linalg.cholesky(eye + t.mT @ t)
            score = vector - (root @ (root.mT @ start_mean.unsqueeze(-1))).squeeze(-1)
            mean = torch.cholesky_solve(factor.mT @ score.unsqueeze(-1), inner).squeeze(-1).to(dtype)
            lower = torch.linalg.solve_triangular(inner.mT, eye.expand_as(inner), upper=True).to(dtype)
        value, here = evidence.values[0].to(dtype), evidence.mask[0].to(dtype).expand(batch, self.size)
        features = torch.cat([mean.flatten(1), (value - self.centre) / self.spread * here, here], -1)
        # A coordinate whose column in L is zero does not exist: it stays at its prior.
        live = torch.ones(self.size, size, dtype=dtype, device=device)
        live[:, 0] = (system.start_std > 0).to(dtype)
        if self.initial == "prior" or plan.noise.starts_at_zero:
            live[:, 1:] = 0
        mean = mean + self.start_net(features).unflatten(-1, (self.size, size)) * live
        raw = self.start_tril * live.unsqueeze(-1) * live.unsqueeze(-2)
        return StartLaw(mean, lower @ (torch.diag_embed(raw.diagonal(dim1=-2, dim2=-1).exp()) + raw.tril(-1)))

    def path(
        self, system: FractionalSystem, grid: SolverGrid, plan: "Plan", x0: Tensor, v0: Tensor, seed: int | None = None
    ) -> Path:
        """Solve the posterior SDE from ``x0`` ``(P B, D)`` and ``v0`` ``(P B, D, K)``, particle first."""
        dtype, device = x0.dtype, x0.device
        particles = len(x0) // plan.ahead.shape[1]
        root_span = grid.steps.times.tolist()[-1] ** 0.5
        reach = plan.noise.gains.detach().abs() * root_span
        unit = reach.clamp_min(1e-6).to(device, dtype)
        u = (grid.steps.times[:-1] / grid.steps.times[-1]).to(device, dtype)
        clock = torch.stack([u, torch.sin(2 * math.pi * u), torch.cos(2 * math.pi * u)], -1)
        coming = tiled(plan.ahead, particles)
        # Taken apart once: the gradient of one step's part by an index is a tensor of all steps.
        ahead, hours = coming.unbind(), clock.unbind()
        # Beyond a series' last observation its posterior is the prior.
        open_end = coming[..., self.size : 2 * self.size].amax(-1, keepdim=True).unbind()

        def residual(n: int, x: Tensor, v: Tensor, base: Tensor) -> Tensor:
            # A control is in units of 1 / sqrt(time).
            u: Tensor = self.residual(hours[n], (x - self.centre) / self.spread, v / unit, base * root_span, ahead[n])
            return u * open_end[n] / root_span

        drift, diffusion, factor, own = _once(system.drift), _once(system.diffusion), system.factor, plan.own
        towards = [
            [None] * len(hours) if part is None else tiled(part.to(dtype), particles).unbind()
            for part in (plan.frame[3:] if plan.frame is not None else ())
        ]

        def seen(step: Step, x: Tensor) -> Tensor:
            if own is None:
                return x
            scale = None if system.additive else diffusion(step.time, x) * factor
            return shown(own, x, drift(step.time, x), scale, tuple(part[step.number] for part in towards))

        settings: dict[str, Any] = {}
        if plan.guide is not None:
            gain, offset, tril = (tiled(part.to(dtype), particles).unbind() for part in plan.guide)
            direction = self._direction(grid.steps).to(device, dtype).unbind()

            def guided(step: Step, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
                n = step.number
                mean = offset[n] - (gain[n] @ torch.cat([seen(step, x).unsqueeze(-1), v], -1).unsqueeze(-1)).squeeze(-1)
                r = direction[n]
                base = (mean * r).sum(-1) / step.size
                return mean + residual(n, x, v, base).unsqueeze(-1) * r, tril[n]

            settings["guide"] = guided
        else:
            linear = None
            if plan.control is not None:
                weight, shift = (tiled(part.to(dtype), particles) for part in plan.control)
                linear = weight[..., 0].unbind(), weight[..., 1:].unbind(), shift.unbind()

            def controlled(step: Step, x: Tensor, v: Tensor) -> Tensor:
                n, base = step.number, torch.zeros_like(x)
                if linear is not None:
                    of_x, of_v, rest = (part[n] for part in linear)
                    base = torch.addcmul(rest, of_x, seen(step, x), value=-1) - (of_v * v).sum(-1)
                return base + residual(n, x, v, base)

            settings["control"] = controlled
        if seed is None and grid.checkpoint is None:
            shape = (len(grid.steps.steps), *x0.shape, grid.steps.rank)
            settings["normals"] = torch.randn(shape, dtype=dtype, device=device)
        # A look at the values makes an accelerator wait, so in training it is left to the loop's own guard there.
        return solve(
            drift, system.field_of(diffusion), plan.noise, grid.steps, x0, y0=v0, additive=system.additive,
            keep=grid.keep, seed=seed, checkpoint_segments=grid.checkpoint,
            check=x0.is_cpu or not torch.is_grad_enabled(), **settings,
        )  # fmt: skip

    def _at_zero(self, info: Information, values: Tensor, noise_std: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Information on z0 with the observation at time 0: ``(B or 1, D, S, S + 1)`` and ``(B, D, S)``."""
        root, vector = info.factor[0], info.vector[0]
        std, here = noise_std.expand_as(values)[0], mask[0].double()
        first = torch.zeros(root.shape[-1], dtype=root.dtype, device=root.device)
        first[0] = 1
        row = (here / std)[: len(root)].expand(len(root), self.size)[..., None, None] * first.unsqueeze(-1)
        vector = vector + (here * values[0] / std**2).unsqueeze(-1) * first
        return torch.cat([root, row], -1), vector

    def _ahead(self, grid: SolverGrid, evidence: Evidence, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Next observation of each step: its standardised value, whether there is one (each ``(D,)``), its distance;
        and the context, ``(N, B, 3 D + C)``; and its number, ``(N, B, D)``.
        """
        values, (count, batch) = evidence.values.to(dtype), evidence.values.shape[:2]
        mask = evidence.mask.to(dtype).expand(count, batch, self.size)
        times = grid.steps.times.to(values.device)
        due, starts = times[grid.positions.to(values.device)], times[:-1]
        n, order = (torch.arange(k, device=values.device) for k in (len(starts), count))
        later = (grid.positions.to(values.device) > n.unsqueeze(-1)).to(dtype) * (count - order).to(dtype)
        first = (later[..., None, None] * mask).max(1)  # the earliest that is ahead and there; 0 where none is
        index, any_left = first.indices, (first.values > 0).to(dtype)
        picked = torch.gather(values.unsqueeze(0).expand(len(starts), -1, -1, -1), 1, index.unsqueeze(1)).squeeze(1)
        gap = ((due[index] - starts[:, None, None]) / times[-1]).to(dtype)
        parts = [(picked - self.centre) / self.spread * any_left, any_left, gap.clamp_min(0) * any_left]
        if evidence.context is not None:
            parts.append(evidence.context.to(dtype))
        return torch.cat(parts, -1), index

    @staticmethod
    def _direction(steps: Discretisation) -> Tensor:
        """What a unit control does to each step's normals, ``(N, M)``: its square is the step's length."""
        moved = torch.cat([steps.shift, steps.steps.unsqueeze(-1)], -1).unsqueeze(-1)
        inverse = torch.linalg.pinv(steps.factor, rtol=1e-7)[steps.which]
        return (inverse @ moved).squeeze(-1)
