"""Effective draws a second of samplers, by model and number of chains, each in a process of its own.

    python -m benchmarks.samplers
    python -m benchmarks.samplers --models "eight schools" --chains 1 64 --samplers "inference NUTS" "numpyro NUTS"

Every sampler has the same warm-up and the same draws a chain (400 and 400; of 64 and more chains of the network, whose
trajectories are long, 100 and 100), and its effective draws are counted by the same function: the smallest bulk ESS
over all scalars of the posterior.  Samplers that take one gradient a step (MEADS, MCLMC) take ten steps where the
others take one, in the warm-up and between draws.  For the network, whose weights have symmetric modes, effective draws
are counted on the function's values at the 100 inputs.  "Warm" is a later run in the same process, with another seed;
"cold" is the first, compilation included and its caches on disk empty; imports are in neither.  A first run of more
than 150 s is not repeated and stands for both.  A sampler that failed or ran into the limit is not tried with more
chains.  Seconds are processor time, which other work on the machine moves less than the clock; the file keeps both.

Rows are added to those of the file that is there; ``samplers.png`` beside it shows what a chain and what an effective
draw cost against the number of chains.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import record
from benchmarks.sampler_figure import draw
from benchmarks.sampler_models import MODELS, for_numpyro, for_pyro
from benchmarks.sampler_tables import beside_peers, table

RUNS = {  # of `benchmarks.run`: name, title, arguments
    "samplers": ("Samplers, effective draws a second", ""),
}

Draws = dict[str, np.ndarray]  # site -> (chain, draw, ...)
Runner = Callable[[str, int, int, int], Callable[[int], Draws]]
STEPS = 10  # a draw, of samplers that take one gradient a step


def inference_sampler(name: str, thin: int = 1) -> Runner:
    """A kernel of this library with its defaults."""

    def prepare(model: str, chains: int, warmup: int, draws: int) -> Callable[[int], Draws]:
        import inference

        text, arguments = for_pyro(model)

        def run(seed: int) -> Draws:
            kernel = getattr(inference, name)(text)
            options: dict[str, Any] = {"num_chains": chains, "seed": seed, "thin": thin, "progress": False}
            mcmc = inference.MCMC(kernel, draws, thin * warmup, **options)
            mcmc.run(*arguments)
            return {n: v.numpy() for n, v in mcmc.get_samples(group_by_chain=True).items()}

        return run

    return prepare


def pyro_nuts(jit: bool) -> Runner:
    """Pyro's NUTS, one chain after another in this process."""

    def prepare(model: str, chains: int, warmup: int, draws: int) -> Callable[[int], Draws]:
        import pyro
        from pyro.infer import MCMC, NUTS

        text, arguments = for_pyro(model)

        def run(seed: int) -> Draws:
            result = []
            for chain in range(chains):
                pyro.set_rng_seed(1000 * seed + chain)
                kernel = NUTS(text, jit_compile=jit, ignore_jit_warnings=True)
                mcmc = MCMC(kernel, draws, warmup, disable_progbar=True)
                mcmc.run(*arguments)
                result.append(mcmc.get_samples())
            return {n: np.stack([r[n].numpy() for r in result]) for n in result[0]}

        return run

    return prepare


def numpyro_nuts(method: str) -> Runner:
    """numpyro's NUTS, chains one after another or vectorised."""

    def prepare(model: str, chains: int, warmup: int, draws: int) -> Callable[[int], Draws]:
        import jax
        from numpyro.infer import MCMC, NUTS

        text, arguments = for_numpyro(model)
        mcmc = MCMC(
            NUTS(text), num_warmup=warmup, num_samples=draws, num_chains=chains, chain_method=method, progress_bar=False
        )

        def run(seed: int) -> Draws:
            mcmc.run(jax.random.PRNGKey(seed), *arguments)
            return {n: np.asarray(v) for n, v in mcmc.get_samples(group_by_chain=True).items()}

        return run

    return prepare


def _unconstrained(model: str, chains: int, seed: int) -> tuple[Any, Any, Any]:
    """numpyro's potential, the chains' starting points, and the map back to the sites."""
    import jax
    from numpyro.infer.util import initialize_model

    text, arguments = for_numpyro(model)
    found = initialize_model(jax.random.split(jax.random.PRNGKey(seed), chains), text, model_args=arguments)
    return found.potential_fn, found.param_info.z, found.postprocess_fn


