"""What the fits and queries of a marginalization model return."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from inference.fit import FitResult
from inference.results.brief import brief
from inference.results.export import to_arviz

if TYPE_CHECKING:
    from ppl_models.marginalization_model.queries import Queries

__all__ = ["AutoregressiveLogProb", "ConsistencyReport", "Evaluation", "MarginalEstimate", "MarginalizationResult"]


@brief
class AutoregressiveLogProb(NamedTuple):
    """log p of the observed part by the chain rule, along several random orders.

    Attributes:
        mean: over the orders ``(B,)``.
        ensemble: log of the mean probability over the orders ``(B,)``: of complete rows a normalised density, and at
            least the mean.
        spread: standard deviation over the orders ``(B,)``; 0 of consistent conditionals.
    """

    mean: Tensor
    ensemble: Tensor
    spread: Tensor


@brief
class MarginalEstimate(NamedTuple):
    """A one-pass log-marginal with its error bar.

    Attributes:
        value: ``(B,)``.
        error: standard error against the chain rule ``(B,)``: root of the estimated squared gap.
        refined: which rows were computed by the slower route because their error was too large.
    """

    value: Tensor
    error: Tensor
    refined: Tensor


@brief
class ConsistencyReport(NamedTuple):
    """How far f is from consistent at the user's own queries.

    Attributes:
        sum_rule: ``log sum_k exp f(x_S, x_j = k) - f(x_S)`` for each missing j ``(B, D)``; NaN where observed.
        gap: chain rule less one pass, estimated from the residuals of random steps of random orders ``(B,)``.
        gap_error: standard error of ``gap`` ``(B,)``.
    """

    sum_rule: Tensor
    gap: Tensor
    gap_error: Tensor

    def summary(self) -> str:
        """One line."""
        found = self.sum_rule[~self.sum_rule.isnan()]
        text = "no variable is missing"
        if len(found):
            text = f"sum rule: root mean square {found.square().mean().sqrt():.3g}, largest {found.abs().max():.3g}"
        return f"{text}; chain rule less one pass: {self.gap.mean():+.3g} nats on average"


@brief
class Evaluation(NamedTuple):
    """One-pass log-marginals against the chain rule.

    ``ensemble`` and ``one_order`` are normalised densities of complete rows.  So is ``one_pass`` where ``normalised``
    says so: the likelihood of a law of its own, close to that of the conditionals.  Elsewhere a one-pass value of
    complete rows is **no log-likelihood**, as nothing makes ``exp f`` sum to one: report it only beside the others.

    Attributes:
        num_rows, orders: what was evaluated.
        one_order: mean log-probability along one random order, nats a row.
        ensemble: mean over rows of the log of the mean over ``orders`` orders.
        one_pass: mean one-pass value.
        bias: ``one_pass - ensemble``.
        mae: mean absolute difference of a row.
        pearson, spearman: correlation of one pass and ensemble over rows; NaN if one of them is constant.
        sum_rule: root mean square of the sum rule's violation with one variable of each row hidden.
        normalised: whether the one-pass law of each subset sums to one by structure.
    """

    num_rows: int
    orders: int
    one_order: float
    ensemble: float
    one_pass: float
    bias: float
    mae: float
    pearson: float
    spearman: float
    sum_rule: float
    normalised: bool = False

    def summary(self) -> str:
        """One line, with what the one pass may be taken for."""
        law = "normalised" if self.normalised else "not normalised, so not a likelihood"
        return (
            f"{self.num_rows} rows: log p {self.ensemble:.4g} by {self.orders} orders, {self.one_order:.4g} by one; "
            f"one pass {self.one_pass:.4g} (bias {self.bias:+.3g}, mean absolute difference {self.mae:.3g}, Pearson "
            f"{self.pearson:.3f}; {law}), sum rule off by {self.sum_rule:.2g}"
        )


@brief
@dataclass(frozen=True, eq=False)
class MarginalizationResult:
    """What ``fit`` and ``fit_energy`` return.

    Attributes:
        model: the model itself, which a later fit changes.
        conditionals: history of the stage that taught the conditionals; of joint and energy training, of both networks.
        marginals: history of the stage that taught the marginals; None where there was one stage.
        check: one pass against the chain rule, on validation rows (training rows without them; draws, of an energy).
        restarts: chains that disagreed and were drawn anew (energy training).
        refit: history of the conditionals' fit to their own draws, if there was one.
        context: contexts of the rows that were held out, or else of all, ``(N, C)`` in the user's units; None of a
            model without.
        order: of drawing, of an autoregressive baseline; None of a model with marginals.
    """

    model: "Queries"
    conditionals: FitResult
    marginals: FitResult | None
    check: Evaluation | None
    restarts: int = 0
    refit: FitResult | None = None
    context: Tensor | None = None
    order: Tensor | None = None

    @property
    def _stages(self) -> dict[str, FitResult]:
        found = {"conditionals": self.conditionals, "refit": self.refit, "marginals": self.marginals}
        return {name: stage for name, stage in found.items() if stage is not None}

    @property
    def losses(self) -> Tensor:
        """Training losses of all updates, in order."""
        return torch.cat([stage.losses for stage in self._stages.values()])

    @property
    def seconds(self) -> float:
        """Wall time of the updates."""
        return sum(stage.seconds for stage in self._stages.values())

    def summary(self) -> str:
        """How it went, and how far one pass may be trusted."""
        lines = [f"{name}: {stage.summary()}" for name, stage in self._stages.items()]
        return "\n".join([*lines, *([] if self.check is None else [self.check.summary()])])

    def to_arviz(self, num_samples: int = 1000, seed: int = 0) -> Any:
        """ArviZ object: draws of the model with their one-pass log-probability, and the history of the losses.

        A model with contexts draws under ``context``, in turn.  The log-probability of an autoregressive baseline is
        its chain rule.

        Args:
            num_samples: draws.
            seed: of the draws.
        """
        given = None if self.context is None else self.context[torch.arange(num_samples) % len(self.context)]
        draws = self.model.sample(num_samples, self.order, given, seed)
        check = {} if self.check is None else {k: +v for k, v in self.check._asdict().items() if not math.isnan(v)}
        if self.order is None:
            log_p = self.model.log_prob(draws, given)
        else:
            log_p = self.model.distribution(order=self.order).log_prob(draws).detach()
        known, dims = {"loss": self.losses}, {"x": ["variable"], "loss": ["update"]}
        if given is not None:
            known["context"], dims["context"] = given, ["row", "feature"]
        return to_arviz(
            posterior={"x": draws.unsqueeze(0)},
            sample_stats={"lp": log_p.unsqueeze(0)},
            constant_data=known,
            dims=dims,
            attrs={"seconds": self.seconds, **check},
        )
