"""Mean field of a whole batch in the few numbers ``y = A q``, where Phi is diagonal blocks minus a low rank.

With ``Phi = D - A' A`` (A rank x N) the equations fall apart into groups once y is known,

    l = c + D softmax(l),   c = b - A' y,        and        y = A softmax(l(y))

is left: the stationarity of ``-1/2 |y|^2 - g*(b - A' y)``, the concave dual of the free energy (g the entropy minus
``1/2 q' D q``, convex under the bound).  Its curvature ``H = I + A W A'``, ``W = P (I - D P)^-1`` (see ``low_rank``),
sums over all groups, so that all that differs much between the queries of a batch is its size.  One eigensystem ``V
Lambda V'`` of the batch's mean of A W A' serves all of them, times each query's share s of the variance ``sum q (1 -
q)``, which is what observations take from it:

    y <- y + V (1 + s Lambda)^-1 V' (A q - y),

an update with one product by A and one by A', which leaves a tenth to a third of the error.  Groups are solved by a few
rounds of ``l <- c + D softmax(l)``, which contracts under the bound.  Arrays are ``(N, B)``: a group's states and the
queries are then the last two dimensions of contiguous blocks, a few large operators and no copies.

Where a coarse residual is asked in float64 the updates run in float32; the residual that is reported is of float64.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from inference.fixed_point import FixedPoint
from ppl_models.monotone_dbm.low_rank import LowRank

__all__ = ["solve_dual"]

_ROUNDS = 3  # in the groups, each update
_MOST = 16  # updates; what has not converged then has a curvature of its own
_COARSE = 1e-4  # residual down to which float32 is as good
_HELD = 1e30  # logits by which the observed state leads the others
_FIRST = 3  # updates before which nothing converges
_NEAR = 4.0  # length of A q - y against the tolerance at which the residual itself is worth its cost

Parts = list[Tensor]  # of each block of groups, (groups, states, queries)


class _Split:
    """``Phi = D - A' A`` in one precision, for arrays ``(N, B)``."""

    def __init__(self, low_rank: LowRank, dtype: torch.dtype) -> None:
        self.blocks, self.dtype = low_rank.groups.blocks, dtype
        self.factor, self.transposed = low_rank.factor.to(dtype), low_rank.transposed.to(dtype)
        self.own = [own.to(dtype) for own in low_rank.own]

    def parts(self, flat: Tensor) -> Parts:
        return [flat[b.start : b.stop].view(b.num, b.size, -1) for b in self.blocks]

    @staticmethod
    def flat(parts: Parts) -> Tensor:
        joined = [part.flatten(0, 1) for part in parts]
        return joined[0] if len(joined) == 1 else torch.cat(joined)

    def inside(self, c: Tensor, q: Parts) -> Parts:
        """c + D q."""
        return [torch.baddbmm(*of) for of in zip(self.parts(c), self.own, q, strict=True)]

    def curvature(self, q: Parts) -> tuple[Tensor, Tensor]:
        """Eigenvalues ``(rank,)`` and eigenvectors of A W A' at the batch's mean of P."""
        rows = []
        for part, own, a in zip(q, self.own, self.parts(self.transposed), strict=True):
            p = torch.diag_embed(part.mean(2)).baddbmm(part, part.transpose(1, 2), alpha=-1 / part.shape[2])
            eye = torch.eye(own.shape[1], dtype=p.dtype, device=p.device)
            rows.append(torch.linalg.solve_ex(eye - p @ own, p)[0] @ a)
        values, vectors = torch.linalg.eigh(self.factor @ self.flat(rows))
        return values.clamp(min=0.0), vectors


