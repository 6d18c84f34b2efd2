"""The penalised dual of W1: its hand-written gradient, known distances, and the rules around the critic."""

import math

import pytest
import torch
from torch import Tensor

from inference.objectives.functional_prior import Critic, WassersteinDual
from inference.objectives.functional_prior import wasserstein_dual as dual_module
from inference.runtime.generators import generator, scoped_seed


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, "test"), dtype=dtype)


def rbf(points: int, lengthscale: float = 0.6) -> Tensor:
    x = torch.linspace(-3, 3, points, dtype=torch.float64)
    return torch.exp(-((x[:, None] - x) ** 2) / (2 * lengthscale**2)) + 1e-6 * torch.eye(points)


@pytest.mark.parametrize("one_sided", [True, False])
def test_critic_gradient_is_that_of_the_penalised_dual(one_sided: bool) -> None:
    n, points = 11, 4
    shapes = [(points, 6), (6,), (6, 6), (6,), (6,)]
    theta = [normal(*s, seed=i).requires_grad_() for i, s in enumerate(shapes)]
    f, g, mix = normal(n, points, seed=7), 3 * normal(n, points, seed=8), normal(n, 1, seed=9).sigmoid()

    def phi(x: Tensor) -> Tensor:
        return Critic(*theta, penalty=10.0)(x.unsqueeze(-1)).squeeze(-1)

    hat = (mix * f + (1 - mix) * g).requires_grad_()
    (slope,) = torch.autograd.grad(phi(hat).sum(), hat, create_graph=True)
    excess = slope.norm(dim=-1) - 1
    assert (excess < 0).any()
    assert (excess > 0).any()
    penalty = (excess.clamp_min(0) if one_sided else excess).square().mean()
    expected = torch.autograd.grad(phi(g).mean() - phi(f).mean() - 10 * penalty, theta)
    with torch.no_grad():
        found = dual_module._ascent_direction(theta, torch.cat([f, g]), mix, 1 / n, 10.0, one_sided)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def dual_of_gaussians(points: int, scale: float, shift: float, seed: int, **settings: str) -> tuple[float, float]:
    """The paper's critic on fresh batches of 128, 400 steps, scored on 20,000 fresh draws."""
    factor = torch.linalg.cholesky(rbf(points)).float()

    def draws(n: int) -> Tensor:
        return (torch.randn(n, points) @ factor.T).unsqueeze(-1)

    with scoped_seed(seed):
        discrepancy = WassersteinDual(num_steps=400, batch_size=128, **settings)
        critic = discrepancy.fit(draws(400 * 128), scale * draws(400 * 128) + shift)
        estimate = critic.estimate(draws(20_000), scale * draws(20_000) + shift)
    return estimate.dual.item(), estimate.corrected.item()


# W1(N(0, S), N(0, c^2 S)) = |c - 1| E|f| and W1 of a shift d is |d|.  At M = 100 the uncorrected value misses the
# tolerance.
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("points", "scale", "shift", "truth", "tolerance"),
    [(1, 2.0, 0.0, 0.798, 0.15), (100, 2.0, 0.0, 9.61, 0.2), (100, 0.5, 0.0, 4.80, 0.2), (100, 1.0, 1.0, 10.0, 0.2)],
)
def test_dual_finds_known_distances(
    points: int, scale: float, shift: float, truth: float, tolerance: float, seed: int
) -> None:
    dual, corrected = dual_of_gaussians(points, scale, shift, seed)
    assert corrected == pytest.approx(truth, rel=tolerance)
    if points == 100:
        assert dual > (1 + tolerance) * truth


@pytest.mark.parametrize("seed", range(5))
def test_two_sided_penalty_misses_the_scale_on_the_line(seed: int) -> None:
    # Its best critic would be |f|, whose kink costs it the whole penalty; 0.798 is the truth.
    assert dual_of_gaussians(1, 2.0, 0.0, seed, sides="two")[1] < 0.2


def test_critic_is_not_scored_on_its_own_draws() -> None:
    f, g = normal(64, 100, 1, seed=1, dtype=torch.float32), normal(64, 100, 1, seed=2, dtype=torch.float32)
    discrepancy = WassersteinDual(corrected=True)
    with scoped_seed(0):
        memory = discrepancy.score(discrepancy.fit(f, g), f, g)
    with scoped_seed(0):
        fresh = discrepancy(f, g)
    assert memory > 3  # what reuse would report for two equal laws
    assert abs(fresh) < 1


def test_correction_inverts_the_excess_slope() -> None:
    # A linear critic of slope 1 + W / (2 lambda) against a shift by W.
    f, w, penalty = normal(5, 1, 1), 7.0, 10.0
    slope = 1 + w / (2 * penalty)
    # The derivative of softplus is 1 far from 0, so the net is linear there.
    one = torch.ones(1, dtype=torch.float64)
    critic = Critic(slope * one[None], 100 * one, one[None], 100 * one, one, penalty)
    dual, corrected = critic.estimate(f, f + w)
    assert dual.item() == pytest.approx(w * slope)
    assert corrected.item() == pytest.approx(w)
    assert critic.estimate(f + w, f).corrected.item() == pytest.approx(-w)


def test_threshold_stops_at_the_step_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    f, g = normal(16, 3, 1, seed=1), normal(16, 3, 1, seed=2)
    direction = dual_module._ascent_direction
    norms: list[float] = []

    def recorded(*arguments: object) -> list[Tensor]:
        grads = direction(*arguments)
        norms.append(math.sqrt(sum(grad.square().sum().item() for grad in grads)))
        return grads

    monkeypatch.setattr(dual_module, "_ascent_direction", recorded)

    def trained(num_steps: int, threshold: float | None) -> Critic:
        norms.clear()
        with scoped_seed(0):
            return WassersteinDual(num_steps=num_steps, threshold=threshold).fit(f, g)

    trained(120, None)
    threshold = min(norms[:40]) * 1.001
    stop = next(step for step, norm in enumerate(norms) if norm < threshold)
    assert 0 < stop < 40
    expected = trained(stop, None)
    found = trained(120, threshold)
    assert all(torch.equal(a, b) for a, b in zip(found[:5], expected[:5], strict=True))
    assert len(norms) == 50  # where the host looked


def test_a_small_bag_is_used_in_turn() -> None:
    f, g = normal(10, 3, 2, seed=1), normal(10, 3, 2, seed=2)
    with scoped_seed(0):
        critic = WassersteinDual(num_steps=7, batch_size=4).fit(f, g)
    assert all(torch.isfinite(part).all() for part in critic[:5])


@pytest.mark.parametrize(
    "arguments", [{"num_steps": 0}, {"lr": -1.0}, {"penalty": math.nan}, {"sides": "both"}, {"threshold": 0.0}]
)
def test_bad_dual_arguments(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        WassersteinDual(**arguments)
