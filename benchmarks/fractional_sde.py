"""Fractional SDEs beside their peers: gradient steps against torchsde, exact noise against fbm and stochastic.

    python -m benchmarks.fractional_sde --out out

Gradient steps: a posterior SDE of two 200-200 networks, batch 32, D = 4, K = 5, over [0, 1] with speeds up to 20, by
``sde.solve`` and by torchsde's solvers on the same augmented SDE (``sde.solve_torchsde``).  The weak error is that of
Var X(1) with zero networks, for which it is known: a fast step that needs more steps for the same error is not faster.
Memory: growth of the resident set over a gradient step with segment checkpointing. Cost: seconds a gradient step over
K, N and D. Times are of the processor, one thread, so that other work on the machine counts little.  Peers that are not
installed are left out and named.
"""

import argparse
import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.record import markdown_table, one_core, progress, save, spread
from sde import (
    MarkovFractionalBrownianMotion,
    Step,
    StepNetwork,
    coarsen,
    fractional_gaussian_noise,
    solve,
    solve_torchsde,
    uniform_grid,
)

RUNS = {  # of `benchmarks.run`: name, title, arguments
    "sde-noise": ("Fractional SDEs: exact noise", "--only noise"),
    "sde-gradients": ("Fractional SDEs: gradient steps", "--only gradients"),
    "sde-weak": ("Fractional SDEs: weak errors of solvers", "--only weak"),
    "sde-memory": ("Fractional SDEs: memory of a long solve", "--only memory"),
    "sde-cost": ("Fractional SDEs: cost against size", "--only cost"),
}

BATCH, DIM, PROCESSES = 32, 4, 5


class Drift(nn.Module):
    """200-200 tanh of the state;"""

    def __init__(self, inputs: int, dim: int) -> None:
        super().__init__()
        self.net = StepNetwork([inputs, 200, 200, dim])  # under torchsde the nn.Sequential that it is

    def forward(self, time: Any, x: Tensor) -> Tensor:
        """``(B, D)``."""
        out: Tensor = self.net(x)
        return out


class Control(Drift):
    """The same of state and processes."""

    def __init__(self, dim: int, processes: int) -> None:
        super().__init__(dim * (1 + processes), dim)

    def forward(self, step: Step, x: Tensor, v: Tensor) -> Tensor:  # type: ignore[override]
        """``(B, D)``."""
        out: Tensor = self.net(torch.cat([x, v.flatten(1)], -1))
        return out


def noise_of(processes: int) -> MarkovFractionalBrownianMotion:
    return MarkovFractionalBrownianMotion(0.3, processes, 20.0, 1.0, "rl", "gamma", "geometric")


def solver(name: str, steps: int, processes: int) -> Callable[..., Any]:
    """A function of (drift, control, x0, seed) that returns a path."""
    noise, grid = noise_of(processes), uniform_grid(1.0, steps)
    if name == "here":
        made = noise.discretise(grid)
        return lambda drift, control, x0, seed: solve(
            drift, 1.0, noise, made, x0, control=control, seed=seed, keep=[steps],
            kl_rule="chain" if control is None else "trapezoid",
        )  # fmt: skip
    method, _, adjoint = name.partition(", ")
    return lambda drift, control, x0, seed: solve_torchsde(
        drift, 1.0, noise, [0.0, 1.0], x0, step_size=1 / steps, control=control, method=method,
        adjoint=bool(adjoint), seed=seed,
    )  # fmt: skip


def gradient_seconds(
    name: str, steps: int, repeats: int, dim: int = DIM, processes: int = PROCESSES, backward: bool = True
) -> list[float]:
    """Seconds of forward and backward, or of paths alone."""
    torch.manual_seed(0)
    drift, control = Drift(dim, dim), Control(dim, processes)
    run, x0 = solver(name, steps, processes), torch.zeros(BATCH, dim)
    out = []
    for i in range(repeats + 1):
        started = time.process_time()
        with torch.set_grad_enabled(backward):
            path = run(drift, control, x0, i)
        if backward:
            (path.x[-1].square().sum() + path.kl.sum()).backward()
        if i:
            out.append(time.process_time() - started)
    return out


def weak_error(name: str, steps: int, paths: int = 20_000) -> tuple[float, float]:
    """Relative error of Var X(1) and its standard error, without drift and control."""
    truth = float(noise_of(PROCESSES).covariance([1.0])[0, 0])
    with torch.no_grad():
        path = solver(name, steps, PROCESSES)(lambda t, x: torch.zeros_like(x), None, torch.zeros(paths, 1), 1)
    return float(path.x[-1].var()) / truth - 1, (2 / paths) ** 0.5


