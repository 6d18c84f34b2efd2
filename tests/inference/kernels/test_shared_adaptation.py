"""Laws and adaptation of the kernels for many chains, on quadratic energies and explicit noise: no driver, no graph."""

import math

import pytest
import torch

from inference.kernels import MCLMC, MEADS, AdjustedMCLMC, ChEES
from inference.kernels.base import StepInputs
from inference.kernels.descent import descend
from inference.kernels.isokinetic import kick, minimal_norm_step, unit
from inference.kernels.meads import largest_eigenvalue

F64 = torch.float64


class Quadratic:
    """U = z' diag(k) z / 2."""

    def __init__(self, stiffness):
        self.stiffness, self.dim = torch.as_tensor(stiffness, dtype=F64), len(stiffness)

    def value_and_grad(self, z):
        return 0.5 * (self.stiffness * z.square()).sum(1), self.stiffness * z


def advance(kernel, potential, chains, steps, warmup, seed=0):
    """State, positions ``(step, chain, dim)`` and info of the steps after the warm-up; chains start in the target."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(chains, potential.dim, generator=generator, dtype=F64) / potential.stiffness.sqrt()
    state = kernel.init(z, potential)
    edges = {*kernel.boundaries(warmup), warmup}
    positions, infos = [], []
    for t in range(warmup + steps):
        control = {n: torch.tensor(v[0], dtype=F64) for n, v in kernel.controls(t, t + 1, warmup).items()}
        noise = {
            "normal": torch.randn(chains, potential.dim, generator=generator, dtype=F64),
            "uniform": torch.rand(chains, 1, generator=generator, dtype=F64),
        }
        state, info = kernel.step(state, StepInputs(noise, control, {}), potential)
        if t + 1 in edges and t < warmup:
            state = kernel.end_window(state, t + 1, warmup, potential)
        if t >= warmup:
            positions.append(state.position)
            infos.append(info)
    return state, torch.stack(positions), {n: torch.stack([i[n] for i in infos]) for n in infos[0]}


# ---------------------------------------------------------------------- the law at large steps
FIXED = {"adapt_step_size": False, "adapt_mass_matrix": False}


@pytest.mark.parametrize(
    ("kernel", "low", "high"),
    [
        (
            ChEES(potential_fn=len, step_size=1.2, trajectory_length=4.0, adapt_trajectory_length=False, **FIXED),
            0.5,
            0.9,
        ),
        (MEADS(potential_fn=len, step_size=1.2, damping=0.4, adapt_damping=False, **FIXED), 0.4, 0.9),
        (
            AdjustedMCLMC(
                potential_fn=len, step_size=4.5, trajectory_length=12.0, adapt_trajectory_length=False, **FIXED
            ),
            0.4,
            0.9,
        ),
    ],
    ids=["chees", "meads", "adjusted"],
)
def test_the_test_of_metropolis_makes_large_steps_exact(kernel, low, high):
    """Steps near the limit of stability, where the dynamics alone is off by tens of per cent: each variance and fourth
    moment is that of the target within 4 standard errors, taken over independent chains.
    """
    potential = Quadratic([1.0, 1.5, 2.0, 0.7, 1.0])
    _, z, info = advance(kernel, potential, chains=2000, steps=60, warmup=0)
    assert low < info["acceptance_rate"].mean() < high
    q = z * potential.stiffness.sqrt()
    for power, truth in ((1, 0.0), (2, 1.0), (4, 3.0)):
        chain_mean = (q**power).mean(0)
        error = (chain_mean.mean(0) - truth).abs() / (chain_mean.std(0) / math.sqrt(len(chain_mean)))
        assert error.max() < 4, power
        assert (chain_mean.std(0) / math.sqrt(len(chain_mean))).max() < (0.02, 0.02, 0.03, 0.12)[power - 1]


def test_meads_joint_law_of_velocity_and_slice():
    """In equilibrium velocities are standard normal, slices uniform on (-1, 1), and both independent of the position's
    energy: a slice that is not rescaled on acceptance, or a velocity not reversed on rejection, is seen here.
    """
    kernel = MEADS(potential_fn=len, step_size=1.2, damping=0.4, adapt_damping=False, **FIXED)
    potential = Quadratic([1.0, 1.5, 2.0, 0.7, 1.0])
    state, _, _ = advance(kernel, potential, chains=20000, steps=15, warmup=0)
    error = 1 / math.sqrt(20000)
    assert (state.velocity.square().mean(0) - 1).abs().max() < 4 * math.sqrt(2) * error
    assert state.slice.abs().max() <= 1
    assert (state.slice.mean().abs()) < 4 * error / math.sqrt(3)
    assert (state.slice.square().mean() - 1 / 3).abs() < 4 * error * math.sqrt(4 / 45)
    energy = state.potential - state.potential.mean()
    assert ((energy * state.slice.abs()).mean() / (energy.std() * state.slice.abs().std())).abs() < 4 * error


# ---------------------------------------------------------------------- isokinetic dynamics
def test_a_kick_is_the_flow_and_its_work_the_volume():
    """Against small Euler steps of du/dt = -(I - u u') g / (d - 1), and the work against the change of volume on the
    sphere, -log det, from autograd.
    """
    generator = torch.Generator().manual_seed(0)
    u, g = unit(torch.randn(1, 4, generator=generator, dtype=F64)), torch.randn(1, 4, generator=generator, dtype=F64)
    epsilon = torch.tensor(1.7, dtype=F64)
    new, work = kick(u, g, epsilon)
    slow = u
    for _ in range(2000):
        middle = slow - 0.5 * epsilon / 2000 * (g - (g * slow).sum(1, keepdim=True) * slow) / 3
        slow = slow - epsilon / 2000 * (g - (g * middle).sum(1, keepdim=True) * middle) / 3
    torch.testing.assert_close(new, unit(slow), rtol=1e-6, atol=1e-6)
    jacobian = torch.func.jacrev(lambda v: kick(unit(v[None]), g, epsilon)[0][0])(u[0])
    basis = torch.linalg.svd(u)[2][1:].T  # of the tangent space before
    after = torch.linalg.svd(new)[2][1:].T
    volume = torch.linalg.det(after.T @ jacobian @ basis).abs().log()
    torch.testing.assert_close(work[0], -volume, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_huge_gradient_overflows_nothing(dtype):
    u = unit(torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.0, 0.0]], dtype=dtype))
    new, work = kick(u, torch.tensor([[1e8, 0.0, 0.0], [1e8, 0.0, 0.0]], dtype=dtype), torch.tensor(1.0, dtype=dtype))
    assert torch.isfinite(new).all() and torch.isfinite(work).all()
    torch.testing.assert_close(new[:, 0], torch.tensor([-1.0, -1.0], dtype=dtype))


def test_the_integrator_is_reversible_and_of_second_order():
    potential = Quadratic([1.0, 4.0, 0.25])
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(7, 3, generator=generator, dtype=F64)
    u = unit(torch.randn(7, 3, generator=generator, dtype=F64))
    scale = torch.tensor([1.0, 0.5, 2.0], dtype=F64)
    energy, gradient = potential.value_and_grad(z)

    def go(z, u, gradient, epsilon, steps):
        work = torch.zeros(7, dtype=F64)
        for _ in range(steps):
            z, u, gradient, energy, added = minimal_norm_step(z, u, gradient, epsilon, scale, potential)
            work = work + added
        return z, u, gradient, energy, work

    epsilon = torch.tensor(0.3, dtype=F64)
    there = go(z, u, gradient, epsilon, 5)
    back = go(there[0], -there[1], there[2], epsilon, 5)
    torch.testing.assert_close(back[0], z)
    torch.testing.assert_close(back[1], -u)
    torch.testing.assert_close(back[4], -there[4])
    errors = [(e[3] + e[4] - energy).abs().mean() for e in (there, go(z, u, gradient, epsilon / 2, 10))]
    assert 3.0 < errors[0] / errors[1] < 5.5


# ---------------------------------------------------------------------- adaptation
@pytest.mark.parametrize("stiff", [1.0, 100.0])
def test_chees_finds_the_length_of_the_slowest_direction(stiff):
    """Without scales, directions of variance 1 and 1 / stiff.  The criterion is ruled by the slow ones, for which it is
    1 - sin(2 T) / (2 T) up to a factor: its maximum lies at T = 2.25, whatever the stiffness.  Steps are small, since
    whole numbers of them round trajectories up.
    """
    kernel = ChEES(potential_fn=len, step_size=0.1, adapt_step_size=False, adapt_mass_matrix=False)
    state, _, _ = advance(kernel, Quadratic([1.0] * 4 + [stiff] * 4), chains=128, steps=1, warmup=240)
    assert 1.7 < state.trajectory_length < 2.9
    assert float(state.step_size) == pytest.approx(0.1) and (state.scale == 1).all()


def test_pooled_scales_and_acceptance_hit_their_targets():
    stiffness = torch.logspace(-4, 4, 5, dtype=F64)
    for kernel in (ChEES, AdjustedMCLMC):
        state, _, info = advance(kernel(potential_fn=len), Quadratic(stiffness), chains=64, steps=50, warmup=200)
        torch.testing.assert_close(state.scale * stiffness.sqrt(), torch.ones(5, dtype=F64), rtol=0.15, atol=0)
        rate = info["acceptance_rate"]
        pooled = (1 / (1 / rate).mean(1)).mean() if kernel is ChEES else rate.mean()
        assert abs(float(pooled) - (0.651 if kernel is ChEES else 0.9)) < 0.06


@pytest.mark.parametrize("target", [5e-4, 5e-3])
def test_mclmc_hits_its_energy_variance(target):
    """The variance of the energy error per dimension is the desired one within 30%: 5% in the step size."""
    kernel = MCLMC(potential_fn=len, desired_energy_variance=target)
    _, _, info = advance(kernel, Quadratic(torch.logspace(-2, 2, 20)), chains=64, steps=200, warmup=200)
    assert float(info["energy_error"].square().mean()) / 20 == pytest.approx(target, rel=0.3)


def test_mclmc_bias_is_small_and_grows_with_the_energy_variance():
    """Variances within 2% at the default; a hundred times the energy variance widens them more than the noise does."""
    potential, wide = Quadratic([1.0, 4.0, 0.25, 2.0, 1.0, 1.0]), {}
    for target in (5e-4, 5e-2):
        kernel = MCLMC(potential_fn=len, desired_energy_variance=target)
        _, z, _ = advance(kernel, potential, chains=256, steps=300, warmup=160)
        variance = (z.square() * potential.stiffness).mean((0, 1))
        wide[target] = float((variance - 1).abs().mean())
    assert wide[5e-4] < 0.02 < wide[5e-2]


def test_mclmc_takes_its_length_from_the_autocorrelation():
    """From 0.1 sqrt(d), where the chain walks at random, to a length of the order of sqrt(d)."""
    short = {"trajectory_length": 0.1 * math.sqrt(20)}
    state, _, _ = advance(MCLMC(potential_fn=len, **short), Quadratic([1.0] * 20), chains=64, steps=1, warmup=200)
    assert state.trajectory_length > 5 * short["trajectory_length"]
    kept, _, _ = advance(
        MCLMC(potential_fn=len, adapt_trajectory_length=False, **short),
        Quadratic([1.0] * 20),
        chains=64,
        steps=1,
        warmup=40,
    )
    assert float(kept.trajectory_length) == pytest.approx(short["trajectory_length"])


def test_meads_step_and_damping_are_the_eigenvalues():
    """With scales held at 1 the eigenvalues are known: gradients have covariance k, positions 1 / k.  The estimate
    tr(C^2) / tr(C) at the truth gives step and damping; 256 chains a fold know it to a few per cent.
    """
    k = torch.tensor([1.0, 1.0, 1.0, 0.1, 16.0], dtype=F64)
    kernel = MEADS(potential_fn=len, adapt_mass_matrix=False)
    state, _, _ = advance(kernel, Quadratic(k), chains=1024, steps=1, warmup=200)
    step = 0.5 * (k.sum() / k.square().sum()).sqrt()
    damping = ((1 / k).sum() / (1 / k).square().sum()).sqrt()
    torch.testing.assert_close(state.step_size, step.expand(4), rtol=0.05, atol=0)
    torch.testing.assert_close(state.damping, damping.expand(4), rtol=0.05, atol=0)


def test_largest_eigenvalue_both_ways():
    """Pairs of rows or pairs of columns, whichever are fewer: the same number; with own pairs the textbook's."""
    generator = torch.Generator().manual_seed(0)
    member = (torch.arange(12) % 3 == torch.arange(3)[:, None]).to(F64)
    x = torch.randn(12, 30, generator=generator, dtype=F64)
    wide = largest_eigenvalue(x, member, own=True)
    for fold in range(3):
        rows = x[fold::3]
        c = rows.T @ rows / 4
        torch.testing.assert_close(wide[fold], (c @ c).trace() / c.trace())
    rotated = x @ torch.linalg.svd(x)[2].T  # the last 18 columns are zero now, and may go
    narrow = largest_eigenvalue(rotated[:, :12], member, own=True)
    torch.testing.assert_close(narrow, wide)
    many = torch.randn(4000, 50, generator=generator, dtype=F64)
    one = torch.ones(1, 4000, dtype=F64)
    assert float(largest_eigenvalue(many[:20], one[:, :20], own=False)) < 1.6  # the truth is 1; with own pairs 3.5
    assert float(largest_eigenvalue(many[:20], one[:, :20], own=True)) > 3


def test_descent_moves_only_who_is_far_out():
    """Chains within the typical set stay to the bit; those far out come near it, whatever the scales."""
    k = torch.logspace(0, 6, 8, dtype=F64)
    potential = Quadratic(k)
    generator = torch.Generator().manual_seed(0)
    inside = torch.randn(5, 8, generator=generator, dtype=F64) / k.sqrt()
    outside = torch.rand(5, 8, generator=generator, dtype=F64) * 4 - 2
    z = torch.cat([inside, outside])
    position, energy, gradient = descend(z, *potential.value_and_grad(z), potential)
    assert torch.equal(position[:5], inside)
    assert potential.value_and_grad(outside)[0].min() > 1e5 and energy[5:].max() < 500
    torch.testing.assert_close(gradient, k * position)


def test_mclmc_forgets_its_velocity_over_the_length():
    """Without forces the velocity keeps exp(-epsilon / L) of itself in a step, up to 1 / d."""
    kernel = MCLMC(potential_fn=len, step_size=0.3, trajectory_length=2.0, **FIXED)
    flat = Quadratic([0.0] * 200)
    state = kernel.init(torch.zeros(512, 200, dtype=F64), flat)
    generator, first = torch.Generator().manual_seed(0), None
    for t in range(6):
        control = {n: torch.tensor(v[0], dtype=F64) for n, v in kernel.controls(t, t + 1, 0).items()}
        normal = torch.randn(512, 200, generator=generator, dtype=F64)
        state, _ = kernel.step(state, StepInputs({"normal": normal}, control, {}), flat)
        first = state.velocity if first is None else first
    overlap = (first * state.velocity).sum(1).mean()
    assert float(overlap) == pytest.approx(math.exp(-5 * 0.3 / 2.0), abs=0.015)


def test_mclmc_sees_a_correlation_of_few_steps_in_a_long_warm_up() -> None:
    """Lags that are 60 steps apart would call the shortest correlation 60 steps."""
    state, _, _ = advance(MCLMC(potential_fn=len), Quadratic([1.0] * 20), chains=64, steps=1, warmup=3000)
    assert float(state.trajectory_length) < 3 * 20**0.5
