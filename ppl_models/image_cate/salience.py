"""Which pixels matter: derivatives by the pixels, and images that show a type.

``d logit pi_k(m) / dm`` of a type's probability (Jerzak, Johansson and Daoud, CLeaR 2023, arXiv 2206.06417), or
``d tau(m) / dm`` of the effect ``tau(m) = sum_k pi_k(m) mu_k``, which needs no numbering of types.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from inference.results.brief import brief
from ppl_models.image_cate.fitted import Fitted

__all__ = ["Exemplars", "exemplars", "salience", "smooth"]

KINDS = ("effect", "type")
_SMOOTHING = 0.01  # mixed into probabilities, so that the log odds of a sure gate have a slope


@brief
class Exemplars(NamedTuple):
    """Images that show each type.

    Attributes:
        rows: of the training images, ``(K, count)``; -1 where there are fewer.
        lower_bounds: lower bounds of the type's probability there, ``(K, count)``.
    """

    rows: Tensor
    lower_bounds: Tensor


def salience(fitted: Fitted, images: Tensor, kind: str, cluster: int) -> Tensor:
    """Derivatives ``(N, ...)`` in the images' own units.

    ``"type"``: of the log odds of type ``cluster`` (by effect, ascending), whose mean probability p over draws enters
    as ``(1 - eps) p + eps / K``; ``"effect"``: of the mean effect in outcome units, which no naming of types changes.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    k = fitted.network.mixture.num_clusters
    if not -k <= cluster < k:
        raise ValueError(f"cluster must lie in {-k}..{k - 1}, got {cluster}")
    leaf, columns = images.clone().requires_grad_(), fitted.average_columns(len(images))
    with torch.enable_grad():
        if kind == "type":
            m = fitted.columns.modifiers(columns[0]).unsqueeze(1)
            p = fitted.probs(fitted.columns.pixels(leaf), m).mean(0)[:, fitted.order[cluster]]
            mixed = (1 - _SMOOTHING) * p + _SMOOTHING / k
            target = torch.logit(mixed).sum()
        else:
            target = fitted.differentiable_at(leaf, *columns).effect.mean(0).sum()
        if not target.requires_grad:
            return torch.zeros_like(images)
        found_gradient = torch.autograd.grad(target, leaf, allow_unused=True)[0]
    return torch.zeros_like(images) if found_gradient is None else found_gradient


def smooth(maps: Tensor, size: int = 10) -> tuple[Tensor, Tensor]:
    """Magnitude (norm over channels) and direction (mean over channels), averaged over boxes: ``(N, H, W)`` each."""
    size = min(size, *maps.shape[-2:])
    parts = torch.stack([maps.norm(dim=-3), maps.mean(-3)], 1)
    left = (size - 1) // 2
    padded = nn.functional.pad(parts, (left, size - 1 - left, left, size - 1 - left), mode="replicate")
    averaged = nn.functional.avg_pool2d(padded, size, stride=1)
    return averaged[:, 0], averaged[:, 1]


@torch.no_grad()
def exemplars(fitted: Fitted, count: int, lon_lat: Tensor | None, least_km: float) -> Exemplars:
    """The training images with the highest lower bound of each type's probability, at least ``least_km`` apart."""
    trial = fitted.trial
    found = fitted.at(trial.images, *fitted.average_columns(trial.num_images)).probs[..., fitted.order]
    lower = found.quantile(0.05, 0) if len(found) > 1 else found[0]
    flat = trial.images.flatten(1)
    rounding = 4 * torch.finfo(flat.dtype).eps * flat.abs().amax(1)
    blank = flat.std(1) <= torch.maximum(1e-6 * flat.std(), rounding)
    rows = torch.full((lower.shape[1], count), -1, dtype=torch.long, device=lower.device)
    bounds = lower.new_full(rows.shape, math.nan)
    for k in range(lower.shape[1]):
        chosen: list[int] = []
        for i in lower[:, k].argsort(descending=True).tolist():
            if bool(blank[i]) or len(chosen) == count:
                continue
            if lon_lat is not None and any(distance_km(lon_lat[i], lon_lat[j]) < least_km for j in chosen):
                continue
            chosen.append(i)
        rows[k, : len(chosen)] = torch.tensor(chosen, device=rows.device)
        bounds[k, : len(chosen)] = lower[chosen, k]
    return Exemplars(rows, bounds)


def distance_km(a: Tensor, b: Tensor) -> float:
    """Great-circle distance of two places in degrees (longitude, latitude)."""
    lon_a, lat_a, lon_b, lat_b = (math.radians(float(v)) for v in (*a, *b))
    inner = math.sin((lat_b - lat_a) / 2) ** 2
    inner += math.cos(lat_a) * math.cos(lat_b) * math.sin((lon_b - lon_a) / 2) ** 2
    return 2 * 6371.0 * math.asin(min(1.0, math.sqrt(inner)))
