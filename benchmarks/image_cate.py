"""Effects by image beside their peers: same rows, same folds, same doubly robust scores.

    python -m benchmarks.image_cate stripes            # the paper's simulation, noise swept
    python -m benchmarks.image_cate coverage           # intervals of the types' effects over many trials
    python -m benchmarks.image_cate uganda             # the Uganda trial, cross-fitted by image
    python -m benchmarks.image_cate permuted           # the same with images exchanged between sites
    python -m benchmarks.image_cate map                # effects over the country by transport
    python -m benchmarks.image_cate scaling            # seconds against units and images

A learner whose package is absent is left out and named.
"""

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import effect_learners
from benchmarks.effect_learners import Learner, Prediction, Trial, accuracy, image_summaries, pehe, two_means
from benchmarks.record import markdown_table, one_core, progress, save, spread
from ppl_models import ImageCATE
from ppl_models.image_cate.baselines import fit_arm_networks
from ppl_models.image_cate.evaluation import blp_scores
from ppl_models.image_cate.figures import map_figure
from ppl_models.image_cate.propensity import aipw_scores, cross_fit_outcomes, grouped_folds
from ppl_models.image_cate.rate import ranks_in_folds, rate
from ppl_models.image_cate.simulation import stripes
from ppl_models.image_cate.training import Settings

RUNS = {  # of `benchmarks.run`: name, title, arguments
    "cate-stripes": ("Effects by image: stripes", "stripes --seeds 2"),
    "cate-uganda": ("Effects by image: the Uganda trial", "uganda --seeds 1"),
    "cate-scaling": ("Effects by image: seconds of a fit", "scaling"),
}

PACKAGES = ("ppl-models", "torch", "econml", "causalml", "scikit-learn", "numpy")
COVERAGE = "coverage of image effects, 90 %"
NOISES = (0.5, 1.0, 2.0, 3.0, 4.0)


def image_cate(**options: Any) -> Learner:
    """``ImageCATE`` with these options."""

    def learner(trial: Trial, where: torch.Tensor, seed: int) -> Prediction:
        model = ImageCATE(**options)
        model.fit(
            trial.outcome,
            trial.treatment,
            trial.images,
            image_index=trial.image_index,
            propensity=trial.propensity,
            seed=seed,
            progress=False,
        )
        target = trial.images[where]
        return Prediction(
            model.effect(target).double(), model.cluster_probs(target).argmax(1), model.effect_interval(target).double()
        )

    return learner


def arm_networks(shared: bool) -> Learner:
    """TARNet, or one network an arm, with types by k-means; the library's, at as many updates as ``ImageCATE``."""

    def learner(trial: Trial, where: torch.Tensor, seed: int) -> Prediction:
        settings = Settings(num_clusters=2, num_steps=ImageCATE().get_params()["num_steps"])
        model = fit_arm_networks(
            trial.outcome,
            trial.treatment,
            trial.images,
            trial.image_index,
            shared=shared,
            settings=settings,
            seed=seed,
        ).model
        target = trial.images[where]
        return Prediction(model.effect(target).double(), model.cluster(target))

    return learner


LEARNERS: dict[str, Learner] = {
    "ImageCATE gated": image_cate(num_clusters=2, objective="gated"),
    "ImageCATE gated, fixed features": image_cate(num_clusters=2, objective="gated", backbone="fixed"),
    "ImageCATE marginal": image_cate(num_clusters=2, objective="marginal"),
    "TARNet, k-means": arm_networks(shared=True),
    "a network an arm, k-means": arm_networks(shared=False),
    "ridge R-learner, summaries": effect_learners.ridge_r,
    "T-learner forest, summaries": effect_learners.forest_t,
    "econml CausalForestDML, summaries": effect_learners.causal_forest,
    "causalml X-learner, summaries": effect_learners.x_learner,
}


def run(name: str, trial: Trial, where: torch.Tensor, seed: int) -> tuple[Prediction, float] | None:
    """A learner's prediction and its seconds, or None where its package is absent."""
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = LEARNERS[name](trial, where, seed)
    except ImportError as error:
        print(f"{name}: left out, {error}")
        return None
    return found, time.perf_counter() - start


