"""Styles: a hidden group whose states are looks of the classes, summed over exactly.

Mean field under a bound answers with one flat average where several pictures are possible.  A group that is summed over
(see :class:`~ppl_models.monotone_dbm.pairwise.PairwiseModel`) chooses between pictures and needs no bound.  Here it has
several states, in images for each class: with the other groups uncoupled the model is a mixture of products of
categoricals, which EM learns (``inference.latent_classes``), and from which the training of the whole goes on.

A component ``p(x | z) = prod_g theta_zg(x_g)`` of weight w is exact in a pairwise model: ``Phi_gz = log theta_zg`` less
its mean over the states of g, which only moves unaries, and ``b_z = log w`` plus these means.
"""

import math

import torch
from torch import Tensor, nn

from inference.latent_classes import LatentClasses
from inference.runtime.generators import generator
from ppl_models.monotone_dbm.groups import Groups
from ppl_models.monotone_dbm.operators import PairwiseMap, PairwiseOperator, ScaledOperator, of_matrix

__all__ = ["COUPLED", "StyledOperator", "class_styles", "styles_of"]

COUPLED = 0.1  # share of the usual random couplings at the start of styles
_SURE = 40.0  # log-odds of a style's own class against each other one at the start: a known class excludes the rest
_FEW = -15.0  # log weight of styles that EM had too few images for
_ITERATIONS = 15


class StyledOperator(PairwiseOperator):
    """Phi of bounded groups, and free potentials between them and a group that is always held or summed over.

    Args:
        groups: the layout of all.
        inner: of the groups without the styles.
        place: the number of the styles' group.
    """

    centres: Tensor

    def __init__(self, groups: Groups, inner: ScaledOperator, place: int) -> None:
        super().__init__(groups)
        self.inner, self.monotone, self.place = inner, inner.monotone, place
        self.start, self.size = sum(groups.sizes[:place]), groups.sizes[place]
        # Between the states of the other groups and the styles, (N - K, K).
        self.templates = nn.Parameter(torch.zeros(groups.num_states - self.size, self.size))
        self.register_buffer("centres", torch.zeros_like(self.templates))

    @property
    def begun(self) -> bool:
        """Whether the styles are known: before that all are alike."""
        return bool((self.templates != 0).any())

    @torch.no_grad()
    def begin(self, potentials: Tensor) -> None:
        """Start from these potentials between the states of the other groups and the styles, ``(N - K, K)``."""
        self.templates.copy_(potentials)
        self.centres.copy_(self.inner.groups.softmax(self.templates.T).T)

    def learned_before(self) -> list[nn.Parameter]:
        """See the base class."""
        return [self.templates]

    def _others(self, x: Tensor) -> Tensor:
        return torch.cat([x[..., : self.start], x[..., self.start + self.size :]], -1)

    def _join(self, others: Tensor, own: Tensor) -> Tensor:
        return torch.cat([others[..., : self.start], own, others[..., self.start :]], -1)

    def _bordered(self, phi: Tensor, looks: Tensor) -> Tensor:
        rows, own = self._join(phi, looks), self._join(looks.T, looks.new_zeros(self.size, self.size))
        return torch.cat([rows[: self.start], own, rows[self.start :]])

    def _looks(self, inner: PairwiseMap, states: Tensor | None = None) -> Tensor:
        """Potentials of all styles, or of these, with the other groups ``(K, N - K)``: the couplings between those act
        on what differs from a style's centre, ``(x - c) Phi (x - c) / 2``, whose part without x stands with the last
        group.
        """
        looks, centres = self.templates.T, self.centres.T
        if states is not None:
            looks, centres = looks[states], centres[states]
        towards = inner.apply(centres)
        level = 0.5 * (towards * centres).sum(1, keepdim=True)
        last = self.inner.groups.sizes[-1]
        return looks - towards + torch.cat([torch.zeros_like(looks[:, :-last]), level.expand(-1, last)], 1)

    def prepare(self) -> PairwiseMap:
        """See the base class."""
        self.inner.share = self.share
        inner = self.inner.prepare()
        looks = self._looks(inner).T
        if inner.matrix is not None:
            return of_matrix(self._bordered(self.inner.to_dense(), looks), None, self.monotone)

        def apply(x: Tensor) -> Tensor:
            others, own = self._others(x), x[..., self.start : self.start + self.size]
            return self._join(inner.apply(others) + own @ looks.T, others @ looks)

        return PairwiseMap(apply, None, monotone=self.monotone)

    def prepare_given(self, states: Tensor) -> PairwiseMap:
        """See the base class."""
        self.inner.share = self.share
        inner, none = self.inner.prepare(), self.templates.new_zeros(len(states), self.size)
        field, sharp = (self._join(x, none) for x in (self._looks(inner, states), self.templates.T[states]))
        matrix = None if inner.matrix is None else self._bordered(inner.matrix, torch.zeros_like(self.templates))
        if matrix is not None and (matrix.requires_grad or not torch.is_grad_enabled()):
            return of_matrix(matrix, None, self.monotone)._replace(field=field, sharp=sharp)

        def apply(x: Tensor) -> Tensor:
            return self._join(inner.apply(self._others(x)), x.new_zeros(len(x), self.size))

        return PairwiseMap(apply, matrix, None, self.monotone, field, sharp)

    def leanings(self, bias: Tensor, clamped: Tensor, free: Tensor) -> Tensor:
        """See the base class."""
        groups, others = self.inner.groups, self._others(bias)
        totals = [part.logsumexp(2) for part in groups.parts((self.templates + others[:, None]).T)]
        open_groups = self._others(free)[:, groups.offset].to(bias.dtype)
        own = bias[self.start : self.start + self.size]
        return own + self._others(clamped) @ self.templates + open_groups @ torch.cat(totals, 1).T

    def colours(self, matrix: Tensor | None) -> list[Tensor]:
        """See the base class."""
        if matrix is not None:
            return super().colours(matrix)
        found = [torch.where(c < self.place, c, c + 1) for c in self.inner.colours(None)]
        return [*found, found[0].new_tensor([self.place])]


