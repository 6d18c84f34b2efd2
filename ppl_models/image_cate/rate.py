"""Rank-weighted average treatment effects: does a ranking of units tell who gains (Yadlowsky et al., 2021)?

With doubly robust scores sorted by a priority, largest first, the targeting operator characteristic at share ``j / n``
is the mean of the top ``j`` less the mean of all.  AUTOC is its average over ``j``, QINI its average weighted by
``j / n``.  Units of equal priority share their mean score, so the order of rows never matters.

Yadlowsky, Fleming, Shah, Brunskill, Wager: Evaluating Treatment Prioritization Rules via Rank-Weighted Average
Treatment Effects, arXiv 2111.07966.  The standard error is their half-sampling bootstrap.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from inference.results.brief import brief
from inference.runtime.generators import generator
from ppl_models.base import check_count
from ppl_models.image_cate.checks import as_vector, as_weights, group_sums, index_groups

__all__ = ["Rate", "permutation_test", "ranks_in_folds", "rate"]

Kind = Literal["autoc", "qini"]
_CELLS = 1 << 22  # draws times units held at once


@brief
@dataclass(frozen=True)
class Rate:
    """A rank-weighted average treatment effect.

    Attributes:
        estimate: AUTOC or QINI, in units of the outcome.
        standard_error: standard deviation of the estimate over half-samples of groups.
        toc: the curve ``TOC(j / n)`` for ``j = 1 .. n``, float64 ``(N,)``; the last is 0.
        uplift: gain over treating nobody, per unit of the population, of treating the first ``j``: share treated times
            their mean effect, ``(N,)``; the last is the average effect.
        kind: ``"autoc"`` or ``"qini"``.
        grid: shares at which the curve has a standard error, ``(10,)``: 0.1, 0.2, ... 1.
        grid_toc: the curve there.
        grid_standard_error: its standard error there.
        num_groups: number of groups that were drawn from: those with weight.
    """

    estimate: float
    standard_error: float
    toc: Tensor
    uplift: Tensor
    kind: Kind
    grid: Tensor
    grid_toc: Tensor
    grid_standard_error: Tensor
    num_groups: int

    @property
    def ratio(self) -> float:
        """Estimate over standard error; NaN where the priority is constant, which ranks nobody."""
        return self.estimate / self.standard_error if self.standard_error > 0 else math.nan

    @property
    def p_value(self) -> float:
        """Two-sided, from the normal law."""
        return math.erfc(abs(self.ratio) / math.sqrt(2))


def rate(
    scores: Any,
    priority: Any,
    kind: Kind = "autoc",
    groups: Any = None,
    num_bootstrap: int = 200,
    seed: int = 0,
    weights: Any = None,
) -> Rate:
    """AUTOC or QINI of a ranking, with its curve and a standard error by site.

    The priority must come from data that the scores were not made of (cross-fitting, or a split by site); otherwise the
    estimate is optimistic.  Predictions that were cross-fitted are ranked by ``ranks_in_folds``.  A constant priority
    ranks nobody: the estimate and its error are 0.

    Args:
        scores: doubly robust scores of the units' effects ``(N,)``, such as ``aipw_scores`` makes.
        priority: who is to be treated first ``(N,)``, larger first.
        kind: ``"autoc"`` or ``"qini"``.
        groups: site of each unit ``(N,)``; half of the sites are drawn together.  None: units are independent.
        num_bootstrap: number of half-samples.
        seed: of the half-samples.
        weights: sample weights ``(N,)``, not negative.  None: equal.

    Raises:
        ValueError: NaN, shapes that differ, fewer than two groups with weight, an unknown kind, a negative weight.
    """
    scores = as_vector("scores", scores)
    n, device = len(scores), scores.device
    priority = as_vector("priority", priority, n, device)
    check_kind(kind)
    num_bootstrap = check_count("num_bootstrap", num_bootstrap, 2)
    sites = index_groups(groups, n, device, least=2)
    weight = as_weights(weights, scores)
    present = group_sums(weight, sites) > 0
    num_groups = int(present.sum())
    if num_groups < 2:
        raise ValueError(f"weights must be positive in at least 2 groups, they are in {num_groups}")

    order = torch.argsort(priority, descending=True, stable=True)
    starts, ends = _tie_bounds(priority[order])
    centred = (scores - scores.mean())[order]
    weight, site = weight[order], sites.index[order]
    grid = torch.linspace(0.1, 1.0, 10, dtype=torch.float64, device=device)
    value, toc, at_grid = _curve(centred, weight.unsqueeze(0), starts, ends, kind, grid)

    values, curves = [], []
    stream = generator(seed, "rate", device=device)
    chunk = max(1, _CELLS // n)
    for first in range(0, num_bootstrap, chunk):
        keys = torch.rand(min(chunk, num_bootstrap - first), sites.count, generator=stream, device=device)
        keys[:, ~present] = -1.0  # a group without weight is not in the sample, nor in half of it
        half = torch.zeros_like(keys, dtype=torch.float64)
        half.scatter_(1, keys.topk(num_groups // 2, dim=1, sorted=False).indices, 1.0)
        drawn, _, curve = _curve(centred, half[:, site] * weight, starts, ends, kind, grid)
        values.append(drawn)
        curves.append(curve)
    return Rate(
        estimate=float(value),
        standard_error=float(torch.cat(values).std()),
        toc=toc[0],
        uplift=weight.cumsum(0) / weight.sum() * (toc[0] + weight @ scores[order] / weight.sum()),
        kind=kind,
        grid=grid,
        grid_toc=at_grid[0],
        grid_standard_error=torch.cat(curves).std(0),
        num_groups=num_groups,
    )


def ranks_in_folds(priority: Any, folds: Any) -> Tensor:
    """Share of a unit's own fold that has a lower priority, and half the share of an equal one, ``(N,)``.

    Each fold is ranked by a model of its own, which was fitted to the others.  A fold with small effects leaves large
    ones to its model, so that levels and spreads of predictions oppose those of effects from fold to fold; ranked in
    one list, even right models then seem to err.  Within a fold one model speaks.

    What ranks do not mend: errors of ``rate`` take the priorities for given, but each pair of sites of different folds
    counts twice, each one's scores having made the other's priority.  Where there is no heterogeneity at all, ratios of
    a learner that is linear in the outcome spread by up to the square root of 2.  A learner may leave a fold in
    ties where the others tell no difference (``ImageCATE.cross_fitted``); a test that holds refits, as with images
    exchanged between sites (``refute``).

    Args:
        priority: cross-fitted, ``(N,)``.
        folds: fold of each unit ``(N,)``.

    Raises:
        ValueError: NaN, or shapes that differ.
    """
    priority = as_vector("priority", priority)
    fold = index_groups(folds, len(priority), priority.device)
    ranks = torch.empty_like(priority)
    for k in range(fold.count):
        own = fold.index == k
        place, count = torch.unique(priority[own], return_inverse=True, return_counts=True)[1:]
        ranks[own] = ((count.cumsum(0) - 0.5 * count) / count.sum())[place].to(ranks)
    return ranks


def permutation_test(
    scores: Any,
    priority: Any,
    kind: Kind = "autoc",
    groups: Any = None,
    num_permutations: int = 999,
    seed: int = 0,
    weights: Any = None,
) -> float:
    """One-sided p-value of "the ranking of sites says nothing about the effect", by permuting priorities over sites.

    A site enters whole, with its summed score, its size and its mean priority; exact, whatever the law of the scores,
    where sites are exchangeable and the priority came from other data.  A cross-fitted one did not quite: each site's
    scores had a part in the priorities of the other folds (``ranks_in_folds``), and small p-values are too frequent.  A
    test that refits is ``refute``'s, of permuted images.  With ``groups=None`` units are permuted.

    Args:
        scores: doubly robust scores ``(N,)``.
        priority: ``(N,)``, larger first.
        kind: the statistic.
        groups: site of each unit ``(N,)``.
        num_permutations: the p-value is at least ``1 / (num_permutations + 1)``.
        seed: of the permutations.
        weights: sample weights ``(N,)``, not negative; a site's size is their sum.  None: equal.

    Raises:
        ValueError: as ``rate``.
    """
    scores = as_vector("scores", scores)
    n, device = len(scores), scores.device
    priority = as_vector("priority", priority, n, device)
    check_kind(kind)
    num_permutations = check_count("num_permutations", num_permutations)
    sites = index_groups(groups, n, device, least=2)
    weight = as_weights(weights, scores)
    size = group_sums(weight, sites)
    some = size > 0
    share = weight / size[sites.index].clamp_min(1e-300)
    mean_score = group_sums(share * (scores - weight @ scores / weight.sum()), sites)[some]
    mean_priority, size = group_sums(share * priority, sites)[some], size[some]
    order = torch.argsort(mean_priority, descending=True, stable=True)
    starts, ends = _tie_bounds(mean_priority[order])
    observed, _, _ = _curve(mean_score[order], size[order].unsqueeze(0), starts, ends, kind)

    stream = generator(seed, "permutation_test", device=device)
    at_least = 0
    chunk = max(1, _CELLS // len(size))
    tolerance = 1e-12 * float(mean_score.abs().max())  # the same ranking, summed in another order, counts as equal
    for first in range(0, num_permutations, chunk):
        keys = torch.rand(min(chunk, num_permutations - first), len(size), generator=stream, device=device)
        permuted = keys.argsort(dim=1)
        value, _, _ = _curve(mean_score[permuted], size[permuted], starts, ends, kind)
        at_least += int((value >= observed - tolerance).sum())
    return (1 + at_least) / (1 + num_permutations)


def check_kind(kind: str) -> None:
    """Raises unless ``kind`` is one that there is."""
    if kind not in ("autoc", "qini"):
        raise ValueError(f'kind must be "autoc" or "qini", got {kind!r}')


def _tie_bounds(sorted_priority: Tensor) -> tuple[Tensor, Tensor]:
    """For each place, how many places stand before its run of equal priorities, and how many up to that run's end."""
    _, run, counts = torch.unique_consecutive(sorted_priority, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0)
    return (ends - counts)[run], ends[run]


