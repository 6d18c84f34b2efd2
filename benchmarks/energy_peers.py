"""Peers of the energy model on two-dimensional toys: torchebm, zuko, normflows, scikit-learn, at equal cost.

Called by ``python -m benchmarks.compositional_ebm peers``.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.energy_densities import Rows, best_gmm, best_kde, table, toy, truth
from benchmarks.record import progress
from inference.objectives.unnormalised.noise import GaussianNoise
from inference.runtime.generators import scoped_seed
from ppl_models import EnergyModel


class _Budget:
    """CPU seconds, or steps: what a peer may use, as a share of it that is gone."""

    def __init__(self, seconds: float | None = None, steps: int | None = None) -> None:
        self.seconds, self.steps, self.done, self.started = seconds, steps, 0, time.process_time()

    def spent(self) -> float:
        if self.steps is not None:
            return self.done / self.steps
        return (time.process_time() - self.started) / (self.seconds or 1.0)


def _descend(parameters: Any, loss: Callable[[Tensor], Tensor], train: Tensor, budget: _Budget, lr: float) -> None:
    """Adam on batches of 256, its rate falling along half a cosine to zero, as in our own fits."""
    optimiser = torch.optim.Adam(parameters, lr)
    while (gone := budget.spent()) < 1:
        optimiser.param_groups[0]["lr"] = 0.5 * lr * (1 + math.cos(math.pi * gone))
        optimiser.zero_grad()
        loss(train[torch.randint(len(train), (256,))]).backward()
        optimiser.step()
        budget.done += 1


def _on_grid(log_p: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The density normalised on 400 by 400 points of (-7, 7)^2."""
    axis = (torch.arange(400) + 0.5) / 400 * 14 - 7
    with torch.no_grad():
        values = torch.cat([log_p(part).double() for part in torch.cartesian_prod(axis, axis).split(20_000)])
    log_z = float(torch.logsumexp(values, 0)) + 2 * math.log(14 / 400)
    return lambda x: log_p(x).detach().double() - log_z


def _torchebm(
    kind: str, setting: Sequence[float], train: Tensor, budget: _Budget, seed: int
) -> Callable[[Tensor], Tensor]:
    """torchebm's losses on our default network and tilt; a setting is Langevin's step or the denoising spread, and
    Adam's rate.
    """
    from torchebm.core import BaseModel
    from torchebm.losses import ContrastiveDivergence, DenoisingScoreMatching, SlicedScoreMatching
    from torchebm.samplers import LangevinDynamics

    size, lr = setting
    noise = GaussianNoise.fit(train, 1.3)
    ebm = EnergyModel(event_shape=(2,), seed=seed)
    ebm._start(train, noise, seed, frozen=False)

    class Theirs(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.net = ebm.energy

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) - noise.log_prob(x)

    model = Theirs()
    if kind in ("CD", "PCD"):
        sampler = LangevinDynamics(model, step_size=size)
        made = ContrastiveDivergence(model, sampler, k_steps=10, persistent=kind == "PCD", buffer_size=10_000)

        def loss(x: Tensor) -> Tensor:
            found: Tensor = made(x)[0]
            return found
    else:
        made = DenoisingScoreMatching(model, noise_scale=size) if kind == "DSM" else SlicedScoreMatching(model, 1)
        loss = made
    with scoped_seed(seed):
        _descend(model.net.parameters(), loss, train, budget, lr)
    return _on_grid(lambda x: -model(x))


def _flow(kind: str, setting: Sequence[float], train: Tensor, budget: _Budget, seed: int) -> Callable[[Tensor], Tensor]:
    """Neural spline flows of zuko and normflows, three autoregressive layers of 64-64; a setting is the rate."""
    shift, scale = train.mean(0), train.std(0)
    standard = (train - shift) / scale
    with scoped_seed(seed):
        log_prob: Callable[[Tensor], Tensor]
        if kind == "zuko":
            import zuko

            made = zuko.flows.NSF(2, transforms=3, hidden_features=(64, 64))

            def log_prob(x: Tensor) -> Tensor:
                found: Tensor = made().log_prob(x)
                return found
        else:
            import normflows

            layers: list[nn.Module] = []
            for _ in range(3):
                layers.append(normflows.flows.AutoregressiveRationalQuadraticSpline(2, 2, 64))
                layers.append(normflows.flows.LULinearPermute(2))
            made = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(2, trainable=False), layers)
            log_prob = made.log_prob
        _descend(made.parameters(), lambda x: -log_prob(x).mean(), standard, budget, setting[0])

    def density(x: Tensor) -> Tensor:
        with torch.no_grad():
            return log_prob((x - shift) / scale) - scale.log().sum()

    return density


_LANGEVIN = tuple((step, lr) for lr in (5e-3, 1e-3) for step in (0.01, 0.03, 0.1))
# how to fit, settings to choose from on held-out rows (Langevin's step or the denoising spread, the rate), and
# evaluations of the energy (its gradient) for a row of a step
PEERS: dict[str, tuple[Any, tuple[tuple[float, ...], ...], float]] = {
    "torchebm CD-10": (partial(_torchebm, "CD"), _LANGEVIN, 12.0),
    "torchebm PCD-10": (partial(_torchebm, "PCD"), _LANGEVIN, 12.0),
    "torchebm DSM": (partial(_torchebm, "DSM"), ((0.05, 5e-3), (0.1, 5e-3), (0.2, 5e-3)), 2.0),
    "torchebm SSM": (partial(_torchebm, "SSM"), ((0.0, 5e-3),), 3.0),
    "zuko NSF": (partial(_flow, "zuko"), ((2e-3,), (5e-3,)), 1.0),
    "normflows NSF": (partial(_flow, "normflows"), ((2e-3,), (5e-3,)), 1.0),
}


