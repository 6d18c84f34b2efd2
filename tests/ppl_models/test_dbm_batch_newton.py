"""Newton with one curvature for the batch, in its two forms: Phi a matrix, and Phi diagonal blocks minus a low rank."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ppl_models import ConvMonotoneDBM, MonotoneDBM
from ppl_models.monotone_dbm import DeepBoltzmannMachine, batch_newton, training
from ppl_models.monotone_dbm.mean_field import solve
from ppl_models.monotone_dbm.pairwise import Query
from tests.ppl_models.dbm_cases import D


def stiff(sizes: list[int], curvature: int | str = 1, rank: int = 6) -> MonotoneDBM:
    """Columns of A that share a direction, so that Phi has one eigenvalue far below zero."""
    model = MonotoneDBM(sizes, rank=rank, monotonicity=0.01, curvature=curvature).double()
    noise, states = torch.Generator().manual_seed(0), model.groups.num_states
    with torch.no_grad():
        weight = 0.3 * torch.randn(rank, states, generator=noise, dtype=D)
        weight[0] += torch.cat([torch.linspace(-1.5, 1.5, k, dtype=D) for k in sizes])
        model.operator.weight.copy_(weight)  # type: ignore[operator, union-attr]
        model.bias.copy_(torch.randn(states, generator=noise, dtype=D))
    return model


def queries(model: MonotoneDBM, shares: Tensor) -> Query:
    """Random states, of which each row shows its share."""
    noise, count = torch.Generator().manual_seed(1), model.groups.num_groups
    states = (torch.rand(len(shares), count, generator=noise) * torch.tensor(model.groups.sizes)).long()
    mask = torch.rand(len(shares), count, generator=noise) < shares[:, None]
    return Query(states * mask, mask)


@pytest.mark.parametrize("curvature", [1, 2, "pinsker"])
def test_it_finds_the_fixed_points_of_groups_of_any_size(curvature: int | str) -> None:
    model = stiff([3] * 20 + [2] + [5] * 9 + [2], curvature)
    query = queries(model, torch.tensor([0.0, 0.3, 0.6, 1.0]))
    with torch.no_grad():
        phi = model.operator.prepare()
        problem = model.problem(phi, query)
        assert phi.low_rank is not None and phi.low_rank.thin and model.spectrum()[0] < -20
        truth = solve(problem, phi, "newton_cg", tolerance=1e-11)
        uniform = problem.response(torch.zeros_like(problem.clamped))
        for initial in (None, uniform):
            found = solve(problem, phi, tolerance=1e-10, initial=initial)
            assert found.converged.all()
            torch.testing.assert_close(found.value, truth.value, rtol=0, atol=1e-7)
            q = problem.response(found.value)
            assert problem.residual(q, problem.apply(q) + problem.bias).max() < 1e-9


def test_one_curvature_serves_queries_that_see_little_and_much() -> None:
    """Without each query's share of the variance, 16 updates leave half of these rows over."""
    model = stiff([4] * 60)
    query = queries(model, torch.linspace(0, 0.9, 32))
    with torch.no_grad():
        phi = model.operator.prepare()
        problem = model.problem(phi, query)
        assert phi.low_rank is not None
        found = batch_newton.solve_batch(phi, model.groups, problem.bias, problem.clamped, problem.free, tolerance=1e-6)
    assert found.converged.all() and found.evaluations <= 12


def test_what_it_leaves_over_is_left_to_newton(monkeypatch: pytest.MonkeyPatch) -> None:
    model = stiff([4] * 60)
    query = queries(model, torch.tensor([0.0, 0.5, 0.9]))
    whole = model.marginals(*query)
    monkeypatch.setattr(batch_newton, "_MOST", 2)
    short = model.marginals(*query)
    assert short.converged.all() and (short.iterations > 2).all()
    torch.testing.assert_close(short.probabilities, whole.probabilities, rtol=0, atol=1e-8)
    limited = model.marginals(*query, max_iterations=2)
    assert not limited.converged.any() and (limited.iterations == 2).all() and limited.probabilities.isfinite().all()


