"""Fixed points ``z = f(z)`` of a batch, with iterations and residual of each sample, and their implicit gradients.

    result = fixed_point(f, z0, x)                      # rows of x go with the rows of z
    z = implicit_gradient(f, result.value, x)           # the same value, differentiable in x and in f's parameters

A sample that has converged is frozen and leaves the batch; one that has not is returned at its best iterate and says
so.  Anderson acceleration is type II (Walker and Ni, "Anderson acceleration for fixed-point iterations", SIAM Journal
on Numerical Analysis 49, 2011, equation 2.1).  The gradient is the implicit function theorem's: with ``J = df/dz`` at
the fixed point, a cotangent g of z is the cotangent ``(I - J')^-1 g`` of the explicit ``f(z*, x)``.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from inference.kernels.base import count, positive
from inference.results.brief import brief

__all__ = ["FixedPoint", "attach_gradient", "cheap_to_read", "fixed_point", "implicit_gradient"]

_METHODS = ("picard", "anderson")
Function = Callable[..., Tensor | tuple[Tensor, Tensor]]


@brief
class FixedPoint(NamedTuple):
    """What a solver found.

    Attributes:
        value: ``(batch, ...)``; of samples that have not converged the iterate of the lowest residual.
        iterations: updates made of each sample, ``(batch,)``.
        residual: at ``value``, ``(batch,)``.
        converged: whether the residual is within the tolerance, ``(batch,)``.
        evaluations: calls of the function, whatever the number of samples still in them.
    """

    value: Tensor
    iterations: Tensor
    residual: Tensor
    converged: Tensor
    evaluations: int


def fixed_point(
    function: Function,
    initial: Tensor,
    *args: Tensor,
    method: str = "picard",
    tolerance: float | None = 1e-6,
    max_iterations: int = 1000,
    damping: float = 1.0,
    memory: int = 5,
    ridge: float = 1e-8,
    callback: Callable[[int, Tensor], None] | None = None,
) -> FixedPoint:
    """Iterate ``z <- (1 - damping) z + damping f(z, *args)`` until each sample's residual is small.

    Args:
        function: ``f(z, *args) -> f(z)``, or ``-> (f(z), residual)`` where the residual ``(batch,)`` belongs to ``z``;
            by default it is the largest ``|f(z) - z|``.  Rows must not depend on each other.
        initial: ``(batch, ...)``.
        args: tensors whose rows go with the samples.
        method: ``"picard"`` iterates as it stands; ``"anderson"`` extrapolates from the last ``memory`` iterates.
        tolerance: on the residual.  ``None`` makes exactly ``max_iterations`` updates and never waits for the device.
        max_iterations: updates at most.
        damping: in (0, 2).
        memory: iterates that Anderson combines.
        ridge: Anderson's Tikhonov term, relative to the mean diagonal of the Gram matrix.
        callback: called with the number of the update and the residuals of all samples, ``(batch,)``.

    Raises:
        TypeError, ValueError: bad arguments, or a function that returns another shape.
    """
    if method not in _METHODS:
        raise ValueError(f"method must be one of {_METHODS}, got {method!r}")
    count("max_iterations", max_iterations, 1)
    count("memory", memory, 1)
    damping = positive("damping", damping, upper=2.0)
    if tolerance is not None:
        positive("tolerance", tolerance)
    batch = len(initial)
    best, least = initial.clone(), initial.new_full((batch,), math.inf)
    steps = torch.zeros(batch, dtype=torch.long, device=initial.device)
    rows = torch.arange(batch, device=initial.device)
    z, data, evaluations = initial, args, 0
    history = _Anderson(memory, damping, ridge) if method == "anderson" else None
    for number in range(max_iterations + 1):
        following, residual = evaluate(function, z, data)
        evaluations += 1
        better = residual < least[rows]
        best[rows] = torch.where(_as(better, z), z, best[rows])
        least[rows] = torch.where(better, residual, least[rows])
        if callback is not None:
            callback(number, least.scatter(0, rows, residual))
        if number == max_iterations:
            break
        if tolerance is not None:
            going = (residual > tolerance) & torch.isfinite(following).flatten(1).all(1)
            if not bool(going.all()):
                keep = going.nonzero()[:, 0]
                if not len(keep):
                    break
                rows, z, following = rows[keep], z[keep], following[keep]
                data = tuple(value[keep] for value in data)
                if history is not None:
                    history.keep(keep)
        steps[rows] += 1
        z = z + damping * (following - z) if history is None else history.extrapolate(z, following)
    found = least <= (math.inf if tolerance is None else tolerance)
    return FixedPoint(best, steps, least, found & torch.isfinite(least), evaluations)


def evaluate(function: Function, z: Tensor, args: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """``f(z)`` and the residual of each sample; NaN counts as infinitely far."""
    made = function(z, *args)
    following, residual = made if isinstance(made, tuple) else (made, (made - z).abs().flatten(1).amax(1))
    if following.shape != z.shape or residual.shape != z.shape[:1]:
        raise ValueError(
            f"function must return {tuple(z.shape)} and residuals ({len(z)},), it returned {tuple(following.shape)} "
            f"and {tuple(residual.shape)}"
        )
    return following, torch.nan_to_num(residual, nan=math.inf)


def cheap_to_read(value: Tensor) -> bool:
    """Whether reading a number back costs nothing: the tensor is in the processor's own memory."""
    return value.device.type == "cpu"


