"""One model in full: match a network's prior to a process, sample its posterior, set it beside what is used today.

    python -m benchmarks.boston

Writes ``boston.nc`` (ArviZ) and three figures to ``out/``, and prints the scores on held-out data, averaged over
published splits of Boston housing.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import figures, record
from benchmarks.baselines import BASELINES, gaussian_scores
from benchmarks.data import Split, split
from ppl_models import FunctionalPriorBNN
from ppl_models.functional_prior_bnn.targets import HierarchicalRBF

MATCHED, STANDARD = "BNN, prior matched to a GP", "BNN, N(0, 1) prior"


def bayesian_network(data: Split, *, match: bool, quick: bool) -> tuple[FunctionalPriorBNN, dict[str, Any]]:
    """Four chains of scale-adapted SGHMC on a 100-unit network, after matching its prior if asked to; its scores."""
    start = time.perf_counter()
    bnn = FunctionalPriorBNN(in_features=data.x_train.shape[1], noise_variance="learned")
    if match:
        target = HierarchicalRBF(data.x_train.shape[1])
        bnn.match_prior(target, data.x_train, num_steps=5 if quick else 200)
    size: dict[str, Any] = (
        {"warmup_steps": 50, "num_samples": 10, "thin": 2} if quick else {"num_samples": 100, "thin": 200}
    )
    posterior = bnn.fit(data.x_train, data.y_train, num_chains=4, **size)
    prediction = bnn.predict(data.x_test)
    scores = gaussian_scores(prediction.mean[:, 0], prediction.variance[:, 0].sqrt(), data.y_test)
    rhat = {"R-hat": float(prediction.rhat.max()), "seconds": time.perf_counter() - start}
    print(posterior.summary())
    return bnn, scores | rhat


def table(scores: dict[str, list[dict[str, float]]]) -> str:
    """Means over the splits, one row a method."""
    formats = {"RMSE": ".2f", "NLL": ".2f", "90% coverage": ".0%", "R-hat": ".3f", "seconds": ".1f"}
    rows = []
    for method, results in scores.items():
        row: dict[str, object] = {"method": method}
        for column, style in formats.items():
            row[column] = format(statistics.mean(r[column] for r in results), style) if column in results[0] else ""
        rows.append(row)
    return record.markdown_table(rows)


def main(arguments: list[str] | None = None) -> dict[str, list[dict[str, float]]]:
    """Run everything; returns the scores, one dict a split, by method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument(
        "--splits", type=int, nargs="+", default=[0, 1, 2], help="numbers of the published splits, 0 to 9"
    )
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it runs")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)

    scores: dict[str, list[dict[str, float]]] = {}
    moments: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    networks: dict[str, FunctionalPriorBNN] = {}
    for number in options.splits:
        data = split(number)
        print(f"{data.name}, split {number}: {len(data.x_train)} rows to learn from, {len(data.x_test)} to predict")
        for method, match in ((MATCHED, True), (STANDARD, False)):
            networks[method], result = bayesian_network(data, match=match, quick=options.quick)
            prediction = networks[method].predict(data.x_test)
            moments.setdefault(method, []).append(
                (prediction.mean[:, 0], prediction.variance[:, 0].sqrt(), data.y_test)
            )
            scores.setdefault(method, []).append(result)
        for method, baseline in BASELINES.items():
            start = time.perf_counter()
            mean, sd = baseline(data, options.quick)
            seconds = {"seconds": time.perf_counter() - start}
            moments.setdefault(method, []).append((mean, sd, data.y_test))
            scores.setdefault(method, []).append(gaussian_scores(mean, sd, data.y_test) | seconds)

    matched = networks[MATCHED]
    target = HierarchicalRBF(data.x_train.shape[1])
    figures.prior_functions(options.out / "prior_functions.png", matched, target, data)
    figures.calibration(options.out / "calibration.png", moments, data.target)
    figures.ranks(options.out / "ranks.png", matched.predict(data.x_test).functions[..., 0])
    assert matched.result is not None
    arviz_file = options.out / "boston.nc"
    matched.result.to_arviz().to_netcdf(str(arviz_file))

    print(f"\n{data.name}, held-out data, mean over {len(options.splits)} splits\n{table(scores)}\n")
    print("Figures: " + ", ".join(str(path) for path in sorted(options.out.glob("*.png"))))
    print(f"ArviZ file of the last split: {arviz_file}  (arviz.from_netcdf reads it)")
    return scores


if __name__ == "__main__":
    torch.set_num_threads(1)  # small tensors: a second thread costs more than it brings
    main()