def _own(name: str, seed: int, num_steps: int) -> list[float]:
    """Nats of our fit, and its CPU seconds."""
    train, test = toy(name, 10_000, 2 * seed), toy(name, 10_000, 2 * seed + 1)
    ebm, started = EnergyModel(event_shape=(2,), seed=seed), time.process_time()
    ebm.fit(train, num_steps=num_steps, seed=seed, progress=False)
    seconds = time.process_time() - started
    exact = ebm.log_partition("quadrature", 360_000).value
    return [float(ebm._law(exact).log_prob(test).detach().mean()), seconds, truth(name, test)]


def _tuned(name: str, peer: str, seconds: float) -> list[float]:
    """The setting that serves held-out rows of the first seed best, with half the seconds."""
    make, settings, _ = PEERS[peer]
    train = toy(name, 10_000, 0)

    def score(setting: tuple[float, ...]) -> float:
        density = make(setting, train[:8000], _Budget(seconds=seconds / 2), 0)
        return float(density(train[8000:]).mean().nan_to_num(nan=-math.inf))

    best = settings[0] if len(settings) == 1 else max(settings, key=score)
    return list(best)


def _peer(name: str, seed: int, peer: str, setting: list[float], limit: Callable[[], _Budget]) -> list[float]:
    """Nats, CPU seconds and steps."""
    train, test = toy(name, 10_000, 2 * seed), toy(name, 10_000, 2 * seed + 1)
    budget = limit()
    density = PEERS[peer][0](setting, train, budget, seed)
    seconds = time.process_time() - budget.started
    return [float(density(test).mean().nan_to_num(nan=-math.inf)), seconds, budget.done]


def _mixture(name: str, seed: int, run: Callable[..., tuple[float, float]]) -> list[float]:
    return list(run(toy(name, 10_000, 2 * seed), toy(name, 10_000, 2 * seed + 1)))


def peers(names: tuple[str, ...], seeds: int, num_steps: int, path: Path, minutes: float) -> None:
    """Peers at the CPU seconds of our fit, and at its evaluations of the energy, medians over seeds.

    Args:
        names: of toys.
        seeds: how many.
        num_steps: of our fit.
        path: file of rows; those in it are not measured again.
        minutes: no row is begun after so many. Begin the run anew to go on.
    """
    rows = Rows(path, minutes)
    evaluations = num_steps * (512 + 128)  # of data and noise, and of half the noise for the ratio correction
    try:
        for what in ("time", "count"):  # the second costs four times the first
            for seed in range(seeds):
                for name in names:
                    own = rows.get(name, seed, "compositional", measure=partial(_own, name, seed, num_steps))
                    for peer, run in (("scikit-learn GMM", best_gmm), ("scikit-learn KDE", best_kde)):
                        rows.get(name, seed, peer, measure=partial(_mixture, name, seed, run))
                    for peer, (_, _, each) in PEERS.items():
                        first = rows.found[name, 0, "compositional"][1]
                        setting = rows.get(name, "setting", peer, measure=partial(_tuned, name, peer, first))
                        steps = round(evaluations / (256 * each))
                        limit = partial(_Budget, **({"seconds": own[1]} if what == "time" else {"steps": steps}))
                        rows.get(name, seed, peer, what, measure=partial(_peer, name, seed, peer, setting, limit))
    except TimeoutError:
        progress(f"{minutes:g} minutes are over: the same command goes on")
    _peer_table(names, seeds, rows.found, evaluations)


def _peer_table(names: tuple[str, ...], seeds: int, found: dict[tuple[Any, ...], list[float]], count: int) -> None:
    def cells(values: list[list[float]]) -> list[Any]:
        if not values:
            return [0, "", "", ""]
        nats, seconds = [v[0] for v in values], statistics.median(v[1] for v in values)
        return [len(values), statistics.median(nats), f"{min(nats):.3f} to {max(nats):.3f}", seconds]

    table_rows = []
    for name in names:
        own = [found[key] for key in ((name, seed, "compositional") for seed in range(seeds)) if key in found]
        for method in ("compositional", "scikit-learn GMM", "scikit-learn KDE", *PEERS):
            setting = " ".join(f"{v:g}" for v in found.get((name, "setting", method), []))
            both = []
            for what in ("time", "count") if method in PEERS else ("",):
                keys = [(name, seed, method, *([what] if what else [])) for seed in range(seeds)]
                both.append([found[key] for key in keys if key in found])
            rows = (both * 2)[:2]
            steps = statistics.median(v[2] for v in rows[0]) if method in PEERS and rows[0] else ""
            table_rows.append((name, method, setting, *cells(rows[0]), steps, *cells(rows[1])))
        table_rows.append((name, "truth", "", len(own), statistics.median(v[2] for v in own) if own else "", *[""] * 7))
    names_of = ("data", "method", "setting", "seeds", "nats, equal time", "range", "CPU s", "steps", "seeds")
    table(
        f"Equal CPU seconds, and {count:,} evaluations of the energy or density",
        (*names_of, "nats, equal count", "range", "CPU s"),
        table_rows,
    )
