"""Sprites: frames against pasting by hand, places beyond the edges, where the ground starts, files, bad input."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inference.runtime.generators import scoped_seed
from ppl_models.fractional_sde import LatentFractionalSDE, SpriteDecoder
from tests.accelerator import fake_accelerator, place

TIMES = torch.tensor([0.1, 0.2, 0.4, 0.7, 1.0])
SMALL: dict[str, Any] = {"hidden": (8,), "width": 4, "features": 8, "context_size": 4, "num_processes": 3}


def decoder(seed: int = 0) -> SpriteDecoder:
    """Two sprites of 3 x 3 on frames of two channels, 9 x 7, with weights of size 1 in the last layer."""
    with scoped_seed(seed):
        made = SpriteDecoder(4, 4, (2, 9, 7), side=3, hidden=8)
        with torch.no_grad():
            made.ground.normal_()
            for part in made.net:
                if isinstance(part, nn.Linear):
                    part.weight.normal_()
    return made


def pasted(made: SpriteDecoder, z: Tensor, corners: list[tuple[int, int]]) -> Tensor:
    """A frame, ``(2, 9, 7)``, by a loop over sprites and pixels: sprite j has its first pixel at ``corners[j]``."""
    frame = torch.sigmoid(made.ground).clone()
    for j, (top, left) in enumerate(corners):
        drawn = torch.sigmoid(made.net(z[2 * j : 2 * j + 2]))
        for row in range(3):
            for column in range(3):
                y, x = top + row, left + column
                if 0 <= y < 9 and 0 <= x < 7:
                    a = drawn[0, row, column]
                    frame[:, y, x] = (1 - a) * frame[:, y, x] + a * drawn[1:, row, column]
    return frame


def test_whole_pixels_are_pasted() -> None:
    """Sprites whose middle is a pixel's; they overlap, and one leaves the frame."""
    made, w = decoder(), torch.tensor([0.3, -1.2, 0.8, 0.5])
    for (p, q), (r, s) in (((1, 1), (1, 2)), ((-3, 0), (4, -2)), ((0, 0), (0, 0))):
        z = torch.cat([w, 2 * torch.tensor([p / 4, q / 3, r / 4, s / 3])])
        found = torch.sigmoid(made(z.unsqueeze(0)))[0]
        expected = pasted(made, z, [(4 + p - 1, 3 + q - 1), (4 + r - 1, 3 + s - 1)])
        torch.testing.assert_close(found, 1e-3 + (1 - 2e-3) * expected, atol=1e-5, rtol=0)


def test_between_pixels_opacity_is_shared() -> None:
    """One sprite over a black ground is linear in its place from pixel to pixel."""
    with scoped_seed(0):
        made = SpriteDecoder(2, 2, (1, 9, 9), side=3, hidden=8)
    with torch.no_grad():
        made.ground.fill_(-50.0)
    at = torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.2, 0.0]])  # a pixel is a half
    here, there, between = torch.sigmoid(made(torch.cat([torch.ones(3, 2), at], -1)))
    torch.testing.assert_close(between, 0.6 * here + 0.4 * there, atol=1e-5, rtol=0)


def test_a_path_that_goes_straight_on_bounces() -> None:
    made, w = decoder(), torch.randn(4, generator=torch.Generator().manual_seed(0))

    def shown(*state: float) -> Tensor:
        return made(torch.cat([w, 2 * torch.tensor(state)]).unsqueeze(0))

    inside = shown(0.7, -0.9, 0.2, 1.0)
    for same in ((1.3, -1.1, 0.2, 1.0), (0.7 + 4, -0.9 - 4, 1.8, 5.0), (-2.7, 2.9, -2.2, -3.0)):
        torch.testing.assert_close(shown(*same), inside, atol=1e-4, rtol=0)


def moving_spot(count: int = 4) -> Tensor:
    """A white pixel pair that moves over a grey ground with a bright left edge, ``(count, 5, 1, 8, 8)``."""
    frames = torch.full((count, 5, 1, 8, 8), 0.3)
    frames[..., 0] = 0.8
    for n in range(count):
        for t in range(5):
            frames[n, t, 0, (n + t) % 8, 2 + t] = 1.0
    return frames


def test_the_ground_starts_as_the_still_part_of_the_data(tmp_path: Path) -> None:
    y = moving_spot()
    model = LatentFractionalSDE((1, 8, 8), 2, 2, decoder="sprites", **SMALL)
    model.fit(TIMES, y, num_steps=1, lr=1e-9, progress=False)
    assert isinstance(model.decoder, SpriteDecoder)
    still = torch.full((1, 8, 8), 0.3)
    still[..., 0] = 0.8
    torch.testing.assert_close(torch.sigmoid(model.decoder.ground.detach()), still, atol=1e-5, rtol=0)
    model.save(tmp_path / "model")
    again = LatentFractionalSDE.load(tmp_path / "model")
    assert torch.equal(model.reconstruct(2).samples, again.reconstruct(2).samples)
    with scoped_seed(0):
        mine = SpriteDecoder(2, 2, (1, 8, 8), side=3)
    own = LatentFractionalSDE((1, 8, 8), 2, 2, decoder=mine, **SMALL)
    own.fit(TIMES, y, num_steps=1, lr=1e-9, progress=False)
    torch.testing.assert_close(torch.sigmoid(mine.ground.detach()), still, atol=1e-5, rtol=0)


def test_on_an_accelerator() -> None:
    with fake_accelerator() as device:
        made = SpriteDecoder(4, 4, (2, 9, 7))
        place(made, device)
        loss = made(torch.zeros(3, 8, device=device)).sum()
        assert loss.device.type == device.type
        loss.backward()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((4, 3, (1, 8, 8)), "state_size is 3"),
        ((3, 4, (1, 8, 8)), "multiple of the 2 sprites"),
        ((4, 4, (8, 8)), "shape"),
        ((4, 4, (1, 8, 8), 0), "side"),
        ((0, 4, (1, 8, 8)), "content_size"),
    ],
)
def test_bad_sizes(arguments: tuple[Any, ...], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SpriteDecoder(*arguments)


def test_bad_names_and_means() -> None:
    with pytest.raises(ValueError, match="'sprites'"):
        LatentFractionalSDE((1, 8, 8), 2, 2, decoder="sprite", **SMALL)
    with pytest.raises(ValueError, match="squash=True"):
        LatentFractionalSDE((1, 8, 8), 2, 2, decoder="sprites", squash=False, **SMALL)
