"""What is released: packages that build and install with what they declare, light imports, types, licences."""

import ast
import os
import re
import subprocess
import sys
import tomllib
import venv
from importlib import metadata
from pathlib import Path

import pytest

import ppl_models

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Licences whose terms Apache-2.0 code may depend on.
PERMISSIVE = re.compile(
    r"\b(apache|bsd|mit|psf|python software|isc|mpl|mozilla|unlicense|zpl|hpnd|0bsd)\b", re.IGNORECASE
)
# What metadata say of their licence in a way that no pattern reads, looked up in the package's own licence file.
LOOKED_UP = {"torch": "BSD-3-Clause"}


def run(*command: str, cwd: Path = ROOT, timeout: int = 600) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_import_is_light() -> None:
    """Nothing optional and nothing slow comes with ``import ppl_models``; ArviZ, plots, data frames wait for their use.

    Seconds of processor time beyond torch and Pyro: 0.4 on the machine where this was written.
    """
    script = """
import sys, time, torch, pyro
start = time.process_time()
import ppl_models, sde, inference
seconds = time.process_time() - start
names = ("arviz", "matplotlib", "pandas", "sklearn", "scipy", "xarray", "IPython", "torch._inductor")
heavy = [name for name in names if name in sys.modules]
print(seconds, *heavy)
"""
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.split()
    assert not found[1:], f"imported too early: {found[1:]}"
    assert float(found[0]) < 2.0  # twice the promise, for machines that are busy or slow


def test_a_users_type_checker_sees_the_types(tmp_path: Path) -> None:
    """``py.typed`` works: mypy knows what ``fit`` and ``MCMC`` return, and refuses a wrong argument."""
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text(
        "from inference import MCMC, NUTS, FitResult, fit\n"
        "import torch\n"
        "result: FitResult = fit(torch.nn.Linear(1, 1), num_steps=3)\n"
        "losses: torch.Tensor = result.losses\n"
        "reveal_type(MCMC(NUTS(print), 10).get_samples())\n"
        "fit(torch.nn.Linear(1, 1), num_steps='three')\n"
    )
    environment = os.environ | {"MYPYPATH": str(ROOT)}
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--follow-imports=silent",
        f"--cache-dir={ROOT / '.mypy_cache'}",
        "--ignore-missing-imports",
        "user.py",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500, env=environment)
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert len(errors) == 1 and 'incompatible type "str"' in errors[0], done.stdout
    assert re.search(r"dict\[(builtins\.)?str, (torch\._tensor\.)?Tensor\]", done.stdout), done.stdout


def test_licences_of_all_dependencies_are_compatible() -> None:
    """Every declared dependency, and theirs, as far as they are installed."""
    pending = [re.split(r"[ <>=!~;\[]", r)[0] for r in PROJECT["dependencies"]]
    seen: set[str] = set()
    wrong = []
    while pending:
        name = pending.pop()
        key = re.sub(r"[-_.]+", "-", name).lower()
        if key in seen or key.startswith(("nvidia", "triton")):
            continue
        seen.add(key)
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        about = found.metadata
        text = " ".join(
            [
                about.get("License-Expression") or "",
                (about.get("License") or "")[:400],
                *(c for c in about.get_all("Classifier") or [] if "License" in c),
            ]
        )
        text += LOOKED_UP.get(key, "")
        if not PERMISSIVE.search(text):
            files = [f for f in found.files or [] if re.search(r"licen[cs]e|copying", f.name, re.IGNORECASE)]
            text = " ".join(Path(str(f.locate())).read_text(errors="ignore")[:400] for f in files)
            if (
                not PERMISSIVE.search(text)
                and "Permission is hereby granted" not in text
                and "Redistribution and use" not in text
            ):
                wrong.append(name)
        pending += [re.split(r"[ <>=!~;\[(]", r)[0] for r in found.requires or [] if "extra ==" not in r]
    assert len(seen) > 20 and not wrong, wrong


def test_citation_file_is_valid() -> None:
    """The required keys of CFF 1.2.0, the version of pyproject.toml, and authors with names."""
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["cff-version"] == "1.2.0" and citation["type"] in ("software", "dataset")
    assert citation["version"] == PROJECT["version"] and citation["license"] == PROJECT["license"]
    for holder in (citation, *citation["references"]):
        assert holder["authors"] and holder["title"]
        assert all("name" in a or {"family-names", "given-names"} <= a.keys() for a in holder["authors"])
    assert all({"type", "title", "authors", "year"} <= reference.keys() for reference in citation["references"])


def test_changelog_and_package_have_the_version() -> None:
    assert ppl_models.__version__ == PROJECT["version"]
    text = (ROOT / "CHANGELOG.md").read_text()
    assert f"## [{PROJECT['version']}]" in text


@pytest.mark.slow
def test_wheel_and_sdist_install_into_an_empty_environment(tmp_path: Path) -> None:
    """Built from a copy, installed with declared dependencies alone, and used; the heavy ones are lent from here.

    To install torch takes gigabytes; the new environment finds those dependencies (and no others) that are declared,
    and theirs, through links.
    """
    source = tmp_path / "source"
    run("git", "clone", "--quiet", "--depth", "1", f"file://{ROOT}", str(source))
    builder = tmp_path / "builder"
    venv.create(builder, with_pip=True)
    run(str(builder / "bin" / "pip"), "install", "--quiet", "build")
    run(str(builder / "bin" / "python"), "-m", "build", "--outdir", str(tmp_path / "dist"), str(source))
    names = {path.suffix for path in (tmp_path / "dist").iterdir()}
    assert names == {".whl", ".gz"}
    for number, package in enumerate(sorted((tmp_path / "dist").iterdir())):
        home = tmp_path / f"venv{number}"
        venv.create(home, with_pip=True)
        site = next((home / "lib").glob("python*")) / "site-packages"
        lend_declared(site)
        run(str(home / "bin" / "pip"), "install", "--quiet", "--no-deps", str(package), timeout=900)
        script = "import inference, ppl_models, sde; print(*ppl_models.__all__)"
        assert run(str(home / "bin" / "python"), "-c", script, cwd=tmp_path).split() == ppl_models.__all__
        installed = {p.name for p in site.iterdir()}
        assert not {"tests", "benchmarks", "tutorials", "docs"} & installed
        assert all((site / room / "py.typed").is_file() for room in ("inference", "ppl_models", "sde"))


def lend_declared(site: Path) -> None:
    """Links to the declared dependencies, and to theirs, from this environment; nothing else."""
    pending = [re.split(r"[ <>=!~;\[]", r)[0] for r in PROJECT["dependencies"]]
    seen: set[str] = set()
    while pending:
        name = re.sub(r"[-_.]+", "-", pending.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        tops = {Path(str(f)).parts[0] for f in found.files or [] if not str(f).startswith("..")}
        for top in tops - {"__pycache__"}:
            origin = Path(str(found.locate_file(top)))
            if origin.exists() and not (site / top).exists():
                (site / top).symlink_to(origin)
        for requirement in found.requires or []:
            if "extra ==" not in requirement:
                pending.append(re.split(r"[ <>=!~;\[(]", requirement)[0])


def test_every_module_of_the_rooms_has_a_docstring() -> None:
    missing = [
        str(path.relative_to(ROOT))
        for room in ("inference", "ppl_models", "sde")
        for path in (ROOT / room).rglob("*.py")
        if ast.get_docstring(ast.parse(path.read_text())) is None
    ]
    assert not missing, missing
