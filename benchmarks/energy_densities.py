"""Densities that are known: two-dimensional toys and mixtures in 8 and 16 dimensions, and who learns them.

Called by ``python -m benchmarks.compositional_ebm toys|peers|mixtures``.
"""

import json
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks.record import progress
from inference import CollapseError
from inference.objectives.unnormalised.noise import GaussianNoise
from inference.runtime.generators import generator, scoped_seed
from ppl_models import EnergyModel
from ppl_models.compositional_ebm.noise import auto_noise

TOYS = ("8gaussians", "checkerboard", "rings", "pinwheel", "2spirals", "moons")
_RADII, _RING_SD = (0.75, 1.5, 2.25, 3.0), 0.08


def table(title: str, columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    """A Markdown table."""
    print(f"\n## {title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print("| " + " | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row) + " |", flush=True)


class Rows:
    """What was measured so far, a line of JSON each, so that a run that was ended goes on where it was."""

    def __init__(self, path: Path, minutes: float) -> None:
        self.path, self.end = path, time.monotonic() + 60 * minutes
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        self.found: dict[tuple[Any, ...], list[float]] = {tuple(k): v for k, v in map(json.loads, lines)}

    def get(self, *key: Any, measure: Callable[[], list[float]]) -> list[float]:
        """The row of a key, measured and written if it is new.

        Raises:
            TimeoutError: it is new, and the minutes are over.
        """
        if key not in self.found:
            if time.monotonic() > self.end:
                raise TimeoutError
            self.found[key] = measure()
            with self.path.open("a") as file:
                file.write(json.dumps([key, self.found[key]]) + "\n")
            progress(*key, *(f"{v:.4g}" for v in self.found[key]))
        return self.found[key]


# ---------------------------------------------------------------- two dimensions
def toy(name: str, n: int, seed: int) -> Tensor:
    """Two-dimensional densities of the FFJORD code, ``(n, 2)``."""
    rng = np.random.default_rng(seed)
    if name == "8gaussians":
        angle = rng.integers(8, size=n) * np.pi / 4
        x = 2 * np.sqrt(2) * np.stack([np.cos(angle), np.sin(angle)], 1) + rng.normal(size=(n, 2)) * 0.5 / np.sqrt(2)
    elif name == "checkerboard":
        first = rng.uniform(size=n) * 4 - 2
        second = rng.uniform(size=n) - rng.integers(0, 2, n) * 2 + np.floor(first) % 2
        x = 2 * np.stack([first, second], 1)
    elif name == "rings":
        radius = np.array(_RADII)[rng.integers(4, size=n)]
        angle = rng.uniform(size=n) * 2 * np.pi
        x = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1) + _RING_SD * rng.normal(size=(n, 2))
    elif name == "pinwheel":
        features = rng.normal(size=(n, 2)) * np.array([0.3, 0.1]) + np.array([1.0, 0.0])
        angle = rng.integers(5, size=n) * 2 * np.pi / 5 + 0.25 * np.exp(features[:, 0])
        turn = np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)], 1).reshape(-1, 2, 2)
        x = 2 * np.einsum("ti,tij->tj", features, turn)
    elif name == "2spirals":
        length = np.sqrt(rng.uniform(size=n)) * 540 * 2 * np.pi / 360
        arm = np.where(rng.uniform(size=n) < 0.5, 1.0, -1.0)
        x = np.stack([-np.cos(length) * length, np.sin(length) * length], 1) + rng.uniform(size=(n, 2)) * 0.5
        x = arm[:, None] * x / 3 + 0.1 * rng.normal(size=(n, 2))
    elif name == "moons":
        upper = rng.uniform(size=n) < 0.5
        angle = rng.uniform(size=n) * np.pi
        x = np.where(upper[:, None], np.stack([np.cos(angle), np.sin(angle)], 1), 0.0)
        x = x + np.where(upper[:, None], 0.0, np.stack([1 - np.cos(angle), 0.5 - np.sin(angle)], 1))
        x = 2 * (x + 0.1 * rng.normal(size=(n, 2))) + np.array([-1.0, -0.2])
    else:
        raise ValueError(f"toy must be one of {TOYS}, got {name!r}")
    return torch.tensor(x, dtype=torch.float32)