def blackjax_sampler(algorithm: str) -> Runner:
    """blackjax on numpyro's potential, chains vectorised, the whole run one compiled program."""

    def prepare(model: str, chains: int, warmup: int, draws: int) -> Callable[[int], Draws]:
        import blackjax
        import jax
        import optax

        potential, _, back = _unconstrained(model, chains, 0)

        def log_density(z: Any) -> Any:
            return -potential(z)

        def nuts(key: Any, start: Any) -> Any:
            adapt = blackjax.window_adaptation(blackjax.nuts, log_density)

            def chain(key: Any, z: Any) -> Any:
                first, second = jax.random.split(key)
                (state, parameters), _ = adapt.run(first, z, num_steps=warmup)
                step = blackjax.nuts(log_density, **parameters).step
                return jax.lax.scan(
                    lambda s, k: (lambda new: (new, new.position))(step(k, s)[0]),
                    state,
                    jax.random.split(second, draws),
                )[1]

            return jax.vmap(chain)(jax.random.split(key, chains), start)

        def chees(key: Any, start: Any) -> Any:
            first, second = jax.random.split(key)
            adapt = blackjax.chees_adaptation(log_density, chains)
            (state, parameters), _ = adapt.run(first, start, 0.1, optax.adam(0.02), warmup)
            step = jax.vmap(blackjax.dynamic_hmc(log_density, **parameters).step)

            def advance(s: Any, k: Any) -> Any:
                new = step(jax.random.split(k, chains), s)[0]
                return new, new.position

            found = jax.lax.scan(advance, state, jax.random.split(second, draws))[1]
            return jax.tree.map(lambda v: v.swapaxes(0, 1), found)

        def thinned(advance: Any, state: Any, key: Any) -> Any:
            """Every ``STEPS``-th position of one chain's or of all chains' steps."""

            def many(s: Any, k: Any) -> Any:
                new = jax.lax.scan(advance, s, jax.random.split(k, STEPS))[0]
                return new, new.position

            return jax.lax.scan(many, state, jax.random.split(key, draws))[1]

        def meads(key: Any, start: Any) -> Any:
            first, second = jax.random.split(key)
            adapt = blackjax.meads_adaptation(log_density, chains)
            (state, parameters), _ = adapt.run(first, start, STEPS * warmup)
            step = jax.vmap(blackjax.ghmc(log_density, **parameters).step)
            found = thinned(lambda s, k: (step(jax.random.split(k, chains), s)[0], None), state, second)
            return jax.tree.map(lambda v: v.swapaxes(0, 1), found)

        def mclmc(key: Any, start: Any) -> Any:
            kernel = blackjax.mclmc.build_kernel()

            def chain(key: Any, z: Any) -> Any:
                first, second, third = jax.random.split(key, 3)
                state = blackjax.mclmc.init(z, log_density, first)
                # Its warm-up is three parts of a tenth of ``num_steps`` each.
                count = STEPS * warmup * 10 // 3
                options = {"num_steps": count, "state": state, "rng_key": second, "logdensity_fn": log_density}
                state, found, _ = blackjax.mclmc_find_L_and_step_size(kernel, **options)
                fixed = {"L": found.L, "step_size": found.step_size, "inverse_mass_matrix": found.inverse_mass_matrix}
                step = blackjax.mclmc(log_density, **fixed).step
                return thinned(lambda s, k: (step(k, s)[0], None), state, third)

            return jax.vmap(chain)(jax.random.split(key, chains), start)

        algorithms = {"NUTS": nuts, "ChEES": chees, "MEADS": meads, "MCLMC": mclmc}
        program = jax.jit(algorithms[algorithm])
        constrain = jax.jit(jax.vmap(jax.vmap(back)))

        def run(seed: int) -> Draws:
            _, start, _ = _unconstrained(model, chains, seed)
            found = constrain(program(jax.random.PRNGKey(seed), start))
            return {n: np.asarray(v) for n, v in found.items()}

        return run

    return prepare


