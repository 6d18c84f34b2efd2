"""Newton's method for the mean field of a whole batch of queries with one curvature for all of them.

``I - Phi P`` differs between queries in ``P = blkdiag(diag q - q q')`` alone, and what is stiff in it sums over many
groups, so that the batch's mean ``P`` serves every query: no linear systems but one of the batch, and a few large
operators an update.  An update leaves a tenth to a third of the error.  Queries whose curvature has another shape are
left over, and say so.  Two forms:

*Phi is a matrix.*  ``l <- l + (I - Phi P)^-1 (Phi q + b - l)``, where logits of observed groups follow the others as if
they were free: their share in the mean is what the other queries' states of these groups make of it.

*Phi is diagonal blocks minus a low rank*, ``D - A' A`` with A rank x N.  The equations fall apart into groups once
``y = A q`` is known,

    l = c + D softmax(l),   c = b - A' y,        and        y = A softmax(l(y))

is left: the stationarity of ``-1/2 |y|^2 - g*(b - A' y)``, the concave dual of the free energy (g the entropy minus
``1/2 q' D q``, convex under the bound), whose curvature is ``I + A W A'``, ``W = P (I - D P)^-1`` (see ``low_rank``).
One eigensystem ``V Lambda V'`` of the batch's mean of A W A' serves all, times each query's share s of the variance
``sum q (1 - q)``, which is what observations take from it:

    y <- y + V (1 + s Lambda)^-1 V' (A q - y).

Groups are solved by a few rounds of ``l <- c + D softmax(l)``, which contracts under the bound.

Arrays are ``(N, B)``: a group's states and the queries are then the last two dimensions of contiguous blocks.  Where a
coarse residual of a low rank is asked in float64 the updates run in float32; the residual reported is of float64.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from inference.fixed_point import FixedPoint
from ppl_models.monotone_dbm.groups import Groups
from ppl_models.monotone_dbm.low_rank import LowRank
from ppl_models.monotone_dbm.operators import PairwiseMap

__all__ = ["fits", "pays", "solve_batch"]

_ROUNDS = 3  # in the groups, each update
_MOST = 16  # updates; what has not converged then has a curvature of its own
_COARSE = 1e-4  # residual down to which float32 is as good
_HELD = 1e30  # logits by which the observed state leads the others
_FIRST = 3  # updates before which nothing converges
_NEAR = 4.0  # length of what is left of y against the tolerance at which the residual is worth a product
_ENOUGH = 3  # states for each query up to which inverting the matrix costs less than it saves

Parts = list[Tensor]  # of each block of groups, (groups, states, queries)


def fits(phi: PairwiseMap) -> bool:
    """Whether :func:`solve_batch` is made for this Phi: one fixed point, and a matrix or a low rank."""
    return phi.monotone and (phi.matrix is not None or _thin(phi))


def pays(phi: PairwiseMap, queries: int) -> bool:
    """Whether one curvature for so many queries also costs less than one for each."""
    return fits(phi) and queries > 0 and (phi.matrix is None or _thin(phi) or _ENOUGH * queries >= len(phi.matrix))


def _thin(phi: PairwiseMap) -> bool:
    return phi.low_rank is not None and phi.low_rank.thin


def solve_batch(
    phi: PairwiseMap,
    groups: Groups,
    bias: Tensor,
    clamped: Tensor,
    free: Tensor,
    *,
    tolerance: float | None,
    initial: Tensor | None = None,
    max_iterations: int | None = None,
    callback: Callable[[int, Tensor], None] | None = None,
) -> FixedPoint:
    """Logits ``l = Phi q + b``, ``(B, N)``; ``evaluations`` are products with Phi, one an update.

    Rows that are left over are reported as not converged, and their logits are finite.

    Args:
        phi: Phi, which :func:`fits`.
        groups: the layout.
        bias: b ``(B, N)`` or ``(1, N)``.
        clamped, free: as in ``MeanFieldProblem``, ``(B, N)``.
        tolerance: on the largest ``|softmax(Phi q + b) - q|``; None makes all updates and never waits for the device.
        initial: first probabilities ``(B, N)``.
        max_iterations: updates at most; 16 by default.
        callback: called with the products so far and the residuals, whenever these are known.
    """
    b = bias.expand_as(clamped).T.contiguous()
    held = torch.where(free, 0.0, (clamped - 1.0) * _HELD).T.contiguous()
    first = None if initial is None else initial.T.contiguous()
    run: _Run
    if _thin(phi):
        run = _LowRankRun(phi, groups, b, held, first, coarse=tolerance is not None and tolerance >= _COARSE)
    else:
        run = _DenseRun(phi, groups, b, held, first)
    limit = _MOST if max_iterations is None else max_iterations
    for made in range(1, limit + 1):
        left = run.update()
        if made < limit and (tolerance is None or made < _FIRST or not float(left) <= tolerance):
            continue
        q, target = run.reached()
        residual = (_flat(_softmax(run.parts(target + held))) - q).abs_().amax(0)
        if callback is not None:
            callback(run.products, residual)
        if tolerance is None or made == limit or bool((residual <= tolerance).all()):
            break
        run.go_on(q)
    residual = torch.nan_to_num(residual, nan=math.inf)
    finite = torch.isfinite(residual)
    value = torch.where(finite[:, None], target.T, bias).contiguous()
    steps = torch.full_like(residual, made, dtype=torch.long)
    return FixedPoint(value, steps, residual, finite if tolerance is None else residual <= tolerance, run.products)


class _Run(ABC):
    """A batch on its way.

    Args:
        phi, groups: the equations'.
        b: their bias ``(N, B)``.
        held: what decides the states of observed groups, beside the bias.

    Attributes:
        products: with Phi so far.
    """

    def __init__(self, phi: PairwiseMap, groups: Groups, b: Tensor, held: Tensor) -> None:
        self.phi, self.blocks, self.b, self.held = phi, groups.blocks, b, held
        self.products = 0

    def parts(self, flat: Tensor) -> Parts:
        return [flat[b.start : b.stop].view(b.num, b.size, -1) for b in self.blocks]

    @abstractmethod
    def update(self) -> Tensor:
        """One; returns a number that falls with the largest residual, and not far below it."""

    @abstractmethod
    def reached(self) -> tuple[Tensor, Tensor]:
        """Probabilities q and Phi q + b, ``(N, B)``."""

    @abstractmethod
    def go_on(self, q: Tensor) -> None:
        """What follows on a q that was not good enough."""


class _DenseRun(_Run):
    """Phi is a matrix."""

    def __init__(self, phi: PairwiseMap, groups: Groups, b: Tensor, held: Tensor, first: Tensor | None) -> None:
        super().__init__(phi, groups, b, held)
        assert phi.matrix is not None
        self.matrix = phi.matrix
        q = _flat(_softmax(self.parts(held))) if first is None else first
        self.logits, self.products = torch.addmm(b, self.matrix, q), 1
        self.inverse = self._inverse(_softmax(self.parts(self.logits + held)))

    def _inverse(self, q: Parts) -> Tensor:
        """``(I - Phi P)^-1`` at the batch's mean of P."""
        columns = [self.matrix[:, b.start : b.stop].unflatten(1, (b.num, b.size)).transpose(0, 1) for b in self.blocks]
        made = [(of @ _mean_spread(part)).transpose(0, 1).flatten(1) for of, part in zip(columns, q, strict=True)]
        eye = torch.eye(len(self.matrix), dtype=self.b.dtype, device=self.b.device)
        return torch.linalg.inv_ex(eye - torch.cat(made, 1))[0]

    def update(self) -> Tensor:
        self.q = _flat(_softmax(self.parts(self.logits + self.held)))
        self.target = torch.addmm(self.b, self.matrix, self.q)
        self.products += 1
        self.logits = torch.addmm(self.logits, self.inverse, self.target - self.logits)
        return self.b.new_zeros(())  # looking at the residual takes no product

    def reached(self) -> tuple[Tensor, Tensor]:
        return self.q, self.target

    def go_on(self, q: Tensor) -> None:
        """The next update goes on from the logits."""


