"""RESULTS.md is made from records: what a command printed, what a slow test printed and whether its bounds held."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import report, run
from tests import records

ROOT = Path(__file__).parent.parent


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Records and page in a folder of their own."""
    monkeypatch.setattr(report, "RECORDS", tmp_path / "records")
    monkeypatch.setattr(report, "HERE", tmp_path)
    (tmp_path / "goals.md").write_text("## Goals\n")
    return tmp_path


def page(folder: Path) -> str:
    report.write(folder / "RESULTS.md")
    return (folder / "RESULTS.md").read_text()


def test_results_are_those_of_the_records(tmp_path: Path) -> None:
    report.write(tmp_path / "RESULTS.md")
    made, kept = (tmp_path / "RESULTS.md").read_text(), (report.HERE / "RESULTS.md").read_text()
    assert made == kept, "RESULTS.md is not what its records say: run `python -m benchmarks.report`"


def test_a_record_shows_what_was_printed_and_where_it_is_from(folder: Path) -> None:
    (folder / "predictive.py").write_text("import torch, pyro")
    printed = '## Nats\n\n| a | b |\n|---|---|\n| 1 | 2 |\n{"mass": 0.99, "peer": "x"}\nat most 3\n'
    report.keep("toys", "Toys", "python -m benchmarks.predictive", printed, 61.4, False)
    shown = page(folder)
    record = json.loads((folder / "records" / "toys.json").read_text())
    for text in (
        "### Toys",
        "#### Nats",
        "| 1 | 2 |",
        "`python -m benchmarks.predictive`",
        "61 s",
        "at most 3",
        record["commit"],
    ):
        assert text in shown
    assert "torch 2" in shown and "pyro-ppl 1" in shown and "gpytorch" not in shown  # what it does not use
    assert "| mass | 0.99     |" in shown and "failed" not in shown
    report.keep("toys", "Toys", "python -m benchmarks.predictive", "", 1, True)
    assert "The command failed" in page(folder) and "at most 3" not in page(folder)


def of_a_test(name: str, **change: Any) -> Any:
    """A report of pytest's on a slow test."""
    given = {"nodeid": name, "keywords": {"slow": 1}, "when": "call", "failed": False, "skipped": False}
    given |= {"outcome": "passed", "user_properties": [("doc", "E2")], "capstdout": "3 nats | best\n", "duration": 7.0}
    return SimpleNamespace(**{**given, **change})


def test_slow_tests_leave_what_they_printed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_found", {})
    a, b = "tests/reproduce/test_x.py::test_a", "tests/reproduce/test_x.py::test_b"
    records.pytest_runtest_logreport(of_a_test(a))
    records.pytest_runtest_logreport(of_a_test(b, outcome="failed", failed=True))
    records.pytest_runtest_logreport(of_a_test("tests/x.py::quick", keywords={}))
    records.pytest_runtest_logreport(of_a_test("tests/x.py::no_data", outcome="skipped", skipped=True))
    records.pytest_runtest_logreport(of_a_test("tests/x.py::torn_down", when="teardown"))
    session: Any = SimpleNamespace(config=SimpleNamespace())
    records.pytest_sessionfinish(session)
    shown = (folder / "RESULTS.md").read_text()
    assert "`test_a`: E2 " in shown and "3 nats \\| best" in shown and " held " in shown
    assert "quick" not in shown and "no_data" not in shown and "torn_down" not in shown
    assert [line for line in shown.splitlines() if "`test_b`" in line and "**missed**" in line]
    monkeypatch.setattr(records, "_found", {})
    records.pytest_runtest_logreport(of_a_test(b, capstdout="now 2\n"))
    records.pytest_sessionfinish(session)
    shown = (folder / "RESULTS.md").read_text()
    assert "missed" not in shown and "now 2" in shown and "3 nats" in shown  # the other row stays
    printed = "of two\n| set | RMSE | NLL |\n|-----|------|-----|\n| a   | 2.8  |     |\n| b   |      | 2.4 |\n" * 2
    records.pytest_runtest_logreport(of_a_test(a, capstdout=printed))
    records.pytest_sessionfinish(session)
    row = next(line for line in (folder / "RESULTS.md").read_text().splitlines() if "`test_a`" in line)
    assert "of two; a: RMSE 2.8; b: NLL 2.4; of two; a: RMSE 2.8; b: NLL 2.4" in row and row.count("| ") == 5
    assert f"{report.provenance()['commit']}, {report.provenance()['machine'].split(', load')[0]}" in row


def test_a_command_is_run_and_kept(folder: Path) -> None:
    assert run.run("words", "Words", "python -c \"import sys; print('result'); print('progress', file=sys.stderr)\"")
    assert "result" in page(folder) and "\nprogress" not in page(folder)
    assert not run.run("words", "Words", 'python -c "raise SystemExit(3)"')
    assert "The command failed" in page(folder)


def test_every_command_and_record_has_its_module() -> None:
    known = run.commands()
    assert len(known) > 20
    for _, command in known.values():
        assert importlib.util.find_spec(command.split()[2]) is not None, command
    made = {path.stem for path in report.RECORDS.glob("*.json")} - {report.TESTS}
    assert made <= known.keys(), "records of no command"


def test_names_that_are_unknown_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["run", "toys"])
    with pytest.raises(SystemExit):
        run.main()
    assert "no comparison is called toys" in capsys.readouterr().err
