"""Newton's method with conjugate gradients in the response's metric, for fixed points ``l = A q(l) + b``.

``A`` is symmetric and ``q`` the gradient of a convex function, with derivative ``P = dq/dl`` symmetric and positive
semidefinite: mean field of a pairwise model (``q`` the softmax), continuous Hopfield networks, symmetric equilibrium
layers.  ``I - A P`` is then self-adjoint in the inner product ``<u, v> = u' P v``, and conjugate gradients in it solve

    (I - A P) d = A q + b - l

with one product with ``A`` an iteration.  ``d`` is a direction of descent of the energy whose stationary points are the
fixed points, so halving the step until the energy has decreased enough makes the method converge from anywhere.  The
same solve gives the implicit gradient (``solve_adjoint``).
"""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor

from inference.fixed_point import FixedPoint

__all__ = ["MetricSolve", "SymmetricProblem", "metric_cg", "newton_cg", "solve_adjoint"]

_ARMIJO = 1e-4
_MOST_HALVINGS = 30
_FORCING = 0.1  # relative accuracy of the first linear solve; the square root of the residual later


class SymmetricProblem(Protocol):
    """A batch of equations ``l = A q(l) + b``; all tensors ``(batch, n)``."""

    @property
    def bias(self) -> Tensor:
        """b, ``(batch, n)`` or ``(1, n)``."""

    def response(self, logits: Tensor) -> Tensor:
        """q(l)."""

    def apply(self, q: Tensor) -> Tensor:
        """A q."""

    def derivative(self, q: Tensor, v: Tensor) -> Tensor:
        """P v, with P at the response q."""

    def energy(self, q: Tensor, applied: Tensor) -> Tensor:
        """What falls along the way, ``(batch,)``; ``applied`` is A q."""

    def residual(self, q: Tensor, logits: Tensor) -> Tensor:
        """How far ``q(logits)`` is from ``q``, ``(batch,)``."""

    def rows(self, index: Tensor) -> Self:
        """The equations of some samples."""


class MetricSolve(NamedTuple):
    """Attributes:
    solution: ``(batch, n)``.
    iterations: products with the operator.
    """

    solution: Tensor
    iterations: int


def metric_cg(
    apply: Callable[[Tensor], Tensor],
    metric: Callable[[Tensor], Tensor],
    rhs: Tensor,
    *,
    tolerance: Tensor | float,
    max_iterations: int = 200,
    wait: bool = True,
) -> MetricSolve:
    """Solve ``(I - A P) d = rhs`` of each sample in the inner product of ``P``.

    A sample stops at its tolerance, and where the curvature is not positive (``A`` too large for a unique fixed
    point): then ``d`` is what there is so far, or ``rhs`` itself, which descends as well.

    Args:
        apply: A.
        metric: P.
        rhs: ``(batch, n)``.
        tolerance: on the residual's P-norm relative to that of ``rhs``; a number or ``(batch,)``.
        max_iterations: at most.
        wait: whether to look at the device after each iteration and end early.
    """
    d, r, p = torch.zeros_like(rhs), rhs, rhs
    pr = metric(r)
    rho = (r * pr).sum(1)
    pp = pr
    # Compared after division by the right side, so that its scale does not matter.
    start = rho.clamp_min(torch.finfo(rhs.dtype).tiny)
    goal = tolerance**2
    active = rho > torch.finfo(rhs.dtype).tiny
    made = 0
    for iteration in range(max_iterations):
        if wait and not bool(active.any()):
            break
        mp = p - apply(pp)
        made += 1
        curvature = (pp * mp).sum(1)
        fine = active & (curvature > 0)
        if iteration == 0:
            d = torch.where((active & ~fine)[:, None], rhs, d)
        step = torch.where(fine, rho / torch.where(fine, curvature, torch.ones_like(rho)), torch.zeros_like(rho))
        d = d + step[:, None] * p
        r = r - step[:, None] * mp
        pr = metric(r)
        new = (r * pr).sum(1)
        active = fine & (new / start > goal)
        ratio = torch.where(active, new / torch.where(active, rho, torch.ones_like(rho)), torch.zeros_like(rho))
        p = r + ratio[:, None] * p
        pp = pr + ratio[:, None] * pp
        rho = new
    return MetricSolve(d, made)


