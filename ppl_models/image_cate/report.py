"""One self-contained HTML page of a study: nothing is loaded from elsewhere, nothing in it runs.

Figures are embedded as pictures, and every text is escaped.  The same contents give the same bytes.
"""

import base64
import html
import io
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from torch import Tensor

from ppl_models.image_cate.balance import Balance, Overlap
from ppl_models.image_cate.evaluation import Evaluation
from ppl_models.image_cate.least_squares import Estimate
from ppl_models.image_cate.rate import Rate
from ppl_models.image_cate.refute import Refutation

__all__ = [
    "Picture",
    "ReportContents",
    "Section",
    "Table",
    "balance_table",
    "evaluation_tables",
    "overlap_table",
    "refutation_table",
    "versions",
    "write_report",
]

_PACKAGES = ("ppl-models", "torch", "pyro-ppl", "numpy", "arviz", "matplotlib")


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        caption: what it shows.
        header: names of the columns.
        rows: of texts and numbers; numbers get four digits, NaN a dash.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Picture:
    """A figure.

    Attributes:
        figure: a matplotlib figure, or the bytes of a PNG file.
        caption: what it shows; also what is read out in its place.
    """

    figure: Any
    caption: str


@dataclass(frozen=True)
class Section:
    """A titled part of the page.

    Attributes:
        title: its heading.
        items: paragraphs (texts), tables and pictures, in order.
    """

    title: str
    items: Sequence[str | Table | Picture]


@dataclass(frozen=True)
class ReportContents:
    """What ``write_report`` writes.

    Attributes:
        title: of the page.
        summary: the findings, one sentence each.
        warnings: what the reader must know before believing them.
        sections: tables, maps, salience, diagnostics.
        settings: what was asked for, by name.
        seeds: by name.
    """

    title: str
    summary: Sequence[str] = ()
    warnings: Sequence[str] = ()
    sections: Sequence[Section] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    seeds: Mapping[str, int] = field(default_factory=dict)


def write_report(path: str | Path, contents: ReportContents) -> None:
    """Write the page; whole or not at all.

    Args:
        path: of the file, ``.html``.
        contents: what it holds.

    Raises:
        TypeError: contents of another kind, or an item that is neither text, table nor picture.
        ValueError: a row of a table with another number of cells than its header.
        OSError: the file cannot be written; what stood there before is untouched.
    """
    if not isinstance(contents, ReportContents):
        raise TypeError(f"contents must be a ReportContents, got {type(contents).__name__}")
    target = Path(path)
    page = _page(contents)
    with NamedTemporaryFile("w", encoding="utf-8", dir=target.parent, suffix=".html", delete=False) as file:
        try:
            file.write(page)
            file.close()
            os.chmod(file.name, 0o644)
            os.replace(file.name, target)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a study stands on; absent ones are left out."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def evaluation_tables(evaluation: Evaluation, names: Sequence[str] | None = None) -> tuple[Table, Table]:
    """Tables of an evaluation: of the whole, and of the types.

    Args:
        evaluation: of ``evaluate``.
        names: of the K types; None numbers them.
    """
    shown: list[tuple[str, Estimate | Rate]] = [
        ("Average effect (AIPW)", evaluation.ate),
        ("AUTOC of the predicted effect", evaluation.autoc),
        ("QINI of the predicted effect", evaluation.qini),
        ("Calibration: mean (1 is right)", evaluation.calibration.mean),
        ("Calibration: heterogeneity (1 is right, 0 is none)", evaluation.calibration.heterogeneity),
        ("Value of treating where the predicted effect is positive", evaluation.policy.value),
        ("The same against treating everybody", evaluation.policy.over_all),
    ]
    whole = Table(
        f"Evaluation on {evaluation.num_units} units in {evaluation.num_groups} groups; errors are by group. "
        f"Permutation p-value of the AUTOC: {evaluation.permutation_p_value:.3g}.",
        ("quantity", "estimate", "standard error", "ratio"),
        [(name, item.estimate, item.standard_error, item.ratio) for name, item in shown],
    )
    gate = evaluation.gate
    labels = names if names is not None else [f"type {k + 1}" for k in range(len(gate.estimates))]
    rows = [
        (label, effect, error, share, size)
        for label, effect, error, share, size in zip(
            labels,
            gate.estimates.tolist(),
            gate.standard_errors.tolist(),
            gate.shares.tolist(),
            gate.num_units.tolist(),
            strict=True,
        )
    ]
    types = Table(
        "Effect by image type, from doubly robust scores weighted by membership; errors are by group.",
        ("type", "effect", "standard error", "share", "units"),
        rows,
    )
    return whole, types


def overlap_table(found: Overlap) -> Table:
    """Propensities by arm."""
    header = ("arm", "units", "effective", "least", "5 %", "25 %", "median", "75 %", "95 %", "largest")
    rows = [
        (name, int(found.num_units[arm]), float(found.effective_sizes[arm]), *found.quantiles[arm].tolist())
        for arm, name in enumerate(("control", "treated"))
    ]
    return Table(
        f"Propensity by arm; {100 * found.share_outside:.2g} % of units lie outside the range that both arms cover.",
        header,
        rows,
    )


def balance_table(found: Balance) -> Table:
    """Covariates by arm."""
    rows = [
        (
            name,
            *found.means[j].tolist(),
            float(found.differences[j]),
            float(found.weighted_differences[j]),
            float(found.variance_ratios[j]),
        )
        for j, name in enumerate(found.names)
    ]
    return Table(
        "Covariates by arm; differences are standardised, the weighted one by the inverse propensity.",
        ("covariate", "mean, control", "mean, treated", "difference", "weighted", "variance ratio"),
        rows,
    )


