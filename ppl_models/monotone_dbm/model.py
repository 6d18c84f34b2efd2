"""Monotone deep Boltzmann machines over categorical variables, and the machines without a bound beside them.

Feng, Winston and Kolter, "Monotone deep Boltzmann machines", TMLR 2023, arXiv 2307.04990: a pairwise model with
connections of any kind, hidden layers and within a layer, whose mean field has exactly one fixed point for every query.
"""

import itertools
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from inference.latent_classes import LatentClasses
from inference.runtime.generators import generator
from ppl_models.base import check_count, to_tensor
from ppl_models.monotone_dbm.boltzmann import BoltzmannModel
from ppl_models.monotone_dbm.groups import Groups
from ppl_models.monotone_dbm.operators import (
    Curvature,
    DenseOperator,
    FreeOperator,
    check_bound,
    check_potentials,
    factor_of,
    hollow,
)
from ppl_models.monotone_dbm.pairwise import Query
from ppl_models.monotone_dbm.styles import COUPLED, StyledOperator, styles_of

__all__ = ["DeepBoltzmannMachine", "MonotoneDBM"]

_STYLES_SUMMED = 16  # at most
_ITERATIONS = 50


class MonotoneDBM(BoltzmannModel):
    """A pairwise model of categorical variables whose mean field has one fixed point for every query.

    Feng, Winston and Kolter, TMLR 2023, arXiv 2307.04990.

    Calling it runs the Pyro model (:meth:`forward`).  Which groups are hidden is a matter of the data: a group that is
    never observed is one.

    Args:
        group_sizes: states of each variable, at least 2.
        rank: rows of A, of which Phi is made.
        monotonicity: m; mean field is m-strongly monotone.  In (0, curvature).
        curvature: 1 for the published bound on Phi, ``lambda_max <= 1 - m``; 2 for the relaxed one, ``2 - m``, which
            gives a unique fixed point just as well; ``"pinsker"`` for the widest, which bounds the distances between
            the columns of A within a group (see ``operators``) and allows all that 2 does.
        summed: a group that is summed over exactly instead of by mean field, k queries for one; see
            :class:`~ppl_models.monotone_dbm.pairwise.PairwiseModel`.  It needs no bound and has none.  It is
            for a group with data, such as a label: the states of a hidden one begin alike and stay so (see ``styles``).
        styles: states of a hidden group behind the others that is summed over, the 16 most probable ones of each query.
            A fit begins with a mixture of as many products of categoricals, learned by EM, and goes on from there (see
            ``styles``): the most accurate model of tables whose variables depend on each other strongly, which the
            bound forbids to Phi.  Rows and masks leave the group out; answers for all groups have it last.
        seed: of the initial potentials.

    Attributes:
        groups: the layout of the variables in flat vectors.
        operator: makes Phi.
        bias: b ``(N,)``.
        log_temperature: of the predictive, ``(G,)``.

    Raises:
        TypeError, ValueError: bad sizes, or m outside its range.

    Example:
        >>> dbm = MonotoneDBM(group_sizes=[3] * 6, rank=6)
        >>> answer = dbm.marginals(observed=[[0, 2, 0, 0, 0, 0]], mask=[[True, True, False, False, False, False]])
        >>> answer.probabilities.shape, bool(answer.converged.all())
        (torch.Size([1, 6, 3]), True)
    """

    kind: ClassVar[str] = "MonotoneDBM"

    def __init__(
        self,
        group_sizes: Sequence[int] | Tensor,
        rank: int = 32,
        monotonicity: float = 0.1,
        curvature: Curvature = 1,
        *,
        summed: int | None = None,
        styles: int = 0,
        seed: int = 0,
    ) -> None:
        check_bound(monotonicity, curvature)
        check_count("rank", rank)
        groups = Groups(group_sizes)
        if summed is not None and check_count("summed", summed, 0) >= groups.num_groups:
            raise ValueError(f"summed must be the number of a group below {groups.num_groups}, got {summed}")
        if check_count("styles", styles, 0) and (styles == 1 or summed is not None):
            raise ValueError(f"styles={styles}: they are at least two, and the group that is summed over (summed=None)")
        random = generator(seed, "potentials")
        inner = DenseOperator(groups, rank, monotonicity, curvature, random, summed, coupled=COUPLED if styles else 1.0)
        if styles:
            super().__init__(StyledOperator(Groups([*groups.sizes, styles]), inner, groups.num_groups))
            self.summed, self.most, self.styled = groups.num_groups, _STYLES_SUMMED, True
        else:
            super().__init__(inner)
            self.summed = summed
        self._config = {
            "group_sizes": list(groups.sizes),
            "rank": rank,
            "monotonicity": float(monotonicity),
            "curvature": curvature if isinstance(curvature, str) else int(curvature),
            "summed": summed,
            "styles": styles,
            "seed": seed,
        }

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return dict(self._config)

    def _begin(self, data: Query, seed: int) -> None:
        """A mixture, where the fit is the first of a model with styles."""
        operator = self.operator
        if not isinstance(operator, StyledOperator) or operator.begun:
            return
        mixture = LatentClasses(list(operator.inner.groups.sizes), operator.size).to(self.bias.device)
        values = torch.where(data.mask, data.states, -1)[:, :-1]
        mixture.learn(values, iterations=_ITERATIONS, generator=generator(seed, "styles", device=values.device))
        potentials, bias = styles_of(mixture)
        operator.begin(potentials)
        with torch.no_grad():
            self.bias[operator.start :] = bias

    @classmethod
    def from_potentials(
        cls,
        phi: Any,
        bias: Any,
        group_sizes: Sequence[int] | Tensor,
        monotonicity: float = 0.1,
        curvature: Curvature = 1,
        *,
        project: bool = False,
    ) -> Self:
        """The model with these potentials.

        Args:
            phi: ``(N, N)``, symmetric and zero inside the groups; the model takes its precision.
            bias: ``(N,)``.
            group_sizes, monotonicity, curvature: as in the constructor.  Other than with ``curvature=1`` phi is
                centred over the states of each group, and the bias takes up what that moves, so that the law stays the
                same; ``"pinsker"`` takes what 2 takes.
            project: shrink phi to the bound instead of refusing it.

        Raises:
            TypeError, ValueError: shapes, a phi that is not symmetric or not hollow, or one that breaks the bound.
        """
        bound = check_bound(monotonicity, curvature)
        groups, matrix, b = _given(group_sizes, phi, bias)
        if curvature != 1 and matrix.shape == (groups.num_states,) * 2:
            matrix, b = _centred(matrix, b, groups)
        factor = factor_of(matrix, groups, bound, project)
        model = cls(groups.sizes, len(factor), monotonicity, curvature).to(device=matrix.device, dtype=matrix.dtype)
        with torch.no_grad():
            model.operator.weight.copy_(factor)  # type: ignore[operator]
            model.bias.copy_(b)
        return model


