"""Milliseconds for one potential and its gradient, 64 chains: Pyro's own loop against recorded and compiled graphs.

    python -m benchmarks.potential

The models are eight schools and a logistic regression of 1,000 rows and 10 columns.  Pyro evaluates chain by chain,
with and without its JIT; ``inference.Potential`` evaluates all chains at once.  One core, medians of repeats;
compilation is not counted.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.mcmc.util import initialize_model
from pyro.ops.integrator import potential_grad

from benchmarks import record
from inference.potential import LogDensity, Potential, Program

RUNS = {  # of `benchmarks.run`: name, title, arguments
    "potential": ("A potential and its gradient", ""),
}

CHAINS = 64
Model = Callable[..., None]


def eight_schools() -> tuple[Model, tuple[torch.Tensor, ...]]:
    """Rubin (1981), non-centred."""
    effect = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    error = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

    def model(effect: torch.Tensor, error: torch.Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("school", 8):
            eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
            pyro.sample("effect", dist.Normal(mu + tau * eta, error), obs=effect)

    return model, (effect, error)


def logistic() -> tuple[Model, tuple[torch.Tensor, ...]]:
    """Simulated logistic regression, 1,000 x 10."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((1000, 10))
    y = rng.random(1000) < 1 / (1 + np.exp(-x @ rng.standard_normal(10)))

    def model(x: torch.Tensor, y: torch.Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[-1]), 2.5).to_event(1))
        b = pyro.sample("b", dist.Normal(0.0, 5.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=x @ w + b), obs=y)

    return model, (torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32))


def milliseconds(call: Callable[[], object], repeats: int, seconds: float = 1.0) -> list[float]:
    """Milliseconds a call, in ``repeats`` stretches of about ``seconds``."""
    call()
    start = time.perf_counter()
    call()
    calls = max(1, round(seconds / max(time.perf_counter() - start, 1e-6)))
    result = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        result.append((time.perf_counter() - start) / calls * 1e3)
    return result


def measure(name: str, model: Model, args: tuple[torch.Tensor, ...], repeats: int) -> list[dict[str, Any]]:
    """All four ways on one model, from the same positions, after a check that the gradients agree."""
    density = LogDensity(model, args)
    potential = Potential(density)
    z = torch.tensor(np.random.default_rng(0).standard_normal((CHAINS, potential.dim)) * 0.5, dtype=torch.float32)
    chains = [{site: value[0] for site, value in density.unflatten(row[None]).items()} for row in z]
    compiled = Program(potential.value_and_grad, compile=True)

    def loop(potential_fn: Callable[..., torch.Tensor]) -> Callable[[], list[Any]]:
        return lambda: [potential_grad(potential_fn, dict(chain)) for chain in chains]

    ways: dict[str, Callable[[], Any]] = {}
    for way, jit in (("Pyro, loop over chains", False), ("Pyro with its JIT, loop over chains", True)):
        ways[way] = loop(initialize_model(model, args, jit_compile=jit, skip_jit_warnings=True)[1])
    ways["inference, recorded"] = lambda: potential.value_and_grad(z)
    ways["inference, recorded and compiled"] = lambda: compiled(z)

    reference = potential.value_and_grad(z)[1]
    for call in ways.values():
        result = call()
        if isinstance(result, list):
            gradient = density.flatten({s: torch.stack([grads[s] for grads, _ in result]) for s in chains[0]})
        else:
            gradient = result[1]
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-4)
    return [{"model": name, "way": way, "ms": milliseconds(call, repeats)} for way, call in ways.items()]


def main() -> None:
    """Measure both models and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    record.one_core()
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)

    rows: list[dict[str, Any]] = []
    with pyro.validation_enabled(False):
        for name, build in (("eight schools", eight_schools), ("logistic 1000 x 10", logistic)):
            rows += measure(name, *build(), options.repeats)
    label = f"ms for {CHAINS} gradients"
    shown = [{"model": row["model"], "way": row["way"], label: record.spread(row["ms"])} for row in rows]
    print(record.markdown_table(shown))
    record.save(options.out / "potential.json", rows, ("torch", "pyro-ppl"))


if __name__ == "__main__":
    main()
