"""Features of images that nothing is learned for: statistics of texture and the answers of random convolutions.

A linear rule on them has few parameters to go wrong with, which counts where effects are small beside the noise.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

__all__ = ["FixedFeatures", "RandomFeatures", "StandardisedFeatures", "TextureStatistics"]

_QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
_LAGS = ((0, 1), (1, 0), (1, 1), (1, -1), (0, 2), (2, 0))  # rows and columns, of autocorrelations
_LEAST_SIDE = 6  # pixels of an image that is worth halving
_TINY = 1e-12


class TextureStatistics(nn.Module):
    """Of each channel at full, half and quarter resolution: mean and spread, mean steps along rows and columns, mean
    absolute Laplacian, autocorrelations in six directions; and quantiles at full resolution.

    Args:
        shape: of one image, ``(C, H, W)``.
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, height, width = shape
        self.halvings = sum(min(height, width) >= _LEAST_SIDE * 2**k for k in range(2))
        each = len(_QUANTILES)
        for k in range(self.halvings + 1):
            each += 5 + len(self._lags(-(-height // 2**k), -(-width // 2**k)))
        self.out_features = channels * each

    @staticmethod
    def _lags(height: int, width: int) -> list[tuple[int, int]]:
        return [(r, c) for r, c in _LAGS if r < height and abs(c) < width]

    def forward(self, images: Tensor) -> Tensor:
        """Features ``(N, F)``."""
        levels = images.new_tensor(_QUANTILES)
        parts = list(images.flatten(2).quantile(levels, dim=2))
        for k in range(self.halvings + 1):
            planes = images if k == 0 else avg_pool2d(images, 2**k, ceil_mode=True, count_include_pad=False)
            parts += self._statistics(planes)
        return torch.cat(parts, 1)

    def _statistics(self, planes: Tensor) -> list[Tensor]:
        mean = planes.mean((2, 3), keepdim=True)
        centred = planes - mean
        power = centred.square().mean((2, 3)) + _TINY
        padded = nn.functional.pad(planes, (1, 1, 1, 1), mode="replicate")
        around = padded[..., :-2, 1:-1] + padded[..., 2:, 1:-1] + padded[..., 1:-1, :-2] + padded[..., 1:-1, 2:]
        steps = [(padded[..., 1:-1, 1:] - padded[..., 1:-1, :-1]), (padded[..., 1:, 1:-1] - padded[..., :-1, 1:-1])]
        found = [mean[..., 0, 0], power.sqrt(), (around - 4 * planes).abs().mean((2, 3))]
        found += [step.abs().mean((2, 3)) for step in steps]
        height, width = planes.shape[2:]
        for rows, columns in self._lags(height, width):
            left, right = (centred[..., rows:, :], centred[..., : height - rows, :])
            if columns >= 0:
                left, right = left[..., columns:], right[..., : width - columns]
            else:
                left, right = left[..., :columns], right[..., -columns:]
            found.append((left * right).mean((2, 3)) / power)
        return found


class RandomFeatures(nn.Module):
    """Fixed random convolutions of several sizes at every second pixel, each pooled by its share of positive values and
    its maximum; as the kernels of Dempster et al. (ROCKET, arXiv:1910.13051) are for series.
    """

    def __init__(self, channels: int, width: int = 64, sizes: Sequence[int] = (3, 5, 7)) -> None:
        super().__init__()
        share = -(-width // len(sizes))
        layers = [nn.Conv2d(channels, share, s, stride=2, padding=s // 2) for s in sizes]
        self.convolutions = nn.ModuleList(layers)
        for layer in layers:
            nn.init.normal_(layer.weight)
            with torch.no_grad():
                layer.weight -= layer.weight.mean((-2, -1), keepdim=True) * (torch.rand(share, 1, 1, 1) < 0.5)
                layer.weight /= layer.weight.flatten(1).norm(dim=1)[:, None, None, None]
        self.requires_grad_(False)
        self.out_features = 2 * share * len(sizes)

    def forward(self, images: Tensor) -> Tensor:
        """Features ``(N, 2 width)``."""
        pooled = []
        for layer in self.convolutions:
            maps = layer(images)
            pooled += [torch.sigmoid(4 * maps).mean((-2, -1)), maps.amax((-2, -1))]
        return torch.cat(pooled, -1)


class FixedFeatures(nn.Module):
    """Statistics of texture and random convolutions side by side.

    Args:
        shape: of one image, ``(C, H, W)``.
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.statistics, self.random = TextureStatistics(shape), RandomFeatures(shape[0])
        self.out_features = self.statistics.out_features + self.random.out_features

    def forward(self, images: Tensor) -> Tensor:
        """Features ``(N, F)``."""
        return torch.cat([self.statistics(images), self.random(images)], -1)


class StandardisedFeatures(nn.Module):
    """A fixed backbone and the standardisation of its features over a trial's images; a constant one becomes 0.

    Args:
        backbone: images to ``(N, F)``.
    """

    shift: Tensor
    inverse_scale: Tensor

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(False)
        self.out_features = int(backbone.out_features)  # type: ignore[arg-type]
        self.register_buffer("shift", torch.zeros(self.out_features))
        self.register_buffer("inverse_scale", torch.ones(self.out_features))

    @torch.no_grad()
    def learn(self, images: Tensor) -> None:
        """The standardisation from the images ``(S, ...)``."""
        features = self.backbone(images)
        self.shift = features.mean(0)
        scale = features.std(0, correction=0)
        flat = scale <= 1e-5 * (1 + self.shift.abs())
        self.inverse_scale = torch.where(flat, 0.0, 1 / torch.where(flat, torch.ones_like(scale), scale))

    def forward(self, images: Tensor) -> Tensor:
        """Standardised features ``(N, F)``."""
        found: Tensor = (self.backbone(images) - self.shift) * self.inverse_scale
        return found
