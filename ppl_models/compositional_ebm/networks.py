"""Energy networks.  None has an output bias: a constant in the energy is not identified."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from inference.objectives.unnormalised.heavy_tails import heavy_tailed
from inference.runtime.generators import generator, scoped_seed
from ppl_models.base import Standardiser

__all__ = ["LOW_DIMENSION", "EnergyNetwork", "mlp"]

LOW_DIMENSION = 4
_FREQUENCIES = 64
_NORMAL = 1.4826  # standard deviations in the median deviation of a normal law


def mlp(sizes: Sequence[int], seed: int, output_bias: bool = False) -> nn.Sequential:
    """Linear layers with SiLU between, without output bias, from initial weights that ``seed`` names."""
    with scoped_seed(seed):
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(itertools.pairwise(sizes)):
            last = i == len(sizes) - 2
            layers.append(nn.Linear(a, b, bias=output_bias or not last))
            if not last:
                layers.append(nn.SiLU())
    return nn.Sequential(*layers)


class EnergyNetwork(nn.Module):
    """The default network: standardised inputs, random Fourier features in few dimensions, a SiLU perceptron.

    Inputs with heavy tails are in units of their median deviation and squashed, ``asinh(z) / 2``: far out E then grows
    with the logarithm of x, so that the density falls with a power of it and the middle keeps its detail.

    In up to four dimensions the inputs are joined by the sines and cosines of 64 random projections, without which
    perceptrons are slow to learn sharp densities (Tancik et al., NeurIPS 2020).  With ``sharp`` the last ones
    alone are.

    Args:
        columns: size of a flattened event.
        hidden: widths of the hidden layers.
        outputs: 1 gives ``(row,)``, more ``(row, outputs)``.
        bandwidth: standard deviation of the frequencies, in radians per standard deviation of the data; 0: no Fourier
            features, for functions as smooth as the data are few.
        sharp: how many of the last columns have Fourier features; None: all.
        seed: of frequencies and initial weights.
    """

    frequencies: Tensor
    squashed: Tensor

    def __init__(
        self,
        columns: int,
        hidden: Sequence[int] = (64, 64),
        outputs: int = 1,
        bandwidth: float = 2.0,
        seed: int = 0,
        *,
        sharp: int | None = None,
    ) -> None:
        super().__init__()
        self.units = Standardiser(columns)
        sharp = columns if sharp is None else sharp
        fourier = _FREQUENCIES if bandwidth and sharp <= LOW_DIMENSION else 0
        draw = torch.randn(columns, fourier, generator=generator(seed, "frequencies"))
        draw[: columns - sharp] = 0.0
        self.register_buffer("frequencies", draw * bandwidth)
        self.register_buffer("squashed", torch.tensor(False))
        self.layers = mlp((columns + 2 * fourier, *hidden, outputs), seed)
        self.outputs = outputs

    def learn(self, x: Tensor) -> None:
        """Units of the inputs, from data ``(row, columns)``."""
        self.units.learn(x)
        heavy = bool(self.frequencies.shape[1]) and heavy_tailed(x)
        self.squashed = torch.tensor(heavy, device=x.device)
        if heavy:
            middle = x.median(0).values
            spread = _NORMAL * (x - middle).abs().median(0).values
            self.units.shift, self.units.scale = middle, torch.where(spread > 0, spread, self.units.scale)

    def forward(self, x: Tensor) -> Tensor:
        """``(row, *event)`` to ``(row,)`` or ``(row, outputs)``."""
        z = self.units(x.reshape(len(x), -1))
        z = torch.where(self.squashed, z.asinh() / 2, z)
        if self.frequencies.shape[1]:
            angle = z @ self.frequencies
            z = torch.cat([z, math.sqrt(2) * angle.sin(), math.sqrt(2) * angle.cos()], 1)
        out: Tensor = self.layers(z)
        return out.squeeze(1) if self.outputs == 1 else out