class _LowRankRun(_Run):
    """Phi is diagonal blocks minus a low rank; ``coarse`` begins in float32."""

    def __init__(
        self, phi: PairwiseMap, groups: Groups, b: Tensor, held: Tensor, first: Tensor | None, *, coarse: bool
    ) -> None:
        super().__init__(phi, groups, b, held)
        assert isinstance(phi.low_rank, LowRank)
        self.low_rank, self.shut = phi.low_rank, b + held
        self._begin(torch.float32 if coarse else b.dtype, first)

    def _begin(self, dtype: torch.dtype, first: Tensor | None) -> None:
        """From the probabilities ``first``, or those of the bias alone."""
        low_rank = self.low_rank
        self.factor, self.transposed = low_rank.factor.to(dtype), low_rank.transposed.to(dtype)
        self.own = [own.to(dtype) for own in low_rank.own]
        self.bias = self.shut.to(dtype)
        self.q = _softmax(self.parts(self.bias)) if first is None else self.parts(first.to(dtype))
        values, self.vectors = self._curvature()
        q = _flat(self.q)
        variance = torch.addcmul(q, q, q, value=-1).sum(0)
        share = variance / variance.mean().clamp_min(torch.finfo(dtype).tiny)
        self.size = (1 + values[:, None] * share).reciprocal()
        self._move(torch.zeros_like(self.size) if first is None else self.factor @ q)

    def _curvature(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues ``(rank,)`` and eigenvectors of A W A' at the batch's mean of P."""
        rows = []
        for part, own, a in zip(self.q, self.own, self.parts(self.transposed), strict=True):
            p = _mean_spread(part)
            eye = torch.eye(own.shape[1], dtype=p.dtype, device=p.device)
            rows.append(torch.linalg.solve_ex(eye - p @ own, p)[0] @ a)
        values, vectors = torch.linalg.eigh(self.factor @ _flat(rows))
        return values.clamp(min=0.0), vectors

    def _move(self, y: Tensor) -> None:
        self.y = y
        self.c = torch.addmm(self.bias, self.transposed, y, alpha=-1)

    def _inside(self, c: Tensor, q: Parts, blocks: Sequence[Tensor]) -> Parts:
        """c + D q."""
        return [torch.baddbmm(*of) for of in zip(self.parts(c), blocks, q, strict=True)]

    def update(self) -> Tensor:
        for _ in range(_ROUNDS if self.products else 1):  # the first y is too far off for more
            self.q = _softmax(self._inside(self.c, self.q, self.own))
        left = self.factor @ _flat(self.q) - self.y
        self.products += 1
        self._move(torch.addmm(self.y, self.vectors, self.size * (self.vectors.T @ left)))
        return left.norm(dim=0).amax() / _NEAR

    def reached(self) -> tuple[Tensor, Tensor]:
        q = _flat(self.q).to(self.b.dtype)
        outside = torch.addmm(self.b, self.low_rank.transposed, self.low_rank.factor @ q, alpha=-1)
        return q, _flat(self._inside(outside, self.parts(q), self.low_rank.own))

    def go_on(self, q: Tensor) -> None:
        self.products += 1  # which looking at it took
        if self.bias.dtype != self.b.dtype:  # as far as float32 goes
            self._begin(self.b.dtype, q)


def _softmax(parts: Parts) -> Parts:
    return [part.softmax(1) for part in parts]


def _flat(parts: Parts) -> Tensor:
    joined = [part.flatten(0, 1) for part in parts]
    return joined[0] if len(joined) == 1 else torch.cat(joined)


def _mean_spread(q: Tensor) -> Tensor:
    """The batch's mean of ``diag(q) - q q'`` of each group of a block ``(groups, states, B)``."""
    return torch.diag_embed(q.mean(2)).baddbmm(q, q.transpose(1, 2), alpha=-1 / q.shape[2])
