"""NUTS against exact moments, against a recursive reference on one trajectory, and against Pyro's arguments."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from inference import HMC, MCMC, MEADS, NUTS, ChEES
from inference.kernels.nuts import Tree
from inference.potential import Potential, PotentialFunction, Program, graph
from inference.results.diagnostics import ess_bulk, rhat
from inference.runtime.streams import Streams

SCALES = torch.tensor([0.1, 1.0, 3.0], dtype=torch.float64)
CORRELATION = torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, -0.3], [0.0, -0.3, 1.0]], dtype=torch.float64)
COVARIANCE = CORRELATION * SCALES * SCALES[:, None]


def gaussian() -> None:
    pyro.sample("x", dist.MultivariateNormal(torch.zeros(3, dtype=torch.float64), COVARIANCE))


def rotten(z: dict[str, Tensor]) -> Tensor:
    """A skewed, light-tailed energy whose moments a quadrature gives."""
    x = z["x"]
    return (x.exp() - 0.5 * x + 0.1 * x**4).sum()


def quadrature(power: int) -> float:
    grid = torch.linspace(-8, 6, 20001, dtype=torch.float64)
    weight = (-(grid.exp() - 0.5 * grid + 0.1 * grid**4)).exp()
    return float((grid**power * weight).sum() / weight.sum())


def assert_mean(draws: Tensor, expected: float, errors: float = 4.0) -> None:
    """``draws`` ``(chain, draw)`` average to ``expected`` within ``errors`` Monte-Carlo standard errors."""
    standard_error = float(draws.std() / ess_bulk(draws).sqrt())
    assert abs(float(draws.mean()) - expected) < errors * standard_error


# ---------------------------------------------------------------------- one trajectory, against a recursion
class Recursion:
    """A trajectory as the papers write it, by recursion, on the choices that the program is given.

    ``points`` maps leaf number to ``(z, p)``; a tree is its range of leaves.
    """

    def __init__(self, potential: Potential, z: Tensor, p: Tensor, epsilon: float) -> None:
        self.potential, self.epsilon = potential, epsilon
        energy, gradient = potential.value_and_grad(z[None])
        self.points = {0: (z, p, gradient[0], float(energy[0]))}

    def point(self, index: int) -> tuple[Tensor, Tensor, Tensor, float]:
        if index not in self.points:
            sign = 1 if index > 0 else -1
            z, p, gradient, _ = self.point(index - sign)
            p = p - 0.5 * sign * self.epsilon * gradient
            z = z + sign * self.epsilon * p
            energy, gradient = (v[0] for v in self.potential.value_and_grad(z[None]))
            self.points[index] = (z, p - 0.5 * sign * self.epsilon * gradient, gradient, float(energy))
        return self.points[index]

    def turns(self, low: int, high: int) -> bool:
        """The criterion over the leaves from ``low`` to ``high``, ends included."""
        momenta = torch.stack([self.point(i)[1] for i in range(low, high + 1)])
        inside = momenta.sum(0) - 0.5 * (momenta[0] + momenta[-1])
        return bool(momenta[0] @ inside <= 0) or bool(momenta[-1] @ inside <= 0)

    def subtree_turns(self, low: int, high: int) -> bool:
        """Whether a tree of ``2 ** k`` leaves, or any of its halves down to pairs, turns."""
        if low == high:
            return False
        middle = (low + high) // 2
        return self.subtree_turns(low, middle) or self.subtree_turns(middle + 1, high) or self.turns(low, high)

    def extent(self, directions: list[int], max_depth: int) -> tuple[int, int, bool]:
        """The trajectory's ends, and whether its last half was dropped for a turn within it."""
        low = high = 0
        for depth, direction in enumerate(directions[:max_depth]):
            new = (high + 1, high + 2**depth) if direction > 0 else (low - 2**depth, low - 1)
            if self.subtree_turns(*new):
                return low, high, True
            low, high = min(low, new[0]), max(high, new[1])
            if self.turns(low, high):
                break
        return low, high, False