def gradients(repeats: int) -> list[dict[str, Any]]:
    rows = []
    for name, steps in (
        ("here", 50), ("here", 25), ("here", 100), ("euler", 100), ("midpoint", 100), ("reversible_heun", 100),
        ("reversible_heun, adjoint", 100), ("euler", 400), ("midpoint", 50), ("euler", 50),
    ):  # fmt: skip
        seconds = gradient_seconds(name, steps, repeats)
        alone = gradient_seconds(name, steps, repeats, backward=False) if "adjoint" not in name else []
        error, se = weak_error(name.partition(", ")[0], steps)
        label = "sde.solve, exact steps" if name == "here" else f"torchsde {name}"
        rows.append({"solver": label, "steps": steps, "seconds a gradient step": spread(seconds),
                     "paths a second": spread([BATCH / s for s in alone]) if alone else "",
                     "error of Var X(1)": f"{error:+.2%} (s.e. {se:.1%})"})  # fmt: skip
        progress(rows[-1])
    return rows


def weak(paths: int = 1000, finest: int = 400) -> list[dict[str, Any]]:
    """Weak errors with the networks at work (times 5, so that they move the path), all grids on one Brownian path.

    The truth is that of the most exact steps, its KL by the trapezoidal rule.  Without networks the law of X(1) under a
    scheme is known: its variance's error is exact, not simulated.
    """
    noise = noise_of(PROCESSES)
    weights, speeds, truth = noise.weights, noise.speeds, float(noise.covariance([1.0])[0, 0])

    def variance(steps: int, method: str) -> float:
        z, held = speeds / steps, torch.zeros(PROCESSES, PROCESSES, dtype=torch.float64)
        decay, gain = (1 - z, torch.ones_like(z)) if method == "euler" else (1 - z + z**2 / 2, 1 - z / 2)
        for _ in range(steps):
            held = torch.outer(decay, decay) * held + torch.outer(gain, gain) / steps
        return float(weights @ held @ weights) / truth - 1

    torch.manual_seed(0)
    drift, control = Drift(DIM, DIM), Control(DIM, PROCESSES)
    grid = noise.discretise(uniform_grid(1.0, finest))
    source = torch.Generator().manual_seed(0)
    normals = torch.randn(finest, paths, DIM, grid.rank, generator=source, dtype=torch.float64)
    increments, rows, best = grid.increments(normals).float(), [], None
    with torch.no_grad():
        while len(grid.steps) >= 25:
            steps = len(grid.steps)
            for scheme, label in (("euler", "sde.solve, exact steps"), ("plain_euler", "Euler (torchsde's)")):
                chain, path = (
                    solve(
                        lambda t, x: 5 * drift(t, x), 1.0, noise, grid, torch.zeros(paths, DIM),
                        control=lambda step, x, v: 5 * control(step, x, v), increments=increments, scheme=scheme,
                        keep=[steps], kl_rule=rule,
                    )
                    for rule in ("chain", "trapezoid")
                )  # fmt: skip
                found = torch.stack([path.x[-1].double().square(), chain.kl.double(), path.kl.double()]).sum(-1)
                best = found[[0, 2, 2]] if best is None else best
                gap = (found - best) / best.mean(-1, keepdim=True)
                texts = [f"{float(g.mean()):+.2%} ({float(g.std()) / paths**0.5:.2%})" for g in gap]
                exact = 0.0 if scheme == "euler" else variance(steps, "euler")
                rows.append({"scheme": label, "steps": steps, "Var X(1), no networks": f"{exact:+.3%}",
                             "E X(1)^2 (s.e.)": texts[0], "KL (s.e.)": texts[1],
                             "KL, trapezoid (s.e.)": texts[2]})  # fmt: skip
            if steps % 2:
                break
            increments, grid = coarsen(increments, grid), noise.discretise(grid.times[::2])
    rows += [
        {"scheme": "midpoint (torchsde's)", "steps": n, "Var X(1), no networks": f"{variance(n, 'midpoint'):+.3%}",
         "E X(1)^2 (s.e.)": "", "KL (s.e.)": "", "KL, trapezoid (s.e.)": ""}
        for n in (100, 50, 25)
    ]  # fmt: skip
    return rows


