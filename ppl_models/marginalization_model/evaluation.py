"""One-pass log-marginals against the chain rule, on complete or partial rows."""

import math

import torch
from torch import Tensor

from inference.objectives.self_consistency import sum_rule_residuals
from inference.runtime.generators import generator
from ppl_models.marginalization_model.queries import Queries
from ppl_models.marginalization_model.results import Evaluation

__all__ = ["compare", "group_correlation", "pearson", "ranks_of", "spearman"]


def pearson(a: Tensor, b: Tensor) -> float:
    """Correlation of two vectors; NaN if one is constant."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale > 0 else math.nan


def ranks_of(x: Tensor) -> Tensor:
    """Ranks from 1; ties share their mean rank."""
    _, inverse, counts = x.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[inverse]


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation."""
    return pearson(ranks_of(a), ranks_of(b))


@torch.no_grad()
def compare(model: Queries, values: Tensor, context: Tensor | None, orders: int, seed: int) -> Evaluation:
    """One pass, one order and an ensemble of orders on rows of which each has an observed variable."""
    along = model._along_orders(values, context, orders, seed)
    ensemble = along.logsumexp(0) - math.log(orders)
    one_pass = model._in_chunks(model._log_marginal, values, context)
    # One observed variable of each row is hidden, and summed over.
    keys = torch.rand(values.shape, generator=generator(seed, "hide", device=values.device), device=values.device)
    position = torch.where(values >= 0, keys, keys - 2).argmax(1)
    hidden = values.scatter(1, position.unsqueeze(1), -1)

    def violation(v: Tensor, j: Tensor, c: Tensor | None) -> Tensor:
        return sum_rule_residuals(model.marginals, model.cardinalities, v, j, c)

    rule = model._in_chunks(violation, hidden, position, context)
    return Evaluation(
        num_rows=len(values),
        orders=orders,
        one_order=float(along[0].mean()),
        ensemble=float(ensemble.mean()),
        one_pass=float(one_pass.mean()),
        bias=float((one_pass - ensemble).mean()),
        mae=float((one_pass - ensemble).abs().mean()),
        pearson=pearson(one_pass, ensemble),
        spearman=spearman(one_pass, ensemble),
        sum_rule=float(rule.square().mean().sqrt()),
        normalised=model.marginals.normalised,
    )


@torch.no_grad()
def group_correlation(
    model: Queries, values: Tensor, hidden: tuple[int, ...], threshold: float, orders: int, seed: int
) -> tuple[float, float, int]:
    """The paper's protocol: of each complete row, versions with so many variables drawn anew; correlation within them.

    Versions whose ensemble log-probability is within ``threshold`` nats of one kept before are dropped, so that only
    well separated ones count; groups of fewer than two are left out.

    Returns:
        Mean Pearson and Spearman correlation over the groups, and how many there were.
    """
    versions = [values]
    for number, count in enumerate(hidden):
        draw = generator(seed, "version", number, device=values.device)
        order = torch.rand(values.shape, generator=draw, device=values.device).argsort(1).argsort(1)
        versions.append(model._fill(values.masked_fill(order < count, -1), None, None, seed + number + 1).values)
    stacked = torch.cat(versions)
    ensemble = model._along_orders(stacked, None, orders, seed).logsumexp(0).view(len(versions), -1) - math.log(orders)
    one_pass = model._in_chunks(model._log_marginal, stacked, None).view(len(versions), -1)
    found = []
    for row in range(len(values)):
        kept: list[int] = []
        for i in range(len(versions)):
            if all(abs(float(ensemble[i, row] - ensemble[j, row])) >= threshold for j in kept):
                kept.append(i)
        if len(kept) > 1:
            a, b = ensemble[kept, row], one_pass[kept, row]
            found.append((pearson(a, b), spearman(a, b)))
    if not found:
        return math.nan, math.nan, 0
    pearsons, spearmans = zip(*found, strict=True)
    return sum(pearsons) / len(found), sum(spearmans) / len(found), len(found)
