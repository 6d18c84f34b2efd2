"""The mean-field equations ``q_g = softmax((Phi q + b)_g)`` of a batch of queries, and every way to solve them.

All solvers stop on the same residual, the largest ``|softmax(Phi q + b) - q|`` over the groups that are not observed,
count their products with Phi, and say of each query whether it converged:

* ``newton``: the default, the fastest that there is for Phi and so many queries. Newton with one curvature for the
  whole batch (see ``batch_newton``) where that pays, and what that leaves over by ``newton_direct`` where Phi is
  diagonal blocks minus a low rank, else by ``newton_cg``. Mirror descent is for what Newton leaves over.
* ``newton_direct``: Newton on the logits, each system solved exactly by the low rank of Phi (see ``low_rank``): the
  fewest products, and a system of the rank's size for each query and step.
* ``newton_cg``: the same by conjugate gradients, for any Phi.
* ``coordinate``: one group (or graph colour) after another; the free energy always falls.
* ``parallel``: all at once, undamped; cycles once the smallest eigenvalue of Phi is well below -1.
* ``damped``: ``q <- (1 - a) q + a softmax(.)``.
* ``mirror``: ``l <- (1 - a) l + a (Phi q + b)``, proximal gradient with the Kullback-Leibler divergence (Baque,
  Bagautdinov, Fleuret and Fua, CVPR 2016, arXiv 1511.06103); with ``a <= 1 / (1 + |lambda_min| / 2)`` the free energy
  always falls.
* ``forward_backward``: ``q <- prox_a((1 - a) q + a (Phi q + b))``, the published solver; converges for ``a < 2 / L``
  with L the largest eigenvalue of ``I - Phi``.
* ``peaceman_rachford``: the splitting of Winston and Kolter (NeurIPS 2020, arXiv 2006.08591), any a, of ``c I - Phi``
  and the entropy less ``c / 2 q^2``, which is convex up to c = 2: c is 1 under the published bound, else 2 with a below
  1. Beyond the relaxed bound (largest eigenvalue of Phi above 2) it need not converge.
* ``krahenbuhl``: the parallel update of ``Phi + |lambda_min| I``, for which it is a concave-convex procedure
  (Krähenbühl and Koltun, ICML 2013). A baseline: the added self terms change the fixed point, so that it converges, but
  not to a solution of these equations, and is reported as not converged.

``anderson=True`` accelerates the last six.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from inference.fixed_point import FixedPoint, fixed_point
from inference.newton_cg import metric_cg, newton_cg
from ppl_models.base import check_count
from ppl_models.monotone_dbm.batch_newton import pays, solve_batch
from ppl_models.monotone_dbm.groups import Groups
from ppl_models.monotone_dbm.operators import PairwiseMap
from ppl_models.monotone_dbm.prox import prox_softmax

__all__ = ["SOLVERS", "MeanFieldProblem", "extreme_eigenvalues", "solve"]

SOLVERS = (
    "newton",
    "coordinate",
    "parallel",
    "damped",
    "mirror",
    "forward_backward",
    "peaceman_rachford",
    "krahenbuhl",
    "newton_cg",
    "newton_direct",
)
_NEWTON = ("newton", "newton_cg", "newton_direct")
_MOST = {**dict.fromkeys(_NEWTON, 50), "coordinate": 2000}
_LANCZOS = 60


class _Counter:
    """Products with Phi, of one batch each."""

    def __init__(self, apply: Callable[[Tensor], Tensor]) -> None:
        self.apply, self.made = apply, 0

    def __call__(self, x: Tensor) -> Tensor:
        self.made += 1
        return self.apply(x)


@dataclass(frozen=True)
class MeanFieldProblem:
    """The equations of B queries.

    Attributes:
        groups: the layout.
        product: ``(B, N) -> (B, N)``.
        bias: b ``(B, N)``.
        clamped: one-hot observed states, zero in free groups, ``(B, N)``.
        free: whether an entry belongs to a group that is not observed, ``(B, N)``.
    """

    groups: Groups
    product: Callable[[Tensor], Tensor]
    bias: Tensor
    clamped: Tensor
    free: Tensor

    def response(self, logits: Tensor) -> Tensor:
        """Probabilities; observed groups keep their state."""
        return torch.where(self.free, self.groups.softmax(logits), self.clamped)

    def apply(self, q: Tensor) -> Tensor:
        """Phi q."""
        return self.product(q)

    def derivative(self, q: Tensor, v: Tensor) -> Tensor:
        """``(diag(q) - q q') v`` in free groups, zero in observed ones."""
        return self.groups.covariance(q, v)

    def energy(self, q: Tensor, applied: Tensor) -> Tensor:
        """The free energy ``-1/2 q' Phi q - b' q + sum q log q``, ``(B,)``; minus it is a lower bound of log Z."""
        return (torch.xlogy(q, q) - q * (0.5 * applied + self.bias)).sum(1)

    def residual(self, q: Tensor, logits: Tensor) -> Tensor:
        """Largest ``|softmax(logits) - q|`` over free entries, ``(B,)``."""
        return (self.response(logits) - q).abs().amax(1)

    def rows(self, index: Tensor) -> Self:
        """Some of the queries."""
        bias, clamped, free = (x if len(x) == 1 else x[index] for x in (self.bias, self.clamped, self.free))
        return replace(self, bias=bias, clamped=clamped, free=free)

    def first_logits(self) -> Tensor:
        """One cheap step from uniform free groups, ``(B, N)``."""
        uniform = self.response(torch.zeros_like(self.clamped))
        return self.apply(uniform) + self.bias


def solve(
    problem: MeanFieldProblem,
    phi: PairwiseMap,
    solver: str = "newton",
    *,
    initial: Tensor | None = None,
    tolerance: float | None = None,
    max_iterations: int | None = None,
    step_size: float | None = None,
    anderson: bool = False,
    colours: Sequence[Tensor] | None = None,
    callback: Callable[[int, Tensor], None] | None = None,
) -> FixedPoint:
    """Logits ``l = Phi q + b`` at the fixed point, ``(B, N)``; ``evaluations`` are products with Phi.

    Args:
        problem: the equations, without gradients.
        phi: Phi, for solvers that need its matrix or eigenvalues.
        solver: one of the above.
        initial: first probabilities ``(B, N)`` of the free groups; one step from uniform by default.
        tolerance: on the residual; by default 1e-10 in float64 and 2e-5 in float32.
        max_iterations: 50 Newton steps (16 with one curvature before them), 2,000 sweeps or updates by default.
        step_size: a of the damped updates; by default the largest that is safe.
        anderson: accelerate the update.
        colours: groups that may be updated at once, for ``coordinate``.
        callback: called with the products so far and the residuals.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    if anderson and solver in (*_NEWTON, "coordinate"):
        raise ValueError(f"anderson=True accelerates updates of all groups at once; solver={solver!r} is none")
    if max_iterations is not None:
        check_count("max_iterations", max_iterations)
    if step_size is not None and not 0 < step_size < math.inf:
        raise ValueError(f"step_size must be positive and finite, got {step_size!r}")
    if tolerance is None:
        tolerance = 1e-10 if problem.bias.dtype == torch.float64 else 2e-5
    low_rank = phi.low_rank
    if solver == "newton_direct" and low_rank is None:
        raise ValueError("solver='newton_direct' needs a dense model of low rank under the bound")
    thin = low_rank is not None and low_rank.thin
    counter = _Counter(low_rank.apply if thin else problem.product)  # type: ignore[union-attr]
    problem = replace(problem, product=counter)
    limit = max_iterations if max_iterations is not None else _MOST.get(solver, 2000)
    tiny = torch.finfo(problem.bias.dtype).tiny
    direct = None if low_rank is None or solver not in ("newton", "newton_direct") else low_rank.direction

    def descend(some: MeanFieldProblem, logits: Tensor) -> FixedPoint:
        """With guaranteed steps, where Newton ends for rounding or a limit."""
        return _iterate(some, phi, "mirror", logits, tolerance, 2000, None, False, None, None)

    if solver == "newton" and pays(phi, len(problem.clamped)):
        found = solve_batch(
            phi,
            *(problem.groups, problem.bias, problem.clamped, problem.free),
            tolerance=tolerance,
            initial=initial,
            max_iterations=max_iterations,
            callback=callback,
        )
        counter.made = found.evaluations
        if max_iterations is None:
            options: dict[str, Any] = {"tolerance": tolerance, "direction": direct}
            found = _on_the_rest(found, tolerance, problem, lambda some, at: newton_cg(some, at, **options))
            found = _on_the_rest(found, tolerance, problem, descend)
        return found._replace(evaluations=counter.made)
    if initial is not None:
        logits = initial.clamp_min(tiny).log()
    elif direct is not None:  # whose first step is worth more than a product with uniform probabilities
        logits = problem.bias.expand_as(problem.clamped).clone()
    else:
        logits = problem.first_logits()
    if solver in _NEWTON:
        options = {"tolerance": tolerance, "max_iterations": limit, "callback": callback, "direction": direct}
        found = newton_cg(problem, logits, **options)
        if max_iterations is None:
            found = _on_the_rest(found, tolerance, problem, descend)
    elif solver == "coordinate":
        found = _coordinate(problem, logits, tolerance, limit, colours, callback)
    else:
        found = _iterate(problem, phi, solver, logits, tolerance, limit, step_size, anderson, counter, callback)
    return found._replace(evaluations=counter.made)


def _on_the_rest(
    found: FixedPoint,
    tolerance: float,
    problem: MeanFieldProblem,
    solver: Callable[[MeanFieldProblem, Tensor], FixedPoint],
) -> FixedPoint:
    """What was found, and better by another solver where it has not converged."""
    if bool(found.converged.all()):
        return found
    rows = (~found.converged).nonzero()[:, 0]
    more = solver(problem.rows(rows), found.value[rows])
    better = more.residual < found.residual[rows]
    value, residual, converged = found.value.clone(), found.residual.clone(), found.converged.clone()
    value[rows] = torch.where(better[:, None], more.value, value[rows])
    residual[rows] = torch.where(better, more.residual, residual[rows])
    converged[rows] = residual[rows] <= tolerance
    iterations = found.iterations.index_add(0, rows, more.iterations)
    return FixedPoint(value, iterations, residual, converged, 0)


def _iterate(
    problem: MeanFieldProblem,
    phi: PairwiseMap,
    solver: str,
    logits: Tensor,
    tolerance: float,
    limit: int,
    step_size: float | None,
    anderson: bool,
    counter: _Counter | None,
    callback: Callable[[int, Tensor], None] | None,
) -> FixedPoint:
    """A map of probabilities (or logits, for ``mirror``) handed to the general solver."""
    groups, needs_spectrum = problem.groups, solver in ("mirror", "forward_backward", "krahenbuhl")
    lowest = 0.0
    if needs_spectrum and (step_size is None or solver == "krahenbuhl"):
        lowest = -extreme_eigenvalues(phi, problem.bias)[0]
    largest = extreme_eigenvalues(phi, problem.bias)[1] if solver == "peaceman_rachford" else 0.0
    safe = {
        "damped": 0.1,
        "mirror": 1 / (1 + max(lowest, 0.0) / 2),
        "forward_backward": 1.9 / (1 + max(lowest, 0.0)),
        "peaceman_rachford": 1.0 if largest < 1 else 0.5,
    }
    a = safe.get(solver, 1.0) if step_size is None else step_size
    own = 0 if solver != "krahenbuhl" else max(lowest, 0.0)

    def target(q: Tensor, bias: Tensor, clamped: Tensor, free: Tensor) -> tuple[Tensor, Tensor, MeanFieldProblem]:
        here = replace(problem, bias=bias, clamped=clamped, free=free)
        made = here.apply(q) + bias
        return made, here.residual(q, made), here

    def update(q: Tensor, bias: Tensor, clamped: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
        q = _into_simplex(q, groups, free, clamped) if anderson else q
        made, residual, here = target(q, bias, clamped, free)
        if solver == "krahenbuhl":  # stops at its own fixed point; the equations' residual is found at the end
            following = here.response(made + own * q)
            return following, (following - q).abs().amax(1)
        if solver == "parallel":
            return here.response(made), residual
        if solver == "damped":
            return (1 - a) * q + a * here.response(made), residual
        inner = (1 - a) * q + a * made
        return torch.where(free, groups.each(lambda part: prox_softmax(part, a), inner), clamped), residual

    def mirror(l: Tensor, bias: Tensor, clamped: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:  # noqa: E741
        here = replace(problem, bias=bias, clamped=clamped, free=free)
        made, residual, _ = target(here.response(l), bias, clamped, free)
        return (1 - a) * l + a * made, residual

    def report(number: int, residual: Tensor) -> None:
        if callback is not None:
            callback(number if counter is None else counter.made, residual)

    batch = len(logits)
    data = tuple(x.expand(batch, -1) for x in (problem.bias, problem.clamped, problem.free))
    options: dict[str, Any] = {
        "method": "anderson" if anderson else "picard",
        "tolerance": tolerance,
        "max_iterations": limit,
        "callback": report,
    }
    if solver == "mirror":
        found = fixed_point(mirror, logits, *data, **options)
        return found._replace(value=problem.apply(problem.response(found.value)) + problem.bias)
    if solver == "peaceman_rachford":
        return _peaceman_rachford(problem, phi, logits, a, largest, data, options)
    found = fixed_point(update, problem.response(logits), *data, **options)
    q = _into_simplex(found.value, groups, *data[:0:-1]) if anderson else found.value
    made = problem.apply(q) + problem.bias
    if solver == "krahenbuhl":
        residual = problem.residual(q, made)
        found = found._replace(residual=residual, converged=residual <= tolerance)
    return found._replace(value=made)


def _peaceman_rachford(
    problem: MeanFieldProblem,
    phi: PairwiseMap,
    logits: Tensor,
    a: float,
    largest: float,
    data: tuple[Tensor, ...],
    options: dict[str, Any],
) -> FixedPoint:
    """Iterates u with ``q = prox(u)``; observed groups are clamped by the prox, so one factor serves the batch.

    The prox of the entropy less ``c / 2 q^2`` with step a is that of c = 1 with step ``a / s`` at ``u / s``, where
    ``s = 1 - a (c - 1)``.
    """
    groups, c = problem.groups, 1 if largest < 1 else 2
    shrink = 1 - a * (c - 1)
    if shrink <= 0:
        raise ValueError(f"step_size must be below 1 where Phi has an eigenvalue above 1, got {a}")
    if a * largest >= 1 + a * c:
        raise ValueError(
            f"solver='peaceman_rachford' with step_size={a:g} needs eigenvalues of Phi below {(1 + a * c) / a:g}, the "
            f"largest is {largest:.3g}: use another solver"
        )
    if phi.matrix is not None:
        eye = torch.eye(len(phi.matrix), dtype=phi.matrix.dtype, device=phi.matrix.device)
        factor = torch.linalg.cholesky((1 + a * c) * eye - a * phi.matrix)

        def invert(x: Tensor) -> Tensor:
            return torch.cholesky_solve(x.T, factor).T
    else:
        # (1 + a c) I - a Phi is (1 + a c) times I minus a scaled Phi: conjugate gradients in the plain metric.
        def invert(x: Tensor) -> Tensor:
            own = 1 + a * c
            solved = metric_cg(lambda v: a / own * problem.apply(v), lambda v: v, x / own, tolerance=1e-12)
            return solved.solution

    def prox(u: Tensor, clamped: Tensor, free: Tensor) -> Tensor:
        return torch.where(free, groups.each(lambda part: prox_softmax(part / shrink, a / shrink), u), clamped)

    def update(u: Tensor, bias: Tensor, clamped: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
        z = prox(u, clamped, free)
        here = replace(problem, bias=bias, clamped=clamped, free=free)
        residual = here.residual(z, here.apply(z) + bias)
        half = 2 * z - u
        return 2 * invert(half + a * bias) - half, residual

    q = problem.response(logits)
    # prox(u) = q for u = (1 - a c) q + a log q
    start = (1 - a * c) * q + a * q.clamp_min(torch.finfo(q.dtype).tiny).log()
    found = fixed_point(update, start, *data, **options)
    return found._replace(value=problem.apply(prox(found.value, *data[1:])) + problem.bias)


def _coordinate(
    problem: MeanFieldProblem,
    logits: Tensor,
    tolerance: float,
    limit: int,
    colours: Sequence[Tensor] | None,
    callback: Callable[[int, Tensor], None] | None,
) -> FixedPoint:
    """Sweeps over graph colours, a product of the whole batch for each."""
    groups = problem.groups
    sets = [torch.tensor([g]) for g in range(groups.num_groups)] if colours is None else colours
    entries = [torch.isin(groups.group_of, c.to(groups.group_of.device)) for c in sets]
    q, batch = problem.response(logits), len(logits)
    iterations = torch.zeros(batch, dtype=torch.long, device=q.device)
    for sweep in range(limit + 1):
        made = problem.apply(q) + problem.bias
        residual = problem.residual(q, made)
        going = residual > tolerance
        if callback is not None:
            callback(sweep * len(sets), residual)
        if sweep == limit or not bool(going.any()):
            break
        iterations += going
        for chosen in entries:
            made = problem.apply(q) + problem.bias
            q = torch.where(chosen & going[:, None], problem.response(made), q)
    made = problem.apply(q) + problem.bias
    return FixedPoint(made, iterations, residual, residual <= tolerance, 0)


def _into_simplex(q: Tensor, groups: Groups, free: Tensor, clamped: Tensor) -> Tensor:
    """Extrapolated probabilities, cut to be positive and made to sum to one."""
    q = q.clamp_min(torch.finfo(q.dtype).tiny)
    return torch.where(free, q / groups.spread(groups.totals(q)), clamped)


def extreme_eigenvalues(phi: PairwiseMap, like: Tensor) -> tuple[float, float]:
    """Smallest and largest eigenvalue of Phi: exact of a matrix, else by Lanczos with full reorthogonalisation, widened
    by its residual bound.

    Args:
        phi: Phi.
        like: ``(..., N)``, for size, dtype and device.
    """
    if phi.matrix is not None:
        values = torch.linalg.eigvalsh(phi.matrix)
        return float(values[0]), float(values[-1])
    n = like.shape[-1]
    v = torch.cos(torch.arange(n, dtype=torch.float64, device=like.device) * 1.7 + 0.3)
    basis = [v / v.norm()]
    diagonal, beside = [], []
    for _ in range(min(_LANCZOS, n)):
        w = phi.apply(basis[-1].to(like.dtype)[None])[0].double()
        diagonal.append(w @ basis[-1])
        stack = torch.stack(basis)
        for _ in range(2):
            w = w - stack.T @ (stack @ w)
        beside.append(w.norm())
        if float(beside[-1]) < 1e-10 * max(1.0, float(torch.stack(diagonal).abs().max())):
            break
        basis.append(w / beside[-1])
    size = len(diagonal)
    tri = torch.diag(torch.stack(diagonal))
    if size > 1:
        off = torch.stack(beside[: size - 1])
        tri = tri + torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(tri)
    slack = [float(beside[size - 1] * vectors[-1, i].abs()) for i in (0, -1)]
    low, high = float(values[0]) - slack[0], float(values[-1]) + slack[1]
    return (low, high) if math.isfinite(low + high) else (-math.inf, math.inf)
