"""Solvers, sampling, log Z and bad input of Boltzmann machines; statistical checks have fixed seeds."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from inference import CheckpointError
from inference.objectives.masked import Head, MaskedConditionals
from inference.runtime.generators import scoped_seed
from ppl_models import ConvMonotoneDBM, MonotoneDBM
from ppl_models.monotone_dbm import DeepBoltzmannMachine
from ppl_models.monotone_dbm.mean_field import SOLVERS
from tests.accelerator import fake_accelerator
from tests.ppl_models.dbm_cases import D, example, random_starts


def stiff(groups: int = 60, rows: int = 3) -> tuple[MonotoneDBM, Tensor, Tensor]:
    """Groups whose columns of A share a direction: Phi has one eigenvalue far below zero."""
    model = MonotoneDBM([4] * groups, rank=6, monotonicity=0.01).double()
    noise = torch.Generator().manual_seed(0)
    tied = torch.tensor([1.5, 0.5, -0.5, -1.5], dtype=D).repeat(groups)
    with torch.no_grad():
        weight = 0.3 * torch.randn(6, 4 * groups, generator=noise, dtype=D)
        weight[0] += tied
        model.operator.weight.copy_(weight)  # type: ignore[operator, union-attr]
        model.bias.copy_(torch.randn(4 * groups, generator=noise, dtype=D))
    observed = torch.randint(4, (rows, groups), generator=noise)
    mask = torch.rand(rows, groups, generator=noise) < 0.3
    mask[0] = False
    return model, observed, mask


def test_all_solvers_reach_one_point_of_a_stiff_problem() -> None:
    model, observed, mask = stiff()
    assert model.spectrum()[0] < -50
    newton = model.marginals(observed, mask, tolerance=1e-8)
    assert newton.converged.all() and newton.residual.max() < 1e-8 and newton.iterations.max() <= 10
    direct = model.marginals(observed, mask, solver="newton_direct", tolerance=1e-8)
    assert direct.products <= 6  # one a step: the linear systems are solved without products
    iterative = model.marginals(observed, mask, solver="newton_cg", tolerance=1e-8)
    assert iterative.converged.all() and iterative.products > 2 * direct.products
    for other in (direct, iterative):
        torch.testing.assert_close(other.probabilities, newton.probabilities, rtol=0, atol=1e-8)
    parallel = model.marginals(observed, mask, solver="parallel", max_iterations=200)
    assert not parallel.converged[0] and parallel.residual[0] > 0.1
    for solver in SOLVERS[1:7]:
        if solver in ("parallel", "damped"):
            continue
        for anderson in (False, True):
            if anderson and solver == "coordinate":
                continue
            found = model.marginals(observed, mask, solver=solver, anderson=anderson, tolerance=1e-7)
            assert found.converged.all(), (solver, anderson)
            assert (found.probabilities - newton.probabilities).abs().max() < 1e-5, (solver, anderson)
            assert found.products > newton.products
    added = model.marginals(observed, mask, solver="krahenbuhl", tolerance=1e-7)
    assert not added.converged[0] and added.residual[0] > 1e-3


@pytest.mark.parametrize("solver", ["coordinate", "mirror", "forward_backward", "peaceman_rachford"])
def test_solvers_reach_the_point_of_the_relaxed_bound(solver: str) -> None:
    noise = torch.Generator().manual_seed(0)
    raw = torch.randn(12, 12, generator=noise, dtype=D)
    phi = raw + raw.mT
    for g in range(0, 12, 3):
        phi[g : g + 3, g : g + 3] = 0
    phi = 1.9 / torch.linalg.eigvalsh(phi)[-1] * phi
    centre = torch.block_diag(*[torch.eye(3, dtype=D) - 1 / 3] * 4)
    phi = centre @ phi @ centre
    phi = 1.9 / torch.linalg.eigvalsh(phi)[-1] * phi
    model = MonotoneDBM.from_potentials(phi, torch.randn(12, generator=noise, dtype=D), [3] * 4, curvature=2)
    assert model.spectrum()[1] > 1.89
    query = [[0, 1, 2, 0]] * 2, [[False] * 4, [True, False, False, False]]
    newton, found = (model.marginals(*query, solver=s, tolerance=1e-10) for s in ("newton", solver))
    assert found.converged.all()
    torch.testing.assert_close(found.probabilities, newton.probabilities, rtol=0, atol=1e-8)


def test_peaceman_rachford_says_what_it_cannot_do() -> None:
    free = DeepBoltzmannMachine([[2] * 5, [2] * 5], scale=3.0, seed=1).double()
    with pytest.raises(ValueError, match="use another solver"):
        free.marginals(solver="peaceman_rachford")
    with pytest.raises(ValueError, match="below 1"):
        free.marginals(solver="peaceman_rachford", step_size=1.0)


@pytest.mark.parametrize("curvature", [1, 2, "pinsker"])
def test_exact_newton_directions(curvature: int | str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the dense system, with groups of several sizes, held groups, and nearly certain ones."""
    model = MonotoneDBM([3, 3, 2, 5, 5, 5, 2, 12], rank=5, monotonicity=0.01, curvature=curvature).double()
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.operator.weight.mul_(torch.linspace(0.2, 4, 37, dtype=D))  # type: ignore[operator, union-attr]
        phi = model.operator.prepare()
    assert phi.low_rank is not None and phi.matrix is not None
    groups = model.groups
    q = groups.softmax(torch.randn(6, 37, generator=noise, dtype=D) * torch.tensor([0.1, 1, 3, 10, 30, 1])[:, None])
    held = torch.zeros(6, 8, dtype=torch.bool)
    held[5, ::2] = True
    q = torch.where(groups.spread(held), groups.one_hot(torch.ones(6, 8, dtype=torch.long), D), q)
    r = torch.randn(6, 37, generator=noise, dtype=D)
    together = groups.group_of[:, None] == groups.group_of
    spread = torch.diag_embed(q) - torch.where(together, q[:, :, None] * q[:, None, :], 0.0)
    expected = torch.linalg.solve(torch.eye(37, dtype=D) - phi.matrix @ spread, r)
    torch.testing.assert_close(phi.low_rank.direction(q, r), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(phi.low_rank.apply(r), phi.apply(r), rtol=0, atol=1e-12)
    monkeypatch.setattr("ppl_models.monotone_dbm.low_rank._AT_ONCE", 500)  # two queries at once
    torch.testing.assert_close(phi.low_rank.direction(q, r), expected, rtol=0, atol=1e-10)


def test_a_large_model_of_low_rank_makes_no_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    model, observed, mask = stiff(groups=12)

    def answer() -> tuple[Tensor, Tensor]:
        model.zero_grad()
        found = model.marginals(observed, mask, differentiable=True)
        (found.probabilities[..., 0].sum() + found.free_energy.sum()).backward()
        return found.probabilities.detach(), model.operator.weight.grad.clone()  # type: ignore[union-attr, operator]

    with_matrix = answer()
    monkeypatch.setattr("ppl_models.monotone_dbm.operators._DENSE_LIMIT", 10)
    assert model.operator.prepare().matrix is None
    for found, expected in zip(answer(), with_matrix, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(model.potentials(), model.operator.to_dense(), rtol=0, atol=1e-12)


def test_a_query_does_not_depend_on_its_batch() -> None:
    model, observed, mask = stiff(groups=12)
    together = model.marginals(observed, mask)
    alone = model.marginals(observed[2:3], mask[2:3])
    torch.testing.assert_close(together.probabilities[2:3], alone.probabilities, rtol=0, atol=1e-9)
    with pytest.raises(RuntimeError, match="did not converge"):
        model.predictive(observed, mask, solver="damped", max_iterations=2)


def test_newton_descends_where_several_fixed_points_are() -> None:
    """Without a bound the default still ends in a stationary point, from any start."""
    free = example(scaled=False)
    starts = random_starts(free, 30, seed=3)
    many = torch.zeros(30, 6, dtype=torch.long), torch.zeros(30, 6, dtype=torch.bool)
    found = free.marginals(*many, initial=starts)
    assert found.converged.all() and found.residual.max() < 1e-10


def test_gibbs_marginals() -> None:
    dbm = example()
    states = dbm.sample(num_chains=1000, num_sweeps=80, seed=0)[:, 30:]
    assert states.shape == (1000, 50, 6)
    found = torch.nn.functional.one_hot(states.flatten(0, 1), 3).to(D).mean(0)
    # 50,000 correlated draws: measured 0.004; a wrong factor of two in the conditional gives 0.1
    assert (found - dbm.exact_marginals()[0]).abs().max() < 0.011
    held = dbm.sample(200, 30, [1, 0, 0, 2, 0, 0], [True, False, False, True, False, False], seed=1)
    assert (held[..., 0] == 1).all() and (held[..., 3] == 2).all()
    exact = dbm.exact_marginals([1, 0, 0, 2, 0, 0], [True, False, False, True, False, False])[0, 1]
    drawn = torch.nn.functional.one_hot(held[:, 5:, 1].flatten(), 3).to(D).mean(0)
    assert (drawn - exact).abs().max() < 0.04
    assert torch.equal(held, dbm.sample(200, 30, [1, 0, 0, 2, 0, 0], [True, False, False, True, False, False], seed=1))


@pytest.mark.parametrize("base", ["uniform", "mean_field"])
def test_log_partition_by_annealing(base: str) -> None:
    dbm = example()
    for seed in range(5 if base == "uniform" else 2):
        found = dbm.log_partition(method="ais", base=base, seed=seed, num_temperatures=60)
        assert abs(found.value - 7.952206132) < min(0.04, 4 * found.standard_error)
        assert found.lower == found.value - 2 * found.standard_error and found.ess > 400
    both = dbm.log_partition(method="sandwich", num_temperatures=60)
    assert both.lower - 0.03 < 7.952206132 < both.upper + 0.03
    given = dbm.log_partition([1, 0, 0, 2, 0, 0], [True, False, False, True, False, False], num_temperatures=60)
    assert abs(given.value - (7.952206132 - 1.931463701)) < 4 * given.standard_error
    assert dbm.log_partition(method="mean_field").value == pytest.approx(7.670163948, abs=1e-7)


def test_mean_field_and_its_corrections_over_random_models() -> None:
    gaps, corrected, covariances, blank = [], [], [], []
    for seed in range(20):
        noise = torch.Generator().manual_seed(seed)
        model = MonotoneDBM([3] * 7, rank=8, monotonicity=0.1).double()
        with torch.no_grad():
            model.operator.weight.copy_(torch.randn(8, 21, generator=noise, dtype=D))  # type: ignore[operator, union-attr]
            model.bias.copy_(torch.randn(21, generator=noise, dtype=D))
        exact = model.exact_marginals()
        found = model.marginals()
        assert -found.free_energy.item() <= model.log_partition(method="exact").value
        gaps.append((found.probabilities - exact).abs().mean().item())
        if seed < 8:
            better = model.correlations()
            corrected.append((better.marginals - exact).abs().mean().item())
            states = model._configurations(model._query(None, None))
            x = model.groups.one_hot(states, D)
            weight = model.log_density(states).detach().softmax(0)
            mean = weight @ x
            covariance = (x * weight[:, None]).T @ x - mean[:, None] * mean
            apart = model.groups.group_of[:, None] != model.groups.group_of
            covariances.append((better.covariance[0] - covariance)[apart].abs().mean().item())
            blank.append(covariance[apart].abs().mean().item())
    assert sum(gaps) / 20 < 0.012
    assert sum(corrected) < 0.7 * sum(gaps[:8])
    assert sum(covariances) < 0.4 * sum(blank)  # mean field says zero


# ---------------------------------------------------------------- training
@pytest.mark.parametrize("objective", ["masked", "elbo", "pcd", "pseudo_likelihood"])
def test_objectives_learn_a_chain(objective: str) -> None:
    """Five groups of 2 that follow each other: the fitted law must predict a neighbour."""
    noise = torch.Generator().manual_seed(0)
    first = torch.randint(2, (600, 1), generator=noise)
    flips = torch.rand(600, 4, generator=noise) < 0.2
    data = torch.cat([first, (first + flips.cumsum(1)) % 2], 1)
    model = MonotoneDBM([2] * 5, rank=5, monotonicity=0.1, curvature=2)
    before = model.bias.detach().clone()
    steps = 60 if objective in ("masked", "pseudo_likelihood") else 40
    result = model.fit(data, objective=objective, num_steps=steps, batch_size=200, lr=0.1, progress=False, seed=1)
    assert result.losses.shape == (steps,) and not torch.equal(before, model.bias)
    assert objective in result.summary()
    predicted = model.predictive([[0] * 5, [1] * 5], [[True] * 4 + [False]] * 2)[:, 4, 0]
    assert predicted[0] > 0.62 and predicted[1] < 0.38


def test_labels_are_shown_to_their_share_of_the_rows() -> None:
    """And scored in the others alone."""
    seen = []

    def conditional(states: Tensor, shown: Tensor, progress: Tensor) -> Tensor:
        seen.append(shown)
        wrong = torch.zeros(len(states), 3, 2).scatter(2, (1 - states)[..., None], 50.0)  # sure of the other state
        return torch.where(shown[..., None], wrong, torch.zeros_like(wrong))

    heads = [Head(torch.tensor([0, 1])), Head(torch.tensor([2]), 1.0, 0.25)]
    loss = MaskedConditionals(torch.nn.Module(), conditional, heads, torch.arange(3), (0.4, 0.8), 10)
    with scoped_seed(0):
        value = loss(torch.zeros(4000, 3, dtype=torch.long))
    shares = seen[0].float().mean(0)
    assert (shares - torch.tensor([0.6, 0.6, 0.25])).abs().max() < 0.03
    assert value.item() == pytest.approx(2 * math.log(2), abs=1e-6)
    with pytest.raises(ValueError, match="share of rows"):
        MaskedConditionals(torch.nn.Module(), conditional, [Head(torch.tensor([2]), 1.0, 1.5)], torch.arange(3), 0.5, 1)


def test_hidden_groups_missing_values_and_a_restricted_machine() -> None:
    noise = torch.Generator().manual_seed(0)
    first = torch.randint(2, (300, 1), generator=noise)
    data = torch.cat([first, (first + (torch.rand(300, 3, generator=noise) < 0.1)) % 2], 1)
    machine = DeepBoltzmannMachine([[2] * 4, [2] * 3], scale=0.3)
    states = torch.cat([data, torch.zeros(300, 3, dtype=torch.long)], 1)
    mask = torch.rand(300, 7, generator=noise) < 0.8
    mask[:, 4:] = False
    result = machine.fit(states, mask, num_steps=240, lr=0.1, progress=False, observed_fraction=(0.2, 0.8))
    assert result.losses[-10:].mean() < 0.8 * result.losses[:10].mean()
    shown = torch.tensor([[True] * 3 + [False] * 4])
    filled = machine.complete([[1, 1, 1, 0, 0, 0, 0]], shown)
    assert filled[0, :4].tolist() == [1, 1, 1, 1]


def test_same_seed_same_bits_resume_and_files(tmp_path: Path) -> None:
    data = torch.randint(3, (40, 6), generator=torch.Generator().manual_seed(0))

    def fit(model: MonotoneDBM, **options: Any) -> Tensor:
        model.fit(data, num_steps=12, batch_size=10, progress=False, annealed=0.5, **options)
        return model.potentials()

    whole = fit(MonotoneDBM([3] * 6))
    assert torch.equal(whole, fit(MonotoneDBM([3] * 6)))

    def interrupt(fields: dict[str, Any]) -> None:
        if fields["step"] >= 1:
            raise KeyboardInterrupt

    stopped = MonotoneDBM([3] * 6)
    stopped.fit(data, num_steps=12, batch_size=10, annealed=0.5, checkpoint=tmp_path / "fit", progress=interrupt)
    assert torch.equal(whole, fit(MonotoneDBM([3] * 6), checkpoint=tmp_path / "fit"))
    model = example()
    model.save(tmp_path / "model")
    script = (
        "import sys, torch; from ppl_models import MonotoneDBM; m = MonotoneDBM.load(sys.argv[1]);"
        "print(m.marginals().probabilities.tolist(), m.sample(2, 3, seed=4).tolist())"
    )
    told = subprocess.run([sys.executable, "-c", script, str(tmp_path / "model")], capture_output=True, text=True)
    assert told.stdout.strip() == f"{model.marginals().probabilities.tolist()} {model.sample(2, 3, seed=4).tolist()}"
    (tmp_path / "model").write_bytes((tmp_path / "model").read_bytes()[:200])
    with pytest.raises(CheckpointError):
        MonotoneDBM.load(tmp_path / "model")


def test_calibration_finds_a_known_temperature() -> None:
    """Labels drawn from the predictive at half the logits: the factor comes out near one half."""
    model = example()
    truth = torch.zeros(4000, 6, dtype=torch.long)
    mask = torch.zeros(4000, 6, dtype=torch.bool)
    with torch.no_grad():
        logits = model.groups.padded(model.solved_logits(model._query(truth[:1], mask[:1])))[0]
    noise = torch.Generator().manual_seed(0)
    truth = torch.stack([torch.multinomial((0.5 * row).softmax(0), 4000, True, generator=noise) for row in logits], 1)
    model.calibrate(truth, mask, truth)
    assert model.log_temperature.detach().exp().tolist() == pytest.approx([0.5] * 6, abs=0.06)


def test_on_an_accelerator() -> None:
    """Forward and backward of training's conditionals, nothing left on the CPU."""
    from ppl_models.monotone_dbm.training import mean_field_logits, to_query

    model = MonotoneDBM([3] * 4 + [5], rank=4, curvature=2)
    with fake_accelerator() as device:
        for module in model.modules():  # `Module.to` cannot swap fake tensors
            for name, value in module._parameters.items():
                if value is not None:
                    module._parameters[name] = torch.nn.Parameter(torch.empty(value.shape, device=device))
            for name, value in module._buffers.items():
                if value is not None:
                    module._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device=device)
        states = torch.zeros(2, 5, dtype=torch.long, device=device)
        shown = torch.zeros(2, 5, dtype=torch.bool, device=device)
        query = to_query(model, torch.arange(5, device=device), states, shown)
        logits = mean_field_logits(model, query, torch.zeros((), device=device))
        loss = model.tempered(logits).square().sum()
        loss.backward()
        assert model.bias.grad is not None and model.bias.grad.device.type == device.type


# ---------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"group_sizes": []}, "empty"),
        ({"group_sizes": [3, 1]}, r"group_sizes\[1\] must be at least 2"),
        ({"group_sizes": [3, 2.5]}, "integer"),
        ({"group_sizes": 3}, "group_sizes must be a sequence of integers"),
        ({"group_sizes": [3, 3], "rank": 0}, "rank"),
        ({"group_sizes": [3, 3], "monotonicity": 1.0}, "monotonicity"),
        ({"group_sizes": [3, 3], "monotonicity": math.nan}, "monotonicity"),
        ({"group_sizes": [3, 3], "curvature": 3}, "curvature"),
    ],
)
def test_bad_models(options: dict[str, Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        MonotoneDBM(**options)


ALL = [[True] * 6]


@pytest.mark.parametrize(
    ("observed", "mask", "words"),
    [
        ([[0, 0, 0, 0, 0, 3]], ALL, "states 0 to 2"),
        ([[0, 0, -1, 0, 0, 0]], ALL, "states 0 to 2"),
        ([[0, 0, 0]], ALL, r"\(B, 6\)"),
        ([[0] * 6], [[True] * 5], "mask"),
        ([[0] * 6] * 3, [[True] * 6] * 2, "mask"),
        ([[0] * 6], [[2] * 6], "boolean"),
        ([[0] * 6], "all", "boolean"),
        ([[0.5] * 6], ALL, "whole"),
        ([[math.nan] * 6], ALL, "finite"),
        (None, ALL, "gives no states"),
        ([["a"] * 6], ALL, "numeric"),
    ],
)
def test_bad_queries(observed: Any, mask: Any, words: str) -> None:
    dbm = example()
    for call in (dbm.marginals, dbm.predictive, dbm.complete, dbm.correlations, dbm.log_partition):
        with pytest.raises((TypeError, ValueError), match=words):
            call(observed, mask)


def test_everything_or_nothing_observed() -> None:
    dbm = example()
    states = [[0, 1, 2, 0, 1, 2]]
    whole = dbm.marginals(states, ALL)
    assert whole.converged.all() and whole.iterations.tolist() == [0]
    assert torch.equal(whole.probabilities.argmax(-1), torch.tensor(states))
    assert whole.free_energy.item() == pytest.approx(-dbm.log_density(states).item(), abs=1e-12)
    assert dbm.log_partition(states, ALL).value == pytest.approx(dbm.log_density(states).item(), abs=1e-9)
    assert torch.equal(dbm.complete(states, ALL), torch.tensor(states))
    ignored = dbm.marginals([[7, -1, 99, 0, 0, 0]], [[False] * 6])
    assert torch.equal(ignored.probabilities, dbm.marginals().probabilities)


def test_masks_of_ones_and_values_that_are_not_looked_at() -> None:
    """A mask may hold ones and zeros; what it hides may be anything, NaN and -1 included."""
    dbm = example()
    states, mask = [[1, 0, 0, 2, 0, 0]], torch.tensor([[True, False, False, True, False, False]])
    expected = dbm.marginals(states, mask).probabilities
    for form in (mask.int(), mask.double(), mask.tolist(), mask.int().numpy()):
        for filler in (-1.0, math.nan):
            given = torch.where(mask, torch.tensor(states), filler)
            for observed in (given, given.numpy()):
                assert torch.equal(dbm.marginals(observed, form).probabilities, expected)


def test_other_bad_arguments() -> None:
    dbm = example()
    calls: list[tuple[Any, str]] = [
        (lambda: dbm.marginals(solver="bp"), "solver"),
        (lambda: dbm.marginals(anderson=True), "anderson"),
        (lambda: MonotoneDBM([3] * 6, rank=18).marginals(solver="newton_direct"), "low rank"),
        (lambda: dbm.marginals(initial=torch.ones(1, 2, 3)), "initial"),
        (lambda: dbm.marginals(initial=torch.full((1, 6, 3), math.nan)), "initial must hold probabilities"),
        (lambda: dbm.marginals(initial=-torch.ones(1, 6, 3)), "initial must hold probabilities"),
        (lambda: dbm.marginals(max_iterations=-2), "max_iterations"),
        (lambda: dbm.marginals(solver="mirror", step_size=math.nan), "step_size"),
        (lambda: dbm.marginals(solver="mirror", step_size=0.0), "step_size"),
        (lambda: dbm.log_partition(method="bp"), "method"),
        (lambda: dbm.log_partition(base="x"), "base"),
        (lambda: dbm.log_partition([[0] * 6] * 2, ALL * 2), "one query"),
        (lambda: dbm.sample(0, 1), "num_chains"),
        (lambda: dbm.sample(3, 1, [[0] * 6] * 2, ALL * 2), "one a chain"),
        (lambda: MonotoneDBM([10] * 8).exact_marginals(), "about 1e8 configurations are too many"),
        (lambda: MonotoneDBM([2] * 2000).exact_marginals(), "about 1e602 configurations are too many"),
        (lambda: dbm.fit([[0] * 6] * 4, objective="x"), "objective"),
        (lambda: dbm.fit([[0] * 6] * 4, [[False] * 6] * 4), "nothing as data"),
        (lambda: dbm.fit([[0] * 6] * 4, observed_fraction=1.5), "observed_fraction"),
        (lambda: dbm.fit([[0] * 6] * 4, observed_fraction=1.0), "hides nothing"),
        (lambda: dbm.fit([[0] * 6] * 4, [[True] * 5 + [False]] * 4, objective="pseudo_likelihood"), "hidden"),
        (lambda: dbm.fit([[0] * 6] * 4, labels=[9]), "labels"),
        (lambda: dbm.fit([[0] * 6] * 4, lr=-1.0), "lr"),
        (lambda: dbm.fit([[0] * 6] * 4, batch_size=torch.empty(0, 3)), "batch_size"),  # type: ignore[arg-type]
        (lambda: dbm.calibrate([[0] * 6], ALL, [[0] * 6], groups=[6]), "below 6"),
        (lambda: ConvMonotoneDBM(torch.tensor(8)), "image_shape"),  # type: ignore[arg-type]
        (lambda: dbm.calibrate([[0] * 6], ALL, [[0] * 6]), "nothing to predict"),
        (lambda: DeepBoltzmannMachine([[2, 2]]), "two"),
    ]
    for call, words in calls:
        with pytest.raises((TypeError, ValueError), match=words):
            call()
