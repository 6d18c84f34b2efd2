"""The export under the installed ArviZ, and under ArviZ 1.x in the interpreter that PPL_MODELS_ARVIZ1_PYTHON names."""

import os
import subprocess
import sys
from pathlib import Path

import arviz as az
import numpy as np
import pytest
import torch

from inference.results import export
from inference.results.export import to_arviz

OLD = int(az.__version__.split(".")[0]) < 1
CHAINS, DRAWS, N = 4, 120, 15


def model_groups(draws=DRAWS):
    """A normal model with known scale: y_n ~ N(mu + w[n % 2], 1), drawn from something near its posterior."""
    rng = np.random.default_rng(0)
    mu, w = rng.normal(0, 0.2, size=(CHAINS, draws)), rng.normal(0, 0.2, size=(CHAINS, draws, 2))
    y = rng.normal(size=N)
    mean = mu[..., None] + w[..., np.arange(N) % 2]
    return {
        "posterior": {"mu": mu, "w": w},
        "posterior_predictive": {"y": mean + rng.normal(size=mean.shape)},
        "log_likelihood": {"y": -0.5 * (y - mean) ** 2 - 0.5 * np.log(2 * np.pi)},
        "sample_stats": {
            "lp": -0.5 * mu**2,
            "energy": rng.normal(size=mu.shape),
            "acceptance_rate": rng.uniform(size=mu.shape),
            "step_size": np.full(mu.shape, 0.1),
            "diverging": np.zeros(mu.shape, int),
        },
        "prior": {"mu": rng.normal(size=(1, 50)), "w": rng.normal(size=(1, 50, 2))},
        "prior_predictive": {"y": rng.normal(size=(1, 50, N))},
        "observed_data": {"y": y},
        "constant_data": {"parity": np.arange(N) % 2},
    }


LABELS = {
    "dims": {"w": ["parity_of"], "y": ["unit"], "parity": ["unit"]},
    "coords": {"parity_of": ["even", "odd"], "unit": np.arange(100, 100 + N)},
}


def test_groups_dims_coords_and_attrs():
    groups = model_groups()
    data = to_arviz(**groups, **LABELS, attrs={"note": "a run", "rate": 0.5})
    for group, variables in groups.items():
        for name, values in variables.items():
            np.testing.assert_array_equal(data[group][name].values, values)
    assert data["posterior"]["w"].dims == ("chain", "draw", "parity_of")
    assert data["log_likelihood"]["y"].dims == ("chain", "draw", "unit")
    assert data["observed_data"]["y"].dims == data["constant_data"]["parity"].dims == ("unit",)
    assert list(data["posterior"]["parity_of"].values) == ["even", "odd"]
    assert data["sample_stats"]["diverging"].dtype == bool
    assert data.attrs["note"] == "a run" and data.attrs["inference_library"] == "ppl-models"
    for group in groups:
        assert data[group].attrs["inference_library"] == "ppl-models"
        assert "created_at" not in data[group].attrs
    stamped = to_arviz(groups["posterior"], created_at="2025-01-01T00:00:00+00:00")
    assert stamped["posterior"].attrs["created_at"] == "2025-01-01T00:00:00+00:00"


def test_summary_and_loo_read_the_result():
    groups = model_groups()
    data = to_arviz(**groups, **LABELS)
    table = az.summary(data)
    assert list(table.index) == ["mu", "w[even]", "w[odd]"]
    if OLD:
        elpd = az.loo(data)
        # Plain importance sampling estimates the same sum; Pareto smoothing moves it by a few hundredths here.
        pointwise = groups["log_likelihood"]["y"].reshape(-1, N)
        assert elpd.elpd_loo == pytest.approx(-np.log(np.exp(-pointwise).mean(0)).sum(), abs=0.1)
        assert elpd.n_data_points == N
        assert np.isfinite(az.bfmi(data)).all()


@pytest.mark.parametrize("engine", ["netcdf4", "h5netcdf"])
def test_netcdf_round_trip(tmp_path, engine):
    pytest.importorskip("netCDF4" if engine == "netcdf4" else engine)
    data = to_arviz(**model_groups(), **LABELS, attrs={"note": "a run", "sizes": [1, 2]})
    data.to_netcdf(str(tmp_path / "run.nc"), engine=engine)
    back = az.from_netcdf(str(tmp_path / "run.nc"))
    for group, variables in model_groups().items():
        for name, values in variables.items():
            np.testing.assert_array_equal(back[group][name].values, values)
    assert back.attrs["note"] == "a run"


