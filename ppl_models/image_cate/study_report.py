"""The report of a fitted study: what ``report.write_report`` writes of an ``ImageCATE``."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ppl_models.image_cate import figures
from ppl_models.image_cate.balance import balance, overlap
from ppl_models.image_cate.fitted import Fitted
from ppl_models.image_cate.report import (
    Picture,
    ReportContents,
    Section,
    Table,
    balance_table,
    evaluation_tables,
    overlap_table,
    write_report,
)

if TYPE_CHECKING:
    from ppl_models.image_cate.model import ImageCATE

__all__ = ["write_study"]

_SHOWN = 3  # images a type


def write_study(cate: "ImageCATE", state: Fitted, places: Tensor | None, path: str | Path) -> None:
    """Gather tables and figures, and write the page."""
    trial = state.trial
    types, found = cate.cluster_effects(), cate.evaluate()
    low, high = cate.ate_interval(population="super")
    names = [f"type {k}" for k in range(len(types.effect))]
    treated = int(trial.treatment.sum())
    summary = [
        f"{trial.num_units} units with {trial.num_images} distinct images; {treated} treated.",
        f"The average effect is {cate.ate():.3g} (90% interval {low:.3g} to {high:.3g}).",
        f"Effects differ by image with a QINI of {found.qini.estimate:.3g} (ratio {found.qini.ratio:.2g}) and an "
        f"AUTOC of {found.autoc.estimate:.3g} (ratio {found.autoc.ratio:.2g}), cross-fitted.",
    ]
    by_type = Table(
        "Effects by type. Posterior of this fit; and doubly robust, with memberships of this fit.",
        ("type", "share", "effect", "sd", "lower", "upper", "doubly robust", "s.e."),
        [
            (name, *(float(v) for v in row))
            for name, *row in zip(
                names,
                types.share,
                types.effect,
                types.sd,
                types.interval[:, 0],
                types.interval[:, 1],
                types.gate,
                types.gate_standard_error,
                strict=True,
            )
        ],
    )
    average = cate.ate()
    sections = [
        Section("Design", _design(state)),
        Section(
            "Types",
            [
                by_type,
                Picture(
                    figures.effects_figure(names, found.gate.estimates, found.gate.standard_errors, average),
                    "Effects by type, of networks that did not see the units, with 95% intervals.",
                ),
            ],
        ),
        Section(
            "Are the effects there?",
            [
                *evaluation_tables(found, names),
                Picture(
                    figures.toc_figure(found.qini), "Gain of treating first whom the cross-fitted effects rank first."
                ),
            ],
        ),
    ]
    if trial.images.ndim == 4:
        sections.append(Section("What in the images matters", [_images(cate, state, names)]))
    if places is not None:
        effect = cate.effect(trial.images)
        sections.append(
            Section("Map", [Picture(figures.map_figure(places, effect, "effect"), "Effects at the study's images.")])
        )
    if state.histories:
        losses = {f"without fold {i + 1}": history.losses for i, history in enumerate(state.histories)}
        picture = Picture(figures.history_figure(losses), "Negative ELBO a unit.")
        sections.append(Section("Training", [picture]))
    write_report(
        path,
        ReportContents(
            title="Effects by image",
            summary=summary,
            warnings=[*state.messages, *_dropped(state)],
            sections=sections,
            settings={n: str(v) for n, v in cate.get_params().items()},
            seeds={"fit": state.seed},
        ),
    )


def _dropped(state: Fitted) -> list[str]:
    rows = state.trial.dropped
    return [f"Rows left out: {', '.join(map(str, rows[:50]))}{' ...' * (len(rows) > 50)}."] if rows else []


def _design(state: Fitted) -> list[str | Table | Picture]:
    trial = state.trial
    items: list[str | Table | Picture] = [overlap_table(overlap(trial.treatment, state.propensity))]
    if bool((state.propensity != state.propensity[0]).any()):
        items.append(Picture(figures.overlap_figure(trial.treatment, state.propensity), "Propensity by arm."))
    columns = torch.cat([trial.modifiers, trial.controls], 1)
    if columns.shape[1]:
        names = [f"covariate {i}" for i in range(trial.modifiers.shape[1])]
        names += [f"control {i}" for i in range(trial.controls.shape[1])]
        items.append(balance_table(balance(trial.treatment, columns, state.propensity, names)))
    return items


def _images(cate: "ImageCATE", state: Fitted, names: list[str]) -> Picture:
    chosen = cate.exemplars(_SHOWN).rows
    own = {int(row): i for i, row in enumerate(state.trial.image_rows)}
    rows = [(own[int(r)], names[k]) for k in range(len(chosen)) for r in chosen[k] if int(r) >= 0]
    shown = state.trial.images[[i for i, _ in rows]]
    maps = cate.salience(shown)
    figure = figures.salience_figure(shown, maps, [f"{name}, no. {i}" for i, name in rows])
    return Picture(
        figure, "Images that show each type, and below them the size of the effect's derivative by each pixel."
    )
