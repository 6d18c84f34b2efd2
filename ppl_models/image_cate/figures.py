"""Figures of a study of effects by image; each returns a matplotlib figure and touches no global state of
matplotlib.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl_models.image_cate.balance import Balance
from ppl_models.image_cate.checks import as_treatment, as_vector
from ppl_models.image_cate.rate import Rate

__all__ = [
    "balance_figure",
    "effects_figure",
    "history_figure",
    "map_figure",
    "overlap_figure",
    "salience_figure",
    "toc_figure",
]

_BLUE, _ORANGE, _GREY = "#0072b2", "#d55e00", "#8a8a8a"


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures are drawn by matplotlib; run: pip install 'ppl-models[plots]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def _numpy(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def toc_figure(rates: Rate, label: str = "predicted effect") -> Any:
    """The curve of a rank-weighted effect with pointwise 95 % bands."""
    figure = _figure(6.4, 3.8)
    axes = figure.subplots()
    n = len(rates.toc)
    share = np.arange(1, n + 1) / n
    first = min(n - 1, max(0, int(0.02 * n)))  # the mean of a few units is all noise and would set the scale
    axes.axhline(0, color=_GREY, linewidth=0.8)
    axes.plot(share[first:], _numpy(rates.toc)[first:], color=_BLUE)
    grid, middle, error = map(_numpy, (rates.grid, rates.grid_toc, rates.grid_standard_error))
    axes.fill_between(grid, middle - 1.96 * error, middle + 1.96 * error, color=_BLUE, alpha=0.2, linewidth=0)
    axes.set_xlim(0, 1)
    axes.set_xlabel(f"share treated, by {label}, largest first")
    axes.set_ylabel("effect among them less the average")
    axes.set_title(f"{rates.kind.upper()} = {rates.estimate:.3g} (s.e. {rates.standard_error:.2g})", fontsize=10)
    return figure


def effects_figure(
    labels: Sequence[str], effects: Any, standard_errors: Any, average: float | None = None, unit: str = "outcome units"
) -> Any:
    """Effects by type with 95 % intervals, and the average effect as a line."""
    values, errors = _numpy(effects), _numpy(standard_errors)
    figure = _figure(6.4, 1.2 + 0.5 * len(values))
    axes = figure.subplots()
    place = np.arange(len(values))
    if average is not None:
        axes.axvline(average, color=_GREY, linestyle="--", linewidth=1)
        axes.annotate(
            "average",
            (average, 1),
            xycoords=("data", "axes fraction"),
            xytext=(3, -10),
            textcoords="offset points",
            fontsize=8,
            color=_GREY,
        )
    axes.axvline(0, color="black", linewidth=0.6)
    axes.errorbar(values, place, xerr=1.96 * errors, fmt="o", color=_BLUE, capsize=3)
    axes.set_yticks(place, labels)
    axes.set_ylim(-0.6, len(values) - 0.4)
    axes.set_xlabel(f"effect ({unit}), 95 % interval")
    return figure


def map_figure(lon_lat: Any, values: Any, label: str = "effect", inside: Any = None) -> Any:
    """Values at places ``(J, 2)``; places out of support (``inside`` False) are hollow and uncoloured."""
    place, value = _numpy(lon_lat), _numpy(values)
    if place.ndim != 2 or place.shape[1] != 2 or len(place) != len(value):
        raise ValueError(f"lon_lat must have shape ({len(value)}, 2), got {place.shape}")
    kept = np.ones(len(value), dtype=bool) if inside is None else _numpy(inside).astype(bool)
    span = np.ptp(place, axis=0)
    height = float(np.clip(5.2 * span[1] / max(span[0], 1e-9), 2.6, 6.5))
    figure = _figure(6.4, height)
    axes = figure.subplots()
    size = float(np.clip(4000 / len(value), 6, 40))
    axes.scatter(*place[~kept].T, s=size, facecolors="none", edgecolors=_GREY, linewidths=0.6, label="out of support")
    drawn = axes.scatter(*place[kept].T, s=size, c=value[kept], cmap="viridis", linewidths=0)
    figure.colorbar(drawn, ax=axes, label=label, shrink=0.8)
    # One degree of longitude is shorter than one of latitude away from the equator.
    axes.set_aspect(1 / max(np.cos(np.deg2rad(place[:, 1].mean())), 0.05))
    axes.set_xlabel("longitude (degrees)")
    axes.set_ylabel("latitude (degrees)")
    if not kept.all():
        axes.legend(loc="best", fontsize=8, framealpha=0.9)
    return figure


def salience_figure(images: Any, salience: Any, titles: Sequence[str] = ()) -> Any:
    """Images ``(N, C, H, W)`` above the magnitude of their salience, its root of summed squares over channels.

    Each image has its own scale: of an image whose type is certain all derivatives are small, by the same factor, and
    where they are largest is what there is to see.  Below it stands its largest.
    """
    picture, gradient = _numpy(images).astype(float), _numpy(salience).astype(float)
    if picture.ndim != 4 or picture.shape != gradient.shape:
        raise ValueError(
            f"images and salience must have one shape (N, C, H, W), got {picture.shape} and {gradient.shape}"
        )
    count = len(picture)
    figure = _figure(1.5 * count + 0.8, 3.3)
    axes = figure.subplots(2, count, squeeze=False)
    magnitude = np.sqrt((gradient**2).sum(1))
    largest = magnitude.max((1, 2))
    for i in range(count):
        shown = picture[i, :3] if picture.shape[1] >= 3 else picture[i, :1].repeat(3, 0)
        low, high = np.quantile(shown, [0.01, 0.99])
        axes[0, i].imshow(
            np.clip((shown - low) / max(high - low, 1e-12), 0, 1).transpose(1, 2, 0), interpolation="nearest"
        )
        relative = magnitude[i] / (largest[i] or 1.0)
        drawn = axes[1, i].imshow(relative, cmap="magma", vmin=0, vmax=1, interpolation="nearest")
        axes[1, i].set_xlabel(f"largest {largest[i]:.1e}", fontsize=7)
        if i < len(titles):
            axes[0, i].set_title(titles[i], fontsize=8)
        for row in (0, 1):
            axes[row, i].set_xticks([])
            axes[row, i].set_yticks([])
    figure.colorbar(drawn, ax=axes[1, :].tolist(), label="salience / largest", shrink=0.9)
    return figure


def overlap_figure(treatment: Any, scores: Any) -> Any:
    """Histograms of the propensity in both arms, on one scale."""
    t = _numpy(as_treatment(treatment))
    e = _numpy(as_vector("scores", scores, len(t)))
    figure = _figure(6.4, 3.0)
    axes = figure.subplots()
    low, high = float(e.min()), float(e.max())
    bins = np.linspace(max(0.0, low - 0.02), min(1.0, high + 0.02), 31)
    for arm, colour, name in ((0, _ORANGE, "control"), (1, _BLUE, "treated")):
        axes.hist(e[t == arm], bins=bins, density=True, histtype="stepfilled", alpha=0.45, color=colour, label=name)
    axes.set_xlabel("propensity")
    axes.set_ylabel("density within arm")
    axes.legend(fontsize=8)
    return figure


def balance_figure(table: Balance) -> Any:
    """Standardised mean differences before and after weighting."""
    count = len(table.names)
    figure = _figure(6.4, 1.2 + 0.32 * count)
    axes = figure.subplots()
    place = np.arange(count)
    axes.axvspan(-0.1, 0.1, color=_GREY, alpha=0.15, linewidth=0)
    axes.axvline(0, color="black", linewidth=0.6)
    axes.scatter(_numpy(table.differences), place, facecolors="none", edgecolors=_ORANGE, label="unweighted", zorder=2)
    axes.scatter(_numpy(table.weighted_differences), place, color=_BLUE, marker="x", label="weighted", zorder=3)
    axes.set_yticks(place, table.names)
    axes.set_ylim(count - 0.4, -0.6)
    axes.set_xlabel("standardised mean difference (grey: within 0.1)")
    axes.legend(fontsize=8, loc="best")
    return figure


def history_figure(histories: dict[str, Any]) -> Any:
    """Loss by step of one fit or more; each is drawn with its running mean over a twentieth of its length."""
    figure = _figure(6.4, 3.0)
    axes = figure.subplots()
    for name, history in histories.items():
        loss = torch.as_tensor(_numpy(history)).double()
        width = max(1, len(loss) // 20)
        smooth = loss.unfold(0, width, 1).mean(1)
        (line,) = axes.plot(np.arange(width - 1, len(loss)), _numpy(smooth), label=name)
        axes.plot(np.arange(len(loss)), _numpy(loss), color=line.get_color(), alpha=0.25, linewidth=0.6)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (running mean in front)")
    if len(histories) > 1:
        axes.legend(fontsize=8)
    return figure
