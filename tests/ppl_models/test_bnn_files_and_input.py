"""The network's seeds and files, and every bad input with its error."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import gpytorch
import pytest
import torch
from torch import Tensor

from inference.runtime.generators import scoped_seed
from ppl_models.functional_prior_bnn import FunctionalPriorBNN

G = torch.Generator().manual_seed(0)
X = 3 + 2 * torch.randn(60, 3, generator=G)
Y = 100 + 20 * torch.sin(X[:, 0]) + 5 * torch.randn(60, generator=G)
LABELS = (X[:, 0] > 3).long()
QUICK: dict[str, Any] = {
    "num_chains": 2,
    "warmup_steps": 30,
    "num_samples": 4,
    "thin": 2,
    "batch_size": 20,
    "progress": False,
}


@pytest.fixture(scope="module")
def fitted() -> FunctionalPriorBNN:
    bnn = FunctionalPriorBNN(3, hidden=(8,))
    with scoped_seed(0):
        bnn.fit(X, Y, **{**QUICK, "warmup_steps": 300, "num_samples": 10, "thin": 20})
    return bnn


MODELS = {
    "hierarchical": {"prior": "hierarchical"},
    "flow": {"prior": "flow"},
    "categorical": {"likelihood": "categorical", "out_features": 3},
}


# ---------------------------------------------------------------- seeds and files
def test_equal_seeds_give_equal_bits_and_fits_do_not_see_each_other(fitted: FunctionalPriorBNN) -> None:
    first, second, other = (FunctionalPriorBNN(3, hidden=(4,)) for _ in range(3))
    a = first.fit(X, Y, **QUICK, seed=3)
    b = second.fit(X, Y, **QUICK, seed=3)
    c = other.fit(X, Y, **QUICK, seed=4)
    assert all(torch.equal(a.samples[n], b.samples[n]) for n in a.samples)
    assert not any(torch.equal(a.samples[n], c.samples[n]) for n in a.samples)
    before = a.predict(X).mean
    first.fit(3 * X + 1, -Y, **QUICK, seed=5)
    assert torch.equal(a.predict(X).mean, before), "a result keeps the model and the units it was made with"
    assert torch.equal(first.sample_prior(X, 5, seed=1), first.sample_prior(X, 5, seed=1))


def test_saved_models_predict_the_same_bits_in_a_new_process(tmp_path: Path) -> None:
    here, names = {}, ["hierarchical", "flow", "categorical"]
    for name in names:
        bnn = FunctionalPriorBNN(3, hidden=(4,), **{"out_features": 1, **MODELS[name]})
        bnn.match_prior(gpytorch.kernels.RBFKernel(), X, num_steps=2, num_functions=4, num_points=8, progress=False)
        result = bnn.fit(X, LABELS if name == "categorical" else Y, **QUICK)
        result.save(tmp_path / name)
        here[name] = [
            bnn.predict(X).samples,
            bnn.predict(X).sample(seed=1),
            bnn.sample_prior(X, 4, seed=2),
            result.rhat,
        ]
    script = f"""
import torch
from ppl_models.functional_prior_bnn import FunctionalPriorBNN
x, out = torch.load({str(tmp_path / "x")!r}, weights_only=True), dict()
for name in {names!r}:
    bnn = FunctionalPriorBNN.load({str(tmp_path)!r} + "/" + name)
    out[name] = [bnn.predict(x).samples, bnn.predict(x).sample(seed=1), bnn.sample_prior(x, 4, seed=2), bnn.result.rhat]
    bnn.result.to_arviz()