def attach_gradient(explicit: Tensor, adjoint: Callable[[Tensor], Tensor]) -> Tensor:
    """``explicit`` unchanged, whose cotangents go through ``adjoint`` on their way back.

    With ``explicit = f(z*, x)`` at a detached fixed point and ``adjoint(g) = (I - J')^-1 g`` the result is z* with the
    gradient of the implicit function.  It is once differentiable.
    """
    return _Attach.apply(explicit, adjoint)


def implicit_gradient(
    function: Function,
    value: Tensor,
    *args: Tensor,
    method: str = "anderson",
    tolerance: float | None = None,
    max_iterations: int = 500,
) -> Tensor:
    """The fixed point ``value`` as a differentiable function of ``args`` and of what ``function`` closes over.

    The adjoint equation ``y = J' y + g`` is solved by :func:`fixed_point` on cotangents that are scaled to length one
    sample by sample, so that a loss's scale does not meet the tolerance.

    Args:
        function, args: as in :func:`fixed_point`.
        value: its fixed point.
        method, max_iterations: of the adjoint solve.
        tolerance: of it; by default 1e-8, or eight times the dtype's precision.
    """
    if tolerance is None:
        tolerance = max(1e-8, 8 * torch.finfo(value.dtype).eps)
    with torch.enable_grad():
        at = value.detach().requires_grad_()
        inner = evaluate(function, at, args)[0]
    fresh = evaluate(function, value.detach(), args)[0]

    def adjoint(g: Tensor) -> Tensor:
        length = g.flatten(1).norm(dim=1).clamp_min(torch.finfo(g.dtype).tiny)
        unit = g / _as(length, g)

        def pull(y: Tensor, rows: Tensor, target: Tensor) -> Tensor:
            full = torch.zeros_like(g).index_put((rows,), y)
            (back,) = torch.autograd.grad(inner, at, full, retain_graph=True)
            return back[rows] + target

        rows = torch.arange(len(g), device=g.device)
        options: dict[str, Any] = {"method": method, "tolerance": tolerance, "max_iterations": max_iterations}
        return fixed_point(pull, unit, rows, unit, **options).value * _as(length, g)

    return attach_gradient(fresh, adjoint)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, explicit: Tensor, adjoint: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.adjoint = adjoint
        return explicit.view_as(explicit)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return ctx.adjoint(g), None


class _Anderson:
    """The last iterates of each sample, and what is made of them."""

    def __init__(self, memory: int, damping: float, ridge: float) -> None:
        self.memory, self.damping, self.ridge = memory, damping, ridge
        self.iterates: list[Tensor] = []
        self.changes: list[Tensor] = []

    def keep(self, rows: Tensor) -> None:
        self.iterates = [x[rows] for x in self.iterates]
        self.changes = [x[rows] for x in self.changes]

    def extrapolate(self, z: Tensor, following: Tensor) -> Tensor:
        self.iterates = [*self.iterates, z][-self.memory :]
        self.changes = [*self.changes, following - z][-self.memory :]
        iterates, changes = torch.stack(self.iterates, 1), torch.stack(self.changes, 1)
        flat = changes.flatten(2).double()
        gram = flat @ flat.transpose(1, 2)
        size = gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(torch.float64).tiny)
        eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
        system = gram / size[:, None, None] + self.ridge * eye
        weights = torch.linalg.solve_ex(system, system.new_ones(len(system), len(eye), 1))[0][..., 0]
        weights = (weights / weights.sum(1, keepdim=True)).to(z.dtype)
        combined = torch.einsum("bm,bm...->b...", weights, iterates + self.damping * changes)
        fine = torch.isfinite(combined).flatten(1).all(1)
        return torch.where(_as(fine, z), combined, z + self.damping * changes[:, -1])


def _as(per_sample: Tensor, like: Tensor) -> Tensor:
    """``(batch,)`` shaped to multiply ``(batch, ...)``."""
    return per_sample.reshape(-1, *(1,) * (like.dim() - 1))
