"""Boston housing, one published split: a network whose prior is matched to a process, beside ridge and an exact GP."""

from pathlib import Path
from typing import Any

from benchmarks import figures
from benchmarks.baselines import BASELINES, gaussian_scores
from benchmarks.data import split
from benchmarks.demo import Row
from ppl_models import FunctionalPriorBNN
from ppl_models.functional_prior_bnn.targets import HierarchicalRBF

_SHOWN = ("Bayesian ridge (scikit-learn)", "exact GP, ML-II (gpytorch)")


def run(out: Path, quick: bool) -> list[Row]:
    """Match, fit, predict."""
    data = split(2)
    columns = data.x_train.shape[1]
    bnn = FunctionalPriorBNN(in_features=columns, noise_variance="learned")
    target = HierarchicalRBF(columns)
    bnn.match_prior(target, data.x_train, num_steps=5 if quick else 100, progress=not quick)
    size: dict[str, Any] = {"warmup_steps": 50, "num_samples": 8, "thin": 2} if quick else {"num_samples": 60}
    bnn.fit(data.x_train, data.y_train, num_chains=4, progress=not quick, **size)
    prediction = bnn.predict(data.x_test)
    scores = gaussian_scores(prediction.mean[:, 0], prediction.variance[:, 0].sqrt(), data.y_test)
    beside = {name: gaussian_scores(*BASELINES[name](data, False), data.y_test) for name in _SHOWN}
    figures.prior_functions(out / "prior_functions.png", bnn, target, data)
    what = f"{data.name}, {len(data.x_train)} rows, split 2"
    return [
        Row(
            "FunctionalPriorBNN" if metric == "RMSE" else "",
            what if metric == "RMSE" else "",
            f"held-out {metric} (lower is better)",
            f"{scores[metric]:.2f}",
            "; ".join(f"{name} {found[metric]:.2f}" for name, found in beside.items()),
        )
        for metric in ("RMSE", "NLL")
    ]
