"""A trial with images: checks at the door, and the units of each image as rows of one table.

Networks see each distinct image once; its units are a padded row of the table, so that minibatches of images have fixed
shapes.
"""

import warnings
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ppl_models.base import from_array, to_precision, to_tensor

__all__ = ["Trial", "Units", "check_images", "make_trial"]

MISSING = ("raise", "drop")


class Units(NamedTuple):
    """Units of B images, U to an image at most; the rest is padding.

    Attributes:
        treatment: 0 or 1, floating point, ``(B, U)``.
        outcome: standardised outcome ``(B, U)``; zero in the padding.
        weight: weights of the log-likelihood, ``(B, U)``.
        mask: True where there is a unit, ``(B, U)``.
        modifiers: tabular effect modifiers, ``(B, U, M)``.
        controls: controls of the baseline, ``(B, U, Q)``.
        site: number of the unit's site, ``(B, U)``.
        propensity: share of the effect that is part of ``offset``: the propensity with a cross-fitted baseline, zero
            with one that is fitted jointly, ``(B, U)``.
        offset: predictors at average treatment that were cross-fitted, ``(B, U, L)``; of width 0 if there are none.
    """

    treatment: Tensor
    outcome: Tensor
    weight: Tensor
    mask: Tensor
    modifiers: Tensor
    controls: Tensor
    site: Tensor
    propensity: Tensor
    offset: Tensor


@dataclass(frozen=True, eq=False)
class Trial:
    """A checked trial.

    Attributes:
        images: distinct images that have units, ``(S, ...)``, in their own units.
        outcome: outcome in its own units, ``(N,)``.
        treatment: 0 or 1, floating point, ``(N,)``.
        image_index: row of ``images`` of each unit, ``(N,)``.
        groups: number of the unit's group (its image, unless groups were given), ``(N,)``.
        modifiers, controls: ``(N, M)``, ``(N, Q)``, in their own units.
        sample_weight: ``(N,)``.
        rows: of the data as given, those that are kept, ``(N,)``.
        image_rows: of the images as given, the first that each distinct image stands for, ``(S,)``.
        dropped: rows that were left out, with the reason in ``messages``.
        messages: what was found on the way.
    """

    images: Tensor
    outcome: Tensor
    treatment: Tensor
    image_index: Tensor
    groups: Tensor
    modifiers: Tensor
    controls: Tensor
    sample_weight: Tensor
    rows: Tensor
    image_rows: Tensor
    dropped: tuple[int, ...] = ()
    messages: tuple[str, ...] = field(default=())

    @property
    def num_units(self) -> int:
        """N."""
        return len(self.outcome)

    @property
    def num_images(self) -> int:
        """S."""
        return len(self.images)

    def table(self) -> tuple[Tensor, Tensor]:
        """Units of each image: ``(S, U)`` row numbers, and a mask of the same shape."""
        order = torch.argsort(self.image_index, stable=True)
        counts = torch.bincount(self.image_index, minlength=self.num_images)
        starts = counts.cumsum(0) - counts
        place = torch.arange(len(order), device=order.device) - starts[self.image_index[order]]
        rows = order.new_zeros((self.num_images, int(counts.max())))
        mask = torch.zeros_like(rows, dtype=torch.bool)
        rows[self.image_index[order], place] = order
        mask[self.image_index[order], place] = True
        return rows, mask

    def select(self, keep: Tensor) -> "Trial":
        """The units of a mask ``(N,)`` and the images that they have."""
        used, index = torch.unique(self.image_index[keep], return_inverse=True)
        per_unit = ("outcome", "treatment", "groups", "modifiers", "controls", "sample_weight", "rows")
        parts: dict[str, Any] = {name: getattr(self, name)[keep] for name in per_unit}
        return replace(
            self, images=self.images[used], image_index=index, image_rows=self.image_rows[used], messages=(), **parts
        )