def nutpie_nuts(model: str, chains: int, warmup: int, draws: int) -> Callable[[int], Draws]:
    """nutpie, Rust threads that call numpyro's potential as compiled by XLA; ESS is counted in unconstrained space."""
    import jax
    import nutpie
    from jax.flatten_util import ravel_pytree

    potential, start, _ = _unconstrained(model, 1, 0)
    first, unravel = ravel_pytree(jax.tree.map(lambda v: v[0], start))
    value_and_grad = jax.jit(jax.value_and_grad(lambda z: -potential(unravel(z))))
    network = for_pyro(model)[1][0].numpy() if model == "small network" else None

    def log_density() -> Callable[[np.ndarray], tuple[float, np.ndarray]]:
        def call(z: np.ndarray) -> tuple[float, np.ndarray]:
            value, gradient = value_and_grad(z.astype(np.float32))
            return float(value), np.asarray(gradient, dtype=np.float64)

        return call

    def expand(seed1: Any, seed2: Any, chain: Any) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
        return lambda z: {"z": np.asarray(z, dtype=np.float64)}

    compiled = nutpie.compiled_pyfunc.from_pyfunc(
        len(first),
        log_density,
        expand,
        [np.dtype("float64")],
        [(len(first),)],
        ["z"],
        make_initial_point_fn=lambda seed: np.random.default_rng(seed).uniform(-2, 2, len(first)),
    )

    def run(seed: int) -> Draws:
        trace = nutpie.sample(compiled, draws=draws, tune=warmup, chains=chains, cores=1, seed=seed, progress_bar=False)
        z = np.asarray(trace.posterior["z"])
        if network is None:
            return {"z": z}
        sites = jax.vmap(jax.vmap(unravel))(z)
        return {n: np.asarray(v) for n, v in sites.items()}

    return run


SAMPLERS: dict[str, Runner] = {
    "inference NUTS": inference_sampler("NUTS"),
    "inference HMC": inference_sampler("HMC"),
    "inference ChEES": inference_sampler("ChEES"),
    "inference MEADS": inference_sampler("MEADS", STEPS),
    "inference MCLMC": inference_sampler("MCLMC", STEPS),
    "Pyro NUTS": pyro_nuts(False),
    "Pyro NUTS, jit": pyro_nuts(True),
    "numpyro NUTS, sequential": numpyro_nuts("sequential"),
    "numpyro NUTS, vectorised": numpyro_nuts("vectorized"),
    "blackjax NUTS": blackjax_sampler("NUTS"),
    "blackjax ChEES": blackjax_sampler("ChEES"),
    "blackjax MEADS": blackjax_sampler("MEADS"),
    "blackjax MCLMC": blackjax_sampler("MCLMC"),
    "nutpie NUTS": nutpie_nuts,
}
_MANY = {f"{of} {by}" for of in ("inference", "blackjax") for by in ("ChEES", "MEADS", "MCLMC")} | {"inference HMC"}
_ONE_BY_ONE = {"numpyro NUTS, sequential", "nutpie NUTS"}  # for 4 chains at most
_ALONE = {"Pyro NUTS", "Pyro NUTS, jit"}  # whose chains run one after another in any number: the rate of one
PACKAGES = ("torch", "pyro-ppl", "jax", "numpyro", "blackjax", "nutpie")
_ENOUGH = 20.0  # seconds of warm runs after which a row is not repeated
_LONG = 150.0  # seconds of a first run that is not repeated


def least_ess(model: str, draws: Draws) -> float:
    """Smallest bulk ESS over all scalars."""
    import torch

    from inference.results.diagnostics import ess_bulk

    if model == "small network" and "first" in draws:
        x = for_pyro(model)[1][0].numpy()
        hidden = np.tanh(x @ draws["first"] + draws["bias"][..., None, :])
        draws = {"f": np.einsum("cdnh,cdh->cdn", hidden, draws["second"]), "sigma": draws["sigma"]}
    values = [torch.from_numpy(np.array(v)).double() for n, v in draws.items() if n != "f" or model == "small network"]
    return min(float(ess_bulk(v.reshape(*v.shape[:2], -1)).min()) for v in values)


