"""The conditional likelihood's steps against their formulas, and log Z(x) against a closed form."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.nn import PyroModule
from torch import Tensor

from inference import CompositionalLikelihood, fit
from inference.objectives.unnormalised import ConditionalCompositionalLikelihood
from inference.objectives.unnormalised.pair import Draws
from inference.runtime.generators import scoped_seed
from tests.inference.unnormalised_cases import DOUBLE


class Slope(PyroModule):
    """``l(x, y) = theta x y - y^2 / 2``; log Z(x) = log sqrt(2 pi) + (theta x)^2 / 2."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = torch.nn.Parameter(torch.tensor(0.3, dtype=DOUBLE))

    def forward(self, y: Tensor, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.ImproperUniform(constraints.real, (), ()), obs=y)
            pyro.factor("energy", self.theta * x * y - y**2 / 2)


LAW = dist.Normal(torch.tensor(0.0, dtype=DOUBLE), 1.5)
X, Y = torch.tensor([0.5, -1.2], dtype=DOUBLE), torch.tensor([0.1, -0.8], dtype=DOUBLE)
INDEX = torch.tensor([2, 0])
Z = torch.tensor([[-1.0, 0.5], [2.0, 0.1], [0.3, -1.7]], dtype=DOUBLE)  # (draw, row)


def noise() -> None:
    pyro.sample("y", LAW)


@pytest.mark.parametrize("normaliser", ["table", "minibatch"])
def test_a_step_for_each_rows_own_constant(normaliser: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """log u of the batch's rows, the loss and the gradient of two steps equal the formulas, to 1e-12."""
    model = Slope()
    objective = ConditionalCompositionalLikelihood(model, noise, 4, 3, normaliser=normaliser, beta=0.25, penalty=0.1)
    with scoped_seed(0):
        objective(INDEX, Y, X)
    objective.seen.zero_()
    fixed = Draws({"y": Z.flatten()}, LAW.log_prob(Z).flatten())
    monkeypatch.setattr(objective.pair, "draw", lambda *a, **k: fixed)
    u: Tensor | None = None
    for theta in (0.3, 0.7):
        with torch.no_grad():
            model.theta.fill_(theta)
        model.zero_grad()
        loss = objective(INDEX, Y, X)
        loss.backward()
        a = theta * X * Z - Z**2 / 2 - LAW.log_prob(Z)
        g = a.exp().mean(0)
        u = g if u is None or normaliser == "minibatch" else 0.75 * u + 0.25 * g
        slope = (a.exp() / (3 * u) * X * Z).sum(0).mean() - (X * Y).mean()
        slope = slope + 0.1 * (2 * g.log() * (a.softmax(0) * X * Z).sum(0)).mean()
        log_p = theta * X * Y - Y**2 / 2
        assert abs((loss - (u.log() - log_p).mean()).item()) < 1e-12
        assert model.theta.grad is not None and abs(float(model.theta.grad - slope)) < 1e-12
        if normaliser == "table":
            assert float((objective.log_u[INDEX] - u.log()).abs().max()) < 1e-12
            assert objective.seen.tolist() == [True, False, True, False]


def test_log_z_of_each_row() -> None:
    objective = ConditionalCompositionalLikelihood(Slope(), noise, 2, 8)
    with scoped_seed(0):
        found = objective.log_partitions((Y, X), 20_000)
    exact = 0.5 * math.log(2 * math.pi) + (0.3 * X) ** 2 / 2
    assert found == pytest.approx(exact, abs=0.02)  # the weights' variance is 0.3, so that the error is 0.004


def test_tables_and_joint_constants_belong_to_averaged_parameters() -> None:
    """After a fit that averages, log u is that of the average: of each row, and of the joint law over the rows."""
    with scoped_seed(1):
        x = torch.randn(64, dtype=DOUBLE)
        y = 0.8 * x + torch.randn(64, dtype=DOUBLE)
    options = {"num_steps": 60, "batch_size": 32, "lr": 0.1, "average_last": 0.5, "progress": False}
    model = Slope()
    table = ConditionalCompositionalLikelihood(model, noise, 64, 64)
    fit(table, (torch.arange(64), y, x), **options)
    exact = 0.5 * math.log(2 * math.pi) + (model.theta.detach() * x) ** 2 / 2
    assert float((table.log_u - exact).abs().median()) < 0.05  # 640 draws a row, whose weights' variance is 0.3 to 2
    model = Slope()
    joint = CompositionalLikelihood(model, noise, 64)
    fit(joint, (y, x), **options)
    exact = torch.logsumexp(0.5 * math.log(2 * math.pi) + (model.theta.detach() * x) ** 2 / 2, 0) - math.log(64)
    assert joint.refreshed is not None
    assert abs(float(joint.log_u - exact)) < 4 * joint.refreshed.standard_error < 0.05
