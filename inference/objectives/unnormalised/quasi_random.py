"""Noise that is drawn evenly: each draw has the law that it had, and the draws of a batch keep apart.

Scrambled Sobol points with a random shift (Cranley and Patterson, SIAM Journal on Numerical Analysis 13, 1976).  Z is
estimated without bias as before, and with less variance where the weights are smooth functions of few coordinates.
Mirrored pairs, the older way, are not here: on a density that is near its own mirror image both of a pair say the same,
and the variance is twice that of independent draws.
"""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from inference.objectives.unnormalised.noise import Noise, noise_from_config

__all__ = ["QuasiRandomNoise"]

_EDGE = 1e-12  # keeps quantiles finite
_BLOCK = 4096  # points; larger batches are blocks of these, each with its own shift


class QuasiRandomNoise(Noise):
    """The law of another noise, drawn evenly.

    Args:
        noise: a normal, uniform or exponential noise, a mixture of normals (whose components then get their shares of
            each batch), or a defensive mixture of those.
        seed: of the scrambling; the shift is drawn anew with each batch. A power of two is the best size of a batch.

    Attributes:
        plain: the noise, whose draws are independent.
    """

    points: Tensor

    def __init__(self, noise: Noise, seed: int = 0) -> None:
        if not noise.uniforms:
            raise ValueError(f"{type(noise).__name__} is not drawn from uniform numbers: it cannot be drawn evenly")
        super().__init__(noise.event_shape)
        self.plain, self.seed = noise, seed
        # in float32, which a change of the module's dtype to or from float64 leaves as it is
        points = SobolEngine(noise.uniforms, scramble=True, seed=seed).draw(_BLOCK, dtype=torch.float32)
        self.register_buffer("points", points, persistent=False)

    @property
    def support(self) -> Any:
        """The noise's."""
        return self.plain.support

    def draw(self, num: int) -> Tensor:
        """As in ``Noise``; the rows are dependent."""
        points = self.points[:num].double()  # which the tails need
        shift = torch.rand(-(-num // _BLOCK), 1, points.shape[1], device=points.device, dtype=points.dtype)
        u = ((points + shift) % 1.0).flatten(0, 1)[:num]
        with torch.no_grad():
            return self.plain.transport(u.clamp(_EDGE, 1 - _EDGE))

    def log_prob(self, x: Tensor) -> Tensor:
        """As in ``Noise``."""
        return self.plain.log_prob(x)

    def config(self) -> dict[str, Any]:
        """The noise's, and the seed."""
        inner = {"kind": type(self.plain).__name__, "config": self.plain.config()}
        return {**super().config(), "plain": inner, "seed": self.seed}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Self:
        """The noise that was saved."""
        inner = {n.removeprefix("plain."): v for n, v in state.items()}
        plain = noise_from_config(config["plain"]["kind"], config["plain"]["config"], inner)
        return cls(plain, config["seed"])
