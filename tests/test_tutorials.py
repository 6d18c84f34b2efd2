"""Every tutorial runs from first to last cell, shortened, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("mlxtend")

ROOT = Path(__file__).resolve().parent.parent
TUTORIALS = sorted((ROOT / "tutorials").glob("*.py"))
SECONDS = 300  # a shortened tutorial takes well under 60 on an idle core


def test_there_are_tutorials() -> None:
    assert TUTORIALS


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial_runs(path: Path, tmp_path: Path) -> None:
    environment = os.environ | {
        "MPLBACKEND": "Agg",
        "PPL_MODELS_OUT": str(tmp_path),
        "PPL_MODELS_SMOKE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    finished = subprocess.run(
        [sys.executable, "-W", "default", str(path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=SECONDS,
    )
    print(finished.stdout, finished.stderr, sep="\n")  # warnings are shown with -s, or where the test fails
    assert finished.returncode == 0, finished.stderr
    assert "assert" in path.read_text()  # it ends in numbers, not only in pictures
    assert all(figure.stat().st_size for figure in (tmp_path / "tutorial").glob("*.png"))
    assert list((tmp_path / "tutorial").glob("*.png"))
