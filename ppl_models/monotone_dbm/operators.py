"""Pairwise potentials Phi: symmetric, zero inside a group, and bounded so that mean field has one fixed point.

With one factor ``A`` (rows x N), block columns ``A_g`` and ``bound = curvature - monotonicity``,

    s_g = min(1, bound / lambda_max(A_g' A_g)),   Phi = blkdiag(A^' A^) - A^' A^,   A^_g = sqrt(s_g) A_g,

so that ``lambda_max(Phi) <= bound``.  ``curvature = 1`` is the published bound (Feng, Winston and Kolter 2023): the
entropy minus half a square is convex on the simplex.  ``curvature = 2`` uses that the entropy itself is 2-strongly
convex along the simplex; each ``A_g`` is centred over its states, which only moves the unaries.  It is tight for two
spins.  The authors' code scales one side only, so that its Phi is not symmetric and its fixed point is mean field of no
model.

``curvature = "pinsker"`` is wider still.  Along the simplex (``sum d = 0``) the entropy's curvature is
``sum d^2 / q >= (sum |d|)^2 = |d|_1^2``, Pinsker's inequality, with equality at ``q = |d| / |d|_1``.  With ``Phi =
blkdiag(A'A) - A'A`` the free energy's is

    |A d|^2 + sum_g (d_g' diag(1 / q_g) d_g - |A_g d_g|^2) >= sum_g (|d_g|_1^2 - |A_g d_g|^2),

and a convex function is largest at the corners ``(e_i - e_j) / 2`` of the ball ``|d|_1 <= 1, sum d = 0``, so that
``|A_g d|^2 <= |d|_1^2 max_ij |a_i - a_j|^2 / 4``: only the distances between the columns of a group count,

    s_g = min(1, bound / (max_ij |a_i - a_j|^2 / 2)),   bound = 2 - m,

which leaves ``m / 2 |d|_1^2 >= m |d|^2``.  No ``A_g`` that ``curvature = 2`` allows is refused, since ``|A_g (e_i -
e_j)|^2 <= 2 lambda_max``; columns that lie on a line, as those of ordered states may, are allowed eigenvalues up to k
/ 2 times as large.
"""

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from ppl_models.monotone_dbm.groups import Groups
from ppl_models.monotone_dbm.low_rank import LowRank

__all__ = [
    "Curvature",
    "DenseOperator",
    "FreeOperator",
    "PairwiseMap",
    "PairwiseOperator",
    "ScaledOperator",
    "check_bound",
    "check_potentials",
    "factor_of",
]

Curvature: TypeAlias = int | str  # 1, 2 or "pinsker"

START_NOISE = 0.3  # length of the random part of a column of A, beside the identity
_DENSE_LIMIT = 2000  # entries N up to which Phi is made a matrix: one product is then far cheaper than convolutions


class PairwiseMap(NamedTuple):
    """Phi of the current parameters.

    Attributes:
        apply: ``(B, N) -> (B, N)``, differentiable in the parameters.
        matrix: Phi ``(N, N)``, or None where it would be too large; with its graph only where ``apply`` multiplies by
            it.
        low_rank: Phi as diagonal blocks minus a low rank, without its graph, where that makes Newton steps cheap.
        monotone: whether mean field is known to have one fixed point.
        field: what a group that every query holds adds to the logits, ``(B, N)``; ``apply`` leaves that group out.
        sharp: the part of it that no bound flattens.
    """

    apply: Callable[[Tensor], Tensor]
    matrix: Tensor | None
    low_rank: LowRank | None = None
    monotone: bool = False
    field: Tensor | None = None
    sharp: Tensor | None = None

    def detach(self) -> "PairwiseMap":
        """The same numbers without their graph."""
        field = None if self.field is None else self.field.detach()
        if self.matrix is None:
            return self._replace(apply=_without_grad(self.apply), field=field)
        return of_matrix(self.matrix.detach(), self.low_rank, self.monotone)._replace(field=field)