def check_images(images: Any, name: str = "images") -> Tensor:
    """Images as a floating-point tensor ``(N, C, H, W)``, ``(N, T, C, H, W)`` or ``(N, F)``; NaN is let through.

    Raises:
        TypeError: not numeric.
        ValueError: empty, or another shape.
    """
    if not isinstance(images, Tensor):
        try:
            images = from_array(images)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{name} must be a tensor or an array, got {type(images).__name__} ({error})") from error
    if images.is_complex():
        raise TypeError(f"{name} must hold real numbers, got {images.dtype}")
    if images.ndim not in (2, 4, 5) or images.numel() == 0:
        raise ValueError(
            f"{name} must have shape (N, C, H, W), (N, T, C, H, W) for sequences or (N, F) for embeddings, got "
            f"{tuple(images.shape)}"
        )
    if images.ndim == 4 and images.shape[-1] <= 4 < images.shape[1]:
        raise ValueError(
            f"{name} look channels-last, {tuple(images.shape)}: move the channels to the front, to (N, C, H, W)"
        )
    if not images.is_floating_point() or images.dtype == torch.float16:
        images = images.to(torch.get_default_dtype())
    return images.detach()


def make_trial(
    outcome: Any,
    treatment: Any,
    images: Any,
    image_index: Any = None,
    covariates: Any = None,
    controls: Any = None,
    groups: Any = None,
    sample_weight: Any = None,
    missing: str = "raise",
) -> Trial:
    """Check a trial's arrays and gather them.

    Raises:
        TypeError, ValueError: an array is not numeric, of another length or outside of what it may hold; the message
            names it, and with ``missing="raise"`` the rows that hold NaN.
    """
    pixels = check_images(images)
    dtype, device = pixels.dtype, pixels.device

    def numeric(name: str, value: Any, ndim: int) -> Tensor:
        tensor = _numeric(name, value).to(device)
        if tensor.ndim == 2 and ndim == 1 and tensor.shape[1] == 1:
            tensor = tensor[:, 0]
        if tensor.ndim == 1 and ndim == 2:
            tensor = tensor[:, None]
        if tensor.ndim != ndim:
            shape = "(N,)" if ndim == 1 else "(N, columns)"
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
        return tensor

    y = numeric("outcome", outcome, 1)
    t = numeric("treatment", treatment, 1).to(dtype)
    n = len(y)
    if image_index is None:
        if len(pixels) != n:
            raise ValueError(
                f"images holds {len(pixels)} rows and outcome {n}: give image_index (N,), each unit's image, where "
                "units share images"
            )
        index = torch.arange(n, device=device)
    else:
        index = _codes("image_index", image_index, device)
        if len(index) == n and bool(((index < 0) | (index >= len(pixels))).any()):
            wrong = int(((index < 0) | (index >= len(pixels))).nonzero()[0])
            raise ValueError(
                f"image_index must lie in 0..{len(pixels) - 1}, the rows of images; it is {int(index[wrong])} at row "
                f"{wrong}"
            )
    empty = torch.empty(n, 0, dtype=dtype, device=device)
    parts = {
        "treatment": t,
        "image_index": index,
        "covariates": empty if covariates is None else numeric("covariates", covariates, 2),
        "controls": empty if controls is None else numeric("controls", controls, 2),
        "sample_weight": y.new_ones(n) if sample_weight is None else numeric("sample_weight", sample_weight, 1),
    }
    site = None if groups is None else _labels("groups", groups, device)
    for name, part in [*parts.items(), *([] if site is None else [("groups", site)])]:
        if len(part) != n:
            raise ValueError(f"{name} has {len(part)} rows and outcome {n}: they must match")
    first, same = _distinct(pixels)
    index = same[index]

    bad_image = ~torch.isfinite(pixels[first].flatten(1)).all(1)
    reasons = {"outcome": ~torch.isfinite(y), "images": bad_image[index]}
    reasons |= {c: ~torch.isfinite(parts[c]).all(1) for c in ("covariates", "controls")}
    keep = ~torch.stack(list(reasons.values())).any(0)
    messages, dropped = [], tuple((~keep).nonzero()[:, 0].tolist())
    if dropped:
        found = "; ".join(f"{name}: rows {_some(mask)}" for name, mask in reasons.items() if bool(mask.any()))
        if missing == "raise":
            raise ValueError(f"NaN or infinite values ({found}). Impute them, or give missing='drop' to leave rows out")
        if len(dropped) == n:
            raise ValueError(f"every row holds NaN or infinite values ({found}): nothing is left to fit")
        messages.append(f"left out {len(dropped)} of {n} rows with NaN or infinite values ({found})")
    if not bool(torch.isfinite(t).all()) or not bool(((t == 0) | (t == 1)).all()):
        wrong = int((~((t == 0) | (t == 1))).nonzero()[0])
        raise ValueError(f"treatment must be 0 or 1, it is {t[wrong].item():g} at row {wrong}")
    # Before units are centred: an offset may be all that a narrower dtype holds.
    for name, part in (("outcome", y), *((c, parts[c]) for c in ("covariates", "controls"))):
        to_precision(name, part[keep], dtype)
    y, *columns = (x.to(dtype) for x in (y, parts["covariates"], parts["controls"]))
    weight = parts["sample_weight"].to(dtype)
    if not bool((torch.isfinite(weight) & (weight >= 0)).all()) or not bool(weight[keep].sum() > 0):
        raise ValueError(
            "sample_weight must be finite and not negative, with a positive sum over the rows that are kept"
        )
    trial = Trial(
        images=pixels[first],
        outcome=y,
        treatment=t,
        image_index=index,
        groups=index if site is None else site,
        modifiers=columns[0],
        controls=columns[1],
        sample_weight=weight / weight[keep].mean(),  # of those that are kept: it is an amount of information too
        rows=torch.arange(n, device=device),
        image_rows=first,
        dropped=dropped,
    ).select(keep)
    _check_arms(trial)
    if site is not None and len(trial.groups.unique()) < 2:
        raise ValueError("groups holds one group: folds and standard errors go by group, so there must be two at least")
    if _constant(trial.images):
        raise ValueError("all images are constant or the same: there is nothing in them to read effects from")
    blank = (trial.images.flatten(1) == trial.images.flatten(1)[:, :1]).all(1)
    if bool(blank.any()):
        messages.append(f"{int(blank.sum())} of {trial.num_images} images are constant (water, or no data)")
    for message in messages:
        warnings.warn(message, UserWarning, stacklevel=4)
    return replace(trial, messages=tuple(messages))


