"""Covariates that are the treatment in disguise are found, and honest ones are left alone."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppl_models.image_cate.covariates import check_covariates


def test_the_design_matrix_of_the_uganda_trial(data_dir: Path) -> None:
    """Columns treatment, a, T a, b, T b, c, T c: the treatment and its products go, the covariates stay."""
    path = data_dir / "uganda_yop" / "uganda_yop.npz"
    if not path.is_file():
        pytest.skip(f"no {path.name} in the data folder")
    with np.load(path, allow_pickle=False) as held:
        x, t = held["covariates"], held["treatment"]
    keep, messages = check_covariates(x, t)
    assert keep.tolist() == [False, True, False, True, False, True, False]
    assert "covariate 0 equals the treatment" in messages[0]
    assert any("covariate 3 has 7 missing values" in m for m in messages)
    assert sum("varies among treated units only" in m for m in messages) == 3
    keep, _ = check_covariates(x[:, 1:], t)  # without its first column the trap is still there
    assert keep.tolist() == [True, False, True, False, True, False]


def honest(seed: int, n: int = 200) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    t = (rng.uniform(size=n) < 0.4).astype(float)
    a = rng.normal(size=n)
    return np.column_stack([a, rng.integers(0, 2, n), a + 0.3 * t + rng.normal(size=n), rng.poisson(3, n)]), t


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 100_000))
def test_honest_covariates_stay(seed: int) -> None:
    x, t = honest(seed)
    keep, messages = check_covariates(x, t)
    assert bool(keep.all()) and messages == ()


def test_rare_indicators_stay() -> None:
    x, t = honest(0)
    rare = np.zeros(len(t))
    rare[np.flatnonzero(t == 1)[:5]] = 1  # five units, all treated: 0.4 ** 5 is no proof
    keep, _ = check_covariates(np.column_stack([x, rare]), t)
    assert bool(keep.all())


@pytest.mark.parametrize(
    ("disguise", "message"),
    [
        (lambda t, x: t, "equals the treatment"),
        (lambda t, x: 1 - t, "is the treatment up to shift and scale"),
        (lambda t, x: 5 * t - 3, "is the treatment up to shift and scale"),
        (lambda t, x: np.where(np.arange(len(t)) == 7, 1 - t, t), "but for a few units"),
        (lambda t, x: t * x[:, 0], "varies among treated units only"),
        (lambda t, x: (1 - t) * x[:, 3], "varies among control units only"),
        (lambda t, x: t * np.random.default_rng(9).normal(size=len(t)), "varies among treated units only"),
        (lambda t, x: (t - 0.4) * x[:, 0], r"is covariate 0 times \(treatment - 0\.4\)"),
        (lambda t, x: 2 - 3 * (t - 0.25) * x[:, 0], r"is covariate 0 times \(treatment - 0\.25\)"),
        (lambda t, x: np.full(len(t), 2.0), "is constant"),
        (lambda t, x: np.full(len(t), np.nan), "has no value at all"),
    ],
)
def test_disguises_are_found(disguise: Any, message: str) -> None:
    x, t = honest(1)
    keep, messages = check_covariates(np.column_stack([x, disguise(t, x)]), t)
    assert keep.tolist() == [True] * 4 + [False]
    assert len(messages) == 1 and messages[0].startswith("covariate 4 ")
    assert re.search(message, messages[0]), messages[0]


def test_a_treatment_hidden_in_a_sum() -> None:
    x, t = honest(2)
    keep, messages = check_covariates(np.column_stack([x[:, 0], x[:, 3], x[:, 0] + 2 * x[:, 3] + 4 * t]), t)
    assert int(keep.sum()) == 2
    assert "gives the treatment as a linear combination" in messages[0]


def test_names_missing_values_and_kinds_of_input() -> None:
    x, t = honest(3)
    x[3, 0] = np.nan
    keep, messages = check_covariates(torch.tensor(np.column_stack([x, t])), torch.tensor(t), list("abcde"))
    assert keep.tolist() == [True] * 4 + [False]
    assert messages[0] == "covariate 'a' has 1 missing values" and "'e' equals the treatment" in messages[1]
    pandas = pytest.importorskip("pandas")
    _, messages = check_covariates(pandas.DataFrame({"age": x[:, 1], "arm": t}), t)
    assert "'arm' equals the treatment" in messages[0]
    assert check_covariates(x[:, 1], t)[0].tolist() == [True]


@pytest.mark.parametrize(
    ("covariates", "names", "error", "message"),
    [
        (np.ones((3, 2)), None, ValueError, r"covariates must have shape \(4, P\)"),
        (np.full((4, 1), np.inf), None, ValueError, "4 infinite values"),
        ([["a"], ["b"], ["c"], ["d"]], None, TypeError, "must be numeric"),
        (np.arange(8.0).reshape(4, 2), ["a"], ValueError, "one name a column, 2, got 1"),
    ],
)
def test_bad_input(covariates: Any, names: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_covariates(covariates, [0, 1, 0, 1], names)
