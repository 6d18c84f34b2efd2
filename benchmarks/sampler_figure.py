"""The figure of the samplers: what a chain and what an effective draw cost, against the number of chains."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

__all__ = ["draw"]

_COLOURS = {  # Okabe and Ito's, which people with colour-blindness can tell apart
    "inference NUTS": "#D55E00",
    "inference HMC": "#E69F00",
    "inference ChEES": "#CC79A7",
    "inference MEADS": "#F0E442",
    "inference MCLMC": "#882255",
    "Pyro NUTS": "#000000",
    "Pyro NUTS, jit": "#666666",
    "numpyro NUTS, sequential": "#56B4E9",
    "numpyro NUTS, vectorised": "#0072B2",
    "blackjax NUTS": "#009E73",
    "blackjax ChEES": "#44AA99",
    "blackjax MEADS": "#88CCAA",
    "blackjax MCLMC": "#117733",
    "nutpie NUTS": "#999933",
}


def draw(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Seconds a chain (above) and a thousand effective draws (below) of warm runs against the number of chains, a
    column a model; this library's lines are solid.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    measured = [row for row in rows if "warm" in row]
    models = list(dict.fromkeys(row["model"] for row in measured))
    if not models:
        return
    style: dict[Any, Any] = {"font.size": 9, "axes.titlesize": 10, "figure.constrained_layout.use": True}
    with mpl.rc_context(style):
        figure = Figure(figsize=(3.2 * len(models), 6.5))
        axes = figure.subplots(2, len(models), squeeze=False, sharex=True)
        for column, model in enumerate(models):
            for sampler, colour in _COLOURS.items():
                mine = sorted(
                    (row for row in measured if (row["model"], row["sampler"]) == (model, sampler)),
                    key=lambda row: int(row["chains"]),
                )
                if not mine:
                    continue
                chains = [row["chains"] for row in mine]
                line: dict[str, Any] = {
                    "color": colour,
                    "ls": "-" if sampler.startswith("inference") else "--",
                    "label": sampler,
                }
                line |= {"marker": "o", "ms": 3, "lw": 1.2}
                cost = [median(row["seconds"]) / row["chains"] for row in mine]
                axes[0, column].plot(chains, cost, **line)
                axes[1, column].plot(chains, [1000 / median(row["warm"]) for row in mine], **line)
            axes[0, column].set(title=model, xscale="log", yscale="log")
            axes[1, column].set(xscale="log", yscale="log", xlabel="chains")
            for ax in axes[:, column]:
                ax.set_xticks([1, 4, 64, 1024], ["1", "4", "64", "1024"])
                ax.minorticks_off()
                ax.spines[["right", "top"]].set_visible(False)
        axes[0, 0].set_ylabel("seconds a chain")
        axes[1, 0].set_ylabel("seconds a thousand effective draws")
        shown = {t: h for ax in axes.flat for h, t in zip(*ax.get_legend_handles_labels(), strict=True)}
        figure.legend(
            [shown[n] for n in _COLOURS if n in shown],
            [n for n in _COLOURS if n in shown],
            loc="outside lower center",
            ncols=5,
            frameon=False,
            fontsize=8,
        )
        figure.savefig(path, dpi=150)
