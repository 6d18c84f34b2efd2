"""Monotone Boltzmann machines beside their peers: solvers, competing updates, marginals and cost.

    python -m benchmarks.monotone_dbm solvers updates marginals cost --out out

``solvers``: products with Phi and milliseconds a thousand queries to a residual of 1e-6 on a stiff problem, beside
torchdeq's solvers on the published map, and Newton's three forms at 1e-3 beside three dense passes.  ``updates``:
residuals of the competing updates, on random and on trained machines with a bound and without.  ``marginals``: error
of mean field, its correction and loopy belief propagation against enumeration.  ``cost``: products against the
stiffness and the size.  Images are in ``benchmarks.monotone_dbm_images``.  Peers that are not installed are left out;
pgmax goes in with ``pip install --no-deps pgmax`` beside jax, since what it declares drags in a documentation tool and
TensorFlow.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import markdown_table, save
from ppl_models import ConvMonotoneDBM, MonotoneDBM
from ppl_models.monotone_dbm.boltzmann import BoltzmannModel
from ppl_models.monotone_dbm.mean_field import SOLVERS, MeanFieldProblem, solve
from ppl_models.monotone_dbm.operators import PairwiseMap
from ppl_models.monotone_dbm.prox import prox_softmax

RUNS = {  # of `benchmarks.run`: name, title, arguments
    "dbm-solvers": ("Monotone machines: solvers", "solvers"),
    "dbm-updates": ("Monotone machines: competing updates", "updates"),
    "dbm-marginals": ("Monotone machines: marginals against enumeration", "marginals"),
    "dbm-cost": ("Monotone machines: cost", "cost"),
}

Row = dict[str, Any]
_D = torch.float64


def stiff(strength: float, groups: int = 96, rows: int = 32, rank: int = 24) -> tuple[MonotoneDBM, MeanFieldProblem]:
    """Groups of 4 whose columns of A share a direction with the given strength, so that Phi has one very negative
    eigenvalue, and random fields; no observations.
    """
    model = MonotoneDBM([4] * groups, rank=rank, monotonicity=0.01).double()
    noise = torch.Generator().manual_seed(0)
    shared = torch.tensor([1.5, 0.5, -0.5, -1.5], dtype=_D).repeat(groups)
    with torch.no_grad():
        weight = torch.randn(rank, 4 * groups, generator=noise, dtype=_D) / rank**0.5
        weight[0] += strength * shared
        model.operator.weight.copy_(weight)  # type: ignore[operator]
        phi = model.operator.prepare()
    bias = torch.randn(rows, 4 * groups, generator=noise, dtype=_D)
    free = torch.ones(rows, 4 * groups, dtype=torch.bool)
    return model, MeanFieldProblem(model.groups, phi.apply, bias, torch.zeros_like(bias), free)


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """What ``run`` returns, and the fastest of ten calls in seconds of processor time; of one where it takes long."""
    seconds = []
    for _ in range(10):
        started = time.process_time()
        result = run()
        seconds.append(time.process_time() - started)
        if seconds[0] > 1:
            break
    return result, min(seconds)


def solvers(sizes: list[int]) -> list[Row]:
    """Every solver on 96 groups, the default and the published one on more."""
    rows: list[Row] = []
    for groups in sizes:
        strength = 3.0 if groups < 500 else 10.0
        model, problem = stiff(strength, groups)
        low, high = model.spectrum()
        with torch.no_grad():
            phi = model.operator.prepare()
            matrix = model.potentials()
        of = f"N = {4 * groups}, {low:.0f} to {high:.2f}"
        x = problem.bias
        _, dense = timed(lambda x=x, matrix=matrix: [x @ matrix for _ in range(3)])  # type: ignore[misc]
        cost = x.shape[1] ** 2
        alone = {
            "problem": of,
            "solver": "three products with Phi",
            "products": 3,
            "largest residual": "",
        }
        rows.append({**alone, **_cost(3 * cost, dense, len(x))})
        published: Row = {"solver": "forward_backward", "step_size": 0.125, "anderson": True}
        cases: list[tuple[str, Row]] = [(f"{name} to 1e-3", {"solver": name, "tolerance": 1e-3}) for name in _NEWTONS]
        cases += [(name, {"solver": name}) for name in _NEWTONS]
        if groups < 500:
            cases += [("published: forward_backward 0.125 + anderson", published)]
        if groups == 96:
            cases += [("forward_backward 0.125", {**published, "anderson": False})]
            names = [n for n in SOLVERS if n not in ("coordinate", "krahenbuhl") and not n.startswith("newton")]
            cases += [(n + " + anderson" * a, {"solver": n, "anderson": a}) for n in names for a in (False, True)]
        for name, options in cases:
            limit = None if name.startswith("newton") else 400

            def run(options: Row = options, limit: int | None = limit, problem: Any = problem, phi: Any = phi) -> Any:
                return solve(problem, phi, **{"tolerance": 1e-6, "max_iterations": limit, **options})

            found, seconds = timed(run)
            direct = options["solver"] == "newton_direct"
            work = _multiplications(phi, 4, found.evaluations, int(found.iterations.max()) if direct else 0)
            worst = float(found.residual.max())
            row = {"problem": of, "solver": name, "products": found.evaluations, "largest residual": f"{worst:.1e}"}
            rows.append({**row, **_cost(work, seconds, len(x))})
        if groups == 96:
            rows += _torchdeq(problem)
    return rows


_NEWTONS = ("newton", "newton_direct", "newton_cg")


def _multiplications(phi: PairwiseMap, states: int, products: int, systems: int) -> float:
    """Multiplications a query: products through the factor A, and systems of the size of its rank."""
    assert phi.low_rank is not None
    rank, n = phi.low_rank.factor.shape
    product = 2 * rank * n + n * states
    system = rank * n * (rank + states) + rank**3 / 3 + 3 * rank * n + n * states * (states + 2)
    return products * product + systems * system


def _cost(work: float, seconds: float, queries: int) -> Row:
    return {"million multiplications a query": f"{work / 1e6:.3g}", **_ms(seconds, queries)}


def _ms(seconds: float, queries: int) -> Row:
    return {"ms a 1,000 queries": f"{1e6 * seconds / queries:,.0f}"}


def _torchdeq(problem: MeanFieldProblem) -> list[Row]:
    try:
        from torchdeq.solver import get_solver
    except ImportError:
        print("torchdeq is not installed and left out")
        return []
    rows = []
    for name in ("anderson", "broyden", "fixed_point_iter"):
        calls = [0]

        def step(q: Tensor, calls: list[int] = calls) -> Tensor:
            calls[0] += 1
            inner = 0.875 * q + 0.125 * (problem.apply(q) + problem.bias)
            return problem.groups.each(lambda part: prox_softmax(part, 0.125), inner)

        start = problem.response(torch.zeros_like(problem.bias))
        started = time.process_time()
        found = get_solver(name)(step, start, max_iter=150, tol=1e-6, stop_mode="abs")[0]
        seconds = time.process_time() - started
        residual = problem.residual(found, problem.apply(found) + problem.bias)
        rows.append(
            {
                "problem": "the first",
                "solver": f"torchdeq {name} on the published map",
                "products": calls[0],
                "largest residual": f"{float(residual.max()):.1e}",
                "million multiplications a query": "",
                **_ms(seconds, len(start)),
            }
        )
    return rows


def updates(out: Path) -> list[Row]:
    """Residual of each update against its products, on machines with a bound and without one: random ones, and ones
    that have learned digits.
    """
    import matplotlib.pyplot as plt

    rows: list[Row] = []
    machines = {**_random_machines(), **_digit_machines()}
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.4), sharex=True, sharey=True, layout="constrained")
    for axis, (kind, (model, problem)) in zip(axes.flat, machines.items(), strict=True):
        with torch.no_grad():
            phi = model.operator.prepare()
            low, high = model.spectrum()
        truth = solve(problem, phi, "coordinate", tolerance=1e-9, max_iterations=300)
        goal = problem.response(truth.value)
        for name in ("parallel", "damped", "mirror", "krahenbuhl", "forward_backward", "newton"):
            trail: list[tuple[int, float]] = []

            def note(products: int, residual: Tensor, trail: list[tuple[int, float]] = trail) -> None:
                trail.append((products, float(residual.max())))

            limit = 50 if name == "newton" else 400
            options: Row = {"step_size": 0.125} if name == "forward_backward" else {}
            found = solve(problem, phi, name, tolerance=1e-9, max_iterations=limit, callback=note, **options)
            apart = (problem.response(found.value) - goal).abs().amax(1)
            values = [max(r, 1e-12) for _, r in trail]
            dashes = "--" if name == "forward_backward" else "-"  # it lies on top of the parallel update
            axis.plot([p for p, _ in trail], values, dashes, label=name, lw=1.6 if name == "newton" else 1.1)
            rows.append(
                {
                    "machine": f"{kind}, eigenvalues {low:.1f} to {high:.2f}",
                    "update": name,
                    "products": found.evaluations,
                    "residual": f"{float(found.residual.max()):.1e}",
                    "distance from coordinate descent": f"{float(apart.max()):.1e}",
                    "queries at its point": f"{int((apart < 1e-6).sum())} of {len(goal)}",
                }
            )
        axis.set(title=kind, yscale="log", xscale="log", ylim=(1e-10, 2))
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("largest residual of the update's own rule")
    for axis in axes[1]:
        axis.set_xlabel("products with Phi")
    axes[0, 1].legend(frameon=False, fontsize=8)
    figure.savefig(out / "dbm_updates.png", dpi=150)
    return rows


Machine = tuple[BoltzmannModel, MeanFieldProblem]


def _random_machines() -> dict[str, Machine]:
    """The same A, scaled to the bound and not."""
    made: dict[str, Machine] = {}
    for kind in ("monotone", "unconstrained"):
        model, problem = stiff(1.0, groups=48, rows=8)
        model.operator.monotone = kind == "monotone"
        with torch.no_grad():
            made[kind] = model, replace(problem, product=model.operator.prepare().apply)
    return made


def _digit_machines(queries: int = 32) -> dict[str, Machine]:
    """Machines of digits with the label by mean field, trained for 200 steps under the relaxed bound and without one;
    test images of which 40% is seen.
    """
    from ppl_models.datasets import load_digits

    table = load_digits()
    made: dict[str, Machine] = {}
    images = (table.x / 16).view(-1, 1, 8, 8)
    mask = torch.rand(queries, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.4
    for kind in ("monotone", "unconstrained"):
        net = ConvMonotoneDBM((1, 8, 8), 4, 10, curvature=2, sum_labels=False)
        net.operator.monotone = kind == "monotone"
        net.fit(images[:1437], table.y[:1437], (0.2, 0.6), num_steps=200, lr=0.03, progress=False)
        net.double()
        with torch.no_grad():
            query = net.image_query(images[1437 : 1437 + queries].double(), mask)
            made[f"digits, {kind}"] = net, net.problem(net.operator.prepare(), query)
    return made


def marginals() -> list[Row]:
    """Mean absolute error of marginals over 20 random models of seven groups of 3."""
    sums: dict[str, list[float]] = {}
    products: dict[str, list[int]] = {}
    for seed in range(20):
        noise = torch.Generator().manual_seed(seed)
        model = MonotoneDBM([3] * 7, rank=8, monotonicity=0.1).double()
        with torch.no_grad():
            model.operator.weight.copy_(torch.randn(8, 21, generator=noise, dtype=_D))  # type: ignore[operator]
            model.bias.copy_(torch.randn(21, generator=noise, dtype=_D))
        exact = model.exact_marginals()[0]
        found, better = model.marginals(tolerance=1e-6), model.correlations()
        corrected = found.products + 12
        results: dict[str, tuple[Tensor, int]] = {
            "mean field": (found.probabilities[0], found.products),
            "mean field, corrected to second order": (better.marginals[0], corrected),
        }
        for name, most in (("as mean field", found.products), ("as its correction", corrected), ("all", 200)):
            messages, rounds = _belief_propagation(model.potentials(), model.bias.detach(), 7, 3, most)
            results[f"loopy belief propagation (own), rounds {name}"] = messages, rounds
        for name, most in (("as mean field", found.products), ("as its correction", corrected), ("30", 30)):
            beside = _pgmax(model.potentials(), model.bias.detach(), 7, 3, most)
            if beside is not None:
                results[f"loopy belief propagation, pgmax, float32, rounds {name}"] = beside, most
        for name, (value, count) in results.items():
            sums.setdefault(name, []).append(float((value - exact).abs().mean()))
            products.setdefault(name, []).append(count)
    return [
        {
            "method": name,
            "mean absolute error": f"{sum(errors) / 20:.5f}",
            "largest of 20 models": f"{max(errors):.5f}",
            "products or rounds": f"{sum(products[name]) / 20:.0f}",
        }
        for name, errors in sums.items()
    ]


def _pgmax(phi: Tensor, bias: Tensor, groups: int, states: int, rounds: int) -> Tensor | None:
    """Marginals by so many rounds of pgmax with damping one half; None where it is not installed."""
    try:
        import jax
        import numpy as np

        if not hasattr(jax.lib, "xla_bridge"):  # which pgmax 0.6.1 asks for, and jax has moved
            from types import SimpleNamespace

            from jax.extend.backend import get_backend

            jax.lib.xla_bridge = SimpleNamespace(get_backend=get_backend)
        from pgmax import fgraph, fgroup, infer, vgroup
    except ImportError:
        return None
    variables = vgroup.NDVarArray(num_states=states, shape=(groups,))
    graph = fgraph.FactorGraph(variable_groups=[variables])
    pairs = [(i, j) for i in range(groups) for j in range(i + 1, groups)]
    blocks = phi.reshape(groups, states, groups, states).numpy()
    graph.add_factors(
        fgroup.PairwiseFactorGroup(
            variables_for_factors=[[variables[i], variables[j]] for i, j in pairs],
            log_potential_matrix=np.stack([blocks[i, :, j] for i, j in pairs]),
        )
    )
    method = infer.BP(graph.bp_state, temperature=1.0)
    start = method.init(evidence_updates={variables: bias.reshape(groups, states).numpy()})
    end = method.run_bp(start, num_iters=rounds, damping=0.5)
    return torch.tensor(np.array(infer.get_marginals(method.get_beliefs(end))[variables])).to(phi)


def _belief_propagation(phi: Tensor, bias: Tensor, groups: int, states: int, most: int) -> tuple[Tensor, int]:
    """Marginals by synchronous sum-product with damping one half; a round costs about one product with Phi."""
    pair = phi.reshape(groups, states, groups, states).permute(0, 2, 1, 3)  # (from, to, state, state)
    local = bias.reshape(groups, states)
    messages = torch.zeros(groups, groups, states, dtype=phi.dtype)
    for rounds in range(1, most + 1):  # noqa: B007
        arriving = local + messages.sum(0)
        without = arriving[:, None] - messages.transpose(0, 1)
        new = (pair + without[..., None]).logsumexp(2).log_softmax(-1)
        new = new * (1 - torch.eye(groups, dtype=phi.dtype))[..., None]
        change = float((new - messages).abs().max())
        messages = 0.5 * messages + 0.5 * new
        if change < 1e-6:
            break
    return (local + messages.sum(0)).softmax(-1), rounds


def cost(out: Path) -> list[Row]:
    """Products of Newton and of the published solver to 1e-6 against stiffness and size."""
    import matplotlib.pyplot as plt

    rows: list[Row] = []
    for groups, strength in ((96, 0.0), (96, 0.3), (96, 1.0), (96, 3.0), (24, 3.0), (48, 3.0), (192, 3.0)):
        model, problem = stiff(strength, groups, rows=8)
        low, _ = model.spectrum()
        with torch.no_grad():
            phi = model.operator.prepare()
        names = _NEWTONS if phi.low_rank is not None else ("newton", "newton_cg")
        newton = {name: solve(problem, phi, name, tolerance=1e-6).evaluations for name in names}
        published = solve(
            problem, phi, "forward_backward", tolerance=1e-6, step_size=0.125, anderson=True, max_iterations=600
        )
        rows.append(
            {
                "N": 4 * groups,
                "lambda_min": f"{low:.1f}",
                **{name: newton.get(name) for name in _NEWTONS},
                "published": published.evaluations,
                "published converged": bool(published.converged.all()),
            }
        )
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True, layout="constrained")
    for axis, chosen, x, label in (
        (axes[0], rows[:4], lambda r: -float(r["lambda_min"]), "-lambda_min (N = 384)"),
        (axes[1], sorted([*rows[4:], rows[3]], key=lambda r: r["N"]), lambda r: r["N"], "N (strength 3)"),
    ):
        for name, colour in (
            ("newton", "#0072B2"),
            ("newton_direct", "#56B4E9"),
            ("newton_cg", "#009E73"),
            ("published", "#D55E00"),
        ):
            known = [r for r in chosen if r[name] is not None]
            axis.plot([x(r) for r in known], [r[name] for r in known], "o-", color=colour, label=name)
        axis.set(xlabel=label, xscale="log")
        axis.set_xticks([x(r) for r in chosen], [f"{x(r):.0f}" for r in chosen])
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylim(0, 1.1 * max(max(r["newton"], r["published"]) for r in rows))
    axes[0].set_ylabel("products with Phi to 1e-6")
    axes[0].legend(frameon=False)
    figure.savefig(out / "dbm_cost.png", dpi=150)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("solvers", "updates", "marginals", "cost")
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(names)}; all by default")
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--groups", type=int, nargs="+", default=[96, 192, 768], help="sizes of the solvers' problems")
    given = parser.parse_args()
    if unknown := set(given.parts) - set(names):
        parser.error(f"there is no part {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    runs: dict[str, Callable[[], list[Row]]] = {
        "solvers": lambda: solvers(given.groups),
        "updates": lambda: updates(given.out),
        "marginals": marginals,
        "cost": lambda: cost(given.out),
    }
    for name in given.parts or names:
        rows = runs[name]()
        print(f"\n{name}\n{markdown_table(rows)}", flush=True)
        save(given.out / f"dbm_{name}.json", rows, ["torch", "torchdeq"])


if __name__ == "__main__":
    main()
