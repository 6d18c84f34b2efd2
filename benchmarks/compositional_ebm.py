"""Unnormalised models: the paper's claims and the peers, on one core.

    python -m benchmarks.compositional_ebm landscape     # steps of exact gradient descent far from the noise
    python -m benchmarks.compositional_ebm variance      # Var(u) against beta and M, figure
    python -m benchmarks.compositional_ebm speed         # a step of each; cost against M and dimension, figure
    python -m benchmarks.compositional_ebm toys NAME     # test log-likelihoods in two dimensions, with NCE, GMM, KDE
    python -m benchmarks.compositional_ebm few           # default fits to 60, 300 and 1,000 rows, with GMM, KDE
    python -m benchmarks.compositional_ebm peers NAME    # the same with torchebm, zuko, normflows, at equal cost
    python -m benchmarks.compositional_ebm mixtures D    # log Z of a mixture in D dimensions, compositional and NCE
    python -m benchmarks.compositional_ebm digits        # density, accuracy, out-of-distribution AUROC
    python -m benchmarks.compositional_ebm regression    # KL of the conditional energy
    python -m benchmarks.compositional_ebm prior         # a VAE's gain by an energy prior

Each prints a table; figures go to ``out/compositional_ebm``.  ``--seeds N`` repeats and prints medians; with
``--minutes N`` peers and mixtures stop after so many, and the same command goes on.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.nn import PyroModule
from torch import Tensor, nn

from benchmarks import energy_densities as densities
from benchmarks import energy_peers
from benchmarks.energy_densities import best_kde, table
from inference import CompositionalLikelihood, fit
from inference.objectives.unnormalised import NoiseContrastive
from inference.objectives.unnormalised.compositional import mix
from inference.objectives.unnormalised.noise import GaussianNoise
from inference.runtime.generators import generator, scoped_seed
from ppl_models import ConditionalEnergyModel, EnergyClassifier, EnergyModel
from ppl_models.compositional_ebm import LatentEnergyPrior
from ppl_models.compositional_ebm.methods import NoiseMeasure, RelativeEnergy

RUNS = {  # of `benchmarks.run`: name, title, arguments
    "ebm-toys": ("Unnormalised models: two dimensions", "toys --seeds 5"),
    "ebm-few": ("Unnormalised models: few rows", "few --seeds 5"),
    "ebm-mixtures": ("Unnormalised models: 8 and 16 dimensions", "mixtures 8 16 --seeds 5"),
    "ebm-peers": ("Unnormalised models: peers", "peers --seeds 5"),
    "ebm-speed": ("Unnormalised models: a step", "speed"),
    "ebm-landscape": ("Unnormalised models: a mean far from the noise", "landscape"),
    "ebm-variance": ("Unnormalised models: variance of u", "variance"),
}

OUT = Path("out") / "compositional_ebm"


# ---------------------------------------------------------------- the landscape
class _Nodes(dist.Normal):
    """A grid as noise, whose weights are those of the rectangle rule."""

    has_rsample = False

    def __init__(self, grid: Tensor, log_density: Tensor) -> None:
        super().__init__(torch.zeros_like(grid), torch.ones_like(grid), validate_args=False)
        self.grid, self.log_density = grid, log_density

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.grid

    def log_prob(self, value: Tensor) -> Tensor:
        return self.log_density


class _Mean(PyroModule):
    """``l(x) = theta x - x^2 / 2``."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.ImproperUniform(constraints.real, (), ()), obs=x)
            pyro.factor("energy", self.theta * x - x**2 / 2)


