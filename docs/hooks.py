"""What the site makes of the repository: API pages, tutorials, results, and mathematics without JavaScript.

Every public name has its entry, because the pages are made from ``__all__``.  A model's page in ``models/`` is shown
if the class that its first lines name is public.  A tutorial is shown with what it printed and drew if ``make
tutorials`` has run it as it stands, and as its text and code otherwise.  Links are written as they hold in the
repository; here those to tutorials, to the pages at its root and to code lead to pages of the site, and a file of code
that is linked to has one.
"""

import ast
import hashlib
import posixpath
import re
from pathlib import Path
from typing import Any

import jupytext
from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
RUN = ROOT / "build" / "tutorials"
HOWTO = [
    "choose-an-engine",
    "minibatches",
    "many-chains",
    "resume",
    "several-machines",
    "gpu",
    "missing-data",
    "posterior-predictive",
    "embed-in-a-model",
    "causal-study",
    "check-and-cite",
]
PACKAGES = {  # beside the models' own
    "ppl_models": "Models",
    "inference": "Engines",
    "inference.kernels": "Kernels",
    "inference.potential": "Potentials",
    "sde": "Paths",
}
LINKS = {  # of pages that stand at the root of the repository
    "benchmarks/RESULTS.md": "benchmarks.md",
    "benchmarks/FINDINGS.md": "findings.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}


_LINK = re.compile(r"(?<=\]\()([^)\s#:]+\.(?:py|md|png))(?=[)#])")


def public_names(package: str) -> list[str]:
    """``__all__`` of a package, read and not run."""
    tree = ast.parse((ROOT / package.replace(".", "/") / "__init__.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return [str(name) for name in ast.literal_eval(node.value)]
    return []


def packages() -> dict[str, str]:
    """The packages that have an API page: those of the engines, and every model's own."""
    own = {f"ppl_models.{p.parent.name}": p.parent.name for p in sorted((ROOT / "ppl_models").glob("*/__init__.py"))}
    ordered = {"ppl_models": PACKAGES["ppl_models"], **own, **PACKAGES}
    return {name: title for name, title in ordered.items() if public_names(name)}


def api_page(package: str, title: str) -> str:
    """An entry a public name; those that a page of a smaller package holds are left to it."""
    names = public_names(package)
    smaller = {n for p in packages() if p.startswith(f"{package}.") for n in public_names(p)}
    folder = ROOT / package.replace(".", "/")
    # A function in a module of its own name is found there; its plain name is the module's.
    paths = {n: f"{package}.{n}.{n}" if (folder / f"{n}.py").is_file() else f"{package}.{n}" for n in names}
    entries = [f"::: {paths[name]}\n" for name in sorted(set(names) - smaller, key=str.lower)]
    below = [p for p in packages() if p.startswith(f"{package}.")]
    listed = ", ".join(
        f"[`{n}`][{next(p for p in below if n in public_names(p))}.{n}]" for n in sorted(set(names) & smaller)
    )
    more = f"\nAlso exported here: {listed}.\n" if listed else ""
    return f"# `{package}`\n{more}\n" + "\n".join(entries)


def model_pages() -> dict[str, str]:
    """File name to class of the pages whose class is public."""
    public = set(public_names("ppl_models"))
    found = {}
    for page in sorted((ROOT / "docs" / "models").glob("*.md")):
        name = re.search(r"^model: (\w+)$", page.read_text(), re.MULTILINE)
        if name and name[1] in public:
            found[page.name] = name[1]
    return found


def title_of(text: str) -> str:
    """The first heading."""
    return next(line[2:] for line in text.splitlines() if line.startswith("# "))


def tutorial_page(path: Path) -> str:
    """Text and code of a tutorial, with what it printed and drew if it has been run."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    run = RUN / f"{path.stem}-{digest}.md"
    if run.is_file():
        return run.read_text()
    parts = []
    for cell in jupytext.read(path).cells:
        parts.append(cell.source if cell.cell_type == "markdown" else f"```python\n{cell.source}\n```")
    note = (
        f"!!! note\n    This build shows the code only. `make tutorials` runs it; `python tutorials/{path.name}` too."
    )
    return "\n\n".join([parts[0], note, *parts[1:]])


def place(uri: str) -> str:
    """Where a page of the site stands in the repository."""
    if uri.startswith("tutorials/"):
        return uri.removesuffix(".md") + ".py"
    return next((source for source, page in LINKS.items() if page == uri), f"docs/{uri}")


def linked(uri: str, target: str) -> str:
    """The file of the repository that a link of a page means."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(place(uri)), target))


def page_of(file: str) -> str | None:
    """The page of the site that a file of the repository has, if any."""
    if file in LINKS:
        return LINKS[file]
    if file.startswith("docs/"):
        return file.removeprefix("docs/")
    if not file.endswith(".py"):
        return None
    if file.startswith("tutorials/"):
        return file.removesuffix(".py") + ".md"
    return f"source/{file.removesuffix('.py')}.md" if (ROOT / file).is_file() else None


def linked_code() -> list[str]:
    """The files of code that pages link to."""
    found = set()
    for page in (ROOT / "docs").rglob("*.md"):
        uri = page.relative_to(ROOT / "docs").as_posix()
        found |= {linked(uri, target) for target in _LINK.findall(page.read_text()) if target.endswith(".py")}
    return sorted(file for file in found if (page_of(file) or "").startswith("source/"))


def source_page(file: str) -> str:
    """A file of code as a page."""
    code = (ROOT / file).read_text()
    return f"---\nsearch:\n  exclude: true\n---\n\n# `{file}`\n\n````python\n{code}````\n"


def on_config(config: Any) -> Any:
    """The table of contents."""
    stems = {p.stem for p in (ROOT / "tutorials").glob("*.py")}  # samplers, one a model, those of several models
    order = sorted(stems, key=lambda stem: (stem.startswith("cross_"), stem != "samplers", stem))
    tutorials = [f"tutorials/{stem}.md" for stem in order]
    config.nav = [
        {"Home": "index.md"},
        {"Models": [f"models/{page}" for page in model_pages()]},
        {"Tutorials": tutorials},
        {"How to": [f"how-to/{name}.md" for name in HOWTO]},
        {"Gotchas": "gotchas.md"},
        {"Benchmarks": ["benchmarks.md", "findings.md"]},
        {"API": [{title: f"api/{name}.md"} for name, title in packages().items()]},
        {"Project": ["contributing.md", "changelog.md"]},
    ]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are made, and takes out those of models that are not there."""
    shown = model_pages()
    for file in list(files):
        if file.src_uri.startswith("models/") and file.name + ".md" not in shown:
            files.remove(file)
    made = {f"api/{name}.md": api_page(name, title) for name, title in packages().items()}
    made |= {f"tutorials/{p.stem}.md": tutorial_page(p) for p in sorted((ROOT / "tutorials").glob("*.py"))}
    made |= {page: (ROOT / source).read_text() for source, page in LINKS.items()}
    made |= {str(page_of(file)): source_page(file) for file in linked_code()}
    for uri, text in made.items():
        files.append(File.generated(config, uri, content=text))
    for picture in sorted(RUN.glob("*.png")):
        files.append(File.generated(config, f"tutorials/{picture.name}", abs_src_path=str(picture)))
    return files


_CODE = re.compile(r"(^(`{3,}).*?^\2`*$|`[^`\n]+`)", re.DOTALL | re.MULTILINE)
_MATHS = re.compile(r"\$\$(.+?)\$\$|(?<![\w$])\$(\S(?:[^$\n]*?\S)?)\$(?![\w$])", re.DOTALL)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Mathematics to MathML, and links of the repository to pages."""
    uri = page.file.src_uri

    def site_link(match: re.Match[str]) -> str:
        target = page_of(linked(uri, match[1]))
        return match[1] if target is None else posixpath.relpath(target, posixpath.dirname(uri) or ".")

    if uri.startswith("source/"):
        return markdown
    out, end = [], 0
    for code in _CODE.finditer(markdown):
        out += [_MATHS.sub(_mathml, markdown[end : code.start()]), code[0]]
        end = code.end()
    text = "".join([*out, _MATHS.sub(_mathml, markdown[end:])])
    return _LINK.sub(site_link, text)


def _mathml(match: re.Match[str]) -> str:
    display = match[1] is not None
    return convert(match[1] or match[2], display="block" if display else "inline")
