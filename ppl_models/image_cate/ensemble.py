"""The gate of a fitted model: members that were each fitted without one fold of the images, and the weights of their
rules.

Member f gives, for every image, log odds of the types by up to three rules: two of fixed features and a trained
network's.  The log odds are their weighted sum, with one set of weights for all members, learned from what each image
is told by the member that did not see it.  At other images the members' probabilities are averaged.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ppl_models.image_cate.bayesian import with_kernels
from ppl_models.image_cate.fixed_features import StandardisedFeatures
from ppl_models.image_cate.towers import Tower

__all__ = ["GateEnsemble", "MeanTower"]

_TINY = 1e-30


class GateEnsemble(nn.Module):
    """Gates of F members with C rules each, for K types.

    Args:
        fixed: fixed features of the images; None: without the rules on them.
        heads: of these rules, ``(F, 2, K - 1, features + columns + 1)``, or ``(F, 0, K - 1, 0)``.
        towers: one trained gate a member, or none.
        kernel_scale: posterior standard deviations of each member's kernels ``(F, P)``; None if they are not random.

    Attributes:
        weight: of the rules, ``(C,)``.
        bias: log odds against the first type that all images share, ``(K - 1,)``.
    """

    heads: Tensor
    weight: Tensor
    bias: Tensor
    kernel_scale: Tensor | None

    def __init__(
        self,
        fixed: StandardisedFeatures | None,
        heads: Tensor,
        towers: Sequence[Tower],
        kernel_scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.fixed, self.towers = fixed, nn.ModuleList(towers)
        self.register_buffer("heads", heads)
        self.register_buffer("weight", heads.new_ones(heads.shape[1] + bool(towers)))
        self.register_buffer("bias", heads.new_zeros(heads.shape[2]))
        self.register_buffer("kernel_scale", kernel_scale)

    @property
    def num_members(self) -> int:
        """F."""
        return len(self.heads)

    def rules(
        self, images: Tensor, columns: Tensor, members: Sequence[int] | None = None, kernels: Tensor | None = None
    ) -> Tensor:
        """Log odds ``(F, B, U or 1, K - 1, C)`` of ``images`` ``(B, ...)`` and ``columns`` ``(B, U, M)`` by each rule.

        Args:
            images: standardised.
            columns: standardised modifiers.
            members: which; None for all.
            kernels: in place of the mean of one member's kernels, ``(P,)``.
        """
        chosen = list(range(self.num_members)) if members is None else list(members)
        parts = []
        if self.heads.shape[1]:
            assert self.fixed is not None
            design = _design(self.fixed(images), columns)
            parts.append(torch.einsum("bup,fckp->fbukc", design, self.heads[chosen]))
        if len(self.towers):
            found = []
            for f in chosen:
                tower = self.towers[f]
                assert isinstance(tower, Tower)
                features = tower.backbone(images) if kernels is None else with_kernels(tower, kernels, images)
                found.append(tower.on_features(features, columns))
            parts.append(torch.stack(found).unsqueeze(-1))
        return torch.cat(parts, -1)

    def forward(self, images: Tensor, columns: Tensor) -> Tensor:
        """Log odds against the first type of the members' mean probabilities, ``(B, U or 1, K - 1)``."""
        mean = self.probs_of_rules(self.rules(images, columns)).mean(0).clamp_min(_TINY).log()
        return mean[..., 1:] - mean[..., :1]

    def probs_of_rules(self, rules: Tensor) -> Tensor:
        """Probabilities of the types ``(..., K)`` at the weights as they are, of ``rules`` ``(..., K - 1, C)``."""
        return nn.functional.pad(rules @ self.weight + self.bias, (1, 0)).softmax(-1)


class MeanTower(nn.Module):
    """The mean of several towers' outputs.

    Args:
        towers: one a member.
    """

    def __init__(self, towers: Sequence[Tower]) -> None:
        super().__init__()
        self.towers = nn.ModuleList(towers)

    def forward(self, images: Tensor, columns: Tensor) -> Tensor:
        """Outputs ``(B, U or 1, outputs)``."""
        return torch.stack([tower(images, columns) for tower in self.towers]).mean(0)


def _design(features: Tensor, columns: Tensor) -> Tensor:
    wide = features.unsqueeze(1)
    if columns.shape[-1]:
        wide = torch.cat([wide.expand(-1, columns.shape[1], -1), columns], -1)
    return torch.cat([wide, torch.ones_like(wide[..., :1])], -1)