@pytest.mark.parametrize("seed", range(8))
def test_the_iterative_tree_is_the_recursive_one(seed: int) -> None:
    """Extent, sum of momenta and weight of a trajectory, and how many leaves it took, leaf by leaf.

    A leaf that is missed or counted twice, a subtree that is not tested, and a wrong sign of time each change one.
    """
    generator = torch.Generator().manual_seed(seed)
    position = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    potential = Potential(PotentialFunction(rotten, {"x": position[0]}))
    kernel = NUTS(potential_fn=rotten, step_size=0.15, adapt_step_size=False, adapt_mass_matrix=False)
    state = kernel.init(position, potential)
    momenta = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    uniforms = torch.rand(128, 5, 3, generator=generator, dtype=torch.float64)
    tree = kernel._first_tree(state, momenta[0], uniforms[0, :, 2], False)
    directions: list[list[int]] = [[int(d)] for d in tree.direction]
    before: list[Tree | None] = [None] * 5
    for _ in range(127):
        previous = tree
        tree = kernel._tick(
            potential, tree, uniforms, momenta, state.mass_factor, torch.tensor(1), torch.tensor(0.0).double()
        )
        for chain in range(5):
            if before[chain] is None and tree.drawn[chain] == 1:
                before[chain] = previous
            elif before[chain] is None and tree.leaf[chain] == 0:
                directions[chain].append(int(tree.direction[chain]))
        if bool((tree.drawn == 1).all()):
            break
    assert bool((tree.drawn == 1).all())
    for chain in range(5):
        reference = Recursion(potential, position[chain], momenta[0, chain], 0.15)
        low, high, dropped = reference.extent(directions[chain], kernel.max_tree_depth)
        record = tree.kept[0, chain]
        depth, steps = int(record[3 + 4]), int(record[3 + 5])
        assert high - low + 1 == 2**depth
        if not dropped:
            assert steps == high - low
        else:
            assert high - low < steps <= high - low + 2**depth
        # The draw is one of the trajectory's points, and its energy is that point's.
        points = torch.stack([reference.point(i)[0] for i in range(low, high + 1)])
        distance = (points - record[:3]).norm(dim=1)
        nearest = int(distance.argmin())
        assert float(distance[nearest]) < 1e-10
        assert float(record[3]) == pytest.approx(reference.point(low + nearest)[3], abs=1e-10)


def test_draws_within_a_trajectory_have_their_weights() -> None:
    """From one start with one momentum, the draw's law over many chains follows exp(-H) along what the trees cover.

    Multinomial sampling with biased progression is checked as a whole: the stationary law must survive one transition.
    """
    chains = 40_000
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(chains, 1, generator=generator, dtype=torch.float64)
    potential = Potential(PotentialFunction(lambda z: 0.5 * (z["x"] ** 2).sum(), {"x": x[0]}))
    kernel = NUTS(
        potential_fn=lambda z: 0.5 * (z["x"] ** 2).sum(), step_size=1.5, adapt_step_size=False, adapt_mass_matrix=False
    )
    state = kernel.init(x, potential)
    momenta = torch.randn(2, chains, 1, generator=generator, dtype=torch.float64)
    uniforms = torch.rand(64, chains, 3, generator=generator, dtype=torch.float64)
    tree = kernel._first_tree(state, momenta[0], uniforms[0, :, 2], False)
    while not bool((tree.drawn == 1).all()):
        tree = kernel._tick(potential, tree, uniforms, momenta, state.mass_factor, torch.tensor(1), x.new_zeros(()))
    after = tree.kept[0, :, 0]
    # Standard errors of the moments of 40,000 independent standard normals.
    assert abs(float(after.mean())) < 4 / math.sqrt(chains)
    assert abs(float(after.square().mean()) - 1) < 4 * math.sqrt(2 / chains)
    assert abs(float((after**4).mean()) - 3) < 4 * math.sqrt(96 / chains)
    assert float((after - x[:, 0]).abs().mean()) > 0.5


