"""What every test inherits.

Globals stay as they were; real data is found, or the test is skipped with the reason; names are the same in each run.
"""

import os
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch

from tests.accelerator import register_stand_in

register_stand_in()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse names that hold an address: the processes that tests are spread over would collect different ones."""
    passing = [item.nodeid for item in items if re.search(r"\b0x[0-9a-f]", item.nodeid)]
    if passing:
        raise pytest.UsageError(f"give these ids of their own, theirs change with each process: {', '.join(passing)}")


def _param_store() -> dict[str, Any]:
    return {name: value.detach().clone() for name, value in pyro.get_param_store().items()}


def _numpy_state() -> tuple[Any, ...]:
    state = np.random.get_state()  # noqa: NPY002 - the legacy global generator is what is watched
    return tuple(part.tobytes() if isinstance(part, np.ndarray) else part for part in state)


# Everything global that user code can see.  A library that leaves one of these changed breaks the code that runs next.
_GLOBALS: dict[str, Callable[[], Any]] = {
    "default_dtype": torch.get_default_dtype,
    "default_device": torch.get_default_device,
    "deterministic": torch.are_deterministic_algorithms_enabled,
    "grad_mode": torch.is_grad_enabled,
    "num_threads": torch.get_num_threads,
    "param_store": _param_store,
    "pyro_settings": pyro.settings.get,  # holds the validation flags of Pyro and of torch.distributions
    "rng": lambda: torch.get_rng_state().numpy().tobytes(),
    "rng_numpy": _numpy_state,
    "rng_python": random.getstate,
}


def _restore(before: dict[str, Any], rng: tuple[Any, Any, Any]) -> None:
    torch.set_default_dtype(before["default_dtype"])
    if torch.get_default_device() != before["default_device"]:
        torch.set_default_device(before["default_device"])
    torch.use_deterministic_algorithms(before["deterministic"])
    torch.set_grad_enabled(before["grad_mode"])
    torch.set_num_threads(before["num_threads"])
    pyro.settings.set(**before["pyro_settings"])
    pyro.clear_param_store()
    for name, value in before["param_store"].items():
        pyro.param(name, value)
    torch.set_rng_state(rng[0])
    np.random.set_state(rng[1])  # noqa: NPY002
    random.setstate(rng[2])


def _same(name: str, a: Any, b: Any) -> bool:
    if name == "param_store":
        return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    return bool(a == b)


@pytest.fixture(autouse=True)
def globals_unchanged(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test after which a global differs, and put the global back so that the next test starts clean.

    A test that needs random numbers makes its own ``torch.Generator`` or uses
    ``inference.runtime.generators.scoped_seed``.  One that must change a global says which:
    ``@pytest.mark.changes_globals("rng")``.
    """
    marker = request.node.get_closest_marker("changes_globals")
    allowed = set(marker.args) if marker else set()
    unknown = allowed - _GLOBALS.keys()
    if unknown:
        raise ValueError(f"changes_globals names {sorted(unknown)}; known names are {sorted(_GLOBALS)}")
    rng = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    before = {name: read() for name, read in _GLOBALS.items()}
    yield
    after = {name: read() for name, read in _GLOBALS.items()}
    changed = {name for name in _GLOBALS if not _same(name, before[name], after[name])}
    if changed:
        _restore(before, rng)
    if changed - allowed:
        pytest.fail(f"the test left these globals changed: {', '.join(sorted(changed - allowed))}", pytrace=False)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data, from ``PPL_MODELS_DATA`` or ``../shared/data``; skips where there is none."""
    root = Path(__file__).resolve().parent.parent
    folder = Path(os.environ.get("PPL_MODELS_DATA", root.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set PPL_MODELS_DATA to the folder that holds it")
    return folder