def landscape(most: int = 3000) -> None:
    """Exact-gradient descent from theta = 0 to a mean R from the noise N(0, 1): steps until |theta - R| < 0.1.

    Expectations over noise are sums on a grid in the product's own objective; NCE and eNCE use their gradients in
    closed quadrature with (theta, c), as the method's table does.
    """
    rows = []
    for r in (4.0, 8.0, 16.0):
        grid = torch.linspace(-12.0, r + 12.0, 3001, dtype=torch.float64)
        width = float(grid[1] - grid[0])
        model = _Mean()
        law = _Nodes(grid, torch.full_like(grid, -math.log(width * len(grid))))

        def noise(law: Any = law) -> None:
            pyro.sample("x", law)

        class Grid(PyroModule):
            def __init__(self, law: Any) -> None:
                super().__init__()
                self.law = law

            def forward(self) -> None:
                pyro.sample("x", self.law)

        objective = CompositionalLikelihood(
            model, Grid(law), beta=1.0, correction="none", warmup_steps=0, on_collapse="ignore"
        )
        x = torch.full((2,), r, dtype=torch.float64)
        steps = 0
        while abs(float(model.theta.detach()) - r) >= 0.1 and steps < 100:
            model.zero_grad()
            objective(x).backward()
            with torch.no_grad():
                assert model.theta.grad is not None
                model.theta.sub_(0.5 * model.theta.grad)
            steps += 1
        row: list[Any] = [r, steps]
        p = torch.exp(-0.5 * (grid - r) ** 2) / math.sqrt(2 * math.pi) * width
        q = torch.exp(-0.5 * grid**2) / math.sqrt(2 * math.pi) * width
        base = 0.5 * math.log(2 * math.pi)
        for kind, normalised in (("nce", False), ("nce", True), ("ence", False), ("ence", True)):
            found = []
            for rate in (0.003, 0.01, 0.03, 0.1) if normalised else (0.1, 1.0, 3.0, 10.0):
                theta, c, target = 0.0, base, base + r**2 / 2
                for step in range(1, most + 1):
                    ratio = theta * grid + base - c
                    if kind == "nce":
                        at_data, at_noise = -torch.sigmoid(-ratio) * p / 2, torch.sigmoid(ratio) * q / 2
                    else:
                        at_data, at_noise = -0.25 * (-ratio / 2).exp() * p, 0.25 * (ratio / 2).exp() * q
                    slope = at_data + at_noise
                    g = torch.stack([(slope * grid).sum(), -slope.sum()])
                    if normalised:
                        g = g / g.norm().clamp(min=1e-300)
                    theta, c = theta - rate * float(g[0]), c - rate * float(g[1])
                    if not math.isfinite(theta) or abs(theta) > 1e3:
                        break
                    if abs(theta - r) < 0.1 and abs(c - target) < 0.2:
                        found.append(step)
                        break
            row.append(min(found) if found else f">{most}")
        rows.append(tuple(row))
    names = ("R", "likelihood (compositional, beta 1)", "NCE, GD", "NCE, normalised GD", "eNCE, GD", "eNCE, NGD")
    table("Steps of exact-gradient descent from 0 to R, best of four rates", names, rows)


# ---------------------------------------------------------------- variance of u
def variance() -> None:
    """Var(u) / Z^2 at fixed parameters, N(1, 1) from N(0, 1), against beta / (2 - beta) (e - 1) / M."""
    rows = []
    for m in (4, 16, 64, 256):
        for beta in (0.02, 0.1, 0.3, 1.0):
            draw, b = generator(m, f"variance {beta}"), torch.tensor(beta, dtype=torch.float64)
            chains, keep, skip = 400, 40, int(4 / beta)
            log_u, kept = torch.zeros(chains, dtype=torch.float64), []
            for step in range(skip + keep):
                z = torch.randn(m, chains, generator=draw)
                log_u = mix(log_u, torch.logsumexp(z.double() - 0.5, 0) - math.log(m), b)
                if step >= skip:
                    kept.append(log_u.exp())
            exact = beta / (2 - beta) * (math.e - 1) / m
            measured = float(torch.stack(kept).var())
            rows.append((m, beta, exact, measured, measured / exact))
    table("Relative variance of the running Z", ("M", "beta", "exact", "measured", "ratio"), rows)
    import matplotlib.pyplot as plt

    OUT.mkdir(parents=True, exist_ok=True)
    figure, ax = plt.subplots(figsize=(4.6, 3.4), layout="constrained")
    for m, colour in zip((4, 16, 64, 256), ("#0072B2", "#D55E00", "#009E73", "#CC79A7"), strict=True):
        own = [row for row in rows if row[0] == m]
        ax.loglog([row[1] for row in own], [row[2] for row in own], color=colour, lw=1)
        ax.loglog([row[1] for row in own], [row[3] for row in own], "o", color=colour, label=f"M = {m}")
    ax.set(xlabel="β", ylabel="Var(u) / Z²", title="lines: exact; dots: measured")
    ax.legend(frameon=False)
    figure.savefig(OUT / "variance.png", dpi=150)


