"""Noise drawn evenly: its law is the plain noise's, its estimates of Z vary less."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from inference.objectives.unnormalised.bounded import BoxNoise, HalfLineNoise
from inference.objectives.unnormalised.mixture import MixtureNoise
from inference.objectives.unnormalised.noise import (
    DefensiveMixture,
    GaussianNoise,
    KernelNoise,
    Noise,
    noise_from_config,
)
from inference.objectives.unnormalised.quasi_random import QuasiRandomNoise
from inference.runtime.generators import scoped_seed


@pytest.fixture(autouse=True)
def _own_random_numbers() -> Iterator[None]:
    with scoped_seed(0):
        yield


def plain(kind: str) -> Noise:
    x = torch.randn(400, 2) * torch.tensor([1.0, 3.0]) + torch.sign(torch.randn(400, 1)) * 2
    made: dict[str, Noise] = {
        "normal": GaussianNoise.fit(x),
        "box": BoxNoise.fit(x),
        "half-line": HalfLineNoise.fit(x.abs()),
        "mixture": MixtureNoise.fit(x, 3),
    }
    made["defensive"] = DefensiveMixture(MixtureNoise.fit(x, 3), GaussianNoise.fit(x, 2.0), 0.2)
    return made[kind]


@pytest.mark.parametrize("kind", ["normal", "box", "half-line", "mixture", "defensive"])
def test_each_draw_has_the_noises_law(kind: str) -> None:
    """The quantiles of log q, of both coordinates and of the third row alone are those of independent draws."""
    noise = plain(kind)
    even = QuasiRandomNoise(noise)
    drawn, free = even.draw(9000), noise.draw(40_000)
    assert drawn.shape == (9000, 2) and torch.equal(even.log_prob(drawn), noise.log_prob(drawn))
    levels = torch.tensor([0.05, 0.3, 0.5, 0.7, 0.95])

    def same(a: Tensor, b: Tensor, tolerance: float) -> None:
        place = torch.searchsorted(b.sort().values, a.quantile(levels)) / len(b)
        assert float((place - levels).abs().max()) < tolerance

    if kind != "box":
        same(noise.log_prob(drawn), noise.log_prob(free), 0.02)
    for column in (0, 1):
        same(drawn[:, column], free[:, column], 0.02)
    # 1200 batches, of which the third row is kept: only the shift, drawn anew each time, spreads it over the law
    same(torch.stack([even.draw(8)[2, 0] for _ in range(1200)]), free[:, 0], 0.05)


@pytest.mark.parametrize(("dim", "least"), [(2, 4.0), (8, 1.3)])
def test_estimates_vary_less_and_have_no_bias(dim: int, least: float) -> None:
    """Z of a correlated normal from a wider one, 128 draws: the variance's ratio to independent draws."""
    noise = GaussianNoise(torch.zeros(dim), 1.3 * torch.eye(dim))
    even = QuasiRandomNoise(noise)
    precision = torch.eye(dim) + 0.3 / dim
    exact = 0.5 * dim * math.log(2 * math.pi) - 0.5 * float(torch.logdet(precision))

    def estimates(law: Noise) -> Tensor:
        found = []
        for _ in range(300):
            z = law.draw(128)
            found.append((-0.5 * ((z @ precision) * z).sum(1) - law.log_prob(z)).exp().mean())
        return torch.stack(found) / math.exp(exact)

    free, spread = estimates(noise), estimates(even)
    assert float(free.var() / spread.var()) > least
    assert abs(float(spread.mean()) - 1) < 4 * float(spread.std()) / math.sqrt(300)


def test_files_types_and_what_cannot_be_drawn_evenly() -> None:
    even = QuasiRandomNoise(plain("mixture"), seed=3)
    again = noise_from_config("QuasiRandomNoise", even.config(), even.state_dict())
    draws = []
    for noise in (even, again):
        with scoped_seed(5):
            draws.append(noise.draw(100))
    assert torch.equal(*draws)
    assert bool(torch.isfinite(even.to(torch.float32).draw(100_000)).all())
    with pytest.raises(ValueError, match="KernelNoise is not drawn from uniform numbers"):
        QuasiRandomNoise(KernelNoise(torch.randn(20, 2)))
