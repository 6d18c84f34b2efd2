"""Marginalization models on binary tables, digits, strings, text and spin lattices, one JSON line a result.

Run ``python -m benchmarks.marginalization_model nltcs`` (or plants, dna, jester, digits, missing, moses, text, ising10,
ising30, timing), with ``--device auto`` for an accelerator if there is one, ``--quick`` for seconds, and ``--steps``,
``--hidden``, ``--depth``, ``--seed`` to change the settings.  ``moses`` needs the package molsets (its data files
alone: install it with ``--no-deps``).
"""

import argparse
import gzip
import json
import math
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inference.latent_classes import LatentClasses
from inference.runtime.generators import generator
from ppl_models import MarginalizationModel
from ppl_models.datasets import load_binary, load_digits
from ppl_models.marginalization_model import LatticeIsing
from ppl_models.marginalization_model.distribution import all_values

__all__ = ["digits", "emit", "half_observed", "main", "missing_scores", "moses", "string_bits", "text"]

RUNS = {  # of `benchmarks.run`: name, title, arguments
    "mam-nltcs": ("Marginalization models: NLTCS", "nltcs --device cpu"),
    "mam-nltcs-causal": ("Marginalization models: NLTCS, one pass normalised", "nltcs --marginal causal --device cpu"),
    "mam-digits": ("Marginalization models: digits", "digits --refit 30000 --pool 48000 --device cpu"),
    "mam-digits-causal": (
        "Marginalization models: digits, one pass normalised",
        "digits --refit 30000 --pool 48000 --marginal causal --marginal-steps 2900 --device cpu",
    ),
    "mam-text": ("Marginalization models: text", "text --device cpu"),
    "mam-moses": ("Marginalization models: strings of molecules", "moses --device cpu"),
    "mam-timing": ("Marginalization models: seconds of a query", "timing --device cpu"),
}

TABLES = ("nltcs", "plants", "dna", "jester")
# steps of the first stage, width, depth, dropout: chosen on the validation rows
SETTINGS: dict[str, tuple[int, int, int, float]] = {
    "nltcs": (4000, 256, 3, 0.1),
    "plants": (6000, 768, 4, 0.2),
    "dna": (600, 256, 2, 0.3),
    "jester": (2000, 384, 3, 0.2),
    "digits": (1500, 384, 3, 0.2),
    "missing": (1000, 256, 3, 0.2),
    "moses": (1500, 128, 4, 0.0),
    "text": (2400, 128, 4, 0.0),
    "ising10": (2000, 16, 2, 0.0),
    "ising30": (2000, 16, 2, 0.0),
}
QUICK = (30, 32, 2, 0.0)


def emit(**result: Any) -> None:
    """One JSON line; numbers to six digits."""
    rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in result.items()}
    print(json.dumps(rounded), flush=True)


