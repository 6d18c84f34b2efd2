"""What ranks run in the tests of many processes: chains."""

import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch

from inference import HMC, MCMC, NUTS, SGHMC, Stop, StreamingMCMC
from inference._errors import RankError, SamplerWarning
from inference.runtime import distributed
from tests.inference import zoo
from tests.inference.rank_cases import error_of
from tests.inference.ranks import forked


def minibatches(x, y):
    w = pyro.sample("w", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
    with pyro.plate("n", len(x), subsample_size=10) as i:
        pyro.sample("y", dist.Normal(x[i] @ w, 1.0), obs=y[i])


KERNELS: dict[str, Callable[[], tuple[Any, tuple[Any, ...]]]] = {
    # A log-concave target: on others a rounding error of adaptation grows e-fold a step.
    "hmc": lambda: (HMC(zoo.logistic, trajectory_length=1.0), (zoo.X, zoo.BINARY)),
    "nuts": lambda: (NUTS(zoo.logistic, full_mass=True), (zoo.X, zoo.BINARY)),
    "sghmc": lambda: (SGHMC(minibatches, step_size=0.01, friction=0.3), (zoo.X, zoo.Y)),
}


DATA = zoo.X, zoo.BINARY
DRAWS = {"hmc": 15, "nuts": 15, "sghmc": 150}  # the last in two blocks


def chains(name: str, num_chains: int = 4, **options: Any) -> MCMC:
    kernel, args = KERNELS[name]()
    settings = dict(num_samples=DRAWS[name], warmup_steps=40, num_chains=num_chains, seed=3, progress=False) | options
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*transitions diverged", SamplerWarning)
        return MCMC(kernel, **settings).run(*args)


def uneven() -> MCMC:
    """Shards of three and two chains; those of one start so far out that alone they would take other steps."""
    far = torch.tensor([0.1, 0.1, 0.1, 30.0, 30.0], dtype=zoo.F64)
    return chains("hmc", 5, initial_params={"w": far[:, None].repeat(1, 3), "b": -far})


def draws(mcmc: MCMC) -> dict[str, Any]:
    return {**mcmc.get_samples(group_by_chain=True), **mcmc.sample_stats}


def chain_cases(folder: Path) -> dict[str, Any]:
    rank = distributed.rank()
    found: dict[str, Any] = {}
    for name in KERNELS:
        mcmc = chains(name, checkpoint=folder / name)
        found[name] = {"draws": draws(mcmc), "chains": list(mcmc.chains), "gradients": mcmc.num_gradients}
    mcmc = uneven()
    found["uneven"] = draws(mcmc)
    found["diagnostics"] = {k: list(v) for k, v in mcmc.diagnostics().items()}
    mcmc.summary()
    found["arviz"] = dict(mcmc.to_arviz()["posterior"].sizes)

    enough = chains("sghmc", num_samples=600, stop=Stop(ess=1, least=20))
    found["stopped"] = [enough.stopped, enough.get_samples(group_by_chain=True)["w"].shape]
    found["errors"] = {"streaming": error_of(lambda: StreamingMCMC(KERNELS["hmc"]()[0], 5, num_chains=2).run(*DATA))}
    reports: list[int] = []
    chains("sghmc", progress=lambda event: reports.append(event["step"]))
    found["reports"] = reports
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # The signal comes to one rank alone, in a block of 128 steps; a hook may also raise by itself.
        signalled = chains(
            "sghmc", num_samples=300, hook_fn=at_step(1, 200, lambda: os.kill(os.getpid(), signal.SIGINT))
        )
        raised = chains("sghmc", num_samples=300, hook_fn=at_step(0, 200, interrupt))
    found["interrupts"] = [
        [m.interrupted, len(m.get_samples(group_by_chain=True)["w"][0])] for m in (signalled, raised)
    ]
    found["warnings"] = [str(w.message) for w in caught if "interrupted" in str(w.message)]

    other = zoo.Y + (rank == 1)
    found["errors"] |= {
        "chains": error_of(lambda: chains("hmc", 1)),
        "data": error_of(lambda: MCMC(KERNELS["sghmc"]()[0], 3, num_chains=2, progress=False).run(zoo.X, other)),
        "lost": error_of(broken),
    }
    return found


def broken() -> MCMC:
    """Steps so large that every chain is lost."""
    kernel = SGHMC(minibatches, step_size=1e6, friction=0.3)
    return MCMC(kernel, 400, 0, num_chains=2, progress=False).run(zoo.X, zoo.Y)


def at_step(rank: int, step: int, strike: Callable[[], None]) -> Callable[..., None]:
    calls = 0

    def hook(*rest: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == step and distributed.rank() == rank:
            strike()

    return hook


def interrupt() -> None:
    raise KeyboardInterrupt


def killed_chains(folder: Path, name: str, step: int, rank: int) -> None:
    """A rank kills itself; the other says so and ends."""
    strike = at_step(rank, step, lambda: os.kill(os.getpid(), signal.SIGKILL))
    try:
        chains(name, checkpoint=folder / name, checkpoint_every=0.0, hook_fn=strike)
    except RankError as error:
        (folder / f"{name}.error").write_text(str(error))
        raise


def resumed_chains(folder: Path, name: str) -> dict[str, Any]:
    steps = 0

    def count(*rest: Any) -> None:
        nonlocal steps
        steps += 1

    found = draws(chains(name, checkpoint=folder / name, hook_fn=count))
    return {"draws": found, "steps": steps, "whole": draws(chains(name))}


# Where each kernel's run is killed: a rank, in the warm-up or among the draws.
KILLS = {"hmc": (25, 0), "nuts": (47, 1), "sghmc": (175, 1)}


def kill_cases(folder: Path) -> None:
    """Each kernel's run is killed and resumed."""
    for name, (step, rank) in KILLS.items():
        codes = forked(killed_chains, folder, name, step, rank, group=folder / f"{name}.first")
        assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == 1, (name, codes)
        codes = forked(resumed_chains, folder, name, group=folder / f"{name}.second", leave=folder / name)
        assert codes == [0, 0], (name, codes)


CASES: dict[str, Callable[[Path], Any]] = {"chains": chain_cases}

if __name__ == "__main__":
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    kill_cases(Path(sys.argv[1]))
