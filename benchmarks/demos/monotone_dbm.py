"""Digits of which four pixels in ten are seen: name them and complete them, beside nearest neighbours."""

from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from sklearn.impute import KNNImputer

from benchmarks.demo import Row
from ppl_models import ConvMonotoneDBM
from ppl_models.datasets import load_digits


def run(out: Path, quick: bool) -> list[Row]:
    """Learn eight styles of each class from 1,400 digits and copies of them, ask 300 others."""
    table = load_digits()
    images = (table.x / table.x.max()).reshape(-1, 1, 8, 8).float()
    labels = table.y.long()
    train, test = slice(0, 200 if quick else 1400), slice(1497, 1797)
    model = ConvMonotoneDBM(image_shape=(1, 8, 8), num_bins=4, num_classes=10, styles=2 if quick else 8)
    model.fit(
        images[train],
        labels[train],
        observed_fraction=(0.2, 0.6),
        num_steps=2 if quick else 20,
        batch_size=48,
        lr=1e-3,
        jitter=0 if quick else 12,
        progress=not quick,
    )
    seen = torch.rand(300, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.4
    accuracy = float((model.classify(images[test], seen).argmax(-1) == labels[test]).float().mean())
    completed = model.complete(images[test], seen).reshape(-1, 1, 8, 8)
    hidden = ~seen.unsqueeze(1)
    error = float((completed - images[test])[hidden].square().mean())
    holes = torch.where(seen.unsqueeze(1), images[test], torch.nan).flatten(1)
    imputer = KNNImputer(n_neighbors=5).fit(images[train].flatten(1).numpy())
    filled = torch.as_tensor(imputer.transform(holes.numpy())).reshape(-1, 1, 8, 8).float()
    beside = float((filled - images[test])[hidden].square().mean())
    nearest = torch.cdist(filled.flatten(1), images[train].flatten(1)).argmin(1)
    named = float((labels[train][nearest] == labels[test]).float().mean())
    with mpl.rc_context({"font.size": 8}):
        figure = Figure(figsize=(6, 2.2), layout="constrained")
        rows = {
            "true": images[test],
            "seen": torch.where(seen.unsqueeze(1), images[test], torch.nan),
            "completed": completed,
        }
        for row, (name, pictures) in enumerate(rows.items()):
            for column in range(10):
                ax = figure.add_subplot(3, 10, row * 10 + column + 1)
                ax.imshow(
                    pictures[column, 0].numpy(),
                    cmap=mpl.colormaps["Greys"].with_extremes(bad="#9ecae1"),
                    vmin=0,
                    vmax=1,
                )
                ax.set(xticks=[], yticks=[])
                if column == 0:
                    ax.set_ylabel(name)
        figure.savefig(out / "completion.png", dpi=200)
    return [
        Row(
            "ConvMonotoneDBM",
            "digits 8 x 8, 40 % of pixels seen",
            "accuracy (higher is better)",
            f"{accuracy:.3f}",
            f"5-NN imputation, then 1-NN {named:.3f}",
        ),
        Row(
            "",
            "",
            "squared error of hidden pixels (lower is better)",
            f"{error:.4f}",
            f"5-NN imputation (scikit-learn) {beside:.4f}",
        ),
    ]
