"""What turns an image into features: a small CNN, a small vision transformer, fixed statistics and convolutions,
embeddings made elsewhere, or a module of the user's; around them crops at several scales and sequences of images.

All map ``(N, C, H, W)`` to ``(N, F)``; no weights are downloaded.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ppl_models.image_cate.fixed_features import FixedFeatures

__all__ = ["AGGREGATIONS", "BACKBONES", "CNN", "AsTheyAre", "ImageSequence", "MultiScale", "ViT", "build_backbone"]

BACKBONES = ("cnn", "vit", "fixed", "embedding")
AGGREGATIONS = ("transformer", "concatenate", "difference", "variance")
_LEAST_SIDE = 5  # pixels; the first convolution's


class CNN(nn.Module):
    """Strided convolutions with batch normalisation and SiLU, then the maximum and the mean over the image.

    Args:
        channels: C of the images.
        width: filters of each layer.
        depth: layers; each halves the image.
    """

    def __init__(self, channels: int, width: int = 16, depth: int = 2) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(depth):
            size = 5 if i == 0 else 3
            layers += [
                nn.Conv2d(channels if i == 0 else width, width, size, stride=2, padding=size // 2, bias=False),
                nn.BatchNorm2d(width),
                nn.SiLU(),
            ]
        self.layers = nn.Sequential(*layers)
        self.out_features = 2 * width

    def forward(self, images: Tensor) -> Tensor:
        """Features ``(N, 2 width)``."""
        maps = self.layers(images)
        return torch.cat([maps.amax((-2, -1)), maps.mean((-2, -1))], -1)


class ViT(nn.Module):
    """A small vision transformer (Dosovitskiy et al., arXiv:2010.11929): patches, pre-norm blocks, mean over tokens.

    Images whose sides are no multiple of the patch are padded by zeros (the channel means) at the right and the bottom.
    """

    def __init__(
        self,
        channels: int,
        image_size: tuple[int, int],
        patch: int = 8,
        width: int = 32,
        depth: int = 2,
        heads: int = 4,
    ) -> None:
        super().__init__()
        self.patch = min(patch, *image_size)
        grid = [-(-side // self.patch) for side in image_size]
        self.padding = (0, grid[1] * self.patch - image_size[1], 0, grid[0] * self.patch - image_size[0])
        self.embed = nn.Conv2d(channels, width, self.patch, stride=self.patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, grid[0] * grid[1], width))
        self.blocks = nn.ModuleList([_block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.out_features = width

    def forward(self, images: Tensor) -> Tensor:
        """Features ``(N, width)``."""
        tokens = self.embed(nn.functional.pad(images, self.padding)).flatten(2).mT + self.position
        for block in self.blocks:
            tokens = block(tokens)
        pooled: Tensor = self.norm(tokens).mean(1)
        return pooled


class Embedding(nn.Module):
    """Features that are given instead of images, ``(N, F)``, and beside them a hidden layer of theirs.

    Without it all that is trained on embeddings would be linear in them.
    """

    def __init__(self, features: int, width: int = 32) -> None:
        super().__init__()
        self.hidden = nn.Linear(features, width)
        self.out_features = features + width

    def forward(self, images: Tensor) -> Tensor:
        """The features and the hidden layer ``(N, F + width)``."""
        return torch.cat([images, nn.functional.silu(self.hidden(images))], -1)


class MultiScale(nn.Module):
    """The same kind of backbone on central crops of several sides, features side by side (Zhu, Jerzak and Daoud,
    Multi-scale representations, CLeaR 2025).

    Args:
        backbones: one for each scale.
        scales: side of the crop in pixels.
    """

    def __init__(self, backbones: Sequence[nn.Module], scales: Sequence[int]) -> None:
        super().__init__()
        self.backbones = nn.ModuleList(backbones)
        self.scales = tuple(scales)
        self.out_features = sum(_width(b) for b in backbones)

    def forward(self, images: Tensor) -> Tensor:
        """Features of all scales ``(N, sum F)``."""
        return torch.cat([b(_crop(images, s)) for b, s in zip(self.backbones, self.scales, strict=True)], -1)


class ImageSequence(nn.Module):
    """Features of a sequence of images ``(N, T, C, H, W)`` from those of each.

    Args:
        backbone: of one image.
        length: T.
        aggregation: ``"concatenate"``; ``"difference"``, last minus first beside the mean; ``"variance"``, mean and
            variance over time; ``"transformer"``, one attention block over time, then the mean.
    """

    def __init__(self, backbone: nn.Module, length: int, aggregation: str) -> None:
        super().__init__()
        width = _width(backbone)
        self.backbone, self.aggregation = backbone, aggregation
        self.out_features = {"concatenate": length * width, "transformer": width}.get(aggregation, 2 * width)
        if aggregation == "transformer":
            self.position = nn.Parameter(0.02 * torch.randn(1, length, width))
            self.block = _block(width, 4 if width % 4 == 0 else 1)

    def forward(self, images: Tensor) -> Tensor:
        """Features ``(N, F)``."""
        each = self.backbone(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        if self.aggregation == "concatenate":
            return each.flatten(1)
        if self.aggregation == "difference":
            return torch.cat([each.mean(1), each[:, -1] - each[:, 0]], -1)
        if self.aggregation == "variance":
            return torch.cat([each.mean(1), each.var(1, correction=0)], -1)
        pooled: Tensor = self.block(each + self.position).mean(1)
        return pooled


def build_backbone(
    backbone: str | nn.Module,
    shape: tuple[int, ...],
    *,
    width: int = 16,
    depth: int = 2,
    scales: Sequence[int] | None = None,
    aggregation: str = "transformer",
) -> nn.Module:
    """A backbone for data of ``shape``: ``(C, H, W)``, a sequence's ``(T, C, H, W)``, or ``(F,)`` of embeddings.

    Raises:
        TypeError, ValueError: the name is unknown or does not go with the shape.
    """
    if isinstance(backbone, str) and backbone not in BACKBONES:
        raise ValueError(f"backbone must be one of {', '.join(BACKBONES)} or a torch.nn.Module, got {backbone!r}")
    if not isinstance(backbone, str | nn.Module):
        raise TypeError(f"backbone must be a name or a torch.nn.Module, got {type(backbone).__name__}")
    if len(shape) == 4:
        if aggregation not in AGGREGATIONS:
            raise ValueError(f"aggregation must be one of {', '.join(AGGREGATIONS)}, got {aggregation!r}")
        one = build_backbone(backbone, shape[1:], width=width, depth=depth, scales=scales)
        if backbone == "fixed" and aggregation == "transformer":  # which would have to be trained
            aggregation = "concatenate"
        return ImageSequence(one, shape[0], aggregation)
    if len(shape) == 1:
        if backbone == "fixed":
            return AsTheyAre(shape[0])
        if isinstance(backbone, str) and backbone != "embedding":
            raise ValueError(
                f"images with shape (N, {shape[0]}) are embeddings: give backbone='embedding', got {backbone!r}"
            )
    elif backbone == "embedding":
        raise ValueError(f"backbone='embedding' takes features (N, F), got images with shape {('N', *shape)}")
    if scales is not None and len(shape) == 3:
        sides = [int(s) for s in scales]
        if not sides or min(sides) < _LEAST_SIDE or max(sides) > min(shape[1:]):
            raise ValueError(
                f"scales must be sides from {_LEAST_SIDE} to {min(shape[1:])} pixels, as the images have; got {scales}"
            )
        if isinstance(backbone, nn.Module):
            raise ValueError("scales go with a named backbone; crop inside your own module")
        each = [build_backbone(backbone, (shape[0], s, s), width=width, depth=depth) for s in sides]
        return MultiScale(each, sides)
    return _single(backbone, shape, width, depth)


def _single(backbone: str | nn.Module, shape: tuple[int, ...], width: int, depth: int) -> nn.Module:
    if isinstance(backbone, nn.Module):
        return _Own(backbone, shape)
    if len(shape) == 1:
        return Embedding(shape[0], 2 * width)
    if min(shape[1:]) < 2:
        raise ValueError(f"images must have at least 2 pixels a side, got {shape[1]} x {shape[2]}")
    if backbone == "cnn":
        return CNN(shape[0], width, depth)
    if backbone == "vit":
        return ViT(shape[0], (shape[1], shape[2]), width=2 * width, depth=depth)
    return FixedFeatures((shape[0], shape[1], shape[2]))


class AsTheyAre(nn.Identity):
    """Features ``(N, F)`` that are given instead of images."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.out_features = features


