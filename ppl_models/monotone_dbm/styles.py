"""Styles: a hidden group whose states are looks of the classes, summed over exactly.

Mean field under a bound answers with one flat average where several pictures are possible.  A group that is summed over
(see :class:`~ppl_models.monotone_dbm.pairwise.PairwiseModel`) chooses between pictures and needs no bound.  Here it has
several states for each class: with the other groups uncoupled the model is a mixture of products of categoricals, which
EM learns class by class (``inference.latent_classes``), and from which the training of the whole goes on.

A component ``p(x | z) = prod_g theta_zg(x_g)`` of weight w is exact in a pairwise model: ``Phi_gz = log theta_zg`` less
its mean over the states of g, which only moves unaries, and ``b_z = log w`` plus these means.
"""

import math

import torch
from torch import Tensor, nn

from inference.latent_classes import LatentClasses
from inference.runtime.generators import generator
from ppl_models.monotone_dbm.groups import Groups
from ppl_models.monotone_dbm.operators import DenseOperator, PairwiseMap, PairwiseOperator, identity_scale, of_matrix

__all__ = ["StyledOperator", "class_styles"]

_SURE = 40.0  # log-odds of a style's own class against each other one at the start: a known class excludes the rest
_FEW = -15.0  # log weight of styles that EM had too few images for
_ITERATIONS = 60
_COUPLED = 0.1  # share of the usual random couplings at the start


class StyledOperator(PairwiseOperator):
    """Phi of bounded groups, and free potentials between them and a group that is always held or summed over.

    Args:
        groups: the layout of all.
        inner: of the groups without the styles.
        place: the number of the styles' group.
    """

    def __init__(self, groups: Groups, inner: DenseOperator, place: int) -> None:
        super().__init__(groups)
        self.inner, self.monotone = inner, inner.monotone
        self.start = sum(groups.sizes[:place])
        with torch.no_grad():  # nearly uncoupled
            rows, columns = inner.weight.shape
            inner.weight.lerp_(identity_scale(inner.bound) * torch.eye(rows, columns), 1 - _COUPLED)
        # Between the states of the other groups and the styles, (N - K, K).
        self.templates = nn.Parameter(torch.zeros(groups.num_states - groups.sizes[place], groups.sizes[place]))

    def prepare(self) -> PairwiseMap:
        """See the base class."""
        self.inner.share = self.share
        phi, looks, cut = self.inner.to_dense(), self.templates, self.start
        blank = looks.new_zeros(looks.shape[1], looks.shape[1])
        above = torch.cat([phi[:cut, :cut], looks[:cut], phi[:cut, cut:]], 1)
        middle = torch.cat([looks[:cut].T, blank, looks[cut:].T], 1)
        below = torch.cat([phi[cut:, :cut], looks[cut:], phi[cut:, cut:]], 1)
        return of_matrix(torch.cat([above, middle, below]), None, self.monotone)


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
        known = mixture.log_weights > -torch.inf
        theta = torch.where(known, mixture.log_theta, mixture.log_theta[..., :1])
        mean = theta.mean(1, keepdim=True)
        looks.append((theta - mean).flatten(0, 1))
        weights.append(mixture.log_weights.clamp(min=_FEW) + share + mean.sum((0, 1)))
    own = torch.eye(num_classes, device=states.device).repeat_interleave(styles, 1)
    return torch.cat(looks, 1), _SURE * (own - 1 / num_classes), torch.cat(weights)