# ---------------------------------------------------------------- speed
def _step_seconds(objectives: dict[str, nn.Module], x: Tensor, repeats: int = 20, rounds: int = 12) -> dict[str, float]:
    """CPU milliseconds of a step, Adam's included: the median over rounds in which each has its turn."""
    optimisers = {name: torch.optim.Adam(objective.parameters()) for name, objective in objectives.items()}
    found: dict[str, list[float]] = {name: [] for name in objectives}
    for _ in range(rounds + 1):
        for name, objective in objectives.items():
            started = time.process_time()
            for _ in range(repeats):
                optimisers[name].zero_grad()
                objective(x).backward()
                optimisers[name].step()
            found[name].append(1e3 * (time.process_time() - started) / repeats)
    return {name: statistics.median(times[1:]) for name, times in found.items()}


def speed() -> None:
    """CPU milliseconds of one step on the default network; "relative" leaves the noise's density out, as fits do."""
    rows, curves = [], []
    for dim, m in ((2, 64), (2, 256), (2, 1024), (16, 256), (64, 256)):
        with scoped_seed(0):
            x = torch.randn(256, dim)
            ebm = EnergyModel(event_shape=(dim,), hidden=(128, 128))
            noise = GaussianNoise.fit(x)
            ebm._start(x, noise, 0, frozen=False)
            alone: dict[str, Any] = {"on_collapse": "ignore"}
            model = RelativeEnergy(ebm.energy, (dim,), None)
            seconds = _step_seconds(
                {
                    "NCE": NoiseContrastive(ebm, noise, m),
                    "compositional": CompositionalLikelihood(ebm, noise, m, correction="none", **alone),
                    "ratio": CompositionalLikelihood(ebm, noise, m, **alone),
                    "relative": CompositionalLikelihood(model, NoiseMeasure(noise), m, **alone),
                },
                x,
            )
        curves.append((dim, m, seconds))
        plain, nce, ratio = seconds["compositional"], seconds["NCE"], seconds["ratio"]
        rows.append((dim, m, nce, plain, ratio, seconds["relative"], plain / nce, ratio / plain))
    names = ("D", "M", "NCE, ms", "plain, ms", "with ratio, ms", "relative, ms", "plain / NCE", "ratio / plain")
    table("One step, B = 256, network D-128-128-1", names, rows)
    import matplotlib.pyplot as plt

    OUT.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(1, 2, figsize=(7, 3), layout="constrained", sharey=True)
    for ax, key, fixed, label in ((axes[0], 1, (0, 2), "noise draws M (D = 2)"), (axes[1], 0, (1, 256), "dimension D")):
        own = [c for c in curves if c[fixed[0]] == fixed[1]]
        for name, marker in (("NCE", "s"), ("compositional", "o"), ("ratio", "^"), ("relative", "v")):
            ax.plot([c[key] for c in own], [c[2][name] for c in own], marker=marker, label=name)
        ax.set(xscale="log", xlabel=label, ylim=(0, None))
        places = sorted({int(c[key]) for c in own})  # type: ignore[arg-type]
        ax.set_xticks(places, [str(p) for p in places])
        ax.minorticks_off()
    axes[0].set_ylabel("CPU ms a step")
    axes[0].legend(frameon=False)
    figure.savefig(OUT / "cost.png", dpi=150)


# ---------------------------------------------------------------- digits, regression, prior
def _mixture_score(clf: EnergyClassifier, mixture: Any, x: Tensor) -> Any:
    return -mixture.score_samples(clf._components(x).numpy())


def _softmax_score(clf: EnergyClassifier, x: Tensor) -> Tensor:
    return -clf.predict_proba(x).max(1).values


