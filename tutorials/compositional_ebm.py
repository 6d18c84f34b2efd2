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
# # Densities known up to a constant
#
# A law cut off at zero, a density drawn as a landscape, a detector of strange images: each is easy to write as
# `exp(-energy)` and hard to fit, because the constant that makes it integrate to one is unknown and moves with the
# parameters. `EnergyModel` fits such models by maximum likelihood without Markov chains, and says what log Z is and how
# far to trust it. The method is that of Jiang et al., ICML 2023 (arXiv:2306.07485).
#
# To run it: `pip install '.[plots,data]'`, then as a notebook (jupytext) or `python tutorials/compositional_ebm.py`. It
# takes about a minute. `PPL_MODELS_SMOKE=1` shortens it to seconds with results that mean little, and
# `PPL_MODELS_OUT=out` writes the figures to `out/tutorial/`.

# %%
import math
import os
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import torch

from ppl_models import EnergyClassifier, EnergyModel
from ppl_models.compositional_ebm import TruncatedNormal

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
# ## A law that was cut
#
# Three thousand draws of N(0.5, 1), of which only the positive ones were kept. Their mean and standard deviation
# describe another law; the likelihood of the cut law, whose constant depends on both parameters, finds the first one.

# %%
drawn = 0.5 + torch.randn(6000, generator=torch.Generator().manual_seed(0))
x = drawn[drawn > 0][:3000]
law = TruncatedNormal(low=0.0)
result = law.fit(x, num_steps=500 if SMOKE else 2000, progress=False)
print(f"naive: mean {float(x.mean()):.3f}, standard deviation {float(x.std()):.3f}")
print(f"cut law: mu {law.location:.3f}, sigma {law.scale:.3f}")
print(result.summary())

# %%
grid = torch.linspace(0, 4, 300)
figure, ax = plt.subplots(figsize=(5, 3.2), layout="constrained")
ax.hist(x.numpy(), bins=60, density=True, color="#DDDDDD")
ax.plot(grid.numpy(), law.log_prob(grid).exp().numpy(), color=BLUE, label="cut law, fitted")
wide = torch.linspace(-1, 4, 300)
naive = torch.distributions.Normal(x.mean(), x.std()).log_prob(wide).exp()
ax.plot(wide.numpy(), naive.numpy(), color=ORANGE, ls="--", label="normal with the naive moments")
ax.set(xlabel="x", ylabel="density", ylim=(0, 0.85))
ax.legend()
show("ebm_truncated")

# %% [markdown]
# ## A density in the plane, and its log Z
#
# The default network is a tilt: its energy starts at zero, where the model is the normal law that the noise draws from.
# In training a running estimate follows log Z; afterwards a fresh one is made from 100,000 draws. In two dimensions
# both can be held against a sum over a grid.


# %%
def eight_gaussians(n: int, seed: int) -> torch.Tensor:
    """Eight small normals on a circle."""
    draw = torch.Generator().manual_seed(seed)
    angle = torch.randint(8, (n,), generator=draw) * math.pi / 4
    centre = 2 * math.sqrt(2) * torch.stack([angle.cos(), angle.sin()], 1)
    return centre + 0.5 / math.sqrt(2) * torch.randn(n, 2, generator=draw)


ebm = EnergyModel(event_shape=(2,))
fitted = ebm.fit(eight_gaussians(10_000, 1), num_steps=300 if SMOKE else 2000, progress=False)
exact = ebm.log_partition("quadrature", num_samples=160_000)
sampled = ebm.log_partition("importance", num_samples=100_000)
print(f"grid {exact.value:.4f}; importance {sampled.value:.4f} +- {sampled.standard_error:.4f}, k {sampled.khat:.2f}")
print(f"running estimate at the end {float(fitted.history['log_partition'][-1]):.4f}")

# %%
side = torch.linspace(-4.5, 4.5, 150)
points = torch.cartesian_prod(side, side)
figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.6), layout="constrained")
density = ebm.log_prob(points).exp().reshape(150, 150).T.numpy()
picture = axes[0].imshow(density, extent=(-4.5, 4.5, -4.5, 4.5), origin="lower", cmap="viridis")
figure.colorbar(picture, ax=axes[0], label="fitted density")
axes[0].set(xlabel="x₁", ylabel="x₂")
steps = np.arange(1, len(fitted.history["log_partition"]) + 1)
axes[1].plot(steps, fitted.history["log_partition_batch"].numpy(), color=GREY, lw=0.3, label="one noise batch")
axes[1].plot(steps, fitted.history["log_partition"].numpy(), color=BLUE, label="running estimate")
axes[1].axhline(exact.value, color=ORANGE, ls="--", label="grid, at the end")
axes[1].set(xlabel="step", ylabel="log Z")
axes[1].legend()
show("ebm_density")

# %% [markdown]
# ## Strange digits
#
# A classifier whose logits are also a density: `log p(x)` says how usual an image is. Digits turned upside down are
# made of the same strokes, and yet less usual.

# %%
try:
    from sklearn.datasets import load_digits

    raw = load_digits()
except ImportError:
    raw = None

gap = math.nan
if raw is not None:
    order = np.random.default_rng(0).permutation(len(raw.data))
    images, labels = torch.tensor(raw.data / 16, dtype=torch.float32)[order], torch.tensor(raw.target)[order]
    clf = EnergyClassifier(num_classes=10)
    clf.fit(images[:1300], labels[:1300], num_steps=100 if SMOKE else 1500, progress=False)
    usual, flipped = images[1300:], images[1300:].reshape(-1, 8, 8).flip(1).reshape(-1, 64)
    gap = float(clf.ood_score(flipped).mean() - clf.ood_score(usual).mean())
    accuracy = float((clf.predict(usual) == labels[1300:]).float().mean())
    print(f"accuracy {accuracy:.3f}; upside down, a digit is {gap:.1f} nats less usual")
    figure, ax = plt.subplots(figsize=(5, 3.2), layout="constrained")
    bins = np.linspace(5, 45, 41)
    ax.hist(clf.ood_score(usual).numpy(), bins=bins, color=BLUE, alpha=0.6, label="test digits")
    ax.hist(clf.ood_score(flipped).numpy(), bins=bins, color=ORANGE, alpha=0.6, label="upside down")
    ax.set(xlabel="-log p(x), nats", ylabel="images")
    ax.legend()
    show("ebm_digits")

# %% [markdown]
# ## When not to use it
#
# The estimate of log Z rests on the noise draws that fall where the model is. For a standard normal model and normal
# noise of standard deviation 1.3 the effective share of the draws is known exactly:

# %%
print("dimensions   effective share")
for dim in (1, 2, 8, 16, 64):
    print(f"{dim:>10}   {(math.sqrt(2 * 1.3**2 - 1) / 1.3**2) ** dim:.4f}")

# %% [markdown]
# Beyond some ten dimensions one normal is not enough: let the noise be a mixture (what `noise="auto"` does) or a flow,
# tilt it, and look at `result.history["ess"]` and `khat`. In two dimensions with noise that fits, noise-contrastive
# estimation (`method="nce"`) does as well. Where the noise lost sight of the model, `fit` ends in a `CollapseError`
# rather than in a number.

# %%
assert abs(law.location - 0.5) < 0.25 and abs(law.location - float(x.mean())) > 0.2
assert abs(sampled.value - exact.value) < 5 * sampled.standard_error
assert raw is None or gap > 0
