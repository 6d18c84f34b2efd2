"""A made-up trial with images of two types: effects by image, beside the truth and the difference of means."""

from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.figure import Figure

from benchmarks.demo import Row
from ppl_models import ImageCATE


def run(out: Path, quick: bool) -> list[Row]:
    """Striped places gain 2, plain ones nothing."""
    n = 200 if quick else 600
    g = torch.Generator().manual_seed(0)
    striped = torch.rand(n, generator=g) < 0.5
    wave = torch.sin(torch.arange(16) * 2.0).expand(16, 16)
    images = torch.where(striped[:, None, None], wave, 0.0) + 0.7 * torch.randn(n, 16, 16, generator=g)
    treatment = (torch.rand(n, generator=g) < 0.5).long()
    truth = 2.0 * striped
    outcome = truth * treatment + torch.randn(n, generator=g)
    size = {"num_steps": 6, "num_restarts": 1, "num_folds": 2, "num_samples": 20} if quick else {}
    model = ImageCATE(num_clusters=2, **size)  # type: ignore[arg-type]
    model.fit(outcome, treatment, images.unsqueeze(1), propensity=0.5, progress=not quick)
    effect = model.effect(images.unsqueeze(1))
    pehe = float((effect - truth).square().mean().sqrt())
    plain = float((truth - truth.mean()).square().mean().sqrt())
    difference = outcome[treatment == 1].mean() - outcome[treatment == 0].mean()
    with mpl.rc_context({"axes.spines.right": False, "axes.spines.top": False, "font.size": 9}):
        figure = Figure(figsize=(4.2, 3), layout="constrained")
        ax = figure.subplots()
        groups = {"plain, true effect 0": (~striped, "#D55E00"), "striped, true effect 2": (striped, "#0072B2")}
        edges = [
            0.05 * k for k in range(-10, 51)
        ]  # of all bars: where types are sure, effects hardly differ within one
        for name, (rows, colour) in groups.items():
            ax.hist(effect[rows].numpy(), bins=edges, color=colour, alpha=0.6, label=name)
        ax.set(xlabel="estimated effect", ylabel="images")
        ax.legend(fontsize=8, frameon=False)
        figure.savefig(out / "effects.png", dpi=200)
    return [
        Row(
            "ImageCATE",
            f"simulated trial, {n} units",
            "error of effects, PEHE (lower is better)",
            f"{pehe:.2f}",
            f"one effect for all {plain:.2f}",
        ),
        Row(
            "",
            "",
            "average effect",
            f"{model.ate():.2f}",
            f"truth {float(truth.mean()):.2f}; difference of means {float(difference):.2f}",
        ),
    ]
