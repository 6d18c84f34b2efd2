"""Solvers of SDEs driven by a Markov noise, with a control or a guide and their path measures.

    dX = b(t, X) dt + s(t, X) o dB,   B = sum_k l_k (V_k(t) - V_k(0)),   dV_k = (-g_k V_k + beta_k u) dt + beta_k dW,

diagonal noise: s_d depends on x_d alone, and all processes of a dimension share its W.  B is a semimartingale with
quadratic variation (sum_k w_k)^2 t, so a state-dependent s is read in the Stratonovich sense; the Ito correction would
grow without bound with the fastest speed for H < 1/2.  V is stepped by its exact transition in every scheme but
``"plain_euler"``, so the step size bounds no speed.

Schemes: ``"euler"`` (additive noise; strong order 1), ``"heun"`` and ``"milstein"`` (Stratonovich, strong order 1),
``"plain_euler"`` (Euler-Maruyama on V as well, additive noise; for comparison).
P. E. Kloeden, E. Platen, *Numerical Solution of Stochastic Differential Equations*, 1992, ch. 10.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sde._checks import PathError, Times, as_count, base_seed, stream
from sde.noise import MarkovNoise
from sde.ornstein_uhlenbeck import Discretisation, exponential_scan
from sde.segments import run_segment
from sde.step_network import shared_gradients, transformed

__all__ = ["Control", "Field", "Guide", "Path", "Step", "coarsen", "solve"]

_SCHEMES = ("euler", "heun", "milstein", "plain_euler")


class Step(NamedTuple):
    """Where a solver stands.

    Attributes:
        number: of the step, for whatever was prepared on the grid.
        time: at its start, a scalar tensor.
        size: h, a scalar tensor.
    """

    number: int
    time: Tensor
    size: Tensor


Field = Callable[[Tensor, Tensor], Tensor]
"""(time, x ``(B, D)``) -> ``(B, D)``."""
Control = Callable[[Step, Tensor, Tensor], Tensor]
"""(step, x ``(B, D)``, v ``(B, D, K)``) -> u ``(B, D)``."""
Guide = Callable[[Step, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(step, x, v) -> mean ``(B, D, M)`` and lower Cholesky factor ``(B, D, M, M)`` of the step's normals."""


class Path(NamedTuple):
    """Solved paths under the posterior measure Q (the prior P where there is neither control nor guide).

    Attributes:
        times: of the kept states, ``(T,)``.
        x: ``(T, B, D)``.
        y: the processes V at the last time, ``(B, D, K)``: a start for going on.
        kl: what KL(Q || P) is the mean of, per path and dimension, ``(B, D)``: 1/2 int u^2 dt, or the sum of a guide's
            closed-form KLs. Sum over D.
        log_ratio: log dP/dQ, per path and dimension, ``(B, D)``. Sum over D.
    """

    times: Tensor
    x: Tensor
    y: Tensor
    kl: Tensor
    log_ratio: Tensor


class _Problem(NamedTuple):
    """What all segments of a solve share."""

    drift: Field
    diffusion: Field | Tensor
    scheme: str
    additive: bool
    trapezoid: bool
    control: Control | None
    guide: Guide | None
    grid: Discretisation  # on the state's device and in its precision
    speeds: Tensor
    loadings: Tensor  # (N + 1 or 1, *D, K)
    gains: Tensor
    normals: Callable[[int, int], Tensor]  # (first step, last step) -> (n, B, D, M)
    increments: Tensor | None
    keep: frozenset[int]
    check: bool


