"""Encoders and decoders: of single frames (images or vectors), of the content that a series keeps, of its context.

The split of a video into what stays (content w) and what moves (the path X) is that of Daems, Opper, Crevecoeur and
Birdal, ICLR 2024, arXiv 2310.12975, section 5; the layers are smaller ones of our own.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sde import StepNetwork

__all__ = ["Content", "Context", "frame_decoder", "frame_encoder", "interpolate"]

_GROUPS = 4
_WAVES = (0.25, 0.5, 1.0)  # half periods of the decoder's waves in a unit of the state


class _ConvEncoder(nn.Module):
    """Halves the image to some 8 pixels by (convolution, GroupNorm, SiLU), one more that does not; dense to features.

    The first convolution is 5x5 and strides too: one of all pixels, with a pool after it, takes four times as long.
    """

    def __init__(self, shape: tuple[int, ...], width: int, features: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels, depth = shape[0], max(_halvings(shape) - 1, 1)
        for i in range(depth + 1):
            out, kernel = width * 2 ** min(i, 2), 3 if i else 5
            layers += [
                nn.Conv2d(channels, out, kernel, stride=2 if i < depth else 1, padding=kernel // 2),
                nn.GroupNorm(_GROUPS, out),
                nn.SiLU(),
            ]
            channels = out
        sides = [side // 2**depth for side in shape[1:]]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * math.prod(sides), features))

    def forward(self, frames: Tensor) -> Tensor:
        """``(M, C, H, W)`` -> ``(M, features)``."""
        out: Tensor = self.body(frames)
        return out


class _ConvDecoder(nn.Module):
    """Dense to a few pixels, then (conv, GroupNorm, SiLU, nearest x2) up to the image.

    Beside the state stand waves of it.  Where things are moves an image in a way that changes often over the range of a
    state, which networks learn slowly from the numbers alone (M. Tancik et al., *Fourier Features Let Networks Learn
    High Frequency Functions in Low Dimensional Domains*, NeurIPS 2020, arXiv 2006.10739).
    """

    def __init__(self, content: int, states: int, shape: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.content = content
        inputs = content + states * (1 + 2 * len(_WAVES))
        depth = _halvings(shape)
        self.sides = [side // 2**depth for side in shape[1:]]
        channels = self.first = width * 2 ** min(depth - 1, 2)
        self.dense = nn.Linear(inputs, channels * math.prod(self.sides))
        layers: list[nn.Module] = []
        for i in range(depth):
            out = width * 2 ** max(min(depth - 2 - i, 2), 0)
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.GroupNorm(_GROUPS, out), nn.SiLU(),
                       nn.Upsample(scale_factor=2)]  # fmt: skip
            channels = out
        self.body = nn.Sequential(*layers, nn.Conv2d(channels, shape[0], 3, padding=1))

    def forward(self, z: Tensor) -> Tensor:
        """Content and state ``(M, W + D)`` -> ``(M, C, H, W)``."""
        phases = [math.pi * wave * z[:, self.content :] for wave in _WAVES]
        z = torch.cat([z, *(torch.sin(p) for p in phases), *(torch.cos(p) for p in phases)], -1)
        out: Tensor = self.body(self.dense(z).unflatten(-1, (self.first, *self.sides)))
        return out


class _Reshaped(nn.Module):
    def __init__(self, net: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.net, self.shape = net, shape

    def forward(self, x: Tensor) -> Tensor:
        """As the network, in the data's shape."""
        out: Tensor = self.net(x).unflatten(-1, self.shape)
        return out


