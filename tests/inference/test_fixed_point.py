"""Fixed points against closed forms: linear maps, whose answer is a linear solve, and what is said of failures."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from inference.fixed_point import FixedPoint, attach_gradient, fixed_point, implicit_gradient
from inference.newton_cg import metric_cg, solve_adjoint

D = torch.float64


def linear(seed: int = 0, size: int = 6, radius: float = 0.9) -> tuple[Tensor, Tensor]:
    """A matrix of the given spectral radius and right sides of five samples."""
    noise = torch.Generator().manual_seed(seed)
    matrix = torch.randn(size, size, generator=noise, dtype=D)
    matrix = matrix * radius / torch.linalg.eigvals(matrix).abs().max()
    return matrix, torch.randn(5, size, generator=noise, dtype=D)


@pytest.mark.parametrize("method", ["picard", "anderson"])
def test_a_linear_map_meets_its_solve_and_stops_row_by_row(method: str) -> None:
    matrix, b = linear()
    start = torch.zeros_like(b)
    exact = torch.linalg.solve(torch.eye(6, dtype=D) - matrix, b.T).T
    start[2] = exact[2]  # one sample is there already
    found = fixed_point(lambda z, x: z @ matrix.T + x, start, b, method=method, tolerance=1e-11, max_iterations=2000)
    assert found.converged.all()
    torch.testing.assert_close(found.value, exact, rtol=0, atol=1e-8)
    assert found.iterations[2] == 0 < found.iterations.max()
    if method == "anderson":
        plain = fixed_point(lambda z, x: z @ matrix.T + x, start, b, tolerance=1e-11, max_iterations=2000)
        assert found.evaluations < plain.evaluations / 2


def test_a_sample_that_does_not_converge_says_so_and_keeps_its_best_iterate() -> None:
    factor = torch.tensor([[0.5], [-1.0], [3.0]], dtype=D)  # converges, cycles, diverges
    start = torch.ones(3, 1, dtype=D)
    found = fixed_point(lambda z, f: f * z + 1, start, factor, tolerance=1e-8, max_iterations=300)
    assert found.converged.tolist() == [True, False, False]
    assert math.isclose(found.value[0].item(), 2.0, abs_tol=1e-7)
    assert found.residual[2] == 3.0  # at the start, which is the best there was
    assert torch.isfinite(found.value).all()


def test_a_map_that_becomes_nan_is_left_at_its_best_iterate() -> None:
    found = fixed_point(lambda z: torch.where(z > 2, math.nan, 2 * z), torch.ones(2, 1, dtype=D), max_iterations=20)
    assert not found.converged.any() and torch.isfinite(found.value).all()


def test_a_fixed_number_of_updates_without_tolerance() -> None:
    matrix, b = linear()
    found = fixed_point(lambda z, x: z @ matrix.T + x, torch.zeros_like(b), b, tolerance=None, max_iterations=7)
    assert found.iterations.tolist() == [7] * 5
    assert found.evaluations == 8


def test_the_adjoint_in_single_precision_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tolerance was below what the dtype can resolve, so that each backward pass took all 500 products."""
    matrix = torch.randn(20, 20, generator=torch.Generator().manual_seed(0))
    matrix = 0.5 * matrix / torch.linalg.matrix_norm(matrix, 2)
    x = torch.ones(4, 20, requires_grad=True)

    def function(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ matrix.T + x)

    made = implicit_gradient(function, fixed_point(function, torch.zeros_like(x), x.detach(), tolerance=1e-6).value, x)
    counted, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: counted.append(1) or grad(*a, **k))
    made.sum().backward()
    assert len(counted) < 50


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_the_implicit_gradient_of_a_linear_map(scale: float) -> None:
    matrix, b = linear(radius=0.7)
    weight, x = matrix.clone().requires_grad_(), b.clone().requires_grad_()
    value = torch.linalg.solve(torch.eye(6, dtype=D) - matrix, b.T).T
    z = implicit_gradient(lambda z, x: torch.tanh(z @ weight.T) + x, _solve_tanh(matrix, b), x)
    (scale * z.square().sum()).backward()
    assert weight.grad is not None and x.grad is not None
    assert value.shape == z.shape
    for tensor, grad, at in ((weight, weight.grad, (1, 2)), (x, x.grad, (3, 1))):
        numbers = []
        for sign in (1, -1):
            changed = tensor.detach().clone()
            changed[at] += sign * 1e-5
            w, c = (changed, b) if tensor is weight else (matrix, changed)
            numbers.append(_solve_tanh(w, c).square().sum())
        assert math.isclose(grad[at].item() / scale, (numbers[0] - numbers[1]).item() / 2e-5, rel_tol=1e-6)


def _solve_tanh(matrix: Tensor, b: Tensor) -> Tensor:
    found = fixed_point(lambda z, x: torch.tanh(z @ matrix.T) + x, b, b, method="anderson", tolerance=1e-13)
    assert found.residual.max() < 1e-12
    return found.value


def test_conjugate_gradients_in_a_metric() -> None:
    noise = torch.Generator().manual_seed(3)
    a = torch.randn(8, 8, generator=noise, dtype=D)
    a = -(a @ a.T) / 4
    half = torch.randn(8, 8, generator=noise, dtype=D)
    p = half @ half.T / 8
    rhs = torch.randn(3, 8, generator=noise, dtype=D) * torch.tensor([[1.0], [1e-6], [1e6]], dtype=D)
    exact = torch.linalg.solve(torch.eye(8, dtype=D) - a @ p, rhs.T).T
    found = metric_cg(lambda v: v @ a, lambda v: v @ p, rhs, tolerance=1e-12)
    torch.testing.assert_close(found.solution / rhs.norm(dim=1, keepdim=True), exact / rhs.norm(dim=1, keepdim=True))
    adjoint = solve_adjoint(lambda v: v @ a, lambda v: v @ p, rhs, tolerance=1e-12)
    expected = torch.linalg.solve(torch.eye(8, dtype=D) - p @ a, rhs.T).T
    torch.testing.assert_close(adjoint / rhs.norm(dim=1, keepdim=True), expected / rhs.norm(dim=1, keepdim=True))
    assert torch.equal(solve_adjoint(lambda v: v @ a, lambda v: v @ p, torch.zeros(1, 8, dtype=D)), torch.zeros(1, 8))


def test_attach_gradient_leaves_the_value() -> None:
    x = torch.ones(3, requires_grad=True)
    made = attach_gradient(2 * x, lambda g: 5 * g)
    made.sum().backward()
    assert made.tolist() == [2.0] * 3
    assert x.grad is not None and x.grad.tolist() == [10.0] * 3


def _bad(**options: object) -> Callable[[], FixedPoint]:
    return lambda: fixed_point(lambda z: z, torch.zeros(1, 1), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (_bad(method="newton"), ValueError),
        (_bad(tolerance=-1.0), ValueError),
        (_bad(max_iterations=0), ValueError),
        (_bad(max_iterations=1.5), TypeError),
        (_bad(damping=3.0), ValueError),
        (lambda: fixed_point(lambda z: z[:, :1], torch.zeros(1, 2)), ValueError),
    ],
)
def test_bad_input(call: Callable[[], FixedPoint], error: type[Exception]) -> None:
    with pytest.raises(error):
        call()
