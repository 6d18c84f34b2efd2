"""Every tutorial runs from first to last cell, shortened, in a process of its own."""

import os
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("mlxtend")

ROOT = Path(__file__).resolve().parent.parent
TUTORIALS = sorted((ROOT / "tutorials").glob("*.py"))
SECONDS = 300  # a shortened tutorial takes well under 60 on an idle core

# Imports are half of what a shortened tutorial costs: a process that has made them is forked for each.
SERVER = """
import os, runpy, sys, traceback
import gpytorch, matplotlib.pyplot, numpy, pyro, torch
import inference, ppl_models, sde

for line in sys.stdin:
    path, folder = line.rstrip("\\n").split("\\t")
    child = os.fork()
    if child == 0:
        out = os.open(os.path.join(folder, "log"), os.O_WRONLY | os.O_CREAT)
        os.dup2(out, 1), os.dup2(out, 2), os.chdir(folder)
        os.environ["PPL_MODELS_OUT"] = folder
        failed = 0
        try:
            runpy.run_path(path, run_name="__main__")
        except BaseException:
            traceback.print_exc()
            failed = 1
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(failed)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[IO[str], IO[str]]]:
    environment = os.environ | {
        "MPLBACKEND": "Agg",
        "PPL_MODELS_SMOKE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    process = subprocess.Popen(
        [sys.executable, "-W", "default", "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdin is not None and process.stdout is not None
    yield process.stdin, process.stdout
    process.stdin.close()
    process.kill()
    process.wait()
    process.stdout.close()


def test_there_are_tutorials() -> None:
    assert TUTORIALS


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial_runs(path: Path, tmp_path: Path, server: tuple[IO[str], IO[str]]) -> None:
    requests, answers = server
    requests.write(f"{path}\t{tmp_path}\n")
    requests.flush()
    answered = bool(select.select([answers], [], [], SECONDS)[0])
    text = (tmp_path / "log").read_text() if (tmp_path / "log").is_file() else ""
    print(text)  # warnings are shown with -s, or where the test fails
    assert answered, f"no end after {SECONDS} s"
    assert answers.readline().strip() == "0", text[-3000:]
    assert "assert" in path.read_text()  # it ends in numbers, not only in pictures
    assert all(figure.stat().st_size for figure in (tmp_path / "tutorial").glob("*.png"))
    assert list((tmp_path / "tutorial").glob("*.png"))
