"""Guards of the running log Z: few draws are judged together, tails and lags are named, beta follows the weights."""

import math
from collections.abc import Iterator

import pytest
import torch

from inference import CollapseError, CompositionalLikelihood
from inference.objectives.unnormalised import TargetVariance
from inference.objectives.unnormalised.guards import Guard, unreliable
from inference.runtime.generators import scoped_seed
from tests.inference.unnormalised_cases import DOUBLE, Tilted, normal_noise


@pytest.fixture(autouse=True)
def _own_random_numbers() -> Iterator[None]:
    with scoped_seed(0):
        yield


def test_batches_of_few_draws_are_judged_together() -> None:
    """M = 4: a batch alone never has fewer than a quarter of its draws effective, 512 draws of 128 batches may."""
    share, even = torch.full((400,), 0.25), torch.zeros(400)
    rare = torch.full((400,), -20.0)
    rare[::128] = 0.0  # one batch in 128 has all the weight: one draw of 512 carries the estimate
    guard = Guard()
    guard.look(even, share, 4)
    with pytest.raises(CollapseError, match=r"for 50 steps up to step \d+ fewer than 1% of the noise draws"):
        guard.look(rare, share, 4)
    guard.look(rare, share, 1024)  # batches that are large enough are judged alone
    with pytest.raises(CollapseError, match="step 150 "):
        guard.look(even, torch.where(torch.arange(400) < 100, 0.5, 0.009), 1024)
    short = torch.where((torch.arange(400) >= 100) & (torch.arange(400) < 149), 0.009, 0.5)
    guard.look(even, short, 1024)  # 49 steps in a row are not 50
    Guard("ignore").look(rare, share, 4)
    passed = torch.where((torch.arange(400) >= 100) & (torch.arange(400) < 200), 0.009, 0.5)
    guard.look(even, passed, 1024)  # the noise has found the model again


def test_a_lag_and_a_tail_are_named() -> None:
    assert unreliable(1.0, 1.3, 0.01, 0.3) is None
    assert "differ by more than 0.5: u lags" in str(unreliable(1.0, 1.6, 0.01, 0.3))
    assert unreliable(1.0, 1.6, 0.05, 0.3) is None  # within what the fresh estimate's own error allows
    assert "Pareto k = 0.75 > 0.7" in str(unreliable(1.0, 1.0, 0.01, 0.75))
    assert "Pareto k" in str(unreliable(1.0, 9.0, 0.01, 0.75))  # such a fresh estimate shows no lag
    assert unreliable(math.nan, 1.0, 0.01, 0.3) is not None
    assert "3 of the noise draws" in str(unreliable(1.0, 1.0, 0.01, 0.3, ess=3.0))  # whose tail has no shape


def test_beta_that_holds_the_variance_of_u() -> None:
    """p = N(1, 1) from N(0, 1), M = 64: 1 / ess - 1 = e - 1, so that a variance of 1e-3 asks for beta = 0.0718."""
    model, x = Tilted(1.0), torch.ones(8, dtype=DOUBLE)
    objective = CompositionalLikelihood(
        model, normal_noise(0.0, 1.0), 64, beta=TargetVariance(1e-3), correction="none", warmup_steps=0
    )
    for _ in range(900):
        objective(x)
    v = 1e-3 * 64 / (math.e - 1)
    beta = objective.history["beta"][300:]
    # the share of 64 draws is above the limit's 1 / e on average, so that beta is a little larger
    assert float(beta.mean()) == pytest.approx(2 * v / (1 + v), rel=0.35)
    assert float(beta.std()) < 0.25 * float(beta.mean())  # an average over batches, not the last one's share
    u = (objective.history["log_partition"][300:] - model.log_z()).exp()
    assert 0.4e-3 < float(u.var()) < 2.2e-3 and abs(float(u.mean()) - 1) < 0.02
