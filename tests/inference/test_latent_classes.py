"""Latent classes: marginals that add up, EM that recovers a mixture, missing values."""

import math

import pytest
import torch

from inference import latent_classes
from inference.latent_classes import LatentClasses
from tests.inference.tabular import states
from tests.ppl_models.marginalization_cases import BernoulliMixture, hide_some

MIXED = [2, 3, 1, 4]


def rows_of(count: int, seed: int = 0, share: float = 0.4) -> torch.Tensor:
    """Two clusters."""
    g = torch.Generator().manual_seed(seed)
    low = torch.rand(count, 1, generator=g) < share
    u = torch.rand(count, 4, generator=g)
    return torch.where(low, u**2, u**0.5).mul(torch.tensor(MIXED)).long()


def test_every_marginal_is_the_sum_of_its_completions() -> None:
    mixture = LatentClasses(MIXED, 3)
    assert torch.allclose(mixture(states(MIXED)), torch.full((24,), -math.log(24))), "uniform before it has learned"
    mixture.learn(rows_of(500), generator=torch.Generator().manual_seed(0))
    complete, partial = states(MIXED), states(MIXED, missing=True)
    joint = mixture(complete)
    fits = ((partial[:, None] == complete) | (partial[:, None] < 0)).all(2)
    summed = joint.expand(len(partial), -1).masked_fill(~fits, -math.inf).logsumexp(1)
    assert torch.allclose(mixture(partial), summed, atol=1e-5)
    assert int(torch.isfinite(mixture.log_weights).sum()) == 3


def test_em_recovers_a_mixture_also_from_what_is_left_of_it() -> None:
    truth = BernoulliMixture(8, seed=4, components=3)
    train, test = truth.sample(6000), truth.sample(4000)
    best = float(truth.log_prob(test).mean())
    alone = LatentClasses([2] * 8, 1)
    alone.learn(train)
    p = (train.double().sum(0) + 0.5) / (len(train) + 1)
    independent = torch.distributions.Bernoulli(p).log_prob(test.double()).sum(1)
    assert torch.allclose(alone(test).double(), independent, atol=1e-4)
    for rows, margin in ((train, 0.02), (hide_some(train), 0.05)):
        mixture = LatentClasses([2] * 8, 8)
        mixture.learn(rows, generator=torch.Generator().manual_seed(0))
        found = float(mixture(test).mean())
        assert best - margin < found <= best + 0.02 and found > float(independent.mean()) + 0.2


def test_em_ends_where_weights_are_the_mean_posterior() -> None:
    x = rows_of(3000, share=0.1)
    mixture = LatentClasses(MIXED, 2)
    mixture.learn(x, iterations=300, generator=torch.Generator().manual_seed(0))
    hot = torch.nn.functional.one_hot(x, 4).float().flatten(1)
    posterior = (mixture.log_weights + hot @ mixture.log_theta.flatten(0, 1)).softmax(1)
    assert torch.allclose(posterior.mean(0), mixture.log_weights.exp(), atol=2e-3)


def test_more_iterations_are_no_worse_and_few_rows_make_few_classes() -> None:
    x = rows_of(400)
    scores = []
    for iterations in (1, 5, 100):
        mixture = LatentClasses(MIXED, 6)
        mixture.learn(x, iterations=iterations, generator=torch.Generator().manual_seed(0))
        scores.append(float(mixture(x).sum()))
    assert scores == sorted(scores)
    mixture.learn(x[:70], generator=torch.Generator().manual_seed(0))
    assert int(torch.isfinite(mixture.log_weights).sum()) == 2
    mixture.learn(x[:5])
    assert int(torch.isfinite(mixture.log_weights).sum()) == 1
    assert bool(torch.isfinite(mixture(states(MIXED))).all())


def test_rows_that_do_not_fit_into_memory_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_classes, "_MOST", 300 * 16)
    x = torch.arange(1000).remainder(4).unsqueeze(1) // torch.tensor([1, 1, 4, 1])
    x = torch.cat([x[:, :1].clamp(max=1), x[:, 1:2].clamp(max=2), x[:, 2:3], x[:, 3:]], 1)
    mixture = LatentClasses(MIXED, 1)
    mixture.learn(x, generator=torch.Generator().manual_seed(0))
    drawn = mixture.log_theta.exp().squeeze(2)[3] * (300 + 0.5 * 4) - 0.5
    assert abs(float(drawn.sum()) - 300) < 1e-2 and 5 < float((drawn - 75).abs().max()) < 40


def test_kinds_of_rows_are_found_from_any_seed() -> None:
    """Copies of a die: three classes that started from any three rows mostly take two kinds for one."""
    die = torch.randint(3, (300, 1), generator=torch.Generator().manual_seed(0)).repeat(1, 6)
    missing = torch.rand(die.shape, generator=torch.Generator().manual_seed(1)) < 0.1
    for seed in range(10):
        mixture = LatentClasses([3] * 6, 3)
        mixture.learn(die.masked_fill(missing, -1), generator=torch.Generator().manual_seed(seed))
        assert mixture(die).mean() > -1.3  # -log 3 = -1.10, and what the prior takes