def test_tensors_share_memory_and_keep_their_values():
    x = torch.randn(2, 30, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    half = {"half": x.half(), "brain": x.bfloat16()}
    data = to_arviz({"x": x, **half})["posterior"]
    assert np.shares_memory(data["x"].values, x.detach().numpy())
    for name, values in half.items():
        assert data[name].dtype == np.float32
        np.testing.assert_array_equal(data[name].values, values.float().detach().numpy())


def test_more_chains_than_draws_is_no_warning():
    data = to_arviz({"x": np.zeros((100, 5))})  # warnings are errors here
    assert data["posterior"]["x"].shape == (100, 5)


def test_names_are_made_fit_for_files(tmp_path):
    x = np.zeros((2, 10))
    data = to_arviz(
        {"net/w": x[..., None]}, sample_stats={"accept_prob": x, "divergent": x}, dims={"net/w": ["in/put"]}
    )
    assert data["posterior"]["net.w"].dims[2] == "in.put"
    assert set(data["sample_stats"].data_vars) == {"acceptance_rate", "diverging"}
    data.to_netcdf(str(tmp_path / "run.nc"))
    with pytest.raises(ValueError, match=r"posterior has two variables .* 'a\.b'; 'a\.b' is the second"):
        to_arviz({"a/b": x, "a.b": x})


def test_scalar_data_and_missing_groups():
    data = to_arviz(observed_data={"y": 3.0}, prior={"x": np.zeros((1, 8))}, posterior={})
    assert data["observed_data"]["y"].values.tolist() == [3.0]
    assert "posterior" not in (data.groups() if OLD else data.children)


def test_inputs_are_left_alone():
    attrs, dims, coords = {"created_at": "then"}, {"x": ["k"]}, {"k": ["a", "b"]}
    to_arviz({"x": np.zeros((2, 10, 2))}, attrs=attrs, dims=dims, coords=coords)
    assert (attrs, dims, coords) == ({"created_at": "then"}, {"x": ["k"]}, {"k": ["a", "b"]})


X = np.zeros((4, 20))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "nothing to export"),
        ({"posterior": X}, TypeError, "posterior must be a mapping"),
        ({"posterior": {"x": X[0]}}, ValueError, r"posterior\['x'\] must be \(chain, draw, ...\), got shape \(20,\)"),
        (
            {"posterior": {"x": X, "y": X.T, "z": X}},
            ValueError,
            r"posterior\['y'\] has \(20, 4\), but posterior\['x'\]",
        ),
        ({"posterior": {"y": X[:, 1:], "x": X, "z": X}}, ValueError, r"posterior\['y'\] has \(4, 19\), but"),
        (
            {"posterior": {"x": X, "z": X}, "sample_stats": {"lp": X[:2]}},
            ValueError,
            r"sample_stats\['lp'\] has \(2, 20\), but posterior\['x'\] has \(4, 20\)",
        ),
        ({"prior": {"x": X, "z": X}, "prior_predictive": {"y": X[:1]}}, ValueError, r"prior_predictive\['y'\] has"),
        ({"posterior": {"x": X[:, :0]}}, ValueError, "at least one chain and one draw"),
        ({"posterior": {"x": X + 1j}}, TypeError, r"posterior\['x'\] must hold real numbers"),
        ({"posterior": {"x": X}, "constant_data": {"c": [None]}}, TypeError, r"constant_data\['c'\]"),
        ({"posterior": {"x": X}, "dims": {"y": ["k"]}}, ValueError, "dims names 'y', but the variables are x"),
        ({"posterior": {"x": X}, "dims": {"x": ["k"]}}, ValueError, r"names 1 dimensions, but posterior\['x'\] has 0"),
        ({"posterior": {"x": X[..., None]}, "dims": {"x": ["x"]}}, ValueError, "names must differ"),
        ({"posterior": {"x": X[..., None]}, "dims": {"x": ["draw"]}}, ValueError, "names must differ"),
        (
            {"posterior": {"x": X[..., None]}, "dims": {"x": ["k"]}, "coords": {"k": ["a", "b"]}},
            ValueError,
            r"coords\['k'\] has 2 labels, but posterior\['x'\] has size 1",
        ),
        ({"posterior": {"x": X}, "coords": {"k": 3}}, ValueError, r"coords\['k'\] must be a flat sequence"),
        ({"posterior": {"x": X}, "attrs": {"ok": True}}, TypeError, r"attrs\['ok'\]"),
        ({"posterior": {"x": X}, "attrs": {"nest": {"a": 1}}}, TypeError, r"attrs\['nest'\]"),
    ],
)
def test_bad_input_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        to_arviz(**arguments)


