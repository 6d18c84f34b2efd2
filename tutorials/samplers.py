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
# # One Pyro model, many samplers
#
# The model below is plain Pyro. We sample it with Pyro's own NUTS and, after changing one import line, with this
# library's; then we read the diagnostics, choose among the engines, stop a run when it has drawn enough, resume one
# that was cut off, and run the same script on two processes. The last cell asserts the numbers.
#
# To run it: `pip install '.[plots]'`, then as a notebook (jupytext) or `python tutorials/samplers.py`. It takes about a
# minute. `PPL_MODELS_SMOKE=1` shortens it; `PPL_MODELS_OUT=out` writes the figures to `out/tutorial/`.

# %%
import os
import tempfile
import time
import warnings
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch

import inference

SMOKE = os.environ.get("PPL_MODELS_SMOKE", "0") not in ("", "0")
OUT = os.environ.get("PPL_MODELS_OUT")
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"  # told apart by people with colour-blindness
CHAINS, DRAWS, WARMUP = (16, 50, 50) if SMOKE else (64, 500, 200)
THEIRS = 15 if SMOKE else 100  # draws of Pyro

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
# ## The model
#
# Eight schools ran the same coaching programme; each reports an effect and its standard error (Rubin 1981). The effects
# come from a common normal distribution whose mean and spread are to be learned. Written with standardised effects
# `eta`, the posterior has no funnel.

# %%
EFFECT = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERROR = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def model(effect, error):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(effect)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("effect", dist.Normal(mu + tau * eta, error), obs=effect)


# %% [markdown]
# ## Pyro, then here
#
# The same two lines, from another module. Pyro runs one chain in this process; here 64 chains are rows of one program,
# and no chain waits for another's tree.

# %%
pyro.set_rng_seed(0)
start = time.perf_counter()
theirs = pyro.infer.MCMC(pyro.infer.NUTS(model), num_samples=THEIRS, warmup_steps=3 * THEIRS, disable_progbar=True)
theirs.run(EFFECT, ERROR)
pyro_seconds = time.perf_counter() - start

start = time.perf_counter()
ours = inference.MCMC(inference.NUTS(model), num_samples=DRAWS, warmup_steps=WARMUP, num_chains=CHAINS, progress=False)
ours.run(EFFECT, ERROR)
our_seconds = time.perf_counter() - start
print(
    f"Pyro: {THEIRS / pyro_seconds:.0f} draws a second; here: {CHAINS * DRAWS / our_seconds:.0f}, compilation included"
)

# %% [markdown]
# ## Reading the diagnostics
#
# `summary()` prints, for every scalar, mean and spread, the effective sample sizes and R-hat. Read it in this order:
#
# 1. *R-hat* compares chains with one another: above 1.01 they have not yet agreed, and no other number can be trusted.
# 2. *Bulk and tail ESS* say how many independent draws the mean and the 5 % and 95 % quantiles are worth. 400 in all is
#    enough for two digits.
# 3. *Divergences* are trajectories that the integrator lost: the posterior has a corner that the step size does
#    not fit. Reparametrise (`eta` above), or raise `target_accept_prob`.

# %%
table = ours.summary()
diagnostics = ours.diagnostics()

# %%
draws = ours.get_samples(group_by_chain=True)
ranks = draws["tau"].flatten().argsort().argsort().reshape(draws["tau"].shape)
figure, axes = plt.subplots(1, 2, figsize=(7, 2.6), layout="constrained")
for chain, color in enumerate((BLUE, ORANGE, GREY, "black")):
    axes[0].hist(ranks[chain].numpy(), bins=10, histtype="step", color=color)