def of_matrix(phi: Tensor, low_rank: LowRank | None = None, monotone: bool = False) -> PairwiseMap:
    """Products with a symmetric matrix."""
    return PairwiseMap(lambda x: x @ phi, phi, low_rank, monotone)


def _without_grad(apply: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            return apply(x)

    return run


class PairwiseOperator(nn.Module):
    """What makes Phi.

    Attributes:
        groups: the layout.
        monotone: whether mean field has one fixed point whatever the parameters.
        share: of the bound that is used; below one only while a fit anneals it.
    """

    monotone: bool = True
    share: Tensor | float = 1.0

    def __init__(self, groups: Groups) -> None:
        super().__init__()
        self.groups = groups

    def prepare(self) -> PairwiseMap:
        """Phi of the current parameters, with their graph where gradients are on."""
        raise NotImplementedError

    def prepare_given(self, states: Tensor) -> PairwiseMap:
        """The same for queries that hold the summed group at ``states`` ``(B,)``."""
        return self.prepare()

    def leanings(self, bias: Tensor, clamped: Tensor, free: Tensor) -> Tensor:
        """Log weights ``(B, K)`` of the states of the summed group, up to a constant of each query, where the other
        groups do not interact; arguments as in ``MeanFieldProblem``, bias ``(N,)``.
        """
        raise NotImplementedError

    def learned_before(self) -> list[nn.Parameter]:
        """Parameters that begin a fit near where they are to end."""
        return []

    def colours(self, matrix: Tensor | None) -> list[Tensor]:
        """Groups that do not interact, colour by colour: greedy, in the order of the groups.

        Args:
            matrix: Phi, whose zeros say what interacts; without it nothing is known and every group is a colour.
        """
        count, where = self.groups.num_groups, self.groups.group_of
        if matrix is None:
            return [torch.tensor([g], device=where.device) for g in range(count)]
        linked = torch.zeros(count, count, dtype=torch.bool, device=where.device)
        rows, columns = (matrix != 0).nonzero(as_tuple=True)
        linked[where[rows], where[columns]] = True
        neighbours: list[set[int]] = [set() for _ in range(count)]
        for g, h in linked.nonzero().tolist():
            neighbours[g].add(h)
        colour_of: dict[int, int] = {}
        members: dict[int, list[int]] = {}
        for g in range(count):
            taken = {colour_of[h] for h in neighbours[g] if h < g}
            colour_of[g] = next(c for c in range(count) if c not in taken)
            members.setdefault(colour_of[g], []).append(g)
        return [torch.tensor(members[c], device=where.device) for c in sorted(members)]

    def to_dense(self) -> Tensor:
        """Phi ``(N, N)``, however large."""
        found = self.prepare()
        if found.matrix is not None and (found.matrix.requires_grad or not torch.is_grad_enabled()):
            return found.matrix
        some = next(self.parameters())
        return found.apply(torch.eye(self.groups.num_states, dtype=some.dtype, device=some.device))


class ScaledOperator(PairwiseOperator):
    """An operator whose columns are scaled to the bound.

    Args:
        groups, monotonicity, curvature: as in the dense operator.
        unbounded: a group whose columns are not scaled.  The bound then holds for Phi of the others, which is all that
            counts where this group is always held.
    """

    def __init__(
        self, groups: Groups, monotonicity: float | None, curvature: Curvature, unbounded: int | None = None
    ) -> None:
        super().__init__(groups)
        self.unbounded = unbounded
        self.bound = math.inf if monotonicity is None else check_bound(monotonicity, curvature)
        self.monotone, self.centred, self.by_distance = monotonicity is not None, curvature != 1, curvature == "pinsker"

    def scale(self, gram: Tensor) -> Tensor:
        """s of Gram matrices ``(..., k, k)``: ``(...)``, differentiable."""
        if not self.monotone:
            return gram.new_ones(gram.shape[:-2])
        bound = gram.new_ones(()) * (self.bound * self.share)
        if self.by_distance:
            square = gram.diagonal(dim1=-2, dim2=-1)
            apart = square[..., :, None] + square[..., None, :] - 2 * gram
            largest = apart.flatten(-2).amax(-1) / 2
        else:
            largest = torch.linalg.eigvalsh(gram)[..., -1]
        # A margin of rounding: eigenvalues are found to a few units in the last place of the largest.
        largest = largest * (1 + 8 * torch.finfo(gram.dtype).eps)
        return bound / torch.maximum(largest, bound)


class DenseOperator(ScaledOperator):
    """Phi of a free matrix.

    Args:
        groups: the layout.
        rank: rows of A.
        monotonicity: m in (0, curvature); None leaves Phi unconstrained.
        curvature: 1 for the published bound, 2 for the relaxed one, ``"pinsker"`` for the widest.
        unbounded: as in the base class.
        seed_generator: of A's initial normals.  Their columns have length one on average; with a full rank they are
            small and beside a multiple of the identity, at which ``Phi = 0`` and which leaves Phi free to move in all
            directions.
        coupled: factor on these normals.
    """

    def __init__(
        self,
        groups: Groups,
        rank: int,
        monotonicity: float | None,
        curvature: Curvature,
        seed_generator: torch.Generator | None = None,
        unbounded: int | None = None,
        coupled: float = 1.0,
    ) -> None:
        super().__init__(groups, monotonicity, curvature, unbounded)
        normal = coupled * torch.randn(rank, groups.num_states, generator=seed_generator) / math.sqrt(rank)
        if rank >= groups.num_states:
            normal = START_NOISE * normal + identity_scale(self.bound) * torch.eye(rank, groups.num_states)
        self.weight = nn.Parameter(normal)

    def scaled_weight(self) -> Tensor:
        """A^ ``(rank, N)``."""
        parts = self.groups.parts(self.weight)
        if self.centred:
            parts = [part - part.mean(-1, keepdim=True) for part in parts]
        scaled = []
        for part, place in zip(parts, self.groups.blocks, strict=True):
            block = part.transpose(0, 1)  # (count, rank, k)
            s = self.scale(block.transpose(1, 2) @ block)
            if self.unbounded is not None and place.first <= self.unbounded < place.first + place.num:
                s = s.index_fill(0, torch.tensor([self.unbounded - place.first], device=s.device), 1.0)
            scaled.append(part * s.sqrt()[:, None])
        return self.groups.join(scaled)

    def prepare(self) -> PairwiseMap:
        """See the base class."""
        a = self.scaled_weight()
        low_rank = LowRank(self.groups, a) if self.monotone and LowRank.cheap(self.groups, len(a)) else None
        if low_rank is not None and self.groups.num_states > _DENSE_LIMIT:
            return PairwiseMap(LowRank(self.groups, a, graph=True).apply, None, low_rank, True)
        return of_matrix(hollow(-(a.T @ a), self.groups), low_rank, self.monotone)


class FreeOperator(PairwiseOperator):
    """Any symmetric hollow Phi between the layers that are connected: Boltzmann machines without a bound.

    Args:
        groups: the layout.
        layer_of: the layer of each group, ``(G,)``; only neighbouring layers are connected.
        lateral: whether the groups of a layer are connected as well.
        seed_generator: of the initial weights, N(0, scale^2).
        scale: their standard deviation.
    """

    monotone = False
    connected: Tensor

    def __init__(
        self,
        groups: Groups,
        layer_of: Tensor,
        seed_generator: torch.Generator | None = None,
        scale: float = 0.01,
        lateral: bool = False,
    ) -> None:
        super().__init__(groups)
        layer = layer_of[groups.group_of]
        above = layer[:, None] - layer[None, :] == -1
        if lateral:
            above |= (layer[:, None] == layer) & (groups.group_of[:, None] < groups.group_of)
        self.register_buffer("connected", above, persistent=False)
        shape = (groups.num_states, groups.num_states)
        self.weight = nn.Parameter(torch.where(above, scale * torch.randn(shape, generator=seed_generator), 0.0))

    def prepare(self) -> PairwiseMap:
        """See the base class."""
        half = torch.where(self.connected, self.weight, 0.0)
        return of_matrix(half + half.T)


def identity_scale(bound: float) -> float:
    """Multiple of the identity at which a factor A starts: where the bound begins to scale it."""
    return math.sqrt(bound) if math.isfinite(bound) else 1.0


def hollow(matrix: Tensor, groups: Groups) -> Tensor:
    """The matrix with zeros inside each group."""
    same = groups.group_of[:, None] == groups.group_of[None, :]
    return matrix.masked_fill(same, 0.0)


def check_bound(monotonicity: float, curvature: Curvature) -> float:
    """``curvature - monotonicity``, checked; Pinsker's counts as 2."""
    if isinstance(curvature, bool) or not isinstance(curvature, Integral | str) or curvature not in (1, 2, "pinsker"):
        raise ValueError(
            "curvature must be 1 (the published bound), 2 (the relaxed one) or 'pinsker' (the widest), "
            f"got {curvature!r}"
        )
    if isinstance(monotonicity, bool) or not isinstance(monotonicity, Real):
        raise TypeError(f"monotonicity must be a number, got {monotonicity!r}")
    most = 1.0 if curvature == 1 else 2.0
    if not 0 < float(monotonicity) < most:
        raise ValueError(
            f"monotonicity must lie between 0 and {most:g} at curvature={curvature!r}, got {monotonicity!r}"
        )
    return most - float(monotonicity)


def factor_of(phi: Tensor, groups: Groups, bound: float, project: bool) -> Tensor:
    """A matrix A (N x N) whose scaled form gives ``phi`` back: ``A' A = bound I - phi``.

    Args:
        phi: symmetric and zero inside the groups, ``(N, N)``.
        groups: the layout.
        bound: of its largest eigenvalue.
        project: shrink a phi that breaks the bound to ``bound / lambda_max`` of it, instead of refusing it.

    Raises:
        ValueError: phi is not symmetric, not hollow, or breaks the bound.
    """
    phi = check_potentials(phi, groups)
    values, vectors = torch.linalg.eigh(phi)
    largest = float(values[-1])
    if largest > bound + _rounding(phi):
        if not project:
            raise ValueError(
                f"phi has the eigenvalue {largest:.6g}, above the bound {bound:.6g}: mean field may have several fixed "
                "points. curvature=2 allows more, project=True shrinks phi to the bound"
            )
        values = values * (bound / largest)
    return (bound - values).clamp(min=0.0).sqrt()[:, None] * vectors.T


def _rounding(phi: Tensor) -> float:
    return 64 * torch.finfo(phi.dtype).eps * (1 + float(phi.abs().max()))


def check_potentials(phi: Tensor, groups: Groups) -> Tensor:
    """``phi`` ``(N, N)`` without the rounding in which it is not symmetric and hollow.

    Raises:
        ValueError: another shape, or not symmetric, or not zero inside the groups.
    """
    n = groups.num_states
    if tuple(phi.shape) != (n, n):
        raise ValueError(f"phi must be ({n}, {n}) for groups of {n} states in all, got {tuple(phi.shape)}")
    small = _rounding(phi)
    uneven = float((phi - phi.T).abs().max())
    if uneven > small:
        raise ValueError(f"phi must be symmetric; it differs from its transpose by up to {uneven:.3g}")
    inside = float((phi - hollow(phi, groups)).abs().max())
    if inside > small:
        raise ValueError(
            f"phi must be zero inside every group (states of one variable exclude each other); it holds {inside:.3g} "
            "there. Move it into the bias"
        )
    return hollow((phi + phi.T) / 2, groups)
