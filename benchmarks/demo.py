"""All models on small data, in one table, each beside a truth or a baseline.

    make demo

Each file of ``benchmarks/demos`` is one entry: its ``run(out, quick)`` fits a model, may draw figures into ``out``, and
returns rows of the table.
"""

import argparse
import importlib
import pkgutil
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks import demos, record

__all__ = ["Row", "main"]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        model: the class.
        data: what it was fitted to.
        metric: what was measured, and which way is better.
        value: the model's.
        beside: the truth, or a baseline's value with its name.
    """

    model: str
    data: str
    metric: str
    value: str
    beside: str


def entries() -> dict[str, Callable[[Path, bool], list[Row]]]:
    """Name to ``run`` of each demonstration."""
    names = [module.name for module in pkgutil.iter_modules(demos.__path__)]
    return {name: importlib.import_module(f"{demos.__name__}.{name}").run for name in names}


def main(arguments: list[str] | None = None) -> list[dict[str, str]]:
    """Run the demonstrations; returns the table's rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="which; all by default")
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it runs")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    found = entries()
    if unknown := set(options.names) - found.keys():
        parser.error(f"no demonstration is called {sorted(unknown)}; there are {sorted(found)}")
    table: list[dict[str, str]] = []
    failed = []
    for name in options.names or found:
        start = time.perf_counter()
        try:
            rows = found[name](options.out, options.quick)
        except Exception:
            traceback.print_exc()
            failed.append(name)
            continue
        seconds = time.perf_counter() - start
        print(f"{name}: {seconds:.0f} s", flush=True)
        for number, row in enumerate(rows):
            table.append({**asdict(row), "seconds": f"{seconds:.0f}" if number == 0 else ""})
    print(f"\n{record.markdown_table(table)}\n" if table else "")
    print("Figures: " + ", ".join(str(path) for path in sorted(options.out.glob("*.png"))))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")
    return table


if __name__ == "__main__":
    torch.set_num_threads(1)  # small tensors: a second thread costs more than it brings
    main()
