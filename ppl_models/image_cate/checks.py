"""Checks at the door of everything that evaluates a study: vectors, treatments, groups.

Statistics of a whole study are sums over thousands of units, so they are computed in double precision whatever came in,
on the device of the input.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl_models.base import from_array, to_tensor

__all__ = ["Groups", "as_matrix", "as_treatment", "as_vector", "as_weights", "group_sums", "index_groups"]


@dataclass(frozen=True)
class Groups:
    """Units by group.

    Attributes:
        index: group of each unit ``(N,)``, int64 in ``[0, count)``, numbered in the order of the sorted labels.
        count: number of groups.
    """

    index: Tensor
    count: int


def as_vector(name: str, value: Any, num_rows: int | None = None, device: torch.device | None = None) -> Tensor:
    """``value`` as a finite float64 vector ``(N,)``; a column ``(N, 1)`` is taken as a vector.

    Raises:
        TypeError: not numeric.
        ValueError: empty, NaN or infinite values, another shape, or not ``num_rows`` long.
    """
    result = _double(name, value)
    if result.ndim == 2 and result.shape[1] == 1:
        result = result[:, 0]
    if result.ndim != 1:
        raise ValueError(f"{name} must have shape (N,), got {tuple(result.shape)}")
    _check_rows(name, result, num_rows)
    return result if device is None else result.to(device)


def as_matrix(name: str, value: Any, num_rows: int | None = None, device: torch.device | None = None) -> Tensor:
    """``value`` as a finite float64 matrix ``(N, P)``; a vector is one column, images ``(N, ...)`` are flattened.

    Raises:
        TypeError: not numeric.
        ValueError: empty, NaN or infinite values, or not ``num_rows`` rows.
    """
    result = _double(name, value)
    if result.ndim == 0:
        raise ValueError(f"{name} must have shape (N, P), got a single number")
    result = result.unsqueeze(1) if result.ndim == 1 else result.flatten(1)
    _check_rows(name, result, num_rows)
    return result if device is None else result.to(device)


def as_treatment(value: Any, num_rows: int | None = None, device: torch.device | None = None) -> Tensor:
    """A treatment of zeros and ones, float64 ``(N,)``, with units in both arms.

    Raises:
        ValueError: another value than 0 and 1, or one arm only.
    """
    treatment = as_vector("treatment", value, num_rows, device)
    other = (treatment != 0) & (treatment != 1)
    if bool(other.any()):
        where = int(other.nonzero()[0])
        raise ValueError(
            f"treatment must be 0 (control) or 1 (treated), got {float(treatment[where])} at index {where}; "
            "code the two arms as 0 and 1"
        )
    treated = int(treatment.sum())
    if treated in (0, len(treatment)):
        raise ValueError(
            f"treatment has one arm only: {treated} of {len(treatment)} units are treated; "
            "an effect needs treated and control units"
        )
    return treatment


def index_groups(groups: Any, num_rows: int, device: torch.device | None = None, least: int = 1) -> Groups:
    """Groups from labels of any kind (integers, strings, tensors); None makes every unit a group of its own.

    Raises:
        ValueError: not one label a unit, a missing label, or fewer than ``least`` groups.
    """
    if groups is None:
        result = Groups(torch.arange(num_rows, device=device), num_rows)
    else:
        labels = groups.numpy(force=True) if isinstance(groups, Tensor) else np.asarray(groups)
        if labels.ndim == 2 and labels.shape[1] == 1:
            labels = labels[:, 0]
        if labels.shape != (num_rows,):
            raise ValueError(f"groups must hold one label a unit, shape ({num_rows},), got {labels.shape}")
        if labels.dtype.kind == "f" and bool(np.isnan(labels).any()):
            raise ValueError(f"groups holds {int(np.isnan(labels).sum())} missing labels (NaN); every unit needs one")
        if labels.dtype == object:
            missing = sum(label is None or label != label for label in labels)
            if missing:
                raise ValueError(f"groups holds {missing} missing labels; every unit needs one")
            labels = labels.astype(str)
        found, index = np.unique(labels, return_inverse=True)
        result = Groups(torch.as_tensor(index.reshape(-1), dtype=torch.int64, device=device), len(found))
    if result.count < least:
        raise ValueError(f"groups must hold at least {least} different groups, got {result.count}")
    return result


def as_weights(weights: Any, like: Tensor) -> Tensor:
    """Sample weights ``(N,)`` of the rows of ``like``; None: equal.

    Raises:
        TypeError, ValueError: not numeric, of another length, negative, or all 0.
    """
    weight = torch.ones_like(like) if weights is None else as_vector("weights", weights, len(like), like.device)
    if bool((weight < 0).any()) or not bool((weight > 0).any()):
        raise ValueError("weights must not be negative, and not all be 0")
    return weight


def group_sums(values: Tensor, groups: Groups) -> Tensor:
    """Sums of ``values`` ``(N, ...)`` within groups, ``(G, ...)``."""
    return values.new_zeros(groups.count, *values.shape[1:]).index_add_(0, groups.index, values)


def _double(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        try:
            value = from_array(value, np.float64)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{name} must be a tensor or a numeric array ({error})") from error
    return to_tensor(name, value).to(torch.float64)


def _check_rows(name: str, value: Tensor, num_rows: int | None) -> None:
    if num_rows is not None and len(value) != num_rows:
        raise ValueError(f"{name} must have one row a unit, {num_rows}, got {len(value)}")
