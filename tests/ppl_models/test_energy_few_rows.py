"""Energies of few rows and of many: which are set aside, the best parameters, the history of the fit, its level."""

import math

import numpy as np
import pytest
import torch

from inference import CompositionalLikelihood
from inference.objectives.unnormalised.noise import GaussianNoise
from inference.runtime.generators import generator, scoped_seed
from ppl_models import ConditionalEnergyModel, EnergyModel


@pytest.mark.parametrize(("rows", "within"), [(60, 0.25), (300, 0.15)])
def test_few_rows_are_not_learned_by_heart(rows: int, within: float) -> None:
    """Before rows were set aside the default fit scored -2.5 with 300 rows and ended in an error with 60."""
    draw = torch.randn(rows + 4000, 1, generator=torch.Generator().manual_seed(0))
    ebm = EnergyModel(event_shape=(1,))
    result = ebm.fit(draw[:rows], progress=False)
    entropy = 0.5 * math.log(2 * math.pi * math.e)
    assert float(ebm.log_prob(draw[rows:]).mean()) > -entropy - within
    steps = len(result.history["loss"])
    assert steps < 2000 and all(len(result.history[n]) == steps for n in ("log_partition", "ess"))
    averaged = EnergyModel(event_shape=(1,)).fit(draw[:rows], num_steps=10, average_last=0.5, progress=False)
    assert "validation_loss" not in averaged.history and len(averaged.history["loss"]) == 10


def test_log_z_does_not_wander_and_no_fit_stops_before_its_rate_has_fallen() -> None:
    """Eight modes in two dimensions, 10,000 rows: stopped early this fit collapsed at its first rate; with the paper's
    gradient log Z rose to 28 and back, at other seeds for good.
    """

    def draw(seed: int) -> torch.Tensor:
        rng = np.random.default_rng(seed)
        angle = rng.integers(8, size=10_000) * np.pi / 4
        centres = 2 * np.sqrt(2) * np.stack([np.cos(angle), np.sin(angle)], 1)
        return torch.tensor(centres + rng.normal(size=(10_000, 2)) / np.sqrt(8), dtype=torch.float32)

    ebm, x, angles = EnergyModel(event_shape=(2,), seed=2), draw(5), torch.arange(8) * math.pi / 4
    result = ebm.fit(draw(4), seed=2, progress=False)
    assert len(result.history["loss"]) == 2000 and len(result.history["validation_loss"]) == 21
    assert float(result.history["log_partition"].abs().max()) < 10
    centres = math.sqrt(8) * torch.stack([angles.cos(), angles.sin()], 1)
    truth = (-4 * torch.cdist(x, centres).square()).logsumexp(1).mean() + math.log(4 / (8 * math.pi))
    assert float(truth - ebm.log_prob(x).mean()) < 0.03


def test_thousands_of_rows_are_not_learned_by_heart() -> None:
    """5,000 rows of a normal in three dimensions were 1.8 nats below the truth on new ones."""
    law = torch.distributions.MultivariateNormal(torch.zeros(3), torch.eye(3) + 0.5)
    with scoped_seed(0):
        x, new = law.sample((5000,)), law.sample((4000,))
        line = torch.nn.Sequential(torch.nn.Linear(3, 1, bias=False), torch.nn.Flatten(0))
    torch.nn.init.zeros_(line[0].weight)
    ebm = EnergyModel(event_shape=(3,))
    ebm.fit(x, progress=False)
    assert float((law.log_prob(new) - ebm.log_prob(new)).mean()) < 0.1
    history = EnergyModel(event_shape=(3,), energy=line).fit(x, num_steps=10, progress=False).history
    assert "validation_loss" not in history  # three parameters


@pytest.mark.parametrize("normaliser", ["table", "joint"])
def test_conditional_energies_of_few_rows_are_not_learned_by_heart(normaliser: str) -> None:
    """60 pairs of a sine scored -8.0 by the table, the truth 0.19; held-out pairs that are given choose as well."""
    draw = generator(2, "few pairs")
    x = torch.rand(1060, generator=draw) * 6 - 3
    y = x.sin() + 0.2 * torch.randn(1060, generator=draw)
    model = ConditionalEnergyModel(normaliser=normaliser)
    result = model.fit(x[:60], y[:60], noise_samples=16, num_steps=1000, progress=False)
    assert float(model.log_prob(y[60:], x[60:]).mean()) > -0.8
    assert len(result.history["validation_loss"]) and len(result.history["log_partition"]) == len(
        result.history["loss"]
    )
    given = model.fit(x[:50], y[:50], valid=(x[50:60], y[50:60]), noise_samples=4, num_steps=20, progress=False)
    assert len(given.history["loss"]) == 20 and len(given.history["validation_loss"]) == 5
    with pytest.raises(ValueError, match="valid"):
        model.fit(x[:50], y[:50], valid=(x[50:60], y[50:59]), progress=False)


def test_chunks_of_held_out_rows_share_one_estimate_until_a_parameter_changes() -> None:
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    ebm = EnergyModel(event_shape=(2,))
    ebm.fit(x, num_steps=5, progress=False)
    objective = CompositionalLikelihood(ebm, GaussianNoise.fit(x), 16)
    calls: list[int] = []
    fresh = objective._fresh_log_weights

    def counted(num_samples: int, seed: int, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        calls.append(num_samples)
        return fresh(num_samples, seed, batch)

    objective._fresh_log_weights = counted  # type: ignore[method-assign]
    objective.eval()
    with torch.no_grad(), scoped_seed(0):
        first = [float(objective(part)) for part in x.split(16)]
        assert len(calls) == 1
        for p in objective.parameters():
            p.mul_(1.5)
        second = [float(objective(part)) for part in x.split(16)]
    assert len(calls) == 2 and first != second


def test_a_sharp_law_beside_many_columns() -> None:
    """Two branches that one of five columns moves: features of y tell them apart, a perceptron is slow to."""
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 5, generator=noise)
    side = 2.0 * (torch.rand(4000, 1, generator=noise) < 0.5) - 1
    laws = [torch.distributions.Normal(torch.sin(2 * x[:, :1]) + 0.8 * s, 0.2) for s in (side, 1.0, -1.0)]
    y = laws[0].mean + 0.2 * torch.randn(4000, 1, generator=noise)
    truth = (torch.logaddexp(laws[1].log_prob(y), laws[2].log_prob(y)) - math.log(2))[3000:].mean()
    model = ConditionalEnergyModel()
    model.fit(x[:3000], y[:3000], num_steps=1500, noise_samples=32, progress=False)
    assert truth - model.log_prob(y[3000:], x[3000:]).mean() < 0.5  # 0.57 without them
