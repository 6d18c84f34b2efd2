"""How a measurement is kept: seconds of repeated calls, a table for people, a JSON file with the machine beside it."""

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["commit", "machine", "markdown_table", "one_core", "progress", "save", "spread"]


def one_core() -> None:
    """Keep this process on one core, so that a peer with its own thread pool is compared like with like."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def progress(*said: object) -> None:
    """Say something on the way; what a command prints is its result."""
    print(*said, file=sys.stderr, flush=True)


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Median, and the smallest and largest in brackets, to ``digits`` significant digits."""

    def text(value: float) -> str:
        rounded = float(f"{value:.{digits}g}")
        return f"{rounded:,.0f}" if abs(rounded) >= 100 else f"{rounded:.{digits}g}"

    return f"{text(statistics.median(values))} [{text(min(values))}, {text(max(values))}]"


def markdown_table(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows with the same keys as a Markdown table."""
    columns = list(rows[0])
    lines = [columns, *([str(row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    cells = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    head, *body = ["| " + " | ".join(line) + " |" for line in cells]
    return "\n".join([head, "|" + "|".join("-" * (width + 2) for width in widths) + "|", *body])


def save(path: Path, rows: Sequence[Mapping[str, Any]], packages: Sequence[str], *, quiet: bool = False) -> None:
    """Write ``rows`` as JSON with the date, the commit, the machine and the versions that they were measured with."""
    path.parent.mkdir(parents=True, exist_ok=True)
    context: dict[str, Any] = {"date": datetime.now(UTC).date().isoformat(), "commit": commit(), "machine": machine()}
    context["versions"] = {name: _version(name) for name in packages}
    path.write_text(json.dumps({**context, "rows": list(rows)}, indent=1) + "\n")
    if not quiet:
        progress(f"{context['date']}, commit {context['commit']}, {context['machine']}\nwritten to {path}")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str:
    """The commit of this tree, with "-dirty" after it if a file other than the records has changed since."""

    def git(*arguments: str) -> str:
        found = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
        return found.stdout.strip()

    changed = git("status", "--porcelain", "--", ":/", ":!records", ":!RESULTS.md")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("-dirty" if changed else "")


def machine() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    processor = models[0] if models else platform.processor()
    load = f", load {os.getloadavg()[0]:.1f} at the end" if hasattr(os, "getloadavg") else ""
    return f"{processor}, {os.cpu_count()} cores{load}, Python {platform.python_version()}"