def true_log_prob(name: str, x: Tensor) -> Tensor:
    """True log-density ``(row,)`` of a toy, by a sum over its latent angle or length where it has one."""
    x = x.double()
    if name == "checkerboard":
        first = x[:, 0] / 2
        low = first.floor() % 2
        second = x[:, 1] / 2 - low
        inside = (first.abs() < 2) & (((second >= 0) & (second < 1)) | ((second >= -2) & (second < -1)))
        return torch.where(inside, -math.log(32.0), -math.inf)
    if name == "rings":
        norm, variance = x.norm(dim=1, keepdim=True), _RING_SD**2
        radii = torch.tensor(_RADII, dtype=torch.float64)
        bessel = torch.special.i0e(norm * radii / variance).log()  # of I0, scaled by exp(-argument)
        ring = -((norm - radii) ** 2) / (2 * variance) + bessel - math.log(2 * math.pi * variance)
        return ring.logsumexp(1) - math.log(4)
    if name == "pinwheel":
        return _pinwheel(x)
    blocks = []
    for part in x.split(500):
        if name == "8gaussians":
            angle = torch.arange(8, dtype=torch.float64) * math.pi / 4
            centres, spread = 2 * math.sqrt(2) * torch.stack([angle.cos(), angle.sin()], 1), 0.5 / math.sqrt(2)
            terms = dist.Normal(centres, spread).to_event(1).log_prob(part[:, None])
        elif name == "moons":
            angle = (torch.arange(600, dtype=torch.float64) + 0.5) / 600 * math.pi
            upper = torch.stack([angle.cos(), angle.sin()], 1)
            lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], 1)
            centres = 2 * torch.cat([upper, lower]) + torch.tensor([-1.0, -0.2], dtype=torch.float64)
            terms = dist.Normal(centres, 0.2).to_event(1).log_prob(part[:, None])
        elif name == "2spirals":  # a uniform square of side 1/6 and a normal of 0.1 about each point of two arms
            length = ((torch.arange(600, dtype=torch.float64) + 0.5) / 600).sqrt() * 3 * math.pi
            low = torch.stack([-length.cos() * length, length.sin() * length], 1) / 3
            low = torch.cat([low, -low - 1 / 6])
            phi = torch.special.ndtr
            mass = phi((part[:, None] - low) / 0.1) - phi((part[:, None] - low - 1 / 6) / 0.1)
            terms = (6 * mass).clamp(min=1e-300).log().sum(2)
        else:
            raise ValueError(f"toy must be one of {TOYS}, got {name!r}")
        blocks.append(terms.logsumexp(1) - math.log(terms.shape[1]))
    return torch.cat(blocks)


def _pinwheel(x: Tensor) -> Tensor:
    """A turn by an angle that depends on the first feature: its roots on a grid, and the map's determinant."""
    grid = torch.linspace(-0.6, 2.6, 401, dtype=torch.float64)

    def turned(f: Tensor, part: Tensor, k: int) -> tuple[Tensor, Tensor]:
        angle = k * 2 * math.pi / 5 + 0.25 * f.exp()
        cosine, sine = angle.cos(), angle.sin()
        u, v = part[:, :1] / 2, part[:, 1:] / 2
        return u * cosine - v * sine, u * sine + v * cosine  # the row vector times the transposed turn

    blocks = []
    for part in x.split(500):
        total = torch.zeros(len(part), dtype=torch.float64)
        for k in range(5):
            gap = turned(grid, part, k)[0] - grid
            row, place = torch.nonzero(gap[:, :-1] * gap[:, 1:] < 0, as_tuple=True)
            before, after = gap[row, place], gap[row, place + 1]
            f = (grid[place] + (grid[1] - grid[0]) * before / (before - after))[:, None]
            other = turned(f, part[row], k)[1]
            determinant = 4 * (1 + 0.25 * f.exp() * other).abs()
            p = dist.Normal(1.0, 0.3).log_prob(f) + dist.Normal(0.0, 0.1).log_prob(other) - determinant.log()
            total.index_add_(0, row, p[:, 0].exp() / 5)
        blocks.append(total.log())
    return torch.cat(blocks)


def truth(name: str, x: Tensor) -> float:
    """Mean true log-density of draws."""
    return float(true_log_prob(name, x).mean())


