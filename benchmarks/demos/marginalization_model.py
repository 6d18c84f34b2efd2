"""An Ising lattice learned from its energy alone: log Z and a marginal, beside the transfer matrix and enumeration."""

from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.figure import Figure

from benchmarks.demo import Row
from ppl_models import MarginalizationModel
from ppl_models.marginalization_model import LatticeIsing


def run(out: Path, quick: bool) -> list[Row]:
    """Train on the energy, read off log Z, ask for marginals of half of the sites."""
    lattice = LatticeIsing(width=4, coupling=0.1, field=0.2)
    model = MarginalizationModel([2] * 16, hidden=64, depth=2)
    model.fit_energy(lattice.log_density, num_steps=20 if quick else 800, batch_size=128, lr=2e-3, progress=not quick)
    estimate = model.log_partition(num_samples=256 if quick else 4096)
    states = (torch.arange(2**16)[:, None] >> torch.arange(16)) & 1
    exact = torch.as_tensor(lattice.log_density(states)).double() - float(lattice.log_partition())
    half = states[:: 2**16 // 200].clone()
    half[:, 8:] = -1
    numbers = (half[:, :8] * 2 ** torch.arange(8)).sum(1)
    truth = exact.reshape(256, 256).logsumexp(0)[numbers]
    answer = model.log_prob(half).double()
    error = (answer - truth).abs().mean()
    with mpl.rc_context({"axes.spines.right": False, "axes.spines.top": False, "font.size": 9}):
        figure = Figure(figsize=(3.6, 3.4), layout="constrained")
        ax = figure.subplots()
        ends = [float(truth.min()), float(truth.max())]
        ax.plot(ends, ends, color="#666666", lw=0.8)
        ax.plot(truth, answer, ".", color="#0072B2", ms=4)
        ax.set(xlabel="exact log marginal (nats)", ylabel="one network pass (nats)", title="half of the sites observed")
        figure.savefig(out / "marginals.png", dpi=200)
    log_z = f"{estimate.value:.3f} ± {estimate.standard_error:.3f}"
    return [
        Row(
            "MarginalizationModel", "Ising lattice 4 x 4", "log Z", log_z, f"exact {float(lattice.log_partition()):.3f}"
        ),
        Row("", "", "mean error of log marginals, 8 of 16 sites (nats)", f"{error:.3f}", "exact 0"),
    ]