def _halvings(shape: tuple[int, ...]) -> int:
    count, sides = 0, list(shape[1:])
    while min(sides) > 4 and all(side % 2 == 0 for side in sides) and count < 4:
        sides = [side // 2 for side in sides]
        count += 1
    if count == 0:
        raise ValueError(f"images need even sides above 4, got data_shape {shape}: give your own encoder and decoder")
    return count


def frame_encoder(shape: tuple[int, ...], width: int, features: int) -> nn.Module:
    """``(M, *shape)`` -> ``(M, features)``: convolutions for ``(C, H, W)``, dense layers for vectors."""
    if len(shape) == 3:
        if width % _GROUPS:
            raise ValueError(f"width must be a multiple of {_GROUPS} for images, got {width}")
        return _ConvEncoder(shape, width, features)
    return nn.Sequential(nn.Flatten(), StepNetwork([math.prod(shape), 4 * width, features]))


def frame_decoder(content: int, states: int, shape: tuple[int, ...], width: int) -> nn.Module:
    """Content and state ``(M, W + D)`` -> ``(M, *shape)``, without a squashing function."""
    if len(shape) == 3:
        if width % _GROUPS:
            raise ValueError(f"width must be a multiple of {_GROUPS} for images, got {width}")
        return _ConvDecoder(content, states, shape, width)
    return _Reshaped(StepNetwork([content + states, 4 * width, math.prod(shape)]), shape)


class Content(nn.Module):
    """q(w) of what a series keeps: the median over its frames of dense features, then mean and log deviation."""

    def __init__(self, features: int, size: int) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(features, features), nn.Linear(features, 2 * size)

    def forward(self, h: Tensor, here: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation, ``(B, size)``, from ``(B, T, F)`` and which frames there are, ``(B, T)``."""
        seen = torch.where(here.unsqueeze(-1), self.before(h), torch.nan)
        middle = torch.nanmedian(seen, dim=1).values
        mean, log_std = self.after(nn.functional.silu(torch.nan_to_num(middle))).chunk(2, -1)
        return mean, log_std - 1.0


class Context(nn.Module):
    """Two temporal convolutions of the frames' features, with which frames there are and the gaps between them."""

    def __init__(self, features: int, size: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(features + 2, size, 3, padding=1), nn.SiLU(), nn.Conv1d(size, size, 3, padding=1), nn.SiLU()
        )

    def forward(self, h: Tensor, here: Tensor, times: Tensor) -> Tensor:
        """``(B, T, F)`` -> ``(B, T, size)``."""
        gap = times.diff(prepend=times.new_zeros(1)) / times[-1] * len(times)
        extra = torch.stack([here.to(h), gap.to(h).expand_as(here)], -1)
        out: Tensor = self.body(torch.cat([h * here.unsqueeze(-1), extra], -1).mT)
        return out.mT


def interpolate(g: Tensor, times: Tensor, at: Tensor) -> Tensor:
    """Linear interpolation in time, constant beyond the ends: ``(B, T, C)`` -> ``(N, B, C)``."""
    right = torch.searchsorted(times, at).clamp(1, len(times) - 1) if len(times) > 1 else torch.zeros_like(at).long()
    left = (right - 1).clamp_min(0)
    width = (times[right] - times[left]).clamp_min(1e-12)
    share = ((at - times[left]) / width).clamp(0, 1).to(g)[:, None, None]
    series = g.movedim(1, 0)
    return series[left.to(g.device)] * (1 - share) + series[right.to(g.device)] * share


def check_network(name: str, net: nn.Module, inputs: Sequence[int], outputs: Sequence[int]) -> nn.Module:
    """The user's network, after one call that shows its shapes."""
    if not isinstance(net, nn.Module):
        raise TypeError(f"{name} must be a torch module or None, got {type(net).__name__}")
    like = next(net.parameters(), torch.zeros(()))
    x = torch.zeros(2, *inputs, dtype=like.dtype, device=like.device)
    needed = f"{name} must map {tuple(x.shape)} to {(2, *outputs)}"
    with torch.no_grad():
        try:
            out = net(x)
        except Exception as error:
            raise ValueError(f"{needed}: {error}") from error
    if not isinstance(out, Tensor) or tuple(out.shape) != (2, *outputs):
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"{needed}, it returned {got}")
    return net