def test_a_coarse_answer_in_double_precision_is_no_worse_than_it_says() -> None:
    """It comes from updates in single precision, from which the double precision goes on where they end."""
    model = stiff([4] * 120)
    query = queries(model, torch.full((8,), 0.3))
    exact = model.marginals(*query, tolerance=1e-11)
    coarse = model.marginals(*query, tolerance=1e-3)
    assert coarse.converged.all() and coarse.residual.max() <= 1e-3 and coarse.probabilities.dtype == D
    assert (coarse.probabilities - exact.probabilities).abs().max() < 1e-3
    assert coarse.products < exact.products


class Operators(TorchDispatchMode):
    """Counts what is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.made = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.made += 1
        return function(*args, **(kwargs or {}))


def test_a_batch_of_queries_takes_few_operators() -> None:
    """In small models they are what takes the time: 1,100 of conjugate gradients and of exact steps."""
    model = stiff([4] * 96)
    query = queries(model, torch.full((32,), 0.4))
    with torch.no_grad():
        phi = model.operator.prepare()
        problem = model.problem(phi, query)
        with Operators() as count:
            assert solve(problem, phi, tolerance=1e-3).converged.all()
    assert count.made < 300


def full(curvature: int | str = 2) -> MonotoneDBM:
    """A trained-like Phi of full rank, of which a matrix is made."""
    model = MonotoneDBM([4] * 20 + [3] * 10, rank=110, monotonicity=0.01, curvature=curvature).double()
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.operator.weight.add_(0.3 * torch.randn(110, 110, generator=noise, dtype=D))  # type: ignore[operator]
        model.operator.weight[:4] += 0.6 * torch.randn(4, 110, generator=noise, dtype=D)  # type: ignore[index]
        model.bias.copy_(torch.randn(110, generator=noise, dtype=D))
    return model


@pytest.mark.parametrize("curvature", [1, 2, "pinsker"])
def test_it_solves_with_a_matrix(curvature: int | str) -> None:
    model = full(curvature)
    query = queries(model, torch.linspace(0.2, 0.6, 48))
    assert batch_newton.pays(model.operator.prepare(), 48) and not batch_newton.pays(model.operator.prepare(), 2)
    found, truth = (model.marginals(*query, solver=s, tolerance=1e-9) for s in ("newton", "newton_cg"))
    assert found.converged.all()
    torch.testing.assert_close(found.probabilities, truth.probabilities, rtol=0, atol=1e-7)
    found, truth = (model.marginals(*query, solver=s, tolerance=1e-4) for s in ("newton", "newton_cg"))
    assert found.converged.all() and 1.5 * found.products < truth.products


def test_a_machine_without_a_bound_is_left_to_descent() -> None:
    """Its curvature may be indefinite, and a step without descent may end at a saddle."""
    phi = torch.tensor([[0.0, 3.0], [3.0, 0.0]], dtype=D).kron(torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=D))
    machine = DeepBoltzmannMachine.from_potentials(phi, torch.zeros(4, dtype=D), [2, 2])
    assert not batch_newton.fits(machine.operator.prepare())
    monotone = full()
    assert batch_newton.fits(monotone.operator.prepare())


def test_a_training_step_that_never_waits_takes_few_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """5,200 of Newton's method with conjugate gradients; its loss and gradient are those of an exact solve."""
    net = ConvMonotoneDBM((1, 4, 4), 4, 3)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        net.operator.weight.add_(0.3 * torch.randn(net.operator.weight.shape, generator=noise))  # type: ignore[operator, union-attr, arg-type]
        net.bias.copy_(torch.randn(len(net.bias), generator=noise))
    query = net.image_query(torch.rand(24, 1, 4, 4, generator=noise), torch.rand(24, 4, 4, generator=noise) < 0.4)

    def learned() -> tuple[Tensor, Tensor]:
        net.zero_grad()
        logits = training.mean_field_logits(net, query, torch.tensor(1.0))
        (logits[:, :64].log_softmax(1)[:, 3].mean() + logits[:, -3:].log_softmax(1)[:, 1].mean()).backward()
        return logits.detach(), net.operator.weight.grad.clone()  # type: ignore[union-attr, operator]

    monkeypatch.setattr(training, "_TIGHT", 1e-6)
    monkeypatch.setattr(training, "_ADJOINT", 1e-5)
    exact = learned()
    monkeypatch.setattr(training, "cheap_to_read", lambda value: False)
    with Operators() as count:
        found = learned()
    assert count.made < 1800
    torch.testing.assert_close(found[0], exact[0], rtol=0, atol=1e-3)
    assert (found[1] - exact[1]).norm() < 0.01 * exact[1].norm()
