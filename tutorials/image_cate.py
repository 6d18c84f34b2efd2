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
# # Whom does a programme help? An applied study with satellite images
#
# A trial gives the average effect. Where it was larger or smaller is often written on the ground: roads, relief,
# fields.
# `ImageCATE` (after Jerzak, Johansson and Daoud, CLeaR 2023) sorts pre-treatment images into a few types with
# effects of
# their own, says how sure it is, shows what in the images matters, and maps effects to places without a trial.
#
# This study goes from trial data to a report: overlap and balance, the average effect, types, whether they are real,
# whom to treat, and where the result may be carried to. The country is made up, so that the truth is known; the last
# part
# runs the Uganda youth trial if its data are there (`PPL_MODELS_DATA`).
#
# To run it: `pip install '.[plots,data]'`, then as a notebook (jupytext) or `python tutorials/image_cate.py`. It takes
# some minutes on two cores. `PPL_MODELS_SMOKE=1` shortens it to seconds, with results that mean nothing, and
# `PPL_MODELS_OUT=out` writes the figures to `out/tutorial/`.

# %%
import io
import os
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch

from ppl_models import ImageCATE
from ppl_models.image_cate import figures
from ppl_models.image_cate.balance import balance, overlap
from ppl_models.image_cate.simulation import village_trial

SMOKE = os.environ.get("PPL_MODELS_SMOKE", "0") not in ("", "0")
OUT = os.environ.get("PPL_MODELS_OUT")
FOLDER = Path(OUT) / "tutorial" if OUT else Path(tempfile.mkdtemp())
FOLDER.mkdir(parents=True, exist_ok=True)

torch.set_num_threads(1)  # small tensors: a second thread costs more than it brings


def show(figure, name):
    """Save the figure if PPL_MODELS_OUT is set, else show it in the notebook."""
    if OUT:
        figure.savefig(FOLDER / f"{name}.png", dpi=150, bbox_inches="tight")
    elif "ipykernel" in sys.modules:
        from IPython.display import Image, display

        picture = io.BytesIO()
        figure.savefig(picture, dpi=100, bbox_inches="tight")
        display(Image(picture.getvalue()))


# %% [markdown]
# ## The trial
#
# Villages with a tile of three bands each; eight people a village; half of them treated. In farmed villages the effect
# is 1, in rugged ones 0.1. The model is told neither.

# %%
country = village_trial(num_sites=60 if SMOKE else 400, units_per_site=6 if SMOKE else 8, seed=1)
trial_sites = torch.arange(len(country.images)) < (40 if SMOKE else 300)  # the other villages have no trial
kept = trial_sites[country.image_index]
outcome, treatment, index = country.outcome[kept], country.treatment[kept], country.image_index[kept]
images = country.images[trial_sites]
print(f"{len(outcome)} people in {len(images)} villages, {int(treatment.sum())} treated")
print("propensity:", overlap(treatment, country.propensity[kept]))

whole = torch.isfinite(country.covariates[kept]).all(1)
differences = balance(treatment[whole], country.covariates[kept][whole], names=country.covariate_names)
show(figures.balance_figure(differences), "image_cate_balance")

# %% [markdown]
# ## The fit
#
# `image_index` says who shares an image: each image is looked at once, and folds and standard errors go by image.

# %%
cate = ImageCATE(num_clusters=2, num_steps=10 if SMOKE else 200, num_folds=2 if SMOKE else 5)
with warnings.catch_warnings():
    warnings.simplefilter("ignore" if SMOKE else "default", UserWarning)
    result = cate.fit(
        outcome,
        treatment,
        images,
        image_index=index,
        lon_lat=country.lon_lat[trial_sites],
        seed=0,
        progress=False,
    )
print(result.summary())

# %% [markdown]
# ## The average effect, and the types
#
# The average comes from doubly robust scores, cross-fitted by village. Each type's effect is given twice: the model's
# posterior, and the mean of the scores of its members.

# %%
low, high = cate.ate_interval(population="super")
print(f"average effect {cate.ate():.3f}, 90% interval {low:.3f} to {high:.3f}; truth {country.effect[kept].mean():.3f}")
types = cate.cluster_effects()
print(types.to_dataframe().round(3).to_string())

