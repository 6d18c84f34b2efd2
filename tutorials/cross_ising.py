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
# # One Ising model, four answers
#
# The same little lattice is asked the same questions (log Z, and the probability that a spin is up) by four methods of
# this library: enumeration, which is the truth; annealed importance sampling, which gives log Z with an error bar; the
# mean field of a monotone Boltzmann machine, which is fast and biased; and a marginalization model, which learns all
# marginals at once. What each is good for shows best side by side.
#
# To run it: as a notebook (jupytext) or `python tutorials/cross_ising.py`. It takes about a minute.
# `PPL_MODELS_SMOKE=1` shortens it; `PPL_MODELS_OUT=out` writes the figure to `out/tutorial/`.

# %%
import os
import time
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch

from ppl_models import MarginalizationModel, MonotoneDBM

SMOKE = os.environ.get("PPL_MODELS_SMOKE", "0") not in ("", "0")
OUT = os.environ.get("PPL_MODELS_OUT")
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
torch.set_num_threads(1)
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
# Nine spins on a 3 x 3 grid, log f(s) = J sum over edges of s_i s_j + sum of h_i s_i, s = -1 or 1. The coupling is weak
# enough for the machine's bound of monotonicity, which is what makes its mean field unique. The fields differ, so
# that the spins do.

# %%
WIDTH, COUPLING = 3, 0.15
N = WIDTH**2
edges = [(i, i + 1) for i in range(N) if i % WIDTH < WIDTH - 1] + [(i, i + WIDTH) for i in range(N - WIDTH)]
field = torch.linspace(-0.6, 0.8, N, dtype=torch.float64)
adjacency = torch.zeros(N, N, dtype=torch.float64)
for i, j in edges:
    adjacency[i, j] = adjacency[j, i] = 1.0


def log_density(x):
    """log f of states 0 and 1, ``(B, N)``; an edge counts once."""
    s = 2 * x.to(field) - 1
    return 0.5 * COUPLING * ((s @ adjacency) * s).sum(-1) + s @ field


# %% [markdown]
# ## Enumeration
#
# 512 states: the truth for everything below.

# %%
states = (torch.arange(2**N)[:, None] >> torch.arange(N)) & 1
log_f = log_density(states)
true_log_z = float(log_f.logsumexp(0))
true_up = ((log_f - true_log_z).exp()[:, None] * states).sum(0)
print(f"log Z = {true_log_z:.4f}")

# %% [markdown]
# ## The Boltzmann machine: mean field and annealed importance sampling
#
# Its potentials act on one-hot states, so a coupling J becomes a 2 x 2 block with J on the diagonal and -J off it.
# `from_potentials` refuses couplings that break its bound.

# %%
sign = torch.tensor([-1.0, 1.0], dtype=torch.float64)
phi = torch.kron(COUPLING * adjacency, torch.outer(sign, sign))
bias = torch.outer(field, sign).flatten()
start = time.perf_counter()
dbm = MonotoneDBM.from_potentials(phi, bias, [2] * N, monotonicity=0.05)
mean_field = dbm.marginals()
seconds = {"mean field": time.perf_counter() - start}
field_up = mean_field.probabilities[0, :, 1].detach().double()
start = time.perf_counter()
annealed = dbm.log_partition(method="ais", num_chains=200 if SMOKE else 1000, num_temperatures=50 if SMOKE else 200)
seconds["AIS"] = time.perf_counter() - start
print(f"AIS: log Z = {annealed.value:.4f} +- {annealed.standard_error:.4f}")

# %% [markdown]
# ## The marginalization model
#
# It sees the energy only. Afterwards the log-probability of any subset of spins, log Z among them, is one pass of its
# network.

# %%
start = time.perf_counter()
mam = MarginalizationModel([2] * N, hidden=32 if SMOKE else 64, depth=1 if SMOKE else 2)
mam.fit_energy(log_density, num_steps=60 if SMOKE else 1500, batch_size=128, lr=2e-3, progress=False)
seconds["marginalization model"] = time.perf_counter() - start
learned = mam.log_partition(num_samples=1024 if SMOKE else 4096)
one_up = torch.full((N, N), -1)
one_up[range(N), range(N)] = 1
learned_up = mam.log_prob(one_up).double().exp()
print(f"marginalization model: log Z = {learned.value:.4f} +- {learned.standard_error:.4f}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
left.axhline(true_log_z, color=GREY, lw=1, label="enumeration")
for place, (name, value, error, colour) in enumerate(
    (
        ("AIS", annealed.value, annealed.standard_error, BLUE),
        ("marginalization\nmodel", learned.value, learned.standard_error, GREEN),
    )
):
    left.errorbar([place], [value], [2 * error], fmt="o", color=colour, capsize=3)
    left.text(place + 0.08, value, name, fontsize=8, va="center")
left.set(xlim=(-0.5, 1.9), xticks=[], ylabel="log Z (two standard errors)")
left.legend(fontsize=8, loc="lower right")
right.plot([0, 1], [0, 1], color=GREY, lw=0.8)
right.plot(true_up, field_up, "o", color=ORANGE, ms=4, label="mean field")
right.plot(true_up, learned_up, "s", color=GREEN, ms=4, mfc="none", label="marginalization model")
low, high = float(true_up.min()) - 0.05, float(true_up.max()) + 0.05
right.set(xlim=(low, high), ylim=(low, high), xlabel="true P(spin up)", ylabel="answer", aspect="equal")
right.legend(fontsize=8)
show("cross_ising")

# %% [markdown]
# Mean field pushes every spin further the way that it leans already: it has each spin see its neighbours' means and not
# their doubts. Its answer costs milliseconds and is the same from any start. AIS gives log Z with an error that can be
# believed, and nothing else. The marginalization model takes longest to learn, and then answers everything.
#
# ## The numbers

# %%
errors = {"mean field": (field_up - true_up).abs().max(), "marginalization model": (learned_up - true_up).abs().max()}
for name, error in errors.items():
    print(f"{name:22} largest error of P(up) {float(error):.3f}, {seconds[name]:.2f} s")
assert abs(annealed.value - true_log_z) < 5 * annealed.standard_error + 1e-3
assert float(mean_field.residual.max()) < 1e-4
# The coupling is weak, so mean field is near; but its bias is there, and of one sign: away from one half.
assert float(errors["mean field"]) < 0.1
if not SMOKE:
    assert abs(learned.value - true_log_z) < 0.05
    assert float(errors["marginalization model"]) < 0.05
