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
# # One model, any query, one answer
#
# A Boltzmann machine over categorical variables can answer "given these variables, what about those?" for any choice of
# "these". The usual way is mean field, and its usual trouble is that the answer depends on where the solver started.
# Monotone deep Boltzmann machines (Feng, Winston and Kolter, TMLR 2023) bound the potentials so that mean field has
# exactly one fixed point, for every query.
#
# On the way: a pair of spins, where one sees what the bound does; a model of handwritten digits that completes,
# classifies, draws from a label, and says how sure it is; Gibbs draws and log Z with its error.
#
# To run it: `pip install '.[plots,data]'`, then as a notebook (jupytext) or `python tutorials/monotone_dbm.py`. It
# takes a few minutes on two cores. `PPL_MODELS_SMOKE=1` shortens it to seconds, with results that mean little, and
# `PPL_MODELS_OUT=out` writes the figures to `out/tutorial/`.

# %%
import os
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch

from ppl_models import ConvMonotoneDBM, MonotoneDBM
from ppl_models.datasets import load_digits
from ppl_models.monotone_dbm import DeepBoltzmannMachine, expected_calibration_error

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
# ## Two spins
#
# Each spin is a group of two states. The potential J favours equal spins (J > 0). Without a field the truth is simple:
# both spins are up half of the time. Mean field finds that while J is at most 1; beyond it, two starts end in two
# answers, both wrong. The published bound stops at J < 0.5; the relaxed bound (`curvature=2`) reaches the edge itself.


# %%
def pair(J, curvature=2):
    """Two spins with coupling J; refused where the bound is broken."""
    block = J * torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    zero = torch.zeros(2, 2, dtype=torch.float64)
    phi = torch.cat([torch.cat([zero, block], 1), torch.cat([block, zero], 1)])
    bias = torch.zeros(4, dtype=torch.float64)
    return MonotoneDBM.from_potentials(phi, bias, [2, 2], monotonicity=0.01, curvature=curvature)


def unbounded(J):
    """The same without a bound."""
    machine = DeepBoltzmannMachine([[2], [2]]).double()
    with torch.no_grad():
        machine.operator.weight[:2, 2:] = J * torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    return machine


starts = torch.tensor([[[0.9, 0.1], [0.9, 0.1]], [[0.1, 0.9], [0.1, 0.9]]], dtype=torch.float64)
nothing = torch.zeros(2, 2, dtype=torch.long), torch.zeros(2, 2, dtype=torch.bool)
couplings = torch.linspace(0.1, 1.6, 16).tolist()
answers = torch.tensor(
    [
        unbounded(J).marginals(*nothing, solver="coordinate", initial=starts).probabilities[:, 0, 0].tolist()
        for J in couplings
    ]
)

figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
axis.plot(couplings, answers[:, 0], "o-", color=BLUE, label="started up", ms=4)
axis.plot(couplings, answers[:, 1], "s--", color=ORANGE, label="started down", ms=4)
axis.axhline(0.5, color=GREY, lw=0.8, label="exact")
for J, name in ((0.5, "published\nbound"), (1.0, "relaxed\nbound")):
    axis.axvline(J, color=GREY, ls=":", lw=1)
    axis.text(J + 0.02, 0.04, name, fontsize=8, color=GREY)
axis.set(xlabel="coupling J", ylabel="P(spin 1 up) by mean field", ylim=(0, 1))
axis.legend(loc="upper left", frameon=True, edgecolor="none", framealpha=1)
show("two_starts")

refused = []
for J in (0.45, 0.6, 0.99, 1.1):
    for curvature in (1, 2):
        try:
            pair(J, curvature)
        except ValueError:
            refused.append((J, curvature))
print("refused (J, curvature):", refused)

# %% [markdown]
# ## Digits
#
# 1,797 handwritten digits of 8 x 8 pixels in four grey values; the last 360 are kept for the test. Pixels, 32 hidden
# groups and the label are one model. Training shows 20 to 60% of the pixels of each image, the label of every fourth
# image, and scores what mean field says of the rest.