def _check_arms(trial: Trial) -> None:
    treated = int(trial.treatment.sum())
    if treated in (0, trial.num_units):
        arm = "treated" if treated else "control"
        raise ValueError(f"all {trial.num_units} units are {arm}: an effect needs both arms")


def _constant(images: Tensor) -> bool:
    return bool((images == images[:1]).all()) or (
        images.ndim > 2 and bool((images.flatten(1) == images.flatten(1)[:, :1]).all())
    )


def _distinct(images: Tensor) -> tuple[Tensor, Tensor]:
    """First row of each distinct image, and of each row which distinct image it is."""
    flat = np.ascontiguousarray(images.reshape(len(images), -1).cpu().numpy())
    seen: dict[bytes, int] = {}
    same = [seen.setdefault(row.tobytes(), len(seen)) for row in flat]
    first = np.unique(same, return_index=True)[1]
    return torch.as_tensor(first, device=images.device), torch.as_tensor(same, device=images.device)


def _numeric(name: str, value: Any) -> Tensor:
    """A numeric tensor, NaN let through."""
    if not isinstance(value, Tensor):
        try:
            value = from_array(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"{name} must be a tensor or a numeric array, got {type(value).__name__} ({error})"
            ) from error
    if value.is_complex():
        raise TypeError(f"{name} must hold real numbers, got {value.dtype}")
    if value.numel() == 0 and value.ndim < 2:
        raise ValueError(f"{name} is empty")
    return value.detach() if value.is_floating_point() else value.to(torch.float64)


def _codes(name: str, value: Any, device: torch.device) -> Tensor:
    codes = to_tensor(name, value).to(device)
    if codes.is_floating_point() and bool((codes != codes.round()).any()):
        raise ValueError(f"{name} must hold whole numbers")
    if codes.ndim != 1:
        raise ValueError(f"{name} must have shape (N,), got {tuple(codes.shape)}")
    return codes.long()


def _labels(name: str, value: Any, device: torch.device) -> Tensor:
    """Numbers 0, 1, ... for labels of any kind."""
    labels = np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise ValueError(f"{name} must have shape (N,), got {labels.shape}")
    missing = [row for row, label in enumerate(labels.tolist()) if label is None or label != label]
    if missing:
        raise ValueError(
            f"{name} holds {len(missing)} missing labels, the first at row {missing[0]}; give each unit one"
        )
    if labels.dtype == object:
        labels = labels.astype(str)
    return torch.as_tensor(np.unique(labels, return_inverse=True)[1], device=device)


def _some(mask: Tensor) -> str:
    rows = mask.nonzero()[:, 0].tolist()
    return ", ".join(map(str, rows[:10])) + (f" and {len(rows) - 10} more" if len(rows) > 10 else "")