# ---------------------------------------------------------------------- moments
# Four chains of one model in most tests: their compiled step is made once.
@pytest.mark.parametrize(("full_mass", "num_chains"), [(False, 4), (True, 4), (True, 1)])
def test_moments_of_a_gaussian(full_mass: bool, num_chains: int) -> None:
    mcmc = MCMC(NUTS(gaussian, full_mass=full_mass), 1000 // num_chains, 200, num_chains=num_chains, progress=False)
    mcmc.run()
    draws = mcmc.get_samples(group_by_chain=True)["x"]
    for i in range(3):
        assert_mean(draws[..., i], 0.0)
        for j in range(i + 1):
            assert_mean(draws[..., i] * draws[..., j], float(COVARIANCE[i, j]))
    assert num_chains == 1 or float(rhat(draws).max()) < 1.03


def test_moments_of_a_skewed_energy() -> None:
    start = {"x": torch.zeros(16, 2, dtype=torch.float64)}
    mcmc = MCMC(NUTS(potential_fn=rotten), 150, 100, initial_params=start, num_chains=16, progress=False)
    mcmc.run()
    draws = mcmc.get_samples(group_by_chain=True)["x"]
    for power in (1, 2, 3):
        assert_mean(draws[..., 0] ** power, quadrature(power))


def test_constrained_and_enumerated_sites() -> None:
    """A positive site and a summed-out discrete one, against quadrature over the site."""
    y = torch.tensor([0.3, 2.1, -0.4, 1.9, 2.4], dtype=torch.float64)

    def model() -> None:
        scale = pyro.sample("scale", dist.Gamma(torch.tensor(2.0, dtype=torch.float64), 2.0))
        with pyro.plate("n", 5):
            k = pyro.sample(
                "k", dist.Bernoulli(torch.tensor(0.4, dtype=torch.float64)), infer={"enumerate": "parallel"}
            )
            pyro.sample("y", dist.Normal(2.0 * k, scale), obs=y)

    grid = torch.linspace(1e-4, 12, 200_001, dtype=torch.float64)
    normal = torch.distributions.Normal
    likelihood = (
        0.6 * normal(torch.zeros_like(grid), grid).log_prob(y[:, None]).exp()
        + 0.4 * normal(torch.full_like(grid, 2.0), grid).log_prob(y[:, None]).exp()
    )
    posterior = likelihood.prod(0) * torch.distributions.Gamma(2.0, 2.0).log_prob(grid).exp()
    mcmc = MCMC(NUTS(model, max_plate_nesting=1), 150, 100, num_chains=16, progress=False)
    mcmc.run()
    draws = mcmc.get_samples(group_by_chain=True)["scale"]
    for power in (1, 2):
        assert_mean(draws**power, float((grid**power * posterior).sum() / posterior.sum()))


# ---------------------------------------------------------------------- adaptation
def test_block_mass_is_dense_within_its_groups_alone() -> None:
    def model() -> None:
        z = pyro.sample("a", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.sample("b", dist.Normal(z[0], 0.1))
        pyro.sample("c", dist.Normal(z[1], 0.1))

    kernel = NUTS(model, full_mass=[("a", "b")])
    mcmc = MCMC(kernel, 1, 50, num_chains=4, progress=False)
    states: list[Any] = []
    original = kernel.end_window
    kernel.end_window = lambda *a: states.append(original(*a)) or states[-1]  # type: ignore[method-assign]
    mcmc.run()
    factor = states[-1].mass_factor
    inverse_mass = factor @ factor.T
    assert bool((inverse_mass[3, :3] == 0).all()) and bool((inverse_mass[:3, 3] == 0).all())
    assert float(inverse_mass[0, 2]) > 0.5 * float(inverse_mass[0, 0])


def test_the_mass_matrix_is_the_posterior_covariance() -> None:
    kernel = NUTS(gaussian, full_mass=True)
    states: list[Any] = []
    original = kernel.end_window
    kernel.end_window = lambda *a: states.append(original(*a)) or states[-1]  # type: ignore[method-assign]
    MCMC(kernel, 1, 1200, num_chains=4, progress=False).run()
    factor = states[-1].mass_factor
    relative = (factor @ factor.T - COVARIANCE) / torch.sqrt(torch.outer(COVARIANCE.diag(), COVARIANCE.diag()))
    assert float(relative.abs().max()) < 0.15
    # In whitened space a step accepted 0.8 of the time is of order one.
    assert 0.4 < float(states[-1].average.log_average.exp()[0]) < 2.5


def test_acceptance_comes_near_its_target() -> None:
    mcmc = MCMC(NUTS(gaussian, target_accept_prob=0.9), 150, 250, num_chains=4, progress=False)
    mcmc.run()
    assert 0.85 < float(mcmc.sample_stats["acceptance_rate"].mean()) < 0.97


# ---------------------------------------------------------------------- chains and programs
def _fixed() -> NUTS:
    return NUTS(gaussian, step_size=0.05, adapt_step_size=False, adapt_mass_matrix=False, max_tree_depth=5)


def test_a_chain_is_the_same_alone_and_among_others() -> None:
    """Without pooled adaptation; trees of different sizes then run side by side without touching one another."""
    x = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def draws(rows: slice) -> Tensor:
        kernel = NUTS(potential_fn=rotten, step_size=0.3, adapt_step_size=False, adapt_mass_matrix=False)
        potential = Potential(PotentialFunction(rotten, {"x": x[0]}))
        chains = range(6)[rows]
        streams = Streams(3, chains, kernel.noise(potential), potential, "shared")
        run = kernel.runner(potential, lambda f, calls: Program(f, compile=False), streams)
        return torch.stack([t.state.position for t in run(kernel.init(x[rows], potential), 0, 40, 0)], dim=1)

    together = draws(slice(0, 6))
    torch.testing.assert_close(draws(slice(2, 3)), together[2:3], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(draws(slice(4, 6)), together[4:6], rtol=1e-9, atol=1e-9)


def test_recorded_compiled_and_plain_agree() -> None:
    runs = [
        MCMC(_fixed(), 10, 0, num_chains=4, progress=False, **options).run().get_samples()["x"]  # type: ignore[arg-type]
        for options in ({"compile": False}, {"compile": True}, {"compile": False, "capture": False})
    ]
    # Rounding differs and is amplified along trajectories; the first draws still agree.
    torch.testing.assert_close(runs[0][:3], runs[1][:3], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(runs[0][:3], runs[2][:3], rtol=1e-6, atol=1e-6)


def test_a_run_records_its_step_once() -> None:
    """One recording and one compilation, whatever the number of windows, blocks and draws."""
    calls = []

    def model() -> None:
        calls.append(1)
        pyro.sample("x", dist.Normal(0.0, 1.0).expand([3]).to_event(1))

    mcmc = MCMC(NUTS(model), 140, 40, num_chains=4, progress=False)
    mcmc.run()
    assert [program.recordings for program in mcmc._programs] == [1]
    first = len(calls)
    mcmc = MCMC(NUTS(model), 280, 80, num_chains=4, progress=False)
    mcmc.run()
    assert len(calls) == 2 * first  # the model is not run again for more draws


def test_gradients_are_counted() -> None:
    mcmc = MCMC(NUTS(gaussian), 30, 0, num_chains=4, progress=False)
    mcmc.run()
    assert mcmc.num_gradients == int(mcmc.sample_stats["num_steps"].sum())


# ---------------------------------------------------------------------- resume, seeds, devices
def test_resume_is_exact(tmp_path: Any) -> None:
    options: dict[str, Any] = {"num_chains": 4, "progress": False, "seed": 5}
    whole = MCMC(NUTS(gaussian), 25, 75, **options).run().get_samples()["x"]

    stopped = 0

    def interrupt(fields: dict[str, Any]) -> None:
        nonlocal stopped
        stopped += 1
        if fields["step"] >= 75:
            raise KeyboardInterrupt

    cut = MCMC(
        NUTS(gaussian), 25, 75, num_chains=4, seed=5, checkpoint=tmp_path, checkpoint_every=0.0, progress=interrupt
    )
    with pytest.warns(UserWarning, match="interrupted"):
        cut.run()
    resumed = MCMC(NUTS(gaussian), 25, 75, checkpoint=tmp_path, **options).run()
    assert torch.equal(resumed.get_samples()["x"], whole)


def _break_even(monkeypatch: Any, calls: int) -> None:
    """Let compilation cost what so many calls of an uncompiled step do."""
    monkeypatch.setattr(graph, "_pays", lambda _, called: called > calls)


@pytest.mark.parametrize("calls", [250, 450])
def test_long_trees_compile_the_step_within_the_run(calls: int, monkeypatch: Any, tmp_path: Any) -> None:
    """Trees of 31 leaves, where 8 were expected: the switch is made in the warm-up, or after it.  Bits depend on the
    number of leapfrog steps alone: neither on what the process has compiled before nor on where a run was resumed.
    """
    _break_even(monkeypatch, calls)
    kernel = _fixed()
    options: dict[str, Any] = {"num_chains": 4, "seed": 5}
    binds: list[bool] = []
    bind = Program.bind

    def watched(program: Program, *args: Any, **kwargs: Any) -> Any:
        step = bind(program, *args, **kwargs)
        binds.append(program.compiled)
        return step

    monkeypatch.setattr(Program, "bind", watched)
    whole = MCMC(kernel, 10, 10, progress=False, **options).run()
    # The run is bound when it begins, and once more where the step outgrows it.
    assert binds == [False, True]
    again = MCMC(kernel, 10, 10, progress=False, **options).run()
    assert torch.equal(again.get_samples()["x"], whole.get_samples()["x"])

    def interrupt(fields: dict[str, Any]) -> None:
        if fields["step"] == 10:
            raise KeyboardInterrupt

    options |= {"checkpoint": tmp_path, "checkpoint_every": 0.0}
    with pytest.warns(UserWarning, match="interrupted"):
        MCMC(kernel, 10, 10, progress=interrupt, **options).run()
    resumed = MCMC(kernel, 10, 10, progress=False, **options).run()
    assert torch.equal(resumed.get_samples()["x"], whole.get_samples()["x"])


def test_short_trees_and_forbidden_compilation_stay_uncompiled(monkeypatch: Any) -> None:
    _break_even(monkeypatch, 250)
    options: dict[str, Any] = {"step_size": 0.05, "adapt_step_size": False, "adapt_mass_matrix": False}
    short = MCMC(NUTS(gaussian, max_tree_depth=2, **options), 20, 0, num_chains=4, progress=False).run()
    forbidden = MCMC(_fixed(), 20, 0, num_chains=4, progress=False, compile=False).run()
    assert int(forbidden.sample_stats["num_steps"].sum(1).min()) > 250
    assert not short.compiled and not forbidden.compiled


# ---------------------------------------------------------------------- Pyro's arguments
def test_arguments_and_defaults_are_pyros() -> None:
    import inspect

    from pyro.infer import HMC as PyroHMC
    from pyro.infer import NUTS as PyroNUTS

    pairs: list[tuple[Callable[..., Any], Callable[..., Any]]] = [(NUTS, PyroNUTS), (HMC, PyroHMC)]
    for ours, theirs in pairs:
        mine = inspect.signature(ours).parameters
        for name, parameter in inspect.signature(theirs).parameters.items():
            assert name in mine
            if name != "init_strategy":
                assert mine[name].default == parameter.default


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"use_multinomial_sampling": False}, ValueError, "slice"),
        ({"max_tree_depth": 0}, ValueError, "max_tree_depth"),
        ({"max_tree_depth": 2.5}, ValueError, "max_tree_depth"),
        ({"step_size": -1.0}, ValueError, "step_size"),
        ({"full_mass": "x"}, TypeError, "full_mass"),
        ({"full_mass": [("x",), ("x",)]}, ValueError, "more than once"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        NUTS(gaussian, **arguments)


def test_an_unknown_site_in_a_mass_block_is_named() -> None:
    with pytest.raises(ValueError, match="nosuch"):
        MCMC(NUTS(gaussian, full_mass=[("nosuch",)]), 10, progress=False).run()


TIMES = torch.arange(1.0, 201.0, 5.0, dtype=torch.float64)
GROWN = (-0.02 * TIMES).exp() + 0.1 * torch.sin(TIMES)


def growth() -> None:
    """What a recursion with an unstable root has: at a = 0.85 the energy is 1e150, in the posterior 30 or so."""
    a = pyro.sample("a", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
    with pyro.plate("period", len(TIMES)):
        pyro.sample("y", dist.Normal((a * TIMES).exp(), 0.1), obs=GROWN)


FROM_FAR = [NUTS(growth), HMC(growth, num_steps=8), ChEES(growth), MEADS(growth)]


@pytest.mark.parametrize("kernel", FROM_FAR, ids=lambda kernel: type(kernel).__name__)
def test_a_chain_from_far_out_comes_in_and_does_not_stop_the_others(kernel: Any) -> None:
    many = not isinstance(kernel, NUTS | HMC)
    # at a = 1.7 the square of the gradient overflows
    far = torch.tensor([1.7, 0.5, -0.05, -0.02]).repeat_interleave(8 if many else 1, 0)
    thin = 10 if isinstance(kernel, MEADS) else 1
    mcmc = MCMC(kernel, 100, 100, {"a": far}, num_chains=len(far), thin=thin, progress=False, compile=False).run()
    draws = mcmc.get_samples(group_by_chain=True)["a"]
    grid = torch.linspace(-0.1, 0.0, 10001).double()
    log = -50 * (GROWN - (grid[:, None] * TIMES).exp()).square().sum(-1) - 0.5 * grid.square()
    assert float(rhat(draws)) < 1.1
    assert_mean(draws, float((log.softmax(0) * grid).sum()))
