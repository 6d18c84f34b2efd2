"""Copies of images that are slightly turned, moved and scaled, to learn from beside the images themselves."""

import math

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from inference.runtime.generators import generator

__all__ = ["jittered"]

_DEGREES, _SHIFT, _ZOOM = 7.0, 0.045, 0.05  # at most; the shift is a share of the width


def jittered(images: Tensor, copies: int, seed: int = 0) -> Tensor:
    """``copies`` of each image ``(N, C, H, W)`` in [0, 1], each changed at random: ``(copies N, C, H, W)``."""
    random = generator(seed, "jitter")
    made = []
    for _ in range(copies):
        turn, zoom_x, zoom_y, right, down = 2 * torch.rand(5, len(images), generator=random).to(images) - 1
        angle = turn * (_DEGREES * math.pi / 180)
        across = torch.stack([angle.cos() * (1 + _ZOOM * zoom_x), -angle.sin() * (1 + _ZOOM * zoom_y)], 1)
        along = torch.stack([angle.sin() * (1 + _ZOOM * zoom_x), angle.cos() * (1 + _ZOOM * zoom_y)], 1)
        offset = 2 * _SHIFT * torch.stack([right, down], 1)  # the grid is two wide
        map_ = torch.cat([torch.stack([across, along], 1), offset[:, :, None]], 2)
        grid = affine_grid(map_, list(images.shape), align_corners=False)
        made.append(grid_sample(images, grid, mode="bicubic", align_corners=False).clamp(0, 1))
    return torch.cat(made)