class _Updates:
    """A batch on its way: the probabilities of its groups and ``y``, ``(rank, B)``."""

    def __init__(self, split: _Split, bias: Tensor, q: Tensor | None) -> None:
        self.split, self.bias = split, bias.to(split.dtype)
        self.q = _softmax(split.parts(self.bias)) if q is None else split.parts(q.to(split.dtype))
        values, self.vectors = split.curvature(self.q)
        flat = split.flat(self.q)
        variance = torch.addcmul(flat, flat, flat, value=-1).sum(0)
        share = variance / variance.mean().clamp_min(torch.finfo(variance.dtype).tiny)
        self.size = (1 + values[:, None] * share).reciprocal()
        self.y = torch.zeros_like(self.size)
        self.c = self.bias
        if q is not None:
            self._move(split.factor @ split.flat(self.q))

    def update(self) -> Tensor:
        """One; returns the largest length of ``A q - y``."""
        for _ in range(_ROUNDS):
            self.q = _softmax(self.split.inside(self.c, self.q))
        left = self.split.factor @ self.split.flat(self.q) - self.y
        self._move(torch.addmm(self.y, self.vectors, self.size * (self.vectors.T @ left)))
        return left.norm(dim=0).amax()

    def _move(self, y: Tensor) -> None:
        self.y = y
        self.c = torch.addmm(self.bias, self.split.transposed, y, alpha=-1)

    def probabilities(self, dtype: torch.dtype) -> Tensor:
        """``(N, B)``."""
        return self.split.flat(self.q).to(dtype)


def solve_dual(
    low_rank: LowRank,
    bias: Tensor,
    clamped: Tensor,
    free: Tensor,
    *,
    tolerance: float,
    initial: Tensor | None = None,
    max_iterations: int | None = None,
    callback: Callable[[int, Tensor], None] | None = None,
) -> FixedPoint:
    """Logits ``l = Phi q + b``, ``(B, N)``; ``evaluations`` are products with Phi, one an update.

    Rows whose curvature has another shape than the batch's mean may be left over: they are reported as not converged,
    and their logits are finite.

    Args:
        low_rank: Phi.
        bias: b ``(B, N)`` or ``(1, N)``.
        clamped, free: as in ``MeanFieldProblem``, ``(B, N)``.
        tolerance: on the largest ``|softmax(Phi q + b) - q|``.
        initial: first probabilities ``(B, N)``; those of the bias alone without it.
        max_iterations: updates at most; 16 by default.
        callback: called with the products so far and the residuals, whenever these are known.
    """
    b = bias.expand_as(clamped).T.contiguous()
    held = None if bool(free.all()) else torch.where(free, 0.0, (clamped - 1.0) * _HELD).T.contiguous()
    own = _Split(low_rank, b.dtype)
    coarse = tolerance >= _COARSE and b.dtype == torch.float64
    split = _Split(low_rank, torch.float32) if coarse else own
    shut = b if held is None else b + held
    run = _Updates(split, shut, None if initial is None else initial.T.contiguous())
    products, limit = 0, _MOST if max_iterations is None else max_iterations
    for made in range(1, limit + 1):
        distance = run.update()
        products += 1
        if made < limit and (made < _FIRST or not float(distance) <= _NEAR * tolerance):
            continue
        q = run.probabilities(b.dtype)
        target, residual = _residual(own, b, held, q)
        if callback is not None:
            callback(products, residual)
        if made == limit or bool((residual <= tolerance).all()):
            break
        products += 1
        if run.split is not own:  # as far as float32 goes
            run = _Updates(own, shut, q)
    residual = torch.nan_to_num(residual, nan=math.inf)
    value = torch.where(torch.isfinite(residual)[:, None], target.T, bias)
    steps = torch.full_like(residual, made, dtype=torch.long)
    return FixedPoint(value.contiguous(), steps, residual, residual <= tolerance, products)


def _softmax(parts: Parts) -> Parts:
    return [part.softmax(1) for part in parts]


def _residual(split: _Split, b: Tensor, held: Tensor | None, q: Tensor) -> tuple[Tensor, Tensor]:
    """``Phi q + b`` ``(N, B)``, and the largest change of a probability ``(B,)``."""
    outside = torch.addmm(b, split.transposed, split.factor @ q, alpha=-1)
    target = split.flat(split.inside(outside, split.parts(q)))
    shut = target if held is None else target + held
    return target, (split.flat(_softmax(split.parts(shut))) - q).abs_().amax(0)