# %%
table = load_digits()
images, labels = ((table.x / 4).floor().clamp(max=3) / 3).view(-1, 1, 8, 8), table.y
train, test = slice(0, 1200), slice(1437, None)
held_out = slice(1200, 1437)  # to calibrate on

net = ConvMonotoneDBM(image_shape=(1, 8, 8), num_bins=4, num_classes=10, curvature=2)
steps = 20 if SMOKE else 300
result = net.fit(
    images[train], labels[train], observed_fraction=(0.2, 0.6), num_steps=steps, batch_size=48, lr=0.03, progress=False
)
print(result.summary())
# The label is summed over, each class a mean field of its own, and its potentials need no bound.
low, high = torch.linalg.eigvalsh(net.potentials()[:-10, :-10])[[0, -1]].tolist()
print(f"eigenvalues of the potentials of pixels and hidden groups: {low:.1f} to {high:.3f}; the bound is 1.99")

# %% [markdown]
# Completed images are expected intensities. The same trained model draws from a label alone, where nothing is shown but
# the class, and completes the upper half of one image, a three, as each of the ten classes.

# %%
mask = torch.rand(360, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.4
completed = net.complete(images[test], mask)
from_label = net.complete(torch.zeros(10, 1, 8, 8), torch.zeros(10, 8, 8, dtype=torch.bool), labels=torch.arange(10))
chosen = [int((labels[test] == c).nonzero()[0]) for c in range(10)]
upper = torch.zeros(8, 8, dtype=torch.bool)
upper[:4] = True
as_each = net.complete(images[test][chosen[3:4]].expand(10, -1, -1, -1), upper, labels=torch.arange(10))
rows = {
    "image": images[test][chosen],
    "40% shown": images[test][chosen],
    "completed": completed[chosen],
    "label alone": from_label,
    "half a three,\nas each class": as_each,
}
figure, axes = plt.subplots(5, 10, figsize=(8, 4.2), layout="constrained")
for line, (name, pictures) in zip(axes, rows.items(), strict=True):
    line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    for axis, picture, shown in zip(line, pictures, mask[chosen], strict=True):
        pixels = picture[0].clone()
        colours = plt.get_cmap("gray")(pixels.numpy())
        if name == "40% shown":
            colours[~shown.numpy()] = (0.45, 0.6, 0.8, 1.0)  # hidden pixels in blue
        axis.imshow(colours)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(True)
show("digits")

# %%
hidden = ~mask[:, None]
mse = float((completed - images[test])[hidden].square().mean())
mean_image = images[train].mean(0).expand(360, -1, -1, -1)
mse_mean = float((mean_image - images[test])[hidden].square().mean())
print(f"mean squared error of hidden pixels {mse:.3f}; of the training mean {mse_mean:.3f}")
for share in (0.2, 0.4, 0.6):
    seen = torch.rand(360, 8, 8, generator=torch.Generator().manual_seed(1)) < share
    accuracy = float((net.classify(images[test], seen).argmax(1) == labels[test]).float().mean())
    print(f"{share:.0%} of the pixels shown: accuracy {accuracy:.3f}")

# %% [markdown]
# ## One answer
#
# 32 random starts of one query, in double precision: the marginals agree to the last digits.

# %%
exact_net = net.double()
query = exact_net.image_query(images[test][:1].double(), mask[:1])
random = torch.randn(32, net.groups.num_groups, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
many = exact_net.marginals(query.states.expand(32, -1), query.mask.expand(32, -1), initial=(3 * random).softmax(-1))
gap = float((many.probabilities - many.probabilities[0]).abs().max())
print(f"largest difference between starts {gap:.1e}, all converged: {bool(many.converged.all())}")
net = net.float()

# %% [markdown]
# ## How sure
#
# The bound keeps mean field flat, so predictions have temperatures of their own, learned in training. Scaling them
# on held-out masks corrects the label's.

# %%
held_mask = torch.rand(237, 8, 8, generator=torch.Generator().manual_seed(2)) < 0.4
queries = net.image_query(images[held_out], held_mask)
truth = queries.states.clone()
truth[:, -1] = labels[held_out]
before = net.classify(images[test], mask)
net.calibrate(queries.states, queries.mask, truth, groups=[net.groups.num_groups - 1])
after = net.classify(images[test], mask)

figure, axis = plt.subplots(figsize=(3.6, 3.2), layout="constrained")
axis.plot([0, 1], [0, 1], color=GREY, lw=0.8)
for name, probabilities, colour, mark in (("as trained", before, ORANGE, "s"), ("calibrated", after, BLUE, "o")):
    confidence, guess = probabilities.max(1)
    right = (guess == labels[test]).float()
    bins = (confidence * 6).long().clamp(max=5)
    points = [(confidence[bins == b].mean(), right[bins == b].mean()) for b in range(6) if (bins == b).sum() > 9]
    error = expected_calibration_error(probabilities, labels[test])
    axis.plot(*zip(*points, strict=True), marker=mark, color=colour, label=f"{name}, ECE {error:.3f}")
axis.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
axis.legend(loc="lower right")
show("calibration")
calibrated_error = expected_calibration_error(after, labels[test])

# %% [markdown]
# ## Samples and log Z
#
# A small model, so that everything can be checked by enumeration: six groups of three states. Gibbs draws, marginals by
# mean field and with the second-order correction, and log Z three ways.

# %%
small = MonotoneDBM(group_sizes=[3] * 6, rank=6, monotonicity=0.1).double()
r, j = torch.arange(1, 7, dtype=torch.float64)[:, None], torch.arange(1, 19, dtype=torch.float64)
with torch.no_grad():
    small.operator.weight.copy_(torch.sin(r * j))
    small.bias.copy_(0.5 * torch.cos(j))
exact = small.exact_marginals()
field, better = small.marginals(), small.correlations()
draws = small.sample(num_chains=100 if SMOKE else 400, num_sweeps=60, seed=0)[:, 20:].flatten(0, 1)
gibbs = torch.nn.functional.one_hot(draws, 3).double().mean(0)
for name, value in (("mean field", field.probabilities), ("second order", better.marginals), ("Gibbs", gibbs[None])):
    print(f"{name:12s} mean absolute error of the marginals {float((value - exact).abs().mean()):.4f}")

log_z = small.log_partition(method="exact").value
annealed = small.log_partition(method="sandwich", num_chains=200, num_temperatures=60)
print(f"log Z exact {log_z:.4f}, annealed {annealed.value:.4f} +- {annealed.standard_error:.4f}")
print(f"mean field's bound {-field.free_energy.item():.4f}, second order {better.log_partition.item():.4f}")

# %% [markdown]
# ## The numbers of this page, asserted

# %%
assert refused == [(0.6, 1), (0.99, 1), (1.1, 1), (1.1, 2)]
assert float((answers[:9, 0] - 0.5).abs().max()) < 1e-3 and float(answers[-1, 0] - answers[-1, 1]) > 0.5
assert high <= 1.99 + 1e-5
assert gap < 1e-8 and bool(many.converged.all())
assert float((better.marginals - exact).abs().mean()) < float((field.probabilities - exact).abs().mean())
assert -field.free_energy.item() <= log_z
assert abs(annealed.value - log_z) < 5 * annealed.standard_error
if not SMOKE:
    assert mse < 0.065 < mse_mean
    assert float((after.argmax(1) == labels[test]).float().mean()) > 0.7
    assert float(torch.pdist(as_each[:, 0, 4:].flatten(1)).min()) > 0.1  # no two classes are completed alike
    assert calibrated_error < 0.09
print("all as stated")