def _curve(
    scores: Tensor, weights: Tensor, starts: Tensor, ends: Tensor, kind: Kind, grid: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The statistic ``(B,)``, the curve ``(B, N)`` and the curve at shares ``grid`` for B weightings of sorted units.

    Args:
        scores: sorted by priority, ``(N,)`` or ``(B, N)``.
        weights: ``(B, N)``; a unit of weight 0 is not in the sample.
        starts, ends: of ``_tie_bounds``.
        kind: the statistic.
        grid: shares; None leaves the third result empty.
    """
    zero = weights.new_zeros(weights.shape[0], 1)
    mass = torch.cat([zero, weights.cumsum(1)], 1)
    total = torch.cat([zero, (weights * scores).cumsum(1)], 1)
    up_to = mass[:, 1:]
    # Within a run of ties the summed score grows in proportion to the mass: each unit carries the run's mean.
    mass_before, total_before = mass[:, starts], total[:, starts]
    run_mass = mass[:, ends] - mass_before
    run_mean = (total[:, ends] - total_before) / torch.where(run_mass > 0, run_mass, 1.0)
    top = total_before + (up_to - mass_before) * run_mean
    whole = mass[:, -1:]
    toc = torch.where(up_to > 0, top / torch.where(up_to > 0, up_to, 1.0) - total[:, -1:] / whole, 0.0)
    toc = torch.where(ends - starts < weights.shape[1], toc, 0.0)  # all tied: exactly 0, without a residue of rounding
    share = up_to / whole
    statistic = (weights * toc * (share if kind == "qini" else 1.0)).sum(1) / whole[:, 0]
    if grid is None:
        return statistic, toc, toc.new_empty(0)
    place = torch.searchsorted(share.contiguous(), (grid - 1e-12).expand(len(share), -1).contiguous())
    return statistic, toc, toc.gather(1, place.clamp_max(toc.shape[1] - 1))
