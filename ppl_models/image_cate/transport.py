"""Effects at places without a trial, from their images alone: ``tau(m) = sum_k pi_k(m) mu_k``.

All places share each draw of the ``mu_k``, so that the error of an area's mean does not shrink with its size (Jerzak,
Johansson and Daoud, CLeaR 2023, arXiv 2206.06417).

This rests on two assumptions that no image can check: that the effect, given the image, does not depend on whether a
place was in the trial; and that the trial's images cover the new ones.  The second is scored.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inference.results.brief import brief
from ppl_models.image_cate.fitted import Fitted

__all__ = ["Transported", "support_scores", "transport"]

_NEIGHBOURS = 5
_LEAST_SUPPORT = 0.05


@brief
@dataclass(frozen=True, eq=False)
class Transported:
    """Posterior of effects at N places.

    Attributes:
        effect, sd: mean and standard deviation, outcome units, ``(N,)``.
        interval: equal-tailed, ``(N, 2)``.
        cluster: the most probable type, by effect ascending, ``(N,)``.
        cluster_probs: ``(N, K)``.
        support: share of the trial's images that lie as far from those of other sites as this one from the trial's, in
            [0, 1]; near 0 the image is unlike all of the trial.
        inside: ``support`` of at least 0.05, ``(N,)``.
        draws: effects, ``(draw, N)``, the same draw of the types' effects at all places.
        lon_lat: ``(N, 2)`` or None.
        alpha: one minus the intervals' coverage.
    """

    effect: Tensor
    sd: Tensor
    interval: Tensor
    cluster: Tensor
    cluster_probs: Tensor
    support: Tensor
    inside: Tensor
    draws: Tensor
    lon_lat: Tensor | None
    alpha: float

    def area(self, weights: Any = None, inside_only: bool = True, bias: float = 0.0) -> dict[str, float]:
        """Mean effect of the places: ``effect``, ``sd``, ``lower``, ``upper`` and ``share_outside``.

        Args:
            weights: of the places, such as population, ``(N,)``.
            inside_only: leave places without support out.
            bias: largest error that transport may have at a place outside of support; widens the interval by this times
                the share outside.

        Raises:
            ValueError: no place is left, or bad weights.
        """
        w = torch.ones_like(self.effect) if weights is None else torch.as_tensor(weights).to(self.effect)
        if w.shape != self.effect.shape or bool((w < 0).any()):
            raise ValueError(f"weights must be {tuple(self.effect.shape)} numbers that are not negative")
        outside = float((w * ~self.inside).sum() / w.sum())
        if inside_only:
            w = w * self.inside
        if not bool(w.sum() > 0):
            raise ValueError("no place has support: give inside_only=False to average them all the same")
        means = self.draws @ (w / w.sum())
        low, high = (float(means.quantile(q)) for q in (self.alpha / 2, 1 - self.alpha / 2))
        extra = 0.0 if inside_only else bias * outside
        return {
            "effect": float(means.mean()),
            "sd": float(means.std()),
            "lower": low - extra,
            "upper": high + extra,
            "share_outside": outside,
        }


def support_scores(features: Tensor, training: Tensor, sites: Tensor) -> Tensor:
    """Support of rows of ``features`` by ``training`` rows ``(S, F)`` whose ``sites`` are ``(S,)``: the share of
    training rows whose distance to other sites' rows (mean of the nearest five) is as large or larger.
    """
    count = min(_NEIGHBOURS, len(training) - 1)
    if count < 1:
        return torch.ones_like(features[:, 0])
    between = torch.cdist(training, training)
    between = between.masked_fill(sites.unsqueeze(0) == sites.unsqueeze(1), float("inf"))
    own = _nearest(between, count)
    new = _nearest(torch.cdist(features, training), count)
    own = own[torch.isfinite(own)]
    if not len(own):
        return torch.ones_like(new)
    return (own.unsqueeze(0) >= new.unsqueeze(1)).to(new.dtype).mean(1)


def _nearest(distances: Tensor, count: int) -> Tensor:
    near = distances.topk(count, largest=False).values
    kept = torch.isfinite(near)
    mean = torch.where(kept, near, torch.zeros_like(near)).sum(1) / kept.sum(1).clamp(min=1)
    return torch.where(kept.any(1), mean, torch.full_like(mean, float("inf")))


def transport(fitted: Fitted, images: Tensor, lon_lat: Tensor | None, alpha: float) -> Transported:
    """Effects at ``images`` ``(N, ...)``, with columns at their training means."""
    found = fitted.at(images, *fitted.average_columns(len(images)))
    draws = found.effect
    probs = found.probs.mean(0)[:, fitted.order]
    trial = fitted.trial
    sites = trial.groups.new_zeros(trial.num_images)
    sites[trial.image_index] = trial.groups
    support = support_scores(fitted.features(images), fitted.features(trial.images), sites)
    ends = torch.quantile(draws, draws.new_tensor([alpha / 2, 1 - alpha / 2]), 0).mT
    return Transported(
        effect=draws.mean(0),
        sd=draws.std(0),
        interval=ends,
        cluster=probs.argmax(1),
        cluster_probs=probs,
        support=support,
        inside=support >= _LEAST_SUPPORT,
        draws=draws,
        lon_lat=lon_lat,
        alpha=alpha,
    )
