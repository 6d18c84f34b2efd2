"""The site builds without a warning, links to nothing that is missing, and its code runs."""

import ast
import importlib
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import ppl_models
from ppl_models.base import Model
from tests.test_readme import shortened

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [DOCS / "index.md", *sorted((DOCS / "how-to").glob("*.md")), *sorted((DOCS / "models").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)  # blocks marked `py` are not run


class _Page(HTMLParser):
    """Links, pictures and anchors of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.anchors.update(v for v in (values.get("id"), values.get("name")) if v)
        self.targets += [v for v in (values.get("href"), values.get("src")) if v]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in ("mkdocs", "mkdocstrings", "jupytext", "latex2mathml"):
        pytest.importorskip(name)
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    return folder


def test_no_link_is_broken_and_no_picture_missing(site: Path) -> None:
    pages = {path: _Page(path) for path in site.rglob("*.html") if path.name != "404.html"}
    assert len(pages) > 20
    broken = []
    for path, page in pages.items():
        for target in page.targets:
            url = urlsplit(target)
            if url.scheme or url.netloc or target.startswith("data:"):
                continue
            there = path if not url.path else (path.parent / unquote(url.path)).resolve()
            if not there.exists() or (url.fragment and there in pages and url.fragment not in pages[there].anchors):
                broken.append(f"{path.relative_to(site)}: {target}")
    assert not broken, broken


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    text = (site / "index.html").read_text()
    assert not re.findall(r"""(?:src|<link[^>]*href)=["']https?://(?!127)[^"']+\.(?:js|css|woff2?)""", text)


def test_links_of_the_pages_hold_in_the_repository_too() -> None:
    """The pages are read there as well, without the site."""
    broken = []
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")):
        for target in re.findall(r"\]\((?!https?:|#)([^)\s#]+)[^)]*\)", page.read_text()):
            if not (page.parent / target).exists() and not target.startswith(("../api/", "api/")):
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert not broken, broken


def test_three_clicks_from_the_readme_to_an_equation_in_code(site: Path) -> None:
    """README -> the model's page -> the file; and every package says which paper it is."""
    readme = (ROOT / "README.md").read_text()
    for page in sorted((DOCS / "models").glob("*.md")):
        assert f"](docs/models/{page.name})" in readme, page.name
        _, table = page.read_text().split("## Equations in code")
        files = re.findall(r"\]\(\.\./\.\./([^)]+\.py)\)", table.split("\n## ")[0])
        assert len(files) >= 5, page.name
        assert all((site / "source" / file).with_suffix(".html").is_file() for file in files), files
        about = ast.get_docstring(ast.parse((ROOT / "ppl_models" / page.stem / "__init__.py").read_text())) or ""
        assert re.search(r"arXiv|OpenReview", about) and f"docs/models/{page.name}" in about, about


def test_every_model_has_a_page_and_every_public_name_an_entry(site: Path) -> None:
    models = {n for n in ppl_models.__all__ if isinstance(v := getattr(ppl_models, n), type) and issubclass(v, Model)}
    text = "".join(path.read_text() for path in (DOCS / "models").glob("*.md"))
    assert models <= set(re.findall(r"\b[A-Z]\w+\b", text)), "a page in docs/models must name each public model"
    anchors = set().union(*(_Page(path).anchors for path in (site / "api").glob("*.html")))
    packages = {".".join(path.stem.split(".")) for path in (site / "api").glob("*.html")}
    assert {"ppl_models", "inference", "sde"} < packages and len(packages) >= 10, packages
    for package in packages:
        # An entry of the package or of one below it, or of the module of the function's own name.
        homes = [other for other in packages if f"{other}.".startswith(f"{package}.")]
        for name in importlib.import_module(package).__all__:
            entries = {f"{home}.{name}" for home in homes} | {f"{package}.{name}.{name}"}
            assert entries & anchors, f"{package}.{name} has no entry"


def test_the_code_of_the_pages_runs() -> None:
    """All in one process, each page in a namespace of its own."""
    public = set(ppl_models.__all__)
    runs = []
    for page in PAGES:
        text = page.read_text()
        model = re.search(r"^model: (\w+)$", text, re.MULTILINE)
        if model is None or model[1] in public:
            runs.append((page.name, shortened("\n".join(BLOCK.findall(text)))))
    script = "\n".join(
        ["import warnings", "warnings.simplefilter('ignore')"]
        + [f"print({name!r}, flush=True)\nexec({code!r}, {{'__name__': 'page'}})" for name, code in runs if code]
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=500)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr
