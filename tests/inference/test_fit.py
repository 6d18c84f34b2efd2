"""The optimisation loop reaches closed forms, keeps to itself, and refuses what it cannot do."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import Tensor, nn

from inference._errors import NonFiniteError
from inference.fit import fit
from inference.runtime.generators import generator, scoped_seed
from inference.runtime.optimization import OptimizationRun, Settings
from tests.inference.fit_cases import (
    F64,
    QUIET,
    Gaussian,
    LeastSquares,
    Noisy,
    Overshoot,
    overshoot,
    regression,
    same,
    state,
)


def solution(x: Tensor, y: Tensor) -> Tensor:
    return torch.linalg.lstsq(x, y).solution


# -- exact answers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_least_squares_is_the_closed_form(dtype):
    x, y = regression(dtype=dtype)
    objective = LeastSquares(dtype=dtype)
    result = fit(objective, (x, y), num_steps=2000, lr=0.02, **QUIET)
    # Adam's gradient vanishes at the minimum of a full batch: only rounding is left
    tolerance = 1e-4 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(objective.weight.detach(), solution(x, y), rtol=0, atol=tolerance)
    assert result.losses.shape == result.learning_rates.shape == (2000,) and result.losses.dtype == dtype
    assert result.losses[0] == y.square().mean()
    assert (result.num_steps, result.best_step, result.stopped_early, result.interrupted) == (2000, None, False, False)
    assert "2000 steps" in result.summary()


def test_an_optimiser_that_calls_the_objective_many_times_a_step():
    x, y = regression()
    objective = LeastSquares()
    result = fit(
        objective,
        [x, y],
        num_steps=5,
        optimizer=lambda p: torch.optim.LBFGS(p, lr=1, line_search_fn="strong_wolfe"),
        **QUIET,
    )
    torch.testing.assert_close(objective.weight.detach(), solution(x, y), rtol=0, atol=1e-5)
    assert len(result.losses) == 5


def test_without_clipping_or_averaging_it_is_the_plain_loop():
    x, y = regression()
    objective, plain = LeastSquares(), LeastSquares()
    fit(objective, (x, y), num_steps=50, optimizer=torch.optim.SGD, lr=0.1, **QUIET)
    for _ in range(50):
        plain.weight.data -= 0.1 * torch.autograd.grad(plain(x, y), plain.weight)[0]
    torch.testing.assert_close(objective.weight.detach(), plain.weight.detach(), rtol=1e-13, atol=0)


def test_clipping_bounds_the_step():
    x, y = regression()
    objective = LeastSquares()
    gradient = torch.autograd.grad(objective(x, 100 * y), objective.weight)[0]
    fit(objective, (x, 100 * y), num_steps=1, optimizer=torch.optim.SGD, lr=1.0, clip_norm=0.25, **QUIET)
    torch.testing.assert_close(objective.weight.detach(), -0.25 * gradient / gradient.norm(), rtol=1e-6, atol=0)


def test_average_of_the_last_steps():
    """Averages are compared with the path of the parameters, which the losses of a linear objective give away."""

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros((), dtype=F64))

        def forward(self) -> Tensor:
            return self.weight * 1.0

    objective = Linear()
    fit(objective, num_steps=10, optimizer=torch.optim.SGD, lr=0.5, average_last=0.3, **QUIET)
    # the weight is -0.5 t after t updates; the last three are t = 8, 9, 10
    assert objective.weight.item() == pytest.approx(-4.5, rel=1e-14)
    objective = Linear()
    fit(objective, num_steps=10, optimizer=torch.optim.SGD, lr=0.5, average_last=1.0, **QUIET)
    assert objective.weight.item() == pytest.approx(-0.5 * 5.5, rel=1e-14)


@pytest.mark.parametrize(("share", "patience", "calls"), [(0.5, None, 1), (0.0, None, 0), (0.0, 3, 1)])
def test_an_objective_is_told_of_the_average(share: float, patience: int | None, calls: int) -> None:
    """Once, with the data, when the averaged or best parameters are in place; not where the last parameters stay."""

    class Told(LeastSquares):
        def refresh_after_average(self, *data: Tensor) -> None:
            told.append((len(data), len(data[0]), self.weight.detach().clone()))

    told: list[tuple[int, int, Tensor]] = []
    x, y = regression()
    objective = Told()
    held = {} if patience is None else {"validation": (x[:9], y[:9]), "validate_every": 3, "patience": patience}
    fit(objective, (x, y), num_steps=20, batch_size=8, average_last=share, **held, **QUIET)
    assert len(told) == calls
    for tensors, rows, weight in told:
        assert (tensors, rows) == (2, len(x)) and torch.equal(weight, objective.weight.detach())


def test_averaging_takes_the_minibatch_noise_away():
    x, y = regression()
    last, averaged = LeastSquares(), LeastSquares()
    arguments = dict(num_steps=2000, batch_size=6, optimizer=torch.optim.SGD, lr=0.05, **QUIET)
    fit(last, (x, y), **arguments)
    fit(averaged, (x, y), average_last=0.8, **arguments)
    far, near = ((m.weight.detach() - solution(x, y)).norm() for m in (last, averaged))
    assert near < 0.2 * far


# -- minibatches


class Recorder(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []

    def forward(self, rows: Tensor) -> Tensor:
        self.seen.append(rows.tolist())
        return self.weight * rows.double().mean()


def test_every_row_serves_once_an_epoch_in_a_new_order():
    objective = Recorder()
    result = fit(objective, torch.arange(12), num_epochs=4, batch_size=4, **QUIET)
    batches = objective.seen[1:]  # the first call is the one that makes lazy parameters
    assert len(batches) == result.num_steps == 12
    epochs = [[row for batch in batches[i : i + 3] for row in batch] for i in range(0, 12, 3)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_batches_that_an_epoch_cuts_are_filled_from_the_next():
    objective = Recorder()
    result = fit(objective, torch.arange(10), num_epochs=3, batch_size=4, **QUIET)
    rows = [row for batch in objective.seen[1:] for row in batch]
    assert result.num_steps == math.ceil(30 / 4) and {len(batch) for batch in objective.seen} == {4}
    assert [sorted(rows[i : i + 10]) for i in (0, 10, 20)] == [list(range(10))] * 3


def test_tensors_are_cut_at_the_same_rows():
    class Paired(Recorder):
        def forward(self, rows: Tensor, others: Tensor) -> Tensor:
            assert torch.equal(others, 10 * rows)
            return super().forward(rows)

    fit(Paired(), (torch.arange(9), 10 * torch.arange(9)), num_steps=20, batch_size=2, **QUIET)


# -- schedulers, validation, early stopping


def test_learning_rates_are_those_of_the_scheduler():
    result = fit(
        LeastSquares(),
        regression(),
        num_steps=6,
        lr=0.8,
        scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=2, gamma=0.5),
        **QUIET,
    )
    assert result.learning_rates.tolist() == [0.8, 0.8, 0.4, 0.4, 0.2, 0.2]


def test_plateaus_are_those_of_the_held_out_loss():
    x, y = regression()
    result = fit(
        LeastSquares(),
        (x, y),
        num_steps=40,
        optimizer=torch.optim.SGD,
        lr=1e-9,  # nothing moves by more than the plateau's threshold
        validation=(x, y),
        validate_every=10,
        scheduler=lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.1, eps=0.0),
        **QUIET,
    )
    assert result.learning_rates[[0, 10, 19, 20, 30]].tolist() == pytest.approx(
        [1e-9, 1e-9, 1e-9, 1e-10, 1e-11], rel=1e-9
    )


def test_early_stopping_puts_the_best_parameters_and_buffers_back():
    objective = Overshoot()
    result = overshoot(objective, patience=3)
    assert result.validation_steps.tolist() == [0, 5, 10, 15, 20, 25]
    assert result.validation_losses.tolist() == [144.0, 49.0, 4.0, 9.0, 64.0, 169.0]
    assert (result.stopped_early, result.best_step, result.num_steps) == (True, 10, 25)
    assert objective.weight.item() == 10.0 and objective.calls == 10
    assert "stopped early" in result.summary() and "after step 10" in result.summary()


def test_without_patience_the_last_parameters_stay():
    objective = Overshoot()
    result = overshoot(objective, num_steps=22)
    assert result.validation_steps.tolist() == [0, 5, 10, 15, 20, 22]  # the end is looked at as well
    assert (result.stopped_early, result.best_step, objective.weight.item()) == (False, 10, 22.0)


def test_best_parameters_come_back_when_the_patience_lasts():
    objective = Overshoot()
    result = overshoot(objective, patience=50, num_steps=20)
    assert (result.stopped_early, objective.weight.item()) == (False, 10.0)


def test_records_of_the_run_are_not_put_back():
    class Recorder(Overshoot):
        record_buffers = ("calls",)

    objective = Recorder()
    overshoot(objective, patience=3)
    assert objective.weight.item() == 10.0 and objective.calls == 25


def test_validation_changes_nothing_in_the_training():
    x, y = regression(dtype=torch.float32)
    with_it, without = Noisy(), Noisy()
    keywords = dict(num_steps=30, batch_size=10, **QUIET)
    a = fit(with_it, (x, y), validation=(x[:25], y[:25]), validate_every=3, **keywords)
    b = fit(without, (x, y), **keywords)
    assert torch.equal(a.losses, b.losses) and same(state(with_it), state(without))


def test_validation_is_weighted_by_rows():
    x, y = regression()
    result = fit(LeastSquares(), (x, y), num_steps=1, batch_size=7, validation=(x[:25], y[:25]), **QUIET)
    assert result.validation_losses[0].item() == pytest.approx(y[:25].square().mean().item(), rel=1e-14)


def test_modes_are_as_they_were():
    objective = Noisy()
    objective.drop.eval()  # a layer that the user froze stays frozen
    seen = []
    objective.drop.register_forward_hook(lambda module, *rest: seen.append(module.training))
    fit(objective, regression(dtype=torch.float32), num_steps=3, **QUIET)
    assert set(seen) == {False} and objective.norm.training and not objective.drop.training
    seen.clear()
    objective.eval()
    fit(objective, regression(dtype=torch.float32), num_steps=3, **QUIET)
    assert set(seen) == {True} and not any(module.training for module in objective.modules())


# -- Pyro


def posterior(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    covariance = torch.linalg.inv(torch.eye(3, dtype=x.dtype) + x.T @ x / 0.25)
    return covariance @ x.T @ y / 0.25, covariance


def test_variational_inference_reaches_the_exact_posterior():
    x, y = regression(40)
    model = Gaussian()
    guide = AutoMultivariateNormal(model, init_scale=0.1)
    objective = Trace_ELBO(num_particles=8, vectorize_particles=True)(model, guide)
    fit(objective, (x, y), num_steps=600, lr=0.03, average_last=0.5, **QUIET)
    mean, covariance = posterior(x, y)
    found = guide.get_posterior()
    # averaged over 300 steps of 8 particles, the mean's standard error is a fiftieth of the posterior's deviation (0.1)
    torch.testing.assert_close(found.mean.detach(), mean, rtol=0, atol=0.006)
    torch.testing.assert_close(found.covariance_matrix.detach(), covariance, rtol=0, atol=0.1 * covariance.max().item())


def test_two_fits_do_not_see_each_other_and_the_store_stays():
    x, y = regression(30)
    pyro.clear_param_store()
    kept = pyro.param("AutoNormal.locs.w", torch.full((3,), 7.0))

    def run(target: Tensor) -> tuple[Tensor, nn.Module]:
        guide = AutoNormal(Gaussian())
        fit(Trace_ELBO()(guide.model, guide), (x, target), num_steps=300, lr=0.02, **QUIET)
        return guide.median()["w"].detach().clone(), guide

    alone, _ = run(y)
    flipped, other = run(-y)
    again, _ = run(y)
    assert torch.equal(alone, again)
    assert torch.equal(flipped, other.median()["w"].detach())  # the third fit did not move the second guide
    assert (flipped * alone < 0).all()  # each learned from its own data
    assert list(pyro.get_param_store()) == ["AutoNormal.locs.w"] and (kept == 7.0).all()
    pyro.clear_param_store()


def test_parameters_of_one_name_in_model_and_guide_are_two():
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.loc = PyroParam(torch.tensor(0.0))

        def forward(self) -> None:
            z = pyro.sample("z", dist.Normal(self.loc, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(4.0))

    class Guide(PyroModule):
        def __init__(self):
            super().__init__()
            self.loc = PyroParam(torch.tensor(0.0))
            self.scale = PyroParam(torch.tensor(0.5), constraint=dist.constraints.positive)

        def forward(self) -> None:
            pyro.sample("z", dist.Normal(self.loc, self.scale))

    model, guide = Model(), Guide()
    fit(Trace_ELBO(num_particles=4)(model, guide), num_steps=400, lr=0.05, average_last=0.5, **QUIET)
    # maximum marginal likelihood: loc = 4; the posterior of z is N(4, 1/2)
    assert model.loc.item() == pytest.approx(4.0, abs=0.1) and guide.loc.item() == pytest.approx(4.0, abs=0.1)
    assert guide.scale.item() == pytest.approx(math.sqrt(0.5), abs=0.05)
    assert model.loc_unconstrained is not guide.loc_unconstrained


def test_a_pyro_module_that_a_function_calls():
    with scoped_seed(0):
        net = PyroModule[nn.Linear](2, 1)
    net.weight = PyroSample(dist.Normal(torch.zeros(1, 2), 1.0).to_event(2))
    net.bias = PyroSample(dist.Normal(torch.zeros(1), 1.0).to_event(1))

    def model(x: Tensor, y: Tensor) -> None:
        mean = net(x).squeeze(-1)
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, 0.1), obs=y)

    guide = AutoNormal(model)
    x = torch.randn(50, 2, generator=generator(0, "x"))
    y = x @ torch.tensor([1.0, -1.0]) + 2.0
    fit(Trace_ELBO()(model, guide), (x, y), num_steps=800, lr=0.03, **QUIET)
    torch.testing.assert_close(guide.median()["weight"][0], torch.tensor([1.0, -1.0]), rtol=0, atol=0.1)


def test_parameters_that_no_module_owns_are_refused():
    def guide(x: Tensor, y: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(3, dtype=F64))
        pyro.sample("w", dist.Normal(loc, 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"\['loc'\] .* not own .*PyroParam"):
        fit(Trace_ELBO()(Gaussian(), guide), regression(), num_steps=3, **QUIET)
    assert not pyro.get_param_store()

    class Inside(PyroModule):
        def forward(self, x: Tensor, y: Tensor) -> None:
            guide(x, y)

    with pytest.raises(ValueError, match=r"do not own.*PyroParam"):
        fit(Trace_ELBO()(Gaussian(), Inside()), regression(), num_steps=3, **QUIET)


# -- seeds, globals


def test_same_seed_same_bits_and_another_seed_others():
    x, y = regression(dtype=torch.float32)
    runs = []
    for seed in (3, 3, 4):
        objective = Noisy()
        result = fit(objective, (x, y), num_steps=25, batch_size=7, seed=seed, **QUIET)
        runs.append((state(objective), result.losses))
    assert same(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])
    assert not torch.equal(runs[0][1], runs[2][1])


def test_looking_more_often_changes_nothing(monkeypatch):
    x, y = regression(dtype=torch.float32)
    found = []
    for seconds in (0.5, 0.0):
        monkeypatch.setattr("inference.runtime.optimization._BLOCK_SECONDS", seconds)
        objective = Noisy()
        found.append((fit(objective, (x, y), num_steps=40, batch_size=7, **QUIET).losses, state(objective)))
    assert torch.equal(found[0][0], found[1][0]) and same(found[0][1], found[1][1])


def test_globals_stay():
    before = (torch.get_rng_state(), torch.get_default_dtype(), pyro.settings.get(), torch.is_grad_enabled())
    with torch.no_grad():
        fit(Noisy(), regression(dtype=torch.float32), num_steps=3, **QUIET)
        assert not torch.is_grad_enabled()
    with pytest.raises(NonFiniteError):
        fit(Returns(lambda w: w.log().sum() + (w - 1).sum() / 0.0), num_steps=3, **QUIET)
    after = (torch.get_rng_state(), torch.get_default_dtype(), pyro.settings.get(), torch.is_grad_enabled())
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]


def test_the_first_call_leaves_buffers_and_randomness():
    x, y = regression(dtype=torch.float32)
    objective, reference = Noisy(), Noisy()
    result = fit(objective, (x, y), num_steps=1, seed=5, **QUIET)
    with scoped_seed(5):
        assert reference(x, y).item() == result.losses[0].item()
    assert objective.norm.num_batches_tracked == 1 and torch.equal(
        objective.norm.running_mean, reference.norm.running_mean
    )


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_lazy_modules_are_learned():
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.LazyLinear(1, dtype=F64)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return (y - self.layer(x).squeeze(1)).square().mean()

    objective = Lazy()
    result = fit(objective, regression(), num_steps=200, lr=0.05, **QUIET)
    assert objective.layer.weight.shape == (1, 3) and result.losses[-1] < 0.2


# -- devices


class Watched(nn.Module):
    def __init__(self, device: str):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, device=device))
        self.norm = nn.BatchNorm1d(3, device=device)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (y - self.norm(x) @ self.weight).square().mean()


def test_no_stray_cpu_tensor_meets_those_of_another_device(monkeypatch):
    """On ``meta`` tensors nothing is computed and a CPU tensor among them is an error; a read-back raises too.

    The part that runs without the host: batches, forward, backward, clipping, optimiser, scheduler, averages.
    """
    data = (torch.empty(20, 3, device="meta"), torch.empty(20, device="meta"))
    settings = Settings(10, 6, 1.0, 5, None, 0, 0, torch.device("meta"))
    objective = Watched("meta")
    optimizer = torch.optim.Adam(objective.parameters())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    run = OptimizationRun(objective, optimizer, scheduler, data, (), settings, torch.float32)
    monkeypatch.setattr(run, "_permutation", lambda epoch: torch.empty(20, dtype=torch.long, device="meta"))
    for _ in range(10):
        assert run.update().device.type == "meta"
    assert all(mean.device.type == "meta" for mean in run.average) and len(run.average) == 3
    assert all(norm.device.type == "meta" for norm in run._norms)


def test_device_follows_the_objective_or_is_the_one_asked_for():
    x, y = regression(dtype=torch.float32)
    for device in (None, "cpu", torch.device("cpu"), "auto"):
        objective = LeastSquares(dtype=torch.float32)
        fit(objective, (x, y), num_steps=1, device=device, **QUIET)


# -- arguments


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_steps": None}, ValueError, "one of num_steps and num_epochs"),
        ({"num_epochs": 3}, ValueError, "one of num_steps and num_epochs"),
        ({"num_steps": 2.0}, TypeError, "num_steps must be an integer"),
        ({"num_steps": True}, TypeError, "num_steps must be an integer"),
        ({"num_steps": 0}, ValueError, "num_steps must be at least 1, got 0"),
        ({"batch_size": 61}, ValueError, "batch_size=61 is larger than the data, which has 60 rows"),
        ({"batch_size": 1.5}, TypeError, "batch_size must be an integer"),
        ({"lr": -0.1}, ValueError, "lr must be positive"),
        ({"lr": math.nan}, ValueError, "lr must be positive"),
        ({"lr": "fast"}, TypeError, "lr must be a number"),
        ({"clip_norm": 0.0}, ValueError, "clip_norm must be positive"),
        ({"average_last": 1.5}, ValueError, "average_last must be between 0 and 1"),
        ({"patience": 3}, ValueError, "patience needs held-out data"),
        ({"patience": 3, "average_last": 0.5}, ValueError, "give one of them"),
        ({"validate_every": 0}, ValueError, "validate_every"),
        ({"checkpoint_every": 0.5}, TypeError, "checkpoint_every"),
        ({"seed": 1.5}, TypeError, "seed must be an integer"),
        ({"progress": "yes"}, TypeError, "progress"),
        ({"optimizer": "adam"}, TypeError, "optimizer must be a function"),
        ({"optimizer": lambda p: None}, TypeError, r"must return a torch\.optim\.Optimizer"),
        ({"optimizer": lambda p: torch.optim.SGD(p), "lr": 0.5}, ValueError, "lr=0.5 would not be used"),
        ({"scheduler": lambda o: o}, TypeError, "must return a torch"),
        ({"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau}, ValueError, "give validation"),
        ({"data": None, "num_steps": None, "num_epochs": 1}, ValueError, "give num_steps"),
        ({"data": None, "batch_size": 3}, ValueError, "needs data"),
        ({"data": []}, TypeError, "data must be a tensor or a list of tensors"),
        ({"data": [[1.0]]}, TypeError, "data must be a tensor or a list of tensors"),
        ({"data": torch.tensor(1.0)}, ValueError, "same number of rows"),
        ({"data": (torch.ones(3), torch.ones(4))}, ValueError, r"same number of rows.*\(3,\), \(4,\)"),
        ({"data": (torch.ones(0, 3), torch.ones(0))}, ValueError, "no rows"),
        ({"data": (torch.ones(2), torch.tensor([1.0, math.nan]))}, ValueError, r"NaN or infinite values \(tensor 1\)"),
        ({"data": (torch.tensor([1.0, math.inf]), torch.ones(2))}, ValueError, r"NaN or infinite values \(tensor 0\)"),
        ({"validation": torch.ones(3, 3)}, ValueError, "validation holds 1 tensors and data 2"),
        ({"validation": (torch.ones(3, 3) * math.nan, torch.ones(3))}, ValueError, "validation holds NaN"),
        ({"objective": lambda x, y: x}, TypeError, r"objective must be a torch\.nn\.Module"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_refused_before_any_work(change, error, message):
    objective = LeastSquares()
    arguments = {"objective": objective, "data": regression(), "num_steps": 3, **QUIET, **change}
    with pytest.raises(error, match=message):
        fit(arguments.pop("objective"), arguments.pop("data"), **arguments)
    assert (objective.weight == 0).all()


class Returns(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.value = value

    def forward(self):
        return self.value(self.weight)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda w: w, r"one real number.*shape \(2,\)"),
        (lambda w: 1.0, "one real number.*float"),
        (lambda w: w.sum() * 1j, "complex"),
        (lambda w: w.detach().sum(), "does not depend on any of its parameters"),
    ],
)
def test_objectives_that_return_no_loss(value, message):
    with pytest.raises(ValueError, match=message):
        fit(Returns(value), num_steps=3, **QUIET)


def test_nothing_to_learn():
    frozen = LeastSquares()
    frozen.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameters to learn"):
        fit(frozen, regression(), num_steps=3, **QUIET)
    spoilt = LeastSquares()
    spoilt.weight.data[1] = math.nan
    with pytest.raises(ValueError, match=r"'weight' of objective is NaN .* before the first step"):
        fit(spoilt, regression(), num_steps=3, **QUIET)


def test_frozen_parameters_do_not_move():
    objective = Noisy()
    objective.first.requires_grad_(False)
    start = objective.first.clone()
    fit(objective, regression(dtype=torch.float32), num_steps=5, lr=0.1, **QUIET)
    assert torch.equal(objective.first, start)


def test_sparse_gradients():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding.from_pretrained(torch.ones(5, 2), freeze=False, sparse=True)

        def forward(self, index: Tensor) -> Tensor:
            return self.table(index).square().sum()

    objective = Table()
    fit(objective, torch.tensor([1, 1, 3]), num_steps=300, optimizer=torch.optim.SparseAdam, lr=0.01, **QUIET)
    assert objective.table.weight[[1, 3]].abs().max() < 0.05 and (objective.table.weight[[0, 2, 4]] == 1).all()


def test_nothing_is_read_back_while_steps_run(monkeypatch):
    """The host looks at the device a few times a block, not at each step."""
    monkeypatch.setattr("inference.runtime.optimization._BLOCK_SECONDS", 1e9)
    reads = []
    for name in ("item", "__bool__", "cpu", "tolist", "__float__"):
        function = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda *a, f=function, n=name, **k: (reads.append(n), f(*a, **k))[1])
    fit(LeastSquares(), regression(), num_steps=1023, batch_size=10, optimizer=torch.optim.SGD, **QUIET)
    # ten blocks of 1, 2, 4, ..., 512 steps; at the door, one look at each input and parameter
    assert len(reads) <= 4 * 10 + 8, len(reads)