def styles_of(mixture: LatentClasses) -> tuple[Tensor, Tensor]:
    """Potentials ``(N, K)`` between states of a mixture's variables and its components, and their biases ``(K,)``."""
    known, possible = mixture.log_weights > -torch.inf, mixture.possible[..., None]
    theta = torch.where(known, mixture.log_theta, mixture.log_theta[..., :1]).masked_fill(~possible, 0.0)
    mean = theta.sum(1, keepdim=True) / possible.sum(1, keepdim=True)
    return (theta - mean)[mixture.possible], mixture.log_weights.clamp(min=_FEW) + mean.sum((0, 1))


def class_styles(
    states: Tensor, labels: Tensor, levels: int, num_classes: int, styles: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A mixture for each class, by EM.

    Args:
        states: of the pixels ``(N, D)``, below ``levels``.
        labels: ``(N,)``.
        levels: states of a pixel.
        num_classes, styles: the number of styles in all is their product, class by class.
        seed: of the random starts.

    Returns:
        Potentials of the pixels' states ``(D levels, K)``, those of the classes ``(num_classes, K)``, and the bias of
        the styles ``(K,)``.
    """
    looks, weights = [], []
    for label in range(num_classes):
        rows = states[labels == label]
        mixture = LatentClasses([levels] * states.shape[1], styles).to(states.device)
        share = math.log(max(len(rows), 1) / len(states))
        if len(rows):
            random = generator(seed, f"styles of class {label}", device=states.device)
            mixture.learn(rows, iterations=_ITERATIONS, generator=random)
        look, weight = styles_of(mixture)
        looks.append(look)
        weights.append(weight + share)
    own = torch.eye(num_classes, device=states.device).repeat_interleave(styles, 1)
    return torch.cat(looks, 1), _SURE * (own - 1 / num_classes), torch.cat(weights)