def run_stripes(learners: Sequence[str], noises: Sequence[float], seeds: int, units: int) -> list[dict[str, Any]]:
    """PEHE, accuracy of types, coverage of 90 % intervals of image effects and seconds, on as many images unseen."""
    rows = []
    for noise in noises:
        for seed in range(seeds):
            data = stripes(2 * units, noise=noise, seed=100 + seed)
            trial = Trial(
                data.outcome, data.treatment, data.images, data.image_index, image_summaries(data.images), 0.5
            ).rows(torch.arange(units))
            where = torch.arange(units, 2 * units)
            truth = data.effect[where].double()
            rows.append(_known_types(trial, data.types, where, truth) | {"noise": noise, "seed": seed})
            for name in learners:
                done = run(name, trial, where, seed)
                if done is None:
                    continue
                found, seconds = done
                types = two_means(found.effect) if found.types is None else found.types
                inside = (
                    None
                    if found.interval is None
                    else float(((found.interval[:, 0] <= truth) & (truth <= found.interval[:, 1])).double().mean())
                )
                rows.append(
                    {
                        "learner": name,
                        "noise": noise,
                        "seed": seed,
                        "PEHE": pehe(found.effect, truth),
                        "accuracy": accuracy(types, data.types[where]),
                        COVERAGE: inside,
                        "seconds": seconds,
                    }
                )
                progress({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()})
    return rows


def _known_types(trial: Trial, types: torch.Tensor, where: torch.Tensor, truth: torch.Tensor) -> dict[str, Any]:
    """The floor: differences in means within types that are known; what it errs by is the outcome's noise."""
    effects = []
    for kind in (0, 1):
        rows = types[trial.image_index] == kind
        arms = [trial.outcome[rows & (trial.treatment == arm)].double().mean() for arm in (0, 1)]
        effects.append(arms[1] - arms[0])
    error = pehe(torch.stack(effects)[types[where]], truth)
    return {"learner": "types known", "PEHE": error, "accuracy": 1.0, COVERAGE: None, "seconds": 0.0}


def _data_folder() -> Path:
    here = Path(__file__).resolve().parents[2] / "shared" / "data"
    return Path(os.environ.get("PPL_MODELS_DATA", here)) / "uganda_yop"


def uganda() -> tuple[Trial, torch.Tensor]:
    """The trial, and which units are used: all."""
    with np.load(_data_folder() / "uganda_yop.npz", allow_pickle=False) as held:
        y, t = torch.from_numpy(held["outcome"]).float(), torch.from_numpy(held["treatment"]).float()
        images = torch.from_numpy(held["images"]).float().permute(0, 3, 1, 2).contiguous()
        index = torch.from_numpy(held["image_index"]).long()
    return Trial(y, t, images, index, image_summaries(images).float(), float(t.mean())), index


def run_uganda(learners: Sequence[str], splits: int) -> list[dict[str, Any]]:
    """Rank-weighted effects of cross-fitted predictions (5 folds by image), ranked within folds; scores from means of
    the other folds' arms.
    """
    trial, site = uganda()
    rows = []
    for split in range(splits):
        folds = grouped_folds(site, 5, split, trial.treatment)
        mu0, mu1 = cross_fit_outcomes(trial.outcome, trial.treatment, None, site, seed=split)
        scores = aipw_scores(trial.outcome, trial.treatment, trial.propensity, mu0, mu1)
        for name in learners:
            effect, seconds = torch.zeros(len(trial.outcome), dtype=torch.float64), 0.0
            for fold in range(5):
                out = folds == fold
                done = run(name, trial.rows(~out), trial.image_index[out], split)
                if done is None:
                    break
                effect[out] = done[0].effect.double()
                seconds += done[1]
            else:
                ranks = ranks_in_folds(effect, folds)
                autoc, qini = (rate(scores, ranks, kind, site, seed=split) for kind in ("autoc", "qini"))
                slope = blp_scores(scores, effect, site).heterogeneity
                rows.append(
                    {
                        "learner": name,
                        "split": split,
                        "AUTOC": autoc.estimate,
                        "AUTOC ratio": autoc.ratio,
                        "QINI": qini.estimate,
                        "QINI ratio": qini.ratio,
                        "BLP slope": slope.estimate,
                        "seconds": seconds,
                    }
                )
                progress({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()})
    return rows