class _Own(nn.Module):
    """A module of the user's, whose number of features is found by one call."""

    def __init__(self, module: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.module = module
        training = {m: m.training for m in module.modules()}
        module.eval()
        like = next(iter(module.parameters()), torch.empty(0))
        with torch.no_grad():
            found = module(torch.zeros(2, *shape, dtype=like.dtype, device=like.device))
        for m, mode in training.items():
            m.training = mode
        if not isinstance(found, Tensor) or found.ndim != 2 or found.shape[0] != 2:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"backbone must map (N, {', '.join(map(str, shape))}) to (N, F), it returned {got} for N = 2"
            )
        self.out_features = found.shape[1]

    def forward(self, images: Tensor) -> Tensor:
        """Features ``(N, F)``."""
        features: Tensor = self.module(images)
        return features


def _block(width: int, heads: int) -> nn.Module:
    # No fused path, which has no gradient of gradients; no dropout, so that runs are a function of the seed alone.
    return nn.TransformerEncoderLayer(
        width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )


def _width(backbone: nn.Module) -> int:
    return int(backbone.out_features)  # type: ignore[arg-type]


def _crop(images: Tensor, side: int) -> Tensor:
    top, left = ((s - side) // 2 for s in images.shape[-2:])
    return images[..., top : top + side, left : left + side]