def digits(seeds: int) -> None:
    """scikit-learn's digits: density of 16 components, accuracy, AUROC of flipped digits and image patches."""
    from sklearn.datasets import load_digits, load_sample_images
    from sklearn.metrics import roc_auc_score
    from sklearn.mixture import GaussianMixture

    raw = load_digits()
    order = np.random.default_rng(0).permutation(len(raw.data))
    x, y = torch.tensor(raw.data / 16, dtype=torch.float32)[order], torch.tensor(raw.target)[order]
    train, test = slice(0, 1300), slice(1300, None)
    flipped = x[test].reshape(-1, 8, 8).flip(1).reshape(-1, 64)
    grey = [p.mean(2)[: len(p) // 8 * 8, : p.shape[1] // 8 * 8] for p in load_sample_images().images]
    pictures = np.concatenate(grey)
    tiles = pictures.reshape(pictures.shape[0] // 8, 8, -1, 8).transpose(0, 2, 1, 3).reshape(-1, 64)
    patches = torch.tensor(tiles[:: len(tiles) // 500][:500] / 255, dtype=torch.float32)
    rows = []
    for seed in range(seeds):
        clf, started = EnergyClassifier(seed=seed), time.process_time()
        clf.fit(x[train], y[train], seed=seed, progress=False)
        seconds = time.process_time() - started
        z, held = clf._components(x[train]).numpy(), clf._components(x[test]).numpy()
        gmm = GaussianMixture(30, reg_covar=0.05, random_state=0).fit(z)
        kde, _ = best_kde(torch.tensor(z), torch.tensor(held))

        def auroc(score: Callable[[Tensor], Any], other: Tensor) -> float:
            inside, outside = np.asarray(score(x[test])), np.asarray(score(other))
            return float(roc_auc_score(np.r_[np.zeros(len(inside)), np.ones(len(outside))], np.r_[inside, outside]))

        scores: dict[str, Callable[[Tensor], Any]] = {
            "energy": clf.ood_score,
            "GMM": partial(_mixture_score, clf, gmm),
            "softmax": partial(_softmax_score, clf),
        }
        found = {n: (auroc(s, flipped), auroc(s, patches)) for n, s in scores.items()}
        accuracy = float((clf.predict(x[test]) == y[test]).float().mean())
        nats = float(clf.log_prob(x[test]).mean())
        rows.append(
            (seed, nats, float(gmm.score(held)), kde, accuracy, *[v for p in found.values() for v in p], seconds)
        )
    names = ("seed", "nats", "GMM(30)", "KDE", "accuracy", "flip", "patch", "GMM flip", "GMM patch", "softmax flip")
    table("Digits", (*names, "softmax patch", "CPU s"), rows)


def branches(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Data set 1 of the energy-regression code: two branches for x < 0, a log-normal for x >= 0."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-3, 3, n)
    sign = np.where(rng.uniform(size=n) < 0.8, 1, -1)
    left, right = sign * np.sin(x) + 0.075 * rng.normal(size=n), np.exp(0.25 * rng.normal(size=n)) - 1
    return x, np.where(x < 0, left, right)


def true_conditional(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """log p(y | x) of ``branches``."""
    from scipy.stats import lognorm, norm

    two = 0.8 * norm.pdf(y, np.sin(x), 0.075) + 0.2 * norm.pdf(y, -np.sin(x), 0.075)
    return np.where(x < 0, np.log(two + 1e-300), lognorm.logpdf(y + 1, 0.25))


def regression_kl(model: ConditionalEnergyModel) -> float:
    """KL(truth || model), the mean over 129 x, on 2048 points of y in (-3, 3)."""
    x, width = np.linspace(-2.95, 2.95, 129), 6 / 2048
    y = (np.arange(2048) + 0.5) * width - 3
    at_x, at_y = np.repeat(x, 2048), np.tile(y, 129)
    log_p = true_conditional(at_x, at_y).reshape(129, 2048)
    log_q = model.log_prob(at_y, at_x).double().numpy().reshape(129, 2048)
    p = np.exp(log_p) * width
    return float((p * (np.where(p > 0, log_p, 0.0) - log_q)).sum(1).mean())


def regression(seeds: int, num_steps: int = 2000) -> None:
    """KL of conditional energies by normaliser and noise draws."""
    rows = []
    for normaliser, draws in (("table", 64), ("network", 64), ("minibatch", 64), ("minibatch", 8)):
        for seed in range(seeds):
            model, started = ConditionalEnergyModel(normaliser=normaliser, seed=seed), time.process_time()
            model.fit(*branches(2000, seed), noise_samples=draws, num_steps=num_steps, seed=seed, progress=False)
            rows.append((normaliser, draws, seed, regression_kl(model), time.process_time() - started))
    table("Conditional energies", ("normaliser", "draws a row", "seed", "KL, nats", "CPU s"), rows)


class Autoencoder(nn.Module):
    """A VAE of the digits with a normal decoder of learned spread."""

    def __init__(self, latents: int = 8) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU())
        self.head = nn.Linear(128, 2 * latents)
        self.decoder = nn.Sequential(
            nn.Linear(latents, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 64)
        )
        self.log_scale = nn.Parameter(torch.tensor(-1.0))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the code."""
        mean, log_scale = self.head(self.encoder(x)).chunk(2, 1)
        return mean, log_scale.exp()

    def forward(self, x: Tensor) -> Tensor:
        """The negative evidence bound."""
        mean, scale = self.encode(x)
        z = mean + scale * torch.randn_like(mean)
        fit_term = dist.Normal(self.decoder(z), self.log_scale.exp()).log_prob(x).sum(1)
        divergence = 0.5 * (mean.square() + scale.square() - 1).sum(1) - scale.log().sum(1)
        return (divergence - fit_term).mean()


def prior(seeds: int, num_steps: int = 4000) -> None:
    """A VAE of the digits, then an energy prior on its codes."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    order = np.random.default_rng(0).permutation(len(raw.data))
    x = torch.tensor(raw.data / 16, dtype=torch.float32)[order]
    rows = []
    for seed in range(seeds):
        with scoped_seed(seed):
            vae = Autoencoder()
        fit(vae, x[:1300], num_steps=num_steps, batch_size=128, lr=1e-3, seed=seed, progress=False)
        energy = LatentEnergyPrior(8, seed=seed)
        with torch.no_grad(), scoped_seed(seed):
            mean, scale = vae.encode(x[:1300])
            result = energy.fit(mean, scale, seed=seed, progress=False)
            gains = []
            for part in (x[:1300], x[1300:]):
                center, spread = vae.encode(part)
                gains.append(energy.bound_gain(center + spread * torch.randn_like(center)))
        rows.append((seed, *gains, float(result.history["ess"][-100:].mean())))
    table("Energy prior of a digits VAE", ("seed", "bound gain, training", "bound gain, test", "ess share"), rows)


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("landscape", "variance", "speed", "toys", "few", "peers", "mixtures", "digits", "regression", "prior")
    parser.add_argument("part", choices=parts)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--bend", type=float, default=1.0)
    parser.add_argument("--scale", type=float, default=0.25)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.part == "toys":
        densities.toys(tuple(given.names) or densities.TOYS, given.seeds, given.steps)
    elif given.part == "few":
        densities.few(given.seeds)
    elif given.part == "peers":
        names = tuple(given.names) or ("8gaussians", "checkerboard")
        energy_peers.peers(names, given.seeds, given.steps, OUT / f"peers-{given.steps}.jsonl", given.minutes)
    elif given.part == "mixtures":
        for dim in given.names or ("8", "16"):
            rows = OUT / "mixtures.jsonl"
            densities.mixtures(int(dim), given.seeds, given.steps, given.bend, given.scale, rows, given.minutes)
    elif given.part == "digits":
        digits(given.seeds)
    elif given.part == "regression":
        regression(given.seeds, given.steps)
    elif given.part == "prior":
        prior(given.seeds, given.steps)
    else:
        {"landscape": landscape, "variance": variance, "speed": speed}[given.part]()


if __name__ == "__main__":
    main()
