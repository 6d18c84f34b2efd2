"""Samplers on an accelerator beside the same machine's processor, as JSON lines within a time budget.

    python -m benchmarks.gpu --seconds 240
    python -m benchmarks.gpu --device cpu --seconds 60        # a rehearsal without an accelerator

Every part runs by itself: one that fails prints its error and the next begins.  A sampler that is not done in its share
of the time is interrupted and what it has drawn is counted.  Chain-gradients are gradients times chains; effective
draws are the smallest bulk ESS over all scalars (of the network: over its function at three inputs and its noise).
Nothing is compiled unless a row says so.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

Model = tuple[Callable[..., None], tuple[Any, ...]]
STARTED = time.perf_counter()


def say(part: str, **fields: Any) -> None:
    """One line of the report."""
    print(json.dumps({"part": part, "at": round(time.perf_counter() - STARTED, 1), **fields}, default=str), flush=True)


def rounded(value: float, digits: int = 4) -> float:
    """``value`` to ``digits`` significant digits."""
    return float(f"{value:.{digits}g}")


@contextlib.contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """Raise ``KeyboardInterrupt`` in the block when its time is up."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Budget:
    """Seconds that are left, and parts that may fail."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def left(self) -> float:
        """Seconds until the budget is spent."""
        return self.seconds - (time.perf_counter() - STARTED)

    def run(self, part: str, work: Callable[[], dict[str, Any] | None], limit: float, **fields: Any) -> None:
        """Run ``work`` within ``limit`` seconds and print what it returns, or why it did not."""
        limit = min(limit, self.left() - 1)
        if limit < 1:
            say(part, **fields, skipped="no time left")
            return
        start = time.perf_counter()
        try:
            with interrupted_after(limit):
                found = work() or {}
        except KeyboardInterrupt:
            found = {"failed": f"more than {limit:.0f} s"}
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            found = {"failed": f"{type(error).__name__}: {str(error)[:300]} ({last.filename}:{last.lineno})"}
        say(part, **fields, **found, wall=rounded(time.perf_counter() - start))


# ---------------------------------------------------------------- models
def models(device: torch.device) -> dict[str, Model]:
    """Three posteriors, their data on ``device``."""
    from benchmarks.sampler_models import for_pyro

    found = {}
    for name, short in (("eight schools", "schools"), ("logistic 1000x10", "logistic"), ("small network", "network")):
        model, arguments = for_pyro(name)
        found[short] = (_on(model, device), tuple(a.to(device) for a in arguments))
    return found


def _on(model: Callable[..., None], device: torch.device) -> Callable[..., None]:
    """The model where distributions of plain numbers are made on ``device``."""

    def moved(*arguments: Any) -> None:
        with torch.device(device):
            model(*arguments)

    return moved


def minibatch_network(device: torch.device) -> Model:
    """13-100-1 tanh on 455 simulated rows, 32 of them a step."""
    import pyro
    import pyro.distributions as dist

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(455, 13, generator=generator)
    y = (torch.sin(x[:, 0]) + 0.3 * torch.randn(455, generator=generator)).to(device)
    x = x.to(device)

    def model(x: Tensor, y: Tensor) -> None:
        zero, one = x.new_zeros(()), x.new_ones(())
        first = pyro.sample("first", dist.Normal(zero, one).expand([13, 100]).to_event(2))
        bias = pyro.sample("bias", dist.Normal(zero, one).expand([100]).to_event(1))
        second = pyro.sample("second", dist.Normal(zero, one).expand([100]).to_event(1))
        with pyro.plate("data", 455, subsample_size=32, device=str(x.device)) as rows:
            f = torch.tanh(x[rows] @ first + bias) @ second / 10
            pyro.sample("y", dist.Normal(f, 0.3 * one), obs=y[rows])

    return model, (x, y)


def potential(model: Model) -> Any:
    """Its potential energy, recorded."""
    from inference.potential import LogDensity, Potential

    return Potential(LogDensity(model[0], model[1]))


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---------------------------------------------------------------- parts
def environment(device: torch.device) -> dict[str, Any]:
    """What this ran on."""
    packages = ("torch", "pyro-ppl", "numpy", "triton", "gpytorch", "arviz", "pytest")
    versions = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    found = {"python": platform.python_version(), "versions": versions, "card": card, "cores": os.cpu_count()}
    return {**found, "threads": torch.get_num_threads(), "load": os.getloadavg()[0]}


def agreement(name: str, device: torch.device) -> dict[str, Any]:
    """Energy and gradient of 64 chains on the device and on the CPU."""
    there, here = potential(models(device)[name]), potential(models(torch.device("cpu"))[name])
    z = 0.5 * torch.randn(64, here.dim, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        (a, b), (c, d) = there.value_and_grad(z.to(device)), here.value_and_grad(z)
    energy = ((a.cpu() - c).abs() / (1 + c.abs())).max().item()
    gradient = ((b.cpu() - d).abs().max() / (1 + d.abs().max())).item()
    same = there.captured and energy < 1e-4 and gradient < 1e-3
    return {"energy": rounded(energy), "gradient": rounded(gradient), "recorded": there.captured, "agree": same}


def gradients(name: str, chains: int, device: torch.device) -> dict[str, Any]:
    """Chain-gradients a second of the recorded graph."""
    energy = potential(models(device)[name])
    z = 0.3 * torch.randn(chains, energy.dim, generator=torch.Generator().manual_seed(2)).to(device)
    with torch.no_grad():
        for _ in range(3):
            energy.value_and_grad(z)
        synchronise(device)
        start, calls = time.perf_counter(), 0
        while time.perf_counter() - start < 0.4 and calls < 400:
            for _ in range(5):
                energy.value_and_grad(z)
            synchronise(device)
            calls += 5
        seconds = (time.perf_counter() - start) / calls
    return {"ms": rounded(1e3 * seconds), "chain_gradients_per_second": rounded(chains / seconds)}


def sample(
    kernel: str, name: str, chains: int, device: torch.device, draws: int, seconds: float, compile: bool = False
) -> dict[str, Any]:
    """One run of a sampler: chain-gradients and effective draws a second of its own wall time."""
    import inference

    stochastic = kernel == "SGHMC"
    model, arguments = minibatch_network(device) if stochastic and name == "network" else models(device)[name]
    options: dict[str, Any] = {"step_size": 0.01, "friction": 0.1} if stochastic else {}
    mcmc = inference.MCMC(
        getattr(inference, kernel)(model, **options),
        draws,
        draws,
        num_chains=chains,
        seed=0,
        progress=False,
        compile=compile,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        begun = time.perf_counter()
        with interrupted_after(seconds), contextlib.suppress(KeyboardInterrupt):
            mcmc.run(*arguments)
        synchronise(device)
        whole = time.perf_counter() - begun
    found: dict[str, Any] = {"sampling_seconds": rounded(mcmc.seconds or whole), "seconds": rounded(whole)}
    found["chain_gradients_per_second"] = rounded(mcmc.num_gradients / found["sampling_seconds"])
    launched = any(type(p.advance).__name__ == "_Replay" for p in mcmc._programs)
    found |= {
        "compiled": mcmc.compiled,
        "one_launch": launched,
        "interrupted": mcmc.interrupted or not mcmc.num_gradients,
    }
    try:
        values = mcmc.get_samples(group_by_chain=True)
    except RuntimeError:
        return {**found, "draws": 0}
    ess = least_ess(values, name)
    drawn = next(iter(values.values())).shape[1]
    return {**found, "draws": drawn, "ess": rounded(ess), "ess_per_second": rounded(ess / found["seconds"])}


def race(sampler: str, model: str, chains: int, device: torch.device) -> dict[str, Any]:
    """400 + 400 draws a chain on the device by one of ours or a peer: wall seconds of a first run in the process and of
    a second with another seed, and effective draws a second of the second.

    ``sampler`` as in ``benchmarks.samplers``; of ours "compiled" may follow.
    """
    import inference
    from benchmarks import samplers

    found: dict[str, Any] = {}
    name, compiled = sampler.removesuffix(" compiled"), sampler.endswith(" compiled")
    short = {"eight schools": "schools", "logistic 1000x10": "logistic", "small network": "network"}[model]

    def ours(seed: int) -> dict[str, Any]:
        text, arguments = models(device)[short]
        kernel = getattr(inference, name.removeprefix("inference "))(text)
        options: dict[str, Any] = {"num_chains": chains, "seed": seed, "progress": False, "compile": compiled or "auto"}
        mcmc = inference.MCMC(kernel, 400, 400, **options)
        mcmc.run(*arguments)
        found["compiled"] = mcmc.compiled
        return {n: v.cpu().numpy() for n, v in mcmc.get_samples(group_by_chain=True).items()}

    run = ours if name.startswith("inference") else samplers.SAMPLERS[name](model, chains, 400, 400)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for label, seed in (("cold", 0), ("warm", 1)):
            start = time.perf_counter()
            draws = run(seed)
            found[f"{label}_seconds"] = rounded(time.perf_counter() - start)
    ess = samplers.least_ess(model, draws)
    return {**found, "ess": rounded(ess), "ess_per_second": rounded(ess / found["warm_seconds"])}


def least_ess(values: dict[str, Tensor], name: str) -> float:
    """The smallest bulk ESS of all scalars."""
    from inference.results.diagnostics import ess_bulk

    if name == "network":
        inputs = values["first"].shape[2]
        x = torch.linspace(-1.5, 1.5, 3)[:, None].expand(3, inputs)
        hidden = torch.tanh(x @ values["first"] + values["bias"][:, :, None, :])
        rest = {"sigma": values["sigma"]} if "sigma" in values else {}
        values = {"f": (hidden @ values["second"][..., None])[..., 0], **rest}
    flat = [v.reshape(*v.shape[:2], -1).double() for v in values.values()]
    return min(float(ess_bulk(v).min()) for v in flat)


def moments(device: torch.device) -> dict[str, Any]:
    """The eight schools by NUTS on the device: means beside reference values (mu about 4.4, tau about 3.6)."""
    import inference
    from inference.results.diagnostics import rhat

    model, arguments = models(device)["schools"]
    mcmc = inference.MCMC(inference.NUTS(model), 100, 100, num_chains=256, seed=1, progress=False, compile=False)
    mcmc.run(*arguments)
    found = {n: rounded(v.mean().item()) for n, v in mcmc.get_samples().items() if n in ("mu", "tau")}
    worst = max(float(rhat(v).max()) for v in mcmc.get_samples(group_by_chain=True).values())
    right = abs(found["mu"] - 4.4) < 0.25 and abs(found["tau"] - 3.6) < 0.3
    return {**found, "rhat": rounded(worst), "right": right}


def variational(device: torch.device) -> dict[str, Any]:
    """An ELBO trained by ``fit`` on the device, and a prediction from it."""
    from pyro.infer.autoguide import AutoNormal

    import inference

    model, arguments = models(device)["logistic"]
    with torch.device(device):
        objective = inference.ELBO(model, AutoNormal(model), num_particles=16)
        start = time.perf_counter()
        result = inference.fit(objective, arguments, num_steps=200, lr=0.02, seed=0, progress=False)
    synchronise(device)
    losses = result.losses
    seconds = time.perf_counter() - start
    return {
        "first": rounded(float(losses[0])),
        "last": rounded(float(losses[-10:].mean())),
        "seconds": rounded(seconds),
    }


def tests(limit: float) -> dict[str, Any]:
    """The tests that run forward and backward on the accelerator."""
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--maxfail=20", "-p", "no:cacheprovider"]
    command += [
        "tests/inference",
        "tests/sde",
        "tests/ppl_models",
        "-k",
        "accelerator or device or cuda",
        "-m",
        "not slow",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired as error:
        text = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        return {"failed": f"more than {limit:.0f} s", "output": text[-400:]}
    lines = done.stdout.strip().splitlines()
    return {"rc": done.returncode, "summary": lines[-1:] or done.stderr[-300:], "failures": lines[-20:-1][:19]}


def launches(device: torch.device) -> dict[str, Any]:
    """What a step costs when its kernel launches are replayed as one CUDA graph: a gradient of 1,024 chains."""
    energy = potential(models(device)["schools"])
    z = torch.zeros(1024, energy.dim, device=device)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                energy.value_and_grad(z)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            energy.value_and_grad(z)
        milliseconds = {}
        for name, call in (("launched", lambda: energy.value_and_grad(z)), ("replayed", graph.replay)):
            synchronise(device)
            start = time.perf_counter()
            for _ in range(100):
                call()
            synchronise(device)
            milliseconds[name] = rounded(10 * (time.perf_counter() - start))
    return {"ms": milliseconds}


def main() -> None:
    """Run the parts, the most telling ones first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--chains", nargs="+", type=int, default=[1024, 16384, 64])
    parser.add_argument("--kernels", nargs="+", default=["HMC", "NUTS", "SGHMC", "ChEES"])
    parser.add_argument("--row-seconds", type=float, default=6.0, help="most seconds of one sampler on one device")
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--race", action="store_true", help="nothing but the comparison with peers on the device")
    options = parser.parse_args()
    device, cpu = torch.device(options.device), torch.device("cpu")
    budget = Budget(options.seconds)
    budget.run("environment", lambda: environment(device), 20)
    if options.race:
        for model in ("eight schools", "logistic 1000x10"):
            for chains in options.chains:
                for sampler in ("inference NUTS", "inference NUTS compiled", "numpyro NUTS, vectorised"):
                    fields = {"sampler": sampler, "model": model, "chains": chains}
                    budget.run("race", partial(race, sampler, model, chains, device), options.row_seconds, **fields)
        return
    names = ("schools", "logistic", "network")
    # Once without an alarm: one that rings within an import leaves modules half imported.
    sample("NUTS", "schools", 2, cpu, 4, 1e6)
    say("imports")
    for name in names:
        budget.run("agreement", partial(agreement, name, device), 20, model=name)
    budget.run("moments", lambda: moments(device), 25)
    devices = [device] if device == cpu else [device, cpu]
    for chains in options.chains:
        for name in names:
            for place in devices:
                fields = {"model": name, "chains": chains, "device": place.type}
                budget.run("gradients", partial(gradients, name, chains, place), 10, **fields)
    if device.type == "cuda":
        budget.run("launches", lambda: launches(device), 15)
    share = min(options.row_seconds, max(1.0, 0.6 * budget.left() / 24))
    for chains in options.chains:
        for kernel in options.kernels:
            for name in names:
                for place in devices:
                    fields = {"sampler": kernel, "model": name, "chains": chains, "device": place.type}
                    draws = 400 if kernel == "SGHMC" else 50
                    work = partial(sample, kernel, name, chains, place, draws, share)
                    budget.run("sampler", work, share + 8, **fields)
        if chains == options.chains[0]:
            budget.run("fit", lambda: variational(device), 20)
            if not options.no_tests:
                limit = min(45.0, max(10.0, 0.3 * budget.left()))
                budget.run("tests", partial(tests, limit), limit + 5)
            for kernel in ("NUTS", "SGHMC"):
                work = partial(sample, kernel, "logistic", 1024, device, 400, 40.0, compile=True)
                budget.run("sampler", work, 60, sampler=kernel, model="logistic", chains=1024, compile=True)
    say("end", seconds=rounded(time.perf_counter() - STARTED))


if __name__ == "__main__":
    main()
