"""The networks of the model: a tower for the gate and one for the baseline, and the Pyro model of both and the mixture.

The gate gives ``pi(m) = softmax(0, g_2(m), ..., g_K(m))``, the baseline ``f0(m)``; the two share no layer (Jerzak,
Johansson and Daoud, CLeaR 2023, arXiv 2206.06417).
"""

from typing import Any, NamedTuple

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from ppl_models.image_cate.data import Units
from ppl_models.image_cate.mixture import EffectMixture

__all__ = ["ImageEffectModel", "PixelScale", "Tower"]


class PixelScale(nn.Module):
    """Standardises the channels of images, or the columns of embeddings.

    Args:
        shape: of one image, ``(C, H, W)``, ``(T, C, H, W)`` or ``(F,)``.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        view = (shape[0],) if len(shape) == 1 else (shape[-3], 1, 1)
        self.register_buffer("shift", torch.zeros(view))
        self.register_buffer("scale", torch.ones(view))

    def learn(self, images: Tensor) -> None:
        """Mean and standard deviation of each channel over all images."""
        flat = images.unsqueeze(-1).unsqueeze(-1) if images.ndim == 2 else images
        axes = (*range(flat.ndim - 3), -2, -1)
        spread = flat.std(axes, correction=0)
        spread = torch.where(spread > 0, spread, torch.ones_like(spread))
        self.shift = flat.mean(axes).reshape(self.shift.shape)
        self.scale = spread.reshape(self.scale.shape)

    def forward(self, images: Tensor) -> Tensor:
        """Standardised images."""
        return (images - self.shift) / self.scale


class Tower(nn.Module):
    """A backbone and a linear layer on its features and on columns of the unit.

    Args:
        backbone: images to ``(N, F)``.
        columns: tabular columns beside them.
        outputs: outputs of the linear layer.
    """

    def __init__(self, backbone: nn.Module, columns: int, outputs: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(int(backbone.out_features) + columns, outputs)  # type: ignore[arg-type]

    def forward(self, images: Tensor, columns: Tensor) -> Tensor:
        """Outputs ``(B, U or 1, outputs)`` of ``images`` ``(B, ...)`` and ``columns`` ``(B, U, columns)``."""
        return self.on_features(self.backbone(images), columns)

    def on_features(self, features: Tensor, columns: Tensor) -> Tensor:
        """The same of the backbone's features."""
        weight, count = self.head.weight, features.shape[-1]
        found = nn.functional.linear(features, weight[:, :count], self.head.bias).unsqueeze(1)
        if columns.shape[-1]:
            found = found + nn.functional.linear(columns, weight[:, count:])
        return found


class Predictions(NamedTuple):
    """Network outputs of the units of B images: ``logits`` (B, U|1, K), ``baseline`` (B, U|1, L), ``deviation``
    (B, U|1, K, L) or None.
    """

    logits: Tensor
    baseline: Tensor
    deviation: Tensor | None


class ImageEffectModel(PyroModule):
    """Networks and mixture as one Pyro model of ``images`` ``(B, ...)`` (standardised) and their ``units``.

    The first type's logit is 0.  With effect networks, the effect of type k at image m is ``mu_k`` plus the k-th output
    of a third tower.

    Args:
        gate: images and columns to K - 1 outputs, a tower in training and an ensemble after it; None if K is 1.
        baseline: the same to L outputs; None if the baseline is the units' offset.
        effects: the same to K L outputs, or None.
        mixture: the rest of the model.

    Attributes:
        kernel_scale: posterior standard deviations of the gate's kernels, ``(P,)``; None if they are not random.
    """

    kernel_scale: Tensor | None

    def __init__(self, gate: Any, baseline: Any, effects: Any, mixture: EffectMixture) -> None:
        super().__init__()
        self.gate, self.baseline, self.effects, self.mixture = gate, baseline, effects, mixture
        self.register_buffer("kernel_scale", None)

    def types(self, images: Tensor, modifiers: Tensor) -> Tensor:
        """Logits of the types, ``(B, U or 1, K)``."""
        if self.gate is None:
            return images.new_zeros(len(images), 1, 1)
        return nn.functional.pad(self.gate(images, modifiers), (1, 0))

    def deviations(self, images: Tensor, modifiers: Tensor) -> Tensor | None:
        """What effect networks add to each type's effect, ``(B, U or 1, K, L)``; None without them."""
        if self.effects is None:
            return None
        shape = (self.mixture.num_clusters, self.mixture.likelihood.num_predictors)
        return self.effects(images, modifiers).unflatten(-1, shape)

    def predictions(self, images: Tensor, units: Units) -> Predictions:
        """The networks' outputs at ``images``, for their units."""
        return Predictions(self.types(images, units.modifiers), *self.beside_types(images, units))

    def beside_types(self, images: Tensor, units: Units) -> tuple[Tensor, Tensor | None]:
        """Baseline and deviations, the networks' outputs that do not come from the gate."""
        if self.baseline is None:
            baseline = units.offset
        else:
            baseline = self.baseline(images, torch.cat([units.modifiers, units.controls], -1))
        return baseline, self.deviations(images, units.modifiers)

    def forward(self, images: Tensor, units: Units) -> None:
        """Run the Pyro model."""
        self.mixture(*self.predictions(images, units), units)
