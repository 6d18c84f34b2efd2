"""A decoder of scenes in which things keep their look and move: sprites from the content, places from the state.

A network that makes an image of (content, state) has to learn anew for each place what a thing looks like there, and
blurs what it has not learned.  Here a thing is drawn once, by a network of the content alone, and put where the state
says, as in the layers of N. Jojic and B. J. Frey, *Learning Flexible Sprites in Video Layers*, CVPR 2001, with the
differentiable sampling of M. Jaderberg et al., *Spatial Transformer Networks*, NeurIPS 2015, arXiv 1506.02025.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ppl_models.base import check_count
from ppl_models.fractional_sde.networks import check_sizes

__all__ = ["SpriteDecoder"]

_OFF = 1e-3  # of the logits' ends, which a sigmoid never reaches
_EDGE = 2.0  # states start as standard normal
_FRAMES = 1000  # of which the ground starts as the median


class SpriteDecoder(nn.Module):
    """``(M, W + D)`` -> logits of frames ``(M, C, H, W)``: D / 2 sprites over a ground that is still.

    Sprite j, an opacity a_j and colours c_j of ``side`` x ``side`` pixels, is made by one network, the same for all,
    from the j-th part of the content.  Its middle is at the state's components 2 j and 2 j + 1, between -2 and 2 from
    one edge of the frame to the other; beyond, a place is reflected, so that a path that goes straight on bounces.
    Layers are laid over each other, frame <- (1 - a_j) frame + a_j c_j, from the ground up.

    Args:
        content_size: W, a multiple of the number of sprites.
        state_size: D, even.
        shape: of a frame, ``(C, H, W)``.
        side: of a sprite in pixels; by default half the frame's shorter side.
        hidden: width of the network's two layers.

    Raises:
        ValueError: sizes at odds with each other.
    """

    rows: Tensor
    columns: Tensor
    cells: Tensor

    def __init__(
        self, content_size: int, state_size: int, shape: Sequence[int], side: int | None = None, hidden: int = 64
    ) -> None:
        super().__init__()
        self.shape = tuple(check_sizes("shape", shape))
        if len(self.shape) != 3:
            raise ValueError(f"sprites need frames of shape (C, H, W), got {self.shape}")
        self.side = min(self.shape[1:]) // 2 if side is None else check_count("side", side)
        self.content_size = check_count("content_size", content_size)
        if check_count("state_size", state_size) % 2:
            raise ValueError(f"a sprite's place takes two of the state's dimensions, state_size is {state_size}")
        self.sprites = state_size // 2
        if content_size % self.sprites:
            raise ValueError(f"content_size must be a multiple of the {self.sprites} sprites, got {content_size}")
        channels = self.shape[0]
        self.net = nn.Sequential(
            nn.Linear(content_size // self.sprites, hidden), nn.SiLU(),
            nn.Linear(hidden, hidden), nn.SiLU(),
            nn.Linear(hidden, (1 + channels) * self.side**2), nn.Unflatten(-1, (1 + channels, self.side, self.side)),
        )  # fmt: skip
        self.ground = nn.Parameter(torch.zeros(self.shape))
        for name, size in (("rows", self.shape[1]), ("columns", self.shape[2])):
            self.register_buffer(name, torch.arange(size).float(), persistent=False)
        self.register_buffer("cells", torch.arange(self.side).float() - (self.side - 1) / 2, persistent=False)
        last = self.net[-2]
        assert isinstance(last, nn.Linear)
        with torch.no_grad():  # a blob: places are learned from what overlaps, shapes from places
            across = torch.linspace(-1, 1, self.side).square()
            last.bias[: self.side**2].copy_((1 - 3 * (across.unsqueeze(-1) + across)).flatten())

    def forward(self, z: Tensor) -> Tensor:
        """Content and state ``(M, W + D)`` -> logits of frames ``(M, C, H, W)``."""
        content, state = z[:, : self.content_size], z[:, self.content_size :]
        drawn = torch.sigmoid(self.net(content.unflatten(-1, (self.sprites, -1))))  # (M, J, 1 + C, side, side)
        opacity = drawn[:, :, :1]
        layers = torch.cat([opacity, opacity * drawn[:, :, 1:]], 2)
        places = reflected(state.unflatten(-1, (self.sprites, 2)) / _EDGE)
        down, across = self._put(places[..., 0], self.rows), self._put(places[..., 1], self.columns)
        layers = down.unsqueeze(2) @ layers @ across.unsqueeze(2).mT  # (M, J, 1 + C, H, W)
        frame = torch.sigmoid(self.ground)
        for layer in layers.unbind(1):
            frame = frame * (1 - layer[:, :1]) + layer[:, 1:]
        return torch.logit(_OFF + (1 - 2 * _OFF) * frame)

    @torch.no_grad()
    def start_from(self, frames: Tensor) -> None:
        """Let the ground be the median of ``(M, C, H, W)`` frames, with nothing on it that moves."""
        if len(frames):
            seen = frames[:: -(-len(frames) // _FRAMES)].median(0).values
            self.ground.copy_(torch.logit(seen, eps=0.01))

    def _put(self, place: Tensor, pixels: Tensor) -> Tensor:
        """What each of a sprite's pixels adds to each of a frame's along one side, ``(M, J, n, side)``."""
        middle = (1 + place) * (len(pixels) - 1) / 2
        at = middle.unsqueeze(-1) + self.cells
        return (1 - (pixels.unsqueeze(-1) - at.unsqueeze(-2)).abs()).clamp_min(0)


def reflected(place: Tensor) -> Tensor:
    """Into [-1, 1] by reflections at both ends."""
    return 1 - (torch.remainder(place + 1, 4) - 2).abs()
