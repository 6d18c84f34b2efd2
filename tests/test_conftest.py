"""The guard itself: each global that a test leaves changed is named and put back, and only a marker excuses it."""

import os

import pytest

pytest_plugins = ["pytester"]

CHANGES = {
    "default_dtype": "torch.set_default_dtype(torch.float64)",
    "deterministic": "torch.use_deterministic_algorithms(True)",
    "grad_mode": "torch.set_grad_enabled(False)",
    "num_threads": "torch.set_num_threads(torch.get_num_threads() + 1)",
    "param_store": "pyro.param('left_behind', torch.zeros(2))",
    "pyro_settings": "pyro.enable_validation(False)",
    "rng": "torch.rand(1)",
    "rng_numpy": "np.random.rand()",
    "rng_python": "random.random()",
}


@pytest.fixture
def our_conftest(pytester: pytest.Pytester, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What every test inherits, for the files of ``pytester``."""
    root = request.path.parent.parent
    monkeypatch.setenv("PYTHONPATH", str(root), prepend=os.pathsep)
    pytester.makeconftest((root / "tests" / "conftest.py").read_text())
    pytester.makeini("[pytest]\nmarkers = changes_globals(*names): on purpose\n")


def test_a_changed_global_fails_the_test_that_changed_it(pytester: pytest.Pytester, our_conftest: None) -> None:
    """One file, run in a fresh process: each change alone, each followed by a test that passes if it was put back."""
    lines = ["import random", "import numpy as np", "import pyro", "import pytest", "import torch"]
    for name, change in CHANGES.items():
        lines += [f"def test_{name}():", f"    {change}", f"def test_after_{name}():", "    pass"]
        lines += [f"@pytest.mark.changes_globals({name!r})", f"def test_marked_{name}():", f"    {change}"]
    lines += ["@pytest.mark.changes_globals('rng')", "def test_marked_for_another():", f"    {CHANGES['grad_mode']}"]
    pytester.makepyfile("\n".join(lines))

    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")

    result.assert_outcomes(passed=3 * len(CHANGES) + 1, errors=len(CHANGES) + 1)
    result.stdout.fnmatch_lines([f"*left these globals changed: {name}" for name in CHANGES])


def test_a_name_that_changes_with_each_process_is_refused(pytester: pytest.Pytester, our_conftest: None) -> None:
    """Two processes differ in it now and then only, which a run of the tests need not show."""
    lines = [
        "import pytest",
        "@pytest.mark.parametrize('value', [object(), 2], ids=str)",
        "def test_value(value):",
        "    pass",
    ]
    pytester.makepyfile("\n".join(lines))

    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*give these ids of their own*test_value?<object object at 0x*"])
    assert "test_value[2]" not in result.stderr.str()
