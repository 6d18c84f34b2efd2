"""The demo's three figures."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.data import Split
from inference.runtime.generators import scoped_seed
from ppl_models import FunctionalPriorBNN

__all__ = ["calibration", "prior_functions", "ranks"]

# Okabe and Ito's colours, which people with colour-blindness can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_GREY = "#666666"
_STYLE: dict[Any, Any] = {
    "axes.prop_cycle": cycler(color=_COLOURS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "legend.frameon": False,
    "savefig.dpi": 200,
}


def prior_functions(path: Path, bnn: FunctionalPriorBNN, target: Callable[[Tensor, int], Tensor], data: Split) -> None:
    """Functions of the standard prior, the matched one and the process, along the inputs' first principal axis."""
    inputs = bnn.input_units(data.x_train)
    axis = torch.linalg.svd(inputs, full_matrices=False).Vh[0]
    reach = torch.linspace(-2, 2, 81) * (inputs @ axis).std()
    line = reach[:, None] * axis
    standard = FunctionalPriorBNN(in_features=line.shape[1], standardise=False)
    matched = FunctionalPriorBNN(in_features=line.shape[1], standardise=False)
    matched.prior.load_state_dict(bnn.prior.state_dict())
    with scoped_seed(0):
        process = target(line, 1000)
    panels = {
        "network, N(0, 1) prior": standard.sample_prior(line, 1000),
        "network, matched prior": matched.sample_prior(line, 1000),
        "Gaussian process": process,
    }
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9, 3))
        axes = figure.subplots(1, 3, sharey=True)
        for ax, colour, (title, functions) in zip(axes, (_GREY, _COLOURS[0], _COLOURS[1]), panels.items(), strict=True):
            f = functions[..., 0].float()
            for level, alpha in ((0.9, 0.15), (0.5, 0.2)):
                low, high = f.quantile((1 - level) / 2, 0), f.quantile((1 + level) / 2, 0)
                ax.fill_between(reach, low, high, color=colour, alpha=alpha, lw=0, label=f"{level:.0%} of functions")
            ax.plot(reach, f[:8].T, color=colour, lw=0.8, alpha=0.8)
            ax.set(title=title, xlabel="first principal axis of the inputs", ylim=(-4, 4))
        axes[0].set_ylabel("f, in standard deviations of y")
        axes[0].legend(loc="upper left", fontsize=8)
        figure.savefig(path)


def calibration(path: Path, moments: Mapping[str, Sequence[tuple[Tensor, Tensor, Tensor]]], target: str) -> None:
    """Predictions with 90 % intervals against the truth for the first method, and coverage at every level for all.

    Args:
        path: of the file.
        moments: by method, and for each split: mean, standard deviation and truth.
        target: what y is.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9, 4))
        left, right = figure.subplots(1, 2)
        method, splits = next(iter(moments.items()))
        mean, sd, y = splits[-1]
        left.errorbar(y, mean, 1.645 * sd, fmt="o", ms=3, lw=0.8, color=_COLOURS[0], ecolor=_COLOURS[0] + "80")
        ends = [float(y.min()), float(y.max())]
        left.plot(ends, ends, color=_GREY, lw=0.8)
        left.set(title=f"{method}: mean and 90% interval", xlabel=f"true {target}", ylabel="predicted")

        levels = torch.linspace(0.02, 0.98, 49)
        normal = torch.distributions.Normal(0.0, 1.0)
        right.plot([0, 1], [0, 1], color=_GREY, lw=0.8)
        for method, splits in moments.items():
            error = torch.cat([((y - mean) / sd).abs() for mean, sd, y in splits])
            covered = (error <= normal.icdf((1 + levels) / 2)[:, None]).float().mean(1)
            right.plot(levels, covered, lw=1.2, label=method)
        right.set(title="Calibration", xlabel="nominal coverage", ylabel="share of test points inside", aspect="equal")
        right.legend(fontsize=8)
        figure.savefig(path)


def ranks(path: Path, functions: Tensor, points: int = 4, bins: int = 10) -> None:
    """Rank histograms (Vehtari et al. 2021) of f at a few test points: chains that agree are flat.

    Args:
        path: of the file.
        functions: f at the test inputs, ``(chain, draw, N)``.
        points: how many test points.
        bins: of each histogram.
    """
    chains, draws, n = functions.shape
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9, 2.6))
        axes: Sequence[Axes] = figure.subplots(1, points, sharey=True)
        for ax, point in zip(axes, np.linspace(0, n - 1, points).astype(int), strict=True):
            order = functions[..., point].flatten().argsort().argsort().unflatten(0, (chains, draws))
            for chain in range(chains):
                counts, edges = np.histogram(order[chain].numpy(), bins=bins, range=(0, chains * draws))
                ax.stairs(counts, edges, lw=1.2, label=f"chain {chain + 1}")
            ax.axhline(draws / bins, color=_GREY, lw=0.8, ls=":")
            ax.set(title=f"f at test point {point + 1}", xlabel="rank among all draws")
        axes[0].set_ylabel("draws")
        axes[-1].legend(fontsize=7, ncols=2)
        figure.savefig(path)
