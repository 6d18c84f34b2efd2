"""How many types: held-out fit by folds of groups, one type included."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inference.results.brief import brief
from ppl_models.image_cate.estimation import cross_fit_effects, with_settings
from ppl_models.image_cate.fitted import Fitted
from ppl_models.image_cate.model import ImageCATE
from ppl_models.image_cate.propensity import clustered_mean

__all__ = ["ClusterChoice", "choose_num_clusters"]


@brief
class ClusterChoice(NamedTuple):
    """How many types the data carry.

    Attributes:
        num_clusters: the choice: of the candidates, the fewest whose loss is within one standard error of the lowest.
        candidates: in ascending order.
        losses: cross-fitted R-loss ``mean (Y - m - (T - e) tau)^2`` of each, in units of the outcome squared.
        excess_errors: cluster-robust standard error of its difference from the lowest.
    """

    num_clusters: int
    candidates: tuple[int, ...]
    losses: Tensor
    excess_errors: Tensor


def choose_num_clusters(
    model: ImageCATE,
    outcome: Any,
    treatment: Any,
    images: Any,
    *args: Any,
    candidates: Sequence[int] = (1, 2, 3),
    seed: int = 0,
    **kwargs: Any,
) -> ClusterChoice:
    """Compare numbers of types by the R-loss (Nie and Wager, arXiv:1712.04912) of cross-fitted effects.

    Args:
        model: settings of the fits; its number of types is not used, and it is left unfitted.
        outcome, treatment, images, args, kwargs: as in ``ImageCATE.fit``.
        candidates: numbers to compare; 1 is always among them.
        seed: of all fits.

    Raises:
        TypeError, ValueError: bad data or candidates.
    """
    counts = tuple(sorted({1, *candidates}))
    rows: list[Tensor] = []
    state: Fitted | None = None
    for count in counts:
        one = ImageCATE(**{**model.get_params(), "num_clusters": count, "num_samples": 50})
        if state is None:  # baseline, propensity and folds are the same for all
            one.fit(outcome, treatment, images, *args, **{**kwargs, "seed": seed, "progress": False})
            state = one._fitted("choose_num_clusters")
        else:
            state = with_settings(state, one.settings())
        rows.append(_r_loss(state, cross_fit_effects(state)[0]))
    assert state is not None
    weight, groups = state.trial.sample_weight, state.trial.groups
    losses = torch.stack([(weight * row).sum() / weight.sum() for row in rows])
    best = int(losses.argmin())
    errors = [float(clustered_mean(row - rows[best], groups, weight).standard_error) if i != best else 0.0
              for i, row in enumerate(rows)]  # fmt: skip
    chosen = next(i for i in range(len(counts)) if float(losses[i] - losses[best]) <= errors[i])
    return ClusterChoice(counts[chosen], counts, losses, losses.new_tensor(errors))


def _r_loss(state: Fitted, tau: Tensor) -> Tensor:
    """Squared residual of each unit, ``(N,)``, about the cross-fitted mean outcome at average treatment."""
    trial = state.trial
    return (trial.outcome - state.mean_outcome - (trial.treatment - state.propensity) * tau).square()
