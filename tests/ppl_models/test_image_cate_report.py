"""The report is one file that loads nothing, runs nothing, and shows in a real browser."""

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ppl_models.image_cate.balance import balance, overlap
from ppl_models.image_cate.evaluation import evaluate
from ppl_models.image_cate.rate import rate
from ppl_models.image_cate.refute import Refutation
from ppl_models.image_cate.report import (
    Picture,
    ReportContents,
    Section,
    Table,
    balance_table,
    evaluation_tables,
    overlap_table,
    refutation_table,
    versions,
    write_report,
)

EVIL = '<script>alert("x")</script> & "quotes" <img src=x onerror=alert(1)>'
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """What a page holds, and whether every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.sources += [v for k, v in attrs if k in ("src", "href", "srcset", "action")]
        assert not any(k.startswith("on") for k, _ in attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def every_part() -> ReportContents:
    """A report of made-up numbers with every table and figure."""
    figures = pytest.importorskip("ppl_models.image_cate.figures")
    pytest.importorskip("matplotlib")
    rng = np.random.default_rng(0)
    site = np.repeat(np.arange(30), 4)
    effect = rng.normal(1, 1, 30)[site]
    scores = effect + rng.normal(size=120)
    t, e, x = (np.arange(120) % 2).astype(float), rng.uniform(0.3, 0.7, 120), rng.normal(size=(120, 2))
    probs = np.eye(2)[(effect > 1).astype(int)]
    evaluation = evaluate(scores, effect, probs, site, num_permutations=19)
    found = rate(scores, effect, groups=site)
    attempt = Refutation("subset", True, "moves little", evaluation.ate, found, (evaluation.ate,), (found,), (0.9,))
    table = balance(t, x, e, ["age", EVIL])
    images = rng.normal(size=(3, 3, 8, 8))
    items = [
        "Plain words.",
        overlap_table(overlap(t, e)),
        balance_table(table),
        *evaluation_tables(evaluation, ["low", EVIL]),
        refutation_table([attempt]),
        Picture(figures.toc_figure(found), "Targeting curve"),
        Picture(figures.overlap_figure(t, e), "Overlap"),
        Picture(figures.balance_figure(table), "Balance"),
        Picture(figures.effects_figure(["low", "high"], evaluation.gate.estimates, [0.1, 0.2], 1.0), "Types"),
        Picture(figures.salience_figure(images, images, ["a", "b", "c"]), "Salience"),
        Picture(
            figures.map_figure(rng.uniform(30, 32, (20, 2)), rng.normal(size=20), "effect", np.arange(20) > 4), "Map"
        ),
        Picture(figures.history_figure({"fold 1": torch.linspace(3, 1, 50), "fold 2": [3.0, 2.0, 1.5]}), EVIL),
    ]
    return ReportContents(
        title=f"A study {EVIL}",
        summary=["Effects differ.", EVIL],
        warnings=["7 rows were dropped.", EVIL],
        sections=[Section(EVIL, items)],
        settings={"objective": "gated", EVIL: EVIL},
        seeds={"fit": 3},
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, every_part())
    return path


def test_it_is_well_formed_and_self_contained(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    parsed = Page(text)
    assert parsed.open == []
    assert len(parsed.sources) == 7 and all(s.startswith("data:image/png;base64,") for s in parsed.sources)
    assert not {"script", "iframe", "object", "link", "form"} & set(parsed.tags)
    assert not re.search(r"https?://|url\(|@import", text)
    assert "default-src 'none'" in text


def test_every_text_is_escaped_and_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text and "<img src=x" not in text
    # Title twice, summary, warning, heading, covariate, type, a figure's caption, a setting and its value.
    assert Page(text).text.count(EVIL) == 10
    words = Page(text).text
    for expected in (
        "Plain words.",
        "gated",
        "7 rows were dropped.",
        "Seeds",
        version("torch"),
        "Average effect (AIPW)",
    ):
        assert expected in words


def test_the_same_contents_give_the_same_bytes(page: Path, tmp_path: Path) -> None:
    write_report(tmp_path / "again.html", every_part())
    assert (tmp_path / "again.html").read_bytes() == page.read_bytes()


def test_cells(tmp_path: Path) -> None:
    table = Table("t", ("a", "b", "c"), [(1.23456, float("nan"), "x"), (-1e-9, torch.tensor(2.5), True), (3, 4, None)])
    write_report(tmp_path / "r.html", ReportContents("t", sections=[Section("s", [table])]))
    words = Page((tmp_path / "r.html").read_text()).text
    for cell in ("1.235", "–", "−1e−09", "2.5", "True", "3", "None"):
        assert cell in words


def test_versions_are_those_of_this_python() -> None:
    found = versions()
    assert found["python"] == ".".join(map(str, sys.version_info[:3])) and "torch" in found


def test_a_page_without_figures_needs_no_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write_report(tmp_path / "r.html", ReportContents("t", summary=["one"]))
    figures = pytest.importorskip("ppl_models.image_cate.figures")
    with pytest.raises(ImportError, match=r"pip install 'ppl-models\[plots\]'"):
        figures.history_figure({"a": [1.0, 2.0]})


def test_a_failed_write_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.html"
    path.write_text("old")

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space"):
        write_report(path, ReportContents("new"))
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["r.html"]
    with pytest.raises(FileNotFoundError):
        write_report(tmp_path / "nowhere" / "r.html", ReportContents("new"))


def test_bad_input(tmp_path: Path) -> None:
    path = tmp_path / "r.html"
    for section, error, message in [
        (Section("s", [Table("t", ("a", "b"), [(1,)])]), ValueError, "has 2 columns, and a row of 1 cells"),
        (Section("s", [3.0]), TypeError, "must be a text, a Table or a Picture, got float"),  # type: ignore[list-item]
        (Section("s", [Picture(b"GIF89a", "x")]), TypeError, "must be a PNG file"),
        (Section("s", [Picture("plot.png", "x")]), TypeError, "a matplotlib figure or the bytes"),
    ]:
        with pytest.raises(error, match=message):
            write_report(path, ReportContents("t", sections=[section]))
    with pytest.raises(TypeError, match="contents must be a ReportContents, got dict"):
        write_report(path, {"title": "t"})  # type: ignore[arg-type]
    assert not path.exists()
    figures = pytest.importorskip("ppl_models.image_cate.figures")
    with pytest.raises(ValueError, match=r"lon_lat must have shape \(3, 2\)"):
        figures.map_figure(np.ones((2, 2)), np.ones(3))
    with pytest.raises(ValueError, match="one shape"):
        figures.salience_figure(np.ones((2, 3, 4, 4)), np.ones((2, 1, 4, 4)))


def test_a_real_browser_shows_it(page: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"]
    shot = tmp_path / "shot.png"
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1000,1600", f"--screenshot={shot}"]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, timeout=120, check=False)
    if not shot.is_file():
        pytest.skip(f"Chromium does not run here: {done.stderr[-300:].decode(errors='replace')}")
    image = pytest.importorskip("matplotlib.image").imread(shot)
    assert image.shape[:2] == (1600, 1000)
    colours = np.unique((image[..., :3] * 255).round().astype(int).reshape(-1, 3), axis=0)
    assert len(colours) > 100  # text and figures, not a blank page