class DeepBoltzmannMachine(BoltzmannModel):
    """Layers of categorical variables with any potentials between neighbours: the machines without a bound.

    One visible and one hidden layer make a restricted Boltzmann machine.  Queries, sampling and training are those of
    :class:`MonotoneDBM`; mean field may have several fixed points, and the solver returns one of them.

    Args:
        layers: the group sizes of each layer, the visible one first.
        scale: standard deviation of the initial potentials.
        lateral: connect the groups of a layer as well; one layer alone is then a general Boltzmann machine.
        seed: of them.
    """

    kind: ClassVar[str] = "DeepBoltzmannMachine"

    def __init__(
        self, layers: Sequence[Sequence[int]], scale: float = 0.01, *, lateral: bool = False, seed: int = 0
    ) -> None:
        if not isinstance(lateral, bool):
            raise TypeError(f"lateral must be True or False, got {lateral!r}")
        if len(layers) < (1 if lateral else 2):
            raise ValueError(f"layers must be at least two (or one with lateral=True), got {len(layers)}")
        groups = Groups(list(itertools.chain.from_iterable(layers)))
        numbers = [torch.full((len(layer),), i) for i, layer in enumerate(layers)]
        random = generator(seed, "potentials")
        super().__init__(FreeOperator(groups, torch.cat(numbers), random, scale, lateral))
        self._config = {
            "layers": [list(map(int, layer)) for layer in layers],
            "scale": float(scale),
            "lateral": lateral,
            "seed": seed,
        }

    @classmethod
    def from_potentials(cls, phi: Any, bias: Any, group_sizes: Sequence[int] | Tensor) -> Self:
        """The machine with these potentials, whatever their eigenvalues: mean field may have several fixed points.

        Args:
            phi: ``(N, N)``, symmetric and zero inside the groups; the model takes its precision.
            bias: ``(N,)``.
            group_sizes: states of each variable.

        Raises:
            TypeError, ValueError: shapes, or a phi that is not symmetric or not hollow.
        """
        groups, matrix, b = _given(group_sizes, phi, bias)
        matrix = check_potentials(matrix, groups)
        model = cls([list(groups.sizes)], lateral=True).to(device=matrix.device, dtype=matrix.dtype)
        with torch.no_grad():
            weight, connected = model.operator.weight, model.operator.connected
            weight.copy_(torch.where(connected, matrix, 0.0))  # type: ignore[operator, arg-type]
            model.bias.copy_(b)
        return model

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return dict(self._config)


def _given(group_sizes: Sequence[int] | Tensor, phi: Any, bias: Any) -> tuple[Groups, Tensor, Tensor]:
    """A user's potentials as tensors of one precision and device."""
    groups = Groups(group_sizes)
    # An array's own precision, and not torch's default: exact potentials ask for exact answers.
    matrix, b = (
        to_tensor(name, torch.as_tensor(x) if isinstance(x, np.ndarray) and x.dtype.kind in "iuf" else x)
        for name, x in (("phi", phi), ("bias", bias))
    )
    if not matrix.is_floating_point():
        matrix = matrix.to(torch.get_default_dtype())
    b = b.to(matrix).flatten()
    if len(b) != groups.num_states:
        raise ValueError(f"bias must be ({groups.num_states},), one entry a state, got {tuple(b.shape)}")
    return groups.to(matrix.device), matrix, b


def _centred(phi: Tensor, bias: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
    """Phi on the simplex's tangent space, and the bias with what that takes from Phi: the same law."""
    same = hollow(torch.ones_like(phi), groups) == 0
    sizes = torch.tensor(groups.sizes, dtype=phi.dtype, device=phi.device)[groups.group_of]
    centre = torch.eye(len(phi), dtype=phi.dtype, device=phi.device) - same.to(phi) / sizes
    moved = ((centre @ phi) / sizes) @ torch.ones_like(bias)
    constant = 0.5 * ((phi / sizes).T / sizes).sum() / groups.num_groups
    return centre @ phi @ centre, bias + moved + constant
