"""The experiments that go with a posterior: cold-posterior search, active learning, out-of-distribution scores,
calibration.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inference.results.brief import brief
from inference.runtime.generators import derive_seed, generator
from ppl_models.base import check_count, to_tensor
from ppl_models.functional_prior_bnn.predictions import Prediction

if TYPE_CHECKING:
    from ppl_models.functional_prior_bnn.model import FunctionalPriorBNN
    from ppl_models.functional_prior_bnn.posterior import Posterior

__all__ = ["ActiveLearning", "TemperatureSearch", "active_learning", "auroc", "calibration_error", "search_temperature"]


@brief
@dataclass(frozen=True)
class TemperatureSearch:
    """Result of ``search_temperature``.

    Attributes:
        temperatures: T tried, ``(T,)``.
        validation_nll: mean negative log predictive density on the validation data, ``(T,)``.
        best: the temperature with the lowest.
        posterior: the posterior at that temperature.
    """

    temperatures: Tensor
    validation_nll: Tensor
    best: float
    posterior: "Posterior"


def search_temperature(
    bnn: "FunctionalPriorBNN",
    x_train: Any,
    y_train: Any,
    x_validation: Any,
    y_validation: Any,
    temperatures: Sequence[float] = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001),
    **options: Any,
) -> TemperatureSearch:
    """Choose the temperature of a tempered ("cold") posterior by validation NLL (Wenzel et al., How good is the Bayes
    posterior in deep neural networks really?, 2020).

    Args:
        bnn: the model; it is left fitted at the best temperature.
        x_train, y_train: training data.
        x_validation, y_validation: data held out of them; test data would bias the comparison.
        temperatures: T to try.
        **options: of ``fit``.

    Raises:
        TypeError, ValueError: no temperature, one that is not positive, or bad data.
    """
    if len(temperatures) == 0:
        raise ValueError("temperatures must hold at least one value")
    scores: list[Tensor] = []
    best: Posterior | None = None
    for temperature in temperatures:
        posterior = bnn.fit(x_train, y_train, temperature=temperature, **options)
        scores.append(posterior.predict(x_validation).nll(y_validation))
        if best is None or scores[-1] <= min(scores):
            best = posterior
    assert best is not None
    bnn.result = best
    nll = torch.stack(scores)
    return TemperatureSearch(torch.tensor(list(temperatures)), nll, float(temperatures[int(nll.argmin())]), best)


@brief
@dataclass(frozen=True)
class ActiveLearning:
    """Result of ``active_learning``.

    Attributes:
        chosen: rows in the order in which they were labelled, the initial ones first, ``(num_initial + num_queries,)``.
        num_labels: labels at each evaluation, ``(num_queries + 1,)``.
        scores: test score at each: RMSE in regression, accuracy in classification.
        posterior: the last posterior.
    """

    chosen: Tensor
    num_labels: Tensor
    scores: Tensor
    posterior: "Posterior"


def active_learning(
    bnn: "FunctionalPriorBNN",
    x: Any,
    y: Any,
    x_test: Any,
    y_test: Any,
    *,
    num_initial: int = 20,
    num_queries: int = 20,
    acquisition: str = "posterior",
    warmup_again: int = 500,
    seed: int = 0,
    **options: Any,
) -> ActiveLearning:
    """Label one row at a time where the posterior is least sure, and sample again from where the chains stand.

    Args:
        bnn: the model; match its prior beforehand, which needs no labels.
        x, y: the pool; only labels of chosen rows are used.
        x_test, y_test: for the scores.
        num_initial: rows labelled at random to begin with; the same for every ``acquisition`` at one seed.
        num_queries: rows labelled after them.
        acquisition: ``"posterior"`` takes the row with the largest variance of the function (regression) or mutual
            information of label and weights (classification), ``"random"`` any.
        warmup_again: warm-up steps of each later run, which starts at the last draws of the one before.
        seed: of rows and chains.
        **options: of ``fit``.

    Raises:
        TypeError, ValueError: bad counts, an unknown acquisition, or bad data.
    """
    if acquisition not in ("posterior", "random"):
        raise ValueError(f"acquisition must be 'posterior' or 'random', got {acquisition!r}")
    check_count("num_initial", num_initial, 2)
    check_count("num_queries", num_queries)
    bnn._follow(x, "x")
    x = bnn._check_x("x", x)
    y = bnn.likelihood.check(y, len(x), bnn.network.out_features, x)
    if num_initial + num_queries > len(x):
        raise ValueError(
            f"num_initial + num_queries = {num_initial + num_queries} labels were asked of a pool of {len(x)} rows"
        )
    order = torch.randperm(len(x), generator=generator(seed, "active learning")).to(x.device)
    chosen, pool = order[:num_initial], order[num_initial:]
    labels, scores = [], []
    posterior: Posterior | None = None
    for step in range(num_queries + 1):
        run = dict(options) if posterior is None else {**options, "warmup_steps": warmup_again, "start_from": posterior}
        posterior = bnn.fit(x[chosen], y[chosen], seed=derive_seed(seed, "run", step), **run)
        test = posterior.predict(x_test)
        labels.append(len(chosen))
        scores.append(test.rmse(y_test) if bnn.likelihood.has_noise else test.accuracy(y_test))
        if step == num_queries:
            break
        pick = 0 if acquisition == "random" else int(_doubt(posterior.predict(x[pool])).argmax())
        chosen = torch.cat([chosen, pool[pick : pick + 1]])
        pool = torch.cat([pool[:pick], pool[pick + 1 :]])
    assert posterior is not None
    return ActiveLearning(chosen, torch.tensor(labels), torch.stack(scores), posterior)


def _doubt(prediction: Prediction) -> Tensor:
    """What the posterior does not know, ``(N,)``; noise, which no label would remove, is left out."""
    return prediction.mutual_information if prediction.noise_variance is None else prediction.function_variance.sum(-1)


def auroc(inside: Any, outside: Any) -> Tensor:
    """Area under the ROC curve of a score that should be larger out of distribution: ``P(outside > inside) + P(equal)
    / 2``.

    Args:
        inside: scores of in-distribution points, ``(N,)``, such as ``Prediction.entropy``.
        outside: scores of out-of-distribution points, ``(M,)``.

    Raises:
        TypeError, ValueError: not numeric, empty or not finite.
    """
    inside, outside = to_tensor("inside", inside), to_tensor("outside", outside)
    dtype = torch.promote_types(inside.dtype, outside.dtype)
    inside, outside = inside.to(dtype), outside.to(inside.device, dtype)
    for name, value in (("inside", inside), ("outside", outside)):
        if value.ndim != 1:
            raise ValueError(f"{name} must be a vector of scores, got shape {tuple(value.shape)}")
    ordered = inside.sort().values
    below = torch.searchsorted(ordered, outside, right=False)
    not_above = torch.searchsorted(ordered, outside, right=True)
    return (below + not_above).double().mean() / (2 * len(inside))


def calibration_error(probabilities: Any, labels: Any, num_bins: int = 10) -> Tensor:
    """Expected calibration error: the mean over points of |accuracy - confidence| of their bin of confidence (Guo et
    al., ICML 2017).

    Args:
        probabilities: ``(N, classes)``, or ``(N, 1)`` of the label 1.
        labels: ``(N,)``.
        num_bins: equal bins of [0, 1].

    Raises:
        TypeError, ValueError: not numeric, or other shapes.
    """
    check_count("num_bins", num_bins)
    probabilities = to_tensor("probabilities", probabilities)
    labels = to_tensor("labels", labels).to(probabilities.device)
    if probabilities.ndim != 2 or labels.numel() != len(probabilities):
        raise ValueError(
            f"probabilities must be (N, classes) and labels (N,), got {tuple(probabilities.shape)} and "
            f"{tuple(labels.shape)}"
        )
    p = torch.cat([1 - probabilities, probabilities], 1) if probabilities.shape[1] == 1 else probabilities
    confidence, predicted = p.max(1)
    right = (predicted == labels.reshape(-1)).to(p.dtype)
    bins = (confidence * num_bins).ceil().long().clamp(1, num_bins) - 1
    gap = torch.zeros(num_bins, dtype=p.dtype, device=p.device).index_add(0, bins, right - confidence)
    return gap.abs().sum() / len(p)
