"""Simulation-based calibration of the models with a proper prior, each through its default engine, in one batched run.

    python -m benchmarks.calibration [names] [--out out] [--replications 500]

Each file of ``benchmarks/calibrations`` is one model: its ``calibrate(num_replications, seed)`` returns the ranks.
Prints, for each quantity, the p-value of a chi-square test of uniform ranks and the coverage of central intervals, and
draws the ranks' distribution functions.
"""

import argparse
import importlib
import pkgutil
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import calibrations, record
from inference.calibration import Calibration

RUNS = {  # of `benchmarks.run`: name, title, arguments
    "calibration": ("Simulation-based calibration", ""),
}

_LEVELS = (0.5, 0.8, 0.9)
_SHOWN = ("f(x)", "effect(m)", "mu", "hurst", "scale", "theta", "constant", "noise_std", "log_likelihood")

MODELS: dict[str, Callable[..., Calibration]] = {
    name: importlib.import_module(f"{calibrations.__name__}.{name}").calibrate
    for _, name, _ in pkgutil.iter_modules(calibrations.__path__)
}


def coverage(found: Calibration, level: float) -> dict[str, float]:
    """Share of replications whose truth lies in the central interval of that many draws, the mean over a quantity's
    scalars.
    """
    half = (1 - level) / 2 * (found.num_draws + 1)
    inside = {name: (r >= half - 0.5) & (r <= found.num_draws - half + 0.5) for name, r in found.ranks.items()}
    return {name: float(hit.double().mean()) for name, hit in inside.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(MODELS), metavar="names", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--replications", type=int, default=500)
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.names:
        begin = time.process_time()
        found = MODELS[name](given.replications)
        seconds = time.process_time() - begin
        print(f"\n## {name}: {seconds:.0f} s of processor time, p-value of all {found.p_value():.3f}\n")
        values, shares = found.chi_square(), {level: coverage(found, level) for level in _LEVELS}
        rows = [
            {
                "quantity": quantity,
                "smallest p": f"{float(p.min()):.3f}",
                "autocorrelation": f"{float(found.autocorrelation[quantity].max()):+.2f}",
                **{f"{level:.0%} intervals cover": f"{shares[level][quantity]:.3f}" for level in _LEVELS},
            }
            for quantity, p in values.items()
        ]
        print(record.markdown_table(rows), flush=True)
        figure = found.plot([n for n in _SHOWN if n in values] or None)
        figure.savefig(given.out / f"calibration_{name}.png", dpi=130)


if __name__ == "__main__":
    main()