def refutation_table(found: Sequence[Refutation]) -> Table:
    """Attempts to refute, one row each; of R repeats the mean is shown."""
    rows = [
        (
            r.method.replace("_", " "),
            len(r.ates),
            sum(a.estimate for a in r.ates) / len(r.ates),
            sum(q.ratio for q in r.rates) / len(r.rates),
            sum(r.correlations) / len(r.correlations),
            r.criterion,
            "stands" if r.passed else "REFUTED",
        )
        for r in found
    ]
    header = ("attempt", "repeats", "average effect", "QINI ratio", "correlation of effects", "must hold", "finding")
    return Table("Attempts to refute the finding.", header, rows)


_STYLE = """
:root{color-scheme:light}
body{margin:0;background:#f6f7f9;color:#1b1f24;font:16px/1.55 system-ui,"Liberation Sans",Arial,sans-serif}
main{max-width:60rem;margin:0 auto;padding:1.25rem 1rem 3rem}
h1{font-size:1.7rem;line-height:1.25;margin:.5rem 0 1rem}
h2{font-size:1.2rem;margin:0 0 .6rem}
section{background:#fff;border:1px solid #dfe3e8;border-radius:8px;padding:1rem 1.1rem;margin:0 0 1rem}
section.warnings{border-left:5px solid #b45309;background:#fffaf0}
ul{margin:.2rem 0;padding-left:1.2rem}
li,p,figcaption{overflow-wrap:anywhere}
.scroll{overflow-x:auto;margin:.6rem 0 1rem}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
p.caption{color:#4b5560;margin:.8rem 0 .2rem;font-size:.9rem}
th,td{max-width:26rem;min-width:4.2rem;padding:.35rem .6rem;overflow-wrap:break-word;text-align:left}
th,td{border-bottom:1px solid #e6e9ed;vertical-align:top}
td.number,th.number{text-align:right;white-space:nowrap}
td.wide{min-width:11rem}
thead th{border-bottom:2px solid #b8c0c9}
figure{margin:.6rem 0 1rem}
img{width:auto;min-width:26rem;max-width:max(100%,26rem);height:auto;display:block}
figcaption{color:#4b5560;font-size:.9rem;margin-top:.3rem}
"""


def _page(contents: ReportContents) -> str:
    title = html.escape(contents.title)
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">",
        f"<title>{title}</title><style>{_STYLE}</style></head><body><main>",
        f"<h1>{title}</h1>",
    ]
    if contents.summary:
        parts.append(f"<section><h2>Findings</h2>{_list(contents.summary)}</section>")
    if contents.warnings:
        parts.append(f'<section class="warnings"><h2>Warnings</h2>{_list(contents.warnings)}</section>')
    parts += [_section(section) for section in contents.sections]
    record = [
        Table("Settings", ("setting", "value"), [(k, str(v)) for k, v in contents.settings.items()]),
        Table("Seeds", ("stream", "seed"), [(k, str(v)) for k, v in contents.seeds.items()]),
        Table("Versions", ("package", "version"), list(versions().items())),
    ]
    parts.append(_section(Section("How this was made", [table for table in record if table.rows])))
    parts.append("</main></body></html>\n")
    return "\n".join(parts)


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(str(line))}</li>" for line in lines) + "</ul>"


def _section(section: Section) -> str:
    return f"<section><h2>{html.escape(section.title)}</h2>{''.join(map(_item, section.items))}</section>"


def _item(item: str | Table | Picture) -> str:
    if isinstance(item, str):
        return f"<p>{html.escape(item)}</p>"
    if isinstance(item, Table):
        return _table(item)
    if isinstance(item, Picture):
        caption = html.escape(item.caption)
        data = base64.b64encode(_png(item.figure)).decode()
        return (
            f'<figure><div class="scroll"><img src="data:image/png;base64,{data}" alt="{caption}"></div>'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    raise TypeError(f"an item of a section must be a text, a Table or a Picture, got {type(item).__name__}")


def _table(table: Table) -> str:
    width = len(table.header)
    for row in table.rows:
        if len(row) != width:
            raise ValueError(f"table {table.caption!r} has {width} columns, and a row of {len(row)} cells")
    numeric = [bool(table.rows) and all(_is_number(row[j]) for row in table.rows) for j in range(width)]
    wide = [any(len(str(row[j])) > 30 for row in table.rows) for j in range(width)]
    mark = [' class="number"' if n else ' class="wide"' if w else "" for n, w in zip(numeric, wide, strict=True)]
    head = "".join(f'<th scope="col"{m}>{html.escape(str(h))}</th>' for h, m in zip(table.header, mark, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{m}>{html.escape(_cell(v))}</td>" for v, m in zip(row, mark, strict=True)) + "</tr>"
        for row in table.rows
    )
    return (
        f'<p class="caption">{html.escape(table.caption)}</p>'
        f'<div class="scroll"><table aria-label="{html.escape(table.caption)}">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cell(value: Any) -> str:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if not _is_number(value):
        return str(value)
    if isinstance(value, int):
        return str(value)
    if math.isnan(value):
        return "–"
    return f"{value:.4g}".replace("-", "−")


def _png(figure: Any) -> bytes:
    if isinstance(figure, bytes):
        if not figure.startswith(b"\x89PNG\r\n\x1a\n"):
            raise TypeError("a picture given as bytes must be a PNG file")
        return figure
    if not hasattr(figure, "savefig"):
        raise TypeError(f"a picture must be a matplotlib figure or the bytes of a PNG, got {type(figure).__name__}")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()
