"""The house rules that a machine can check: who imports whom, what a model never holds, how long a file may grow."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("inference", "ppl_models", "sde")
TREES = (*ROOMS, "tests", "benchmarks", "tutorials")
MAX_LINES = 600


def python_files(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def names(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every attribute access and every call in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute | ast.Name):
            yield node.lineno, ast.unparse(node)


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def matches(pattern: re.Pattern[str], *folders: str) -> list[str]:
    return [
        f"{where(path, line)}: {name}"
        for path in python_files(*folders)
        for line, name in names(path)
        if pattern.search(name)
    ]


@pytest.mark.changes_globals("rng_python")  # the linter draws the colours of its banner
def test_the_arrows_between_the_rooms() -> None:
    cli = pytest.importorskip("importlinter.cli")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        status = cli.lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True)
    assert status == cli.EXIT_STATUS_SUCCESS


def test_no_model_trains_or_samples_itself() -> None:
    """No backward pass, no optimiser or kernel step, no loop of Pyro's own in ``ppl_models``: those are the engines'.

    To name an optimiser, so that the shared loop builds it, is allowed.
    """
    training = re.compile(r"(\.(backward|zero_grad|step)|(^|\.)SVI)$")
    assert not (found := matches(training, "ppl_models")), found


def test_device_follows_the_inputs() -> None:
    """Nothing in the rooms moves a tensor to a named accelerator, and no model names a device at all."""
    found = matches(re.compile(r"^(?!torch\.cuda$).*\.(cuda|mps)$"), *ROOMS)
    device = re.compile(r"(cpu|cuda|mps|xpu)(:\d+)?")
    for path in python_files("ppl_models"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and device.fullmatch(node.value):
                found.append(f"{where(path, node.lineno)}: {node.value!r}")
    assert not found, found


def test_globals_are_not_set_in_the_rooms() -> None:
    setters = re.compile(
        r"(set_default_dtype|set_default_device|set_num_threads|manual_seed_all|set_rng_seed"
        r"|clear_param_store|enable_validation|set_default_validate_args)$"
    )
    assert not (found := matches(setters, *ROOMS)), found


def models_of(path: Path) -> set[str]:
    """Folders of the models that a file imports, from their folder or from the index."""
    index = ast.parse((ROOT / "ppl_models" / "__init__.py").read_text())
    folder_of = {
        alias.name: node.module.split(".")[1]
        for node in index.body
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ppl_models.")
        for alias in node.names
    }
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module == "ppl_models":
            found |= {folder_of.get(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module]
        found |= {m.split(".")[1] for m in modules if m.startswith("ppl_models.")}
    return found & set(folder_of.values())


def test_a_model_can_be_taken_out() -> None:
    """A model is its folder, its tests, its tutorial, demo, benchmark and page, and a line of the index: nothing else
    imports it, and no test file belongs to two.
    """
    outside = [*python_files("inference", "sde", "tests", "docs", "benchmarks"), *(ROOT / "ppl_models").glob("*.py")]
    own = ("ppl_models", "contract/cases", "reproduce")  # folders of tests that go with their models
    for path in (p for p in outside if p != ROOT / "ppl_models" / "__init__.py"):
        used, place = models_of(path), path.parent.relative_to(ROOT).as_posix()
        goes_with_one = place.startswith("benchmarks") or place in [f"tests/{folder}" for folder in own]
        assert len(used) <= goes_with_one, f"{where(path, 1)} imports {', '.join(sorted(used))}"
    for path in python_files("ppl_models"):
        home = path.relative_to(ROOT / "ppl_models").parts[0]
        assert home == "__init__.py" or models_of(path) <= {home}, f"{where(path, 1)} imports another model"


def test_files_stay_short() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in python_files(*TREES)}
    long = {path: lines for path, lines in lengths.items() if lines > MAX_LINES}
    assert not long, f"over {MAX_LINES} lines, split them: {long}"


def test_no_absolute_paths_of_one_machine() -> None:
    pattern = re.compile(r"""["'\s(=](/(work|home|root|tmp|mnt|Users)/[\w.-]+)""")
    texts = [*python_files(*TREES), *ROOT.glob("*.md"), *ROOT.glob("*.toml"), ROOT / "Makefile", ROOT / ".ci" / "run"]
    found = [f"{where(path, 0)}: {match[1]}" for path in texts for match in pattern.finditer(path.read_text())]
    assert not found, found


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_typed_packages(room: str) -> None:
    assert (ROOT / room / "__init__.py").is_file()
    assert (ROOT / room / "py.typed").is_file()