def exact_noise(length: int = 1000, paths: int = 500, repeats: int = 5) -> list[dict[str, Any]]:
    rows = []

    def add(name: str, run: Callable[[], Any], count: int, times: int) -> None:
        run()
        found = []
        for _ in range(times):
            started = time.process_time()
            run()
            found.append(1e3 * (time.process_time() - started) / count)
        rows.append({"sampler": name, "ms a path": spread(found)})
        progress(rows[-1])

    add("sde.fractional_gaussian_noise", lambda: fractional_gaussian_noise(0.7, length, paths, seed=0), paths, repeats)
    if find_spec("fbm"):
        from fbm import FBM

        process = FBM(n=length, hurst=0.7, length=1, method="daviesharte")
        add("fbm 0.3.0, daviesharte", process.fgn, 1, 30)
        hosking = FBM(n=length, hurst=0.7, length=1, method="hosking")
        add("fbm 0.3.0, hosking", hosking.fgn, 1, 1)
    else:
        print("fbm is not installed")
    if find_spec("stochastic"):
        from stochastic.processes.noise import FractionalGaussianNoise

        noise = FractionalGaussianNoise(hurst=0.7, t=1)
        add("stochastic 0.6.0", lambda: noise.sample(length), 1, 100)
    else:
        print("stochastic is not installed (it asks for numpy below 2: pip install --no-deps stochastic==0.6.0)")
    return rows


def peak_growth(steps: int, segments: str | None) -> float:
    """Growth of this process's largest resident set over a gradient step, in bytes, after a short one to warm up."""
    noise = MarkovFractionalBrownianMotion(0.7, 5, kind="rl")
    drift = StepNetwork([2, 64, 2])

    def once(count: int) -> None:
        path = solve(
            lambda t, x: drift(x), 1.0, noise, uniform_grid(1.0, count), torch.zeros(256, 2), seed=0, keep=[count],
            checkpoint_segments=segments,
        )  # fmt: skip
        path.x.sum().backward()

    once(16)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    once(steps)
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def memory() -> list[dict[str, Any]]:
    """A process each, as a peak is never taken back, whose allocator gives back what is free (glibc's settings)."""
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "32768", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
    rows = []
    for segments in (None, "sqrt"):
        for steps in (100, 400, 1600, 10_000) if segments else (100, 400, 1600):
            with multiprocessing.get_context("spawn").Pool(1, torch.set_num_threads, (1,)) as pool:
                grown = pool.apply(peak_growth, (steps, segments))
            rows.append({"checkpoint_segments": segments, "steps": steps, "growth, MB": f"{grown / 1e6:.1f}"})
            progress(rows[-1])
    return rows


def cost(out: Path | None, repeats: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for label, values in (("K", (2, 5, 10, 20)), ("N", (25, 50, 100, 200)), ("D", (1, 4, 16, 64))):
        for value in values:
            setting = {"steps": 50, "dim": DIM, "processes": PROCESSES}
            setting[{"K": "processes", "N": "steps", "D": "dim"}[label]] = value
            seconds = gradient_seconds("here", repeats=repeats, backward=True, **setting)
            rows.append({"varied": label, "value": value, "seconds": float(np.median(seconds))})
    if out is not None and find_spec("matplotlib"):
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(1, 3, figsize=(8, 2.6), sharey=True)
        names = {"K": "processes K", "N": "solver steps N", "D": "dimensions D"}
        for axis, label in zip(axes, "KND", strict=True):
            part = [row for row in rows if row["varied"] == label]
            axis.plot([row["value"] for row in part], [1e3 * row["seconds"] for row in part], "o-", color="#0072B2")
            axis.set(xscale="log", xlabel=names[label])
            axis.set_xticks([row["value"] for row in part], [str(row["value"]) for row in part])
            axis.minorticks_off()
        axes[0].set_ylim(0, 1.1e3 * max(row["seconds"] for row in rows))
        axes[0].set_ylabel("ms a gradient step")
        out.mkdir(parents=True, exist_ok=True)
        figure.savefig(out / "fractional_sde_cost.png", dpi=150, bbox_inches="tight")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=("gradients", "weak", "noise", "memory", "cost"))
    arguments = parser.parse_args()
    one_core()
    torch.set_num_threads(1)
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "noise": exact_noise,
        "gradients": lambda: gradients(arguments.repeats),
        "weak": weak,
        "memory": memory,
        "cost": lambda: cost(arguments.out, arguments.repeats),
    }
    for name, part in parts.items():
        if arguments.only in (None, name):
            rows = part()
            print(f"\n{name}\n{markdown_table(rows)}\n", flush=True)
            if arguments.out is not None:
                save(arguments.out / f"fractional_sde_{name}.json", rows, ["torch", "torchsde", "fbm", "stochastic"])


if __name__ == "__main__":
    main()