def best_gmm(train: Tensor, test: Tensor, sizes: tuple[int, ...] = (8, 16, 32, 64)) -> tuple[float, float]:
    """scikit-learn's mixture, its size by a held-out fifth of the training data: nats and CPU seconds."""
    from sklearn.mixture import GaussianMixture

    started, cut = time.process_time(), len(train) * 4 // 5
    scores = {k: GaussianMixture(k, random_state=0).fit(train[:cut]).score(train[cut:]) for k in sizes}
    best = max(scores, key=scores.__getitem__)
    value = GaussianMixture(best, random_state=0).fit(train).score(test)
    return float(value), time.process_time() - started


def best_kde(
    train: Tensor, test: Tensor, most: int = 2000, widths: tuple[float, ...] = (0.05, 0.08, 0.12, 0.2, 0.3)
) -> tuple[float, float]:
    """scikit-learn's kernel density, its bandwidth by held-out data; scored on the first ``most`` test rows."""
    from sklearn.neighbors import KernelDensity

    started, cut = time.process_time(), len(train) * 4 // 5
    held = train[cut:][:most]
    scores = {h: KernelDensity(bandwidth=h).fit(train[:cut]).score(held) for h in widths}
    best = max(scores, key=scores.__getitem__)
    value = KernelDensity(bandwidth=best).fit(train).score(test[:most]) / min(most, len(test))
    return float(value), time.process_time() - started


def toys(names: tuple[str, ...], seeds: int, num_steps: int = 2000) -> None:
    """Test log-likelihood in nats, 10,000 rows to train and to test, medians over seeds; CPU seconds."""
    rows = []
    for name in names:
        scores: dict[str, list[float]] = {}
        clock: dict[str, list[float]] = {}
        lags, over, under = [], [], []
        for seed in range(seeds):
            train, test = toy(name, 10_000, 2 * seed), toy(name, 10_000, 2 * seed + 1)
            found = {"truth": truth(name, test)}
            for method in ("compositional", "nce"):
                ebm, started = EnergyModel(event_shape=(2,), seed=seed), time.process_time()
                ebm.fit(train, method=method, num_steps=num_steps, seed=seed, progress=False)
                clock.setdefault(method, []).append(time.process_time() - started)
                found[method] = float(ebm.log_prob(test).mean())
                if method == "compositional":
                    assert ebm.result is not None
                    exact = ebm.log_partition("quadrature", 360_000).value
                    lags.append(abs(float(ebm.result.history["log_partition"][-1]) - exact))
            for peer, run in (("GMM", best_gmm), ("KDE", best_kde)):
                found[peer], seconds = run(train, test)
                clock.setdefault(peer, []).append(seconds)
            over.append(found["compositional"] - found["truth"])
            under.append(found["compositional"] - max(found["GMM"], found["KDE"]))
            for method, value in found.items():
                scores.setdefault(method, []).append(value)
        for method, values in scores.items():
            seconds = statistics.median(clock[method]) if method in clock else math.nan
            spread = f"{min(values):.3f} to {max(values):.3f}"
            rows.append((name, method, round(statistics.median(values), 3), spread, seconds))
        print(
            f"{name}: least gain on the best of GMM and KDE {min(under):.3f}, most above the truth {max(over):.3f}, "
            f"largest |log u - grid log Z| {max(lags):.3f}",
            flush=True,
        )
    table("Test log-likelihood", ("data", "method", "median nats", "range", "CPU s"), rows)


def few(seeds: int) -> None:
    """Default fits to few rows: nats on 5,000 test rows below the truth, with a mixture and a kernel density beside."""
    laws: dict[str, tuple[Callable[[int, int], Tensor], Callable[[Tensor], Tensor]]] = {
        "normal": (lambda n, s: torch.randn(n, 1, generator=generator(s, "few")), lambda x: _normal(x)),
        "exponential": (
            lambda n, s: -torch.rand(n, 1, generator=generator(s, "few")).clamp_min(1e-7).log(), lambda x: -x[:, 0],
        ),
        "normal in 5 dimensions": (lambda n, s: torch.randn(n, 5, generator=generator(s, "few")), lambda x: _normal(x)),
        "8gaussians": (lambda n, s: toy("8gaussians", n, s), lambda x: true_log_prob("8gaussians", x)),
    }  # fmt: skip
    rows = []
    for name, (draw, log_prob) in laws.items():
        for count in (60, 300, 1000):
            short: dict[str, list[float]] = {"EnergyModel": [], "GMM": [], "KDE": []}
            clock = []
            for seed in range(seeds):
                train, test = draw(count, 2 * seed), draw(5000, 2 * seed + 1)
                best = float(log_prob(test).mean())
                ebm, started = EnergyModel(event_shape=tuple(train.shape[1:]), seed=seed), time.process_time()
                ebm.fit(train, seed=seed, progress=False)
                clock.append(time.process_time() - started)
                short["EnergyModel"].append(best - float(ebm.log_prob(test).mean()))
                short["GMM"].append(best - best_gmm(train, test, (1, 2, 4, 8, 16))[0])
                score = best_kde(train, test, 5000, (0.05, 0.1, 0.2, 0.3, 0.5, 0.8))[0]
                short["KDE"].append(best - score)
            spread = [f"{statistics.median(v):.3f} ({min(v):.3f} to {max(v):.3f})" for v in short.values()]
            rows.append((name, count, *spread, statistics.median(clock)))
            progress(*rows[-1])
    table("Nats below the truth, few rows", ("data", "rows", "EnergyModel", "GMM", "KDE", "CPU s of EnergyModel"), rows)


