"""What ArviZ 0.2x and 1.x name differently, for tests of what the library hands over."""

from typing import Any

__all__ = ["elpd", "groups"]


def groups(data: Any) -> set[str]:
    """Names of the groups of an InferenceData (a method) or a DataTree (paths)."""
    return set(data.groups()) if callable(data.groups) else {g.strip("/") for g in data.groups}


def elpd(loo: Any) -> float:
    """Of a result of ``arviz.loo``."""
    return float(loo.elpd_loo if hasattr(loo, "elpd_loo") else loo.elpd)
