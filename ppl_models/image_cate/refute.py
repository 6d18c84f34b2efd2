"""Attempts to refute a finding: what should vanish must vanish, what should stay must stay.

Each takes a study, breaks one thing in it, and fits again by a function of the user's.  With a placebo treatment or
with images shuffled over sites nothing should be found; a random covariate or the loss of some sites should change
little.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inference.results.brief import brief
from inference.runtime.generators import derive_seed, generator
from ppl_models.base import check_count
from ppl_models.image_cate.checks import as_treatment, as_vector, group_sums, index_groups
from ppl_models.image_cate.least_squares import Estimate, clustered_mean
from ppl_models.image_cate.rate import Rate, rate

__all__ = ["METHODS", "FitPredict", "Fitted", "Refutation", "Study", "refute", "regions_of"]

METHODS = ("placebo_treatment", "permuted_images", "random_common_cause", "subset")
_BY_REGION = "leave_one_region_out"
_TWO_SIDED = 1.96
_ONE_SIDED = 1.645 * math.sqrt(2)  # of a cross-fitted ranking, in which each pair of sites counts twice


@dataclass(frozen=True)
class Study:
    """The data of a study of N units with M images.

    Attributes:
        outcome: ``(N,)``.
        treatment: zeros and ones ``(N,)``.
        images: anything that ``fit_predict`` takes, M rows; passed through untouched.
        image_index: row of ``images`` of each unit ``(N,)``.
        covariates: ``(N, P)`` or None.
        groups: group of each unit ``(N,)``; None: units of an image are a group.
        propensity: ``(N,)``, or None for a constant one.
        controls: columns that outcomes alone depend on ``(N, Q)``, or None; passed through as the covariates are.
        sample_weight: ``(N,)`` or None; passed through.
        regions: region of each unit ``(N,)``, for ``"leave_one_region_out"``.
    """

    outcome: Tensor
    treatment: Tensor
    images: Any
    image_index: Tensor
    covariates: Tensor | None = None
    groups: Any = None
    propensity: Tensor | None = None
    controls: Tensor | None = None
    sample_weight: Tensor | None = None
    regions: Tensor | None = None


class Fitted(NamedTuple):
    """What a fit gives for each unit, from a model that did not see the unit's group.

    Attributes:
        scores: doubly robust scores ``(N,)``.
        effect: predicted effect ``(N,)``, or its ``ranks_in_folds``.
    """

    scores: Tensor
    effect: Tensor


FitPredict = Callable[[Study, int], Fitted]


@brief
@dataclass(frozen=True)
class Refutation:
    """One attempt, repeated R times.

    Attributes:
        method: which.
        passed: whether the finding stands.
        criterion: what had to hold.
        reference_ate: of the study as it is.
        reference_rate: QINI of the study as it is.
        ates: R average effects.
        rates: R QINIs.
        correlations: of each repeat's predicted effects with those of the study as it is, over the units of both; NaN
            where one is constant.
    """

    method: str
    passed: bool
    criterion: str
    reference_ate: Estimate
    reference_rate: Rate
    ates: tuple[Estimate, ...]
    rates: tuple[Rate, ...]
    correlations: tuple[float, ...]


def refute(
    study: Study,
    fit_predict: FitPredict,
    methods: Sequence[str] = METHODS,
    num_repeats: int = 1,
    subset_share: float = 0.8,
    reference: Fitted | None = None,
    seed: int = 0,
) -> tuple[Refutation, ...]:
    """Refit the study under each of ``methods``.

    - ``"placebo_treatment"``: treatments are shuffled over units, or over groups where a group has one treatment,
      and the propensity is constant.  Neither an average effect nor a ranking may be found.
    - ``"permuted_images"``: images are shuffled over sites.  No ranking may be found.
    - ``"random_common_cause"``: a column of standard normals joins the covariates.  The average effect may move by
      half of its standard error.
    - ``"subset"``: a share of the groups, at random.  The average effect may move by what the smaller sample explains.
    - ``"leave_one_region_out"``, where asked for: each region of ``study.regions`` in turn is left out, once whatever
      ``num_repeats`` is.  The same of the average effect, which one region may not make.

    "May not be found": of R repeats, no more have an absolute ratio of the average effect above 1.96, or of QINI above
    2.33, than chance allows with probability 0.95 (0 of 1, 3 of 20).

    Args:
        study: the data.
        fit_predict: fits a study with a seed and returns cross-fitted scores and effects of its units.
        methods: names from ``METHODS``, or ``"leave_one_region_out"``.
        num_repeats: R, refits a method.
        subset_share: share of groups that ``"subset"`` keeps.
        reference: what ``fit_predict(study, seed)`` gave, if it has been run.
        seed: of the shuffles and the refits.

    Raises:
        ValueError: an unknown method, a share outside (0, 1), data that do not fit together.
    """
    known = (*METHODS, _BY_REGION)
    if not methods or any(name not in known for name in methods):
        raise ValueError(f"methods must be some of {', '.join(known)}; got {', '.join(map(repr, methods)) or 'none'}")
    num_repeats = check_count("num_repeats", num_repeats)
    if not 0 < subset_share < 1:
        raise ValueError(f"subset_share must lie strictly between 0 and 1, got {subset_share}")
    outcome = as_vector("outcome", study.outcome)
    n = len(outcome)
    as_treatment(study.treatment, n)
    index = as_vector("image_index", study.image_index, n).long()
    groups = index if study.groups is None else study.groups
    sites = index_groups(groups, n, least=2)
    study = replace(study, groups=sites.index, image_index=index)
    regions = _regions(study.regions, n) if _BY_REGION in methods else sites.index
    reference = _checked(fit_predict(study, seed) if reference is None else reference, n)
    found = _measured(reference, study)

    results = []
    for method in methods:
        ates, rates, correlations = [], [], []
        repeats = int(regions.max()) + 1 if method == _BY_REGION else num_repeats
        for repeat in range(repeats):
            own = derive_seed(seed, "refute", method, repeat)
            broken, rows = _break(study, method, subset_share, own, regions != repeat)
            fitted = _checked(fit_predict(broken, own % (1 << 31)), len(rows))
            ate, qini = _measured(fitted, broken)
            ates.append(ate)
            rates.append(qini)
            correlations.append(_correlation(fitted.effect, reference.effect[rows]))
        passed, criterion = _judge(method, found[0], ates, rates)
        results.append(Refutation(method, passed, criterion, *found, tuple(ates), tuple(rates), tuple(correlations)))
    return tuple(results)


def _measured(fitted: Fitted, study: Study) -> tuple[Estimate, Rate]:
    weights = study.sample_weight
    ate = clustered_mean(fitted.scores, study.groups, weights)
    return ate, rate(fitted.scores, fitted.effect, "qini", study.groups, weights=weights)


def _break(study: Study, method: str, subset_share: float, seed: int, elsewhere: Tensor) -> tuple[Study, Tensor]:
    """The study with one thing broken, and which of its rows are left; ``elsewhere``: outside of a region."""
    n, g = len(study.outcome), generator(seed, "break")
    everyone = torch.arange(n)
    sites = index_groups(study.groups, n)
    if method == "placebo_treatment":
        treatment = as_treatment(study.treatment, n)
        share = group_sums(treatment, sites) / group_sums(torch.ones_like(treatment), sites)
        if bool(((share == 0) | (share == 1)).all()):
            shuffled = share[torch.randperm(sites.count, generator=g)][sites.index]
        else:
            shuffled = treatment[torch.randperm(n, generator=g)]
        return replace(study, treatment=shuffled.to(torch.as_tensor(study.treatment).dtype), propensity=None), everyone
    if method == "permuted_images":
        used, place = torch.unique(study.image_index, return_inverse=True)
        return replace(study, image_index=used[torch.randperm(len(used), generator=g)][place]), everyone
    if method == "random_common_cause":
        column = torch.randn(n, 1, generator=g)
        if study.covariates is not None:
            given = torch.as_tensor(study.covariates)
            column = torch.cat([given.reshape(n, -1), column.to(given)], 1)
        return replace(study, covariates=column), everyone
    if method == _BY_REGION:
        rows = elsewhere.nonzero()[:, 0]
    else:
        kept = torch.zeros(sites.count, dtype=torch.bool)
        kept[torch.randperm(sites.count, generator=g)[: max(2, round(subset_share * sites.count))]] = True
        rows = kept[sites.index].nonzero()[:, 0]
    per_unit = ("outcome", "treatment", "image_index", "covariates", "propensity", "controls", "sample_weight")
    values = {name: getattr(study, name) for name in per_unit}
    some: dict[str, Any] = {name: None if value is None else value[rows] for name, value in values.items()}
    return replace(study, groups=sites.index[rows], regions=None, **some), rows


def regions_of(places: Tensor) -> Tensor:
    """Four regions ``(N,)`` of ``places`` ``(N, 2)``: halves by the median of the first coordinate, each halved by the
    median of the second, so that all hold about as many.
    """
    east = places[:, 0] > places[:, 0].median()
    north = torch.zeros_like(east)
    for half in (east, ~east):
        if bool(half.any()):
            north[half] = places[half, 1] > places[half, 1].median()
    return 2 * east.long() + north.long()


def _regions(regions: Any, num_rows: int) -> Tensor:
    if regions is None:
        raise ValueError(f"{_BY_REGION!r} needs the region of each unit: of ImageCATE, fit with lon_lat")
    return index_groups(regions, num_rows, least=2).index


def _judge(method: str, ate: Estimate, ates: Sequence[Estimate], rates: Sequence[Rate]) -> tuple[bool, str]:
    repeats = len(ates)
    if method in ("placebo_treatment", "permuted_images"):
        allowed = _chance_count(repeats)
        criterion = f"ratio of QINI above {_ONE_SIDED:.2f} in at most {allowed} of {repeats}"
        passed = sum(r.ratio > _ONE_SIDED for r in rates) <= allowed
        if method == "placebo_treatment":
            criterion += f", absolute ratio of the average effect above {_TWO_SIDED} too"
            passed = passed and sum(abs(a.ratio) > _TWO_SIDED for a in ates) <= allowed
        return passed, criterion
    if method == "random_common_cause":
        moved = max(abs(a.estimate - ate.estimate) for a in ates)
        return moved <= 0.5 * ate.standard_error, "average effect moves by at most half its standard error"
    # The full sample contains the subset, so the variance of the difference is the difference of the variances.
    z = []
    for a in ates:
        variance = max(a.standard_error**2 - ate.standard_error**2, 1e-3 * a.standard_error**2)
        z.append((a.estimate - ate.estimate) / math.sqrt(variance))
    allowed = _chance_count(repeats)
    return (
        sum(abs(v) > _TWO_SIDED for v in z) <= allowed,
        f"average effect moves by more than {_TWO_SIDED} standard errors of the move in at most {allowed} of {repeats}",
    )


def _chance_count(repeats: int) -> int:
    """The least c with ``P(Binomial(R, 0.05) <= c)`` of at least 0.95."""
    total = 0.0
    for count in range(repeats + 1):
        total += math.comb(repeats, count) * 0.05**count * 0.95 ** (repeats - count)
        if total >= 0.95 - 1e-9:
            break
    return count


def _checked(fitted: Fitted, num_rows: int) -> Fitted:
    return Fitted(
        as_vector("scores of fit_predict", fitted[0], num_rows), as_vector("effect of fit_predict", fitted[1], num_rows)
    )


def _correlation(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale > 1e-12 else math.nan
