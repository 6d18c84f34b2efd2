"""What ``ImageCATE`` returns."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inference import to_arviz
from inference.results.brief import brief
from ppl_models.image_cate.fitted import Fitted

__all__ = ["ClusterEffects", "ImageCATEResult"]


@brief
class ClusterEffects(NamedTuple):
    """Effects by type, ascending; K types.

    The estimand is ``E[Y(1) - Y(0) | Z = k]``, the mean effect in the population of units of type k: of image types
    under the gated objective, of types of units under the marginal one.  Memberships ``z`` come from gates that did not
    see the unit.  Given the images they owe nothing to its outcome, so that where they err what is found for type j is
    ``sum_k P(Z = k | z = j) mu_k``: two types' effects are drawn together by the factor ``1 - P(Z = 2 | z = 1) - P(Z =
    1 | z = 2)``, and intervals, which take a sure gate at its word, do not know of it.  Doubly robust effects are drawn
    together alike.

    Attributes:
        effect: posterior mean, outcome units, ``(K,)``.
        sd: posterior standard deviation of it (not the spread of effects inside the type), ``(K,)``.
        interval: equal-tailed, ``(K, 2)``.
        share: of the units, by mean membership, ``(K,)``.
        gate: effect of the type's members by doubly robust scores, ``(K,)``.
        gate_standard_error: cluster-robust, ``(K,)``.
    """

    effect: Tensor
    sd: Tensor
    interval: Tensor
    share: Tensor
    gate: Tensor
    gate_standard_error: Tensor

    def to_dataframe(self) -> Any:
        """One row a type; needs pandas."""
        import pandas

        columns = {n: getattr(self, n).cpu().numpy() for n in ("effect", "sd", "share", "gate", "gate_standard_error")}
        ends = self.interval.cpu().numpy()
        return pandas.DataFrame({**columns, "lower": ends[:, 0], "upper": ends[:, 1]})


@brief
@dataclass(frozen=True, eq=False)
class ImageCATEResult:
    """What a fit found.

    Attributes:
        samples: posterior draws ``(chain, draw, ...)``, types by effect, ascending: ``mu`` effects on the predictors'
            scale, ``rho`` raw noise, ``gate_weight`` of the gate's rules (on fixed features, the effect's regression
            and the discriminant; the trained network), ``gate_bias`` of the types, centred; see ``EffectMixture``.
        sample_stats: the sampler's, with NUTS and SGHMC.
        losses: negative ELBO a unit at each step, mean over the folds' networks, ``(num_steps,)``; empty where nothing
            was trained.
        seconds: wall time of the networks' training.
        messages: warnings of the data and the fit.
        dropped: rows that were left out.
        type_effects: of the types in outcome units, ``(chain, draw, K)``.
        outcome, treatment: the data, ``(N,)``.
    """

    samples: dict[str, Tensor]
    sample_stats: dict[str, Tensor]
    losses: Tensor
    seconds: float
    messages: tuple[str, ...]
    dropped: tuple[int, ...]
    type_effects: Tensor
    outcome: Tensor
    treatment: Tensor

    def to_arviz(self) -> Any:
        """Draws, with the types' effects in outcome units as ``type_effect``, and the data."""
        return to_arviz(
            {"type_effect": self.type_effects, **self.samples},
            sample_stats=self.sample_stats or None,
            observed_data={"outcome": self.outcome},
            constant_data={"treatment": self.treatment},
        )

    def summary(self) -> str:
        """One line on how it went."""
        effects = ", ".join(f"{v:.4g}" for v in self.type_effects.mean((0, 1)).tolist())
        if not len(self.losses):
            return f"types' effects {effects}; nothing was trained"
        tail = self.losses[-max(1, len(self.losses) // 10) :].double().mean().item()
        return f"types' effects {effects}; {len(self.losses)} steps in {self.seconds:.3g} s, loss a unit {tail:.4g}"


def result_of(fitted: Fitted, type_effects: Tensor) -> ImageCATEResult:
    """The public result, types in order; the gate's weights stay relative to the first type of the fit."""
    samples = dict(fitted.samples)
    samples["mu"] = samples["mu"][..., fitted.order, :]
    if "rho" in samples:
        samples["rho"] = samples["rho"][..., fitted.order]
    if "gate_bias" in samples:
        # Log odds are against the fit's first type; of all K, centred ones name none.
        full = torch.nn.functional.pad(samples["gate_bias"], (1, 0))[..., fitted.order]
        samples["gate_bias"] = full - full.mean(-1, keepdim=True)
    losses = [history.losses for history in fitted.histories]
    return ImageCATEResult(
        samples=samples,
        sample_stats=fitted.sample_stats,
        losses=torch.stack(losses).mean(0) if losses else torch.empty(0),
        seconds=sum(history.seconds for history in fitted.histories),
        messages=fitted.messages,
        dropped=fitted.trial.dropped,
        type_effects=type_effects.unflatten(0, samples["mu"].shape[:2]),
        outcome=fitted.trial.outcome,
        treatment=fitted.trial.treatment,
    )
