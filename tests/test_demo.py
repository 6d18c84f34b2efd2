"""Each demonstration runs, shortened: the same code as ``make demo``."""

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("mlxtend")

from benchmarks import demo


@pytest.mark.changes_globals("rng_python")  # joblib, which scikit-learn imports when it is first used, draws from it
@pytest.mark.filterwarnings("ignore::inference.SamplerWarning")  # runs this short have not mixed
@pytest.mark.parametrize("name", sorted(demo.entries()))
def test_a_demonstration_fills_its_rows(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = demo.main([name, "--quick", "--out", str(tmp_path)])
    assert rows and all(row["metric"] and row["value"] and row["beside"] for row in rows)
    assert "nan" not in "".join(row["value"] for row in rows)
    assert rows[0]["model"] and rows[0]["data"] and rows[0]["seconds"]
    assert list(tmp_path.glob("*.png")) and "| model" in capsys.readouterr().out


def test_an_unknown_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        demo.main(["nothing"])
    assert "no demonstration is called" in capsys.readouterr().err