torch.save(out, {str(tmp_path / "out")!r})
"""
    torch.save(X, tmp_path / "x")
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
    there = torch.load(tmp_path / "out", weights_only=True)
    for name in names:
        for a, b in zip(there[name], here[name], strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num()), name


def test_an_unfitted_model_can_be_saved_and_a_refitted_one_too(tmp_path: Path, fitted: FunctionalPriorBNN) -> None:
    bnn = FunctionalPriorBNN(3, hidden=(5,), prior="flow", seed=7)
    bnn.save(tmp_path / "a")
    loaded = FunctionalPriorBNN.load(tmp_path / "a")
    assert torch.equal(loaded.sample_prior(X, 3), bnn.sample_prior(X, 3)) and loaded.result is None
    fitted.save(tmp_path / "b")
    FunctionalPriorBNN.load(tmp_path / "b").save(tmp_path / "c")
    assert torch.equal(FunctionalPriorBNN.load(tmp_path / "c").predict(X).samples, fitted.predict(X).samples)


# ---------------------------------------------------------------- bad input
NAN, INF = float("nan"), float("inf")


def spoiled(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x.view(-1)[7] = value
    return x


@pytest.mark.parametrize(
    ("x", "y", "options", "error", "message"),
    [
        (spoiled(X, NAN), Y, {}, ValueError, r"x_train.*\(2, 1\)"),
        (spoiled(X, INF), Y, {}, ValueError, "x_train"),
        (X, spoiled(Y, NAN), {}, ValueError, "y"),
        (X[:, :2], Y, {}, ValueError, r"\(N, 3\)"),
        (X[:0], Y[:0], {}, ValueError, "empty"),
        (
            (X.double() + torch.tensor([0, 1e9, 0])).numpy(),
            Y,
            {},
            ValueError,
            "x_train varies by .* column 1, which float32 cannot",
        ),
        (X, Y.double().numpy() + 1e8, {}, ValueError, "y varies by .* subtract a constant"),
        (X, Y.double() + 1e8, {}, ValueError, "y varies by .* subtract a constant"),
        (X, Y[:-1], {}, ValueError, "60"),
        (X, torch.stack([Y, Y], 1), {}, ValueError, r"\(60, 1\)"),
        ("abc", Y, {}, TypeError, "x_train"),
        (X, Y, {"batch_size": 61}, ValueError, "batch_size.*60"),
        (X, Y, {"batch_size": 0}, ValueError, "batch_size"),
        (X, Y, {"batch_size": 2.5}, TypeError, "batch_size"),
        (X, Y, {"batch_size": "half"}, ValueError, "batch_size"),
        (X, Y, {"num_chains": 0}, ValueError, "num_chains"),
        (X, Y, {"num_samples": 2.5}, TypeError, "num_samples"),
        (X, Y, {"warmup_steps": -1}, ValueError, "warmup_steps"),
        (X, Y, {"step_size": -0.1}, ValueError, "step_size"),
        (X, Y, {"friction": 2.0}, ValueError, "friction"),
        (X, Y, {"temperature": 0.0}, ValueError, "temperature"),
        (X, Y, {"sampler": "nuts2"}, ValueError, "sampler"),
        (X, Y, {"sampler": "hmc", "batch_size": 20}, ValueError, "HMC"),
        (X, Y, {"sampler": "hmc", "batch_size": None, "temperature": 0.5}, ValueError, "temperature"),
        (X, Y, {"seed": 0.5}, TypeError, "seed"),
    ],
)
def test_bad_data_and_settings_are_refused_before_any_work(
    x: Any, y: Any, options: dict, error: type[Exception], message: str
) -> None:
    bnn = FunctionalPriorBNN(3, hidden=(4,))
    with pytest.raises(error, match=message):
        bnn.fit(x, y, **{**QUICK, **options})
    assert bnn.result is None


@pytest.mark.parametrize(
    ("likelihood", "y", "error", "message"),
    [
        ("categorical", LABELS.float(), TypeError, "integer"),
        ("categorical", LABELS + 2, ValueError, "0 to 2"),
        ("categorical", LABELS - 1, ValueError, "0 to 2"),
        ("categorical", LABELS.bool(), TypeError, "integer"),
        ("bernoulli", LABELS.float() * 2, ValueError, "0 or 1"),
        ("bernoulli", Y, ValueError, "0 or 1"),
        ("gaussian", Y.to(torch.complex64), TypeError, "real"),
        ("gaussian", ["a"] * 60, TypeError, "y must be"),
    ],
)
def test_targets_of_the_wrong_kind_are_refused(likelihood: str, y: Any, error: type[Exception], message: str) -> None:
    bnn = FunctionalPriorBNN(3, 3 if likelihood == "categorical" else 1, hidden=(4,), likelihood=likelihood)
    with pytest.raises(error, match=message):
        bnn.fit(X, y, **QUICK)


def test_queries_out_of_turn_and_out_of_shape(fitted: FunctionalPriorBNN) -> None:
    fresh = FunctionalPriorBNN(3)
    with pytest.raises(RuntimeError, match="call fit"):
        fresh.predict(X)
    assert fresh.sample_prior(X, num_samples=2).shape == (2, 60, 1)
    with pytest.raises(ValueError, match=r"\(N, 3\).*\(60, 2\)"):
        fitted.predict(X[:, :2])
    with pytest.raises(ValueError, match="finite"):
        fitted.predict(spoiled(X, NAN))
    with pytest.raises(ValueError, match="num_samples"):
        fresh.sample_prior(X, num_samples=0)
    with pytest.raises(ValueError, match="classification"):
        _ = fitted.predict(X).entropy
    again = FunctionalPriorBNN(3, hidden=(4,))
    again.fit(X, Y, **QUICK)
    again.match_prior(gpytorch.kernels.RBFKernel(), X, num_steps=1, num_functions=4, num_points=8, progress=False)
    with pytest.raises(RuntimeError, match="match_prior drops"):
        again.predict(X)


def test_numpy_arrays_and_lists_are_welcome() -> None:
    bnn = FunctionalPriorBNN(3, hidden=(4,))
    bnn.fit(X.double().numpy(), Y.tolist(), **QUICK)
    assert bnn.predict(X.numpy()).mean.dtype == torch.float32
    assert bnn.predict(X.double().numpy()).rmse(Y.numpy()).isfinite()
