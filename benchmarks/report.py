"""RESULTS.md, made from what the commands printed.

    python -m benchmarks.report

``benchmarks.run`` and ``make reproduce`` leave a record of each command and of each slow test in
``benchmarks/records``: what it printed, with the date, the commit, the machine and the versions.  This module writes
them out, after the goals that ``goals.md`` compares them with.  ``FINDINGS.md`` holds what was made of the figures.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import distributions
from itertools import zip_longest
from pathlib import Path
from typing import Any

from benchmarks.record import commit, machine, markdown_table

__all__ = ["PEERS", "RECORDS", "keep", "keep_tests", "provenance", "write"]

HERE = Path(__file__).parent
RECORDS = HERE / "records"
TESTS = "reproduce"  # the record of slow tests
PEERS = (
    *("torch", "pyro-ppl", "torchsde", "gpytorch", "numpy", "jax", "numpyro", "blackjax", "nutpie", "posteriors"),
    *("scikit-learn", "econml", "causalml", "diffrax", "fbm", "stochastic", "torchdeq", "pgmax", "rbms", "libcirkit"),
    *("torchebm", "zuko", "normflows"),
)
IMPORTED_AS = {"pyro-ppl": "pyro", "scikit-learn": "sklearn", "libcirkit": "cirkit"}
INTRODUCTION = (
    "Made by `python -m benchmarks.report`, which `make bench` and `make reproduce` end with: change the records, not "
    "this page. First the goals and what was reached; then each comparison with peers and each slow check, with the "
    "command that makes it anew. What was tried, why figures are as they are, and older ones: [Findings](FINDINGS.md)."
)
AGAIN = (
    "`make reproduce` runs all of them, and `python -m pytest -m slow --timeout 0 -p tests.records FILE::CHECK` one. A "
    "check that is not here has not been run since they are recorded."
)


def provenance() -> dict[str, str]:
    """Date, commit and machine of now."""
    return {"date": datetime.now(UTC).date().isoformat(), "commit": commit(), "machine": machine()}


def keep(name: str, title: str, command: str, printed: str, seconds: float, failed: bool) -> None:
    """Keep what a command printed, in place of what it printed the last time."""
    installed = {d.metadata["Name"].lower(): d.version for d in distributions()}
    record = {
        "title": title,
        "command": command,
        **provenance(),
        "versions": {peer: installed[peer] for peer in PEERS if peer in installed},
        "seconds": round(seconds),
        "failed": failed,
        "printed": printed.splitlines(),
    }
    _save(name, record)


def keep_tests(found: Mapping[str, Mapping[str, Any]]) -> None:
    """Keep what slow tests printed and whether their bounds held, by the name of the test; others stay as they were."""
    new = {name: {**row, **provenance()} for name, row in found.items()}
    _save(TESTS, dict(sorted({**_read(TESTS), **new}.items())))


def _read(name: str) -> dict[str, Any]:
    path = RECORDS / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def _save(name: str, record: Mapping[str, Any]) -> None:
    RECORDS.mkdir(exist_ok=True)
    (RECORDS / f"{name}.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def write(path: Path | None = None) -> None:
    """Write the goals and all records, by default to ``RESULTS.md``."""
    parts = ["# Results", INTRODUCTION, (HERE / "goals.md").read_text().strip(), "## Side by side with peers"]
    for name in sorted(file.stem for file in RECORDS.glob("*.json") if file.stem != TESTS):
        record = _read(name)
        parts += [f"### {record['title']}", _origin(record), *_shown(record["printed"])]
    parts += ["## Slow checks", AGAIN, *_checks(_read(TESTS))]
    (path or HERE / "RESULTS.md").write_text("\n\n".join(parts) + "\n")


def _origin(record: Mapping[str, Any]) -> str:
    source = HERE / f"{record['command'].split()[2].split('.')[-1]}.py"
    text = " ".join([*record["printed"], source.read_text() if source.exists() else ""])
    words = set(re.findall(r"\w+", text))
    used = {p: version for p, version in record["versions"].items() if words & {p, IMPORTED_AS.get(p, p)}}
    versions = ", ".join(f"{peer} {version}" for peer, version in used.items())
    return (
        f"`{record['command']}`: {record['seconds']:,} s, {record['date']}, commit {record['commit']}, "
        f"{record['machine']}, {versions}."
        f"{' **The command failed.**' if record['failed'] else ''}"
    )


def _shown(printed: Iterable[str]) -> list[str]:
    """Paragraphs: Markdown as it is, its headings deeper, and a JSON line as a table."""
    lines: list[str] = []
    for line in printed:
        if line.startswith("{"):
            rows = [{"what": key, "measured": value} for key, value in json.loads(line).items()]
            lines += ["", markdown_table(rows), ""]
        else:
            lines.append(f"#### {line.lstrip('# ')}" if line.startswith("#") else line)
    return [part.strip() for part in "\n".join(lines).split("\n\n") if part.strip()]


def _checks(tests: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A table for each file of tests."""
    shown = []
    for file in dict.fromkeys(name.split("::")[0] for name in tests):
        mine = {name.split("::", 1)[1]: row for name, row in tests.items() if name.split("::")[0] == file}
        rows = [
            {
                "check": f"`{name}`: {row['doc']}" if row["doc"] else f"`{name}`",
                "printed": "; ".join(_flat(row["printed"])).replace("|", "\\|") or "-",
                "bounds": {"passed": "held", "failed": "**missed**"}.get(row["outcome"], f"**{row['outcome']}**"),
                "seconds": f"{row['seconds']:,.0f}",
                "date, commit, machine": f"{row['date']}, {row['commit']}, {row['machine'].split(', load')[0]}",
            }
            for name, row in mine.items()
        ]
        shown += [f"### {file}", markdown_table(rows)]
    return shown


def _flat(printed: Sequence[str]) -> list[str]:
    """Lines for one cell: of a Markdown table a line for each row, its cells after their columns' names."""
    lines: list[str] = []
    columns: list[str] = []
    for line, after in zip_longest(printed, printed[1:], fillvalue=""):
        cells = [cell.strip() for cell in line.strip()[1:-1].split("|")]
        if not line.startswith("|"):
            lines.append(line)
        elif after.startswith("|-"):
            columns = cells
        elif not line.startswith("|-"):
            named = [f"{name} {cell}" for name, cell in zip(columns[1:], cells[1:], strict=True) if cell]
            lines.append(f"{cells[0]}: {', '.join(named)}")
    return lines


if __name__ == "__main__":
    write()