def test_multivariate_observations_have_one_log_likelihood():
    groups = {"log_likelihood": {"y": np.zeros((2, 10, 5))}, "observed_data": {"y": np.zeros((5, 3))}}
    data = to_arviz({"x": np.zeros((2, 10))}, **groups, dims={"y": ["unit", "axis"]})
    assert data["log_likelihood"]["y"].dims == ("chain", "draw", "unit")
    assert data["observed_data"]["y"].dims == ("unit", "axis")


# Runs in an interpreter with ArviZ 1.x and without torch; the arguments are export.py and a folder.
ARVIZ_1 = """
import importlib.util, pathlib, sys
import numpy as np

spec = importlib.util.spec_from_file_location("export", sys.argv[1])
export = importlib.util.module_from_spec(spec)
spec.loader.exec_module(export)
assert "arviz" not in sys.modules and "torch" not in sys.modules
groups = np.load(pathlib.Path(sys.argv[2], "groups.npz"))
nested = {}
for key in groups.files:
    group, name = key.split(":")
    nested.setdefault(group, {})[name] = groups[key]
coords = {"parity_of": ["even", "odd"], "unit": np.arange(100, 115)}
dims = {"w": ["parity_of"], "y": ["unit"], "parity": ["unit"]}
data = export.to_arviz(**nested, dims=dims, coords=coords, attrs={"note": "a run"})

import arviz as az
import xarray as xr

assert int(az.__version__.split(".")[0]) >= 1 and isinstance(data, xr.DataTree)
path = str(pathlib.Path(sys.argv[2], "run.nc"))
data.to_netcdf(path)
for tree in (data, az.from_netcdf(path)):
    assert set(tree.children) == set(nested)
    assert tree.attrs["note"] == "a run"
    for group, variables in nested.items():
        assert "created_at" not in tree[group].attrs
        assert tree[group].attrs["inference_library"] == "ppl-models"
        for name, values in variables.items():
            np.testing.assert_array_equal(tree[group][name].values, values)
    assert tree["posterior"]["w"].dims == ("chain", "draw", "parity_of")
    assert tree["log_likelihood"]["y"].dims == ("chain", "draw", "unit")
    assert tree["observed_data"]["y"].dims == ("unit",)
assert list(az.summary(data).index) == ["mu", "w[even]", "w[odd]"]
assert export.to_arviz({"x": np.zeros((100, 5))})["posterior"]["x"].shape == (100, 5)
print("elpd", az.loo(data).elpd)
"""


def test_arviz_1(tmp_path):
    python = os.environ.get("PPL_MODELS_ARVIZ1_PYTHON")
    if not python or not Path(python).exists():
        pytest.skip("PPL_MODELS_ARVIZ1_PYTHON names no interpreter with ArviZ 1.x")
    groups = model_groups()
    flat = {f"{group}:{name}": values for group, variables in groups.items() for name, values in variables.items()}
    np.savez(tmp_path / "groups.npz", **flat)
    command = [python, "-W", "error:More chains", "-c", ARVIZ_1, str(export.__file__), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    if OLD:
        assert float(done.stdout.split("elpd")[1]) == pytest.approx(az.loo(to_arviz(**groups)).elpd_loo, rel=1e-3)


def test_the_file_loads_without_torch_and_arviz():
    code = (
        "import sys, importlib.util as u; s = u.spec_from_file_location('export', sys.argv[1]);"
        "m = u.module_from_spec(s); s.loader.exec_module(m); print(sorted({'torch', 'arviz'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(export.__file__)], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "[]", done.stderr
