"""Monotone Boltzmann machines against published numbers, enumeration and closed forms."""

import math

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate
from torch import Tensor

from inference.runtime.generators import scoped_seed
from ppl_models import ConvMonotoneDBM, MonotoneDBM
from ppl_models.monotone_dbm import DeepBoltzmannMachine, prox_softmax
from ppl_models.monotone_dbm.convolution import ConvOperator, check_layers
from ppl_models.monotone_dbm.groups import Groups
from ppl_models.monotone_dbm.mean_field import SOLVERS, extreme_eigenvalues
from tests.ppl_models.dbm_cases import D, check_gradients, example, ising, magnetisation, random_starts

OBSERVED, MASK = [1, 0, 0, 2, 0, 0], [True, False, False, True, False, False]  # group 1 in state 2, group 4 in state 3


# ---------------------------------------------------------------- the prox
@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (0.125, (0.15771179, 0.00822499, 0.83406322)),
        (0.5, (0.22089673, 0.0924055, 0.68669777)),
        (0.9, (0.25495117, 0.14802733, 0.5970215)),
        (1, (0.26095546, 0.15827749, 0.58076705)),
        (1.5, (0.28231227, 0.19658706, 0.52110067)),
    ],
)
def test_prox_at_known_values(alpha: float, expected: tuple[float, ...]) -> None:
    found = prox_softmax(torch.tensor([0.3, -0.2, 1.1], dtype=D), alpha)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=D), rtol=0, atol=1e-7)
    single = prox_softmax(torch.tensor([0.3, -0.2, 1.1]), alpha)
    torch.testing.assert_close(single, torch.tensor(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("states", [2, 3, 10, 20])
@pytest.mark.parametrize("alpha", [0.01, 0.125, 0.99, 1.5, 10.0])
def test_prox_identity(states: int, alpha: float) -> None:
    """prox((1 - a) q + a l) = q for q = softmax(l): mean field's fixed points are those of every step."""
    noise = torch.Generator().manual_seed(states)
    logits = 3 * torch.randn(100, states, generator=noise, dtype=D)
    q = logits.softmax(-1)
    torch.testing.assert_close(prox_softmax((1 - alpha) * q + alpha * logits, alpha), q, rtol=0, atol=1e-10)


@pytest.mark.changes_globals("rng")  # gradcheck draws from it
@pytest.mark.parametrize("alpha", [0.125, 0.9, 1.5])
def test_prox_derivatives(alpha: float) -> None:
    noise = torch.Generator().manual_seed(1)
    x = torch.randn(3, 4, generator=noise, dtype=D, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: prox_softmax(v, alpha), x)
    assert torch.autograd.gradgradcheck(lambda v: prox_softmax(v, alpha), x)


@pytest.mark.parametrize(
    ("x", "alpha"), [([1], 0.5), ("x", 0.5), (torch.ones(2), 0.0), (torch.ones(2), -1), (torch.ones(2), True)]
)
def test_prox_bad_input(x: object, alpha: float) -> None:
    with pytest.raises((TypeError, ValueError)):
        prox_softmax(x, alpha)  # type: ignore[arg-type]


def test_prox_of_arrays_and_lists() -> None:
    x = torch.tensor([0.3, -0.2, 1.1], dtype=D)
    assert torch.equal(prox_softmax(x.numpy(), np.float32(0.5)), prox_softmax(x, torch.tensor(0.5)))
    assert torch.equal(prox_softmax(x.tolist(), 0.5), prox_softmax(x.float(), 0.5))


# ---------------------------------------------------------------- known numbers
def test_six_groups() -> None:
    dbm = example()
    low, high = dbm.spectrum()
    assert math.isclose(low, -1.93457581, abs_tol=1e-7) and math.isclose(high, 0.89893116, abs_tol=1e-7)
    assert math.isclose(dbm.log_partition(method="exact").value, 7.952206132, abs_tol=1e-8)
    found, exact = dbm.marginals(), dbm.exact_marginals()
    assert math.isclose(-found.free_energy.item(), 7.670163948, abs_tol=1e-7)
    close = {"rtol": 0, "atol": 1e-7}
    torch.testing.assert_close(exact[0, 0], torch.tensor([0.52446945, 0.28728449, 0.18824605], dtype=D), **close)
    torch.testing.assert_close(
        found.probabilities[0, 0], torch.tensor([0.54181597, 0.27525891, 0.18292511], dtype=D), **close
    )
    assert math.isclose((found.probabilities - exact).abs().mean().item(), 0.01327, abs_tol=1e-5)
    torch.testing.assert_close(example(factor=10.0).potentials(), dbm.potentials(), rtol=0, atol=1e-14)


def test_six_groups_given_two() -> None:
    dbm = example()
    clamped, whole = (dbm.log_partition(*q, method="exact").value for q in ((OBSERVED, MASK), ()))
    assert math.isclose(clamped - whole, -1.931463701, abs_tol=1e-8)
    found = dbm.marginals(OBSERVED, MASK)
    assert math.isclose(-found.free_energy.item(), 5.929932259, abs_tol=1e-7)
    close = {"rtol": 0, "atol": 1e-7}
    exact = dbm.exact_marginals(OBSERVED, MASK)
    torch.testing.assert_close(exact[0, 1], torch.tensor([0.28129369, 0.30897767, 0.40972864], dtype=D), **close)
    torch.testing.assert_close(
        found.probabilities[0, 1], torch.tensor([0.28365424, 0.30307226, 0.41327349], dtype=D), **close
    )
    assert found.probabilities[0, 0].tolist() == [0, 1, 0] and found.probabilities[0, 3].tolist() == [0, 0, 1]


def test_one_answer_with_the_bound_and_two_without() -> None:
    bound, free = example(), example(scaled=False)
    starts = random_starts(bound, 64)
    nothing = torch.zeros(64, 6, dtype=torch.long), torch.zeros(64, 6, dtype=torch.bool)
    for solver in SOLVERS[:5]:
        found = bound.marginals(*nothing, solver=solver, initial=starts)
        assert found.converged.all()
        assert (found.probabilities - found.probabilities[0]).abs().max() < 1e-8, solver
    several = free.marginals(*nothing, solver="coordinate", initial=starts)
    values = sorted({round(-v, 5) for v in several.free_energy.tolist()})
    assert several.converged.all() and values == [11.79273, 12.16601]
    assert math.isclose(free.log_partition(method="exact").value, 13.675650, abs_tol=1e-6)


def test_potentials_without_a_bound_have_their_two_answers() -> None:
    """The same by the public road: any potentials, of a machine whose layer has connections of its own."""
    free = example(scaled=False)
    with pytest.raises(ValueError, match="several fixed points"):
        MonotoneDBM.from_potentials(free.potentials(), free.bias, [3] * 6)
    machine = DeepBoltzmannMachine.from_potentials(free.potentials().numpy(), free.bias.detach().numpy(), [3] * 6)
    torch.testing.assert_close(machine.potentials(), free.potentials(), rtol=0, atol=1e-14)
    nothing = torch.zeros(64, 6, dtype=torch.long), torch.zeros(64, 6, dtype=torch.bool)
    several = machine.marginals(*nothing, initial=random_starts(machine, 64))
    values = sorted({round(-v, 5) for v in several.free_energy.tolist()})
    assert several.converged.all() and values == [11.79273, 12.16601]
    assert math.isclose(machine.log_partition(method="exact").value, 13.675650, abs_tol=1e-6)
    with pytest.raises(ValueError, match="symmetric"):
        DeepBoltzmannMachine.from_potentials(free.potentials().triu(), free.bias, [3] * 6)


def test_lateral_connections_stay_in_their_layer() -> None:
    machine = DeepBoltzmannMachine([[2, 3], [2, 2], [3]], 1.0, lateral=True)
    layer = torch.tensor([0, 0, 1, 1, 2])[machine.groups.group_of]
    joined = machine.potentials() != 0
    apart = machine.groups.group_of[:, None] != machine.groups.group_of
    assert torch.equal(joined, ((layer[:, None] - layer).abs() <= 1) & apart)
    plain = DeepBoltzmannMachine([[2, 3], [2, 2], [3]], 1.0).potentials() != 0
    assert torch.equal(plain, (layer[:, None] - layer).abs() == 1)


@pytest.mark.parametrize(
    ("coupling", "exact", "mean_field"),
    [
        (0.45, (0.21321233, -0.07632227), (0.25612432, -0.08454178)),
        (-0.45, (0.36571347, -0.31269438), (0.43809950, -0.37750328)),
    ],
)
def test_two_spins(coupling: float, exact: tuple[float, float], mean_field: tuple[float, float]) -> None:
    pair = ising(coupling, (0.3, -0.2))
    found = pair.marginals()
    close = {"rtol": 0, "atol": 1e-7}
    torch.testing.assert_close(magnetisation(pair.exact_marginals()), torch.tensor(exact, dtype=D), **close)
    torch.testing.assert_close(magnetisation(found.probabilities), torch.tensor(mean_field, dtype=D), **close)
    better = magnetisation(pair.correlations().marginals) - torch.tensor(exact, dtype=D)
    assert better.abs().max() < 0.7 * (magnetisation(found.probabilities) - torch.tensor(exact, dtype=D)).abs().max()
    if coupling > 0:
        assert math.isclose(pair.log_partition(method="exact").value, 1.523952502, abs_tol=1e-8)
        assert math.isclose(-found.free_energy.item(), 1.433549947, abs_tol=1e-8)
        second = pair.correlations().log_partition.item()
        assert abs(second - 1.523952502) < 0.1 * abs(1.433549947 - 1.523952502)


# ---------------------------------------------------------------- potentials
@pytest.mark.parametrize("curvature", [1, 2])
def test_potentials_come_back(curvature: int) -> None:
    noise = torch.Generator().manual_seed(4)
    model = MonotoneDBM([2, 3, 4, 2], rank=5, curvature=curvature).double()
    with torch.no_grad():
        model.bias.copy_(torch.randn(11, generator=noise, dtype=D))
        model.operator.weight.mul_(3)  # type: ignore[operator, union-attr]
    again = MonotoneDBM.from_potentials(model.potentials(), model.bias, [2, 3, 4, 2], curvature=curvature)
    torch.testing.assert_close(again.potentials(), model.potentials(), rtol=0, atol=1e-12)
    assert model.spectrum()[1] <= curvature - 0.1 + 1e-12


def test_potentials_in_arrays_keep_their_precision() -> None:
    """Float64 arrays made a float32 model, whose bound is off by 1e-6."""
    dbm = example()
    arrays = dbm.potentials().numpy(), dbm.bias.detach().numpy()
    for sizes in (torch.tensor([3] * 6), np.full(6, 3)):
        again = MonotoneDBM.from_potentials(*arrays, sizes, np.float32(0.1), np.int64(1))  # type: ignore[arg-type]
        assert torch.equal(again.bias, dbm.bias)
        assert math.isclose(-again.marginals().free_energy.item(), 7.670163948, abs_tol=1e-8)
        assert again.config()["curvature"] == 1


def test_the_relaxed_form_of_uncentred_potentials_is_the_same_law() -> None:
    dbm = example()
    relaxed = MonotoneDBM.from_potentials(dbm.potentials(), dbm.bias, [3] * 6, curvature=2)
    states = torch.randint(3, (50, 6), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(relaxed.log_density(states), dbm.log_density(states), rtol=0, atol=1e-12)


def test_which_potentials_are_refused() -> None:
    with pytest.raises(ValueError, match="above the bound"):
        ising(0.6, (0.0, 0.0))
    assert ising(0.6, (0.0, 0.0), curvature=2).spectrum()[1] == pytest.approx(1.2)
    assert ising(0.6, (0.0, 0.0), project=True).spectrum()[1] == pytest.approx(0.9)
    phi, bias = example().potentials(), torch.zeros(18)
    lopsided, full = phi.clone(), phi.clone()
    lopsided[0, 5] += 0.1
    full[0, 1] = full[1, 0] = 0.1
    for bad, words in ((lopsided, "symmetric"), (full, "inside"), (phi[:3], "must be"), (phi * math.nan, "finite")):
        with pytest.raises(ValueError, match=words):
            MonotoneDBM.from_potentials(bad, bias, [3] * 6)
    with pytest.raises(ValueError, match="bias"):
        MonotoneDBM.from_potentials(phi, bias[:3], [3] * 6)


@pytest.mark.parametrize("gap", [0.05, 0.2])
def test_the_relaxed_bound_is_unique_up_to_its_edge(gap: float) -> None:
    """Two spins without a field: one fixed point while J <= 1, the edge of the relaxed bound."""
    pair = ising(1 - gap / 2, (0.0, 0.0), curvature=2, monotonicity=gap)
    many = torch.zeros(64, 2, dtype=torch.long), torch.zeros(64, 2, dtype=torch.bool)
    found = pair.marginals(*many, initial=random_starts(pair, 64), tolerance=1e-13)
    assert (found.probabilities - 0.5).abs().max() < 1e-8


def least_curvature(phi: Tensor, groups: Groups) -> float:
    """The smallest ``d' (diag(1 / q) - Phi) d / d' d`` along the simplices that descending by turns in q and d finds:
    that of the free energy, whose minimum over q at a given d is at ``q = |d| / |d|_1`` of each group.
    """
    same = (groups.group_of[:, None] == groups.group_of).to(D)
    centre = torch.eye(len(phi), dtype=D) - same / same.sum(1)
    least = math.inf
    for seed in range(20):
        d = centre @ torch.randn(len(phi), generator=torch.Generator().manual_seed(seed), dtype=D)
        for _ in range(30):
            q = d.abs().clamp_min(1e-6) / (same @ d.abs().clamp_min(1e-6))
            hessian = centre @ (torch.diag(1 / q) - phi) @ centre + 1e9 * (torch.eye(len(phi), dtype=D) - centre)
            values, vectors = torch.linalg.eigh(hessian)
            d = centre @ vectors[:, 0]
        least = min(least, float(values[0]))
    return least


@pytest.mark.parametrize("curvature", [2, "pinsker"])
@pytest.mark.parametrize("sizes", [[2, 2, 2], [4] * 5, [3, 6, 2, 4]])
def test_the_curvature_that_the_bounds_leave(sizes: list[int], curvature: int | str) -> None:
    """The free energy's curvature is at least m everywhere."""
    noise = torch.Generator().manual_seed(0)
    model = MonotoneDBM(sizes, rank=sum(sizes), monotonicity=0.05, curvature=curvature).double()
    line = torch.cat([torch.linspace(-1, 1, k, dtype=D).sign() for k in sizes])
    with torch.no_grad():
        weight = 0.3 * torch.randn(sum(sizes), sum(sizes), generator=noise, dtype=D)
        weight[0] += 3 * line * torch.cat([x * torch.ones(k) for x, k in zip((1, -1, 1, -1, 1), sizes, strict=False)])
        model.operator.weight.copy_(weight)  # type: ignore[operator]
    assert least_curvature(model.potentials(), model.groups) >= 0.05 - 1e-9


@pytest.mark.parametrize("gap", [0.05, 0.2])
def test_the_bound_by_distances_is_tight_for_states_in_two_clusters(gap: float) -> None:
    """Two variables of 4 states that couple as two spins through a split of their states: eigenvalue 4 J of Phi, and
    one fixed point up to J = 1, where the other bounds end at J = 1 / 2 and 1 / 4.
    """
    split = torch.tensor([1, 1, -1, -1], dtype=D)
    model = MonotoneDBM([4, 4], rank=1, monotonicity=gap, curvature="pinsker").double()
    with torch.no_grad():
        model.operator.weight.copy_(10 * torch.cat([split, -split])[None])  # type: ignore[operator]
    assert model.spectrum()[1] == pytest.approx(4 * (1 - gap / 2))
    assert gap - 1e-9 <= least_curvature(model.potentials(), model.groups) <= 1.2 * gap
    many = torch.zeros(64, 2, dtype=torch.long), torch.zeros(64, 2, dtype=torch.bool)
    found = model.marginals(*many, initial=random_starts(model, 64), tolerance=1e-13)
    assert found.converged.all() and (found.probabilities - 0.25).abs().max() < 1e-8
    model.operator.monotone = False  # type: ignore[assignment]
    with torch.no_grad():
        model.operator.weight.copy_(1.02 * torch.cat([split, -split])[None])  # type: ignore[operator]
    beyond = model.marginals(*many, initial=random_starts(model, 64))
    assert (beyond.probabilities - 0.25).abs().max() > 0.05


# ---------------------------------------------------------------- convolutions
@pytest.mark.parametrize("curvature", [1, 2, "pinsker"])
@pytest.mark.parametrize("size", [1.0, 100.0])
@pytest.mark.parametrize("classes", [True, False])
def test_convolutions_as_a_matrix(curvature: int | str, size: float, classes: bool) -> None:
    layers = check_layers([(4, 8, 8, 1), (6, 4, 4, 2), (6, 2, 2, 3), *([(10, 1)] if classes else [])])
    kernels = [[3, 0, 0, 0], [3, 3, 0, 0], [3, 3, 3, 0], [0, 0, 2, 1]]
    kernels = kernels if classes else [row[:3] for row in kernels[:3]]
    operator = ConvOperator(layers, kernels, None, 0.05, curvature, 0, torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        for weight in operator.weights:
            weight.mul_(size)
        phi = operator.to_dense()
        operator.dense_limit = 10_000
        torch.testing.assert_close(operator.to_dense(), phi, rtol=0, atol=1e-12)
        operator.dense_limit = 0
        prepared = operator.prepare()
        low, high = extreme_eigenvalues(prepared, phi[0])
    where = operator.groups.group_of
    assert (phi - phi.T).abs().max() < 1e-12
    assert phi[where[:, None] == where].abs().max() < 1e-12
    values = torch.linalg.eigvalsh(phi)
    if isinstance(curvature, int):
        assert values[-1] <= curvature - 0.05 + 1e-10
    assert low <= values[0] + 1e-8 and high >= values[-1] - 1e-8
    assert high < values[-1] + 0.1 and low > values[0] - 0.1
    colours = operator.colours(None)
    assert sorted(torch.cat(colours).tolist()) == list(range(operator.groups.num_groups))
    for colour in colours:
        chosen = torch.isin(where, colour)
        assert phi[chosen][:, chosen].abs().max() < 1e-14


# ---------------------------------------------------------------- gradients
@pytest.mark.parametrize("scale", [1.0, 1e-6])
@pytest.mark.parametrize("curvature", [1, 2, "pinsker"])
def test_implicit_gradient(scale: float, curvature: int | str) -> None:
    """Against central differences of 20 parameters, where some groups are scaled, some are not, and some are held."""
    dbm = MonotoneDBM([3, 3, 4, 2, 2], rank=6, monotonicity=0.1, curvature=curvature).double()
    noise = torch.Generator().manual_seed(1)
    weight = dbm.operator.weight
    with torch.no_grad():
        weight.mul_(torch.linspace(0.5, 3, 14, dtype=D))  # type: ignore[operator, union-attr]
        dbm.bias.copy_(torch.randn(14, generator=noise, dtype=D))
    observed = torch.tensor([[1, 0, 2, 0, 1], [0, 1, 2, 1, 0]])
    mask = torch.tensor([[True, False, False, True, False], [False] * 5])
    direction = torch.randn(2, 5, 4, generator=noise, dtype=D)

    def loss(factor: float = 1.0) -> Tensor:
        found = dbm.marginals(observed, mask, differentiable=True, tolerance=1e-12)
        return factor * ((found.probabilities * direction).sum() + 0.3 * found.free_energy.sum())

    loss(scale).backward()
    check_gradients(loss, (weight, dbm.bias), 10, rel=1e-5, abs=1e-7, scale=scale)


@pytest.mark.parametrize("matrix", [True, False])
def test_implicit_gradient_through_convolutions(matrix: bool) -> None:
    """The same of kernels, whether products are made with a matrix or by convolutions; and Phi itself keeps a graph."""
    kernels = [[3, 0, 0], [3, 3, 0], [0, 2, 1]]
    net = ConvMonotoneDBM((1, 4, 4), 3, 2, hidden=[(4, 2, 2, 2)], kernels=kernels, monotonicity=0.1).double()
    operator, noise = net.operator, torch.Generator().manual_seed(1)
    assert isinstance(operator, ConvOperator)
    operator.dense_limit = 1000 if matrix else 0
    with torch.no_grad():
        for weight in operator.weights:
            weight.add_(0.5 * torch.randn(weight.shape, generator=noise, dtype=D))
        net.bias.copy_(torch.randn(len(net.bias), generator=noise, dtype=D))
    count = net.groups.num_groups
    mask = torch.rand(2, count, generator=noise) < 0.3
    observed = torch.randint(2, (2, count), generator=noise)
    direction = torch.randn(2, count, 3, generator=noise, dtype=D)

    def loss() -> Tensor:
        found = net.marginals(observed, mask, differentiable=True, tolerance=1e-12)
        return (found.probabilities * direction).sum() + 0.3 * found.free_energy.sum()

    loss().backward()
    check_gradients(loss, (operator.weights[0], operator.weights[2], net.bias), 6, rel=1e-5, abs=1e-7)

    def entry() -> Tensor:
        return operator.to_dense()[0, 5] + operator.to_dense()[7, 50]

    net.zero_grad()
    entry().backward()
    check_gradients(entry, (operator.weights[0], operator.weights[1]), 6, rel=1e-5, abs=1e-7)


# ---------------------------------------------------------------- Pyro
def test_enumeration_by_pyro() -> None:
    dbm = example()

    def empty(*_: object) -> None:
        pass

    assert -TraceEnum_ELBO(max_plate_nesting=1).loss(config_enumerate(dbm.forward), empty) == pytest.approx(
        7.952206132175689, abs=1e-9
    )


def test_the_guide_is_mean_field_of_the_free_groups_alone() -> None:
    """Rows with held groups: the log-probability of a draw counts the free ones, and the model adds the energy."""
    dbm = example()
    observed, mask = torch.tensor([OBSERVED, [0] * 6]), torch.tensor([MASK, [False] * 6])
    q = dbm.marginals(observed, mask).probabilities
    with scoped_seed(0), torch.no_grad():
        drawn = pyro.poutine.trace(dbm.guide).get_trace(observed, mask)
        model = pyro.poutine.trace(pyro.poutine.replay(dbm.forward, drawn)).get_trace(observed, mask)
    states = model.nodes["_RETURN"]["value"]
    assert states[0, 0] == 1 and states[0, 3] == 2
    own = q.gather(2, states[..., None])[..., 0].log().masked_fill(mask, 0.0)
    assert drawn.log_prob_sum().item() == pytest.approx(own.sum().item(), abs=1e-10)
    assert model.log_prob_sum().item() == pytest.approx(dbm.log_density(states).sum().item(), abs=1e-10)


# ---------------------------------------------------------------- machines without a bound
def test_a_restricted_machine_has_two_colours_and_its_conditionals() -> None:
    machine = DeepBoltzmannMachine([[2] * 5, [3] * 4], scale=0.5)
    assert [len(c) for c in machine.colours(machine.potentials())] == [5, 4]
    states = torch.randint(2, (7, 9), generator=torch.Generator().manual_seed(0))
    for g, size in enumerate(machine.groups.sizes):
        tried = states.repeat_interleave(size, 0)
        tried[:, g] = torch.arange(size).repeat(7)
        joint = machine.log_density(tried).reshape(7, size).log_softmax(1).gather(1, states[:, g, None])[:, 0]
        torch.testing.assert_close(machine.log_conditionals(states)[:, g], joint, rtol=1e-4, atol=1e-5)