def solve(
    drift: Field,
    diffusion: Field | Tensor | float,
    noise: MarkovNoise,
    times: Times | Discretisation,
    x0: Tensor,
    *,
    y0: Tensor | None = None,
    control: Control | None = None,
    guide: Guide | None = None,
    scheme: str | None = None,
    additive: bool | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    normals: Tensor | None = None,
    increments: Tensor | None = None,
    keep: Sequence[int] | None = None,
    checkpoint_segments: int | str | None = None,
    kl_rule: str = "chain",
    check: bool = True,
) -> Path:
    """Solve for a batch of paths; differentiable in everything.

    Args:
        drift: b.
        diffusion: s: positive, a number or tensor that broadcasts to ``(B, D)``, or a function of time and state.
        noise: B; dims ``()`` or ``(D,)``.
        times: the grid, ``(N + 1,)``, strictly increasing; or what ``noise.discretise`` made of it, which a training
            loop makes once, as it does not depend on H.
        x0: initial state, ``(B, D)``; its device and precision are the solve's.
        y0: initial processes V, ``(B, D, K)``; drawn from the noise's own law where left out.
        control: u, frozen over a step: Q adds beta u dt to every dV of a dimension (Girsanov).
        guide: instead of a control, the law of each step's M standard normals under Q: it may shrink them as well as
            shift them, and its KL is in closed form.
        scheme: ``"euler"`` by default for additive noise and ``"heun"`` otherwise.
        additive: whether a function ``diffusion`` ignores the state; without it a function is taken to depend on it.
        seed: integer seed.
        generator: instead of a seed.
        normals: the steps' standard normals, ``(N, B, D, M)``, instead of a seed.
        increments: the steps' joint noise of the K unit processes and W, ``(N, B, D, K + 1)``, instead of a seed (for
            coupled step sizes).
        keep: positions in the grid whose states are returned, increasing, 0..N; all by default.
        checkpoint_segments: number of segments whose inner states are recomputed in the backward pass, or ``"sqrt"``
            for sqrt(N) of them, with which memory grows like sqrt(N) (with a short ``keep``). Gradients are the same.
        kl_rule: of a control's KL. ``"chain"``: 1/2 sum u_n^2 h, that of the stepped chain, exactly: a bound holds with
            any control. ``"trapezoid"``: that of the continuous path, the integral with an error of order h^2 instead
            of h, for a control that is smooth in time and can be asked at the end of the grid (one more call of it);
            no bound for the chain: one with values of its own for each step could make the first large at half price.
        check: look once, at the end, whether a state or diffusion went wrong.

    Raises:
        PathError: where a path became NaN or infinite or its diffusion left (0, inf); names time, path and dimension.
        ValueError: for shapes that don't match, unsorted times, times beyond the horizon, unknown schemes, a
            state-dependent diffusion with a scheme for additive noise.
    """
    grid = times if isinstance(times, Discretisation) else noise.discretise(times)
    num_steps = len(grid.steps)
    if not isinstance(x0, Tensor):
        raise TypeError(f"x0 must be a tensor (B, D), got {type(x0).__name__}")
    if x0.ndim != 2 or 0 in x0.shape:
        raise ValueError(f"x0 must be (B, D) and not empty, got {tuple(x0.shape)}")
    if not x0.is_floating_point():
        raise TypeError(f"x0 must be a floating-point tensor, got {x0.dtype}")
    batch, dim = x0.shape
    if noise.dims not in ((), (1,), (dim,)):
        raise ValueError(f"the noise has {noise.dims[0]} dimensions, x0 has {dim}")
    if control is not None and guide is not None:
        raise ValueError("give control or guide, not both")
    if sum(given is not None for given in (seed, generator, normals, increments)) > 1:
        raise ValueError("give one of seed, generator, normals and increments")
    if guide is not None and increments is not None:
        raise ValueError("a guide shapes the steps' normals: give normals, not increments")
    additive = not callable(diffusion) if additive is None else additive or not callable(diffusion)
    scheme = ("euler" if additive else "heun") if scheme is None else scheme
    if scheme not in _SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(_SCHEMES)}, got {scheme!r}")
    if scheme in ("euler", "plain_euler") and not additive:
        raise ValueError(
            f"scheme={scheme!r} reads a state-dependent diffusion in the Ito sense, which is silently wrong here; use "
            "'heun' or 'milstein', or additive=True if diffusion ignores the state"
        )
    if scheme == "plain_euler" and guide is not None:
        raise ValueError("a guide shapes the normals of exact steps: use another scheme than 'plain_euler'")
    if kl_rule not in ("chain", "trapezoid"):
        raise ValueError(f"kl_rule must be 'chain' or 'trapezoid', got {kl_rule!r}")
    if kl_rule == "trapezoid" and control is None:
        raise ValueError("kl_rule='trapezoid' is of a control's KL: give a control")
    device, dtype = x0.device, x0.dtype
    if not callable(diffusion):
        diffusion = torch.as_tensor(diffusion, dtype=dtype, device=device)
        if check and not bool(((diffusion > 0) & torch.isfinite(diffusion)).all()):
            raise ValueError("diffusion must be positive and finite")
    keep = range(num_steps + 1) if keep is None else keep
    kept = [int(i) for i in keep]
    if not kept or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] > num_steps:
        raise ValueError(f"keep must be increasing positions between 0 and {num_steps}")

    for name, given, last in (("normals", normals, grid.rank), ("increments", increments, noise.num_processes + 1)):
        if given is not None and tuple(given.shape) != (num_steps, batch, dim, last):
            raise ValueError(f"{name} must be {(num_steps, batch, dim, last)}, got {tuple(given.shape)}")
    if y0 is not None and tuple(y0.shape) != (batch, dim, noise.num_processes):
        raise ValueError(f"y0 must be {(batch, dim, noise.num_processes)}, got {tuple(y0.shape)}")

    # Noise is drawn in blocks with a stream each, so that a segment can be recomputed without storing it.
    segments = _segments(checkpoint_segments, num_steps)
    needs_seed = (normals is None and increments is None) or (y0 is None and not noise.starts_at_zero)
    root = base_seed(seed, generator) if needs_seed else 0
    block = math.isqrt(num_steps - 1) + 1

    def draw(first: int, last: int) -> Tensor:
        if normals is not None:
            return normals[first:last].to(device, dtype)
        blocks = [
            torch.randn(
                min(block, num_steps - b * block), batch, dim, grid.rank,
                generator=stream(root, "steps", b, device=device), device=device, dtype=dtype,
            )
            for b in range(first // block, (last - 1) // block + 1)
        ]  # fmt: skip
        start = first - first // block * block
        return torch.cat(blocks)[start : start + last - first]

    y = _initial(noise, x0, y0, root)
    loadings = noise.loadings_on(grid.times.to(noise.loadings.device)).to(device, dtype)
    loadings = loadings.reshape(len(loadings), 1, -1, noise.num_processes)
    problem = _Problem(
        drift, diffusion, scheme, additive, kl_rule == "trapezoid", control, guide, grid.to(device, dtype),
        noise.speeds.to(device), loadings, noise.gains.to(device, dtype), draw, increments, frozenset(kept), check,
    )  # fmt: skip

    x, zero = x0, torch.zeros(batch, dim, device=device, dtype=dtype)
    kl, log_ratio, states = zero, zero, [x0] if kept[0] == 0 else []
    worst = torch.full((), num_steps * batch * dim, device=device)
    bounds = [round(i * num_steps / segments) for i in range(segments + 1)]
    for first, last in pairwise(bounds):
        out = (
            run_segment(partial(_run, problem, first, last), x, y)
            if segments > 1 and torch.is_grad_enabled()
            else _run(problem, first, last, x, y)
        )
        x, y, kl_part, ratio_part, bad, *inner = out
        kl, log_ratio = kl + kl_part, log_ratio + ratio_part
        states.extend(inner)
        worst = torch.minimum(worst, bad)
    if check:
        _raise_if_bad(int(worst), num_steps, batch, dim, grid.times)
    return Path(grid.times[torch.tensor(kept, device=grid.times.device)], torch.stack(states), y, kl, log_ratio)


def _segments(asked: int | str | None, num_steps: int) -> int:
    if asked is None:
        return 1
    if asked == "sqrt":
        return math.isqrt(num_steps - 1) + 1
    if isinstance(asked, str):
        raise ValueError(f"checkpoint_segments must be a count, 'sqrt' or None, got {asked!r}")
    return min(as_count(asked, "checkpoint_segments"), num_steps)


def _initial(noise: MarkovNoise, x0: Tensor, y0: Tensor | None, root: int) -> Tensor:
    batch, dim = x0.shape
    shape = (batch, dim, noise.num_processes)
    if y0 is not None:
        return y0.to(x0)
    if noise.starts_at_zero:
        return torch.zeros(shape, device=x0.device, dtype=x0.dtype)
    source = stream(root, "start", device=x0.device)
    normals = torch.randn(*shape, generator=source, device=x0.device, dtype=x0.dtype)
    return (noise.initial_factor.to(x0) @ normals.unsqueeze(-1)).squeeze(-1)


def _run(problem: _Problem, first: int, last: int, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Steps ``first`` to ``last``: new x and v, KL and log-ratio of the segment, first bad entry, kept states."""
    with shared_gradients():
        return _steps(problem, first, last, x, y)


def _steps(problem: _Problem, first: int, last: int, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    p, grid = problem, problem.grid
    count = last - first
    gains = p.gains
    steps = grid.steps[first:last]
    sizes, clock = steps.unbind(), grid.times[first:last].to(x.dtype).unbind()
    # B itself is differenced, with the loadings of each time, so that H may change along the path.
    constant = len(p.loadings) == 1
    loadings = p.loadings.expand(count + 1, -1, -1, -1) if constant else p.loadings[first : last + 1]
    loadings_at = loadings.unbind()
    if p.scheme == "plain_euler":
        decay, shift = 1 - steps.unsqueeze(-1) * p.speeds.to(x.dtype), steps.unsqueeze(-1).expand(-1, len(p.speeds))
    else:
        decay, shift = grid.decay[first:last], grid.shift[first:last]
    if p.guide is None:
        if p.increments is None:
            given = grid.increments(p.normals(first, last), first)
        else:
            given = p.increments[first:last].to(x)
        wiener = given[..., -1]
        noise = wiener.unsqueeze(-1) * gains if p.scheme == "plain_euler" else given[..., :-1] * gains
    states, diffusions, xs = [], [], []
    kl = log_ratio = torch.zeros_like(x)

    if p.control is None and p.guide is None and p.scheme != "plain_euler":
        # Nothing feeds back into V: all of it in one scan, and only X is stepped.
        times = grid.times[first + 1 : last + 1]
        start = torch.cat([(noise[:1] + decay[0] * y), noise[1:]])
        v = exponential_scan(p.speeds, times, start)
        b = (torch.cat([y.unsqueeze(0), v]) * loadings).sum(-1)
        for i, db in enumerate(b.diff(dim=0).unbind()):
            x, s = _advance(p, x, db, clock[i], sizes[i])
            xs.append(x)
            diffusions.append(s)
        y = v[-1]
    else:
        b = (y * loadings_at[0]).sum(-1)
        controls = []
        response = (shift.unsqueeze(1) * gains if gains.ndim == 1 else shift.unsqueeze(1).unsqueeze(1) * gains).unbind()
        decays = decay.unbind()
        fused = p.scheme == "euler" and torch.is_grad_enabled() and not transformed()
        moves = noise.unbind() if p.guide is None else ()
        normals = (drawn := p.normals(first, last)).unbind() if p.guide is not None else ()
        means, trils, bent = [], [], []
        for i in range(count):
            step = Step(first + i, clock[i], sizes[i])
            u: Tensor | None = None
            if p.guide is not None:
                mean, tril = p.guide(step, x, y)
                eps = mean + (tril @ normals[i].unsqueeze(-1)).squeeze(-1)
                move = grid.increments(eps.unsqueeze(0), first + i)[0, ..., :-1] * gains
                means.append(mean)
                trils.append(tril)
                bent.append(eps)
            else:
                move = moves[i]
                if p.control is not None:
                    u = p.control(step, x, y)
                    controls.append(u)
            if fused:
                s = p.diffusion(clock[i], x) if callable(p.diffusion) else p.diffusion
                f = p.drift(clock[i], x)
                x, y, b = _EulerStep.apply(x, y, b, u, f, s, move, decays[i], response[i], loadings_at[i + 1], sizes[i])
            else:
                y = torch.addcmul(move, decays[i], y)
                if u is not None:
                    y = torch.addcmul(y, response[i], u.unsqueeze(-1))
                b_next = (y * loadings_at[i + 1]).sum(-1)
                x, s = _advance(p, x, b_next - b, clock[i], sizes[i])
                b = b_next
            xs.append(x)
            diffusions.append(s)
        if controls:
            pushed = torch.stack(controls)
            kl = 0.5 * (pushed.square() * steps[:, None, None]).sum(0)
            log_ratio = -(pushed * wiener).sum(0) - kl
            if p.trapezoid and p.control is not None:
                end = p.control(Step(last, grid.times[last].to(x.dtype), sizes[-1]), x, y)
                after = torch.cat([pushed[1:], end.unsqueeze(0)]).square()
                kl = 0.5 * kl + 0.25 * (after * steps[:, None, None]).sum(0)
        if means:
            tril = torch.stack(trils)
            logdet = tril.diagonal(dim1=-2, dim2=-1).log().sum((0, -1))
            shift_shrink = torch.stack(means).square().sum((0, -1)) + tril.square().sum((0, -2, -1))
            kl = 0.5 * (shift_shrink - count * grid.rank) - logdet
            eps = torch.stack(bent)
            log_ratio = 0.5 * (drawn.square().sum((0, -1)) - eps.square().sum((0, -1))) + logdet
    states = [state for i, state in enumerate(xs) if first + i + 1 in p.keep]
    bad = _first_bad(p, first, xs, diffusions) if p.check else torch.zeros((), device=x.device)
    return x, y, kl, log_ratio, bad, *states


class _EulerStep(torch.autograd.Function):
    """A step of V, B and X for additive noise as one node of the graph instead of a dozen.

    V' = move + decay V + response u, B' = l . V', X' = X + s (B' - B) + f h.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, b: Tensor, u: Tensor | None, f: Tensor, s: Tensor, move: Tensor,
        decay: Tensor, response: Tensor, loading: Tensor, h: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        after = torch.addcmul(move, decay, y)
        if u is not None:
            after = after.addcmul_(response, u.unsqueeze(-1))
        b_after = (after * loading).sum(-1)
        x_after = torch.addcmul(torch.addcmul(x, s, b_after - b), f, h)
        ctx.save_for_backward(b, u, s, decay, response, loading, h, after, b_after)
        return x_after, after, b_after

    @staticmethod
    def backward(ctx: Any, gx: Tensor, gy: Tensor, gb: Tensor) -> tuple[Tensor | None, ...]:
        b, u, s, decay, response, loading, h, after, b_after = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        along = gx * s
        total = (gb + along).unsqueeze(-1)
        g = torch.addcmul(gy, total, loading)
        return (
            gx if wanted[0] else None,
            g * decay if wanted[1] else None,
            -along if wanted[2] else None,
            (g * response).sum(-1) if wanted[3] else None,
            gx * h if wanted[4] else None,
            (gx * (b_after - b)).sum_to_size(s.shape) if wanted[5] else None,
            g if wanted[6] else None,
            None,
            (g * u.unsqueeze(-1)).sum_to_size(response.shape) if wanted[8] and u is not None else None,
            (total * after).sum_to_size(loading.shape) if wanted[9] else None,
            None,
        )


def _advance(p: _Problem, x: Tensor, db: Tensor, t: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """One step of X for a noise increment ``db``; returns the diffusion that it used as well."""
    drift, diffusion = p.drift, p.diffusion
    if p.scheme in ("euler", "plain_euler"):
        s = diffusion(t, x) if callable(diffusion) else diffusion
        return torch.addcmul(torch.addcmul(x, s, db), drift(t, x), h), s
    if not callable(diffusion):
        s = diffusion
        move = s * db
        if p.scheme == "milstein":
            return torch.addcmul(x, drift(t, x), h) + move, s
        b = drift(t, x)
        return x + 0.5 * (b + drift(t + h, x + b * h + move)) * h + move, s
    if p.scheme == "heun":
        b, s = drift(t, x), diffusion(t, x)
        ahead = x + b * h + s * db
        return x + 0.5 * (b + drift(t + h, ahead)) * h + 0.5 * (s + diffusion(t + h, ahead)) * db, s
    s = diffusion(t, x)
    # s_d depends on x_d alone, so that the derivative along s is s s', entry by entry.
    slope = torch.func.jvp(lambda state: diffusion(t, state), (x,), (s,))[1]
    return x + drift(t, x) * h + s * db + 0.5 * slope * db**2, s


def _first_bad(p: _Problem, first: int, xs: list[Tensor], diffusions: list[Tensor]) -> Tensor:
    """The smallest step * B * D + path * D + dimension that went wrong, or one past the end; asks no host."""
    with torch.no_grad():
        x = torch.stack([state.detach() for state in xs])
        bad = ~torch.isfinite(x)
        if callable(p.diffusion):
            s = torch.stack([value.detach().expand_as(x[0]) for value in diffusions])
            bad = bad | ~((s > 0) & torch.isfinite(s))
        end = len(p.grid.steps) * x[0].numel()
        place = torch.arange(first * x[0].numel(), first * x[0].numel() + x.numel(), device=x.device)
        return torch.where(bad.flatten(), place, end).min()


def _raise_if_bad(place: int, num_steps: int, batch: int, dim: int, times: Tensor) -> None:
    if place >= num_steps * batch * dim:
        return
    step, rest = divmod(place, batch * dim)
    path, axis = divmod(rest, dim)
    span = f"from time {float(times[step]):.10g} to {float(times[step + 1]):.10g} on path {path}, dimension {axis}"
    raise PathError(
        f"the state or the diffusion went wrong (not finite, or diffusion not positive) in the step {span}: take "
        "smaller steps, bound the drift, or keep the diffusion positive"
    )


def coarsen(increments: Tensor, grid: Discretisation) -> Tensor:
    """Joint noise over pairs of steps: the same Brownian path on every second time.

    Args:
        increments: of N steps, N even, ``(N, ..., K + 1)``.
        grid: of the N steps.

    Returns:
        ``(N / 2, ..., K + 1)``.
    """
    if len(increments) % 2 or len(increments) != len(grid.steps):
        raise ValueError(f"increments must hold an even number of steps, those of the grid, got {len(increments)}")
    early, late = increments[::2], increments[1::2]
    decay = torch.nn.functional.pad(grid.decay[1::2], (0, 1), value=1.0).to(increments)
    return early * decay.reshape(len(early), *[1] * (increments.ndim - 2), -1) + late
