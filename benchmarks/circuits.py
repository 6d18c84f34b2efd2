"""Probabilistic circuits on the binary tables: a hidden Chow-Liu tree of libcirkit, for so many processor seconds.

The peer of marginalization models for marginals: exact for any subset.  Run ``python -m benchmarks.circuits nltcs
--seconds 120``, in an environment with libcirkit (``pip install libcirkit``); the JSON lines have the names of
``benchmarks.marginalization_model``.  pyjuice is no peer here: its layers are Triton kernels, which need a GPU.
"""

import argparse
import copy
import time
from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from benchmarks.marginalization_model import TABLES, emit, half_observed, seconds
from ppl_models.datasets import load_binary
from ppl_models.marginalization_model.distribution import all_values

__all__ = ["main"]

RUNS = {  # of `benchmarks.run`: name, title, arguments
    "circuits-nltcs": ("Probabilistic circuits: NLTCS", "nltcs --seconds 150"),
    "circuits-plants": ("Probabilistic circuits: plants", "plants --seconds 120"),
}


def circuit_of(rows: Tensor, units: int) -> tuple[Any, Any]:
    """The compiled circuit, and its query of marginals."""
    modalities, pipeline = import_module("cirkit.templates.data_modalities"), import_module("cirkit.pipeline")
    queries, utils = import_module("cirkit.backend.torch.queries"), import_module("cirkit.templates.utils")
    symbolic = modalities.tabular_data(
        "chow-liu-tree",
        data=rows,
        input_layers={"name": "categorical", "args": {"num_categories": 2}},
        num_input_units=units,
        sum_product_layer="cp",
        num_sum_units=units,
        sum_weight_param=utils.Parameterization(activation="softmax", initialization="normal"),
    )
    context = pipeline.PipelineContext(backend="torch", semiring="lse-sum", fold=True, optimize=True)
    circuit = context.compile(symbolic)
    return circuit, queries.IntegrateQuery(circuit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--seconds", type=float, default=120.0, help="of the processor, for training")
    parser.add_argument("--units", type=int, default=32)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    train, valid, test = load_binary(options.table)
    circuit, integrate = circuit_of(train, options.units)
    optimizer = torch.optim.Adam(circuit.parameters(), lr=options.lr)

    def log_prob(rows: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([circuit(part).flatten() for part in rows.split(2048)])

    def log_marginal(rows: Tensor) -> Tensor:
        with torch.no_grad():
            parts = [integrate(p.clamp(min=0), integrate_vars=p < 0).flatten() for p in rows.split(2048)]
        return torch.cat(parts)

    start, steps, best, kept = time.process_time(), 0, -float("inf"), copy.deepcopy(circuit.state_dict())
    while time.process_time() - start < options.seconds:
        # the rate falls to zero with the time
        optimizer.param_groups[0]["lr"] = options.lr * max(1 - (time.process_time() - start) / options.seconds, 0.01)
        batch = train[torch.randint(len(train), (min(options.batch, len(train)),))]
        loss = -circuit(batch).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
        if steps % 100 == 0:
            score = float(log_prob(valid).mean())
            if score > best:
                best, kept = score, copy.deepcopy(circuit.state_dict())
    spent = time.process_time() - start
    circuit.load_state_dict(kept)
    half = half_observed(test)
    once = seconds(lambda: log_marginal(half), torch.device("cpu"))
    found: dict[str, Any] = {}
    if options.table == "nltcs":
        found["mass"] = float(log_prob(all_values(torch.full((16,), 2))).double().exp().sum())
    emit(
        task=options.table,
        peer=f"libcirkit {version('libcirkit')}",
        units=options.units,
        steps=steps,
        processor_seconds=spent,
        parameters=sum(p.numel() for p in circuit.parameters()),
        complete=float(log_prob(test).mean()),
        half_observed=float(log_marginal(half).mean()),
        queries_per_second=len(half) / once,
        **found,
    )


if __name__ == "__main__":
    main()