def _normal(x: Tensor) -> Tensor:
    return -0.5 * (x.square() + math.log(2 * math.pi)).sum(1)


# ---------------------------------------------------------------- eight and sixteen dimensions
class KnownMixture:
    """Eight components about standard normal centres, straight or bent; ``scale`` is their coordinates' spread.

    A bent component moves every odd coordinate by the square of the even one before it, which keeps volumes, so that
    its density stays known while no normal is like it.
    """

    def __init__(self, dim: int, bend: float, scale: float, seed: int, components: int = 8) -> None:
        self.dim, self.bend, self.scale = dim, bend, scale
        self.draws = generator(seed, "mixture")
        self.centres = torch.randn(components, dim, generator=self.draws)

    def sample(self, n: int) -> Tensor:
        """``(n, dim)``."""
        z = torch.randn(n, self.dim, generator=self.draws)
        z[:, 1::2] += self.bend * (z[:, ::2].square() - 1)
        index = torch.randint(len(self.centres), (n,), generator=self.draws)
        return self.centres[index] + self.scale * z

    def log_prob(self, x: Tensor) -> Tensor:
        """``(row,)`` in float64."""
        z = (x.double()[:, None] - self.centres.double()) / self.scale
        odd = z[..., 1::2] - self.bend * (z[..., ::2].square() - 1)
        square = z[..., ::2].square().sum(2) + odd.square().sum(2)
        constant = self.dim * (0.5 * math.log(2 * math.pi) + math.log(self.scale)) + math.log(len(self.centres))
        return torch.logsumexp(-0.5 * square, 1) - constant