def run_coverage(noises: Sequence[float], replications: int, units: int) -> list[dict[str, Any]]:
    """Share of trials whose 90 % intervals of the types' effects cover 0 and 2, without calibration to the average; and
    standard deviations of these effects over those of differences in means of types that are known.
    """
    rows = []
    for noise in noises:
        for seed in range(replications):
            data = stripes(units, noise=noise, seed=1000 + seed)
            model = ImageCATE(backbone="fixed", num_folds=3, calibrate=False)
            start = time.process_time()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.fit(data.outcome, data.treatment, data.images, seed=seed, progress=False)
            types, seconds = model.cluster_effects(), time.process_time() - start
            for k, truth in enumerate((0.0, 2.0)):
                own = data.types == k
                counts = [int((own & (data.treatment == arm)).sum()) for arm in (0, 1)]
                error = noise * (1 / counts[0] + 1 / counts[1]) ** 0.5
                low, high = types.interval[k].tolist()
                half = 1.6449 * float(types.gate_standard_error[k])
                rows.append(
                    {
                        "noise": noise,
                        "type": k,
                        "posterior interval covers": float(low <= truth <= high),
                        "doubly robust interval covers": float(abs(float(types.gate[k]) - truth) <= half),
                        "sd over known types'": float(types.sd[k]) / error,
                        "error": float(types.effect[k]) - truth,
                        "CPU seconds": seconds,
                    }
                )
                progress({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()})
    return rows


def coverage_table(rows: Sequence[dict[str, Any]]) -> str:
    """Means over the trials."""
    names = [n for n in rows[0] if n not in ("noise", "type")]
    lines: list[dict[str, object]] = []
    for noise, kind in dict.fromkeys((row["noise"], row["type"]) for row in rows):
        own = [row for row in rows if (row["noise"], row["type"]) == (noise, kind)]
        means = {n: f"{statistics.mean(row[n] for row in own):.3f}" for n in names}
        lines.append({"noise": noise, "type": kind, "trials": len(own), **means})
    return markdown_table(lines)


def run_permuted(repeats: int) -> list[dict[str, Any]]:
    """QINI of the Uganda trial with images exchanged between sites, by gates of fixed features: nothing is to be
    found."""
    trial, _ = uganda()
    rows = []
    for seed in range(repeats):
        order = torch.randperm(len(trial.images), generator=torch.Generator().manual_seed(seed))
        model = ImageCATE(backbone="fixed", num_samples=50)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.fit(trial.outcome, trial.treatment, trial.images[order], trial.image_index, seed=seed, progress=False)
        found = model.evaluate()
        rows.append({"learner": "permuted", "QINI": found.qini.estimate, "QINI ratio": found.qini.ratio})
        progress({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()})
    return rows


def run_map(path: Path) -> list[dict[str, Any]]:
    """Effects over the whole country by transport from the trial, 70 x 70 pixels a tile; places unlike the trial's are
    marked."""
    folder = _data_folder()
    with np.load(folder / "yop_trial_70.npz", allow_pickle=False) as held, np.load(folder / "tiles70.npz") as other:
        y, t, index = (torch.from_numpy(held[name]) for name in ("Y", "W", "key"))
        images, tiles = (
            torch.from_numpy(x).float().permute(0, 3, 1, 2).contiguous() for x in (held["img70"], other["img"])
        )
        places = torch.from_numpy(other["lonlat"])
    index = torch.unique(index, return_inverse=True)[1] if int(index.max()) >= len(images) else index.long()
    model = ImageCATE()
    start = time.perf_counter()
    model.fit(y.float(), t.float(), images, image_index=index, seed=0, progress=False)
    carried = model.transport(tiles, lon_lat=places)
    seconds = time.perf_counter() - start
    picture = map_figure(carried.lon_lat, carried.effect, "effect", carried.inside)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, dpi=150)
    inside, everywhere = carried.area(), carried.area(inside_only=False)
    return [{"tiles": len(tiles), "seconds": seconds, "inside": inside, "everywhere": everywhere}]


