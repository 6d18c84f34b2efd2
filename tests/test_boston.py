"""The comparison on Boston housing runs from data to figures, in small: the same code, with few steps."""

import math
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("mlxtend")

from benchmarks import boston


@pytest.mark.changes_globals("rng_python")  # joblib, which scikit-learn imports when it is first used, draws from it
@pytest.mark.filterwarnings("ignore::inference.SamplerWarning")  # chains this short have not mixed
def test_boston_writes_table_figures_and_arviz_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arviz = pytest.importorskip("arviz")
    scores = boston.main(["--quick", "--splits", "2", "--out", str(tmp_path)])

    assert len(scores) == 5
    assert all(math.isfinite(value) for results in scores.values() for result in results for value in result.values())
    # Even from one start an exact process beats a linear model on these data by far.
    assert scores["exact GP, ML-II (gpytorch)"][0]["RMSE"] < 2.5 < scores["Bayesian ridge (scikit-learn)"][0]["RMSE"]
    assert {"prior_functions.png", "calibration.png", "ranks.png"} <= {path.name for path in tmp_path.iterdir()}
    assert "| method" in capsys.readouterr().out
    data = arviz.from_netcdf(str(tmp_path / "boston.nc"))
    assert dict(data.posterior.sizes)["chain"] == 4
    assert dict(data.observed_data.sizes)["point"] == 455
