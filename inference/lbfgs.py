"""L-BFGS for many starting points at once, one evaluation of all of them a tick.

Each row is a minimisation of its own (Nocedal and Wright, Numerical Optimization, 2nd ed., 2006, algorithm 7.4): a
direction from the last ``history`` steps, then a line search for the weak Wolfe conditions by doubling and bisection
(Lewis and Overton, "Nonsmooth optimization via quasi-Newton methods", 2013, algorithm 2.6).  In a tick every row
evaluates one trial point, whether it is in the first or the tenth of its line search, so no row waits for another.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Minimum", "minimize"]

_DECREASE = 1e-4  # of the slope's promise, that a step must keep
_CURVATURE = 0.9  # of the slope, that may be left after a step
_MOST_TRIALS = 30  # a line search that needs more has met the end of the floats
_WINDOW = 20  # ticks between two looks at whether all rows are done


class Minimum(NamedTuple):
    """Where the rows ended.

    Attributes:
        position: ``(row, dim)``.
        value: ``(row,)``.
        gradient: ``(row, dim)``.
        converged: whether no more than the tolerance is left to gain by the direction's own word, ``(row,)``.
    """

    position: Tensor
    value: Tensor
    gradient: Tensor
    converged: Tensor


def minimize(
    value_and_grad: Callable[[Tensor], tuple[Tensor, Tensor]],
    start: Tensor,
    *,
    max_evaluations: int = 2000,
    tolerance: float | None = None,
    history: int = 10,
) -> Minimum:
    """Minimise each row.

    Args:
        value_and_grad: ``(row, dim)`` -> values ``(row,)`` and gradients ``(row, dim)``; a trial point whose value or
            gradient is not finite counts as too far.
        start: ``(row, dim)``; a row that is not finite there stays.
        max_evaluations: most calls.
        tolerance: a row is done when its direction promises a decrease of at most this, ``-g'd / 2``: half the squared
            length of the Newton step, which neither units nor a constant in the value change.  By default it goes on to
            the dtype's precision, and four times that will do.
        history: steps that the direction remembers.
    """
    eps = torch.finfo(start.dtype).eps
    limit, enough = (eps, 4 * eps) if tolerance is None else (tolerance, tolerance)
    z = start
    f, g = value_and_grad(z)
    sound = f.isfinite() & g.isfinite().all(-1)
    # Steepest descent knows no curvature, so that it promises nothing yet; where the slope is zero it is over.
    promise = torch.where((g == 0).all(-1), 0.0, math.inf)
    done = ~sound | (promise <= limit)
    steps = z.new_zeros((history, *z.shape))
    changes = torch.zeros_like(steps)
    direction = -g / _norm(g).clamp(min=1.0)
    t = torch.ones_like(f)
    low, high = torch.zeros_like(f), torch.full_like(f, math.inf)
    trials = torch.zeros_like(f)
    fresh = torch.ones_like(done)  # the direction is the steepest descent, so there is none better to fall back to
    for tick in range(max_evaluations - 1):
        if tick % _WINDOW == 0 and bool(done.all()):
            break
        slope = (g * direction).sum(-1)
        trial = z + t.unsqueeze(-1) * direction
        f_new, g_new = value_and_grad(trial)
        finite = f_new.isfinite() & g_new.isfinite().all(-1)
        # Near the minimum the promised decrease drowns in the value's rounding.
        decreased = finite & (f_new <= f + _DECREASE * t * slope + 4 * eps * f.abs())
        flat = (g_new * direction).sum(-1) >= _CURVATURE * slope
        last = trials >= _MOST_TRIALS - 1
        accept = decreased & (flat | last) & ~done
        shorter, longer = ~decreased & ~done, decreased & ~flat & ~last & ~done
        high, low = torch.where(shorter, t, high), torch.where(longer, t, low)
        t = torch.where(shorter | longer, torch.where(high.isinf(), 2 * t, (low + high) / 2), t)
        trials = trials + (shorter | longer)
        tired = (trials >= _MOST_TRIALS) & ~accept & ~done
        t = torch.where(tired & (low > 0), low, t)  # go back to what was gained
        lost = tired & ((low == 0) | (trials > _MOST_TRIALS + 1))
        done = done | (lost & fresh) | (tired & (promise <= enough))
        restart = lost & ~fresh

        row = accept.unsqueeze(-1)
        s, y = trial - z, g_new - g
        useful = accept & ((s * y).sum(-1) > eps * _norm(s).squeeze(-1) * _norm(y).squeeze(-1))
        kept = useful.unsqueeze(-1)
        steps = torch.where(kept, torch.cat([steps[1:], s.unsqueeze(0)]), steps)
        changes = torch.where(kept, torch.cat([changes[1:], y.unsqueeze(0)]), changes)
        steps, changes = (torch.where(restart.unsqueeze(-1), 0.0, x) for x in (steps, changes))
        z, g = torch.where(row, trial, z), torch.where(row, g_new, g)
        f = torch.where(accept, f_new, f)
        turned = accept | restart
        direction = torch.where(turned.unsqueeze(-1), _direction(g, steps, changes), direction)
        known = (steps[-1] != 0).any(-1) | (g == 0).all(-1)
        promise = torch.where(accept, torch.where(known, -0.5 * (g * direction).sum(-1), math.inf), promise)
        done = done | (promise <= limit)
        fresh = torch.where(turned, restart, fresh)
        t, trials = torch.where(turned, 1.0, t), torch.where(turned, 0.0, trials)
        low, high = torch.where(turned, 0.0, low), torch.where(turned, math.inf, high)
    return Minimum(z, f, g, sound & (promise <= enough))


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def _direction(g: Tensor, steps: Tensor, changes: Tensor) -> Tensor:
    """Minus the inverse Hessian's estimate times the gradient, by the two loops; a pair of zeros is no pair."""
    products = (steps * changes).sum(-1, keepdim=True)
    rho = torch.where(products > 0, 1 / products.clamp(min=torch.finfo(g.dtype).tiny), 0.0)
    q, alphas = g, []
    for k in reversed(range(len(steps))):
        alpha = rho[k] * (steps[k] * q).sum(-1, keepdim=True)
        q = q - alpha * changes[k]
        alphas.append(alpha)
    squares = changes[-1].square().sum(-1, keepdim=True)
    first = 1 / _norm(g).clamp(min=1.0)
    q = q * torch.where(products[-1] > 0, products[-1] / squares.clamp(min=torch.finfo(g.dtype).tiny), first)
    for k, alpha in enumerate(reversed(alphas)):
        beta = rho[k] * (changes[k] * q).sum(-1, keepdim=True)
        q = q + steps[k] * (alpha - beta)
    return -q