def run_scaling(learners: Sequence[str], sizes: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """Seconds of one fit against numbers of images and of units an image."""
    rows = []
    for images, units in sizes:
        data = stripes(images, seed=0)
        generator = torch.Generator().manual_seed(0)
        index = torch.arange(images).repeat_interleave(units)
        treatment = torch.randint(2, (len(index),), generator=generator).float()
        outcome = treatment * data.effect[index] + torch.randn(len(index), generator=generator)
        trial = Trial(outcome, treatment, data.images, index, image_summaries(data.images), 0.5)
        for name in learners:
            done = run(name, trial, torch.arange(min(images, 500)), 0)
            if done is not None:
                rows.append({"learner": name, "images": images, "units": len(index), "seconds": done[1]})
                progress(rows[-1])
    return rows


def table(rows: Sequence[dict[str, Any]], keys: Sequence[str], values: Sequence[str]) -> str:
    """Median, smallest and largest over seeds or splits."""
    groups = list(dict.fromkeys(tuple(row[k] for k in keys) for row in rows))
    lines: list[dict[str, object]] = []
    for group in groups:
        chosen = [row for row in rows if tuple(row[k] for k in keys) == group]
        line: dict[str, object] = dict(zip(keys, group, strict=True))
        for value in values:
            numbers = [row[value] for row in chosen if row[value] is not None]
            line[value] = spread(numbers) if len(numbers) > 1 else f"{numbers[0]:.3g}" if numbers else "-"
        lines.append(line)
    return markdown_table(lines)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """PEHE and accuracy against noise."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    axes = figure.subplots(1, 2)
    names = list(dict.fromkeys(row["learner"] for row in rows))
    markers = "osD^vP*X"
    for name, marker in zip(names, markers, strict=False):
        noises = sorted({row["noise"] for row in rows if row["learner"] == name})
        for axis, value in zip(axes, ("PEHE", "accuracy"), strict=True):
            medians = [
                statistics.median(row[value] for row in rows if row["learner"] == name and row["noise"] == noise)
                for noise in noises
            ]
            axis.plot(noises, medians, marker=marker, markersize=5, label=name)
    for axis, label in zip(axes, ("PEHE (effects are 0 and 2)", "accuracy of types"), strict=True):
        axis.set_xlabel("standard deviation of the outcome's noise")
        axis.set_ylabel(label)
    axes[0].set_ylim(bottom=0)
    axes[1].set_ylim(0.4, 1.02)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one comparison, print its table, keep its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("stripes", "coverage", "uganda", "permuted", "map", "scaling"))
    parser.add_argument("--learners", nargs="+", default=list(LEARNERS), choices=list(LEARNERS), metavar="NAME")
    parser.add_argument("--noise", nargs="+", type=float, default=NOISES)
    parser.add_argument("--seeds", type=int, default=5, help="simulations a noise level, or splits of the trial")
    parser.add_argument("--units", type=int, default=1000, help="units to train on, and images to test on")
    parser.add_argument("--replications", type=int, default=100, help="trials of coverage")
    parser.add_argument("--out", type=Path, default=Path("out/image_cate"))
    options = parser.parse_args(arguments)
    one_core()
    torch.set_num_threads(1)
    if options.what == "stripes":
        rows = run_stripes(options.learners, options.noise, options.seeds, options.units)
        columns = ["PEHE", "accuracy", COVERAGE, "seconds"]
        print(table(rows, ["noise", "learner"], columns))
        plot(rows, options.out / "stripes.png")
    elif options.what == "coverage":
        rows = run_coverage(options.noise, options.replications, options.units)
        print(coverage_table(rows))
    elif options.what == "permuted":
        rows = run_permuted(20)
        print("absolute ratio above 1.96:", sum(abs(row["QINI ratio"]) > 1.96 for row in rows), "of", len(rows))
    elif options.what == "map":
        rows = run_map(options.out / "country.png")
        print(markdown_table(rows))
    elif options.what == "uganda":
        rows = run_uganda(options.learners, options.seeds)
        columns = ["AUTOC", "AUTOC ratio", "QINI", "QINI ratio", "BLP slope", "seconds"]
        print(table(rows, ["learner"], columns))
    else:
        sizes = [(250, 1), (500, 1), (1000, 1), (2000, 1), (500, 4), (500, 16)]
        rows = run_scaling(options.learners, sizes)
        print(table(rows, ["learner", "images", "units"], ["seconds"]))
    save(options.out / f"{options.what}.json", rows, PACKAGES)


if __name__ == "__main__":
    main()
