"""The README says what is true: its Python runs, its commands exist, its files are there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)

# The README's runs are long enough for a usable result; the test only wants to know that they run, and shortens them.
SMALL = {
    "num_steps": 3,
    "warmup_steps": 20,
    "num_samples": 8,
    "thin": 2,
}


def shortened(block: str) -> str:
    for name, value in SMALL.items():
        block = re.sub(rf"\b{name}=\d+", f"{name}={value}", block)
    return block


def test_there_are_examples() -> None:
    assert len(BLOCKS) >= 2
    assert all(shortened(block) != block for block in BLOCKS)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_example_runs(number: int) -> None:
    """In a process of its own, as a reader would run it."""
    finished = subprocess.run(
        [sys.executable, "-c", shortened(BLOCKS[number])], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip()  # each ends in something that a reader sees


def test_first_example_is_ten_lines() -> None:
    lines = [line for line in BLOCKS[0].splitlines() if line.strip() and not line.startswith(("from", "import"))]
    assert len(lines) <= 10


def test_commands_exist() -> None:
    rules = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`make ([a-z-]+)", README + (ROOT / "CONTRIBUTING.md").read_text()))
    assert {"demo", "test"} <= named
    assert named <= rules


def test_linked_files_exist() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text())
        assert [target for target in targets if not (ROOT / target).exists()] == []


def test_ci_runs_the_same_command_as_a_person() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text()
