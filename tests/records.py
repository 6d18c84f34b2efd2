"""A plugin of pytest that keeps what slow tests print, and whether their bounds held, for ``benchmarks/RESULTS.md``.

python -m pytest -m slow --timeout 0 -p tests.records
"""

from typing import Any

import pytest

from benchmarks import report

_found: dict[str, dict[str, Any]] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        doc = (getattr(getattr(item, "obj", None), "__doc__", None) or "").strip().split("\n\n")[0]
        item.user_properties.append(("doc", " ".join(doc.split())))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if "slow" not in report.keywords or (report.when != "call" and not report.failed):
        return
    outcome = "xfailed" if hasattr(report, "wasxfail") and report.skipped else report.outcome
    if outcome == "skipped":  # no data, no figure
        return
    _found[report.nodeid] = {
        "doc": dict(report.user_properties).get("doc", ""),
        "printed": [line.strip() for line in report.capstdout.splitlines() if line.strip()],
        "outcome": outcome,
        "seconds": report.duration,
    }


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _found and not hasattr(session.config, "workerinput"):
        report.keep_tests(_found)
        report.write()
