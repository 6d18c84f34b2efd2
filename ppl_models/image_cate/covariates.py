"""Covariates that are the treatment in disguise.

A design matrix that went through a regression may hold the treatment itself as a column, or its products with other
columns. To adjust for these removes the effect that is to be estimated: they are found here before anything is fitted.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl_models.base import from_array
from ppl_models.image_cate.checks import as_treatment

__all__ = ["check_covariates"]

_NEAR = 0.95  # correlation with the treatment from which a column counts as a copy of it
_EXACT = 1e-6  # share of a column's variance that may be left where it is said to follow from others
_CHANCE = 1e-6  # probability below which a column that varies in one arm only is no accident


def check_covariates(
    covariates: Any, treatment: Any, names: Sequence[str] | None = None
) -> tuple[Tensor, tuple[str, ...]]:
    """Which covariates may be used, and what is wrong with the others.

    Left out are columns that are constant; that equal the treatment or nearly do (absolute correlation of 0.95 and
    more, so also 1 - T, 2 T - 1 and copies with a few errors); that are the product of the treatment, or of the
    treatment less a number, with something else; and that give the treatment as a linear combination.  Missing values
    (NaN) are left out of each check and reported.

    Args:
        covariates: ``(N, P)`` or ``(N,)``; NaN is a missing value.
        treatment: zeros and ones ``(N,)``.
        names: names of the columns for the messages; of a data frame, its columns.

    Returns:
        ``keep``: bool ``(P,)``, columns that may be used; ``messages``: one sentence a finding.

    Raises:
        ValueError: infinite values, other numbers of rows or names.
        TypeError: not numeric.
    """
    if names is None:
        names = [str(c) for c in getattr(covariates, "columns", ())]
    t = as_treatment(treatment)
    x = _values(covariates, len(t), t.device)
    num_columns = x.shape[1]
    labels = [f"{name!r}" for name in names] if len(names) else [str(j) for j in range(num_columns)]
    if len(labels) != num_columns:
        raise ValueError(f"names must hold one name a column, {num_columns}, got {len(labels)}")
    keep = torch.ones(num_columns, dtype=torch.bool, device=t.device)
    messages: list[str] = []

    def leave_out(column: int, why: str) -> None:
        keep[column] = False
        messages.append(f"covariate {labels[column]} {why}")

    for j in range(num_columns):
        seen = ~torch.isnan(x[:, j])
        column, arm = x[seen, j], t[seen]
        missing = int((~seen).sum())
        if missing == len(t):
            leave_out(j, "has no value at all")
            continue
        if missing:
            messages.append(f"covariate {labels[j]} has {missing} missing values")
        if _is_constant(column):
            leave_out(j, "is constant")
            continue
        correlation = _correlation(column, arm)
        if abs(correlation) >= _NEAR:
            what = "equals the treatment" if torch.equal(column, arm) else "is the treatment up to shift and scale"
            near = "" if abs(correlation) > 1 - _EXACT else f" but for a few units (correlation {correlation:.4f})"
            leave_out(j, what + near)
        elif _varies_in_one_arm(column, arm):
            varying = 1 if _is_constant(column[arm == 0]) else 0
            leave_out(
                j,
                f"varies among {'treated' if varying else 'control'} units only, as the product of the treatment and a "
                "covariate does",
            )
    for j, k, centre in _products(x, t, keep):
        if keep[j] and keep[k]:
            leave_out(j, f"is covariate {labels[k]} times (treatment - {centre:.3g}), up to shift and scale")
    _leave_out_combinations(x, t, keep, leave_out)
    return keep, tuple(messages)


def _values(covariates: Any, num_rows: int, device: torch.device) -> Tensor:
    if isinstance(covariates, Tensor):
        x = covariates.detach().to(torch.float64)
    else:
        try:
            x = from_array(covariates, np.float64)
        except (TypeError, ValueError) as error:
            raise TypeError(f"covariates must be numeric, code categories as indicators ({error})") from error
    x = x.unsqueeze(1) if x.ndim == 1 else x
    if x.ndim != 2 or x.shape[0] != num_rows or x.shape[1] == 0:
        raise ValueError(f"covariates must have shape ({num_rows}, P), got {tuple(x.shape)}")
    if bool(torch.isinf(x).any()):
        raise ValueError(f"covariates holds {int(torch.isinf(x).sum())} infinite values")
    return x.to(device)


def _is_constant(column: Tensor) -> bool:
    return len(column) == 0 or float(column.max() - column.min()) <= 1e-12 * (1 + float(column.abs().max()))


def _correlation(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale > 0 else 0.0


def _varies_in_one_arm(column: Tensor, arm: Tensor) -> bool:
    """Constant in one arm and not in the other, which a rare indicator may be by accident: the chance of that, under a
    treatment that does not depend on the column, decides.
    """
    for still in (0, 1):
        inside, outside = column[arm == still], column[arm != still]
        if len(inside) and len(outside) and _is_constant(inside) and not _is_constant(outside):
            others = int((outside - inside[0]).abs().gt(1e-12 * (1 + inside[0].abs())).sum())
            if others * math.log(len(outside) / len(column)) < math.log(_CHANCE):
                return True
    return False


def _products(x: Tensor, t: Tensor, keep: Tensor) -> list[tuple[int, int, float]]:
    """Pairs ``(j, k, c)`` where column j is column k times ``(T - c)``, up to shift and scale: in each arm one is a
    linear function of the other, with slopes that differ.  j is the one whose mean and spread differ more between arms.
    """
    found = []
    columns = [j for j in range(x.shape[1]) if keep[j]]
    for a, j in enumerate(columns):
        for k in columns[a + 1 :]:
            seen = ~torch.isnan(x[:, j]) & ~torch.isnan(x[:, k])
            slopes = []
            for arm in (0, 1):
                rows = seen & (t == arm)
                u, v = x[rows, j], x[rows, k]
                # Of two indicators each is a linear function of the other by chance, when few units are left.
                if len(u) < 3 or _is_constant(u) or _is_constant(v) or abs(_correlation(u, v)) < 1 - _EXACT:
                    break
                slopes.append(float((u - u.mean()) @ (v - v.mean()) / (v - v.mean()).square().sum()))
            if len(slopes) < 2 or math.isclose(slopes[0], slopes[1], rel_tol=1e-4):
                continue
            product, factor = (j, k) if _imbalance(x[seen, j], t[seen]) >= _imbalance(x[seen, k], t[seen]) else (k, j)
            low, high = slopes if product == j else [1 / s for s in slopes]
            found.append((product, factor, low / (low - high)))
    return found


def _imbalance(column: Tensor, arm: Tensor) -> float:
    treated, control = column[arm == 1], column[arm == 0]
    spread = float(column.std())
    log_ratio = abs(math.log(float(treated.std()) / float(control.std())))
    return abs(float(treated.mean() - control.mean())) / spread + log_ratio


def _leave_out_combinations(x: Tensor, t: Tensor, keep: Tensor, leave_out: Any) -> None:
    """Drop columns, the one that tells most of the treatment first, until the rest no longer gives the treatment."""
    seen = ~torch.isnan(x[:, keep]).any(1)
    while int(keep.sum()) > 0 and int(seen.sum()) > int(keep.sum()) + 1:
        columns = keep.nonzero()[:, 0].tolist()
        z = x[seen][:, keep]
        z = (z - z.mean(0)) / z.std(0).clamp_min(1e-12)
        target = t[seen] - t[seen].mean()
        if not bool(target.any()):
            return
        u, s, vh = torch.linalg.svd(z, full_matrices=False)
        whole = s > 1e-10 * s[0]
        projected = u[:, whole].mT @ target
        if float(projected.square().sum() / target.square().sum()) < 1 - _EXACT:
            return
        coefficients = vh[whole].mT @ (projected / s[whole])
        leave_out(
            columns[int(coefficients.abs().argmax())],
            "gives the treatment as a linear combination with other covariates",
        )
