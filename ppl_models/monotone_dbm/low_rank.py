"""Exact Newton steps of mean field where Phi is block-diagonal minus a low rank.

With ``Phi = D - A' A`` (D the diagonal blocks of A' A, A rank x N) and ``P = blkdiag(diag(q) - q q')``, the equations

    (I - Phi P) d = r      are      (I - D P) d + A' y = r,   y = A P d,

and W = P (I - D P)^-1, which is block-diagonal, symmetric and positive semidefinite under the bound on Phi, leaves a
symmetric positive definite system of the size of the rank for each query (Woodbury):

    (I + A W A') y = A W r,        z = r - A' y,        d = z + D W z.

No product with Phi is made.  A group's block of W is ``S (H^-1 - u u') S`` with ``S = diag(sqrt(q))``, ``u = sqrt(q)``
and ``H = I - (I - u u') S D S (I - u u')``, whose eigenvalues lie in (0, 1]: it is inverted without pivots.
"""

import torch
from torch import Tensor

from ppl_models.monotone_dbm.groups import Groups

__all__ = ["LowRank"]

_AT_ONCE = 1 << 18  # numbers held at once: fresh memory beyond a few megabytes costs more than the arithmetic


class LowRank:
    """``Phi = D - A' A``.

    Args:
        groups: the layout.
        factor: A, scaled to the bound, ``(rank, N)``.
        graph: keep the factor's graph, for :meth:`apply`.
    """

    def __init__(self, groups: Groups, factor: Tensor, *, graph: bool = False) -> None:
        self.groups, self.factor = groups, factor if graph else factor.detach()
        self.rank = len(factor)
        parts = [part.permute(1, 2, 0) for part in groups.parts(self.factor)]
        self._blocks = [part.contiguous() for part in parts]  # (count, k, rank)
        self.own = [block @ block.transpose(1, 2) for block in self._blocks]  # (count, k, k)
        self.transposed = self.factor.T.contiguous()

    @staticmethod
    def cheap(groups: Groups, rank: int) -> bool:
        """Whether a step costs less than the products of conjugate gradients with the matrix Phi, about four a step."""
        return rank**2 <= 4 * groups.num_states

    @property
    def thin(self) -> bool:
        """Whether a product through the factor costs less than half of one with the matrix."""
        return 4 * self.rank < self.groups.num_states

    def apply(self, x: Tensor) -> Tensor:
        """Phi x, ``(B, N)``, through the factor."""
        return self._diagonal(x) - (x @ self.transposed) @ self.factor

    def _diagonal(self, x: Tensor) -> Tensor:
        """D x."""
        made = [_blockwise(part, own) for part, own in zip(self.groups.parts(x), self.own, strict=True)]
        return self.groups.join(made)

    def direction(self, q: Tensor, r: Tensor) -> Tensor:
        """d with ``(I - Phi P) d = r`` at the probabilities q, both ``(B, N)``; r where a group is held."""
        at_once = max(1, _AT_ONCE // (self.groups.num_states * (self.rank + self.groups.largest)))
        pieces = [self._solve(*part) for part in zip(q.split(at_once), r.split(at_once), strict=True)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _solve(self, q: Tensor, r: Tensor) -> Tensor:
        responses = [_response(part, own) for part, own in zip(self.groups.parts(q), self.own, strict=True)]

        def weighted(v: Tensor) -> Tensor:
            parts = self.groups.parts(v)
            made = [(w * part.permute(2, 0, 1)).sum(1) for w, part in zip(responses, parts, strict=True)]
            return self.groups.join([part.permute(1, 2, 0) for part in made])

        rows = []
        for w, block in zip(responses, self._blocks, strict=True):
            k, _, batch, count = w.shape
            last = w.view(k * k, -1).T.contiguous().view(batch, count, k, k)  # torch is quick at two dimensions
            made = last.transpose(0, 1).reshape(count, batch * k, k) @ block  # (count, B k, rank)
            rows.append(made.view(count, batch, k, self.rank).transpose(0, 1).reshape(batch, count * k, self.rank))
        inner = self.factor @ (rows[0] if len(rows) == 1 else torch.cat(rows, 1))
        inner.diagonal(dim1=1, dim2=2).add_(1.0)
        root = torch.linalg.cholesky_ex(inner)[0]
        y = torch.cholesky_solve((weighted(r) @ self.transposed)[..., None], root)[..., 0]
        z = r - y @ self.factor
        return z + self._diagonal(weighted(z))


def _blockwise(part: Tensor, own: Tensor) -> Tensor:
    """``(B, count, k)`` times symmetric ``(count, k, k)``."""
    if own.shape[0] == 1:
        return part @ own[0]
    return (part.transpose(0, 1) @ own).transpose(0, 1)


def _response(q: Tensor, own: Tensor) -> Tensor:
    """W of each group, ``(k, k, B, count)``: long last dimensions, since k is small."""
    u = q.permute(2, 0, 1).contiguous().sqrt()
    square = u[:, None] * u
    inside = own.permute(1, 2, 0).contiguous()[:, :, None] * square
    towards = (inside * u).sum(1)
    level = (towards * u).sum(0)
    crossed = u[:, None] * (towards - (0.5 * level) * u)
    h = inside.neg_().add_(crossed).add_(crossed.transpose(0, 1))
    k = len(h)
    for i in range(k):
        h[i, i] += 1.0
    # Gauss-Jordan without pivots.
    for i in range(k):
        pivot = h[i, i].reciprocal()
        row = h[i] * pivot
        column = h[:, i].clone()
        column[i] = 0.0
        h.sub_(column[:, None] * row)
        h[i] = row
        h[:, i] = column.mul_(pivot).neg_()
        h[i, i] = pivot
    return h.sub_(square).mul_(square)
