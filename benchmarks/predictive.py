"""Posterior predictive draws: ``inference.Predictive`` against ``pyro.infer.Predictive``, sequential and parallel.

Run ``python benchmarks/predictive.py``.  1000 posterior draws x 1000 rows; the two sides take turns, and each line
gives the median ratio of processor time with the smallest and the largest of the repeats.  Pyro's ``parallel=True``
needs a model written to broadcast over an outer plate; it runs on the second logistic regression only.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Predictive as PyroPredictive
from torch import Tensor

from benchmarks.record import markdown_table, spread
from inference.results.predictive import Predictive

RUNS = {  # of `benchmarks.run`: name, title, arguments
    "predictive": ("Posterior predictive draws", ""),
}


def logistic(x: Tensor) -> None:
    """Logistic regression as one writes it for a single draw."""
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=x @ w + b))


def logistic_broadcast(x: Tensor) -> None:
    """The same, written to broadcast over a dimension of draws on the left of the rows."""
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=(w @ x.mT).squeeze(-2) + b if w.dim() > 2 else w @ x.mT + b))


def network(x: Tensor) -> None:
    """A Bayesian network 13-100-1 with tanh units."""
    w1 = pyro.sample("w1", dist.Normal(torch.zeros(x.shape[1], 100), 1.0).to_event(2))
    b1 = pyro.sample("b1", dist.Normal(torch.zeros(100), 1.0).to_event(1))
    w2 = pyro.sample("w2", dist.Normal(torch.zeros(100), 0.1).to_event(1))
    b2 = pyro.sample("b2", dist.Normal(0.0, 1.0))
    s = pyro.sample("s", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(torch.tanh(x @ w1 + b1) @ w2 + b2, s))


def seconds(run: Callable[[Tensor], object], x: Tensor) -> float:
    """Processor time of one run, which a busy machine distorts less than the clock."""
    start = time.process_time()
    run(x)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=7)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(settings.rows, 13)
    rows = []
    for model, parallel in (
        (logistic, False),
        (logistic_broadcast, False),
        (logistic_broadcast, True),
        (network, False),
    ):
        prior = Predictive(model, num_samples=settings.draws, return_sites=None)(x)
        samples = {site: value.squeeze(1) for site, value in prior.items() if site != "y"}
        ours, theirs = Predictive(model, samples), PyroPredictive(model, samples, parallel=parallel)
        pairs = [(seconds(theirs, x), seconds(ours, x)) for _ in range(settings.repeats + 1)][1:]
        ratios = [a / b for a, b in pairs]
        pyros, mine = (statistics.median(side) for side in zip(*pairs, strict=True))
        rows.append(
            {
                "model": model.__name__,
                "Pyro's": "parallel" if parallel else "draw by draw",
                "s, Pyro": f"{pyros:.4f}",
                "s, here": f"{mine:.4f}",
                "ratio": spread(ratios),
            }
        )
    print(f"{settings.draws} draws for {settings.rows} rows, one thread.\n\n{markdown_table(rows)}")


if __name__ == "__main__":
    main()