def half_observed(x: Tensor, seed: int = 0) -> Tensor:
    """Rows with a random half of their variables missing; the same rows for each method."""
    order = torch.rand(x.shape, generator=generator(seed, "half")).argsort(1).argsort(1)
    return x.masked_fill((order < x.shape[1] // 2).to(x.device), -1)


def seconds(run: Callable[[], Any], device: torch.device, repeats: int = 3) -> float:
    """Least wall time of a call."""
    found = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        found.append(time.perf_counter() - start)
    return min(found[1:])


def settings_of(options: argparse.Namespace) -> tuple[int, int, int, float]:
    steps, hidden, depth, dropout = QUICK if options.quick else SETTINGS[options.task]
    dropout = dropout if options.dropout is None else options.dropout
    return options.steps or steps, options.hidden or hidden, options.depth or depth, dropout


def digits() -> tuple[Tensor, Tensor, Tensor]:
    """scikit-learn's digits, pixels of at least 8, cut at random: 1297, 200 and 300 rows."""
    order = torch.from_numpy(np.random.RandomState(0).permutation(1797))
    x = (load_digits().x[order] >= 8).long()
    return x[:1297], x[1297:1497], x[1497:]


def moses(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first strings of MOSES as 57 symbols out of 27, padding included."""
    spec = find_spec("moses")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("moses needs the data of molsets: pip install --no-deps molsets==0.3.1")
    folder = Path(spec.submodule_search_locations[0]) / "dataset" / "data"

    def lines(name: str, count: int) -> list[str]:
        with gzip.open(folder / f"{name}.csv.gz", "rt") as file:
            next(file)
            return [line.split(",")[0].strip() for line, _ in zip(file, range(count), strict=False)]

    train, test = lines("train", rows), lines("test", 2000)
    index = {symbol: i + 1 for i, symbol in enumerate(sorted(set("".join(train + test))))}
    coded = [torch.tensor([[index[c] for c in s] + [0] * (57 - len(s)) for s in part]) for part in (train, test)]
    return coded[0][1000:], coded[0][:1000], coded[1]


def text(length: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """The manual pages that ship with Python, as windows of lower-case letters and spaces."""
    topics = import_module("pydoc_data.topics").topics
    letters = "".join(
        c if c.isalpha() and c.isascii() else " " for c in " ".join(topics[k] for k in sorted(topics)).lower()
    )
    codes = torch.tensor([ord(c) - 96 if c != " " else 0 for c in " ".join(letters.split())])
    cuts = [0, int(0.9 * len(codes)), int(0.95 * len(codes)), len(codes)]
    train, valid, test = (codes[a:b] for a, b in pairwise(cuts))
    return train.unfold(0, length, 1), valid.unfold(0, length, length), test.unfold(0, length, length)


def strings_task(options: argparse.Namespace, device: torch.device) -> None:
    """R2 and R3 as JSON."""
    steps, hidden, depth, dropout = settings_of(options)
    rows = 2000 if options.quick else options.rows
    if options.task == "moses" and find_spec("moses") is None:
        emit(task="moses", what="not run", reason="no data: pip install --no-deps molsets==0.3.1")
        raise SystemExit(1)
    found = string_bits(
        *(moses(rows) if options.task == "moses" else text()),
        (steps, hidden, depth, dropout),
        num_test=16 if options.quick else 256,
        network=options.network or "transformer",
        seed=options.seed,
        device=device,
        batch_size=options.batch or 64,
        lr=options.lr or 3e-3,
        weight_decay=options.weight_decay,
        checkpoint=options.checkpoint,
        progress=options.progress,
    )
    emit(task=options.task, device=str(device), seed=options.seed, steps=steps, hidden=hidden, depth=depth, **found)


def string_bits(
    train: Tensor,
    valid: Tensor,
    test: Tensor,
    settings: tuple[int, int, int, float],
    *,
    num_test: int = 256,
    network: str = "transformer",
    seed: int = 0,
    device: torch.device | None = None,
    **training: Any,
) -> dict[str, Any]:
    """Bits a symbol of test strings out of 27 symbols, by the conditionals alone: f gets one update and is not asked.

    Args:
        train, valid, test: strings ``(N, D)``.
        settings: updates, width, depth, dropout.
        num_test: test strings that are scored, and the most validation strings.
        network, seed, device: of the model.
        training: further arguments of ``fit``.
    """
    steps, hidden, depth, dropout = settings
    train, valid, test = (part.to(device) for part in (train, valid[:num_test], test[:num_test]))
    size = train.shape[1]
    mam = MarginalizationModel([27] * size, network, hidden=hidden, depth=depth, dropout=dropout, classes=1, seed=seed)
    mam.to(train.device)
    cpu = time.process_time()
    result = mam.fit(train, valid, seed, num_steps=steps, marginal_steps=1, num_rows=2, **training)
    cpu = time.process_time() - cpu
    found = mam.log_prob_autoregressive(test, orders=5, seed=seed)
    scale = -1 / (size * math.log(2))
    ensemble = scale * found.ensemble
    curve = result.conditionals.validation_losses[1:]
    return {
        "one_order": scale * float(found.mean.mean()),
        "five_orders": float(ensemble.mean()),
        "standard_error": float(ensemble.std()) / math.sqrt(len(test)),
        "training_strings": len(train),
        "training_seconds": result.conditionals.seconds,
        "fit_processor_seconds": cpu,
        "validation_bits": [round(-scale * float(v), 3) for v in curve[4::5]],
    }


def data_task(options: argparse.Namespace, device: torch.device) -> None:
    """Train on rows; the chain rule, the one pass, half-observed rows, speed."""
    name, (steps, hidden, depth, dropout) = options.task, settings_of(options)
    network = options.network or "mlp"
    train, valid, test = load_binary(name) if name in TABLES else digits()
    if options.quick:
        train, valid, test = train[:1000], valid[:100], test[:100]
    train, valid, test = (part.to(device) for part in (train, valid, test))
    size = train.shape[1]
    mam = MarginalizationModel(
        [2] * size,
        network,
        hidden=hidden,
        depth=depth,
        dropout=dropout,
        classes=options.classes,
        marginal=options.marginal or "trunk",
        seed=options.seed,
    )
    mam.to(device)
    start, cpu = time.perf_counter(), time.process_time()
    result = mam.fit(
        train,
        valid,
        options.seed,
        num_steps=steps,
        marginal_steps=options.marginal_steps,
        num_rows=1000 if options.quick else options.pool,
        refit_rows=1000 if options.quick and options.refit else options.refit,
        batch_size=min(options.batch or 512, len(train)),
        lr=options.lr or 1e-3,
        weight_decay=options.weight_decay,
        checkpoint=options.checkpoint,
        progress=options.progress,
    )
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    common = {
        "task": name,
        "device": str(device),
        "seed": options.seed,
        "steps": steps,
        "hidden": hidden,
        "depth": depth,
    }
    best = None if result.conditionals.best_step is None else int(result.conditionals.best_step)
    emit(
        **common, what="training", seconds=wall, processor_seconds=cpu, best_step=best, network=network, dropout=dropout
    )
    for what, rows in (
        ("validation rows", valid),
        ("complete", test),
        ("half observed", half_observed(test)),
    ):
        found = mam.evaluate(rows, seed=options.seed)
        scale = size * math.log(2)
        emit(**common, what=what, **found._asdict(), bits_per_variable=-found.ensemble / scale)
    rows = half_observed(test)
    once = seconds(lambda: mam.log_prob(rows), device)
    along = seconds(lambda: mam.log_prob_autoregressive(rows, orders=1), device, 1)
    emit(
        **common,
        what="speed, half observed",
        queries_per_second=len(rows) / once,
        one_order_per_second=len(rows) / along,
        ratio=along / once,
    )
    if name == "nltcs":
        emit(**common, what="enumeration", **enumerate_states(mam))


def missing_task(options: argparse.Namespace, device: torch.device) -> None:
    """R4 as JSON."""
    steps, hidden, depth, dropout = settings_of(options)
    found = missing_scores(steps, hidden, depth, dropout, options.seed, device, options.progress)
    emit(task="missing", seed=options.seed, steps=steps, hidden=hidden, **found)


def missing_scores(
    steps: int, hidden: int, depth: int, dropout: float, seed: int, device: torch.device, progress: bool = False
) -> dict[str, float]:
    """R4: digits and their class as one more variable, 30 % of the pixels missing at random in training and test.

    The class is predicted from the observed pixels, each missing pixel from the observed ones; beside a mixture of 80
    latent classes fitted to the same rows.
    """
    order = torch.from_numpy(np.random.RandomState(0).permutation(1797))
    data = load_digits()
    whole = torch.cat([(data.x[order] >= 8).long(), data.y[order].long().unsqueeze(1)], 1).to(device)
    gone = torch.rand(whole.shape, generator=generator(0, "missing")).to(device) < 0.3
    gone[:, -1] = False
    x = whole.masked_fill(gone, -1)
    train, valid, test, truth = x[:1297], x[1297:1497], x[1497:].clone(), whole[1497:]
    test[:, -1] = -1
    mam = MarginalizationModel([2] * 64 + [10], hidden=hidden, depth=depth, dropout=dropout, seed=seed)
    mam.to(device)
    mam.fit(train, valid, seed, num_steps=steps, marginal_steps=1, num_rows=100, progress=progress)
    log_p = mam.conditional_logits(test)
    hidden_pixels = gone[1497:, :-1]
    picked = log_p[:, :-1].gather(2, truth[:, :-1, None]).squeeze(2)
    classes = LatentClasses([2] * 64 + [10], 80).to(device)
    classes.learn(train, generator=generator(0, "classes", device=device))
    places = torch.arange(64, device=device).split(1)
    by_classes = torch.stack([classes(test.index_copy(1, j, truth[:, j])) - classes(test) for j in places], 1)
    return {
        "accuracy": float((log_p[:, -1].argmax(1) == truth[:, -1]).float().mean()),
        "class_log_score": float(log_p[:, -1].gather(1, truth[:, -1:]).mean()),
        "pixel_log_score": float(picked[hidden_pixels].mean()),
        "pixel_log_score_of_latent_classes": float(by_classes[hidden_pixels].mean()),
        "latent_classes": int(torch.isfinite(classes.log_weights).sum()),
    }


def enumerate_states(mam: MarginalizationModel) -> dict[str, float]:
    """All 65,536 states of nltcs: total mass of one pass, and its 120 pairwise marginals beside the conditionals' own.

    The conditionals give a pair's marginal in several ways, which differ as far as their orders do: along one order of
    all variables, summed over all states; the same for two random orders of each state, averaged, which is the
    mixture over orders that the ensemble stands for; and the product of two steps, the mean of both ways round.
    """
    states = all_values(mam.cardinalities)
    size = mam.num_variables
    mass = mam.log_prob(states).double().exp().sum()
    along, back = (mam.distribution(order=order) for order in (range(size), range(size - 1, -1, -1)))
    with torch.no_grad():
        joint = torch.cat([along.log_prob(part) for part in states.split(8192)]).double().exp()
    mixed = mam.log_prob_autoregressive(states, orders=2, seed=1).ensemble.double().exp()
    hot = torch.stack([states == 0, states == 1], 2).double().flatten(1)
    cells = torch.triu_indices(2 * size, 2 * size, 1)
    cells = cells[:, cells[0] // 2 != cells[1] // 2]
    rows = torch.full((cells.shape[1], size), -1, device=states.device)
    for cell in cells:
        rows.scatter_(1, (cell // 2).unsqueeze(1).to(states.device), (cell % 2).unsqueeze(1).to(states.device))
    found = {
        "one_pass": mam.log_prob(rows).double().exp(),
        "one_order": (hot.T * joint @ hot)[cells[0], cells[1]],
        "orders": (hot.T * mixed @ hot)[cells[0], cells[1]] / mixed.sum(),
        "two_steps": (along.log_prob(rows).exp() + back.log_prob(rows).exp()).detach().double() / 2,
    }
    names = list(found)
    gaps = {
        f"worst_{a}_{b}": float((found[a] - found[b]).abs().max()) for i, a in enumerate(names) for b in names[i + 1 :]
    }
    return {"mass": float(mass), "conditionals_mass": float(joint.sum()), **gaps}


def heat_bath(lattice: LatticeIsing, rows: int, sweeps: int, device: torch.device, seed: int) -> Tensor:
    """Draws of a lattice with even sides by Gibbs sampling of its two colours in turn."""
    draw = generator(seed, "heat bath", device=device)
    height, width = lattice.shape
    colour = (torch.arange(height)[:, None] + torch.arange(width)) % 2 == 0
    s = torch.randint(2, (rows, height, width), generator=draw, device=device) * 2.0 - 1
    for sweep in range(2 * sweeps):
        around = s.roll(1, 1) + s.roll(-1, 1) + s.roll(1, 2) + s.roll(-1, 2)
        up = torch.sigmoid(2 * (2 * lattice.coupling * around + lattice.field))
        new = 2.0 * (torch.rand(s.shape, generator=draw, device=device) < up) - 1
        s = torch.where((colour if sweep % 2 else ~colour).to(device), new, s)
    return ((s + 1) / 2).long().flatten(1)


def lattice_task(options: argparse.Namespace, device: torch.device) -> None:
    """Train on an Ising energy of 10 x 10 spins; exact divergences both ways and log Z, there or on 30 x 30 spins.

    The networks see no lattice larger than 10 x 10: for the larger one they are resized.
    """
    steps, hidden, depth, _ = settings_of(options)
    side = 10 if options.task == "ising10" else 30
    small = LatticeIsing(10, coupling=0.1, field=0.2)
    lattice = LatticeIsing(side, coupling=0.1, field=0.2)
    # A torus of 30 x 30 is three of 10 x 30 to 1e-8 nats at this coupling.
    strip = lattice if side == 10 else LatticeIsing(10, coupling=0.1, field=0.2, height=30)
    log_z, entropy = strip.log_partition() * side / 10, strip.entropy() * side / 10
    mam = MarginalizationModel(
        [2] * 100,
        options.network or "lattice",
        hidden=hidden,
        depth=depth,
        marginal=options.marginal or "shared",
        seed=options.seed,
    ).to(device)
    start, cpu = time.perf_counter(), time.process_time()
    result = mam.fit_energy(
        small.log_density,
        options.objective,
        options.seed,
        num_steps=steps,
        batch_size=16 if options.quick else options.batch or 64,
        lr=options.lr or 6e-3,
        checkpoint=options.checkpoint,
        progress=options.progress,
    )
    if side > 10:
        mam = mam.resized((side, side), lattice.log_density)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    common = {"task": options.task, "device": str(device), "seed": options.seed, "steps": steps, "hidden": hidden}
    common |= {"depth": depth, "objective": options.objective}
    emit(**common, what="training", seconds=wall, processor_seconds=cpu, restarts=result.restarts)
    count = options.draws or (64 if options.quick or side > 10 else 4096)
    start = time.perf_counter()
    found = mam.log_partition("bridge", num_samples=count, seed=1)
    reverse = log_z - found.log_weights  # log q - log p of draws of q
    error = float(reverse.std() / math.sqrt(count))
    emit(
        **common,
        what="log Z and KL(model || target)",
        truth=log_z,
        importance_error=float(found.log_weights.logsumexp(0)) - math.log(count) - log_z,
        bridge_error=found.value - log_z,
        network_error=mam.log_partition("network").value - log_z,
        lower=found.lower,
        upper=found.upper,
        ess=found.ess,
        pareto_k=found.pareto_k,
        kl=float(reverse.mean()),
        kl_standard_error=error,
        seconds=time.perf_counter() - start,
    )
    draws = heat_bath(lattice, count, 20 if options.quick else 200, device, options.seed)
    along = mam.log_prob_autoregressive(draws, orders=1, seed=2).mean.double()
    pass_log_p = mam.log_prob(draws).double()
    emit(
        **common,
        what="KL(target || model)",
        rows=count,
        entropy=entropy,
        one_order_nll=-float(along.mean()),
        kl_one_order=-float(along.mean()) - entropy,
        # the entropy's noise cancels where the draws' own log-density is known
        kl_paired=float((lattice.log_density(draws).double() - log_z - along).mean()),
        kl_paired_standard_error=float((lattice.log_density(draws).double() - along).std() / math.sqrt(count)),
        one_pass_nll=-float(pass_log_p.mean()),
    )
    half = half_observed(draws)
    once = seconds(lambda: mam.log_prob(half[:16]), device)
    order = seconds(lambda: mam.log_prob_autoregressive(half[:16], orders=1), device, 1)
    emit(**common, what="speed of 16 half-observed rows", seconds=once, one_order_seconds=order, ratio=order / once)


def timing_task(options: argparse.Namespace, device: torch.device) -> None:
    """Time of a one-pass query of 16 half-observed rows and of one order of the chain rule, as D grows."""
    found = []
    for size in (16, 36) if options.quick else (25, 50, 100, 200, 400, 900):
        mam = MarginalizationModel(
            [2] * size, hidden=options.hidden or 256, depth=options.depth or 3, marginal=options.marginal or "trunk"
        ).to(device)
        rows = half_observed(torch.randint(2, (16, size), generator=generator(0, "rows")).to(device))
        once = seconds(lambda mam=mam, rows=rows: mam.log_prob(rows), device, 5)  # type: ignore[misc]
        order = seconds(lambda mam=mam, rows=rows: mam.log_prob_autoregressive(rows, orders=1), device, 1)  # type: ignore[misc]
        found.append((size, once, order))
        times = {"one_pass": once, "one_order": order, "ratio": order / once}
        emit(task="timing", device=str(device), variables=size, marginal=options.marginal or "trunk", **times)
    if options.figure:
        draw_timing(found, options.figure)


def draw_timing(found: list[tuple[int, float, float]], path: Path) -> None:
    """Both times, and their ratio, against the number of variables."""
    from matplotlib.figure import Figure

    size, once, order = zip(*found, strict=True)
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.loglog(size, [1e3 * t for t in order], "o-", label="chain rule, one order")
    left.loglog(size, [1e3 * t for t in once], "s-", label="one pass")
    left.set(xlabel="variables D", ylabel="milliseconds, 16 half-observed rows")
    left.legend(frameon=False)
    right.loglog(size, [b / a for a, b in zip(once, order, strict=True)], "o-", label="measured")
    right.loglog(size, size, ":", color="gray", label="D")
    right.set(xlabel="variables D", ylabel="one order / one pass")
    right.legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=[*SETTINGS, "timing"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--marginal-steps", type=int, help="by default half of the first stage's")
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--depth", type=int)
    parser.add_argument("--dropout", type=float)
    parser.add_argument("--classes", type=int, default=64)
    parser.add_argument("--network")
    parser.add_argument("--marginal", help="of f: trunk by default, of the lattices shared")
    parser.add_argument("--objective", default="consistency", help="of the lattices")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--draws", type=int, help="of a lattice, to judge it by")
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--pool", type=int, default=16384, help="rows of the second stage")
    parser.add_argument("--refit", type=int, default=0, help="draws that the conditionals are fitted to once more")
    parser.add_argument("--rows", type=int, default=200_000, help="training strings of MOSES")
    parser.add_argument("--checkpoint", type=Path, help="file to resume the training from")
    parser.add_argument("--figure", type=Path, help="of the times, a PNG file")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--progress", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1 if options.device == "cpu" else torch.get_num_threads())
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = (found or torch.device("cpu")) if options.device == "auto" else torch.device(options.device)
    others = {"timing": timing_task, "missing": missing_task, "moses": strings_task, "text": strings_task}
    others |= {"ising10": lattice_task, "ising30": lattice_task}
    others.get(options.task, data_task)(options, device)


if __name__ == "__main__":
    main()