axes[0].axhline(DRAWS / 10, color=GREY, lw=0.8, ls="--")
axes[0].set(ylim=(0, None), xticks=[0, CHAINS * DRAWS // 2, CHAINS * DRAWS])
axes[0].set(xlabel="rank of tau among all draws", ylabel="draws", title="four chains: flat is well mixed")
school = (draws["mu"][..., None] + draws["tau"][..., None] * draws["eta"]).flatten(0, 1)
low, middle, high = school.quantile(torch.tensor([0.05, 0.5, 0.95]), dim=0)
axes[1].errorbar(EFFECT, range(8), xerr=1.645 * ERROR, fmt="o", color=GREY, label="reported", alpha=0.5)
axes[1].errorbar(
    middle,
    [i + 0.25 for i in range(8)],
    xerr=torch.stack([middle - low, high - middle]),
    fmt="o",
    color=BLUE,
    label="posterior",
)
axes[1].set(xlabel="effect, 90 % interval", ylabel="school", title="effects are drawn together")
axes[1].set(ylim=(-0.5, 9.2), yticks=range(8), yticklabels=range(1, 9))
axes[1].legend(fontsize=7, loc="upper center", ncols=2)
show("eight_schools")

# %% [markdown]
# ## Which engine?
#
# | you have | take |
# |---|---|
# | a posterior of up to some thousand dimensions, a few chains | `NUTS` |
# | the same, 32 chains or more, or a GPU | `ChEES`: all chains share one learned trajectory length |
# | very many short chains | `MEADS` (no acceptance waste), `AdjustedMCLMC`; judge them by `rhat_nested` |
# | dimensions in the tens of thousands and tolerance for a small bias | `MCLMC` |
# | a network and minibatches | `SGHMC`, `AdaptiveSGHMC`, `SGLD` |
# | several modes | `ParallelTempering`, or `SMC`, which also gives log Z |
# | log Z | `SMC`, `ais_sandwich` (bounds from both sides), `bridge_sampling` on draws you have |
# | no time | `Laplace`, or `fit(ELBO(model, guide))` |
#
# They take the same model and run in the same driver.

# %%
engines = {"NUTS": inference.NUTS(model), "ChEES": inference.ChEES(model)}
rows = {}
for name, kernel in engines.items():
    run = inference.MCMC(kernel, num_samples=DRAWS, warmup_steps=WARMUP, num_chains=CHAINS, progress=False, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", inference.SamplerWarning)
        run.run(EFFECT, ERROR)
    found = run.diagnostics()
    ess = min(float(found[site]["n_eff"].min()) for site in ("mu", "tau", "eta"))
    rows[name] = {"tau": float(run.get_samples()["tau"].mean()), "ess": ess, "gradients": run.num_gradients}
    print(f"{name:6} mean of tau {rows[name]['tau']:.2f}, {ess:.0f} effective draws of {run.num_gradients:,} gradients")

# %% [markdown]
# ## Evidence
#
# Tempered SMC walks from the prior to the posterior and multiplies up the weights: log Z with its standard error.

# %%
smc = inference.SMC(model, num_particles=100 if SMOKE else 500, num_runs=4, progress=False)
smc.run(EFFECT, ERROR)
evidence = smc.log_evidence
print(f"log Z = {evidence.value:.2f} with standard error {evidence.standard_error:.2f}")

# %% [markdown]
# ## Stop when it is enough, keep draws on disk, resume
#
# `Stop` ends a run at the first look at which every criterion holds. With `checkpoint=` draws go to disk as they come;
# a run that was killed, started again by the same line, goes on to the same bits.

# %%
with tempfile.TemporaryDirectory() as folder:
    enough = inference.Stop(rhat=1.02, ess=100 if SMOKE else 400)
    line = {"num_samples": 200 if SMOKE else 5000, "warmup_steps": WARMUP, "num_chains": 16, "progress": False}
    first = inference.MCMC(inference.NUTS(model), checkpoint=folder, stop=enough, **line).run(EFFECT, ERROR)
    kept = first.get_samples(group_by_chain=True)["tau"].shape[1]
    again = inference.MCMC(inference.NUTS(model), checkpoint=folder, stop=enough, **line).run(EFFECT, ERROR)
    same = torch.equal(
        first.get_samples(group_by_chain=True)["tau"], again.get_samples(group_by_chain=True)["tau"][:, :kept]
    )
print(f"stopped after {kept} draws a chain, because {first.stopped}")

# %% [markdown]
# Where even the disk is too small, `StreamingMCMC` keeps statistics alone, those of `pyro.ops.streaming`.
#
# ## Two processes
#
# Nothing changes in the script:
#
#     torchrun --nproc-per-node=2 script.py
#
# Chains are split over the processes, which meet only where a window of the warm-up ends. Two processes with 32 chains
# each draw what one with 64 draws, to rounding; rank 0 gathers the draws and alone prints. If a process is killed, the
# others say which, and the same command resumes. Runs over seeds or settings go through `inference.sweep`, whose `map`
# takes `joblib.Parallel`.

# %%
mean = float(draws["tau"].mean())
worst = max(float(diagnostics[site]["r_hat"].max()) for site in ("mu", "tau", "eta"))
print(f"mean of tau {mean:.2f}, largest R-hat {worst:.3f}")
assert same
assert torch.isfinite(draws["tau"]).all()
assert abs(rows["NUTS"]["tau"] - rows["ChEES"]["tau"]) < (1.0 if SMOKE else 0.3)
if not SMOKE:
    # The reference: mean of tau 3.6, 10,000 draws of posteriordb.
    assert abs(mean - 3.6) < 0.15
    assert worst < 1.02
