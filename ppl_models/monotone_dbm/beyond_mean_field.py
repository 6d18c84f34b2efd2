"""What mean field leaves out: covariances by linear response, marginals and log Z to second order.

With ``P = blkdiag(diag(q) - q q')`` and the fixed point's ``dq/db = P (I - Phi P)^-1`` (linear response; Kappen and
Rodriguez, Neural Computation 10, 1998), which is symmetric, the covariance of different groups is that matrix.  The
second-order term of Plefka's expansion at fixed marginals (Plefka, J. Phys. A 15, 1982; the Onsager term of TAP) is

    T(q) = 1/4 sum_{g, h} tr(P_g Phi_gh P_h Phi_hg),        log Z = -F + T + ...,

and its derivative in b gives ``q + P (I - Phi P)^-1 dT/dq``, which is made on the logits here so that probabilities
stay probabilities.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from inference.newton_cg import metric_cg
from inference.results.brief import brief
from ppl_models.monotone_dbm.groups import Groups
from ppl_models.monotone_dbm.mean_field import MeanFieldProblem

__all__ = ["Correlations", "correct", "mixture"]

_AT_ONCE = 1 << 24  # numbers held at once


@brief
class Correlations(NamedTuple):
    """Corrections of mean field for B queries.

    Attributes:
        marginals: ``(B, G, K)``, corrected to second order.
        mean_field: the marginals without it, ``(B, G, K)``.
        covariance: of the one-hot entries, ``(B, N, N)``, entries in the order of the groups; zero where observed.
            Inside a group it is linear response's estimate, not ``diag(q) - q q'``.
        log_partition: ``-F + T`` ``(B,)``; an estimate, no bound.
    """

    marginals: Tensor
    mean_field: Tensor
    covariance: Tensor
    log_partition: Tensor


def correct(problem: MeanFieldProblem, phi: Tensor, logits: Tensor) -> Correlations:
    """The corrections at a fixed point.

    Args:
        problem: the equations.
        phi: Phi ``(N, N)``.
        logits: ``Phi q + b`` there, ``(B, N)``.
    """
    groups, n = problem.groups, len(phi)
    q = problem.response(logits)
    pieces, second = [], []
    for rows in torch.arange(len(q), device=q.device).split(max(1, _AT_ONCE // (n * n))):
        made = [_second_order(problem, phi, part) for part in q[rows].split(1)]
        gradient = torch.cat([g for g, _ in made])
        second.append(torch.cat([t for _, t in made]))
        here = problem.rows(rows) if len(problem.clamped) > 1 else problem
        some = q[rows]
        solved = metric_cg(
            here.apply,
            lambda v, some=some: groups.covariance(some, v),  # type: ignore[misc]
            gradient,
            tolerance=1e-6,
        )
        corrected = here.response(logits[rows] + solved.solution)
        spread = torch.diag_embed(some) - torch.where(
            groups.group_of[:, None] == groups.group_of, some[:, :, None] * some[:, None, :], 0.0
        )
        eye = torch.eye(n, dtype=q.dtype, device=q.device)
        inverse = torch.linalg.solve(eye - phi @ spread, eye.expand(len(some), n, n))
        covariance = spread @ inverse
        pieces.append((corrected, (covariance + covariance.transpose(1, 2)) / 2))
    marginals = groups.padded(torch.cat([c for c, _ in pieces]))
    log_z = torch.cat(second) - problem.energy(q, problem.apply(q))
    return Correlations(marginals, groups.padded(q), torch.cat([c for _, c in pieces]), log_z)


def mixture(found: Correlations, groups: Groups, shares: Tensor, plain: Tensor) -> Correlations:
    """The corrections of B queries from those of their k cases, by the law of total covariance.

    Args:
        found: of the cases, ``(B k, ...)``.
        groups: the layout.
        shares: log weights of the cases ``(B, k)``.
        plain: those for the marginals without correction.
    """
    w = shares.softmax(1)

    def mean(x: Tensor, weight: Tensor) -> Tensor:
        split = x.unflatten(0, weight.shape)
        return (split * weight.view(*weight.shape, *[1] * (split.dim() - 2))).sum(1)

    marginals = mean(found.marginals, w)
    parts = [found.marginals[:, b.first : b.first + b.num, : b.size] for b in groups.blocks]
    own = groups.join(parts).unflatten(0, w.shape)
    apart = own - (own * w[:, :, None]).sum(1, keepdim=True)
    between = torch.einsum("bk,bki,bkj->bij", w, apart, apart)
    covariance = mean(found.covariance, w) + between
    return Correlations(marginals, mean(found.mean_field, plain.softmax(1)), covariance, shares.logsumexp(1))


def _second_order(problem: MeanFieldProblem, phi: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """``dT/dq`` ``(1, N)`` and ``T`` ``(1,)`` of one query."""
    groups = problem.groups
    gradients, total = [], q.new_zeros(1)
    for block in groups.blocks:
        rows = phi[block.start : block.stop].unflatten(0, (block.num, block.size))
        weighted = rows * q[0]
        means = groups.totals(weighted)  # of each group seen from a state: (count, size, G)
        onsager = weighted @ rows.transpose(1, 2) - _outer(groups.totals(weighted), means)
        own = q[0, block.start : block.stop].unflatten(0, (block.num, block.size))
        towards = (onsager @ own[..., None])[..., 0]
        diagonal = onsager.diagonal(dim1=1, dim2=2)
        gradients.append((0.5 * diagonal - towards).flatten())
        total = total + 0.25 * ((own * diagonal).sum() - (own * towards).sum())
    return torch.cat(gradients)[None], total


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return a @ b.transpose(1, 2)
