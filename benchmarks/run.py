"""Run the comparisons with peers, and keep what each prints as a record.

    python -m benchmarks.run                             all of them, hours; `make bench` does that
    python -m benchmarks.run cate-stripes ebm-speed      some
    python -m benchmarks.run --list                      their names and commands

Which there are stands in ``RUNS`` of each module here.  Each runs in a process of its own.  What it prints is its
result, and goes to ``benchmarks/records``; what it says on the way goes to the error stream.  A command that fails
leaves a record that says so, and the others go on.
"""

import argparse
import ast
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import report

__all__ = ["commands", "run"]


def commands() -> dict[str, tuple[str, str]]:
    """Titles and commands by name, read from the sources: to import them takes the peers."""
    found: dict[str, tuple[str, str]] = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "RUNS":
                for name, (title, arguments) in ast.literal_eval(node.value).items():
                    found[name] = title, f"python -m benchmarks.{path.stem} {arguments}".strip()
    return found


def run(name: str, title: str, command: str) -> bool:
    """Run one, and keep its record.

    Returns:
        Whether it ended well.
    """
    begin = time.monotonic()
    arguments = [sys.executable, *shlex.split(command)[1:]]
    done = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    report.keep(name, title, command, done.stdout, time.monotonic() - begin, done.returncode != 0)
    report.write()
    return done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="which; all by default")
    parser.add_argument("--list", action="store_true", help="print names and commands")
    given = parser.parse_args()
    known = commands()
    unknown = set(given.names) - known.keys()
    if unknown:
        parser.error(f"no comparison is called {', '.join(sorted(unknown))}; --list prints their names")
    if given.list:
        print("\n".join(f"{name:16} {command}" for name, (_, command) in known.items()))
        return
    failed = []
    for name in given.names or known:
        print(f"{name}: {known[name][0]}", file=sys.stderr, flush=True)
        if not run(name, *known[name]):
            failed.append(name)
    if failed:
        sys.exit(f"failed, as their records say: {', '.join(failed)}")


if __name__ == "__main__":
    main()