def measure(sampler: str, model: str, chains: int, warmup: int, draws: int, repeats: int) -> dict[str, Any]:
    """One row, in this process."""
    record.one_core()
    warnings.simplefilter("ignore")
    run = SAMPLERS[sampler](model, chains, warmup, draws)

    def timed(seed: int) -> tuple[float, float, float]:
        clock, processor = time.perf_counter(), time.process_time()
        found = run(seed)
        processor, clock = time.process_time() - processor, time.perf_counter() - clock
        return least_ess(model, found), processor, clock

    ess, processor, clock = timed(0)
    row: dict[str, Any] = {"sampler": sampler, "model": model, "chains": chains, "draws": draws, "warmup": warmup}
    row |= {"cold": ess / processor, "cold seconds": processor, "cold clock": clock}
    warm: list[tuple[float, float, float]] = [(ess, processor, clock)] if processor > _LONG else []
    while len(warm) < repeats and (not warm or sum(w[1] for w in warm) < _ENOUGH):
        warm.append(timed(len(warm) + 1))
    names = ("ess", "seconds", "clock")
    return {**row, "warm": [e / p for e, p, _ in warm], **dict(zip(names, zip(*warm, strict=True), strict=True))}


def main() -> None:
    """Run each row in a process and print a table a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--chains", nargs="+", type=int, default=[1, 4, 64, 1024])
    parser.add_argument("--samplers", nargs="+", default=list(SAMPLERS), choices=SAMPLERS)
    parser.add_argument("--warmup", type=int, help="default 400, for many chains of the small network 100")
    parser.add_argument("--draws", type=int, help="the same")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--limit", type=float, default=900.0, help="seconds after which a row is given up")
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--row", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        sampler, model, chains = options.row
        with contextlib.redirect_stdout(sys.stderr):
            row = measure(sampler, model, int(chains), options.warmup, options.draws, options.repeats)
        print(json.dumps(row))
        return
    file = options.out / "samplers.json"
    old = json.loads(file.read_text())["rows"] if file.exists() else []
    rows = {(row["sampler"], row["model"], row["chains"]): row for row in old}
    for model in options.models:
        failed: dict[str, dict[str, Any]] = {}
        for chains in options.chains:
            for sampler in options.samplers:
                most = 1 if sampler in _ALONE else 4 if sampler in _ONE_BY_ONE else chains
                if chains > most or (sampler in _MANY and chains < 64):
                    continue
                row = failed.get(sampler) or _in_a_process(sampler, model, chains, options)
                rows[sampler, model, chains] = row | {"chains": chains}
                if "failed" in row:
                    failed[sampler] = row
                shown = record.spread(row["warm"]) if "warm" in row else row["failed"]
                record.progress(f"{model:18} {chains:5} {sampler:26} warm {shown:26} cold {row.get('cold', 0):9.3g}")
                record.save(file, list(rows.values()), PACKAGES, quiet=True)
    record.save(file, list(rows.values()), PACKAGES)
    print(f"{table(list(rows.values()))}\n\n{beside_peers(list(rows.values()))}")
    draw(options.out / "samplers.png", list(rows.values()))


def _in_a_process(sampler: str, model: str, chains: int, options: argparse.Namespace) -> dict[str, Any]:
    usual = 100 if model == "small network" and chains >= 64 else 400
    warmup, draws = options.warmup or usual, options.draws or usual
    counts = ["--warmup", str(warmup), "--draws", str(draws), "--repeats", str(options.repeats)]
    command = [sys.executable, "-m", "benchmarks.samplers", *counts, "--row", sampler, model, str(chains)]
    failed = {"sampler": sampler, "model": model, "chains": chains}
    try:
        with tempfile.TemporaryDirectory() as caches:
            flags = {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"}
            environment = {**os.environ, **flags, "TORCHINDUCTOR_CACHE_DIR": caches}
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=options.limit, env=environment, check=False
            )
    except subprocess.TimeoutExpired:
        return {**failed, "failed": f"more than {options.limit:.0f} s"}
    if done.returncode:
        return {**failed, "failed": done.stderr.strip().splitlines()[-1][:100] if done.stderr else "failed"}
    row: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return row


if __name__ == "__main__":
    main()