# %% [markdown]
# ## Are they real?
#
# The types were searched for, but not in the villages that their effects are taken from: each village's type is said by
# a gate that had not seen it. `evaluate` leaves each fold out of the effects as well: does the ranking find those who
# gain (QINI, AUTOC)? A ratio above 1.96 says so.

# %%
found = cate.evaluate()
print(f"QINI {found.qini.estimate:.3f}, ratio {found.qini.ratio:.2f}; AUTOC ratio {found.autoc.ratio:.2f}")
print("effects by type, cross-fitted:", [round(v, 3) for v in found.gate.estimates.tolist()])
print(f"policy of treating where the effect is positive: {found.policy.value.estimate:.3f} a head")
show(figures.toc_figure(found.qini), "image_cate_toc")
names = [f"type {k}" for k in range(2)]
show(figures.effects_figure(names, found.gate.estimates, found.gate.standard_errors, cate.ate()), "image_cate_types")

# %% [markdown]
# ## What in the images matters
#
# The villages that show each type best, and the derivative of the effect by each pixel. Where a type is certain the
# derivatives are minute; each picture has its own scale, and shows where they are largest.

# %%
rows = cate.exemplars(3).rows.flatten()
rows = rows[rows >= 0]
titles = [f"village {int(i)}" for i in rows]
show(figures.salience_figure(images[rows], cate.salience(images[rows]), titles), "image_cate_salience")

# %% [markdown]
# ## Where it may be carried to
#
# Effects at villages without a trial, from their images. Villages whose images are unlike all of the trial's are
# marked, and are left out of the average. That an effect depends on the image alone is an assumption: `bias` widens the
# interval by what you would concede outside of support.

# %%
elsewhere = country.images[~trial_sites]
carried = cate.transport(elsewhere, lon_lat=country.lon_lat[~trial_sites])
print("average elsewhere:", {k: round(v, 3) for k, v in carried.area().items()})
print("with all, and a bias of 0.5:", {k: round(v, 3) for k, v in carried.area(inside_only=False, bias=0.5).items()})
show(figures.map_figure(carried.lon_lat, carried.effect, "effect", carried.inside), "image_cate_map")

# %% [markdown]
# ## The report
#
# One HTML page with all of this, settings, seeds and versions.

# %%
cate.report(FOLDER / "image_cate_report.html")

# %% [markdown]
# ## The Uganda youth trial
#
# 2,082 people, 825 of them offered a grant; 327 images of 35 x 35 pixels. Column 0 of the released covariates is the
# treatment itself, and every second one a product with it: `fit` refuses them, and says why.

# %%
data = Path(os.environ.get("PPL_MODELS_DATA", "../shared/data")) / "uganda_yop" / "uganda_yop.npz"
if data.is_file() and not SMOKE:
    with np.load(data, allow_pickle=False) as held:
        uganda = {name: held[name] for name in ("outcome", "treatment", "images", "image_index", "covariates")}
    tiles = np.ascontiguousarray(uganda["images"].transpose(0, 3, 1, 2))
    try:
        ImageCATE().fit(
            uganda["outcome"], uganda["treatment"], tiles, uganda["image_index"], uganda["covariates"][:, :1]
        )
    except ValueError as error:
        print("refused:", error)
    study = ImageCATE(num_clusters=2)
    study.fit(uganda["outcome"], uganda["treatment"], tiles, uganda["image_index"], seed=0, progress=False)
    print("average effect:", round(study.ate(), 3), study.ate_interval(population="super"))
    checked = study.evaluate()
    print("types:", study.cluster_effects().effect.tolist())
    print("types, cross-fitted:", checked.gate.estimates.tolist(), "QINI ratio", round(checked.qini.ratio, 2))
    assert 0.59 < study.ate() < 0.89
else:
    print("left out: no data, or a shortened run")

# %% [markdown]
# ## The numbers
#
# What must hold, so that a change of the library that breaks it is seen.

# %%
assert torch.isfinite(cate.effect(elsewhere)).all()
assert abs(cate.effect(images)[index].mean().item() - cate.ate()) < 1e-4
if not SMOKE:
    truth = country.types[trial_sites]
    accuracy = (cate.cluster_probs(images).argmax(1) == truth).float().mean().item()
    print(f"villages put into their type: {accuracy:.3f}")
    assert accuracy > 0.85
    assert low < country.effect[kept].mean() < high
    assert found.qini.ratio > 1.96