def exact_log_z(ebm: EnergyModel, law: KnownMixture, num: int = 100_000) -> tuple[float, float]:
    """log Z of what was learned, and its error, from draws of the truth and of a noise in equal parts."""
    noise = ebm._noise()
    with torch.no_grad(), scoped_seed(1):
        z = torch.cat([law.sample(num // 2), noise.draw(num // 2)])
        log_q = torch.logaddexp(law.log_prob(z), noise.log_prob(z).double()) - math.log(2)
        weights = ebm._law(None).log_prob(z).double() - log_q
    value = torch.logsumexp(weights, 0) - math.log(len(z))
    return float(value), float((weights - value).exp().std()) / math.sqrt(len(z))


def mixture_fit(
    law: KnownMixture, train: Tensor, method: str, noise: Any, steps: int, seed: int, lr: float = 2e-2, draws: int = 512
) -> Any:
    """A fitted model, its learned log Z and the CPU seconds."""
    ebm, started = EnergyModel(event_shape=(law.dim,), hidden=(64, 64), seed=seed), time.process_time()
    options: dict[str, Any] = {"noise_samples": draws, "lr": lr, "progress": False}
    ebm.fit(train, noise=noise, method=method, num_steps=steps, seed=seed, **options)
    assert ebm.result is not None
    return ebm, float(ebm.result.history["log_partition"][-1]), time.process_time() - started


_RATES = (2e-3, 5e-3, 1e-2, 2e-2)
_ARMS = tuple((method, noise) for noise in ("adaptive", "one normal") for method in ("compositional", "nce"))


def _noise_of(name: str, train: Tensor) -> Any:
    return auto_noise(train) if name == "adaptive" else GaussianNoise.fit(train, 1.3)


def _clock(law: KnownMixture) -> list[float]:
    """CPU seconds of a step of each arm, medians of three turns, and of fitting the adaptive noise."""
    train, started = law.sample(20_000), time.process_time()
    noises = {name: _noise_of(name, train) for name in ("one normal", "adaptive")}
    fitting = time.process_time() - started
    found: list[list[float]] = []
    for _ in range(3):
        turn = [[mixture_fit(law, train, m, noises[n], k, 0)[2] for k in (50, 250)] for m, n in _ARMS]
        found.append([(more - few) / 200 for few, more in turn])
    return [statistics.median(arm) for arm in zip(*found, strict=True)] + [fitting]


def _rate(law: KnownMixture, method: str, noise: str, steps: int) -> list[float]:
    """The rate that serves held-out rows best."""
    train = law.sample(20_000)
    train, held = train[: len(train) * 4 // 5], train[len(train) * 4 // 5 :]
    scores = {}
    for rate in _RATES:
        try:
            ebm, _, _ = mixture_fit(law, train, method, _noise_of(noise, train), steps, 0, rate)
        except CollapseError:
            continue
        exact, _ = exact_log_z(ebm, law)
        scores[rate] = float(ebm._law(exact).log_prob(held).detach().mean().nan_to_num(nan=-math.inf))
    return [max(scores, key=scores.__getitem__) if scores else _RATES[0]]


def _arm(law: KnownMixture, method: str, noise: str, steps: int, seed: int, rate: float) -> list[float]:
    """Learned log Z less the exact one, the latter's error, nats, the truth's, CPU seconds, log Z after the fit."""
    train, test = law.sample(20_000), law.sample(5000)
    best = float(law.log_prob(test).mean())
    try:
        ebm, learned, seconds = mixture_fit(
            law, train, method, "auto" if noise == "adaptive" else _noise_of(noise, train), steps, seed, rate
        )
    except CollapseError:
        return [math.nan] * 3 + [best] + [math.nan] * 2
    exact, error = exact_log_z(ebm, law)
    nats = float(ebm._law(exact).log_prob(test).mean().detach())
    return [learned - exact, error, nats, best, seconds, float(ebm.log_z) - exact]


def mixtures(dim: int, seeds: int, num_steps: int, bend: float, scale: float, path: Path, minutes: float) -> None:
    """The learned log Z beside the exact one: compositional with adaptive noise, and NCE for as many CPU seconds.

    NCE runs with the same noise, and with the one inflated normal that is its usual noise; each arm's rate is chosen
    on a fifth of the training rows of the first seed. 512 noise draws and 256 rows a step. Rows in the file ``path``
    are not measured again, and none is begun after so many ``minutes``.
    """
    rows = Rows(path, minutes)
    laws = partial(KnownMixture, dim, bend, scale)
    key = (dim, bend, scale, num_steps)
    steps: dict[tuple[str, str], int] = {}
    try:
        clock = rows.get(*key, "seconds a step, and of the noise", measure=lambda: _clock(laws(0)))
        for (method, noise), each in zip(_ARMS, clock, strict=False):
            spare = 0.0 if noise == "adaptive" else clock[-1]  # a single normal is there at once
            budget = num_steps * clock[0] + spare
            steps[method, noise] = round(budget / each) if method == "nce" else num_steps
        for method, noise in _ARMS:
            fit_rate = partial(_rate, laws(0), method, noise, steps[method, noise])
            rate = rows.get(*key, "rate", method, noise, measure=fit_rate)[0]
            for seed in range(seeds):
                fit_arm = partial(_arm, laws(seed), method, noise, steps[method, noise], seed, rate)
                rows.get(*key, seed, method, noise, measure=fit_arm)
    except TimeoutError:
        progress(f"{minutes:g} minutes are over: the same command goes on")
    made: list[tuple[Any, ...]] = []
    for seed in range(seeds):
        for method, noise in _ARMS:
            if (found := rows.found.get((*key, seed, method, noise))) is not None:
                rate = rows.found[(*key, "rate", method, noise)][0]
                made.append((dim, seed, f"{method}, {noise}", rate, steps[method, noise], *found))
    names = ("D", "seed", "method, noise", "rate", "steps", "learned log Z - exact", "s.e.", "test nats", "truth")
    table(f"Mixtures of known density, bend {bend:g}, scale {scale:g}", (*names, "CPU s", "after the fit"), made)
