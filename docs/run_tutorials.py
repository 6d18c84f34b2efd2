"""Run the tutorials in full and keep what they printed and drew, for the site.

    make tutorials

A tutorial that has not changed since it was run is not run again.
"""

import base64
import hashlib
import os
import sys
import time
from pathlib import Path
from typing import Any

import jupytext
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
RUN = ROOT / "build" / "tutorials"


def outputs(cell: Any, prefix: str) -> list[str]:
    """What a cell printed, as text, and what it drew, as files."""
    found = []
    for number, output in enumerate(cell.outputs):
        data = output.get("data", {})
        if "image/png" in data:
            name = f"{prefix}-{number}.png"
            (RUN / name).write_bytes(base64.b64decode(data["image/png"]))
            found.append(f"![figure]({name})")
            continue
        text = output.get("text") if output.output_type == "stream" else data.get("text/plain")
        if text and output.get("name") != "stderr":
            found.append(f"```text\n{text.rstrip()}\n```")
    return found


def run(path: Path) -> None:
    """Execute one tutorial, unless its text has not changed."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    target = RUN / f"{path.stem}-{digest}.md"
    if target.is_file():
        print(f"{path.name}: as it was run")
        return
    for old in RUN.glob(f"{path.stem}-*"):
        old.unlink()
    start = time.perf_counter()
    notebook = jupytext.read(path)
    NotebookClient(notebook, timeout=3600, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    parts = []
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts += [f"```python\n{cell.source}\n```", *outputs(cell, f"{path.stem}-{digest}-{number}")]
    target.write_text("\n\n".join(parts) + "\n")
    print(f"{path.name}: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    RUN.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONPATH"] = str(ROOT)
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    for name in sys.argv[1:] or sorted(p.stem for p in (ROOT / "tutorials").glob("*.py")):
        run(ROOT / "tutorials" / f"{name}.py")
