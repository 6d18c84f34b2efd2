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
# # A trial, a Bayesian network for its outcomes, and covariates that are missing
#
# A trial gives the average effect without any model. A model of the outcome can make the answer sharper, if it may not
# make it wrong: that is what the doubly robust estimator is for. Here the outcome model is a network with a functional
# prior. Then a third of the covariates go missing, and a marginalization model fills them in, several times, so that
# the uncertainty of the filling is counted (Rubin's rules).
#
# The trial is made up, so that the truth is known. `PPL_MODELS_SMOKE=1` shortens the run, `PPL_MODELS_OUT=out` writes
# the figure to `out/tutorial/`.

# %%
import os
import warnings
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch

from inference import SamplerWarning
from ppl_models import FunctionalPriorBNN, MarginalizationModel

SMOKE = os.environ.get("PPL_MODELS_SMOKE", "0") not in ("", "0")
OUT = os.environ.get("PPL_MODELS_OUT")
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"
torch.set_num_threads(1)
warnings.simplefilter("ignore", SamplerWarning)
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
# ## The trial
#
# Six yes-or-no answers from a survey, which belong together in two blocks; the outcome depends on them with an
# interaction that no linear model has. Half are treated. The effect is 1 on average, larger for those who answer yes to
# the first question.

# %%
ROWS = 200 if SMOKE else 600
g = torch.Generator().manual_seed(4)
block = torch.rand(ROWS, 2, generator=g) < 0.5
flips = torch.rand(ROWS, 6, generator=g) < 0.15
x = (block.repeat_interleave(3, 1) ^ flips).long()
treated = torch.rand(ROWS, generator=g) < 0.5
effect = 0.6 + 0.8 * x[:, 0]
baseline = 3.0 * (x[:, 0] ^ x[:, 3]) + 1.5 * x[:, 1]
y = baseline + effect * treated + 0.5 * torch.randn(ROWS, generator=g)
truth = float(effect.mean())


# %% [markdown]
# ## Difference of means, and the doubly robust estimate
#
# Each half of the rows is scored by networks that learned from the other half, an arm a network. The propensity is
# known to be one half.


# %%
def doubly_robust(covariates, seed):
    """AIPW with cross-fitted networks: the estimate and its standard error."""
    score = torch.zeros(ROWS)
    folds = torch.arange(ROWS) % 2
    size = {"warmup_steps": 30, "num_samples": 5} if SMOKE else {"warmup_steps": 800, "num_samples": 30}
    for fold in (0, 1):
        means = {}
        for arm in (False, True):
            rows = (folds != fold) & (treated == arm)
            network = FunctionalPriorBNN(6, hidden=(20,), noise_variance="learned")
            network.fit(covariates[rows], y[rows], num_chains=2, thin=10, seed=seed, progress=False, **size)
            means[arm] = network.predict(covariates[folds == fold]).mean[:, 0]
        t, outcome = treated[folds == fold], y[folds == fold]
        correction = torch.where(t, (outcome - means[True]) / 0.5, -(outcome - means[False]) / 0.5)
        score[folds == fold] = means[True] - means[False] + correction
    return float(score.mean()), float(score.std() / ROWS**0.5)


arms = y[treated], y[~treated]
estimates = {
    "difference of means": (
        float(arms[0].mean() - arms[1].mean()),
        float((arms[0].var() / len(arms[0]) + arms[1].var() / len(arms[1])).sqrt()),
    ),
    "network, all covariates": doubly_robust(x.float(), 0),
}

# %% [markdown]
# ## A third of the answers are missing
#
# The marginalization model learns from the rows as they are, holes included. Each completed table gives an estimate;
# the variance between them is added to the variance within.
#
# How often can a drawn answer be the true one? Answers come in two threes, each answer its three's common one with
# probability 0.85. So the law of a hidden answer given those that are seen is known, and with it the share of true
# ones among draws of that law, which no honest imputation can beat.

# %%


def chance_of_the_truth(answers, hidden):
    """Probability of each hidden answer's true value given the seen ones of its three, under the law of the data."""
    three, unseen = answers.reshape(-1, 2, 3), hidden.reshape(-1, 2, 3)
    match = torch.tensor([[0.85, 0.15], [0.15, 0.85]])  # the common answer down, the answer across
    likelihood = torch.where(unseen[..., None], 1.0, match[:, three].movedim(0, -1))  # (row, three, answer, common)
    common = likelihood.prod(2)
    common = common / common.sum(-1, keepdim=True)
    return torch.einsum("rtc,crta->rta", common, match[:, three]).reshape(answers.shape)[hidden]


missing = torch.rand(ROWS, 6, generator=g) < 1 / 3
missing[missing.all(1), 0] = False
holes = torch.where(missing, -1, x)
filler = MarginalizationModel([2] * 6, hidden=32, depth=1)
filler.fit(holes, num_steps=30 if SMOKE else 800, marginal_steps=10 if SMOKE else 200, progress=False)
tables = filler.impute(holes, num_samples=2 if SMOKE else 5, seed=0)
tables = tables if len(tables) != ROWS else tables.transpose(0, 1)
filled = [doubly_robust(table.float(), 0) for table in tables]
center = sum(value for value, _ in filled) / len(filled)
within = sum(error**2 for _, error in filled) / len(filled)
between = sum((value - center) ** 2 for value, _ in filled) / (len(filled) - 1)
estimates["network, imputed covariates"] = center, (within + (1 + 1 / len(filled)) * between) ** 0.5
agree = float((tables == x).float()[:, missing].mean())
best = float(chance_of_the_truth(x, missing).mean())
print(f"filled-in answers that are the true ones: {agree:.1%}; of draws of the true law {best:.1%}, of guesses 50%")

# %%
figure, ax = plt.subplots(figsize=(6, 2.2), layout="constrained")
for place, (name, (value, error)) in enumerate(estimates.items()):
    ax.errorbar([value], [place], xerr=[[1.96 * error]] * 2, fmt="o", color=ORANGE if place == 0 else BLUE, capsize=3)
    print(f"{name:30} {value:.3f} +- {error:.3f}")
ax.axvline(truth, color=GREY, lw=1)
ax.set(yticks=range(len(estimates)), yticklabels=list(estimates), ylim=(len(estimates) - 0.5, -0.5))
ax.set_xlabel("average effect, 95% interval; line: truth")
show("cross_trial")

# %% [markdown]
# The network's interval is the shortest, because it explains what is not the treatment's doing. With a third of the
# answers gone it widens, and stays shorter than that of the means.
#
# ## The numbers

# %%
assert all(abs(value - truth) < 4 * error for value, error in estimates.values())
assert 0.5 < agree < best + 0.05
if not SMOKE:
    assert estimates["network, all covariates"][1] < 0.8 * estimates["difference of means"][1]
    assert estimates["network, all covariates"][1] < estimates["network, imputed covariates"][1]
    assert agree > best - 0.05
