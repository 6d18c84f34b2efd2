"""Gradients and effective draws a second of stochastic-gradient samplers, on one Bayesian neural network.

The network is 13-100-1, tanh, NTK scaling, N(0, 1) priors, noise variance 0.1, on standardised Boston housing (455
rows, batches of 32). Every implementation samples the same posterior with the same discretisation of Chen et al.
(2014), step ``eps`` and friction ``alpha``: ``w += eps m``, ``m += eps grad - eps alpha m + N(0, 2 alpha eps)``.
Exceptions, by each package's design: blackjax draws a new momentum every 10 gradients and keeps one minibatch for
them; Pyro's HMC uses the whole data set; scale-adapted SGHMC has a preconditioner and its own step.

Speed is the time of a block of steps after warm-up and compilation, repeated; effective draws are the smallest bulk
ESS (ArviZ) of the network's value at 51 test inputs, per gradient, over one longer run of 8 chains. Chains are
independent, so effective draws a second at any number of chains is the product of the two. Each implementation runs
in a process of its own, all on the same single core, one after the other.

    python -m benchmarks.sgmcmc_peers            # all, about 20 minutes
    python -m benchmarks.sgmcmc_peers --only blackjax
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import record
from benchmarks.data import split

RUNS = {  # of `benchmarks.run`: name, title, arguments
    "sgmcmc": ("Stochastic-gradient samplers", ""),
}

HIDDEN, NOISE, BATCH, EPS, ALPHA = 100, 0.1, 32, 3e-3, 30.0
CHAINS = (1, 8, 64)
PACKAGES = ("torch", "pyro-ppl", "jax", "jaxlib", "blackjax", "posteriors", "arviz", "numpy")

SPLIT = split(2)
Y_SCALE = float(SPLIT.y_train.std(correction=0))
X, Y, X_TEST, Y_TEST = (part.numpy() for part in SPLIT.standardised()[2:])
N, D = X.shape

Functions = NDArray[np.floating[Any]]


@dataclass
class Sampler:
    """One implementation with its chains at hand.

    Attributes:
        speed: gradients a second, over all chains, of a stretch of about so many gradients a chain; set-up left out.
        draws: ``draws(steps, thin)`` runs on, keeping the network at the test inputs, ``(chain, draw, 51)``.
        batch: rows of data that a gradient looks at.
    """

    speed: Callable[[int], float]
    draws: Callable[[int, int], Functions]
    batch: int = BATCH


def timed(advance: Callable[[int], int]) -> Callable[[int], float]:
    """The speed of ``advance``, which runs all chains on and returns the gradients that it made."""

    def speed(steps: int) -> float:
        start = time.perf_counter()
        gradients = advance(steps)
        return gradients / (time.perf_counter() - start)

    return speed


def initial(chains: int) -> dict[str, NDArray[np.float32]]:
    """Starting weights, the same for all: draws from the prior."""
    rng = np.random.default_rng(0)
    shapes = {"W1": (D, HIDDEN), "b1": (HIDDEN,), "W2": (HIDDEN, 1), "b2": (1,)}
    return {name: rng.standard_normal((chains, *shape), dtype=np.float32) for name, shape in shapes.items()}


def network(w: dict[str, Any], x: Any, tanh: Callable[[Any], Any]) -> Any:
    """The network at ``(rows, 13)`` inputs; weights may carry a chain dimension in front."""
    hidden = tanh(x @ w["W1"] / math.sqrt(D) + w["b1"][..., None, :])
    return (hidden @ w["W2"] / math.sqrt(HIDDEN) + w["b2"][..., None, :])[..., 0]


def posteriors_batched(chains: int) -> Sampler:
    """``posteriors.sgmcmc.sghmc`` with a chain dimension in the parameters and the log posterior summed over it."""
    import torch

    warnings.filterwarnings("ignore", category=FutureWarning)
    import posteriors

    torch.manual_seed(0)
    x, y, x_test = (torch.tensor(part) for part in (X, Y, X_TEST))

    def log_posterior(w: dict[str, torch.Tensor], index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        f = network(w, x[index], torch.tanh)
        likelihood = -0.5 * ((y[index] - f) ** 2).sum() / NOISE * (N / BATCH)
        return likelihood - 0.5 * sum((value**2).sum() for value in w.values()), torch.tensor([])

    transform = posteriors.sgmcmc.sghmc.build(log_posterior, lr=EPS, alpha=ALPHA)
    state = transform.init({name: torch.tensor(value) for name, value in initial(chains).items()})

    def advance(steps: int) -> int:
        nonlocal state
        for index in torch.randint(0, N, (steps, chains, BATCH)):
            state, _ = transform.update(state, index)
        return steps * chains

    def draws(steps: int, thin: int) -> Functions:
        kept = []
        for _ in range(steps // thin):
            advance(thin)
            kept.append(network(state.params, x_test, torch.tanh).numpy())
        return np.stack(kept, 1)

    return Sampler(timed(advance), draws)


def posteriors_loop(chains: int) -> Sampler:
    """``posteriors.sgmcmc.sghmc`` as its examples use it: one chain after the other."""
    samplers = [posteriors_batched(1) for _ in range(chains)]

    def speed(steps: int) -> float:
        # The harmonic mean of the chains' speeds is that of running them one after the other.
        return chains / sum(1 / sampler.speed(steps) for sampler in samplers)

    def draws(steps: int, thin: int) -> Functions:
        return np.concatenate([sampler.draws(steps, thin) for sampler in samplers])

    return Sampler(speed, draws)


def blackjax_scan(chains: int) -> Sampler:
    """``blackjax.sghmc``, vmapped over chains, the whole loop in one jitted ``lax.scan``."""
    import blackjax
    import jax
    import jax.numpy as jnp

    x, y, x_test = (jnp.asarray(part) for part in (X, Y, X_TEST))
    leapfrogs = 10  # the package's default

    def log_posterior(w: Any, rows: Any) -> Any:
        likelihood = -0.5 * jnp.sum((rows[1] - network(w, rows[0], jnp.tanh)) ** 2) / NOISE * (N / BATCH)
        return likelihood - 0.5 * sum(jnp.sum(value**2) for value in w.values())

    # One product for the whole batch; the package's own grad_estimator, row by row, is up to a third slower here.
    gradient = jax.grad(log_posterior)
    kernel = blackjax.sghmc(gradient, num_integration_steps=leapfrogs, alpha=ALPHA)

    def step(w: Any, key: Any) -> Any:
        index_key, key = jax.random.split(key)
        index = jax.random.randint(index_key, (BATCH,), 0, N)
        return kernel.step(key, w, (x[index], y[index]), EPS)

    def run(w: Any, key: Any, steps: int) -> Any:
        return jax.lax.fori_loop(0, steps, lambda i, w: step(w, jax.random.fold_in(key, i)), w)

    def thinned(w: Any, key: Any, kept: int, thin: int) -> Any:
        def block(w: Any, key: Any) -> Any:
            w = run(w, key, thin)
            return w, network(w, x_test, jnp.tanh)

        return jax.lax.scan(block, w, jax.random.split(key, kept))

    many = jax.jit(jax.vmap(run, (0, 0, None)))
    keep = jax.jit(jax.vmap(thinned, (0, 0, None, None)), static_argnums=(2, 3))
    state = {name: jnp.asarray(value) for name, value in initial(chains).items()}
    key = jax.random.key(0)

    def advance(steps: int) -> int:
        nonlocal state, key
        key, now = jax.random.split(key)
        state = jax.block_until_ready(many(state, jax.random.split(now, chains), steps // leapfrogs))
        return steps // leapfrogs * leapfrogs * chains

    def draws(steps: int, thin: int) -> Functions:
        nonlocal state, key
        key, now = jax.random.split(key)
        state, functions = keep(state, jax.random.split(now, chains), steps // thin, thin // leapfrogs)
        return np.asarray(functions)

    return Sampler(timed(advance), draws)


def pyro_model(subsample: int | None) -> Callable[[], None]:
    """The network as a Pyro model; with ``subsample``, the data plate takes minibatches of that size."""
    import pyro
    import pyro.distributions as dist
    import torch

    x, y = torch.tensor(X), torch.tensor(Y)
    shapes = {name: value.shape[1:] for name, value in initial(1).items()}
    noise = math.sqrt(NOISE)

    def model() -> None:
        w = {name: pyro.sample(name, dist.Normal(0.0, 1.0).expand(s).to_event(len(s))) for name, s in shapes.items()}
        with pyro.plate("data", N, subsample_size=subsample) as index:
            mean = network(w, x if subsample is None else x[index], torch.tanh)
            pyro.sample("y", dist.Normal(mean, noise), obs=y if subsample is None else y[index])

    return model


def pyro_hmc(chains: int) -> Sampler:
    """``pyro.infer.HMC`` on the whole data set; Pyro adapts step size and mass matrix in 400 warm-up draws."""
    import pyro
    import torch
    from pyro.infer import HMC

    if chains != 1:
        raise ValueError("Pyro runs further chains as further processes; measured with one")
    pyro.set_rng_seed(0)
    warmup = 400
    kernel = HMC(pyro_model(None), step_size=0.01, trajectory_length=0.5)
    kernel.initial_params = {name: torch.tensor(value[0]) for name, value in initial(1).items()}
    kernel.setup(warmup)
    position = kernel.initial_params
    for _ in range(warmup):
        position = kernel.sample(position)
    kernel.end_warmup()

    def proposals(steps: int) -> int:
        return max(1, round(steps / kernel.num_steps))

    def advance(steps: int) -> int:
        nonlocal position
        for _ in range(proposals(steps)):
            position = kernel.sample(position)
        return proposals(steps) * kernel.num_steps

    def draws(steps: int, thin: int) -> Functions:
        x_test = torch.tensor(X_TEST)
        kept = []
        for _ in range(proposals(steps)):
            advance(1)
            kept.append(network(position, x_test, torch.tanh).numpy())
        return np.stack(kept)[None]

    return Sampler(timed(advance), draws, batch=N)


def ours(kernel: str) -> Callable[[int], Sampler]:
    """``inference.MCMC`` with ``SGHMC`` at the peers' setting, or ``AdaptiveSGHMC`` at the setting of its paper."""

    def build(chains: int) -> Sampler:
        import torch

        from inference import MCMC, SGHMC, AdaptiveSGHMC

        x_test = torch.tensor(X_TEST)
        position = {name: torch.tensor(value) for name, value in initial(chains).items()}
        model = pyro_model(BATCH)

        def run(steps: int, thin: int, warmup: int, progress: Callable[[dict[str, Any]], None] | bool) -> Any:
            nonlocal position
            if kernel == "SGHMC":
                chosen: Any = SGHMC(model, step_size=EPS, friction=EPS * ALPHA)
            else:
                chosen = AdaptiveSGHMC(model, step_size=0.01, friction=0.01)
            mcmc = MCMC(
                chosen,
                num_samples=steps // thin,
                warmup_steps=warmup,
                thin=thin,
                num_chains=chains,
                initial_params=position,
                minibatch="per_chain",
                compile=True,
                progress=progress,
            )
            samples = mcmc.run().get_samples(group_by_chain=True)
            position = {name: value[:, -1] for name, value in samples.items()}
            return samples

        def speed(steps: int) -> float:
            # What the progress reports say between the first block, which holds compilation, and the last.
            reports: list[tuple[float, int]] = []
            run(max(steps, 1024), 64, 0, lambda report: reports.append((time.perf_counter(), report["step"])))
            (begin, first), (end, last) = reports[0], reports[-1]
            return (last - first) * chains / (end - begin)

        def draws(steps: int, thin: int) -> Functions:
            # Adaptation belongs to a run, so that every adaptive run has its own warm-up.
            samples = run(steps, thin, 0 if kernel == "SGHMC" else steps // 2, False)
            return np.asarray(network(samples, x_test, torch.tanh))

        return Sampler(speed, draws)

    return build


@dataclass(frozen=True)
class Implementation:
    """How to build a sampler, and how it is measured.

    Attributes:
        build: from the number of chains.
        chains: the numbers of chains to time it with.
        steps: gradients a chain of the run that ESS is taken from; 0 where ``same_law_as`` names another's.
        same_law_as: an implementation that makes the same draws in less time.
    """

    build: Callable[[int], Sampler]
    chains: tuple[int, ...] = CHAINS
    steps: int = 40_000
    same_law_as: str = ""


BATCHED = "posteriors 0.1.3 SGHMC, chains batched by hand"
IMPLEMENTATIONS = {
    "inference SGHMC": Implementation(ours("SGHMC")),
    "inference AdaptiveSGHMC": Implementation(ours("AdaptiveSGHMC")),
    "blackjax 1.7.1 SGHMC, vmap and scan": Implementation(blackjax_scan),
    BATCHED: Implementation(posteriors_batched),
    "posteriors 0.1.3 SGHMC, chain by chain": Implementation(posteriors_loop, steps=0, same_law_as=BATCHED),
    "Pyro 1.9.2 HMC, whole data": Implementation(pyro_hmc, chains=(1,), steps=20_000),
}


def measure(name: str, *, block_seconds: float, repeats: int, ess_steps: int | None) -> list[dict[str, Any]]:
    """Speed at each number of chains, and effective draws per gradient from one run of 8 chains (or of one)."""
    import arviz as az

    implementation = IMPLEMENTATIONS[name]
    build, numbers = implementation.build, implementation.chains
    rows = []
    for chains in numbers:
        start = time.perf_counter()
        sampler = build(chains)
        sampler.speed(20)
        setup = time.perf_counter() - start
        steps, speed = 20, sampler.speed(20)
        while steps * chains < block_seconds / 4 * speed:
            steps, speed = steps * 4, sampler.speed(steps * 4)
        steps = max(20, round(block_seconds * speed / chains / 20) * 20)
        speeds = [sampler.speed(steps) for _ in range(repeats)]
        rows.append({"sampler": name, "chains": chains, "batch": sampler.batch, "setup": setup, "speed": speeds})
        record.progress(f"{name}: {chains} chains, {record.spread(speeds)} gradients/s")

    if not implementation.steps:
        return rows
    chains = 8 if 8 in numbers else numbers[0]
    steps = ess_steps or implementation.steps
    sampler = build(chains)
    sampler.draws(steps // 2, 100)  # warm-up
    functions = sampler.draws(steps, 100)
    if len(functions) == 1:  # halves of the one chain
        half = functions.shape[1] // 2
        functions = np.concatenate([functions[:, :half], functions[:, half : 2 * half]])
    ess = [float(az.ess(functions[..., i], method="bulk")) for i in range(functions.shape[-1])]
    rhat = [float(az.rhat(functions[..., i])) for i in range(functions.shape[-1])]
    rmse = float(np.sqrt(np.mean((functions.mean((0, 1)) - Y_TEST) ** 2))) * Y_SCALE
    for row in rows:
        row |= {"ess_per_gradient": min(ess) / (steps * chains), "rhat": max(rhat), "rmse": rmse}
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The Markdown table."""
    known = {row["sampler"]: row for row in rows if "rhat" in row}
    shown = []
    for row in rows:
        line = {
            "sampler": row["sampler"],
            "chains": row["chains"],
            "rows a gradient": row["batch"],
            "gradients/s": record.spread(row["speed"]),
        }
        law = known.get(IMPLEMENTATIONS[row["sampler"]].same_law_as or row["sampler"])
        if law is not None:
            line["min ESS/s"] = record.spread([speed * law["ess_per_gradient"] for speed in row["speed"]])
            line["min ESS per 10^6 gradients"] = f"{1e6 * law['ess_per_gradient']:,.0f}"
            line["R-hat"], line["test RMSE"] = f"{law['rhat']:.2f}", f"{law['rmse']:.2f}"
        shown.append(line | {"set-up s": f"{row['setup']:.1f}"})
    columns = max((list(line) for line in shown), key=len)
    return record.markdown_table([{column: line.get(column, "") for column in columns} for line in shown])


def main() -> None:
    """Measure what ``--only`` names, or everything, each in a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="run the implementations whose name contains this, in this process")
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--block-seconds", type=float, default=4.0, help="length of one timed block")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ess-steps", type=int, help="steps of the run that ESS is taken from")
    parser.add_argument("--json", type=Path, help="where one implementation leaves its rows for the parent process")
    options = parser.parse_args()
    record.one_core()

    rows: list[dict[str, Any]] = []
    if options.only:
        for name in IMPLEMENTATIONS:
            if options.only in name:
                rows += measure(
                    name,
                    block_seconds=options.block_seconds,
                    repeats=options.repeats,
                    ess_steps=options.ess_steps,
                )
    else:
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / "rows.json"
            for name in IMPLEMENTATIONS:
                arguments = ["--only", name, "--json", str(part)]
                arguments += ["--block-seconds", str(options.block_seconds), "--repeats", str(options.repeats)]
                arguments += ["--ess-steps", str(options.ess_steps)] if options.ess_steps else []
                subprocess.run([sys.executable, "-m", "benchmarks.sgmcmc_peers", *arguments], check=True)
                rows += json.loads(part.read_text())
                record.progress(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows))
        return
    print(table(rows))
    record.save(options.out / "sgmcmc_peers.json", rows, PACKAGES)


if __name__ == "__main__":
    main()