def newton_cg(
    problem: SymmetricProblem,
    initial: Tensor,
    *,
    tolerance: float | None = 1e-8,
    max_iterations: int = 50,
    max_inner: int = 200,
    direction: Callable[[Tensor, Tensor], Tensor] | None = None,
    callback: Callable[[int, Tensor], None] | None = None,
) -> FixedPoint:
    """Solve ``l = A q(l) + b`` for each sample.

    Args:
        problem: the equations.
        initial: logits ``(batch, n)``.
        tolerance: on ``problem.residual``.  ``None``: exactly ``max_iterations`` steps of ``max_inner`` products each,
            full steps, and the device is never waited for.
        max_iterations: Newton steps at most.
        max_inner: products in each linear solve at most.
        direction: ``(q, r) -> d`` that solves ``(I - A P) d = r`` itself, where A's structure allows it; conjugate
            gradients without it.
        callback: called with the number of products so far and the residuals of all samples.

    Returns:
        The logits; ``evaluations`` are products with A.
    """
    best, batch = initial.clone(), len(initial)
    least = initial.new_full((batch,), math.inf)
    steps = torch.zeros(batch, dtype=torch.long, device=initial.device)
    rows = torch.arange(batch, device=initial.device)
    logits, q = initial, problem.response(initial)
    applied, products = problem.apply(q), 1
    for number in range(max_iterations + 1):
        target = applied + problem.bias
        residual = torch.nan_to_num(problem.residual(q, target), nan=math.inf)
        better = residual < least[rows]
        # The target is the better iterate: it is one product further.
        best[rows] = torch.where(better[:, None], target, best[rows])
        least[rows] = torch.where(better, residual, least[rows])
        if callback is not None:
            callback(products, least)
        if number == max_iterations:
            break
        if tolerance is not None:
            going = (residual > tolerance) & torch.isfinite(target).all(1)
            if not bool(going.all()):
                keep = going.nonzero()[:, 0]
                if not len(keep):
                    break
                rows, logits, q = rows[keep], logits[keep], q[keep]
                applied, target, residual = applied[keep], target[keep], residual[keep]
                problem = problem.rows(keep)
        r = target - logits
        if direction is not None:
            solved = MetricSolve(direction(q, r), 0)
        else:
            here = problem
            solved = metric_cg(
                here.apply,
                lambda v, here=here, q=q: here.derivative(q, v),  # type: ignore[misc]
                r,
                tolerance=residual.sqrt().clamp(max=_FORCING),
                max_iterations=max_inner,
                wait=tolerance is not None,
            )
        products += solved.iterations
        steps[rows] += 1
        if tolerance is None:
            logits = logits + solved.solution
            q = problem.response(logits)
            applied, products = problem.apply(q), products + 1
        else:
            logits, q, applied, more = _descend(problem, logits, q, applied, r, solved.solution)
            products += more
    converged = torch.isfinite(least) if tolerance is None else least <= tolerance
    return FixedPoint(best, steps, least, converged, products)


def _descend(
    problem: SymmetricProblem, logits: Tensor, q: Tensor, applied: Tensor, r: Tensor, d: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Logits, response and product after the longest of the steps 1, 1/2, 1/4, ... that descends enough."""
    energy = problem.energy(q, applied)
    slope = (r * problem.derivative(q, d)).sum(1)
    slack = 16 * torch.finfo(q.dtype).eps * (1 + (q * (applied.abs() + problem.bias.abs())).sum(1))
    size = torch.ones_like(energy)
    new_logits = logits + d
    new_q = problem.response(new_logits)
    new_applied, products = problem.apply(new_q), 1
    for _ in range(_MOST_HALVINGS):
        bound = energy - _ARMIJO * size * slope + slack
        high = ~(problem.energy(new_q, new_applied) <= bound)  # NaN is too high
        failing = high.nonzero()[:, 0]
        if not len(failing):
            break
        size[failing] *= 0.5
        tried = logits[failing] + size[failing, None] * d[failing]
        some = problem.rows(failing)
        response = some.response(tried)
        new_logits = new_logits.index_put((failing,), tried)
        new_q = new_q.index_put((failing,), response)
        new_applied = new_applied.index_put((failing,), some.apply(response))
        products += 1
    return new_logits, new_q, new_applied, products


def solve_adjoint(
    apply: Callable[[Tensor], Tensor],
    metric: Callable[[Tensor], Tensor],
    cotangent: Tensor,
    *,
    tolerance: float = 1e-8,
    max_iterations: int = 200,
    wait: bool = True,
) -> Tensor:
    """``(I - P A)^-1 g`` of each sample, the cotangent of ``A q + b`` if g is that of the fixed point's logits.

    It is ``g + P u`` with ``(I - A P) u = A g``.

    Args:
        apply, metric, max_iterations, wait: as in :func:`metric_cg`.
        cotangent: g ``(batch, n)``; any scale, zero included.
        tolerance: relative, on the solve.
    """
    length = cotangent.norm(dim=1, keepdim=True).clamp_min(torch.finfo(cotangent.dtype).tiny)
    unit = cotangent / length
    options = {"tolerance": tolerance, "max_iterations": max_iterations, "wait": wait}
    u = metric_cg(apply, metric, apply(unit), **options).solution  # type: ignore[arg-type]
    return (unit + metric(u)) * length
